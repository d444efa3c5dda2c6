"""What a training shows while it runs, and what it leaves behind when its loss stops being a number.

Learning curves as scalars for TensorBoard where that is installed; and `nan_batch.pt`, from which the step that went
wrong can be computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from utils import InputError, atomic_path
from weights import UNREADABLE


class Scalars:
    """The numbers of each epoch in `folder`/tensorboard; does nothing where TensorBoard is not installed."""

    def __init__(self, folder: Path, epochs_done: int) -> None:
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # an extra that nobody needs; the README says so
            return
        # an epoch that was written before the run was killed, and is now trained again, is not shown twice
        self.writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=epochs_done + 1)

    def write(self, row: Mapping[str, float]) -> None:
        """One epoch: a row of the history, `epoch` counted from 1."""
        if self.writer is not None:
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, row["epoch"])
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class StepMemory:
    """What a step starts from that the step itself changes before its loss is known.

    Parameters change only afterwards; running statistics and the random generators change on the way to the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.generators = model, {}
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def remember(self) -> None:
        """Before each step."""
        if self.buffers:
            torch._foreach_copy_(list(self.buffers.values()), list(self.model.buffers()))
        self.generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            self.generators["cuda"] = torch.cuda.get_rng_state()

    def write(self, path: Path, batch, **facts) -> None:
        """Images, masks and ids of the batch, the model's state and the generators' before the step, and `facts`."""
        state = self.model.state_dict()
        state |= {name: buffer for name, buffer in self.buffers.items() if name in state}
        kept = {"images": batch.image.cpu(), "masks": batch.mask.cpu(), "ids": list(batch.id), "model": state}
        with atomic_path(path) as temporary:
            torch.save(kept | {"generators": self.generators} | facts, temporary)


def read_batch(path: Path) -> dict:
    """What `StepMemory.write` wrote."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); give a nan_batch.pt of train.py") from error


def restore_generators(generators: Mapping[str, torch.Tensor]) -> None:
    """Set the random generators to where the step began."""
    torch.set_rng_state(generators["cpu"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
