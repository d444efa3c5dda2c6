"""What running a model costs: parameters, floating-point operations, time and memory of its answer to images.

Everything is measured from a checkpoint folder (`measure`) or from a model at hand, in eval mode and without gradients,
and the model is left as it was found. Reading images and moving them to the device is not counted. Times are of this
machine at this moment: compare only those that were measured together. Training costs are not known here.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from answers import pixel_logits
from models import load_model
from models import parameter_count as parameter_counts  # (all, trainable)
from similarity.hooks import quiet
from utils import InputError, resolve_device

BATCHES = (1, 16)  # images at once, of the times that `measure` reports
MEMORY_BATCH = 16
MEGABYTE = 1e6
BALLAST = 32e6  # bytes that are surely above what the system's own account of memory lags behind

Answer = Callable[[nn.Module, Tensor], object]


def forward(model: nn.Module, images: Tensor) -> object:
    """The model's own forward: what is measured of a model at hand where no other answer is asked for."""
    return model(images)


@contextlib.contextmanager
def at_rest(model: nn.Module, device: torch.device | None = None) -> Iterator[torch.device]:
    """The model in eval mode on a device (where it is, without one), and afterwards each of its modules as it was."""
    place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    device = place if device is None else torch.device(device)
    with quiet(model, freeze=False):
        try:
            model.to(device)
            yield device
        finally:
            model.to(place)


def images_of(image_size: int, batch: int, device: torch.device) -> Tensor:
    """Noise (batch, 3, image_size, image_size) in [0, 1): how much a model computes does not depend on what it sees."""
    if image_size < 1 or batch < 1:
        raise InputError(f"a batch of {batch} images of {image_size} px was asked for; both must be at least 1")
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, image_size, image_size, generator=generator).to(device)


# ---- operations -------------------------------------------------------------------------------------------------


def flops(model: nn.Module, image_size: int, answer: Answer = forward) -> int:
    """Floating-point operations of the model's answer to one image; see `flops_of` for what is counted."""
    with at_rest(model) as device:
        return flops_of(lambda images: answer(model, images), images_of(image_size, 1, device))


def flops_of(function: Callable[[Tensor], object], x: Tensor) -> int:
    """Floating-point operations of `function(x)`, by PyTorch's own counter (`torch.utils.flop_counter`).

    Counted are matrix products, convolutions and scaled dot-product attention, two operations a multiply-accumulate,
    in the shapes in which they run. Everything else counts 0: biases, norms, activations, softmax, interpolation, and
    the sampling of deformable attention. Fused attention kernels that the counter does not know are switched off
    meanwhile, since they too would count 0. Gradients are not computed.
    """
    with counted_operations() as total:
        function(x)
        return total()


@contextlib.contextmanager
def counted_operations() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many operations were counted so far in the block; see `flops_of`."""
    fused = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # not inference_mode: there products reach the counter undivided in some versions of PyTorch
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            yield lambda: int(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


# ---- time -------------------------------------------------------------------------------------------------------


def run_times(
    model: nn.Module,
    image_size: int,
    batch: int,
    repeats: int,
    warmup: int,
    device: torch.device | None = None,
    answer: Answer = forward,
) -> np.ndarray:
    """Milliseconds an image of each of `repeats` answers to a batch, float64 (repeats,), after `warmup` untimed ones.

    On CUDA the device is waited for before and after each. The number of threads is PyTorch's own setting.
    """
    if repeats < 1 or warmup < 0:
        raise InputError(f"{repeats} timed and {warmup} warm-up runs were asked for; at least 1 and 0 are needed")
    times = np.empty(repeats)
    with at_rest(model, device) as place, torch.inference_mode():
        images = images_of(image_size, batch, place)
        for run in range(-warmup, repeats):
            _wait_for(place)
            start = time.perf_counter()
            answer(model, images)
            _wait_for(place)
            took = time.perf_counter() - start
            if run >= 0:
                times[run] = took * 1000 / batch
    return times


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def latency(
    model: nn.Module,
    image_size: int,
    batch: int = 1,
    repeats: int = 30,
    warmup: int = 5,
    device: torch.device | None = None,
    answer: Answer = forward,
) -> dict[str, float]:
    """Median and quartiles of `run_times`: batch, repeats, and median, low, high in milliseconds an image."""
    times = run_times(model, image_size, batch, repeats, warmup, device, answer)
    low, median, high = (float(value) for value in np.quantile(times, [0.25, 0.5, 0.75]))
    return {"batch": batch, "repeats": repeats, "median": median, "low": low, "high": high}


# ---- memory -----------------------------------------------------------------------------------------------------


def peak_memory(
    folder: Path,
    image_size: int,
    batch: int = MEMORY_BATCH,
    device: torch.device | str = "cpu",
    answer: Answer = pixel_logits,
) -> float:
    """Megabytes (10^6 bytes) at the peak of one answer to a batch: weights, images and activations.

    folder : of `models.save_model`. On CUDA what PyTorch's allocator hands out at most, above what it held before. On
    the CPU the resident memory of a fresh process, above what it held with all libraries loaded, because a process's
    peak never falls: what else this process has done does not count, and neither does what loading takes for a moment.
    There repeats differ by some ten megabytes (what the system's allocator keeps back and which code is paged in), and
    `answer` must be a function of a module, so that the process can import it.
    """
    device = torch.device(device)
    what = (Path(folder), image_size, batch)
    if device.type == "cuda":
        return _peak_on_gpu(*what, device, answer)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(peak_of_this_process, *what, torch.get_num_threads(), answer).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"the process that measured the memory of {folder} with {batch} images of {image_size} px ended "
                "without an answer, as it does where memory runs out; measure a smaller batch or size"
            ) from error


def _peak_on_gpu(folder: Path, image_size: int, batch: int, device: torch.device, answer: Answer) -> float:
    model, _ = load_model(folder)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with at_rest(model, device), torch.inference_mode():
        answer(model, images_of(image_size, batch, device))
        _wait_for(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE


def peak_of_this_process(folder: Path, image_size: int, batch: int, threads: int, answer: Answer) -> float:
    """`peak_memory` on the CPU, for a fresh process that does nothing else.

    Loading may peak higher than answering does, and would hide it. So ballast is taken until as much memory is in use
    as ever was; from there on every further byte raises the peak, and the ballast is subtracted.
    """
    torch.set_num_threads(threads)
    with torch.inference_mode():
        nn.Conv2d(3, 8, 3)(torch.rand(1, 3, 32, 32)).flatten(1) @ torch.rand(8 * 30 * 30, 8)  # libraries start here
        empty, _ = _memory()
        model, _ = load_model(folder)
        images = images_of(image_size, batch, torch.device("cpu"))
        loaded, highest = _memory()
        ballast = np.ones(math.ceil(highest - loaded + BALLAST), dtype=np.uint8)  # written, so that it is resident
        weight = _memory()[0] - loaded
        answer(model, images)
        _, highest = _memory()
        del ballast
    return (highest - weight - empty) / MEGABYTE


def _memory() -> tuple[int, int]:
    """Bytes that this process holds now, and held at most (both resident)."""
    used = psutil.Process().memory_info()
    if hasattr(used, "peak_wset"):  # Windows
        return used.rss, used.peak_wset
    if sys.platform == "linux":
        # getrusage would give a spawned process the peak of the one that started it
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    import resource  # not on Windows

    return used.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- all of them ------------------------------------------------------------------------------------------------


def measure(
    folder: Path,
    image_size: int,
    device: torch.device | str = "auto",
    *,
    repeats: int = 30,
    warmup: int = 5,
    answer: Answer = pixel_logits,
) -> dict[str, float | int | str]:
    """One row of costs of the model in a checkpoint folder (of `models.save_model`), at one image size.

    What is measured is the way from images to logits for every pixel, the step from queries to a mask included.

    parameters, trainable; gflops of one image (10^9, see `flops_of`); latency_ms_1 and latency_ms_16, medians in
    milliseconds an image at those batches, with quartiles latency_ms_1_low, latency_ms_1_high, …; memory_mb at the peak
    of a batch of 16 (see `peak_memory`); image_size in pixels, repeats, device and threads.
    """
    device = resolve_device(device) if isinstance(device, str) else device
    model, _ = load_model(Path(folder))
    total, trainable = parameter_counts(model)
    row = {"parameters": total, "trainable": trainable, "gflops": flops(model, image_size, answer) / 1e9}
    for batch in BATCHES:
        times = latency(model, image_size, batch, repeats, warmup, device, answer)
        name = f"latency_ms_{batch}"
        row |= {name: times["median"], f"{name}_low": times["low"], f"{name}_high": times["high"]}
    del model  # on a GPU it would count beside the one that is measured
    row["memory_mb"] = peak_memory(folder, image_size, MEMORY_BATCH, device, answer)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return row | {"image_size": image_size, "repeats": repeats, "device": name, "threads": torch.get_num_threads()}
