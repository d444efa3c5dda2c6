"""Ten architectures by one name each: what they answer, where they are listened to, how they are saved and learn."""

import dataclasses

import pytest
import torch
from torchvision.models.segmentation import fcn_resnet50
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

import models
from answers import class_logits, decided, pixel_logits
from class_metrics import ce_dice
from model_sites import encoder_of, encoder_path
from model_spec import TITLES
from models import ModelSpec, build_model, check_batches, lesion_logits, load_model, save_model, set_loss, sites
from recipes import TrainConfig, objective
from similarity import record
from utils import InputError

ENCODERS = {
    "mask2former on a ViT": {"encoder": {"vit": "dinov2_tiny"}},
    "mask2former on a ViT, simple neck": {"encoder": {"vit": "clip_tiny", "neck": "simple"}},
    "mask2former on a CNN": {"encoder": {"cnn": "resnet18"}},
}
SPECS = {name: ModelSpec(name, "smoke") for name in TITLES}
SPECS |= {name: ModelSpec("mask2former", "smoke", options=options) for name, options in ENCODERS.items()}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=SPECS)
def model(request):
    return build_model(SPECS[request.param]).eval()


def test_there_is_a_title_for_every_model_and_a_model_for_every_title():
    assert set(TITLES) == set(models._BUILDERS)


@torch.no_grad()
def test_a_lesion_logit_for_every_pixel(model, images):
    logits = lesion_logits(model, images)
    assert logits.shape == (3, 1, 64, 64)
    both = class_logits(model, images).softmax(1)
    torch.testing.assert_close(both[:, 1:], logits.sigmoid())
    assert torch.equal(decided(logits)[:, 0] == 1, both[:, 1] > 0.5)


@torch.no_grad()
def test_only_the_row_of_the_image_that_differs_changes_at_every_site(model, images):
    other = images.clone()
    other[1] = other[1].flip(-1) * 0.5
    rows = [record(model, [(batch, ["a", "b", "c"])], policy="gap") for batch in (images, other)]
    assert rows[0].names and {site.part for site in rows[0].sites} == {"encoder", "decoder"}
    for name in rows[0].names:
        same = [torch.equal(rows[0][name][k], rows[1][name][k]) for k in range(3)]
        close = [torch.allclose(rows[0][name][k], rows[1][name][k], atol=1e-5) for k in range(3)]
        assert (close[0], close[2]) == (True, True), name
        assert not same[1], name


def test_sites_come_in_the_order_in_which_they_fire_with_encoder_first(model):
    parts = [site.part for site in sites(model, 64)]
    assert parts[0] == "encoder" and parts[-1] == "decoder" and len(parts) >= 4


@torch.no_grad()
def test_a_saved_model_answers_the_same(model, images, tmp_path):
    save_model(model, tmp_path)
    again, _ = load_model(tmp_path)
    assert torch.equal(lesion_logits(model, images), lesion_logits(again, images))


def test_a_frozen_encoder_is_the_encoder_alone(model, images):
    frozen = build_model(dataclasses.replace(model.spec, freeze=("encoder",))).train()
    prefix = encoder_path(frozen) + "."
    trains = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trains and not any(name.startswith(prefix) for name in trains)
    assert not encoder_of(frozen).training
    before = {name: value.clone() for name, value in encoder_of(frozen).state_dict().items()}
    pixel_logits(frozen, images)
    assert all(torch.equal(before[name], value) for name, value in encoder_of(frozen).state_dict().items())


@pytest.mark.parametrize("name", SPECS)
def test_several_classes_through_the_same_loss_and_answer(name, images):
    spec = dataclasses.replace(SPECS[name], classes=3)
    model = build_model(spec).train()
    masks = torch.randint(0, 3, (3, 1, 64, 64), generator=torch.Generator().manual_seed(1))
    masks[0, 0, :5] = 255
    loss = set_loss(model, images, masks) if spec.name == "mask2former" else ce_dice(pixel_logits(model, images), masks)
    loss.backward()
    assert torch.isfinite(loss)
    with torch.no_grad():
        logits = class_logits(model.eval(), images)
    assert logits.shape == (3, 3, 64, 64) and set(decided(logits).unique().tolist()) <= {0, 1, 2}
    with pytest.raises(InputError, match="3 classes, not one lesion"):
        lesion_logits(model, images)


def test_the_set_loss_of_three_classes_is_the_librarys(images):
    model = build_model(ModelSpec("mask2former", "smoke", classes=3)).eval()
    masks = torch.randint(0, 3, (3, 1, 64, 64), generator=torch.Generator().manual_seed(2))
    masks[2] = 1  # an image without the others
    present = [masks[k].unique() for k in range(3)]
    targets = [torch.cat([(masks[k] == label).float() for label in present[k]]) for k in range(3)]
    output = model(images, output_auxiliary_logits=True)
    points = max(models.mask2former_model.MASK2FORMER_PRESETS["smoke"]["train_num_points"], 0)
    assert points == model.criterion.num_points  # below the least that is ever taken, so both look at as many
    library = Mask2FormerLoss(model.config, model.weight_dict)
    torch.manual_seed(0)
    theirs = library(
        output.masks_queries_logits,
        output.class_queries_logits,
        targets,
        list(present),
        [{k: v for k, v in layer.items()} for layer in output.auxiliary_logits],
    )
    weighted = sum(
        value * next(weight for key, weight in model.weight_dict.items() if key in name)
        for name, value in theirs.items()
    )
    torch.manual_seed(0)
    ours = set_loss(model, images, masks)
    torch.testing.assert_close(ours, weighted, rtol=1e-4, atol=1e-4)


def test_the_full_fcn_is_torchvisions():
    ours = build_model(ModelSpec("fcn", "isic2018", normalization="none")).eval()
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=1, aux_loss=False).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(lesion_logits(ours, images), theirs(images)["out"])


def test_segformer_is_loaded_from_a_folder_in_the_hubs_format(tmp_path, images):
    config = SegformerConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32, num_labels=150)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    kept = SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    model = build_model(ModelSpec("segformer", str(tmp_path), "imagenet"))
    ours, theirs = model.segformer.state_dict(), kept.segformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lesion_logits(model.eval(), images).shape == (3, 1, 64, 64)  # the head of 150 labels made way for one


def test_another_models_folder_is_no_segformer(tmp_path):
    build_model(ModelSpec("mask2former", "smoke")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is no SegFormer"):
        build_model(ModelSpec("segformer", str(tmp_path), "imagenet"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ModelSpec("unett", "smoke"), "unknown model 'unett'; closest: 'unet'"),
        (ModelSpec("fpn", "resnet19"), "unknown fpn preset or encoder 'resnet19'; closest: 'resnet1"),
        (ModelSpec("fpn", "smoke", options={"decoder_channel": 3}), "unknown model option 'decoder_channel'"),
        (ModelSpec("fcn", "smok"), "unknown fcn preset 'smok'; closest: 'smoke'"),
        (ModelSpec("fcn", "smoke", "imagenet"), "has no pretrained weights"),
        (ModelSpec("fcn", "smoke", options={"layers": [1]}), "2 to 4 layers"),
        (ModelSpec("segformer", "smok"), "unknown segformer preset 'smok'"),
        (ModelSpec("segformer", "smoke", "imagenet"), "has no pretrained weights"),
        (ModelSpec("unet", "smoke", classes=2), "classes must be 1"),
        (ModelSpec("mask2former", "smoke", answer="query:1", classes=3), "one mask; 3 classes need 'semantic'"),
        (ModelSpec("mask2former", "smoke", options={"encoder": "clip"}), "give {'cnn'"),
        (
            ModelSpec("mask2former", "smoke", options={"encoder": {"vit": "vit_bas_patch16_224"}}),
            "vit_base_patch16_224",
        ),
        (ModelSpec("mask2former", "smoke", options={"encoder": {"cnn": "resnet19"}}), "resnet1"),
        (
            ModelSpec(
                "mask2former", "smoke", options={"encoder": {"vit": "clip_tiny", "taps": [0.25, 0.5, 0.75, 1.5]}}
            ),
            r"taps must be four increasing fractions of depth in \(0, 1\]",
        ),
        (
            ModelSpec(
                "mask2former", "smoke", freeze=("encoder",), options={"encoder": {"vit": "clip_tiny", "adapters": 2}}
            ),
            "leave freeze out",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_closest(spec, said):
    with pytest.raises(InputError, match=said):
        build_model(spec)


def test_a_patch_that_does_not_divide_the_image_names_the_sizes_that_it_does():
    model = build_model(ModelSpec("mask2former", "smoke", options={"encoder": {"vit": "dinov2_tiny14"}}))
    with pytest.raises(InputError, match="126 or 140"):
        models.check_image_size(model, 128, 128)
    with pytest.raises(InputError, match="126 or 140"):
        lesion_logits(model, torch.zeros(1, 3, 128, 128))
    models.check_image_size(model, 126, 126)


def test_one_image_left_over_is_refused_where_it_cannot_be_trained_on():
    model = build_model(ModelSpec("deeplabv3plus", "smoke"))
    with pytest.raises(InputError, match="17 training images in batches of 16 leave one over"):
        check_batches(model, 17, 16)
    check_batches(model, 18, 16)
    check_batches(build_model(ModelSpec("fpn", "smoke")), 17, 16)


@pytest.mark.parametrize(("loss", "classes"), [("dice_bce", 3), ("ce_dice", 1)])
def test_a_loss_of_another_number_of_classes_is_refused(loss, classes, tmp_path):
    names = ["a", "b", "c"] if classes == 3 else []
    config = TrainConfig(model="unet", loss=loss, classes=names, layout="folder", data=str(tmp_path))
    with pytest.raises(InputError, match=f"loss '{loss}' does not fit"):
        objective(config)
