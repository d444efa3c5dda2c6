"""Where our models are listened to: their informative sites with axes and parts, and the aliases of their names.

Axes are declared here because no shape tells them: Swin tokens are (batch, token, channel), Mask2Former's transformer
decoder emits (query, batch, channel), its pixel decoder concatenates the tokens of three strides.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from classifier_sites import declared_sites
from similarity.hooks import list_sites
from similarity.sites import IMAGE_AXES, Site, contract_axes, find_module, parse
from utils import InputError, closest

TOKENS = ("batch", "token", "channel")
QUERIES = ("query", "batch", "channel")
BATCH_QUERIES = ("batch", "query", "channel")
ENCODERS = ("encoder", "backbone", "segformer")  # of models that answer a map of logits
PIXEL_STRIDES = (32, 16, 8)  # the order in which the pixel decoder concatenates its levels

_SWIN = "model.pixel_level_module.encoder.swin"
_PIXEL = "model.pixel_level_module.decoder"
_DECODER = "model.transformer_module.decoder"
# transformers 4 -> 5: the backbone wraps the Swin body, and a block's feed-forward is one module
_NEW_SPELLINGS = (
    (r"^model\.pixel_level_module\.encoder\.(embeddings|encoder|layernorm)", rf"{_SWIN}.\1"),
    (r"(\.blocks\.\d+)\.intermediate\.dense\b", r"\1.mlp.fc1"),
    (r"(\.blocks\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    (r"\.attention\.output\.dense\b", ".attention.o_proj"),
    (r"\.attention\.self\.query\b", ".attention.q_proj"),
    (r"\.attention\.self\.key\b", ".attention.k_proj"),
    (r"\.attention\.self\.value\b", ".attention.v_proj"),
    (
        r"\.attention\.self\.relative_position_bias_table\b",
        ".attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"\.attention\.self\.relative_position_index\b", ".attention.relative_position_bias.relative_position_index"),
)
_OLD_SPELLINGS = (
    (r"^model\.pixel_level_module\.encoder\.swin\.", "model.pixel_level_module.encoder."),
    (r"(\.blocks\.\d+)\.mlp\.fc1\b", r"\1.intermediate.dense"),
    (r"(\.blocks\.\d+)\.mlp\.fc2\b", r"\1.output.dense"),
)
# what is listened to in the decoders of segmentation-models-pytorch and torchvision; '.*' stands for every child
DECODERS = {
    "unetpp": ("decoder.blocks.*",),
    "unet": ("decoder.blocks.*",),
    "fpn": ("decoder.p5", "decoder.p4", "decoder.p3", "decoder.p2", "decoder.seg_blocks.*", "decoder.merge"),
    "deeplabv3plus": ("decoder.aspp", "decoder.block1", "decoder.block2"),
    "segformer_smp": ("decoder.mlp_stage.*", "decoder.fuse_stage"),
    "upernet": (
        "decoder.psp",
        "decoder.fpn_lateral_blocks.*",
        "decoder.fpn_conv_blocks.*",
        "decoder.fusion_block",
    ),
    "fcn": ("classifier.2",),
    "all_mlp": ("decoder.levels.*", "decoder.fusion"),
}
# what each kind of module emits, first match wins
_MASK2FORMER_AXES = (
    (rf"{re.escape(_PIXEL)}\.(input_projections|adapter|layer|mask_projection)", IMAGE_AXES),
    (rf"{re.escape(_PIXEL)}\.encoder\.layers\.\d+", TOKENS),
    (rf"{re.escape(_DECODER)}\.mask_predictor\.mask_embedder", BATCH_QUERIES),
    (rf"{re.escape(_DECODER)}\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)$", BATCH_QUERIES),
    (rf"{re.escape(_DECODER)}\.(layers\.\d+|layernorm)", QUERIES),
    (r"class_predictor$", BATCH_QUERIES),
    (r"model\.transformer_module\.input_projections", IMAGE_AXES),
)


def encoder_of(model: nn.Module) -> nn.Module:
    """The image encoder (backbone), as a module; without the neck that turns its features into a pyramid."""
    return model.get_submodule(encoder_path(model))


def encoder_path(model: nn.Module) -> str:
    """Where the image encoder is among the model's modules."""
    for path in ("model.pixel_level_module.encoder.body", "model.pixel_level_module.encoder", *ENCODERS):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise InputError(
        f"{type(model).__name__} has no encoder at {', '.join(ENCODERS)}; models.py builds those that have"
    )


def default_sites(model: nn.Module) -> list[Site]:
    """The informative sites in execution order: every block of encoder and decoder that has features to compare.

    The one-channel head is left out (its features are the prediction itself), and so is what is constant over images.
    """
    declared = _all_declared(model)
    # any size that every stride divides: only the order of firing is read off
    side = getattr(model, "image_size", None) or 64
    if (patch := getattr(encoder_of(model), "patch", 1)) > 1:
        side = 4 * patch
    parameter = next(model.parameters())
    blank = torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    # encoders that start at stride 4 leave blocks at stride 2 without a channel: nothing to compare there
    return [replace(site, shape=()) for site in list_sites(model, blank, declared) if 0 not in site.shape]


def sites(model: nn.Module, image_size: int = 128) -> list[Site]:
    """`default_sites` with the shapes that one square image of `image_size` pixels gives, in execution order."""
    device = next(model.parameters()).device
    return list_sites(model, torch.zeros(1, 3, image_size, image_size, device=device), default_sites(model))


def declare_site(model: nn.Module, name: str) -> Site:
    """A site by name, in either spelling of transformers, with its axes; unknown ones raise with the closest names."""
    known = {site.name: site for site in _all_declared(model)}
    resolved = resolve_alias(model, name)
    if resolved in known:
        return known[resolved]
    module = find_module(model, resolved)
    part = "encoder" if parse(resolved).path.startswith(encoder_path(model)) else "decoder"
    if model.spec.name == "mask2former":
        axes, strides = _mask2former_axes(resolved)
    elif model.spec.name in ("segformer", "fcn", "all_mlp") or parse(resolved).selectors:
        axes, strides = None, ()
    else:
        axes, strides = IMAGE_AXES, ()
    axes = contract_axes(module) if axes is None else axes
    if axes is None:
        raise InputError(
            f"the axes of site {name!r} are not declared; give a Site with its axes, or use one of: "
            f"{closest(resolved, known)}"
        )
    return Site(resolved, axes, strides, part)


def resolve_alias(model: nn.Module, name: str) -> str:
    """The spelling that this model's modules have; a name that fits none is returned as it came."""
    modules = dict(model.named_modules())
    address = parse(name)
    rest = name[len(address.path) :]
    for path in (address.path, respell(address.path, _NEW_SPELLINGS), respell(address.path, _OLD_SPELLINGS)):
        if path in modules:
            return path + rest
    return name


def respell(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply every renaming rule in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def rename_keys(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its keys in the model's own spelling, where another version of transformers wrote it."""
    own = model.state_dict()
    if set(state) == set(own):
        return state

    def renamed(key: str) -> str:
        options = (key, respell(key, _NEW_SPELLINGS), respell(key, _OLD_SPELLINGS))
        return next((option for option in options if option in own), key)

    return {renamed(key): tensor for key, tensor in state.items()}


def _all_declared(model: nn.Module) -> list[Site]:
    if model.spec.name == "mask2former":
        return _mask2former_sites(model)
    if model.spec.name == "segformer":
        return _segformer_sites(model)
    if model.spec.name == "all_mlp":
        encoder = declared_sites(model.encoder, "encoder.")
    else:
        blocks = _convolutional_encoder_blocks(encoder_of(model), encoder_path(model))
        encoder = [Site(name, IMAGE_AXES, part="encoder") for name in blocks]
    decoder = [name for pattern in DECODERS[model.spec.name] for name in _children_of(model, pattern)]
    return encoder + [Site(name, IMAGE_AXES, part="decoder") for name in decoder]


def _children_of(model: nn.Module, pattern: str) -> list[str]:
    """'decoder.blocks.*' -> every child of decoder.blocks; any other name is itself."""
    if not pattern.endswith(".*"):
        return [pattern]
    return [f"{pattern[:-1]}{name}" for name, _ in model.get_submodule(pattern[:-2]).named_children()]


def _convolutional_encoder_blocks(encoder: nn.Module, path: str) -> list[str]:
    """Blocks of the ResNet and MobileNet families by their modules; any other encoder by its list of stages."""
    if hasattr(encoder, "layer1"):
        stem = [f"{path}.relu"] if hasattr(encoder, "relu") else []
        layers = [f"layer{i}" for i in range(1, 5) if hasattr(encoder, f"layer{i}")]
        return stem + [f"{path}.{layer}.{name}" for layer in layers for name in getattr(encoder, layer)._modules]
    if isinstance(getattr(encoder, "features", None), nn.Sequential):
        return [f"{path}.features.{name}" for name in encoder.features._modules]
    return [f"{path}:{stage}" for stage in range(1, len(encoder.out_channels))]


def _segformer_sites(model: nn.Module) -> list[Site]:
    """Every block of the encoder, the four projections of its stages, and their fusion."""
    config, blocks = model.config, []
    strides = [math.prod(config.strides[: stage + 1]) for stage in range(len(config.depths))]
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            new, old = f"segformer.stages.{stage}.blocks.{block}", f"segformer.encoder.block.{stage}.{block}:0"
            name = new if _has(model, new) else old  # transformers 4 wrapped a block's tokens in a tuple
            blocks.append(Site(name, TOKENS, (strides[stage],), "encoder"))
    heads = "linear_projections" if hasattr(model.decode_head, "linear_projections") else "linear_c"
    levels = [
        Site(f"decode_head.{heads}.{stage}", TOKENS, (stride,), "decoder") for stage, stride in enumerate(strides)
    ]
    return [*blocks, *levels, Site("decode_head.activation", IMAGE_AXES, part="decoder")]


def _has(model: nn.Module, path: str) -> bool:
    return path in dict(model.named_modules())


def _mask2former_encoder_sites(model: nn.Module) -> list[Site]:
    """Blocks of whichever encoder it stands on, and the levels of the pyramid that a neck makes of them."""
    body, path = encoder_of(model), encoder_path(model)
    if hasattr(body, "vit"):
        options = {"strides": (body.patch,), "part": "encoder", "prefix": body.prefix_tokens}
        blocks = [Site(f"{path}.vit.blocks.{k}", TOKENS, **options) for k in range(len(body.vit.blocks))]
        neck = f"{path.removesuffix('.body')}.neck"
        last = "projections" if getattr(model.get_submodule(neck), "smoothing", None) is None else "smoothing"
        return blocks + [Site(f"{neck}.{last}.{level}", IMAGE_AXES, part="decoder") for level in range(4)]
    if path.endswith(".body"):
        return [Site(name, IMAGE_AXES, part="encoder") for name in _convolutional_encoder_blocks(body, path)]
    prefix = resolve_alias(model, f"{_SWIN}.embeddings").removesuffix(".embeddings")
    embedding = Site(f"{prefix}.embeddings.norm", TOKENS, (4,), "encoder")
    return [embedding] + [
        Site(f"{prefix}.encoder.layers.{stage}.blocks.{block}", TOKENS, (4 * 2**stage,), "encoder")
        for stage, depth in enumerate(model.config.backbone_config.depths)
        for block in range(depth)
    ]


def _mask2former_sites(model: nn.Module) -> list[Site]:
    module = model.model
    pixel = [
        Site(f"{_PIXEL}.encoder.layers.{i}", TOKENS, PIXEL_STRIDES, "decoder")
        for i in range(len(module.pixel_level_module.decoder.encoder.layers))
    ]
    maps = [Site(f"{_PIXEL}.{name}", IMAGE_AXES, part="decoder") for name in ("layer_1", "mask_projection")]
    layers = [
        Site(f"{_DECODER}.layers.{i}", QUERIES, part="decoder")
        for i in range(len(module.transformer_module.decoder.layers))
    ]
    embedder = Site(f"{_DECODER}.mask_predictor.mask_embedder.2", BATCH_QUERIES, part="decoder")
    return [*_mask2former_encoder_sites(model), *pixel, *maps, *layers, embedder]


def _mask2former_axes(name: str) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """(axes, token strides) of a module of Mask2Former that is not among the default sites."""
    address = parse(name)
    if address.selectors:
        return None, ()
    swin = re.search(r"encoder\.(?:swin\.)?encoder\.layers\.(\d+)\.blocks\.\d+", address.path)
    if swin:
        return _swin_block_axes(address.path, 4 * 2 ** int(swin[1]))
    if re.search(r"pixel_level_module\.encoder\.(?:swin\.)?embeddings\.(norm|dropout)$", address.path):
        return TOKENS, (4,)
    for pattern, axes in _MASK2FORMER_AXES:
        if re.match(pattern, address.path):
            return axes, (PIXEL_STRIDES if axes is TOKENS else ())
    return None, ()


def _swin_block_axes(path: str, stride: int) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    # inside the attention the batch axis counts windows, not images: such sites have no row per image
    return (None, ()) if re.search(r"\.attention\b|\.layernorm_before$", path) else (TOKENS, (stride,))
