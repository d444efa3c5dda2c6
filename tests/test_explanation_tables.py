"""Tables of an explanation study, from maps made by hand: pooled, compared, counted by kind, joined by id."""

import types

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from scipy.stats import t as student

from similarity import Recording, Site
from similarity.nulls import benjamini_hochberg
from studies import explanation_work
from studies.explained_images import Chosen, Images
from studies.explaining import Made
from studies.explanation_checks import Checks
from studies.explanation_joined import MASKS, joined
from studies.explanation_tables import (
    DIFFERENT,
    OTHER_SEED,
    SAME,
    groups,
    inside_masks,
    inventory,
    kinds,
    maps_of,
    pooled,
    similarities,
    with_failures,
    without_missing,
)
from studies.explanation_ways import ways_of
from studies.explanation_work import Job
from studies.subjects import SEGMENTATION, Subject
from utils import InputError

IDS = tuple(f"i{k:02d}" for k in range(12))
CONFIG = types.SimpleNamespace(
    compared_at=4, similarities=["cosine", "spearman"], sigma=1.0, top=0.25, permutations=99, resamples=50, seed=0
)
FAMILIES = {"A": "CNN", "B": "CNN", "C": "transformer", "D": "transformer"}
SUBJECTS = [Subject(label, FAMILIES[label], seed, SEGMENTATION, 8) for label in FAMILIES for seed in (0, 1)]
NAMES = [subject.name for subject in SUBJECTS]


def generated(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def made(maps, ids=IDS, **parts):
    nothing = {"gaps": {}, "errors": {}, "settings": {}, "refused": {}, "seconds": 1.2}
    return Made(maps=maps, ids=tuple(ids), **nothing | parts)


class Pool(Chosen):
    """Twelve images of 8 px whose mask is the upper left quarter, in one image more of it."""

    def at(self, size):
        masks = torch.zeros(len(self.ids), 1, size, size, dtype=torch.bool)
        for row, name in enumerate(self.ids):
            masks[row, :, : size // 2, : size // 2 + int(name[1:]) % 4] = True
        return Images(self.ids, torch.zeros(len(self.ids), 3, size, size), masks, None)


def job_of(methods=None, ids=IDS):
    ways = ways_of(methods or {"occlusion": {}}, len(ids))
    return Job(Pool(SEGMENTATION, ids, "f", None), ways, Checks(8, 4, 4, 2, "mask"), "true", None, 8, 0, "cpu")


@pytest.fixture(scope="module")
def kept():
    """What is common to all, to the family, to the label and to the seed, in falling strength."""
    found = {}
    parts = {"all": generated(1, 12, 8, 8)}
    for row, subject in enumerate(SUBJECTS):
        for place, key in enumerate((subject.family, subject.label)):
            parts.setdefault(key, generated(10 + 7 * place + ord(key[0]), 12, 8, 8))
        maps = parts["all"] + parts[subject.family] + parts[subject.label] + 0.3 * generated(100 + row, 12, 8, 8)
        found[subject.name] = {"occlusion": made({"occlusion": maps})}
    return found


NO_CHECKS = pd.DataFrame({"network": NAMES, "variant": "occlusion", "failed": "", "failed_absolute": ""})


@pytest.fixture(scope="module")
def table(kept):
    return similarities(CONFIG, SUBJECTS, job_of(), kept, NO_CHECKS)


# ------------------------------------------------------------------------------------------------------------- compared


def test_pooling_is_the_mean_of_blocks():
    maps = generated(0, 3, 8, 8)
    expected = maps.double().numpy().reshape(3, 4, 2, 4, 2).mean((2, 4))
    assert pooled(maps, 4) == pytest.approx(expected, abs=1e-12) and pooled(maps, 4).dtype == np.float64
    assert pooled(maps, 8) == pytest.approx(maps.double().numpy())
    uneven = pooled(torch.arange(5.0).expand(1, 5, 5), 2)[0]  # columns 0 to 2 and 2 to 4
    assert uneven == pytest.approx(np.array([[1, 3], [1, 3]]))


def test_networks_without_a_variant_are_not_compared_in_it(kept):
    less = kept | {"A (0)": {"occlusion": made({}, refused={"occlusion": "no"})}}
    assert (
        "A (0)" not in maps_of(less, "occlusion", "occlusion", 4)
        and len(maps_of(less, "occlusion", "occlusion", 4)) == 7
    )
    found = similarities(CONFIG, SUBJECTS, job_of(), less, NO_CHECKS)
    assert "A (0)" not in set(found["model_a"]) | set(found["model_b"]) and len(found) == 2 * 7 * 6 / 2


def test_nothing_to_compare_is_a_sentence(kept):
    alone = {name: {"occlusion": made({})} for name in NAMES[1:]} | {"A (0)": kept["A (0)"]}
    with pytest.raises(InputError, match="no method gave maps of two networks"):
        similarities(CONFIG, SUBJECTS, job_of(), alone, NO_CHECKS)


def test_maps_are_matched_by_id_and_not_by_place(kept, table):
    order = np.random.default_rng(0).permutation(12)
    turned = {
        "occlusion": made({"occlusion": kept["C (0)"]["occlusion"].maps["occlusion"][order]}, [IDS[k] for k in order])
    }
    again = similarities(CONFIG, SUBJECTS, job_of(), kept | {"C (0)": turned}, NO_CHECKS)
    for column in ("mean", "dissimilarity", "null_mean", "ceiling"):
        assert again[column].to_numpy() == pytest.approx(table[column].to_numpy(), abs=1e-9), column


def test_every_pair_has_its_kind_its_mean_and_a_q_over_all_pairs(table, kept):
    kind = {frozenset(pair): kind for *pair, kind in table[["model_a", "model_b", "kind"]].itertuples(index=False)}
    assert len(kind) == 28 and len(table) == 2 * 28
    assert kind[frozenset(["A (0)", "A (1)"])] == OTHER_SEED
    assert kind[frozenset(["A (0)", "B (1)"])] == SAME and kind[frozenset(["B (0)", "C (0)"])] == DIFFERENT
    row = table[(table["model_a"] == "A (0)") & (table["model_b"] == "C (1)") & (table["similarity"] == "cosine")].iloc[
        0
    ]
    a, b = (pooled(kept[name]["occlusion"].maps["occlusion"], 4).reshape(12, -1) for name in ("A (0)", "C (1)"))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert row["mean"] == pytest.approx(cosines.mean())
    for _, part in table.groupby("similarity"):
        assert part["q"].to_numpy() == pytest.approx(benjamini_hochberg(part["p"].to_numpy()))


# ---------------------------------------------------------------------------------------------------- failing and kinds


def test_a_failing_method_is_named_with_its_network_in_every_row_that_uses_it():
    rows = pd.DataFrame({"model_a": ["A (0)", "A (0)", "B (0)"], "model_b": ["B (0)", "C (0)", "C (0)"]})
    checks = pd.DataFrame(
        {"network": ["A (0)", "C (0)", "B (0)"], "variant": ["ig", "ig", "shap"], "failed": ["x", "y", "z"]}
    )
    found = with_failures(rows.assign(method="ig"), checks)["failed"]
    assert found.tolist() == ["A (0): x", "A (0): x; C (0): y", "C (0): y"]
    assert with_failures(rows.assign(method="shap"), checks)["failed"].tolist() == ["B (0): z", "", "B (0): z"]
    one = with_failures(pd.DataFrame({"model": ["A (0)", "D (0)"], "method": "ig"}), checks)
    assert one["failed"].tolist() == ["A (0): x", ""]


def by_hand(rows):
    columns = ["model_a", "model_b", "kind", "mean", "null_mean", "ceiling", "q", "failed"]
    return pd.DataFrame(rows, columns=columns).assign(method="m", similarity="cosine")


def test_u_is_a_ratio_of_sums_over_the_pairs_that_have_a_ceiling():
    rows = [
        ("A (0)", "C (0)", DIFFERENT, 0.3, 0.1, 0.5, 0.01, ""),
        ("A (0)", "C (1)", DIFFERENT, 0.5, 0.1, 0.9, 0.20, "A (0): x"),
        ("B (0)", "C (0)", DIFFERENT, 0.1, 0.0, 0.001, 0.03, ""),  # next to its null: a u of 100 of its own
        ("B (0)", "C (1)", DIFFERENT, 0.7, 0.2, np.nan, 0.04, ""),
        ("A (0)", "B (0)", SAME, 0.7, 0.2, 0.1, 0.04, "A (0): x"),
    ]
    labels = {name: name[0] for row in rows for name in row[:2]}
    found = kinds(by_hand(rows), labels).set_index("kind")
    row = found.loc[DIFFERENT]
    assert row["u"] == pytest.approx((0.2 + 0.4 + 0.1) / (0.4 + 0.8 + 0.001))
    assert row["mean"] == pytest.approx(0.4) and row["null_mean"] == pytest.approx(0.1) and row["pairs"] == 4
    assert row["above_null"] == 0.75 and row["failed"] == 0.25
    assert np.isnan(found.loc[SAME, "u"])  # no room between chance and ceiling
    assert np.isnan(found.loc[SAME, "mean_low"])  # two labels


def test_intervals_leave_out_a_label_with_all_its_pairs():
    rows, values = [], iter([0.1, 0.2, 0.4, 0.3, 0.6, 0.5])
    for place, a in enumerate("ABCD"):
        rows += [(f"{a} (0)", f"{b} (0)", SAME, next(values), 0.0, 1.0, 0.01, "") for b in "ABCD"[place + 1 :]]
    row = kinds(by_hand(rows), {f"{a} (0)": a for a in "ABCD"}).iloc[0]
    without = [np.mean([r[3] for r in rows if a not in (r[0][0], r[1][0])]) for a in "ABCD"]
    error = np.sqrt(3 / 4 * ((np.array(without) - np.mean(without)) ** 2).sum())
    reach = student.ppf(0.975, 3) * error
    assert (row["mean_low"], row["mean_high"]) == pytest.approx((0.35 - reach, 0.35 + reach))
    assert (row["u_low"], row["u_high"]) == pytest.approx((0.35 - reach, 0.35 + reach))  # chance 0, ceiling 1


def test_seeds_agree_most_and_families_least_in_maps_made_so(table):
    labels = {subject.name: subject.label for subject in SUBJECTS}
    found = kinds(table, labels).set_index(["similarity", "kind"])
    for similarity in CONFIG.similarities:
        means = [found.loc[(similarity, kind), "mean"] for kind in (OTHER_SEED, SAME, DIFFERENT)]
        assert means == sorted(means, reverse=True) and means[0] - means[2] > 0.3
        u = [found.loc[(similarity, kind), "u"] for kind in (OTHER_SEED, DIFFERENT)]
        assert u[0] == pytest.approx(1, abs=0.02) and u[1] < 0.6


# -------------------------------------------------------------------------------------------------------------- grouped


def test_groups_of_maps_made_by_family_are_the_families(table):
    found = groups(CONFIG, SUBJECTS, table[table["similarity"] == "cosine"])
    tree = found[(found["clustering"] == "hierarchical") & (found["parameter"] == 2) & (found["among"] == "all")]
    assert tree["ari"].tolist() == [1.0]
    assert (tree["p_smallest"] == 1 / 3).all()  # AB|CD and CD|AB of the six arrangements of two and two labels
    mantel = found[found["clustering"] == "none (Mantel)"]
    assert (mantel["r"] > 0.9).all()


def test_networks_on_which_the_method_fails_are_left_out_of_the_faithful_ones(kept):
    checks = NO_CHECKS.assign(failed=["x" if name.startswith("D") else "" for name in NAMES])
    pairs = similarities(CONFIG, SUBJECTS, job_of(), kept, checks)
    found = groups(CONFIG, SUBJECTS, pairs[pairs["similarity"] == "cosine"])
    assert found.groupby("among")["models"].max().to_dict() == {"all": 8, "faithful": 6}


def test_networks_without_a_value_are_left_out_the_worst_first():
    pairs = pd.DataFrame(
        [("A", "B", 0.1), ("A", "C", np.nan), ("B", "C", np.nan), ("A", "D", 0.2), ("B", "D", 0.3), ("C", "D", np.nan)],
        columns=["model_a", "model_b", "mean"],
    )
    left = without_missing(pairs)
    assert set(left["model_a"]) | set(left["model_b"]) == {"A", "B", "D"} and len(left) == 3


# ------------------------------------------------------------------------------------------------------------ inventory


def test_the_inventory_counts_maps_and_says_why_there_are_none():
    job = job_of({"occlusion": {}, "grad_cam": {"depths": [0.5, 1.0], "images": 6}})
    cams = {"grad_cam, 100 %": torch.zeros(6, 8, 8)}
    own = {
        "occlusion": made({"occlusion": torch.zeros(12, 8, 8)}, seconds=2.4),
        "grad_cam": made(
            cams, IDS[:6], refused={"grad_cam, 50 %": "no map"}, settings={"grad_cam, 100 %": {"site": "last"}}
        ),
    }
    found = inventory(SUBJECTS[:1], job, {"A (0)": own}, NO_CHECKS).set_index("variant")
    assert found["explanations"].to_dict() == {"occlusion": 12, "grad_cam, 50 %": 0, "grad_cam, 100 %": 6}
    assert found["reason"].to_dict() == {"occlusion": "", "grad_cam, 50 %": "no map", "grad_cam, 100 %": ""}
    assert found.loc["occlusion", "milliseconds"] == pytest.approx(200)
    assert found.loc["grad_cam, 100 %", "settings"] == "site last"


def test_all_attribution_inside_the_masks_is_a_mass_of_one(kept):
    images = job_of().chosen.at(8)
    inside = made({"occlusion": images.masks[:, 0].float()})
    outside = made({"occlusion": (~images.masks[:, 0]).float()})
    own = {name: {"occlusion": inside if name.startswith("A") else outside} for name in NAMES}
    failed = ["x" if name == "B (1)" else "" for name in NAMES]
    checks = NO_CHECKS.assign(failed=failed, failed_absolute=["y" if name == "A (0)" else "" for name in NAMES])
    found = inside_masks(CONFIG, SUBJECTS, job_of(), own, checks).set_index(["model", "quantity"])
    for quantity in ("positive mass", "absolute mass", "pointing"):
        assert found.loc[("A (0)", quantity), "mean"] == pytest.approx(1)
        assert found.loc[("B (0)", quantity), "mean"] == pytest.approx(0)
        assert found.loc[("A (0)", quantity), "other_seeds"] == pytest.approx(1)
    assert found.loc[("B (1)", "pointing"), "failed"] == "B (1): x" and found.loc[("B (0)", "pointing"), "failed"] == ""
    assert found.loc[("A (0)", "pointing"), "failed"] == "" and found.loc[("B (1)", "absolute mass"), "failed"] == ""
    assert found.loc[("A (0)", "absolute mass"), "failed"] == "A (0): y"


# --------------------------------------------------------------------------------------------------------------- joined


SITES = [Site("one", ("batch", "channel"), part="encoder"), Site("two", ("batch", "channel"), part="decoder")]


@pytest.fixture
def others(monkeypatch):
    """Recordings and masks of every network, those of the C in another order of the images."""
    recordings, answers = {}, {}
    for row, subject in enumerate(SUBJECTS):
        order = np.random.default_rng(row).permutation(12) if subject.label == "C" else np.arange(12)
        ids = [IDS[k] for k in order]
        features = {site.name: generated(50, 12, 5)[order] + 0.5 * generated(60 + row, 12, 5)[order] for site in SITES}
        recordings[subject.name] = Recording(features, ids, SITES, "gap", "m", "d")
        masks = (generated(70, 12, 8, 8) + generated(80 + row, 12, 8, 8) > 0)[order]
        answers[subject.name] = dict(zip(ids, masks))
    monkeypatch.setattr(explanation_work, "recording", lambda subject, *_: recordings[subject.name])
    monkeypatch.setattr(explanation_work, "predictions", lambda subject, *_: answers[subject.name])
    return answers


def expected_of(kept, answers):
    """Per image: mean cosine and mean Dice over A and B with C and D, first seeds."""
    pairs = [(f"{a} (0)", f"{b} (0)") for a in "AB" for b in "CD"]
    maps = {name: pooled(kept[name]["occlusion"].maps["occlusion"], 4).reshape(12, -1) for name in NAMES}
    cosines = [
        [(u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(maps[a], maps[b])] for a, b in pairs
    ]
    dice = [
        [2 * (answers[a][i] & answers[b][i]).sum() / (answers[a][i].sum() + answers[b][i].sum()) for i in IDS]
        for a, b in pairs
    ]
    return np.mean(cosines, 0), np.mean(dice, 0)


def test_agreements_are_joined_by_id_over_first_seeds_of_different_families(kept, others):
    points, found = joined(CONFIG, SUBJECTS, job_of(), kept, None)
    cosines, dice = expected_of(kept, others)
    part = points[points["other"] == MASKS].set_index("id")
    assert part["y"].reindex(IDS).to_numpy() == pytest.approx(cosines)
    assert part["x"].reindex(IDS).to_numpy() == pytest.approx(dice)
    assert set(part["pairs"]) == {4}
    row = found.set_index("other").loc[MASKS]
    assert row["spearman"] == pytest.approx(spearmanr(cosines, dice).statistic) and row["n"] == 12
    assert set(found["other"]) == {
        MASKS,
        "agreement of encoder representations",
        "agreement of decoder representations",
    }


def test_of_one_family_all_pairs_of_labels_are_taken(kept, others):
    points, _ = joined(CONFIG, SUBJECTS[:4], job_of(), kept, None)
    assert set(points["pairs"]) == {1}


def test_seeds_of_one_network_join_nothing(kept, others):
    points, found = joined(CONFIG, SUBJECTS[:2], job_of(), kept, None)
    assert points.empty and found.empty


def test_too_few_images_are_a_reason_and_no_end(kept, others):
    few = {
        name: {"occlusion": made({"occlusion": kept[name]["occlusion"].maps["occlusion"].clone()})} for name in NAMES
    }
    few["A (0)"]["occlusion"].maps["occlusion"][3:] = 0  # zero maps have no cosine
    _, found = joined(CONFIG, SUBJECTS, job_of(), few, None)
    assert found["spearman"].isna().all() and found["reason"].str.contains("at least 4 are needed").all()


def test_networks_without_a_map_are_in_no_pair_on_either_side(kept, others):
    less = kept | {"A (0)": {"occlusion": made({}, refused={"occlusion": "no"})}}
    job = job_of()
    points, _ = joined(CONFIG, [s for s in SUBJECTS if s.name != "A (1)"], job, less, None)
    without, _ = joined(CONFIG, [s for s in SUBJECTS if s.label != "A"], job, kept, None)
    pd.testing.assert_frame_equal(points, without)
    assert set(points["pairs"]) == {2}
