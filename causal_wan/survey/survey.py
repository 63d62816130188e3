"""What the records of a data set add up to: counts, histograms, duplicates, and which settings would fit.

Knows numbers alone, in arrays with an entry a row, so that a million rows take little memory.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from causal_wan.data.settings import DataConfig
from causal_wan.survey.kinds import FoundKind, find_kinds


BLACK_LUMA = 8.0  # of 255; darker clips are called black
STATIC_MOTION = 4.0  # of 255; clips whose looks differ by less everywhere are called static
MAX_REASONS = 50
LONE_NUMBER = re.compile(r"(?<![\w.-])(?<!JPEG )(?<!4k \+ )\d+([.,]\d+)*(?!\w)")
NUM_BARS = 24
ASPECTS = {"9:21": 9 / 21, "9:16": 9 / 16, "3:4": 3 / 4, "1:1": 1, "4:3": 4 / 3, "16:9": 16 / 9, "21:9": 21 / 9}


@dataclass(frozen=True)
class Survey:
    """All that the report is made of.

    Args:
        config: What the rows are checked for.
        facts: `row_records.FACTS` of each row, in the order of the table.
        is_short: Rows that have too few frames, bool.
        prompt_hashes: Of each row's prompts; 0 where there is none.
        prompt_lengths: Of the longest of each row's prompts, in `length_unit`.
        length_unit: "tokens" or "words".
        max_sequence_length: Tokens that prompts are cut at.
        reasons: Why rows cannot be used -> how many.
        num_scheduled: Rows along whose clips the prompt changes.
    """

    config: DataConfig
    facts: np.ndarray
    is_short: np.ndarray
    prompt_hashes: np.ndarray
    prompt_lengths: np.ndarray
    length_unit: str
    max_sequence_length: int
    reasons: Counter = field(default_factory=Counter)
    num_scheduled: int = 0

    @property
    def bad(self) -> np.ndarray:
        """Rows that stop a run, as bool: those whose video is bad, and short ones where these are an error."""
        return self.facts["is_bad"] | (self.is_short & (self.config.short_clips == "error"))

    @property
    def left_out(self) -> np.ndarray:
        """Rows that a run silently goes on without, as bool."""
        return self.is_short & (self.config.short_clips == "skip")

    @property
    def usable(self) -> np.ndarray:
        """Rows that are trained on, as bool."""
        return ~(self.bad | self.left_out)

    @property
    def readable(self) -> np.ndarray:
        """Facts of the rows whose video can be read, short ones included."""
        return self.facts[~self.facts["is_bad"]]

    @property
    def seconds(self) -> np.ndarray:
        """Durations of the readable clips."""
        return self.readable["frames"] / np.maximum(self.readable["rate"], 1e-6)

    @property
    def black(self) -> np.ndarray:
        """Clips that show nothing, as bool a row."""
        return ~self.facts["is_bad"] & (self.facts["luma"] < BLACK_LUMA)

    @property
    def static(self) -> np.ndarray:
        """Clips that hardly change and are not black, as bool a row."""
        return ~self.facts["is_bad"] & ~self.black & (self.facts["motion"] < STATIC_MOTION)

    @property
    def is_cut(self) -> np.ndarray:
        """Rows with a prompt that is cut, as bool; none where tokens are not counted."""
        return (self.prompt_lengths > self.max_sequence_length) & (self.length_unit == "tokens")

    @property
    def kinds(self) -> list[FoundKind]:
        """Readable files that are out of the ordinary, by kind."""
        return find_kinds(self.readable["traits"])

    def duplicate_files(self) -> list[np.ndarray]:
        """Groups of row indices that show the same file."""
        return group_equal(self.facts["content"], ~self.facts["is_bad"])

    def duplicate_prompts(self) -> list[np.ndarray]:
        """Groups of row indices with the same prompts."""
        return group_equal(self.prompt_hashes, self.prompt_hashes != 0)


def group_equal(values: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """Groups of two or more indices of equal values among the chosen, largest first."""
    indices = np.flatnonzero(chosen)
    order = indices[np.argsort(values[indices], kind="stable")]
    starts = np.flatnonzero(np.diff(values[order])) + 1
    groups = [group for group in np.split(order, starts) if len(group) > 1] if len(order) else []
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def generalize(reason: str) -> str:
    """A reason without what differs from file to file, for counting; names such as mp4 and JPEG 2000 stay."""
    return re.sub(LONE_NUMBER, "…", re.sub(r"^/.*? (?=ends before)", "the file ", reason))[:200]


def count_reason(reasons: Counter, reason: str) -> None:
    """Adds a reason; beyond so many different ones, they are counted together."""
    name = generalize(reason)
    reasons[name if name in reasons or len(reasons) < MAX_REASONS else "other reasons"] += 1


# --- histograms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Histogram:
    """Bars to draw.

    Args:
        title: What is counted.
        bars: (Label, count) each.
        note: One line below.
        mark: Where a setting lies, in bars from the left, and its label; None without.
        is_upright: Bars of numbers stand upright; those of categories lie.
    """

    title: str
    bars: Sequence[tuple[str, int]]
    note: str = ""
    mark: tuple[float, str] | None = None
    is_upright: bool = True


def histogram_of_numbers(
    title: str, values: np.ndarray, unit: str, mark: tuple[float, str] | None = None
) -> Histogram:
    """Up to 24 bars with round edges; what is far out is counted in the last."""
    low, high = float(values.min()), float(values.max())
    common = float(np.quantile(values, 0.99))
    top = common if high > 2 * common > 0 else high
    step = _round_step((top - low) / NUM_BARS, whole=np.issubdtype(values.dtype, np.integer))
    first = np.floor(low / step) * step
    num_bars = int((top - first) // step) + 1
    places = np.minimum((values - first) // step, num_bars - 1).astype(int)
    counts = np.bincount(places, minlength=num_bars).tolist()
    labels = [f"{first + step * bar:g}" for bar in range(num_bars)]
    if top < high:
        labels[-1] += f" to {high:g}"
    note = f"{low:,.4g} to {high:,.4g} {unit}, median {np.median(values):,.4g}; {max(counts):,} in the highest bar"
    if mark is not None:
        place = (mark[0] - first) / step + 0.5 * np.issubdtype(values.dtype, np.integer)
        mark = (place, mark[1]) if 0 <= place <= num_bars else None
    return Histogram(title, list(zip(labels, counts, strict=True)), note, mark)


def _round_step(step: float, *, whole: bool) -> float:
    """The next of 1, 2, 5, 10, 20, ... from a step on."""
    if step <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(step))
    rounded = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
    return max(rounded, 1.0) if whole else float(rounded)


def histogram_of_kinds(title: str, counts: Counter, note: str = "", most: int = 8) -> Histogram:
    """A bar for each of the most frequent kinds, and one for all others."""
    bars = counts.most_common(most)
    rest = sum(counts.values()) - sum(count for _, count in bars)
    if rest:
        bars.append((f"{len(counts) - most} others", rest))
    return Histogram(title, bars, note, is_upright=False)


def histograms(survey: Survey) -> list[Histogram]:
    """What the readable clips are like."""
    facts, config = survey.readable, survey.config
    charts = []
    if len(facts):
        shapes, counts = np.unique(np.stack([facts["height"], facts["width"]]), axis=1, return_counts=True)
        sizes = Counter({f"{h} × {w}": int(n) for (h, w), n in zip(shapes.T, counts, strict=True)})
        rates, counts = np.unique(facts["rate"].round(2), return_counts=True)
        rate_counts = Counter({f"{rate:g}": int(n) for rate, n in zip(rates, counts, strict=True)})
        nearest = np.abs(
            np.log((facts["width"] / facts["height"])[:, None] / np.array(list(ASPECTS.values())))
        ).argmin(1)
        aspects = dict(zip(ASPECTS, np.bincount(nearest, minlength=len(ASPECTS)).tolist(), strict=True))
        charts = [
            histogram_of_numbers("Frames", facts["frames"], "frames", (config.num_frames, "num_frames")),
            histogram_of_numbers(
                "Duration", survey.seconds, "seconds", (config.num_frames / config.sampling_rate, "a clip")
            ),
            histogram_of_kinds("Frames a second", rate_counts),
            histogram_of_kinds("Resolution (height × width)", sizes),
            Histogram("Aspect ratio (width : height), nearest", list(aspects.items()), is_upright=False),
        ]
    lengths = survey.prompt_lengths[survey.prompt_hashes != 0]
    if len(lengths):
        mark = (survey.max_sequence_length, "cut") if survey.length_unit == "tokens" else None
        charts.append(histogram_of_numbers(f"Prompt {survey.length_unit}", lengths, survey.length_unit, mark))
    return charts


# --- suggestions -----------------------------------------------------------------------------------------------------


def suggest(survey: Survey) -> list[str]:
    """Sentences on which settings or rows to change, most urgent first; none if all is well."""
    files = map(str, survey.kinds)
    return [*_suggest_for_bad_rows(survey), *files, *_suggest_for_shape(survey), *_suggest_for_contents(survey)]


def _suggest_for_bad_rows(survey: Survey) -> Iterator[str]:
    config = survey.config
    if num_bad := int(survey.facts["is_bad"].sum()):
        yield (
            f"Bad rows: {num_bad:,}. Correct or remove them (bad_rows.csv lists all), or leave them out with "
            "--on_bad_sample skip."
        )
    if num_short := int(survey.is_short.sum()):
        geometry, most_have = config.geometry, int(np.quantile(survey.readable["frames"], 0.05))
        fits = geometry.num_frames(geometry.num_latent_frames(most_have))
        shorter = f", or --num_frames {fits}, which 95 % of all clips have" if 1 < fits < config.num_frames else ""
        done = {"error": "stop a run", "skip": "are left out", "pad": "are padded"}[config.short_clips]
        yield (
            f"Clips with too few frames: {num_short:,}; they {done}. Use --short_clips pad (repeats the last frame, "
            f"and leaves that out of the loss), --short_clips skip, or shorter --frame_buckets{shorter}."
        )


def _suggest_for_shape(survey: Survey) -> Iterator[str]:
    facts, config = survey.readable, survey.config
    if not len(facts):
        return
    rate = config.sampling_rate
    played, lasts = config.num_frames / rate, float(np.median(survey.seconds))
    if config.frame_sampling == "uniform" and lasts > 1.25 * played:
        yield (
            f"The median clip lasts {lasts:.1f} s, and {config.num_frames} frames at {rate:g} a second "
            f"are {played:.1f} s: uniform sampling plays it {lasts / played:.1f} times as fast. Right for a drawing "
            "process; for real motion use --frame_sampling head or random, or cut the clips."
        )
    slow = int((facts["rate"] < 0.9 * rate).sum())
    if config.frame_sampling != "uniform" and slow:
        yield (
            f"Clips with fewer than {rate:g} frames a second: {slow:,}. Some of their frames are shown "
            "twice; lower --frame_rate."
        )
    if not config.resolution_buckets:
        yield from _suggest_for_size(survey)


def _suggest_for_size(survey: Survey) -> Iterator[str]:
    facts, config = survey.readable, survey.config
    height, width = config.height, config.width
    is_turned = np.sign(facts["height"] - facts["width"]) == -np.sign(height - width)
    is_turned &= facts["height"] != facts["width"]
    scale = np.maximum(height / facts["height"], width / facts["width"])
    kept = height * width / (facts["height"] * facts["width"] * scale**2)
    if num_cropped := int((kept < 0.75).sum()):
        share = 100 * np.mean(is_turned)
        kind = "portrait" if height <= width else "landscape"
        sizes = f"{height}x{width} {width}x{height}" if height != width else "with several sizes"
        advice = f"--height {width} --width {height}" if share > 90 else f"--resolution_buckets {sizes}"
        yield (
            f"More than a quarter of the picture is lost to the crop: {num_cropped:,} of {len(facts):,} clips; "
            f"{share:.0f} % of all are {kind}. Use {advice}."
        )
    targets = np.where(is_turned, [[width], [height]], [[height], [width]])  # as they would be if that advice is taken
    scale = np.maximum(targets[0] / facts["height"], targets[1] / facts["width"])
    if (num_small := int((scale > 1.2).sum())) > 0.1 * len(facts):
        yield (
            f"Enlarging blurs: {num_small:,} of {len(facts):,} clips are smaller than {height} x {width}, in the "
            f"median {np.median(scale[scale > 1.2]):.1f} times. Use a smaller --height and --width."
        )


def _suggest_for_contents(survey: Survey) -> Iterator[str]:
    if num_cut := int(survey.is_cut.sum()):
        yield (
            f"Prompts that are cut at {survey.max_sequence_length} tokens: {num_cut:,}. Say first what matters, or "
            "shorten them."
        )
    if extra := sum(len(group) - 1 for group in survey.duplicate_files()):
        yield (
            f"Rows that show a file of an earlier row: {extra:,}. Remove them, or, if the prompts differ, give one "
            "row several prompts with --caption_column."
        )
    num_prompts = len(np.unique(survey.prompt_hashes[survey.prompt_hashes != 0]))
    if num_prompts == 1 < int(survey.usable.sum()):
        yield "All rows have the same prompt: a student learns to ignore it, and cannot be asked for anything."
    for name, chosen in (("Black", survey.black), ("Nearly static", survey.static)):
        if count := int(chosen.sum()):
            yield f"{name} clips: {count:,}. Look at them below; a student learns to do nothing from them."


def summary(survey: Survey) -> dict[str, Any]:
    """The figures at the head of the report."""
    num_rows, num_usable = len(survey.facts), int(survey.usable.sum())
    return {
        "rows": num_rows,
        "usable": num_usable,
        "bad": int(survey.bad.sum()),
        "left_out": int(survey.left_out.sum()),
        "hours": float(survey.seconds.sum()) / 3600,
        "gigabytes": float(survey.readable["bytes"].sum()) / 1e9,
        "prompts": len(np.unique(survey.prompt_hashes[survey.prompt_hashes != 0])),
        "scheduled": survey.num_scheduled,
    }
