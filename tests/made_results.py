"""Small results folders of every study that the explorer page draws, of made-up numbers, for tests of the page."""

import json

import numpy as np
import pandas as pd
import yaml
from PIL import Image

SITES = {"unetpp": ["encoder.a", "encoder.b", "decoder.c"], "mask2former": ["swin.x", "swin.y", "pixel.z", "query.q"]}
PART = {"unetpp": ["encoder", "encoder", "decoder"], "mask2former": ["encoder", "encoder", "decoder", "decoder"]}
TILE = 8


def make_results(root, name="encoder.a"):
    """All studies under one folder; `name` stands wherever a name from a table is shown."""
    make_universality(root / "universality", name)
    make_explanations(root / "explanations-synthetic", name)
    make_steps(root / "processing-steps-synthetic", name)
    make_matrix(root / "architectures-synthetic", name)
    make_legacy(root / "legacy-synthetic", name)
    return root


def stamp(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"commit": "0123456789ab", "time": "2026-01-02T03:04:05+00:00", "packages": {"torch": "2.9"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "data.json").write_text(json.dumps({"test": {"images": 24, "hash": "feedfeedfeedfeed"}}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": "synthetic", "permutations": 20, **settings}))


def ruler(value):
    """A row's numbers on the ruler: floor 0.1, ceiling 0.9."""
    found = {"similarity": value, "floor": 0.1, "ceiling": 0.9, "u": (value - 0.1) / 0.8}
    found |= {
        f"{key}_{end}": found[key] + step for key in list(found) for end, step in (("low", -0.05), ("high", 0.05))
    }
    return found | {"null_mean": 0.0, "null_high": 0.02, "p_value": 0.05, "q_value": 0.04, "verdict": "partial"}


def make_universality(folder, name="encoder.a"):
    models = [{"model": model, "preset": "smoke"} for model in SITES]
    stamp(folder, models=models, policies={"gap": ["linear_cka"]}, seeds=[0, 1], image_size=64)
    sites = {**SITES, "unetpp": [name, *SITES["unetpp"][1:]]}
    rows = [
        {"estimator": estimator, "policy": policy, "part_a": part_a, "part_b": part_b, "n_images": 24}
        | {"site_a": a, "site_b": b, **ruler(0.2 + 0.1 * i + 0.05 * j + shift)}
        for estimator, policy, shift in (("linear_cka", "gap", 0), ("rsa", "gap", 0.1), ("linear_cka", "grid:4", -0.1))
        for i, (a, part_a) in enumerate(zip(sites["unetpp"], PART["unetpp"]))
        for j, (b, part_b) in enumerate(zip(sites["mask2former"], PART["mask2former"]))
    ]
    pairs = pd.DataFrame(rows)
    pairs.to_csv(folder / "pairs.csv", index=False)
    same = pairs[pairs["part_a"] == pairs["part_b"]].drop_duplicates(["estimator", "policy", "site_a"])
    same.assign(relative_depth=[0.0, 1.0, 0.0] * 3).to_csv(folder / "depth.csv", index=False)
    summary = [
        {
            "part": part,
            "estimator": "linear_cka",
            "policy": "gap",
            "n_images": 24,
            "interval_over": "images",
            **ruler(0.4),
        }
        for part in ("encoder", "decoder")
    ]
    pd.DataFrame(summary).to_csv(folder / "summary.csv", index=False)
    stitches = [
        {"giver": "a", "site_a": name, "receiver": "b", "site_b": "x.y", "kind": kind, "images": 24}
        | {"dice": 0.7, "dice_own": 0.8, "kept": 0.875, "low": 0.8, "high": 0.9, "without": 0.2}
        for kind in ("cross", "twin", "untrained")
    ]
    pd.DataFrame(stitches).to_csv(folder / "stitching.csv", index=False)
    make_sites(folder, sites)


def make_sites(folder, sites):
    """sites.csv and an atlas in which the tile of row r and column c has the colour (20 r, 60 c, 255)."""
    rows, places = [], []
    for model, names in sites.items():
        for place, site in enumerate(names):
            facts = {
                "part": PART[model][place],
                "position": place,
                "depth": place / 2,
                "axes": "batch channel height width",
            }
            rows.append({"model": model, "title": model, "site": site, "shape": f"{place + 1} × 4 × 4", **facts})
            if site != "query.q":
                places.append({"model": model, "site": site, "row": len(places) + 1, "share": 0.5})
    pd.DataFrame(rows).to_csv(folder / "sites.csv", index=False)
    atlas = np.zeros(((len(places) + 1) * TILE, 2 * TILE, 3), np.uint8)
    for row in range(len(places) + 1):
        for column in range(2):
            where = slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE)
            atlas[where] = (20 * row, 60 * column, 255)
    Image.fromarray(atlas).save(folder / "pca_rgb.png")
    index = {"tile": TILE, "seed": 0, "images": ["ISIC_1", "ISIC_2"], "sites": places}
    (folder / "pca_rgb.json").write_text(json.dumps(index))


def make_explanations(folder, name="encoder.a"):
    stamp(folder, similarities=["cosine"], mask="true")
    models = [name, "B (1)", "C (0)", "D (0)"]
    rows = [
        {"method": "occlusion", "model_a": a, "model_b": b, "kind": "same family", "n": 24, "mean": value, "u": value}
        | {"dissimilarity": 1 - value, "null_mean": 0.1, "q": 0.01, "ceiling": 0.9}
        for a, b, value in ((0, 1, 0.9), (0, 2, 0.2), (0, 3, 0.3), (1, 2, 0.25), (1, 3, 0.35), (2, 3, 0.8))
    ]
    table = pd.DataFrame(rows)
    table[["model_a", "model_b"]] = table[["model_a", "model_b"]].map(lambda place: models[place])
    table.to_csv(folder / "pairs.csv", index=False)
    networks = [{"network": model, "label": model, "family": "CNN"} for model in models]
    pd.DataFrame(networks).to_csv(folder / "networks.csv", index=False)
    failed = [{"network": "B (1)", "variant": "occlusion", "failed": "points nowhere"}]
    pd.DataFrame(failed).to_csv(folder / "explanations.csv", index=False)


def make_steps(folder, name="encoder.a"):
    stamp(folder)
    networks = {
        "Net (0)": [name, "blocks.1", "blocks.2"],
        "ViT (0)": ["blocks.0", "blocks.1"],
        "Swin (0)": ["layers.0"],
    }
    names, rows = list(networks), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for x, site_a in enumerate(networks[a]):
                for y, site_b in enumerate(networks[b]):
                    values = {"a_to_b": 0.1 * x, "b_to_a": 0.1 * y, "linear_cka": 0.5}
                    keys = {"network_a": a, "network_b": b, "site_a": site_a, "site_b": site_b}
                    rows.append({**keys, "depth_a": x / 2, "depth_b": y, **values, "mutual_knn": 0.3, "note": None})
    pd.DataFrame(rows).assign(k=1, n_images=40, neighbours=4).to_csv(folder / "planes.csv", index=False)
    sites = [
        {
            "network": network,
            "site": site,
            "place": place,
            "depth": place,
            "axes": "batch token channel",
            "shape": "4 × 8",
        }
        for network, found in networks.items()
        for place, site in enumerate(found)
    ]
    pd.DataFrame(sites).to_csv(folder / "sites.csv", index=False)
    facts = [
        {"network": network, "label": network, "family": "CNN", "sites": len(s)} for network, s in networks.items()
    ]
    pd.DataFrame(facts).to_csv(folder / "networks.csv", index=False)
    pairs = [{"network_a": "Net (0)", "network_b": "ViT (0)", "n_images": 24, "matched": 0.4}]
    pd.DataFrame(pairs).to_csv(folder / "pairs.csv", index=False)


def make_matrix(folder, name="encoder.a"):
    stamp(folder)
    labels = [name, "FPN", "SegFormer"]
    rows = [
        {"label_a": a, "label_b": b, "part": part, "n_images": 24, "interval_over": "images", **ruler(0.3 + 0.1 * i)}
        for part in ("encoder", "decoder")
        for i, a in enumerate(labels)
        for b in labels[i:]
    ]
    pd.DataFrame(rows).to_csv(folder / "matrix.csv", index=False)
    pd.DataFrame({"label": labels, "family": ["CNN", "CNN", "transformer"]}).to_csv(folder / "facts.csv", index=False)


def make_legacy(folder, name="encoder.a"):
    stamp(folder)
    row = {"pair": f"{name} × y", "measure": "linear_cka", "published": 0.0682, "published_again": 0.0295, "run1": 0.01}
    row |= {"run2": -0.02, "run1_cut_again": 0.03, "word": "changes sign", "corrected": 0.4, "corrected_low": 0.3}
    pd.DataFrame([row | {"corrected_high": 0.5, "verdict": "partial"}]).to_csv(folder / "table.csv", index=False)
