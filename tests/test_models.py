"""Models: built, normalised once, frozen by module, asked for lesion logits, saved, loaded and listened to."""

import copy
import dataclasses
import json
import math
import pickle
import re
import shutil

import pytest
import segmentation_models_pytorch as smp
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
    SwinModel,
)

import model_sites
from answers import maps_of
from models import (
    NORMALIZATIONS,
    ModelSpec,
    build_model,
    lesion_logits,
    load_model,
    parameter_count,
    save_model,
    set_loss,
)
from utils import InputError
from weights import load_state, read_state

UNETPP = ModelSpec("unetpp", "smoke")
MASK2FORMER = ModelSpec("mask2former", "smoke")
MOBILENET = {"encoder_name": "mobilenet_v2", "decoder_channels": [16, 8, 8, 8, 8]}
# written by hand from transformers 4.57's Swin, the other way round than the rules of model_sites
OLD_NAMES = (
    ("pixel_level_module.encoder.swin.", "pixel_level_module.encoder."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".attention.q_proj.", ".attention.self.query."),
    (".attention.k_proj.", ".attention.self.key."),
    (".attention.v_proj.", ".attention.self.value."),
    (".attention.relative_position_bias.relative_position_bias_table", ".attention.self.relative_position_bias_table"),
)
MASK_EMBEDDER = "model.transformer_module.decoder.mask_predictor.mask_embedder"

needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="tells of what transformers 5 renamed"
)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def unetpp():
    return build_model(UNETPP).eval()


@pytest.fixture(scope="module")
def mask2former():
    return build_model(MASK2FORMER).eval()


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A Mask2Former of 150 labels in the hub's own format, as ADE checkpoints are, with random weights."""
    swin = SwinConfig(
        out_features=["stage1", "stage2", "stage3", "stage4"],
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
    )
    torch.manual_seed(11)
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=150,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        dim_feedforward=64,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=7,
        num_attention_heads=4,
        train_num_points=256,
    )
    folder = tmp_path_factory.mktemp("hub") / "ade"
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def old_spelling(state: dict) -> dict:
    """A state as transformers 4 would have written it: its Swin backbone had no last norm."""
    renamed = {}
    for key, tensor in state.items():
        if "encoder.swin.layernorm" in key:
            continue
        for new, old in OLD_NAMES if "pixel_level_module.encoder" in key else ():
            key = key.replace(new, old)
        renamed[key] = tensor.clone()
    return renamed


# ------------------------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("normalization", ["imagenet", "half", "none"])
def test_unetpp_normalises_its_input_exactly_once(images, normalization):
    model = build_model(dataclasses.replace(UNETPP, normalization=normalization)).eval()
    twin = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1, decoder_channels=[32, 16, 16, 8, 8]).eval()
    twin.load_state_dict(model.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS[normalization])
    with torch.no_grad():
        torch.testing.assert_close(lesion_logits(model, images), twin((images - mean) / std))


def test_mask2former_normalises_its_input_exactly_once_by_position_and_by_name(images, mask2former):
    twin = Mask2FormerForUniversalSegmentation(mask2former.config).eval()
    twin.load_state_dict(mask2former.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    with torch.no_grad():
        expected = twin((images - mean) / std).masks_queries_logits
        torch.testing.assert_close(mask2former(images).masks_queries_logits, expected)
        torch.testing.assert_close(mask2former(pixel_values=images).masks_queries_logits, expected)


def test_the_normalisations_are_the_published_ones():
    assert NORMALIZATIONS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (values[0] for values in NORMALIZATIONS["half"])
    for x in (0, 128, 255):
        assert (x / 255 - mean) / std == pytest.approx((x - 128) / 128)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 64, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_images_of_another_kind_are_refused(unetpp, mask2former, bad):
    for model in (unetpp, mask2former):
        with pytest.raises(InputError, match="images must be float"):
            lesion_logits(model, bad)


def test_sizes_that_do_not_halve_are_refused_with_the_next_one_that_does(unetpp):
    with pytest.raises(InputError, match=r"multiples of 32 pixels, got 100×100; use --image_size 96"):
        lesion_logits(unetpp, torch.zeros(1, 3, 100, 100))


def test_a_single_image_too_small_to_normalise_is_refused(mask2former):
    with pytest.raises(InputError, match=r"one image of 32×32 pixels is too small .* use --image_size 64"):
        lesion_logits(mask2former, torch.zeros(1, 3, 32, 32))
    lesion_logits(mask2former, torch.zeros(2, 3, 32, 32))


def test_the_seed_alone_decides_the_random_weights():
    for spec in (UNETPP, MASK2FORMER):
        first, again, other = (build_model(spec, seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert any(not torch.equal(first[key], other[key]) for key in first)


# ----------------------------------------------------------------------------------------------------- what comes out


def test_lesion_logits_are_the_log_odds_of_the_semantic_inference(images, mask2former):
    small = images[..., :32, :32]
    with torch.no_grad():
        output = mask2former(small)
        got = lesion_logits(mask2former, small)
    classes = output.class_queries_logits.double().softmax(-1)
    masks = output.masks_queries_logits.double().sigmoid()
    score = torch.einsum("bqc,bqhw->bchw", classes[..., :2], masks)  # without 'no object'
    naive = torch.log(score[:, 1]) - torch.log(score[:, 0])
    upsampled = torch.nn.functional.interpolate(naive[:, None], size=(32, 32), mode="bilinear")
    torch.testing.assert_close(got.double(), upsampled, atol=1e-5, rtol=1e-5)


def test_the_sign_of_lesion_logits_is_the_librarys_own_semantic_map(images, mask2former):
    with torch.no_grad():
        output = mask2former(images)
        mine = _at_mask_resolution(mask2former, images)
    processor = Mask2FormerImageProcessor()
    resized = processor.post_process_semantic_segmentation(output)  # at 384×384, the library's own choice
    logits = torch.nn.functional.interpolate(mine, size=resized[0].shape, mode="bilinear", align_corners=False)
    assert mine.shape[-1] == 16
    for theirs, log_odds in zip(resized, logits[:, 0]):
        assert ((log_odds > 0) == (theirs == 1)).float().mean() > 0.97  # log-odds and scores are blended differently
    # and exactly, where nothing is resized
    score = torch.einsum(
        "bqc,bqhw->bchw", output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
    )
    assert torch.equal(score.argmax(1) == 1, mine[:, 0] > 0)


def _at_mask_resolution(model, images):
    return maps_of(model.spec, model(images))


def test_extreme_logits_stay_finite(mask2former):
    output = {
        "class_queries_logits": torch.tensor([[[-300.0, 300.0, 0.0]]]),
        "masks_queries_logits": torch.full((1, 1, 2, 2), -500.0),
    }
    torch.testing.assert_close(maps_of(mask2former.spec, output), torch.full((1, 1, 2, 2), 600.0))


def test_one_query_can_be_the_answer(images):
    model = build_model(dataclasses.replace(MASK2FORMER, answer="query:1")).eval()
    with torch.no_grad():
        masks = model(images).masks_queries_logits[:, 1:2]
        expected = torch.nn.functional.interpolate(masks, size=(64, 64), mode="bilinear")
        torch.testing.assert_close(lesion_logits(model, images), expected)


def test_a_query_the_model_does_not_have_is_refused():
    with pytest.raises(InputError, match="has 5 queries, numbered from 0"):
        build_model(dataclasses.replace(MASK2FORMER, answer="query:5"))
    for answer in ("query:", "query:-1", "panoptic"):
        with pytest.raises(InputError, match="unknown answer"):
            build_model(dataclasses.replace(MASK2FORMER, answer=answer))


@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_logits_have_the_images_size(unetpp, mask2former, size):
    for model in (unetpp, mask2former):
        with torch.no_grad():
            assert lesion_logits(model, torch.rand(1, 3, *size)).shape == (1, 1, *size)


# --------------------------------------------------------------------------------------------------------- set loss


def masks_of_three_kinds() -> torch.Tensor:
    masks = torch.zeros(3, 1, 64, 64)
    masks[0, :, 10:40, 20:50] = 1
    masks[2] = 1
    return masks  # a lesion, an empty mask, a full one


def test_set_loss_is_the_librarys_loss_for_background_and_lesion(images):
    model = build_model(MASK2FORMER).train()
    masks = masks_of_three_kinds()[:2]
    torch.manual_seed(0)
    mine = set_loss(model, images, masks)
    twin = Mask2FormerForUniversalSegmentation(model.config).train()
    twin.load_state_dict(model.state_dict())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    torch.manual_seed(0)
    theirs = twin(
        (images - mean) / std,
        mask_labels=[torch.stack([1 - masks[0, 0], masks[0, 0]]), torch.ones(1, 64, 64)],
        class_labels=[torch.tensor([0, 1]), torch.tensor([0])],
    ).loss
    torch.testing.assert_close(mine, theirs.sum())
    mine.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [1, 2], [0, 1, 2]])
def test_empty_and_full_masks_have_a_finite_set_loss(chosen):
    model = build_model(MASK2FORMER).train()
    loss = set_loss(model, torch.rand(len(chosen), 3, 64, 64), masks_of_three_kinds()[chosen])
    assert loss.ndim == 0 and loss.isfinite()
    loss.backward()


def test_set_loss_needs_queries(unetpp, images):
    with pytest.raises(InputError, match="use scaled_dice, dice_bce or ce_dice"):
        set_loss(unetpp, images, torch.zeros(2, 1, 64, 64))


# ---------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("spec", [UNETPP, MASK2FORMER])
def test_a_frozen_encoders_whole_state_survives_training(spec):
    model = build_model(dataclasses.replace(spec, freeze=("encoder",)))
    encoder = model_sites.encoder_of(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(2):
        model.train()
        assert not any(module.training for module in encoder.modules())
        images = torch.rand(2, 3, 64, 64) * (step + 1) / 2
        masks = masks_of_three_kinds()[[0, 0]]
        logits = None if spec is MASK2FORMER else lesion_logits(model, images)
        loss = set_loss(model, images, masks) if logits is None else ((logits - masks) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = model.state_dict()
    prefix = "encoder." if spec is UNETPP else "model.pixel_level_module.encoder."
    assert {key for key in before if key.startswith(prefix)} == {prefix + key for key in encoder.state_dict()}
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith(prefix))
    assert any(not torch.equal(before[key], after[key]) for key in before if not key.startswith(prefix))


def test_unfrozen_batch_norm_does_drift_in_train_mode():
    model = build_model(UNETPP).train()
    before = model.encoder.bn1.running_mean.clone()
    lesion_logits(model, torch.rand(2, 3, 32, 32))
    assert not torch.equal(before, model.encoder.bn1.running_mean)


def test_freezing_the_encoder_leaves_the_pixel_decoders_own_encoder_training(images):
    model = build_model(dataclasses.replace(MASK2FORMER, freeze=("encoder",))).train()
    pixel = model.model.pixel_level_module.decoder.encoder
    assert all(parameter.requires_grad for parameter in pixel.parameters())
    assert all(module.training for module in pixel.modules())
    before = {key: value.clone() for key, value in pixel.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-1)
    set_loss(model, images, masks_of_three_kinds()[[0, 0]]).backward()
    optimizer.step()
    changed = [key for key, value in pixel.state_dict().items() if not torch.equal(before[key], value)]
    assert len(changed) > len(before) / 2
    total, trainable = parameter_count(model)
    assert total - trainable == sum(p.numel() for p in model.model.pixel_level_module.encoder.parameters())


def test_frozen_statistics_stay_while_every_parameter_trains():
    model = build_model(dataclasses.replace(UNETPP, freeze=("encoder_statistics",))).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    lesion_logits(model, torch.rand(2, 3, 64, 64)).sum().backward()
    same = {name: torch.equal(buffer, before[name]) for name, buffer in model.named_buffers()}
    assert all(kept == name.startswith("encoder.") for name, kept in same.items() if "running" in name)
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_only_roles_can_be_frozen():
    with pytest.raises(InputError, match="can freeze 'encoder' or 'encoder_statistics', not 'decoder'"):
        build_model(dataclasses.replace(UNETPP, freeze=("decoder",)))


# ----------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize(
    "spec",
    [
        UNETPP,
        MASK2FORMER,
        ModelSpec("unetpp", "efficientnet-b0", normalization="half", options={"decoder_channels": [16, 8, 8, 8, 8]}),
        ModelSpec("mask2former", "smoke", answer="query:2", freeze=("encoder",), options={"num_queries": 3}),
    ],
)
def test_a_saved_model_gives_identical_outputs(tmp_path, images, spec):
    model = build_model(spec, seed=3)
    model.train()
    with torch.no_grad():
        model(images)  # so that running statistics differ from fresh ones
    model.eval()
    save_model(model, tmp_path / "kept", {"transform": {"size": 64}})
    loaded, extra = load_model(tmp_path / "kept")
    assert not loaded.training and loaded.spec == spec and extra == {"transform": {"size": 64}}
    with torch.no_grad():
        assert torch.equal(lesion_logits(model, images), lesion_logits(loaded, images))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["model.json", "model.safetensors"]


def test_a_hub_folder_is_loaded_and_its_copy_outlives_it(tmp_path, hub_folder, images):
    folder = tmp_path / "ade"
    shutil.copytree(hub_folder, folder)
    published = load_file(folder / "model.safetensors")
    model = build_model(ModelSpec("mask2former", str(folder), weights="imagenet")).eval()
    state = model.state_dict()
    head = {"class_predictor.weight", "class_predictor.bias", "criterion.empty_weight"}
    source = Mask2FormerForUniversalSegmentation.from_pretrained(folder).state_dict()
    assert set(source) == set(state) and len(published) > 100
    assert all(torch.equal(state[key], source[key]) for key in set(state) - head)
    assert state["class_predictor.weight"].shape == (3, 32)
    assert state["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 0.1])  # not what was in memory
    with torch.no_grad():
        before = lesion_logits(model, images)
    save_model(model, tmp_path / "kept")
    shutil.rmtree(folder)
    loaded, _ = load_model(tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(before, lesion_logits(loaded, images))
    torch.manual_seed(0)
    mine = set_loss(model, images, masks_of_three_kinds()[:2])
    torch.manual_seed(0)
    torch.testing.assert_close(mine, set_loss(loaded, images, masks_of_three_kinds()[:2]))


def test_a_hub_folder_as_weights_is_the_same_model(hub_folder, images):
    by_preset = build_model(ModelSpec("mask2former", str(hub_folder), weights="imagenet")).eval()
    by_weights = build_model(ModelSpec("mask2former", "smoke", weights=str(hub_folder))).eval()
    with torch.no_grad():
        assert torch.equal(lesion_logits(by_preset, images), lesion_logits(by_weights, images))


def test_a_hub_folder_without_its_weights_is_only_an_architecture(hub_folder):
    model = build_model(ModelSpec("mask2former", str(hub_folder), weights="none"))
    published = load_file(hub_folder / "model.safetensors")
    key = "model.transformer_module.queries_features.weight"
    assert model.config.num_labels == 2 and model.config.num_queries == 7
    assert not torch.equal(model.state_dict()[key], published[key])


def test_a_hub_folder_in_the_old_spelling_is_loaded(tmp_path, hub_folder, images):
    """Published checkpoints were written by transformers 4."""
    folder = tmp_path / "old"
    shutil.copytree(hub_folder, folder)
    state = old_spelling(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    new, old = (build_model(ModelSpec("mask2former", str(path), weights="imagenet")) for path in (hub_folder, folder))
    with torch.no_grad():
        assert torch.equal(lesion_logits(new.eval(), images), lesion_logits(old.eval(), images))


@needs_transformers_5
def test_the_norm_that_old_checkpoints_lack_changes_no_output(mask2former, images):
    model = copy.deepcopy(mask2former)
    norm = model.model.pixel_level_module.encoder.swin.layernorm
    with torch.no_grad():
        norm.weight.fill_(3)
        assert torch.equal(lesion_logits(model, images), lesion_logits(mask2former, images))


def test_a_hub_folder_of_another_kind_of_model_is_refused(tmp_path):
    """The library itself would build a Mask2Former of random weights from it, with a warning."""
    SwinModel(SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2])).save_pretrained(tmp_path / "swin")
    with pytest.raises(InputError, match="is no Mask2Former with a Swin encoder"):
        build_model(ModelSpec("mask2former", str(tmp_path / "swin"), weights="imagenet"))


def test_a_hub_folder_with_lost_tensors_is_refused(tmp_path, hub_folder):
    folder = tmp_path / "lost"
    shutil.copytree(hub_folder, folder)
    state = load_file(folder / "model.safetensors")
    del state["model.transformer_module.queries_features.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors, first 'model.transformer_module.queries_features.weight'"):
        build_model(ModelSpec("mask2former", str(folder), weights="imagenet"))


def test_options_that_a_pretrained_model_would_ignore_are_refused(hub_folder):
    for spec in (
        ModelSpec("mask2former", str(hub_folder), weights="imagenet", options={"num_queries": 9}),
        ModelSpec("mask2former", str(hub_folder), options={"num_queries": 9}),
        ModelSpec("mask2former", "smoke", weights=str(hub_folder), options={"num_queries": 9}),
    ):
        with pytest.raises(InputError, match=r"num_queries.*leave them out"):
            build_model(spec)


@pytest.mark.parametrize("damage", ["{", "[]", '{"spec": {"name": "unetpp", "colour": 1}}', '{"spec": 3}', "{}"])
def test_a_damaged_description_is_refused(tmp_path, unetpp, damage):
    save_model(unetpp, tmp_path / "kept")
    (tmp_path / "kept" / "model.json").write_text(damage)
    with pytest.raises(InputError, match=r"model\.json is damaged"):
        load_model(tmp_path / "kept")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, unetpp, mask2former):
    save_model(unetpp, tmp_path / "a")
    save_model(mask2former, tmp_path / "b")
    shutil.copy(tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors")
    with pytest.raises(InputError, match="is of another architecture than this Mask2Former"):
        load_model(tmp_path / "b")
    with pytest.raises(InputError, match="fits neither the encoder nor the whole model"):
        build_model(dataclasses.replace(MASK2FORMER, weights=str(tmp_path / "a" / "model.safetensors")))
    wider = dataclasses.replace(UNETPP, weights=str(tmp_path / "a" / "model.safetensors"))
    with pytest.raises(InputError, match="of another architecture"):
        build_model(dataclasses.replace(wider, options={"decoder_channels": [32, 16, 16, 16, 8]}))


# ------------------------------------------------------------------------------------------------------ weights: files


def test_a_truncated_checkpoint_is_refused(tmp_path, unetpp):
    save_model(unetpp, tmp_path / "kept")
    path = tmp_path / "kept" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        load_model(tmp_path / "kept")
    path.unlink()
    with pytest.raises(InputError, match="does not exist"):
        load_model(tmp_path / "kept")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b".", b"hello", b"PK\x03\x04rest", bytes(range(256)), b"\x80\x04]."])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content, suffix):
    (tmp_path / f"bad{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\{suffix}"):
        read_state(tmp_path / f"bad{suffix}")


def test_a_checkpoint_of_something_else_than_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "notes.pth")
    with pytest.raises(InputError, match="is not a state dict of tensors"):
        read_state(tmp_path / "notes.pth")


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, write):
    victim = tmp_path / "executed"
    write({"weight": _Attack(victim)}, tmp_path / "gift.pth")
    with pytest.raises(InputError, match=r"gift\.pth cannot be read as a checkpoint"):
        build_model(dataclasses.replace(UNETPP, weights=str(tmp_path / "gift.pth")))
    assert not victim.exists()


@pytest.mark.parametrize("wrap", [False, True])
def test_a_legacy_pth_of_the_whole_model_is_loaded(tmp_path, images, wrap):
    model = build_model(UNETPP, seed=4).eval()
    torch.save({"state_dict": model.state_dict()} if wrap else model.state_dict(), tmp_path / "old.pth")
    again = build_model(dataclasses.replace(UNETPP, weights=str(tmp_path / "old.pth"))).eval()
    with torch.no_grad():
        assert torch.equal(lesion_logits(model, images), lesion_logits(again, images))


def test_a_legacy_pth_in_the_old_spelling_is_loaded(tmp_path, images):
    model = build_model(MASK2FORMER, seed=4).eval()
    state = old_spelling(model.state_dict())
    assert "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight" in state
    assert "model.pixel_level_module.encoder.encoder.layers.2.blocks.0.output.dense.weight" in state
    torch.save(state, tmp_path / "old.pth")
    again = build_model(dataclasses.replace(MASK2FORMER, weights=str(tmp_path / "old.pth"))).eval()
    with torch.no_grad():
        assert torch.equal(lesion_logits(model, images), lesion_logits(again, images))


@needs_transformers_5
def test_a_legacy_pth_with_the_old_index_buffers_is_loaded(tmp_path):
    model = build_model(MASK2FORMER, seed=4)
    state = old_spelling(model.state_dict())
    for key in list(state):
        if key.endswith("relative_position_bias_table"):
            state[key.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    torch.save(state, tmp_path / "old.pth")
    again = build_model(dataclasses.replace(MASK2FORMER, weights=str(tmp_path / "old.pth")))
    own = {key: value for key, value in model.state_dict().items() if "encoder.swin.layernorm" not in key}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in own.items())


def test_encoder_files_load_and_leave_their_classifier_out(tmp_path):
    source = smp.encoders.get_encoder("resnet18", weights=None)
    state = {key: value.clone() for key, value in source.state_dict().items()}
    save_file(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "e.safetensors")
    model = build_model(dataclasses.replace(UNETPP, weights=str(tmp_path / "e.safetensors")))
    assert all(torch.equal(value, model.encoder.state_dict()[key]) for key, value in state.items())


def test_an_encoder_file_of_other_widths_is_refused(tmp_path):
    state = build_model(UNETPP).encoder.state_dict()
    state = {key: (value[:1] if value.ndim == 4 else value).contiguous() for key, value in state.items()}
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"narrow\.safetensors: .*another encoder"):
        build_model(dataclasses.replace(UNETPP, weights=str(tmp_path / "narrow.safetensors")))


def test_the_real_mobilenet_loads_into_its_encoder(shared, tmp_path, images):
    file = shared / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not file.is_file():
        pytest.skip("the MobileNetV2 file is not at hand")
    spec = ModelSpec("unetpp", "smoke", weights=str(file), normalization="half", options=MOBILENET)
    model = build_model(spec).eval()
    published, mine = load_file(file), model.encoder.state_dict()
    assert len(mine) == 312 and all(torch.equal(published[key], mine[key]) for key in mine)
    save_file({f"encoder.{k}": v.clone() for k, v in mine.items()}, tmp_path / "prefixed.safetensors")
    with pytest.raises(InputError, match=r"prefixed\.safetensors is of another architecture .* missing"):
        build_model(dataclasses.replace(spec, weights=str(tmp_path / "prefixed.safetensors")))
    save_model(model, tmp_path / "kept")
    loaded, _ = load_model(tmp_path / "kept")  # the file it started from is no longer asked for
    with torch.no_grad():
        assert torch.equal(lesion_logits(model, images), lesion_logits(loaded, images))
    with pytest.raises(InputError, match=r"fits neither|another architecture|another encoder"):
        build_model(dataclasses.replace(UNETPP, weights=str(file)))


@pytest.mark.parametrize(
    ("spec", "repository"),
    [
        (ModelSpec("unetpp", "isic2018", weights="imagenet"), "smp-hub/resnet34.imagenet"),
        (ModelSpec("unetpp", "tu-resnet18d", weights="imagenet"), "timm/resnet18d"),
        (
            ModelSpec("mask2former", "isic2018", weights="imagenet"),
            "facebook/mask2former-swin-base-IN21k-ade-semantic",
        ),
        (ModelSpec("mask2former", "owner/name", weights="imagenet"), "owner/name"),
    ],
)
def test_offline_the_error_names_the_file_its_place_and_the_way_round(spec, repository, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as caught:
        build_model(spec)
    message = str(caught.value)
    assert repository in message and "--weights none" in message
    assert f"models--{repository.replace('/', '--')}" in message


def test_the_isic2018_presets_need_no_network_without_weights():
    with torch.device("meta"):
        model = build_model(ModelSpec("mask2former", "isic2018"))
    backbone = model.config.backbone_config
    assert (backbone.embed_dim, backbone.depths, backbone.window_size) == (128, [2, 2, 18, 2], 12)
    assert model.config.num_labels == 2 and model.config.num_queries == 100
    total, _ = parameter_count(model)
    assert 106e6 < total < 108e6  # the published model has 107 M


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec("unetppp", "demo"), "unknown model 'unetppp'; closest: 'unetpp'"),
        (ModelSpec("unetpp", "demoo"), "closest: 'demo'"),
        (ModelSpec("unetpp", "resnet35"), "'resnet34'"),
        (ModelSpec("unetpp", "demo", options={"encoder_name": "resnet35"}), "unknown encoder 'resnet35'.*'resnet34'"),
        (ModelSpec("unetpp", "demo", options={"encoder_nam": "resnet34"}), "unknown model option .*'encoder_name'"),
        (ModelSpec("unetpp", "demo", options={"decoder_channels": [8, 8]}), "cannot be built: .*decoder_channels"),
        (ModelSpec("unetpp", "mit_b0"), "'mit_b0'.*cannot be built"),
        (ModelSpec("unetpp", "tu-nosuch"), "'tu-nosuch'.*cannot be built"),
        (ModelSpec("mask2former", "smok"), "closest: 'smoke'.*'owner/name'"),
        (ModelSpec("mask2former", "smoke", options={"querys": 1}), "unknown model option 'querys'"),
        (ModelSpec("mask2former", "smoke", options={"hidden_dim": 30}), "cannot be built: .*30"),
        (ModelSpec("mask2former", "smoke", weights="imagenet"), "has no pretrained weights"),
        (ModelSpec("unetpp", "smoke", weights="nowhere.pth"), "nowhere.pth does not exist"),
        (ModelSpec("unetpp", "smoke", normalization="imagnet"), "unknown normalization .*'imagenet'"),
    ],
)
def test_unknown_names_are_refused_with_the_closest_ones(spec, words):
    with pytest.raises(InputError, match=words):
        build_model(spec)


# -------------------------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.layer3", (256, 8, 8)),
        ("encoder.layer4", (512, 4, 4)),
        ("decoder.blocks.x_1_1.conv1", (128, 16, 16)),
        ("segmentation_head.0", (1, 128, 128)),
    ],
)
def test_the_published_unetpp_sites_have_their_published_shapes(name, shape):
    model = build_model(ModelSpec("unetpp", "isic2018"))
    (site,) = model_sites.list_sites(model, torch.zeros(1, 3, 128, 128), [model_sites.declare_site(model, name)])
    assert site.name == name and site.shape == shape
    assert site.axes == ("batch", "channel", "height", "width")


@pytest.mark.parametrize(
    ("old", "new", "axes"),
    [
        (
            "model.pixel_level_module.encoder.embeddings.norm",
            "model.pixel_level_module.encoder.swin.embeddings.norm",
            ("batch", "token", "channel"),
        ),
        (
            "model.pixel_level_module.encoder.encoder.layers.2.blocks.0.output.dense",
            "model.pixel_level_module.encoder.swin.encoder.layers.2.blocks.0.mlp.fc2",
            ("batch", "token", "channel"),
        ),
        *[(f"{MASK_EMBEDDER}.{i}.0", f"{MASK_EMBEDDER}.{i}.0", ("batch", "query", "channel")) for i in range(3)],
    ],
)
def test_both_spellings_of_the_published_mask2former_sites_resolve(mask2former, old, new, axes):
    first, second = (model_sites.declare_site(mask2former, name) for name in (old, new))
    assert first == second and first.axes == axes
    assert model_sites.declare_site(mask2former, f"{old}@0").name == f"{first.name}@0"
    shape = model_sites.list_sites(mask2former, torch.zeros(1, 3, 64, 64), [first])[0].shape
    assert len(shape) == 2


def test_sites_come_in_execution_order_with_axes_shapes_and_parts(unetpp, mask2former):
    for model in (unetpp, mask2former):
        listed = model_sites.sites(model, 64)
        assert [site.name for site in listed] == [site.name for site in model_sites.default_sites(model)]
        assert {site.part for site in listed} == {"encoder", "decoder"}
        assert all(len(site.shape) == len(site.axes) - 1 and math.prod(site.shape) > 1 for site in listed)
        parts = [site.part for site in listed]
        assert parts == sorted(parts, key=["encoder", "decoder"].index)  # encoders run first
    fired, handles = [], []
    for name, module in unetpp.decoder.blocks.named_children():
        handles.append(module.register_forward_hook(lambda *_, name=name: fired.append(f"decoder.blocks.{name}")))
    with torch.no_grad():
        unetpp(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert [site.name for site in model_sites.sites(unetpp, 64) if site.part == "decoder"] == fired
    assert fired != [f"decoder.blocks.{name}" for name in unetpp.decoder.blocks._modules]  # nor the modules' order


def test_an_unknown_site_names_the_closest(mask2former, unetpp):
    with pytest.raises(ValueError, match=r"unknown site 'encoder\.layer9'.*'encoder\.layer\d'"):
        model_sites.declare_site(unetpp, "encoder.layer9")
    with pytest.raises(ValueError, match="closest"):
        model_sites.declare_site(mask2former, "model.pixel_level_module.encoder.nothing")


def test_other_encoders_have_sites_too():
    for encoder in ("mobilenet_v2", "efficientnet-b0"):
        model = build_model(ModelSpec("unetpp", encoder, options={"decoder_channels": [16, 8, 8, 8, 8]}))
        listed = model_sites.sites(model, 64)
        assert len([site for site in listed if site.part == "encoder"]) >= 4


def test_checkpoints_are_described_in_plain_json(tmp_path, mask2former):
    save_model(mask2former, tmp_path / "kept")
    stored = json.loads((tmp_path / "kept" / "model.json").read_text())
    assert stored["spec"]["name"] == "mask2former" and stored["config"]["num_queries"] == 5
    assert not re.search(r"object at 0x", json.dumps(stored))


def test_loading_state_lists_what_differs(tmp_path, unetpp):
    state = {key: value.clone() for key, value in unetpp.state_dict().items()}
    del state["encoder.conv1.weight"]
    save_file(state | {"extra.weight": torch.zeros(1)}, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"2 differences, first encoder\.conv1\.weight is missing; extra\.weight is"):
        load_state(unetpp, tmp_path / "s.safetensors")
