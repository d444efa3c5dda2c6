"""Encoders under Mask2Former: Vision Transformers of timm and CNNs of segmentation-models-pytorch as backbones."""

import json
import logging
import math
import sys

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from timm.layers import LayerScale
from torch import nn
from transformers import AutoBackbone, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

import cnn_encoders
from cnn_encoders import ConvPyramid, ConvPyramidConfig, load_conv_weights
from utils import InputError
from vit_encoders import (
    PRESETS,
    SimpleNeck,
    TapNeck,
    TappedViT,
    ViTPyramid,
    ViTPyramidConfig,
    add_adapters,
    body_geometry,
    check,
    check_image_size,
    tap_blocks,
)
from vit_weights import folder_encoder, load_vit_weights

CLIP, DINOV2, MAE = "vit_base_patch16_clip_quickgelu_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_224"
SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 64}
FAMILIES = {"clip": (CLIP, SMALL), "dinov2": (DINOV2, SMALL | {"img_size": 56}), "mae": (MAE, SMALL)}
DECODER = {
    **{width: 32 for width in ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward")},
    **{"encoder_feedforward_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5},
    "num_attention_heads": 4,
}


def small(family="mae", **changes):
    name, options = FAMILIES[family]
    options = options | changes.pop("options", {})
    return ViTPyramidConfig(**({"encoder_name": name, "encoder_options": options, "width": 32} | changes))


def shaken(module, seed=0):
    """The same module with every weight moved, so that no zero, one or LayerScale hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def images_of(height, width, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def hub_folder(request, tmp_path_factory):
    """(folder in timm's hub format, its patch) of a small Vision Transformer of each family."""
    name, options = FAMILIES[request.param]
    vit = shaken(timm.create_model(name, num_classes=7, **options))
    folder = tmp_path_factory.mktemp(request.param)
    timm.models.save_for_hf(vit, folder, safe_serialization=True)
    return folder, vit.patch_embed.patch_size[0]


def body_from(folder, **options):
    name, stored = folder_encoder(folder)
    backbone = ViTPyramid(ViTPyramidConfig(encoder_name=name, encoder_options=stored | options, width=32)).eval()
    load_vit_weights(backbone, folder)
    return backbone.body


# ---------------------------------------------------------------------------------------------------------- the body


@torch.no_grad()
def test_taps_are_timms_own_intermediate_layers_at_another_size_than_trained(hub_folder):
    folder, patch = hub_folder
    images = images_of(6 * patch, 4 * patch)
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True, dynamic_img_size=True).eval()
    taps = body_from(folder)(images)
    layers = reference.get_intermediate_layers(images, n=[0, 1, 2, 3], reshape=True)
    intermediates = reference.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    assert len(taps) == 4 and taps[0].shape == (2, 24, 6, 4)
    for ours, layer, intermediate in zip(taps, layers, intermediates):
        assert torch.equal(ours, layer) and torch.equal(ours, intermediate)


@torch.no_grad()
def test_folders_position_embeddings_are_resampled_to_our_grid_as_timm_does(hub_folder):
    folder, patch = hub_folder
    reference = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=6 * patch).eval()
    body = body_from(folder, img_size=6 * patch)
    assert torch.equal(body.vit.pos_embed, reference.pos_embed)
    assert body.vit.pos_embed.shape != timm.create_model(f"local-dir:{folder}").pos_embed.shape


def test_weights_saved_by_torch_in_the_folder_are_the_same(hub_folder, tmp_path):
    folder, _ = hub_folder
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.save_for_hf(vit, tmp_path, safe_serialization=False)
    assert (tmp_path / "pytorch_model.bin").is_file() and not (tmp_path / "model.safetensors").exists()
    ours, reference = body_from(tmp_path).vit.state_dict(), body_from(folder).vit.state_dict()
    assert all(torch.equal(ours[key], reference[key]) for key in reference)


def test_twelve_blocks_are_tapped_after_3_6_9_12():
    assert tap_blocks([0.25, 0.5, 0.75, 1.0], 12) == [3, 6, 9, 12]
    assert tap_blocks([0.25, 0.5, 0.75, 1.0], 4) == [1, 2, 3, 4]
    assert tap_blocks([0.07, 0.3, 0.5, 0.99], 100) == [7, 30, 50, 99]  # 0.07 × 100 is above 7 in floating point
    assert tap_blocks([0.1, 0.3, 0.5, 0.99], 12) == [2, 4, 6, 12]


@torch.no_grad()
def test_only_the_asked_blocks_are_tapped():
    body = shaken(TappedViT(small(options={"depth": 8}, taps=[0.2, 0.5, 0.6, 0.8])))
    seen = {}
    for i, block in enumerate(body.vit.blocks):
        block.register_forward_hook(lambda _, __, output, i=i: seen.update({i + 1: output}))
    taps = body(images_of(64, 64))
    for tap, block in zip(taps, (2, 4, 5, 7)):
        assert torch.equal(tap.flatten(2).transpose(1, 2), seen[block][:, 1:])
    assert 8 not in seen  # nothing is computed after the last tap


@torch.no_grad()
@pytest.mark.parametrize(("family", "prefix"), [("mae", 1), ("dinov2", 5)])
def test_a_cell_of_the_map_is_its_own_patch_and_no_class_or_register_token(family, prefix):
    # with blocks that add nothing a tap is the patch embedding: here worked out from pixels, without timm
    body = TappedViT(small(family)).eval()
    vit, patch = body.vit, body.patch
    for block in vit.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    nn.init.zeros_(vit.pos_embed)
    for token in (vit.cls_token, vit.reg_token):
        if token is not None:
            nn.init.constant_(token, 1e3)
    images = images_of(3 * patch, 5 * patch, count=1)
    maps = body(images)
    columns = F.unfold(images, patch, stride=patch)  # patches row by row
    expected = torch.einsum("ck,bkn->bcn", vit.patch_embed.proj.weight.flatten(1), columns)
    expected = expected.unflatten(2, (3, 5)) + vit.patch_embed.proj.bias.view(-1, 1, 1)
    assert body.prefix_tokens == prefix
    assert all(torch.allclose(level, expected, atol=1e-5) for level in maps)
    images[..., patch : 2 * patch, 3 * patch : 4 * patch] += 1
    moved = (body(images)[0] - maps[0]).abs().amax((0, 1)) > 1e-6
    assert moved.nonzero().tolist() == [[1, 3]]


def test_tiny_presets_keep_what_is_particular_to_their_family():
    clip, dinov2, mae = (
        TappedViT(ViTPyramidConfig(**PRESETS[f"{name}_tiny"])).vit for name in ("clip", "dinov2", "mae")
    )
    assert isinstance(clip.norm_pre, nn.LayerNorm) and "QuickGELU" in str(clip.blocks[0].mlp.act)
    assert isinstance(dinov2.blocks[0].ls1, LayerScale) and dinov2.num_reg_tokens == 4
    assert isinstance(mae.norm_pre, nn.Identity) and isinstance(mae.blocks[0].ls1, nn.Identity)
    assert "QuickGELU" not in str(mae.blocks[0].mlp.act) and mae.num_prefix_tokens == clip.num_prefix_tokens == 1
    assert body_geometry(ViTPyramidConfig(**PRESETS["dinov2_tiny14"])).patch == 14


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built_and_has_the_published_size(name):
    geometry = check(ViTPyramidConfig(**PRESETS[name]))
    published = {"clip_b16": (16, 12, 768), "dinov2_s14": (14, 12, 384), "dinov2_b14": (14, 12, 768)}
    published["mae_b16"] = published["clip_b16"]
    expected = published.get(name, (14 if name.endswith("14") else 16, 4, 96))
    assert (geometry.patch, geometry.depth, geometry.width) == expected


# ---------------------------------------------------------------------------------------------------------- the necks


@torch.no_grad()
@pytest.mark.parametrize("neck", ["taps", "simple"])
@pytest.mark.parametrize(("family", "height", "width"), [("dinov2", 126, 98), ("mae", 112, 80), ("clip", 128, 128)])
def test_maps_have_strides_4_8_16_32_rounded_up(neck, family, height, width):
    maps = ViTPyramid(small(family, neck=neck))(images_of(height, width, 1)).feature_maps
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (4, 8, 16, 32)]
    assert [tuple(level.shape) for level in maps] == [(1, 32, *size) for size in sizes]


def test_top_down_adds_every_coarser_level_and_without_it_levels_stay_apart():
    taps = [torch.full((1, 6, 4, 4), value) for value in (1.0, 10.0, 100.0, 1000.0)]
    sizes = [(16, 16), (8, 8), (4, 4), (2, 2)]
    for top_down, expected in ((True, [1111, 1110, 1100, 1000]), (False, [1, 10, 100, 1000])):
        neck = TapNeck(6, 6, top_down=top_down, smooth=False)
        neck.projections = nn.ModuleList(nn.Identity() for _ in taps)
        levels = neck(taps, sizes)
        assert [tuple(level.shape[-2:]) for level in levels] == sizes
        assert [level.unique().tolist() for level in levels] == [[value] for value in expected]


def test_tap_levels_are_projected_normalised_and_resized_bilinearly():
    taps = [torch.randn(2, 24, 4, 3) for _ in range(4)]
    neck, sizes = TapNeck(24, 16, top_down=False, smooth=False), [(16, 12), (8, 6), (4, 3), (2, 2)]
    for tap, level, size, (project, norm) in zip(taps, neck(taps, sizes), sizes, neck.projections):
        flat = torch.einsum("oc,bchw->bohw", project.weight[..., 0, 0], tap)
        grouped = flat.unflatten(1, (norm.num_groups, -1)).flatten(2)
        centred = grouped - grouped.mean(-1, keepdim=True)
        normal = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).view_as(flat)
        expected = F.interpolate(normal, size=size, mode="bilinear", align_corners=False)
        assert torch.allclose(level, expected, atol=1e-5)


def test_simple_neck_reads_the_last_tap_alone_and_needs_no_resizing_at_patch_16():
    taps = [torch.randn(1, 24, 8, 6, requires_grad=True) for _ in range(4)]
    neck = SimpleNeck(24, 32, top_down=False, smooth=False)
    levels = neck(taps, [(32, 24), (16, 12), (8, 6), (4, 3)])
    sum(level.square().sum() for level in levels).backward()
    assert [tap.grad is None for tap in taps] == [True, True, True, False]
    scaled = [tuple(scale(taps[-1]).shape[-2:]) for scale in neck.scales]
    assert scaled == [(32, 24), (16, 12), (8, 6), (4, 3)]
    assert torch.equal(neck.scales[3](taps[-1]), F.max_pool2d(taps[-1], 2))


@pytest.mark.parametrize("width", [7, 20, 24, 32, 96, 256])
def test_any_width_has_a_number_of_groups_that_divides_it(width):
    maps = ViTPyramid(small(width=width, smooth=True))(images_of(32, 32, 1)).feature_maps  # one cell at stride 32
    assert [level.shape[1] for level in maps] == [width] * 4
    assert all(level.isfinite().all() and level.std() > 0 for level in maps)


@pytest.mark.parametrize("neck", [{"neck": "simple"}, {"top_down": True, "smooth": True}, {}])
def test_everything_trains_but_the_last_norm_that_no_map_passes(neck):
    backbone = ViTPyramid(small("dinov2", **neck))
    sum((level * torch.randn_like(level)).sum() for level in backbone(images_of(56, 56)).feature_maps).backward()
    idle = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert idle == ["body.vit.norm.weight", "body.vit.norm.bias"]


# ---------------------------------------------------------------------------------------- as backbones of transformers


@pytest.mark.parametrize("config", [small("dinov2", neck="simple", adapters=2), small(top_down=True, smooth=True)])
def test_config_survives_json(config):
    again = ViTPyramidConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again.encoder_options == config.encoder_options
    assert again.out_features == ["stride4", "stride8", "stride16", "stride32"]


BACKBONES = {
    "vit taps": small("dinov2", top_down=True),
    "vit simple": small("clip", neck="simple"),
    "vit adapters": small("mae", adapters=2),
    "cnn": ConvPyramidConfig(encoder_name="mobilenet_v2"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_mask2former_on_it_saves_and_loads_to_identical_output(name, tmp_path):
    torch.manual_seed(0)
    model = shaken(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=BACKBONES[name], **DECODER)))
    model.save_pretrained(tmp_path)
    again, report = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    images = images_of(112, 112)
    ours, theirs = model(images), again(images)
    assert torch.equal(ours.masks_queries_logits, theirs.masks_queries_logits)
    assert torch.equal(ours.class_queries_logits, theirs.class_queries_logits)
    trainable = [[name for name, p in each.named_parameters() if p.requires_grad] for each in (model, again)]
    assert trainable[0] == trainable[1]
    assert ("adapters" in name) == (len(trainable[0]) < len(list(model.parameters())))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit adapters", "cnn"])
def test_backbone_alone_comes_from_its_config_and_from_its_folder(name, tmp_path):
    backbone = shaken(AutoBackbone.from_config(BACKBONES[name]))
    backbone.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path)
    assert type(again) is type(backbone) and isinstance(again, (ViTPyramid, ConvPyramid))
    images = images_of(64, 96)
    for ours, theirs in zip(backbone(images).feature_maps, again(images).feature_maps):
        assert torch.equal(ours, theirs)
    assert again.channels == [level.shape[1] for level in again(images).feature_maps]


def test_only_the_asked_stages_are_given():
    config = small(out_features=["stride8", "stride32"])
    backbone = ViTPyramid(config)
    assert [level.shape[-1] for level in backbone(images_of(64, 64)).feature_maps] == [8, 2]
    assert backbone.channels == [32, 32]


def test_mask2former_says_nothing_against_these_backbones():
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logger = logging.getLogger("transformers.models.mask2former.configuration_mask2former")
    logger.addHandler(handler)
    for config in BACKBONES.values():
        Mask2FormerConfig(backbone_config=config)
    logger.removeHandler(handler)
    assert not said


@pytest.mark.parametrize("name", ["vit taps", "cnn"])
def test_initial_weights_are_those_of_the_bodys_own_library(name):
    torch.manual_seed(3)
    backbone = AutoBackbone.from_config(BACKBONES[name])
    torch.manual_seed(3)
    config = BACKBONES[name]
    if name == "cnn":
        own, ours = smp.encoders.get_encoder(config.encoder_name, weights=None), backbone.body
    else:
        own, ours = timm.create_model(config.encoder_name, num_classes=0, **config.encoder_options), backbone.body.vit
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in own.state_dict().items())


def test_a_tensor_that_a_checkpoint_lacks_is_drawn_and_reported(tmp_path):
    shaken(ViTPyramid(small("dinov2"))).save_pretrained(tmp_path)
    state = timm.models.load_state_dict(tmp_path / "model.safetensors")
    lost = ["body.vit.pos_embed", "body.vit.blocks.0.ls1.gamma", "body.vit.blocks.1.attn.qkv.weight"]
    save_file({k: v for k, v in state.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = ViTPyramid.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(report["missing_keys"]) == sorted(lost)
    drawn = {key: again.state_dict()[key] for key in lost}
    assert 0.01 < drawn[lost[0]].std() < 0.03 and 0.01 < drawn[lost[2]].std() < 0.03
    assert torch.allclose(drawn[lost[1]], torch.full((24,), 1e-5))  # DINOv2's LayerScale


# ---------------------------------------------------------------------------------------------- weights and adapters


def mae_file(vit):
    state = vit.state_dict() | {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
    return {"model": state | {"decoder_blocks.0.norm1.weight": torch.zeros(8)}}


def dinov2_file(vit):
    """DINOv2's own layout with registers: the class token's position embedding is a row of its own, not added yet."""
    state = dict(vit.state_dict())
    place = torch.randn(1, 1, 24)
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - place
    state["register_tokens"] = state.pop("reg_token")
    return state | {"mask_token": torch.zeros(1, 24)}


def clip_file(vit):
    """OpenAI's own layout, image and text tower."""
    names = [("blocks.", "transformer.resblocks."), ("norm_pre.", "ln_pre."), ("patch_embed.proj.", "conv1.")]
    names += [
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj.", "attn.out_proj."),
        ("norm1.", "ln_1."),
        ("norm2.", "ln_2."),
    ]
    names += [("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."), ("norm.", "ln_post.")]
    state = dict(vit.state_dict())
    image = {"class_embedding": state.pop("cls_token")[0, 0], "positional_embedding": state.pop("pos_embed")[0]}
    for key, tensor in state.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        image[key] = tensor
    text = {"logit_scale": torch.ones(()), "token_embedding.weight": torch.ones(2), "visual.proj": torch.randn(24, 16)}
    return text | {f"visual.{key}": tensor for key, tensor in image.items()}


@pytest.mark.parametrize(("family", "layout"), [("mae", mae_file), ("dinov2", dinov2_file), ("clip", clip_file)])
def test_files_in_the_original_layouts_give_the_same_taps(family, layout, tmp_path):
    original = shaken(TappedViT(small(family)))
    torch.save(layout(original.vit), tmp_path / "weights.pth")
    backbone = ViTPyramid(small(family)).eval()
    load_vit_weights(backbone, tmp_path / "weights.pth")
    images = images_of(8 * original.patch, 4 * original.patch)
    for ours, expected in zip(backbone.body(images), original(images)):
        assert torch.allclose(ours, expected, atol=1e-5)


def test_position_embeddings_of_a_file_are_interpolated_and_the_class_tokens_stays(tmp_path):
    original = shaken(TappedViT(small()))
    save_file(original.vit.state_dict(), tmp_path / "weights.safetensors")
    body = TappedViT(small(options={"img_size": 128}))
    load_vit_weights(body, tmp_path / "weights.safetensors")
    grid = original.vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    larger = F.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.allclose(body.vit.pos_embed[:, 1:], larger, atol=1e-6)
    assert torch.equal(body.vit.pos_embed[:, :1], original.vit.pos_embed[:, :1])


def test_pretrained_weights_come_from_the_hubs_repository_of_that_name(monkeypatch):
    body = TappedViT(small(encoder_name="vit_base_patch16_224.mae"))
    stored = shaken(TappedViT(small())).vit.state_dict()
    asked = []
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda name: (asked.append(name), stored)[1])
    load_vit_weights(body, "imagenet")
    assert asked == ["timm/vit_base_patch16_224.mae"]
    assert all(torch.equal(tensor, stored[key]) for key, tensor in body.vit.state_dict().items())


def test_pretrained_weights_out_of_reach_are_said_with_the_command(monkeypatch):
    def unreachable(name):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", unreachable)
    with pytest.raises(InputError, match=r"hf download timm/vit_base_patch16_224\.mae"):
        load_vit_weights(TappedViT(small(encoder_name="vit_base_patch16_224.mae")), "imagenet")


def test_adapters_change_nothing_at_first_and_are_all_that_trains():
    body = shaken(TappedViT(small()))
    images = images_of(64, 64)
    before = [tap.detach() for tap in body(images)]
    add_adapters(body, 3)
    after = body(images)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    sum((tap * torch.randn_like(tap)).sum() for tap in after).backward()
    trained = {name for name, parameter in body.named_parameters() if parameter.grad is not None}
    places = [f"vit.blocks.{block}.attn.{part}" for block in range(4) for part in ("qkv", "proj")]
    assert trained == {f"{place}.lora_{side}.default.weight" for place in places for side in "AB"}
    assert trained <= set(body.state_dict())
    assert body.vit.blocks[0].attn.qkv.lora_A["default"].weight.shape == (3, 24)


def test_adapters_base_stays_frozen_whoever_unfreezes_it_and_the_neck_trains():
    backbone = ViTPyramid(small(adapters=2))
    backbone.requires_grad_(True).train()
    idle = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert idle == {name for name, _ in backbone.named_parameters() if name.startswith("body.") and "lora_" not in name}


def test_pretrained_weights_go_under_the_adapters(tmp_path):
    original = shaken(TappedViT(small()))
    save_file(original.vit.state_dict(), tmp_path / "weights.safetensors")
    backbone = ViTPyramid(small(adapters=2)).eval()
    adapters = {key: tensor.clone() for key, tensor in backbone.state_dict().items() if "lora_" in key}
    load_vit_weights(backbone, tmp_path / "weights.safetensors")
    images = images_of(64, 64)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(backbone.body(images), original(images)))
    assert adapters and all(torch.equal(tensor, backbone.state_dict()[key]) for key, tensor in adapters.items())


def test_without_peft_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        ViTPyramid(small(adapters=2))


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [(128, 128, "fit: 126 or 140 for 128$"), (126, 100, "fit: 98 or 112 for 100$"), (10, 14, "fit: 14 for 10$")],
)
def test_a_patch_that_does_not_divide_the_image_names_the_nearest_sizes(height, width, said):
    config = small("dinov2")
    with pytest.raises(InputError, match=said):
        check_image_size(config, height, width)
    with pytest.raises(InputError, match=said):
        ViTPyramid(config)(images_of(height, width))
    check_image_size(config, 126, 98)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"taps": [0.0, 0.5, 0.75, 1.0]}, "taps must be four increasing fractions"),
        ({"taps": [0.25, 0.5, 0.75, 1.1]}, "taps must be four increasing fractions"),
        ({"taps": [0.25, 0.5, 0.5, 1.0]}, "taps must be four increasing fractions"),
        ({"taps": [0.5, 1.0]}, "taps must be four increasing fractions"),
        ({"taps": [0.3, 0.4, 0.5, 1.0]}, r"fall on blocks \[2, 2, 2, 4\] of the 4"),
        ({"neck": "tap"}, "unknown neck 'tap'; closest: 'taps'"),
        ({"neck": "simple", "smooth": True}, "belong to the neck 'taps'"),
        ({"width": 0}, "width must be positive"),
        ({"adapters": -1}, "adapters 0 or more"),
        ({"encoder_name": "vit_base_patch16_clp_224"}, "closest: 'vit_base_patch16_clip_224"),
        ({"encoder_name": "vit_base_patch16_224.mea"}, "no weights 'mea' .*'vit_base_patch16_224.mae'"),
        ({"encoder_name": "resnet18"}, "no plain Vision Transformer"),
        ({"encoder_name": "swin_tiny_patch4_window7_224"}, "no plain Vision Transformer"),
        ({"encoder_name": "vit_base_r50_s16_224"}, "no plain Vision Transformer"),
        ({"options": {"num_heads": 5}}, "cannot be built"),
        ({"options": {"num_headz": 3}}, "cannot be built.*num_headz"),
        ({"options": {"num_classes": 5}}, r"\['num_classes'\] are set here"),
        ({"options": {"patch_size": [8, 16]}}, "does not read square patches"),
    ],
)
def test_a_config_that_cannot_be_built_is_a_sentence(changes, said):
    with pytest.raises(InputError, match=said):
        ViTPyramid(small(**changes))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: timm.create_model(MAE, num_classes=0, **SMALL | {"depth": 5}), "blocks.4.* is not in the model"),
        (lambda: timm.create_model(MAE, num_classes=0, **SMALL | {"depth": 3}), "blocks.3.* is missing"),
        (lambda: timm.create_model(MAE, num_classes=0, **SMALL | {"embed_dim": 48}), "another architecture"),
        (lambda: timm.create_model(MAE, num_classes=0, **SMALL | {"patch_size": 8}), "patches of 8×8, not 16"),
        (lambda: timm.create_model(DINOV2, num_classes=0, **SMALL | {"patch_size": 16}), "vit_base|cannot be conv"),
        (lambda: timm.create_model("resnet10t"), "cls_token is missing"),
    ],
)
def test_a_file_of_another_architecture_is_refused_and_nothing_is_loaded(other, said, tmp_path):
    save_file(other().state_dict(), tmp_path / "weights.safetensors")
    body = TappedViT(small())
    before = {key: tensor.clone() for key, tensor in body.vit.state_dict().items()}
    with pytest.raises(InputError, match=said):
        load_vit_weights(body, tmp_path / "weights.safetensors")
    assert all(torch.equal(tensor, before[key]) for key, tensor in body.vit.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [(MAE, {"num_heads": 2}, "heads 2, not 3"), (MAE, {"act_layer": "quick_gelu"}, "activation QuickGELU")],
)
def test_a_folder_whose_function_differs_in_no_tensors_shape_is_refused(name, options, said, tmp_path):
    timm.models.save_for_hf(
        timm.create_model(name, num_classes=0, **SMALL | options), tmp_path, safe_serialization=True
    )
    with pytest.raises(InputError, match=said):
        load_vit_weights(TappedViT(small()), tmp_path)


def test_files_and_folders_that_are_no_weights_are_refused(tmp_path):
    body = TappedViT(small())
    with pytest.raises(InputError, match="does not exist"):
        load_vit_weights(body, tmp_path / "absent.pth")
    with pytest.raises(InputError, match="not in timm's hub format"):
        load_vit_weights(body, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "input_size": [3, 64, 64]}))
    with pytest.raises(InputError, match=r"not in timm's hub format.*architecture"):
        folder_encoder(tmp_path)
    timm.models.save_for_hf(timm.create_model(MAE, num_classes=0, **SMALL), tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match=r"holds no weights; it needs model\.safetensors"):
        load_vit_weights(body, tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="cannot be read"):
        load_vit_weights(body, tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="not a state dict"):
        load_vit_weights(body, tmp_path / "numbers.pth")


# ------------------------------------------------------------------------------------------------- convolutional ones


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mit_b0", "tu-convnext_atto"])
def test_cnn_maps_are_the_encoders_own_at_strides_4_to_32(name, tmp_path):
    backbone = shaken(ConvPyramid(ConvPyramidConfig(encoder_name=name)))
    own = smp.encoders.get_encoder(name, in_channels=3, depth=5, weights=None).eval()
    save_file(backbone.body.state_dict(), tmp_path / "weights.safetensors")
    own.load_state_dict(timm.models.load_state_dict(tmp_path / "weights.safetensors"))
    images = images_of(64, 96)
    maps = backbone(images).feature_maps
    assert [tuple(level.shape[-2:]) for level in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, own(images)[-4:]))
    again = ConvPyramid(ConvPyramidConfig(encoder_name=name)).eval()
    load_conv_weights(again, tmp_path / "weights.safetensors")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, again(images).feature_maps))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet81", "unknown encoder 'resnet81'; closest: 'resnet18'"),
        ("tu-convnext_atoo", "closest: 'convnext_atto'"),
        ("tu-vit_tiny_patch16_224", "'tu-vit_tiny_patch16_224' gives no feature pyramid"),
        ("tu-swin_tiny_patch4_window7_224", "'tu-swin_tiny_patch4_window7_224' gives no feature pyramid"),
    ],
)
def test_cnn_names_that_are_unknown_or_give_no_pyramid_are_refused(name, said):
    with pytest.raises(InputError, match=said):
        ConvPyramid(ConvPyramidConfig(encoder_name=name))


def test_cnn_of_other_strides_is_refused_by_name(monkeypatch):
    class Coarse(nn.Module):
        def forward(self, images):
            return [images, *(F.avg_pool2d(images, stride) for stride in (4, 8, 16, 32, 64))]

    monkeypatch.setattr(cnn_encoders, "_encoder", lambda name: Coarse())
    cnn_encoders.stage_channels.cache_clear()
    with pytest.raises(InputError, match=r"'resnet50' has maps at strides \[8.0, 16.0, 32.0, 64.0\]"):
        ConvPyramid(ConvPyramidConfig(encoder_name="resnet50"))


def test_cnn_weights_out_of_reach_are_said_with_the_command(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("offline")

    backbone = ConvPyramid(ConvPyramidConfig(encoder_name="resnet18"))
    monkeypatch.setattr(smp.encoders, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match="hf download smp-hub/resnet18"):
        load_conv_weights(backbone, "imagenet")
