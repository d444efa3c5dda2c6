"""How a folder becomes pairs of image and mask per split, from names and lists alone; no image is opened here.

Three layouts, told apart by what is there: `isic` (ISIC 2018 Task 1, in both spellings of its folders), `pet` (the
Oxford-IIIT Pet archives, unpacked) and `folder` (any `images` beside `masks`, whole or in split folders). Which mask
values mean which class is settled here too, since one layout brings its own; how a mask is read is in `images.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from download import SPLITS
from images import Pair
from utils import InputError, digest, pick

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_ENDING = "_segmentation"
MASK_ENDINGS = ("_mask", MASK_ENDING)  # what a mask's name may add to its image's, in a plain folder
# The share of Training that stands in for a missing folder, as a range of the id's hash in [0, 1).
DRAWN = {"test": (0.0, 0.2), "validation": (0.2, 0.3)}
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
PET_LISTS = {"train": "trainval.txt", "test": "test.txt"}
BINARY_NAMES = ("background", "lesion")
PET_NAMES, PET_VALUES = ("pet", "background", "border"), ((1,), (2,), (3,))
AUTO = "auto"

Problems = dict[str, list[str]]  # kind of problem -> where


# ---- what every layout shares -----------------------------------------------------------------------------------


def find_splits(root: Path | str, *, seed: int = 0, layout: str = AUTO) -> dict[str, list[Pair]]:
    """The pairs of each split, sorted by id, from file names alone; keys among 'train', 'validation', 'test'.

    Beside training images, a missing test or validation split is drawn from them by a seeded hash of the id: test
    20 %, validation 10 % of the ids. So the split of an id never depends on which other images are there. Without
    training images only what is there is returned. layout: 'isic', 'pet', 'folder', or 'auto' for what is there.

    Raises InputError when there is no known layout, or when an image or a mask has no partner (some are named).
    """
    splits, problems = scan(root, seed=seed, layout=layout)
    if problems:
        raise InputError(
            f"{root}: {_summary(problems)}. Add or remove these files; "
            f"`python dataset.py check --data {root}` lists every one"
        )
    return splits


def scan(root: Path | str, *, seed: int = 0, layout: str = AUTO) -> tuple[dict[str, list[Pair]], Problems]:
    """As `find_splits`, but what is wrong is returned beside the sound pairs: kind of problem -> where."""
    root, problems = Path(root), {}
    given = READERS[recognise(root, layout)](root, problems)
    splits = _draw_missing(given, seed) if "train" in given else given
    for name, pairs in splits.items():
        if not pairs:
            origin = "its folder" if name in given else "drawn from the training images"
            problems.setdefault("empty split", []).append(f"no pairs in {name} ({origin})")
    for (one, pairs), (other, others) in itertools.combinations(splits.items(), 2):
        shared = {pair.id for pair in pairs} & {pair.id for pair in others}
        for id_ in sorted(shared):
            problems.setdefault("same id in two splits", []).append(f"{id_} ({one} and {other})")
    order = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in order}, problems


def recognise(root: Path | str, layout: str = AUTO) -> str:
    """'isic', 'pet' or 'folder': the layout asked for, or with 'auto' the one that the folder shows."""
    root = Path(root)
    if layout != AUTO:
        pick("layout", layout, READERS)
    if root.is_file():
        raise InputError(f"data folder {root} is a file; give the folder which holds the images, such as ISIC 2018's")
    if not root.is_dir():
        raise InputError(
            f"data folder {root} does not exist; `python dataset.py download --to {root}` fetches ISIC 2018, "
            "and with --dataset pet Oxford-IIIT Pet"
        )
    if layout != AUTO:
        return layout
    shown = [name for name, is_there in SIGNS.items() if is_there(root)]
    if len(shown) > 1:
        raise InputError(f"{root} shows several layouts ({', '.join(shown)}); say which one with the setting layout")
    if not shown:
        raise InputError(
            f"no ISIC 2018 folder in {root}, nor another layout that is known: looked for {_isic_names()}; for "
            f"annotations/trimaps and annotations/trainval.txt beside images (Oxford-IIIT Pet); for {_folder_names()}; "
            "give the folder which holds these"
        )
    return shown[0]


def _draw_missing(splits: dict[str, list[Pair]], seed: int) -> dict[str, list[Pair]]:
    drawn = {name: share for name, share in DRAWN.items() if name not in splits}
    result = {**splits, "train": []} | {name: [] for name in drawn}
    for pair in splits["train"]:
        place = int(digest("split", seed, pair.id), 16) / 16**16
        home = next((name for name, (low, high) in drawn.items() if low <= place < high), "train")
        result[home].append(pair)
    return result


def _summary(problems: Mapping[str, Sequence[str]], limit: int = 3) -> str:
    """'2 × image without a mask: a.jpg, b.jpg; 7 × …', the first `limit` of each kind."""
    return "; ".join(
        f"{len(where)} × {kind}: {', '.join(where[:limit])}{', …' if len(where) > limit else ''}"
        for kind, where in problems.items()
    )


def cap(pairs: Sequence[Pair], n: int | None, seed: int = 0) -> list[Pair]:
    """A seeded subset of at most `n` pairs in id order (None: all); a smaller n is a subset of a larger one."""
    if n is not None and n < 1:
        raise InputError(f"a subset of {n} images was asked for; ask for at least 1")
    chosen = sorted(pairs, key=lambda pair: digest("cap", seed, pair.id))[:n]
    return sorted(chosen, key=lambda pair: pair.id)


def _pair_up(root: Path, folders: tuple[Path, Path], endings: Sequence[str], problems: Problems) -> list[Pair]:
    """The pairs of an image and a mask folder, sorted by id; what has no partner or two of them goes to `problems`."""

    def note(kind: str, where: str) -> None:
        problems.setdefault(kind, []).append(where)

    def named(path: Path) -> str:
        return path.relative_to(root).as_posix()

    images = _by_id(folders[0])
    masks = _by_id(folders[1], endings, images)
    for found in (images, masks):
        for id_, files in sorted(found.items()):
            if len(files) > 1:
                note("duplicate id", f"{id_}: {', '.join(map(named, files))}")
    for id_ in sorted(set(images) - set(masks)):
        note("image without a mask", named(images[id_][0]))
    for id_ in sorted(set(masks) - set(images)):
        note("mask without an image", named(masks[id_][0]))
    both = sorted(set(images) & set(masks))
    return [Pair(id_, images[id_][0], masks[id_][0]) for id_ in both if len(images[id_]) == len(masks[id_]) == 1]


def _by_id(folder: Path, endings: Sequence[str] = (), known: Collection[str] = ()) -> dict[str, list[Path]]:
    """Id -> the image files of that id; hidden files, superpixels and texts of the official archives are left out.

    An id is the name without the first of `endings` that it has; a name that is `known` as it stands is an id.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES or path.stem.endswith("_superpixels"):
            continue
        ending = next((end for end in endings if path.stem.endswith(end) and path.stem not in known), "")
        found.setdefault(path.stem.removesuffix(ending), []).append(path)
    return found


# ---- ISIC 2018 --------------------------------------------------------------------------------------------------


def layout_names(split: str) -> tuple[tuple[str, str], ...]:
    """The (image folder, mask folder) names of 'Training', 'Validation' or 'Test' in ISIC's two spellings."""
    return tuple(
        (f"ISIC2018_{images}{split}_Input", f"ISIC2018_{masks}{split}_GroundTruth")
        for images, masks in (("Task1-2_", "Task1_"), ("", ""))
    )


def _isic_names() -> str:
    return ", ".join(f"{images} with {masks}" for split in SPLITS for images, masks in layout_names(split))


def _isic(root: Path, problems: Problems) -> dict[str, list[Pair]]:
    folders = _isic_folders(root)
    if not folders:
        raise InputError(
            f"no ISIC 2018 folder in {root}: looked for {_isic_names()}; give the folder which holds these"
        )
    return {split: _pair_up(root, pair, (MASK_ENDING,), problems) for split, pair in folders.items()}


def _isic_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """Split name -> (image folder, mask folder), for the folders that are in `root`."""
    found = {}
    for split in SPLITS:
        present = [names for names in layout_names(split) if any((root / name).is_dir() for name in names)]
        if len(present) > 1:
            raise InputError(
                f"{root} holds two layouts of {split} ({present[0][0]}, {present[1][0]}); keep one of them"
            )
        for names in present:
            missing = [name for name in names if not (root / name).is_dir()]
            if missing:
                raise InputError(f"{root} has one half of {split} only: folder {missing[0]} is missing; put it there")
            found["train" if split == "Training" else split.lower()] = (root / names[0], root / names[1])
    return found


def _shows_isic(root: Path) -> bool:
    return any((root / name).is_dir() for split in SPLITS for pair in layout_names(split) for name in pair)


# ---- Oxford-IIIT Pet --------------------------------------------------------------------------------------------


def _pet(root: Path, problems: Problems) -> dict[str, list[Pair]]:
    """The images that the two lists name; what else lies in `images` is left alone, as some of the archive's does."""
    needed = [Path("images"), Path("annotations/trimaps"), *(Path("annotations") / name for name in PET_LISTS.values())]
    missing = [str(path) for path in needed if not (root / path).exists()]
    if missing:
        raise InputError(
            f"{root} is no whole Oxford-IIIT Pet: {', '.join(missing)} is missing; put it there, or run "
            f"`python dataset.py download --dataset pet --to {root}`"
        )
    return {split: _listed(root, root / "annotations" / name, problems) for split, name in PET_LISTS.items()}


def _listed(root: Path, list_: Path, problems: Problems) -> list[Pair]:
    """The pairs of a list, sorted by id; a name without its image or trimap goes to `problems`, as one given twice."""
    pairs: dict[str, Pair] = {}
    for name in _names_in(list_):
        pair = Pair(name, root / "images" / f"{name}.jpg", root / "annotations" / "trimaps" / f"{name}.png")
        absent = [str(path.relative_to(root)) for path in (pair.image, pair.mask) if not path.is_file()]
        for path in absent:
            problems.setdefault("listed but not there", []).append(f"{path} (listed in {list_.name})")
        if name in pairs:
            problems.setdefault("duplicate id", []).append(f"{name} (twice in {list_.name})")
        if not absent:
            pairs[name] = pair
    return [pairs[name] for name in sorted(pairs)]


def _names_in(list_: Path) -> list[str]:
    """The names in a list of lines 'NAME CLASS SPECIES BREED', with # comments."""
    names = []
    try:
        lines = list_.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list {list_} cannot be read ({error}); fetch it again") from error
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 4 or not all(word.isdigit() for word in words[1:]) or Path(words[0]).name != words[0]:
            raise InputError(f"{list_}, line {number}: {line!r} is not NAME CLASS SPECIES BREED; correct it")
        names.append(words[0])
    return names


def _shows_pet(root: Path) -> bool:
    return any((root / "annotations" / name).exists() for name in ("trimaps", "trainval.txt"))


# ---- any folder of images and masks -----------------------------------------------------------------------------


def _folder_names() -> str:
    splits = ", ".join(name for names in SPLIT_FOLDERS.values() for name in names)
    return f"images beside masks, there or in {splits}"


def _folder(root: Path, problems: Problems) -> dict[str, list[Pair]]:
    places = _places(root)
    if not places:
        raise InputError(f"no images in {root}: looked for {_folder_names()}; give the folder which holds these")
    found = {}
    for split, place in places:
        missing = [name for name in ("images", "masks") if not (place / name).is_dir()]
        if missing:
            raise InputError(f"{place} has one half of its pairs only: folder {missing[0]} is missing; put it there")
        if split in found:
            raise InputError(f"{root} holds images of {split} in two places, one of them {place}; keep one of them")
        found[split] = _pair_up(root, (place / "images", place / "masks"), MASK_ENDINGS, problems)
    return found


def _places(root: Path) -> list[tuple[str, Path]]:
    """(split, the folder that holds its `images` or `masks`); what lies in the root itself is for training."""
    places = [(split, root / name) for split, names in SPLIT_FOLDERS.items() for name in names] + [("train", root)]
    return [(split, place) for split, place in places if any((place / name).is_dir() for name in ("images", "masks"))]


def _shows_folder(root: Path) -> bool:
    """`images` in the root alone, without `masks`, are Pet's where its annotations are there."""
    of_pet = _shows_pet(root) and not (root / "masks").is_dir()
    return any(place != root or not of_pet for _, place in _places(root))


READERS: dict[str, Callable[[Path, Problems], dict[str, list[Pair]]]] = {"isic": _isic, "pet": _pet, "folder": _folder}
SIGNS: dict[str, Callable[[Path], bool]] = {"isic": _shows_isic, "pet": _shows_pet, "folder": _shows_folder}


# ---- classes ----------------------------------------------------------------------------------------------------


def settle_classes(
    layout: str, names: Sequence[str] = (), values: Sequence[Sequence[int]] = ()
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """(class names, for each the mask values that mean it) of a layout, from what a user has said of them.

    No values: a mask is binary, and whatever is not 0 is the second class. Not said: three classes for 'pet', its
    trimaps' 1, 2 and 3; else background and lesion. More than two names without values: the values 0, 1, 2, …
    """
    names, values = tuple(names), tuple(tuple(entry) for entry in values)
    if not values and layout == "pet":
        values = PET_VALUES
    elif not values and len(names) > 2:
        values = tuple((index,) for index in range(len(names)))
    if not names and layout == "pet" and len(values) == 3:
        names = PET_NAMES
    elif not names and layout != "pet" and len(values) in (0, 2):
        names = BINARY_NAMES
    if len(names) != (len(values) or 2):
        listed = f"mask_values lists {[list(entry) for entry in values]}" if values else "a binary mask has 2"
        raise InputError(
            f"classes names {len(names)} ({', '.join(names) or 'none'}), but {listed}; say both, such as "
            "classes [background, pet] with mask_values [[2], [1, 3]]"
        )
    if len(set(names)) != len(names):
        raise InputError(f"classes names one class twice: {', '.join(names)}; give each its own name")
    return names, values
