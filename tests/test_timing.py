"""What the main job says of its duration before it starts."""

from types import SimpleNamespace

import pytest

from studies.timing import statistics_seconds, stitching_seconds, training_seconds

CONFIG = SimpleNamespace(
    seeds=[0, 1], permutations=100, resamples=50, stitch_pairs=2, stitch_images=120, stitch_epochs=1
)


def test_sums_are_those_counted_by_hand():
    recipe, sizes = SimpleNamespace(epochs=5), {"train": 240, "validation": 60, "test": 200}
    found = training_seconds(recipe, sizes, step=0.1, forward=0.01)
    assert found == pytest.approx(240 * 5 * 0.1 + (60 * 5 + 600) * 0.01)
    assert statistics_seconds(CONFIG, 200) == pytest.approx(30 + 20 + 160)
    assert statistics_seconds(CONFIG, 400) == pytest.approx(30 + 4 * 180)  # Gram matrices of twice the images
    timed = [(0.08, 0.02), (0.04, 0.01)]
    assert stitching_seconds(CONFIG, 300, timed) == pytest.approx(12 * (120 * (0.06 + 0.015) + 800 * 0.015))


@pytest.mark.parametrize("changed", [{"stitch_pairs": 0}, {"seeds": [0]}])
def test_where_nothing_is_stitched_it_takes_no_time(changed):
    assert stitching_seconds(SimpleNamespace(**vars(CONFIG) | changed), 200, [(1, 1)]) == 0
