"""Fixtures that every room's tests share: images, and what runs need to stay inside the test's own folder."""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


@pytest.fixture(scope="session", autouse=True)
def _own_image_cache(tmp_path_factory):
    os.environ["ISIC_CACHE"] = str(tmp_path_factory.mktemp("image-cache"))
    torch.set_num_threads(
        1
    )  # tiny tensors: threads that wait for each other on a busy machine cost more than they save


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real images beside the project; a test that needs them says so when they are not there."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real images are not at hand (no folder {folder.parent.name}/data beside the project)")
    return folder.parent


@pytest.fixture(scope="session")
def synthetic_root(tmp_path_factory) -> Path:
    """24 synthetic images of 64 px in ISIC's layout: 12 Training, 4 Validation, 8 Test."""
    from synthetic import make_dataset

    counts = {"Training": 12, "Validation": 4, "Test": 8}
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "set", counts=counts, size=64, seed=0)


@pytest.fixture(scope="module")
def slim_unetpp():
    """Within a file, UNet++'s preset `smoke` stands on an encoder of 0.2 million weights instead of 11 million.

    For tests of what happens around a model: most of their time went into writing checkpoints.
    """
    import dense_models

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dense_models.SMP_PRESETS["unetpp"]["smoke"], "encoder_name", "tu-mobilenetv3_small_050")
        yield
