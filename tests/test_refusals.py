"""The instrument's public functions refuse bad input by a ValueError: which side or argument, and what to do."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from similarity import Recording, measures, merge, plane, record, resolve_sites, stream_plane
from similarity.intervals import subsamples
from similarity.nulls import plane_null

generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(20, 5, generator=generator), torch.randn(20, 6, generator=generator)
# two sides -> what the sentence must say
SIDES = {
    "other rows": (X, Y[:10], "X has 20 rows and Y has 10; rows must be the same images"),
    "three images": (X[:3], Y[:3], "X has 3 rows; at least 4 images"),
    "no image": (X[:0], Y[:0], "X has 0 rows"),
    "constant": (X, torch.ones(20, 6), "Y is constant"),
    "no feature": (X[:, :0], Y, "X is constant"),
    "NaN": (X * float("nan"), Y, "X holds NaN or infinite values; look for the layer"),
    "infinity": (X, Y / 0, "Y holds NaN or infinite values"),
    "a vector": (X[:, 0], Y, "X must be .n images, p features., got shape .*; pool or flatten"),
    "maps": (X, Y[None], "Y must be .n images, p features."),
    "a number": (5, Y, "X must be .n images"),
    "nothing": (None, Y, "X holds object values; give real numbers"),
    "text": (X, np.full((20, 5), "a"), "Y holds .* values; give real numbers"),
    "uneven rows": ([[1, 2], [3]], Y, "X is not a matrix: its rows differ in length"),
    "complex": (X + 1j, Y, "X holds torch.complex64 values"),
}


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("name", measures.MEASURES)
def test_every_measure_names_the_side_and_the_remedy(name, kind):
    one, other, words = SIDES[kind]
    with pytest.raises(ValueError, match=words):
        getattr(measures, name)(one, other)


MODEL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))


def batch(n: int = 6, start: int = 0) -> list:
    return [(torch.rand(n, 3, 8, 8), [f"i{start + k}" for k in range(n)])]


def recorded(**batches) -> Recording:
    return record(MODEL, batch(**batches), ["0", "2"])


def spoilt(path, kind: str):
    """A recording's file that is none: empty, of something else, or cut short."""
    recorded().save(path)
    if kind == "other":
        save_file({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"" if kind == "empty" else path.read_bytes()[:200])
    return path


# what is called, given a folder -> what the sentence must say
CALLS = [
    (lambda _: plane("linear_kca", recorded(), recorded()), "unknown measure 'linear_kca'; choose from linear_cka"),
    (lambda _: plane("linear_cka", recorded(), recorded(), unbiased=True), "no option 'unbiased'; it has debiased"),
    (lambda _: plane("linear_cka", recorded(), recorded(start=3)), "different images: 3 only in A, 3 only in B"),
    (lambda _: measures.mutual_knn(X, Y, k=0), "k must be a whole number of neighbours, at least 1, got 0"),
    (lambda _: measures.mutual_knn(X, Y, k=1.5), "k must be a whole number"),
    (lambda _: measures.mutual_knn(X, Y, k=100), "X has 20 rows; 100 neighbours of each need at least 102"),
    (lambda _: measures.rbf_cka(X, Y, fraction=0), "fraction must be above 0"),
    (lambda _: measures.rbf_cka(X, Y, fraction=float("nan")), "fraction must be above 0"),
    (lambda _: measures.rbf_cka(X, Y, fraction="half"), "fraction must be above 0 .*, got half"),
    (lambda _: measures.rsa(X, Y, rdm="cosine"), "unknown rdm 'cosine'; choose 'correlation' or 'euclidean'"),
    (lambda _: measures.svcca(X, Y, variance=2), r"variance must be in \(0, 1\], got 2"),
    (lambda _: record(MODEL, batch(), ["9"]), "unknown site '9'; closest modules: '0'"),
    (lambda _: record(MODEL, batch(), "0"), "sites is the text '0'; give a list of names"),
    (lambda _: record(MODEL, batch(), ["0", "0"]), "site '0' is asked for twice"),
    (lambda _: record(MODEL, batch(), ["0@x"]), "site name '0@x' is not of the form"),
    (lambda _: record(MODEL, batch(), ["0"], policy="gapp"), "unknown policy 'gapp'; choose from gap"),
    (lambda _: record(MODEL, batch(), ["0"], policy=None), "unknown policy 'None'|unknown policy None"),
    (lambda _: record(MODEL, batch(), ["0"], policy="grid:99"), "needs a larger map: site '0' has 6 × 6 cells"),
    (lambda _: record(MODEL, [], ["0"]), "the loader gave no batch"),
    (lambda _: record(MODEL, [5], ["0"]), "each batch must have .image and .id"),
    (lambda _: record(MODEL, batch() + batch(), ["0"]), "image id 'i0' comes twice"),
    (lambda _: record(MODEL, [(torch.rand(3, 3, 8, 8), ["a"])], ["0"]), "a batch has 3 images but 1 ids"),
    (lambda _: stream_plane(MODEL, MODEL, [], ["0"], ["0"]), "the loader gave no batch"),
    (lambda _: resolve_sites(MODEL, []), "sites is empty; name at least one"),
    (lambda _: recorded()["1"], "site '1' was not recorded; closest"),
    (lambda _: recorded().select(ids=["i9"]), "1 ids were not recorded, first 'i9'"),
    (lambda _: merge([]), "there is no recording to merge"),
    (lambda tmp: Recording.load(spoilt(tmp / "a", "empty")), "a is damaged or no recording .*; delete it and record"),
    (lambda tmp: Recording.load(spoilt(tmp / "a", "cut")), "a is damaged or no recording .*; delete it and record"),
    (lambda tmp: Recording.load(spoilt(tmp / "a", "other")), "a is not a recording of this version"),
    (lambda _: plane_null("linear_cka", recorded(), recorded(), permutations=0), "permutations must be at least 1"),
    (lambda _: plane_null("linear_cka", recorded(), recorded(), pairs=[("0", "9")]), "'9' is no site of B"),
    (lambda _: subsamples(3), "3 images are too few for an interval"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words[:40] for _, words in CALLS])
def test_calls_that_cannot_be_answered_say_why(call, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
