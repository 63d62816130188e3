"""Settings of the clips: where they are, what the model sees of them, and in which shapes."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Self

from causal_wan.config.choices import LocalPath
from causal_wan.config.ranges import (
    FrameRate,
    NonNegativeInt,
    PositiveInt,
    Range,
    Share,
    checked_dataclass,
)
from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits


class ClipShape(NamedTuple):
    """Video frames, height and width in pixels of a clip as the model sees it."""

    num_frames: int
    height: int
    width: int


@checked_dataclass
class DataConfig:
    """The clips: where they are, and what the model sees of them."""

    dataset_base_path: LocalPath | None = None
    """Folder that the paths in the table are relative to; they cannot leave it. Folders and data sets need none."""
    metadata_path: LocalPath | None = None
    """CSV, JSONL or Parquet with a row a clip, folder with a.mp4 and a.txt, or `datasets` folder or hub name."""
    dataset_config: LocalPath | None = None
    """YAML list of several tables with weights; in the place of metadata_path."""
    follow_links: bool = False
    """Links in dataset_base_path, or in a folder of clips, may lead out of it; those of the hub's cache always may."""
    video_column: str = "video"
    """Column with the path of the video."""
    caption_column: tuple[str, ...] = ("prompt",)
    """Column with the prompt or a list of prompts, or several columns; of several prompts, each sample draws one."""
    control_column: tuple[str, ...] = ()
    """Columns with videos that the student is to follow, such as sketch depth: of the same frames as the clip."""
    control_dropout: Share = 0.0
    """Share of the samples without a control, drawn for each control; with 0.1 the student can do without, too."""
    caption_dropout: Share = 0.0
    """Share of the samples that get the empty prompt; classifier-free guidance needs a student that knows it."""
    num_frames: PositiveInt = 81
    """Video frames of a clip, 4k + 1 for the WAN VAE."""
    height: PositiveInt = 480
    """Pixels, a multiple of 16, for WAN 2.2 5B of 32."""
    width: PositiveInt = 832
    """Pixels, a multiple of 16, for WAN 2.2 5B of 32."""
    time_division_factor: PositiveInt = WAN.temporal_factor
    """Video frames to a latent frame; num_frames must be a multiple of it, plus 1."""
    frame_sampling: Literal["uniform", "head", "random"] = "uniform"
    """uniform spreads num_frames over the whole clip, right for a process; head and random keep to frame_rate."""
    frame_rate: FrameRate | None = None
    """Frames a second that head and random sample at; None is the checkpoint's: 16, of WAN 2.2 5B 24."""
    short_clips: Literal["error", "skip", "pad"] = "error"
    """Clips with too few frames: stop, leave them out, or repeat the last frame (which the loss then leaves out)."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """Rows that cannot be used: stop and list them, or list them and go on without."""
    max_bad_samples: NonNegativeInt = 10
    """Clips that may fail to decode while training, before the run stops."""
    streaming: bool = False
    """Read tars, Parquet, JSON lines or a hub data set as training goes, without a copy or a count of the rows."""
    shuffle_buffer_size: PositiveInt = 256
    """Rows of a stream that are shuffled among each other, in each process that decodes."""
    shuffle_buffer_bytes: PositiveInt = 2**28
    """Bytes of a stream that each process that decodes holds, about."""
    resolution_buckets: tuple[str, ...] = ()
    """Sizes such as 480x832 832x480 640x640 (height x width): each clip takes that of the nearest aspect ratio."""
    frame_buckets: tuple[PositiveInt, ...] = ()
    """Lengths such as 17 49 81: each clip takes the longest that it has the frames for."""
    frames_schedule: str | None = None
    """Lengths by step, such as 0:17,2000:49,5000:81; ends with num_frames."""
    resolution_schedule: str | None = None
    """Sizes by step, such as 0:240x416,2000:480x832; ends with height x width."""
    temporal_crop: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Uniform sampling takes a random window of each clip, at least this share of it; 1 is all of it."""
    horizontal_flip: Share = 0.0
    """Share of the samples that are mirrored; not for clips with writing, or prompts that say left and right."""
    color_jitter: tuple[Annotated[float, Range(ge=0, lt=1, hint="try 0.1 0.1 0.1 0.02")], ...] = ()
    """Largest change of brightness, contrast, saturation and hue, such as 0.1 0.1 0.1 0.02; the same in all frames."""
    limits: VideoLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        if self.metadata_path is not None and self.dataset_config is not None:
            raise ValueError(
                "exactly one of metadata_path and dataset_config must be given, got both; --metadata_path names one "
                "table, --dataset_config a YAML list of several."
            )
        self.geometry.check_num_frames(self.num_frames)
        self.geometry.check_size(self.height, self.width)
        if not self.caption_column:
            raise ValueError("caption_column must name at least one column.")
        if len(set(self.control_column)) < len(self.control_column):
            raise ValueError(f"control_column must name each column once, got {' '.join(self.control_column)}.")
        if self.video_column in self.control_column:
            raise ValueError(f"control_column must be other videos than the clips, got {self.video_column}.")
        if self.control_dropout and not self.control_column:
            raise ValueError("control_dropout is about controls; name their columns with --control_column.")
        if self.streaming and (self.resolution_buckets or self.frame_buckets):
            raise ValueError(
                "--streaming does not go with buckets, which have to know all clips beforehand; use schedules, or a "
                "table."
            )
        self._check_shapes()
        self._check_augmentation()

    def _check_shapes(self) -> None:
        names = ("sizes of resolution_buckets and resolution_schedule",) * 2
        for shape in self.all_shapes():
            self.geometry.check_num_frames(shape.num_frames, "frame_buckets and frames_schedule")
            self.geometry.check_size(shape.height, shape.width, names)
        for what, last, flag in (
            (self.frames_schedule, str(self.num_frames), "num_frames"),
            (self.resolution_schedule, f"{self.height}x{self.width}", "height x width"),
        ):
            if what is not None and what.split(":")[-1].strip() != last:
                raise ValueError(
                    f"schedules must end with {flag}, the shape of the result, which is {last}; got {what}."
                )
        for schedule, buckets, name in (
            (self.frames_schedule, self.frame_buckets, "frame"),
            (self.resolution_schedule, self.resolution_buckets, "resolution"),
        ):
            if schedule is not None and buckets:
                raise ValueError(f"a {name} comes from a schedule or from buckets, not from both; leave one out.")

    def _check_augmentation(self) -> None:
        if self.temporal_crop < 1 and self.frame_sampling != "uniform":
            raise ValueError("temporal_crop goes with --frame_sampling uniform; random starts anywhere by itself.")
        if self.color_jitter and (len(self.color_jitter) != 4 or self.color_jitter[3] > 0.5):
            raise ValueError(
                "color_jitter must be four numbers in [0, 1), for brightness, contrast, saturation and hue (hue at "
                f"most 0.5), got {' '.join(map(str, self.color_jitter))}; try 0.1 0.1 0.1 0.02."
            )

    def for_checkpoint(self, geometry: LatentGeometry) -> Self:
        """The settings with what is left to the checkpoint.

        Raises:
            ValueError: If sizes do not fit it; names the nearest that do.
        """
        for shape in {self.shape, *self.all_shapes()}:
            geometry.check_num_frames(shape.num_frames)
            geometry.check_size(shape.height, shape.width, of=" for this checkpoint")
        return replace(self, frame_rate=self.frame_rate or float(geometry.frame_rate))

    def for_validation(self) -> Self:
        """The settings of clips to validate on: in the shape of the result, nothing random."""
        return replace(
            self,
            streaming=False,
            frame_sampling="head" if self.frame_sampling == "random" else self.frame_sampling,
            resolution_buckets=(),
            frame_buckets=(),
            frames_schedule=None,
            resolution_schedule=None,
            temporal_crop=1.0,
            horizontal_flip=0.0,
            color_jitter=(),
        )

    @property
    def geometry(self) -> LatentGeometry:
        """WAN's, as long as the checkpoint is not read."""
        return replace(WAN, temporal_factor=self.time_division_factor)

    @property
    def sampling_rate(self) -> float:
        """Frames a second that clips are sampled at; WAN's as long as the checkpoint is not read."""
        return float(WAN.frame_rate) if self.frame_rate is None else self.frame_rate

    @property
    def shape(self) -> ClipShape:
        """The shape of the result, and of all clips without buckets and schedules."""
        return ClipShape(self.num_frames, self.height, self.width)

    @cached_property
    def buckets(self) -> list[tuple[int | None, tuple[int, int] | None]]:
        """Length and size of each bucket; None is what the schedule says."""
        sizes = [parse_size(size) for size in self.resolution_buckets]
        return list(itertools.product(self.frame_buckets or (None,), sizes or (None,)))

    def shape_at(self, bucket: int, step: int) -> ClipShape:
        """The shape of the clips of a bucket at an optimizer step."""
        length, size = self.buckets[bucket]
        if length is None:
            length = _at_step(self.frame_stages, step)
        return ClipShape(length, *(_at_step(self.size_stages, step) if size is None else size))

    @cached_property
    def frame_stages(self) -> list[tuple[int, int]]:
        """(First step, num_frames) of each stage."""
        return parse_schedule("frames_schedule", self.frames_schedule, int) or [(0, self.num_frames)]

    @cached_property
    def size_stages(self) -> list[tuple[int, tuple[int, int]]]:
        """(First step, (height, width)) of each stage."""
        stages = parse_schedule("resolution_schedule", self.resolution_schedule, parse_size)
        return stages or [(0, (self.height, self.width))]

    def shapes_of_bucket(self, bucket: int) -> list[ClipShape]:
        """Every shape in which a run may show the clips of a bucket."""
        steps = {step for step, _ in [*self.frame_stages, *self.size_stages]}
        return sorted({self.shape_at(bucket, step) for step in steps})

    def all_shapes(self) -> list[ClipShape]:
        """Every shape of a run."""
        return sorted({shape for bucket in range(len(self.buckets)) for shape in self.shapes_of_bucket(bucket)})

    @property
    def random_views(self) -> list[str]:
        """Flags by which no two samples of a clip are the same, so that latents cannot be kept."""
        flags = {
            "--frame_sampling random": self.frame_sampling == "random",
            "--temporal_crop": self.temporal_crop < 1,
            "--horizontal_flip": self.horizontal_flip > 0,
            "--color_jitter": any(self.color_jitter),
        }
        return [flag for flag, is_on in flags.items() if is_on]


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of 480x832.

    Raises:
        ValueError: If the text is anything else.
    """
    found = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    if found is None:
        raise ValueError(f"a size must be written height x width, such as 480x832, got {text!r}.")
    return int(found[1]), int(found[2])


def parse_schedule(name: str, text: str | None, parse: Callable[[str], Any]) -> list[tuple[int, Any]]:
    """(First step, value) of each stage of a schedule such as 0:17,2000:49; none of None.

    Raises:
        ValueError: If the text is anything else, does not begin at step 0, or has steps that do not rise.
    """
    if text is None:
        return []
    try:
        stages = [(int(step), parse(value)) for step, value in (stage.split(":") for stage in text.split(","))]
    except ValueError as error:
        raise ValueError(
            f"{name} must be step:value, comma separated, such as 0:17,2000:49; got {text!r} ({error})."
        ) from None
    steps = [step for step, _ in stages]
    if steps[0] != 0 or steps != sorted(set(steps)):
        raise ValueError(f"{name} must begin at step 0 and rise, got the steps {', '.join(map(str, steps))}.")
    return stages


def _at_step(stages: Sequence[tuple[int, Any]], step: int) -> Any:
    return [value for first, value in stages if first <= step][-1]


def check_waits_for_clips(data: DataConfig, dataloader_timeout: float) -> None:
    """Checks that a clip whose decoding is given up can be replaced before waiting for it is given up, too.

    Raises:
        ValueError: If not.
    """
    if dataloader_timeout <= data.limits.decode_timeout:
        raise ValueError(
            f"dataloader_timeout must be above decode_timeout, which is {data.limits.decode_timeout:g} seconds, got "
            f"{dataloader_timeout:g}; raise it, or lower --decode_timeout."
        )


def check_can_be_cached(data: DataConfig) -> None:
    """Checks that all samples of a clip are the same.

    Raises:
        ValueError: If not.
    """
    if data.streaming:
        raise ValueError("latents of a stream are not kept; leave out --latents_dir and --cache_latents.")
    if data.random_views:
        raise ValueError(
            f"latents can be kept only if all samples of a clip are the same, but {' and '.join(data.random_views)} "
            "makes each another; leave that out, or train without --cache_latents and --latents_dir."
        )
