"""How a network was trained, as plain data: with class labels ('supervised') or without ('self-supervised').

Of a network that was trained here its objective says so; of a pretrained one, the tag of its weights in timm's names.
"""

from __future__ import annotations

import re

import timm

from classification.torchvision_bodies import is_torchvision
from utils import InputError

SUPERVISED, SELF_SUPERVISED = "supervised", "self-supervised"
TRAININGS = (SUPERVISED, SELF_SUPERVISED)
# objective of a training here -> how it counts
OBJECTIVES = {"supervised": SUPERVISED, "simclr": SELF_SUPERVISED}
# parts of a tag that name a method without class labels; pairs of images and texts count among them
_WITHOUT_LABELS = re.compile(
    r"mae|fcmae|dino(v\d)?|lvd\d+m|sat\d+m|ijepa|mim|seer|openai|clip|m?clip\d?|laion\w+|datacomp\w*|dfn\d\w*|metaclip\w*"
    r"|webli|yfcc\d+m|cc12m|merged2b"
)
_LABELS = re.compile(r"in\d+k|in22k")


def training_of(name: str) -> str:
    """'supervised' or 'self-supervised', of the pretrained weights that a name of timm or torchvision stands for.

    What was fine-tuned on class labels in the end counts as supervised. Torchvision's weights all are. CLIP and its
    like, which learn from the texts of images, are self-supervised here: no class label was given. A tag that does not
    tell raises.
    """
    if is_torchvision(name):
        return SUPERVISED
    plain, _, tag = name.partition(".")
    parts = (tag or timm.get_pretrained_cfg(plain).tag or "").split("_")
    if "ft" in parts:
        return SUPERVISED
    if any(_WITHOUT_LABELS.fullmatch(part) for part in parts):
        return SELF_SUPERVISED
    if any(_LABELS.fullmatch(part) for part in parts):
        return SUPERVISED
    raise InputError(f"whether {name!r} was trained with class labels is not known here; say it: training")
