"""What a run asks of the data that it trains on, whatever that is, and the data loader that it makes of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset

from causal_wan.cache.encoded_clips import CachedData, LatentKeeper
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.clips import Loadable
from causal_wan.data.rows import Row
from causal_wan.data.samples import collate
from causal_wan.data.shared_memory import collate_shared
from causal_wan.data.workers import worker_settings
from causal_wan.streams.lanes import LaneStates


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How a run loads its batches, from the first to the last.

    Attributes:
        seed: Of the run.
        samples_per_step: Of an optimizer step, all processes together.
        batch_size: Samples of a batch of one process.
        num_workers: Processes that decode ahead.
        num_processes: That get batches in turn.
        pin_memory: As in torch.
        timeout: Seconds after which a batch that does not come is an error.
    """

    seed: int
    samples_per_step: int
    batch_size: int
    num_workers: int
    num_processes: int
    pin_memory: bool
    timeout: float


@dataclass(frozen=True, kw_only=True)
class DataDescription:
    """The data of a run in words, for its plan.

    Attributes:
        summary: How much there is, in one line.
        shapes: Lines on the shapes in which it is shown, if there is more than one.
        notes: What it goes through that may surprise, a sentence each.
        num_scheduled: Clips along which the prompt changes, as far as that is known.
    """

    summary: str
    shapes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_scheduled: int = 0


class TrainingData(Protocol):
    """What a run trains on, and the held-out clips beside it.

    Attributes:
        validation_rows: Held-out clips.
        lane_states: How far the run has come in streams, if it reads some; goes into checkpoints.
        cached: The embeddings of prompts, once they are open, if there are any.
        keeper: Keeps what is encoded, if a cache is to be filled.
        prompts: All that are known, held-out ones and the empty one, if it is used, included.
        num_samples: To train on; 0 if nobody knows.
        has_clips: Whether there is anything that may have to be encoded.
    """

    @property
    def validation_rows(self) -> list[Row]: ...
    @property
    def lane_states(self) -> LaneStates | None: ...
    @property
    def cached(self) -> CachedData | None: ...
    @property
    def keeper(self) -> LatentKeeper | None: ...
    @property
    def prompts(self) -> list[str]: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def has_clips(self) -> bool: ...

    def describe(self) -> DataDescription:
        """It in words."""

    def count(self) -> dict[str, int]:
        """How much there is of it, for a model card."""

    def open_cache(self, cache: CacheConfig, model: BaseModelConfig, prompts: Iterable[str], **encoding: Any) -> None:
        """Opens what was encoded before; arguments as in `RunData.open_cache`. Called by every process."""

    def sample_bytes(self) -> int:
        """Of the largest sample that a loader hands over."""

    def dataset(self) -> Loadable:
        """What is trained on, in the order of its table."""

    def held_out_dataset(self) -> Loadable:
        """The held-out clips."""

    def samples(
        self, dataset: Loadable, settings: LoaderSettings, *, start: int, end: int, step: int
    ) -> Dataset[dict[str, Any]]:
        """The samples of `dataset` in the run's order; arguments as in `make_loader`."""


def make_loader(
    data: TrainingData, dataset: Loadable, settings: LoaderSettings, *, start: int, end: int, step: int
) -> DataLoader:
    """The batches of the run's samples from `start`, the first of a step, to `end`, in order.

    Args:
        data: Of the run.
        dataset: From `data.dataset`.
        settings: Of the run.
        start, end: Numbers of samples.
        step: Optimizer step that `start` belongs to.
    """
    return DataLoader(
        data.samples(dataset, settings, start=start, end=end, step=step),
        batch_size=settings.batch_size,
        collate_fn=partial(collate_shared, collate),
        pin_memory=settings.pin_memory,
        **worker_settings(settings.num_workers, settings.timeout),
    )
