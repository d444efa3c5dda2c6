"""Merging: what several processes recorded is what one would have recorded, whoever saw which image."""

import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from similarity import Recording, gather, merge, record

SITES = ["conv", "head"]


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


IMAGES = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = [f"ISIC_{i:07d}" for i in (5, 3, 8, 1, 0, 7, 2, 6, 4)]  # not sorted: order must not come from the loader


def shard(places, model=None, sites=SITES, policy="gap", **options):
    """A recording of some of the images, in batches of 2."""
    loader = [(IMAGES[places[i : i + 2]], [IDS[p] for p in places[i : i + 2]]) for i in range(0, len(places), 2)]
    return record(model or Net(), loader, sites, policy, **options)


def whole(**options):
    return shard(list(range(9)), **options)


def assert_same(merged, single):
    """By id, with every hash."""
    assert merged.ids == sorted(single.ids)
    ordered = single.select(ids=merged.ids)
    assert (merged.sites, merged.policy, merged.model_hash, merged.data_hash, merged.image_hashes) == (
        ordered.sites,
        ordered.policy,
        ordered.model_hash,
        ordered.data_hash,
        ordered.image_hashes,
    )
    for name in ordered.names:
        torch.testing.assert_close(merged[name], ordered[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- shards of one


@pytest.mark.parametrize(
    "shards",
    [
        [range(9)],
        [range(5), range(5, 9)],
        [range(0, 9, 2), [*range(1, 9, 2), 0]],  # padded by repeating the first, as DistributedSampler does
        [[8, 1], [3, 5, 0], [2, 7], [6, 4, 1]],
        [[place] for place in range(9)],
        [range(9), range(9)],
    ],
    ids=["one", "halves", "padded", "four", "nine", "everything twice"],
)
@pytest.mark.parametrize("policy", ["gap", "map"])
def test_merged_shards_are_the_recording_of_one_process(shards, policy):
    sites = ["conv"] if policy == "map" else SITES
    merged = merge([shard(list(places), sites=sites, policy=policy) for places in shards])
    assert_same(merged, whole(sites=sites, policy=policy))


def test_the_order_of_shards_does_not_matter():
    parts = [shard([0, 1, 2]), shard([3, 4]), shard([5, 6, 7, 8])]
    one, two = merge(parts), merge(iter(parts[::-1]))
    assert one.ids == two.ids and one.data_hash == two.data_hash
    assert all(torch.equal(one[name], two[name]) for name in SITES)


def test_merging_in_two_steps_is_merging_at_once():
    parts = [shard([0, 1, 2]), shard([3, 4, 0]), shard([5, 6, 7, 8])]
    assert_same(merge([merge(parts[:2]), parts[2]]), merge(parts))


def test_parts_of_a_recording_merge_to_it_again():
    single = whole()
    parts = [single.select(ids=IDS[:4]), single.select(ids=IDS[4:])]
    assert parts[0].image_hashes == single.image_hashes[:4]
    assert_same(merge(parts), single)


def test_a_given_data_hash_is_kept():
    merged = merge([shard([0, 1], data_hash="mine"), shard([2, 3], data_hash="mine")])
    assert merged.data_hash == "mine" and merged.image_hashes is None


def test_mean_and_gap_are_one_policy():
    assert merge([shard([0, 1], policy="gap"), shard([2, 3], policy="mean")]).policy == "gap"


def test_shards_come_back_from_files(tmp_path):
    parts = [shard(list(range(5))), shard(list(range(4, 9)))]
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.safetensors")
    assert_same(merge(Recording.load(tmp_path / f"{i}.safetensors") for i in range(2)), whole())


def test_a_recording_without_image_hashes_is_saved_and_loaded(tmp_path):
    given = shard([0, 1, 2], data_hash="mine")
    given.save(tmp_path / "given.safetensors")
    assert Recording.load(tmp_path / "given.safetensors").image_hashes is None


# -------------------------------------------------------------------------------------------------------- what differs


@pytest.mark.parametrize(
    "other, complaint",
    [
        (lambda: shard([2], policy="flat:2", sites=["conv"]), "different policy: 'gap' and 'flat:2'"),
        (lambda: shard([2], Net(seed=1)), "different model hash: "),
        (lambda: shard([2], sites=["conv"]), "different sites: 'head' has axes .* and absent"),
        (lambda: shard([2], sites=["conv", "norm", "head"]), "different sites: 'norm' has axes absent and"),
        (
            lambda: shard([2], sites={"conv": "batch height width channel", "head": "batch channel"}),
            "different sites: 'conv' has axes",
        ),
        (lambda: shard([2], data_hash="mine"), "a data hash given by its caller, the other one computed"),
    ],
)
def test_shards_that_differ_in_more_than_images_are_refused_with_the_difference(other, complaint):
    with pytest.raises(
        ValueError, match=rf"recordings 0 and 2 .*{complaint}|one of recordings 0 and 2 has {complaint}"
    ):
        merge([shard([0]), shard([1]), other()])


def test_shards_of_different_given_data_are_refused():
    with pytest.raises(ValueError, match="different data: their data hashes are mine, yours"):
        merge([shard([0], data_hash="yours"), shard([1], data_hash="mine")])


def test_one_id_for_two_images_is_refused():
    impostor = record(Net(), [(IMAGES[[1]], [IDS[0]])], SITES)
    with pytest.raises(ValueError, match=f"image id '{IDS[0]}' names two different images"):
        merge([shard([0]), impostor])


def touched(recording, name, change):
    features = {**recording.features, name: change(recording[name].clone())}
    return dataclasses.replace(recording, features=features)


def test_rows_of_one_image_that_disagree_are_refused_and_rounding_is_not():
    one, two = shard([0, 1, 2]), shard([2, 3])
    scale = max(one["head"].abs().max(), two["head"].abs().max())
    near = touched(two, "head", lambda rows: rows + 0.9e-3 * scale)
    assert torch.equal(merge([one, near]).select(ids=[IDS[2]])["head"][0], one["head"][2])  # the first is kept
    far = touched(two, "head", lambda rows: rows + 3e-3 * scale)
    with pytest.raises(ValueError, match=f"image '{IDS[2]}' was recorded twice at site 'head', and its rows differ"):
        merge([one, far])


def test_rows_without_a_number_agree_with_themselves_and_with_nothing_else():
    one, two = shard([0, 1]), shard([1, 2])

    def broken(rows, row, value):
        rows[row, 0] = value
        return rows

    for value in (torch.nan, torch.inf):
        lost = touched(one, "head", lambda rows, value=value: broken(rows, 1, value))
        twice = touched(two, "head", lambda rows, value=value: broken(rows, 0, value))
        assert len(merge([lost, twice])) == 3
        with pytest.raises(ValueError, match="was recorded twice at site 'head'"):
            merge([lost, two])


def test_a_site_that_is_zero_everywhere_merges():
    one, two = (touched(shard(places), "head", torch.zeros_like) for places in ([0, 1], [1, 2]))
    assert merge([one, two])["head"].abs().sum() == 0


def test_maps_of_images_of_two_sizes_are_refused():
    small = record(Net(), [(IMAGES[[1], :, :8, :8], [IDS[1]])], ["conv"], "map")
    with pytest.raises(ValueError, match=r"site 'conv' has rows of different shapes .*\(6, 8, 8\), \(6, 16, 16\)"):
        merge([shard([0], sites=["conv"], policy="map"), small])


def test_nothing_is_not_merged():
    with pytest.raises(ValueError, match="there is no recording to merge"):
        merge([])


def test_hashes_must_be_as_many_as_images():
    with pytest.raises(ValueError, match="has 1 image hashes for 2 image ids"):
        dataclasses.replace(shard([0, 1]), image_hashes=["x"])


# ------------------------------------------------------------------------------------------------------ real processes


def _one_process(rank: int, folder: str) -> None:
    """Record every second image, the shorter share padded by a repeated one, and gather."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        places = [*range(rank, 9, 2), *([0] if rank else [])]
        gather(shard(places)).save(os.path.join(folder, f"{rank}.safetensors"))
    finally:
        dist.destroy_process_group()


def test_two_processes_gather_the_recording_of_one(tmp_path):
    multiprocessing.spawn(_one_process, (str(tmp_path),), nprocs=2)
    single = whole()
    gathered = [Recording.load(tmp_path / f"{rank}.safetensors", data_hash=single.data_hash) for rank in range(2)]
    for one in gathered:
        assert_same(one, single)
    assert all(torch.equal(gathered[0][name], gathered[1][name]) for name in SITES)


def test_without_processes_gather_changes_nothing():
    single = whole()
    assert gather(single) is single
