"""Facts of sites without a trained network, and pictures of what they see of synthetic images only."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from dataset import SegmentationDataset
from images import Transform
from layouts import find_splits
from models import ModelSpec, build_model
from studies import site_facts
from utils import InputError

SPECS = [ModelSpec("unetpp", "smoke"), ModelSpec("mask2former", "smoke")]


@pytest.fixture(scope="module")
def networks():
    return {spec.name: build_model(spec, seed=0).eval() for spec in SPECS}


@pytest.fixture(scope="module")
def test_images(synthetic_root):
    return SegmentationDataset(find_splits(synthetic_root)["test"], Transform(size=64))


def test_every_site_has_its_shape_and_depth_and_the_parts_run_from_0_to_1(networks):
    table = site_facts.site_table(SPECS, 64)
    assert list(table) == site_facts.COLUMNS and set(table["model"]) == {"unetpp", "mask2former"}
    for _, part in table.groupby(["model", "part"]):
        assert part["depth"].iloc[0] == 0 and part["depth"].iloc[-1] == 1 and part["depth"].is_monotonic_increasing
    seen = {}
    row = table[(table["model"] == "unetpp")].iloc[-1]
    module = networks["unetpp"].get_submodule(row["site"])
    module.register_forward_hook(lambda _, __, output: seen.update(shape=tuple(output.shape[1:])))
    with torch.no_grad():
        networks["unetpp"](torch.zeros(1, 3, 64, 64))
    assert row["shape"] == " × ".join(map(str, seen["shape"]))
    assert row["parameters"] == sum(p.numel() for p in module.parameters())


def test_the_pictures_hold_the_images_first_and_a_row_for_every_site_with_a_map(networks, test_images, tmp_path):
    site_facts.write_pictures(networks, test_images, 0, tmp_path)
    index = json.loads((tmp_path / "pca_rgb.json").read_text())
    atlas = np.asarray(Image.open(tmp_path / "pca_rgb.png"))
    tile = index["tile"]
    assert atlas.shape == ((1 + len(index["sites"])) * tile, 4 * tile, 3)
    first = (test_images[0].image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert index["images"] == test_images.ids[:4] and np.array_equal(atlas[:tile, :tile], first)
    assert [place["row"] for place in index["sites"]] == list(range(1, len(index["sites"]) + 1))
    table = site_facts.site_table(SPECS, 64)
    without = set(table["site"]) - {place["site"] for place in index["sites"]}
    assert without == set(table[table["axes"].str.contains("query")]["site"])  # queries have no place in the image


def test_a_map_that_is_a_rotation_of_the_images_gets_the_images_colours(test_images):
    images = torch.stack([test_images[i].image for i in range(4)]).numpy()
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turned = np.einsum("kchw,cd->kdhw", images, turn)
    found = {}
    for name, maps in (("as they are", images), ("turned", turned)):
        ((_, colours, share),) = site_facts.coloured(_Recorded(maps), images)
        assert share == pytest.approx(1)
        found[name] = colours
    assert np.allclose(found["as they are"], found["turned"], atol=1e-5)


class _Recorded(dict):
    names = ("site",)

    def __init__(self, maps):
        super().__init__(site=torch.from_numpy(maps))


def test_pictures_are_of_synthetic_images_only(networks, test_images, tmp_path, monkeypatch):
    recipes = [SimpleNamespace(model=spec.name, spec=spec) for spec in SPECS]
    config = SimpleNamespace(models=recipes, image_size=64, seeds=[0], is_synthetic=False)
    monkeypatch.setattr(site_facts, "load_model", lambda *_: pytest.fail("a network was read"))
    site_facts.write(config, tmp_path, test_images, torch.device("cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["sites.csv"]


def test_a_finished_run_gets_its_sites_from_the_settings_it_keeps(tmp_path):
    models = [{"model": spec.name, "preset": spec.preset, "weights": "gone.safetensors", "epochs": 5} for spec in SPECS]
    settings = {"models": models, "policies": {"gap": ["linear_cka"]}, "image_size": 64}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    written = pd.read_csv(site_facts.add_sites(tmp_path), keep_default_na=False)
    assert written["site"].tolist() == site_facts.site_table(SPECS, 64)["site"].tolist()


@pytest.mark.parametrize(
    ("text", "words"), [(None, "holds no config.yaml"), ("model: unetpp", "no universality study")]
)
def test_another_folder_is_refused(tmp_path, text, words):
    if text:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        site_facts.add_sites(tmp_path)
