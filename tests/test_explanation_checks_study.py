"""Verdicts on explanations: good maps beat random ones, turned ones fail, what survives random weights is flagged."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import wilcoxon
from torch import nn

from explanations.targets import Target
from similarity import Site
from similarity.nulls import benjamini_hochberg
from sources import ImageSource
from studies.explained_images import Chosen, Images
from studies.explaining import Made, make
from studies.explanation_checks import (
    ELSEWHERE,
    OBJECT,
    RANDOM,
    Asked,
    Checks,
    check_way,
    keep,
    known,
    random_curves,
    region,
)
from studies.explanation_verdicts import (
    GAP,
    NOT_BETTER,
    SAMPLING,
    SURVIVES,
    covered,
    normalised,
    over_networks,
    randomized,
    verdicts,
)
from studies.explanation_ways import ways_of
from studies.subjects import SEGMENTATION, Subject

SUBJECT = Subject("Quadrant", "CNN", 0, SEGMENTATION, 16)
CHECKS = Checks(images=8, few=4, cells=4, levels=2, cover="mask")
METHODS = {"occlusion": {"features": 4}, "kernel_shap": {"features": 4, "samples": 96}}
SUM = Target("sum", lambda model, images, rows: model(images).sum((1, 2, 3)))
NOTHING = Made({}, {}, {}, (), {}, {}, 0.0)


class Quadrant(nn.Module):
    """A logit map that is bright where the upper left quadrant is; all else is ignored."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
        with torch.no_grad():
            self.first.weight.abs_()
            self.last.weight.abs_()
            self.last.bias -= self(torch.full((1, 3, 16, 16), 0.6))[0, 0, 0, 0]  # the line between dark and bright

    def forward(self, images):
        inside = torch.zeros_like(images[:1, :1])
        inside[..., :8, :8] = 1
        return self.last(self.first(images * inside).relu())

    def default_sites(self):
        return [Site("first", ("batch", "channel", "height", "width"), part="encoder")]


def pictures(count=8, seed=0):
    """Dark pictures with a bright spot somewhere in the quadrant, another one elsewhere; the mask is the first."""
    generator = np.random.default_rng(seed)
    pixels = torch.from_numpy(generator.uniform(0, 0.3, (count, 3, 16, 16))).float()
    masks = torch.zeros(count, 1, 16, 16, dtype=torch.bool)
    for row in range(count):
        y, x = generator.integers(0, 4, 2)
        pixels[row, :, y : y + 4, x : x + 4] = 1
        pixels[row, :, 9:13, 9:13] = 1
        masks[row, :, y : y + 4, x : x + 4] = True
    return Images(tuple(f"i{row}" for row in range(count)), pixels, masks, None)


CHOSEN = Chosen(SEGMENTATION, pictures().ids, "f", ImageSource())


@pytest.fixture(scope="module")
def explained():
    """(what is asked, {variant: (way, its maps)}), the negated maps of occlusion as a third."""
    model, images = Quadrant().eval(), pictures()
    asked = Asked(SUBJECT, model, images, CHOSEN, lambda part: SUM, None, 32, 0)
    made = {way.name: (way, make(way, model, images, SUM, batch=32, seed=0)) for way in ways_of(METHODS, 8)}
    way, own = made["occlusion"]
    negated = dataclasses.replace(own, maps={"negated": -own.maps["occlusion"]})
    return asked, made | {"negated": (dataclasses.replace(way, name="negated"), negated)}


def checked(explained, checks=CHECKS, images=None):
    asked, made = explained
    asked = dataclasses.replace(asked, images=images or asked.images)
    parts = [check_way(asked, way, each, checks) for way, each in made.values()] + [random_curves(asked, checks)]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pd.concat([part[name] for part in parts if name in part], ignore_index=True) for name in names}


@pytest.fixture(scope="module")
def tables(explained):
    return checked(explained)


def judged(tables, made, labels=None):
    """A row a network and variant, by hand: made is {variant: Made}, the same for all networks."""
    return verdicts(tables, labels or {name: name for name in tables}, dict.fromkeys(tables, made))


@pytest.fixture(scope="module")
def verdict(tables, explained):
    made = {variant: each for variant, (_, each) in explained[1].items()}
    return judged({SUBJECT.name: tables}, made).set_index("variant")


def test_maps_of_what_the_network_reads_beat_random_maps(verdict):
    for variant in METHODS:
        row = verdict.loc[variant]
        assert row.q < 0.05 and row.deletion < row.insertion - 0.2 and row.n == 8
        assert NOT_BETTER not in row.failed


def test_maps_that_say_the_opposite_fail(verdict):
    assert verdict.loc["negated"].p > 0.5 and verdict.loc["negated"].insertion < verdict.loc["negated"].deletion
    assert NOT_BETTER in verdict.loc["negated"].failed


def test_the_verdict_is_the_wilcoxon_test_of_the_areas(tables, verdict):
    areas = {}
    for (variant, image, curve), part in tables["curves"].groupby(["variant", "id", "curve"]):
        part = part.sort_values("fraction")
        areas[variant, image, curve] = trapezoid(part["score"], part["fraction"])
    ids = pictures().ids
    variants = [*METHODS, "negated"]
    gain = {v: np.array([areas[v, i, "insertion"] - areas[v, i, "deletion"] for i in ids]) for v in (*variants, RANDOM)}
    expected = [wilcoxon(gain[variant] - gain[RANDOM], alternative="greater").pvalue for variant in variants]
    assert verdict.loc[variants, "p"].tolist() == pytest.approx(expected)
    assert verdict.loc[variants, "q"].tolist() == pytest.approx(benjamini_hochberg(np.array(expected)).tolist())


def test_every_order_of_removal_ends_at_the_image_and_at_the_baseline(tables):
    counted = tables["curves"].groupby("variant")["id"].nunique()
    assert counted.to_dict() == {"occlusion": 8, "kernel_shap": 8, "negated": 8, RANDOM: 8}
    ends = tables["curves"].query("curve == 'deletion' and fraction in (0, 1)")
    assert ends.groupby(["id", "fraction"])["score"].agg(np.ptp).max() < 1e-4


def test_covering_the_object_tells_more_than_covering_as_much_elsewhere(tables):
    rows = covered({SUBJECT.name: tables}, {SUBJECT.name: "Quadrant"}, seed=0, resamples=200)
    rows = rows[rows["variant"] == "occlusion"].set_index("which")
    of_object, elsewhere = rows.loc[OBJECT], rows.loc[ELSEWHERE]
    assert of_object.n == elsewhere.n == 4 and of_object.covered == "the object's mask"
    assert of_object.fall > 0.1 and elsewhere.fall == pytest.approx(0, abs=1e-6)  # reads the quadrant alone
    assert of_object.answer == 1 and of_object.answer_covered < 0.5 and elsewhere.answer_covered == 1
    part = tables["cover"].query("variant == 'occlusion' and which == 'object'")
    expected = ((part["score"] - part["score_covered"]) / part["score"].abs().mean()).mean()
    assert of_object.fall == pytest.approx(expected) and of_object.fall_low <= of_object.fall <= of_object.fall_high


def test_an_image_that_is_covered_whole_is_left_out_and_the_others_are_not(explained):
    images = explained[0].images
    masks = images.masks.clone()
    masks[1] = True
    found = checked(explained, images=dataclasses.replace(images, masks=masks))["cover"]
    assert sorted(found["id"].unique()) == ["i0", "i2", "i3"]
    masks[:] = True
    found = checked(explained, images=dataclasses.replace(images, masks=masks))
    rows = covered({"A": found}, {"A": "A"}, 0, 10)
    assert rows["n"].tolist() == [0] * 6 and set(rows["reason"]) == {"all of every image is covered"}


@pytest.mark.parametrize("cover", ["mask", "box", "centre"])
def test_what_is_covered_elsewhere_is_as_large_and_elsewhere(cover):
    images = pictures()
    images = dataclasses.replace(images, masks=images.masks & (torch.rand(images.masks.shape) < 0.7))
    hidden, moved = (region(images, cover, which, None)[0] for which in (OBJECT, ELSEWHERE))
    assert torch.equal(hidden.sum((1, 2, 3)), moved.sum((1, 2, 3)))
    assert cover == "centre" or not (hidden & moved).any()
    if cover == "box":
        assert (hidden | ~images.masks).all() and (hidden.sum((1, 2, 3)) <= 16).all()
    if cover == "centre":
        assert torch.equal(hidden[0, 0, 4:12, 4:12], torch.ones(8, 8, dtype=bool)) and hidden[0].sum() == 64


def test_a_network_that_is_not_explained_again_has_curves_alone(explained):
    assert list(checked(explained, dataclasses.replace(CHECKS, again=False))) == ["curves"]


def test_more_levels_than_layers_are_a_reason_and_no_end(explained):
    found = checked(explained, dataclasses.replace(CHECKS, levels=9))
    assert "level" not in found["randomization"]
    made = {variant: each for variant, (_, each) in explained[1].items()}
    table = judged({"Quadrant (0)": found}, made)
    assert table["randomized"].isna().all() and not table["failed"].str.contains(SURVIVES).any()
    assert table["unchecked"].str.contains("levels must be 1 to 2").all()


def test_the_passes_of_the_checks_are_those_that_are_made(explained):
    asked, made = explained
    counted, real = [], Quadrant.forward
    model = Quadrant().eval()
    model.forward = lambda images: counted.append(len(images)) or real(model, images)
    (way, each) = made["occlusion"]
    check_way(dataclasses.replace(asked, model=model), way, each, CHECKS)
    forward, _ = CHECKS.passes(way)
    assert forward * 0.7 < sum(counted) < forward * 1.3


# -------------------------------------------------------------------------------------------- from numbers made by hand


def curve(variant, deletion, insertion, image="i"):
    frames = []
    for name, scores in (("deletion", deletion), ("insertion", insertion)):
        rows = {"variant": variant, "id": image, "curve": name, "fraction": np.linspace(0, 1, len(scores))}
        frames.append(pd.DataFrame(rows | {"score": scores, "baseline": "mean"}))
    return pd.concat(frames)


def test_normalised_curves_run_from_the_baseline_to_the_image():
    table = pd.concat([curve("v", [10, 4, 2], [2, 8, 10]), curve("v", [20, 6, 0], [0, 14, 20], "j")])
    found = normalised(table).set_index(["curve", "fraction"])["score"]
    assert found["deletion"].tolist() == pytest.approx([1, (5 - 1) / 14, 0])  # of means 15, 5, 1
    assert found["insertion"].tolist() == pytest.approx([0, (11 - 1) / 14, 1])


def test_over_networks_is_the_mean_with_the_middle_ninety_percent():
    values = np.linspace(0, 1, 21)
    found = {f"n{k}": {"curves": curve("v", [1, y, 0], [0, y, 1])} for k, y in enumerate(values)}
    rows = over_networks(found).set_index(["kind", "label", "fraction"])
    middle = rows.loc["deletion", "v", 0.5]
    assert middle[["score", "low", "high", "networks"]].tolist() == pytest.approx([0.5, 0.05, 0.95, 21])
    assert rows.loc["insertion", "v", 1.0][["score", "low", "high"]].tolist() == [1, 1, 1]


def made_by_hand(gain, correlation=None, absolute=0.0):
    """Tables of six images whose insertion area lies `gain` above that of random maps; the scale is 0 to 1."""
    frames = [curve("v", [1, 0.5, 0], [0, 0.5 + 2 * (gain + k / 100), 1], f"i{k}") for k in range(6)]
    frames += [curve(RANDOM, [1, 0.5, 0], [0, 0.5, 1], f"i{k}") for k in range(6)]
    found = {"curves": pd.concat(frames)}
    if correlation is not None:
        columns = ["variant", "level", "randomized", "rank_correlation", "rank_correlation_absolute"]
        rows = [("v", 1, 0.4, 0.9, 0.9)] + [("v", 2, 1.0, correlation + s, absolute + s) for s in (-0.1, 0.1)]
        found["randomization"] = pd.DataFrame(rows, columns=columns)
    return found


@pytest.mark.parametrize(
    ("gain", "correlation", "absolute", "failed"),
    [
        (0.2, 0.3, 0.3, ""),
        (0.2, 0.7, 0.0, SURVIVES),
        (0.2, 0.0, 0.7, ""),  # the same places, other signs: see the test that follows
        (-0.2, 0.3, 0.3, NOT_BETTER),
        (-0.2, 0.7, 0.0, f"{NOT_BETTER}; {SURVIVES}"),
        (0.2, -0.9, 0.0, ""),
    ],
)
def test_what_fails_is_said_in_words(gain, correlation, absolute, failed):
    (row,) = judged({"A": made_by_hand(gain, correlation, absolute)}, {"v": NOTHING}).to_dict("records")
    assert row["failed"] == failed and row["randomized"] == pytest.approx(correlation) and row["n"] == 6
    assert row["insertion"] == pytest.approx(0.5 + gain + 0.025) and row["deletion"] == pytest.approx(0.5)
    assert row["p"] == pytest.approx(1 / 2**6 if gain > 0 else 1)  # all six images to one side


def test_absolute_maps_are_judged_apart():
    """Integrated Gradients are large where an image differs from its baseline, whatever the weights."""
    (row,) = judged({"A": made_by_hand(0.2, 0.0, 0.7)}, {"v": NOTHING}).to_dict("records")
    assert row["failed"] == "" and row["failed_absolute"] == SURVIVES
    (row,) = judged({"A": made_by_hand(0.2, 0.7, 0.0)}, {"v": NOTHING}).to_dict("records")
    assert row["failed"] == SURVIVES and row["failed_absolute"] == ""


def test_another_seed_shares_the_randomisation_of_its_label_and_no_other():
    tables = {"A (0)": made_by_hand(0.2, 0.7), "A (1)": made_by_hand(0.2), "B (0)": made_by_hand(0.2)}
    found = judged(tables, {"v": NOTHING}, {"A (0)": "A", "A (1)": "A", "B (0)": "B"}).set_index("network")
    assert found["failed"].to_dict() == {"A (0)": SURVIVES, "A (1)": SURVIVES, "B (0)": ""}
    assert found.loc["B (0)", "unchecked"] == "not explained again"


def test_equal_curves_are_not_better_than_random_and_neither_is_a_network_that_ignores_its_input():
    same = [[1, 0.5, 0], [0, 0.5, 1]]
    for deletion, insertion in (same, [[3, 3, 3], [3, 3, 3]]):
        table = pd.concat([curve(v, deletion, insertion, f"i{k}") for k in range(6) for v in ("v", RANDOM)])
        (row,) = judged({"A": {"curves": table}}, {"v": NOTHING}).to_dict("records")
        assert (row["p"], row["failed"]) == (1.0, NOT_BETTER)
        assert np.isnan(row["insertion"]) == (deletion[0] == 3)
        shares = over_networks({"A": {"curves": table}})
        assert shares["score"].isna().all() == (deletion[0] == 3) and np.isfinite(shares["score"].dropna()).all()


def test_accuracy_is_the_median_gap_and_sampling_error_and_fails_above_one_half():
    sums = torch.tensor([1.0, 2.0, 4.0, 8.0])
    maps = {"v": (sums[:, None, None] / 4).expand(4, 2, 2)}

    def row(missed, errors):
        made = Made(maps, {"v": sums * missed}, {"v": torch.tensor(errors)}, tuple("abcd"), {}, {}, 1.0)
        return judged({"A": made_by_hand(0.2)}, {"v": made}).iloc[0]

    # the map sums to change + gap: of a sum s and a gap g s, the share missed is g / (1 − g)
    fine = row(torch.tensor([0.1, 0.1, 0.2, 0.9]), [0.1, 0.2, 0.4, 9.0])
    assert fine.gap == pytest.approx((0.1 / 0.9 + 0.2 / 0.8) / 2) and fine.sampling_error == pytest.approx(0.3)
    assert fine.failed == ""
    assert row(torch.tensor([0.4, 0.4, 0.4, 0.0]), [0.1] * 4).failed == GAP  # 0.4 / 0.6
    assert row(torch.tensor([0.1] * 4), [0.1, 0.6, 0.6, 0.6]).failed == SAMPLING
    nothing = judged({"A": made_by_hand(0.2)}, {"v": NOTHING}).iloc[0]
    assert np.isnan(nothing.gap) and np.isnan(nothing.sampling_error) and nothing.failed == ""


def test_levels_of_the_randomisation_are_means_over_images():
    found = randomized({"A": made_by_hand(0.2, 0.3, 0.1)}, {"A": "A"}).set_index("level")
    assert found.loc[2, "rank_correlation"] == pytest.approx(0.3) and found.loc[2, "n"] == 2
    assert found.loc[1, "rank_correlation"] == 0.9 and found.loc[2, "randomized"] == 1
    assert randomized({"A": {"curves": None}}, {"A": "A"}).empty


# ---------------------------------------------------------------------------------------------------------------- files


def test_kept_tables_are_found_by_their_key_and_not_after_a_kill(tmp_path, monkeypatch):
    tables = {"curves": curve("v", [1, 0.5, 0], [0, 0.5, 1], "0012")}
    keep(tmp_path, tables, "key")
    found = known(tmp_path, "key")
    assert list(found) == ["curves"] and set(found["curves"]["id"]) == {"0012"}  # ids stay words
    assert known(tmp_path, "other") is None

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("studies.explanation_checks.write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(tmp_path, tables, "new")
    assert known(tmp_path, "key") is None and known(tmp_path, "new") is None


def test_a_table_that_is_missing_is_made_anew(tmp_path):
    keep(tmp_path, {"curves": curve("v", [1, 0], [0, 1])}, "key")
    (tmp_path / "curves.csv").unlink()
    assert known(tmp_path, "key") is None
    keep(tmp_path, {"curves": curve("v", [1, 0], [0, 1])}, "key")
    (tmp_path / "checks.json").write_text('{"key": "key"')
    assert known(tmp_path, "key") is None
    assert known(tmp_path / "nowhere", "key") is None
