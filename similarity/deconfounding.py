"""Similarity with the kernels of confounds regressed out: what two models share beyond what some controls explain.

In the Hilbert space of U-centred Gram matrices debiased CKA is a cosine, so the Grams of the controls can be regressed
out of both sides with nothing but CKA values (Székely & Rizzo 2014, partial distance correlation; Cui et al. 2022,
Deconfounded Representation Similarity, who regress uncentred kernels). A control is removed as a kernel: what of it
another kernel sees, such as a curved function of it, stays. So do products of a control with what is a side's own:
they average to 0 but make what is left vary more than permuted images would, so it has no permutation null; read its
interval. Not for measures that are no cosine of Gram matrices.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from similarity.measures import with_defaults
from similarity.plane import Plane, plane
from similarity.recording import Recording

COSINES = ("linear_cka", "rbf_cka")
FLOAT32 = 1e-5  # error of a CKA by float32 Gram matrices, which are refused below five digits: see `grams`
FLOAT64 = 1e-12  # and by float64 ones

Values = Plane | np.ndarray


def deconfounded(ab: Values, ac: Values, bc: Values, cc: Values, *, rounding: float = FLOAT32) -> np.ndarray:
    """Partial cosines (R_ab − R_ac R_cc⁻¹ R_cb) / √((1 − R_ac R_cc⁻¹ R_ca)(1 − R_bc R_cc⁻¹ R_cb)), (…, a, b).

    ab : (…, a, b) CKA of the sites of A and of B; ac (…, a, c) and bc (…, b, c) with the controls; cc (…, c, c) of the
        controls. All of one estimator and the same images; leading axes, such as resamples, are broadcast.
    rounding : largest error of these values; planes may come from float32 Gram matrices, hence the default

    NaN where a value is missing, and where the controls explain a site entirely: the share of it that they leave is no
    more than rounding can make, see `share_left`. ValueError where that is so everywhere, or where the controls are
    linearly dependent.
    """
    _refuse_mismatch(ab, ac, bc, cc)
    ab, ac, bc = (_array(values) for values in (ab, ac, bc))
    a, left_a = _regress(ac, cc, rounding)
    b, left_b = _regress(bc, cc, rounding)
    room = left_a[..., :, None] * left_b[..., None, :]
    if np.isnan(room).all() and not (np.isnan(ac).any(-1).all() or np.isnan(bc).any(-1).all()):
        raise ValueError(
            "the controls explain every site of one side entirely, so nothing is left to compare; use fewer controls"
        )
    return (ab - a @ np.swapaxes(b, -1, -2)) / np.sqrt(room)


def share_left(ac: Values, cc: Values, *, rounding: float = FLOAT32) -> np.ndarray:
    """Share of each site's squared norm that the controls leave, 1 − R_ac R_cc⁻¹ R_ca: (…, a), in (0, 1].

    NaN where it is at most 3cδ/λ, with c controls, values that err by δ = `rounding`, and λ the smallest eigenvalue of
    R_cc: the first-order bound of the share's own error, so that it may as well be 0.
    """
    return _regress(_array(ac), cc, rounding)[1]


def deconfounded_plane(A: Recording, B: Recording, controls: Recording) -> Plane:
    """Debiased linear CKA of all sites of A and B with the linear kernels of all sites of `controls` regressed out.

    All three of the same images (matched by id) under the same policy; computed in float64. The controls' names are
    the option `without`; notes say which sites the controls explain entirely, and how much of the others is left.
    """
    A, B, controls = (_double(recording) for recording in (A, B, controls))
    ab, ac, bc = plane("linear_cka", A, B), plane("linear_cka", A, controls), plane("linear_cka", B, controls)
    cc = plane("linear_cka", controls)
    values = deconfounded(ab, ac, bc, cc, rounding=FLOAT64)
    left_a, left_b = (share_left(side, cc, rounding=FLOAT64) for side in (ac, bc))
    notes = {
        (a, b): ab.notes.get((a, b)) or _note({a: left_a[i], b: left_b[j]})
        for i, a in enumerate(ab.rows)
        for j, b in enumerate(ab.columns)
    }
    return dataclasses.replace(ab, values=values, options={"without": ", ".join(controls.names)}, notes=notes)


def _note(left: dict[str, float]) -> str:
    explained = [name for name, share in left.items() if np.isnan(share)]
    if explained:
        return f"the controls explain {' and '.join(map(repr, explained))} entirely: what is left is rounding"
    return "; ".join(f"the controls leave {share:.1%} of {name!r}" for name, share in left.items())


def _regress(ac: np.ndarray, cc: Values, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """(sites in orthonormal coordinates of the controls' span (…, a, c), share of each that is outside it (…, a))."""
    names, cc = cc.rows if isinstance(cc, Plane) else None, _array(cc)
    eigenvalues, vectors = _spectrum(cc, names, rounding)
    coordinates = ac @ (vectors / np.sqrt(eigenvalues)[..., None, :])
    left = 1 - (coordinates**2).sum(-1)
    tolerance = 3 * cc.shape[-1] * rounding / eigenvalues[..., :1]
    return coordinates, np.where(left > tolerance, left, np.nan)


def _spectrum(cc: np.ndarray, names: list[str] | None, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in ascending order, (…, c), and eigenvectors of the controls' similarities; or why there are none."""
    called = f" ({', '.join(map(repr, names))})" if names else ""
    if np.isnan(cc).any():
        raise ValueError(
            f"a control{called} has no similarity to itself or to another, so it is constant; leave it out"
        )
    if (np.abs(np.diagonal(cc, axis1=-2, axis2=-1) - 1) > 1e-3).any():
        raise ValueError("cc has a diagonal that is not 1, so it holds no cosines; give CKA of the controls, not HSIC")
    eigenvalues, vectors = np.linalg.eigh(cc)
    # errors of δ in c × c entries move an eigenvalue by up to cδ (Weyl), so this one may as well be 0
    if (eigenvalues[..., 0] <= cc.shape[-1] * rounding).any():
        raise ValueError(
            f"the controls{called} are linearly dependent: the smallest eigenvalue of their similarities is "
            f"{eigenvalues.min():.1e}; leave out one that the others explain"
        )
    return eigenvalues, vectors


def _refuse_mismatch(ab: Values, ac: Values, bc: Values, cc: Values) -> None:
    """Axes that stand for the same sites have the same length, and, of planes, the same names."""
    given = {"ab": ab, "ac": ac, "bc": bc, "cc": cc}
    lengths: dict[str, set[int]] = {}
    for argument, values in given.items():
        shape = _array(values).shape
        if len(shape) < 2:
            raise ValueError(f"{argument} has shape {shape}; give (…, sites, sites)")
        for letter, length in zip(argument, shape[-2:]):
            lengths.setdefault(letter, set()).add(length)
    for letter, found in lengths.items():
        if len(found) > 1:
            raise ValueError(f"sites of {letter!r} are {sorted(found)} in number; give values of the same sites")
    _refuse_unlike_planes({argument: values for argument, values in given.items() if isinstance(values, Plane)})


def _refuse_unlike_planes(planes: dict[str, Plane]) -> None:
    names: dict[str, list[str]] = {}
    for argument, values in planes.items():
        for letter, sites in zip(argument, (values.rows, values.columns)):
            if names.setdefault(letter, sites) != sites:
                raise ValueError(
                    f"{argument} has other sites of {letter!r} than the planes before it; order them alike"
                )
    for argument, values in planes.items():
        if values.measure not in COSINES:
            raise ValueError(
                f"{argument} holds {values.measure}, no cosine of Gram matrices; use {' or '.join(COSINES)}"
            )
    kinds = {
        f"{each.measure} {with_defaults(each.measure, each.options)}, {each.policy}, {each.n_images} images"
        for each in planes.values()
    }
    if len(kinds) > 1:
        raise ValueError(f"the planes are not alike: {'; '.join(sorted(kinds))}; compute them all in one way")


def _array(values: Values) -> np.ndarray:
    return np.asarray(values.values if isinstance(values, Plane) else values, dtype=np.float64)


def _double(recording: Recording) -> Recording:
    """The same in float64: a difference of similarities loses digits that float32 Gram matrices do not have."""
    return dataclasses.replace(recording, features={name: X.double() for name, X in recording.features.items()})
