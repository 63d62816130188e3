"""Prompts alone, as what a run trains on: the clips are the student's own."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from causal_wan.cache.encoded_clips import CachedData
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.runs.data import BesideHeldOut, RunData
from causal_wan.runs.regression import load_clips
from causal_wan.runs.settings import MatchingRunConfig
from causal_wan.runs.training_data import DataDescription, TrainingData
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
class PromptData(BesideHeldOut):
    """The prompts of a run, and its held-out clips.

    Attributes:
        config: Settings of the clips.
        texts: To draw, each once.
        clips: The held-out clips, and no others.
        source: Where the prompts are from, in words.
    """

    config: DataConfig
    texts: list[str]
    clips: RunData
    source: str

    @property
    def cached(self) -> CachedData | None:
        """The embeddings of prompts, once they are open, if there are any."""
        return self.clips.cached

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

    def sample_bytes(self) -> int:
        """Of a prompt that a loader hands over: next to nothing."""
        return 0


def load_matching_data(config: MatchingRunConfig) -> TrainingData:
    """The clips of a run, where they have a part in it; else the prompts of its file, or of its tables.

    Raises:
        ValueError: If they cannot be used.
    """
    prompts_file = config.matching.prompts_file
    clips = load_clips(config, held_out_only=prompts_file is not None)
    if config.matching.needs_clips:
        return clips
    if prompts_file is not None:
        return PromptData(config.data, texts_of(read_prompts_file(prompts_file)), clips, prompts_file)
    texts = texts_of(prompt for row in clips.rows for prompt in row.prompts)
    return PromptData(config.data, texts, replace(clips, rows=[]), "the tables")
