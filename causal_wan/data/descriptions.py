"""What the rows of a run are, in sentences for its plan."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from causal_wan.data.rows import Row
from causal_wan.data.settings import DataConfig
from causal_wan.tables.prompt_schedules import PromptSchedule, texts_of
from causal_wan.tables.table import TableRow


def describe_rows(rows: Sequence[Row]) -> str:
    """Rows, prompts, lengths, rates, sizes and duration in one line."""
    frames = [row.num_frames for row in rows]
    (height, width), _ = Counter((row.height, row.width) for row in rows).most_common(1)[0]
    sizes = len({(row.height, row.width) for row in rows})
    num_prompts = len(texts_of(prompt for row in rows for prompt in row.prompts))
    num_scheduled = count_schedules(rows)
    return (
        f"{len(rows)} clips, {num_prompts} prompts"
        + (f", which change along {num_scheduled} clips" if num_scheduled else "")
        + f"; {min(frames)} to {max(frames)} frames "
        f"(median {median(frames):g}) at {median(row.frame_rate for row in rows):g} a second, {height} x {width}"
        + (f" and {sizes - 1} other sizes" if sizes > 1 else "")
        + f"; {sum(row.num_frames / row.frame_rate for row in rows) / 60:.1f} minutes in all"
    )


def count_schedules(rows: Iterable[Row | TableRow]) -> int:
    """Rows along whose clips the prompt changes."""
    return sum(isinstance(prompt, PromptSchedule) for row in rows for prompt in row.prompts[:1])


def describe_flip(rows: Sequence[Row], config: DataConfig) -> str | None:
    """A warning when clips are mirrored, which their prompts or writing in them may not survive."""
    if not config.horizontal_flip:
        return None
    texts = [text for row in rows for prompt in row.prompts for text in texts_of([prompt])]
    sided = sum(bool(re.search(r"\b(left|right)\b", text, re.I)) for text in texts)
    said = f"; {sided} prompts here say left or right" if sided else ""
    return f"--horizontal_flip mirrors writing, and what prompts call left and right{said}."


def describe_speed_up(rows: Sequence[Row], config: DataConfig) -> str | None:
    """One sentence when uniform sampling speeds clips up by more than a quarter, else None."""
    if config.frame_sampling != "uniform":
        return None
    played = config.num_frames / config.sampling_rate
    factors = [row.num_frames / row.frame_rate / played for row in rows]
    if median(factors) <= 1.25:
        return None
    return (
        f"uniform sampling plays clips {median(factors):.1f} times as fast (up to {max(factors):.1f}): "
        f"{config.num_frames} frames at {config.sampling_rate:g} a second are {played:.1f} s, the clips last "
        f"{median(factors) * played:.1f} s (median). Right for a drawing process; for real motion use "
        "--frame_sampling head, or cut the clips."
    )
