"""Do explanations tell of the model? Deletion and insertion curves, randomised weights, and the object covered.

Takes maps as tensors (B, H, W), whatever made them, and returns long tables; it names nobody faithful: where a method
fails is the caller's line to draw, against the same numbers of `random_maps`. How maps are made is in `attributions`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from scipy.integrate import trapezoid
from scipy.stats import rankdata
from torch import Tensor, nn

from explanations.covering import Baseline, baseline_images, checked_images, covered, grid
from explanations.features import picture_scores
from explanations.targets import Target, device_of, quiet
from utils import InputError

FRACTIONS = tuple(step / 20 for step in range(21))
CURVES = ("deletion", "insertion")

Explainer = Callable[[nn.Module, Tensor], Tensor]  # (model, images (B, 3, H, W)) -> maps (B, H, W)

# ---- deletion and insertion -------------------------------------------------------------------------------------


def curves(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    target: Target,
    *,
    baseline: Baseline = "mean",
    cells: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    ids: Sequence[str] | None = None,
    batch: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Petsiuk et al. 2018: the target as the most relevant pixels go (deletion) or come (insertion): long form.

    cells : remove whole cells of a grid of so many a side, by their mean; methods whose maps are of different grain can
        only then be compared, since a scatter of single pixels harms a network more than as many in one piece
    fractions : of the pixels, from 0 to 1, ascending; two passes each
    seed : of the order among pixels of equal relevance

    Columns: id, curve, fraction, score, baseline. At fraction 0 of a deletion stands the image, at 1 the baseline.
    """
    images = checked_images(images).to(device_of(model))
    _check_maps(maps, images)
    target.check(len(images))
    steps = _checked_fractions(fractions)
    names = _names(ids, len(images))
    missing, words = baseline_images(images, baseline)
    ranks = _ranks(maps.to(images.device), cells, seed)  # 0 is the most relevant pixel
    gone = torch.tensor(np.round(steps * ranks[0].numel()), device=images.device)

    def keep(rows: Tensor, which: Tensor) -> Tensor:
        inserted, step = which >= len(steps), which % len(steps)
        outside = ranks[rows] >= gone[step][:, None, None]
        return outside ^ inserted[:, None, None]

    scores = picture_scores(model, target, images, missing, keep, 2 * len(steps), batch).numpy()
    index = pd.MultiIndex.from_product([names, CURVES, steps], names=["id", "curve", "fraction"])
    return pd.DataFrame({"score": scores.ravel()}, index=index).reset_index().assign(baseline=words)


def areas(table: pd.DataFrame) -> pd.DataFrame:
    """Area under each curve of `curves`, by trapezoids: columns id, curve, auc, share, baseline.

    auc : the mean score along the curve, in the target's unit
    share : 0 where the curve lies at the baseline's score throughout, 1 at the image's; nan where these two are equal.
        Of a good explanation the deletion's is low and the insertion's high.
    """
    rows = []
    for (image, curve), part in table.groupby(["id", "curve"], sort=False):
        score = part["score"].to_numpy()
        empty, full = (score[-1], score[0]) if curve == "deletion" else (score[0], score[-1])
        auc = float(trapezoid(score, part["fraction"].to_numpy()))
        share = (auc - empty) / (full - empty) if full != empty else np.nan
        rows.append({"id": image, "curve": curve, "auc": auc, "share": share, "baseline": part["baseline"].iloc[0]})
    return pd.DataFrame(rows)


def random_maps(count: int, height: int, width: int, *, cells: int | None = None, seed: int = 0) -> Tensor:
    """Maps (count, height, width) that know nothing: a random number for every pixel, or for every cell of a grid."""
    generator = torch.Generator().manual_seed(seed)
    if cells is None:
        return torch.rand(count, height, width, generator=generator)
    return torch.rand(count, cells * cells, generator=generator)[:, grid(cells, height, width)]


def _ranks(maps: Tensor, cells: int | None, seed: int) -> Tensor:
    """(B, H, W): each pixel's place in descending order of relevance, pixels of equal relevance in random order."""
    shape = maps.shape
    flat = maps.detach().double().flatten(1)
    generator = torch.Generator().manual_seed(seed)
    if cells is not None:
        number = grid(cells, *shape[1:]).flatten().to(maps.device)
        sums = torch.zeros(len(flat), cells * cells, dtype=flat.dtype, device=flat.device).index_add_(1, number, flat)
        flat = (sums / number.bincount())[:, number]
    shuffled = torch.randperm(flat.shape[1], generator=generator).to(maps.device)
    if cells is not None:  # a cell's pixels stay together, also next to a cell of the same mean
        shuffled = shuffled[torch.argsort(torch.randperm(cells**2, generator=generator).to(number)[number[shuffled]])]
    order = shuffled[torch.argsort(flat[:, shuffled], dim=1, descending=True, stable=True)]
    places = torch.arange(flat.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(shape)


def _check_maps(maps: Tensor, images: Tensor) -> None:
    if not isinstance(maps, Tensor) or maps.shape != (len(images), *images.shape[-2:]):
        what = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"maps must be ({len(images)}, {images.shape[-2]}, {images.shape[-1]}) as images, got {what}")
    broken = (~maps.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
    if broken:
        raise InputError(f"the map of the image in row {broken[0]} is not finite ({len(broken)} of {len(maps)} maps)")


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
    steps = np.asarray(fractions, dtype=np.float64)
    if steps.ndim != 1 or len(steps) < 2 or steps[0] != 0 or steps[-1] != 1 or not (np.diff(steps) > 0).all():
        raise InputError(f"fractions must ascend from 0 to 1, got {list(fractions)}")
    return steps


def _names(ids: Sequence[str] | None, count: int) -> list:
    if ids is None:
        return list(range(count))
    if len(ids) != count or len(set(ids)) != count:
        raise InputError(f"{len(ids)} ids ({len(set(ids))} different) for {count} images; give each image its own")
    return list(ids)


# ---- randomised weights -----------------------------------------------------------------------------------------


def randomization(
    model: nn.Module,
    images: Tensor,
    explainer: Explainer,
    *,
    levels: int = 6,
    seed: int = 0,
    ids: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Adebayo et al. 2018, cascading: the maps' rank correlation with the model's own as its weights turn random.

    levels : groups of layers of about equal number, from the output backwards; at level k the first k are random

    Columns: id, level, layer (the last that turned random), randomized (share of the parameters), rank_correlation
    and rank_correlation_absolute (of the maps' absolute values); nan where a map is constant: no order can be compared.
    The model is copied; it is left as it was. Asks the explainer levels + 1 times.
    """
    names = _names(ids, len(images))
    groups = layer_groups(model, images[:2], levels)
    own = explainer(model, images)
    _check_maps(own, images)
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    total, random, rows = sum(parameter.numel() for parameter in model.parameters()), 0, []
    for level, group in enumerate(groups, 1):
        random += redraw(changed, group, generator)
        maps = explainer(changed, images)
        _check_maps(maps, images)
        place = {"level": level, "layer": group[-1].rpartition(".")[0], "randomized": random / total}
        for name, before, after in zip(names, own, maps):
            both = {
                "rank_correlation": rank_correlation(before, after),
                "rank_correlation_absolute": rank_correlation(before.abs(), after.abs()),
            }
            rows.append({"id": name, **place, **both})
    return pd.DataFrame(rows)


def layer_groups(model: nn.Module, images: Tensor, levels: int) -> list[list[str]]:
    """Names of the parameters in `levels` groups of layers, those nearest to the output first.

    A layer is a module with parameters of its own; its place is where it is last called in a forward pass. One that is
    never called itself (its parameters are read by the module around it) stands with that one.
    """
    order = _last_calls(model, images)
    owners: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    if not owners:
        raise InputError(f"{type(model).__name__} has no parameters that could be randomised")

    def place(owner: str) -> int:
        while owner and owner not in order:
            owner = owner.rpartition(".")[0]
        return order.get(owner, -1)

    layers = sorted(owners, key=place, reverse=True)
    if not 1 <= levels <= len(layers):
        raise InputError(f"levels must be 1 to {len(layers)}, the number of layers with parameters; got {levels}")
    parts = np.array_split(np.arange(len(layers)), levels)
    return [[name for index in part for name in owners[layers[index]]] for part in parts]


def _last_calls(model: nn.Module, images: Tensor) -> dict[str, int]:
    """{module's name: when it is last entered in a forward pass}."""
    calls: dict[str, int] = {}
    count = iter(range(10**9))
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.__setitem__(name, next(count)))
        for name, module in model.named_modules()
    ]
    try:
        with quiet(model), torch.no_grad():
            model(images.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def redraw(model: nn.Module, names: Sequence[str], generator: torch.Generator) -> int:
    """Redraw parameters in place, each from a normal with its own mean and standard deviation; how many numbers.

    So the scale of activations is kept, and what the weights say is gone; what is constant, such as biases of 0 at the
    start, stays. Every architecture is treated alike, whatever it was initialised with.
    """
    count = 0
    for name in names:
        parameter = model.get_parameter(name)
        values = parameter.double().cpu()
        drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values.mean() + values.std(correction=0) * drawn)
        count += parameter.numel()
    return count


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's over the pixels of two maps (H, W), ties at their mean rank; nan where one is constant."""
    ranks = [rankdata(each.detach().cpu().numpy().ravel()) for each in (first, second)]
    if any(np.ptp(each) == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


# ---- the object covered -----------------------------------------------------------------------------------------


def cover_check(
    model: nn.Module,
    images: Tensor,
    masks: Tensor,
    target: Target,
    explainer: Explainer,
    *,
    baseline: Baseline = "outside",
    box: bool = False,
    ids: Sequence[str] | None = None,
    batch: int = 16,
) -> pd.DataFrame:
    """What changes when the object is covered: columns id, score, score_covered, rank_correlation, baseline.

    A score that hardly falls says that the model answers from what surrounds the object; a map that stays as it was,
    that the explanation is about that, too.
    """
    names = _names(ids, len(images))
    target.check(len(images))
    without, words = covered(images, masks, baseline=baseline, box=box)
    before, after = explainer(model, images), explainer(model, without)
    for maps in (before, after):
        _check_maps(maps, images)
    device = device_of(model)

    def keep(_rows: Tensor, which: Tensor) -> Tensor:
        return (which == 0)[:, None, None]

    scores = picture_scores(model, target, images.to(device), without.to(device), keep, 2, batch)
    return pd.DataFrame(
        {
            "id": names,
            "score": scores[:, 0].numpy(),
            "score_covered": scores[:, 1].numpy(),
            "rank_correlation": [rank_correlation(*pair) for pair in zip(before, after)],
            "baseline": words,
        }
    )
