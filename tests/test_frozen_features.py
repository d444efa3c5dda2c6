"""Cached encoder features: what the encoder would have answered, for the pixels that were asked."""

import pytest
import torch

import model_sites
from frozen_features import NAME, cache_features
from models import ModelSpec, build_model, lesion_logits
from utils import InputError

UNETPP = ModelSpec("unetpp", "smoke", freeze=("encoder",))
MASK2FORMER = ModelSpec("mask2former", "smoke", freeze=("encoder",))


def images(n=6, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def counted(model, monkeypatch):
    """Pictures that the encoder itself was given."""
    encoder, seen = model_sites.encoder_of(model), []
    compute = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda x: seen.append(len(x)) or compute(x))
    return seen


@pytest.mark.parametrize("spec", [UNETPP, MASK2FORMER])
def test_read_features_give_the_same_answer_in_any_order(spec, tmp_path, monkeypatch):
    model, x = build_model(spec).eval(), images()
    expected = lesion_logits(model, x)
    seen = counted(model, monkeypatch)
    cache = cache_features(model, tmp_path, rows=10)
    torch.testing.assert_close(lesion_logits(model, x[:4]), expected[:4])
    del seen[:]
    order = [3, 5, 0, 1, 4]  # old and new ones in a batch
    torch.testing.assert_close(lesion_logits(model, x[order]), expected[order])
    assert seen == [2]  # pictures 5 and 4
    torch.testing.assert_close(lesion_logits(model, x), expected, rtol=1e-4, atol=1e-5)
    assert seen == [2] and (cache.computed, cache.read) == (6, 9)
    del seen[:]
    torch.testing.assert_close(lesion_logits(model, x.flip(-1)), lesion_logits(build_model(spec).eval(), x.flip(-1)))
    assert seen == [6]  # a mirrored picture is another picture


def test_the_decoder_still_trains_on_read_features(tmp_path):
    model, twin, x = build_model(UNETPP).train(), build_model(UNETPP).train(), images()
    cache_features(model, tmp_path, rows=6)
    for _ in range(2):
        for each in (model, twin):
            each.zero_grad()
            lesion_logits(each, x).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        assert (mine.grad is None) == (theirs.grad is None) == name.startswith("encoder.")
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_another_run_finds_the_files_and_a_name_cut_short_is_no_row(tmp_path, monkeypatch):
    x = images()
    first = build_model(UNETPP).eval()
    cache_features(first, tmp_path, rows=6)
    expected = lesion_logits(first, x)
    (log,) = tmp_path.rglob("rows.bin")
    log.write_bytes(log.read_bytes()[: -NAME // 2])  # killed while it wrote
    second = build_model(UNETPP).eval()
    seen = counted(second, monkeypatch)
    cache_features(second, tmp_path, rows=6)
    torch.testing.assert_close(lesion_logits(second, x), expected)
    assert seen == [1, 1]  # the shapes are asked of one picture, and the last one is computed again
    other = build_model(UNETPP, seed=1).eval()
    cache_features(other, tmp_path, rows=6)
    assert not torch.allclose(lesion_logits(other, x), expected)  # other weights, other files


def test_full_files_and_other_sizes_are_computed(tmp_path):
    model, x = build_model(UNETPP).eval(), images()
    expected, small = lesion_logits(model, x), lesion_logits(model, images(size=32))
    cache_features(model, tmp_path, rows=3)
    for _ in range(2):
        torch.testing.assert_close(lesion_logits(model, x), expected)
        torch.testing.assert_close(lesion_logits(model, images(size=32)), small)


def test_what_trains_is_not_cached_and_a_full_disk_is_said(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="set freeze to"):
        cache_features(build_model(ModelSpec("unetpp", "smoke")), tmp_path, rows=3)
    model = build_model(UNETPP).eval()
    cache_features(model, tmp_path, rows=10**9)
    with pytest.raises(InputError, match="more than is free there; leave cache_features out"):
        model(images())
