"""What has to be known to build a model again: its name, preset, weights, input normalisation, and what it answers.

Plain data, stored beside the weights; how a spec becomes a model is in `models` and the rooms it calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from utils import InputError, closest

NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((128 / 255,) * 3, (128 / 255,) * 3),  # (x − 128) / 128 for x in 0..255
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0,) * 3, (1.0,) * 3),  # the earlier study's
}
TITLES = {
    "unetpp": "UNet++",
    "mask2former": "Mask2Former",
    "fcn": "FCN",
    "unet": "U-Net",
    "fpn": "FPN",
    "deeplabv3plus": "DeepLabV3+",
    "segformer": "SegFormer",
    "segformer_smp": "SegFormer decoder (smp)",
    "upernet": "UPerNet",
    "all_mlp": "All-MLP",
}


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build a model again; stored beside its weights.

    name : one of `TITLES`
    preset : a preset of that name; for unet, unetpp, fpn, deeplabv3plus, segformer_smp and upernet also any encoder of
        segmentation-models-pytorch; for mask2former (Swin-based) and segformer also a hub name or a local folder in
        the hub's format; for all_mlp also any network of timm
    weights : 'none' (random), 'imagenet' (the pretrained ones of the preset, from the hub or its local cache), or a
        file: encoder or whole-model state as safetensors or legacy .pth; for mask2former and segformer also a folder;
        for all_mlp also the folder of a classifier that was trained here
    normalization : 'imagenet', 'half', 'clip' or 'none', see NORMALIZATIONS
    freeze : 'encoder' (its parameters do not train, and it stays in eval mode) or 'encoder_statistics', see `freeze`
    answer : what `lesion_logits` means for Mask2Former: 'semantic', or 'query:1' (the earlier study's objective)
    options : overrides of the preset's entries, e.g. {'encoder_name': 'mobilenet_v2'} or {'num_queries': 20}
    classes : 1 is one lesion logit against background; from 3 on, so many classes (two classes are a lesion logit)
    """

    name: str = "unetpp"
    preset: str = "demo"
    weights: str = "none"
    normalization: str = "imagenet"
    freeze: tuple[str, ...] = ()
    answer: str = "semantic"
    options: dict = field(default_factory=dict)
    classes: int = 1

    @property
    def labels(self) -> int:
        """Classes that a set of queries tells apart: background and lesion count as two."""
        return max(2, self.classes)


def check_answer(spec: ModelSpec) -> None:
    """Refuse an answer or a number of classes that no model gives."""
    kind, _, query = spec.answer.partition(":")
    if spec.answer != "semantic" and (kind != "query" or not query.isdigit()):
        raise InputError(f"unknown answer {spec.answer!r}; use 'semantic' or 'query:N'")
    if spec.classes != 1 and spec.classes < 3:
        raise InputError(f"classes must be 1 (lesion against background) or at least 3, got {spec.classes}")
    if spec.answer != "semantic" and spec.classes != 1:
        raise InputError(f"answer {spec.answer!r} is one mask; {spec.classes} classes need 'semantic'")


def check_query(spec: ModelSpec, queries: int) -> None:
    """Refuse the mask of a query that a model of so many does not have."""
    if spec.answer != "semantic" and int(spec.answer.partition(":")[2]) >= queries:
        raise InputError(f"answer {spec.answer!r}: the model has {queries} queries, numbered from 0")


def refuse_unknown_options(options: dict, allowed: set[str]) -> None:
    """Name the closest options where one is unknown."""
    for name in options:
        if name not in allowed:
            raise InputError(f"unknown model option {name!r}; closest: {closest(name, allowed)}")


def refuse_options(spec: ModelSpec) -> None:
    """A pretrained model is what it is."""
    if spec.options:
        raise InputError(
            f"options {spec.options} cannot change a pretrained model; leave them out, or use weights none"
        )
