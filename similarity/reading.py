"""Reading: one batch of images through a model, and the rows of every site under every policy.

Nothing is kept from one batch to the next: `recording` gathers the rows, streaming code may fold them into sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from similarity.hooks import Listener, check_batch, list_sites, outputs_of, run_quietly
from similarity.policies import parse_policy, query_rows, reduce, unfit, weigh, weighs_queries
from similarity.sites import Site


class Reader:
    """Reads batches: every activation is reduced on its device the moment it fires.

    model : in any mode; it is read in eval mode and without gradients, and left as it was
    sites : listed ones (`list_sites`), so with their shapes
    policies : of `POLICIES`
    image_size : (height, width) of the images in pixels, by which policies are judged to fit
    strict : a site that a policy does not fit raises; else that pair of site and policy is left out
    forward : called as forward(model, images); default model(images)

    Under 'mask' the model says after each pass how much each query adds to its answer: `model.query_weights(output)`
    gives non-negative weights (batch, query), where `output` is what the model itself returned, whatever `forward`
    makes of it. Until then the queries of that batch are held.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        policies: Sequence[str],
        image_size: tuple[int, int],
        *,
        strict: bool = False,
        forward: Callable[[nn.Module, Tensor], object] | None = None,
    ):
        if not sites:
            raise ValueError("no site to record: the model declares none; name them with their axes")
        check_query_weights(model, sites, policies)
        self.model, self.sites, self.policies, self.forward = model, list(sites), list(policies), forward
        misfits = {(s.name, p): unfit(s, p, image_size) if s.shape else "" for s in sites for p in policies}
        reasons = [reason for reason in misfits.values() if reason]
        if reasons and strict:
            raise ValueError(reasons[0])
        self.wanted = {site.name: [p for p in policies if not misfits[site.name, p]] for site in sites}
        self.weighs = any(weighs_queries(site, policy) for site in sites for policy in policies)

    def read(self, images: Tensor, ids: Sequence[str] | None = None) -> dict[tuple[str, str], Tensor]:
        """{(site name, policy): rows (batch, …)} of images (batch, …), on the model's device, their memory their own.

        ids : of the images, for messages only
        """
        size = tuple(images.shape[-2:])

        def keep(site: Site, tensor: Tensor) -> dict[str, Tensor]:
            check_batch(site, tensor, len(images))
            return {policy: _held(tensor, site, policy, size) for policy in self.wanted[site.name]}

        answering = outputs_of(self.model) if self.weighs else nullcontext()
        with Listener(self.model, self.sites, keep) as listener, answering as outputs:
            run_quietly(self.model, images, self.forward)
            taken = listener.take()
        weights = self._weights(outputs, len(images), ids) if self.weighs else None
        by_name = {site.name: site for site in self.sites}
        return {
            (name, policy): weigh(rows, weights, by_name[name]) if weighs_queries(by_name[name], policy) else rows
            for name, kept in taken.items()
            for policy, rows in kept.items()
        }

    def _weights(self, outputs: list, images: int, ids: Sequence[str] | None) -> Tensor:
        """(batch, query), each row summing to 1, from the one output of the pass."""
        if len(outputs) != 1:
            raise ValueError(
                f"policy 'mask' needs one answer a pass, and {type(self.model).__name__} itself was called "
                f"{len(outputs)} times in this one; let `forward` call model(images) once, or use 'gap'"
            )
        with torch.no_grad():
            weights = self.model.query_weights(outputs[0])
        return normalized(weights, images, ids)


def _held(tensor: Tensor, site: Site, policy: str, size: tuple[int, int]) -> Tensor:
    """What is kept of an activation until the pass has ended; a copy, as successors may work in place."""
    late = weighs_queries(site, policy)
    return (query_rows(tensor, site) if late else reduce(tensor, site, policy, size)).clone()


def check_query_weights(model: nn.Module, sites: Iterable[Site], policies: Sequence[str]) -> None:
    """Under 'mask', a model with sites of queries must say how it weights them; checked before any pass over data."""
    for policy in policies:
        parse_policy(policy)
    late = [site for site in sites if any(weighs_queries(site, policy) for policy in policies)]
    if late and not callable(getattr(model, "query_weights", None)):
        raise ValueError(
            f"policy 'mask' weights the queries of site {late[0].name!r} by their share in the model's answer, and "
            f"{type(model).__name__} does not say it; give it a method query_weights(output) -> (batch, query), or "
            "use 'gap', their plain mean"
        )


def normalized(weights: Tensor, images: int, ids: Sequence[str] | None = None) -> Tensor:
    """Non-negative weights (batch, query) as shares, each image's summing to 1; in at least float32."""
    if not isinstance(weights, Tensor) or weights.ndim != 2 or len(weights) != images:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"query_weights must give a tensor (batch, query) for {images} images, got {got}")
    weights = weights.detach() if weights.dtype == torch.float64 else weights.detach().float()
    totals = weights.sum(1)
    unusable = ~totals.isfinite() | (totals == 0) | (weights < 0).any(1)
    if unusable.any():
        rows = unusable.nonzero().flatten().tolist()
        named = ", ".join(repr(ids[row]) if ids is not None else f"row {row} of the batch" for row in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"query_weights must be finite, non-negative and not all zero for every image; they are not for {named}"
            f"{more}, so 'mask' is not defined there: leave those images out, or use 'gap'"
        )
    return weights / totals[:, None]


def open_reader(
    model: nn.Module,
    images: Tensor,
    sites: Sequence[Site] | None,
    policies: Sequence[str],
    *,
    strict: bool = False,
    forward: Callable[[nn.Module, Tensor], object] | None = None,
) -> Reader:
    """A Reader of sites as `resolve_sites` gives them, listed on the first image of a batch.

    strict : sites were asked for by name: they keep their place even where they do not fire in the listing pass
        (reading them then says why), and each must fit every policy
    """
    check_query_weights(model, sites or [], policies)
    listed = list_sites(model, images[:1], sites, forward)
    if strict:
        seen = {site.name for site in listed}
        listed += [site for site in sites or [] if site.name not in seen]
    return Reader(model, listed, policies, tuple(images.shape[-2:]), strict=strict, forward=forward)
