"""Regions: the weighted mean over cells, of the right cells, images and rows."""

import numpy as np
import pandas as pd
import pytest
import torch

from similarity import Site, plane, record
from similarity.regions import pooled
from tests.made import batches, images_of, made


def gridded(n=6, g=3, channels=4, seed=0):
    features = {
        name: torch.randn(n, g * g, channels, generator=torch.Generator().manual_seed(seed + i))
        for i, name in enumerate("xy")
    }
    return made(features, policy=f"grid:{g}")


def test_uniform_weights_are_the_mean_over_the_grid():
    recording = gridded()
    whole = pooled(recording, {image: np.full(9, 0.3) for image in recording.ids})
    for name in recording.names:
        torch.testing.assert_close(whole[name], recording[name].mean(1))
    assert whole.policy == "gap" and whole.ids == recording.ids
    assert all(site.axes == ("batch", "channel") and site.shape == (4,) for site in whole.sites)
    assert [(site.name, site.part) for site in whole.sites] == [(site.name, site.part) for site in recording.sites]


def test_a_recorded_grid_pooled_whole_is_the_recorded_gap():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1))
    loader = batches(images_of(9, side=16), size=4)
    sites = {"0": "batch channel height width"}
    grid, gap = (record(model, loader, sites, policy) for policy in ("grid:4", "gap"))
    whole = pooled(grid, {image: np.ones(16) for image in grid.ids})
    torch.testing.assert_close(whole["0"], gap["0"])
    assert plane("linear_cka", whole, gap).values[0, 0] == pytest.approx(1, abs=1e-6)
    assert whole.data_hash == gap.data_hash and whole.image_hashes == gap.image_hashes


def test_a_weighted_mean_by_hand():
    features = {"x": torch.tensor([[[1.0], [2.0], [4.0], [8.0]], [[0.0], [1.0], [0.0], [5.0]]])}
    recording = made(features, ids=["p", "q"], policy="grid:2")
    found = pooled(recording, {"p": [1, 0, 3, 0], "q": [0, 0.5, 0, 0.5]})
    assert found["x"].tolist() == [[13 / 4], [3.0]]


def test_images_without_the_region_are_left_out_by_id():
    recording = gridded()
    weights = {image: np.zeros(9) if k in (1, 4) else np.eye(9)[k] for k, image in enumerate(recording.ids)}
    found = pooled(recording, weights)
    assert found.ids == ["i000", "i002", "i003", "i005"]
    for row, k in enumerate((0, 2, 3, 5)):
        torch.testing.assert_close(found["y"][row], recording["y"][k, k])
    with pytest.raises(ValueError, match="no image has this region"):
        pooled(recording, {image: np.zeros(9) for image in recording.ids})


def test_weights_are_matched_by_id_and_not_by_place():
    recording = gridded()
    table = pd.DataFrame(np.random.default_rng(0).random((6, 9)), index=recording.ids)
    mixed = pooled(
        recording, pd.concat([table.sample(frac=1, random_state=1), pd.DataFrame([[1.0] * 9], index=["other"])])
    )
    torch.testing.assert_close(mixed["x"], pooled(recording, table)["x"])
    turned = recording.select(ids=recording.ids[::-1])
    torch.testing.assert_close(pooled(turned, table)["x"].flip(0), mixed["x"])


def planted(seed, shared, inside, grid=4, channels=6):
    """What two models share lies in the cells `inside` each image's region; elsewhere each has noise of its own."""
    n = len(shared)
    X = np.random.default_rng(seed).normal(size=(n, grid * grid, channels)) * 2
    mixed = shared @ np.linalg.qr(np.random.default_rng(seed).normal(size=(channels, channels)))[0]
    return made({"s": np.where(inside[:, :, None], mixed[:, None, :], X)}, policy=f"grid:{grid}")


def test_a_feature_planted_in_a_region_is_similar_there_and_nowhere_else():
    generator = np.random.default_rng(0)
    n = 80
    inside = np.zeros((n, 16), dtype=bool)
    for row, start in zip(inside, generator.integers(0, 12, n)):  # another place in every image
        row[start : start + 4] = True
    shared = generator.normal(size=(n, 6))
    A, B = planted(1, shared, inside), planted(2, shared, inside)
    masks = {"inside": inside, "outside": ~inside}
    weights = {name: dict(zip(A.ids, mask.astype(float))) for name, mask in masks.items()}
    values = {
        name: plane("linear_cka", pooled(A, each), pooled(B, each)).values[0, 0] for name, each in weights.items()
    }
    assert values["inside"] == pytest.approx(1, abs=1e-5)
    assert abs(values["outside"]) < 0.1  # independent Gaussians, n = 80
    misplaced = dict(zip(A.ids, np.roll(inside, 1, axis=0).astype(float)))
    assert plane("linear_cka", pooled(A, misplaced), pooled(B, misplaced)).values[0, 0] < 0.9


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"i000": np.ones(9)}, "5 recorded images have no weights, first 'i001'"),
        ({f"i00{k}": np.ones(4) for k in range(6)}, "the grid has 9 cells"),
        ({f"i00{k}": -np.ones(9) for k in range(6)}, "negative"),
        ({f"i00{k}": np.full(9, np.nan) for k in range(6)}, "not finite"),
        (pd.DataFrame(np.ones((7, 9)), index=["i000", *(f"i00{k}" for k in range(6))]), "twice"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        pooled(gridded(), weights)


def test_a_recording_without_a_grid_is_refused():
    with pytest.raises(ValueError, match="under 'gap'"):
        pooled(made({"x": torch.ones(5, 3)}), {})


def test_token_sites_lose_their_strides():
    recording = gridded()
    recording.sites = [Site("x", ("batch", "token", "channel"), strides=(8,)), recording.sites[1]]
    site = pooled(recording, {image: np.ones(9) for image in recording.ids}).sites[0]
    assert (site.axes, site.strides, site.spatial) == (("batch", "channel"), (), False)
