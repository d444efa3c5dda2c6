"""The networks of the classifiers study, from its settings: what each is, and all that its training depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from classification.classifiers import FAMILIES, ClassifierSpec, check_spec, family_of
from classification.origins import OBJECTIVES
from classification.training import ClassifierRecipe, check_recipe
from utils import InputError, closest

OWN_RECIPE = ("epochs", "batch_size", "learning_rate", "weight_decay", "smallest_crop", "temperature", "jitter")
OF_A_NETWORK = ("name", "options", "family", "image_size", "objective", *OWN_RECIPE)
# settings of a recipe that networks of before do not know, and what they were trained with
LATER = {"objective": "supervised", "temperature": 0.5, "jitter": 0.5, "precision": "auto"}


@dataclass(frozen=True)
class Member:
    """One network of the study, and all that its training depends on beside the photographs."""

    label: str
    family: str
    spec: ClassifierSpec
    recipe: ClassifierRecipe
    seed: int

    @property
    def name(self) -> str:
        return f"{self.label}--seed-{self.seed}"

    def settings(self) -> dict:
        """What must be the same for a finished network to be taken as this one."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def members_of(config, classes: int) -> list[Member]:
    """networks × seeds of a ClassifiersConfig, for photographs of so many classes.

    Names, options and recipes are checked here, options against each other when it is built.
    """
    for key in config.simclr:
        if key not in OWN_RECIPE:
            raise InputError(f"simclr: unknown setting {key!r}; closest: {closest(key, OWN_RECIPE)}")
    members = []
    for label, settings in config.networks.items():
        if not label or set(label) & set("/\\:") or label.startswith(".") or "--" in label:
            raise InputError(f"networks: {label!r} names a folder, so it needs letters, and no slash, colon or '--'")
        spec, recipe, family = _of_network(config, label, settings, classes)
        members += [Member(label, family, spec, recipe, seed) for seed in config.seeds]
    return members


def _of_network(config, label: str, settings: Mapping, classes: int) -> tuple[ClassifierSpec, ClassifierRecipe, str]:
    for key in settings:
        if key not in OF_A_NETWORK:
            raise InputError(f"networks: {label}: unknown setting {key!r}; closest: {closest(key, OF_A_NETWORK)}")
    if "name" not in settings:
        raise InputError(f"networks: {label} has no name; give one of timm's, such as name: resnet18")
    recipe = _recipe_of(config, label, settings)
    classes = classes if recipe.objective == "supervised" else 0
    spec = ClassifierSpec(
        settings["name"], dict(settings.get("options", {})), classes=classes, image_size=config.image_size
    )
    check_spec(spec)
    family = settings.get("family") or family_of(spec.name)
    if family not in FAMILIES:
        raise InputError(f"networks: {label}: family {family!r} is none of {', '.join(FAMILIES)}")
    return spec, recipe, family


def _recipe_of(config, label: str, settings: Mapping) -> ClassifierRecipe:
    """A network's own settings come first, then those of its objective, then those of all."""
    objective = settings.get("objective", config.objective)
    if objective not in OBJECTIVES:
        raise InputError(f"networks: {label}: objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    of_all = {key: getattr(config, key) for key in OWN_RECIPE}
    own = {key: settings[key] for key in OWN_RECIPE if key in settings}
    merged = of_all | (dict(config.simclr) if objective == "simclr" else {}) | own
    recipe = ClassifierRecipe(**merged, objective=objective, precision=config.precision)
    check_recipe(recipe, label)
    return recipe
