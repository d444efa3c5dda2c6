"""Checks of explanations, on models whose answers to covered pixels and to random weights are known."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from made import images_of
from scipy.stats import spearmanr
from torch import nn

import models
from explanations.attributions import explain
from explanations.checks import (
    areas,
    cover_check,
    curves,
    layer_groups,
    random_maps,
    randomization,
    rank_correlation,
    redraw,
)
from explanations.covering import covered, grid
from explanations.targets import class_logit, masked_logit
from models import ModelSpec
from utils import InputError

SIDE = 12


class Sum(nn.Module):
    """One logit: the sum of positive weights times the pixels of the first channel."""

    def __init__(self, side=SIDE):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(side, side, generator=torch.Generator().manual_seed(2)) ** 4)

    def forward(self, images):
        return (images[:, 0] * self.weight).sum((1, 2))[:, None]


class Layers(nn.Module):
    """Four layers called in another order than they are declared in, one of them twice, and one whose parameters are
    read from outside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.twice = nn.Linear(4, 2), nn.Conv2d(4, 4, 1)
        self.first, self.read = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, images):
        features = self.twice(self.first(images)).relu()
        features = nn.functional.conv2d(features, self.read.weight, self.read.bias)
        return self.last(self.twice(features).mean((2, 3)) * self.scale)


BLACK = torch.zeros(3)
WHITE = torch.ones(3, 3, SIDE, SIDE)


def gradients(target):
    """An explainer: Integrated Gradients from black."""

    def explainer(model, images):
        return explain("integrated_gradients", model, images, target, baseline=BLACK, steps=2).maps

    return explainer


# ---- deletion and insertion -------------------------------------------------------------------------------------


def test_curves_of_a_sum_are_cumulative_sums_in_the_order_of_the_map():
    model, fractions = Sum(), [0, 0.25, 0.5, 1]
    table = curves(model, WHITE[:1], model.weight.detach()[None], class_logit(0), baseline=BLACK, fractions=fractions)
    ordered = model.weight.detach().double().flatten().sort(descending=True).values
    removed = torch.tensor([ordered[: round(fraction * len(ordered))].sum() for fraction in fractions])
    scores = {curve: part["score"].to_numpy() for curve, part in table.groupby("curve")}
    np.testing.assert_allclose(scores["deletion"], ordered.sum() - removed, atol=1e-4)
    np.testing.assert_allclose(scores["insertion"], removed, atol=1e-4)
    found = areas(table).set_index("curve")
    by_hand = np.trapezoid(removed, fractions)
    assert found.loc["insertion", "auc"] == pytest.approx(by_hand, abs=1e-4)
    assert found.loc["insertion", "share"] == pytest.approx(by_hand / float(ordered.sum()), abs=1e-5)
    assert found.loc["deletion", "share"] == pytest.approx(1 - by_hand / float(ordered.sum()), abs=1e-5)


@pytest.mark.parametrize("cells", [None, 3])
def test_a_perfect_map_beats_a_random_one_and_its_opposite_is_worst(cells):
    model, target = Sum(), class_logit(0)
    perfect = model.weight.detach().expand(3, -1, -1)
    maps = {"perfect": perfect, "opposite": -perfect, "random": random_maps(3, SIDE, SIDE, cells=cells, seed=1)}
    shares = {
        name: areas(curves(model, WHITE, each, target, baseline=BLACK, cells=cells)).groupby("curve")["share"].mean()
        for name, each in maps.items()
    }
    assert shares["perfect"]["deletion"] < shares["random"]["deletion"] < shares["opposite"]["deletion"]
    assert shares["perfect"]["insertion"] > shares["random"]["insertion"] > shares["opposite"]["insertion"]
    assert shares["random"]["deletion"] == pytest.approx(0.5, abs=0.1)  # on average nothing is gained by chance


def test_with_cells_whole_cells_go_in_the_order_of_their_means():
    model, target = Sum(), class_logit(0)
    cells = grid(2, SIDE, SIDE)
    maps = torch.tensor([[1.0, 3.0, 3.0, 2.0]])[:, cells] + 0.01 * random_maps(1, SIDE, SIDE)
    maps[:, 0, 0] = 30  # one large pixel of 36 makes a cell's mean 1.8: it stays the last
    table = curves(model, WHITE[:1], maps, target, baseline=BLACK, cells=2, fractions=[0, 0.25, 0.5, 0.75, 1])
    left = table[table["curve"] == "deletion"]["score"].to_numpy()
    sums = torch.stack([model.weight.detach()[cells == cell].sum() for cell in range(4)]).numpy()
    gone = -np.diff(left)
    np.testing.assert_allclose(sorted(gone[:2]), sorted(sums[1:3]), atol=1e-4)  # nearly equal: in either order
    np.testing.assert_allclose(gone[2:], sums[[3, 0]], atol=1e-4)


def test_equal_relevance_is_no_order_at_all():
    """A constant map must not delete from the top left: over seeds each pixel's turn is even."""
    model, flat = Sum(), torch.zeros(1, SIDE, SIDE)
    shares = [
        areas(curves(model, WHITE[:1], flat, class_logit(0), baseline=BLACK, seed=seed))["share"] for seed in range(8)
    ]
    assert len({round(float(share[0]), 6) for share in shares}) == 8
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


def test_curves_do_not_depend_on_the_batch_and_leave_the_model_as_it_was():
    model, images = models.build_model(ModelSpec("fcn", "smoke")).train(), images_of(3, 32)
    target = masked_logit(images.mean(1, keepdim=True) > 0.5, which="true", ids=list("abc"))
    maps = random_maps(3, 32, 32)
    options = {"fractions": [0, 0.3, 1], "ids": list("abc"), "baseline": "blur"}
    one, many = (curves(model, images, maps, target, batch=batch, **options) for batch in (1, 8))
    pd.testing.assert_frame_equal(one, many, rtol=1e-4)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert one["id"].unique().tolist() == list("abc") and one["baseline"].str.contains("σ = 3.2 px").all()
    with torch.no_grad():
        scores = target(model.eval(), images)
    start = many[(many["fraction"] == 0) & (many["curve"] == "deletion")]["score"]
    np.testing.assert_allclose(start, scores, rtol=1e-4)
    ends = many[many["fraction"] == 1].pivot(index="id", columns="curve", values="score")
    np.testing.assert_allclose(ends["insertion"], scores, rtol=1e-4)


def test_a_share_is_undefined_where_baseline_and_image_score_the_same():
    images = torch.zeros(1, 3, SIDE, SIDE)
    table = areas(curves(Sum(), images, random_maps(1, SIDE, SIDE), class_logit(0), baseline=BLACK))
    assert table["share"].isna().all() and (table["auc"] == 0).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"maps": torch.rand(3, SIDE, SIDE + 1)}, r"maps must be \(3, 12, 12\)"),
        ({"maps": torch.full((3, SIDE, SIDE), torch.nan)}, "row 0 is not finite"),
        ({"fractions": [0.1, 1]}, "ascend from 0 to 1"),
        ({"fractions": [0, 0.5, 0.5, 1]}, "ascend from 0 to 1"),
        ({"ids": ["a", "b"]}, "2 ids"),
        ({"ids": ["a", "b", "a"]}, "2 different"),
        ({"baseline": "grey"}, "unknown baseline"),
        ({"cells": 13}, "does not fit"),
        ({"target": class_logit([0, 0])}, "made for 2 images"),
    ],
)
def test_curves_refuse_what_does_not_fit(options, match):
    options = {"maps": random_maps(3, SIDE, SIDE), "target": class_logit(0)} | options
    with pytest.raises(InputError, match=match):
        curves(Sum(), WHITE, **options)


# ---- randomised weights -----------------------------------------------------------------------------------------


def test_layers_are_grouped_by_when_they_are_last_called_from_the_output_backwards():
    groups = layer_groups(Layers(), torch.rand(1, 3, 8, 8), 5)
    assert [{name.rpartition(".")[0] for name in group} for group in groups] == [
        {"last"},
        {"twice"},
        {"first"},
        {""},
        {"read"},  # never called itself: it stands with the module around it, which is entered first
    ]
    assert groups[1] == ["twice.weight", "twice.bias"]
    merged = layer_groups(Layers(), torch.rand(1, 3, 8, 8), 2)
    assert merged == [[*groups[0], *groups[1], *groups[2]], [*groups[3], *groups[4]]]


def test_random_weights_change_the_explanation_of_a_linear_model():
    model = Sum()
    model.weight.data = 1 / (1 + torch.arange(SIDE * SIDE).view(SIDE, SIDE) ** 0.5)  # as if trained: smooth
    images, weight = WHITE, model.weight.detach().clone()
    table = randomization(model, images, gradients(class_logit(0)), levels=1, ids=list("abc"))
    assert table["id"].tolist() == list("abc") and (table["randomized"] == 1).all()
    assert table["rank_correlation"].abs().max() < 0.3  # 144 independent pixels: a standard deviation of 0.08
    assert torch.equal(model.weight, weight)


def test_an_explanation_that_does_not_look_at_the_weights_is_found_out():
    def edges(_model, images):
        return images.mean(1)

    table = randomization(Layers(), images_of(2, SIDE), edges, levels=3)
    assert table["rank_correlation"].to_numpy() == pytest.approx(1.0)
    assert table["level"].tolist() == [1, 1, 2, 2, 3, 3]


def test_randomisation_is_cascading_and_the_model_is_left_as_it_was():
    model, images, seen = Layers(), images_of(2, SIDE), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def explainer(changed, images):
        same = {name for name, tensor in changed.state_dict().items() if torch.equal(tensor, before[name])}
        seen.append(len(before) - len(same))
        return explain("integrated_gradients", changed, images, class_logit(0), steps=2).maps

    table = randomization(model, images, explainer, levels=5)
    assert seen == [0, 2, 4, 6, 7, 9]
    assert table["layer"].unique().tolist() == ["last", "twice", "first", "", "read"]
    assert table["randomized"].iloc[-1] == 1 and table["randomized"].is_monotonic_increasing
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = randomization(model, images, gradients_of_mean(), levels=5, seed=1)
    pd.testing.assert_frame_equal(again, randomization(model, images, gradients_of_mean(), levels=5, seed=1))


def gradients_of_mean():
    return lambda model, images: explain("integrated_gradients", model, images, class_logit(0), steps=2).maps


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec("unetpp", "smoke"),
        ModelSpec("mask2former", "smoke", freeze=("encoder",)),
        ModelSpec("mask2former", "smoke", options={"encoder": {"vit": "clip_tiny"}}),
    ],
)
def test_copies_of_our_models_are_randomised_apart_from_them(spec):
    model, images = models.build_model(spec).eval(), images_of(2, 64)
    changed = copy.deepcopy(model)
    own = models.lesion_logits(model, images)
    groups = layer_groups(model, images, 4)
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in model.named_parameters())
    redraw(changed, groups[0], torch.Generator().manual_seed(0))
    assert not torch.allclose(models.lesion_logits(changed, images), own)
    torch.testing.assert_close(models.lesion_logits(model, images), own)
    encoder = models.model_sites.encoder_path(model)
    assert not any(name.startswith(encoder) for name in groups[0]) and any(n.startswith(encoder) for n in groups[-1])


def test_redrawn_weights_keep_their_scale_and_constants_stay():
    layer = nn.Linear(300, 200)
    nn.init.constant_(layer.bias, 0.25)
    nn.init.normal_(layer.weight, 0.1, 0.02)
    old = layer.weight.detach().clone()
    count = redraw(layer, ["weight", "bias"], torch.Generator().manual_seed(0))
    assert count == 300 * 200 + 200 and (layer.bias == 0.25).all()
    assert float(layer.weight.detach().mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert abs(np.corrcoef(old.flatten(), layer.weight.detach().flatten())[0, 1]) < 0.02


def test_rank_correlation_is_spearmans_and_undefined_for_a_constant_map():
    first, second = torch.randn(2, 9, 9, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first.flatten(), second.flatten())[0])
    assert np.isnan(rank_correlation(first, torch.zeros(9, 9)))


@pytest.mark.parametrize("levels", [0, 6])
def test_more_levels_than_layers_are_refused(levels):
    with pytest.raises(InputError, match="levels must be 1 to 5"):
        randomization(Layers(), images_of(2, SIDE), gradients_of_mean(), levels=levels)


def test_a_model_without_parameters_cannot_be_randomised():
    with pytest.raises(InputError, match="no parameters"):
        layer_groups(nn.Identity(), torch.rand(1, 3, 8, 8), 1)


# ---- the object covered -----------------------------------------------------------------------------------------


def masks_of(count=2):
    masks = torch.zeros(count, 1, SIDE, SIDE)
    masks[:, :, 2:5, 3:9] = 1
    masks[:, :, 3, 5] = 0
    return masks


def test_covering_hides_the_mask_and_nothing_else():
    images, masks = images_of(2, SIDE), masks_of()
    hidden = masks[:, 0].bool()
    result, words = covered(images, masks)
    inside, outside = (part[:, None].expand_as(images) for part in (hidden, ~hidden))
    assert torch.equal(result[outside], images[outside]) and words == "mask covered by: mean colour outside"
    for row in range(2):
        colour = images[row][:, ~hidden[row]].mean(1)
        torch.testing.assert_close(result[row][:, hidden[row]], colour[:, None].expand(3, int(hidden[row].sum())))
    boxed, words = covered(images, masks, baseline=BLACK, box=True)
    assert (boxed[:, :, 2:5, 3:9] == 0).all() and int((boxed == 0).sum()) == 2 * 3 * 18 and words.startswith("box")
    assert inside.any()


def test_covering_tells_a_model_that_reads_the_object_from_one_that_reads_the_rest():
    images, masks, tables = images_of(2, SIDE), masks_of(), {}
    for name, part in (("object", masks[0, 0]), ("rest", 1 - covered(torch.ones(1, 3, SIDE, SIDE), masks[:1],
                                                                     baseline=BLACK, box=True)[0][0, 0])):  # fmt: skip
        model = Sum()
        model.weight.data = model.weight * (part if name == "object" else 1 - part)
        tables[name] = cover_check(
            model, images, masks, class_logit(0), gradients(class_logit(0)), baseline=BLACK, box=True, ids=["a", "b"]
        )
    assert (tables["object"]["score_covered"].abs() < 1e-6).all() and (tables["object"]["score"] > 0).all()
    np.testing.assert_allclose(tables["rest"]["score"], tables["rest"]["score_covered"], rtol=1e-5)
    assert tables["rest"]["rank_correlation"].to_numpy() == pytest.approx(1)
    assert tables["object"]["rank_correlation"].isna().all()  # nothing is left to explain: a constant map has no order


@pytest.mark.parametrize(
    ("masks", "options", "match"),
    [
        (masks_of() * torch.tensor([1, 0]).view(2, 1, 1, 1), {}, "row 1 has an empty mask"),
        (torch.ones(2, 1, SIDE, SIDE), {}, "row 0 is covered whole"),
        (masks_of(3), {}, "masks must be"),
        (masks_of(), {"baseline": "grey"}, "unknown baseline"),
    ],
)
def test_what_cannot_be_covered_is_refused(masks, options, match):
    with pytest.raises(InputError, match=match):
        covered(images_of(2, SIDE), masks, **options)
