"""What was spent up to a site: sums that can be counted by hand, and totals that are the network's own."""

import timm
import torch
from torch import nn

from costs import flops, parameter_counts
from processing.spending import spent_by_site
from similarity import Site

MAP = ("batch", "channel", "height", "width")


class Chain(nn.Module):
    """Two convolutions, the second used twice, and a head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, images):
        x = self.second(self.first(images * self.scale))
        return self.head(self.second(x).mean((2, 3)))


def test_sums_are_those_counted_by_hand():
    sites = [Site("first", MAP), Site("second@0", MAP), Site("second@1", MAP), Site("head", ("batch", "channel"))]
    spent = spent_by_site(Chain(), sites, 8)
    # 1 of the scale; 3·4 + 4, 4·4 + 4, 4·2 + 2
    assert spent["parameters"].tolist() == [17, 37, 37, 47]
    # two operations a multiply-accumulate, on 64 pixels, and of the head on one mean
    assert spent["operations"].tolist() == [2 * 64 * 12, 2 * 64 * 28, 2 * 64 * 44, 2 * 64 * 44 + 2 * 8]


def test_a_transformer_has_spent_all_but_its_head_at_the_last_norm():
    body = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=5)
    tokens = ("batch", "token", "channel")
    spent = spent_by_site(body, [Site("blocks.0", tokens), Site("blocks.1", tokens), Site("norm", tokens)], 32)
    block = parameter_counts(body.blocks[0])[0]
    before = body.pos_embed.numel() + body.cls_token.numel() + parameter_counts(body.patch_embed)[0]
    assert spent["parameters"].tolist()[:2] == [before + block, before + 2 * block]
    assert spent.loc["norm", "parameters"] == parameter_counts(body)[0] - parameter_counts(body.head)[0]
    assert spent.loc["norm", "operations"] == flops(body, 32) - 2 * 24 * 5
    assert spent.loc["blocks.1", "operations"] - spent.loc["blocks.0", "operations"] > 0


def test_parameters_that_are_used_without_a_call_count_when_their_module_ends():
    attention = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 12, 4, stride=4), attention

        def forward(self, images):
            return self.block(self.embed(images).flatten(2).mT)

    spent = spent_by_site(Tokens(), [Site("block", ("batch", "token", "channel"))], 16)
    assert spent.loc["block", "parameters"] == parameter_counts(Tokens())[0]


def test_hooks_are_gone_and_modes_are_as_they_were():
    model = Chain().train()
    spent_by_site(model, [Site("first", MAP)], 8)
    assert model.training and not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
