"""The study of processing steps end to end on tiny networks: what it leaves, a second time, after a kill, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from made_networks import RESNET, VIT, classifiers_of, grid_of

from classification.photos import synthetic_photos
from experiments import main
from studies import processing_report, processing_steps, processing_work
from studies.processing_steps import ProcessingConfig, run
from studies.processing_work import kept_recording
from studies.walks import Walk
from utils import InputError

IMAGES = {"synthetic_images": {"Training": 8, "Validation": 4, "Test": 48}, "synthetic_size": 64, "image_size": 32}
SMALL = {"images": 44, "neighbours": 4, "statistics_size": 48, "permutations": 19, "read_permutations": 3}
SMALL |= {"resamples": 3, "device": "cpu"}
TINY = {"Conv": ("resnet18", RESNET, "CNN"), "Attention": ("vit_tiny_patch16_224", VIT, "transformer")}
SITES = {"Conv": 5, "Attention": 2, "All-MLP, tuned": 5}  # blocks, and where there is one the stem
COLUMNS = {
    "statistics": "id statistic value reason",
    "networks": "network label family training seed body image_size sites decoder_sites parameters gflops source",
    "sites": "site part axes shape stage parameters operations place depth whole_depth network",
    "pairs": "network_a network_b part training relation matched elsewhere distance chance reversed p q n_images",
    "relations": "part training relation quantity pairs bodies mean low high",
    "curves": "part training relation depth pairs bodies mean low high",
    "steps": "network rule part site_from site_to both cka_change parameters_share operations_share floor",
    "smoothness": "network label family training body part rule change mean cv largest",
    "families": "part training rule change reason",
    "matched": "part network_a network_b value quantity pairs estimate se low high n_images",
    "largest": "part network_a network_b value site_a site_b depth imbalance depth_low depth_high same",
    "kept": "network site depth statistic r2 low high null_high p imbalance_from imbalance_to images",
    "losses": "training statistic quantity networks bodies median low high p",
    "planes": "network_a network_b site_a site_b depth_a depth_b a_to_b b_to_a linear_cka mutual_knn",
}
FIGURES = {"planes", "matched_depths", "matched_depths_whole", "smoothness", "families", "kept"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two bodies as classifiers and one of them in a segmentation network, two seeds each, at their random weights."""
    root = tmp_path_factory.mktemp("trained")
    classifiers = classifiers_of(root / "classifiers", TINY, seeds=(0, 1))
    axes = {"body": {"tuned": {"model": "all_mlp"}}, "seed": [0, 1]}
    options = {"body": RESNET, "image_size": 32, "decoder_channels": 8}
    settings = {"preset": "resnet18", "options": options, "synthetic_images": IMAGES["synthetic_images"]}
    return classifiers, grid_of(root / "segmentation", axes, weights=True, **settings)


@pytest.fixture(scope="module")
def study(trained, tmp_path_factory):
    """Through the command line, with all figures."""
    out = tmp_path_factory.mktemp("study")
    settings = SMALL | IMAGES | {"networks": {str(each): [] for each in trained}, "out": str(out / "run")}
    (out / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    main(["processing_steps", "--config", str(out / "study.yaml")])
    return out / "run"


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take longest, and are drawn once."""
    monkeypatch.setattr(processing_report, "draw", lambda *_: {})


@pytest.fixture
def recorded(monkeypatch):
    """Names of the networks that are recorded."""
    names, real = [], processing_work._record

    def record(walk, *rest):
        names.append(walk.name)
        return real(walk, *rest)

    monkeypatch.setattr(processing_work, "_record", record)
    return names


def config_of(trained_in, out, **changes):
    return ProcessingConfig(
        **{"networks": {str(each): [] for each in trained_in}, "out": str(out)} | SMALL | IMAGES | changes
    )


def tables(folder):
    return {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        pd.testing.assert_frame_equal(ours[name], theirs[name], obj=name)


def kept_files(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "walks").rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------------------- one run


def test_all_tables_figures_and_the_page_are_there(study):
    found = tables(study)
    assert set(found) == set(COLUMNS)
    for name, columns in COLUMNS.items():
        assert set(columns.split()) <= set(found[name].columns), name
    assert {path.stem for path in study.glob("*.png")} == FIGURES
    text = (study / "summary.md").read_text()
    assert "**Synthetic images** (embedded set)" in text and all(f"]({name}.png)" in text for name in FIGURES)
    assert "- **classifier**: best matches" in text and {"config.yaml", "environment.json", "data.json"} <= {
        path.name for path in study.iterdir()
    }


def test_untrained_twins_are_one_a_body_and_seed(study):
    networks = tables(study)["networks"]
    twins = networks[networks["training"] == "untrained"]
    # the segmentation network has the body of a classifier, and so no twin of its own
    assert sorted(twins["network"]) == [
        f"{body}, untrained ({seed})" for body in ("Attention", "Conv") for seed in (0, 1)
    ]
    assert networks["training"].tolist() == ["classifier"] * 4 + ["segmentation"] * 2 + ["untrained"] * 4
    assert set(networks.loc[networks["training"] == "segmentation", "body"]) == {"Conv"}


def test_rows_are_networks_times_sites(study):
    found, n = tables(study), json.loads((study / "data.json").read_text())["images"]
    networks = found["networks"].set_index("network")
    sites, encoder = found["sites"], found["sites"][found["sites"]["part"] == "encoder"]
    assert networks["sites"].to_dict() == {
        name: SITES[label.removesuffix(", untrained")] for name, label in networks["label"].items()
    }
    counts = sites.groupby("network").size()[networks.index]
    assert counts.tolist() == (networks["sites"] + networks["decoder_sites"]).tolist()
    assert networks.loc[networks["training"] != "segmentation", "decoder_sites"].eq(0).all()
    assert encoder.groupby("network")["depth"].max().eq(1).all()
    statistics = found["statistics"]["statistic"].nunique()
    assert len(found["kept"]) == len(encoder) * statistics and found["kept"]["images"].eq(n).all()
    encoders, whole = (found["pairs"][found["pairs"]["part"] == part] for part in ("encoder", "whole"))
    assert len(encoders) == 10 * 9 / 2 and len(whole) == 1 and found["pairs"]["n_images"].eq(n).all()
    blocks = found["steps"].query("rule == 'every block' and part == 'encoder'").groupby("network").size()
    assert blocks[networks.index].tolist() == (networks["sites"] - 1).tolist()
    shown = found["planes"].groupby(["network_a", "network_b"]).size()
    assert shown.to_dict() == {
        ("Conv (0)", "Attention (0)"): SITES["Conv"] * SITES["Attention"],
        ("Conv, untrained (0)", "Attention, untrained (0)"): SITES["Conv"] * SITES["Attention"],
    }


def test_an_untrained_network_and_its_twin_are_one(study):
    """These checkpoints were never trained: the twin draws the very weights, and floor and network coincide."""
    found = tables(study)
    pairs = found["pairs"].query("relation == 'same body and seed' and training == 'classifier × untrained'")
    assert len(pairs) == 4
    np.testing.assert_allclose(pairs["matched"], 2 / pairs["n_images"], rtol=1e-5)  # (k + 1)/n: the same neighbours
    conv = pairs[pairs["label_a"] == "Conv"]
    assert (conv["distance"] == 0).all() and (conv["smallest"] == 0).all()  # every best match is the site itself
    np.testing.assert_allclose(conv["p"], 1 / 120, rtol=1e-5)  # one order of five sites among 5!
    attention = pairs[pairs["label_a"] == "Attention"]
    # all images have the same nearest neighbour in both blocks: which of them matches best is a tie
    np.testing.assert_allclose(attention["elsewhere"], attention["matched"], rtol=1e-5)
    learnt = found["losses"].query("training == 'classifier' and quantity == 'learnt'")["median"]
    np.testing.assert_allclose(learnt, 0, atol=1e-3)  # kernels in another order of memory round otherwise


def test_a_recording_is_read_by_the_name_of_its_network(study):
    read = kept_recording("Conv (0)", study)
    assert read.names == tables(study)["sites"].query("network == 'Conv (0)'")["site"].tolist()
    with pytest.raises(InputError, match="0 recordings of 'Con'"):
        kept_recording("Con", study)


def test_a_second_run_makes_nothing_again(trained, study, undrawn, recorded, monkeypatch):
    before, was = kept_files(study), tables(study)
    monkeypatch.setattr(Walk, "load", None)  # no network is needed
    run(config_of(trained, study))
    assert kept_files(study) == before and recorded == []
    assert_same(tables(study), was)


def test_an_interrupted_run_goes_on_to_the_same_numbers(trained, study, undrawn, recorded, monkeypatch, tmp_path):
    real = processing_work.work

    def work(walk, asked, folder, threads=None):
        if walk.name == "All-MLP, tuned (1)":
            raise KeyboardInterrupt
        real(walk, asked, folder, threads)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(processing_work, "work", work)
        run(config_of(trained, tmp_path / "run"))
    assert len(recorded) == 5 and not (tmp_path / "run" / "summary.md").exists()
    (cut,) = (tmp_path / "run" / "walks" / "Conv_0").glob("recording-*")
    cut.write_bytes(cut.read_bytes()[:-9])  # and one is cut short
    recorded.clear()
    run(config_of(trained, tmp_path / "run"))
    assert sorted(recorded) == sorted({*tables(study)["networks"]["network"][5:], "Conv (0)"})
    assert_same(tables(tmp_path / "run"), tables(study))


# ---------------------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(results folder of classifiers, photographs that were drawn, one of each class for training)."""
    root = tmp_path_factory.mktemp("photos")
    drawn = synthetic_photos(root / "drawn", {"train": 1, "val": 12}, 32)
    settings = {"data": str(drawn), "image_size": 32}
    return classifiers_of(root / "classifiers", TINY, settings=settings), drawn


def of_photographs(photos, out, **changes):
    return config_of([photos[0]], out, photographs=True, data=str(photos[1]), statistics_size=32, **changes)


def test_classifiers_are_compared_on_photographs_without_lesions(photos, undrawn, tmp_path):
    folder = run(of_photographs(photos, tmp_path / "run"))
    found, text = tables(folder), (folder / "summary.md").read_text()
    assert set(found["statistics"]["statistic"]) == set(processing_steps.LOW_LEVEL)
    assert "lesion" not in set(found["losses"]["statistic"]) and set(found["pairs"]["part"]) == {"encoder"}
    assert len(found["networks"]) == 4 and "**Synthetic images** of `drawn`" in text
    assert all("_val_" in name for name in found["statistics"]["id"])


def test_photographs_that_were_trained_on_are_refused(photos, undrawn, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    for split in ("train", "val"):
        (seen / split).symlink_to(photos[1] / "val", target_is_directory=True)
    networks = classifiers_of(tmp_path / "classifiers", TINY, settings={"data": str(seen), "image_size": 32})
    with pytest.raises(InputError, match="were trained on by the networks"):
        run(of_photographs((networks, photos[1]), tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shown": [["Conv", "Atention"]]}, "label of a network 'Atention'.*Attention"),
        ({"shown": [["Conv"]]}, "no pair of labels"),
        ({"intervals_of": ["Cnv"]}, "label of a network 'Cnv'.*Conv"),
        ({"leave_out": ["Cnv"]}, "no network 'Cnv'"),
        ({"images": 39}, "39 are too few for halves"),
        ({"images": 400}, "400 were asked for, and there are 48"),
        ({"policy": "grid:2"}, "no one row an image"),
        ({"policy": "gab"}, "policy: unknown policy"),
        ({"neighbours": 43}, "neighbours must be at most 42"),
        ({"statistics_size": 8}, "at least 16 pixels"),
        ({"photographs": True}, "has lesions, not photographs"),
        ({"networks": {}}, "give results folders"),
        ({"networks": {}, "train": {"clasifiers": []}}, "clasifiers"),
        ({"synthetic_images": {"Training": 8, "Validation": 4, "Test": 50}}, "All-MLP, tuned.*was trained with"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_made(trained, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(config_of(trained, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_two_networks_of_one_name_are_refused(trained, tmp_path):
    again = classifiers_of(tmp_path / "again", TINY)
    with pytest.raises(InputError, match=r"two networks are called 'Attention \(0\)'"):
        run(config_of([*trained, again], tmp_path / "run"))


def test_one_network_is_no_comparison(tmp_path):
    alone = classifiers_of(tmp_path / "alone", {"Conv": TINY["Conv"]})
    with pytest.raises(InputError, match="at least two are compared"):
        run(config_of([alone], tmp_path / "run", untrained=False))


def test_other_settings_of_the_images_are_another_folders(trained, study):
    with pytest.raises(InputError, match="policy"):
        run(config_of(trained, study, policy="flat:2"))
    with pytest.raises(InputError, match="statistics_size"):
        run(config_of(trained, study, statistics_size=64))
