"""Class and register tokens have no place in the image: every policy leaves them out."""

import pytest
import torch
from torch import nn

from similarity import Recording, Site, record
from similarity.policies import reduce, row_shape
from similarity.stitching import Stitch

TOKENS = ("batch", "token", "channel")
SITE = Site("blocks", TOKENS, (16,), "encoder", (2 + 6, 3), prefix=2)  # 32 × 48 pixels, patches of 16


@pytest.fixture
def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)


def test_means_are_over_patches_alone(tokens):
    torch.testing.assert_close(reduce(tokens, SITE, "gap", (32, 48)), tokens[:, 2:].mean(1))


def test_maps_are_laid_out_from_the_first_patch(tokens):
    full = reduce(tokens, SITE, "map", (32, 48))
    assert full.shape == (4, 3, 2, 3)
    assert torch.equal(full[:, :, 1, 2], tokens[:, -1]) and torch.equal(full[:, :, 0, 0], tokens[:, 2])
    assert torch.equal(reduce(tokens, SITE, "tokens", (32, 48)), tokens[:, 2:])


@pytest.mark.parametrize("policy", ["gap", "tokens", "flat:2", "map", "grid:2"])
def test_no_policy_sees_them_and_the_expected_shape_is_the_true_one(tokens, policy):
    other = tokens.clone()
    other[:, :2] += 100
    rows = reduce(tokens, SITE, policy, (32, 48))
    assert torch.equal(rows, reduce(other, SITE, policy, (32, 48)))
    assert tuple(rows.shape[1:]) == row_shape(SITE, policy, (32, 48))


def test_they_are_counted_only_among_tokens():
    with pytest.raises(ValueError, match="1 prefix tokens need an axis 'token'"):
        Site("conv", ("batch", "channel", "height", "width"), prefix=1)


def test_a_kept_recording_remembers_them(tokens, tmp_path):
    made = Recording({"blocks": tokens[:, 2:].mean(1)}, list("abcd"), [SITE], "gap", "m", "d")
    made.save(tmp_path / "r.safetensors")
    assert Recording.load(tmp_path / "r.safetensors").sites[0].prefix == 2


class Patches(nn.Module):
    """Images to a class token and the means of their patches, passed on by `blocks`."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Identity()

    def forward(self, images):
        cells = nn.functional.avg_pool2d(images, 16).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([cells.sum(1, keepdim=True), cells], 1))


def test_recorded_rows_are_means_of_the_patches(tokens):
    images = torch.rand(5, 3, 32, 48)
    site = Site("blocks", TOKENS, (16,), prefix=1)
    rows = record(Patches(), [(images, list("abcde"))], [site], "gap")
    torch.testing.assert_close(rows["blocks"], images.mean((2, 3)))


def test_nothing_is_stitched_in_where_a_class_token_would_pass_by():
    site, images = Site("blocks", TOKENS, (16,), prefix=1), torch.rand(2, 3, 32, 48)
    with pytest.raises(ValueError, match="1 class or register tokens that no map can stand in for"):
        Stitch(Patches(), site, Patches(), site, images)
    assert Stitch(Patches(), site, nn.Sequential(nn.Conv2d(3, 2, 1)), "0", images).given(images).shape == (2, 3, 2, 3)
