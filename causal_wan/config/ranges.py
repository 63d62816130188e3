"""Which numbers settings may be: declared where a field is declared, checked whenever settings are made.

    @checked_dataclass
    class Config:
        num_samples: PositiveInt = 16
        lora_scale: tuple[FiniteFloat, ...] = ()
        context_noise: Annotated[float, Range(gt=0, le=1000, hint="for none use --context clean")] = 100.0

No number is NaN, infinite or too large to compute with, none is a bool, and no bool is a number. A field with a number
and no range is an error of the class, found when it is imported, so that no new one escapes. Imports no library, so
that settings are read at once.
"""

import contextlib
import dataclasses
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from causal_wan.timesteps import NUM_TRAIN_TIMESTEPS


Class = TypeVar("Class", bound=type)
LARGEST = {int: 2**63 - 1, float: sys.float_info.max}
KINDS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a finite number")}


@dataclass(frozen=True, kw_only=True)
class Range:
    """Which numbers an int or a float may be; metadata of an Annotated.

    Attributes:
        ge, gt, le, lt: Bounds: at least, above, at most, below.
        also: Numbers outside of the bounds that have a meaning of their own.
        hint: What to do about a number that is outside; the default is named if it is empty.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: tuple[float, ...] = ()
    hint: str = ""

    def __contains__(self, number: float) -> bool:
        bounds = ((operator.ge, self.ge), (operator.gt, self.gt), (operator.le, self.le), (operator.lt, self.lt))
        return number in self.also or all(bound is None or holds(number, bound) for holds, bound in bounds)

    def __repr__(self) -> str:
        return f"Range({self})"

    def __str__(self) -> str:
        low, high = (self.gt if self.ge is None else self.ge), (self.lt if self.le is None else self.le)
        if low is not None and high is not None:
            words = f"in {'(' if self.ge is None else '['}{low}, {high}{')' if self.le is None else ']'}"
        elif low is not None:
            words = f"above {low}" if self.ge is None else f"{low} or more"
        elif high is not None:
            words = f"below {high}" if self.le is None else f"{high} or less"
        else:
            words = "finite"
        return ", or ".join([words, *map(str, self.also)])


PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
FiniteFloat = Annotated[float, Range()]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]
Decay = Annotated[float, Range(ge=0, lt=1)]
Seed = Annotated[int, Range(ge=0)]
Timestep = Annotated[float, Range(ge=0, le=NUM_TRAIN_TIMESTEPS)]
TimestepShift = Annotated[float, Range(ge=0.001, le=1000, hint="1 shifts nothing, 5 is usual")]
GuidanceScale = Annotated[float, Range(ge=1, hint="1 is without guidance")]
FrameRate = Annotated[float, Range(ge=0.001, le=1000, hint="WAN's is 16")]
AttentionWindow = Annotated[int, Range(ge=1, also=(-1,), hint="-1 is no window")]


class Refusal(Exception):
    """A mistake in settings, on its way through a library that would catch a ValueError."""


_refuses: ContextVar[bool] = ContextVar("refuses", default=False)


@contextlib.contextmanager
def passing_mistakes() -> Iterator[None]:
    """Lets mistakes in settings that a library makes reach the caller as they are.

    Raises:
        ValueError: If settings are wrong.
    """
    token = _refuses.set(True)
    try:
        yield
    except Refusal as refusal:
        raise ValueError(str(refusal)) from None
    finally:
        _refuses.reset(token)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def checked_dataclass(cls: Class) -> Class:
    """A frozen dataclass with keywords only, whose numbers are checked before its own `__post_init__` sees them.

    Raises:
        TypeError: If a number has no range, or settings in it are none of this kind.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, hint in hints.items():
        _check_is_declared(f"{cls.__qualname__}.{name}", hint)
    further_checks = getattr(cls, "__post_init__", None)

    def check(self: Any) -> None:
        try:
            check_numbers(self, hints)
            if further_checks is not None:
                further_checks(self)
        except ValueError as error:
            if _refuses.get():
                raise Refusal(str(error)) from None
            raise

    cls.__post_init__ = check
    cls.__number_hints__ = hints
    return dataclass(frozen=True, kw_only=True)(cls)


def is_checked(cls: type) -> bool:
    """Whether a class itself, not only one that it inherits from, is a `checked_dataclass`."""
    return "__number_hints__" in vars(cls)


def check_numbers(settings: Any, hints: dict[str, Any]) -> None:
    """Checks the numbers and bools among settings.

    Args:
        settings: A dataclass.
        hints: Types of the fields to check, with ranges.

    Raises:
        ValueError: If one is not of its kind or outside of its range.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name, hint in hints.items():
        check_number(name, hint, getattr(settings, name), defaults[name])


def check_number(name: str, hint: Any, value: Any, default: Any = dataclasses.MISSING) -> None:
    """Checks a setting, if it is a number, a bool, or numbers.

    Args:
        name: Of the setting.
        hint: Its type, with a range.
        value: What it is to be.
        default: Named where the range has no hint.

    Raises:
        ValueError: If it, or a number in it, is not of its kind or outside of its range.
    """
    for demand, got, advice in _complaints(hint, value):
        each = "each of " if got is not value else ""
        advice = advice or _name_default(default)
        raise ValueError(f"{each}{name} must be {demand}, got {got!r}{advice and '; '}{advice}.")


def _name_default(default: Any) -> str:
    if default is dataclasses.MISSING:
        return ""
    if default == ():
        return "it may be left out"
    return f"the default is {' '.join(map(str, default)) if isinstance(default, tuple) else default}"


def _complaints(hint: Any, value: Any) -> Iterator[tuple[str, Any, str]]:
    """What must hold of a value or of one in it and does not, what came, and what to do."""
    kinds = typing.get_args(hint)
    if hint is bool:
        if not isinstance(value, bool):
            yield "true or false", value, ""
    elif typing.get_origin(hint) is Annotated and kinds[0] in KINDS:
        (allowed,) = (item for item in hint.__metadata__ if isinstance(item, Range))
        demand = _demand(kinds[0], allowed, value)
        if demand:
            yield demand, value, allowed.hint
    elif not _holds_numbers(hint):
        return
    elif typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple | list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
            yield f"a tuple of {count}numbers", value, ""
            return
        for kind, item in zip(kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds, value, strict=True):
            yield from _complaints(kind, item)
    elif value is not None:  # what _check_is_declared leaves is X | None
        (kind,) = (kind for kind in kinds if kind is not types.NoneType)
        yield from _complaints(kind, value)


def _demand(kind: type, allowed: Range, value: Any) -> str:
    """What must hold of a number and does not, or nothing."""
    abstract_kind, words = KINDS[kind]
    bounds = "" if str(allowed) == "finite" else f", {allowed}"
    if isinstance(value, bool) or not isinstance(value, abstract_kind):
        return words + bounds
    is_finite = abs(value) <= LARGEST[kind] if isinstance(value, numbers.Integral) else math.isfinite(value)
    if not is_finite:
        return f"{words}{' of 64 bits' if kind is int else ''}{bounds}"
    return "" if value in allowed else str(allowed)


def _holds_numbers(hint: Any) -> bool:
    return hint in (int, float, bool) or any(_holds_numbers(kind) for kind in typing.get_args(hint))


def _check_is_declared(name: str, hint: Any) -> None:
    """Checks that all numbers of a field have a range, in containers that `_complaints` sees into."""
    kinds = [kind for kind in typing.get_args(hint) if kind not in (types.NoneType, Ellipsis)]
    if dataclasses.is_dataclass(hint) and not is_checked(hint):
        raise TypeError(f"{name} must be a checked_dataclass, got {hint.__qualname__}; decorate it.")
    if hint in (int, float):
        raise TypeError(f"{name} must say which numbers it may be, got {hint.__name__}; use PositiveInt, Share, ...")
    is_number = typing.get_origin(hint) is Annotated and kinds[0] in KINDS
    if is_number and sum(isinstance(item, Range) for item in hint.__metadata__) != 1:
        raise TypeError(f"{name} must have one Range, got {hint.__metadata__}.")
    if is_number or hint is bool or not _holds_numbers(hint):
        return
    is_optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and len(kinds) == 1
    if typing.get_origin(hint) is not tuple and not is_optional:
        raise TypeError(f"{name} must be a number, a tuple of numbers, or one of these or None, got {hint}.")
    for kind in kinds:
        _check_is_declared(name, kind)
