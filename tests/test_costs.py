"""What running a model costs: operations by hand arithmetic, memory of known allocations, calls that are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import costs
from models import ModelSpec, build_model, save_model
from utils import InputError

HELD = 10_000_000  # bytes an image


def hungry(model, images):
    """An answer that holds a known amount of memory while the model runs."""
    held = np.ones(len(images) * HELD, dtype=np.uint8)
    return model(images), held.sum()


class Counting(nn.Module):
    """Remembers each call: the batch's shape, its own mode, and whether gradients were on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)
        self.calls = []

    def forward(self, images):
        self.calls.append(
            (tuple(images.shape), self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        )
        return self.layer(images)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "best"
    save_model(build_model(ModelSpec(name="mask2former", preset="smoke", freeze=("encoder",))), folder)
    return folder


# ---- operations -------------------------------------------------------------------------------------------------


def test_a_convolution_costs_two_operations_a_multiply_accumulate():
    layer = nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2)
    assert costs.flops(layer, 32) == 2 * (16 * 16) * 8 * (3 * 5 * 5)


def test_groups_divide_the_operations_of_a_convolution():
    layer = nn.Conv2d(6, 12, kernel_size=3, padding=1, groups=3)
    assert costs.flops_of(layer, torch.rand(1, 6, 8, 8)) == 2 * 64 * 12 * (6 // 3 * 9)


def test_linear_layers_are_counted_row_by_row_and_add_up():
    layers = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5, bias=False))
    assert costs.flops_of(layers, torch.rand(4, 9, 7)) == 2 * 4 * 9 * (7 * 11 + 11 * 5)


@pytest.mark.parametrize("training", [True, False])
def test_attention_is_counted_though_a_fused_kernel_computes_it(training):
    batch, tokens, width, heads, hidden = 2, 10, 32, 4, 64
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True).train(training)
    projections = tokens * width * 3 * width + tokens * width * width
    attention = 2 * tokens * tokens * width  # queries × keys, and their weights × values
    expected = 2 * batch * (projections + attention + 2 * tokens * width * hidden)
    fused = torch.backends.mha.get_fastpath_enabled()
    assert costs.flops_of(layer, torch.rand(batch, tokens, width)) == expected
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_operations_grow_with_the_pixels_of_a_fully_convolutional_model():
    model = build_model(ModelSpec(preset="smoke"))
    assert costs.flops(model, 128) == 4 * costs.flops(model, 64) > 0


# ---- parameters -------------------------------------------------------------------------------------------------


def test_parameters_are_counted_and_frozen_ones_are_not_trainable():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6))
    model[0].requires_grad_(False)
    assert costs.parameter_counts(model) == (4 * 3 * 9 + 4 + 5 * 6 + 6, 5 * 6 + 6)


# ---- time -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 16])
def test_every_timed_run_follows_the_warm_up_in_inference_mode(batch):
    model = Counting().train()
    times = costs.run_times(model, 8, batch, repeats=7, warmup=3)
    assert len(times) == 7 and (times > 0).all()
    assert model.calls == [((batch, 3, 8, 8), False, False, True)] * 10


def test_the_median_lies_between_the_quartiles_of_the_timed_runs():
    row = costs.latency(Counting(), 8, batch=2, repeats=9, warmup=0)
    assert 0 < row["low"] <= row["median"] <= row["high"] and (row["batch"], row["repeats"]) == (2, 9)


def test_warm_up_runs_are_not_among_the_times(monkeypatch):
    clock = iter([0.0, 100.0, 0.0, 50.0, 0.0, 0.004, 0.0, 0.008])  # seconds: two slow first runs, two warm ones
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    assert costs.run_times(Counting(), 8, batch=2, repeats=2, warmup=2) == pytest.approx([2.0, 4.0])


def test_another_answer_than_the_forward_is_timed_when_asked_for():
    seen = []
    costs.run_times(Counting(), 8, 1, repeats=2, warmup=1, answer=lambda model, images: seen.append(images.shape))
    assert len(seen) == 3


def test_measuring_leaves_each_modules_mode_and_the_gradients_as_they_were():
    model = nn.Sequential(Counting(), nn.BatchNorm2d(2), nn.Dropout()).train()
    model[1].eval()  # as of a frozen part
    modes = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone()
    costs.flops(model, 8)
    costs.latency(model, 8, repeats=2, warmup=1)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert torch.is_grad_enabled() and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model[1].running_mean, statistics)
    assert model(torch.rand(1, 3, 8, 8)).requires_grad


def test_a_model_that_fails_is_given_back_as_it_was():
    class Failing(Counting):
        def forward(self, images):
            raise RuntimeError("out of luck")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of luck"):
        costs.latency(model, 8, repeats=1, warmup=0)
    assert model.training and model.layer.training and torch.is_grad_enabled()


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}, {"batch": 0}, {"image_size": 0}])
def test_impossible_runs_are_refused(options):
    arguments = {"image_size": 8, "batch": 1, "repeats": 1, "warmup": 0} | options
    with pytest.raises(InputError, match="at least"):
        costs.run_times(Counting(), **arguments)


# ---- memory, and all together -----------------------------------------------------------------------------------


def test_twice_the_batch_needs_the_memory_that_it_is_known_to_hold(checkpoint):
    row = costs.measure(checkpoint, 64, "cpu", repeats=2, warmup=1, answer=hungry)
    twice = costs.peak_memory(checkpoint, 64, 2 * costs.MEMORY_BATCH, answer=hungry)
    held = costs.MEMORY_BATCH * HELD / 1e6
    # the smoke model itself is small: 36 MB with 16 images, 16 MB more with 32 of them
    assert held < row["memory_mb"] < held + 80
    assert held < twice - row["memory_mb"] < held + 50
    model = build_model(ModelSpec(name="mask2former", preset="smoke", freeze=("encoder",)))
    assert (row["parameters"], row["trainable"]) == costs.parameter_counts(model)
    assert row["trainable"] < row["parameters"]
    assert row["gflops"] == pytest.approx(costs.flops(model, 64) / 1e9, rel=1e-12)
    for batch in costs.BATCHES:
        low, median, high = (row[f"latency_ms_{batch}{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= median <= high
    assert (row["device"], row["threads"], row["image_size"]) == ("cpu", torch.get_num_threads(), 64)


def test_a_folder_without_a_model_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(InputError, match=r"no model\.json"):
        costs.measure(tmp_path, 64, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: memory on a GPU was not measured")
def test_on_a_gpu_a_larger_batch_needs_more_and_nothing_stays_behind(checkpoint):
    before = torch.cuda.memory_allocated()
    small, large = (costs.peak_memory(checkpoint, 64, batch, "cuda") for batch in (4, 32))
    assert 0 < small < large
    assert torch.cuda.memory_allocated() == before
    assert costs.measure(checkpoint, 64, "cuda", repeats=2, warmup=1)["device"] == torch.cuda.get_device_name()
