"""The fields of groups of settings: their names and kinds, whatever group they are in."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from causal_wan.config.choices import ON_THIS_MACHINE


def check_type(name: str, hint: Any, value: Any) -> None:
    """Checks a text or one of several that a setting chooses from; `check_number` checks all else.

    Raises:
        ValueError: If it is of another kind.
    """
    if not _is_of_kind(hint, value):
        kind = str(hint).replace("typing.", "")
        raise ValueError(f"{name} must be {'text' if hint is str else kind}, got {value!r}.")


def _is_of_kind(hint: Any, value: Any) -> bool:
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _is_of_kind(kinds[0], value)
    if origin is Literal:
        return value in kinds
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_kind(kind, value) for kind in kinds)
    if origin is tuple:
        is_text = room_for_text(hint) or typing.get_origin(kinds[0]) is Literal
        return not is_text or (isinstance(value, tuple | list) and all(_is_of_kind(kinds[0], item) for item in value))
    return isinstance(value, hint) if hint in (str, types.NoneType) else True


def flat_fields(config_class: type) -> Iterator[tuple[str, Any]]:
    """Names and types of all settings, ranges of numbers and those of nested dataclasses included."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flat_fields(hints[field.name])
        else:
            yield field.name, hints[field.name]


def names_of(*config_classes: type) -> set[str]:
    """Names of all settings of some dataclasses."""
    return {name for config_class in config_classes for name, _ in flat_fields(config_class)}


def paths_of(*config_classes: type) -> set[str]:
    """Names of the settings of some dataclasses that name something on this machine; see `LocalPath`."""
    return {name for config_class in config_classes for name, hint in flat_fields(config_class) if _is_path(hint)}


def _is_path(hint: Any) -> bool:
    kinds = typing.get_args(hint)
    return (typing.get_origin(hint) is Annotated and ON_THIS_MACHINE in hint.__metadata__) or any(map(_is_path, kinds))


def flat_dict(config: Any) -> dict[str, Any]:
    """All settings of a config as one flat dict, tuples as lists."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            settings.update(flat_dict(value))
        else:
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings


def room_for_text(hint: Any) -> float:
    """How many texts a setting takes: none, one, or any number."""
    if typing.get_origin(hint) is tuple:
        return math.inf if any(map(room_for_text, typing.get_args(hint))) else 0
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return max(map(room_for_text, typing.get_args(hint)))
    return float(hint is str)


def are_pairs(hint: Any) -> bool:
    """Whether a setting is a tuple of tuples."""
    return typing.get_origin(hint) is tuple and typing.get_origin(typing.get_args(hint)[0]) is tuple
