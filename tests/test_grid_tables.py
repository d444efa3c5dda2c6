"""Numbers of a grid: intervals of pooled scores, q-values, and files that are read once, against slow twins."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, wilcoxon

from class_metrics import confusion_table, mean_iou
from studies import grid_tables
from studies.cells import Cell
from studies.grid_tables import Scored, by_group, mean_with_interval, paired_table, pooled_with_interval, score_table


def matrices_of(seed, images=12, classes=4):
    return np.random.default_rng(seed).integers(0, 50, (images, classes, classes)) + 60 * np.eye(classes, dtype=int)


def cells_of(labels, seeds):
    changes = [(label, seed) for label in labels for seed in seeds]
    return [Cell({"encoder": label, "seed": seed}, {"seed": seed, "fraction": 1.0}) for label, seed in changes]


def random_scores(cells, images=25):
    rng, ids = np.random.default_rng(0), [f"i{k}" for k in range(images)]
    shift = {label: 0.02 * k for k, label in enumerate(dict.fromkeys(cell.labels["encoder"] for cell in cells))}
    iou = [pd.Series(rng.uniform(0, 0.8, images) + shift[cell.labels["encoder"]], ids) for cell in cells]
    return {
        cell.name: {"test": Scored(values, matrices_of(k, images))} for k, (cell, values) in enumerate(zip(cells, iou))
    }


def test_the_interval_is_that_of_resampled_images_pooled_one_by_one():
    matrices = matrices_of(4)
    each, low, high = pooled_with_interval([matrices], mean_iou)
    generator = np.random.default_rng(99)  # other draws, by index: they agree up to the noise of the bootstrap
    drawn = [mean_iou(sum(matrices[i] for i in generator.integers(12, size=12))) for _ in range(4000)]
    assert each == mean_iou(matrices.sum(0)) and low < each[0] < high
    assert [each[0] - low, high - each[0]] == pytest.approx([1.959964 * np.std(drawn)] * 2, rel=0.1)


def test_seeds_see_the_same_resampled_images():
    matrices = matrices_of(5)
    each, low, high = pooled_with_interval([matrices, matrices], mean_iou)
    assert (each[0], low, high) == pytest.approx((each[1], *pooled_with_interval([matrices], mean_iou)[1:]))


def test_for_images_of_one_size_pooled_accuracy_has_the_interval_of_the_mean_over_images():
    right = np.random.default_rng(0).integers(40, 100, size=60)
    matrices = np.stack([[[n, 100 - n], [0, 0]] for n in right])
    each, low, high = pooled_with_interval([matrices], lambda matrix: np.trace(matrix) / matrix.sum(), seed=1)
    mean, lowest, highest = mean_with_interval(right[None] / 100)
    assert each[0] == pytest.approx(mean)
    assert [low, high] == pytest.approx([lowest, highest], abs=0.1 * (high - low) / 2)


def test_three_seeds_pooled_have_students_interval_where_images_are_alike():
    matrices = [np.tile([[n, 100 - n], [0, 100]], (40, 1, 1)) for n in (50, 60, 70)]
    each, low, high = pooled_with_interval(matrices, lambda matrix: matrix[0, 0] / matrix[0].sum())
    assert list(each) == [0.5, 0.6, 0.7]
    reach = 4.302653 * 0.1 / np.sqrt(3)  # Student's t of two degrees of freedom
    assert (each.mean() - low, high - each.mean()) == pytest.approx((reach, reach), rel=1e-6)


def test_the_same_seed_gives_the_same_interval_and_a_wider_level_contains_it():
    matrices = [matrices_of(5, images=10)]
    first = pooled_with_interval(matrices, mean_iou, seed=3)[1:]
    assert first == pooled_with_interval(matrices, mean_iou, seed=3)[1:]
    assert first != pooled_with_interval(matrices, mean_iou, seed=4)[1:]
    values = np.random.default_rng(0).normal(size=(2, 30))
    wide, narrow = (mean_with_interval(values, level) for level in (0.99, 0.95))
    assert wide[1] < narrow[1] < narrow[0] < narrow[2] < wide[2]
    with pytest.raises(ValueError, match="level"):
        mean_with_interval(values, 1.0)


def test_one_image_or_other_images_have_values_and_no_interval():
    for matrices in ([matrices_of(6, images=1)], [matrices_of(6), matrices_of(7, images=11)]):
        each, low, high = pooled_with_interval(matrices, mean_iou)
        assert list(each) == [mean_iou(matrix.sum(0)) for matrix in matrices] and np.isnan([low, high]).all()


def test_standard_deviations_over_seeds_are_of_each_seeds_own_score():
    cells = cells_of("ab", (0, 1, 2)) + cells_of("c", (0,))
    scores = random_scores(cells)
    table = score_table(by_group(cells), scores).set_index("label")
    for label in "ab":
        mine = [scores[cell.name]["test"] for cell in cells if cell.labels["encoder"] == label]
        assert table.loc[label, "seed_sd"] == pytest.approx(np.std([one.iou.mean() for one in mine], ddof=1))
        pooled = [mean_iou(one.confusions.sum(0)) for one in mine]
        assert table.loc[label, "miou_sd"] == pytest.approx(np.std(pooled, ddof=1))
        assert table.loc[label, "miou"] == pytest.approx(np.mean(pooled))
    assert np.isnan(table.loc["c", ["seed_sd", "miou_sd"]].astype(float)).all() and table.loc["c", "seeds"] == 1


def test_q_values_are_benjamini_and_hochbergs_over_the_pairs_that_have_a_p():
    cells = cells_of("abcd", (0, 1))
    table = paired_table(by_group(cells), random_scores(cells))
    assert len(table) == 6
    np.testing.assert_allclose(table["q_value"], false_discovery_control(table["p_value"]))


def test_one_label_has_no_pair():
    cells = cells_of("a", (0, 1))
    table = paired_table(by_group(cells), random_scores(cells))
    assert table.empty and {"difference", "p_value", "q_value"} <= set(table)


def test_pairs_are_of_the_seeds_that_both_have():
    cells = cells_of("a", (0, 1)) + cells_of("b", (1, 2))
    scores = random_scores(cells)
    row = paired_table(by_group(cells), scores).iloc[0]
    one, other = (scores[f"encoder-{label}--seed-1"]["test"].iou for label in "ab")
    assert row["seeds"] == 1 and row["difference"] == pytest.approx((one - other).mean())
    assert row["p_value"] == pytest.approx(wilcoxon(one - other).pvalue)


def test_files_of_scores_are_read_as_they_were_written_the_test_images_first(tmp_path, monkeypatch):
    (cell,) = cells_of("a", (0,))
    matrices = matrices_of(0, images=3)
    (tmp_path / cell.name).mkdir()
    for images in ("elsewhere", "test"):
        path = tmp_path / cell.name / f"{images}.csv"
        pd.DataFrame({"id": ["007", "01", "2"], "iou": [0.1, 0.2, 0.3]}).to_csv(path, index=False)
        confusion_table(["007", "01", "2"], matrices).to_csv(path.with_name(f"{images}-confusion.csv"), index=False)
    read, opened = pd.read_csv, []
    monkeypatch.setattr(grid_tables.pd, "read_csv", lambda path, **how: opened.append(path.name) or read(path, **how))
    found = grid_tables.read_scores([cell], tmp_path)
    assert len(opened) == len(set(opened)) == 4
    assert list(found[cell.name]) == ["test", "elsewhere"]
    scored = found[cell.name]["test"]
    assert dict(scored.iou) == {"007": 0.1, "01": 0.2, "2": 0.3} and np.array_equal(scored.confusions, matrices)
