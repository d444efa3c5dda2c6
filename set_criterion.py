"""Mask2Former's set loss on logits and masks: every image of a batch at once, each sampled point computed once.

Definition: Cheng et al., *Masked-attention Mask Transformer for Universal Image Segmentation*, CVPR 2022, section 3.3:
queries are matched to the image's masks by their cost on sampled points (Carion et al. 2020), matched ones pay mask
cross-entropy and Dice on points sampled where they are unsure (Kirillov et al., PointRend, 2020), all pay class
cross-entropy. The value equals transformers' `Mask2FormerLoss` on the same random numbers, and random numbers are drawn
in that loss's order, so that the same seed gives the same loss. No model is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class SetCriterion:
    """What the loss weighs and how many points it looks at; the weights serve matching and loss alike.

    points : per mask; `oversample` x as many are drawn, of which the `importance` share of `points` that is least sure
        is kept, the rest of `points` being drawn anew
    no_object : weight of the class 'no object' in the class cross-entropy
    """

    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object: float = 0.1
    points: int = 12544
    oversample: float = 3.0
    importance: float = 0.75


def set_criterion(
    settings: SetCriterion, layers: Sequence[tuple[Tensor, Tensor]], masks: Tensor, present: Tensor, count: Tensor
) -> Tensor:
    """The loss summed over the decoder's layers: a scalar Tensor.

    layers : (mask logits (B, Q, h, w), class logits (B, Q, labels + 1)) of each layer, the last layer first
    masks : (B, labels, H, W) in {0, 1}; present : (B, labels) bool, the masks that are targets, one at least
    count : scalar Tensor, the number of target masks that sums are divided by (of several processes: their mean)
    """
    return torch.stack([_layer_loss(settings, *layer, masks, present, count) for layer in layers]).sum()


def _layer_loss(settings, mask_logits, class_logits, masks, present, count) -> Tensor:
    mask_logits, masks = mask_logits.float(), masks.float()
    images, queries, labels = _match(settings, mask_logits, class_logits, masks, present)
    target = masks[images, labels][:, None]
    chosen = mask_logits[images, queries][:, None]
    points = _unsure_points(settings, chosen.detach())
    logits, truth = _sample(chosen, points)[:, 0], _sample(target, points)[:, 0]
    # at an easy point both terms are tiny: summed per mask first, as the definition does
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum() / count
    probabilities = logits.sigmoid()
    shared, total = (probabilities * truth).sum(1), probabilities.sum(1) + truth.sum(1)
    dice = (1 - (2 * shared + 1) / (total + 1)).sum() / count  # the +1 belongs to the published loss
    classes = _class_loss(settings, class_logits, images, queries, labels)
    return settings.mask_weight * cross_entropy + settings.dice_weight * dice + settings.class_weight * classes


def _class_loss(settings, class_logits, images, queries, labels) -> Tensor:
    """Weighted mean cross-entropy of all queries; those without a mask are to say 'no object', the last class."""
    none = class_logits.shape[-1] - 1
    wanted = torch.full(class_logits.shape[:2], none, device=class_logits.device)
    wanted[images, queries] = labels
    weights = torch.ones(none + 1, device=class_logits.device)
    weights[none] = settings.no_object
    return F.cross_entropy(class_logits.float().flatten(0, 1), wanted.flatten(), weights)


def _unsure_points(settings: SetCriterion, logits: Tensor) -> Tensor:
    """Points in [0, 1]² of every mask: logits (N, 1, h, w) -> (N, points, 2)."""
    drawn = torch.rand(len(logits), int(settings.points * settings.oversample), 2, device=logits.device)
    unsure = int(settings.importance * settings.points)
    sureness = _sample(logits, drawn)[:, 0].abs_()
    kept = sureness.topk(unsure, dim=1, largest=False, sorted=False).indices
    points = drawn.gather(1, kept[..., None].expand(-1, -1, 2))
    if unsure == settings.points:
        return points
    return torch.cat([points, torch.rand(len(logits), settings.points - unsure, 2, device=logits.device)], dim=1)


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2) in [0, 1]²: (N, C, P); outside the map is 0."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


# ---------------------------------------------------------------------------------------------------------- matching


@torch.no_grad()
def _match(settings, mask_logits, class_logits, masks, present) -> tuple[Tensor, Tensor, Tensor]:
    """(image, query, label) of every target mask, by image and then by query."""
    points = torch.rand(len(masks), settings.points, 2, device=masks.device)
    costs = _mask_costs(settings, mask_logits, masks, points)
    costs -= settings.class_weight * class_logits.float().softmax(-1)[..., : masks.shape[1]]
    worst = torch.finfo(costs.dtype).max  # of diverged queries: they are matched when there is no other
    costs = costs.nan_to_num(nan=worst, posinf=worst, neginf=worst).cpu().numpy()
    found = []
    for image, (cost, here) in enumerate(zip(costs, present.cpu().numpy())):
        labels = np.flatnonzero(here)
        queries, order = linear_sum_assignment(cost[:, labels])
        found.append(np.stack([np.full_like(queries, image), queries, labels[order]]))
    return tuple(torch.as_tensor(np.concatenate(found, axis=1), device=masks.device))


def _mask_costs(settings, mask_logits, masks, points) -> Tensor:
    """Weighted cross-entropy and Dice between every query and every mask of an image: (B, Q, labels)."""
    if mask_logits.is_cuda:
        return _costs_of(settings, _sample(mask_logits, points), _sample(masks, points))
    # an image at a time stays in the processor's cache, all at once does not
    pairs = zip(mask_logits, masks, points)
    return torch.cat([_costs_of(settings, _sample(q[None], p[None]), _sample(m[None], p[None])) for q, m, p in pairs])


def _costs_of(settings: SetCriterion, logits: Tensor, truth: Tensor) -> Tensor:
    """Costs from values at the same points: logits (B, Q, P), truth (B, labels, P) -> (B, Q, labels).

    softplus(x) is the cross-entropy of x against 0 and softplus(x) − x against 1: one of them is enough.
    """
    truth = truth.mT
    background = F.softplus(logits).sum(-1, keepdim=True)
    cross_entropy = (background - logits @ truth) / logits.shape[-1]
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities @ truth) + 1) / (probabilities.sum(-1, keepdim=True) + truth.sum(1)[:, None] + 1)
    return settings.mask_weight * cross_entropy + settings.dice_weight * dice
