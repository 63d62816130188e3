"""Video files, opened safely, are probed and decoded with PyAV.

Shapes: T = frames, height, width in pixels.
"""

from collections import Counter
from collections.abc import Callable

import torch

from causal_wan.video.facts import NO_TRAITS, Traits, VideoFacts
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import Video, open_video
from causal_wan.video.packets import read_frames
from causal_wan.video.showing import display_matrix, is_mirrored, pixel_aspect, show_frame, shown_size
from causal_wan.video.timing import read_timing


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
    with open_video(video, limits) as (container, stream):
        timing = read_timing(video, container, stream, limits)
        if not timing.num_frames:
            raise ValueError("the video has no frames")
        traits, size = timing.traits, shown_size(stream, limits)
        if size != (stream.height, stream.width):
            traits |= Traits.NON_SQUARE_PIXELS
    if as_shown:
        size, is_mirrored = _look_at_first_frame(video, limits)
        traits |= Traits.MIRRORED if is_mirrored else NO_TRAITS
    return VideoFacts(timing.num_frames, timing.frame_rate, *size, traits)


def _look_at_first_frame(video: Video, limits: VideoLimits) -> tuple[tuple[int, int], bool]:
    """Height and width as shown, and whether the file says to mirror it."""
    with open_video(video, limits) as (container, stream):
        aspect = pixel_aspect(stream)
        frame = next(read_frames(container, stream, limits), None)
        if frame is None:
            raise _end_error(video, 0)
        return show_frame(frame, aspect, limits).shape[-2:], is_mirrored(display_matrix(frame))


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
        ValueError: If the file ends before the last index, is damaged, or asks for more than the limits.
        av.FFmpegError: If it is no video.
    """
    wanted = Counter(indices.tolist())
    frames: list[torch.Tensor] = []
    with open_video(video, limits) as (container, stream):
        aspect = pixel_aspect(stream)
        for index, frame in enumerate(read_frames(container, stream, limits)):
            if index in wanted:
                picture = show_frame(frame, aspect, limits)
                # Left with the channels last, as they come: to move them takes as long as decoding.
                frames += [transform(picture).movedim(0, -1)] * wanted[index]
            if len(frames) == len(indices):
                return torch.stack(frames).movedim(-1, 1)
    raise _end_error(video, int(indices[-1]))


def _end_error(video: Video, index: int) -> ValueError:
    return ValueError(f"{video} ends before frame {index}, which its header promises; encode it anew.")
