"""Prompts along a video: which of them is in force when. Imports no library, so that settings are read at once."""

import bisect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


COLUMN = "prompt_schedule"
ENDING = COLUMN + ".json"  # of members of tars, where --caption_column names it
EXAMPLE = '[[0, "a cat sits"], [2.5, "the cat jumps"]]'
FramePrompts = tuple[str, ...]
"""The prompt that is in force at each frame of a clip."""


@dataclass(frozen=True)
class PromptSchedule:
    """Prompts of a video, each in force from its second on until the next begins.

    Attributes:
        seconds: From the start of the video; the first is 0, and they rise.
        prompts: One each, not blank.

    Raises:
        ValueError: If they are others.
    """

    seconds: tuple[float, ...]
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        listed = ", ".join(f"{second:g}" for second in self.seconds)
        if not all(math.isfinite(second) and second >= 0 for second in self.seconds):
            raise ValueError(f"the seconds of a prompt_schedule must be 0 or more, got {listed}.")
        if not self.seconds or self.seconds[0] != 0:
            raise ValueError(f"the first prompt of a prompt_schedule must begin at 0 seconds, got {listed or 'none'}.")
        if any(later <= earlier for earlier, later in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ValueError(f"the seconds of a prompt_schedule must rise, got {listed}.")
        for second, prompt in zip(self.seconds, self.prompts, strict=True):
            if not prompt.strip():
                raise ValueError(f"the prompts of a prompt_schedule must not be empty, but that at {second:g} s is.")

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, str]]) -> Self:
        """That of (seconds, prompt); white space around prompts is left out."""
        pairs = list(pairs)
        return cls(tuple(float(second) for second, _ in pairs), tuple(prompt.strip() for _, prompt in pairs))

    def at(self, second: float) -> str:
        """The prompt that is in force."""
        return self.prompts[bisect.bisect_right(self.seconds, second) - 1]

    def by_frame(self, seconds: Iterable[float]) -> FramePrompts:
        """The prompts that are in force at these seconds."""
        return tuple(self.at(second) for second in seconds)

    def check_ends_before(self, seconds: float) -> None:
        """Checks that the last prompt begins before the video ends.

        Raises:
            ValueError: If not.
        """
        if self.seconds[-1] >= seconds:
            raise ValueError(
                f"each prompt of a prompt_schedule must begin before the video ends, which is at {seconds:.4g} s, got "
                f"{self.seconds[-1]:g} s."
            )

    def __str__(self) -> str:
        return " | ".join(f"{second:g} s: {prompt}" for second, prompt in zip(self.seconds, self.prompts, strict=True))


def schedule_column(names: Iterable[str]) -> str | None:
    """The column of schedules among those of a table, if it has one."""
    return next((name for name in names if name in (COLUMN, ENDING)), None)


Prompt = str | PromptSchedule
"""What a video is to show."""


def texts_of(prompts: Iterable[Prompt | FramePrompts]) -> list[str]:
    """The distinct texts of prompts, in their order."""
    found: dict[str, None] = {}
    for prompt in prompts:
        texts = prompt.prompts if isinstance(prompt, PromptSchedule) else prompt
        found.update(dict.fromkeys([texts] if isinstance(texts, str) else texts))
    return list(found)


def caption_of(prompt: Prompt | FramePrompts) -> str:
    """One line for people."""
    return " | ".join(texts_of([prompt])) if isinstance(prompt, tuple) else str(prompt)


def parse_prompt_schedule(cell: Any) -> Prompt | None:
    """The prompts of a cell of a table; a lone prompt is one for the whole video.

    Args:
        cell: A list of pairs (seconds, prompt), or of mappings with `seconds` and `prompt`, or either as JSON; blank,
            None or an empty list is none.

    Raises:
        ValueError: If it is anything else, or the schedule is not valid.
    """
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], str):  # a text of a tar
        (cell,) = cell
    value = cell
    if isinstance(cell, str):
        if not cell.strip():
            return None
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"prompt_schedule must be JSON such as {EXAMPLE}, got {cell!r:.100} ({error}).") from None
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    pairs = [_pair_of(item) for item in value] if isinstance(value, list | tuple) else [None]
    if None in pairs:
        raise ValueError(
            f"prompt_schedule must be pairs of seconds and a prompt such as {EXAMPLE}, got {cell!r:.100}."
        )
    schedule = PromptSchedule.of(pairs)
    return schedule if len(schedule.prompts) > 1 else schedule.prompts[0]


def _pair_of(item: Any) -> tuple[float, str] | None:
    """(Seconds, prompt) of an item of a list, or None if it is none."""
    if isinstance(item, Mapping):
        item = [item.get("seconds"), item.get("prompt")] if item.keys() == {"seconds", "prompt"} else []
    if not isinstance(item, list | tuple) or len(item) != 2 or not isinstance(item[1], str):
        return None
    second, prompt = item
    if isinstance(second, str):  # where all that is in a list must be text
        try:
            second = float(second)
        except ValueError:
            return None
    is_number = isinstance(second, int | float) and not isinstance(second, bool)
    return (second, prompt) if is_number else None
