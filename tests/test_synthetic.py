"""Claims about the synthetic set: its layout, its reproducibility, and that it is neither trivial nor impossible."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import synthetic
import synthetic_drawing
from utils import InputError

COUNTS = {"Training": 5, "Validation": 2, "Test": 3}
SIZE = 48


def files(root: Path) -> dict[str, bytes]:
    """Every file below `root` by its relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def make(root: Path, **changes) -> Path:
    return synthetic.make_dataset(root, **{"counts": COUNTS, "size": SIZE, "seed": 3, **changes})


def touches_frame(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Images (300, 64, 64, 3) uint8 and masks (300, 64, 64) uint8."""
    images, masks = zip(*(synthetic.draw(0, index, 64) for index in range(300)))
    return np.stack(images), np.stack(masks)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("synthetic") / "set")


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """A set whose making was interrupted: no record, and one image of a pair not yet there."""
    root = make(tmp_path / "set")
    (root / "SYNTHETIC.json").unlink()
    (root / "ISIC2018_Task1-2_Training_Input" / "ISIC_9000002.jpg").unlink()
    return root


def test_layout_and_names_are_those_of_isic(made):
    for split, count in COUNTS.items():
        images = sorted(path.name for path in (made / f"ISIC2018_Task1-2_{split}_Input").iterdir())
        masks = sorted(path.name for path in (made / f"ISIC2018_Task1_{split}_GroundTruth").iterdir())
        assert len(images) == len(masks) == count
        assert all(re.fullmatch(r"ISIC_\d{7}\.jpg", name) for name in images)
        assert masks == [name.replace(".jpg", "_segmentation.png") for name in images]
    assert (made / "ISIC2018_Task1-2_Training_Input" / "ISIC_9000000.jpg").exists()


def test_ids_are_unique_over_the_splits(made):
    ids = [path.stem for path in made.rglob("*.jpg")]
    assert len(set(ids)) == len(ids) == sum(COUNTS.values())


def test_files_hold_what_draw_returns(made):
    folder = made / "ISIC2018_Task1-2_Training_Input"
    image, mask = synthetic.draw(3, 1, SIZE)
    stored = cv2.cvtColor(cv2.imread(str(folder / "ISIC_9000001.jpg")), cv2.COLOR_BGR2RGB)
    path = made / "ISIC2018_Task1_Training_GroundTruth" / "ISIC_9000001_segmentation.png"
    assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), mask)
    assert stored.shape == image.shape == (SIZE, SIZE, 3)
    assert 0 < np.abs(stored.astype(float) - image).mean() < 8  # JPEG artefacts, and the channels in the right order


def test_record_says_what_was_made(made):
    record = json.loads((made / "SYNTHETIC.json").read_text())
    assert record["seed"] == 3 and record["size"] == SIZE and record["counts"] == COUNTS
    assert record["version"] == synthetic.VERSION and "no patient" in record["note"]


def test_same_seed_gives_identical_bytes(made, tmp_path):
    assert files(make(tmp_path / "again")) == files(made)


def test_bytes_do_not_depend_on_the_process(made, tmp_path):
    counts = [f"--{split.lower()}={count}" for split, count in COUNTS.items()]
    command = [sys.executable, "synthetic.py", "--root", str(tmp_path / "cli"), f"--size={SIZE}", "--seed=3", *counts]
    home = Path(synthetic.__file__).parent
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True)
    assert "10 synthetic images at 48 px" in done.stdout
    assert files(tmp_path / "cli") == files(made)


def test_other_seed_gives_other_images(made, tmp_path):
    other, ours = files(make(tmp_path / "other", seed=4)), files(made)
    assert set(other) == set(ours)
    assert all(other[name] != ours[name] for name in ours)


def test_images_do_not_depend_on_counts(made, tmp_path):
    other, ours = files(make(tmp_path / "other", counts={"Training": 2, "Test": 4})), files(made)
    shared_names = {name for name in set(other) & set(ours) if name != "SYNTHETIC.json"}
    assert len(shared_names) == 2 * (2 + 3)
    assert all(other[name] == ours[name] for name in shared_names)


def test_drawing_leaves_numpys_global_generator_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    synthetic.draw(0, 0, SIZE)
    assert np.random.random() == expected


def test_most_scenes_stay_the_same_at_another_size():
    iou = []
    for index in range(20):
        small, large = synthetic.draw(5, index, 64)[1] > 0, synthetic.draw(5, index, 128)[1]
        shrunk = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA) > 127
        iou.append((shrunk & small).sum() / (shrunk | small).sum())
    assert np.median(iou) > 0.9


def test_complete_set_is_returned_without_drawing(made, monkeypatch):
    monkeypatch.setattr(synthetic, "draw", lambda *_: pytest.fail("a complete set was drawn again"))
    assert make(made) == made


def test_interrupted_set_is_completed(made, unfinished):
    assert files(make(unfinished)) == files(made)


def test_missing_image_of_a_recorded_set_is_drawn_again(made, tmp_path):
    root = make(tmp_path / "set")
    (root / "ISIC2018_Task1_Test_GroundTruth" / "ISIC_9200001_segmentation.png").unlink()
    assert files(make(root)) == files(made)


def test_record_is_written_last(tmp_path, monkeypatch):
    real = synthetic.draw

    def interrupted(seed, index, size):
        if index == 3:
            raise KeyboardInterrupt
        return real(seed, index, size)

    monkeypatch.setattr(synthetic, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set")
    left = files(tmp_path / "set")
    assert len(left) == 2 * 3 and "SYNTHETIC.json" not in left


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"seed": 4}, "seed"), ({"size": 64}, "size"), ({"counts": {"Training": 1}}, "counts")],
)
def test_another_complete_set_is_refused(made, changes, named):
    before = files(made)
    with pytest.raises(InputError, match=rf"another synthetic set \({named} differ"):
        make(made, **changes)
    assert files(made) == before


def test_unfinished_set_of_another_seed_is_refused_untouched(unfinished):
    before = files(unfinished)
    with pytest.raises(InputError, match="unfinished synthetic set of another seed"):
        make(unfinished, seed=4)
    assert files(unfinished) == before


def test_folder_with_other_images_is_refused(tmp_path):
    real = tmp_path / "ISIC2018_Task1-2_Training_Input" / "ISIC_0000000.jpg"
    real.parent.mkdir()
    real.write_bytes(b"a real image")
    with pytest.raises(InputError, match=r"ISIC_0000000\.jpg"):
        make(tmp_path)
    assert list(files(tmp_path)) == [str(real.relative_to(tmp_path))]


def test_unreadable_record_is_named(tmp_path):
    (tmp_path / "SYNTHETIC.json").write_text("{")
    with pytest.raises(InputError, match=r"SYNTHETIC\.json is not readable"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": {"Trainin": 1}}, "unknown split 'Trainin'; closest: 'Training'"),
        ({"counts": {"Training": -1}}, "-1 images"),
        ({"counts": {}}, "no images"),
        ({"size": 8}, "size 8 pixels"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_are_sentences_and_write_nothing(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        make(tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


def test_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make(tmp_path / "file")


def test_command_line_error_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: size 8 pixels"):
        synthetic.main(["--root", str(tmp_path / "set"), "--size", "8"])


def test_masks_are_binary_neither_empty_nor_full(drawn):
    _, masks = drawn
    assert set(np.unique(masks)) == {0, 255}
    share = (masks > 0).mean(axis=(1, 2))
    assert share.min() > 0.03 and share.max() < 0.7


def test_lesion_sizes_vary_widely(drawn):
    share = (drawn[1] > 0).mean(axis=(1, 2))
    assert np.quantile(share, 0.1) < 0.1 and np.quantile(share, 0.95) > 0.35


def test_mask_is_one_piece_without_holes(drawn):
    for mask in drawn[1]:
        pieces, _ = cv2.connectedComponents(mask, connectivity=8)
        padded = np.pad(255 - mask, 1, constant_values=255)
        surroundings, _ = cv2.connectedComponents(padded, connectivity=4)
        assert pieces == 2 and surroundings == 2


def test_some_lesions_touch_the_frame_but_not_most(drawn):
    share = np.mean([touches_frame(mask) for mask in drawn[1]])
    assert 0.05 <= share <= 0.20


def test_lesion_location_is_not_constant(drawn):
    inside = (drawn[1] > 0).astype(float)
    axis = (np.arange(64) + 0.5) / 64
    area = inside.sum(axis=(1, 2))
    x, y = (inside * axis).sum(axis=(1, 2)) / area, (inside * axis[:, None]).sum(axis=(1, 2)) / area
    assert x.std() > 0.06 and y.std() > 0.06
    often = inside.mean(axis=0)
    guess = often >= np.quantile(often, 0.8)  # one guess for all images: where lesions are most often
    assert np.mean([(guess & (mask > 0)).sum() / (guess | (mask > 0)).sum() for mask in inside]) < 0.5


def test_threshold_of_luminance_does_not_segment(drawn):
    iou = []
    for image, mask in zip(*drawn):
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        _, dark = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
        iou.append(((dark > 0) & (mask > 0)).sum() / ((dark > 0) | (mask > 0)).sum())
    assert 0.3 < np.mean(iou) < 0.7


def test_nearly_all_lesions_differ_visibly_from_the_skin_around_them(drawn):
    """CIELAB distance of the medians inside and in a ring outside; about 2.3 is a just noticeable difference."""
    distances = []
    for image, mask in zip(*drawn):
        lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        ring = (cv2.dilate(mask, np.ones((9, 9))) > 0) & (cv2.dilate(mask, np.ones((3, 3))) == 0)
        distances.append(np.linalg.norm(np.median(lab[mask > 0], axis=0) - np.median(lab[ring], axis=0)))
    assert np.mean(np.array(distances) > 2 * 2.3) > 0.95


def test_every_kind_of_lesion_has_a_chance_and_they_sum_to_one():
    assert sum(kind.weight for kind in synthetic_drawing.KINDS.values()) == pytest.approx(1)
    assert all(kind.weight > 0 for kind in synthetic_drawing.KINDS.values())
