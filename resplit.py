"""Deal the pairs of a set in ISIC 2018's layout anew to training, validation and test, by their ids alone.

`python dataset.py resplit --data FOLDER --to FOLDER --training 800 --validation 100 --test 1100`: similarities and
read-outs want a thousand test images and more that no network was trained on, and the official parts are not of such
sizes. The files stay where they are and are linked, so the new set takes no space on the same disk.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from download import SPLITS
from images import Pair
from layouts import find_splits, layout_names
from utils import InputError, atomic_path, digest

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def resplit(data: Path, to: Path, training: int, validation: int, test: int, seed: int = 0) -> int:
    """Deal the pairs of all parts of a set anew by id, and link them into a folder in the same layout.

    Running it again completes what is missing; a folder that holds anything else is refused.

    Args:
        data: folder in ISIC 2018's layout, whose parts are put together first
        to: folder of the new set
        training: images for training
        validation: images for validation
        test: images for the test
        seed: of the draw; another seed deals otherwise

    Returns: 0.
    """
    data, to = Path(data), Path(to)
    counts = dict(zip(SPLITS, (training, validation, test)))
    dealt = deal([pair for pairs in find_splits(data, layout="isic").values() for pair in pairs], counts, seed)
    wanted = {target: source for split, pairs in dealt.items() for target, source in _files(to, split, pairs).items()}
    _refuse_other_content(to, wanted)
    copied = sum(_link(source, target) for target, source in wanted.items() if not target.exists())
    how = "all as hard links" if not copied else f"{copied:,} of the {len(wanted):,} files copied: no links there"
    said = ", ".join(f"{len(pairs):,} {split}" for split, pairs in dealt.items())
    print(f"{to} holds {said} pairs of {data}, {how}; look it over with `python dataset.py check --data {to}`")
    return 0


def deal(pairs: list[Pair], counts: Mapping[str, int], seed: int = 0) -> dict[str, list[Pair]]:
    """{split: its pairs in id order}: the ids in the order of a seeded hash, so that no part of the set counts more."""
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"{split.lower()} {count}: each part needs at least 1 image")
    if sum(counts.values()) > len(pairs):
        raise InputError(
            f"{sum(counts.values()):,} images were asked for ({', '.join(f'{n:,} {s}' for s, n in counts.items())}), "
            f"and there are {len(pairs):,}; ask for fewer"
        )
    order = iter(sorted(pairs, key=lambda pair: digest("resplit", seed, pair.id)))
    return {
        split: sorted((next(order) for _ in range(count)), key=lambda pair: pair.id) for split, count in counts.items()
    }


def _files(to: Path, split: str, pairs: list[Pair]) -> dict[Path, Path]:
    """New file -> the one that it is linked to."""
    images, masks = (to / name for name in layout_names(split)[0])
    found = {images / pair.image.name: pair.image for pair in pairs}
    return found | {masks / pair.mask.name: pair.mask for pair in pairs}


def _refuse_other_content(to: Path, wanted: Mapping[Path, Path]) -> None:
    """Nothing but what would be put there may be there: the same files, by their bytes."""
    if to.exists() and not to.is_dir():
        raise InputError(f"{to} is a file; choose another folder with --to")
    for path in sorted(to.rglob("*")) if to.exists() else []:
        if path.is_dir():
            continue
        source = wanted.get(path)
        if source is None or not (path.samefile(source) or filecmp.cmp(path, source, shallow=False)):
            raise InputError(f"{to} holds {path.relative_to(to)}, which is not of this split; choose another --to")


def _link(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where the disk knows no links or another disk holds it; True when it was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise InputError(
                f"{target} cannot be written ({error.strerror}); choose another folder with --to"
            ) from error
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return True
    return False
