"""What sites keep of statistics: against scikit-learn and plain loops, and on sites whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from made import made
from scipy import stats
from sklearn.linear_model import Ridge, RidgeCV

from processing.readout import folds_of, kept, permuted_orders
from processing.ridge import PENALTIES, Readout, read_out
from similarity.measures import information_imbalance
from utils import InputError

NO_ORDERS = np.zeros((0, 0), dtype=int)


def gaussian(n, p, seed=0):
    return np.random.default_rng(seed).normal(size=(n, p))


def names(n):
    return [f"i{place:03d}" for place in range(n)]


def long(columns, ids=None):
    """{statistic: values} as a long table."""
    ids = names(len(next(iter(columns.values())))) if ids is None else ids
    return pd.concat([pd.DataFrame({"id": ids, "statistic": name, "value": y}) for name, y in columns.items()])


def some_fold(n, folds=4):
    return folds_of(names(n), folds=folds)


def related(n=80, p=30, noise=1.0):
    """Features, and targets that some of them, none of them, and all of them tell."""
    X = gaussian(n, p) * np.logspace(0, -2, p)
    Y = np.stack([X[:, 0], gaussian(n, 1, 1)[:, 0], X @ np.logspace(0, 2, p)], 1)
    return X, Y + noise * np.array([0.3, 1.0, 3.0]) * gaussian(n, 3, 2)


def outer_loop(X, Y, fold, predict):
    """R² of cross-validated predictions, with the training images' mean as what they have to beat."""
    residual, total = 0.0, 0.0
    for one in range(fold.max() + 1):
        train, test = fold != one, fold == one
        residual = residual + ((Y[test] - predict(X[train], Y[train], X[test])) ** 2).sum(0)
        total = total + ((Y[test] - Y[train].mean(0)) ** 2).sum(0)
    return 1 - residual / total


# ---------------------------------------------------------------------------------------------- against scikit-learn


def by_ridge_cv(X, Y, held_out, shares, chosen):
    ours = shares * ((X - X.mean(0)) ** 2).sum()
    model = RidgeCV(alphas=ours, alpha_per_target=True).fit(X, Y)
    chosen.extend(model.alpha_ / ours[0])
    return model.predict(held_out)


@pytest.mark.parametrize("p", [30, 100])
def test_r2_is_that_of_ridge_cv_in_a_loop_over_folds(p):
    """RidgeCV leaves one image out where we use the mean leverage: of penalties far apart they choose the same."""
    X, Y = related(p=p)
    fold, shares, chosen = some_fold(80), np.array([1e-6, 1e-2, 1e2]), []
    theirs = outer_loop(X, Y, fold, lambda *sides: by_ridge_cv(*sides, shares, chosen))
    assert len(np.unique(np.round(np.log10(chosen)))) > 1
    np.testing.assert_allclose(read_out(X, Y, fold, NO_ORDERS, shares).r2, theirs, rtol=1e-9)


def by_plain_gcv(X, Y, held_out):
    """Every penalty by scikit-learn's Ridge, its hat matrix from the unit vectors as targets."""
    n, predictions, errors = len(X), [], []
    for penalty in PENALTIES * ((X - X.mean(0)) ** 2).sum():
        hat = Ridge(alpha=penalty, solver="svd").fit(X, np.eye(n)).predict(X)
        errors.append(((Y - hat @ Y) ** 2).mean(0) / (1 - np.trace(hat) / n) ** 2)
        predictions.append(Ridge(alpha=penalty, solver="svd").fit(X, Y).predict(held_out))
    best = np.argmin(errors, 0)
    return np.stack([predictions[penalty][:, target] for target, penalty in enumerate(best)], 1)


def test_penalties_are_chosen_by_generalised_cross_validation():
    X, Y = related(n=40, p=12)
    fold = some_fold(40)
    np.testing.assert_allclose(read_out(X, Y, fold, NO_ORDERS).r2, outer_loop(X, Y, fold, by_plain_gcv), rtol=1e-8)


def test_permuted_images_go_through_the_same_folds_and_choices():
    X, Y = related(n=40, p=60)
    fold, orders = some_fold(40), permuted_orders(40, 5, 0)
    together = read_out(X, Y, fold, orders).null
    alone = [read_out(X, Y[order], fold, NO_ORDERS).r2 for order in orders]
    np.testing.assert_allclose(together, alone, rtol=1e-9)


def test_many_permutations_in_blocks_are_those_at_once(monkeypatch):
    X, Y = related(n=40, p=5)
    fold, orders = some_fold(40), permuted_orders(40, 20, 0)
    at_once = read_out(X, Y, fold, orders).null
    monkeypatch.setattr("processing.ridge.COLUMNS_AT_A_TIME", 7)
    np.testing.assert_allclose(read_out(X, Y, fold, orders).null, at_once, rtol=1e-9)


def test_rotations_and_scale_of_the_site_change_nothing():
    X, Y = related(n=40, p=60)
    rotation = np.linalg.qr(gaussian(60, 60, 5))[0]
    found, turned = (read_out(features, Y, some_fold(40), NO_ORDERS).r2 for features in (X, 1e4 * X @ rotation + 3))
    np.testing.assert_allclose(turned, found, rtol=1e-7)


# ---------------------------------------------------------------------------------------------------- known answers


def test_an_invertible_linear_map_of_the_statistics_keeps_all_of_them():
    Y = gaussian(60, 3)
    X = Y @ np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 2.0]]) + 7
    table = kept(made({"site": X}), long({"a": Y[:, 0], "b": 1e6 * Y[:, 1], "c": Y[:, 2] - 5}), permutations=19)
    np.testing.assert_allclose(table["r2"], 1, atol=1e-6)
    assert (table["low"] <= table["r2"]).all() and (table["high"] <= 1).all()
    assert (table["p"] == 1 / 20).all() and (table["null_high"] < 0.5).all()


def test_of_noise_no_r2_is_expected_and_p_is_uniform():
    found = read_out(gaussian(50, 20), gaussian(50, 150, 1), some_fold(50), permuted_orders(50, 39, 0))
    assert found.r2.mean() <= 0 and found.r2.min() < 0
    assert found.null.mean() <= 0
    grid = np.unique(np.round(found.p * 40)).astype(int)
    assert grid.min() >= 1 and grid.max() <= 40
    # p is one of 40 steps; spread each evenly over its own to compare with a continuous distribution
    spread = found.p - np.random.default_rng(0).random(150) / 40
    assert stats.kstest(spread, "uniform").pvalue > 0.01


def test_a_curved_statistic_is_no_linear_read_out_but_has_neighbours():
    x = gaussian(200, 1)
    table = kept(made({"site": x}), long({"square": x[:, 0] ** 2}), permutations=19).iloc[0]
    assert table["r2"] < 0.1
    assert table["imbalance_from"] < 0.1 < 0.3 < table["imbalance_to"]


def test_imbalances_are_those_of_the_measure_both_ways():
    X, Y = related(n=40, p=5)
    table = kept(made({"a": X, "b": gaussian(40, 3, 9)}), long({"s": Y[:, 0], "t": Y[:, 2]}), permutations=1, k=2)
    for row in table.itertuples():
        features = X if row.site == "a" else gaussian(40, 3, 9)
        y = Y[:, [0 if row.statistic == "s" else 2]]
        features = features.astype(np.float32)
        assert row.imbalance_from == pytest.approx(information_imbalance(features, y, k=2), abs=1e-9)
        assert row.imbalance_to == pytest.approx(information_imbalance(y, features, k=2), abs=1e-9)


def test_each_image_left_out_is_a_refit_without_it():
    X, Y = related(n=24, p=30)
    fold, share = some_fold(24), np.array([1e-2])
    found = read_out(X, Y, fold, NO_ORDERS, share)
    totals = [((X[fold != one] - X[fold != one].mean(0)) ** 2).sum() for one in range(4)]
    for left_out in (0, 13):
        errors, spreads = 0.0, 0.0
        for one in range(4):
            train, test = (np.setdiff1d(np.flatnonzero(rows), [left_out]) for rows in (fold != one, fold == one))
            predicted = Ridge(alpha=share[0] * totals[one], solver="svd").fit(X[train], Y[train]).predict(X[test])
            errors = errors + ((Y[test] - predicted) ** 2).sum(0)
            spreads = spreads + ((Y[test] - Y[train].mean(0)) ** 2).sum(0)
        np.testing.assert_allclose(found.errors_without[left_out], errors, rtol=1e-9)
        np.testing.assert_allclose(found.spreads_without[left_out], spreads, rtol=1e-9)


def test_intervals_cover_the_expected_r2():
    """Of 200 sets of images; their mean R² is known to ± 0.005, a tenth of an interval's width."""
    slope, fold, found = gaussian(10, 1, 99), some_fold(150, 5), []
    for draw in range(200):
        X = gaussian(150, 10, draw)
        found.append(read_out(X, X @ slope + 3 * gaussian(150, 1, 1000 + draw), fold, NO_ORDERS))
    expected = np.mean([one.r2[0] for one in found])
    bounds = np.array([one.interval() for one in found])[..., 0]
    assert 0.3 < expected < 0.7
    assert 0.9 <= ((bounds[:, 0] <= expected) & (expected <= bounds[:, 1])).mean() <= 0.99


def test_an_exact_read_out_has_no_interval():
    low, high = Readout(np.zeros(1), np.ones(1), np.zeros((30, 1)), np.ones((30, 1)), np.empty((0, 1))).interval()
    assert np.isnan(low).all() and np.isnan(high).all()


# ------------------------------------------------------------------------------------------------------- ids, columns


def test_images_are_matched_by_id_and_their_order_changes_nothing():
    X, Y = related(n=40, p=5)
    ids, order = names(40), np.random.default_rng(3).permutation(40)
    table = long({"s": Y[:, 0], "t": Y[:, 1]}, ids)
    found = kept(made({"a": X, "b": X[:, :2]}, ids), table, permutations=9)
    moved = made({"a": X[order], "b": X[order][:, :2]}, [ids[place] for place in order])
    pd.testing.assert_frame_equal(
        found, kept(moved, table.sample(frac=1, random_state=0).sort_values("statistic"), permutations=9)
    )


def test_statistics_of_other_images_are_not_read():
    X, Y = related(n=40, p=5)
    table = long({"s": Y[:, 0]})
    more = pd.concat([table, pd.DataFrame({"id": ["z"], "statistic": ["s"], "value": [np.nan]})])
    pd.testing.assert_frame_equal(*(kept(made({"a": X}), each, permutations=2) for each in (table, more)))


def test_folds_follow_the_ids_and_have_one_size():
    fold = folds_of(names(43), folds=5, seed=1)
    assert sorted(np.bincount(fold)) == [8, 8, 9, 9, 9]
    np.testing.assert_array_equal(fold[::-1], folds_of(names(43)[::-1], folds=5, seed=1))
    assert (fold != folds_of(names(43), folds=5, seed=2)).any()


def test_rows_are_sites_in_execution_order_and_depth_ends_at_one():
    X, Y = related(n=40, p=5)
    table = kept(made({"late": X, "early": X}), long({"s": Y[:, 0], "t": Y[:, 1]}), permutations=1)
    assert table["site"].tolist() == ["late", "late", "early", "early"]
    assert table["statistic"].tolist() == ["s", "t", "s", "t"]
    assert table["depth"].tolist() == [0.5, 0.5, 1, 1]
    given = kept(made({"x": X}), long({"s": Y[:, 0]}), permutations=1, depths={"x": 0.25})
    assert given["depth"].tolist() == [0.25]


def test_a_constant_site_has_a_reason_and_the_others_numbers():
    X, Y = related(n=40, p=5)
    lone = np.zeros((40, 2))
    lone[0] = 1  # varies, but not among the training images of the fold that holds it out
    table = kept(made({"dead": np.ones((40, 3)), "a": X, "lone": lone}), long({"s": Y[:, 0]}), permutations=1)
    table = table.set_index("site")
    assert "constant" in table.loc["dead", "reason"] and "same for all training images" in table.loc["lone", "reason"]
    assert table.loc[["dead", "lone"], ["r2", "low", "p", "imbalance_from", "imbalance_to"]].isna().all(axis=None)
    assert table.loc["a", "reason"] == "" and table.loc["a", ["r2", "imbalance_to"]].notna().all()


# ---------------------------------------------------------------------------------------------------- what is refused


def refused(columns=None, recording=None, ids=None, **options):
    recording = made({"a": gaussian(30, 4)}) if recording is None else recording
    columns = {"s": gaussian(30, 1, 1)[:, 0]} if columns is None else columns
    with pytest.raises(InputError) as error:
        kept(recording, long(columns, ids), permutations=options.pop("permutations", 1), **options)
    return str(error.value)


def test_a_constant_statistic_is_refused_by_name():
    assert "'flat' is constant" in refused({"s": gaussian(30, 1)[:, 0], "flat": np.full(30, 0.1)})


def test_a_statistic_that_some_image_lacks_is_refused_by_name():
    y = gaussian(30, 1)[:, 0].copy()
    y[7] = np.nan
    assert "'slope' has no finite value for 1 of 30 images, the first 'i007'" in refused({"slope": y})


def test_images_without_statistics_are_refused():
    message = refused({"s": gaussian(29, 1)[:, 0]})
    assert "1 recorded images have no statistics, the first 'i029'" in message


def test_an_image_that_comes_twice_is_refused():
    assert "'i000' comes twice" in refused(ids=[*names(29), "i000"])


def test_several_rows_an_image_are_refused():
    recording = made({"a": torch.rand(30, 4, 3)}, policy="grid:2")
    assert "'flat:g'" in refused(recording=recording)


@pytest.mark.parametrize("option", [{"folds": 1}, {"folds": 31}, {"permutations": 0}, {"k": 29}, {"level": 1.0}])
def test_options_out_of_range_are_refused_by_name(option):
    assert refused(**option).startswith(next(iter(option)))


def test_too_few_images_are_refused():
    recording = made({"a": gaussian(10, 4)})
    assert "10 images are too few" in refused({"s": gaussian(10, 1, 1)[:, 0]}, recording)
