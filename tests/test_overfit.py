"""The smoke test of every architecture: trained and scored on the same 20 images it must outline them, IoU 0.95."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from model_spec import TITLES
from recipes import OVERFIT_IOU, for_overfit
from train import TrainConfig, load_config, main, train
from utils import InputError

ENCODERS = {
    "CLIP ViT": {"encoder": {"vit": "clip_tiny"}},
    "DINOv2 ViT, simple neck": {"encoder": {"vit": "dinov2_tiny", "neck": "simple"}},
    "MAE ViT, fused": {"encoder": {"vit": "mae_tiny", "top_down": True, "smooth": True}},
    "a CNN": {"encoder": {"cnn": "resnet18"}},
}


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """24 dark ellipses on light ground, 64 px, in folders of images and masks."""
    root = tmp_path_factory.mktemp("discs")
    for part in ("images", "masks"):
        (root / part).mkdir()
    rng, (y, x) = np.random.default_rng(0), np.indices((64, 64))
    for k in range(24):
        (cy, cx), (a, b), turn = rng.uniform(26, 38, 2), rng.uniform(17, 25, 2), rng.uniform(0, np.pi)
        along = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        across = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        mask = (along / a) ** 2 + (across / b) ** 2 < 1
        colours = np.where(mask[..., None], rng.uniform(40, 110, 3), rng.uniform(150, 230, 3))
        picture = (colours + rng.normal(0, 12, (64, 64, 3))).clip(0, 255)
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"disc{k:02d}.png")
        Image.fromarray(np.uint8(255 * mask)).save(root / "masks" / f"disc{k:02d}.png")
    return root


def config_of(discs, out, **settings) -> TrainConfig:
    base = {"preset": "smoke", "data": str(discs), "image_size": 64, "learning_rate": 2e-3, "overfit": 20, "epochs": 1}
    return for_overfit(TrainConfig(**(base | {"out": str(out), "device": "cpu"} | settings)))


@pytest.mark.parametrize("name", [*TITLES, *ENCODERS])
def test_every_architecture_learns_twenty_images(name, discs, tmp_path):
    model = {"model": name} if name in TITLES else {"model": "mask2former", "options": ENCODERS[name]}
    run = train(config_of(discs, tmp_path, **model))
    history = pd.read_csv(run / "history.csv")
    assert history["validation_iou"].max() >= OVERFIT_IOU
    assert (history["validation_iou"].iloc[:-1] < OVERFIT_IOU).all()  # it ends where it has learnt enough


def test_the_check_uses_as_many_images_as_asked_for_and_does_not_turn_them(discs, tmp_path):
    from train import _open

    datasets = _open(config_of(discs, tmp_path, overfit=8, flips=True))
    assert datasets["train"].ids == datasets["validation"].ids and len(datasets["train"].ids) == 8
    assert datasets["train"].augmenter is None and len(datasets["train"]) == 80


def test_the_command_line_fails_where_a_model_does_not_learn(discs, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.OVERFIT_EPOCHS", 1)
    arguments = [
        "--model",
        "segformer",
        "--preset",
        "smoke",
        "--data",
        str(discs),
        "--image_size",
        "64",
        "--epochs",
        "1",
    ]
    arguments += ["--learning_rate", "1e-9", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert load_config([*arguments, "--overfit", "4"]).schedule == "constant"
    with pytest.raises(InputError, match=r"overfit check failed: IoU .* on its own 4 training images"):
        main([*arguments, "--overfit", "4"])
