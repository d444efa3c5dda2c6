"""For each image, whether two sites agree on it: do they find the same other images similar to it?

The agreement of image i is the cosine of its rows in the two sites' U-centred Gram matrices of linear kernels, that is
of its similarities to all other images. Their products, before division by the rows' norms, sum to debiased linear CKA,
so this tells which images a CKA comes from. It is descriptive: rows share images, so no test may treat them as
independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from similarity.inputs import as_matrix, centered
from similarity.kernels import equally_similar, u_center
from similarity.plane import match_rows, rows_an_image
from similarity.recording import Recording


def agreement(A: Recording, site_a: str, B: Recording, site_b: str) -> pd.Series:
    """Cosine in [−1, 1] of every image's rows in U(XXᵀ) and U(YYᵀ): a Series by id, in A's order.

    0 on average where the sides are independent, 1 where they are alike up to rotation, scale and shift. NaN for an
    image that is, to rounding, equally similar to all others at one site (its row's norm is at most 1e-12 of the whole
    Gram matrix's): it has no row to compare. Raises NotComputable for a constant site.
    """
    B = match_rows(A, B)
    for recording in (A, B):
        if rows_an_image(recording) != 1:
            raise ValueError(f"policy {recording.policy!r} has several rows an image; record with 'gap' or 'flat:g'")
    x, y = _unit_rows(A[site_a], site_a), _unit_rows(B[site_b], site_b)
    return pd.Series((x * y.to(x.device)).sum(1).cpu().numpy(), pd.Index(A.ids, name="id"), name="agreement")


def mean_agreement(A: Recording, B: Recording, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Columns id, agreement: the mean over pairs (site of A, site of B), NaN where one of them is."""
    if not pairs:
        raise ValueError("no pair of sites was given; give [(site of A, site of B), …]")
    each = pd.concat([agreement(A, a, B, b) for a, b in pairs], axis=1)
    return each.mean(axis=1, skipna=False).rename("agreement").reset_index()


def _unit_rows(X: Tensor, side: str) -> Tensor:
    """Rows of U(XXᵀ) with norm 1, (n, n) float64; NaN where there is nothing but rounding."""
    X = centered(as_matrix(X, side))  # changes nothing but the size of the products
    K = X @ X.T
    rows = u_center(K)
    norms, rounding = torch.linalg.vector_norm(rows, dim=1), 1e-12 * torch.linalg.matrix_norm(K)
    if torch.linalg.matrix_norm(rows) <= rounding:
        raise equally_similar(side)
    return rows / torch.where(norms > rounding, norms, torch.nan)[:, None]
