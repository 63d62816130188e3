"""Video files, opened safely, are probed and decoded with PyAV.

Shapes: T = frames, height, width in pixels.
"""

import contextlib
import functools
import gc
import itertools
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NoReturn

import av
import torch
from av.video.reformatter import ColorTrc

from causal_wan.video.facts import NO_TRAITS, Traits, VideoFacts
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import PictureError, Video, find_opacity, open_video
from causal_wan.video.packets import end_error, read_frames
from causal_wan.video.pictures import read_picture
from causal_wan.video.showing import display_matrix, is_mirrored, pixel_aspect, show_frame, shown_size
from causal_wan.video.timing import UNKNOWN_RATE, read_timing


# What is garbage when a process forks is left alone by the fork: to free a frame there would wait for ever for threads
# of FFmpeg's scaler, which only the process before has.
os.register_at_fork(after_in_child=gc.freeze)

HDR_TRANSFERS = {ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67}  # PQ and HLG
PROGRESSIVE = 1  # FFmpeg's field orders: 0 is unknown, those above have two fields


def probe_video(video: Video, *, limits: VideoLimits = DEFAULT_LIMITS, as_shown: bool = False) -> VideoFacts:
    """What is known of a file without decoding it.

    Args:
        video: The file.
        limits: What it may ask for.
        as_shown: Whether height and width are those of frames turned upright, and mirrored ones are told; takes
            decoding one. Else only pixels are square.

    Raises:
        ValueError: If it has no video stream, no frames, a codec that is not known, or asks for more than the limits.
        av.FFmpegError: If it is no video.
    """
    try:
        with open_video(video, limits) as (container, stream):
            timing = read_timing(video, container, stream, limits)
            if not timing.num_frames:
                raise ValueError("the video has no frames")
            traits, size = timing.traits | _traits_of(container, stream), shown_size(stream, limits)
            if size != (stream.height, stream.width):
                traits |= Traits.NON_SQUARE_PIXELS
    except PictureError:
        return VideoFacts(1, UNKNOWN_RATE, *read_picture(video, limits).shape[-2:], Traits.PICTURE)
    if as_shown:
        size, more = _look_at_first_frame(video, limits)
        traits |= more
    return VideoFacts(timing.num_frames, timing.frame_rate, *size, traits)


def _traits_of(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Traits:
    """What the header tells of a stream."""
    found = {
        Traits.OTHER_STREAM: stream.index != container.streams.video[0].index,
        Traits.HIGH_DYNAMIC_RANGE: stream.codec_context.color_trc in HDR_TRANSFERS,
        Traits.INTERLACED: stream.codec_context.field_order > PROGRESSIVE,
    }
    return functools.reduce(operator.or_, (trait for trait, is_so in found.items() if is_so), NO_TRAITS)


def _look_at_first_frame(video: Video, limits: VideoLimits) -> tuple[tuple[int, int], Traits]:
    """Height and width as shown, and what a frame alone tells."""
    with open_video(video, limits) as (container, stream):
        aspect = pixel_aspect(stream)
        frame = next(read_frames(container, stream, limits), None)
        if frame is None:
            raise end_error(video, 0, who="is the first")
        traits = Traits.MIRRORED if is_mirrored(display_matrix(frame)) else NO_TRAITS
        traits |= Traits.INTERLACED if frame.interlaced_frame else NO_TRAITS
        traits |= Traits.HIGH_DYNAMIC_RANGE if frame.color_trc in HDR_TRANSFERS else NO_TRAITS
        return show_frame(frame, aspect, limits).shape[-2:], traits


def decode_frames(
    video: Video,
    indices: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda frame: frame,
    *,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> torch.Tensor:
    """Decodes the frames at non-decreasing indices as a player shows them, in one pass that ends at the last.

    Args:
        video: The file.
        indices: int64 `(T,)`.
        transform: Applied to each frame, uint8 `(3, H, W)`, as it comes, so that few full-size frames are held.
        limits: What the file may ask for.

    Returns:
        uint8 `(T, 3, H, W)`.

    Raises:
        ValueError: If the file ends before the last index, is damaged there, or asks for more than the limits.
        av.FFmpegError: If it is no video.
    """
    wanted = Counter(indices.tolist())
    frames: list[torch.Tensor] = []
    with contextlib.closing(_shown_frames(video, limits)) as shown:
        for index, show in enumerate(shown):
            if index in wanted:
                # Left with the channels last, as they come: to move them takes as long as decoding.
                frames += [transform(show()).movedim(0, -1)] * wanted[index]
            if len(frames) == len(indices):
                return torch.stack(frames).movedim(-1, 1)
    raise end_error(video, int(indices[-1]), who="is wanted of it")


def _refuse_damaged(index: int) -> NoReturn:
    raise ValueError(
        f"frame {index} is damaged: the decoder makes up what is missing of it, or of one that it leans on; copy or "
        "download the video again, or encode it anew"
    )


def _shown_frames(video: Video, limits: VideoLimits) -> Iterator[Callable[[], torch.Tensor]]:
    """What gives each frame, uint8 `(3, H, W)`, for those that are wanted."""
    try:
        with open_video(video, limits) as (container, stream):
            aspect, is_damaged = pixel_aspect(stream), False
            frames = read_frames(container, stream, limits)
            opacities = itertools.repeat(None)
            if find_opacity(container, stream) is not None:
                opacities = _read_opacities(video, limits)
            for index, (frame, opacity) in enumerate(zip(frames, opacities, strict=False)):
                is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
                if is_damaged or (opacity is not None and opacity.is_corrupt):
                    yield functools.partial(_refuse_damaged, index)
                else:
                    yield functools.partial(show_frame, frame, aspect, limits, opacity=opacity)
    except PictureError:
        yield functools.partial(read_picture, video, limits)


def _read_opacities(video: Video, limits: VideoLimits) -> Iterator[av.VideoFrame]:
    """Frames that say how opaque those of an AVIF are; another container reads them, as each goes through its file."""
    with open_video(video, limits) as (container, stream):
        yield from read_frames(container, find_opacity(container, stream), limits)
