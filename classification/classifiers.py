"""Image classifiers from a spec: networks of timm and of torchvision, that take pictures in [0, 1].

`build_classifier` wraps a network so that it normalises its own input, answers logits (or features where it has no
head, as self-supervised ones), and says at which places it is to be listened to; `save_classifier` and
`load_classifier` keep one in a folder. How it is trained is in `training`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import is_model, list_models, list_pretrained, model_entrypoint
from torch import Tensor, nn

from classification import torchvision_bodies
from classification.torchvision_bodies import is_torchvision
from classifier_sites import declared_sites
from model_spec import NORMALIZATIONS
from similarity import Site, list_sites
from utils import InputError, atomic_path, closest, file_digest, pick, seed_everything, write_text
from weights import HUB_ERRORS, load_state, offline_message, read_state

MOBILENET = "torchvision/mobilenet_v2"
PRETRAINED = ("pretrained", "imagenet")  # two words for one thing: what timm or torchvision has under a name
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

    name : a network of timm, also with a pretrained tag ('resnet50.a1_in1k', 'vit_small_patch14_dinov2.lvd142m'), or
        one of torchvision, also with the name of its weights ('torchvision/resnet50.IMAGENET1K_V1')
    options : of timm.create_model, or of torchvision's function, for this network, such as {'depths': [1, 1, 2, 1]}
    weights : 'none' (random), 'pretrained' or 'imagenet' (those under this name, from the hub or the local cache), or a
        file in the network's own key layout: safetensors or legacy .pth
    normalization : 'imagenet', 'half', 'clip' or 'none', see model_spec.NORMALIZATIONS; with pretrained weights what
        they were trained with takes its place
    classes : logits that it answers; with pretrained weights as many as they have (1000 of ImageNet); 0: it has no head
        and answers its pooled features
    image_size : side in pixels of the images that it is built for; networks of convolutions alone take others too
    """

    name: str
    options: Mapping = field(default_factory=dict)
    weights: str = "none"
    normalization: str = "imagenet"
    classes: int = 10
    image_size: int = 64

    @property
    def is_pretrained(self) -> bool:
        return self.weights in PRETRAINED


class Classifier(nn.Module):
    """A network that takes images (B, 3, H, W) in [0, 1] and answers logits (B, classes), or features (B, width)."""

    def __init__(self, body: nn.Module, spec: ClassifierSpec):
        super().__init__()
        self.body, self.spec = body, spec
        mean, std = pick("normalization", spec.normalization, NORMALIZATIONS)
        if spec.is_pretrained:
            mean, std = _normalization_of(body, spec.name)
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


def _normalization_of(body: nn.Module, name: str) -> tuple:
    if is_torchvision(name):
        return torchvision_bodies.normalization(name)
    return body.pretrained_cfg["mean"], body.pretrained_cfg["std"]


# ---- what timm calls a network ----------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Refuse a name that neither timm nor torchvision knows, with the closest ones."""
    torchvision_bodies.check_name(name) if is_torchvision(name) else architecture_of(name)


def architecture_of(name: str) -> str:
    """The module of timm that registers a network ('swin_transformer'); unknown names raise with the closest ones."""
    plain = name.partition(".")[0]
    known = is_model(plain) and (name == plain or name in list_pretrained(f"{plain}.*"))
    if not known:
        choices = list_models() if "." not in name else list_pretrained()
        raise InputError(f"unknown network {name!r}; closest: {closest(name, choices)}")
    return model_entrypoint(plain).__module__.rpartition(".")[2]


def family_of(name: str) -> str:
    """'CNN', 'transformer' or 'hybrid', by the architecture that timm registers a network under, or torchvision's name.

    A transformer computes its features by attention over patches from the first block on (pyramids and windows count,
    whatever embeds the patches); a hybrid has convolutional blocks and attention.
    """
    if is_torchvision(name):
        check_name(name)
        return torchvision_bodies.family(name)
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
    return torchvision_bodies.takes_one_size(name) if is_torchvision(name) else architecture_of(name) in _SIZED


# ---- building ---------------------------------------------------------------------------------------------------


def build_classifier(spec: ClassifierSpec, seed: int = 0) -> Classifier:
    """A classifier in training mode; random weights are drawn by the seed."""
    check_spec(spec)
    seed_everything(seed)
    body = _body(spec, spec.is_pretrained)
    if spec.weights not in ("none", *PRETRAINED):
        load_state(body, Path(spec.weights))
    return Classifier(body, spec)


def check_spec(spec: ClassifierSpec) -> None:
    """Refuse what no network can be built from, without building one."""
    check_name(spec.name)
    pick("normalization", spec.normalization, NORMALIZATIONS)
    if spec.image_size < 1 or spec.classes < 0:
        raise InputError(
            f"{spec.name}: image_size must be at least 1 and classes at least 0 (no head), got {spec.image_size}, "
            f"{spec.classes}"
        )
    if spec.is_pretrained:
        _check_pretrained(spec)
    elif spec.weights != "none":
        read_state(Path(spec.weights))


def _check_pretrained(spec: ClassifierSpec) -> None:
    name, own = spec.name, 1000
    if not is_torchvision(name):
        config = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if not config.has_weights:
            raise InputError(
                f"timm has no pretrained weights for {name!r}; closest: {closest(name, list_pretrained())}"
            )
        own = config.num_classes
    if spec.classes not in (0, own):
        answers = f"answer {own} classes, not {spec.classes}; set classes to {own}, or to 0 for its features"
        without = f"have no head and answer no classes, not {spec.classes}; set classes to 0"
        raise InputError(f"{name}: weights {spec.weights!r} {answers if own else without}")


def _body(spec: ClassifierSpec, pretrained: bool) -> nn.Module:
    if is_torchvision(spec.name):
        return torchvision_bodies.build(spec.name, spec.options, spec.classes, spec.image_size, pretrained)
    return timm_body(spec, pretrained)


def timm_body(spec: ClassifierSpec, pretrained: bool) -> nn.Module:
    """timm's network of a spec with its head, not normalising its input; what timm refuses is said in a sentence."""
    size = {"img_size": spec.image_size} if is_sized(spec.name) else {}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.options.items()}
    name = spec.name
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
    model = Classifier(_body(spec, False), spec)
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
