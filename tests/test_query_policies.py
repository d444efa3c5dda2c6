"""Queries: their plain mean, and the mean weighted by what each adds to the model's own answer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import ModelSpec, build_model, lesion_logits, query_weights
from similarity import Recording, Site, open_reader, record, record_models
from similarity.hooks import run_quietly
from similarity.policies import POLICIES, canonical, reduce, weighs_queries
from similarity.reading import normalized
from tests.made import batches, images_of

DECODER = "model.transformer_module.decoder"
LAYERS = [f"{DECODER}.layers.0"]
EMBEDDER = f"{DECODER}.mask_predictor.mask_embedder.2"


@pytest.fixture(scope="module")
def mask2former():
    return build_model(ModelSpec("mask2former", "smoke"))


def outputs_of(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


def hooks_of(model):
    return [name for name, module in model.named_modules() if module._forward_hooks]


class Seeker(nn.Module):
    """Three queries look at an image; the answer weights them by how bright they find it. Emits (batch, query, C)."""

    def __init__(self, queries=3, axes="batch query channel"):
        super().__init__()
        torch.manual_seed(0)
        self.axes = axes
        self.patch = nn.Conv2d(3, 4, 8, 8)
        self.look = nn.Linear(4, queries * 4)
        self.turn = nn.Identity()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        seen = self.look(self.patch(images).mean((2, 3))).unflatten(1, (-1, 4))
        order = [("batch", "query", "channel").index(axis) for axis in self.axes.split()]
        self.turn(seen.permute(order))  # not contiguous unless the order is its own
        return SimpleNamespace(scores=seen.mean(-1))

    def query_weights(self, output):
        return output.scores.softmax(-1)


def seen_by(model, images):
    with torch.no_grad():
        seen = model.look(model.patch(images).mean((2, 3))).unflatten(1, (-1, 4))
    return seen, seen.mean(-1).softmax(-1)


def seek(model, images, policy="mask", size=4, **options):
    return record(model, batches(images, size), {"turn": model.axes}, policy, **options)


# ---------------------------------------------------------------------------------------------------------- the mean


def test_mean_is_gap_by_another_name(mask2former):
    assert canonical("mean") == "gap"
    assert [canonical(policy) for policy in ("gap", "mask", "grid:4")] == ["gap", "mask", "grid:4"]
    assert "same as gap" in POLICIES["mean"]
    both = record_models({"m": mask2former}, batches(images_of(4)), policies=("gap", "mean"))["m"]
    assert both["mean"].policy == "mean" and both["mean"].names == both["gap"].names
    assert all(torch.equal(both["mean"][name], both["gap"][name]) for name in both["gap"].names)


# ------------------------------------------------------------------------------- the model's share, on known answers


def test_mask2formers_weights_are_class_times_mean_mask_of_its_last_layer(mask2former):
    output = outputs_of(mask2former, images_of(3))
    weights = mask2former.query_weights(output)
    classes, masks = output.class_queries_logits, output.masks_queries_logits
    for image in range(3):
        for query in range(5):
            odds = classes[image, query].exp()
            lesion = odds[1] / odds.sum()  # background, lesion, no object
            pixels = [1 / (1 + torch.exp(-logit)) for logit in masks[image, query].flatten()]
            assert weights[image, query].item() == pytest.approx((lesion * sum(pixels) / len(pixels)).item(), rel=1e-4)


def test_the_weights_are_the_terms_of_the_semantic_inference(mask2former):
    """Averaged over pixels, Σ_q p_q(lesion) σ(m_q) is the sum of the weights."""
    output = outputs_of(mask2former, images_of(2))
    lesion = output.class_queries_logits.softmax(-1)[..., 1]
    semantic = torch.einsum("bq,bqhw->bhw", lesion, output.masks_queries_logits.sigmoid())
    torch.testing.assert_close(mask2former.query_weights(output).sum(1), semantic.mean((1, 2)))


def test_a_query_that_answers_alone_is_the_whole_row():
    classes, masks = torch.zeros(1, 3, 3), torch.zeros(1, 3, 4, 4)
    classes[0, :, 2] = 50  # no object …
    classes[0, 1] = torch.tensor([0.0, 50, 0])  # … but for query 1: lesion
    weights = query_weights(SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks))
    torch.testing.assert_close(normalized(weights, 1), torch.tensor([[0.0, 1, 0]]))


def test_a_query_that_paints_twice_as_much_weighs_twice_as_much():
    classes, masks = torch.zeros(1, 2, 3), torch.full((1, 2, 4, 4), -100.0)
    masks[0, 0, 0] = masks[0, 1, :2] = 100.0  # a quarter, a half
    weights = query_weights(SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks))
    torch.testing.assert_close(weights, torch.tensor([[1 / 12, 1 / 6]]))


def test_where_one_query_is_the_answer_it_has_all_the_weight_and_the_model_another_hash():
    semantic, single = (
        build_model(ModelSpec("mask2former", "smoke", answer=answer)) for answer in ("semantic", "query:1")
    )
    loader = batches(images_of(3))
    site = [LAYERS[0]]
    chosen = record(single, loader, site, "mask")
    every = record(single, loader, site, "tokens")
    torch.testing.assert_close(chosen[LAYERS[0]], every[LAYERS[0]][:, 1])
    assert chosen.model_hash != record(semantic, loader, site, "mask").model_hash


def test_recorded_rows_are_the_weighted_means_of_the_queries(mask2former):
    """Layers emit (query, batch, channel), the embedder (batch, query, channel); 5 images and 5 queries."""
    images = images_of(5)
    got = record_models({"m": mask2former}, batches(images, 5), {"m": [*LAYERS, EMBEDDER]}, ("mask", "tokens"))["m"]
    weights = mask2former.query_weights(outputs_of(mask2former, images))
    for name in [*LAYERS, EMBEDDER]:
        every = got["tokens"][name]
        expected = torch.stack([(w[:, None] * rows).sum(0) / w.sum() for w, rows in zip(weights, every)])
        torch.testing.assert_close(got["mask"][name], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got["mask"][name], every.mean(1), rtol=1e-3)


def test_sites_without_queries_are_pooled_over_space(mask2former):
    both = record_models({"m": mask2former}, batches(images_of(4)), policies=("gap", "mask"))["m"]
    assert both["mask"].names == both["gap"].names
    queries = [site.name for site in both["gap"].sites if "query" in site.axes]
    assert queries == [*LAYERS, EMBEDDER]
    for name in both["gap"].names:
        assert torch.equal(both["mask"][name], both["gap"][name]) == (name not in queries)


def test_models_without_queries_need_no_weights():
    unetpp = build_model(ModelSpec("unetpp", "smoke"))
    both = record_models({"m": unetpp}, batches(images_of(4, 32)), policies=("gap", "mask"))["m"]
    assert all(torch.equal(both["mask"][name], both["gap"][name]) for name in both["gap"].names)


# --------------------------------------------------------------------------------------------------- rows and images


def test_one_differing_image_changes_only_its_row_under_mask(mask2former):
    one = images_of(5)
    two = one.clone()
    two[3] = images_of(1, seed=9)[0]
    sites = mask2former.default_sites()
    reader = open_reader(mask2former, one, sites, ("mask",), strict=True)
    before, after = reader.read(one), reader.read(two)
    assert {name for name, _ in before} == {site.name for site in sites}
    for key, rows in before.items():
        gap = (rows - after[key]).abs().amax(1)
        assert (gap > 1e-5 * rows.abs().max()).nonzero().flatten().tolist() == [3], key


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_change_rows_under_mask(mask2former, size):
    images = images_of(65)
    whole, parts = (record(mask2former, batches(images, s), policy="mask") for s in (64, size))
    assert (whole.ids, whole.sites, whole.data_hash) == (parts.ids, parts.sites, parts.data_hash)
    for name in whole.names:
        assert (whole[name] - parts[name]).abs().max() < 1e-4 * whole[name].abs().max(), name


def test_the_order_of_images_does_not_change_a_row(mask2former):
    images = images_of(9)
    straight = record(mask2former, batches(images, 4), policy="mask")
    order = [4, 8, 0, 3, 1, 7, 2, 6, 5]
    shuffled = record(mask2former, batches(images[order], 5, [straight.ids[i] for i in order]), policy="mask")
    assert shuffled.ids != straight.ids and shuffled.data_hash == straight.data_hash
    back = shuffled.select(ids=straight.ids)
    for name in straight.names:
        assert (straight[name] - back[name]).abs().max() < 1e-4 * straight[name].abs().max(), name
    assert back.image_hashes == straight.image_hashes


@pytest.mark.parametrize("axes", ["batch query channel", "query batch channel", "channel query batch"])
def test_every_order_of_axes_gives_the_same_rows(axes):
    model, images = Seeker(axes=axes), images_of(7)
    rows, weights = seen_by(model, images)
    torch.testing.assert_close(seek(model, images)["turn"], torch.einsum("bq,bqc->bc", weights, rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_models_in_other_precisions_are_summed_in_single_or_better(dtype):
    images = images_of(6)
    single, other = seek(Seeker(), images), seek(Seeker().to(dtype), images)
    assert other["turn"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(other["turn"].float(), single["turn"], rtol=0.03, atol=0.03)


def test_mask2former_in_bfloat16_is_recorded_under_mask(mask2former):
    images = images_of(4)
    single = record(mask2former, batches(images), [EMBEDDER], "mask")[EMBEDDER]
    half = record(copy.deepcopy(mask2former).bfloat16(), batches(images), [EMBEDDER], "mask")[EMBEDDER]
    assert half.dtype == torch.float32
    assert (half - single).abs().max() < 0.1 * single.abs().max()


def test_shares_of_half_precision_weights_are_exact_though_their_sum_is_not():
    """In bfloat16, 257 ones add up to 256."""
    assert normalized(torch.ones(1, 257, dtype=torch.bfloat16), 1).sum().item() == pytest.approx(1, abs=1e-6)


def test_a_place_beside_the_queries_is_averaged_plainly():
    site = Site("x", "query token channel batch")
    tensor = torch.rand(3, 5, 4, 2)
    weights = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    got = reduce(tensor, site, "mask", (8, 8), weights)
    mean = tensor.mean(1)
    torch.testing.assert_close(got, torch.stack([mean[0, :, 0], (mean[1, :, 1] + mean[2, :, 1]) / 2]))
    assert weighs_queries(site, "mask") and not weighs_queries(site, "gap")
    with pytest.raises(ValueError, match="needs the weights of the queries at site 'x'; none were given"):
        reduce(tensor, site, "mask", (8, 8))


def test_an_in_place_successor_does_not_reach_into_the_queries_that_were_held():
    class Scaling(Seeker):
        def forward(self, images):
            output = super().forward(images)
            self.last.mul_(1000)
            return output

    model, images = Scaling(), images_of(4)
    model.turn.register_forward_hook(lambda _m, _i, out: setattr(model, "last", out))
    rows, weights = seen_by(model, images)
    torch.testing.assert_close(seek(model, images)["turn"], torch.einsum("bq,bqc->bc", weights, rows))


# ------------------------------------------------------------------------------------------- whose answer, and whether


def test_the_models_own_output_gives_the_weights_whatever_forward_returns(mask2former):
    images = images_of(4)
    plain, through = (
        record(mask2former, batches(images), LAYERS, "mask", forward=forward) for forward in (None, lesion_logits)
    )
    assert all(torch.equal(plain[name], through[name]) for name in LAYERS)


@pytest.mark.parametrize(
    "forward, times",
    [
        (lambda model, images: model.forward(images), 0),
        (lambda model, images: (model(images), model(images.flip(-1))), 2),
    ],
)
def test_a_pass_with_another_number_of_answers_than_one_is_refused(forward, times):
    model = Seeker()
    with pytest.raises(ValueError, match=rf"Seeker itself was called {times} times in this one; let `forward` call"):
        seek(model, images_of(4), forward=forward)
    assert hooks_of(model) == []


def test_a_model_that_does_not_say_its_weights_is_refused_before_any_pass_over_data():
    class Silent(Seeker):
        query_weights = None

    model = Silent()
    with pytest.raises(ValueError, match=r"site 'turn' .* and Silent does not say it; give it a method query_weights"):
        seek(model, images_of(4))
    with pytest.raises(ValueError, match="or use 'gap', their plain mean"):
        open_reader(model, images_of(4), [Site("turn", model.axes)], ("mask",))
    assert model.calls == 0
    assert seek(model, images_of(4), "gap")["turn"].shape == (4, 4)


def test_a_site_with_another_number_of_queries_than_weights_is_refused():
    class Short(Seeker):
        def query_weights(self, output):
            return output.scores[:, :2].softmax(-1)

    with pytest.raises(ValueError, match=r"site 'turn' has 3 queries for each of 4 images, and the model weights 2"):
        seek(Short(), images_of(4))


@pytest.mark.parametrize(
    "given, named",
    [
        (lambda w: w * torch.tensor([1, 0, 1, 1.0])[:, None], "'ISIC_0000001'"),
        (
            lambda w: w.masked_fill(torch.eye(4, 3).bool() & (torch.arange(4) == 2)[:, None], torch.nan),
            "'ISIC_0000002'",
        ),
        (lambda w: -w, "'ISIC_0000000', 'ISIC_0000001', 'ISIC_0000002', 'ISIC_0000003'"),
        (lambda w: w + torch.tensor([0, 0, 0, torch.inf])[:, None], "'ISIC_0000003'"),
    ],
    ids=["all zero", "nan", "negative", "infinite"],
)
def test_weights_that_have_no_mean_are_refused_with_the_images_named(given, named):
    class Bad(Seeker):
        def query_weights(self, output):
            return given(super().query_weights(output))

    model = Bad()
    with pytest.raises(ValueError, match=rf"not all zero for every image; they are not for {named}, so 'mask'"):
        seek(model, images_of(4))
    assert hooks_of(model) == []


def test_rows_are_named_where_no_ids_are_known_and_many_are_counted():
    with pytest.raises(ValueError, match=r"for row 0 of the batch, .* row 4 of the batch and 3 more, so"):
        normalized(torch.zeros(8, 2), 8)


@pytest.mark.parametrize("given", [torch.ones(3), torch.ones(2, 5), torch.ones(4, 5, 1), [0.5, 0.5]])
def test_weights_of_another_form_are_refused(given):
    with pytest.raises(ValueError, match=r"query_weights must give a tensor \(batch, query\) for 4 images, got"):
        normalized(given, 4)


def test_a_failing_pass_leaves_no_hook_on_the_model():
    class Failing(Seeker):
        def forward(self, images):
            super().forward(images)
            if self.calls > 1:
                raise RuntimeError("out of memory, say")

    model = Failing().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        seek(model, images_of(4))
    assert hooks_of(model) == [] and model.training


def test_hooks_that_a_user_put_there_stay(mask2former):
    seen = []
    handle = mask2former.register_forward_hook(lambda _m, _i, _o: seen.append(1))
    hooks = hooks_of(mask2former)
    record(mask2former, batches(images_of(3)), LAYERS, "mask")
    assert "" in hooks and hooks_of(mask2former) == hooks and len(seen) == 2  # listing, reading
    handle.remove()


def test_a_recording_under_mask_is_saved_and_loaded(tmp_path, mask2former):
    whole = record(mask2former, batches(images_of(4)), LAYERS, "mask")
    whole.save(tmp_path / "mask.safetensors")
    back = Recording.load(tmp_path / "mask.safetensors", model=mask2former)
    assert back.policy == "mask" and back.image_hashes == whole.image_hashes
    assert all(torch.equal(back[name], whole[name]) for name in LAYERS)


def test_a_reader_gives_the_rows_that_a_recording_keeps(mask2former):
    images = images_of(6)
    policies = ("mask", "gap", "tokens")
    kept = record_models({"m": mask2former}, batches(images), {"m": LAYERS}, policies)["m"]
    sites = [mask2former.declare_site(name) for name in LAYERS]
    rows = open_reader(mask2former, images, sites, policies).read(images)
    assert set(rows) == {(name, policy) for name in LAYERS for policy in policies}
    assert all(torch.equal(tensor, kept[policy][name]) for (name, policy), tensor in rows.items())


def test_reading_leaves_gradients_and_modes_alone():
    model, images = Seeker().train(), images_of(4)
    rows = open_reader(model, images, [Site("turn", model.axes)], ("mask",)).read(images)
    assert not rows["turn", "mask"].requires_grad and model.training
    run_quietly(model, images)
