"""The matrix of architectures: the ruler's numbers, what they follow, and what is said and refused."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from similarity import Recording, Site, plane
from similarity.calibration import Comparison, matched_depth_pairs
from studies import architecture_matrix
from studies.architecture_words import as_square, sentence
from utils import InputError

IMAGES, CHANNELS = 60, 8
SMALL = {"resamples": 6, "permutations": 199, "seed": 0, "image_permutations": 19}


def network(label, seed, state, latent, sites=(2, 2), noise=0.7):
    """A recording whose trained sites show a latent (images, k) beside noise of their own; untrained ones noise alone.

    All have some of the images' first latent, so that there is a floor.
    """
    rng = np.random.default_rng([*map(ord, label), seed, state == "trained"])
    low = np.random.default_rng(99).normal(size=(IMAGES, 3))
    features, listed = {}, []
    for part, count in zip(("encoder", "decoder"), sites):
        for depth in range(count):
            shown = np.column_stack([0.4 * low, latent]) if state == "trained" else 0.4 * low
            X = shown @ rng.normal(size=(shown.shape[1], CHANNELS)) + noise * rng.normal(size=(IMAGES, CHANNELS))
            features[f"{part}.{depth}"] = X
            listed.append(Site(f"{part}.{depth}", ("batch", "channel"), part=part))
    tensors = {name: torch.as_tensor(X).float() for name, X in features.items()}
    return Recording(tensors, [f"i{k:03d}" for k in range(IMAGES)], listed, "gap", f"{label}{seed}{state}", "d")


def facts_of(families, scores=None, **more):
    labels = [f"n{place}" for place in range(len(families))]
    table = {"label": labels, "title": [f"Net {place}" for place in range(len(families))], "family": families}
    scores = np.random.default_rng(1).permutation(len(families)) / 100 + 0.7 if scores is None else scores
    table |= {"encoder": [f"e{p % 4}" for p in range(len(families))], "iou": scores}
    table["pretrained"] = [place % 2 == 0 for place in range(len(families))]
    return pd.DataFrame(table | more)


def networks_of(latents, seeds=(0, 1), states=("trained", "untrained"), **options):
    return {
        (f"n{place}", seed, state): network(f"n{place}", seed, state, latent, **options)
        for place, latent in enumerate(latents)
        for seed, state in itertools.product(seeds, states)
    }


def latent_of(*seed):
    return np.random.default_rng(list(seed)).normal(size=(IMAGES, 3))


@pytest.fixture(scope="module")
def by_family():
    families = ["CNN"] * 4 + ["transformer"] * 4 + ["hybrid"] * 2
    order = {"CNN": 0, "transformer": 1, "hybrid": 2}
    facts = facts_of(families)
    networks = networks_of([latent_of(5, order[family]) for family in families])
    return networks, facts, architecture_matrix.compare(networks, facts, **SMALL)


@pytest.fixture(scope="module")
def three():
    """Three labels of three seeds, of different depths."""
    latents = [latent_of(1), latent_of(1), latent_of(2)]
    networks = {
        name: network(*name, latents[int(name[0][1])], sites=((3, 4), (5, 2), (3, 4))[int(name[0][1])])
        for name in networks_of(latents, seeds=(0, 1, 2))
    }
    return networks, facts_of(["CNN", "CNN", "hybrid"])


def one(table, a, b, part):
    return table[(table["label_a"] == a) & (table["label_b"] == b) & (table["part"] == part)].iloc[0]


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_the_numbers_of_a_pair_are_the_rulers_by_hand(three):
    networks, facts = three
    tables = architecture_matrix.compare(networks, facts, **SMALL)
    own = list(itertools.combinations(range(3), 2))
    for part in ("encoder", "decoder"):
        sides = {name: recording.select(part=part) for name, recording in networks.items()}

        def planes(a, b, state, pairs, sides=sides):
            return {(i, j): plane("linear_cka", sides[a, i, state], sides[b, j, state]).values for i, j in pairs}

        A, B = sides["n0", 0, "trained"], sides["n1", 0, "trained"]
        every = list(itertools.permutations(range(3), 2))  # two of one seed may have begun as one
        owns = [planes(label, label, "trained", own) for label in ("n0", "n1")]
        cross, floor = (planes("n0", "n1", state, every) for state in ("trained", "untrained"))
        comparison = Comparison(A.names, B.names, cross, *owns, floor)
        pairs = matched_depth_pairs(A, B) + [(a, b) for b, a in matched_depth_pairs(B, A)]
        row = one(tables["matrix"], "n0", "n1", part)
        for name, value in comparison.scale(pairs).items():
            assert row[name] == pytest.approx(float(value), abs=1e-9), name
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        assert row["site_pairs"] == len(pairs) and row["network_pairs"] == 6
        assert row["interval_over"] == "images and seeds"
        own_row = one(tables["matrix"], "n0", "n0", part)
        expected = np.mean([np.diagonal(values).mean() for values in owns[0].values()])
        assert own_row["similarity"] == pytest.approx(expected) == own_row["ceiling"] and own_row["u"] == 1
        twins = planes("n0", "n0", "untrained", own)
        assert own_row["floor"] == pytest.approx(np.mean([np.diagonal(values).mean() for values in twins.values()]))


def test_own_seeds_are_left_out_one_by_one_with_everything_they_are_in():
    values = {(0, 1): 0.9, (0, 2): 0.7, (1, 2): 0.6}
    planes = {seeds: np.array([[value]]) for seeds, value in values.items()}
    floor = {seeds: np.array([[0.1]]) for seeds in values}
    again = {seeds: np.full((5, 1, 1), value) for seeds, value in values.items()}
    no_floor = {seeds: np.full((5, 1, 1), 0.1) for seeds in values}
    observed = Comparison(["s"], ["s"], planes, planes, planes, floor)
    samples = architecture_matrix.Resamples(Comparison(["s"], ["s"], again, again, again, no_floor), 50, 40)
    found = architecture_matrix.own_intervals(observed, samples, [("s", "s")])
    left = np.array([0.6, 0.7, 0.9])  # without seed 0, 1, 2
    se = np.sqrt(2 / 3 * ((left - left.mean()) ** 2).sum())
    assert found["similarity"] == pytest.approx(0.7333, abs=1e-4)
    assert (found["similarity_high"] - found["similarity"]) / se == pytest.approx(4.3027, abs=1e-3)  # t, 2 degrees


def test_every_pair_has_one_row_a_part_and_the_other_way_round_is_the_same(three):
    networks, facts = three
    tables = architecture_matrix.compare(networks, facts, **SMALL)
    turned = architecture_matrix.compare(networks, facts.iloc[::-1], **SMALL)
    assert len(tables["matrix"]) == 6 * 2
    for row in tables["matrix"].itertuples():
        other = one(turned["matrix"], row.label_b, row.label_a, row.part)
        for name in ("similarity", "floor", "ceiling", "u", "u_low", "u_high"):
            assert getattr(row, name) == pytest.approx(other[name], abs=1e-9), (row.label_a, row.label_b, name)


def test_shuffled_ids_change_nothing(three):
    networks, facts = three
    rng = np.random.default_rng(3)
    shuffled = {
        name: recording if place == 0 else recording.select(ids=list(rng.permutation(recording.ids)))
        for place, (name, recording) in enumerate(networks.items())
    }
    before, after = (architecture_matrix.compare(each, facts, **SMALL) for each in (networks, shuffled))
    for name in before:
        pd.testing.assert_frame_equal(before[name], after[name], rtol=1e-9)


def test_depth_bins_hold_every_pair_once_and_agree_with_one_bin(three):
    networks, facts = three
    tables = architecture_matrix.compare(networks, facts, **SMALL, bins=1)
    depth = tables["depth"].set_index(["label_a", "label_b", "part"])
    matrix = tables["matrix"].set_index(["label_a", "label_b", "part"])
    assert (depth["relative_depth"] == 0.5).all()
    for name in ("similarity", "floor", "ceiling", "u", "u_low"):
        np.testing.assert_allclose(depth[name], matrix.loc[depth.index, name])
    pairs = [("a", "x"), ("b", "y"), ("c", "z")]
    assert architecture_matrix.binned(pairs, list("abc"), list("xyz"), 2) == {0.25: pairs[:1], 0.75: pairs[1:]}
    assert list(architecture_matrix.binned(pairs, list("abc"), list("xyz"), 4)) == [0.125, 0.625, 0.875]


def test_a_constant_site_is_left_out_and_counted(three):
    networks, facts = three
    dead = networks["n0", 1, "trained"]
    dead = dataclasses.replace(dead, features=dead.features | {"encoder.1": dead["encoder.1"] * 0 + 1})
    found = architecture_matrix.compare(networks | {("n0", 1, "trained"): dead}, facts, **SMALL)["matrix"]
    row = one(found, "n0", "n2", "encoder")
    assert row["site_pairs_left_out"] == 2 and row["site_pairs"] == 4 and row["u"] == row["u"]


# ------------------------------------------------------------------------------------------------------ what it follows


def test_networks_that_share_a_latent_by_family_follow_family(by_family):
    _, _, tables = by_family
    found = tables["factors"].set_index(["part", "quantity", "factor"])
    for part in ("encoder", "decoder"):
        for quantity in ("similarity", "u"):
            row = found.loc[(part, quantity, "family")]
            assert row["p_holm"] < 0.05 and row["r"] > 0.8 and row["p_partial_holm"] < 0.05
            assert found.loc[(part, quantity, "task score"), "p_holm"] > 0.05
        assert found.loc[(part, "floor", "family"), "p"] > 0.01  # untrained twins share no latent of a family
    words = sentence(tables)
    assert words.startswith("Among 10 architectures (45 pairs") and words.count(".") > 1
    row = found.loc[("encoder", "similarity", "family")]
    assert f"encoders are more alike of one family ({row.difference:+.2f}, r {row.r:.2f}, p {row.p_holm:.2g}" in words


def test_networks_on_a_line_by_score_follow_task_score():
    scores = np.random.default_rng(2).permutation(9) / 10
    near = np.random.default_rng(8).normal(size=(2, IMAGES, 3))
    latents = [np.cos(1.5 * score) * near[0] + np.sin(1.5 * score) * near[1] for score in scores]
    facts = facts_of(["CNN", "hybrid", "CNN"] * 3, scores)
    found = architecture_matrix.compare(networks_of(latents), facts, **SMALL)["factors"]
    table = found[found["quantity"] == "similarity"].set_index(["part", "factor"])
    for part in ("encoder", "decoder"):
        assert table.loc[(part, "task score"), "p_holm"] < 0.05 and table.loc[(part, "task score"), "r"] > 0.8
        assert table.loc[(part, "family"), "p_holm"] > 0.05


def test_independent_networks_are_not_found_to_follow_anything():
    facts = facts_of(["CNN", "hybrid", "transformer"] * 3)
    tables = architecture_matrix.compare(networks_of([latent_of(7, k) for k in range(9)]), facts, **SMALL)
    table = tables["factors"]
    assert (table.loc[table["quantity"] == "similarity", "p_holm"] > 0.05).all()
    assert "encoders were not found more alike" in sentence(tables)
    assert "does not show that they follow nothing" in sentence(tables)


def test_with_so_few_architectures_nothing_can_be_told(three):
    networks, facts = three
    tables = architecture_matrix.compare(networks, facts, **SMALL)
    words = sentence(tables)
    smallest = tables["factors"].query("part == 'encoder' and quantity == 'similarity'")["p_smallest"].min()
    assert f"encoders cannot be told to follow anything: the smallest p that so few allow is {smallest:.2g}" in words
    two = {name: recording for name, recording in networks.items() if name[0] != "n2"}
    tables = architecture_matrix.compare(two, facts, **SMALL)
    assert "encoders allow no test (1 pair of items" in sentence(tables)


def test_a_label_without_a_number_is_left_out_of_what_is_followed_by_name():
    facts = facts_of(["CNN", "CNN", "hybrid", "hybrid", "transformer"])
    networks = networks_of([latent_of(k) for k in range(5)])
    bare = {name: r for name, r in networks.items() if name[0] != "n4" or name[2] == "trained"}
    tables = architecture_matrix.compare(bare, facts, **SMALL)
    u = tables["factors"].query("quantity == 'u'")
    assert (u["left_out"] == "n4").all() and (u["items"] == 4).all() and u["p"].notna().any()
    assert (tables["factors"].query("quantity == 'similarity'")["left_out"] == "").all()


# ------------------------------------------------------------------------------------------------ what there is not


def test_one_seed_has_no_ceiling_and_so_no_u_and_says_so():
    networks, facts = networks_of([latent_of(0)] * 3, seeds=(0,)), facts_of(["a", "a", "b"])
    tables = architecture_matrix.compare(networks, facts, **SMALL)
    row, own = (one(tables["matrix"], "n0", b, "encoder") for b in ("n1", "n0"))
    assert np.isnan(row[["ceiling", "u", "u_low"]].astype(float)).all() and not np.isnan(row["floor"])
    assert row["note"].endswith("one seed of 'n0' and 'n1': no ceiling, so no u") and "same seed" in row["note"]
    assert row["verdict"].startswith("no scale")
    assert np.isnan(own["similarity"]) and own["note"] == "one seed of 'n0': no ceiling, so no u"
    u = tables["factors"].query("quantity == 'u'")
    assert u["p"].isna().all() and (u["reason"] == "3 of 3 pairs have no similarity").all()


def test_without_untrained_twins_there_is_no_floor_and_that_is_said():
    latents = [latent_of(k) for k in range(3)]
    networks = {name: r for name, r in networks_of(latents).items() if name[2] == "trained" or name[0] == "n0"}
    matrix = architecture_matrix.compare(networks, facts_of(["a", "a", "b"]), **SMALL)["matrix"]
    row = one(matrix, "n0", "n1", "decoder")
    assert np.isnan(row[["floor", "u"]].astype(float)).all() and row["similarity"] == row["similarity"]
    assert row["note"] == "no untrained twin of 'n1': no floor, so no u"
    assert one(matrix, "n0", "n0", "decoder")["note"] == "" and one(matrix, "n0", "n0", "decoder")["u"] == 1


def test_what_does_not_fit_is_refused_before_any_work():
    networks = networks_of([latent_of(k) for k in range(2)])
    facts, name = facts_of(["a", "b"]), ("n1", 1, "trained")

    def refused(what, changed=None, table=facts):
        with pytest.raises(InputError, match=what):
            architecture_matrix.compare(networks if changed is None else changed, table, **SMALL)

    recording = networks[name]
    refused(r"lacks the columns \['iou'\]", table=facts.drop(columns="iou"))
    refused("'n1' twice", table=pd.concat([facts, facts.iloc[1:]]))
    refused("no family for label 'n0'", table=facts.assign(family=[None, "b"]))
    refused("no row for label 'n1'; closest", table=facts.iloc[:1])
    refused("at least two architectures", {n: r for n, r in networks.items() if n[0] == "n0"})
    refused(r"trained seeds \[0\] and untrained twins of \[0, 1\]", {n: r for n, r in networks.items() if n != name})
    refused("state 'start'", networks | {("n1", 0, "start"): recording})
    refused("under policy 'grid:2'", networks | {name: dataclasses.replace(recording, policy="grid:2")})
    refused("different images, 10 are in one only", networks | {name: recording.select(ids=recording.ids[10:])})
    refused(
        "no site of part 'decoder'", {n: r.select(part="encoder") if n[0] == "n1" else r for n, r in networks.items()}
    )
    refused("other sites", networks | {name: network(*name, latent_of(1), sites=(3, 2))})


def test_the_square_of_a_part_is_symmetric_and_complete(by_family):
    *_, tables = by_family
    square = as_square(tables["matrix"].query("part == 'encoder'"), "similarity")
    assert square.shape == (10, 10) and square.notna().all().all() and (square == square.T).all().all()


def test_networks_that_began_as_one_do_not_lift_the_floor():
    """Two architectures on one encoder hold the same initial weights at one seed: such pairs say nothing of chance."""
    rng = np.random.default_rng(0)
    ids = [f"i{k:03d}" for k in range(40)]
    start = {seed: rng.normal(size=(40, 12)) for seed in (0, 1, 2)}
    networks = {}
    for label in ("U-Net", "FPN"):
        for seed in (0, 1, 2):
            for state in ("trained", "untrained"):
                values = start[seed] if state == "untrained" else rng.normal(size=(40, 12))
                features = {
                    name: torch.as_tensor(values) for name in ("encoder.1", "encoder.2", "decoder.1", "decoder.2")
                }
                sites = [Site(name, ("batch", "channel"), part=name.split(".")[0]) for name in features]
                networks[label, seed, state] = Recording(features, ids, sites, "gap", "m", "d")
    facts = pd.DataFrame(
        [(label, label, "CNN", "resnet", False, 0.7) for label in ("U-Net", "FPN")],
        columns=["label", "title", "family", "encoder", "pretrained", "iou"],
    )
    matrix = architecture_matrix.compare(networks, facts, resamples=8, permutations=10, seed=0)["matrix"]
    pair = matrix[(matrix["label_a"] != matrix["label_b"]) & (matrix["part"] == "encoder")].iloc[0]
    assert abs(pair["floor"]) < 0.2 and pair["network_pairs"] == 6
