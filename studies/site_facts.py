"""Facts of sites and small pictures of what they see, for those who read results without having the networks.

`sites.csv` says where a site is, of which axes and shape, how deep and how large; it needs no weights, so that
`python -m studies.site_facts RESULTS_FOLDER` adds it to a finished run. `pca_rgb.png` and `pca_rgb.json` hold the maps
of a few synthetic images as colours; of other images none are written, because they show the images.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from torch import nn
from torch.nn import functional

from dataset import SegmentationDataset
from model_spec import ModelSpec
from models import TITLES, build_model, load_model, sites
from pictures import pca_scores, rotate_onto, scores_to_rgb
from similarity import Recording, record_models
from similarity.sites import find_module, parse
from utils import InputError, atomic_path, sentences_instead_of_tracebacks, write_table, write_text

PICTURED = 4  # images
TILE = 64  # pixels a side of one picture
FEWEST_CELLS = 2  # a side; a map of one cell shows no place
COLUMNS = ["model", "title", "part", "position", "depth", "site", "axes", "shape", "strides", "parameters"]


def write(config, folder: Path, test: SegmentationDataset, device: torch.device) -> None:
    """`sites.csv` of both models, and the pictures where the images are synthetic."""
    write_table(site_table([recipe.spec for recipe in config.models], config.image_size), folder / "sites.csv")
    if config.is_synthetic:
        seed = config.seeds[0]
        networks = {
            recipe.model: load_model(folder / "models" / f"{recipe.model}-seed{seed}" / "best")[0].to(device)
            for recipe in config.models
        }
        write_pictures(networks, test, seed, folder)


def site_table(specs: list[ModelSpec], image_size: int) -> pd.DataFrame:
    """One row a site, in execution order; shapes of one square image, without its batch axis.

    depth : rank among the sites of its part / (their number − 1), as sites are matched; parameters : of its module,
    NaN where the module has none of its own
    """
    rows = []
    for spec in specs:
        model = build_model(dataclasses.replace(spec, weights="none", freeze=())).eval()
        found = sites(model, image_size)
        count = {part: sum(site.part == part for site in found) for part in {site.part for site in found}}
        reached = dict.fromkeys(count, 0)
        for position, site in enumerate(found):
            depth = reached[site.part] / max(count[site.part] - 1, 1)
            reached[site.part] += 1
            strides = " ".join(map(str, site.strides))
            line = (spec.name, TITLES[spec.name], site.part, position, depth, site.name)
            shape = " × ".join(map(str, site.shape))
            rows.append((*line, " ".join(site.axes), shape, strides, parameters_of(model, site.name)))
    return pd.DataFrame(rows, columns=COLUMNS)


def parameters_of(model: nn.Module, name: str) -> float:
    """Parameters of the module that a site listens to; NaN where it has none."""
    count = sum(p.numel() for p in find_module(model, parse(name).path).parameters())
    return count or np.nan


# --------------------------------------------------------------------------------------------------------- pictures


def write_pictures(networks: dict[str, nn.Module], test: SegmentationDataset, seed: int, folder: Path) -> None:
    """`pca_rgb.png`: a row a site, a column an image, the images themselves first; `pca_rgb.json`: what is where."""
    chosen = [test[place] for place in range(min(PICTURED, len(test)))]
    images, ids = torch.stack([sample.image for sample in chosen]), [sample.id for sample in chosen]
    maps = record_models(networks, [(images, ids)], policies=("map",))
    rows, places = [_tiles(images.numpy().transpose(0, 2, 3, 1))], []
    for name in networks:
        for site, colours, share in coloured(maps[name]["map"], images.numpy()):
            places.append({"model": name, "site": site, "row": len(rows), "share": round(float(share), 4)})
            rows.append(_tiles(colours))
    atlas = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    with atomic_path(folder / "pca_rgb.png") as temporary:
        Image.fromarray(atlas).save(temporary, optimize=True)
    index = {"tile": TILE, "seed": seed, "images": ids, "data_hash": test.fingerprint, "sites": places}
    write_text(folder / "pca_rgb.json", json.dumps(index, indent=1) + "\n")


def coloured(recording: Recording, images: np.ndarray):
    """(site, colours (k, h, w, 3) in [0, 1], share of the variance) of every site that has a map of some cells.

    Three principal components of a site over all pixels of all images, rotated onto those of the images (k, 3, H, W)
    themselves, so that any two sites are as comparable as both are with what they saw.
    """
    target = pca_scores(images)[0]
    for site in recording.names:
        maps = recording[site].numpy()
        if maps.ndim == 4 and min(maps.shape[2:]) >= FEWEST_CELLS:
            scores, share = pca_scores(maps)
            yield site, scores_to_rgb(rotate_onto(scores, target)), share.sum()


def _tiles(pictures: np.ndarray) -> np.ndarray:
    """(k, h, w, 3) in [0, 1] to (k, TILE, TILE, 3) bytes; smaller ones keep their cells, larger ones are averaged."""
    found = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    mode = "area" if min(found.shape[2:]) > TILE else "nearest-exact"
    resized = functional.interpolate(found, size=(TILE, TILE), mode=mode)
    return (resized.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def add_sites(folder: Path) -> Path:
    """Write `sites.csv` of a finished run of the universality study from the settings it keeps."""
    stored = Path(folder) / "config.yaml"
    if not stored.is_file():
        raise InputError(f"{folder} holds no config.yaml; give the results folder of a universality study")
    settings = yaml.safe_load(stored.read_text(encoding="utf-8"))
    if "models" not in settings or "policies" not in settings:
        raise InputError(f"{folder} holds no universality study: its config.yaml has no models and policies")
    known = {field.name for field in dataclasses.fields(ModelSpec)} - {"name", "weights", "freeze"}
    specs = [
        ModelSpec(name=row["model"], **{key: value for key, value in row.items() if key in known})
        for row in settings["models"]
    ]
    write_table(site_table(specs, settings["image_size"]), Path(folder) / "sites.csv")
    return Path(folder) / "sites.csv"


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        if len(sys.argv) != 2:
            raise InputError("give one results folder: python -m studies.site_facts results/FOLDER")
        print(f"Wrote {add_sites(Path(sys.argv[1]))}")
