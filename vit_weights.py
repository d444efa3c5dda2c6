"""Pretrained weights for Vision Transformers: timm's hub, a folder in its format, files of CLIP, DINOv2 or MAE.

What the weights are loaded into is built in `vit_encoders`; anything that does not fit it is refused with a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import timm
import timm.models
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from utils import InputError, closest
from vit_encoders import MISFITS, OURS, TappedViT, create_vit
from weights import HUB_ERRORS, UNREADABLE, differences, offline_message

# of the pretraining, and of no use to a body: classifier or projection, MAE's decoder, the masked patches' token
_LEFT_OUT = ("head.", "decoder_", "mask_token", "fc_norm.", "attn_pool.")
_FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's two names


def load_vit_weights(target: nn.Module, source: str | Path) -> None:
    """Pretrained weights into a `TappedViT`, or into the body of a `ViTPyramid`.

    source : 'imagenet' (what timm has under the encoder's name, from the hub or its cache), a folder in timm's hub
        format, or a file in timm's own, CLIP's, DINOv2's or MAE's layout. timm converts the layouts and resamples the
        position embeddings to our `img_size`. Anything missing, of another shape, or not of a Vision Transformer is
        refused; the pretraining's heads and decoders (`_LEFT_OUT`) are left out. A file does not tell the number of
        heads or the activation: that these fit is for the caller to know.
    """
    body = getattr(target, "body", target)
    if str(source) == "imagenet":
        label, state = _hub_state(body)
    elif Path(source).is_dir():
        label, state = _folder_state(body, Path(source))
    else:
        label, state = f"weights file {source}", _read(Path(source))
    _check_patch(body, state, label)
    try:
        state = checkpoint_filter_fn(dict(state), body.vit)
    except (*MISFITS, LookupError, AttributeError) as error:
        raise InputError(f"{label} cannot be converted for {body.name}: {type(error).__name__}: {error}") from error
    _load_exactly(body, state, label)


def folder_encoder(folder: Path) -> tuple[str, dict]:
    """(encoder_name, encoder_options) of a folder in timm's hub format, so that the config comes from the folder.

    Such folders are written by `timm.models.save_for_hf`. The name has no tag: the weights are the folder's.
    """
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        name, options = stored["architecture"], dict(stored.get("model_args", {}))
        size = stored.get("pretrained_cfg", stored)["input_size"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"folder {folder} is not in timm's hub format ({type(error).__name__}: {error}); it needs the config.json "
            "and model.safetensors of timm.models.save_for_hf"
        ) from error
    options.setdefault("img_size", size[-1] if size[-1] == size[-2] else list(size[-2:]))
    return name, {key: value for key, value in options.items() if key not in OURS}


def _hub_state(body: TappedViT) -> tuple[str, dict]:
    repository = body.vit.pretrained_cfg.get("hf_hub_id")
    if not repository:
        raise InputError(
            f"timm has no pretrained weights of {body.name!r}; names with weights: "
            f"{closest(body.name, timm.list_pretrained('vit_*'))}"
        )
    try:
        return f"hub weights {repository}", timm.models.load_state_dict_from_hf(repository)
    except HUB_ERRORS as error:
        raise InputError(offline_message(repository, "", error)) from error


def _folder_state(body: TappedViT, folder: Path) -> tuple[str, dict]:
    name, options = folder_encoder(folder)
    with torch.device("meta"):
        theirs, ours = _unseen(create_vit(name, options)), _unseen(body.vit)
    wrong = [f"{what} {theirs[what]}, not {ours[what]}" for what in ours if theirs[what] != ours[what]]
    if wrong:
        raise InputError(f"folder {folder} holds another architecture ({name}) than {body.name}: {'; '.join(wrong)}")
    path = next((folder / known for known in _FOLDER_WEIGHTS if (folder / known).is_file()), None)
    if path is None:
        raise InputError(f"folder {folder} holds no weights; it needs {' or '.join(_FOLDER_WEIGHTS)}")
    return f"folder {folder}", _read(path)


def _unseen(vit: VisionTransformer) -> dict[str, object]:
    """What changes a Vision Transformer's function and no tensor's shape."""
    block = vit.blocks[0]
    return {
        "patch": vit.patch_embed.patch_size,
        "heads": block.attn.num_heads,
        "activation": str(block.mlp.act),
        "norm": f"{type(block.norm1).__name__} ε {block.norm1.eps}",
        "position of the class token": vit.no_embed_class,
    }


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist; give 'imagenet', a folder, a file, or use 'none'")
    try:
        state = timm.models.load_state_dict(path, weights_only=True)  # unwraps {'model': …} and {'state_dict': …}
    except UNREADABLE as error:
        raise InputError(f"weights file {path} cannot be read ({type(error).__name__}: {error})") from error
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"weights file {path} is not a state dict of tensors")
    return state


def _check_patch(body: TappedViT, state: dict[str, Tensor], label: str) -> None:
    """timm would resample a patch embedding of another size, to another function: only as said, never by the way."""
    ends = ("patch_embed.proj.weight", "visual.conv1.weight")
    found = next((tensor for key, tensor in state.items() if key.endswith(ends) and tensor.ndim == 4), None)
    if found is not None and tuple(found.shape[-2:]) != (body.patch, body.patch):
        sides = "×".join(map(str, found.shape[-2:]))
        raise InputError(f"{label} is of another architecture than {body.name}: patches of {sides}, not {body.patch}")


def _load_exactly(body: TappedViT, state: dict[str, Tensor], label: str) -> None:
    own = body.vit.state_dict()
    adapters = {key: tensor for key, tensor in own.items() if "lora_" in key}
    names = {key.replace(".base_layer", ""): key for key in own if key not in adapters}
    state = {key: tensor for key, tensor in state.items() if key in names or not key.startswith(_LEFT_OUT)}
    if wrong := differences({name: own[key] for name, key in names.items()}, state):
        raise InputError(
            f"{label} is of another architecture than {body.name}: {len(wrong)} differences, first "
            f"{'; '.join(wrong[:3])}"
        )
    body.vit.load_state_dict({names[key]: tensor for key, tensor in state.items()} | adapters)  # strict
