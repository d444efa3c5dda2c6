"""SimCLR and the linear probe: the loss of known answers, views that stay pictures, and features that tell classes."""

import math

import numpy as np
import pytest
import torch
from test_classifiers import TINY, colours

from classification.classifiers import ClassifierSpec, build_classifier
from classification.probe import linear_probe
from classification.simclr import LUMA, nt_xent, recolour, train_simclr
from classification.training import ClassifierRecipe
from utils import InputError

OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "class_token": False, "global_pool": "avg"}
BODY = ClassifierSpec("vit_tiny_patch16_224", OPTIONS, classes=0, image_size=32)
RECIPE = ClassifierRecipe(epochs=2, batch_size=16, objective="simclr", smallest_crop=0.5)


def by_double_loop(first, second, temperature):
    """Equation 1 of Chen et al. 2020 as it is written, with pairs side by side as in their Algorithm 1."""
    z = [row for pair in zip(first.tolist(), second.tolist()) for row in pair]

    def s(i, j):
        dot = sum(a * b for a, b in zip(z[i], z[j]))
        return dot / math.sqrt(sum(a * a for a in z[i])) / math.sqrt(sum(b * b for b in z[j]))

    total = 0.0
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        others = sum(math.exp(s(i, k) / temperature) for k in range(len(z)) if k != i)
        total -= math.log(math.exp(s(i, j) / temperature) / others)
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_loss_is_that_of_the_equation(temperature):
    first, second = torch.randn(2, 7, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    ours = float(nt_xent(first, second, temperature))
    assert ours == pytest.approx(by_double_loop(first, second, temperature), rel=1e-12)


def test_views_that_are_all_alike_are_guessed_among_all_others():
    same = torch.ones(6, 4, dtype=torch.double)
    assert float(nt_xent(same, same, 0.3)) == pytest.approx(math.log(11))


def test_pairs_that_are_alike_and_at_right_angles_to_others_have_the_known_loss():
    axes = torch.eye(5, dtype=torch.double)
    expected = math.log(math.exp(1 / 0.5) + 8) - 1 / 0.5
    assert float(nt_xent(axes, 3 * axes, 0.5)) == pytest.approx(expected)  # lengths do not matter


def test_jittered_pictures_stay_in_range_and_every_fifth_is_grey():
    pictures = torch.rand(1000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made = recolour(pictures, 0.5, torch.Generator().manual_seed(1))
    assert made.min() >= 0 and made.max() <= 1
    grey = (made - made[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    untouched = (made - pictures).abs().amax((1, 2, 3)) < 1e-6
    assert 0.15 < grey.float().mean() < 0.25
    assert 0.12 < untouched.float().mean() < 0.21  # neither jittered (0.2) nor grey (0.8)
    assert torch.equal(recolour(pictures, 0, torch.Generator()), pictures)


def test_a_grey_picture_has_the_brightness_of_its_colours():
    pictures = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made = recolour(pictures, 1e-9, torch.Generator().manual_seed(1))  # next to no jitter
    luma = sum(weight * pictures[:, channel] for channel, weight in enumerate(LUMA))
    grey = (made - made[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert grey.any() and not grey.all()
    torch.testing.assert_close(made[grey][:, 1], luma[grey], atol=1e-5, rtol=0)
    torch.testing.assert_close(made[~grey], pictures[~grey], atol=1e-5, rtol=0)


def test_the_loss_falls_and_labels_are_not_looked_at():
    labels = torch.arange(64) % 2
    tints = torch.randint(0, 256, (64, 3, 1, 1), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    images = tints.expand(-1, -1, 32, 32).contiguous()  # a colour each tells pictures apart, as long as it stays
    recipe = ClassifierRecipe(epochs=12, batch_size=32, learning_rate=0.003, objective="simclr", jitter=0)
    model, history = train_simclr(BODY, (images, labels), (images, labels), recipe)
    assert history["val_loss"].iloc[-1] < 0.9 * history["val_loss"].iloc[0] < 0.9 * math.log(63)
    assert list(history.columns) == ["epoch", "learning_rate", "train_loss", "val_loss", "seconds"]
    other, _ = train_simclr(BODY, (images, 1 - labels), (images, labels), recipe)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert not model.training and set(model.state_dict()) == set(build_classifier(BODY).state_dict())  # no projection


def test_the_same_seed_gives_the_same_network():
    photos = colours(32)
    weights = [train_simclr(BODY, photos, photos, RECIPE, seed)[0].body.patch_embed.proj.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_heads_and_lonely_pictures_are_refused():
    photos = colours(16)
    with pytest.raises(InputError, match="set classes to 0, not 10"):
        train_simclr(TINY, photos, photos, RECIPE)
    with pytest.raises(InputError, match="at least 2 in train"):
        train_simclr(BODY, photos, tuple(part[:1] for part in photos), RECIPE)
    with pytest.raises(InputError, match="batch_size 2 or more"):
        train_simclr(BODY, photos, photos, ClassifierRecipe(batch_size=1, objective="simclr"))


def test_a_probe_tells_what_features_tell():
    images, labels = colours(40)
    model = build_classifier(BODY).eval()
    found = linear_probe(model, (images, labels), images)
    assert (found == labels.numpy()).all()
    shuffled = labels[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    other = colours(40)[0].flip(0)
    assert np.mean(linear_probe(model, (images, labels), other) == labels.numpy()) == 0  # bluish ones come first now
    assert (linear_probe(model, (images, shuffled), images) == labels.numpy()).mean() < 1


def test_a_probe_wants_features_and_classes():
    images, labels = colours(16)
    with pytest.raises(InputError, match="has a head of 10 classes"):
        linear_probe(build_classifier(TINY), (images, labels), images)
    with pytest.raises(InputError, match="at least 2"):
        linear_probe(build_classifier(BODY), (images, labels * 0), images)
