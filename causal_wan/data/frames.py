"""Which frames of a file make a clip, and whether another file has the same."""

from pathlib import Path

import numpy as np
import torch

from causal_wan.data.settings import DataConfig
from causal_wan.video.decoding import probe_video
from causal_wan.video.facts import Traits, VideoFacts
from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import Video
from causal_wan.video.timing import read_frame_times


MAX_DIFFERENCE = 0.01  # of the rates and the aspect ratios of two videos with the same frames
REMEDY = "make it of the clip, frame by frame"


def min_num_frames(config: DataConfig) -> int:
    """Frames that a clip must have: for the shortest bucket, or for the longest stage of a schedule."""
    return min(config.frame_buckets) if config.frame_buckets else max(length for _, length in config.frame_stages)


def num_sampleable_frames(num_file_frames: int, file_frame_rate: float, config: DataConfig) -> int:
    """How many different moments of a file can be sampled as the config says."""
    if config.frame_sampling == "uniform":
        return num_file_frames
    return int((num_file_frames - 1) / file_frame_rate * config.sampling_rate + 1e-6) + 1


def sample_frame_indices(
    num_file_frames: int,
    file_frame_rate: float,
    num_frames: int,
    config: DataConfig,
    generator: torch.Generator,
    *,
    times: np.ndarray | None = None,
) -> tuple[torch.Tensor, int]:
    """Which frames of a file make the clip.

    Args:
        num_file_frames: Frames in the file.
        file_frame_rate: Its frames a second; the mean where they vary.
        num_frames: Frames of the clip.
        config: Says by what rule.
        generator: Chooses the start of random sampling, and the window of a temporal crop.
        times: Seconds from the first frame to each, where they vary: moments are spread in place of frames.

    Returns:
        Indices, non-decreasing, int64 `(num_frames,)`, and how many of them come before padding.
    """
    places, num_valid = _sample_places(num_file_frames, file_frame_rate, num_frames, config, generator)
    indices = nearest_frames(places, file_frame_rate, times).clamp(max=num_file_frames - 1)
    return torch.cat([indices, indices[-1:].expand(num_frames - num_valid)]), num_valid


def _sample_places(
    num_file_frames: int, file_frame_rate: float, num_frames: int, config: DataConfig, generator: torch.Generator
) -> tuple[torch.Tensor, int]:
    """Where the frames before padding lie in the file, in frames at its rate, float64, and how many they are."""
    num_valid = min(num_frames, num_sampleable_frames(num_file_frames, file_frame_rate, config))
    last = num_file_frames - 1
    if config.frame_sampling == "uniform":
        start, window = 0.0, float(last)
        if config.temporal_crop < 1:
            share, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            shortest = max(config.temporal_crop * last, num_valid - 1)  # no frame twice
            window = shortest + share * (last - shortest)
            start = place * (last - window)
        return torch.linspace(start, start + window, num_valid, dtype=torch.float64), num_valid
    places = torch.arange(num_valid, dtype=torch.float64) * file_frame_rate / config.sampling_rate
    if config.frame_sampling == "random":
        slack = last - float(places[-1])
        places += slack * torch.rand((), generator=generator, dtype=torch.float64)
    return places, num_valid


def sample_frame_seconds(
    num_file_frames: int,
    file_frame_rate: float,
    num_frames: int,
    config: DataConfig,
    generator: torch.Generator,
    *,
    is_even: bool,
) -> torch.Tensor:
    """When the frames of `sample_frame_indices` are shown in the file, without reading it.

    Args:
        num_file_frames: As there,
        file_frame_rate: as there,
        num_frames: as there,
        config: as there,
        generator: in the state that it has there.
        is_even: Whether the file has a constant rate. Where it varies, these are the moments that are sampled: at each
            the file shows the frame that is taken.

    Returns:
        Seconds from the first frame of the file, non-decreasing, float64 `(num_frames,)`.
    """
    places, num_valid = _sample_places(num_file_frames, file_frame_rate, num_frames, config, generator)
    places = (places.round() if is_even else places).clamp(max=num_file_frames - 1)
    return torch.cat([places, places[-1:].expand(num_frames - num_valid)]) / file_frame_rate


def last_frame_indices(
    num_file_frames: int, file_frame_rate: float, num_frames: int, frame_rate: float, times: np.ndarray | None = None
) -> torch.Tensor:
    """The last frames of a file at a rate, the last of all included; fewer if it has no more.

    Args:
        num_file_frames: Frames in the file.
        file_frame_rate: Its frames a second; the mean where they vary.
        num_frames: How many.
        frame_rate: How many a second.
        times: Seconds from the first frame to each, where they vary.

    Returns:
        Indices, non-decreasing, int64.
    """
    last = num_file_frames - 1
    count = min(num_frames, int(last / file_frame_rate * frame_rate + 1e-6) + 1)
    places = last - torch.arange(count - 1, -1, -1, dtype=torch.float64) * file_frame_rate / frame_rate
    return nearest_frames(places, file_frame_rate, times).clamp(0, last)


def nearest_frames(places: torch.Tensor, file_frame_rate: float, times: np.ndarray | None) -> torch.Tensor:
    """The frames at places between frames.

    At a constant rate a place is rounded. Where the rate varies it is a moment, and the frame on screen is taken, as a
    player shows it; the next one if that comes within half of a usual interval, as rounding does.

    Args:
        places: In frames at the rate, from 0 on, float64.
        file_frame_rate: Frames a second; the mean where they vary.
        times: Seconds from the first frame to each, where they vary.

    Returns:
        Indices, int64, like `places`.
    """
    if times is None:
        return places.round().long()
    steps = np.diff(times)
    early = np.minimum(steps, np.median(steps[steps > 0])) / 2
    starts = torch.from_numpy(times[1:] - early)
    return torch.searchsorted(starts, places / file_frame_rate, right=True)


# --- a clip, and videos that were made of it -------------------------------------------------------------------------


def check_same_frames(
    video: tuple[Video, VideoFacts], clip: tuple[Video, VideoFacts], limits: VideoLimits
) -> VideoFacts:
    """Checks that frame i of a video belongs to frame i of a clip, and shows the same part of the picture.

    Args:
        video: A file, and what is known of it.
        clip: Likewise.
        limits: What files may ask for.

    Returns:
        The video's facts with the clip's rate, so that the same frames are chosen of both.

    Raises:
        ValueError: If not.
        OSError, av.FFmpegError: If a file cannot be read.
    """
    facts, of_clip = video[1], clip[1]
    if facts.num_frames != of_clip.num_frames:
        raise ValueError(f"it must have the {of_clip.num_frames} frames of its clip, got {facts.num_frames}; {REMEDY}")
    if abs(facts.frame_rate / of_clip.frame_rate - 1) > MAX_DIFFERENCE and of_clip.num_frames > 1:
        raise ValueError(
            f"it must have the frame rate of its clip, {of_clip.frame_rate:g} a second, got {facts.frame_rate:g}; "
            f"{REMEDY}"
        )
    _check_times(video, clip, limits)
    size, size_of_clip = facts[2:4], of_clip[2:4]
    if _aspects_differ(size, size_of_clip):  # as stored, perhaps, and not as shown
        size, size_of_clip = (probe_video(file, limits=limits, as_shown=True)[2:4] for file in (video[0], clip[0]))
    if _aspects_differ(size, size_of_clip):
        raise ValueError(
            "it must have the aspect ratio of its clip, as both are cut to shape alike, but is {} x {}, and the clip "
            "{} x {}; ".format(*size, *size_of_clip)
            + REMEDY
        )
    varies = of_clip.traits & Traits.VARIABLE_RATE
    return facts._replace(frame_rate=of_clip.frame_rate, traits=facts.traits & ~Traits.VARIABLE_RATE | varies)


def _check_times(video: tuple[Video, VideoFacts], clip: tuple[Video, VideoFacts], limits: VideoLimits) -> None:
    """Checks that frames of the same number are those of the same moment, where the rate of either varies."""
    files = (video[0], clip[0])
    if not any(facts.traits & Traits.VARIABLE_RATE for _, facts in (video, clip)):
        return
    if any(isinstance(file, Path) and not file.exists() for file in files):  # known from a cache
        return
    times, of_clip = (read_frame_times(file, limits=limits) for file in files)
    if len(times) != len(of_clip) or abs(times - of_clip).max() > 0.5 / clip[1].frame_rate:
        raise ValueError(
            "it must show its frames when its clip does, but the frame rate of one of the two varies; convert the "
            "clip to a constant rate (ffmpeg -i clip.mp4 -fps_mode cfr -r 16 new.mp4), then make it of that, frame by "
            "frame"
        )


def _aspects_differ(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether (height, width) and another cannot be one picture in two sizes, each rounded to pixels."""
    (height, width), (other_height, other_width) = size, other
    tolerance = max(MAX_DIFFERENCE, 2 / min(*size, *other))
    return abs(height / width * other_width / other_height - 1) > tolerance
