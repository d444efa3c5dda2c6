"""The legacy study: every trap of the earlier study is in `legacy_protocol`, and none of them in the corrected one."""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from made import batches, images_of, made
from scipy.stats import spearmanr
from torch import nn

from dataset import Sample
from models import ModelSpec, build_model, load_model
from similarity import measures, plane, record
from studies import legacy, legacy_report
from studies.legacy_protocol import (
    LEGACY_MEASURES,
    legacy_cut,
    legacy_freeze,
    legacy_linear_cka,
    legacy_pool,
    legacy_rbf_cka,
    legacy_rows,
    legacy_rsa,
    legacy_similarities,
    legacy_svcca,
)
from utils import HOME, InputError, read_settings

EMBEDDER = "model.transformer_module.decoder.mask_predictor.mask_embedder.0.0"
CONFIGS = ("legacy.yaml", "legacy_demo.yaml")


def gaussian(n, p, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def configured(name="legacy_demo.yaml", *more):
    return read_settings(legacy.LegacyConfig, "legacy", ["--config", str(HOME / "configs" / name), *more])


@pytest.fixture(scope="module")
def mask2former():
    return build_model(ModelSpec("mask2former", "smoke"), seed=0).eval()


@pytest.fixture(scope="module")
def loader():
    return [Sample(images, None, ids) for images, ids in batches(images_of(24), size=8)]


# ----------------------------------------------------------------------------------------------- unpaired rows, calls


def test_plain_hooks_append_every_call_and_the_corrected_recording_has_one_row_an_image(mask2former, loader):
    calls = len(mask2former.model.transformer_module.decoder.layers) + 1
    rows = legacy_rows(mask2former, loader, [EMBEDDER])[EMBEDDER]
    assert calls > 1 and len(rows) == calls * 24
    recording = record(mask2former, loader, [EMBEDDER])
    assert len(recording.matrix(EMBEDDER)) == 24 == len(set(recording.ids))


def test_a_network_with_itself_is_near_chance_the_legacy_way_and_one_the_corrected_way(mask2former, loader):
    X = legacy_rows(mask2former, loader, [EMBEDDER])[EMBEDDER]
    many = np.tile(X, (20, 1)) + 1e-3 * gaussian(20 * len(X), X.shape[1]) * X.std()  # longer than the cut, as there
    assert len(many) > 500
    shuffled = [legacy_linear_cka(*legacy_cut(many, many, np.random.default_rng(seed))) for seed in range(10)]
    assert legacy_linear_cka(many, many) == pytest.approx(1) and max(shuffled) < 0.1
    recording = record(mask2former, loader, [EMBEDDER])
    for name, options in legacy.CORRECTED.items():
        assert plane(name, recording, recording, **options).values.item() == pytest.approx(1, abs=1e-9)


def test_the_same_features_with_cut_rows_score_what_independent_ones_do():
    X = gaussian(1000, 5)
    scores = [legacy_similarities(X, X, np.random.default_rng(seed)) for seed in range(20)]
    chance = 5 / (500 + 5)  # √(pq)/√((n + p)(n + q)) of independent Gaussians
    assert np.mean([score["linear_cka"] for score in scores]) == pytest.approx(chance, rel=0.3)
    assert all(abs(score["rsa"]) < 0.1 for score in scores)
    together = made({"a": X, "b": X})
    assert plane("linear_cka", together).frame().loc["a", "b"] == pytest.approx(1)


def test_the_same_networks_measured_twice_differ_the_legacy_way_and_never_the_corrected_way():
    X, Y = gaussian(100, 8), gaussian(1000, 6, seed=1)
    once, again = (legacy_similarities(X, Y, np.random.default_rng(seed)) for seed in (0, 1))
    assert all(once[name] != again[name] for name in LEGACY_MEASURES)
    assert once == legacy_similarities(X, Y, np.random.default_rng(0))
    A, B = made({"a": X}), made({"b": Y[:100]})
    for name, options in legacy.CORRECTED.items():
        assert plane(name, A, B, **options).values == plane(name, A, B, **options).values


def test_a_cut_keeps_five_hundred_rows_then_the_shorter_sides_and_leaves_equal_short_sides_alone():
    X, Y = np.arange(1600.0)[:, None], np.arange(700.0)[:, None]
    x, y = legacy_cut(X, Y, np.random.default_rng(0))
    assert len(x) == len(y) == 500 and len(np.unique(x)) == len(np.unique(y)) == 500
    x, y = legacy_cut(X, Y[:100], np.random.default_rng(0))
    assert len(x) == 100 and (y == Y[:100]).all() and (np.diff(x[:, 0]) < 0).any()  # the shorter side stays in order
    x, y = legacy_cut(X[:100], Y[:100], np.random.default_rng(0))
    assert (x == X[:100]).all() and (y == Y[:100]).all()


def test_rows_of_other_images_are_refused_by_the_corrected_way():
    X = gaussian(20, 4)
    A, B = made({"a": X}), made({"b": X}, ids=[f"other{k}" for k in range(20)])
    assert legacy_linear_cka(*legacy_cut(X, X, np.random.default_rng(0))) == pytest.approx(1)  # it cannot know
    with pytest.raises(ValueError, match="different images"):
        plane("linear_cka", A, B)
    order = np.random.default_rng(0).permutation(20)
    shuffled = made({"b": X[order]}, ids=[f"i{k:03d}" for k in order])  # shuffled, but each row knows its image
    assert plane("linear_cka", A, shuffled).values.item() == pytest.approx(1)


def test_the_first_call_of_the_mask_embedder_is_constant_and_said_to_be(mask2former, loader):
    recording = record(mask2former, loader, [f"{EMBEDDER}@0", EMBEDDER])
    found = plane("linear_cka", recording)
    assert np.isnan(found.frame().loc[f"{EMBEDDER}@0", EMBEDDER])
    assert "is constant" in found.notes[f"{EMBEDDER}@0", EMBEDDER]
    rows = legacy_rows(mask2former, loader, [EMBEDDER])[EMBEDDER]  # the earlier way keeps it among the others
    assert np.ptp(rows[:8], axis=0).max() < 1e-5 < np.ptp(rows[8:16], axis=0).max()


# -------------------------------------------------------------------------------------------------------------- axes


def test_tokens_are_pooled_over_channels_the_legacy_way_and_over_tokens_the_corrected_way(mask2former, loader):
    old, new = (f"model.pixel_level_module.encoder.{middle}embeddings.norm" for middle in ("", "swin."))
    kept = []
    spelled = mask2former.declare_site(old).name
    handle = mask2former.get_submodule(spelled).register_forward_hook(lambda _m, _i, output: kept.append(output))
    rows = legacy_rows(mask2former, loader, [old, new])
    handle.remove()
    tokens = torch.cat(kept)
    np.testing.assert_allclose(rows[old], tokens.mean(2), atol=1e-5)
    np.testing.assert_array_equal(rows[old], rows[new])  # both spellings of transformers
    recording = record(mask2former, loader, [old])
    torch.testing.assert_close(recording.matrix(spelled), tokens.mean(1))


def test_every_published_site_is_found_in_both_presets_of_the_demo(mask2former):
    unetpp = build_model(ModelSpec("unetpp", "smoke"))
    for pair in configured().pairs:
        assert unetpp.declare_site(pair.unetpp) and mask2former.declare_site(pair.mask2former)
    deep = "model.pixel_level_module.encoder.encoder.layers.2.blocks.0.output.dense"
    assert mask2former.declare_site(deep).name.endswith(("blocks.0.mlp.fc2", "blocks.0.output.dense"))


def test_conv_maps_are_pooled_over_space_and_other_ranks_are_refused():
    maps = torch.rand(3, 5, 4, 2)
    torch.testing.assert_close(legacy_pool(maps), maps.flatten(2).mean(2))
    with pytest.raises(InputError, match="3-D and 4-D"):
        legacy_pool(torch.rand(3, 5))


def test_hooks_are_removed_and_the_mode_restored(mask2former):
    with pytest.raises(AttributeError):
        legacy_rows(mask2former, [object()], [EMBEDDER])
    module = mask2former.get_submodule(EMBEDDER)
    assert not module._forward_hooks


# ----------------------------------------------------------------------------------------------------------- measures


def test_legacy_svcca_is_negative_and_changes_with_the_means_where_the_real_one_does_neither():
    pairs = [(gaussian(60, 5, seed), gaussian(60, 5, seed + 100)) for seed in range(20)]
    legacy_values, real = ([f(X, Y) for X, Y in pairs] for f in (legacy_svcca, measures.svcca))
    assert min(legacy_values) < -0.02 and min(real) >= 0 and max(real) <= 1
    X = gaussian(60, 5)
    Y = X @ np.diag([1.0, 2, 4, 8, 16])[:, ::-1]  # the same features, their strengths the other way round
    assert measures.svcca(X, Y, variance=1.0) == pytest.approx(1) and abs(legacy_svcca(X, Y)) < 0.7
    assert measures.svcca(X + 100, Y) == pytest.approx(measures.svcca(X, Y))
    assert abs(legacy_svcca(X + 100, Y) - legacy_svcca(X, Y)) > 0.05


def test_legacy_svcca_is_the_mean_correlation_of_singular_scores_up_to_each_ones_sign():
    X, Y = gaussian(30, 3) + 1, gaussian(30, 4, seed=1) - 2
    vectors = [np.linalg.eigh(side.T @ side)[1] for side in (X, Y)]
    scores = [side @ v[:, ::-1] for side, v in zip((X, Y), vectors)]  # another route: eigenvectors, largest first
    each = [np.corrcoef(scores[0][:, i], scores[1][:, i])[0, 1] for i in range(3)]
    signs = [np.mean(np.array(s) * each) for s in np.array(np.meshgrid(*[[1, -1]] * 3)).reshape(3, -1).T]
    assert min(abs(np.array(signs) - legacy_svcca(X, Y))) < 1e-10


def test_the_epsilon_makes_identical_small_features_zero_where_the_corrected_one_is_one():
    X = 1e-5 * gaussian(50, 4)
    assert legacy_linear_cka(X, X) < 0.01 and measures.linear_cka(X, X) == pytest.approx(1)
    X = gaussian(50, 4)
    assert legacy_linear_cka(X, gaussian(50, 6, 1)) == pytest.approx(
        measures.linear_cka(X, gaussian(50, 6, 1), debiased=False), rel=1e-6
    )


def test_legacy_cka_of_independent_wide_features_is_high_and_the_debiased_one_is_zero():
    X, Y = gaussian(100, 1000), gaussian(100, 1000, seed=1)
    assert legacy_linear_cka(X, Y) == pytest.approx(1000 / 1100, abs=0.02)
    assert abs(measures.linear_cka(X, Y)) < 0.03


def test_one_bandwidth_for_two_spaces_depends_on_their_scales_and_the_corrected_one_does_not():
    X = gaussian(60, 5)
    assert legacy_rbf_cka(X, X) == pytest.approx(1) == measures.rbf_cka(X, 50 * X)
    assert legacy_rbf_cka(X, 50 * X) < 0.6
    same = legacy_rbf_cka(X, gaussian(60, 7, 1))  # one scale on both sides: Kornblith's biased RBF-CKA of that σ
    K, L = (np.exp(-((s[:, None] - s[None]) ** 2).sum(2) / (2 * _median(X) ** 2)) for s in (X, gaussian(60, 7, 1)))
    H = np.eye(60) - 1 / 60
    K, L = H @ K @ H, H @ L @ H
    assert same == pytest.approx(np.trace(K @ L) / math.sqrt(np.trace(K @ K) * np.trace(L @ L)))


def _median(X):
    return np.median([np.linalg.norm(X[i] - X[j]) for i in range(len(X)) for j in range(i)])


def test_legacy_rsa_is_spearman_of_upper_triangles_of_correlation_distances():
    X, Y = gaussian(12, 6), gaussian(12, 9, seed=1)
    upper = np.triu_indices(12, 1)
    expected = spearmanr(*(1 - np.corrcoef(side)[upper] for side in (X, Y))).statistic
    assert legacy_rsa(X, Y) == pytest.approx(expected) == measures.rsa(X, Y)


def test_a_scalar_site_is_nan_the_legacy_way_and_a_sentence_the_corrected_way():
    X, Y = gaussian(30, 1), gaussian(30, 6, seed=1)
    found = legacy_similarities(X, Y, np.random.default_rng(0))
    assert np.isnan(found["svcca"]) and np.isnan(found["rsa"]) and not np.isnan(found["linear_cka"])
    A, B = made({"segmentation_head.0": X}), made({"b": Y})
    for name, options in legacy.CORRECTED.items():
        places, recordings = ("segmentation_head.0", "b"), {"A": A, "B": B}
        note = legacy._why_no_number([plane(name, A, B, **options)], recordings, ("A", "B"), places)
        assert note.startswith("segmentation_head.0 is a scalar")


# ----------------------------------------------------------------------------------------------------------- freezing


def test_freezing_by_substring_takes_96_tensors_of_the_pixel_decoder_and_freezing_by_module_none():
    options = {"encoder_layers": 6}  # as many as the published model has
    by_name = build_model(ModelSpec("mask2former", "smoke", options=options))
    by_module = build_model(ModelSpec("mask2former", "smoke", freeze=("encoder",), options=options))
    inside = "model.pixel_level_module.decoder.encoder"
    assert sum(name.startswith(inside) for name in legacy_freeze(by_name)) == 96
    for model, frozen in ((by_name, True), (by_module, False)):
        assert {not p.requires_grad for n, p in model.named_parameters() if n.startswith(inside)} == {frozen}


@pytest.mark.parametrize("freezing", ["substring", "module"])
def test_a_trained_encoder_frozen_by_name_drifts_and_one_frozen_by_module_does_not(freezing, synthetic_root, tmp_path):
    config = configured("legacy_demo.yaml", "--data", str(synthetic_root), "--freezing", freezing, "--epochs", "1")
    recipes = [dataclasses.replace(recipe, preset="smoke", weights="none") for recipe in config.models]
    config = legacy.settle(dataclasses.replace(config, models=recipes, out=str(tmp_path)))
    from sources import open_datasets

    datasets = open_datasets(config, needed=("train", "validation"))
    legacy.train_network(config, config.models[0], 0, datasets, tmp_path, torch.device("cpu"))
    before = build_model(config.models[0].spec, 0).state_dict()
    after = load_model(tmp_path / "models" / "unetpp-seed0" / "last")[0].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    encoder = {name for name in moved if name.startswith("encoder.")}
    assert moved - encoder
    drifted = {name for name in encoder if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert encoder == drifted and bool(drifted) == (freezing == "substring")


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", CONFIGS)
def test_both_configurations_name_every_published_pair_and_its_sites(name):
    config = configured(name)
    settled = legacy.settle(config)
    printed = legacy._printed()
    assert {pair.published for pair in settled.pairs if pair.published} == set(printed["pair"])
    for pair in settled.pairs:
        rows = printed[printed["pair"] == pair.published]
        assert {(pair.unetpp, pair.mask2former)} == set(zip(rows.unetpp, rows.mask2former)) or not pair.published
    for recipe in settled.models:
        assert (recipe.normalization, recipe.loss, recipe.optimizer, recipe.schedule) == (
            *("none", "scaled_dice", "adam", "constant"),
        )
        assert (recipe.batch_size, recipe.weight_decay) == (16, 1e-4) and recipe.patience == recipe.average == 0
    assert (config.blur, config.interpolation, config.flips) == (2, "bicubic", False)
    assert config.models[1].answer == "query:1"


def test_the_real_configuration_is_the_earlier_recipe_and_the_demo_is_not():
    real, demo = (configured(name) for name in CONFIGS)
    assert real.own_models_and_data and not demo.own_models_and_data
    assert {(r.epochs, r.learning_rate) for r in real.models} == {(10, 1e-4)} and real.image_size == 128
    assert legacy.default_folder(demo) == "results/legacy-synthetic"
    assert legacy.default_folder(real) == "results/legacy-isic2018-isic2018"


def test_the_published_table_is_the_reference(shared):
    text = (shared / "reference" / "published_tables.md").read_text(encoding="utf-8").replace("−", "-")
    lines = [
        line for line in text.splitlines() if line.startswith(("| `encoder.layer", "| `decoder", "| `segmentation"))
    ]
    order = list(dict.fromkeys(legacy._printed()["pair"]))
    assert len(lines) == len(order) == 8
    for pair, line in zip(order, lines):
        for measure, cell in zip(("linear_cka", "svcca", "rbf_cka", "rsa"), line.split("|")[3:7]):
            printed = legacy._printed().sort_values("printing").set_index(["pair", "measure"])["printed"]
            rows = printed[[key == (pair, measure) for key in printed.index]]
            words = cell.replace("(", " ").split()
            assert rows.tolist() == [word for word in words if word == "nan" or word[-4:].isdigit()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [0]}, "seeds must be two different numbers"),
        ({"freezing": "all"}, "unknown freezing 'all'"),
        ({"cuts": 1}, "cuts must be at least 2"),
        ({"weights": "a.pth"}, "use none or imagenet"),
        ({"pairs": []}, "each once"),
        ({"pairs": [legacy.SitePair("encoder.layer3", "x", "layer3")]}, "unknown published pair 'layer3'; closest"),
        ({"models": [legacy.Recipe(), legacy.Recipe()]}, "one of unetpp and one of mask2former"),
    ],
)
def test_settings_that_cannot_run_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        legacy.settle(dataclasses.replace(configured(), **changes))


def test_an_unknown_site_is_refused_before_any_image_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(legacy, "open_datasets", lambda *_, **__: pytest.fail("images were read"))
    pairs = [legacy.SitePair("encoder.layer9", EMBEDDER)]
    with pytest.raises(InputError, match=r"pairs, unetpp: .*'encoder.layer9'"):
        legacy.run(dataclasses.replace(configured(), pairs=pairs, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_pairs_without_any_corrected_number_still_make_a_table_and_a_page():
    config = legacy.settle(configured())
    config = dataclasses.replace(config, pairs=[pair for pair in config.pairs if "segmentation_head" in pair.name][:1])
    observations = pd.DataFrame(
        [
            legacy._seen(config.pairs[0], measure, "corrected", 0, math.nan, note="x is a scalar: no")
            for measure in legacy.CORRECTED
        ]
    )
    table = legacy_report.headline(config, observations)
    assert table["corrected"].isna().all() and list(table.columns) == legacy_report.COLUMNS


@pytest.mark.parametrize(
    ("values", "word"),
    [((0.1, 0.11, 0.105), "steady"), ((0.1, 0.2, 0.15), "varies"), ((-0.1, 0.1, 0.05), "changes sign")],
)
def test_a_number_is_named_after_what_its_recipe_gives_again(values, word):
    assert legacy_report.steadiness(*values) == word
    assert legacy_report.steadiness(*(-values[1], -values[0], -values[2])) == word
    assert legacy_report.steadiness(math.nan, math.nan, math.nan) == "no number"


# -------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(synthetic_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("legacy") / "out"
    config = configured("legacy_demo.yaml", "--data", str(synthetic_root), "--out", str(out), "--epochs", "1")
    recipes = [dataclasses.replace(recipe, preset="smoke") for recipe in config.models]
    config = dataclasses.replace(config, models=recipes, limits={"validation": 4}, cuts=3, permutations=9, device="cpu")
    legacy.run(config)
    return config, out


def test_a_run_writes_every_observation_and_the_table_holds_them(finished):
    config, out = finished
    seen, table = pd.read_csv(out / "legacy.csv"), pd.read_csv(out / "table.csv")
    assert len(table) == len(config.pairs) * 4 and (out / "environment.json").exists()
    recipe = seen[seen.protocol == "legacy"]
    assert len(recipe) == 8 * 4 * 2 * 3  # pairs × measures × runs × cuts
    row = table[(table.pair == "x_1_1.conv1 × mask_embedder.0.0") & (table.measure == "linear_cka")].iloc[0]
    mine = recipe[(recipe.pair == row.pair) & (recipe.measure == row.measure)].set_index(["run", "cut"])["value"]
    assert (row.run1, row.run2, row.run1_cut_again) == (mine[1, 0], mine[2, 0], mine[1, 1])
    assert (row.published, row.published_again) == (0.0682, 0.0295)
    assert row.low == mine.min() and row.high == mine.max()
    corrected = seen[(seen.protocol == "corrected") & (seen.pair == row.pair) & (seen.measure == row.measure)]
    values = corrected[corrected.quantity == "value"]["value"]
    assert row.corrected == pytest.approx(values.mean(), abs=1e-5) and len(values) == 2
    assert set(corrected.quantity) == {"value", "null_high", "p_value", "floor", "ceiling", "u"}


def test_a_run_says_what_has_no_number_and_what_cannot_be_compared(finished):
    config, out = finished
    table = pd.read_csv(out / "table.csv")
    scalar, constant = (table[table.pair.str.contains(word)] for word in (r"segmentation_head\.0", "@0"))
    assert scalar.note.str.contains("is a scalar").all() and scalar.corrected.isna().all() and len(scalar) == 12
    assert constant.note.str.contains("is constant").all() and constant.corrected.isna().all()
    assert scalar[scalar.measure.isin(["svcca", "rsa"])].run1.isna().all()
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "no difference from it means anything" in text and "nothing is frozen" in text
    assert "encoders are frozen" not in text
    pretrained = [dataclasses.replace(recipe, weights="imagenet") for recipe in config.models]
    frozen = dataclasses.replace(config, models=pretrained, freezing="substring")
    assert "encoders are frozen" in legacy_report.reading(frozen, table)
    control = pd.read_csv(out / "control.csv")
    assert control["corrected"].dropna().sub(1).abs().max() < 1e-6
    assert {"images", "hash"} == set(json.loads((out / "data.json").read_text())["validation"])


def test_a_second_run_trains_nothing_and_gives_the_same_tables(finished, monkeypatch):
    config, out = finished
    monkeypatch.setattr(legacy.training._Run, "train_epoch", lambda *_: pytest.fail("trained again"))
    before = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    legacy.run(config)
    assert before == {path.name: path.read_bytes() for path in out.glob("*.csv")} and len(before) == 3
    with pytest.raises(InputError, match="other settings"):
        legacy.run(dataclasses.replace(config, cuts=4))


def test_the_last_checkpoint_is_measured_not_the_best(finished, monkeypatch):
    _, out = finished
    asked = []
    monkeypatch.setattr(legacy, "load_model", lambda path: (asked.append(path), (nn.Identity(), {}))[1])
    legacy._loaded(legacy.Recipe(), 0, out, True)
    assert asked[0].name == "last"
