"""Deformable attention as a matrix product, against the library's sampling and against pixels read by hand."""

import copy

import pytest
import torch
from transformers.models.mask2former import modeling_mask2former as library

import deformable_attention as room
from deformable_attention import deformable_attention
from models import ModelSpec, build_model, lesion_logits

SHAPES = [(2, 3), (4, 6), (8, 12)]
PIXELS = sum(height * width for height, width in SHAPES)


def inputs(batch=2, queries=5, heads=3, channels=4, points=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, PIXELS, heads, channels, generator=g)
    locations = torch.rand(batch, queries, heads, len(SHAPES), points, 2, generator=g) * 1.6 - 0.3  # some lie outside
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, generator=g)
    return [tensor.requires_grad_() for tensor in (value, locations, weights)]


def test_values_and_gradients_are_the_librarys():
    mine, theirs = inputs(), inputs()
    a = deformable_attention(mine[0], SHAPES, *mine[1:])
    b = library.multi_scale_deformable_attention(theirs[0], SHAPES, *theirs[1:])
    torch.testing.assert_close(a, b)
    for each in (a, b):
        (each * torch.linspace(-1, 1, each.numel()).view_as(each)).sum().backward()
    for x, y in zip(mine, theirs):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_a_pixels_centre_reads_that_pixel_and_a_corner_the_mean_of_four():
    value = torch.zeros(1, PIXELS, 1, 1)
    start, (height, width) = 2 * 3, SHAPES[1]
    value[0, start + 1 * width + 2] = 8.0  # row 1, column 2 of the second level
    locations = torch.full((1, 3, 1, 3, 1, 2), -9.0)  # far outside: nothing
    locations[0, 0, 0, 1, 0] = torch.tensor([2.5 / width, 1.5 / height])
    locations[0, 1, 0, 1, 0] = torch.tensor([3 / width, 2 / height])
    read = deformable_attention(value, SHAPES, locations, torch.ones(1, 3, 1, 3, 1))
    torch.testing.assert_close(read.flatten(), torch.tensor([8.0, 2.0, 0.0]))


@pytest.mark.parametrize("size, fast", [(64, True), (256, False)])
def test_the_model_answers_alike_by_either_way(size, fast, monkeypatch):
    model = build_model(ModelSpec("mask2former", "smoke")).eval()
    images = torch.rand(2, 3, size, size)
    calls = []
    ours = deformable_attention
    monkeypatch.setattr(room, "deformable_attention", lambda *args: calls.append(1) or ours(*args))
    with torch.no_grad():
        answer = lesion_logits(copy.deepcopy(model), images)
        assert bool(calls) == fast
        monkeypatch.setattr(room, "MOST_PIXELS", 0 if fast else 10**6)
        torch.testing.assert_close(lesion_logits(model, images), answer, rtol=1e-4, atol=1e-4)
