"""Which family an architecture is of: whether its encoder and its decoder are convolutional or attend.

From the model's specification alone; nothing is built. Which other facts architectures differ in is the business of
the studies that compare them.
"""

from __future__ import annotations

from classification.classifiers import family_of as classifier_family
from model_spec import ModelSpec
from models import encoder_name

OF_TRANSFORMERS = ("mit_", "tu-vit", "tu-swin", "tu-deit", "tu-pvt")  # encoders by name; all others here are CNNs


def family_of(spec: ModelSpec) -> str:
    """'CNN', 'transformer' or 'hybrid': whether encoder and decoder are convolutional, attend, or differ in that.

    SegFormer's decoder has neither attention nor spatial convolutions (1 × 1 only): it counts as its encoder does. On a
    body of timm, which may be a hybrid itself, the network is of that classifier's family.
    """
    if spec.name == "all_mlp":
        return classifier_family(encoder_name(spec))
    attends = encoder_attends(spec)
    decoder = attends if spec.name.startswith("segformer") else spec.name == "mask2former"
    return "hybrid" if attends != decoder else "transformer" if attends else "CNN"


def encoder_attends(spec: ModelSpec) -> bool:
    """Whether the image encoder is a transformer."""
    if spec.name == "segformer":
        return True
    if spec.name == "mask2former" and "cnn" not in spec.options.get("encoder", {}):
        return True
    return encoder_name(spec).startswith(OF_TRANSFORMERS)
