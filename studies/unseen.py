"""Were the networks trained on the images that a study asks them about? Refused before anything long, by name.

Networks of other studies' results folders are held against those folders' own account of their images. Which networks
and which images are asked for is said elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from classification.photos import photo_set
from sources import ImageSource, open_datasets
from studies.classifiers import ClassifiersConfig, photo_folder
from studies.subjects import SEGMENTATION, Subject, settings_in, stored_images
from utils import InputError


def check_segmentation(source: ImageSource, subjects: Sequence[Subject]) -> None:
    """Refuse networks that segment and were trained with other images, whose test images these may not be."""
    segmenting = [subject for subject in subjects if subject.kind == SEGMENTATION]
    (check_drawn_images if source.data == "synthetic" else check_same_images)(source, segmenting)


def check_same_images(source: ImageSource, subjects: Sequence[Subject]) -> None:
    """Refuse networks whose study had other test images, or saw them otherwise: these may be among their training."""
    for folder in dict.fromkeys(subject.source for subject in subjects):
        size = settings_in(folder)["image_size"]
        found = open_datasets(dataclasses.replace(source, image_size=size), needed=("test",))["test"].fingerprint
        known = stored_images(folder, "test", "hash")
        if found != known:
            raise InputError(
                f"the test images of {source.data} are not those of {folder} (at {size} px: hash {found}, there "
                f"{known}); give the data, layout, blur and interpolation that its networks were trained with"
            )


def check_drawn_images(source: ImageSource, subjects: Sequence[Subject]) -> None:
    """Refuse networks that were trained on another synthetic set: some of these test images may be among theirs."""
    wanted = {name: getattr(source, name) for name in ("data", "synthetic_images", "synthetic_size", "synthetic_seed")}
    for subject in subjects:
        own = settings_in(subject.folder.parent)
        for name, value in wanted.items():
            if own[name] != value:
                raise InputError(
                    f"network {subject.name} was trained with {name} {own[name]!r}, and the images to explain are of "
                    f"{value!r}; give the same settings"
                )


def check_photographs(ids: Iterable[str], subjects: Sequence[Subject]) -> None:
    """Refuse photographs that some of the classifiers were trained on."""
    for subject in {subject.source: subject for subject in subjects if subject.kind != SEGMENTATION}.values():
        seen = set(ids) & trained_on(subject)
        if seen:
            raise InputError(
                f"{len(seen)} of the photographs were trained on by the networks of {subject.source}, first "
                f"{min(seen)!r}; explain others"
            )


def trained_on(subject: Subject) -> set[str]:
    """Ids of the photographs that a classifier was trained on, where they are still there to be asked."""
    if subject.source is None:
        return set()
    folder = photo_folder(ClassifiersConfig(**settings_in(subject.source)))
    return set(photo_set(folder, "train").ids) if (folder / "train").is_dir() else set()
