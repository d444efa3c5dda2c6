"""Made by hand for the tests of several rooms: images, loaders of them, and recordings of given numbers."""

import torch
import torch.nn.functional as F

from similarity import Recording, Site


def images_of(count, side=64, seed=0):
    """Pictures with large and small structure, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size=side, mode="bilinear")
    return 0.7 * coarse + 0.3 * torch.rand(count, 3, side, side, generator=generator)


def batches(images, size=8, ids=None):
    """A loader: (images, ids) of so many at a time."""
    ids = [f"ISIC_{i:07d}" for i in range(len(images))] if ids is None else ids
    return [(images[i : i + size], ids[i : i + size]) for i in range(0, len(images), size)]


def made(features, ids=None, policy="gap"):
    """A recording of given features, (n, channel) or (n, position, channel): tensors as they are, arrays as float32."""
    features = {name: X if torch.is_tensor(X) else torch.as_tensor(X).float() for name, X in features.items()}
    ids = [f"i{k:03d}" for k in range(len(next(iter(features.values()))))] if ids is None else ids
    sites = [Site(name, ("batch", "channel"), part=name[0]) for name in features]
    return Recording(features, ids, sites, policy, "m", "d")
