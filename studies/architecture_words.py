"""What the matrix of architectures follows, as a table and as a sentence.

From the table `matrix` of `architecture_matrix.compare`; how it is made is the subject there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from similarity import factors

# matrices of which it is asked what they follow; the first is the headline
FOLLOWED = HEADLINE, ON_THE_RULER, BEFORE_TRAINING = ("similarity", "u", "floor")
LEVEL = 0.05
WHEN = {
    "family": "of one family",
    "architecture": "of the same architecture",
    "encoder": "with the same encoder",
    "pretraining": "of equal pretraining",
    "task score": "near in task score",
}


def what_it_follows(matrix: pd.DataFrame, facts: pd.DataFrame, *, permutations: int, seed: int) -> pd.DataFrame:
    """One row a part, quantity and factor, see `similarity.factors.follows`.

    A label without a number against some other is left out (named in left_out), the one that most lack first.
    """
    tables = []
    for part, quantity in itertools.product(matrix["part"].unique(), FOLLOWED):
        square = as_square(matrix[matrix["part"] == part], quantity)
        whole = _complete(square)
        square = square if len(whole) < 3 else whole  # too few to ask: the reason counts what is missing
        here = facts.set_index("label").loc[square.index]
        table = factors.follows(square.to_numpy(), factors_of(here), permutations=permutations, seed=seed)
        left_out = [label for label in facts["label"] if label in set(matrix["label_a"]) - set(square.index)]
        tables.append(table.assign(part=part, quantity=quantity, left_out=", ".join(left_out)))
    table = pd.concat(tables, ignore_index=True)
    first = ["part", "quantity"]
    return table[first + [column for column in table if column not in first]]


def factors_of(facts: pd.DataFrame) -> dict[str, np.ndarray]:
    """factor -> (labels, labels): 1 where the same family, encoder or pretraining; −|difference| of task scores."""
    kinds = {"family": "family", "architecture": "architecture", "encoder": "encoder", "pretraining": "pretrained"}
    kinds = {name: column for name, column in kinds.items() if column in facts}
    found = {name: factors.same(facts[column]) for name, column in kinds.items()}
    return found | {"task score": factors.nearness(facts["iou"])}


def as_square(rows: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """labels × labels of one part, both halves; in the order in which the labels come."""
    labels = list(dict.fromkeys(rows["label_a"]))
    square = rows.pivot(index="label_a", columns="label_b", values=quantity).reindex(index=labels, columns=labels)
    return square.where(square.notna(), square.T)


def _complete(square: pd.DataFrame) -> pd.DataFrame:
    """Without the labels that lack a number against others, those that lack the most first; diagonals do not count."""
    lacking = square.isna().to_numpy() & ~np.eye(len(square), dtype=bool)
    while lacking.any():
        worst = lacking.sum(1).argmax()
        square = square.drop(index=square.index[worst], columns=square.index[worst])
        lacking = np.delete(np.delete(lacking, worst, 0), worst, 1)
    return square


# ---------------------------------------------------------------------------------------------------------- the words


def sentence(tables: Mapping[str, pd.DataFrame]) -> str:
    """Which factors the similarity of encoders, and of decoders, follows; p corrected over the factors (Holm).

    Says so where so few architectures could not tell, whatever was measured; and of a factor that is followed, whether
    u and the untrained twins do so too, and whether it remains with the other factors held fixed.
    """
    matrix, table = tables["matrix"], tables["factors"]
    count = matrix["label_a"].nunique()
    said = [
        f"{part}s {_part_words({q: rows.set_index('factor') for q, rows in mine.groupby('quantity')})}"
        for part, mine in table.groupby("part", sort=False)
    ]
    pairs = f"{count * (count - 1) // 2} pair{'s' if count > 2 else ''}"
    return f"Among {count} architectures ({pairs}; p corrected over the factors), {'; '.join(said)}."


def _part_words(by_quantity: Mapping[str, pd.DataFrame]) -> str:
    table = by_quantity[HEADLINE]
    tested = table[table["p"].notna()].sort_values("p")
    if tested.empty:
        return f"allow no test ({'; '.join(dict.fromkeys(table['reason']))})"
    reachable = pd.Series(factors.holm(tested["p_smallest"]), tested.index) < LEVEL
    if not reachable.any():
        smallest = tested["p_smallest"].min()
        return f"cannot be told to follow anything: the smallest p that so few allow is {smallest:.2g}, uncorrected"
    followed = tested["p_holm"] < LEVEL
    yes = [_followed_words(name, by_quantity) for name in tested.index[followed]]
    no = [_number_words(tested.loc[name], name) for name in tested.index[~followed & reachable]]
    blind = [f"{name} (too few architectures)" for name in tested.index[~followed & ~reachable]]
    blind += [f"{name} ({reason})" for name, reason in table.loc[table["p"].isna(), "reason"].items()]
    words = f"are more alike {' and '.join(yes)}" if yes else "were not found more alike"
    if no:
        words += f"{', but not demonstrably' if yes else ''} {' or '.join(no)}"
    if not yes:
        words += ", which does not show that they follow nothing"
    return words + (f" (nothing can be said of {', '.join(blind)})" if blind else "")


def _followed_words(name: str, by_quantity: Mapping[str, pd.DataFrame]) -> str:
    row = by_quantity[HEADLINE].loc[name]
    more = [row.reason_partial or f"p {row.p_partial_holm:.2g} with the other factors held fixed"]
    for quantity, words in ((ON_THE_RULER, "of the place u on the ruler"), (BEFORE_TRAINING, "of untrained twins")):
        p = by_quantity[quantity].loc[name, "p_holm"]
        more += [] if np.isnan(p) else [f"p {p:.2g} {words}"]
    return _number_words(row, name, more)


def _number_words(row: pd.Series, name: str, more: list[str] | None = None) -> str:
    """'of one family (+0.12, r 0.45, p 0.002; …)'; the first number is the difference between the two kinds of pair."""
    return f"{WHEN[name]} ({'; '.join([f'{row.difference:+.2f}, r {row.r:.2f}, p {row.p_holm:.2g}', *(more or [])])})"
