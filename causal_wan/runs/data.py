"""The clips of a run, from tables or streams, from files or a cache: what training scripts ask of their data.

Knows no noise and no loss. A loader gives the samples of any part of the run, in the run's order.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import av
from torch.utils.data import Dataset

from causal_wan.cache.encoded_clips import CachedClips, CachedData, LatentKeeper
from causal_wan.cache.opening import open_cache
from causal_wan.cache.tensor_cache import CorruptTensorError
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.buckets import clip_shapes, describe_shapes, order_samples
from causal_wan.data.clips import Loadable, VideoDataset
from causal_wan.data.descriptions import count_schedules, describe_flip, describe_rows, describe_speed_up
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.rows import Row, load_rows, source_weights, sources_of, with_controls
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.samples import SampleStream
from causal_wan.data.settings import ClipShape, DataConfig, check_can_be_cached
from causal_wan.runs.training_data import DataDescription, LoaderSettings
from causal_wan.streams.clips import StreamDecoder
from causal_wan.streams.lanes import LaneStates, StreamedClips
from causal_wan.streams.sources import Stream, open_stream
from causal_wan.tables.prompt_schedules import texts_of
from causal_wan.video.opening import describe_error


@dataclass
class RunData:
    """The clips of a run; see `load_run_data`.

    Attributes:
        config: Settings of the clips.
        rows: Those to train on; none if they are streamed.
        validation_rows: Held-out ones.
        streams: In the place of rows.
        manifest: Facts of the files, if there is a cache.
        cached: The cache, once it is open.
        keeper: Keeps what is encoded, if the cache is to be filled.
        lane_states: How far the run has come in the streams, if there are any; goes into checkpoints.
    """

    config: DataConfig
    rows: list[Row]
    validation_rows: list[Row]
    streams: list[Stream]
    manifest: FileManifest | None
    cached: CachedData | None = None
    keeper: LatentKeeper | None = None
    lane_states: LaneStates | None = None

    @property
    def prompts(self) -> list[str]:
        """All prompts that are known, held-out ones and the empty one, if it is used, included."""
        prompts = texts_of(prompt for row in [*self.rows, *self.validation_rows] for prompt in row.prompts)
        return prompts + ([""] if self.config.caption_dropout else [])

    def count(self) -> dict[str, int]:
        """How much there is of it, for a model card."""
        if self.streams:
            return {"streams": len(self.streams)}
        prompts = texts_of(prompt for row in self.rows for prompt in row.prompts)
        return {"clips": len(self.rows), "distinct prompts": len(prompts), "held-out clips": len(self.validation_rows)}

    @property
    def videos(self) -> list[Row]:
        """All videos of the run: those of `rows`, then of `validation_rows`, each followed by its controls."""
        return with_controls([*self.rows, *self.validation_rows])

    def wanted_shapes(self) -> list[list[ClipShape]]:
        """In which shapes a run shows each of `videos`."""
        shapes = [clip_shapes(row, self.config) for row in self.rows for _ in with_controls([row])]
        return shapes + [[self.config.shape]] * len(with_controls(self.validation_rows))

    def open_cache(self, cache: CacheConfig, model: BaseModelConfig, prompts: Iterable[str], **encoding: Any) -> None:
        """Opens the cache, if there is one. Called by every process.

        Args:
            cache: Its settings.
            model: Where the encoders are.
            prompts: That the run wants to be embedded.
            encoding: vae_tiling, text_dtype and encodes of `causal_wan.cache.opening.open_cache`.

        Raises:
            ValueError: If the cache cannot be used, or the run is to read all from it and something is not in it.
        """
        if self.manifest is None:
            return
        self.cached, videos = open_cache(cache, self.config, model, self.videos, self.manifest, **encoding)
        if encoding["encodes"]:
            self.keeper = LatentKeeper(self.cached, self.cached.latent_writer(eager=True))
        else:
            self.cached.check_complete(videos, self.wanted_shapes(), prompts)
        contents = iter(videos)
        self.rows, self.validation_rows = (
            [replace(next(contents), controls=tuple(itertools.islice(contents, len(row.controls)))) for row in rows]
            for rows in (self.rows, self.validation_rows)
        )

    def dataset(self) -> Loadable:
        """Clips as videos, or as latents where the cache has them."""
        return self._behind_cache(VideoDataset(self.rows, self.config))

    def held_out_dataset(self) -> Loadable:
        """The same of held-out clips."""
        return self._behind_cache(VideoDataset(self.validation_rows, self.config.for_validation()))

    def _behind_cache(self, videos: VideoDataset) -> Loadable:
        return videos if self.cached is None else CachedClips(videos, self.cached, fills=self.keeper is not None)

    def samples(self, dataset: Loadable, settings: LoaderSettings, *, start: int, end: int, step: int) -> Dataset:
        """The clips of tables or streams in the run's order; arguments as in `make_loader`."""
        config, weights = self.config, source_weights(self.config)
        seed, place = settings.seed, {"start_sample": start, "start_step": step}
        if self.lane_states is None:
            order = order_samples(
                self.rows, config, weights=weights, seed=seed, samples_per_step=settings.samples_per_step, **place
            )
            return SampleStream(dataset, order, config, start=start, end=end)
        return StreamedClips(
            self.streams,
            self.lane_states,
            StreamDecoder(config, seed, settings.samples_per_step, **place),
            seed=seed,
            start=start,
            end=end,
            batch_size=settings.batch_size,
            num_slots=settings.num_processes * max(settings.num_workers, 1),
            weights=weights,
            buffer_rows=config.shuffle_buffer_size,
            buffer_bytes=config.shuffle_buffer_bytes,
        )

    def sample_bytes(self) -> int:
        """Of the largest clip that a loader hands over: of a video, or of latents if the cache has them all."""
        num_videos = 1 + len(self.config.control_column)
        videos = with_controls(self.rows)
        shapes = self.wanted_shapes()[: len(videos)]
        if self.cached is not None and not self.cached.missing_clips(videos, shapes):
            work = [(row, shape) for row, own in zip(videos, shapes, strict=True) for shape in own]
            row, shape = max(work, key=lambda each: math.prod(each[1]))
            with contextlib.suppress(CorruptTensorError):  # is made anew, of the video
                return num_videos * self.cached.latents.read(self.cached.latent_key(row.content, shape))[0].nbytes
        return num_videos * 3 * max(map(math.prod, self.config.all_shapes()))

    def check_stream(self, seed: int) -> None:
        """Reads and decodes the first streamed row, so that wrong settings are found at once.

        Raises:
            ValueError: If that does not work.
        """
        for stream in self.streams:
            path = stream.source.metadata_path
            row = next(iter(stream.read_file(0, 0)), None)
            if row is None:
                raise ValueError(f"{path} must hold at least one row in its first file, but has none.")
            try:
                base = stream.source.dataset_base_path
                video, controls = row.find_video(base), row.find_controls(base)
                StreamDecoder(self.config, seed, samples_per_step=1)(video, row.prompts, 0, *controls)
            except (ValueError, OSError, av.FFmpegError) as error:
                raise ValueError(
                    f"the first row of {path} must be a clip that can be used, but {row.name} is not: "
                    f"{describe_error(error)}."
                ) from error

    @property
    def has_clips(self) -> bool:
        """Whether there is anything that may have to be encoded."""
        return bool(self.rows or self.validation_rows or self.streams)

    @property
    def num_samples(self) -> int:
        """Clips to train on; 0 if nobody knows."""
        return len(self.rows)

    def describe(self) -> DataDescription:
        """Clips and prompts, buckets and stages, and what clips go through; or streams."""
        speed_up = describe_speed_up(self.rows, self.config) if self.rows else None
        return DataDescription(
            summary=self._summarize(),
            shapes=describe_shapes(self.rows, self.config),
            notes=[note for note in (speed_up, describe_flip(self.rows, self.config)) if note],
            num_scheduled=count_schedules(self.rows),
        )

    def _summarize(self) -> str:
        if not self.streams:
            return describe_rows(self.rows)
        counts = [f"{stream.num_files} file(s) of {stream.source.metadata_path}" for stream in self.streams]
        return "streamed: " + ", ".join(counts)


class BesideHeldOut:
    """What trajectories and prompts have in common that are trained on beside held-out clips, in no buckets.

    Attributes:
        config: Settings of the clips.
        clips: The held-out clips, and no others.
        lane_states: None, as nothing is streamed.
    """

    config: DataConfig
    clips: RunData
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
    def has_clips(self) -> bool:
        """Whether there is anything that may have to be encoded: held-out clips."""
        return self.clips.has_clips

    def held_out_dataset(self) -> Loadable:
        """Held-out clips as videos, or as latents where the cache has them."""
        return self.clips.held_out_dataset()

    def samples(self, dataset: Loadable, settings: LoaderSettings, *, start: int, end: int, step: int) -> SampleStream:
        """What is trained on, in the run's order; arguments as in `make_loader`."""
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


def load_run_data(
    config: DataConfig,
    *,
    validation_metadata_path: str | None,
    num_validation_samples: int,
    cache_dir: Path | None,
    held_out_only: bool = False,
) -> RunData:
    """Reads and checks the tables of a run, or opens its streams.

    Args:
        config: Settings of the clips.
        validation_metadata_path: Table of held-out clips.
        num_validation_samples: How many of them are used, from the first row on.
        cache_dir: Folder of the cache, if there is one.
        held_out_only: Leave out the clips to train on.

    Raises:
        ValueError: If they cannot be used.
    """
    if cache_dir is not None and not held_out_only:
        check_can_be_cached(config)
    manifest = None if cache_dir is None else FileManifest(cache_dir)
    streams = [open_stream(source) for source in sources_of(config)] if config.streaming and not held_out_only else []
    rows = [] if config.streaming or held_out_only else load_rows(config, manifest)
    held_out = []
    if validation_metadata_path is not None:
        data = replace(config.for_validation(), metadata_path=validation_metadata_path, dataset_config=None)
        try:
            held_out = load_rows(data, manifest)[:num_validation_samples]
        except ValueError as error:
            raise ValueError(str(error).replace("metadata_path must", "validation_metadata_path must", 1)) from None
    return RunData(config, rows, held_out, streams, manifest, lane_states=LaneStates() if streams else None)
