"""Pairs of networks whose answer is known: the ruler must say it, from recordings to the word.

A "network" here is what a trained one would leave in a recording: every site holds the task's latent variables, mixed
by weights of its own seed, with noise; its untrained twin holds what the pixels alone give, mixed likewise.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from similarity import Recording, Site
from studies import ruler
from utils import digest

N, SITES = 150, ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
CONFIG = {"seeds": [0, 1, 2], "permutations": 99, "resamples": 40}
CONFIG |= {
    "models": [SimpleNamespace(model="a"), SimpleNamespace(model="b")],
    "policies": {"gap": ["linear_cka", "rsa"]},
}
TASK, PIXELS = (np.random.default_rng(seed).normal(size=(N, 6)) * [3, 2, 1.5, 1, 1, 1] for seed in (101, 102))


def recorded(features: dict[str, np.ndarray], name: str) -> Recording:
    sites = [Site(site, ("batch", "channel"), part=site.split(".")[0]) for site in features]
    tensors = {site: torch.from_numpy(X) for site, X in features.items()}
    own = digest(name, *(X.tobytes() for X in features.values()))  # kept nulls and resamples go by it
    return Recording(tensors, [f"i{k:03d}" for k in range(N)], sites, "gap", own, "data")


def network(signal: np.ndarray, seed: int, noise: float = 0.5) -> dict[str, np.ndarray]:
    """Four sites that hold a signal (n, 6) in coordinates of this seed's own, with noise."""
    rng = np.random.default_rng(seed)
    return {site: signal @ rng.normal(size=(6, 12)) + noise * rng.normal(size=(N, 12)) for site in SITES}


def rotated(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(12, 12)))[0]
    return {site: 2.5 * X @ turn + 7 for site, X in features.items()}


def shuffled(features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    order = np.random.default_rng(8).permutation(N)
    return {site: X[order] for site, X in features.items()}


# trained networks of architecture b, by seed; those of a are network(TASK, seed)
ANSWERS = {
    "the same networks": (lambda seed: network(TASK, seed), {"at ceiling", "above ceiling"}),
    "the same networks, rotated": (lambda seed: rotated(network(TASK, seed)), {"at ceiling", "above ceiling"}),
    "other seeds": (lambda seed: network(TASK, seed + 10), {"at ceiling"}),
    "shuffled images": (lambda seed: shuffled(network(TASK, seed + 10)), {"below chance"}),
    "never trained": (lambda seed: network(PIXELS, seed + 10), {"below chance", "at floor", "below floor"}),
    "trained on another task's masks": (
        lambda seed: network(np.random.default_rng(77).normal(size=(N, 6)), seed + 10),
        {"below chance"},
    ),
    "half of the task, half of the pixels": (lambda seed: network((TASK + PIXELS) / 2, seed + 10), {"partial"}),
}


def summary_of(trained_b, policies=None):
    """The study's summary, for architecture b as given."""
    config = SimpleNamespace(**(CONFIG | ({"policies": policies} if policies else {})))
    recordings = {}
    for seed in config.seeds:
        made = {f"a-seed{seed}": network(TASK, seed), f"b-seed{seed}": trained_b(seed)}
        # untrained networks see pixels, and a little of the task shows in them
        for place, name in enumerate("ab"):
            made[f"{name}-seed{seed}-untrained"] = network(PIXELS, 50 + 10 * place + seed, noise=8.0)
        recordings |= {name: {"gap": recorded(features, name)} for name, features in made.items()}
    return config, recordings


@pytest.fixture
def analysed(tmp_path):
    def analyse(trained_b):
        config, recordings = summary_of(trained_b)
        comparisons = ruler.compare_all(config, recordings, tmp_path)
        stages = (ruler.resample_all(config, recordings, tmp_path), ruler.null_all(config, recordings, tmp_path))
        return ruler.calibrate(config, recordings, comparisons, *stages)

    return analyse


@pytest.mark.parametrize("case", ANSWERS)
def test_the_ruler_gives_the_known_answer(case, analysed):
    trained_b, words = ANSWERS[case]
    tables = analysed(trained_b)
    lines = tables["summary"].query("estimator == 'linear_cka'").set_index("part")
    assert set(lines["verdict"]) <= words, lines[["similarity", "null_high", "floor", "ceiling", "u", "verdict"]]
    assert (lines["interval_over"] == "images and seeds").all() and (lines["network_pairs"] == 9).all()
    if words == {"at ceiling"}:
        assert lines["u_low"].lt(1).all() and lines["u_high"].gt(0.9).all()
    if words == {"partial"}:
        assert lines["u_high"].lt(1).all() and (lines["u_low"] < lines["u"]).all()


def test_a_part_of_constant_sites_has_no_number_and_the_other_part_keeps_its(tmp_path):
    def partly_constant(seed):
        features = network(TASK, seed + 10)
        return features | {site: np.ones((N, 12)) for site in SITES if site.startswith("decoder")}

    config, recordings = summary_of(partly_constant)
    comparisons = ruler.compare_all(config, recordings, tmp_path)
    stages = (ruler.resample_all(config, recordings, tmp_path), ruler.null_all(config, recordings, tmp_path))
    summary = ruler.calibrate(config, recordings, comparisons, *stages)["summary"].set_index(["part", "estimator"])
    constant = summary.loc["decoder", "linear_cka"]
    assert constant["verdict"] == "no number" and constant["site_pairs"] == 0 and constant["site_pairs_left_out"] == 2
    assert np.isnan(constant["similarity"]) and np.isnan(constant["u_low"])
    assert summary.loc["encoder", "linear_cka"]["verdict"] == "at ceiling"


def test_noise_of_growing_strength_lowers_the_similarity_and_the_place_on_the_ruler(analysed, tmp_path):
    places = []
    for noise in (0.5, 4.0, 16.0):
        config, recordings = summary_of(lambda seed, noise=noise: network(TASK, seed + 10, noise))
        comparison = ruler.compare_all(config, recordings, tmp_path)["gap", "linear_cka"]
        same = ruler.compare_all(*summary_of(lambda seed: network(TASK, seed + 10)), tmp_path)["gap", "linear_cka"]
        places.append((comparison.scale()["similarity"] - same.scale()["floor"]).mean())
    assert places[0] > places[1] > places[2]


def test_p_values_are_of_the_first_pair_and_known_differences_are_significant(analysed):
    pairs = analysed(ANSWERS["other seeds"][0])["pairs"].query("estimator == 'linear_cka'")
    assert (pairs["p_value"] == 0.01).all() and (pairs["q_value"] == 0.01).all()
    shuffled_pairs = analysed(ANSWERS["shuffled images"][0])["pairs"].query("estimator == 'linear_cka'")
    assert (shuffled_pairs["q_value"] > 0.05).all()
    best = pairs.dropna(subset=["p_best"])
    assert len(best) == len(SITES) and (best["p_best"] == 0.01).all()
