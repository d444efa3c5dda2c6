"""Channels last in memory, but for networks in which PyTorch's CPU kernels would write outside theirs."""

import subprocess
import sys

import pytest
from torch import nn

from classification.classifiers import ClassifierSpec, build_classifier
from classification.training import in_fast_layout
from kernel_layout import channels_last, writes_outside
from utils import HOME

# a ResNet whose second stage has a 1 × 1 convolution with strides over so many channels
RESNET = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "stem_type": "deep", "stem_width": 8}
NARROW = RESNET | {"channels": [4, 8, 8, 8]}
TRAINED = """
import torch
from torch import nn
from kernel_layout import channels_last
torch.set_num_threads(1)
net = channels_last(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1, 2)))
for _ in range(60):
    net(torch.rand(4, 3, 8, 8)).square().mean().backward()
print("sound")
"""


def is_last(model: nn.Module) -> bool:
    kernels = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return any(not kernel.is_contiguous() for kernel in kernels)


@pytest.mark.parametrize(("options", "last"), [(RESNET, True), (NARROW, False)])
def test_a_network_with_a_narrow_strided_one_by_one_convolution_keeps_its_layout(options, last):
    model = build_classifier(ClassifierSpec("resnet18", options, image_size=32, weights="none", classes=4), 0)
    assert not is_last(model)
    assert in_fast_layout(model) is model and is_last(model) is last


@pytest.mark.parametrize(
    ("convolution", "outside"),
    [
        (nn.Conv2d(4, 8, 1, 2), True),
        (nn.Conv2d(4, 8, 1, (1, 2)), True),
        (nn.Conv2d(7, 8, 1, 4), True),
        (nn.Conv2d(8, 8, 1, 2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, 2), False),
    ],
)
def test_which_convolutions_write_outside(convolution, outside):
    assert writes_outside(convolution) is outside
    assert is_last(channels_last(nn.Sequential(nn.Conv2d(8, 4, 3), convolution))) is not outside


def test_such_a_network_trains_with_a_sound_heap():
    """In a process of its own: a corrupt heap ends it (with `.to(channels_last)` it dies every time tried)."""
    done = subprocess.run([sys.executable, "-c", TRAINED], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "sound", done.stderr
