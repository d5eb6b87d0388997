"""The structure of what was read from a file: checked before anything is built from it."""

import math
from collections.abc import Mapping
from typing import Any

from utils.text_table import shorten


def find_mismatch(value: Any, shape: Any, where: str = "") -> str:
    """Where a value differs from a shape, for people; empty if it does not.

    Args:
        shape: one of

            * a type, or several as `int | None`; `float` means any finite number, a bool is
              neither an int nor a float, and `object` is anything;
            * `[shape]`: a list or tuple of such items;
            * `{"name": shape, "other?": shape}`: a dict with at least these keys; those that end
              in a question mark may be missing;
            * `{type: shape}`: a dict whose keys all have this type, and whose values the shape.
        where: the name of the value, for the message.
    """
    if isinstance(shape, list):
        if not isinstance(value, list | tuple):
            return _mismatch(value, where, "a list")
        pairs = ((f"{where}[{i}]", item, shape[0]) for i, item in enumerate(value))
    elif isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            return _mismatch(value, where, "a dict")
        pairs = []
        for name, inner in shape.items():
            if isinstance(name, type):
                for key, item in value.items():
                    if not isinstance(key, name) or isinstance(key, bool):
                        return f"{where or 'it'} has the key {short_repr(key)}"
                    pairs.append((f"{where}[{short_repr(key)}]", item, inner))
                continue
            key = name.removesuffix("?")
            if key in value:
                pairs.append((f"{where}.{key}" if where else key, value[key], inner))
            elif key == name:
                return f"no {key!r} in {where or 'it'}"
    else:
        return "" if _is_a(value, shape) else _mismatch(value, where, _names(shape))
    mismatches = (find_mismatch(item, inner, name) for name, item, inner in pairs)
    return next(filter(None, mismatches), "")


def _is_a(value: Any, kinds: Any) -> bool:
    kinds = getattr(kinds, "__args__", (kinds,))
    if object in kinds:
        return True
    if isinstance(value, bool):
        return bool in kinds
    if float in kinds and isinstance(value, int | float):
        return abs(value) < 1e300 and not math.isnan(value)
    return isinstance(value, tuple(kind for kind in kinds if kind is not float))


def _names(kinds: Any) -> str:
    names = [kind.__name__ for kind in getattr(kinds, "__args__", (kinds,))]
    return " or ".join("None" if name == "NoneType" else name for name in names)


def _mismatch(value: Any, where: str, expected: str) -> str:
    number = isinstance(value, int | float)
    found = f"is {short_repr(value)}" if number else f"is of type {type(value).__name__}"
    return f"{where or 'it'} {found}, not {expected}"


def short_repr(value: Any) -> str:
    """A value in at most 40 characters; a number may have thousands of digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return shorten(repr(value), 40)
