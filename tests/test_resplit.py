"""A set dealt anew: by ids alone, linked, never overwritten."""

import itertools
import os

import pytest

import dataset
import resplit
from images import Pair
from layouts import find_splits
from resplit import deal
from utils import InputError

COUNTS = {"Training": 5, "Validation": 3, "Test": 7}


def arguments(root, to, counts=COUNTS, seed=0):
    numbers = itertools.chain(*((f"--{split.lower()}", str(count)) for split, count in counts.items()))
    return ["resplit", "--data", str(root), "--to", str(to), *numbers, "--seed", str(seed)]


def ids_in(folder):
    return {split: [pair.id for pair in pairs] for split, pairs in find_splits(folder).items()}


def test_parts_have_the_sizes_asked_for_and_share_no_image(synthetic_root, tmp_path, capsys):
    to = tmp_path / "dealt"
    assert dataset.main(arguments(synthetic_root, to)) == 0
    assert "5 Training, 3 Validation, 7 Test pairs" in (said := capsys.readouterr().out) and "hard links" in said
    found = ids_in(to)
    assert [len(ids) for ids in found.values()] == [5, 3, 7]
    assert len(set().union(*found.values())) == 15
    sources = {pair.id: pair for pairs in find_splits(synthetic_root).values() for pair in pairs}
    for pair in itertools.chain(*find_splits(to).values()):
        assert pair.image.samefile(sources[pair.id].image) and pair.mask.samefile(sources[pair.id].mask)
    again = tmp_path / "otherwise"
    assert dataset.main(arguments(synthetic_root, again, seed=1)) == 0
    assert ids_in(again) != found


def test_where_an_image_goes_depends_on_ids_alone():
    pairs = [Pair(f"ISIC_{k:07d}", None, None) for k in range(40)]
    one, other = deal(pairs, COUNTS), deal(pairs[::-1], COUNTS)
    assert one == other
    larger = deal(pairs, COUNTS | {"Test": 20})
    assert larger["Training"] == one["Training"] and set(one["Test"]) < set(larger["Test"])


def test_running_it_again_completes_and_other_content_is_refused(synthetic_root, tmp_path, capsys):
    to = tmp_path / "dealt"
    assert dataset.main(arguments(synthetic_root, to)) == 0
    first = find_splits(to)["train"][0]
    found = ids_in(to)
    first.image.unlink()
    assert dataset.main(arguments(synthetic_root, to)) == 0 and ids_in(to) == found
    assert dataset.main(arguments(synthetic_root, to, seed=1)) == 2
    first.mask.unlink()
    first.mask.write_bytes(b"somebody's own")
    assert dataset.main(arguments(synthetic_root, to)) == 2
    assert first.mask.read_bytes() == b"somebody's own"
    assert capsys.readouterr().err.count("not of this split; choose another --to") == 2


def test_files_are_copied_where_there_are_no_links_and_it_says_so(synthetic_root, tmp_path, monkeypatch, capsys):
    def no_links(*_):
        raise OSError(resplit.errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    assert dataset.main(arguments(synthetic_root, tmp_path / "dealt")) == 0
    assert "30 of the 30 files copied" in capsys.readouterr().out
    pair = find_splits(tmp_path / "dealt")["test"][0]
    source = next(p for pairs in find_splits(synthetic_root).values() for p in pairs if p.id == pair.id)
    assert pair.image.read_bytes() == source.image.read_bytes() and not pair.image.samefile(source.image)


def test_too_many_images_none_and_unmatched_ones_are_refused(synthetic_root, tmp_path):
    with pytest.raises(InputError, match=r"32 images were asked for .* and there are 24; ask for fewer"):
        resplit.resplit(synthetic_root, tmp_path / "dealt", 20, 4, 8)
    with pytest.raises(InputError, match="validation 0: each part needs at least 1 image"):
        resplit.resplit(synthetic_root, tmp_path / "dealt", 5, 0, 5)
    half = tmp_path / "half"
    resplit.resplit(synthetic_root, half, 5, 3, 7)
    find_splits(half)["test"][0].mask.unlink()
    with pytest.raises(InputError, match="image without a mask"):
        resplit.resplit(half, tmp_path / "dealt", 5, 3, 6)
    assert not (tmp_path / "dealt").exists()
