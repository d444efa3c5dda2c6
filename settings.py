"""What settings may be: a YAML that is plain and says each thing once, values of the declared types, seeds, names.

Checked where settings come in, before anything is read or written.
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from sentences import InputError

LARGEST_SEED = 2**63 - 1
MOST_VALUES = 100_000  # of a YAML, aliases written out
LONGEST_ID = 200  # bytes; with what is added to it, a file's name may have 255


class _Plain(yaml.SafeLoader):
    """Plain values only, and no key of a mapping twice: the last one would win, unseen."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The settings in a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = yaml.load(text, _Plain)  # a SafeLoader: no tag can name a function
        size = _size(found, {})
    except UnicodeDecodeError as error:
        raise InputError(f"settings {path} are no UTF-8 text (byte {error.start}); save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"settings {path} cannot be read ({reason}); give --config a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(
            f"settings {path} are no readable YAML ({' '.join(str(error).split())}); correct it"
        ) from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"settings {path} hold no `name: value`; write each setting on a line of its own")
    if size > MOST_VALUES:
        raise InputError(f"settings {path} are {size:,} values once its aliases are written out; write fewer of them")
    return found


def _size(value, known: dict[int, int]) -> int:
    """How many values a nested one holds, each alias counted where it stands."""
    if id(value) not in known:
        known[id(value)] = 1  # an alias of what it stands in
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def check_types(settings, where: str = "") -> None:
    """Refuse a dataclass whose values are not of its declared types, or not finite: YAML may say anything."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, kind):
            wanted = getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
            raise InputError(f"{where}{name} must be {_ARTICLES.get(wanted, wanted)}, got {value!r}; correct it")


_ARTICLES = {"int": "a whole number", "float": "a finite number", "bool": "true or false", "str": "text"}
_ARTICLES |= {"dict": "a mapping of names to values"}


def _fits(value, kind) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if kind in (bool, type(None)):
        return isinstance(value, kind)
    if kind in (int, float):
        known = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        return known and math.isfinite(value)
    if kind is str:
        return isinstance(value, str | Path)
    if (origin or kind) in (list, tuple, Sequence):
        listed = isinstance(value, list | tuple)
        return listed and all(_fits(item, parts[0]) for item in value if parts)
    if (origin or kind) in (dict, Mapping):
        known = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return known and all(_fits(item, parts[1]) for item in value.values() if parts)
    return True  # Any, or a dataclass with checks of its own


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuse what no generator can be seeded with."""
    if not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{name} {seed} is not between 0 and 2**63 - 1; choose another")


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse none, one twice, and what no generator can be seeded with."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"seeds must be different numbers from 0 up, got {list(seeds)}")
    check_seed(max(seeds), "seeds:")


def check_label(what: str, label: str) -> None:
    """Refuse a label that a folder is named after and that would lead out of its place."""
    if not label.strip() or label.startswith(".") or any(sign in label for sign in "/\\:\0"):
        raise InputError(f"{what} {label!r} names a folder: it needs letters, no dot in front, no slash and no colon")


def check_id(id_: str) -> None:
    """Refuse the id of an image that could not be the name of a file, or would lead out of a folder."""
    if not id_ or id_ in (".", "..") or any(sign in id_ for sign in "/\\\0"):
        raise InputError(f"{id_!r} cannot be the id of an image: files are named after it; leave out / and \\")
    if len(id_.encode()) > LONGEST_ID:
        raise InputError(f"the id {id_[:40]}… of an image has more than {LONGEST_ID} bytes; rename the file shorter")
