"""Which order a network's kernels have in memory: channels last where that is faster and safe.

For whoever trains a network or goes back through it. Which networks are faster so is the caller's to know.
"""

from __future__ import annotations

import torch
from torch import nn

FEWEST_CHANNELS = 8  # that a 1 × 1 kernel with strides may read


def channels_last(model: nn.Module) -> nn.Module:
    """The model with channels last; as it is on a CPU where one of its convolutions would write outside its memory.

    PyTorch 2.14.1 on a CPU (x86 with AVX2): the backward pass of a 1 × 1 convolution with strides and
    2 to 7 input channels in this layout ends in 'corrupted double-linked list' or a segmentation fault, sooner or later
    and somewhere else. With 8 channels and more, without strides, and in the ordinary layout it was sound under glibc's
    heap checks. A ResNet whose first stage has 4 channels has such a convolution.
    """
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    unsafe = on_cpu and any(writes_outside(module) for module in model.modules())
    return model if unsafe else model.to(memory_format=torch.channels_last)


def writes_outside(module: nn.Module) -> bool:
    """Whether a module is such a convolution (see `channels_last`)."""
    if not isinstance(module, nn.Conv2d) or set(module.kernel_size) != {1} or set(module.stride) == {1}:
        return False
    return module.in_channels // module.groups < FEWEST_CHANNELS
