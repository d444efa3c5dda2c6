"""What is an encoder worth? Mask2Former fixed, its encoder varied: CNNs, Swin, Vision Transformers behind two necks.

`python experiments.py encoders` trains a grid of encoders × necks × shares of the data × seeds (× whatever else the
YAML names), scores every network on the same test images, and reports how good, how fast, how greedy for data each
encoder is, with differences on the same seeds and images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from studies.grid_report import FinishedGrid, ranged, share_words
from studies.grid_study import GridConfig, run_grid

QUESTION = "What is an encoder worth?"


@dataclass
class EncodersConfig(GridConfig):
    """ """

    model: str = "mask2former"


EncodersConfig.__doc__ = GridConfig.__doc__


def run(config: EncodersConfig) -> Path:
    """The whole study; returns the results folder."""
    return run_grid(config, "encoders", QUESTION, answer)


def answer(grid: FinishedGrid) -> str:
    """The best encoder at each share of the data, and whether it stands apart from the next one."""
    scores = grid.tables["scores"].query("images == 'test'")
    lines = []
    for fraction, group in sorted(scores.groupby("fraction")):
        ranked = group.sort_values("iou", ascending=False)
        best = ranked.iloc[0]
        line = f"- {share_words(fraction)} of the training images: **{best['label']}**, IoU "
        line += ranged(best["iou"], best["low"], best["high"])
        if len(ranked) > 1:
            line += f"; {apart(grid.tables['paired'], best['label'], ranked.iloc[1]['label'], fraction)}"
        lines.append(line)
    return "## The answer\n" + "\n".join(lines) + "\n"


def apart(paired: pd.DataFrame, best: str, second: str, fraction: float) -> str:
    """'0.012 (…) above NAME, q = …': the paired difference of two labels, whichever way round it is in the table."""
    for a, b, sign in ((best, second, 1), (second, best, -1)):
        rows = paired[(paired["label_a"] == a) & (paired["label_b"] == b) & (paired["fraction"] == fraction)]
        if len(rows):
            row = rows.iloc[0]
            low, high = sorted((sign * row["low"], sign * row["high"]))
            clear = "above" if low > 0 else "not clearly above"
            return f"{ranged(sign * row['difference'], low, high)} {clear} {second} (q = {row['q_value']:.2g})"
    return f"not compared with {second}: no seed in common"
