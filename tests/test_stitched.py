"""Stitched segmentation: which stitches are planned, what a row of scores is, and the summary on known numbers."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import bootstrap

from dataset import SegmentationDataset, find_splits, make_loader
from images import Transform
from inference import score
from loss_metrics import dice_bce
from models import ModelSpec, build_model, lesion_logits, sites
from similarity.stitching import stitchable
from studies.stitched import StitchJob, matched_sites, plan, stitched_scores, summarize
from utils import InputError

LAST = "decoder.blocks.x_0_4"  # no skip connection runs past it
SETTINGS = {"images": 6, "batch_size": 4, "learning_rate": 1e-3, "seed": 0, "device": torch.device("cpu")}
PIXEL = "model.pixel_level_module.decoder"
UNTRAINED = {name: f"{name}-untrained" for name in ("u0", "u1", "m0", "m1")}


@pytest.fixture(scope="module")
def datasets(synthetic_root):
    splits = find_splits(synthetic_root)
    return {name: SegmentationDataset(splits[name], Transform(size=64)) for name in ("train", "test")}


@pytest.fixture(scope="module")
def networks(datasets):
    """A UNet++ whose last blocks have learnt the training images a little, an untrained one, and a Mask2Former."""
    learnt, untrained = (build_model(ModelSpec("unetpp", "smoke"), seed).eval() for seed in (0, 9))
    batch = next(iter(make_loader(datasets["train"], 12)))
    learnt.requires_grad_(False)
    for part in (learnt.decoder.blocks["x_0_3"], learnt.decoder.blocks["x_0_4"], learnt.segmentation_head):
        part.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in learnt.parameters() if p.requires_grad], 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        dice_bce(lesion_logits(learnt, batch.image), batch.mask).backward()
        optimizer.step()
    optimizer.zero_grad()
    return {"u0": learnt, "u-untrained": untrained, "m0": build_model(ModelSpec("mask2former", "smoke")).eval()}


# ------------------------------------------------------------------------------------------------------------ planning


def test_every_stitch_has_its_twin_and_its_untrained_baseline_in_both_directions():
    jobs = plan(["u0", "u1"], ["m0", "m1"], UNTRAINED, [("a", "x"), ("b", "y")])
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 3
    into_m, into_u = (("u0", "m0", "m1"), [("a", "x"), ("b", "y")]), (("m0", "u0", "u1"), [("x", "a"), ("y", "b")])
    for (giver, receiver, twin), site_a, site_b in [
        (names, *pair) for names, pairs in (into_m, into_u) for pair in pairs
    ]:
        assert StitchJob(giver, site_a, receiver, site_b, "cross") in jobs
        assert StitchJob(twin, site_b, receiver, site_b, "twin") in jobs
        assert StitchJob(f"{giver}-untrained", site_a, receiver, site_b, "untrained") in jobs
    assert {job.direction for job in jobs} == {"into u0", "into m0"}


def test_a_twin_that_serves_two_pairs_is_stitched_once():
    jobs = plan(["u0", "u1"], ["m0", "m1"], UNTRAINED, [("a", "x"), ("b", "x")])
    twins = [(job.giver, job.site_a, job.receiver, job.site_b) for job in jobs if job.kind == "twin"]
    assert twins == [("m1", "x", "m0", "x"), ("u1", "a", "u0", "a"), ("u1", "b", "u0", "b")]


def test_pairs_are_thinned_evenly_and_seeds_are_paired():
    many = [(f"a{k}", f"x{k}") for k in range(11)]
    jobs = plan(["u0", "u1"], ["m0", "m1"], UNTRAINED, many, pairs=3, seeds=2)
    givers = [("u0", "a"), ("m0", "x"), ("u1", "a"), ("m1", "x")]
    expected = [(giver, f"{site}{k}") for giver, site in givers for k in (0, 5, 10)]
    assert [(job.giver, job.site_a) for job in jobs if job.kind == "cross"] == expected
    assert {(job.giver, job.receiver) for job in jobs if job.kind == "twin"} == {
        ("u1", "u0"), ("u0", "u1"), ("m1", "m0"), ("m0", "m1")
    }  # fmt: skip


def test_plans_without_a_twin_or_an_untrained_network_are_refused():
    with pytest.raises(InputError, match=r"1 and 2 networks .* a twin needs at least two seeds"):
        plan(["u0"], ["m0", "m1"], UNTRAINED, [("a", "x")])
    with pytest.raises(InputError, match="unknown network among the untrained twins 'm0'"):
        plan(["u0", "u1"], ["m0", "m1"], {"u0": "v"}, [("a", "x")])


def test_sites_are_matched_by_depth_among_those_that_can_be_stitched(networks):
    u, m = networks["u0"], networks["m0"]
    pairs = matched_sites(u, m, image_size=64)
    names = [site.name for site in sites(u, 64) if site.part == "decoder"]
    assert [a for a, _ in pairs] == names  # eleven, at 0, 0.1 … 1; the two maps of Mask2Former stand at 1/4 and 2/4
    assert [b.removeprefix(f"{PIXEL}.") for _, b in pairs] == 4 * ["layer_1"] + 7 * ["mask_projection"]
    at_16 = matched_sites(u, m, image_size=64, stride=4, parts=("encoder", "decoder"))
    shapes = {site.name: site.shape for site in [*sites(u, 64), *sites(m, 64)]}
    assert {shapes[a][1:] for a, _ in at_16} == {(16, 16)} and len(at_16) == 2 + 3
    assert {shapes[b] for _, b in at_16} == {(256, 16), (32, 16, 16)}
    backwards = matched_sites(m, u, image_size=64, parts=("encoder", "decoder"))
    assert [a for a, _ in backwards] == [site.name for site in sites(m, 64) if not stitchable(site)]
    with pytest.raises(InputError, match="no maps of 2 cells a side in decoder"):
        matched_sites(u, m, image_size=64, stride=32)


# ------------------------------------------------------------------------------------------------------------- scoring


def test_a_row_is_an_image_of_a_job_and_nobody_is_changed(networks, datasets, capsys):
    jobs = [
        StitchJob("u0", LAST, "m0", f"{PIXEL}.mask_projection", "cross"),
        StitchJob("m0", f"{PIXEL}.layer_1", "u0", "decoder.blocks.x_0_3", "cross"),
    ]
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in networks.items()}
    table = stitched_scores(networks, jobs, datasets["train"], datasets["test"], epochs=2, **SETTINGS)
    cost = (
        "2 stitches of 2 epochs × 2 steps (6 images, 4 a step): 8 steps through two networks, then 8 test images each."
    )
    assert capsys.readouterr().out == f"{cost}\n"
    assert table.columns.tolist() == [
        "giver", "site_a", "receiver", "site_b", "kind", "direction", "id", "dice", "dice_own", "dice_without"
    ]  # fmt: skip
    assert len(table) == 2 * 8 and not table.isna().any().any()
    for job, rows in table.groupby("receiver"):
        assert rows.id.tolist() == datasets["test"].ids
        own, _ = score(networks[job], make_loader(datasets["test"], 3))
        np.testing.assert_allclose(rows.dice_own, own.dice, atol=5e-3)  # one pixel at 0 may turn with the batch
    for name, model in networks.items():
        assert all(torch.equal(v, before[name][k]) for k, v in model.state_dict().items()) and not model.training
        assert all(p.grad is None for p in model.parameters())
        assert name == "u0" or all(p.requires_grad for p in model.parameters())
    again = stitched_scores(networks, jobs[1:], datasets["train"], datasets["test"], epochs=2, **SETTINGS)
    pd.testing.assert_frame_equal(again, table[table.receiver == "u0"].reset_index(drop=True))


def test_a_network_keeps_all_of_itself_and_less_of_an_untrained_twin(networks, datasets):
    jobs = [StitchJob("u0", LAST, "u0", LAST, "twin"), StitchJob("u-untrained", LAST, "u0", LAST, "untrained")]
    table = stitched_scores(networks, jobs, datasets["train"], datasets["train"], epochs=1, **SETTINGS)
    summary = summarize(table).set_index("kind")
    assert summary.loc["twin", "dice_own"] > 0.5
    assert summary.loc["twin", "kept"] == pytest.approx(1, abs=0.05)
    assert summary.loc["untrained", "kept"] < summary.loc["twin", "kept"] - 0.1
    # no connection runs past the last block: with its mean there the answer is the same inside, lesion or not
    areas = np.array([float(sample.mask.mean()) for sample in datasets["train"]])
    assert summary.loc["twin", "without"] * summary.loc["twin", "dice_own"] < np.mean(2 * areas / (1 + areas)) + 0.05


def test_unknown_networks_and_no_jobs_are_refused(networks, datasets):
    with pytest.raises(InputError, match="unknown network 'u7'"):
        job = StitchJob("u7", LAST, "u0", LAST, "twin")
        stitched_scores(networks, [job], datasets["train"], datasets["test"], epochs=1, **SETTINGS)
    with pytest.raises(InputError, match="no stitch was asked for"):
        stitched_scores(networks, [], datasets["train"], datasets["test"], epochs=1, **SETTINGS)


# ------------------------------------------------------------------------------------------------------------- summary


def table_of(job, dice, own, without):
    frame = pd.DataFrame({"id": [f"i{k:02d}" for k in range(len(dice))], "dice": dice, "dice_own": own})
    return frame.assign(dice_without=without, direction=job.direction, **vars(job))


def test_the_summary_is_the_ratio_of_means_with_a_paired_interval():
    rng = np.random.default_rng(0)
    own = rng.uniform(0.3, 1, 40)
    dice = np.clip(0.8 * own + rng.normal(0, 0.05, 40), 0, 1)
    jobs = plan(["u0", "u1"], ["m0", "m1"], UNTRAINED, [("a", "x")])
    share = {"cross": dice, "twin": 0.9 * own, "untrained": 0.5 * own}
    table = pd.concat([table_of(job, share[job.kind], own, 0.25 * own) for job in jobs])
    summary = summarize(table.sample(frac=1, random_state=0), seed=1)
    assert len(summary) == 6 and (summary.images == 40).all()
    cross = summary[summary.kind == "cross"]
    assert len(cross) == 2 and set(cross.receiver) == {"u0", "m0"}
    for row in cross.itertuples():
        assert row.dice == pytest.approx(dice.mean()) and row.dice_own == pytest.approx(own.mean())
        assert row.kept == pytest.approx(dice.sum() / own.sum())
        ends = bootstrap(
            (dice, own), lambda a, b, axis: a.mean(axis) / b.mean(axis), paired=True, method="percentile", rng=2
        ).confidence_interval
        assert [row.low, row.high] == pytest.approx(list(ends), abs=2e-3) and row.high - row.low > 0.02
        assert [row.without, row.without_low, row.without_high] == pytest.approx(3 * [0.25])  # paired: no spread
        assert [row.twin, row.twin_low, row.twin_high] == pytest.approx(3 * [0.9])
        assert [row.untrained, row.untrained_low, row.untrained_high] == pytest.approx(3 * [0.5])
    assert summary[summary.kind != "cross"][["twin", "untrained"]].isna().all().all()


def test_what_is_not_defined_is_nan_and_doubled_baselines_are_refused():
    cross, twin = StitchJob("u0", "a", "m0", "x", "cross"), StitchJob("m1", "x", "m0", "x", "twin")
    row = summarize(table_of(cross, np.zeros(4), np.zeros(4), np.zeros(4))).iloc[0]
    assert np.isnan([row.kept, row.low, row.high, row.twin, row.untrained]).all() and row.dice == 0
    several = [
        table_of(job, np.ones(4), np.ones(4), np.ones(4))
        for job in (cross, twin, StitchJob("m2", "x", "m0", "x", "twin"))
    ]
    with pytest.raises(InputError, match="2 twin stitches"):
        summarize(pd.concat(several))
