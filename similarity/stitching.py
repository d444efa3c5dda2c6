"""Stitching: put what A computes at one site in place of what B computes at another, and let B finish.

Between the two lies one linear map of channels, the same at every cell: a 1 × 1 convolution (on tokens, a linear map).
If B then still does its work, A's site holds what B needs there, in a form that a linear map can hand over (Lenc &
Vedaldi 2015; Bansal, Nakkiran & Barak 2021): function, where the measures ask for geometry. It is not for judging how
much a site matters: where skip connections run beside it, B loses little whatever is put there. So a stitch is read
beside one from an untrained network, and beside B with the mean of its site in place of it (`mean_only`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from similarity.hooks import Listener, check_batch, quiet, run_quietly
from similarity.inputs import relative_rounding
from similarity.policies import row_shape, to_map
from similarity.sites import IMAGE_AXES, Site, find_module, parse, resolve_sites

CELLS = 16384  # rows that the least squares look at: 16 times the channels of a wide site, and seconds of work
Batch = tuple[Tensor, Tensor]  # images (B, …, height, width) and what the loss compares with


def stitchable(site: Site) -> str:
    """Why nothing can be stitched at this site, for a message; '' where it can."""
    if "query" in site.axes:
        return f"site {site.name!r} holds queries, which have no place in the image and no order; stitch at a map"
    if "token" in site.axes and len(site.strides) > 1:
        return (
            f"site {site.name!r} holds maps of strides {', '.join(map(str, site.strides))} one after the other, and a "
            "stitch gives one map; stitch where one of them is alone"
        )
    if set(site.axes) not in (set(IMAGE_AXES), {"batch", "token", "channel"}) or not site.spatial:
        return f"site {site.name!r} has no map: its axes are {site.axes}, its strides {site.strides or 'unknown'}"
    return ""


class Stitch(nn.Module):
    """B with T(A at a) in place of b: images -> B's own output.

    giver, site_a : A and where it is listened to, a name or a Site
    receiver, site_b : B and where it is replaced; A and B may be one model
    images : an example (batch, …, height, width), by which both sites are found and their calls counted: the last call
        (`@-1`, the default) is from then on the k-th

    T is a 1 × 1 convolution in B's precision on B's device, and the only parameter here: A and B belong to the caller,
    run in eval mode with nothing of theirs training, and are left as they were. T starts as zero, see `least_squares`.
    Where the grids differ A's map is area-resized to B's: cells are averaged, or repeated for a finer grid. A runs
    without gradients and stops as soon as its site has fired. Raises ValueError for a site that does not fire, does not
    fit its axes, or is not `stitchable`.
    """

    def __init__(self, giver: nn.Module, site_a: Site | str, receiver: nn.Module, site_b: Site | str, images: Tensor):
        super().__init__()
        self.__dict__.update(giver=giver, receiver=receiver)  # past nn.Module's books: neither is a part of this one
        self.site_a, _ = _locate(giver, site_a, images)
        self.site_b, self.calls = _locate(receiver, site_b, images)
        if self.site_b.prefix:
            raise ValueError(
                f"site {self.site_b.name!r} has {self.site_b.prefix} class or register tokens that no map can stand in "
                "for, and B's own would carry its answer past the stitch; stitch at a map behind it"
            )
        channels = [row_shape(site, "gap", ())[0] for site in (self.site_a, self.site_b)]
        own = next((p for p in receiver.parameters() if p.is_floating_point()), images)
        self.transform = nn.utils.skip_init(nn.Conv2d, *channels, 1, device=own.device, dtype=own.dtype)
        self.set_map(torch.zeros(channels[1], channels[0]), torch.zeros(channels[1]))

    @torch.no_grad()
    def set_map(self, weight: Tensor, bias: Tensor) -> None:
        """Let T be x -> weight x + bias, weight (channels of b, channels of a) and bias (channels of b,)."""
        self.transform.weight.copy_(weight[:, :, None, None])
        self.transform.bias.copy_(bias)

    def forward(self, images: Tensor) -> object:
        """B's own output for images (batch, …, height, width) that both models get."""
        with self.in_place(images) as receiver:
            return receiver(images)

    @contextmanager
    def in_place(self, images: Tensor) -> Iterator[nn.Module]:
        """B for one pass over these images, its site replaced; the hook is removed however the block ends."""
        patch = _Patch(self.site_b, self.given(images), self.transform, tuple(images.shape[-2:]))
        # first among the hooks: whatever else listens there hears what B goes on with
        handle = find_module(self.receiver, self.site_b.name).register_forward_hook(patch, prepend=True)
        try:
            # without gradients nothing has to be held, and PyTorch would take other kernels, which round otherwise
            with quiet(self.receiver, freeze=torch.is_grad_enabled()):
                yield self.receiver
        finally:
            handle.remove()
        if patch.calls != self.calls:
            raise ValueError(
                f"the module of site {self.site_b.name!r} was called {patch.calls} times in the block, {self.calls} in "
                "the example; run the receiver once a block, and stitch only where every pass calls as often"
            )

    def given(self, images: Tensor) -> Tensor:
        """A's activation at a as a map (batch, channels of a, height, width) on T's device, in T's precision."""
        return _map_at(self.giver, self.site_a, images).to(self.transform.weight)

    def wanted(self, images: Tensor) -> Tensor:
        """B's own activation at b as a map (batch, channels of b, height, width) on T's device."""
        return _map_at(self.receiver, self.site_b, images).to(self.transform.weight)


def least_squares(stitch: Stitch, images: Iterable[Tensor], *, cells: int = CELLS, seed: int = 0) -> None:
    """Let T be the linear map with intercept that comes nearest to b's own activations, given a's, in squared error.

    images : batches (B, …, height, width)
    cells : about how many (image, cell) pairs are looked at, as many of each image (at least one), drawn by `seed`

    Where several maps are equally near, the one of least norm: no ridge. Directions in which a varies by no more than
    its activations are rounded are not features, and are left out. In float64 on the CPU, whose solver (gelsd) allows
    for fewer directions than channels; CUDA's does not.
    """
    images = _some(images)
    generator = torch.Generator().manual_seed(seed)
    each = max(1, cells // sum(map(len, images)))
    rows = [_rows(stitch, batch, each, generator) for batch in images]
    given, wanted = (torch.cat(side) for side in zip(*rows))
    for site, side in ((stitch.site_a, given), (stitch.site_b, wanted)):
        if not torch.isfinite(side).all():
            raise ValueError(f"site {site.name!r} emits NaN or infinite values; nothing can be stitched there")
    rounding, given, wanted = 32 * relative_rounding(given), given.double(), wanted.double()
    mean_given, mean_wanted = given.mean(0), wanted.mean(0)
    X, Y = given - mean_given, wanted - mean_wanted
    smallest, spread = float(rounding * given.norm()), float(X.norm())  # values are rounded by their own size
    solution = X.new_zeros(X.shape[1], Y.shape[1])
    if smallest < spread:  # gelsd would take a tolerance of 1 or more for none at all
        solution = torch.linalg.lstsq(X, Y, rcond=smallest / spread, driver="gelsd").solution
    stitch.set_map(solution.T, mean_wanted - mean_given @ solution)


def mean_only(stitch: Stitch, images: Iterable[Tensor]) -> None:
    """Let T give b's mean over these images at every cell, whatever A does: B without what the site knows."""
    means = torch.cat([stitch.wanted(batch).double().mean((2, 3)) for batch in _some(images)])
    stitch.set_map(torch.zeros_like(stitch.transform.weight[..., 0, 0]), means.mean(0))


def fit(
    stitch: Stitch,
    batches: Sequence[Batch],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Train T, and T alone; returns the mean loss of the images in each epoch, as it was while they were trained on.

    batches : (images, targets) each; moved to T's device one at a time
    loss : (stitch, images, targets) -> scalar Tensor; it calls stitch(images)

    T starts from `least_squares` over all batches, so that few steps are needed (Csiszárik et al. 2021 compare such a
    start with the end), then Adam follows the loss of the task. `seed` draws the cells of the start, the order of the
    batches in each epoch, and whatever the loss draws; the global generators are left alone.
    """
    if epochs < 0 or not learning_rate > 0:
        raise ValueError(f"epochs {epochs} with learning_rate {learning_rate}: use at least 0, and a rate above 0")
    least_squares(stitch, [images for images, *_ in batches], seed=seed)
    weight = stitch.transform.weight
    optimizer = torch.optim.Adam(stitch.parameters(), lr=learning_rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            total, count = 0.0, 0
            for place in torch.randperm(len(batches), generator=generator).tolist():
                images, targets, *_ = batches[place]
                value = loss(stitch, images.to(weight.device), targets.to(weight.device))
                if not torch.isfinite(value):
                    raise ValueError(f"the loss of the stitch became {value.item()}; use a lower learning_rate")
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total, count = total + float(value.detach()) * len(images), count + len(images)
            losses.append(total / count)
    return losses


def _rows(stitch: Stitch, images: Tensor, each: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, channels of a) and (rows, channels of b) of one batch, at most `each` cells of an image, on the CPU."""
    wanted = stitch.wanted(images)
    given = resized(stitch.given(images), wanted.shape[-2:])
    maps = [side.flatten(2).transpose(1, 2).cpu() for side in (given, wanted)]
    count, cells = maps[0].shape[:2]
    chosen = torch.rand(count, cells, generator=generator).argsort(1)[:, :each]
    rows = torch.arange(count)[:, None]
    return tuple(side[rows, chosen].flatten(0, 1) for side in maps)


def _some(images: Iterable[Tensor]) -> list[Tensor]:
    images = list(images)
    if not images:
        raise ValueError("there is no image to find the map of a stitch by; give at least one batch")
    return images


def resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(batch, channel, height, width) area-resized to grid (height, width) in cells."""
    return maps if maps.shape[-2:] == tuple(grid) else F.adaptive_avg_pool2d(maps, tuple(grid))


def _locate(model: nn.Module, site: Site | str, images: Tensor) -> tuple[Site, int]:
    """(the site with its shape and its call counted from the first, how often its module is called in a pass)."""
    (site,) = resolve_sites(model, [site])
    if reason := stitchable(site):
        raise ValueError(reason)

    def shape(site: Site, tensor: Tensor) -> tuple[int, ...]:
        check_batch(site, tensor, len(images))
        to_map(tensor, site, tuple(images.shape[-2:]))  # says so where the tokens do not fill the map of their stride
        return tuple(tensor.shape)

    with Listener(model, [site], shape) as listener:
        run_quietly(model, images)
        calls = listener.calls[find_module(model, site.name)]
        seen = dict(zip(site.axes, listener.take()[site.name]))
    address = parse(site.name)
    call = address.call if address.call >= 0 else calls + address.call
    name = ":".join([f"{address.path}@{call}", *address.selectors])
    return replace(site, name=name, shape=tuple(seen[axis] for axis in site.axes if axis != "batch")), calls


class _Fired(Exception):
    """The site has fired: the rest of the pass is not needed."""


def _map_at(model: nn.Module, site: Site, images: Tensor) -> Tensor:
    """(batch, channel, height, width) that a model computes at a located site; the pass ends there."""
    heard = []

    def keep(site: Site, tensor: Tensor) -> None:
        check_batch(site, tensor, len(images))
        heard.append(to_map(tensor.detach(), site, tuple(images.shape[-2:])))
        raise _Fired

    with Listener(model, [site], keep) as listener:
        try:
            run_quietly(model, images)
        except _Fired:
            return heard[0]
        return listener.take()[site.name]  # raises: the pass went to its end, and this says why


class _Patch:
    """Forward hook of b's module: at the site's call, T of the given maps takes the place of the site's tensor."""

    def __init__(self, site: Site, given: Tensor, transform: nn.Module, image_size: tuple[int, int]):
        self.site, self.given, self.transform, self.image_size = site, given, transform, image_size
        self.calls = 0

    def __call__(self, _module: nn.Module, _inputs, output):
        self.calls += 1
        address = parse(self.site.name)
        return self._put(output, address.selectors) if self.calls == address.call + 1 else None

    def _put(self, output, selectors: Sequence[str]):
        """The output with one tensor of it replaced; what holds it is copied, never changed."""
        if not selectors and isinstance(output, (tuple, list)):  # (hidden_states,) and (hidden_states, None)
            selectors = [str(next(place for place, part in enumerate(output) if part is not None))]
        if not selectors:
            return self._instead_of(output)
        key = selectors[0] if isinstance(output, Mapping) else int(selectors[0])
        changed = list(output) if isinstance(output, tuple) else copy.copy(output)
        changed[key] = self._put(output[key], selectors[1:])
        if not isinstance(output, tuple):
            return changed
        return type(output)(*changed) if hasattr(output, "_fields") else tuple(changed)

    def _instead_of(self, own: Tensor) -> Tensor:
        """T of the given maps, on the grid of B's own tensor and with its axes, strides and precision."""
        grid = to_map(own.detach(), self.site, self.image_size).shape[-2:]
        tensor = self.transform(resized(self.given, grid))
        place = dict(zip(IMAGE_AXES, range(4)))
        if "token" in self.site.axes:
            tensor, place = tensor.flatten(2), {"batch": 0, "channel": 1, "token": 2}
        tensor = tensor.permute([place[axis] for axis in self.site.axes])
        if len(self.given) != own.shape[self.site.axes.index("batch")]:
            raise ValueError(f"the receiver got other images than the {len(self.given)} that the stitch was put in for")
        return torch.empty_like(own.detach()).copy_(tensor)  # with B's own strides: products round by them
