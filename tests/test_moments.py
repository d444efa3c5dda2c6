"""Streaming moments: the same plane as from Gram matrices, however the rows arrive, and from whichever process."""

import datetime

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch import nn
from tqdm import tqdm

from similarity import cells, measures, moments, plane, record, stream_plane
from similarity.measures import NotComputable
from similarity.moments import Moments
from tests.made import made


def gaussian(*shape, seed=0, mean=0.0):
    return torch.as_tensor(np.random.default_rng(seed).normal(mean, 1, shape))


def sides(n=60, mean=0.0):
    """Two sites of A and three of B, some of them related."""
    shared = gaussian(n, 5)
    A = {"a0": shared + mean, "a1": gaussian(n, 3, seed=1) - mean}
    B = {"b0": 2 * shared + gaussian(n, 5, seed=2) + mean, "b1": gaussian(n, 90, seed=3), "b2": gaussian(n, 1, seed=4)}
    return A, B


def fed(A, B, batch, first=0, last=None):
    sums = Moments()
    for start in range(first, last or len(A["a0"]), batch):
        rows = slice(start, min(start + batch, last or len(A["a0"])))
        sums.update({k: X[rows] for k, X in A.items()}, None if B is None else {k: X[rows] for k, X in B.items()})
    return sums


def expected(A, B, debiased):
    """By n × n Gram matrices."""
    return [[measures.linear_cka(X, Y, debiased=debiased) for Y in B.values()] for X in A.values()]


@pytest.mark.parametrize("debiased", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 60])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_batches_of_any_size_give_the_gram_form(batch, mean, debiased):
    A, B = sides(mean=mean)
    values, notes = fed(A, B, batch).cka(debiased=debiased)
    np.testing.assert_allclose(values, expected(A, B, debiased), atol=1e-9)
    assert notes == [{}, {}]


@pytest.mark.parametrize("batch", [10, 60])
def test_one_model_with_itself_needs_its_rows_once(batch):
    A, _ = sides()
    values, _ = fed(A, None, batch).cka()
    np.testing.assert_allclose(values, expected(A, A, True), atol=1e-10)
    np.testing.assert_allclose(np.diag(values), 1, atol=1e-12)


def test_means_that_drift_between_batches_do_not_matter():
    """The shift is the first batch's mean; here it is far from all that follows."""
    A, B = sides()
    A["a0"][:10] += 1e3
    np.testing.assert_allclose(fed(A, B, 10).cka()[0], expected(A, B, True), atol=1e-9)


def test_many_rows_are_taken_in_at_once_in_pieces(monkeypatch):
    monkeypatch.setattr(moments, "ROWS", 7)
    A, B = sides()
    sums = Moments()
    sums.update(A, B)
    np.testing.assert_allclose(sums.cka()[0], expected(A, B, True), atol=1e-10)
    assert sums.n == 60


def test_float32_products_are_summed_in_float64():
    A, B = ({k: X.float() for k, X in side.items()} for side in sides(n=3000, mean=5.0))
    sums = Moments(precision=torch.float32)
    for start in range(0, 3000, 100):
        sums.update(*({k: X[start : start + 100] for k, X in side.items()} for side in (A, B)))
    np.testing.assert_allclose(sums.cka()[0], expected(A, B, True), atol=2e-6)


@pytest.mark.parametrize("parts", [(30, 60), (4, 60), (59, 60)])
def test_parts_that_began_elsewhere_add_up(parts):
    A, B = sides(mean=3.0)
    whole = fed(A, B, 10, last=parts[0])
    whole.merge(fed(A, B, 9, first=parts[0]))
    np.testing.assert_allclose(whole.cka()[0], expected(A, B, True), atol=1e-10)
    empty = Moments()
    empty.merge(whole)
    empty.merge(Moments())
    np.testing.assert_allclose(empty.cka()[0], whole.cka()[0])
    empty.merge(whole)  # a copy: the first is untouched
    assert (whole.n, empty.n) == (60, 120)


def one_process(rank, folder):
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    A, B = sides(mean=2.0)
    sums = fed(A, B, 8, *((0, 25) if rank == 0 else (25, 60)))
    sums.all_reduce()
    np.save(f"{folder}/{rank}.npy", sums.cka()[0])
    other = fed(A, dict(reversed(B.items())) if rank else B, 8)
    with pytest.raises(ValueError, match="every process the same sites in the same order"):
        other.all_reduce()
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_plane_of_all_rows(tmp_path):
    torch.multiprocessing.spawn(one_process, args=(str(tmp_path),), nprocs=2)
    A, B = sides(mean=2.0)
    for rank in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{rank}.npy"), expected(A, B, True), atol=1e-10)


def test_all_reduce_without_rows_is_refused():
    with pytest.raises(ValueError, match="this process has no rows yet"):
        Moments().all_reduce()


# ------------------------------------------------------------------------------------------------------ hostile input


def test_sites_that_allow_no_number_are_named_and_spoil_no_other():
    A, B = sides()
    A["constant"] = torch.full((60, 2), 7.3)
    A["almost"] = (torch.full((60, 2), 7.3) + 1e-7 * gaussian(60, 2)).float()
    values, (row_notes, column_notes) = fed(A, B, 20).cka()
    assert np.isnan(values[2:]).all() and np.isfinite(values[:2]).all()
    assert set(row_notes) == {"constant", "almost"} and column_notes == {}
    assert row_notes["constant"].startswith("constant is constant")
    simplex = {"a": torch.eye(7).double() * 3.7 + 0.3}
    values, (notes, _) = fed_simply(simplex).cka()
    assert np.isnan(values).all() and "equally similar" in notes["a"]


def fed_simply(A):
    sums = Moments()
    sums.update(A)
    return sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_other_number_types_are_read_as_what_they_are(dtype):
    A, B = sides()
    A, B = ({k: (10 * X).round().to(dtype) for k, X in side.items()} for side in (A, B))
    np.testing.assert_allclose(fed(A, B, 20).cka()[0], expected(A, B, True), atol=1e-9)


@pytest.mark.parametrize(
    "left, right, complaint",
    [
        ({"a": torch.ones(5, 2)}, {"b": torch.ones(4, 2)}, r"sites have \[4, 5\] rows"),
        ({"a": torch.ones(5)}, None, r"a must be \(rows, features\), got shape \(5,\)"),
        ({"a": torch.full((5, 2), torch.nan)}, None, "a holds NaN or infinite values"),
        ({"other": torch.ones(5, 2)}, None, "sites and widths are .*other.* but these Moments began with"),
        ({"a": torch.ones(5, 3)}, None, "sites and widths are .* but these Moments began with"),
        ({"a": torch.ones(5, 2)}, {"b": torch.ones(5, 2)}, "sites and widths are .* but these Moments began with"),
    ],
)
def test_rows_that_do_not_fit_are_refused(left, right, complaint):
    sums = fed_simply({"a": gaussian(6, 2)})
    with pytest.raises(ValueError, match=complaint):
        sums.update(left, right)
    assert sums.n == 6  # nothing of it was taken in


def test_a_first_update_without_rows_changes_nothing():
    X = gaussian(9, 3)
    sums = Moments()
    sums.update({"a": X[:0]})
    sums.update({"a": X})
    np.testing.assert_allclose(sums.cka()[0], 1)


def test_moments_of_other_sites_are_not_merged_and_too_few_rows_give_no_number():
    with pytest.raises(ValueError, match="these Moments began with"):
        fed_simply({"a": gaussian(6, 2)}).merge(fed_simply({"b": gaussian(6, 2)}))
    with pytest.raises(NotComputable, match="3 rows were seen; at least 4"):
        fed_simply({"a": gaussian(3, 2)}).cka()
    with pytest.raises(NotComputable, match="0 rows were seen"):
        Moments().cka()


# -------------------------------------------------------------------------------------------------- chosen by planes


@pytest.mark.parametrize("n", [500, 30_000])
def test_a_plane_with_many_rows_takes_feature_space_and_says_so(n, capsys, monkeypatch):
    cells._say_once.cache_clear()
    A, B = ({k: X.float() for k, X in side.items()} for side in sides(n=n))
    B["b1"] = B["b1"][:, :9] if n == 500 else B["b1"]
    result = plane("linear_cka", made(A), made(B))
    said = capsys.readouterr().err
    assert f"2 × 3 sites, {n:,} rows: exact moments in feature space" in said and "Gram matrices would take" in said
    plane("linear_cka", made(A), made(B))
    assert capsys.readouterr().err == ""  # once is enough
    by_pairs = [[moments.linear_cka(X, Y) for Y in B.values()] for X in A.values()]
    np.testing.assert_allclose(result.values, by_pairs, atol=1e-9)
    if n == 500:
        np.testing.assert_allclose(result.values, expected(A, B, True), atol=1e-9)
        monkeypatch.setattr(moments, "are_cheaper", lambda left, right: False)
        np.testing.assert_allclose(plane("linear_cka", made(A), made(B)).values, result.values, atol=1e-9)


def test_sites_whose_sums_would_be_larger_than_their_rows_go_pair_by_pair(monkeypatch):
    A, B = ({f"{s}{k}": gaussian(18, 2, seed=10 * k + len(s)) for k in range(20)} for s in ("a", "bb"))
    assert moments.are_cheaper(A, B)
    monkeypatch.setattr(moments, "Moments", None)  # not needed here
    np.testing.assert_allclose(plane("linear_cka", made(A), made(B)).values, expected(A, B, True), atol=1e-9)


def test_one_pass_over_many_rows_notes_what_allows_no_number(monkeypatch):
    A, _ = sides(n=3000)
    A = {name: X[:, :3] for name, X in A.items()}
    A |= {"constant": torch.ones(3000, 2), "nan": torch.full((3000, 2), torch.nan)}
    result = plane("linear_cka", made(A))
    assert "constant is constant" in result.notes["a0", "constant"] and "nan holds NaN" in result.notes["nan", "a1"]
    assert np.isfinite(result.frame().loc["a0", "a1"]) and ("a0", "a1") not in result.notes
    empty = plane("linear_cka", made({"nan": A["nan"]}))
    assert np.isnan(empty.values).all() and "nan holds NaN" in empty.notes["nan", "nan"]


def test_feature_space_is_chosen_when_grams_do_not_fit_in_memory(monkeypatch):
    wide = {"a": gaussian(20, 400)}
    assert not moments.are_cheaper(wide, wide)
    monkeypatch.setattr(moments.memory, "available_bytes", lambda device: 1000)
    assert moments.are_cheaper(wide, wide)


def test_a_plane_that_does_not_fit_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(cells.memory, "available_bytes", lambda device: 1000)
    A = made({"a": gaussian(50, 400).float()})
    with pytest.raises(MemoryError, match=r"a plane of 1 sites × 50 rows needs about 1\d\.\d kB .* are available"):
        plane("rbf_cka", A)


# ---------------------------------------------------------------------------------------------------- whole models


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1, stride=2)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


@pytest.mark.parametrize("policy", ["tokens", "grid:2", "gap", "flat:2"])
def test_streaming_two_models_equals_recording_them(policy):
    images, ids = torch.rand(11, 3, 8, 8), [str(k) for k in range(11)]
    loader = [(images[k : k + 4], ids[k : k + 4]) for k in range(0, 11, 4)]
    A, B = Net(0), Net(1)
    sites = ["one"] if policy == "tokens" else ["one", "two"]
    streamed = stream_plane(A, B, loader, sites, sites, policy)
    recorded = plane("linear_cka", record(A, loader, sites, policy), record(B, loader, sites, policy))
    np.testing.assert_allclose(streamed.values, recorded.values, atol=1e-9)
    assert (streamed.rows, streamed.n_images, streamed.policy) == (recorded.rows, 11, policy)
    alone = stream_plane(A, None, loader, sites, policy=policy)
    np.testing.assert_allclose(np.diag(alone.values), 1, atol=1e-12)
    for second in (A, None):  # other sites of the same model
        between = stream_plane(A, second, loader, sites, sites[-1:], policy)
        np.testing.assert_allclose(between.values, alone.values[:, -1:], atol=1e-12)


def test_a_bar_over_batches_is_drawn_on_a_terminal_and_only_one(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    loader = [(torch.rand(4, 3, 8, 8), list("abcd"))]
    stream_plane(Net(0), None, loader)
    assert "streaming:" in capsys.readouterr().err
    stream_plane(Net(0), None, tqdm(loader, desc="mine"))
    drawn = capsys.readouterr().err
    assert "mine:" in drawn and "streaming:" not in drawn


def test_sites_of_different_sizes_have_no_common_tokens_and_repeated_images_are_refused(capsys):
    images = torch.rand(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"under 'tokens' the sites have \[16, 64\] positions"):
        stream_plane(Net(0), Net(1), [(images, list("abcd"))], ["one", "two"], ["one"], "tokens")
    with pytest.raises(ValueError, match="image id 'a' comes twice"):
        stream_plane(Net(0), Net(1), [(images, list("abcd"))] * 2)
    assert "streaming 2 × 2 sites under gap: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="full maps have no rows"):
        stream_plane(Net(0), None, [(images, list("abcd"))], policy="map")
    with pytest.raises(ValueError, match="the loader gave no batch"):
        stream_plane(Net(0), None, [])
