"""What a matrix of similarities follows: known answers, brute force, and how often the test is wrong."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, pearsonr

from similarity.factors import follows, holm, item_orders, nearness, same


def symmetric(rng, items):
    return (lambda upper: upper + upper.T)(np.triu(rng.normal(size=(items, items)), 1))


def asked_of(similarity, factors, **options):
    return follows(similarity, factors, **options).set_index("factor")


GROUPS = {5: list("aabbc"), 7: list("aaabbcd"), 10: list("aaaabbbccc")}


@pytest.mark.parametrize("items", GROUPS)
def test_a_matrix_made_from_a_factor_follows_it_as_far_as_can_be(items):
    factor = same(GROUPS[items])
    found = asked_of(0.2 + 0.5 * factor, {"group": factor}, permutations=499).loc["group"]
    assert found["r"] == pytest.approx(1) and found["difference"] == pytest.approx(0.5) == found["coefficient"]
    assert found["p"] == found["p_smallest"]
    if items <= 7:  # orders that leave the groups as they are: within each, and groups of one size with each other
        counts = [GROUPS[items].count(group) for group in sorted(set(GROUPS[items]))]
        kept = math.prod(map(math.factorial, counts))
        kept *= math.prod(math.factorial(counts.count(size)) for size in set(counts))
        assert found["exact"] and found["p"] == pytest.approx(kept / math.factorial(items))
    else:
        assert not found["exact"] and found["orders"] == 500 and 1 / 500 <= found["p"] < 0.02


def test_r_is_pearsons_and_p_that_of_every_order_tried_by_hand():
    rng = np.random.default_rng(3)
    similarity, scores = symmetric(rng, 5), rng.normal(size=5)
    found = asked_of(similarity, {"score": nearness(scores)}).loc["score"]
    pairs = list(itertools.combinations(range(5), 2))

    def r(order):
        x = [similarity[order[i], order[j]] for i, j in pairs]
        return pearsonr(x, [-abs(scores[i] - scores[j]) for i, j in pairs]).statistic

    every = [r(order) for order in itertools.permutations(range(5))]
    assert found["r"] == pytest.approx(every[0])
    assert found["p"] == pytest.approx(np.mean([value >= every[0] - 1e-12 for value in every]))
    assert found["exact"] and found["orders"] == 120


def test_the_difference_is_of_means_and_its_null_that_of_every_order():
    rng = np.random.default_rng(4)
    similarity, group = symmetric(rng, 5), list("aabbb")
    found = asked_of(similarity, {"group": same(group)}).loc["group"]
    pairs = list(itertools.combinations(range(5), 2))

    def difference(order):
        kinds = {True: [], False: []}
        for i, j in pairs:
            kinds[group[i] == group[j]].append(similarity[order[i], order[j]])
        return np.mean(kinds[True]) - np.mean(kinds[False])

    every = [difference(order) for order in itertools.permutations(range(5))]
    assert found["same_pairs"] == 4 and found["difference"] == pytest.approx(every[0])
    np.testing.assert_allclose(found[["null_low", "null_high"]].astype(float), np.quantile(every, [0.025, 0.975]))


def test_the_coefficients_are_those_of_least_squares():
    rng = np.random.default_rng(5)
    similarity = symmetric(rng, 9)
    factors = {"a": same(list("aaabbbccc")), "b": same(list("xyxyxyxyx")), "s": nearness(rng.normal(size=9))}
    upper = np.triu_indices(9, 1)
    design = np.column_stack([np.ones(36), *(factor[upper] for factor in factors.values())])
    expected = np.linalg.lstsq(design, similarity[upper], rcond=None)[0][1:]
    np.testing.assert_allclose(asked_of(similarity, factors, permutations=19)["coefficient"], expected)


def test_the_shadow_of_a_factor_is_followed_alone_but_not_beside_it():
    rng = np.random.default_rng(6)
    family, encoder = same(list("aaaaabbbbb")), same(list("aaaabbbbbb"))
    similarity = 0.5 * family + 0.05 * symmetric(rng, 10)
    found = asked_of(similarity, {"family": family, "encoder": encoder}, permutations=999)
    assert (found["p"] < 0.05).all()
    assert found.loc["family", "p_partial"] < 0.01 and found.loc["encoder", "p_partial"] > 0.05
    assert found.loc["family", "coefficient"] == pytest.approx(0.5, abs=0.05)
    assert found.loc["encoder", "coefficient"] == pytest.approx(0, abs=0.05)


def in_five_of_a_hundred(rejections, draws):
    low, high = binom.ppf([5e-4, 1 - 5e-4], draws, 0.05)
    return low <= rejections <= high


def test_independent_matrices_are_told_to_follow_a_factor_as_often_as_alpha():
    """Items differ in how similar they are to all others: the pairs of a matrix are far from independent."""
    rng, draws, p = np.random.default_rng(7), 300, []
    for draw in range(draws):
        own = rng.normal(size=8)
        similarity = symmetric(rng, 8) + own[:, None] + own[None, :]
        factors = {"score": nearness(rng.normal(size=8)), "group": same(list("aaabbbcc"))}
        p.append(asked_of(similarity, factors, permutations=199, seed=draw)[["p", "p_partial"]].to_numpy())
    rejected = (np.array(p) <= 0.05).sum(0)
    # of the groups 144 of 40320 orders are one, which moves the rate by less than half a percent
    assert all(in_five_of_a_hundred(count, draws) for count in rejected.ravel()), rejected


def test_a_factor_beside_the_one_that_is_followed_is_rejected_as_often_as_alpha():
    rng, draws, partial, alone = np.random.default_rng(8), 300, 0, 0
    family, encoder = same(list("aaaaabbbbb")), same(list("aaaabbbbbb"))
    for draw in range(draws):
        similarity = 3 * family + symmetric(rng, 10)
        row = asked_of(similarity, {"f": family, "e": encoder}, permutations=199, seed=draw).loc["e"]
        partial, alone = partial + (row["p_partial"] <= 0.05), alone + (row["p"] <= 0.05)
    assert in_five_of_a_hundred(partial, draws) and alone > 0.8 * draws


def test_what_cannot_be_asked_is_nan_with_a_reason():
    rng = np.random.default_rng(9)
    similarity = symmetric(rng, 6)
    factors = {
        "one family": same(["a"] * 6),
        "all different": same(range(6)),
        "no score": nearness([1, 2, np.nan, 4, 5, 6]),
        "group": same(list("aabbcc")),
        "its twin": same(list("xxyyzz")),
        "score": nearness(rng.normal(size=6)),
    }
    found = asked_of(similarity, factors)
    for name in ("one family", "all different", "no score"):
        assert np.isnan(found.loc[name, ["r", "p", "p_holm", "coefficient"]].astype(float)).all()
    assert "does not vary" in found.loc["one family", "reason"]
    assert "5 of 15 pairs have no value" in found.loc["no score", "reason"]
    assert found.loc["group", "reason"] == "" and found.loc["group", "p"] > 0
    assert np.isnan(found.loc["group", "p_partial"]) and "its twin parts" in found.loc["group", "reason_partial"]
    assert found.loc["score", "p_partial"] > 0  # a pair of twins leaves the others their coefficients


def test_too_few_items_or_missing_similarities_give_reasons():
    factor = {"group": same("aab")}
    assert "too few" in asked_of(np.eye(2), {"group": same("aa")}).loc["group", "reason"]
    holed = np.array([[0, 0.1, np.nan], [0.1, 0, 0.3], [np.nan, 0.3, 0]])
    assert asked_of(holed, factor).loc["group", "reason"] == "1 of 3 pairs have no similarity"
    assert "equally similar" in asked_of(np.ones((3, 3)), factor).loc["group", "reason"]
    three = asked_of(symmetric(np.random.default_rng(0), 3), factor | {"score": nearness([1, 2, 4])})
    assert (three["p"] >= 1 / 6).all() and "too few for 2 factors" in three.loc["group", "reason_partial"]


def test_matrices_of_another_size_or_not_symmetric_are_refused():
    with pytest.raises(ValueError, match=r"factor 'group' must be \(4, 4\)"):
        follows(np.eye(4), {"group": same("aab")})
    with pytest.raises(ValueError, match="similarity is not symmetric"):
        follows(np.arange(9.0).reshape(3, 3), {"group": same("aab")})
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        follows(np.eye(3), {"group": same("aab")}, permutations=0)


def test_the_diagonal_is_not_read():
    rng = np.random.default_rng(10)
    similarity, factor = symmetric(rng, 6), {"group": same(list("aaabbb"))}
    other = similarity + np.diag(np.full(6, np.nan))
    assert follows(similarity, factor).equals(follows(other, factor))


def test_holm_is_the_procedure_written_out():
    assert holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx([0.03, 0.06, 0.06, np.nan], nan_ok=True)
    assert holm([0.5, 0.9]) == pytest.approx([1, 1]) and len(holm([])) == 0


def test_orders_are_all_of_few_items_and_a_seeded_sample_of_many():
    every, exact = item_orders(4, 10, 0)
    assert exact and len({tuple(order) for order in every}) == 24
    sample, exact = item_orders(8, 10, 0)
    assert not exact and sample.shape == (11, 8) and sample[0].tolist() == list(range(8))
    assert (np.sort(sample, 1) == np.arange(8)).all() and (sample == item_orders(8, 10, 0)[0]).all()
