"""Superpixels as features: what SLIC must give to be explained by, and what a known model's superpixels are worth."""

import numpy as np
import pytest
import torch
from made import images_of
from scipy.ndimage import label
from torch import nn

import models
from explanations.attributions import explain
from explanations.covering import baseline_images, counts_of, features_of, grid
from explanations.features import cut
from explanations.superpixels import superpixels
from explanations.targets import class_logit, masked_logit
from models import ModelSpec
from utils import InputError

SIDE = 64


class Quadrant(nn.Module):
    """One logit, a product of colours in the upper left quarter."""

    def forward(self, images):
        return images[:, :, : images.shape[2] // 2, : images.shape[3] // 2].prod(1).sum((1, 2))[:, None]


def disc(side=SIDE, radius=17):
    """(a dark disc on a pale ground (1, 3, side, side), where the disc is (side, side))."""
    down, across = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (down - 30) ** 2 + (across - 35) ** 2 < radius**2
    return torch.where(inside, 0.3, 0.8).expand(1, 3, -1, -1), inside


def impurity(features, inside):
    """The share of pixels that do not lie where most of their own feature lies."""
    sizes = features.flatten().bincount()
    within = features[inside].bincount(minlength=len(sizes))
    return float(torch.minimum(within, sizes - within).sum() / sizes.sum())


# ---- what they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 40, 150])
def test_superpixels_are_numbered_without_a_gap_and_each_is_one_piece(count):
    images = images_of(3, SIDE)
    maps = superpixels(images, count)
    assert maps.shape == (3, SIDE, SIDE) and maps.dtype == torch.int64
    assert torch.equal(features_of(maps, images), maps)  # refuses a gap
    for each, found in zip(maps, counts_of(maps)):
        assert count / 2 <= found <= 1.2 * count
        assert all(label(each.numpy() == number)[1] == 1 for number in range(found))


def test_superpixels_follow_a_border_that_a_grid_cuts_through():
    image, inside = disc()
    (found,) = superpixels(image, 36)
    assert 3 * impurity(found, inside) < impurity(grid(6, SIDE, SIDE), inside)


def test_an_images_superpixels_depend_on_nothing_but_the_image_and_not_on_its_contrast():
    images = images_of(3, SIDE)
    together = superpixels(images, 40)
    assert torch.equal(superpixels(images[[1]], 40)[0], together[1])
    assert torch.equal(superpixels(images.to(memory_format=torch.channels_last), 40), together)
    paler = superpixels(0.5 + images[[0]] / 4, 40)[0]
    assert (paler == together[0]).float().mean() > 0.99  # stretched by each image's own range


def test_a_constant_image_falls_into_tiles_of_about_equal_size():
    sizes = superpixels(torch.full((1, 3, SIDE, SIDE), 0.4), 40).flatten().bincount()
    assert 20 <= len(sizes) <= 40 and sizes.max() <= 2 * sizes.min()


# ---- what they are worth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kernel_shap", "occlusion"])
def test_superpixels_outside_the_quarter_that_a_model_reads_are_worth_nothing(method):
    images = images_of(3, SIDE)
    cells = superpixels(images, 9)
    assert max(counts_of(cells)) <= 9  # every coalition is asked for: a dummy is then worth exactly nothing
    explained = explain(method, Quadrant(), images, class_logit(0), features="superpixels:9", samples=510)
    for values, maps, each in zip(explained.values, explained.maps, cells):
        read = each[: SIDE // 2, : SIDE // 2].unique()
        outside = [number for number in range(int(each.max()) + 1) if number not in read]
        assert outside and values[outside].abs().max() < 1e-10 * values[read].abs().max()
        assert not values[int(each.max()) + 1 :].isfinite().any()
        assert maps[~torch.isin(each, read)].abs().max() < 1e-10 * maps.abs().max()


def test_values_of_sampled_superpixels_sum_to_the_change_from_the_baseline():
    images = images_of(3, SIDE)
    model = models.build_model(ModelSpec("segformer", "smoke")).eval()
    target = masked_logit(images.mean(1, keepdim=True) > 0.5, which="true")
    explained = explain("kernel_shap", model, images, target, features="superpixels:20", samples=100)
    assert len(set(counts_of(superpixels(images, 20)))) > 1  # images of different number, one call
    with torch.no_grad():
        change = target(model, images) - target(model, baseline_images(images, "mean")[0])
    assert (change.abs() > 0.1).all() and explained.settings["coalitions"] == 100
    torch.testing.assert_close(explained.values.nansum(1), change, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(explained.maps.sum((1, 2)), change, atol=1e-4, rtol=1e-5)


def test_the_string_says_what_the_map_says():
    images = images_of(2, SIDE)
    options = {"method": "occlusion", "model": Quadrant(), "images": images, "target": class_logit(0)}
    named = explain(**options, features="superpixels:12")
    given = explain(**options, features=superpixels(images, 12))
    assert torch.equal(named.maps, given.maps)
    assert named.settings["features"] == "superpixels (SLIC, about 12)"
    assert cut(4, images)[1] == "grid 4 × 4" and torch.equal(cut(4, images)[0][1], grid(4, SIDE, SIDE))


# ---- bad input --------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_fall_apart_is_refused_by_its_row_with_the_remedy():
    constant = torch.full((1, 3, SIDE, SIDE), 0.4)
    with pytest.raises(InputError, match=r"image in row 0 into 1 superpixels where about 2 .* grid, which fits every"):
        explain("kernel_shap", Quadrant(), constant, class_logit(0), features="superpixels:2")


def test_the_row_that_is_refused_is_the_one_that_failed(monkeypatch):
    monkeypatch.setattr(
        "explanations.superpixels.slic", lambda image, *_, **__: np.arange(64).reshape(8, 8) * (image.max() < 0.5)
    )
    with pytest.raises(InputError, match="image in row 1 into 1 superpixels where about 40"):
        superpixels(torch.tensor([0.4, 0.6]).view(2, 1, 1, 1).expand(2, 3, 8, 8), 40)


@pytest.mark.parametrize("features", ["grid", "superpixels", "superpixels:", "superpixels:x", "superpixels:-3", "7"])
def test_unknown_features_are_refused_with_the_choices(features):
    with pytest.raises(InputError, match=f"unknown features '{features}'; choose from .*superpixels:n"):
        explain("occlusion", Quadrant(), images_of(1, 16), class_logit(0), features=features)


@pytest.mark.parametrize("count", [0, 1, 16 * 16 + 1, 2.0, True])
def test_a_number_of_superpixels_that_cannot_be_is_refused(count):
    with pytest.raises(InputError, match="whole number from 2 to 256"):
        superpixels(images_of(1, 16), count)


def test_too_few_samples_for_an_images_superpixels_are_refused_before_any_pass():
    with pytest.raises(InputError, match="30 samples cannot tell"):
        explain("kernel_shap", nn.Identity(), images_of(2, SIDE), class_logit(0), features="superpixels:40", samples=30)
