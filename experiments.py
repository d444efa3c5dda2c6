"""Door: `python experiments.py [study] [--config configs/NAME.yaml] [--data FOLDER] …` runs a study.

Without arguments it runs the main job: the universality study in its demo preset, on the embedded synthetic images.
`python experiments.py STUDY --help` lists every setting; those on the command line override the YAML.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence

from studies import legacy, segmentation, universality
from utils import HOME, InputError, closest, format_seconds, read_settings, sentences_instead_of_tracebacks

STUDIES = {
    "universality": (universality.UniversalityConfig, universality.run),
    "segmentation": (segmentation.SegmentationConfig, segmentation.run),
    "legacy": (legacy.LegacyConfig, legacy.run),
}
DEFAULT_CONFIG = {
    "universality": HOME / "configs" / "demo.yaml",
    "segmentation": HOME / "configs" / "segmentation_demo.yaml",
    "legacy": HOME / "configs" / "legacy_demo.yaml",
}


def load_config(study: str, arguments: Sequence[str] = ()):
    """The settings of a study: its YAML (`--config`, default the demo's), overridden by the other arguments."""
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(DEFAULT_CONFIG[study]), *arguments]
    return read_settings(STUDIES[study][0], f"python experiments.py {study}", arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pick the study, run it, and say where the results are."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    study = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "universality"
    if study not in STUDIES:
        raise InputError(f"unknown study {study!r}; closest: {closest(study, STUDIES)}")
    started = time.perf_counter()
    folder = STUDIES[study][1](load_config(study, arguments))
    print(f"\nDone in {format_seconds(time.perf_counter() - started)}. Read {folder / 'summary.md'}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    with sentences_instead_of_tracebacks():
        main()
