"""Photographs in class folders: the layouts that are read, what is refused, and what the pixels are."""

import numpy as np
import pytest
import torch
from PIL import Image

from classification.photos import (
    IMAGENETTE,
    SHAPES,
    PhotoSet,
    load_photos,
    photo_set,
    synthetic_masks,
    synthetic_photos,
)
from utils import InputError


def picture(path, size=(12, 8), colour=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(3):
                picture(tmp_path / split / name / f"{split}_{name}_{number}.JPEG")
    return tmp_path


def test_labels_count_in_sorted_class_names_and_ids_are_file_names(folder):
    photos = photo_set(folder, "train")
    assert photos.classes == ("cat", "dog") and photos.labels == (0, 0, 0, 1, 1, 1)
    assert photos.ids[3] == "train_dog_0" and photos.paths[3].parent.name == "dog"


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPEG", ".png", ".PNG"])
def test_every_ending_is_read_in_either_case(tmp_path, suffix):
    picture(tmp_path / "val" / "cat" / f"one{suffix}")
    assert photo_set(tmp_path, "val").ids == ("one",)


def test_val_alone_is_enough_and_its_labels_agree_with_train_where_that_is_there(folder):
    for path in (folder / "val" / "cat").iterdir():
        path.unlink()
    (folder / "val" / "cat").rmdir()
    assert set(photo_set(folder, "val").labels) == {1}  # 'dog' is the second class of train
    assert photo_set(folder, "val").classes == ("cat", "dog")


def test_wrong_layouts_are_refused_by_name(folder, tmp_path_factory):
    with pytest.raises(InputError, match="nowhere does not exist"):
        photo_set(folder / "nowhere", "train")
    with pytest.raises(InputError, match="unknown split 'test'"):
        photo_set(folder, "test")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(InputError, match="train does not exist"):
        photo_set(empty, "train")
    (empty / "train").mkdir()
    with pytest.raises(InputError, match="holds no class folders"):
        photo_set(empty, "train")
    (empty / "train" / "cat").mkdir()
    with pytest.raises(InputError, match="cat holds no photograph"):
        photo_set(empty, "train")


def test_a_class_of_val_that_train_lacks_is_refused(folder):
    picture(folder / "val" / "eel" / "one.png")
    with pytest.raises(InputError, match="class 'eel' is not in"):
        photo_set(folder, "val")


def test_two_photographs_of_one_name_are_refused(folder):
    picture(folder / "train" / "dog" / "train_cat_0.png")
    with pytest.raises(InputError, match="have the same id 'train_cat_0'"):
        photo_set(folder, "train")


def test_an_unreadable_photograph_is_named(folder):
    (folder / "train" / "cat" / "train_cat_1.JPEG").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"train_cat_1\.JPEG cannot be decoded"):
        load_photos(photo_set(folder, "train"), 8)


def test_pixels_are_the_centre_square_brought_to_size(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = np.arange(8)[None, :, None] * 30  # the centre square; what is beside it stays black
    path = tmp_path / "val" / "cat" / "one.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    images, labels = load_photos(photo_set(tmp_path, "val"), 4)
    assert images.dtype == torch.uint8 and images.shape == (1, 3, 4, 4) and labels.tolist() == [0]
    by_hand = pixels[:, 4:12].reshape(4, 2, 4, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    np.testing.assert_array_equal(images[0].numpy(), by_hand)


def test_chosen_rows_come_in_the_order_asked_for(folder):
    picture(folder / "train" / "dog" / "train_dog_1.JPEG", colour=(250, 0, 0))
    photos = photo_set(folder, "train")
    images, labels = load_photos(photos, 8, [4, 0])
    assert labels.tolist() == [1, 0] and images[0, 0].float().mean() > 200 > images[1, 0].float().mean()


def test_the_fingerprint_follows_content_not_place(folder, tmp_path_factory):
    first = photo_set(folder, "train").fingerprint
    elsewhere = tmp_path_factory.mktemp("moved") / "photos"
    folder.rename(elsewhere)
    moved = photo_set(elsewhere, "train")
    assert moved.fingerprint == first
    backwards = PhotoSet(moved.paths[::-1], moved.ids[::-1], moved.labels[::-1], moved.classes)
    assert backwards.fingerprint == first
    picture(elsewhere / "train" / "cat" / "train_cat_0.JPEG", colour=(0, 0, 1))
    assert photo_set(elsewhere, "train").fingerprint != first


def test_limits_take_as_many_of_every_class_by_seed(folder):
    photos = photo_set(folder, "train")
    part = photos.part(photos.rows(2, seed=1))
    assert part.labels == (0, 0, 1, 1) and part.classes == photos.classes
    assert photos.rows(2, seed=1) == photos.rows(2, seed=1)
    assert photos.rows(None) == list(range(6))


def test_synthetic_masks_cover_the_object_alone(tmp_path):
    root = synthetic_photos(tmp_path / "drawn", {"train": 3, "val": 2}, size=32)
    photos = photo_set(root, "train")
    assert photos.classes == tuple(sorted(SHAPES)) and len(photos) == 12
    images, _ = load_photos(photos, 32)
    masks = synthetic_masks(root, photos.ids)
    for image, name, label in zip(images.numpy() / 255, photos.ids, photos.labels):
        own = np.array(SHAPES[photos.classes[label]])[:, None, None]
        distance = np.abs(image - own).mean(0)
        assert masks[name].shape == (32, 32) and 0.02 < masks[name].mean() < 0.5
        assert distance[masks[name]].mean() < distance[~masks[name]].mean()


def test_a_synthetic_set_is_drawn_once_and_the_same_everywhere(tmp_path):
    one, two = (synthetic_photos(tmp_path / name, {"val": 2}, size=16) for name in ("one", "two"))
    assert photo_set(one, "val").fingerprint == photo_set(two, "val").fingerprint
    assert synthetic_photos(one, {"val": 2}, size=16) == one
    with pytest.raises(InputError, match="holds something else"):
        synthetic_photos(one, {"val": 3}, size=16)
    other = synthetic_photos(tmp_path / "other", {"val": 2}, size=16, seed=1)
    assert photo_set(other, "val").fingerprint != photo_set(one, "val").fingerprint


def test_imagenette_is_read_as_it_comes(shared):
    photos = photo_set(shared / "data" / "imagenette128", "val")
    assert len(photos) == 128 and photos.classes == tuple(sorted(IMAGENETTE))
    assert set(photos.imagenet_classes().tolist()) == {0, 217, 482, 491, 497, 566, 569, 571, 574, 701}
    with pytest.raises(InputError, match="none of Imagenette's ten"):
        PhotoSet(photos.paths[:1], photos.ids[:1], (0,), ("zebra",)).imagenet_classes()
