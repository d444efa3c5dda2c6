"""What a recording will keep is known before it starts, said, refused where it does not fit, and never held twice."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from models import ModelSpec, build_model
from similarity import Site, estimate_bytes, list_sites, open_reader, record, record_models, recording
from similarity.policies import row_shape
from tests.made import batches, images_of

POLICIES = ("gap", "grid:2", "flat:2", "tokens", "map", "mask", "mean")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def kept_bytes(recordings):
    return sum(rows.nbytes for one in recordings.values() for rows in one.features.values())


# ---------------------------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("name", ["unetpp", "mask2former"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_estimate_is_what_a_recording_keeps_to_the_byte(name, policy):
    model, images = build_model(ModelSpec(name, "smoke")), images_of(5)
    recordings = record_models({"m": model}, batches(images, 4), policies=(policy,))["m"]
    sites = list_sites(model, images[:1], model.default_sites())
    assert estimate_bytes(sites, (policy,), (64, 64), 5) == kept_bytes(recordings) > 0


def test_the_estimate_adds_up_over_policies_and_images():
    model = build_model(ModelSpec("mask2former", "smoke"))
    sites = list_sites(model, images_of(1), model.default_sites())
    one = [estimate_bytes(sites, (policy,), (64, 64), 1) for policy in POLICIES]
    assert estimate_bytes(sites, POLICIES, (64, 64), 300) == 300 * sum(one)


def test_numbers_of_a_double_model_are_twice_as_long():
    images = images_of(5)
    recordings = record_models({"m": Small().double()}, batches(images, 4), policies=POLICIES[:1])["m"]
    sites = list_sites(Small(), images[:1])
    assert estimate_bytes(sites, ("gap",), (64, 64), 5, itemsize=8) == kept_bytes(recordings) == 5 * 8 * (6 + 2)


def test_images_that_are_not_square_are_counted_by_both_sides():
    site = Site("x", "batch token channel", strides=(32, 16, 8), shape=(2 * 3 + 4 * 6 + 8 * 12, 7))
    assert row_shape(site, "map", (64, 96)) == (7, 8, 12)
    assert row_shape(site, "tokens", (64, 96)) == (126, 7)
    maps = Site("y", "batch channel height width", shape=(5, 4, 6))
    shapes = {policy: row_shape(maps, policy, (64, 96)) for policy in ("gap", "grid:3", "flat:3", "tokens", "map")}
    assert shapes == {"gap": (5,), "grid:3": (9, 5), "flat:3": (45,), "tokens": (24, 5), "map": (5, 4, 6)}


def test_a_site_that_was_never_listed_has_no_size():
    with pytest.raises(ValueError, match="site 'x' has no shape yet; list it first"):
        estimate_bytes([Site("x", "batch channel")], ("gap",), (64, 64), 3)


# ------------------------------------------------------------------------------------------- what is said and refused


def said(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_one_line_says_what_will_be_kept(capsys):
    models = {"a": Small(), "b": Small()}
    record_models(models, batches(images_of(8), 4), {"a": ["conv", "head"], "b": ["head"]})
    assert said(capsys) == ["recording 2 models, 3 sites, up to 8 images under gap: 320 B"]  # 8 × (6 + 2 + 2) × 4
    record(Small(), batches(images_of(1)), ["conv"], "grid:4")
    assert said(capsys) == ["recording 1 model, 1 site, 1 image under grid:4: 384 B"]


def pairs(items):
    return torch.stack([image for image, _ in items]), [int(place) for _, place in items]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(images_of(10), range(10))


@pytest.mark.parametrize(
    "loader, counted",
    [
        (lambda data: DataLoader(data, 4, collate_fn=pairs), "1 site, 10 images under gap: 320 B"),
        (
            lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(3)), collate_fn=pairs),
            "1 site, 3 images under gap: 96 B",
        ),
        (lambda data: Wrapping(data), "1 site, 10 images under gap: 320 B"),
        (
            lambda data: batches(images_of(10), 4),
            "up to 12 images under gap: 384 B",
        ),  # an upper bound: 3 batches of up to 4
        (lambda data: iter(batches(images_of(10), 4)), "1 site under gap: 32 B an image"),
        (lambda data: DataLoader(Stream(), 4, collate_fn=pairs), "1 site under gap: 32 B an image"),
    ],
    ids=["DataLoader", "sampler of some", "only a dataset", "list", "generator", "stream"],
)
def test_images_are_counted_by_sampler_data_set_or_batches_or_not_at_all(loader, counted, capsys):
    images = images_of(10)
    record(nn.Sequential(nn.Conv2d(3, 8, 1)), loader(TensorDataset(images, torch.arange(10))), ["0"])
    assert len(lines := said(capsys)) == 1 and lines[0].endswith(counted)


class Wrapping:
    """A loader that has a data set and no length."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from DataLoader(self.dataset, 5, collate_fn=pairs)


def test_more_than_the_memory_at_hand_is_refused_before_the_pass_with_remedies(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
    model = Small()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    sentence = (
        r"recording 1 model, 1 site, up to 20 images under map needs about 2\.0 MB and 1\.0 MB are available; "
        r"use a coarser policy .*, fewer sites or fewer images"
    )
    with pytest.raises(MemoryError, match=sentence):
        record(model, batches(images_of(20), 4), ["conv"], "map")
    assert passes == [1]  # the listing of one image
    assert len(record(model, batches(images_of(20), 4), ["conv"], "grid:2")) == 20


def test_the_estimate_of_a_double_model_counts_eight_bytes(capsys):
    record(Small().double(), batches(images_of(4)), ["conv"])
    record(nn.Sequential(nn.MaxPool2d(4)), batches(images_of(4).double()), ["0"])
    assert [line.rpartition(": ")[2] for line in said(capsys)] == ["192 B", "96 B"]


def test_no_bar_is_drawn_where_there_is_no_terminal(capsys):
    record(Small(), batches(images_of(8), 1), ["conv"])
    assert len(said(capsys)) == 1


def test_a_bar_over_batches_is_drawn_on_a_terminal_and_only_one(capsys, monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    record(Small(), batches(images_of(8), 1), ["conv"])
    assert "recording:" in capsys.readouterr().err
    record(Small(), tqdm(batches(images_of(8), 1), desc="mine"), ["conv"])
    drawn = capsys.readouterr().err
    assert "mine:" in drawn and "recording:" not in drawn


# -------------------------------------------------------------------------------------------------- nothing held twice


def test_the_room_of_a_site_is_let_go_as_its_rows_are_taken_out(monkeypatch):
    """When rows are taken out, the sites before are in the recording alone, and without room to spare."""
    images = images_of(8)
    book = recording._Book(open_reader(Small(), images, None, ("gap", "tokens")))
    for batch, ids in batches(images, 2):
        book.write(batch, ids)
    left, take = [], recording._Rows.joined

    def taking(rows):
        left.append(len(book.rows))
        return take(rows)

    monkeypatch.setattr(recording._Rows, "joined", taking)
    count = len(book.rows)
    done = book.close([str(i) for i in range(8)], "", None)
    assert left == list(range(count))[::-1] and book.rows == {}
    features = [rows for one in done.values() for rows in one.features.values()]
    assert all(rows.untyped_storage().nbytes() == rows.nbytes and len(rows) == 8 for rows in features)


def test_rows_of_many_batches_lie_in_one_piece_and_in_order():
    rows = recording._Rows()
    parts = [torch.arange(float(3 * k), 3 * k + 3)[:, None].expand(3, 2) for k in range(60)]
    for part in parts:
        rows.add(part)
    assert torch.equal(rows.joined(), torch.cat(parts))
    with pytest.raises(
        ValueError, match=r"rows of \(1,\) torch.float32 after rows of \(2,\) torch.float32; record images"
    ):
        rows.add(torch.ones(3, 1))


def test_a_readers_rows_hold_no_more_than_themselves():
    """A view of an activation would keep all of it: 64 × 64 times as much."""
    images = images_of(4)
    sites = [Site("conv", "batch channel height width")]
    rows = open_reader(Small(), images, sites, ("gap", "tokens", "map")).read(images)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in rows.values())
