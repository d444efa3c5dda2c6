"""Stitching: one model's activation in another's place, its known answers, and that nobody's model is changed by it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LinearRegression
from torch import nn

from models import ModelSpec, build_model, lesion_logits
from similarity import Site
from similarity.sites import IMAGE_AXES
from similarity.stitching import Stitch, fit, least_squares, mean_only, stitchable
from tests.made import images_of

IMAGES = images_of(6, side=32)
SWIN = "model.pixel_level_module.encoder.swin.encoder.layers"
MASKS = "model.pixel_level_module.decoder.mask_projection"


class Small(nn.Module):
    """A little segmenter with a batch norm; `middle` emits maps of every rank, without a ReLU behind."""

    def __init__(self, seed=0, width=5):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.middle = nn.Conv2d(8, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        self.broken = False

    def forward(self, images):
        output = self.last(self.middle(self.first(images)))
        if self.broken:
            raise RuntimeError("a wire is loose")
        return F.interpolate(output, size=images.shape[-2:], mode="bilinear")


class Pooled(nn.Module):
    """Cells of so many pixels a side, as a map or as tokens of that stride, and the same as its answer."""

    def __init__(self, side, tokens=None):
        super().__init__()
        self.side, self.tokens = side, tokens
        self.cells, self.again = nn.Identity(), nn.Identity()

    def forward(self, images):
        maps = F.avg_pool2d(images, self.side)
        if self.tokens:
            place = {"batch": 0, "channel": 1, "token": 2}
            maps = maps.flatten(2).permute([place[axis] for axis in self.tokens.split()])
        return self.again(self.cells(maps))

    @property
    def site(self):
        return Site("cells", self.tokens, (self.side,)) if self.tokens else Site("cells", IMAGE_AXES)


def identity(stitch):
    """The same stitch, with T the identity."""
    channels = stitch.transform.out_channels
    stitch.set_map(torch.eye(channels), torch.zeros(channels))
    return stitch


def small_stitch(A, B, images=IMAGES):
    return Stitch(A, "middle", B, "middle", images)


def squared(model, images, targets):
    return (model(images) - targets).square().mean()


def hooks_of(*models):
    return [(name, len(m._forward_hooks)) for model in models for name, m in model.named_modules() if m._forward_hooks]


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]


def unchanged(model, before):
    state, grads, modes = before
    return (
        all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        and grads == [p.requires_grad for p in model.parameters()]
        and modes == [m.training for m in model.modules()]
        and all(p.grad is None for p in model.parameters())
    )


# ------------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize("name", ["unetpp", "mask2former"])
@torch.no_grad()
def test_a_model_stitched_to_itself_by_the_identity_gives_exactly_its_own_answer(name):
    model = build_model(ModelSpec(name, "smoke")).eval()
    images = images_of(2)
    own = lesion_logits(model, images)
    found = [site for site in model.default_sites() if not stitchable(site)]
    assert len(found) == {"unetpp": 20, "mask2former": 7}[name]
    for site in found[::5]:
        stitch = identity(Stitch(model, site, model, site, images))
        with stitch.in_place(images) as receiver:
            assert torch.equal(lesion_logits(receiver, images), own), site.name
            assert receiver is model
        stitch.set_map(0 * stitch.transform.weight[..., 0, 0], stitch.transform.bias)
        with stitch.in_place(images) as receiver:  # so the site does matter
            assert not torch.allclose(lesion_logits(receiver, images), own, atol=1e-3), site.name


def test_least_squares_of_a_model_and_itself_is_the_identity():
    model = Small()
    stitch = small_stitch(model, model)
    least_squares(stitch, IMAGES.split(4))
    torch.testing.assert_close(stitch.transform.weight[..., 0, 0], torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(stitch.transform.bias, torch.zeros(5), atol=1e-5, rtol=0)


def test_least_squares_finds_the_inverse_of_a_mixing_of_channels():
    model, mixed = Small(), Small()
    mixing, shift = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) + 2 * torch.eye(5), torch.arange(5.0)
    with torch.no_grad():  # mixed.middle emits M x + shift, mixed.last takes it apart again
        mixed.middle.weight.copy_(torch.einsum("ij,jkhw->ikhw", mixing, model.middle.weight))
        mixed.middle.bias.copy_(mixing @ model.middle.bias)
        mixed.last.weight.copy_(torch.einsum("ijhw,jk->ikhw", model.last.weight, mixing.inverse()))
        torch.testing.assert_close(mixed.eval()(IMAGES), model.eval()(IMAGES), atol=1e-5, rtol=0)
        mixed.middle.bias += shift
        there, back = small_stitch(model, mixed), small_stitch(mixed, model)
        for stitch, weight, bias in ((there, mixing, shift), (back, mixing.inverse(), -mixing.inverse() @ shift)):
            least_squares(stitch, [IMAGES])
            torch.testing.assert_close(stitch.transform.weight[..., 0, 0], weight, atol=1e-4, rtol=0)
            torch.testing.assert_close(stitch.transform.bias, bias, atol=1e-4, rtol=0)
            torch.testing.assert_close(stitch(IMAGES), stitch.receiver(IMAGES), atol=1e-4, rtol=0)


def test_least_squares_is_that_of_another_library_also_with_more_channels_than_cells():
    for A, cells in ((Small(1, width=4), 10**6), (Small(1, width=700), 500)):
        A, B = A.eval(), Small(2).eval()
        stitch = small_stitch(A, B)
        least_squares(stitch, IMAGES.split(2), cells=cells, seed=3)
        with torch.no_grad():
            rows = [model.middle(model.first(IMAGES)).flatten(2).transpose(1, 2) for model in (A, B)]
            if cells == 500:  # 83 of each image's 256 cells, drawn batch after batch
                generator = torch.Generator().manual_seed(3)
                chosen = torch.cat([torch.rand(2, 256, generator=generator).argsort(1)[:, :83] for _ in range(3)])
                rows = [side[torch.arange(6)[:, None], chosen] for side in rows]
        x, y = (side.flatten(0, 1).double().numpy() for side in rows)
        weight, bias = stitch.transform.weight[..., 0, 0].detach().numpy(), stitch.transform.bias.detach().numpy()
        centred = x - x.mean(0)
        # 8 channels under 3 × 3 are 72 directions, however many come out; what else there is in x is rounding
        assert np.linalg.matrix_rank(centred, rtol=1e-6) == min(x.shape[1], 72)
        shortest = np.linalg.pinv(centred, rcond=1e-6) @ (y - y.mean(0))
        np.testing.assert_allclose(weight.T, shortest, atol=1e-3 * np.abs(shortest).max())
        np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ shortest, atol=1e-3 * y.std())
        if x.shape[1] == 4:
            other = LinearRegression().fit(x, y)
            np.testing.assert_allclose(x @ weight.T + bias, other.predict(x), atol=1e-4 * y.std())


@torch.no_grad()
def test_maps_of_another_grid_are_averaged_or_repeated():
    finer, coarser = Pooled(2), Pooled(8)
    down = identity(Stitch(finer, finer.site, coarser, coarser.site, IMAGES))
    torch.testing.assert_close(down(IMAGES), coarser(IMAGES))
    up = identity(Stitch(coarser, coarser.site, finer, finer.site, IMAGES))
    torch.testing.assert_close(up(IMAGES), coarser(IMAGES).repeat_interleave(4, 2).repeat_interleave(4, 3))
    other = IMAGES[:2, :, :24]  # another size and batch than the example's
    torch.testing.assert_close(down(other), coarser(other))


@pytest.mark.parametrize("axes", ["batch token channel", "token batch channel", "channel token batch"])
@torch.no_grad()
def test_tokens_and_maps_are_stitched_by_stride_and_image_size(axes):
    tokens, maps = Pooled(4, axes), Pooled(4)
    wide = IMAGES[:, :, :20]  # 5 × 8 cells: rows and columns must not change places
    into_map = identity(Stitch(tokens, tokens.site, maps, maps.site, wide))
    assert torch.equal(into_map(wide), maps(wide))
    into_tokens = identity(Stitch(maps, maps.site, tokens, tokens.site, wide))
    assert torch.equal(into_tokens(wide), tokens(wide))


@torch.no_grad()
def test_only_the_call_that_the_site_names_is_replaced():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = nn.Identity()

        def forward(self, images):
            return torch.stack([self.twice((k + 1.0) * images) for k in range(3)])

    A, B = Pooled(1), Thrice()
    own, shift = B(IMAGES), torch.tensor([1.0, 2.0, 3.0])
    for name, place in (("twice@0", 0), ("twice@1", 1), ("twice", 2), ("twice@-2", 1)):
        stitch = Stitch(A, A.site, B, Site(name, IMAGE_AXES), IMAGES)
        stitch.set_map(torch.eye(3), shift)
        expected = own.clone()
        expected[place] = IMAGES + shift[:, None, None]
        torch.testing.assert_close(stitch(IMAGES), expected)
        heard = identity(Stitch(B, Site(name, IMAGE_AXES), A, A.site, IMAGES))
        assert torch.equal(heard(IMAGES), own[place])
    with pytest.raises(ValueError, match="called 3 times"):
        Stitch(A, A.site, B, Site("twice@3", IMAGE_AXES), IMAGES)


@torch.no_grad()
def test_an_element_of_an_output_is_replaced_and_its_neighbours_stay():
    class Many(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap, self.inner = wrap, nn.Module()
            self.inner.forward = lambda images: wrap(images, images + 1)

        def forward(self, images):
            self.made = self.wrap(images, images + 1)
            return self.inner(images)

    A = Pooled(1)
    wraps = {
        "inner:1": lambda a, b: (a, b),
        "inner:-1": lambda a, b: [a, b],
        "inner:maps": lambda a, b: {"own": a, "maps": b},
        "inner:0:1": lambda a, b: ((a, b), None),
        "inner": lambda a, b: (None, b),
    }
    for name, wrap in wraps.items():
        stitch = Stitch(A, A.site, Many(wrap), Site(name, IMAGE_AXES), IMAGES)
        stitch.set_map(torch.zeros(3, 3), torch.full((3,), 7.0))
        answer, expected = stitch(IMAGES), wrap(IMAGES, torch.full_like(IMAGES, 7))
        assert type(answer) is type(expected)
        torch.testing.assert_close(answer, expected)


# -------------------------------------------------------------------------------------------------------- what is kept


def trained_small(seed):
    """Learns where the blue channel is brighter than the red one by its surroundings, which takes its middle."""
    model, images = Small(seed), images_of(32, side=32, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(images), truth(images)).backward()
        optimizer.step()
    return model.eval()


def truth(images):
    return (images[:, 2:] > images[:, :1]).float()


def test_a_trained_giver_keeps_most_and_a_constant_one_keeps_nothing():
    A, B, constant = trained_small(1), trained_small(2), Small(3)
    constant.middle.weight.data.zero_()
    train, test = images_of(32, side=32, seed=5), images_of(16, side=32, seed=6)
    batches = [(images, truth(images)) for images in train.split(8)]

    def task(model, images, targets):
        return F.binary_cross_entropy_with_logits(model(images), targets)

    def kept(giver):
        stitch = small_stitch(giver, B)
        fit(stitch, batches, task, epochs=3, learning_rate=1e-2, seed=0)
        with torch.no_grad():
            return ((stitch(test) > 0) == (truth(test) > 0)).float().mean(), stitch

    own = ((B(test) > 0) == (truth(test) > 0)).float().mean()
    (from_A, _), (from_constant, stitch) = kept(A), kept(constant)
    assert own > 0.8 and from_A > own - 0.03
    assert from_constant < 0.65
    answers = stitch(test)  # nothing of the image is left, at any place in it
    torch.testing.assert_close(answers, answers[:1].expand_as(answers))


def test_what_can_be_known_from_a_constant_is_the_mean():
    constant, B = Small(3), Small(2)
    constant.middle.weight.data.zero_()
    by_squares, by_mean = small_stitch(constant, B), small_stitch(Small(4), B)
    least_squares(by_squares, IMAGES.split(4))
    mean_only(by_mean, IMAGES.split(4))
    torch.testing.assert_close(by_squares(IMAGES), by_mean(IMAGES), atol=1e-6, rtol=0)
    with torch.no_grad():
        own = B.eval().middle(B.first(IMAGES)).mean((0, 2, 3))
    torch.testing.assert_close(by_mean.transform.bias.detach(), own, atol=1e-6, rtol=0)
    constant.middle.weight.data.copy_(1e-5 * torch.randn_like(constant.middle.weight))
    constant.middle.bias.data.fill_(100.0)  # varies by some few of its roundings alone
    with torch.no_grad():
        assert constant.eval().middle(constant.first(IMAGES)).unique().numel() > 1
    least_squares(by_squares, IMAGES.split(4))
    torch.testing.assert_close(by_squares(IMAGES), by_mean(IMAGES), atol=1e-6, rtol=0)


@pytest.mark.parametrize("giver, site_a, receiver, site_b", [
    ("unetpp", "decoder.blocks.x_0_3", "mask2former", MASKS),
    ("mask2former", f"{SWIN}.1.blocks.0", "unetpp", "encoder.layer2.1"),
    ("unetpp", "encoder.layer1.1", "mask2former", f"{SWIN}.2.blocks.0"),
])  # fmt: skip
def test_training_through_either_architecture_changes_the_stitch_alone(giver, site_a, receiver, site_b):
    A, B = (build_model(ModelSpec(name, "smoke"), seed=1).train() for name in (giver, receiver))
    images = images_of(4)
    A.eval()
    stitch = Stitch(A, site_a, B, site_b, images[:2])
    before, hooks = (snapshot(A), snapshot(B)), hooks_of(A, B)  # transformers leaves some of its own
    batches = [(images, (images.mean(1, keepdim=True) > 0.5).float())]

    def task(model, images, masks):
        output = model(images)
        logits = output if torch.is_tensor(output) else output.masks_queries_logits[:, :1]
        return F.binary_cross_entropy_with_logits(F.interpolate(logits, size=64), masks)

    losses = fit(stitch, batches, task, epochs=4, learning_rate=1e-3, seed=0)
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert unchanged(A, before[0]) and unchanged(B, before[1])
    assert not A.training and B.training and hooks_of(A, B) == hooks
    assert {name for name, _ in stitch.named_parameters()} == {"transform.weight", "transform.bias"}


def test_a_seed_decides_everything_and_no_other_draw_is_touched():
    A, B = Small(1), Small(2)
    batches = [(images, torch.zeros(2, 1, 32, 32)) for images in IMAGES.split(2)]

    def trained(seed):
        stitch = small_stitch(A, B)
        losses = fit(stitch, batches, squared, epochs=2, learning_rate=1e-2, seed=seed)
        return losses, stitch.transform.weight.detach().clone()

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    (losses, weight), (again, same), (_, other) = trained(0), trained(0), trained(4)
    assert losses == again and torch.equal(weight, same) and not torch.equal(weight, other)
    assert torch.equal(torch.rand(3), expected)


def test_no_epoch_is_the_least_squares_map():
    stitch, start = small_stitch(Small(1), Small(2)), small_stitch(Small(1), Small(2))
    assert fit(stitch, [(IMAGES, IMAGES[:, :1])], squared, epochs=0, learning_rate=1.0, seed=0) == []
    least_squares(start, [IMAGES])
    assert torch.equal(stitch.transform.weight, start.transform.weight)


# ------------------------------------------------------------------------------------------ what is refused and cleaned


@pytest.mark.parametrize(
    "site, complaint",
    [
        (Site("a", "query batch channel"), "holds queries"),
        (Site("a", "batch token channel", (32, 16, 8)), "maps of strides 32, 16, 8 one after the other"),
        (Site("a", "batch token channel"), "has no map"),
        (Site("a", "batch channel"), "has no map"),
        (Site("a", "batch channel height"), "has no map"),
    ],
)
def test_sites_without_one_map_are_refused_with_a_reason(site, complaint):
    assert complaint in stitchable(site)
    A = Pooled(4)
    with pytest.raises(ValueError, match=complaint):
        Stitch(A, A.site, A, Site("cells", site.axes, site.strides), IMAGES)


def test_what_can_be_stitched_in_our_models_is_all_but_queries_and_joined_maps():
    reasons = {site.name: stitchable(site) for site in build_model(ModelSpec("mask2former", "smoke")).default_sites()}
    refused = [name for name, reason in reasons.items() if reason]
    assert [name.split("model.")[1] for name in refused] == [
        "pixel_level_module.decoder.encoder.layers.0",
        "transformer_module.decoder.layers.0",
        "transformer_module.decoder.mask_predictor.mask_embedder.2",
    ]


def test_wrong_names_strides_settings_and_data_are_refused():
    A, B = Small(1), Small(2)
    with pytest.raises(ValueError, match="unknown site 'centre'"):
        Stitch(A, "centre", B, "middle", IMAGES)
    with pytest.raises(ValueError, match=r"has 64 tokens, but strides \(8,\)"):
        tokens = Pooled(4, "batch token channel")
        Stitch(tokens, Site("cells", tokens.site.axes, (8,)), B, "middle", IMAGES)
    stitch = small_stitch(A, B)
    for options in ({"epochs": -1, "learning_rate": 1.0}, {"epochs": 1, "learning_rate": 0.0}):
        with pytest.raises(ValueError, match="use at least 0, and a rate above 0"):
            fit(stitch, [(IMAGES, IMAGES)], squared, seed=0, **options)
    with pytest.raises(ValueError, match="there is no image"):
        fit(stitch, [], squared, epochs=1, learning_rate=1.0, seed=0)
    with pytest.raises(ValueError, match="there is no image"):
        mean_only(stitch, [])
    with pytest.raises(ValueError, match="became inf; use a lower learning_rate"):
        fit(stitch, [(IMAGES, IMAGES[:, :1] + torch.inf)], squared, epochs=1, learning_rate=1.0, seed=0)
    A.middle.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="'middle@0' emits NaN"):
        least_squares(stitch, [IMAGES])


def test_the_receiver_runs_once_a_block():
    stitch = small_stitch(Small(1), Small(2))
    with pytest.raises(ValueError, match="was called 0 times in the block, 1 in the example"), stitch.in_place(IMAGES):
        pass
    with pytest.raises(ValueError, match="was called 2 times"), stitch.in_place(IMAGES) as receiver:
        receiver(IMAGES), receiver(IMAGES)
    with pytest.raises(ValueError, match="other images than the 1"), stitch.in_place(IMAGES[:1]) as receiver:
        receiver(IMAGES)
    assert not hooks_of(stitch.giver, stitch.receiver)


def test_hooks_and_modes_are_put_back_when_a_pass_breaks():
    A, B = Small(1).train(), Small(2).train()
    stitch = small_stitch(A, B)
    before = snapshot(A), snapshot(B)
    B.broken = True
    with pytest.raises(RuntimeError, match="wire"):
        stitch(IMAGES)
    A.first.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        stitch(IMAGES)
    with pytest.raises(ZeroDivisionError):
        least_squares(stitch, [IMAGES])
    assert not hooks_of(A, B) and unchanged(A, before[0]) and unchanged(B, before[1])


def test_the_giver_stops_where_it_is_listened_to():
    A, B = Small(1), Small(2)
    stitch = identity(small_stitch(A, B))
    expected = stitch(IMAGES)
    A.broken = True  # behind its last layer
    A.last.forward = lambda maps: SimpleNamespace()
    assert torch.equal(stitch(IMAGES), expected)


def test_hooks_of_others_hear_what_the_receiver_goes_on_with():
    A, B = Small(1), Small(2)
    heard = []
    B.middle.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    stitch = small_stitch(A, B)
    stitch(IMAGES)
    assert torch.equal(heard[-1], torch.zeros_like(heard[-1])) and len(heard) == 2
