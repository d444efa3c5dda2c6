"""What a network has spent by the time each of its sites fires: parameters used and operations done so far.

For asking how much a network changes what it represents for what it spends (`smoothness.step_changes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from costs import at_rest, counted_operations, forward, images_of
from similarity import Site
from similarity.hooks import Listener


def spent_by_site(
    model: nn.Module,
    sites: Sequence[Site],
    image_size: int,
    answer: Callable[[nn.Module, Tensor], object] = forward,
) -> pd.DataFrame:
    """Parameters and operations up to and with each site, for one image; index the sites, in the order they fire.

    parameters : scalars of all modules that have run, each counted once, however often it runs; those that a module
        holds itself (position embeddings) count from when it begins, those of parts that it uses without calling them
        when it ends
    operations : as `costs.flops_of` counts them. A block whose branches join later counts with what had run before it
    answer : what is done with images, as far as it matters for what runs
    """
    with at_rest(model) as device, counted_operations() as total:
        ledger = _Ledger(model)
        keep = Listener(model, sites, lambda site, _: (ledger.parameters, total()))
        try:
            with keep as listener:  # its hooks come after the ledger's: a site counts itself
                answer(model, images_of(image_size, 1, device))
                fired = listener.take()
        finally:
            ledger.close()
    table = pd.DataFrame(fired, index=["parameters", "operations"]).T
    table.index.name = "site"
    return table


class _Ledger:
    """Counts parameters as the modules that hold them begin and end."""

    def __init__(self, model: nn.Module):
        self.seen: set[int] = set()
        self.parameters = 0
        self.handles: list[RemovableHandle] = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._begins))
            self.handles.append(module.register_forward_hook(self._ends))

    def _begins(self, module: nn.Module, _inputs) -> None:
        self._count(module.parameters(recurse=False))

    def _ends(self, module: nn.Module, _inputs, _output) -> None:
        self._count(module.parameters())

    def _count(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) not in self.seen:
                self.seen.add(id(parameter))
                self.parameters += parameter.numel()

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
