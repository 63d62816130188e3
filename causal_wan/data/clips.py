"""Clips as the model sees them: decoded, sampled, resized, cropped and augmented.

Shapes: T = video frames, height, width in pixels.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import av
import torch
from torch.utils.data import get_worker_info
from torchvision.transforms import v2

from causal_wan.data.frames import sample_frame_indices, sample_frame_seconds
from causal_wan.data.rows import Row
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.tables.prompt_schedules import FramePrompts, PromptSchedule
from causal_wan.video.decoding import decode_frames
from causal_wan.video.facts import Traits
from causal_wan.video.opening import describe_error
from causal_wan.video.timing import read_frame_times


MAX_WORKERS = 256  # whose clips are noted


class ResizeToCover(v2.Transform):
    """Resizes so that height x width is just covered, aspect ratio kept."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        """Called by torchvision for each picture `(..., H, W)`."""
        scale = max(self.height / inpt.shape[-2], self.width / inpt.shape[-1])
        size = [max(self.height, round(inpt.shape[-2] * scale)), max(self.width, round(inpt.shape[-1] * scale))]
        return v2.functional.resize(inpt, size, antialias=True)


def build_video_transform(height: int, width: int) -> v2.Transform:
    """Aspect-preserving resize and centre crop of uint8 pictures `(..., H, W)`."""
    return v2.Compose([ResizeToCover(height, width), v2.CenterCrop((height, width))])


def augment_videos(
    videos: Sequence[torch.Tensor], config: DataConfig, generator: torch.Generator
) -> list[torch.Tensor]:
    """Mirrors a clip and its controls alike, and recolours the clip alone, as the generator decides.

    Args:
        videos: The clip, then its controls, uint8 `(3, T, H, W)`; all frames are changed alike.
        config: Says how much.
        generator: Decides.
    """
    if config.horizontal_flip and float(torch.rand((), generator=generator)) < config.horizontal_flip:
        videos = [video.flip(-1) for video in videos]
    video, *controls = videos
    if any(config.color_jitter):
        picture = video.flatten(1, 2)  # one picture `(3, T * H, W)`: one mean for all frames
        changes = (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1) * torch.tensor(config.color_jitter)
        brightness, contrast, saturation, hue = changes.tolist()
        picture = v2.functional.adjust_brightness(picture, 1 + brightness)
        picture = v2.functional.adjust_contrast(picture, 1 + contrast)
        picture = v2.functional.adjust_saturation(picture, 1 + saturation)
        video = v2.functional.adjust_hue(picture, hue).reshape(video.shape)
    return [video, *controls]


def normalize_videos(videos: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], same shape.

    For the training device: workers hand over uint8, a quarter of the bytes.
    """
    return videos.float() / 127.5 - 1


class Loadable(Protocol):
    """What can be streamed: `len` rows, each loaded in a shape, with a generator of its own."""

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]: ...


class VideoDataset:
    """Clips as the model sees them: decoded, sampled, resized, cropped and augmented."""

    def __init__(self, rows: Sequence[Row], config: DataConfig) -> None:
        self.rows, self.config = list(rows), config
        # (process, index, whether it is still loading) of each worker's last row, for `name_clips_of_dead_workers`.
        self.loading = torch.full((MAX_WORKERS, 3), -1).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """One clip.

        Returns:
            video: uint8 `(3, T, height, width)`; controls: a list of such; prompts, see `shown_prompts`; row_index;
            num_valid_frames: frames before padding.

        Raises:
            ValueError: If the clip does not decode; names row and file.
        """
        row = self.rows[index]
        prompts = shown_prompts(row, shape, self.config, generator)
        try:
            with self.noted(index):
                (video, *controls), num_valid = load_videos(row, shape, self.config, generator)
        except (ValueError, OSError, av.FFmpegError) as error:
            raise ValueError(f"row {row.number}, {row.video}: {describe_error(error)}") from error
        facts = {"prompts": prompts, "row_index": index, "num_valid_frames": num_valid}
        return {"video": video, "controls": controls, **facts}

    @contextlib.contextmanager
    def noted(self, index: int) -> Iterator[None]:
        """Notes that a worker of a data loader is at a row, while it is."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        note = self.loading[worker.id % MAX_WORKERS]
        note.copy_(torch.tensor([os.getpid(), index, True]))
        try:
            yield
        finally:
            note[2] = False


def load_videos(
    row: Row, shape: ClipShape, config: DataConfig, generator: torch.Generator
) -> tuple[list[torch.Tensor], int]:
    """A clip and its controls as the model sees them, uint8 `(3, T, height, width)`, and their frames before padding.

    Raises:
        ValueError, OSError, av.FFmpegError: If one does not decode.
    """
    times = read_frame_times(row.video, limits=config.limits) if row.traits & Traits.VARIABLE_RATE else None
    timing = (row.num_frames, row.frame_rate, shape.num_frames)
    indices, num_valid = sample_frame_indices(*timing, config, generator, times=times)
    transform = build_video_transform(shape.height, shape.width)
    videos = [
        decode_frames(each.video, indices, transform, limits=config.limits).movedim(0, 1)
        for each in (row, *row.controls)
    ]
    return augment_videos(videos, config, generator), num_valid


def load_video(row: Row, shape: ClipShape, config: DataConfig, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """The same of the clip alone.

    Raises:
        ValueError, OSError, av.FFmpegError: If it does not decode.
    """
    (video,), num_valid = load_videos(replace(row, controls=()), shape, config, generator)
    return video, num_valid


def shown_prompts(
    row: Row, shape: ClipShape, config: DataConfig, generator: torch.Generator
) -> tuple[str | FramePrompts, ...]:
    """The prompts of a row for a clip of a shape: of a schedule, that of each frame which `load_video` shows.

    Args:
        row: Its prompts, and the facts of its file.
        shape: Of the clip.
        config: Says which frames are shown.
        generator: That `load_video` is about to be given; it is left as it is.
    """
    if not any(isinstance(prompt, PromptSchedule) for prompt in row.prompts):
        return row.prompts
    timing = (row.num_frames, row.frame_rate, shape.num_frames)
    is_even = not row.traits & Traits.VARIABLE_RATE
    seconds = sample_frame_seconds(*timing, config, generator.clone_state(), is_even=is_even).tolist()
    return tuple(prompt.by_frame(seconds) if isinstance(prompt, PromptSchedule) else prompt for prompt in row.prompts)
