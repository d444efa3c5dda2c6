"""Hooks on sites, removed however a pass ends; the order in which sites fire; models at rest while they are looked at.

The holder keeps what each site emitted in one forward pass; what is kept of it is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from similarity.sites import Site, contract_axes, find_module, parse, resolve_sites


class Listener:
    """Forward hooks on sites, as a context manager; they are removed however the block ends.

    `keep(site, tensor)` reduces an output as it fires; `take()` returns {site name: kept} of one forward pass, in the
    order in which the sites fired, and forgets it.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site], keep: Callable[[Site, Tensor], object]):
        self.keep = keep
        self.sites_of: dict[nn.Module, list[Site]] = {}
        for site in sites:
            self.sites_of.setdefault(find_module(model, site.name), []).append(site)
        self.handles: list = []
        self._forget()

    def __enter__(self) -> Listener:
        self.handles = [module.register_forward_hook(self._fire) for module in self.sites_of]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._forget()

    def _forget(self) -> None:
        self.calls = dict.fromkeys(self.sites_of, 0)
        self.kept: dict[str, list] = {}

    def _fire(self, module: nn.Module, _inputs, output) -> None:
        call = self.calls[module]
        self.calls[module] += 1
        for site in self.sites_of[module]:
            wanted = parse(site.name).call
            if wanted in (call,) or wanted < 0:
                recent = self.kept.pop(site.name, []) if wanted < 0 else []
                recent.append(self._kept(site, output))
                # only the last |wanted| calls can still turn out to be the asked one; popping keeps firing order
                self.kept[site.name] = recent[wanted:] if wanted < 0 else recent

    def _kept(self, site: Site, output) -> object:
        try:
            return self.keep(site, _element(output, site))
        except ValueError as reason:
            return reason  # an earlier call may look different: only the call asked for has to fit, see `take`

    def take(self, *, missing_ok: bool = False, misfit_ok: bool = False) -> dict[str, object]:
        """{site name: kept}; sites that did not fire, or do not fit their axes, raise unless they may be left out."""
        silent = []
        taken = {}
        for name, recent in self.kept.items():
            wanted = parse(name).call
            if wanted >= 0 or len(recent) == -wanted:
                taken[name] = recent[0]
        for module, sites in self.sites_of.items():
            silent += [(site.name, self.calls[module]) for site in sites if site.name not in taken]
        self._forget()
        if silent and not missing_ok:
            name, calls = silent[0]
            raise ValueError(f"site {name!r} did not fire as asked: its module was called {calls} times in the pass")
        misfits = {name: kept for name, kept in taken.items() if isinstance(kept, ValueError)}
        if misfits and not misfit_ok:
            raise next(iter(misfits.values()))
        return {name: kept for name, kept in taken.items() if name not in misfits}


def _element(output, site: Site) -> Tensor:
    """Follow the selectors of a site into a module's output, down to one tensor; its rank must fit the axes."""
    selectors = parse(site.name).selectors
    for selector in selectors:
        output = _step(output, selector, site.name)
    if not selectors and isinstance(output, (tuple, list)) and len([o for o in output if o is not None]) == 1:
        output = next(o for o in output if o is not None)  # (hidden_states,) and (hidden_states, None)
    if not isinstance(output, Tensor):
        if output is None:
            raise ValueError(f"site {site.name!r} emits nothing (None); listen to a module that returns a tensor")
        keys = list(output) if isinstance(output, Mapping) else range(len(output)) if hasattr(output, "__len__") else []
        choice = ", ".join(f"':{key}'" for key in keys)
        raise ValueError(
            f"site {site.name!r} emits a {type(output).__name__}, not a tensor; choose an element: {choice}"
        )
    if output.ndim != len(site.axes):
        raise ValueError(f"site {site.name!r} emits shape {tuple(output.shape)}, but its axes are {site.axes}")
    return output


def _step(output, selector: str, name: str):
    if isinstance(output, Mapping) and selector in output:
        return output[selector]
    if (
        isinstance(output, (tuple, list))
        and selector.lstrip("-").isdigit()
        and -len(output) <= int(selector) < len(output)
    ):
        return output[int(selector)]
    raise ValueError(f"site {name!r}: a {type(output).__name__} has no element {selector!r}")


def check_batch(site: Site, tensor: Tensor, images: int) -> None:
    """The axis declared as batch must be as long as the batch."""
    rows = tensor.shape[site.axes.index("batch")]
    if rows != images:
        raise ValueError(
            f"site {site.name!r} emits {rows} rows along its 'batch' axis for {images} images; its axes {site.axes} "
            "are declared wrongly"
        )


def list_sites(model: nn.Module, images: torch.Tensor, sites: Iterable[Site] | None = None, forward=None) -> list[Site]:
    """The sites in the order in which they fire, with the shapes (batch axis taken out) seen on `images`.

    With `sites=None` for a model that declares none: every module whose layout PyTorch's contract fixes.
    """
    sites = resolve_sites(model, None) if sites is None else list(sites)
    guessed = sites is None
    if guessed:
        sites = [
            Site(name, axes)
            for name, module in model.named_modules()
            if name and not list(module.children()) and (axes := contract_axes(module)) is not None
        ]

    def shape(site: Site, tensor: Tensor) -> tuple[int, ...]:
        check_batch(site, tensor, len(images))
        return tuple(tensor.shape)

    with Listener(model, sites, shape) as listener:
        run_quietly(model, images, forward)
        fired = listener.take(missing_ok=True, misfit_ok=guessed)  # a Linear may run on tokens: not in its contract
    by_name = {site.name: site for site in sites}
    return [
        replace(by_name[name], shape=tuple(s for axis, s in zip(by_name[name].axes, shape) if axis != "batch"))
        for name, shape in fired.items()
    ]


def run_quietly(model: nn.Module, images: Tensor, forward=None) -> None:
    """One forward pass in eval mode, without gradients, with images on the model's device and in its precision.

    Every module's mode is restored.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is not None:
        images = images.to(parameter.device, parameter.dtype if images.is_floating_point() else images.dtype)
    with quiet(model, freeze=False), torch.no_grad():
        model(images) if forward is None else forward(model, images)


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[list]:
    """What the model itself returns within the block, one entry a call; the hook is removed however the block ends."""
    outputs: list = []
    handle = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def quiet(model: nn.Module, *, freeze: bool = True) -> Iterator[None]:
    """Eval mode inside the block, and with `freeze` parameters that ask for no gradient; both as they were after it.

    Gradients then flow to images and activations alone, and what only the parameters' would need is not kept.
    """
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # one by one: train() of a model would reach parts that stay in eval mode
        for parameter in trained:
            parameter.requires_grad_(True)
