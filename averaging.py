"""The exponential moving average of a model's weights: a second model that follows the first one slowly.

Validation and the kept checkpoints use the average when a recipe asks for one; training never sees it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class AveragedWeights:
    """average ← d average + (1 − d) weights after every step, d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d forgets the random weights of the first steps, which a decay of 0.999 would carry for thousands.
    What does not train is the same in both and left alone. Running statistics (floating-point buffers, as of batch
    norm) are averaged like the weights: those of the last step belong to the last weights, not to their average.
    Whole-number buffers are copied: a position index or a count of batches has no mean. PyTorch's AveragedModel offers
    all buffers averaged, indices rounded down, or none, so this is our own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model, which has just made a step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = [(mine, its) for mine, its in zip(self.module.parameters(), model.parameters()) if its.requires_grad]
        for mine, its in zip(self.module.buffers(), model.buffers()):
            if its.is_floating_point():
                pairs.append((mine, its))
            else:
                mine.copy_(its)
        torch._foreach_lerp_([mine for mine, _ in pairs], [its.detach() for _, its in pairs], 1 - decay)
        self.steps += 1

    def state_dict(self) -> dict:
        """The averaged weights and how many steps they have followed."""
        return {"model": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["model"])
        self.steps = state["steps"]
