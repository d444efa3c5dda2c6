"""Recording: every row has an image, every axis a name, every call an address, and no pass leaves a trace."""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from models import ModelSpec, build_model
from similarity import Recording, Site, list_sites, measures, plane, record, record_models
from similarity.hooks import Listener, quiet, run_quietly
from similarity.policies import reduce
from similarity.recording import hash_model
from tests.made import batches, images_of

DECODER = "model.transformer_module.decoder"
EMBEDDER = f"{DECODER}.mask_predictor.mask_embedder.2"
QUERIES = ("query", "batch", "channel")


@pytest.fixture(scope="module")
def unetpp():
    return build_model(ModelSpec("unetpp", "smoke"))


@pytest.fixture(scope="module")
def mask2former():
    return build_model(ModelSpec("mask2former", "smoke"))


@pytest.fixture(scope="module", params=["unetpp", "mask2former"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def pictures(model):
    """65 of them: batches of 64, of 7 and of 1 all end differently."""
    return images_of(65, 32 if model.spec.name == "unetpp" else 64)


@pytest.fixture(scope="module")
def recorded(model, pictures):
    return record(model, batches(pictures, 64))


def hooks_of(model):
    return {name: len(module._forward_hooks) for name, module in model.named_modules() if module._forward_hooks}


class Small(nn.Module):
    """conv, a ReLU used on maps and on vectors, and a head that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.relu(self.norm(x).mean((2, 3)))
        return self.head(self.dropout(self.head(x)))


# ------------------------------------------------------------------------------------------- the pipeline on itself


def of_itself(name, images):
    """What the table says a site scores with itself, at the measure's defaults."""
    return {"1": 1, "0": 0, "(k + 1)/n": 2 / images}[measures.MEASURES[name].identical]


def sites_for(name, recording):
    """A regression on as many features as images does not extrapolate, not even to itself."""
    wide = {site for site in recording.names if recording[site].shape[1] > len(recording) // 2}
    return [site for site in recording.names if name != "linear_regression_r2" or site not in wide]


def test_a_model_against_itself_scores_as_the_table_says_at_every_site_with_every_measure(recorded):
    for name in measures.MEASURES:
        values = plane(name, recorded, recorded).frame()
        for site in sites_for(name, recorded):
            # a feature that is silent in all training images is not predicted in a held-out one
            allowed = 0.01 if name == "linear_regression_r2" else 1e-9
            assert values.loc[site, site] == pytest.approx(of_itself(name, 65), abs=allowed), (name, site)


def test_one_row_per_image_id_at_every_site(recorded):
    assert recorded.ids == [f"ISIC_{i:07d}" for i in range(65)]
    assert all(recorded[site].shape[0] == 65 and recorded[site].ndim == 2 for site in recorded.names)


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size_does_not_change_a_recording(model, recorded, pictures, size):
    again = record(model, batches(pictures, size))
    assert (again.ids, again.sites, again.model_hash, again.data_hash) == (
        recorded.ids,
        recorded.sites,
        recorded.model_hash,
        recorded.data_hash,
    )
    for site in recorded.names:
        scale = recorded[site].abs().max()
        assert (again[site] - recorded[site]).abs().max() < 1e-4 * scale, site
    for name in measures.MEASURES:
        values = plane(name, recorded, again).frame()
        # rounding may swap two neighbours that are almost equally far
        local = ("mutual_knn", "cknna", "information_imbalance", "linear_regression_r2")
        allowed = 0.01 if name in local else 1e-4
        expected = of_itself(name, 65)
        for site in sites_for(name, recorded):
            assert values.loc[site, site] == pytest.approx(expected, abs=allowed), (name, site)


def test_recording_twice_gives_the_same_numbers_and_leaves_the_model_as_it_was(model):
    state, hooks = hash_model(model), hooks_of(model)
    modes = [module.training for module in model.modules()]
    one, two = (record(model, batches(images_of(6))) for _ in range(2))
    assert all(torch.equal(one[site], two[site]) for site in one.names)
    assert hash_model(model) == state  # batch norm's running statistics too
    assert hooks_of(model) == hooks
    assert [module.training for module in model.modules()] == modes


def test_shuffled_rows_are_refused_unless_ids_say_where_they_belong(unetpp):
    images = images_of(12, 32)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    straight = record(unetpp, batches(images), ["encoder.layer4.1"])
    ids = [straight.ids[i] for i in order]
    shuffled = record(unetpp, batches(images[order], 5, ids), ["encoder.layer4.1"])
    assert plane("linear_cka", straight, shuffled).values[0, 0] == pytest.approx(1, abs=1e-6)
    mislabelled = record(unetpp, batches(images[order], 5, straight.ids), ["encoder.layer4.1"])
    assert plane("linear_cka", straight, mislabelled).values[0, 0] < 0.5
    strangers = record(unetpp, batches(images, 5, [f"other{i}" for i in range(12)]), ["encoder.layer4.1"])
    with pytest.raises(ValueError, match="hold different images: 12 only in A, 12 only in B"):
        plane("linear_cka", straight, strangers)


# ------------------------------------------------------------------------------------------------- axes and positions


def changed_rows(model, sites, policy="gap", count=5, changed=3):
    """{site: rows that differ} when one image of the batch is replaced; count = queries, so that no shape tells."""
    one = images_of(count)
    two = one.clone()
    two[changed] = images_of(1, seed=9)[0]
    both = []
    for images in (one, two):
        with Listener(model, sites, lambda site, tensor: reduce(tensor, site, policy, (64, 64))) as listener:
            run_quietly(model, images)
            both.append(listener.take())
    differ = {}
    for name, before in both[0].items():
        gap = (before - both[1][name]).flatten(1).abs().amax(1)
        differ[name] = (gap > 1e-5 * before.abs().max()).nonzero().flatten().tolist()
    return differ


def test_a_batch_in_which_one_image_differs_changes_only_its_row_at_every_site(model):
    sites = model.default_sites()
    assert changed_rows(model, sites) == {site.name: [3] for site in sites}
    spatial = [site for site in sites if site.spatial]
    assert changed_rows(model, spatial, "flat:2") == {site.name: [3] for site in spatial}


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "tu-convnext_atto"])
def test_other_encoders_have_sites_too_each_with_a_row_per_image(encoder):
    model = build_model(ModelSpec("unetpp", "smoke", options={"encoder_name": encoder}))
    sites = model.default_sites()
    assert {site.part for site in sites} == {"encoder", "decoder"}
    assert changed_rows(model, sites) == {site.name: [3] for site in sites}


def test_a_wrong_declaration_fails_the_one_image_check(mask2former):
    """5 images and 5 queries: the shape (5, 5, C) fits both ways round, and only the check can tell."""
    site = f"{DECODER}.layers.0"
    assert changed_rows(mask2former, [Site(site, QUERIES)]) == {site: [3]}
    assert changed_rows(mask2former, [Site(site, ("batch", "query", "channel"))]) == {site: [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("count", [4, 5])
def test_queries_declared_as_batch_are_refused_even_where_the_numbers_agree(mask2former, count):
    wrong = [Site(f"{DECODER}.layers.0", ("batch", "query", "channel"))]
    with pytest.raises(ValueError, match=r"along its 'batch' axis for 1 images; its axes .* are declared wrongly"):
        record(mask2former, batches(images_of(count), count), wrong)


def test_axes_of_another_rank_are_refused():
    with pytest.raises(ValueError, match=r"site 'conv' emits shape \(1, 6, 64, 64\), but its axes are"):
        record(Small(), batches(images_of(4)), {"conv": "batch token channel"})
    with pytest.raises(ValueError, match="must be distinct, hold 'batch' and 'channel'"):
        record(Small(), batches(images_of(4)), {"conv": "batch channels height width"})


def test_unetpp_sites_come_in_execution_order_which_is_not_the_order_of_names(unetpp):
    expected = ["x_0_0", "x_1_1", "x_2_2", "x_3_3", "x_0_1", "x_1_2", "x_2_3", "x_0_2", "x_1_3", "x_0_3", "x_0_4"]
    names = [name for name in record(unetpp, batches(images_of(4))).names if name.startswith("decoder")]
    assert names == [f"decoder.blocks.{block}" for block in expected]
    assert [site.name for site in unetpp.default_sites() if site.part == "decoder"] == names
    named = [name for name, _ in unetpp.named_modules() if name in names]
    assert sorted(named) == sorted(names) and named != names
    reversed_request = record(unetpp, batches(images_of(4)), names[::-1])
    assert reversed_request.names == names


def test_tokens_are_pooled_over_tokens_never_over_channels(mask2former):
    block = "model.pixel_level_module.encoder.swin.encoder.layers.1.blocks.0"
    images = images_of(4)
    caught = []
    module = mask2former.get_submodule(mask2former.declare_site(block).name)
    handle = module.register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
    run_quietly(mask2former, images)
    handle.remove()
    tokens = caught[0]
    assert tokens.shape == (4, 64, 32)  # 8 × 8 tokens, 32 channels
    pooled = record(mask2former, batches(images), [block])[mask2former.declare_site(block).name]
    torch.testing.assert_close(pooled, tokens.mean(1))


def test_swin_tokens_are_laid_out_as_the_model_lays_them_out(mask2former):
    """Every stage's map, put through the backbone's own output norm, is the backbone's own feature map."""
    images = images_of(4)
    encoder = mask2former.model.pixel_level_module.encoder
    caught = []
    handle = encoder.register_forward_hook(lambda _m, _i, out: caught.append(out))
    stages = [site for site in mask2former.default_sites() if ".blocks." in site.name and site.part == "encoder"]
    maps = record(mask2former, batches(images), stages, "map")
    handle.remove()
    assert len(stages) == 4
    for i, site in enumerate(stages):
        norm = encoder.hidden_states_norms[f"stage{i + 1}"]
        with torch.no_grad():
            ours = norm(maps[site.name].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, caught[-1].feature_maps[i], rtol=1e-4, atol=1e-5)


def test_the_patch_embedding_has_its_tokens_where_its_convolution_put_them(mask2former):
    norm = mask2former.default_sites()[0]
    projection = norm.name.replace("norm", "patch_embeddings.projection")
    images = images_of(4)
    maps = record(mask2former, batches(images), [norm, projection], "map")
    expected = F.layer_norm(maps[projection].permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[norm.name], expected, rtol=1e-4, atol=1e-4)


def test_maps_of_the_pixel_decoder_are_its_finest_level(mask2former):
    images = images_of(4)
    level = mask2former.model.pixel_level_module
    caught = []
    handle = level.register_forward_hook(lambda _m, _i, out: caught.append(out))
    site = "model.pixel_level_module.decoder.encoder.layers.0"
    maps = record(mask2former, batches(images), [site], "map")
    handle.remove()
    scales = caught[-1].decoder_hidden_states
    assert [tuple(scale.shape[-2:]) for scale in scales] == [(2, 2), (4, 4), (8, 8)]
    torch.testing.assert_close(maps[site], scales[2], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ policies


def slow_cells(maps, cells):
    """Means over the cells of a g × g grid, one by one."""
    n, c, height, width = maps.shape
    grid = torch.zeros(n, cells * cells, c)
    for i in range(cells):
        for j in range(cells):
            top, bottom = i * height // cells, -(-(i + 1) * height // cells)
            left, right = j * width // cells, -(-(j + 1) * width // cells)
            grid[:, i * cells + j] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return grid


@pytest.mark.parametrize("cells", [1, 2, 3, 4])
def test_policies_agree_with_slow_twins(cells):
    model, images = Small().eval(), images_of(5, 24)
    with torch.no_grad():
        maps = model.conv(images)
    policies = ("gap", f"grid:{cells}", f"flat:{cells}", "tokens", "map")
    got = record_models({"m": model}, batches(images, 2), {"m": ["conv"]}, policies)["m"]
    grid = slow_cells(maps, cells)
    expected = {
        "gap": maps.mean((2, 3)),
        f"grid:{cells}": grid,
        f"flat:{cells}": grid.reshape(5, -1),
        "tokens": torch.stack([maps[:, :, i, j] for i in range(24) for j in range(24)], dim=1),
        "map": maps,
    }
    for policy, tensor in expected.items():
        torch.testing.assert_close(got[policy]["conv"], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[f"grid:{cells}"].matrix("conv"), grid.reshape(-1, 6), rtol=1e-4, atol=1e-5)


def test_gap_of_queries_is_the_mean_over_queries(mask2former):
    site = f"{DECODER}.layers.0"
    several = record_models({"m": mask2former}, batches(images_of(6), 3), {"m": [site]}, ("gap", "tokens"))["m"]
    assert several["tokens"][site].shape == (6, 5, 32)
    torch.testing.assert_close(several["gap"][site], several["tokens"][site].mean(1))


def test_grids_are_refused_where_features_have_no_place_and_left_out_by_default(mask2former):
    with pytest.raises(ValueError, match=r"policy 'grid:2' needs space, and site .*layers.0' has axes .*use 'gap'"):
        record(mask2former, batches(images_of(4)), [f"{DECODER}.layers.0"], "grid:2")
    default = record(mask2former, batches(images_of(4)), policy="grid:2")
    assert len(default.names) == 8 and not [name for name in default.names if DECODER in name]


def test_a_map_smaller_than_the_grid_is_refused_because_its_cells_would_repeat_as_rows(mask2former):
    # stride 32: 2 × 2 of 64 × 64 pixels; under the name that the installed transformers gives it
    last = mask2former.declare_site("model.pixel_level_module.encoder.swin.encoder.layers.3.blocks.0").name
    assert record(mask2former, batches(images_of(4)), [last], "grid:2")[last].shape[1] == 4
    with pytest.raises(ValueError, match=r"'grid:4' needs a larger map: site .* has 2 × 2 cells for images of 64 × 64"):
        record(mask2former, batches(images_of(4)), [last], "grid:4")
    assert last not in record(mask2former, batches(images_of(4)), policy="grid:4").names


@pytest.mark.parametrize("policy", ["grid", "grid:", "grid:0", "grid:-1", "grid:x", "gap:2", "mask:2", "average", ""])
def test_unknown_policies_are_named_before_any_pass(policy):
    with pytest.raises(ValueError, match=r"unknown policy .*; choose from gap, grid:g"):
        record(Untouchable(), batches(images_of(4)), ["conv"], policy)


def test_maps_have_no_rows_to_compare():
    maps = record(Small(), batches(images_of(4)), ["conv"], "map")
    with pytest.raises(ValueError, match=r"full maps .* record with 'gap'"):
        plane("linear_cka", maps)


def test_models_of_one_state_but_another_normalisation_have_another_hash():
    plain, bright = Small(), Small()
    bright.load_state_dict(plain.state_dict())
    assert hash_model(plain) == hash_model(bright)
    bright.recording_key = "imagenet"
    assert hash_model(plain) != hash_model(bright)


def test_a_site_that_was_not_recorded_is_named_with_the_closest():
    recording = record(Small(), batches(images_of(4)), ["conv"])
    with pytest.raises(ValueError, match=r"site 'convv' was not recorded; closest: 'conv'"):
        recording["convv"]


def test_integer_outputs_are_pooled_as_numbers():
    class Winner(nn.Module):
        def forward(self, x):
            return x.argmax(1, keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Winner())
    got = record(model, batches(images_of(4)), {"1": "batch channel height width"})
    with torch.no_grad():
        torch.testing.assert_close(got["1"], model(images_of(4)).float().mean((2, 3)))


# ------------------------------------------------------------------------------------------- calls and their addresses


def test_every_call_of_a_module_is_addressable():
    model, images = Small().eval(), images_of(5)
    got = record(model, batches(images, 2), ["head", "head@0", "head@1", "head@-1", "head@-2"])
    with torch.no_grad():
        first = model.head(torch.relu(model.norm(torch.relu(model.conv(images))).mean((2, 3))))
        second = model.head(first)
    for name, expected in {
        "head": second,
        "head@0": first,
        "head@1": second,
        "head@-1": second,
        "head@-2": first,
    }.items():
        assert got[name].shape == (5, 6)
        torch.testing.assert_close(got[name], expected)


@pytest.mark.parametrize("name", ["head@2", "head@-3"])
def test_a_call_that_does_not_come_is_reported_with_the_number_that_did(name):
    with pytest.raises(ValueError, match=rf"site '{name}' did not fire as asked: its module was called 2 times"):
        record(Small(), batches(images_of(4)), [name])


def test_a_module_reused_on_other_shapes_is_recorded_at_the_call_asked_for():
    model, images = Small().eval(), images_of(4)
    got = record(model, batches(images), {"relu": "batch channel", "relu@0": "batch channel height width"})
    with torch.no_grad():
        maps = torch.relu(model.conv(images))
        torch.testing.assert_close(got["relu@0"], maps.mean((2, 3)))
        torch.testing.assert_close(got["relu"], torch.relu(model.norm(maps).mean((2, 3))))


def test_an_in_place_successor_does_not_reach_into_what_was_recorded():
    model, images = Small().eval(), images_of(4)
    for policy in ("map", "tokens", "gap"):
        got = record(model, batches(images), ["conv"], policy)["conv"]
        with torch.no_grad():
            maps = model.conv(images)
        assert (got < 0).any()
        torch.testing.assert_close(
            got, {"map": maps, "tokens": maps.flatten(2).transpose(1, 2), "gap": maps.mean((2, 3))}[policy]
        )


def test_the_mask_embedder_is_called_once_before_and_once_per_layer_and_gives_one_row_per_image(mask2former):
    layers = len(mask2former.get_submodule(f"{DECODER}.layers"))
    calls = [f"{EMBEDDER}@{k}" for k in range(layers + 1)]
    got = record(mask2former, batches(images_of(16), 16), [EMBEDDER, *calls])
    assert all(got[name].shape == (16, 32) for name in got.names)  # not one for every call
    assert torch.equal(got[EMBEDDER], got[calls[-1]])
    assert not torch.allclose(got[EMBEDDER], got[calls[0]])
    with pytest.raises(ValueError, match=f"its module was called {layers + 1} times"):
        record(mask2former, batches(images_of(4)), [f"{EMBEDDER}@{layers + 1}"])


@pytest.mark.parametrize("size", [1, 7, 16])
def test_the_first_mask_embedding_is_constant_and_is_reported_so_never_as_a_number(mask2former, size):
    got = record(mask2former, batches(images_of(16), size), [EMBEDDER, f"{EMBEDDER}@0"])
    for name in measures.MEASURES:
        result = plane(name, got)
        cell = (f"{EMBEDDER}@0", EMBEDDER)
        assert result.frame().loc[cell] != result.frame().loc[cell]  # NaN
        assert "is constant: every image has the same features" in result.notes[cell]
        if name != "linear_regression_r2":  # 16 images, 32 features
            assert result.frame().loc[EMBEDDER, EMBEDDER] == pytest.approx(of_itself(name, 16))


# --------------------------------------------------------------------------------------------------- selecting elements


class Emitter(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(x.mean((2, 3)))


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner = Emitter(wrap)

    def forward(self, x):
        self.inner(x)
        return x


@dataclass
class TwoStates(ModelOutput):
    last: torch.Tensor = None
    states: tuple = None


SELECTED = {
    "tuple": (lambda v: (None, v), "inner:1"),
    "from the end": (lambda v: (-v, 2 * v, v), "inner:-1"),
    "list": (lambda v: [v, -v], "inner:0"),
    "dict": (lambda v: {"a": -v, "b": v}, "inner:b"),
    "ModelOutput": (lambda v: TwoStates(last=-v, states=(2 * v, v)), "inner:states:1"),
    "nested": (lambda v: OrderedDict(out=({"x": v}, None)), "inner:out:0:x"),
    "first call of a dict": (lambda v: {"a": v, "b": -v}, "inner@0:a"),
    "one tensor in a tuple needs none": (lambda v: (v, None), "inner"),
}


@pytest.mark.parametrize("wrap, name", SELECTED.values(), ids=SELECTED)
def test_elements_of_outputs_are_selected_by_index_and_key(wrap, name):
    got = record(Wrapped(wrap), batches(images_of(5), 2), {name: "batch channel"})
    torch.testing.assert_close(got[name], images_of(5).mean((2, 3)))


@pytest.mark.parametrize(
    "wrap, name, complaint",
    [
        (lambda v: (v, -v), "inner", "emits a tuple, not a tensor; choose an element: ':0', ':1'"),
        (lambda v: {"a": v}, "inner", "emits a dict, not a tensor; choose an element: ':a'"),
        (lambda v: TwoStates(last=v), "inner", "emits a TwoStates, not a tensor; choose an element: ':last'"),
        (lambda v: (v, -v), "inner:2", "a tuple has no element '2'"),
        (lambda v: {"a": v}, "inner:b", "a dict has no element 'b'"),
        (lambda v: None, "inner", r"emits nothing \(None\)"),
        (lambda v: {"a": None}, "inner:a", r"emits nothing \(None\)"),
        (lambda v: v, "inner:0", "a Tensor has no element '0'"),
    ],
)
def test_what_is_not_one_tensor_is_said_with_the_choices(wrap, name, complaint):
    with pytest.raises(ValueError, match=complaint):
        record(Wrapped(wrap), batches(images_of(4)), {name: "batch channel"})


# ------------------------------------------------------------------------------------------------- names and their fate


class Untouchable(Small):
    def forward(self, x):
        raise AssertionError("the model must not be run")


@pytest.mark.parametrize("name", ["convv", "heads", "Head@0", "head.0:x"])
def test_an_unknown_site_fails_before_any_pass_with_the_closest_names(name):
    with pytest.raises(ValueError, match=rf"unknown site '{name}'; closest modules: .*('conv'|'head')"):
        record(Untouchable(), batches(images_of(4)), [name])


def test_an_unknown_site_of_our_models_is_answered_with_the_closest_names(mask2former, unetpp):
    with pytest.raises(ValueError, match=r"unknown site 'encoder.layer4.7'; closest modules: .*'encoder.layer4.1"):
        record(unetpp, iter(()), ["encoder.layer4.7"])
    with pytest.raises(ValueError, match=r"unknown site .*closest modules: .*decoder\.layers\.0'"):
        record(mask2former, iter(()), [f"{DECODER}.layers.9"])


def test_both_spellings_of_transformers_find_the_same_site(mask2former):
    new = "model.pixel_level_module.encoder.swin.encoder.layers.0.blocks.0"
    old = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0"
    assert mask2former.declare_site(old) == mask2former.declare_site(new)


@pytest.mark.parametrize(
    "sites, complaint",
    [
        ("conv", r"give a list of names, such as \['conv'\]"),
        (["conv", "conv"], "site 'conv' is asked for twice"),
        ([], "sites is empty"),
        (["conv@x"], "is not of the form"),
        (["dropout"], r"axes of site 'dropout' \(Dropout\) are not declared; say them"),
        (["head:0"], "axes of site 'head:0' .* are not declared"),
    ],
)
def test_malformed_requests_fail_before_any_pass(sites, complaint):
    with pytest.raises(ValueError, match=complaint):
        record(Untouchable(), batches(images_of(4)), sites)


def test_sites_can_be_names_objects_or_a_dict_of_axes():
    model, loader = Small(), batches(images_of(4))
    ways = [
        ["conv"],
        ("conv",),
        [Site("conv", ("batch", "channel", "height", "width"))],
        [Site("conv", "batch channel height width")],
        {"conv": "batch channel height width"},
        {"conv": ["batch", "channel", "height", "width"]},
    ]
    got = [record(model, loader, way) for way in ways]
    assert all(torch.equal(one["conv"], got[0]["conv"]) and one.sites == got[0].sites for one in got)


def test_a_module_under_two_names_answers_to_both():
    model = Small()
    model.alias = model.head
    got = record(model, batches(images_of(4)), ["head@0", "alias@0", "alias"])
    assert torch.equal(got["head@0"], got["alias@0"])
    assert not torch.equal(got["alias"], got["alias@0"])


def test_without_declarations_every_module_of_known_layout_is_recorded():
    assert record(Small(), batches(images_of(4))).names == ["conv", "norm", "head"]


def test_a_linear_layer_on_tokens_is_left_out_of_the_default_because_its_layout_is_not_known():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.mix, self.out = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.mix(self.patch(x).flatten(2).transpose(1, 2)).mean(1))

    assert record(Tokens(), batches(images_of(4))).names == ["patch", "out"]
    declared = record(Tokens(), batches(images_of(4)), {"mix": "batch token channel"})
    assert declared["mix"].shape == (4, 4)


def test_listed_sites_carry_the_shapes_seen(unetpp):
    sites = list_sites(unetpp, images_of(2))
    assert sites[0].name == "encoder.relu" and sites[0].shape == (64, 32, 32)
    assert sites[-1].name == "decoder.blocks.x_0_4" and sites[-1].shape == (8, 64, 64)


# ------------------------------------------------------------------------------------------------ hooks, modes, devices


class Failing(Small):
    def __init__(self, at):
        super().__init__()
        self.passes, self.at = 0, at

    def forward(self, x):
        self.passes += 1
        x = super().forward(x)
        if self.passes == self.at:
            raise RuntimeError("out of memory, say")
        return x


@pytest.mark.parametrize("at", [1, 2, 3])
def test_hooks_are_removed_and_modes_restored_even_when_the_forward_pass_raises(at):
    model = Failing(at).train()
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="out of memory, say"):
        record(model, batches(images_of(8), 4), ["conv", "head"])
    assert hooks_of(model) == {}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert record(model, batches(images_of(8), 4), ["conv", "head"])["conv"].shape == (8, 6)


def test_a_refused_site_leaves_no_hook_behind():
    model = Small().train()
    with pytest.raises(ValueError, match="emits shape"):
        record(model, batches(images_of(4)), {"conv": "batch channel"})
    assert hooks_of(model) == {} and model.training


def test_recording_runs_in_eval_mode_without_gradients_and_restores_a_training_model():
    model = Small().train()
    seen = []
    model.norm.register_forward_hook(lambda module, _i, out: seen.append((module.training, out.requires_grad)))
    statistics = model.norm.running_mean.clone()
    got = record(model, batches(images_of(8), 4), ["head"])
    assert set(seen) == {(False, False)}
    assert torch.equal(model.norm.running_mean, statistics) and model.training and model.norm.training
    assert torch.equal(got["head"], record(model.eval(), batches(images_of(8), 4), ["head"])["head"])
    assert not got["head"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_precisions_are_fed_and_recorded(dtype):
    loader = batches(images_of(8), 4)
    single, other = (record(Small().to(d), loader, ["conv", "head"]) for d in (torch.float32, dtype))
    for site in single.names:
        assert other[site].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(other[site].float(), single[site], rtol=0.05, atol=0.05)


def test_a_model_without_parameters_and_a_custom_forward():
    got = record(nn.Sequential(nn.MaxPool2d(4)), batches(images_of(4)), ["0"])
    torch.testing.assert_close(got["0"], F.max_pool2d(images_of(4), 4).mean((2, 3)))
    twice = record(Small(), batches(images_of(4)), ["conv"], forward=lambda model, images: model(2 * images))
    torch.testing.assert_close(twice["conv"], record(Small(), batches(2 * images_of(4)), ["conv"])["conv"])


def test_several_models_and_policies_share_one_pass_over_the_data():
    passes = []

    def loader():
        passes.append(1)
        yield from batches(images_of(6), 4)

    got = record_models(
        {"a": Small(), "b": Small().double()}, loader(), {"a": ["conv"], "b": ["head"]}, ("gap", "tokens")
    )
    assert passes == [1] and set(got) == {"a", "b"} and set(got["a"]) == {"gap", "tokens"}
    assert got["a"]["gap"].data_hash == got["b"]["tokens"].data_hash
    assert torch.equal(got["a"]["gap"]["conv"], record(Small(), batches(images_of(6), 4), ["conv"])["conv"])


# ----------------------------------------------------------------------------------------------------------- image ids


@pytest.mark.parametrize(
    "batch, ids",
    [
        (lambda x: (x, ["a", "b", "c", "d"]), ["a", "b", "c", "d"]),
        (lambda x: [x, (7, 3, 5, 1)], ["7", "3", "5", "1"]),
        (lambda x: (x, torch.tensor([7, 3, 5, 1])), ["7", "3", "5", "1"]),
        (lambda x: {"image": x, "id": list("wxyz"), "mask": None}, list("wxyz")),
        (lambda x: SimpleNamespace(image=x, mask=None, id=list("wxyz")), list("wxyz")),
    ],
    ids=["pair", "ints", "tensor", "dict", "sample"],
)
def test_batches_may_come_in_several_forms(batch, ids):
    assert record(Small(), [batch(images_of(4))], ["conv"]).ids == ids


@pytest.mark.parametrize(
    "loader, complaint",
    [
        (lambda x: [(x, list("abca"))], "image id 'a' comes twice"),
        (lambda x: [(x, list("abcd")), (x, list("efgb"))], "image id 'b' comes twice"),
        (lambda x: [(x, list("abc"))], "a batch has 4 images but 3 ids"),
        (lambda x: [(x, "abcd")], "one id each"),
        (lambda x: [x], "each batch must have .image and .id"),
        (lambda x: [(x, x, list("abcd"))], "each batch must have .image and .id"),
        (lambda x: [(x.numpy(), list("abcd"))], "must hold a tensor of images"),
        (lambda x: [], "the loader gave no batch"),
    ],
)
def test_images_without_one_id_each_are_refused(loader, complaint):
    with pytest.raises(ValueError, match=complaint):
        record(Small(), loader(images_of(4)), ["conv"])


def test_a_recording_made_by_hand_must_have_one_row_per_distinct_id():
    site = Site("x", ("batch", "channel"))
    with pytest.raises(ValueError, match="1 image ids come twice"):
        Recording({"x": torch.ones(3, 2)}, ["a", "b", "a"], [site], "gap", "", "")
    with pytest.raises(ValueError, match="site 'x' has 3 rows for 2 image ids"):
        Recording({"x": torch.ones(3, 2)}, ["a", "b"], [site], "gap", "", "")


def test_selecting_images_and_parts(unetpp):
    whole = record(unetpp, batches(images_of(6)))
    some = whole.select(part="decoder", ids=[whole.ids[4], whole.ids[1]])
    assert some.ids == [whole.ids[4], whole.ids[1]]
    assert torch.equal(some["decoder.blocks.x_0_4"], whole["decoder.blocks.x_0_4"][[4, 1]])
    with pytest.raises(ValueError, match="1 ids were not recorded, first 'nobody'"):
        whole.select(ids=["nobody"])
    with pytest.raises(ValueError, match=r"no site of part 'neck' was recorded; parts: \['decoder', 'encoder'\]"):
        whole.select(part="neck")


# ------------------------------------------------------------------------------------------------------ save and load


def test_a_saved_recording_comes_back_whole(tmp_path, mask2former):
    recording = record(mask2former, batches(images_of(5), 2))
    recording.save(tmp_path / "deep" / "recording.safetensors")
    back = Recording.load(tmp_path / "deep" / "recording.safetensors", model=mask2former, data_hash=recording.data_hash)
    assert (back.ids, back.sites, back.policy, back.names) == (
        recording.ids,
        recording.sites,
        recording.policy,
        recording.names,
    )
    assert all(torch.equal(back[site], recording[site]) for site in back.names)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["recording.safetensors"]


def test_loading_with_another_model_or_other_data_is_an_error(tmp_path):
    model, path = Small(), tmp_path / "r.safetensors"
    recording = record(model, batches(images_of(5)), ["conv", "head"])
    recording.save(path)
    touched = Small()
    with torch.no_grad():
        touched.norm.running_mean[0] += 1e-6  # not even a parameter
    for other in (touched, "0123456789abcdef"):
        with pytest.raises(ValueError, match="was recorded with another model"):
            Recording.load(path, model=other)
    repainted = images_of(5)
    repainted[2, 0, 0, 0] += 0.01
    other_data = record(model, batches(repainted), ["conv"]).data_hash
    with pytest.raises(ValueError, match="was recorded with another data"):
        Recording.load(path, model=model, data_hash=other_data)


def test_the_data_hash_knows_ids_and_pixels_but_not_their_order_or_batching():
    model, images, ids = Small(), images_of(6), list("abcdef")
    hashes = [
        record(model, batches(images, 4, ids), ["conv"]).data_hash,
        record(model, batches(images.flip(0), 5, ids[::-1]), ["conv"]).data_hash,
        record(model, batches(images, 4, ids[::-1]), ["conv"]).data_hash,
        record(model, batches(images.bfloat16(), 4, ids), ["conv"]).data_hash,
        record(model, batches(images, 4, ids), ["conv"], data_hash="mine").data_hash,
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4 and hashes[4] == "mine"


def test_a_file_of_another_kind_is_not_a_recording(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is not a recording of this version"):
        Recording.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("freeze", [True, False])
def test_a_quiet_model_is_afterwards_as_it_was_part_by_part(freeze):
    model = Small().train()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), quiet(model, freeze=freeze):
        assert not any(module.training for module in model.modules())
        assert any(parameter.requires_grad for parameter in model.parameters()) != freeze
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
