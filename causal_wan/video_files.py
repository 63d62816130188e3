"""Video files: found below their folder, opened safely, probed and decoded with PyAV.

FFmpeg opens no file itself: it is handed an open one, and reads containers that hold their own pictures only.

Shapes: T = frames, height, width in pixels.
"""

import io
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import torch


# FFmpeg may also read playlists and lists of files; containers that hold their own pictures are all a clip needs.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,ogg,gif,asf,m4v,h264,hevc"


def resolve_path(video: str | None, base: Path) -> Path:
    """The file that a cell names.

    Raises:
        ValueError: If it is no path below the base folder, symlinks resolved, or no file.
    """
    if not (video or "").strip():
        raise ValueError("the path is empty")
    if ":" in video.split("/")[0]:
        raise ValueError("the path must name a file below dataset_base_path, not a URL or protocol")
    path = Path(os.path.realpath(base / video))  # Path.resolve raises RuntimeError where links go in a circle
    if not path.is_relative_to(base):
        raise ValueError("the path leaves dataset_base_path")
    if path.is_dir():
        raise ValueError("the path is a folder")
    if not path.exists():
        raise ValueError("the file does not exist")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    return path


@dataclass(frozen=True)
class EmbeddedVideo:
    """A clip whose bytes a `datasets` data set holds; opens like a path."""

    dataset: Any
    index: int
    column: str

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file."""
        value = self.dataset[self.index][self.column]
        return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)

    def __str__(self) -> str:
        return f"row {self.index + 1} of the data set"


def open_video(file: Any) -> av.container.InputContainer:
    """Opens a binary file object as a video; FFmpeg itself opens no file and reads no playlist."""
    return av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": ""})


def probe_video(video: Path | EmbeddedVideo) -> tuple[int, float, int, int]:
    """Frames that decode, frames a second, height and width of a file as stored.

    Raises:
        ValueError: If it has no video stream, no frames, or a codec that is not known.
    """
    with video.open("rb") as file, open_video(file) as container:
        if not container.streams.video:
            raise ValueError("the file has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("the video's codec is not known to FFmpeg")
        num_frames = count_frames(container, stream)
        if not num_frames:
            raise ValueError("the video has no frames")
        return num_frames, float(stream.average_rate or 0) or 16.0, stream.height, stream.width


def count_frames(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    """Frames that a stream shows: the header's count if its duration agrees, else by reading all packets.

    Clips that were cut without encoding anew hold frames that an edit list hides; the header counts these too.
    """
    shown = (stream.duration or 0) * stream.time_base * (stream.average_rate or 0)
    if stream.frames and abs(stream.frames - shown) < 0.5:
        return stream.frames
    return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def decode_frames(
    video: Path | EmbeddedVideo,
    indices: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor] = lambda frame: frame,
) -> torch.Tensor:
    """Decodes the frames at non-decreasing indices, in one pass that ends at the last of them.

    Args:
        video: The file.
        indices: int64 `(T,)`.
        transform: Applied to each frame, uint8 `(3, H, W)`, as it comes, so that few full-size frames are held.

    Returns:
        uint8 `(T, 3, H, W)`.

    Raises:
        ValueError: If the file ends before the last index.
        av.FFmpegError: If it is damaged.
    """
    wanted = Counter(indices.tolist())
    frames: list[torch.Tensor] = []
    with video.open("rb") as file, open_video(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(-1, 0)
                picture = torch.rot90(picture, round(frame.rotation / 90), dims=(-2, -1))  # as a phone was held
                frames += [transform(picture)] * wanted[index]
            if len(frames) == len(indices):
                return torch.stack(frames)
    raise ValueError(f"{video} ends before frame {int(indices[-1])}, which its header promises; encode it anew.")


def describe_error(error: Exception) -> str:
    """What is wrong with a file, in words."""
    if isinstance(error, av.FFmpegError):
        return f"not a video that can be read ({error.strerror})"
    return str(error)
