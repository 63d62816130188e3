"""Prompts alone, as what a run trains on: the clips are the student's own."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from causal_wan.cache.encoded_clips import CachedData, LatentKeeper
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.clips import Loadable
from causal_wan.data.rows import Row
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.samples import SampleStream
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.runs.data import RunData
from causal_wan.runs.regression import load_clips
from causal_wan.runs.settings import MatchingRunConfig
from causal_wan.runs.training_data import DataDescription, LoaderSettings, TrainingData
from causal_wan.tables.prompt_schedules import texts_of
from causal_wan.tables.prompts import read_prompts_file


@dataclass(frozen=True)
class Prompts:
    """Prompts as a data set of clips that are not there."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """A prompt, with empty latents in the place of a clip."""
        return {
            "latents": torch.zeros(1),
            "prompts": (self.texts[index],),
            "row_index": index,
            "num_valid_frames": shape.num_frames,
        }


@dataclass
class PromptData:
    """The prompts of a run, and its held-out clips.

    Attributes:
        config: Settings of the clips.
        texts: To draw, each once.
        clips: The held-out clips, and no others.
        source: Where the prompts are from, in words.
        lane_states: None, as prompts are not streamed.
    """

    config: DataConfig
    texts: list[str]
    clips: RunData
    source: str
    lane_states: ClassVar[None] = None

    @property
    def validation_rows(self) -> list[Row]:
        """Held-out clips."""
        return self.clips.validation_rows

    @property
    def keeper(self) -> LatentKeeper | None:
        """Keeps the latents of held-out clips."""
        return self.clips.keeper

    @property
    def cached(self) -> CachedData | None:
        """The embeddings of prompts, once they are open, if there are any."""
        return self.clips.cached

    @property
    def has_clips(self) -> bool:
        """Whether there is anything that may have to be encoded: held-out clips."""
        return self.clips.has_clips

    @property
    def num_samples(self) -> int:
        """Prompts."""
        return len(self.texts)

    @property
    def prompts(self) -> list[str]:
        """All prompts, held-out ones and the empty one, if it is used, included."""
        return [*self.texts, *self.clips.prompts]

    def count(self) -> dict[str, int]:
        """How much there is of it, for a model card."""
        return {"distinct prompts": len(self.texts), "held-out clips": len(self.validation_rows)}

    def describe(self) -> DataDescription:
        """How many prompts, and where they are from."""
        return DataDescription(summary=f"{len(self.texts)} prompts of {self.source}; no clips")

    def open_cache(self, cache: CacheConfig, model: BaseModelConfig, prompts: Iterable[str], **encoding: Any) -> None:
        """Opens the cache of prompts and held-out clips; arguments as in `RunData.open_cache`.

        Raises:
            ValueError: If it cannot be used.
        """
        self.clips.open_cache(cache, model, prompts, **encoding)

    def dataset(self) -> Prompts:
        """The prompts."""
        return Prompts(self.texts)

    def held_out_dataset(self) -> Loadable:
        """Held-out clips as videos, or as latents where the cache has them."""
        return self.clips.held_out_dataset()

    def samples(self, dataset: Loadable, settings: LoaderSettings, *, start: int, end: int, step: int) -> SampleStream:
        """The prompts in the run's order; arguments as in `make_loader`."""
        one = [0] * len(dataset)
        order = SampleOrder(
            one,
            one,
            seed=settings.seed,
            samples_per_step=settings.samples_per_step,
            start_sample=start,
            start_step=step,
        )
        return SampleStream(dataset, order, self.config, start=start, end=end)

    def sample_bytes(self) -> int:
        """Of a prompt that a loader hands over: next to nothing."""
        return 0


def load_matching_data(config: MatchingRunConfig) -> TrainingData:
    """The clips of a run, where they have a part in it; else the prompts of its file, or of its tables.

    Raises:
        ValueError: If they cannot be used.
    """
    if config.matching.needs_clips:
        return load_clips(config)
    held_out = load_clips(config, held_out_only=True)
    if config.matching.prompts_file is not None:
        prompts, source = read_prompts_file(config.matching.prompts_file), config.matching.prompts_file
    else:
        prompts, source = (prompt for row in load_clips(config).rows for prompt in row.prompts), "the tables"
    return PromptData(config.data, texts_of(prompts), held_out, source)
