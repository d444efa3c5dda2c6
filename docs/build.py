"""Make what is tables of the code and of results: measures.md and benchmarks.md here, and answers in pages by hand.

`python docs/build.py` writes all; tests compare them with what is committed.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import yaml

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path.insert(0, str(PROJECT))

from similarity import measures  # noqa: E402
from studies import explanation_words, processing_words  # noqa: E402
from studies import universality_words as words  # noqa: E402
from utils import InputError, markdown_table, sentences_instead_of_tracebacks, write_text  # noqa: E402

BENCHMARKS = PROJECT / "results" / "benchmarks"
REFERENCE = "results/universality-isic2018_256-mobilenet_v2"
STEPS = "results/processing-steps-isic2018_256"
STEPS_TABLES = ("networks", "relations", "families", "losses")
STEPS_PAGES = {
    "The study": "docs/processing_steps.md",
    "notebook": "processing_steps.ipynb",
    "all tables": f"{STEPS}/summary.md",
}
EXPLAINED = {
    "results/explanations-isic2018_256": "Segmentation networks, test images of ISIC 2018",
    "results/explanations-imagenette": "Classifiers, photographs of Imagenette",
}
MARKS = ("<!-- answer: python docs/build.py -->", "<!-- end -->")
EXPLANATION_MARKS = ("<!-- explanations: python docs/build.py -->", "<!-- end of explanations -->")
STEPS_MARKS = ("<!-- steps: python docs/build.py -->", "<!-- end of steps -->")
MADE = "<!-- made by `python docs/build.py` -->\n"


def measures_page() -> str:
    """The table of measures, and what each one's documentation says."""
    table = measures.table()
    ignores = [column for column in table.columns if column.startswith("ignores ")]
    first = table.drop(columns=[*ignores, "cost a site", "cost a pair"])
    second = table[["measure", *ignores]].rename(columns=lambda name: name.removeprefix("ignores "))
    third = table[["measure", "cost a site", "cost a pair"]]
    parts = [
        "# The measures\n",
        MADE,
        "Every measure is a function of X (n, p) and Y (n, q), whose rows are the same n images in the same order, and "
        "gives a float: `similarity.measures.rsa(X, Y)`. A whole plane of sites × sites is "
        '`similarity.plane("rsa", A, B)`. Of a distance, smaller is more similar. A measure that cannot be computed '
        "(a constant side, NaN, too few images) raises `NotComputable` and says why; in a plane its cell is NaN and "
        "`plane.notes` says why. A warning `FewImages` says when a value is large by construction.\n",
        markdown_table(first.columns, first.values.tolist()),
        "## What each one does not see\n",
        "Maps of the features of X, of Y, or of either that leave the value as it is; the tests check that it does not "
        "change there, and does elsewhere.\n",
        markdown_table(second.columns, second.values.tolist()),
        "## What each one costs\n",
        "Operations for n images; p features are prepared once a site, then each pair is combined. Linear CKA, RBF-CKA "
        "and RSA planes make half of every Gram matrix and then one product for all pairs; where n is large, linear "
        "CKA goes through p × q moments instead and says so. Planes of float32 features whose work is long are "
        "computed in float32 and summed in float64 (error below 1e-5), all others in float64.\n",
        markdown_table(third.columns, third.values.tolist()),
        "## One by one\n",
        *(_measure(name) for name in measures.MEASURES),
    ]
    return "\n".join(parts)


def _measure(name: str) -> str:
    function = getattr(measures, name)
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    listed = ", ".join(["X, Y", *(f"{option.name}={option.default!r}" for option in options)])
    return f"### `{name}({listed})`\n\n{inspect.getdoc(function)}\n"


def benchmarks_page() -> str:
    """What `benchmarks.planes`, `benchmarks.recording` and `benchmarks.sanity_check` last wrote."""
    planes = pd.read_csv(BENCHMARKS / "planes.csv", keep_default_na=False, na_values={"seconds": [""], "ratio": [""]})
    stored = json.loads((BENCHMARKS / "planes.json").read_text(encoding="utf-8"))
    parts = [
        "# Benchmarks\n",
        MADE,
        "Each implementation runs in a process of its own on the same data, all take turns, times are medians; `ratio` "
        "is to ours, `MB` the peak above what was loaded. The other packages stand in an environment of their own "
        "(`benchmarks/requirements-peers.txt`).\n",
        "```bash\npython -m benchmarks.planes        # results/benchmarks/planes.csv, about a quarter of an hour\n"
        "python -m benchmarks.recording     # results/benchmarks/recording.csv\n"
        "python -m benchmarks.sanity_check --data IMAGENETTE     # a folder of train/ and val/ with classes\n"
        "python -m benchmarks.training --data ISIC2018           # results/benchmarks/training.csv\n```\n",
    ]
    for name, rows in planes.groupby("workload", sort=False):
        parts += [f"## {name.replace('_', ' ')}\n", _workload(stored[name]), _plane_rows(rows)]
    recording = pd.read_csv(BENCHMARKS / "recording.csv")
    stamp = json.loads((BENCHMARKS / "recording.json").read_text(encoding="utf-8"))
    cells = [[_cell(value) for value in row] for row in recording.values.tolist()]
    parts += ["## Recording\n", _machine(stamp), markdown_table(recording.columns, cells)]
    parts.append(_training())
    parts.append((BENCHMARKS / "sanity_check.md").read_text(encoding="utf-8").replace("# ", "## ", 1))
    return "\n".join(parts)


def _training() -> str:
    """Our training loop beside the plain one."""
    table = pd.read_csv(BENCHMARKS / "training.csv", keep_default_na=False)
    stored = json.loads((BENCHMARKS / "training.json").read_text(encoding="utf-8"))
    parts = [
        "## Training\n",
        "`train.py` beside the plain loop one would write (the library's set loss and number of points, its attention, "
        "its decoder, the default allocator, the encoder computed again each epoch), 16 images a step, from the same "
        "seed, epoch by epoch in turn. Speeds are medians over the epochs after the first; the validation IoU is that "
        "after the last one: it says whether both learned the same, not how well they can.\n",
    ]
    for name, rows in table.groupby("workload", sort=False):
        config = stored[name]["config"]
        kind = f"Preset {config['preset']} at {config['image_size']} px, {config['epochs']} epochs"
        what = f"{kind} of {config['images']} images of `{config['data']}`. {_machine(stored[name])}"
        columns = rows.columns.drop("workload")
        cells = [[_cell(value) for value in row] for row in rows[columns].values.tolist()]
        parts += [f"### {name.replace('_', ' ')}\n", what, markdown_table(columns, cells)]
    return "\n".join(parts)


def _workload(stored: dict) -> str:
    data = stored["config"]["data"]
    widths = ", ".join(map(str, data["widths"]))
    return (
        f"{data['sites']} + {data['sites']} sites, n = {data['n']:,} rows, widths {widths} in turn. {_machine(stored)}"
    )


def _machine(stamp: dict) -> str:
    environment = stamp["environment"]
    processor = environment.get("processor", "")
    threads = stamp["config"]["threads"]
    what = f"{processor}, " if processor else ""
    return f"{what}{threads} threads, torch {environment['packages']['torch']}, commit {environment['commit']}.\n"


def _plane_rows(rows: pd.DataFrame) -> str:
    shown = [
        [
            row.implementation.replace("_", " "),
            _cell(row.seconds),
            _cell(row.ratio),
            _cell(row.rss_mb),
            _cell(row.max_error),
            row.bar,
            row.note,
        ]
        for row in rows.itertuples()
    ]
    return markdown_table(["implementation", "seconds", "ratio", "MB", "max error", "bar", "note"], shown)


def _cell(value) -> str:
    """Three digits; nothing where there is no number."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return "" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


PAGES = {"measures.md": measures_page, "benchmarks.md": benchmarks_page}


def answer() -> str:
    """The first thing of the README: the reference run's figure, its sentences and its table."""
    summary = pd.read_csv(PROJECT / REFERENCE / "summary.csv")
    seeds = yaml.safe_load((PROJECT / REFERENCE / "config.yaml").read_text(encoding="utf-8"))["seeds"]
    sentences = words.sentence(SimpleNamespace(seeds=seeds), summary, ["UNet++", "Mask2Former"]).split("\n")
    listed = "\n".join(f"- {sentence}" for sentence in sentences)
    return f"![ruler]({REFERENCE}/ruler.png)\n\n{listed}\n\n{words.short_table(summary)}"


def explanation_answer() -> str:
    """What the committed explanation runs found, by method."""
    parts = []
    for folder, title in EXPLAINED.items():
        names = ("networks", "explanations", "kinds", "clusters")
        tables = {name: pd.read_csv(PROJECT / folder / f"{name}.csv") for name in names}
        count = explanation_words.counted(tables)
        parts.append(
            f"**{title}** ([summary](../{folder}/summary.md)): {count}\n\n{explanation_words.answer(tables)}\n"
        )
    return "\n".join(parts)


def steps_answer() -> str:
    """What the committed run of the processing-steps study found, and where to read on; nothing where there is none."""
    parts = []
    if (PROJECT / STEPS / "summary.md").is_file():
        tables = {name: pd.read_csv(PROJECT / STEPS / f"{name}.csv") for name in STEPS_TABLES}
        parts.append(f"{processing_words.answer(tables)}\n\n{processing_words.findings(tables)}\n")
    links = [f"[{name}]({place})" for name, place in STEPS_PAGES.items() if (PROJECT / place).is_file()]
    return "\n".join([*parts, f"{', '.join(links)}.\n"] if links else parts)


ANSWERS = {
    "README.md": {MARKS: answer, STEPS_MARKS: steps_answer},
    "docs/explanations.md": {EXPLANATION_MARKS: explanation_answer},
}


def with_answers(page: str, text: str) -> str:
    """The page with what stands between its marks made anew."""
    for (start, end), make in ANSWERS[page].items():
        if text.count(start) != 1 or text.count(end) != 1:
            raise InputError(f"{page} needs {start} and {end} once each; put them back around what is made")
        before, _, rest = text.partition(start)
        text = f"{before}{start}\n{make()}{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Write every page, and the answers in those that are written by hand."""
    if len(sys.argv) > 1:
        raise InputError(f"docs/build.py takes no arguments, got {' '.join(sys.argv[1:])}")
    for page, make in PAGES.items():
        write_text(HERE / page, make())
        print(HERE / page)
    for page in ANSWERS:
        path = PROJECT / page
        write_text(path, with_answers(page, path.read_text(encoding="utf-8")))
        print(path)


if __name__ == "__main__":
    with sentences_instead_of_tracebacks():
        main()
