"""Video files: found below their folder, opened safely, probed and decoded with PyAV.

A file may come from anyone. FFmpeg opens none itself: it is handed an open one, and reads containers that hold their
own pictures only. What a file may ask for is limited, whatever its header says.

Shapes: T = frames, height, width in pixels.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import av
import torch

from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import Video, _check_frames, _check_pixels, _check_seconds, _timeout_error, open_video


# --- finding ---------------------------------------------------------------------------------------------------------


# --- opening ---------------------------------------------------------------------------------------------------------


# --- reading ---------------------------------------------------------------------------------------------------------


def probe_video(
    video: Video, *, limits: VideoLimits = DEFAULT_LIMITS, as_shown: bool = False
) -> tuple[int, float, int, int]:
    """Frames that decode, frames a second, height and width of a file.

    Args:
        video: The file.
        limits: What it may ask for.
        as_shown: Whether height and width are those of frames turned upright; takes decoding one. Else as stored.

    Raises:
        ValueError: If it has no video stream, no frames, a codec that is not known, or asks for more than the limits.
        av.FFmpegError: If it is no video.
    """
    with open_video(video, limits) as (container, stream):
        num_frames = count_frames(container, stream, limits)
        if not num_frames:
            raise ValueError("the video has no frames")
        facts = num_frames, float(stream.average_rate or 0) or 16.0
        size = stream.height, stream.width
    return *facts, *(decode_frames(video, torch.tensor([0]), limits=limits).shape[-2:] if as_shown else size)


def count_frames(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> int:
    """Frames that a stream shows: the header's count if its duration agrees, else by reading all packets.

    Clips that were cut without encoding anew hold frames that an edit list hides; the header counts these too.
    """
    shown = (stream.duration or 0) * stream.time_base * (stream.average_rate or 0)
    if stream.frames and abs(stream.frames - shown) < 0.5:
        return stream.frames
    num_frames = 0
    for packet in _read_packets(container, stream, limits):
        num_frames += bool(packet.size and not packet.is_discard)
        _check_frames(num_frames, limits)
    return num_frames


def _read_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> Iterator[av.Packet]:
    """Packets of a stream, as long as time and duration allow."""
    deadline, first = time.monotonic() + limits.decode_timeout, None
    for packet in container.demux(stream):
        if time.monotonic() > deadline:
            raise _timeout_error(limits)
        if packet.dts is not None:
            first = packet.dts if first is None else first
            _check_seconds(float((packet.dts - first) * packet.time_base), limits)
        yield packet


def _read_frames(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> Iterator[av.VideoFrame]:
    """Frames of a stream, as long as the limits allow."""
    num_frames = 0
    for packet in _read_packets(container, stream, limits):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            raise ValueError(
                f"a frame does not decode ({error.strerror}): the file is damaged, or the frame has more than "
                f"max_video_pixels={limits.max_video_pixels} pixels"
            ) from error
        for frame in frames:
            num_frames += 1
            _check_frames(num_frames, limits)
            _check_pixels(frame.height, frame.width, limits)
            yield frame


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
        for index, frame in enumerate(_read_frames(container, stream, limits)):
            if index in wanted:
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
                if frame.rotation:  # as a phone was held
                    picture = torch.rot90(picture, round(frame.rotation / 90), dims=(-2, -1))
                # Left with the channels last, as they come: to move them takes as long as decoding.
                frames += [transform(picture).movedim(0, -1)] * wanted[index]
            if len(frames) == len(indices):
                return torch.stack(frames).movedim(-1, 1)
    raise ValueError(f"{video} ends before frame {int(indices[-1])}, which its header promises; encode it anew.")
