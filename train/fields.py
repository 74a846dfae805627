"""Fields of JSON files, checked where they enter: each has a kind, and what is wrong is named."""

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value has to be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(value: Any) -> bool:
    """Whether a text can be the name of a file, and is in no other folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


NUMBER = Kind("a finite number", _number)
POSITIVE = Kind("a number above 0", lambda value: _number(value) and value > 0)
WHOLE = Kind("a whole number", _whole)
COUNT = Kind("a whole number of at least 1", lambda value: _whole(value) and value > 0)
STEP = Kind("a whole number of at least 0", lambda value: _whole(value) and value >= 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAME = Kind("a name without / and \\, not '..'", _plain)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NOTHING = Kind("null", lambda value: value is None)
_SIMPLE = {int: WHOLE, float: NUMBER, str: TEXT, bool: FLAG, Path: TEXT, type(None): NOTHING}


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list of values of a kind, of any length or of one."""

    def fits(value: Any) -> bool:
        right = isinstance(value, list) and length in (None, len(value))
        return right and all(kind.fits(item) for item in value)

    return Kind(f"a list of {length or 'any length'}, each {kind.words}", fits)


def one_of(*choices: Any) -> Kind:
    """One of these values."""
    words = f"one of {', '.join(map(str, choices))}"
    return Kind(words, lambda value: isinstance(value, str) and value in choices)


def kind_of(hint: Any) -> Kind:
    """The kind of JSON values that a dataclass's field of this type is made of."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return kind_of(args[0])
    if origin in (Union, types.UnionType):
        kinds = [kind_of(arg) for arg in args]
        words = " or ".join(kind.words for kind in kinds)
        return Kind(words, lambda value: any(kind.fits(value) for kind in kinds))
    if origin is Literal:
        return one_of(*args)
    if origin is tuple:
        return list_of(kind_of(args[0]), None if args[-1] is Ellipsis else len(args))
    return OBJECT if dataclasses.is_dataclass(hint) else _SIMPLE[hint]


def kinds_of(cls: type) -> dict[str, Kind]:
    """The kinds of a dataclass's fields."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(cls)}


def wrong_field(values: Any, kinds: Mapping[str, Kind], where: str = "") -> str | None:
    """Say which of the fields that ``values`` has is not of its kind; None if all are.

    ``where`` is what leads to ``values`` in its file, such as "clips[3]".
    """
    if not isinstance(values, dict):
        return f"{where or 'it'} is {shown(values)}, expected {OBJECT.words}"
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            path = f"{where}.{name}" if where else name
            return f"{path} is {shown(values[name])}, expected {kind.words}"
    return None


def shown(value: Any) -> str:
    """A JSON value in a few letters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
