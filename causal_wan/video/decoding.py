"""Video files, opened safely, are probed and decoded with PyAV.

Shapes: T = frames, height, width in pixels.
"""

from collections import Counter
from collections.abc import Callable

import torch

from causal_wan.video.facts import VideoFacts
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import Video, open_video
from causal_wan.video.packets import read_frames
from causal_wan.video.timing import read_timing


def probe_video(video: Video, *, limits: VideoLimits = DEFAULT_LIMITS, as_shown: bool = False) -> VideoFacts:
    """What is known of a file without decoding it.

    Args:
        video: The file.
        limits: What it may ask for.
        as_shown: Whether height and width are those of frames turned upright; takes decoding one. Else as stored.

    Raises:
        ValueError: If it has no video stream, no frames, a codec that is not known, or asks for more than the limits.
        av.FFmpegError: If it is no video.
    """
    with open_video(video, limits) as (container, stream):
        timing = read_timing(container, stream, limits)
        if not timing.num_frames:
            raise ValueError("the video has no frames")
        size = stream.height, stream.width
    if as_shown:
        size = decode_frames(video, torch.tensor([0]), limits=limits).shape[-2:]
    return VideoFacts(timing.num_frames, timing.frame_rate, *size, timing.traits)


def decode_frames(
    video: Video,
    indices: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda frame: frame,
    *,
    limits: VideoLimits = DEFAULT_LIMITS,
) -> torch.Tensor:
    """Decodes the frames at non-decreasing indices, in one pass that ends at the last of them.

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
        for index, frame in enumerate(read_frames(container, stream, limits)):
            if index in wanted:
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
                if frame.rotation:  # as a phone was held
                    picture = torch.rot90(picture, round(frame.rotation / 90), dims=(-2, -1))
                # Left with the channels last, as they come: to move them takes as long as decoding.
                frames += [transform(picture).movedim(0, -1)] * wanted[index]
            if len(frames) == len(indices):
                return torch.stack(frames).movedim(-1, 1)
    raise ValueError(f"{video} ends before frame {int(indices[-1])}, which its header promises; encode it anew.")
