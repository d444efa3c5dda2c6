"""Inference: the checkpoint's own transform, masks at the originals' sizes, metrics per image with intervals."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from jsonargparse import CLI
from PIL import Image

import inference
from dataset import SegmentationDataset, find_splits, make_loader
from images import Transform, read_mask
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


# ---- views and ensembles ----


class Pointwise(torch.nn.Module):
    """Log-odds from each pixel's colour and, unless `place` is 0, from where it is: then flips change the answer."""

    def __init__(self, place: float, weight: float = 4.0) -> None:
        super().__init__()
        self.place, self.weight = place, torch.nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        rows, columns = (torch.arange(n, dtype=torch.float32) for n in images.shape[-2:])
        where = self.place * (rows[:, None] - 0.3 * columns + 0.01 * rows[:, None] * columns)
        return self.weight * (images.sum(1, keepdim=True) - 1.5) + where


def pictures_of(count=3, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_flips_leave_an_equivariant_models_answer():
    even, images = Pointwise(0.0), pictures_of()
    torch.testing.assert_close(inference.predict(even, images, flips=True), inference.predict(even, images))


def test_with_flips_the_answer_to_a_flipped_image_is_exactly_the_flipped_answer(model):
    for net, images in ((Pointwise(0.1), pictures_of()), (model, pictures_of(2, 64))):
        answer = inference.predict(net, images, flips=True)
        assert not torch.allclose(answer, inference.predict(net, images), atol=1e-3)
        for move in (
            lambda x: x.flip(-1),
            lambda x: x.flip(-2),
            lambda x: x.transpose(-1, -2),
            lambda x: x.rot90(1, (-2, -1)),
        ):
            assert torch.equal(inference.predict(net, move(images), flips=True), move(answer))


def test_flips_average_the_probabilities_of_eight_views():
    """By NumPy in float64, from the model's answers to the eight views."""
    net, images = Pointwise(0.1), pictures_of()
    probabilities = []
    for turns in range(4):
        for mirrored in (False, True):
            view = np.rot90(images.numpy(), turns, (2, 3))
            view = view[..., ::-1] if mirrored else view
            logits = inference.predict(net, torch.from_numpy(view.copy())).double().numpy()
            logits = logits[..., ::-1] if mirrored else logits
            probabilities.append(1 / (1 + np.exp(-np.rot90(logits, -turns, (2, 3)))))
    mean = np.mean(probabilities, axis=0)
    expected = torch.from_numpy(np.log(mean / (1 - mean))).float()
    torch.testing.assert_close(inference.predict(net, images, flips=True), expected, atol=1e-4, rtol=1e-4)


def test_an_ensemble_is_the_mean_probability_even_where_float32_rounds_it_to_one():
    known = [torch.tensor([0.0, 2.0, 60.0, -200.0]), torch.tensor([0.0, -1.0, 60.0, -200.0])]
    mean = (1 / (1 + np.exp(-2.0)) + 1 / (1 + np.exp(1.0))) / 2
    expected = torch.tensor([0.0, np.log(mean / (1 - mean)), 60.0, -200.0])
    torch.testing.assert_close(inference.mean_log_odds(known), expected.float())
    assert torch.equal(inference.mean_log_odds(known[::-1]), inference.mean_log_odds(known))
    models, images = [Pointwise(0.1), Pointwise(0.0, -3.0)], pictures_of()
    both = inference.mean_log_odds([inference.predict(each, images) for each in models])
    assert torch.equal(inference.predict(models, images), both)
    with pytest.raises(InputError, match="no model"):
        inference.predict([], images)


def test_an_ensemble_of_two_architectures_scores_a_split(checkpoint, model, uneven, tmp_path):
    other = build_model(ModelSpec("unetpp", "smoke"), seed=1)
    save_model(other, tmp_path / "other", {"transform": dataclasses.asdict(TRANSFORM), "data": "folder"})
    inference.infer([checkpoint, tmp_path / "other"], data=uneven, out=tmp_path / "out", flips=True)
    data = SegmentationDataset(find_splits(uneven)["test"], TRANSFORM)
    table, _ = inference.score([model, other], make_loader(data, 3), flips=True)
    written = pd.read_csv(tmp_path / "out" / "per_image.csv")
    np.testing.assert_allclose(written["iou"], table["iou"], rtol=1e-5)


def test_checkpoints_of_unequal_sizes_are_no_ensemble(checkpoint, model, uneven, tmp_path):
    save_model(model, tmp_path / "large", {"transform": dataclasses.asdict(Transform(size=96)), "data": "folder"})
    with pytest.raises(InputError, match=r"64 px \(blur 1, bicubic\), .*large on images of 96 px .*one at a time"):
        inference.infer([checkpoint, tmp_path / "large"], data=uneven, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_may_be_named_several_times(capsys):
    arguments = ["--checkpoint", "a", "--data", "d", "--checkpoint=b", "--checkpoint", "c"]
    assert CLI(named, as_positional=False, args=inference.repeatable(arguments)) == [Path("a"), Path("b"), Path("c")]
    assert CLI(named, as_positional=False, args=inference.repeatable(arguments[:4])) == Path("a")
    assert CLI(named, as_positional=False, args=["--checkpoint", "[a, b]"]) == [Path("a"), Path("b")]


def named(checkpoint: Path | list[Path], data: Path | None = None):
    """A door with inference's own `checkpoint`."""
    return checkpoint


def test_augmentation_in_a_checkpoint_is_not_repeated_in_scoring(model, uneven, tmp_path):
    drawn = dataclasses.replace(TRANSFORM, rotate=90, scale=0.5, colour=1, hair=1)
    save_model(model, tmp_path / "drawn", {"transform": dataclasses.asdict(drawn)})
    _, transform, _ = inference.load_ensemble(tmp_path / "drawn")
    assert transform == Transform(TRANSFORM.size, TRANSFORM.blur, TRANSFORM.interpolation)


# ---- full resolution ----


def test_full_resolution_is_scored_against_the_unresized_masks(checkpoint, model, uneven, tmp_path, capsys):
    """By PyTorch's interpolation and NumPy's counts, from the model's own log-odds at 64 px."""
    inference.infer(checkpoint, data=uneven, out=tmp_path / "out", full_resolution=True, batch_size=2)
    assert "3 images of test at their own sizes" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    data = SegmentationDataset(find_splits(uneven)["test"], TRANSFORM)
    assert table[["width", "height"]].to_numpy().tolist() == [[64, 48], [50, 90], [33, 31]]
    for index, pair in enumerate(data.pairs):
        truth = np.asarray(Image.open(pair.mask)) > 0
        logits = inference.predict(model, data[index].image[None])
        full = torch.nn.functional.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)[0, 0] > 0
        found, union = full.numpy(), (full.numpy() | truth).sum()
        assert table["iou"][index] == pytest.approx((found & truth).sum() / union, abs=2 / union)
        assert table["accuracy"][index] == pytest.approx((found == truth).mean(), abs=2 / truth.size)
        written = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{pair.id}_segmentation.png")) > 0
        assert (written != found).sum() <= 2


def test_a_perfect_answer_is_perfect_at_full_resolution_only_as_far_as_the_input_size_allows(uneven):
    """Large log-odds of the resized mask itself: right everywhere but at the outline."""
    data = SegmentationDataset(find_splits(uneven)["test"], Transform(size=64))
    for index, pair in enumerate(data.pairs):
        row = inference._at_own_size(pair.id, data[index].mask * 20 - 10, read_mask(pair.mask)).iloc[0]
        assert 0.8 < row["iou"] <= 1 and row["id"] == pair.id


def test_full_resolution_without_masks_is_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match="--full_resolution is for --data"):
        inference.infer(checkpoint, images=tmp_path, out=tmp_path / "out", full_resolution=True)


def test_originals_are_scored_at_their_own_size(checkpoint, shared, tmp_path):
    root = shared / "data" / "isic_original_size"
    inference.infer(checkpoint, data=root, out=tmp_path / "out", full_resolution=True)
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    for pair, row in zip(find_splits(root)["test"], table.itertuples()):
        with Image.open(pair.mask) as mask:
            assert mask.size == (row.width, row.height)
            truth = np.asarray(mask) > 0
        found = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{pair.id}_segmentation.png")) > 0
        assert row.iou == pytest.approx((found & truth).sum() / (found | truth).sum(), rel=1e-5)


# ---- failures ----


def test_the_worst_images_are_drawn_worst_first(checkpoint, synthetic_root, tmp_path):
    inference.infer(checkpoint, data=synthetic_root, out=tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "per_image.csv")
    ids = inference.worst_ids(table)
    assert len(ids) == min(10, len(table)) and table.set_index("id").loc[ids, "iou"].is_monotonic_increasing
    assert set(ids) == set(table.sort_values("iou")["id"][:10])
    with Image.open(tmp_path / "out" / "worst.png") as worst, Image.open(tmp_path / "out" / "examples.png") as examples:
        assert worst.height > examples.height  # eight images, not four


def test_the_worst_pictures_carry_ids_and_scores(model, synthetic_root):
    data = SegmentationDataset(find_splits(synthetic_root)["test"], Transform(size=64))
    metrics, logits = inference.score(model, make_loader(data, 8))
    figure = inference.picture(data, logits, metrics, "model", worst=True, synthetic=True)
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    notes = [text.get_text() for ax in figure.axes for text in ax.texts if "IoU" in text.get_text()]
    assert labels == inference.worst_ids(metrics)
    assert [note[:8] for note in notes] == [f"IoU {iou:.2f}" for iou in sorted(metrics["iou"])]


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
