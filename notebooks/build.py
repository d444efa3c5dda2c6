"""Make the notebooks of the top folder from their sources here: fill in address and set-up, execute, write.

`python notebooks/build.py` builds and executes all (the demo preset: minutes); `--only unetpp` one of them;
`--preset smoke` executes in seconds, for trying out. Sources are jupytext percent scripts; the badge and the set-up
cell are the same in all and come from `setup_cell.py` and `repository.yaml`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
NOTEBOOKS = ("unetpp", "mask2former", "mech_interp_experiment", "encoders_and_architectures", "explanations")
NOTEBOOKS += ("processing_steps",)
LIMIT_BYTES = 1_500_000
LONGEST_CELL = 40  # lines: a screen; the set-up cell has as many
MOST_WORDS = 1000  # of text: a few minutes of reading
# notebooks that differ by their model alone have one source, one_model.py, with these words in its places
OF_ONE_MODEL = {
    "unetpp": {
        "model": "unetpp",
        "title": "UNet++",
        "kind": "a convolutional network",
        "training": """One loop serves every model. It validates each epoch, and the checkpoint with the best *validation* IoU is kept: the
test images are not looked at until the end. Run again, the cell finds the finished training.""",
        "sites": """; not the order in which the
decoder's modules are named.""",
        "next": "`mask2former.ipynb` trains the transformer, `mech_interp_experiment.ipynb` compares the two.",
    },
    "mask2former": {
        "model": "mask2former",
        "title": "Mask2Former",
        "kind": "a transformer",
        "training": """Mask2Former predicts a *set*: each of its queries proposes a mask and a class, and its own loss matches queries to a
background and a lesion mask. A pixel's answer is the class-weighted sum over all queries, as log-odds of lesion.
The best epoch is chosen on validation images; run again, the cell finds the finished training.""",
        "sites": """. Their axes are declared, never
guessed: Swin emits tokens × channels, the transformer decoder queries × *batch* × channels.""",
        "next": "`mech_interp_experiment.ipynb` compares this model with UNet++.",
    },
}
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"


def address() -> dict:
    """The project's public address, from the one place that knows it."""
    return yaml.safe_load((PROJECT / "repository.yaml").read_text(encoding="utf-8"))


def badge(name: str) -> str:
    """Markdown of the Colab badge; without a public address it opens Colab's own start page, and says what to do."""
    url = address()["url"]
    if url is None:
        return (
            f"[![Open in Colab]({COLAB_BADGE})](https://colab.research.google.com/) *In Colab: upload this notebook, and "
            "put the project's folder or zip beside it (Files pane); the set-up cell finds it.*"
        )
    path = url.removeprefix("https://github.com/").strip("/")
    return f"[![Open in Colab]({COLAB_BADGE})](https://colab.research.google.com/github/{path}/blob/{address()['branch']}/{name}.ipynb)"


def setup_cell() -> str:
    """The code of the set-up cell with the address filled in."""
    code = (HERE / "setup_cell.py").read_text(encoding="utf-8").strip()
    return code.replace('REPOSITORY = ""', f'REPOSITORY = "{address()["url"] or ""}"')


def source(name: str) -> nbformat.NotebookNode:
    """The notebook as written, not executed."""
    text = (HERE / f"{'one_model' if name in OF_ONE_MODEL else name}.py").read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:12]}-{index:02d}"  # stable, so that rebuilding changes nothing by itself
        for place, words in {"badge": badge(name), **OF_ONE_MODEL.get(name, {})}.items():
            cell.source = cell.source.replace(f"{{{{{place}}}}}", words)
        if cell.source.strip() == "# {{setup}}":
            cell.source = setup_cell()
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def execute(notebook: nbformat.NotebookNode, preset: str) -> None:
    """Run every cell in the project's folder; an error ends the build."""
    os.environ |= {"PRESET": preset, "TQDM_DISABLE": "1"}
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(PROJECT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # clock times
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata.pop("widgets", None)


def build(name: str, preset: str) -> Path:
    """Execute one notebook and write it to the top folder."""
    notebook = source(name)
    execute(notebook, preset)
    text = nbformat.writes(notebook, version=4) + "\n"
    if len(text.encode()) > LIMIT_BYTES:
        raise SystemExit(
            f"{name}.ipynb would be {len(text.encode()):,} bytes, above {LIMIT_BYTES:,}: show fewer pictures"
        )
    path = PROJECT / f"{name}.ipynb"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=NOTEBOOKS)
    parser.add_argument("--preset", default="demo")
    options = parser.parse_args()
    for name in NOTEBOOKS if options.only is None else (options.only,):
        path = build(name, options.preset)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
