"""Weights in: state dicts from files, pretrained ones from the hub, each failure a sentence with its remedy.

Safetensors, or legacy `.pth` with `weights_only=True`; nothing that could run code is ever unpickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import model_sites
from utils import InputError

# what the safetensors, zip and (restricted) pickle readers raise for a file that is none of theirs
UNREADABLE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
)
# transformers 5 gave Swin backbones a last norm that no feature map passes through; older checkpoints have none
UNUSED_NORM = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias")
HUB_ERRORS = (OSError, LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError)


def from_hub(load: Callable, source: str):
    """`load(source)`, or a sentence that says which files are missing and where to put them."""
    try:
        return load(source)
    except HUB_ERRORS as error:
        raise InputError(offline_message(source, "", error)) from error


def offline_message(repository: str, revision: str, error: Exception) -> str:
    """What to do when a hub repository is neither reachable nor in the local cache."""
    command = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    return (
        f"the pretrained weights {repository!r} could not be fetched and are not in the local cache "
        f"({type(error).__name__}). On a connected machine run `{command}` and copy the folder "
        f"~/.cache/huggingface/hub/models--{repository.replace('/', '--')} to the same place here; or give --weights a "
        "local file or folder; or use --weights none"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a legacy .pth state dict (loaded with weights_only=True only)."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights file {path} does not exist; give 'imagenet', 'none' or an existing file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(
            f"weights file {path} cannot be read as a checkpoint ({type(error).__name__}: {error})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"weights file {path} is not a state dict of tensors")
    return state


def load_state(model: nn.Module, path: Path) -> None:
    """Load a whole model's state; a checkpoint of another architecture is refused with the first differences."""
    state = model_sites.rename_keys(model, read_state(path))
    own = model.state_dict()
    state |= {key: own[key] for key in own if key.endswith(UNUSED_NORM) and key not in state}
    # transformers 4 stored these buffers; a Swin block works them out from its window
    state = {key: tensor for key, tensor in state.items() if key in own or not key.endswith("relative_position_index")}
    if wrong := differences(own, state):
        raise InputError(
            f"checkpoint {path} is of another architecture than this {type(model).__name__}: "
            f"{len(wrong)} differences, first {'; '.join(wrong[:3])}"
        )
    model.load_state_dict(state)


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """In words, each way in which a given state cannot be the network's own."""
    return [
        *(f"{key} is missing" for key in own if key not in given),
        *(f"{key} is not in the model" for key in given if key not in own),
        *(
            f"{key} is {tuple(given[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in given and given[key].shape != own[key].shape
        ),
    ]


def load_pretrained_file(model: nn.Module, encoder: nn.Module, path: Path) -> None:
    """Weights of the encoder alone, or of the whole model, whichever the file holds.

    Encoder files may carry the classifier of their pretraining, which is left out.
    """
    state = read_state(path)
    own = encoder.state_dict()
    if set(own) <= set(state):
        extra = set(state) - set(own)
        if all(key.startswith(("classifier", "fc.", "head.", "last_linear")) for key in extra):
            for key in own:
                if state[key].shape != own[key].shape:
                    shapes = f"shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
                    raise InputError(f"weights file {path}: {key} has {shapes}; it is of another encoder")
            nn.Module.load_state_dict(encoder, {key: state[key] for key in own})
            return
    if not set(model_sites.rename_keys(model, state)) & set(model.state_dict()):
        raise InputError(
            f"weights file {path} fits neither the encoder nor the whole model: it has {next(iter(state))!r}, "
            f"the encoder has {next(iter(own))!r}"
        )
    load_state(model, path)
