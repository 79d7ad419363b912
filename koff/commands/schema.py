"""Dataclasses from YAML values, strictly: exact types, no unknown keys, key paths in errors."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}


def build(cls: type[T], value: Any, path: str) -> T:
    """Build a dataclass from a mapping, checking every key and type on the way.

    Args:
        cls: dataclass; its fields' types may be str, int, float, bool, None, Literal, dataclasses,
            ``X | None``, ``tuple[X, ...]`` and ``dict[str, X]``.
        value: what YAML gave.
        path: key path of ``value``, for errors ("train", "data.en"); "" at the top.

    Returns:
        The dataclass, with fields that the mapping lacks at their defaults.

    Raises:
        KeyError: an unknown or a missing key.
        ValueError: a value of another type, or one that the dataclass itself refuses.
    """
    if not isinstance(value, Mapping):
        raise _wrong(path, "a mapping of keys to values", value)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in value:
        if key not in fields:
            raise unknown_key(join(path, key), key, fields)
    arguments = {key: convert(hints[key], item, join(path, key)) for key, item in value.items()}
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if name not in arguments and not optional:
            raise KeyError(f"recipe: {join(path, name)} must be given, got nothing; add it")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        # What the dataclass refuses in __post_init__ knows its field, but not where it stands.
        raise ValueError(f"recipe: in {path or 'the recipe'}: {error}") from error


def convert(hint: Any, value: Any, path: str) -> Any:
    """Return a value that a type hint allows, converted where YAML leaves no choice.

    Args:
        hint: a type as ``build`` knows it.
        value: what YAML gave.
        path: key path, for errors.

    Returns:
        The value: mappings as dataclasses, lists as tuples, integers as floats where due.

    Raises:
        KeyError, ValueError: as ``build``.
    """
    options = _options(hint)
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    for option in options:
        origin = typing.get_origin(option)
        # With one option even what is no mapping goes to build(), which says what it should be.
        if dataclasses.is_dataclass(option) and (isinstance(value, Mapping) or len(options) == 1):
            return build(option, value, path)
        if origin is dict and isinstance(value, Mapping):
            item_hint = typing.get_args(option)[1]
            return {
                convert(str, key, f"{path or 'the recipe'} (a key)"): convert(
                    item_hint, item, join(path, key)
                )
                for key, item in value.items()
            }
        if origin is tuple and isinstance(value, list | tuple):
            item_hint = typing.get_args(option)[0]
            return tuple(convert(item_hint, item, f"{path}[{i}]") for i, item in enumerate(value))
        if origin is typing.Literal and value in typing.get_args(option):
            return value
        if option in _NAMES and _is_scalar(option, value):
            return option(value)
    raise _wrong(path, " or ".join(_describe(option) for option in _options(hint)), value)


def unknown_key(path: str, key: Any, known: Iterable[str]) -> KeyError:
    """Return the error for a key that does not exist, with the nearest known one suggested.

    Args:
        path: full key path.
        key: its last part.
        known: keys that exist there.
    """
    names = sorted(known)
    # Below difflib's 0.6, so that the half of a name is enough: "save" for save_every.
    close = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "remove it"
    return KeyError(f"recipe: {path} must be one of the known keys {names}, got {key!r}; {hint}")


def join(path: str, key: Any) -> str:
    """Return the key path of ``key`` under ``path``."""
    return f"{path}.{key}" if path else str(key)


def _options(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return list(typing.get_args(hint))
    return [hint]


def _is_scalar(option: type, value: Any) -> bool:
    # True and False are ints to Python, and never meant as numbers in a recipe.
    if option is float:
        # YAML 1.1 reads 1e-3 (no point) as a text; nobody who writes it means one.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number or (isinstance(value, str) and bool(_NUMBER.fullmatch(value)))
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _describe(option: Any) -> str:
    origin = typing.get_origin(option)
    if option is type(None):
        return "null"
    if origin is tuple:
        return "a list"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(option)))
    if origin is dict or dataclasses.is_dataclass(option):
        return "a mapping of keys to values"
    return _NAMES.get(option, getattr(option, "__name__", str(option)))


def _wrong(path: str, rule: str, value: Any) -> ValueError:
    # YAML has numbers and truth values that were meant as texts: 3.10, no, on.
    quotable = "a text" in rule and isinstance(value, bool | int | float)
    step = "quote it if it is a text" if quotable else "correct the value"
    return ValueError(
        f"recipe: {path or 'the recipe'} must be {rule}, got {value!r} "
        f"({type(value).__name__}); {step}"
    )
