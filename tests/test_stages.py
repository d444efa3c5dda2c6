"""Which stage a site belongs to: by map sizes, or quarters where maps stay as they are."""

import pytest

from processing.stages import stages_of
from similarity import Site
from utils import InputError

MAP = ("batch", "channel", "height", "width")


def maps(*sides):
    return [Site(f"s{place}", MAP, shape=(8 * (place + 1), side, side)) for place, side in enumerate(sides)]


def test_a_stage_ends_where_the_map_changes_size():
    assert stages_of(maps(32, 32, 16, 8, 8)) == [0, 0, 1, 2, 2]


def test_a_decoder_that_comes_back_to_a_size_has_another_stage():
    assert stages_of(maps(32, 16, 8, 16, 32)) == [0, 1, 2, 3, 4]


def test_channels_are_no_place():
    assert stages_of([*maps(16, 16), *maps(8), *maps(4)]) == [0, 0, 1, 2]


@pytest.mark.parametrize("count, expected", [(8, [0, 0, 1, 1, 2, 2, 3, 3]), (6, [0, 0, 1, 2, 2, 3]), (3, [0, 1, 2])])
def test_columns_are_cut_into_quarters(count, expected):
    tokens = [Site(f"blocks.{k}", ("batch", "token", "channel"), (8,), shape=(64, 24)) for k in range(count)]
    assert stages_of(tokens) == expected


def test_sites_without_shapes_are_refused():
    with pytest.raises(InputError, match="has no shape"):
        stages_of([Site("blocks.0", MAP)])
