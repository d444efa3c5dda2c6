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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_pixel_is_found_in_any_precision(dtype):
    shapes = [(4, 4), (8, 8), (16, 16)]  # 336 pixels: bfloat16 itself counts to 256 only
    centres = [
        ((x + 0.5) / width, (y + 0.5) / height) for height, width in shapes for y in range(height) for x in range(width)
    ]
    levels = [level for level, (height, width) in enumerate(shapes) for _ in range(height * width)]
    locations = torch.full((1, len(centres), 1, 3, 1, 2), -9.0)
    locations[0, range(len(centres)), 0, levels, 0] = torch.tensor(centres)
    value = torch.eye(len(centres), dtype=dtype)[None, :, None]  # each pixel has a channel of its own
    weights = torch.ones(1, len(centres), 1, 3, 1, dtype=dtype)
    read = deformable_attention(value, shapes, locations.to(dtype), weights)  # centres are exact in all of these
    assert read.dtype == dtype
    assert torch.equal(read, value[:, :, 0])


def test_in_16_bits_the_model_answers_nearly_as_in_32(monkeypatch):
    model = build_model(ModelSpec("mask2former", "smoke")).eval()
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def answers():
        with torch.no_grad():
            return model(images).pixel_decoder_last_hidden_state, lesion_logits(model, images)

    def away(found, wanted):
        assert torch.isfinite(found).all()
        return float((found.float() - wanted).norm() / wanted.norm())

    exact = answers()
    with torch.autocast("cpu", torch.bfloat16):
        ours = answers()
        monkeypatch.setattr(room, "MOST_PIXELS", 0)
        theirs = answers()
    rounding = 2**-8  # of bfloat16, relative
    assert 0 < away(ours[0], exact[0]) < 4 * rounding
    # queries attend where a mask is above one half: a rounded mask can let a whole pixel in or out
    assert away(ours[1], exact[1]) < 0.25
    # the library samples in 32 bits under autocast: it sees nearly the same maps
    assert away(ours[0], theirs[0]) < rounding


def test_a_model_of_16_bits_trains_through_it():
    model = build_model(ModelSpec("mask2former", "smoke")).bfloat16()
    lesion_logits(model, torch.rand(1, 3, 128, 128, dtype=torch.bfloat16)).sum().backward()
    layer = model.model.pixel_level_module.decoder.encoder.layers[0].self_attn
    for part in (layer.value_proj, layer.sampling_offsets, layer.attention_weights):
        assert torch.isfinite(part.weight.grad).all() and part.weight.grad.any()
