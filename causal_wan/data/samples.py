"""The samples of a run in their order, and batches of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from causal_wan.config.refusals import DataError
from causal_wan.data.clips import Loadable
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.settings import DataConfig
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.tables.prompt_schedules import FramePrompts


MAX_REPLACEMENTS = 10


class SampleStream(Dataset):
    """The samples of a run in their order: item i is sample number start + i, epoch after epoch, each shuffled anew.

    A data loader goes through it in sequence; shuffling, resuming and splitting over processes all follow from the
    numbers. A clip that does not decode is replaced by the next of its epoch and reported in `errors`. Of several
    prompts each sample draws one, or the empty prompt with a probability of `caption_dropout`; each of its controls is
    left out with one of `control_dropout`.

    Args:
        dataset: Rows to stream.
        order: Their order, and that of their buckets.
        config: Gives each bucket its shape, and the caption dropout.
        start: Samples that the run has seen already.
        end: End of the run, in samples, all processes together.
    """

    def __init__(self, dataset: Loadable, order: SampleOrder, config: DataConfig, *, start: int, end: int) -> None:
        self.dataset, self.order, self.config = dataset, order, config
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        number, errors = self.start + item, []
        generator = seeded_generator(self.order.seed, RandomPurpose.CLIP, number)
        shape = self.config.shape_at(self.order.bucket(number), self.order.step(number))
        for index in itertools.islice(self.order.candidates(number), MAX_REPLACEMENTS):
            try:
                sample = self.dataset.load(index, generator, shape)
            except ValueError as error:
                errors.append(str(error))
                continue
            prompt = choose_prompt(sample.pop("prompts"), self.config, seed=self.order.seed, number=number)
            drop_controls(sample, self.config, seed=self.order.seed, number=number)
            return {**sample, "prompt": prompt, "sample_number": number, "errors": errors}
        raise DataError(f"{len(errors)} clips in a row did not decode; the last: {errors[-1].removesuffix('.')}.")


def choose_prompt(
    prompts: Sequence[str | FramePrompts], config: DataConfig, *, seed: int, number: int
) -> str | FramePrompts:
    """The prompt of a sample, one of several, or the empty one; a schedule is dropped whole."""
    if len(prompts) == 1 and not config.caption_dropout:
        return prompts[0]
    drop, choice = torch.rand(
        2, generator=seeded_generator(seed, RandomPurpose.CAPTION, number), dtype=torch.float64
    ).tolist()
    return "" if drop < config.caption_dropout else prompts[int(choice * len(prompts))]


def drop_controls(sample: dict[str, Any], config: DataConfig, *, seed: int, number: int) -> None:
    """Puts None in the place of some controls of a sample, as its number decides."""
    if config.control_dropout and sample.get("controls"):
        generator = seeded_generator(seed, RandomPurpose.CONTROL, number)
        draws = torch.rand(len(sample["controls"]), generator=generator, dtype=torch.float64).tolist()
        kept = [draw >= config.control_dropout for draw in draws]
        sample["controls"] = [
            control if is_kept else None for control, is_kept in zip(sample["controls"], kept, strict=True)
        ]


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Samples as a data loader hands them over: an entry for each in all lists but `errors`.

    Numbers are ints and no tensors, which would wait for a GPU to tell them.

    Attributes:
        clips: Videos, uint8 `(3, T, height, width)`, and latents, float `(C, F, H, W)`; of trajectories several,
            `(K, C, F, H, W)`.
        is_latents: Which of them are latents.
        cache_keys: Of videos whose latents are to be kept, else None.
        prompts: One each, or that of each of its video frames.
        controls: The videos, or latents, that control each clip, like `clips`; None is a control that is left out.
        control_keys: Of them, like `cache_keys`.
        row_indices: Rows of the data set.
        sample_numbers: In the run.
        num_valid_frames: Video frames before padding.
        errors: What is wrong with clips that did not decode and were replaced.
        lane_states: Of samples of streams, for `causal_wan.streams.lanes.LaneStates`; else there are none.
    """

    clips: list[torch.Tensor]
    is_latents: list[bool]
    cache_keys: list[bytes | None]
    prompts: list[str | FramePrompts]
    row_indices: list[int]
    sample_numbers: list[int]
    num_valid_frames: list[int]
    errors: list[str]
    lane_states: list[tuple[int, ...]] = field(default_factory=list)
    controls: list[list[torch.Tensor | None]] = field(default_factory=list)
    control_keys: list[list[bytes | None]] = field(default_factory=list)

    def pin_memory(self) -> Self:
        """In pinned memory; called by data loaders."""
        controls = [
            [None if control is None else control.pin_memory() for control in controls] for controls in self.controls
        ]
        return replace(self, clips=[clip.pin_memory() for clip in self.clips], controls=controls)


def collate(samples: Sequence[dict[str, Any]]) -> ClipBatch:
    """Samples of tables, streams or trajectories -> a batch."""
    return ClipBatch(
        clips=[sample["latents"] if "latents" in sample else sample["video"] for sample in samples],
        is_latents=["latents" in sample for sample in samples],
        cache_keys=[sample.get("cache_key") for sample in samples],
        prompts=[sample["prompt"] for sample in samples],
        row_indices=[sample["row_index"] for sample in samples],
        sample_numbers=[sample["sample_number"] for sample in samples],
        num_valid_frames=[sample["num_valid_frames"] for sample in samples],
        errors=[error for sample in samples for error in sample["errors"]],
        lane_states=[sample["lane_state"] for sample in samples if "lane_state" in sample],
        controls=[sample.get("controls", []) for sample in samples],
        control_keys=[sample.get("control_keys", [None] * len(sample.get("controls", []))) for sample in samples],
    )


class BadClips:
    """The book of the clips of a run that did not decode and were replaced.

    Args:
        limit: How many there may be: `max_bad_samples`.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.errors: dict[str, None] = {}  # in the order that they came in

    def note(self, errors: Sequence[str]) -> None:
        """Notes those of a batch, and reports each once, though it comes back every epoch.

        Raises:
            DataError: Above the limit.
        """
        for error in errors:
            if error not in self.errors:
                tqdm.write(f"replaced a clip that does not decode: {error}")
        self.errors.update(dict.fromkeys(errors))
        check_bad_clips(list(self.errors), self.limit)


def check_bad_clips(errors: Sequence[str], limit: int) -> None:
    """Checks that not too many clips failed to decode.

    Args:
        errors: One a clip.
        limit: `max_bad_samples`.

    Raises:
        DataError: If there are more.
    """
    if len(errors) > limit:
        raise DataError(
            f"at most max_bad_samples={limit} clips may fail to decode, but {len(errors)} did, last: "
            f"{errors[-1].removesuffix('.')}. "
            "Repair or remove them, or raise --max_bad_samples."
        )
