"""What a measure accepts: matrices whose rows are images, and the sentences for those it cannot use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALLEST_N = 4
_AT_MOST_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)


class NotComputable(ValueError):
    """One side does not allow this measure (constant, too few rows or features); the message says why."""


class FewImages(UserWarning):
    """So few images that a measure is large (or small) by construction."""


def as_matrix(X, side: str = "X", dtype: torch.dtype | None = torch.float64) -> Tensor:
    """(n, p) tensor of `dtype` on its own device; refuses what no measure can use, naming the side.

    dtype=None keeps float32 and float64 as they are, and makes halfs float32: measures that count dimensions need to
    know how coarsely the features were rounded.
    """
    X = as_tensor(X, side)
    if X.ndim != 2:
        raise ValueError(f"{side} must be (n images, p features), got shape {tuple(X.shape)}; pool or flatten it first")
    if len(X) < SMALLEST_N:
        raise NotComputable(f"{side} has {len(X)} rows; at least {SMALLEST_N} images are needed")
    rounding = relative_rounding(X)  # before X is converted
    X = X.to(dtype or (torch.float64 if X.dtype not in _AT_MOST_FLOAT32 else torch.float32))
    if X.shape[1] == 0:
        raise NotComputable(f"{side} is constant: every image has the same features, so nothing can be compared")
    low, high = X.amin(0), X.amax(0)  # NaN and infinity show in them (aminmax over columns is ten times slower)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise NotComputable(f"{side} holds NaN or infinite values; look for the layer that overflows")
    if _is_constant(X[0], low, high, 32 * rounding):
        raise NotComputable(f"{side} is constant: every image has the same features, so nothing can be compared")
    return X


def relative_rounding(X: Tensor) -> float:
    """Rounding of the features as a share of their size; integers have none.

    Half precision is judged by float32's: its own would call features constant that vary by a few percent.
    """
    return min(torch.finfo(X.dtype).eps, torch.finfo(torch.float32).eps) if X.is_floating_point() else 0.0


def _is_constant(first: Tensor, low: Tensor, high: Tensor, tolerance: float) -> bool:
    """Whether no feature varies over images by more than rounding: `tolerance` × its size, or a typical feature's.

    Matrix products round a row differently by its place in the batch, so a site that sees no image is not constant
    to the last bit.
    """
    size = torch.maximum(torch.maximum(low.abs(), high.abs()), first.abs().median())
    return bool((high - low <= tolerance * size).all())


def as_tensor(X, side: str) -> Tensor:
    """Numbers of any layout and library as a tensor without gradient."""
    if not isinstance(X, Tensor):
        try:
            X = np.asarray(X)
        except ValueError as reason:
            raise ValueError(f"{side} is not a matrix: its rows differ in length") from reason
        if X.dtype.kind in "biuf":
            kept = X.dtype if X.dtype in (np.float16, np.float32) else np.float64
            X = torch.as_tensor(np.require(X, kept, ["C", "W"]))  # torch takes no negative strides
    if not isinstance(X, Tensor) or X.is_complex():
        raise ValueError(f"{side} holds {X.dtype} values; give real numbers")
    return X.detach()


def both_sides(X, Y) -> tuple[Tensor, Tensor]:
    """X (n, p) and Y (n, q) as matrices of the same rows in their own precision, on X's device."""
    X, Y = as_tensor(X, "X"), as_tensor(Y, "Y")
    if X.ndim == Y.ndim == 2 and len(X) != len(Y):
        raise ValueError(f"X has {len(X)} rows and Y has {len(Y)}; rows must be the same images in the same order")
    return as_matrix(X, "X", None), as_matrix(Y.to(X.device), "Y", None)


def centered(X: Tensor) -> Tensor:
    """X without its column means; the second pass removes what rounding left when means are far from zero."""
    X = X - X.mean(0)
    return X.sub_(X.mean(0))
