"""What a model's output means: logits of lesion or of classes for every pixel, whichever architecture it comes from.

Training, inference, explanations and stitching ask here and never look at the model they hold. For Mask2Former the
answer is its semantic inference over queries (Cheng et al. 2022), and its own set loss is here beside it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_spec import ModelSpec
from set_criterion import SetCriterion, set_criterion
from utils import InputError

FEWEST_POINTS = 1024  # in the set loss, however small the maps are
LESION = 1  # its label among Mask2Former's classes


def unwrapped(model: nn.Module) -> nn.Module:
    """With several processes the distributed wrapper holds the model."""
    return getattr(model, "module", model)


def _spec_of(model: nn.Module) -> ModelSpec:
    return unwrapped(model).spec


def lesion_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Log-odds of lesion for every pixel: images (B, 3, H, W) in [0, 1] -> (B, 1, H, W).

    Mask2Former: log-odds of its semantic inference, log Σ_q p_q(lesion) σ(m_q) − log Σ_q p_q(background) σ(m_q)
    (Cheng et al. 2022), computed in log space at the masks' resolution and upsampled bilinearly; with
    `answer='query:k'` the k-th query's mask logit. A model of several classes has no lesion: see `class_logits`.
    """
    logits = _answer(model, images)
    if logits.shape[1] != 1:
        raise InputError(f"the model answers {logits.shape[1]} classes, not one lesion; ask for its class_logits")
    return logits


def class_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits of every class for every pixel, whose softmax is the answer: images (B, 3, H, W) -> (B, C, H, W).

    Mask2Former: log Σ_q p_q(class) σ(m_q). A model with one lesion logit z answers (0, z): the softmax of these is
    σ(−z) and σ(z), so that everything which works on classes works for it too.
    """
    logits = _answer(model, images)
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def pixel_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What the model was built to answer: (B, 1, H, W) lesion log-odds, or (B, C, H, W) logits of C classes."""
    return _answer(model, images)


def decided(logits: Tensor) -> Tensor:
    """The label of every pixel, (B, 1, H, W) int64: lesion (1) above log-odds of 0, or the class of highest logit."""
    return (logits > 0).long() if logits.shape[1] == 1 else logits.argmax(1, keepdim=True)


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    maps = output if isinstance(output, Tensor) else maps_of(_spec_of(model), output)
    return maps if maps.shape[-2:] == images.shape[-2:] else _upsampled(maps, images.shape[-2:])


def _upsampled(maps: Tensor, size) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def maps_of(spec: ModelSpec, output) -> Tensor:
    """The logits in the output of a torchvision or transformers model, (B, 1 or C, h, w) at their own resolution."""
    if "masks_queries_logits" not in output:  # torchvision's and transformers' dense models
        return output["out"] if "out" in output else output["logits"]
    if spec.answer != "semantic":
        return _one_query(output, spec.answer)
    classes = _semantic(output, spec.labels)
    return classes if spec.classes > 1 else classes[:, LESION:] - classes[:, :LESION]


def _semantic(output: Mapping, labels: int) -> Tensor:
    """log Σ_q p_q(label) σ(m_q): (B, labels, h, w)."""
    classes = output["class_queries_logits"].float().log_softmax(-1)[..., :labels]  # the last one is 'no object'
    masks = F.logsigmoid(output["masks_queries_logits"].float())
    return torch.stack([torch.logsumexp(classes[..., label, None, None] + masks, dim=1) for label in range(labels)], 1)


def query_weights(output, answer: str = "semantic") -> Tensor:
    """Each query's share in the answer, from Mask2Former's output (of its last layer): (batch, query), not normalised.

    p_q(lesion) times the mean over pixels of σ(mask_q): what query q adds to the semantic inference of
    `lesion_logits`; of several classes, p_q(any class but the first, the background). With `answer='query:k'` the k-th
    query is the whole answer, so the k-th weight is 1, the others 0.
    """
    masks = output.masks_queries_logits
    if answer != "semantic":
        chosen = _query_number(masks, answer)
        return F.one_hot(torch.full((len(masks),), chosen, device=masks.device), masks.shape[1]).float()
    classes = output.class_queries_logits.float().softmax(-1)  # over the labels and 'no object'
    return classes[..., LESION:-1].sum(-1) * masks.float().sigmoid().mean((2, 3))


def _one_query(output, answer: str) -> Tensor:
    masks = output["masks_queries_logits"]
    return masks[:, _query_number(masks, answer), None]


def _query_number(masks: Tensor, answer: str) -> int:
    query = int(answer.partition(":")[2])
    if query >= masks.shape[1]:
        raise InputError(f"answer {answer!r}: the model has {masks.shape[1]} queries, numbered from 0")
    return query


def set_loss(model: nn.Module, images: Tensor, masks: Tensor) -> Tensor:
    """Mask2Former's own loss: Hungarian matching of queries to one mask per image and label, background included.

    masks : (B, 1, H, W) of {0, 1}, or of class indices with 255 for pixels that are in none

    A label that has no pixel in an image is left out of that image's targets. The loss looks at the configured number
    of points a mask (12,544 by default: made for maps of 256 × 256), but at no more than the mask logits have pixels or
    `FEWEST_POINTS`, whichever is more: further points would read the same few pixels again.
    """
    spec = _spec_of(model)
    if spec.name != "mask2former":
        raise InputError(
            f"loss 'set' needs a set of queries; {spec.name} has none: use scaled_dice, dice_bce or ce_dice"
        )
    targets = torch.cat([masks == label for label in range(spec.labels)], dim=1).to(images.dtype)
    present = targets.flatten(2).any(-1)
    output = model(images, output_auxiliary_logits=True)
    layers = [
        (output.masks_queries_logits, output.class_queries_logits),
        *((layer["masks_queries_logits"], layer["class_queries_logits"]) for layer in output.auxiliary_logits),
    ]
    criterion = unwrapped(model).criterion
    count = criterion.get_num_masks([here.nonzero()[:, 0] for here in present], images.device)
    return set_criterion(_criterion_settings(criterion, layers[0][0]), layers, targets, present, count)


def _criterion_settings(criterion: nn.Module, mask_logits: Tensor) -> SetCriterion:
    pixels = mask_logits.shape[-2] * mask_logits.shape[-1]
    return SetCriterion(
        class_weight=criterion.matcher.cost_class,
        mask_weight=criterion.matcher.cost_mask,
        dice_weight=criterion.matcher.cost_dice,
        no_object=criterion.eos_coef,
        points=min(criterion.num_points, max(FEWEST_POINTS, pixels)),
        oversample=criterion.oversample_ratio,
        importance=criterion.importance_sample_ratio,
    )
