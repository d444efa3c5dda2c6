"""What the processing-steps study says of its own tables: the three findings, and which way each points."""

import numpy as np
import pandas as pd
import pytest

from studies.processing_words import findings

RELATIONS = [
    ("other family", "closer", 0.1, 0.02, 0.2),
    ("other family", "matched", 0.3, 0.25, 0.35),
    ("another seed", "matched", 0.1, 0.08, 0.12),
]


def tables(cnn=0.3, transformer=0.1, p=0.01, closer_low=0.02):
    relations = pd.DataFrame(RELATIONS, columns=["relation", "quantity", "mean", "low", "high"])
    relations.loc[0, "low"] = closer_low
    families = pd.DataFrame({"statistic": ["mean", "cv", "largest"], "mean_a": cnn, "mean_b": transformer})
    families["p_holm"] = [p, 0.9, 1e-9]
    losses = pd.DataFrame({"quantity": ["late", "last", "lost"], "median": [0.8, 0.7, 0.1], "low": 0.0, "high": 0.9})
    about = {"part": "encoder", "training": "segmentation"}
    return {
        "relations": relations.assign(**about),
        "families": families.assign(rule="every block", change="both", **about),
        "losses": losses.assign(training="segmentation", statistic="low-level", p=0.03),
    }


@pytest.mark.parametrize("changed, said", [
    ({}, "holds under some rule of sites (smallest p over rules, mean and unevenness: 0.01)"),
    ({"p": 0.2}, "does not hold demonstrably (smallest p over rules, mean and unevenness: 0.2)"),  # the jump's is not
    ({"cnn": 0.1, "transformer": 0.3}, "does not hold: under some rule of sites it is the CNNs that change"),
    ({"p": np.nan}, "does not hold demonstrably (smallest p over rules, mean and unevenness: 0.9)"),
])  # fmt: skip
def test_smoothness_is_of_transformers_only_where_they_change_less(changed, said):
    assert said in findings(tables(**changed))


def test_same_depth_holds_where_the_interval_leaves_chance_out():
    assert "holds: best matches are 0.10 (0.02 … 0.20) of the depth nearer than chance" in findings(tables())
    assert "is not demonstrated: best matches" in findings(tables(closer_low=-0.01))
    assert "segmentation 0.10 (0.00 to 0.90), p = 0.03" in findings(tables())


def test_nothing_is_said_of_one_family():
    found = tables()
    found["relations"] = found["relations"].query("relation == 'another seed'")
    assert findings(found).startswith("There are not two families of segmentation networks")
