"""Door: `python experiments.py [study] [--config configs/NAME.yaml] [--data FOLDER] …` runs a study.

Without arguments it runs the main job: the universality study in its demo preset, on the embedded synthetic images.
`python experiments.py STUDY --help` lists every setting; those on the command line override the YAML.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence

from studies import (
    architectures,
    classifiers,
    encoders,
    explanations,
    legacy,
    processing_steps,
    report,
    segmentation,
    universality,
)
from utils import HOME, InputError, closest, format_seconds, read_settings, sentences_instead_of_tracebacks

STUDIES = {
    "universality": (universality.UniversalityConfig, universality.run),
    "segmentation": (segmentation.SegmentationConfig, segmentation.run),
    "legacy": (legacy.LegacyConfig, legacy.run),
    "encoders": (encoders.EncodersConfig, encoders.run),
    "architectures": (architectures.ArchitecturesConfig, architectures.run),
    "classifiers": (classifiers.ClassifiersConfig, classifiers.run),
    "explanations": (explanations.ExplanationsConfig, explanations.run),
    "processing_steps": (processing_steps.ProcessingConfig, processing_steps.run),
    "report": (report.ReportConfig, report.run),
}
DEFAULT_CONFIG = {
    "universality": HOME / "configs" / "demo.yaml",
    "segmentation": HOME / "configs" / "segmentation_demo.yaml",
    "legacy": HOME / "configs" / "legacy_demo.yaml",
    "encoders": HOME / "configs" / "encoders_demo.yaml",
    "architectures": HOME / "configs" / "architectures_demo.yaml",
    "classifiers": HOME / "configs" / "classifiers_demo.yaml",
    "explanations": HOME / "configs" / "explanations_demo.yaml",
    "processing_steps": HOME / "configs" / "processing_steps_demo.yaml",
    "report": HOME / "configs" / "report.yaml",
}
SWITCHES = ("--dry-run", "--dry_run", "--retry")  # settings that are true when they are named


def load_config(study: str, arguments: Sequence[str] = ()):
    """The settings of a study: its YAML (`--config`, default the demo's), overridden by the other arguments."""
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(DEFAULT_CONFIG[study]), *arguments]
    return read_settings(STUDIES[study][0], f"python experiments.py {study}", spelt_out(arguments))


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """`--dry-run` and `--retry` alone as `--dry_run true` and `--retry true`."""
    arguments = list(arguments)
    found = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        found.append(argument.replace("-", "_").replace("__", "--", 1) if argument in SWITCHES else argument)
        if argument in SWITCHES and following.lower() not in ("true", "false"):
            found.append("true")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Pick the study, run it, and say where the results are."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    study = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "universality"
    if study not in STUDIES:
        raise InputError(f"unknown study {study!r}; closest: {closest(study, STUDIES)}")
    started = time.perf_counter()
    folder = STUDIES[study][1](load_config(study, arguments))
    page = folder / "summary.md"
    told = f" Read {page}" if page.exists() else ""
    print(f"\nDone in {format_seconds(time.perf_counter() - started)}.{told}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers")
    with sentences_instead_of_tracebacks():
        main()
