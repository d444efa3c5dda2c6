"""Several processes of one training (`accelerate launch`): who goes first, and what they tell each other.

One process is the ordinary case: there everything here does its work at once and asks nobody.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import Dataset, Subset

from utils import InputError

PRECISIONS = ("no", "fp16", "bf16")
RANKS = ("RANK", "LOCAL_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # a launcher's, or an MPI's
PATIENCE = 10  # seconds
T = TypeVar("T")


def start_the_others(device: torch.device) -> None:
    """Where `accelerate launch --num_processes N` started only one process, become the torchrun that starts all N.

    On CPUs accelerate leaves that to an MPI, and without one trains in a single process and does not say so.
    """
    alone = (
        "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    )  # set when several were asked for
    if not alone or any(name in os.environ for name in RANKS) or device.type != "cpu":
        return
    number = _processes_asked_for(psutil.Process(os.getppid()).cmdline())
    if number is None:
        raise InputError(
            "accelerate's launcher started one process of several; on CPUs of one machine use "
            f"`torchrun --standalone --nproc_per_node N {' '.join(sys.argv)}`, on several machines mpirun"
        )
    sys.stdout.flush()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    os.execv(sys.executable, [*torchrun, *sys.argv])


def _processes_asked_for(command: Sequence[str]) -> int | None:
    """N of an `accelerate launch --num_processes N …` on one machine; None of any other command."""
    for place, word in enumerate(command):
        if word in ("launch", "accelerate.commands.launch") or os.path.basename(word).startswith("accelerate-launch"):
            asked = launch_command_parser().parse_args(command[place + 1 :])
            return None if (asked.num_machines or 1) > 1 else asked.num_processes
    return None


def make_accelerator(device: torch.device, mixed_precision: str) -> Accelerator:
    """accelerate's hold on this process: alone, or one of those that `accelerate launch` started."""
    if mixed_precision not in PRECISIONS:
        raise InputError(f"unknown mixed precision {mixed_precision!r}; use one of {', '.join(PRECISIONS)}")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise InputError("mixed precision fp16 needs a GPU; on the CPU use --mixed_precision no, or bf16")
    # accelerate keeps the first run's device and precision for the whole process; a notebook may train with others
    AcceleratorState._reset_state(reset_partial_state=True)
    # some models have parameters that no loss reaches, such as the last norm of a Swin backbone
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[unused])


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, handed to all of them; its InputError ends all, and is said once."""
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except InputError as error:
            if accelerator.num_processes == 1:
                raise
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        if not accelerator.is_main_process:
            time.sleep(PATIENCE)  # a launcher ends all processes at the first exit: let the main one say why
            raise SystemExit(2)
        raise outcome[1]
    return outcome[0]


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """`work` on the main process, then on the others, which find the files that it made."""
    made: list[T] = []
    on_main(accelerator, lambda: made.append(work()))
    return made[0] if made else work()


def share_of(dataset: Dataset, batch_size: int, accelerator: Accelerator) -> Subset:
    """This process's images: every so-manieth batch, whole, so that each image is in one process and nothing is padded.

    The batches are those of one process, so a model answers them to the same bit.
    """
    mine, all_ = accelerator.process_index, accelerator.num_processes
    return Subset(dataset, [i for i in range(len(dataset)) if i // batch_size % all_ == mine])


def gather_rows(rows: Sequence[T]) -> list[T]:
    """The rows of every process, in order of the processes, on all of them."""
    return gather_object(list(rows))


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give every process the main one's running statistics: each has seen other images since the last step."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def close_connections() -> None:
    """The end of the program: wait for each other and close the connections, whose threads may else abort the exit."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
