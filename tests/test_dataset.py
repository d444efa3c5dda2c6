"""Images in: pairing, refusals, the cache, determinism, splits and duplicates, on tiny pictures and on real ones."""

from __future__ import annotations

import multiprocessing
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import dataset
import images
from dataset import SegmentationDataset, cap, find_splits, make_loader
from images import Pair, Transform, cache_file, duplicates, prepare
from utils import InputError

SMALL = Transform(size=16)
LAYOUTS = {
    "challenge": ("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth"),
    "plain": ("ISIC2018_{}_Input", "ISIC2018_{}_GroundTruth"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ISIC_CACHE", str(folder))
    return folder


def picture(seed: int, size=(32, 24)) -> np.ndarray:
    """(H, W, 3) uint8 smooth colours, another for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def blob(seed: int, size=(32, 24)) -> np.ndarray:
    """(H, W) uint8 {0, 255}."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[3 + seed % 5 : 15, 4 : 20 + seed % 7] = 255
    return mask


def folders(root: Path, split: str, layout: str = "challenge") -> tuple[Path, Path]:
    pair = tuple(root / name.format(split) for name in LAYOUTS[layout])
    for folder in pair:
        folder.mkdir(parents=True, exist_ok=True)
    return pair


def write(root: Path, split: str, ids, layout: str = "challenge", size=(32, 24)) -> None:
    inputs, masks = folders(root, split, layout)
    for number in ids:
        Image.fromarray(picture(number, size)).save(inputs / f"ISIC_{number:07d}.jpg", quality=95)
        Image.fromarray(blob(number, size)).save(masks / f"ISIC_{number:07d}_segmentation.png")


def one_pair(root: Path) -> Pair:
    write(root, "Test", [1])
    return find_splits(root)["test"][0]


# ---- finding ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_are_paired_by_id(tmp_path, layout):
    for split, ids in (("Training", range(5)), ("Validation", range(5, 7)), ("Test", range(7, 10))):
        write(tmp_path, split, ids, layout)
    splits = find_splits(tmp_path)
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 5, "validation": 2, "test": 3}
    for pair in splits["train"]:
        assert pair.image.stem == pair.id and pair.mask.name == f"{pair.id}_segmentation.png"


def test_official_extras_are_ignored(tmp_path):
    write(tmp_path, "Test", range(3))
    inputs, masks = folders(tmp_path, "Test")
    for extra in ("ATTRIBUTION.txt", "LICENSE.txt", "ISIC_0000001_superpixels.png", ".hidden.jpg", "Thumbs.db"):
        (inputs / extra).write_bytes(b"x")
    (masks / "._ISIC_0000001_segmentation.png").write_bytes(b"x")
    assert len(find_splits(tmp_path)["test"]) == 3


def test_a_folder_with_only_test_has_only_test(tmp_path):
    write(tmp_path, "Test", range(3))
    assert list(find_splits(tmp_path)) == ["test"]


def test_missing_splits_are_drawn_from_training_and_more_images_move_none(tmp_path):
    names = folders(tmp_path, "Training")
    for number in range(1000):
        (names[0] / f"ISIC_{number}.jpg").touch()
        (names[1] / f"ISIC_{number}_segmentation.png").touch()
    before = find_splits(tmp_path, seed=3)
    # binomial with n = 1000: four standard deviations are 51 and 38
    assert abs(len(before["test"]) - 200) < 51 and abs(len(before["validation"]) - 100) < 38
    assert sum(map(len, before.values())) == 1000
    for number in range(1000, 1200):
        (names[0] / f"ISIC_{number}.jpg").touch()
        (names[1] / f"ISIC_{number}_segmentation.png").touch()
    after = find_splits(tmp_path, seed=3)
    for name, pairs in before.items():
        assert {pair.id for pair in pairs} <= {pair.id for pair in after[name]}
    assert find_splits(tmp_path, seed=4)["test"] != after["test"]


def test_only_the_missing_split_is_drawn(tmp_path):
    write(tmp_path, "Training", range(60))
    write(tmp_path, "Test", [100])
    splits = find_splits(tmp_path)
    assert len(splits["test"]) == 1 and len(splits["train"]) + len(splits["validation"]) == 60
    assert splits["validation"]


def test_no_folder_and_no_layout_name_what_was_looked_for(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_splits(tmp_path / "absent")
    with pytest.raises(InputError, match=r"ISIC2018_Task1-2_Training_Input.*ISIC2018_Test_GroundTruth"):
        find_splits(tmp_path)


def test_half_a_layout_and_two_layouts_are_refused(tmp_path):
    _, masks = folders(tmp_path, "Test")
    masks.rmdir()
    with pytest.raises(InputError, match=f"folder {masks.name} is missing"):
        find_splits(tmp_path)
    masks.mkdir()
    folders(tmp_path, "Test", "plain")
    with pytest.raises(InputError, match="two layouts of Test"):
        find_splits(tmp_path)


def test_unmatched_files_are_named(tmp_path):
    write(tmp_path, "Test", range(4))
    inputs, masks = folders(tmp_path, "Test")
    (inputs / "ISIC_0000002.jpg").unlink()
    (masks / "ISIC_0000003_segmentation.png").unlink()
    with pytest.raises(InputError) as caught:
        find_splits(tmp_path)
    assert "image without a mask: ISIC2018_Task1-2_Test_Input/ISIC_0000003.jpg" in str(caught.value)
    assert "mask without an image: ISIC2018_Task1_Test_GroundTruth/ISIC_0000002_segmentation.png" in str(caught.value)


def test_zero_images_are_refused(tmp_path):
    folders(tmp_path, "Test")
    with pytest.raises(InputError, match="no pairs in test"):
        find_splits(tmp_path)
    with pytest.raises(InputError, match="no images"):
        SegmentationDataset([], SMALL)


def test_one_id_twice_is_refused(tmp_path):
    write(tmp_path, "Test", range(2))
    inputs, _ = folders(tmp_path, "Test")
    Image.fromarray(picture(0)).save(inputs / "ISIC_0000001.png")
    with pytest.raises(InputError, match=r"duplicate id: ISIC_0000001: .*jpg.*png"):
        find_splits(tmp_path)


def test_one_id_in_two_splits_is_refused(tmp_path):
    write(tmp_path, "Validation", [1, 2])
    write(tmp_path, "Test", [2, 3])
    with pytest.raises(InputError, match="same id in two splits: ISIC_0000002"):
        find_splits(tmp_path)


def test_a_smaller_subset_lies_in_the_larger(tmp_path):
    pairs = [Pair(f"ISIC_{number}", Path("a"), Path("b")) for number in range(50)]
    small, large = cap(pairs, 5, seed=1), cap(pairs, 20, seed=1)
    assert len(small) == 5 and set(small) < set(large) and cap(pairs[::-1], 5, seed=1) == small
    assert set(cap(pairs, 5, seed=2)) != set(small)
    assert len(cap(pairs, None)) == len(cap(pairs, 99)) == 50
    with pytest.raises(InputError, match="at least 1"):
        cap(pairs, 0)


# ---- pixels ----


def test_pixels_are_the_files_own_when_no_resize_is_needed(tmp_path):
    write(tmp_path, "Test", [1], size=(16, 16))
    data = SegmentationDataset(find_splits(tmp_path)["test"], SMALL)
    sample = data[0]
    expected = np.asarray(Image.open(data.pairs[0].image).convert("RGB")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(sample.image.numpy(), expected, atol=1e-7)
    np.testing.assert_array_equal(sample.mask[0].numpy(), blob(1, (16, 16)) > 0)
    assert sample.image.dtype == sample.mask.dtype == torch.float32 and sample.id == "ISIC_0000001"


def test_area_resizing_by_a_whole_factor_is_the_block_mean(tmp_path):
    write(tmp_path, "Test", [1], size=(64, 64))
    pair = find_splits(tmp_path)["test"][0]
    blocks = np.asarray(Image.open(pair.image), float).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    assert np.abs(images.decode(pair, SMALL)[..., :3] - blocks).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("name, filter_", [("bicubic", Image.Resampling.BICUBIC), ("bilinear", 2)])
def test_other_interpolations_and_the_blur_are_pils(tmp_path, name, filter_):
    pair = one_pair(tmp_path)
    expected = Image.open(pair.image).filter(ImageFilter.GaussianBlur(2)).resize((16, 16), filter_)
    pixels = images.decode(pair, Transform(size=16, blur=2, interpolation=name))
    np.testing.assert_array_equal(pixels[..., :3], np.asarray(expected))
    assert (pixels[..., :3] != images.decode(pair, Transform(size=16, interpolation=name))[..., :3]).any()


@pytest.mark.parametrize("options", [{"size": 0}, {"blur": -1}, {"blur": float("nan")}, {"interpolation": "cubic"}])
def test_impossible_transforms_are_refused(options):
    with pytest.raises(InputError):
        Transform(**options)


@pytest.mark.parametrize("values", [(0, 255), (0, 1), (0,), (255,)])
def test_binary_masks_of_any_kind_are_read(tmp_path, values):
    pair = one_pair(tmp_path)
    lesion = blob(1) > 0
    Image.fromarray(np.where(lesion, values[-1], values[0]).astype(np.uint8)).save(pair.mask)
    share = images.decode(pair, Transform(size=32))[..., 3].mean()
    assert share == pytest.approx(lesion.mean() if len(values) == 2 else values[0] / 255, abs=0.02)


def grey(mask):
    return np.where(mask > 0, np.linspace(9, 250, mask.size).reshape(mask.shape), 0).astype(np.uint8)


def colour(mask):
    return np.dstack([mask, 0 * mask, mask])


@pytest.mark.parametrize(
    "change, message",
    [
        (grey, r"not binary: 67 different values from 0 to \d+"),
        (lambda mask: np.where(mask > 0, 200, 100).astype(np.uint8), "not binary: 2 different values from 100 to 200"),
        (lambda mask: mask[:, :-1], "has 31×24 but its image 32×24 pixels"),
        (colour, "colour picture"),
    ],
)
def test_unusable_masks_are_refused_by_name(tmp_path, change, message):
    pair = one_pair(tmp_path)
    Image.fromarray(change(blob(1))).save(pair.mask)
    with pytest.raises(InputError, match=f"ISIC_0000001_segmentation.png.*{message}"):
        SegmentationDataset([pair], SMALL)


def claiming(side: int) -> bytes:
    """A PNG whose header claims side × side pixels, and which holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text"])
def test_undecodable_images_are_named(tmp_path, damage):
    pair = one_pair(tmp_path)
    pair.image.write_bytes(damage(pair.image.read_bytes()))
    with pytest.raises(InputError, match=r"ISIC_0000001.jpg cannot be decoded"):
        prepare([pair], SMALL)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_100, 50_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, side):
    pair = one_pair(tmp_path)
    pair.image.write_bytes(claiming(side))
    with pytest.raises(InputError, match=r"ISIC_0000001.jpg claims more than 100,000,000 pixels"):
        prepare([pair], SMALL)


def test_all_broken_files_come_in_one_message_and_no_more_than_ten_are_listed(tmp_path):
    write(tmp_path, "Test", range(14))
    pairs = find_splits(tmp_path)["test"]
    for pair in pairs[:12]:
        pair.image.write_bytes(b"broken")
    with pytest.raises(InputError, match="12 of 14 pairs") as caught:
        prepare(pairs, SMALL)
    assert str(caught.value).count("cannot be decoded") == 10 and "2 more" in str(caught.value)


# ---- cache ----


def test_nothing_is_decoded_twice(tmp_path, monkeypatch):
    pair = one_pair(tmp_path)
    first = SegmentationDataset([pair], SMALL)[0]

    def never(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "decode", never)
    assert torch.equal(SegmentationDataset([pair], SMALL)[0].image, first.image)
    with pytest.raises(AssertionError, match="decoded again"):
        prepare([pair], Transform(size=24))


def test_a_changed_file_is_decoded_again(tmp_path):
    pair = one_pair(tmp_path)
    before = SegmentationDataset([pair], SMALL)
    Image.fromarray(255 - picture(1)).save(pair.image)
    after = SegmentationDataset([pair], SMALL)
    assert not torch.allclose(before[0].image, after[0].image, atol=0.1)


@pytest.mark.parametrize("damage", ["truncated", "altered", "deleted"])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    data = SegmentationDataset([one_pair(tmp_path)], SMALL)
    expected, file = data[0], data.files[0]
    whole = file.read_bytes()
    if damage == "deleted":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(whole[:100] if damage == "truncated" else whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert torch.equal(data[0].image, expected.image) and file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"image cache .*file cannot be written.*ISIC_CACHE"):
        prepare([one_pair(tmp_path)], SMALL)


def test_processes_share_one_cache(tmp_path, own_cache):
    write(tmp_path, "Test", range(12))
    pairs = find_splits(tmp_path)["test"]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=prepare, args=(pairs, SMALL)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert {file.name for file in own_cache.iterdir()} == {cache_file(pair, SMALL, None).name for pair in pairs}
    for pair in pairs:
        np.testing.assert_array_equal(images.cached_pixels(pair, SMALL), images.decode(pair, SMALL))


# ---- serving ----


def batches(data, *, epoch=0, **options):
    data.set_epoch(epoch)
    return list(make_loader(data, 4, shuffle=True, seed=5, **options))


@pytest.fixture
def augmented(tmp_path) -> SegmentationDataset:
    write(tmp_path, "Test", range(10))
    return SegmentationDataset(find_splits(tmp_path)["test"], Transform(size=16, flips=True), augment=True, seed=7)


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        a.id == b.id and torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask) for a, b in zip(one, other)
    )


def test_a_batch_is_a_sample_of_stacked_tensors_and_a_list_of_ids(augmented):
    batch = batches(augmented)[0]
    assert batch.image.shape == (4, 3, 16, 16) and batch.mask.shape == (4, 1, 16, 16)
    assert isinstance(batch.id, list) and len(set(batch.id)) == 4
    assert set(batch.mask.unique().tolist()) == {0.0, 1.0} and 0 <= batch.image.min() < batch.image.max() <= 1


def test_an_epoch_is_the_same_for_any_number_of_workers_and_after_resuming(augmented):
    expected = [batches(augmented, epoch=epoch) for epoch in range(3)]
    assert same(batches(augmented, epoch=2, workers=2), expected[2])  # straight to epoch 2, as a resumed run does
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(batches(augmented, epoch=1), expected[1])
    assert [batch.id for batch in expected[0]] != [batch.id for batch in expected[1]]
    assert sorted(id_ for batch in expected[0] for id_ in batch.id) == augmented.ids


def test_workers_start_after_opencv_has_worked_on_a_large_image(augmented):
    """Its thread pool, once started, made every forked worker wait for ever."""
    cv2.resize(np.zeros((3000, 4000, 3), np.uint8), (512, 512), interpolation=cv2.INTER_AREA)
    loader = make_loader(augmented, 4, workers=2)
    loader.timeout = 60  # seconds; then an error instead of a test that never ends
    assert len(list(loader)) == 3 and cv2.getNumThreads() == 1


def test_one_loader_follows_the_data_sets_epoch(augmented):
    loader = make_loader(augmented, 4, shuffle=True, seed=5)
    for epoch in (0, 3):
        augmented.set_epoch(epoch)
        assert same(list(loader), batches(augmented, epoch=epoch))


def test_image_and_mask_move_together_through_all_eight_symmetries(tmp_path):
    """The image carries its own mask in red, so the two must agree after any move."""
    inputs, masks = folders(tmp_path, "Test")
    corner = np.zeros((16, 16), np.uint8)
    corner[1:4, 2:9] = 255
    for number in range(5):
        Image.fromarray(np.dstack([corner, 0 * corner, 0 * corner])).save(inputs / f"ISIC_{number}.png")
        Image.fromarray(corner).save(masks / f"ISIC_{number}_segmentation.png")
    data = SegmentationDataset(find_splits(tmp_path)["test"], Transform(size=16, flips=True), augment=True)
    seen = []
    for epoch in range(80):
        data.set_epoch(epoch)
        for sample in data:
            assert torch.equal(sample.image[0], sample.mask[0])
            seen.append(sample.mask.numpy().tobytes())
    counts = [seen.count(each) for each in set(seen)]
    assert len(counts) == 8 and min(counts) > 50 - 4 * 6.7  # 400 draws of 8: mean 50, standard deviation 6.6


def test_without_augment_images_stay_as_they_are(augmented):
    plain = SegmentationDataset(augmented.pairs, augmented.transform)
    before = plain[3]
    plain.set_epoch(5)
    assert torch.equal(plain[3].image, before.image)
    assert [id_ for batch in make_loader(plain, 3) for id_ in batch.id] == plain.ids


def test_a_loader_without_batches_is_refused(augmented):
    with pytest.raises(InputError, match="do not fill one batch"):
        make_loader(augmented, 11, drop_last=True)
    with pytest.raises(InputError, match="at least 1"):
        make_loader(augmented, 0)


def test_the_fingerprint_follows_pixels_and_transform_not_order_or_place(tmp_path):
    write(tmp_path / "one", "Test", range(4))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (find_splits(tmp_path / name)["test"] for name in ("one", "two"))
    known = SegmentationDataset(one, SMALL).fingerprint
    assert SegmentationDataset(two[::-1], SMALL, augment=True, seed=3).fingerprint == known
    assert SegmentationDataset(one, Transform(size=24)).fingerprint != known
    assert SegmentationDataset(one[:3], SMALL).fingerprint != known
    Image.fromarray(255 - blob(0)).save(two[0].mask)
    assert SegmentationDataset(two, SMALL).fingerprint != known


# ---- duplicates and the command ----


def test_exact_and_near_duplicates_are_found_and_smooth_skin_is_not(tmp_path):
    write(tmp_path, "Training", range(20), size=(64, 64))
    write(tmp_path, "Validation", [100], size=(64, 64))
    write(tmp_path, "Test", range(50, 56), size=(64, 64))
    train, test = (folders(tmp_path, split)[0] for split in ("Training", "Test"))
    shutil.copy(train / "ISIC_0000004.jpg", test / "ISIC_0000050.jpg")
    lighter = np.clip(picture(7, (64, 64)) * 0.8 + 30, 0, 255).astype(np.uint8)
    Image.fromarray(lighter).save(test / "ISIC_0000051.jpg", quality=60)
    ramp = np.linspace(0, 20, 64)
    for folder, number, turn in ((train, 8, False), (test, 52, True)):  # two even skins, lit from different sides
        light = ramp[:, None] if turn else ramp[None]
        noise = np.random.default_rng(number).normal(0, 2, (64, 64))
        skin = np.array([200, 160, 140]) + (light + noise)[..., None]
        Image.fromarray(skin.astype(np.uint8)).save(folder / f"ISIC_{number:07d}.jpg")
    found = duplicates(find_splits(tmp_path), Transform(size=64))
    rows = list(found[["split_a", "id_a", "split_b", "id_b", "kind"]].itertuples(index=False, name=None))
    assert rows == [
        ("train", "ISIC_0000004", "test", "ISIC_0000050", "exact"),
        ("train", "ISIC_0000007", "test", "ISIC_0000051", "near"),
    ]
    assert found.distance[0] == 0


def test_even_images_are_no_near_duplicates(tmp_path):
    for split, number, level in (("Validation", 1, 100), ("Test", 2, 180)):
        write(tmp_path, split, [number])
        even = np.full((24, 32, 3), level, np.uint8)
        Image.fromarray(even).save(folders(tmp_path, split)[0] / f"ISIC_{number:07d}.jpg")
    assert duplicates(find_splits(tmp_path), SMALL).empty


def test_check_lists_every_fault_and_goes_on(tmp_path, capsys):
    write(tmp_path, "Validation", range(100, 103))
    write(tmp_path, "Test", range(6))
    inputs, masks = folders(tmp_path, "Test")
    (inputs / "ISIC_0000000.jpg").write_bytes(b"broken")
    Image.fromarray(grey(blob(1))).save(masks / "ISIC_0000001_segmentation.png")
    (masks / "ISIC_0000002_segmentation.png").unlink()
    shutil.copy(inputs / "ISIC_0000003.jpg", folders(tmp_path, "Validation")[0] / "ISIC_0000101.jpg")
    assert dataset.main(["check", "--data", str(tmp_path), "--size", "16"]) == 1
    printed = capsys.readouterr().out
    for expected in (
        "validation: 3 pairs, 32×24 to 32×24 pixels",
        "test: 3 pairs",
        "ISIC_0000000.jpg cannot be decoded",
        "ISIC_0000001_segmentation.png is not binary",
        "image without a mask: ISIC2018_Task1-2_Test_Input/ISIC_0000002.jpg",
        "exact duplicates across splits: 1",
        "3 problems",
    ):
        assert expected in printed


def test_the_commands_end_with_one_line_and_code_two_on_bad_input(tmp_path, capsys):
    assert dataset.main(["check", "--data", str(tmp_path / "absent")]) == 2
    assert dataset.main(["download", "--to", str(tmp_path), "--base-url", "file:///etc"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


# ---- real images ----


def test_the_real_set_has_its_known_counts_and_its_one_known_near_duplicate(shared):
    splits = find_splits(shared / "data" / "isic2018_256")
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 1600, "validation": 100, "test": 300}
    chosen = {name: cap(pairs, 60) for name, pairs in splits.items()}
    chosen["train"] += [pair for pair in splits["train"] if pair.id == "ISIC_0013184"]  # seen by eye: one lesion,
    chosen["test"] += [pair for pair in splits["test"] if pair.id == "ISIC_0012756"]  # photographed once
    found = duplicates(chosen, Transform())
    assert list(found[["id_a", "id_b", "kind"]].itertuples(index=False, name=None)) == [
        ("ISIC_0013184", "ISIC_0012756", "near")
    ]


def test_originals_of_any_shape_become_squares_that_keep_the_lesions_share(shared):
    data = SegmentationDataset(find_splits(shared / "data" / "isic_original_size")["test"], Transform())
    assert len(data) == 8
    for sample, pair in zip(data, data.pairs):
        assert sample.image.shape == (3, 128, 128)
        share = (np.asarray(Image.open(pair.mask)) > 127).mean()
        assert sample.mask.mean().item() == pytest.approx(share, abs=0.01)
