"""Inference: the checkpoint's own transform, masks at the originals' sizes, metrics per image with intervals."""

import dataclasses
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import inference
from dataset import SegmentationDataset, find_splits, make_loader
from images import Transform
from loss_metrics import METRICS
from models import ModelSpec, build_model, lesion_logits, save_model
from utils import InputError

TRANSFORM = Transform(size=64, blur=1.0, interpolation="bicubic", flips=True)


@pytest.fixture(scope="module")
def model():
    return build_model(ModelSpec("mask2former", "smoke"), seed=2)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "best"
    save_model(model, folder, {"transform": dataclasses.asdict(TRANSFORM), "data": "synthetic"})
    return folder


@pytest.fixture
def uneven(synthetic_root, tmp_path):
    """Three test images and masks of other sizes than square."""
    root = tmp_path / "uneven"
    pairs = find_splits(synthetic_root)["test"][:3]
    for pair, size in zip(pairs, [(64, 48), (50, 90), (33, 31)]):
        for path, resample in ((pair.image, Image.Resampling.BICUBIC), (pair.mask, Image.Resampling.NEAREST)):
            target = root / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).resize(size, resample).save(target, quality=95)
    return root


def read_masks(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_a_split_gives_masks_metrics_intervals_and_pictures(checkpoint, uneven, tmp_path, capsys):
    inference.infer(checkpoint, data=uneven, out=tmp_path / "out", batch_size=2)
    pairs = find_splits(uneven)["test"]
    masks = read_masks(tmp_path / "out" / "masks")
    assert list(masks) == [f"{pair.id}_segmentation.png" for pair in pairs]
    for pair, mask in zip(pairs, masks.values()):
        assert mask.shape == Image.open(pair.image).size[::-1] and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    assert table["id"].tolist() == [pair.id for pair in pairs] and set(METRICS) <= set(table)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("metric")
    assert summary.loc["iou", "mean"] == pytest.approx(table["iou"].mean(), rel=1e-5)
    assert summary.loc["iou", "low"] <= summary.loc["iou", "mean"] <= summary.loc["iou", "high"]
    assert (summary["n"].loc[["iou", "dice", "accuracy"]] == 3).all()
    with Image.open(tmp_path / "out" / "examples.png") as picture:
        assert min(picture.size) > 100
    assert "3 images of test at 64 px" in capsys.readouterr().out


def test_inference_uses_the_transform_saved_with_the_checkpoint(checkpoint, model, uneven, tmp_path):
    """Against the pixels and metrics worked out by hand: blur, bicubic to 64 px, no flips, cut at log-odds 0."""
    from PIL import ImageFilter

    inference.infer(checkpoint, data=uneven, out=tmp_path / "out")
    masks, table = read_masks(tmp_path / "out" / "masks"), pd.read_csv(tmp_path / "out" / "per_image.csv")
    for pair, iou in zip(find_splits(uneven)["test"], table["iou"]):
        original = Image.open(pair.image).convert("RGB")
        pixels = np.asarray(original.filter(ImageFilter.GaussianBlur(1.0)).resize((64, 64), Image.Resampling.BICUBIC))
        images = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))[None]
        with torch.no_grad():
            logits = lesion_logits(model.eval(), images)[0, 0].numpy()
        full = cv2.resize(logits, original.size, interpolation=cv2.INTER_LINEAR) > 0
        assert (full != (masks[f"{pair.id}_segmentation.png"] > 0)).mean() < 0.01
        truth = np.asarray(Image.open(pair.mask).resize((64, 64), Image.Resampling.NEAREST)) > 0
        union = ((logits > 0) | truth).sum()
        assert iou == pytest.approx(((logits > 0) & truth).sum() / union, abs=2 / union)


def test_images_alone_get_the_masks_that_the_split_gets(checkpoint, uneven, tmp_path):
    folder = uneven / "ISIC2018_Task1-2_Test_Input"
    (folder / "notes.txt").write_text("not an image")
    inference.infer(checkpoint, data=uneven, out=tmp_path / "split")
    inference.infer(checkpoint, images=folder, out=tmp_path / "folder")
    one = sorted(folder.glob("*.jpg"))[0]
    inference.infer(checkpoint, images=one, out=tmp_path / "one")
    scored, alone, single = (read_masks(tmp_path / name) for name in ("split/masks", "folder", "one"))
    assert list(scored) == list(alone) and list(single) == [f"{one.stem}_segmentation.png"]
    for name in alone:
        assert (scored[name] != alone[name]).mean() < 0.01  # batches of three and of one differ in the last bits
    assert np.array_equal(single[f"{one.stem}_segmentation.png"], alone[f"{one.stem}_segmentation.png"])
    shares = pd.read_csv(tmp_path / "folder" / "lesion_share.csv")
    assert shares["id"].tolist() == sorted(path.stem for path in folder.glob("*.jpg"))
    assert shares["lesion_share"].between(0, 1).all()


def test_another_split_can_be_chosen(checkpoint, synthetic_root, tmp_path):
    inference.infer(checkpoint, data=synthetic_root, split="validation", out=tmp_path / "out")
    ids = pd.read_csv(tmp_path / "out" / "per_image.csv")["id"].tolist()
    assert ids == [pair.id for pair in find_splits(synthetic_root)["validation"]]
    with pytest.raises(InputError, match="has no split 'tset'; it has train, validation, test"):
        inference.infer(checkpoint, data=synthetic_root, split="tset", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_nothing_is_overwritten(checkpoint, synthetic_root, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty; choose another with --out"):
        inference.infer(checkpoint, data=synthetic_root, out=tmp_path)
    with pytest.raises(InputError, match="is a file; choose another with --out"):
        inference.infer(checkpoint, data=synthetic_root, out=tmp_path / "precious.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_broken_image_among_many_is_named_before_any_mask_is_written(checkpoint, uneven, tmp_path):
    folder = uneven / "ISIC2018_Task1-2_Test_Input"
    broken = sorted(folder.glob("*.jpg"))[2]
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(InputError, match=f"{broken.name} cannot be decoded"):
        inference.infer(checkpoint, images=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_images_of_one_name_would_share_a_mask_and_are_refused(checkpoint, uneven, tmp_path):
    folder = uneven / "ISIC2018_Task1-2_Test_Input"
    first = sorted(folder.glob("*.jpg"))[0]
    Image.open(first).save(first.with_suffix(".png"))
    with pytest.raises(InputError, match=f"2 images are called {first.stem}"):
        inference.infer(checkpoint, images=folder, out=tmp_path / "out")


@pytest.mark.parametrize("options", [{}, {"data": ".", "images": "."}])
def test_either_data_or_images(checkpoint, options):
    with pytest.raises(InputError, match=r"give either --data .* or --images"):
        inference.infer(checkpoint, **options)


def test_no_image_at_all_is_refused(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        inference.infer(checkpoint, images=tmp_path / "empty", out=tmp_path / "out")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        inference.infer(checkpoint, images=tmp_path / "absent", out=tmp_path / "out")


def test_scores_do_not_depend_on_the_batch_size_and_leave_the_models_mode(model, synthetic_root):
    data = SegmentationDataset(find_splits(synthetic_root)["test"], Transform(size=64))
    model.train()
    tables = [inference.score(model, make_loader(data, size)) for size in (1, 3, 8)]
    assert model.training
    for table, logits in tables[1:]:
        assert table["id"].tolist() == data.ids
        for name in data.ids:
            torch.testing.assert_close(logits[name], tables[0][1][name], atol=1e-4, rtol=1e-4)


def test_a_mask_is_cut_after_upsampling(tmp_path):
    logits = torch.tensor([[[-1.0, 3.0]]])
    inference.save_mask(logits, (8, 1), tmp_path / "m.png")
    mask = np.asarray(Image.open(tmp_path / "m.png"))
    # bilinear with half-pixel centres: zero is crossed a quarter of the way between the two, at pixel 2 + 4 / 4 = 3
    assert mask.tolist() == [[0, 0, 0, 255, 255, 255, 255, 255]]


def test_a_checkpoint_without_its_weights_is_named(checkpoint, tmp_path, synthetic_root):
    shutil.copytree(checkpoint, tmp_path / "best")
    (tmp_path / "best" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors does not exist"):
        inference.infer(tmp_path / "best", data=synthetic_root, out=tmp_path / "out")
    with pytest.raises(InputError, match=r"has no model\.json; give a folder that train.py wrote"):
        inference.infer(tmp_path, data=synthetic_root, out=tmp_path / "out")


def test_originals_get_masks_of_their_own_size(checkpoint, shared, tmp_path):
    root = shared / "data" / "isic_original_size"
    files = sorted((root / "ISIC2018_Task1-2_Test_Input").glob("*.jpg"))[:2]
    for file in files:
        inference.infer(checkpoint, images=file, out=tmp_path / file.stem)
        with Image.open(file) as image, Image.open(tmp_path / file.stem / f"{file.stem}_segmentation.png") as mask:
            assert image.size == mask.size and mask.mode == "L"
