"""The house: imports run one way, rooms keep to themselves, and files stay short."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
FIGURES = ("visualization", "verdict_figures", "matrix_figures", "grid_figures", "pictures")
# room: (its modules, the rooms it may import beside itself); 'name.*' is a package with all that is in it, but for what
# an earlier room has of it. Rooms form no circle.
ROOMS = {
    "ground": (
        ("utils", "settings", "sentences", "locks", "processes", "allocation", "averaging", "kernel_layout"),
        (),
    ),
    "instrument": (("similarity.*",), ()),  # usable on any PyTorch model: it may not even import utils
    "metrics": (("class_metrics", "loss_metrics"), ("ground",)),
    "images": (
        ("download", "images", "synthetic*", "layouts", "resplit", "augmentation", "dataset", "sources"),
        ("ground",),
    ),
    "model parts": (("deformable_attention", "dense_decoder", "set_criterion"), ()),
    "models": (
        (
            *("model_spec", "model_sites", "classifier_sites", "answers", "weights", "cnn_encoders", "vit_encoders"),
            *("vit_weights", "mask2former_model", "dense_models", "timm_bodies", "models", "costs"),
            *("classification.classifiers", "classification.origins", "classification.torchvision_bodies"),
        ),
        ("ground", "instrument", "model parts"),
    ),
    "classification": (
        ("classification.*",),
        ("ground", "instrument", "images", "models", "training parts"),
    ),
    "explanations": (("explanations.*",), ("ground", "instrument", "models", "figures")),
    "figures": (FIGURES, ("ground",)),
    "processing": (("processing.*",), ("ground", "instrument", "models", "explanations", "figures")),
    "training parts": (
        ("optimization", "checkpoints", "watching", "frozen_features", "recipes"),
        ("ground", "metrics", "images", "models"),
    ),
    "doors": (
        ("train", "inference"),
        ("ground", "metrics", "images", "models", "figures", "training parts"),
    ),
    "studies": (
        ("studies.*",),
        (
            *("ground", "instrument", "metrics", "images", "models", "classification", "explanations", "figures"),
            *("processing", "training parts", "doors", "report"),
        ),
    ),
    "report": (("report.*",), ("ground", "models", "explanations", "figures")),
    "front door": (("experiments",), ("ground", "studies")),
}
# beside ground and instrument, what figures may know of other rooms: no network
NUMBERS = ("explanations.clusters", "processing.planes")
BOUGHT_BY_THE_INSTRUMENT = {"torch", "numpy", "scipy", "pandas", "safetensors", "tqdm", "psutil", "sklearn"}
LONGEST = 450  # lines: about 400 is the aim, a little more is no reason to tear apart what belongs together
LONGER = {}  # file: why it is longer than that


def modules() -> dict[str, Path]:
    """{dotted name: file} of the code that runs: rooms and doors, not tests, notebooks, pages or benchmarks."""
    files = [*PROJECT.glob("*.py")]
    for package in PROJECT.glob("*/__init__.py"):
        files += package.parent.rglob("*.py") if package.parent.name not in ("benchmarks", "tests") else []
    names = {path: ".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, also inside functions; `from a import b` is both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively; say the room's name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()


def ours(path: Path) -> set[str]:
    """What a file imports of ours; of a package and a module in it, the module."""
    found = imported(path) & set(MODULES)
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


ARROWS = {name: ours(path) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    for room, (members, _) in ROOMS.items():
        for member in members:
            if module == member or (member.endswith("*") and f"{module}.".startswith(member.removesuffix("*"))):
                return room
    raise AssertionError(f"{module} is in no room of ROOMS; say there which one it belongs to")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_room_may(module):
    room = room_of(module)
    allowed = {room, *ROOMS[room][1]}
    wrong = sorted(f"{name} ({room_of(name)})" for name in ARROWS[module] if room_of(name) not in allowed)
    assert not wrong, f"{module} ({room}) imports {', '.join(wrong)}"


def test_imports_run_in_no_circle():
    """Between modules, and between rooms."""
    graphlib.TopologicalSorter(ARROWS).prepare()
    graphlib.TopologicalSorter({room: set(may) for room, (_, may) in ROOMS.items()}).prepare()


def test_the_instrument_needs_nothing_but_what_is_bought():
    standard = set(sys.stdlib_module_names) | {"similarity"}
    for name, path in MODULES.items():
        if room_of(name) == "instrument":
            packages = {found.partition(".")[0] for found in imported(path)}
            assert packages <= standard | BOUGHT_BY_THE_INSTRUMENT, f"{name}: {packages}"


def test_figures_know_no_model():
    figures = {name for name in MODULES if name in FIGURES or name.endswith(("figures", ".pictures"))}
    assert len(figures) > len(FIGURES)
    for name in figures:
        known = {found for found in ARROWS[name] if room_of(found) in ("ground", "instrument")}
        assert ARROWS[name] <= figures | known | set(NUMBERS), name
        libraries = {found.partition(".")[0] for found in imported(MODULES[name])}
        assert not libraries & {"transformers", "timm", "segmentation_models_pytorch", "torchvision"}, name


def test_nobody_imports_a_door_but_who_opens_it():
    assert not [name for name, found in ARROWS.items() if "experiments" in found]
    outside = {name for name in MODULES if room_of(name) not in ("studies", "front door", "doors")}
    assert not [name for name in outside if ARROWS[name] & {"train", "inference"}]
    assert not [name for name in outside if any(found.startswith("studies") for found in ARROWS[name])]


def test_no_file_is_much_longer_than_it_should_be():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    long = {name: n for name, n in lengths.items() if n > LONGEST and name not in LONGER}
    assert not long, f"{long}: split by subject, or say in LONGER why not"
