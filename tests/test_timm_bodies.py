"""Bodies of timm that segment: their taps and sites, and a classifier's body taken over to the bit or refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from made_networks import RESNET, VIT, classifiers_of
from safetensors.torch import save_file

from classification.classifiers import load_classifier
from classification.classifiers import sites as classifier_sites
from models import ModelSpec, build_model, check_image_size, encoder_name, lesion_logits, load_model, save_model
from similarity import record
from studies.cells import cells_of
from studies.encoders import EncodersConfig
from studies.families import family_of
from studies.grid_work import job_of
from utils import HOME, InputError

DEEP = {"patch_size": 8, "embed_dim": 24, "depth": 12, "num_heads": 2}
BODIES = {  # network -> (its options, strides of its taps at 64 px)
    "resnet18": (RESNET, [4, 8, 16, 32]),
    "convnext_atto": ({"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}, [4, 8, 16, 32]),
    "mobilenetv3_small_050": ({}, [4, 8, 16, 32]),
    "mobilenetv2_035": ({}, [4, 8, 16, 32]),
    "regnety_002": ({}, [4, 8, 16, 32]),
    "vit_tiny_patch16_224": (DEEP, [8, 8, 8, 8]),
    "beit_base_patch16_224": (DEEP, [8, 8, 8, 8]),
    "eva02_tiny_patch14_224": (DEEP, [8, 8, 8, 8]),
    "swin_tiny_patch4_window7_224": (
        {"patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": [1, 1, 2], "num_heads": [1, 2, 4]},
        [4, 8, 16],
    ),
    "pvt_v2_b0": (
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32], "num_heads": [1, 1, 2, 4], "mlp_ratios": [2, 2, 2, 2]},
        [4, 8, 16, 32],
    ),
}
OF_CLASSIFIERS = {
    "Conv": ("resnet18", RESNET, "CNN"),
    "Attention": ("vit_tiny_patch16_224", VIT, "transformer"),
    "Efficient": ("mobilenetv2_035", {}, "CNN"),
}


def spec_of(network: str, options: dict, **more) -> ModelSpec:
    return ModelSpec("all_mlp", network, options={"body": options, "decoder_channels": 8, "image_size": 64}, **more)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A classifiers study's folder, of seeds 0 and 1."""
    return classifiers_of(tmp_path_factory.mktemp("classifiers"), OF_CLASSIFIERS, seeds=(0, 1), size=64)


@pytest.mark.parametrize("network", BODIES)
def test_bodies_give_their_stages_or_depths_and_every_parameter_learns(network, images, tmp_path):
    options, strides = BODIES[network]
    model = build_model(spec_of(network, options)).train()
    assert [64 // part.shape[-1] for part in model.encoder(images)] == strides
    lesion_logits(model, images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    save_model(model, tmp_path)
    again = load_model(tmp_path)[0]
    with torch.no_grad():
        assert torch.equal(lesion_logits(model.eval(), images), lesion_logits(again, images))


def test_blocks_of_a_columnar_body_are_tapped_at_quarters_of_its_depth(images):
    model = build_model(spec_of("vit_tiny_patch16_224", DEEP)).eval()
    outputs = []
    for block in (model.encoder.blocks[k] for k in (2, 5, 8, 11)):
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        maps = model.encoder(images)
    tokens = [output[:, model.encoder.num_prefix_tokens :] for output in outputs]
    for part, expected in zip(maps, tokens, strict=True):
        assert torch.equal(part.flatten(2).transpose(1, 2), expected)


def test_the_decoder_is_a_linear_map_of_each_level_resized_and_fused(images):
    model = build_model(spec_of("resnet18", RESNET)).eval()
    decoder = model.decoder
    with torch.no_grad():
        maps = model.encoder(images)
        levels = []
        for (norm, projection), part in zip(decoder.levels, maps):
            rows = F.layer_norm(part.permute(0, 2, 3, 1), part.shape[1:2], norm.weight, norm.bias, norm.eps)
            rows = rows @ projection.weight[:, :, 0, 0].T + projection.bias
            levels.append(F.interpolate(rows.permute(0, 3, 1, 2), size=(16, 16), mode="bilinear"))
        fused = F.conv2d(torch.cat(levels, 1), decoder.fusion[0].weight).relu() / (1 + decoder.fusion[1].eps) ** 0.5
        logits = F.conv2d(fused, decoder.classifier.weight, decoder.classifier.bias)
        torch.testing.assert_close(decoder(maps), logits)


@pytest.mark.parametrize("label", OF_CLASSIFIERS)
def test_a_classifiers_body_computes_the_same_at_every_block(label, trained, images):
    network, options, family = OF_CLASSIFIERS[label]
    folder = trained / "networks" / f"{label}--seed-1"
    classifier, _ = load_classifier(folder)
    model = build_model(spec_of(network, options, weights=str(folder))).eval()
    batches = [(images, ["a", "b"])]
    of_body = [site for site in model.default_sites() if site.part == "encoder"]
    renamed = {site.name.removeprefix("body."): site for site in classifier_sites(classifier)}
    left_out = set(renamed) - {site.name.removeprefix("encoder.") for site in of_body}
    assert left_out == ({"bn2"} if label == "Efficient" else set())  # of its head
    mine = record(model, batches, of_body, policy="map")
    theirs = record(classifier, batches, classifier.default_sites(), policy="map")
    for site in of_body:
        assert torch.equal(mine[site.name], theirs["body." + site.name.removeprefix("encoder.")]), site.name
    assert family_of(model.spec) == family and encoder_name(model.spec) == network


def test_a_classifiers_weights_do_not_depend_on_our_seed_and_their_decoder_does(trained):
    spec = spec_of("resnet18", RESNET, weights=str(trained / "networks" / "Conv--seed-0"))
    one, other = (build_model(spec, seed).state_dict() for seed in (0, 1))
    assert all(torch.equal(one[key], other[key]) for key in one if key.startswith("encoder."))
    assert not torch.equal(one["decoder.classifier.weight"], other["decoder.classifier.weight"])


def test_files_in_timms_layout_are_loaded_with_and_without_a_head(trained, tmp_path):
    classifier, _ = load_classifier(trained / "networks" / "Conv--seed-0")
    state = {key: tensor.clone() for key, tensor in classifier.body.state_dict().items()}
    for file, left_out in (("whole", ()), ("headless", ("fc.weight", "fc.bias"))):
        path = tmp_path / f"{file}.safetensors"
        save_file({key: tensor for key, tensor in state.items() if key not in left_out}, path)
        model = build_model(spec_of("resnet18", RESNET, weights=str(path)))
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.encoder.state_dict().items())


def test_other_bodies_other_sizes_and_other_normalisations_are_refused(trained, tmp_path):
    folder = str(trained / "networks" / "Conv--seed-0")
    wider = RESNET | {"channels": [*RESNET["channels"][:3], 24]}
    with pytest.raises(InputError, match=r"of another body than this ResNet: .*layer4.*not \(24"):
        build_model(spec_of("resnet18", wider, weights=folder))
    shorter = VIT | {"depth": 1}
    deep = str(trained / "networks" / "Attention--seed-0")
    with pytest.raises(InputError, match=r"blocks\.1\.\S+ is not in the model"):
        build_model(spec_of("vit_tiny_patch16_224", shorter, weights=deep))
    with pytest.raises(InputError, match="normalises its input otherwise"):
        build_model(spec_of("resnet18", RESNET, weights=folder, normalization="half"))
    with pytest.raises(InputError, match="holds no classifier"):
        build_model(spec_of("resnet18", RESNET, weights=str(tmp_path)))
    with pytest.raises(InputError, match="does not exist"):
        build_model(spec_of("resnet18", RESNET, weights=str(tmp_path / "absent")))
    with pytest.raises(InputError, match="unknown network 'resnet81'"):
        build_model(spec_of("resnet81", {}))
    with pytest.raises(InputError, match="unknown model option 'depth'"):
        build_model(ModelSpec("all_mlp", "smoke", options={"depth": 3}))
    model = build_model(spec_of("vit_tiny_patch16_224", VIT))
    with pytest.raises(InputError, match=r"built for images of 64×64 pixels, got 96×96; use --image_size 64"):
        check_image_size(model, 96, 96)
    check_image_size(build_model(dataclasses.replace(spec_of("resnet18", RESNET))), 96, 96)


def test_a_grids_weights_may_be_named_by_its_axes(tmp_path):
    axes = {"body": {"Conv": {"preset": "resnet18"}}, "start": {"fine-tuned": {"weights": "in/{body}--seed-{seed}"}}}
    config = EncodersConfig(model="all_mlp", axes=axes)
    jobs = [job_of(config, cell, tmp_path) for cell in cells_of(axes | {"seed": [0, 1]})]
    assert [job.weights for job in jobs] == ["in/Conv--seed-0", "in/Conv--seed-1"]
    with pytest.raises(InputError, match=r"braces hold the name of an axis \(body, start\), not 'seed'"):
        job_of(config, cells_of(axes)[0], tmp_path)


def bodies_in(name: str, place: str) -> dict[str, tuple]:
    """label -> (network of timm, its options) in a YAML of either study."""
    settings = yaml.safe_load((HOME / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    if place == "networks":
        return {label: (each["name"], each.get("options", {})) for label, each in settings["networks"].items()}
    bodies = settings["axes"]["body"]
    return {label: (each["preset"], each.get("options", {}).get("body", {})) for label, each in bodies.items()}


@pytest.mark.parametrize("name", ["processing_{}", "processing_{}_demo"])
def test_the_networks_that_are_fine_tuned_are_those_that_were_taught_to_classify(name):
    path = HOME / "configs" / f"{name.format('networks')}.yaml"
    if not path.exists():
        pytest.skip(f"there is no {path.name}")
    classifiers, bodies = bodies_in(path.stem, "networks"), bodies_in(name.format("segmentation"), "body")
    assert bodies == {label: classifiers[label] for label in bodies}
