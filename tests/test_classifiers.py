"""Classifiers: what they are built from, where they are listened to, how they are kept, and that they learn."""

import json
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from scipy.stats import binomtest

from classification.classifiers import (
    FOURTEEN,
    MOBILENET,
    ClassifierSpec,
    build_classifier,
    family_of,
    load_classifier,
    save_classifier,
    sites,
)
from classification.origins import training_of
from classification.photos import load_photos, photo_set
from classification.training import (
    ClassifierRecipe,
    accuracy,
    crop_and_flip,
    precision_on,
    predict,
    train_classifier,
    wilson_interval,
)
from classifier_sites import declared_sites
from explanations.attributions import grad_cams, sites_at_depths
from explanations.targets import class_logit
from similarity.hooks import Listener
from utils import InputError

TINY = ClassifierSpec(
    "resnet18",
    {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8},
    image_size=32,
)
CNNS = FOURTEEN[:9]
TORCHVISION = ("resnet18", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5", "efficientnet_b0", "swin_t")
HYBRIDS = ("coatnet_nano_rw_224", "maxvit_tiny_rw_224", "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small")
HYBRIDS += ("levit_128s", "efficientformer_l1", "fastvit_t8")


def colours(count=48, size=32):
    """uint8 images of noise, the first half reddish and the second bluish, and their labels 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(60, 120, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) >= count // 2).long()
    for row, label in enumerate(labels.tolist()):
        images[row, 2 if label else 0] += 80
    return images, labels


def test_the_fourteen_of_the_earlier_study_have_their_families():
    assert len(FOURTEEN) == 14
    for name in FOURTEEN:
        assert family_of(name) == ("CNN" if name in CNNS else "transformer"), name
    assert {family_of(name) for name in HYBRIDS} == {"hybrid"}
    assert family_of("resnet50.a1_in1k") == "CNN"


def test_unknown_names_and_families_are_refused():
    with pytest.raises(InputError, match="unknown network 'resnt50'; closest: 'resnet50'"):
        family_of("resnt50")
    with pytest.raises(InputError, match=r"closest: 'resnet50\.a1_in1k'"):
        build_classifier(ClassifierSpec("resnet50.a1_in1"))
    with pytest.raises(InputError, match="say it: family"):
        family_of("mixer_b16_224")


def test_a_classifier_normalises_its_own_input():
    model = build_classifier(TINY).eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = model.body((images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    torch.testing.assert_close(model(images), by_hand)
    assert model(images).shape == (2, 10)


def test_the_same_seed_draws_the_same_weights():
    first, second, other = (build_classifier(TINY, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["body.fc.weight"], other["body.fc.weight"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": {"wings": 2}}, "resnet18 cannot be built .*wings"),
        ({"normalization": "imagnet"}, "unknown normalization 'imagnet'; closest: 'imagenet'"),
        ({"weights": "imagenet"}, "answer 1000 classes, not 10"),
        ({"weights": "pretrained"}, "set classes to 1000, or to 0 for its features"),
        ({"name": "vit_small_patch14_dinov2.lvd142m", "options": {}, "weights": "pretrained"}, "set classes to 0"),
        ({"name": "torchvision/resnet81"}, "unknown network .*closest: 'torchvision/resnet18'"),
        ({"name": "torchvision/resnet18.IMAGENET1K_V2"}, "unknown weights .*closest: 'IMAGENET1K_V1'"),
        ({"name": "torchvision/resnet18", "options": {"wings": 2}}, "cannot be built .*wings"),
        ({"classes": -1}, "classes at least 0"),
        ({"weights": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"weights": "imagenet", "classes": 1000, "options": {}}, "give --weights a local file"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(changes, sentence):
    spec = ClassifierSpec(**{**{"name": "resnet18", "image_size": 32}, **changes})
    with pytest.raises(InputError, match=sentence):
        build_classifier(spec)


def test_weights_come_from_a_file_in_timms_own_layout(tmp_path):
    body = timm.create_model("resnet18", num_classes=10, **TINY.options)
    torch.save(body.state_dict(), tmp_path / "own.pth")
    spec = ClassifierSpec("resnet18", TINY.options, str(tmp_path / "own.pth"), image_size=32)
    model = build_classifier(spec, seed=5)
    assert torch.equal(model.body.fc.weight, body.fc.weight)
    with pytest.raises(InputError, match="another architecture"):
        build_classifier(ClassifierSpec("resnet18", TINY.options, str(tmp_path / "own.pth"), classes=7, image_size=32))


def test_images_of_another_size_are_refused_where_the_network_has_one():
    options = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = build_classifier(ClassifierSpec("vit_tiny_patch16_224", options, image_size=32))
    with pytest.raises(InputError, match=r"built for images \(3, 32, 32\)"):
        model(torch.rand(1, 3, 64, 64))


# ---- sites ------------------------------------------------------------------------------------------------------


def responses(model, images):
    """site name -> its features of every image, batch axis first."""
    found = model.default_sites()
    with Listener(model, found, lambda s, t: t.movedim(s.axes.index("batch"), 0).clone()) as listener, torch.no_grad():
        model(images)
        return listener.take()


def check_sites(spec):
    """Every site has one row an image, and its axes say truly which axis is which."""
    model = build_classifier(spec).eval()
    size = spec.image_size
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    changed = torch.cat([images[:1], 1 - images[1:2], images[2:]])
    before, after = responses(model, images), responses(model, changed)
    listed = sites(model, size)
    assert [site.name for site in listed] == list(before) and len(listed) >= 3
    for name in before:
        moved = (after[name] - before[name]).abs().flatten(1).amax(1)
        scale = before[name].abs().max()
        assert moved[1] > 0 and max(moved[0], moved[2]) <= 1e-4 * scale, name
    for site in listed:
        _check_shape(site, size)
    return model, images


def _check_shape(site, size):
    axes = dict(zip([axis for axis in site.axes if axis != "batch"], site.shape))
    if "token" in axes:
        side = -(-size // site.strides[0])  # convolutions with padding round up
        assert axes["token"] == side**2 + site.prefix, site
    else:
        assert axes["height"] == axes["width"] <= size, site


@pytest.mark.parametrize("name", FOURTEEN)
def test_perturbing_one_image_changes_its_row_alone_at_every_site(name):
    size, options = 64, {"depth": 3} if name == "vit_base_patch32_224" else {}  # all blocks are alike, and large
    model, images = check_sites(ClassifierSpec(name, options, image_size=size))
    chosen = sites_at_depths(model, size, (0.25, 0.5, 0.75))
    maps = grad_cams(model, images[:1], class_logit(0), list(dict.fromkeys(chosen.values())))
    for explained in maps.values():
        assert explained.maps.shape == (1, size, size) and explained.maps.any()


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_listened_to_as_well(name):
    check_sites(ClassifierSpec(name, image_size=224 if name.startswith("efficientformer") else 64))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_listened_to_under_their_own_names(name):
    spec = ClassifierSpec(f"torchvision/{name}", image_size=64)
    check_sites(spec)
    assert family_of(spec.name) == ("transformer" if name.startswith("swin") else "CNN")


def test_torchvisions_vision_transformer_has_one_token_before_the_patches():
    options = {"num_layers": 2, "hidden_dim": 24, "mlp_dim": 24, "num_heads": 2}
    with pytest.raises(InputError, match="cannot be built"):
        build_classifier(ClassifierSpec("torchvision/vit_b_32", options, image_size=50))
    body = torchvision.models.VisionTransformer(64, 16, **options)
    assert [(site.prefix, site.strides) for site in declared_sites(body)] == [(1, (16,))] * 2
    with torch.no_grad():
        assert body.encoder(body._process_input(torch.rand(1, 3, 64, 64)).new_zeros(1, 17, 24)).shape == (1, 17, 24)


def test_what_no_place_is_declared_for_is_refused_by_name():
    with pytest.raises(InputError, match="torchvision's SqueezeNet is not declared"):
        build_classifier(ClassifierSpec("torchvision/squeezenet1_1")).default_sites()


# ---- without a head, and with torchvision's weights ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "torchvision/mobilenet_v3_small"])
def test_without_classes_a_network_answers_what_its_last_layer_was_given(name):
    whole = build_classifier(ClassifierSpec(name, image_size=32)).eval()
    without = build_classifier(ClassifierSpec(name, classes=0, image_size=32)).eval()
    own = without.state_dict()
    without.load_state_dict({key: tensor for key, tensor in whole.state_dict().items() if key in own})
    head = [module for module in whole.modules() if isinstance(module, torch.nn.Linear)][-1]
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(head(without(images)), whole(images))


def test_torchvisions_weights_come_from_its_cache_with_their_own_colours(tmp_path, monkeypatch):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    body = torchvision.models.resnet18()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda *_args, **_options: body.state_dict())
    spec = ClassifierSpec("torchvision/resnet18", {}, "pretrained", "none", 0, 32)
    model = build_classifier(spec)
    assert torch.equal(model.body.conv1.weight, body.conv1.weight)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])  # not the spec's
    save_classifier(tmp_path, model)
    again, _ = load_classifier(tmp_path)
    assert torch.equal(again.body.layer4[1].conv2.weight, body.layer4[1].conv2.weight)


def test_weights_of_torchvision_that_are_out_of_reach_are_named_with_their_place(monkeypatch):
    def unreachable(*_args, **_options):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(InputError, match=r"resnet18-\w+\.pth and put it here as .*checkpoints/resnet18-\w+\.pth"):
        build_classifier(ClassifierSpec("torchvision/resnet18", {}, "pretrained", classes=1000))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("resnet50.a1_in1k", "supervised"),
        ("resnet50", "supervised"),
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", "supervised"),
        ("torchvision/swin_t", "supervised"),
        ("vit_small_patch14_dinov2.lvd142m", "self-supervised"),
        ("vit_base_patch16_224.mae", "self-supervised"),
        ("vit_base_patch16_clip_224.openai", "self-supervised"),
        ("vit_base_patch16_224.dino", "self-supervised"),
        ("convnextv2_nano.fcmae", "self-supervised"),
        ("convnextv2_nano.fcmae_ft_in1k", "supervised"),
        ("vit_base_patch16_clip_224.openai_ft_in1k", "supervised"),
    ],
)
def test_the_tag_of_its_weights_says_how_a_network_was_trained(name, training):
    assert training_of(name) == training


def test_a_tag_that_does_not_tell_asks_for_it_to_be_said():
    with pytest.raises(InputError, match="say it: training"):
        training_of("samvit_base_patch16.sa1b")


# ---- in a folder ------------------------------------------------------------------------------------------------


def test_a_saved_classifier_answers_the_same_and_remembers_what_was_said_of_it(tmp_path):
    model = build_classifier(TINY, seed=2).eval()
    save_classifier(tmp_path, model, {"label": "ResNet", "seed": 2})
    again, extra = load_classifier(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), again(images))
    assert extra == {"label": "ResNet", "seed": 2} and again.spec == TINY and not again.training


def test_damaged_folders_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"classifier\.json is missing"):
        load_classifier(tmp_path)
    save_classifier(tmp_path, build_classifier(TINY))
    whole = (tmp_path / "classifier.safetensors").read_bytes()
    (tmp_path / "classifier.safetensors").write_bytes(whole[:-8] + b"\0" * 7 + b"\1")
    with pytest.raises(InputError, match="is not the file that"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(whole)
    (tmp_path / "classifier.json").write_text("{")
    with pytest.raises(InputError, match=r"classifier\.json cannot be read"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text(json.dumps({"spec": {}}))
    with pytest.raises(InputError, match="does not describe a classifier"):
        load_classifier(tmp_path)


def test_the_real_mobilenet_knows_the_real_photographs(shared):
    weights = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    spec = ClassifierSpec(MOBILENET, {}, str(weights), "half", 1000, 224)
    photos = photo_set(shared / "data" / "imagenette128", "val")
    rows = list(range(0, 128, 4))
    images, labels = load_photos(photos, 224, rows)
    logits = predict(build_classifier(spec), images, 16)
    own = photos.imagenet_classes()
    assert accuracy(logits, own[rows]) > 0.5  # of 1000 classes; 0.711 on all 128 photographs
    ten = sorted(set(own.tolist()))
    assert accuracy(logits[:, ten], labels) > 0.9  # 0.984 on all 128


# ---- training ---------------------------------------------------------------------------------------------------


def test_what_a_linear_model_separates_is_learnt_in_full():
    images, labels = colours()
    recipe = ClassifierRecipe(epochs=20, batch_size=8, learning_rate=0.01, smallest_crop=0.5)
    model, history = train_classifier(TINY, (images, labels), (images, labels), recipe)
    assert accuracy(predict(model, images), labels) == 1.0 == history["val_accuracy"].iloc[-1]
    assert list(history["epoch"]) == list(range(1, 21)) and not model.training


def test_the_same_seed_gives_the_same_numbers():
    photos = colours(16)
    recipe = ClassifierRecipe(epochs=2, batch_size=8)
    runs = [train_classifier(TINY, photos, photos, recipe, seed) for seed in (0, 0, 1)]
    first, second = (model.state_dict() for model, _ in runs[:2])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert runs[0][1]["train_loss"].tolist() == runs[1][1]["train_loss"].tolist()
    assert runs[0][1]["train_loss"].tolist() != runs[2][1]["train_loss"].tolist()


def test_crops_show_a_part_of_the_picture_in_its_own_colours():
    ramp = torch.arange(64.0).expand(64, 64)
    images = torch.stack([ramp / 64, ramp.T / 64, torch.ones(64, 64)]).expand(200, 3, 64, 64)
    crops = crop_and_flip(images, 0.35, torch.Generator().manual_seed(0))
    assert torch.allclose(crops[:, 2], torch.ones(200, 64, 64))  # nothing from outside the picture
    wide = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) * 64 / 63
    high = (crops[:, 1, -1, 0] - crops[:, 1, 0, 0]) * 64 / 63
    flipped = (wide < 0).float().mean()
    assert 0.4 < flipped < 0.6 and (high > 0).all()
    area = wide.abs() * high
    assert 0.3 < area.min() < 0.45 and 0.9 < area.max() <= 1.05
    assert torch.equal(crop_and_flip(images, 1, torch.Generator()), images)


def test_bad_recipes_and_photographs_are_refused():
    images, labels = colours(16)
    for changes in ({"epochs": 0}, {"learning_rate": 0.0}, {"smallest_crop": 1.5}, {"warmup": 1.0}, {"temperature": 0}):
        with pytest.raises(InputError, match=next(iter(changes))):
            train_classifier(TINY, (images, labels), (images, labels), ClassifierRecipe(**changes))
    with pytest.raises(InputError, match="labels run from 0 to 11"):
        train_classifier(TINY, (images, labels * 11), (images, labels), ClassifierRecipe(epochs=1))
    with pytest.raises(InputError, match=r"uint8 \(N, 3, 32, 32\)"):
        train_classifier(TINY, (images.float(), labels), (images, labels), ClassifierRecipe(epochs=1))


def test_bfloat16_learns_as_well_and_auto_is_fp32_on_a_processor():
    photos = colours()
    recipe = ClassifierRecipe(epochs=8, batch_size=8, learning_rate=0.01, smallest_crop=0.5, precision="bf16")
    model, _ = train_classifier(TINY, photos, photos, recipe)
    assert accuracy(predict(model, photos[0]), photos[1]) > 0.9
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert precision_on(ClassifierRecipe(), torch.device("cpu")) == "fp32"
    assert precision_on(ClassifierRecipe(), torch.device("cuda")) == "bf16"
    assert precision_on(recipe, torch.device("cpu")) == "bf16"


def test_a_loss_that_is_no_number_ends_the_training():
    photos = colours(16)
    with pytest.raises(InputError, match="lower learning_rate"):
        train_classifier(TINY, photos, photos, ClassifierRecipe(epochs=3, batch_size=8, learning_rate=1e30, warmup=0))


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (5, 9), (700, 1000)])
def test_the_wilson_interval_is_scipys(right, count):
    theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
