"""Folders that are not ISIC's, masks of several classes, and parts of the training images."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import images
from augmentation import Augmenter
from dataset import SegmentationDataset, class_pixels, find_splits, make_loader
from images import IGNORE, Pair, Transform, cache_file, read_mask
from layouts import recognise, settle_classes
from sources import ImageSource, open_datasets, part_of
from utils import InputError, digest

TRIMAP = ((1,), (2,), (3,))
PETS = ["Abyssinian_1", "Abyssinian_10", "great_pyrenees_7", *(f"pug_{number}" for number in range(1, 38))]
HEADER = "#Image CLASS-ID SPECIES BREED ID\n#ID: 1:37 Class ids\n\n"


def picture(number: int, size=(32, 24)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def trimap(number: int, size=(32, 24)) -> np.ndarray:
    """(H, W) uint8: a pet (1) with its border (3) on background (2)."""
    mask = np.full(size[::-1], 2, np.uint8)
    mask[4 : 16 + number % 3, 5:25] = 3
    mask[6 : 14 + number % 3, 7:23] = 1
    return mask


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_pets(root: Path, test=PETS[:3], trainval=PETS[3:]) -> Path:
    """A folder as the two archives leave it: comments, hidden files and MATLAB files included."""
    for number, name in enumerate(PETS):
        save(picture(number), root / "images" / f"{name}.jpg")
        save(trimap(number), root / "annotations" / "trimaps" / f"{name}.png")
        (root / "annotations" / "trimaps" / f"._{name}.png").write_bytes(b"x")
    for extra in ("Abyssinian_100.mat", "._pug_1.jpg"):
        (root / "images" / extra).write_bytes(b"x")
    save(picture(99), root / "images" / "unlisted_1.jpg")
    for list_, names in (("trainval", trainval), ("test", test)):
        lines = "".join(f"{name} 1 2 3\n" for name in names)
        (root / "annotations" / f"{list_}.txt").write_text(HEADER + lines)
    return root


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return make_pets(tmp_path_factory.mktemp("pets") / "oxford-iiit-pet")


def make_folder(root: Path, numbers, *, ending: str = "", mask=trimap) -> Path:
    for number in numbers:
        save(picture(number), root / "images" / f"i{number:03d}.png")
        save(mask(number), root / "masks" / f"i{number:03d}{ending}.png")
    return root


def one_mask(tmp_path: Path, mask: np.ndarray) -> Pair:
    save(picture(0, mask.shape[1::-1]), tmp_path / "images" / "one.png")
    save(mask, tmp_path / "masks" / "one.png")
    return Pair("one", tmp_path / "images" / "one.png", tmp_path / "masks" / "one.png")


# ---- Oxford-IIIT Pet ----


def test_pet_is_recognised_and_split_as_its_lists_say(pets):
    assert recognise(pets) == "pet"
    splits = find_splits(pets)
    assert [pair.id for pair in splits["test"]] == sorted(PETS[:3])
    assert sorted(pair.id for name in ("train", "validation") for pair in splits[name]) == sorted(PETS[3:])
    for pair in splits["train"]:
        assert pair.image == pets / "images" / f"{pair.id}.jpg"
        assert pair.mask == pets / "annotations" / "trimaps" / f"{pair.id}.png"


def test_pet_validation_is_a_seeded_tenth_that_more_names_do_not_move(tmp_path):
    names = [f"cat_{number}" for number in range(1000)]
    for place in ("images", "annotations/trimaps"):
        (tmp_path / place).mkdir(parents=True)
    for name in [*names, "dog_1"]:
        (tmp_path / "images" / f"{name}.jpg").touch()
        (tmp_path / "annotations" / "trimaps" / f"{name}.png").touch()

    def split(count: int, seed: int) -> dict[str, set[str]]:
        (tmp_path / "annotations" / "trainval.txt").write_text("".join(f"{name} 1 1 1\n" for name in names[:count]))
        (tmp_path / "annotations" / "test.txt").write_text("dog_1 1 1 1\n")
        return {name: {pair.id for pair in pairs} for name, pairs in find_splits(tmp_path, seed=seed).items()}

    whole, part = split(1000, 0), split(600, 0)
    assert abs(len(whole["validation"]) - 100) < 4 * 9.5  # binomial: four standard deviations
    assert part["validation"] == whole["validation"] & set(names[:600]) and whole["test"] == {"dog_1"}
    assert split(1000, 1)["validation"] != whole["validation"]


@pytest.mark.parametrize("lost", ["images/pug_5.jpg", "annotations/trimaps/pug_5.png"])
def test_a_listed_pet_without_image_or_trimap_is_named(tmp_path, lost):
    (make_pets(tmp_path) / lost).unlink()
    with pytest.raises(InputError, match=rf"listed but not there: {lost} \(listed in trainval\.txt\)"):
        find_splits(tmp_path)


def test_a_pet_folder_that_is_not_whole_and_bad_lists_are_named(tmp_path):
    make_pets(tmp_path, test=[*PETS[:3], PETS[4]])
    with pytest.raises(InputError, match=r"same id in two splits: pug_2 \("):
        find_splits(tmp_path)
    list_ = tmp_path / "annotations" / "test.txt"
    for line in ("pug_1", "pug_1 one 2 3", "../pug_1 1 2 3"):
        list_.write_text(HEADER + line)
        with pytest.raises(InputError, match=r"test\.txt, line 4: .* is not NAME CLASS SPECIES BREED"):
            find_splits(tmp_path)
    list_.write_text("pug_1 1 2 3\npug_1 1 2 3\n")
    with pytest.raises(InputError, match=r"duplicate id: pug_1 \(twice in test\.txt\)"):
        find_splits(tmp_path)
    list_.unlink()
    with pytest.raises(InputError, match=r"annotations/test\.txt is missing.*download --dataset pet"):
        find_splits(tmp_path)


def test_pet_serves_the_trimaps_three_classes_by_name(pets):
    source = ImageSource(data=str(pets), image_size=16, flips=False)
    assert source.class_names == ("pet", "background", "border") and source.num_classes == 3
    data = open_datasets(source)["test"]
    sample = data[0]
    assert sample.mask.shape == (1, 16, 16) and sample.mask.dtype == torch.int64
    resized = Image.open(data.pairs[0].mask).resize((16, 16), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(sample.mask[0].numpy() + 1, np.asarray(resized))
    batch = next(iter(make_loader(data, 3)))
    assert batch.mask.shape == (3, 1, 16, 16) and set(batch.mask.unique().tolist()) == {0, 1, 2}


def test_pet_against_the_rest_is_binary(pets):
    settings = {"classes": ["background", "pet"], "mask_values": [[2, 3], [1]]}
    source = ImageSource(data=str(pets), image_size=24, **settings)
    sample = open_datasets(source, needed=("test",))["test"][0]
    assert source.num_classes == 2 and sample.mask.dtype == torch.float32
    expected = np.asarray(Image.open(find_splits(pets)["test"][0].mask).resize((24, 24), Image.Resampling.NEAREST)) == 1
    np.testing.assert_array_equal(sample.mask[0].numpy(), expected)
    with pytest.raises(InputError, match=r"classes names 2 \(background, pet\), but mask_values lists \[\[1\], "):
        ImageSource(data=str(pets), classes=["background", "pet"]).transform  # noqa: B018


# ---- any folder ----


@pytest.mark.parametrize("ending", ["", "_mask", "_segmentation"])
def test_images_beside_masks_are_paired_by_stem_and_splits_are_drawn(tmp_path, ending):
    make_folder(tmp_path, range(60), ending=ending)
    assert recognise(tmp_path) == "folder"
    splits = find_splits(tmp_path)
    assert list(splits) == ["train", "validation", "test"] and all(splits.values())
    assert sorted(pair.id for pairs in splits.values() for pair in pairs) == [f"i{number:03d}" for number in range(60)]
    for pair in splits["train"]:
        assert pair.image.stem == pair.id and pair.mask.name == f"{pair.id}{ending}.png"


@pytest.mark.parametrize("validation", ["validation", "val"])
def test_split_folders_are_taken_as_they_are(tmp_path, validation):
    numbers = {"train": range(5), validation: range(5, 7), "test": range(7, 10)}
    for name, part in numbers.items():
        make_folder(tmp_path / name, part)
    counts = {name: len(pairs) for name, pairs in find_splits(tmp_path).items()}
    assert counts == {"train": 5, "validation": 2, "test": 3}


def test_only_the_split_folder_that_is_missing_is_drawn(tmp_path):
    make_folder(tmp_path / "train", range(60))
    make_folder(tmp_path / "test", [100])
    splits = find_splits(tmp_path)
    assert len(splits["test"]) == 1 and splits["validation"] and len(splits["train"]) + len(splits["validation"]) == 60


def test_an_image_whose_name_ends_like_a_masks_keeps_its_name(tmp_path):
    for stem in ("a", "a_mask"):
        save(picture(0), tmp_path / "test" / "images" / f"{stem}.png")
        save(trimap(0), tmp_path / "test" / "masks" / f"{stem}.png")
    assert [(pair.id, pair.mask.stem) for pair in find_splits(tmp_path)["test"]] == [("a", "a"), ("a_mask", "a_mask")]


def test_files_without_partner_are_named_with_their_folder(tmp_path):
    make_folder(tmp_path / "test", range(3))
    (tmp_path / "test" / "masks" / "i001.png").unlink()
    (tmp_path / "test" / "images" / "i002.png").unlink()
    with pytest.raises(InputError, match=r"without a mask: test/images/i001\.png.*an image: test/masks/i002\.png"):
        find_splits(tmp_path)


def test_an_unknown_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"ISIC2018_Training_Input.*annotations/trimaps.*images beside masks.*val"):
        find_splits(tmp_path)
    for layout, words in (("isic", "ISIC2018_Test_Input"), ("pet", "annotations/trimaps"), ("folder", "beside masks")):
        with pytest.raises(InputError, match=words):
            find_splits(tmp_path, layout=layout)
    with pytest.raises(InputError, match="unknown layout 'pets'; closest: 'pet'"):
        find_splits(tmp_path, layout="pets")


def test_half_a_folder_and_one_that_shows_two_layouts_are_refused(tmp_path):
    make_folder(tmp_path / "two", range(3))
    (tmp_path / "half" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="half of its pairs only: folder masks is missing"):
        find_splits(tmp_path / "half")
    make_pets(tmp_path / "two")
    with pytest.raises(InputError, match=r"several layouts \(pet, folder\).*setting layout"):
        find_splits(tmp_path / "two")
    assert len(find_splits(tmp_path / "two", layout="pet")["test"]) == 3
    for name in ("val", "validation"):
        make_folder(tmp_path / "twice" / name, range(2))
    with pytest.raises(InputError, match="images of validation in two places"):
        find_splits(tmp_path / "twice")


# ---- classes ----


def test_mask_values_become_class_indices_and_255_is_ignored(tmp_path):
    mask = np.array([[0, 7, 7, 255], [9, 8, 0, 255]], np.uint8)
    pair = one_mask(tmp_path, mask)
    values = ((0,), (7, 8), (9,))
    expected = [[0, 1, 1, IGNORE], [2, 1, 0, IGNORE]]
    np.testing.assert_array_equal(read_mask(pair.mask, values), expected)
    assert read_mask(pair.mask, [[255], [0, 7], [8, 9]])[0].tolist() == [1, 1, 1, 0]  # listed, so a class like another


@pytest.mark.parametrize("kind", ["palette", "16 bit", "grey saved as colour"])
def test_masks_are_read_by_their_numbers_however_they_are_stored(tmp_path, kind):
    numbers = np.array([[0, 1], [2, 1]], np.uint8)
    stored = {
        "palette": Image.fromarray(numbers),
        "16 bit": Image.fromarray(numbers.astype(np.uint16) * 300),
        "grey saved as colour": Image.fromarray(np.dstack([numbers] * 3)),
    }[kind]
    if kind == "palette":
        stored.putpalette([0, 0, 0, 200, 10, 10, 0, 90, 255])
        assert stored.mode == "P"
    stored.save(tmp_path / "mask.png")
    values = ((0,), (300,), (600,)) if kind == "16 bit" else ((0,), (1,), (2,))
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", values), numbers)


def test_a_value_of_no_class_is_named_with_its_file_and_what_is_known(tmp_path):
    mask = trimap(0)
    mask[3, 3] = 4
    pair = one_mask(tmp_path, mask)
    with pytest.raises(InputError, match=r"one\.png holds the value 4, .* 1 for class 0; 2 .* 3 for class 2; 255 to"):
        SegmentationDataset([pair], Transform(size=16, values=TRIMAP))
    with pytest.raises(InputError, match=r"one\.png holds the value 4, .* 2 for class 0; 1, 3 for class 1; correct"):
        SegmentationDataset([pair], Transform(size=16, values=((2,), (1, 3))))


def test_ignored_pixels_of_a_binary_mask_are_refused(tmp_path):
    pair = one_mask(tmp_path, np.array([[0, 1], [1, 255]], np.uint8))
    with pytest.raises(InputError, match=r"one\.png holds 255 \(ignore\).*list 255 in mask_values"):
        read_mask(pair.mask, ((0,), (1,)))
    assert read_mask(pair.mask, ((0,), (1, 255))).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    "values, message",
    [
        (((1,),), "between 2 and 255"),
        (((1,), ()), "give class 1 none"),
        (((1,), (2, 1)), "value 1 is listed twice"),
        (((-1,), (2,)), "whole numbers from 0 up"),
        (((1.5,), (2,)), "whole numbers from 0 up"),
    ],
)
def test_impossible_classes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Transform(values=values)


def test_names_and_values_are_settled_together():
    assert settle_classes("isic") == settle_classes("folder") == (("background", "lesion"), ())
    assert settle_classes("pet") == (("pet", "background", "border"), TRIMAP)
    assert settle_classes("folder", ["sky", "road", "car"])[1] == ((0,), (1,), (2,))
    assert settle_classes("folder", ["skin", "polyp"]) == (("skin", "polyp"), ())
    assert settle_classes("pet", ["rest", "pet"], [[2, 3], [1]]) == (("rest", "pet"), ((2, 3), (1,)))
    for layout, names, values in (("folder", ["a"], []), ("folder", [], [[0], [1], [2]]), ("pet", ["a", "b"], [])):
        with pytest.raises(InputError, match=f"classes names {len(names)} .*say both"):
            settle_classes(layout, names, values)
    with pytest.raises(InputError, match="one class twice: a, b, a"):
        settle_classes("folder", ["a", "b", "a"])


@pytest.mark.parametrize("size", [8, 13, 31, 64])
def test_resizing_never_invents_a_class(tmp_path, size):
    """Between classes 0 and 2 every blend would pass through 1."""
    mask = np.where(np.random.default_rng(1).random((40, 52)) < 0.5, 1, 3).astype(np.uint8)
    found = np.unique(images.decode(one_mask(tmp_path, mask), Transform(size=size, values=TRIMAP))[..., 3])
    assert found.tolist() == [0, 2]


def test_augmentation_moves_class_indices_without_inventing_any():
    generator = np.random.default_rng(0)
    mask = generator.choice(np.array([0, 2, IGNORE], np.uint8), (32, 32))
    image = np.where(mask[..., None] == IGNORE, 200, mask[..., None] * 50).repeat(3, 2).astype(np.uint8)
    augmenter = Augmenter(Transform(size=32, flips=True, rotate=180, scale=0.5, values=TRIMAP))
    for epoch in range(40):
        moved = augmenter(image, mask, 0, epoch, "x")[1]
        assert moved.dtype == np.uint8 and set(np.unique(moved)) <= {0, 2, IGNORE}
    exact = Augmenter(Transform(size=32, flips=True, values=TRIMAP))(image, mask, 0, 3, "x")
    np.testing.assert_array_equal(exact[0][..., 0], np.where(exact[1] == IGNORE, 200, exact[1] * 50))


def test_a_transform_with_classes_survives_json_and_scoring():
    transform = Transform(size=24, flips=True, values=((2,), (1, 3)))
    assert Transform(**json.loads(json.dumps(dataclasses.asdict(transform)))) == transform
    assert transform.unaugmented == Transform(size=24, values=((2,), (1, 3))) and len({transform}) == 1


def test_without_values_names_in_the_cache_and_fingerprints_are_what_they_were(tmp_path):
    pair = one_mask(tmp_path, np.where(trimap(0) == 1, 255, 0).astype(np.uint8))
    facts = []
    for path in (pair.image, pair.mask):
        facts += [str(path), path.stat().st_size, path.stat().st_mtime_ns]
    plain = Transform(size=16, blur=1.0)
    assert cache_file(pair, plain, tmp_path).name == f"one-{digest(1, facts, 16, 1.0, 'area')}.rgbm"
    data = SegmentationDataset([pair], plain)
    pixels = images.decode(pair, plain).tobytes()
    assert data.fingerprint == digest([16, 1.0, "area", "one", digest(pixels)])
    assert SegmentationDataset([pair], plain, repeats=3).fingerprint == data.fingerprint
    stated = dataclasses.replace(plain, values=((0,), (255,)))
    assert cache_file(pair, stated, tmp_path) != cache_file(pair, plain, tmp_path)
    assert SegmentationDataset([pair], stated).fingerprint != data.fingerprint


def test_check_counts_the_pixels_of_each_class(tmp_path, capsys):
    make_folder(tmp_path / "test", range(2), mask=lambda number: np.where(trimap(number) == 3, 255, trimap(number)))
    classes, values = ["pet", "background", "bird"], [[1], [2], [4]]
    arguments = ["--classes", json.dumps(classes), "--mask_values", json.dumps(values)]
    assert dataset.main(["check", "--data", str(tmp_path), "--size", "24", *arguments]) == 0
    printed = capsys.readouterr().out
    pairs = find_splits(tmp_path)["test"]
    small = [np.asarray(Image.open(pair.mask).resize((24, 24), Image.Resampling.NEAREST)) for pair in pairs]
    expected = [[np.count_nonzero(mask == value) for value in (1, 2, 4, 255)] for mask in small]
    assert class_pixels(pairs, Transform(size=24, values=values)).tolist() == expected
    pet, background, bird, ignored = np.sum(expected, axis=0)
    assert f"pet: {pet} pixels ({100 * pet / (pet + background):.1f} %) in 2 images" in printed
    assert f"bird: {bird} pixels (0.0 %) in 0 images" in printed and f"ignored: {ignored} pixels in 2" in printed


def test_check_reads_every_layout(pets, tmp_path, capsys):
    make_folder(tmp_path, range(8), mask=lambda number: np.where(trimap(number) == 1, 255, 0).astype(np.uint8))
    assert dataset.main(["check", "--data", str(tmp_path), "--size", "24"]) == 1  # of 8 images none is drawn for test
    printed = capsys.readouterr().out
    assert "train: 8 pairs, 32×24 to 32×24 pixels, lesions" in printed and "empty split: no pairs in test" in printed
    assert dataset.main(["check", "--data", str(pets), "--size", "24"]) == 0
    assert "border: " in capsys.readouterr().out


# ---- parts of the training images ----


def train_ids(pets, **settings) -> list[str]:
    return open_datasets(ImageSource(data=str(pets), image_size=16, **settings), needed=("train",))["train"].ids


def test_a_smaller_fraction_lies_in_a_larger_one_of_the_same_seed(pets):
    whole = train_ids(pets)
    for seed in (0, 1):
        parts = [train_ids(pets, fraction=share, fraction_seed=seed) for share in (0.01, 0.1, 0.3, 0.5, 1.0)]
        assert [len(part) for part in parts] == [max(1, round(s * len(whole))) for s in (0.01, 0.1, 0.3, 0.5, 1)]
        assert all(set(small) < set(large) for small, large in itertools.pairwise(parts)) and parts[-1] == whole
    assert train_ids(pets, fraction=0.5) != train_ids(pets, fraction=0.5, fraction_seed=1)


def test_a_fraction_is_of_what_limits_leave_and_of_training_images_alone(pets):
    whole = open_datasets(ImageSource(data=str(pets), image_size=16))
    part = open_datasets(ImageSource(data=str(pets), image_size=16, limits={"train": 10}, fraction=0.5))
    assert len(part["train"].ids) == 5 and set(part["train"].ids) < set(train_ids(pets, limits={"train": 10}))
    assert all(part[name].ids == whole[name].ids for name in ("validation", "test"))


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_an_impossible_fraction_is_refused(pets, fraction):
    with pytest.raises(InputError, match=r"fraction .* is not above 0 and at most 1"):
        train_ids(pets, fraction=fraction)


def test_a_fraction_that_leaves_no_image_of_a_class_is_refused(tmp_path):
    def rare(number: int) -> np.ndarray:
        return trimap(number) if number == 7 else np.where(trimap(number) == 3, 2, trimap(number)).astype(np.uint8)

    make_folder(tmp_path / "train", range(20), mask=rare)
    settings = {"data": str(tmp_path), "classes": ["pet", "rest", "border"], "mask_values": [[1], [2], [3]]}
    source = ImageSource(**settings, image_size=24)
    pairs = find_splits(tmp_path)["train"]
    seeds = {any(pair.id == "i007" for pair in part_of(pairs, 0.2, seed)): seed for seed in range(20)}
    assert open_datasets(source, needed=("train",))["train"].ids == [pair.id for pair in pairs]
    kept = dataclasses.replace(source, fraction=0.2, fraction_seed=seeds[True])
    assert "i007" in open_datasets(kept, needed=("train",))["train"].ids
    lost = dataclasses.replace(source, fraction=0.2, fraction_seed=seeds[False])
    with pytest.raises(InputError, match=r"fraction 0\.2 .*no.* pixel of class 'border' at 24 px; raise fraction"):
        open_datasets(lost, needed=("train",))


def test_a_class_that_no_training_image_holds_is_refused(tmp_path):
    make_folder(tmp_path / "train", range(30))
    source = ImageSource(
        data=str(tmp_path), classes=["pet", "rest", "border", "bird"], mask_values=[[1], [2], [3], [4]], image_size=24
    )
    with pytest.raises(InputError, match=r"none of the \d+ training images .* of class 'bird'.*mask_values"):
        open_datasets(source, needed=("train",))


def test_a_binary_fraction_of_empty_masks_is_refused_and_the_full_set_is_not(tmp_path):
    def empty(number: int) -> np.ndarray:
        return np.zeros((24, 32), np.uint8)

    make_folder(tmp_path / "train", range(30), mask=empty)
    source = ImageSource(data=str(tmp_path), image_size=16)
    assert open_datasets(source, needed=("train",))["train"]
    with pytest.raises(InputError, match="class 'lesion'"):
        open_datasets(dataclasses.replace(source, fraction=0.5), needed=("train",))


# ---- repeats ----


def served(data, *, epoch=0, workers=0, batch=4):
    data.set_epoch(epoch)
    return list(make_loader(data, batch, shuffle=True, seed=5, workers=workers))


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        a.id == b.id and torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in zip(one, other)
    )


@pytest.fixture
def tripled(pets) -> SegmentationDataset:
    transform = Transform(size=16, flips=True, colour=0.5, values=TRIMAP)
    return SegmentationDataset(find_splits(pets)["train"][:8], transform, augment=True, seed=7, repeats=3)


def test_repeats_make_as_many_steps_as_the_whole_set(pets):
    whole = open_datasets(ImageSource(data=str(pets), image_size=16, limits={"train": 24}))["train"]
    settings = {"limits": {"train": 24}, "fraction": 1 / 3, "repeats": 3}
    part = open_datasets(ImageSource(data=str(pets), image_size=16, **settings))
    assert len(part["train"]) == len(whole) == 24 and len(served(part["train"])) == len(served(whole)) == 6
    assert len(part["train"].ids) == len(part["train"].pairs) == 8
    counts = [id_ for batch in served(part["train"]) for id_ in batch.id]
    assert all(counts.count(id_) == 3 for id_ in part["train"].ids)
    assert all(len(part[name]) == len(part[name].ids) for name in ("validation", "test"))


def test_each_repeat_is_what_a_later_epoch_of_the_plain_set_would_serve(tripled):
    plain = SegmentationDataset(tripled.pairs, tripled.transform, augment=True, seed=7)
    for epoch in (0, 2):
        tripled.set_epoch(epoch)
        for time in range(3):
            plain.set_epoch(3 * epoch + time)
            for place in range(8):
                one, other = tripled[time * 8 + place], plain[place]
                assert one.id == other.id and torch.equal(one.image, other.image) and torch.equal(one.mask, other.mask)
    views = {tripled[time * 8].image.numpy().tobytes() for time in range(3)}
    assert len(views) == 3


def test_repeated_epochs_are_the_same_for_any_number_of_workers(tripled):
    expected = [served(tripled, epoch=epoch) for epoch in (0, 1)]
    assert same(served(tripled, epoch=1, workers=2), expected[1])
    assert [batch.id for batch in expected[0]] != [batch.id for batch in expected[1]]


def test_a_repeated_set_ends_where_its_length_says(tripled):
    assert len(list(tripled)) == len(tripled) == 24 and tripled[-1].id == tripled[23].id
    with pytest.raises(IndexError):
        tripled[24]
    with pytest.raises(InputError, match="repeats 0"):
        SegmentationDataset(tripled.pairs, tripled.transform, repeats=0)
    with pytest.raises(InputError, match="repeats -1"):
        open_datasets(ImageSource(repeats=-1))
