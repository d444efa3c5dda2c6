"""Image classifiers from a spec: timm networks, and torchvision's MobileNetV2, that take pictures in [0, 1].

`build_classifier` wraps a network so that it normalises its own input, answers logits and says at which places it is
to be listened to; `save_classifier` and `load_classifier` keep one in a folder. How it is trained is in `training`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import is_model, list_models, list_pretrained, model_entrypoint
from torch import Tensor, nn

from classification.places import declared_sites
from model_spec import NORMALIZATIONS
from similarity import Site, list_sites
from utils import InputError, atomic_path, closest, file_digest, pick, seed_everything, write_text
from weights import HUB_ERRORS, load_state, offline_message, read_state

MOBILENET = "torchvision/mobilenet_v2"
FAMILIES = ("CNN", "transformer", "hybrid")
FOURTEEN = (
    "convnextv2_nano",
    "densenet121",
    "efficientnet_b3",
    "efficientnet_b4",
    "mobilenetv3_large_100",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "res2net50_26w_4s",
    "deit_small_patch16_224",
    "deit_tiny_patch16_224",
    "pvt_v2_b2",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch32_224",
)
# by the module of timm that a network is registered in; modules that hold several kinds are left out
_CNN = "convnext cspnet cspnext csatv2 densenet dla dpn efficientnet fasternet ghostnet hardcorenas hgnet hrnet"
_CNN += " inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mobilenetv3 nasnet nfnet pnasnet rdnet"
_CNN += " regnet repghost repvit res2net resnest resnet resnetv2 rexnet selecsls senet sknet starnet tresnet vgg vovnet"
_CNN += " xception xception_aligned byobnet convmixer"
_TRANSFORMER = "beit cait crossvit davit deit eva hiera hieradet_sam2 mvitv2 naflexvit nest pit pvt_v2 swin_transformer"
_TRANSFORMER += " swin_transformer_v2 swin_transformer_v2_cr tnt twins vision_transformer vision_transformer_relpos"
_TRANSFORMER += " vision_transformer_sam volo xcit"
_HYBRID = "byoanet coat convit cpubone edgenext efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra"
_HYBRID += " fastvit iformer levit lowformer maxxvit mobilevit nextvit shvit swiftformer tiny_vit visformer"
_HYBRID += " vision_transformer_hybrid vitamin"
_FAMILY = {
    module: family for family, modules in zip(FAMILIES, (_CNN, _TRANSFORMER, _HYBRID)) for module in modules.split()
}
# networks of these modules are built for one image size, and have to be told which
_SIZED = {"beit", "deit", "eva", "levit", "maxxvit", "swin_transformer", "swin_transformer_v2", "vision_transformer"}


@dataclass(frozen=True)
class ClassifierSpec:
    """Everything needed to build a classifier again; stored beside its weights.

    name : a network of timm, also with a pretrained tag ('resnet50.a1_in1k'), or 'torchvision/mobilenet_v2'
    options : of timm.create_model for this network, such as {'depths': [1, 1, 2, 1]}
    weights : 'none' (random), 'imagenet' (timm's pretrained ones, from the hub or its local cache), or a file in the
        network's own key layout: safetensors or legacy .pth
    normalization : 'imagenet', 'half', 'clip' or 'none', see model_spec.NORMALIZATIONS; with weights 'imagenet' what
        the pretrained network was trained with takes its place
    classes : logits that it answers; 1000 with weights 'imagenet'
    image_size : side in pixels of the images that it is built for; networks of convolutions alone take others too
    """

    name: str
    options: Mapping = field(default_factory=dict)
    weights: str = "none"
    normalization: str = "imagenet"
    classes: int = 10
    image_size: int = 64


class Classifier(nn.Module):
    """A network that takes images (B, 3, H, W) in [0, 1] and answers logits (B, classes)."""

    def __init__(self, body: nn.Module, spec: ClassifierSpec):
        super().__init__()
        self.body, self.spec = body, spec
        mean, std = pick("normalization", spec.normalization, NORMALIZATIONS)
        if spec.weights == "imagenet":
            mean, std = body.pretrained_cfg["mean"], body.pretrained_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        size = self.spec.image_size
        if images.shape[1:] != (3, size, size) and (is_sized(self.spec.name) or images.shape[1] != 3):
            raise InputError(
                f"{self.spec.name} was built for images (3, {size}, {size}) and got {tuple(images.shape[1:])}; resize "
                "them, or build it with another image_size"
            )
        return self.body((images - self.mean) / self.std)

    def default_sites(self) -> list[Site]:
        """The informative sites in the order in which they fire, with declared axes; see `places`."""
        return [dataclasses.replace(site, shape=()) for site in sites(self)]


def sites(model: Classifier, image_size: int | None = None) -> list[Site]:
    """The informative sites in execution order, with the shapes that a square image gives (default: the spec's)."""
    size = model.spec.image_size if image_size is None else image_size
    blank = torch.zeros(1, 3, size, size, device=model.mean.device)
    return list_sites(model, blank, declared_sites(model.body, "body."))


# ---- what timm calls a network ----------------------------------------------------------------------------------


def architecture_of(name: str) -> str:
    """The module of timm that registers a network ('swin_transformer'); unknown names raise with the closest ones."""
    plain = name.partition(".")[0]
    if name == MOBILENET:
        return "efficientnet"  # where timm has its own MobileNetV2
    known = is_model(plain) and (name == plain or name in list_pretrained(f"{plain}.*"))
    if not known:
        choices = [*list_models(), MOBILENET] if "." not in name else list_pretrained()
        raise InputError(f"unknown network {name!r}; closest: {closest(name, choices)}")
    return model_entrypoint(plain).__module__.rpartition(".")[2]


def family_of(name: str) -> str:
    """'CNN', 'transformer' or 'hybrid', by the architecture that timm registers a network under.

    A transformer computes its features by attention over patches from the first block on (pyramids and windows count,
    whatever embeds the patches); a hybrid has convolutional blocks and attention.
    """
    plain = name.partition(".")[0]
    if plain.startswith(("caformer_", "convformer_")):  # one module of timm holds both
        return "hybrid" if plain.startswith("ca") else "CNN"
    module = architecture_of(name)
    if module not in _FAMILY:
        raise InputError(
            f"whether {name!r} (timm's {module}) is a CNN, a transformer or a hybrid is not known here; say it: family"
        )
    return _FAMILY[module]


def is_sized(name: str) -> bool:
    """Whether a network takes images of one size alone."""
    return name != MOBILENET and architecture_of(name) in _SIZED


# ---- building ---------------------------------------------------------------------------------------------------


def build_classifier(spec: ClassifierSpec, seed: int = 0) -> Classifier:
    """A classifier in training mode; random weights are drawn by the seed."""
    check_spec(spec)
    seed_everything(seed)
    body = _torchvision_body(spec) if spec.name == MOBILENET else _timm_body(spec, spec.weights == "imagenet")
    if spec.weights not in ("none", "imagenet"):
        load_state(body, Path(spec.weights))
    return Classifier(body, spec)


def check_spec(spec: ClassifierSpec) -> None:
    """Refuse what no network can be built from, without building one."""
    architecture_of(spec.name)
    pick("normalization", spec.normalization, NORMALIZATIONS)
    if spec.image_size < 1 or spec.classes < 1:
        raise InputError(
            f"{spec.name}: image_size and classes must be at least 1, got {spec.image_size}, {spec.classes}"
        )
    if spec.weights == "imagenet" and spec.name == MOBILENET:
        raise InputError(f"{MOBILENET} takes its ImageNet weights from a file: set weights to it (normalization: half)")
    if spec.weights == "imagenet" and spec.classes != 1000:
        raise InputError(
            f"{spec.name}: weights 'imagenet' answer 1000 classes, not {spec.classes}; set classes to 1000"
        )
    if spec.weights not in ("none", "imagenet"):
        read_state(Path(spec.weights))


def _torchvision_body(spec: ClassifierSpec) -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None, num_classes=spec.classes, **spec.options)


def _timm_body(spec: ClassifierSpec, pretrained: bool) -> nn.Module:
    size = {"img_size": spec.image_size} if is_sized(spec.name) else {}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.options.items()}
    name = spec.name
    if pretrained and not timm.get_pretrained_cfg(name, allow_unregistered=False).has_weights:
        raise InputError(f"timm has no pretrained weights for {name!r}; closest: {closest(name, list_pretrained())}")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=spec.classes, **size, **options)
    except HUB_ERRORS as error:
        if not pretrained:
            raise
        source = timm.get_pretrained_cfg(name).hf_hub_id or name
        raise InputError(offline_message(source, "", error)) from error
    except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, KeyError) as error:
        raise InputError(
            f"{name} cannot be built at {spec.image_size} px with the options {dict(spec.options)} ({error}); see "
            f"help(timm.models.{model_entrypoint(name.partition('.')[0]).__name__}) for what it takes"
        ) from error


# ---- in a folder ------------------------------------------------------------------------------------------------


def save_classifier(folder: Path, model: Classifier, extra: Mapping | None = None) -> None:
    """Write classifier.safetensors and classifier.json (spec, `extra`, the weights' hash), each atomically."""
    folder = Path(folder)
    state = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in model.state_dict().items()}
    with atomic_path(folder / "classifier.safetensors") as temporary:
        save_file(state, temporary)
    about = {"spec": dataclasses.asdict(model.spec), "extra": dict(extra or {})}
    about["weights_hash"] = file_digest(folder / "classifier.safetensors")
    write_text(folder / "classifier.json", json.dumps(about, indent=1) + "\n")


def load_classifier(folder: Path) -> tuple[Classifier, dict]:
    """The classifier of `save_classifier` in eval mode on the CPU, and its `extra`; needs nothing but the folder."""
    folder = Path(folder)
    about, file = _read_about(folder / "classifier.json"), folder / "classifier.safetensors"
    if not file.is_file():
        raise InputError(f"{file} does not exist; save the classifier again")
    if file_digest(file) != about["weights_hash"]:
        raise InputError(f"{file} is not the file that {folder / 'classifier.json'} describes; save it again")
    try:
        spec = ClassifierSpec(**about["spec"])
    except TypeError as error:
        raise InputError(f"{folder / 'classifier.json'} holds no spec of a classifier ({error})") from error
    body = _torchvision_body(spec) if spec.name == MOBILENET else _timm_body(spec, False)
    model = Classifier(body, spec)
    load_state(model, file)
    return model.eval(), about["extra"]


def _read_about(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path.parent} holds no classifier: {path.name} is missing")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); save the classifier again") from error
    if not isinstance(about, dict) or not {"spec", "extra", "weights_hash"} <= set(about):
        raise InputError(f"{path} does not describe a classifier; save the classifier again")
    return about
