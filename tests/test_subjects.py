"""Which networks a study finds in other studies' folders, what it knows of them, and what it refuses."""

import json

import pytest
import torch
import yaml
from made_networks import RESNET, VIT, classifiers_of, grid_of, universality_of

from studies.subjects import CLASSIFICATION, SEGMENTATION, named, networks_in, subjects_of, twins
from utils import InputError

AXES = {"architecture": {"FCN": {"model": "fcn"}, "SegFormer": {"model": "segformer"}}, "seed": [0, 1]}
TINY = {"Conv": ("resnet18", RESNET, "CNN"), "Attention": ("vit_tiny_patch16_224", VIT, "transformer")}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    return grid_of(tmp_path_factory.mktemp("grid") / "run", AXES, weights=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return classifiers_of(tmp_path_factory.mktemp("photos") / "run", TINY, seeds=(0, 1))


def names(subjects):
    return [subject.name for subject in subjects]


def test_a_grids_networks_come_in_its_order_with_label_family_and_seed(grid):
    found = subjects_of({str(grid): []})
    assert names(found) == ["FCN (0)", "FCN (1)", "SegFormer (0)", "SegFormer (1)"]
    assert [subject.family for subject in found] == ["CNN", "CNN", "transformer", "transformer"]
    assert {(subject.kind, subject.image_size) for subject in found} == {(SEGMENTATION, 32)}


def test_a_network_is_loaded_with_its_own_weights_in_eval_mode(grid):
    models = [subject.load() for subject in subjects_of({str(grid): ["SegFormer"]})]
    assert not any(model.training for model in models)
    first, second = (next(model.parameters()) for model in models)
    assert not torch.equal(first, second)  # two seeds


def test_unfinished_cells_are_left_out(tmp_path):
    folder = grid_of(tmp_path, AXES, unfinished=["architecture-FCN--seed-1"])
    assert names(networks_in(folder)) == ["FCN (0)", "SegFormer (0)", "SegFormer (1)"]


def test_cells_that_the_grid_no_longer_has_are_left_out(tmp_path):
    folder = grid_of(tmp_path, AXES)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["axes"]["seed"] = [1]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert names(networks_in(folder)) == ["FCN (1)", "SegFormer (1)"]


def test_of_several_shares_of_the_images_the_largest_is_taken(tmp_path):
    folder = grid_of(tmp_path, AXES | {"fraction": [0.25, 0.5]})
    assert names(networks_in(folder)) == ["FCN (0)", "FCN (1)", "SegFormer (0)", "SegFormer (1)"]
    assert all("fraction-0.5" in str(subject.folder) for subject in networks_in(folder))


def test_a_label_says_the_architecture_also_where_its_study_did_not(tmp_path):
    vit = {"model": "mask2former", "options": {"encoder": {"vit": "dinov2_tiny"}}}
    cnn = {"model": "mask2former", "options": {"encoder": {"cnn": "resnet18"}}}
    folder = grid_of(tmp_path, {"encoder": {"ViT": vit, "a Mask2Former on ResNet": cnn}, "seed": [0]})
    found = networks_in(folder)
    assert [subject.label for subject in found] == ["Mask2Former, ViT", "a Mask2Former on ResNet"]
    assert [subject.family for subject in found] == ["transformer", "hybrid"]


@pytest.mark.parametrize(
    ("model", "family"),
    [("unetpp", "CNN"), ("fpn", "CNN"), ("fcn", "CNN"), ("segformer", "transformer"), ("mask2former", "transformer")],
)
def test_families_of_segmentation_networks(tmp_path, model, family):
    folder = grid_of(tmp_path, {"architecture": {"it": {"model": model}}, "seed": [0]})
    assert [subject.family for subject in networks_in(folder)] == [family]


def test_a_convolutional_decoder_on_a_transformer_is_a_hybrid(tmp_path):
    folder = grid_of(tmp_path, {"encoder": {"MiT": {"model": "unetpp", "options": {"encoder_name": "mit_b0"}}}})
    assert networks_in(folder)[0].family == "hybrid"


def test_of_universality_only_those_whose_epochs_are_done(tmp_path):
    both = {"mask2former-seed0": ("mask2former", 2), "unetpp-seed1": ("unetpp", 1), "unetpp-seed2": ("unetpp", 2)}
    found = networks_in(universality_of(tmp_path, both))
    assert [(each.label, each.seed, each.family) for each in found] == [
        ("Mask2Former", 0, "transformer"),
        ("UNet++", 2, "CNN"),
    ]


def test_classifiers_are_found_with_what_they_say_of_themselves(photos):
    found = subjects_of({str(photos): []})
    assert {(each.label, each.family, each.seed) for each in found} == {
        (label, family, seed) for label, (_, _, family) in TINY.items() for seed in (0, 1)
    }
    assert {(each.kind, each.image_size) for each in found} == {(CLASSIFICATION, 32)}
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    answers = [each.load()(images) for each in found]
    assert all(answer.shape == (2, 4) for answer in answers) and not torch.equal(answers[0], answers[1])


def test_classifiers_whose_training_did_not_end_are_left_out_and_classes_are_known_by_name(tmp_path):
    folder = classifiers_of(tmp_path, TINY, unfinished=["Conv--seed-0"])
    (found,) = networks_in(folder)
    assert found.label == "Attention" and found.classes == ("cross", "disc", "ring", "stripes")


def test_a_pretrained_one_has_no_seed_and_is_named_by_its_label():
    found = named("tiny", {"name": "vit_tiny_patch16_224", "image_size": 96})
    assert (found.name, found.seed, found.family, found.image_size) == ("tiny", None, "transformer", 96)
    assert (found.spec.weights, found.spec.classes) == ("imagenet", 1000)


def test_networks_that_differ_in_their_seed_alone_are_twins(grid):
    found = subjects_of({str(grid): []})
    assert twins(found) == [("FCN (0)", "FCN (1)"), ("SegFormer (0)", "SegFormer (1)")]


def test_labels_are_chosen_and_left_out(grid):
    assert names(subjects_of({str(grid): ["FCN"]})) == ["FCN (0)", "FCN (1)"]
    assert names(subjects_of({str(grid): []}, leave_out=["FCN"])) == ["SegFormer (0)", "SegFormer (1)"]


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_network_there_twice_is_refused_by_name(grid, tmp_path):
    other = grid_of(tmp_path, AXES)
    with pytest.raises(InputError, match=r"two networks are called 'FCN \(0\)'; leave out"):
        subjects_of({str(grid): [], str(other): []})


def test_one_label_of_two_families_is_refused(grid, tmp_path):
    other = grid_of(tmp_path, {"architecture": {"FCN, SegFormer": {"model": "segformer"}}, "seed": [5]})
    with pytest.raises(InputError, match="'FCN, SegFormer' differ in more than their seed"):
        mixed = grid_of(tmp_path / "b", {"architecture": {"FCN, SegFormer": {"model": "fcn"}}, "seed": [6]})
        subjects_of({str(other): [], str(mixed): []})


def test_segmenters_and_classifiers_together_are_refused(grid, photos):
    with pytest.raises(InputError, match="some networks segment and some classify; explain them in two runs"):
        subjects_of({str(grid): [], str(photos): []})


def test_one_network_alone_is_refused(grid):
    with pytest.raises(InputError, match="1 networks: at least two"):
        subjects_of({}, {"one": {"name": "resnet18"}})


@pytest.mark.parametrize(
    ("labels", "leave_out", "sentence"),
    [
        (["FNC"], [], "has no 'FNC'; closest: 'FCN'"),
        ([], ["SegFormr"], "leave_out: there is no network 'SegFormr'; closest: 'SegFormer'"),
    ],
)
def test_unknown_labels_are_refused_with_the_closest(grid, labels, leave_out, sentence):
    with pytest.raises(InputError, match=sentence):
        subjects_of({str(grid): labels}, leave_out=leave_out)


def test_a_folder_that_is_not_there_or_holds_no_network_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist; give the results folder"):
        networks_in(tmp_path / "nowhere")
    empty = grid_of(tmp_path / "empty", {"seed": [0]}, unfinished=["seed-0"], model="fcn")
    with pytest.raises(InputError, match=r"empty holds no finished network .* run the study"):
        networks_in(empty)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("axes: [", "config.yaml cannot be read"),
        ("just words", "config.yaml holds no settings"),
        ("seed: 0", "config.yaml has no axes"),
    ],
)
def test_a_damaged_config_is_named_with_the_remedy(tmp_path, text, sentence):
    folder = grid_of(tmp_path, {"seed": [0]}, model="fcn")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=f"(?s){sentence}.*give a results folder as a study wrote it"):
        networks_in(folder)


def test_a_missing_config_of_a_run_is_named(tmp_path):
    folder = grid_of(tmp_path, {"seed": [0]}, model="fcn")
    path = folder / "cells" / "seed-0" / "run" / "config.yaml"
    path.unlink()
    with pytest.raises(InputError, match=str(path)):
        networks_in(folder)


def test_damaged_classifiers_are_named(tmp_path):
    path = classifiers_of(tmp_path, {"Conv": TINY["Conv"]}) / "networks" / "Conv--seed-0" / "classifier.json"
    whole = json.loads(path.read_text())
    for text, sentence in (
        (json.dumps(whole)[:40], "cannot be read"),
        (json.dumps(whole | {"extra": {}}), "says no label, family and seed"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"(?s)classifier.json.*{sentence}"):
            networks_in(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "pretrained 'it': which network.*name: resnet18"),
        ({"name": "resnet18", "wieghts": "none"}, "unknown setting 'wieghts'; closest: 'weights'"),
        ({"name": "resnet81"}, "unknown network 'resnet81'; closest"),
        ({"name": "mixer_s32_224"}, "is not known here; say it: family"),
        ({"name": "resnet18", "family": "CNNs"}, "family 'CNNs' is none of CNN, transformer, hybrid"),
    ],
)
def test_pretrained_ones_that_nobody_can_build_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        named("it", settings)
