"""Which images are explained: chosen by id, with an object, evenly over classes; and what is asked about them."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from classification.classifiers import ClassifierSpec
from classification.photos import IMAGENETTE, synthetic_masks, synthetic_photos
from dataset import SegmentationDataset
from sources import ImageSource
from studies import explained_images
from studies.explained_images import Chosen, Images, choose, key_of, own_classes, target_of, true_masks
from studies.subjects import CLASSIFICATION, SEGMENTATION, Subject
from utils import InputError

NAMES = [f"pic_{k:02d}" for k in range(12)]
EMPTY = ("pic_03", "pic_07")


def lesions(folder, names, shift=0):
    """Images of 32 px beside masks of a square that differs from image to image; some masks are empty."""
    generator = np.random.default_rng(0)
    pictures = {name: generator.integers(0, 255, (32, 32, 3), dtype=np.uint8) for name in sorted(names)}
    for name in names:
        mask = np.zeros((32, 32), np.uint8)
        if name not in EMPTY:
            start = 4 + int(name[-2:]) % 8
            mask[start : start + 12, start : start + 16] = 255
        for kind, pixels in (("images", pictures[name]), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve test images, ten of them with an object, and others to train on."""
    folder = lesions(tmp_path_factory.mktemp("lesions") / "test", NAMES).parent
    for split in ("train", "validation"):
        lesions(folder / split, [f"{split}_{k:02d}" for k in range(2)])
    return ImageSource(data=str(folder), image_size=32, layout="folder")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return synthetic_photos(tmp_path_factory.mktemp("photos") / "set", {"train": 1, "val": 4}, 32)


def test_the_choice_is_of_the_test_images_and_the_same_by_the_same_seed(source):
    chosen = choose(source, SEGMENTATION, 9, [32])
    assert len(set(chosen.ids)) == 9 and set(chosen.ids) <= set(NAMES)
    assert choose(source, SEGMENTATION, 9, [32]).ids == chosen.ids
    assert choose(source, SEGMENTATION, 9, [32], seed=1).ids != chosen.ids
    assert choose(source, SEGMENTATION, 8, [32]).ids == chosen.ids[:8]  # fewer are the first of more
    assert choose(source, SEGMENTATION, None, [32]).ids[:9] == chosen.ids


def test_the_order_of_the_files_does_not_matter(source, monkeypatch):
    before, real = choose(source, SEGMENTATION, 8, [32]), explained_images.open_datasets

    def backwards(*args, **options):
        found = real(*args, **options)
        return {split: SegmentationDataset(each.pairs[::-1], each.transform) for split, each in found.items()}

    whole = before.at(32)
    monkeypatch.setattr(explained_images, "open_datasets", backwards)
    after = choose(source, SEGMENTATION, 8, [32])
    assert (after.ids, key_of(after)) == (before.ids, key_of(before))
    assert torch.equal(after.at(32).pixels, whole.pixels) and torch.equal(after.at(32).masks, whole.masks)


def test_an_image_comes_with_its_own_mask_at_every_size(synthetic_root):
    chosen = choose(ImageSource(data=str(synthetic_root)), SEGMENTATION, 8, [16, 32])
    for size in (16, 32):
        images = chosen.at(size)
        assert images.pixels.shape == (8, 3, size, size) and images.classes is None
        for name, mask in zip(images.ids, true_masks(images, None)):
            file = next(path for path in synthetic_root.rglob(f"{name}*.png"))
            whole = np.asarray(Image.open(file).resize((size, size), Image.Resampling.BOX)) > 127
            assert (mask[0].numpy() == whole).mean() > 0.95  # but for the rounding of the resize


def test_images_without_an_object_are_never_chosen(source):
    chosen = choose(source, SEGMENTATION, None, [32])
    assert set(chosen.ids) == set(NAMES) - set(EMPTY)
    assert true_masks(chosen.at(32), None).flatten(1).any(1).all()


def test_too_few_images_with_an_object_are_refused(synthetic_root):
    with pytest.raises(InputError, match="5 images can be explained: give at least 8"):
        choose(ImageSource(data=str(synthetic_root), limits={"test": 5}), SEGMENTATION, 5, [32])


def test_photographs_are_chosen_evenly_over_the_classes(photos):
    source = ImageSource(data=str(photos))
    for count, expected in ((8, [2, 2, 2, 2]), (10, [3, 3, 2, 2]), (16, [4, 4, 4, 4])):
        images = choose(source, CLASSIFICATION, count, [32]).at(32)
        assert sorted(images.classes.bincount(minlength=4).tolist(), reverse=True) == expected
    names = choose(source, CLASSIFICATION, 8, [32]).names
    assert [names[label] for label in images.classes] == [name.split("_")[2] for name in images.ids]
    assert all("_val_" in name for name in images.ids)


def test_drawn_pictures_come_with_the_masks_they_were_drawn_with(photos):
    images = choose(ImageSource(data=str(photos)), CLASSIFICATION, 8, [32]).at(32)
    drawn = synthetic_masks(photos, images.ids)
    assert all(np.array_equal(mask[0].numpy(), drawn[name]) for name, mask in zip(images.ids, images.masks))


def test_photographs_have_no_masks(photos, tmp_path):
    (tmp_path / "val").symlink_to(photos / "val")
    assert choose(ImageSource(data=str(tmp_path)), CLASSIFICATION, 8, [32]).at(32).masks is None


def test_another_choice_has_another_key(source):
    chosen = choose(source, SEGMENTATION, 8, [32])
    others = [chosen.first(4), chosen.without(chosen.ids[:1]), dataclasses.replace(chosen, fingerprint="other")]
    others.append(dataclasses.replace(chosen, ids=chosen.ids[::-1]))
    assert len({key_of(each) for each in [chosen, *others]}) == 5


def test_rows_are_taken_of_all_parts_alike():
    pixels = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    images = Images(tuple("abcde"), pixels, pixels[:, :1] > 0.5, torch.arange(5))
    part = images.at_rows([3, 1])
    assert part.ids == ("d", "b") and part.classes.tolist() == [3, 1] and torch.equal(part.pixels, pixels[[3, 1]])
    assert torch.equal(part.masks, images.masks[[3, 1]])
    assert images.first(2).ids == ("a", "b") and images.first(9).ids == images.ids


# ------------------------------------------------------------------------------------------------ what is asked of them


class Answers(nn.Module):
    """Logits (N, classes): 10 · class + row."""

    def __init__(self, classes):
        super().__init__()
        self.spec = ClassifierSpec("resnet18", classes=classes)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        rows = torch.arange(len(images))[:, None]
        return self.scale * (10.0 * torch.arange(self.spec.classes)[None] + rows)


def asked_of(classes, names, labels):
    """The numbers that a classifier of these classes, () for ImageNet's 1000, has for photographs of others."""
    images = Images(tuple(f"i{k}" for k in range(len(labels))), torch.zeros(len(labels), 3, 8, 8), None, labels)
    chosen = Chosen(CLASSIFICATION, images.ids, "f", ImageSource(), tuple(names))
    subject = Subject("A", "CNN", 0, CLASSIFICATION, 8, classes=tuple(classes))
    return own_classes(subject, images, chosen), (subject, images, chosen)


def test_imagenets_thousand_classes_are_asked_by_imagenettes_wordnet_ids():
    names = ["n03888257", "n01440764", "n02102040"]  # parachute, tench, English springer
    found, (subject, images, chosen) = asked_of((), names, torch.tensor([2, 0, 1, 0]))
    assert found.tolist() == [217, 701, 0, 701] == [IMAGENETTE[names[k]].index for k in (2, 0, 1, 0)]
    target = target_of(subject, Answers(1000), images, chosen, "true", None)
    assert target(Answers(1000), images.pixels).tolist() == [2170, 7011, 2, 7013]


def test_a_classifier_trained_here_is_asked_by_the_names_of_its_classes():
    found, _ = asked_of("abc", "abc", torch.tensor([2, 0, 1]))
    assert found.tolist() == [2, 0, 1]
    found, _ = asked_of("xcab", "abc", torch.tensor([2, 0, 1]))  # more classes, in another order
    assert found.tolist() == [1, 2, 3]


@pytest.mark.parametrize("classes", [(), "abd"])
def test_classes_that_a_classifier_does_not_know_are_refused(classes):
    with pytest.raises(InputError, match=r"A \(0\) does not know the class 'c': .* use photographs of its"):
        asked_of(classes, ["a", "b", "c"] if classes else ["n01440764", "c"], torch.tensor([0]))


def test_of_several_classes_the_mask_of_the_label_is_taken():
    masks = torch.tensor([[0, 1], [2, 2]])[None, None]
    images = Images(("a",), torch.zeros(1, 3, 2, 2), masks, None)
    assert true_masks(images, None)[0, 0].tolist() == [[False, True], [True, True]]
    assert true_masks(images, 2)[0, 0].tolist() == [[False, False], [True, True]]
