"""Figures of processing steps: each draws from a small table, and refuses one that lacks columns."""

import itertools

import numpy as np
import pandas as pd
import pytest

from processing import figures
from utils import InputError

TEXTS = {"title": "A question?", "caption": "of nothing", "synthetic": True}
TRAININGS, RULES = ("classifier", "untrained"), ("every block", "stage ends")
NETWORKS = [(f"{body}, {training}", family, training) for body, family in (("R", "CNN"), ("V", "transformer"))
            for training in TRAININGS]  # fmt: skip
FACTS = pd.DataFrame(NETWORKS, columns=["network", "family", "training"])


def plane():
    rows = [(f"a{i}", f"b{j}", (i + 1) / 3, (j + 1) / 2, 0.1 * (i + j), 0.2) for i in range(3) for j in range(2)]
    return pd.DataFrame(rows, columns=["site_a", "site_b", "depth_a", "depth_b", "a_to_b", "b_to_a"])


def relations():
    rows = itertools.product(TRAININGS, ["another seed", "other family"], ["distance", "chance"])
    table = pd.DataFrame(rows, columns=["training", "relation", "quantity"]).assign(mean=0.3, low=0.2, high=0.4)
    table.loc[table.index[-2:], ["mean", "high"]] = 0.9, 1.3  # of the last panel alone
    return table


def curves():
    rows = itertools.product(TRAININGS, ["another seed", "other family"], [0.5, 1.0])
    return pd.DataFrame(rows, columns=["training", "relation", "depth"]).assign(mean=0.3, low=0.2, high=0.4)


def steps():
    rows = itertools.product(FACTS["network"], [0.5, 1.0])
    shares = {"parameters_share": 0.5, "operations_share": 0.6, "both": 0.1}
    return pd.DataFrame(rows, columns=["network", "depth_to"]).assign(**shares)


def smooth():
    rows = itertools.product(["R", "V"], TRAININGS, RULES)
    table = pd.DataFrame(rows, columns=["body", "training", "rule"]).assign(
        change="both", mean=0.1, cv=1.0, largest=0.2
    )
    table.loc[table["rule"] == "stage ends", "mean"] = 0.7
    return table.assign(family=table["body"].map({"R": "CNN", "V": "transformer"}))


def families():
    rows = itertools.product(TRAININGS, RULES, ["mean", "cv", "largest"])
    return pd.DataFrame(rows, columns=["training", "rule", "statistic"]).assign(change="both", p_holm=0.25)


def kept():
    rows = itertools.product(FACTS["network"], [0.5, 1.0], ["luminance", "edge_density"])
    return pd.DataFrame(rows, columns=["network", "depth", "statistic"]).assign(r2=0.5)


def drawn(name, **changes):
    tables = {
        "planes": lambda: figures.planes(changes.get("planes", {"A | B": plane()}), label="imbalance", **TEXTS),
        "relations": lambda: figures.matched_depths(changes.get("relations", relations()), curves(), **TEXTS),
        "curves": lambda: figures.matched_depths(relations(), changes.get("curves", curves()), **TEXTS),
        "steps": lambda: figures.smooth_steps(changes.get("steps", steps()), FACTS, **TEXTS),
        "smooth": lambda: figures.families_compared(changes.get("smooth", smooth()), families(), **TEXTS),
        "tests": lambda: figures.families_compared(smooth(), changes.get("tests", families()), **TEXTS),
        "kept": lambda: figures.kept_along_depth(changes.get("kept", kept()), FACTS, **TEXTS),
    }
    return tables[name]()


def words_of(figure):
    return " ".join(text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("name", ["planes", "relations", "steps", "smooth", "kept"])
def test_a_figure_says_its_question_and_that_images_are_synthetic(name):
    words = words_of(drawn(name))
    assert "A question?" in words and "synthetic" in words


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("planes", {"A | B": plane().drop(columns="depth_a")}, "depth_a"),
        ("relations", relations().drop(columns="relation"), "relation"),
        ("curves", curves().drop(columns="depth"), "depth"),
        ("steps", steps().drop(columns="operations_share"), "operations_share"),
        ("smooth", smooth().drop(columns="cv"), "cv"),
        ("tests", families().drop(columns="p_holm"), "p_holm"),
        ("kept", kept().drop(columns="r2"), "r2"),
    ],
    ids=["planes", "relations", "curves", "steps", "smooth", "tests", "kept"],
)
def test_a_table_without_a_column_is_refused_by_its_name(name, table, column):
    with pytest.raises(InputError, match=column):
        drawn(name, **{name: table})


def test_no_dot_of_a_later_panel_is_cut_off():
    """Panels of a row share their axis, and the first does not have the highest dot."""
    for figure in (drawn("smooth"), drawn("relations")):
        for ax in figure.axes:
            highest = [np.nanmax(line.get_ydata()) for line in ax.lines if len(line.get_ydata())]
            assert not highest or max(highest) <= ax.get_ylim()[1]


def test_marks_of_best_matches_can_be_left_out():
    with_marks = drawn("planes").axes[0].collections
    without = figures.planes({"A | B": plane()}, label="imbalance", best=False, **TEXTS).axes[0].collections
    assert len(with_marks) == len(without) + 2
