"""Explanations of models whose explanations are known: linear, reading one quadrant, ignoring images; and real ones."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import KernelShap, LayerGradCam
from made import images_of
from torch import nn

import models
from explanations import kernel_shap
from explanations.attributions import METHODS, cost, explain, grad_cams, sites_at_depths
from explanations.covering import baseline_images, features_of, grid
from explanations.features import coalition_scores
from explanations.targets import Target, class_logit, masked_logit, predicted_masks
from models import ModelSpec
from similarity import Site, list_sites
from similarity.policies import without_prefix
from utils import InputError

SIDE = 16
RELU = Site("relu", "batch channel height width")  # element-wise: what it emits depends on what comes in
PIXEL_METHODS = [name for name in METHODS if name != "grad_cam"]
VIT = ModelSpec("mask2former", "smoke", options={"encoder": {"vit": "clip_tiny"}})


class Linear(nn.Module):
    """K logits, each a weighted sum of the pixels."""

    def __init__(self, classes=3, side=SIDE):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(classes, 3, side, side, generator=generator))

    def forward(self, images):
        return torch.einsum("bchw,kchw->bk", images, self.weight) + 0.5


class Quadrant(nn.Module):
    """Two logits, products of colours in the upper left quarter: what lies elsewhere is not read."""

    def forward(self, images):
        part = images[:, :, : images.shape[2] // 2, : images.shape[3] // 2]
        return torch.stack([part.prod(1).sum((1, 2)), part.pow(2).sum((1, 2, 3))], 1)


class Blind(nn.Module):
    def forward(self, images):
        return torch.ones(len(images), 2)


class Cut(nn.Module):
    """Its gradient is cut off at the input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3)

    def forward(self, images):
        return self.stem(images.detach()).detach().mean((2, 3))


class Conv(nn.Module):
    """A small convolutional classifier; `early` is not read by what follows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.early, self.first, self.norm = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.relu, self.head = nn.ReLU(), nn.Linear(6, 3)
        self.norm.running_mean += torch.rand(6) - 0.5

    def forward(self, images):
        self.early(images)
        return self.head(self.relu(self.norm(self.first(images))).pow(2).mean((2, 3)))


class Corners(nn.Module):
    """A game of four players, the quarters' means: products of two, three and a maximum."""

    def forward(self, images):
        a, b, c, d = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1).T
        return (5 * a * b + 7 * b * c * d + torch.maximum(a, 2 * d) - c**2)[:, None]


def pictures(count=5, side=SIDE, seed=0):
    return images_of(count, side, seed)


@pytest.fixture(scope="module")
def vit():
    return models.build_model(VIT).eval()


# ---- known explanations -----------------------------------------------------------------------------------------


def test_integrated_gradients_of_a_linear_model_are_its_weights_times_the_change():
    model, images = Linear(), pictures()
    missing, _ = baseline_images(images, "blur")
    explained = explain("integrated_gradients", model, images, class_logit(2), baseline="blur", steps=3)
    expected = (model.weight[2] * (images - missing)).sum(1).detach().double()
    torch.testing.assert_close(explained.maps, expected, atol=1e-5, rtol=1e-5)
    assert explained.gap.abs().max() < 1e-4


@pytest.mark.parametrize("method", ["kernel_shap", "occlusion"])
@pytest.mark.parametrize("baseline", ["mean", "blur", torch.tensor([0.2, 0.5, 0.9])])
def test_features_of_a_linear_model_are_worth_the_sum_over_their_pixels(method, baseline):
    model, images = Linear(), pictures()
    missing, _ = baseline_images(images, baseline)
    explained = explain(method, model, images, class_logit([0, 1, 2, 1, 0]), baseline=baseline, features=3, samples=64)
    products = (model.weight[[0, 1, 2, 1, 0]] * (images - missing)).sum(1).detach().double()
    cells = grid(3, SIDE, SIDE)
    expected = torch.stack([(products * (cells == cell)).sum((1, 2)) for cell in range(9)], 1)
    torch.testing.assert_close(explained.values, expected, atol=1e-3, rtol=1e-4)
    by_cell = torch.stack([(explained.maps * (cells == cell)).sum((1, 2)) for cell in range(9)], 1)
    torch.testing.assert_close(by_cell, explained.values)  # a value is shared by its pixels, none is lost


@pytest.mark.parametrize("method", PIXEL_METHODS)
def test_what_a_model_does_not_read_gets_nothing(method):
    images = pictures()
    # 16 cells would be sampled; four are asked for in every coalition, and a dummy is then worth exactly nothing
    explained = explain(method, Quadrant(), images, class_logit(0), features=2, samples=14)
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[: SIDE // 2, : SIDE // 2] = False
    assert explained.maps[:, outside].abs().max() < 1e-10 * explained.maps.abs().max()
    assert (explained.maps[:, ~outside].abs().sum(1) > 0).all()


@pytest.mark.parametrize("method", PIXEL_METHODS)
def test_a_model_that_ignores_its_input_has_maps_of_zero(method):
    maps = explain(method, Blind(), pictures(), class_logit(1), features=3).maps
    assert maps.shape == (5, SIDE, SIDE) and not maps.any()


def test_integrated_gradients_of_a_smooth_model_are_complete():
    images = pictures()
    explained = explain("integrated_gradients", Quadrant(), images, class_logit(0), steps=4)  # a cubic: exact from 2 on
    missing, _ = baseline_images(images, "mean")
    change = (Quadrant()(images) - Quadrant()(missing))[:, 0].double()
    torch.testing.assert_close(explained.maps.sum((1, 2)), change, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(explained.gap, explained.maps.sum((1, 2)) - change, atol=1e-5, rtol=0)


def test_more_steps_close_the_gap_of_a_trained_architecture():
    model = models.build_model(ModelSpec("fcn", "smoke"))
    images = pictures(2, 32)
    target = masked_logit(torch.ones(2, 1, 32, 32), which="true")
    gaps = [explain("integrated_gradients", model, images, target, steps=n).gap.abs().mean() for n in (2, 64)]
    assert gaps[1] < gaps[0] / 3


def exact_shapley(value, players):
    """By the definition: the mean over all orders of what a player adds."""
    total = np.zeros(players)
    for order in itertools.permutations(range(players)):
        there = np.zeros(players, bool)
        for player in order:
            before = value(there)
            there[player] = True
            total[player] += value(there) - before
    return total / math.factorial(players)


def test_kernel_shap_of_four_features_is_exact():
    images, model = pictures(3).double(), Corners()
    missing, _ = baseline_images(images, "mean")
    cells = grid(2, SIDE, SIDE)
    explained = explain("kernel_shap", model, images, class_logit(0), features=2, samples=14)
    for row in range(3):

        def value(there, row=row):
            keep = torch.from_numpy(there)[cells]
            return float(model(torch.where(keep, images[row], missing[row])[None])[0, 0])

        np.testing.assert_allclose(explained.values[row], exact_shapley(value, 4), atol=1e-9)
    assert explained.settings["coalitions"] == "all"


def test_kernel_shap_is_efficient_however_few_its_samples():
    images = pictures(4, 64)
    model = models.build_model(ModelSpec("segformer", "smoke"))
    target = masked_logit(images.mean(1, keepdim=True) > 0.5, which="true")
    explained = explain("kernel_shap", model, images, target, features=4, samples=60, batch=64)
    missing, _ = baseline_images(images, "mean")
    with torch.no_grad():
        change = target(model.eval(), images) - target(model, missing)
    assert (change.abs() > 0.1).all()
    torch.testing.assert_close(explained.values.sum(1), change, atol=1e-4, rtol=1e-5)
    assert explained.gap.abs().max() < 1e-9 * change.abs().max()


def test_kernel_shap_has_no_error_from_interactions_of_two_features():
    rng = np.random.default_rng(0)
    single, pairs = rng.standard_normal(12), np.triu(rng.standard_normal((12, 12)), 1)
    members, weights = kernel_shap.coalitions(12, 60, seed=3)
    table = members.astype(float)
    answers = table @ single + np.einsum("si,ij,sj->s", table, pairs, table)
    everyone = np.array([single.sum() + pairs.sum()])
    fitted = kernel_shap.shapley_values(members, weights, answers[None], np.zeros(1), everyone)
    np.testing.assert_allclose(
        fitted.values[0], single + (pairs + pairs.T).sum(1) / 2, atol=1e-9
    )  # Shapley's, by symmetry


def test_standard_errors_of_kernel_shap_are_about_as_large_as_its_errors():
    """Of random games of ten players, whose values are exact when all 1022 coalitions are asked for."""
    rng, actual, stated = np.random.default_rng(0), [], []
    for seed in range(60):
        weights = rng.random(10)

        def game(members, weights=weights):
            return np.tanh(4 * members @ weights / weights.sum())[None]

        ends = game(np.zeros((1, 10)))[0], game(np.ones((1, 10)))[0]
        fits = {}
        for samples in (100, 1022):
            members, kernel = kernel_shap.coalitions(10, samples, seed)
            fits[samples] = kernel_shap.shapley_values(members, kernel, game(members), *ends)
        assert len(members) == 1022 and not fits[1022].errors.any()
        actual.append((fits[100].values - fits[1022].values) ** 2)
        stated.append(fits[100].errors ** 2)
    assert 0.3 < np.mean(actual) / np.mean(stated) < 1.3  # rather too large than too small: the draw is even
    assert 0.2 < np.mean(np.array(actual)[..., -1]) / np.mean(np.array(stated)[..., -1]) < 1.6  # the last one's, too


def test_the_same_seed_asks_the_same_of_every_model_and_another_seed_something_else():
    first, same, other = (kernel_shap.coalitions(20, 80, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert np.array_equal(first[::2], ~first[1::2]) and first[::2].any(1).all()


def test_kernel_shap_agrees_with_captums_on_the_same_coalitions():
    images, model, cells = pictures(2), Conv().eval(), grid(3, SIDE, SIDE)
    missing, _ = baseline_images(images, "mean")
    members, _ = kernel_shap.coalitions(9, 80, seed=5)

    class Same(KernelShap):
        def kernel_shap_perturb_generator(self, original_inp, **kwargs):
            for row in [np.ones(9), np.zeros(9), *members]:
                yield torch.as_tensor(row, dtype=torch.long)[None]

    ours = explain("kernel_shap", model, images, class_logit(1), features=3, samples=80, seed=5).values
    for row in range(2):
        theirs = Same(model).attribute(
            images[row : row + 1],
            baselines=missing[row : row + 1],
            target=1,
            feature_mask=cells[None, None],
            n_samples=82,
            perturbations_per_eval=41,
            return_input_shape=False,
        )
        # captum holds the two ends by a weight of 10^6 in float32, and not by a constraint
        torch.testing.assert_close(ours[row], theirs[0].double(), atol=2e-3 * float(ours.abs().max()), rtol=1e-2)


def test_superpixels_of_different_number_are_each_explained_as_alone():
    images, model = pictures(3), Linear()
    columns = torch.arange(SIDE).expand(SIDE, SIDE)
    maps = torch.stack([columns // 4, columns // 8, columns // 4])
    explained = explain("kernel_shap", model, images, class_logit([0, 1, 2]), features=maps)
    assert explained.values.shape == (3, 4) and explained.values[1, 2:].isnan().all()
    for row in range(3):
        alone = explain("kernel_shap", model, images[[row]], class_logit(row), features=maps[row])
        torch.testing.assert_close(explained.maps[row], alone.maps[0], atol=1e-4, rtol=1e-4)
    covered = explain("occlusion", model, images, class_logit([0, 1, 2]), features=maps)
    torch.testing.assert_close(covered.maps, explained.maps, atol=1e-3, rtol=1e-3)  # linear: the two agree


# ---- Grad-CAM ---------------------------------------------------------------------------------------------------


def test_grad_cam_is_captums_and_is_computed_by_hand():
    model, images = Conv().eval(), pictures()
    explained = explain("grad_cam", model, images, class_logit(1), site=RELU, relu=True)
    activation = model.relu(model.norm(model.first(images)))
    # the head reads the mean of squares: the gradient is 2 a w / places, its mean over places 2 w mean(a) / places
    alpha = 2 * model.head.weight[1][:, None, None] * activation.mean((2, 3), keepdim=True) / activation[0, 0].numel()
    by_hand = (alpha * activation).sum(1, keepdim=True).relu()
    theirs = LayerGradCam(model, model.relu).attribute(images, 1, relu_attributions=True)
    torch.testing.assert_close(by_hand, theirs, atol=1e-7, rtol=1e-4)
    enlarged = F.interpolate(theirs, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(explained.maps, enlarged.detach(), atol=1e-7, rtol=1e-4)
    assert explained.settings["relu"] is True and explained.settings["site"] == "relu"


def test_tokens_are_laid_out_where_they_are_and_prefix_tokens_left_out(vit):
    """Of a site of a ViT: activations and gradients by hand from the module's own output, patch by patch."""
    images, site = pictures(2, 64), sites_of(vit, "vit.blocks.1")
    target = masked_logit(torch.ones(2, 1, 64, 64), which="true")
    kept = []
    handle = vit.get_submodule(site.name).register_forward_hook(lambda _m, _i, output: kept.append(output))
    score = target(vit, images.clone().requires_grad_())
    handle.remove()
    gradient = torch.autograd.grad(score.sum(), kept[0])[0]
    assert site.prefix == kept[0].shape[1] - (64 // site.strides[0]) ** 2 > 0
    tokens, slopes = (without_prefix(tensor.detach(), site) for tensor in (kept[0], gradient))
    cam = (tokens * slopes.mean(1, keepdim=True)).sum(2).view(2, 1, 64 // site.strides[0], -1)
    by_hand = F.interpolate(cam, size=(64, 64), mode="bilinear", align_corners=False)[:, 0]
    maps = explain("grad_cam", vit, images, target, site=site).maps
    torch.testing.assert_close(maps, by_hand, atol=1e-5 * float(by_hand.abs().max()), rtol=1e-4)


def test_grad_cam_at_a_token_site_moves_with_the_patch_that_is_changed(vit):
    """The first site of a ViT has mixed its tokens least: another patch changes the map most where that patch is."""
    images = torch.full((1, 3, 64, 64), 0.5)
    site = sites_of(vit, "vit.blocks.0")
    stride, target = site.strides[0], masked_logit(torch.ones(1, 1, 64, 64), which="true")
    places = 64 // stride
    for row, column in ((0, places - 1), (places - 1, 0)):
        other = images.clone()
        other[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = torch.rand(
            3, stride, stride, generator=torch.Generator().manual_seed(0)
        )
        maps = [explain("grad_cam", vit, each, target, site=site).maps for each in (images, other)]
        changed = F.adaptive_avg_pool2d((maps[1] - maps[0] - (maps[1] - maps[0]).median()).abs()[None], places)[0, 0]
        assert divmod(int(changed.argmax()), places) == (row, column)


def sites_of(model, ending):
    return next(site for site in list_sites(model, torch.zeros(1, 3, 64, 64)) if site.name.endswith(ending))


@pytest.mark.parametrize("spec", [ModelSpec("unetpp", "smoke"), ModelSpec("mask2former", "smoke"), VIT])
def test_every_site_that_has_a_map_has_a_grad_cam(spec):
    model, images = models.build_model(spec), pictures(1, 64)
    spatial = [site for site in list_sites(model, images) if site.spatial]
    chosen = [site for site in spatial if "neck.projections" not in site.name]  # see the next test
    explained = grad_cams(model, images, masked_logit(torch.ones(1, 1, 64, 64), which="true"), chosen)
    assert list(explained) == [site.name for site in chosen]
    assert all(each.maps.shape == (1, 64, 64) and each.maps.any() for each in explained.values())
    depths = sites_at_depths(model, 64)
    assert list(depths) == [0.25, 0.5, 0.75, 1.0] and depths[1.0] == spatial[-1]
    assert {site.part for site in depths.values()} == {"encoder", "decoder"}


def test_a_site_before_a_norm_of_each_channel_is_refused_since_grad_cam_would_be_rounding(vit):
    """In this preset 32 groups normalise 32 channels: the mean over places of each channel's gradient is zero."""
    target = masked_logit(torch.ones(1, 1, 64, 64), which="true")
    with pytest.raises(InputError, match="mean gradient is zero up to rounding"):
        explain("grad_cam", vit, pictures(1, 64), target, site=sites_of(vit, "neck.projections.1"))


class ClassToken(nn.Module):
    """Logit 0 is read from the patches, logit 1 from the class token alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Identity(), nn.Linear(4, 1)

    def forward(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = self.tokens(torch.cat([patches.mean(1, keepdim=True), patches], 1))
        return torch.cat([self.head(tokens[:, 1:].pow(2).mean(1)), self.head(tokens[:, 0])], 1)


def test_sites_that_are_refused_are_named_with_the_reason_and_the_others_go_on():
    model, images, target = Conv(), pictures(), class_logit(0)
    model.relu = nn.ReLU(inplace=True)
    refused = {}
    asked = ["early", "first", "norm", "head", RELU]
    found = grad_cams(model, images, target, asked, refused=refused, batch=2)
    assert list(found) == ["first", "relu"] and set(refused) == {"early", "norm", "head"}
    assert "'early' has no gradient" in refused["early"] and "changed in place" in refused["norm"]
    assert "features without a place" in refused["head"]
    for site in ("first", RELU):
        alone = explain("grad_cam", model, images, target, site=site)
        torch.testing.assert_close(found[alone.settings["site"]].maps, alone.maps)
    with pytest.raises(InputError, match="'early' has no gradient"):
        grad_cams(model, images, target, ["first", "early"])


def test_a_site_that_is_refused_in_a_later_batch_leaves_no_part_of_its_maps():
    site, images = Site("tokens", "batch token channel", strides=(4,), prefix=1), pictures(4)
    refused, model = {}, ClassToken()
    found = grad_cams(model, images, class_logit([0, 0, 0, 1]), [site, "embed"], refused=refused, batch=1)
    assert list(found) == ["embed"] and found["embed"].maps.shape == (4, SIDE, SIDE)
    assert list(refused) == ["tokens"] and "first 1 tokens alone" in refused["tokens"]
    assert list(grad_cams(model, images, class_logit(0), [site, "embed"], refused=refused)) == ["tokens", "embed"]


def test_a_model_all_of_whose_sites_are_refused_has_no_map_and_says_why():
    refused = {}
    assert grad_cams(Cut(), pictures(), class_logit(0), ["stem"], refused=refused) == {}
    assert "'stem' has no gradient" in refused["stem"]


@pytest.mark.parametrize(
    ("sites", "target", "match"),
    [
        (["first", "frist"], class_logit(0), "unknown site"),
        (["first", Site("relu", "batch channel height")], class_logit(0), "its axes are"),
        (["first"], class_logit(3), "out of range"),
    ],
)
def test_what_is_no_refusal_of_a_site_is_raised_even_where_refusals_are_collected(sites, target, match):
    with pytest.raises(InputError, match=match):
        grad_cams(Conv(), pictures(), target, sites, refused={})


# ---- batches, costs, and the model afterwards -------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("spec", [ModelSpec("fcn", "smoke"), VIT])
def test_maps_do_not_depend_on_the_batch(method, spec):
    model, images = models.build_model(spec), pictures(3, 64)
    target = masked_logit(images.mean(1, keepdim=True) > 0.5, which="true")
    options = {"site": sites_at_depths(model, 64)[0.25]} if method == "grad_cam" else {}
    one, many = (
        explain(method, model, images, target, features=2, samples=14, steps=4, batch=batch, **options).maps
        for batch in (1, 7)
    )
    torch.testing.assert_close(one, many, atol=1e-4 * float(many.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    ("spec", "side"), [(ModelSpec("unetpp", "smoke"), 32), (ModelSpec("segformer", "smoke"), 32), (VIT, 64)]
)
def test_maps_of_kernels_with_channels_last_are_equal_but_for_rounding(spec, side):
    model, images = models.build_model(spec), pictures(2, side)
    target, site = masked_logit(images.mean(1, keepdim=True) > 0.5, which="true"), sites_at_depths(model, side)[0.25]
    for method in METHODS:
        options = {"site": site} if method == "grad_cam" else {"features": 2, "samples": 14, "steps": 3}
        plain = explain(method, model, images, target, **options).maps
        model.to(memory_format=torch.channels_last)
        faster = explain(method, model, images, target, **options).maps
        model.to(memory_format=torch.contiguous_format)
        # not pixel by pixel: rounding can open or close a ReLU whose input is zero but for it
        assert (faster - plain).norm() < 1e-3 * plain.norm(), method


class Counting(Conv):
    seen, largest = 0, 0

    def forward(self, images):
        self.seen += len(images)
        self.largest = max(self.largest, len(images))
        return super().forward(images)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("samples", [25, 30, 600])
def test_an_explanation_takes_the_passes_that_it_says_in_batches_no_larger_than_asked(method, samples):
    model = Counting()
    site = RELU if method == "grad_cam" else None
    explain(method, model, pictures(5), class_logit(0), features=3, samples=samples, steps=6, batch=4, site=site)
    assert model.seen == 5 * cost(method, features=9, samples=samples, steps=6).forward
    assert model.largest <= 4


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(method, fails):
    model = Conv().train()
    model.first.weight.requires_grad_(False)
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    site = RELU if method == "grad_cam" else None
    target = class_logit(7 if fails else 0)
    with torch.no_grad():
        if fails:
            with pytest.raises(InputError, match="out of range"):
                explain(method, model, pictures(), target, features=2, site=site)
        else:
            explain(method, model, pictures(), target, features=2, site=site)
    assert [module.training for module in model.children()] == [True, True, True, True, False] and model.training
    assert [p.requires_grad for p in model.parameters()][2:4] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_parameters_are_no_hindrance():
    model, images = Conv(), pictures()
    free = explain("grad_cam", model, images, class_logit(0), site="first").maps
    frozen = explain("grad_cam", model.requires_grad_(False), images, class_logit(0), site="first").maps
    torch.testing.assert_close(free, frozen)


# ---- targets ----------------------------------------------------------------------------------------------------


def test_the_masked_logit_sums_what_the_model_says_inside_the_mask():
    images = pictures(2, 32)
    model = models.build_model(ModelSpec("fcn", "smoke")).eval()
    masks = images.mean(1, keepdim=True) > 0.5
    logits = models.lesion_logits(model, images)
    expected = torch.stack([logits[row][masks[row]].double().sum() for row in range(2)])
    torch.testing.assert_close(masked_logit(masks, which="true")(model, images), expected)
    swapped = masked_logit(masks, which="true")(model, images, torch.tensor([1, 0]))
    expected = torch.stack([logits[row][masks[1 - row]].double().sum() for row in range(2)])
    torch.testing.assert_close(swapped, expected)
    several = models.build_model(ModelSpec("fcn", "smoke", classes=3)).eval()
    expected = models.class_logits(several, images)[:, 2:].double().mul(masks).sum((1, 2, 3))
    torch.testing.assert_close(masked_logit(masks, 2, which="predicted")(several, images), expected)


def test_predicted_masks_are_the_models_own_decisions():
    images = pictures(3, 32)
    model = models.build_model(ModelSpec("fcn", "smoke", classes=3))
    found = torch.cat([predicted_masks(model, images, label, batch=2) for label in range(3)], 1)
    assert (found.sum(1) == 1).all() and model.training
    logits = models.class_logits(model.eval(), images)
    assert torch.equal(found.int().argmax(1), logits.argmax(1))


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"images": [torch.rand(3, 8, 8), torch.rand(3, 9, 9)]}, r"sizes \[\(8, 8\), \(9, 9\)\]"),
        ({"images": torch.rand(2, 1, SIDE, SIDE)}, r"must be float \(batch, 3, height, width\)"),
        ({"images": torch.rand(2, 3, SIDE, SIDE) * 255}, "normalise their input themselves"),
        ({"images": torch.full((2, 3, SIDE, SIDE), torch.nan)}, r"must lie in \[0, 1\]"),
        ({"images": torch.rand(0, 3, SIDE, SIDE)}, "no image"),
        ({"method": "lime"}, "unknown method 'lime'"),
        ({"target": class_logit(3)}, r"class 3 \(image in row 0\) is out of range: the model has 3 classes"),
        ({"target": class_logit([0, -1, 0, 0, 0])}, r"class -1 \(image in row 1\)"),
        ({"target": class_logit([0, 1])}, "made for 2 images, and 5"),
        ({"target": masked_logit(torch.ones(5, 1, SIDE, SIDE), which="true")}, "a mask needs a segmentation model"),
        ({"baseline": "black"}, "unknown baseline 'black'"),
        ({"baseline": "blur:-1"}, "unknown baseline"),
        ({"baseline": torch.rand(4)}, r"fits no images"),
        ({"baseline": torch.tensor([0.0, torch.inf, 0.0])}, "finite"),
        ({"features": 17}, "17 × 17 cells does not fit"),
        ({"features": torch.ones(SIDE, SIDE)}, "whole numbers"),
        ({"features": torch.ones(SIDE, SIDE, dtype=torch.long)}, "number them from 0"),
        ({"features": 7, "samples": 60}, "60 samples cannot tell 49 features apart"),
        ({"features": 4, "samples": 30}, "of 16 features undetermined"),
        ({"batch": 0}, "batch must be a whole number"),
        ({"site": RELU}, "takes no site"),
        ({"method": "grad_cam"}, "needs a site"),
        ({"method": "grad_cam", "site": "first.weights"}, "unknown site"),
        ({"method": "grad_cam", "site": "head"}, "features without a place"),
        ({"method": "grad_cam", "site": "early"}, "'early' has no gradient"),
        ({"method": "grad_cam", "site": "norm"}, "changed in place"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(options, match):
    model = Conv()
    model.relu = nn.ReLU(inplace=True)
    options = {"method": "kernel_shap", "images": pictures(), "target": class_logit(0)} | options
    with pytest.raises(InputError, match=match):
        explain(model=model, **options)


def test_queries_have_no_map():
    model = models.build_model(ModelSpec("mask2former", "smoke"))
    site = next(site for site in list_sites(model, torch.zeros(1, 3, 64, 64)) if "query" in site.axes)
    with pytest.raises(InputError, match="has queries"):
        explain("grad_cam", model, pictures(1, 64), masked_logit(torch.ones(1, 1, 64, 64), which="true"), site=site)


def test_a_model_without_gradients_is_refused_by_gradient_methods_and_explained_by_the_others():
    images, target = pictures(), class_logit(0)
    with pytest.raises(InputError, match="no gradient of the target"):
        explain("integrated_gradients", Cut(), images, target)
    with pytest.raises(InputError, match="'stem' has no gradient"):
        explain("grad_cam", Cut(), images, target, site="stem")
    assert explain("kernel_shap", Cut(), images, target, features=2).maps.any()


def test_a_site_whose_class_token_alone_counts_is_refused():
    class ClassToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.tokens, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Identity(), nn.Linear(4, 2)

        def forward(self, images):
            patches = self.embed(images).flatten(2).transpose(1, 2)
            return self.head(self.tokens(torch.cat([patches.mean(1, keepdim=True), patches], 1))[:, 0])

    site = Site("tokens", "batch token channel", strides=(4,), prefix=1)
    with pytest.raises(InputError, match="first 1 tokens alone"):
        explain("grad_cam", ClassToken(), pictures(), class_logit(0), site=site)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda ones: masked_logit(ones, which="mine"), "'true' or 'predicted'"),
        (lambda ones: masked_logit(ones[:, 0], which="true"), r"\(images, 1, height, width\)"),
        (lambda ones: masked_logit(ones * 2, which="true"), "of 0 and 1"),
        (lambda ones: masked_logit(ones * torch.tensor([1, 0, 0]).view(3, 1, 1, 1), which="true"), "row 1, row 2"),
        (
            lambda ones: masked_logit(
                ones * torch.tensor([1, 0, 1]).view(3, 1, 1, 1), which="predicted", ids=list("abc")
            ),
            "predicted mask is empty for 'b'",
        ),
        (lambda _: class_logit(0.5), "whole number"),
        (lambda _: class_logit([]), "whole number"),
    ],
)
def test_a_target_of_nothing_is_refused(make, match):
    with pytest.raises(InputError, match=match):
        make(torch.ones(3, 1, 8, 8))


@pytest.mark.parametrize(("classes", "label"), [(1, 0), (1, 2), (3, None), (3, 3)])
def test_a_label_that_the_model_does_not_have_is_refused(classes, label):
    model, images = models.build_model(ModelSpec("fcn", "smoke", classes=classes)), pictures(1, 32)
    with pytest.raises(InputError, match="label"):
        masked_logit(torch.ones(1, 1, 32, 32), label, which="true")(model.eval(), images)
    with pytest.raises(InputError, match="label"):
        predicted_masks(model, images, label)


def test_a_target_must_give_one_number_an_image():
    with pytest.raises(InputError, match="one an image"):
        explain("occlusion", Linear(), pictures(), Target("all", lambda model, images, rows: model(images)), features=2)


def test_depths_outside_the_model_and_models_without_maps_are_refused():
    with pytest.raises(InputError, match="shares of the model"):
        sites_at_depths(Conv(), SIDE, (0.0, 1.0))
    with pytest.raises(InputError, match="no site of this model has a map"):
        sites_at_depths(Linear(), SIDE)


def test_blur_of_a_constant_image_is_that_image_and_means_are_kept():
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(baseline_images(flat, "blur")[0], flat)
    images = pictures(2)
    missing, words = baseline_images(images, "mean")
    torch.testing.assert_close(missing.mean((2, 3)), images.mean((2, 3)))
    assert words == "mean colour of the image" and "σ = 1.6 px" in baseline_images(images, "blur")[1]


def test_coalitions_keep_the_features_that_they_say():
    images = pictures(1)
    cells = features_of(2, images)
    members = np.array([[True, False, False, True]])
    score = coalition_scores(Linear(), class_logit(0), images, torch.zeros_like(images), cells, members, 4)
    kept = torch.where((cells == 0) | (cells == 3), images, 0)
    np.testing.assert_allclose(score[0, 0], Linear()(kept)[0, 0].item(), rtol=1e-5)
