"""Recordings in a study's folder: taken again only where they are of the same network, sites and images."""

import pytest

from dataset import make_loader
from models import ModelSpec, build_model
from similarity import record
from sources import ImageSource, open_datasets
from studies.recordings import kept_recording

SMALL = ImageSource(
    synthetic_images={"Training": 16, "Validation": 4, "Test": 20}, synthetic_size=64, image_size=64, limits={"test": 4}
)


@pytest.fixture(scope="module")
def test_images():
    return open_datasets(SMALL, needed=("test",))["test"]


@pytest.fixture(scope="module")
def model():
    return build_model(ModelSpec("unetpp", "smoke"), 0).eval()


def kept_in(path, model, images, policy="gap", sites=None):
    record(model, make_loader(images, 4), sites, policy=policy, data_hash=images.fingerprint).save(path)
    return path


@pytest.mark.parametrize("policy", ["gap", "grid:4"])
def test_a_recording_of_all_that_its_policy_fits_is_taken_again(policy, model, test_images, tmp_path):
    path = kept_in(tmp_path / "one.safetensors", model, test_images, policy)
    found = kept_recording(path, model, test_images)
    assert found.ids == test_images.ids and found.policy == policy
    everything = kept_recording(kept_in(tmp_path / "all.safetensors", model, test_images), model, test_images)
    assert (len(found.names) < len(everything.names)) == (policy != "gap")  # small maps have no 4 × 4 cells


def test_one_of_other_weights_images_or_sites_is_not(model, test_images, tmp_path):
    path = kept_in(tmp_path / "one.safetensors", model, test_images)
    assert kept_recording(path, build_model(ModelSpec("unetpp", "smoke"), 1).eval(), test_images) is None
    other = open_datasets(ImageSource(**(vars(SMALL) | {"blur": 1.0})), needed=("test",))["test"]
    assert kept_recording(path, model, other) is None
    names = kept_recording(path, model, test_images).names
    fewer = kept_in(tmp_path / "fewer.safetensors", model, test_images, sites=names[:-1])
    assert kept_recording(fewer, model, test_images) is None


def test_none_is_taken_where_there_is_none_or_a_part_of_one(model, test_images, tmp_path):
    path = kept_in(tmp_path / "one.safetensors", model, test_images)
    assert kept_recording(tmp_path / "other.safetensors", model, test_images) is None
    path.write_bytes(path.read_bytes()[:-100])
    assert kept_recording(path, model, test_images) is None
