"""Videos -> mp4 files, whole or frame by frame."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import av
import imageio.v3 as iio
import numpy as np
import torch

from causal_wan.geometry import FRAME_RATE


def as_frames(video: torch.Tensor) -> np.ndarray:
    """A video in [-1, 1], `(3, T, height, width)` -> uint8 frames `(T, height, width, 3)`."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def write_video(path: str | Path, video: torch.Tensor, frame_rate: float = FRAME_RATE) -> None:
    """Writes a video in [-1, 1], `(3, T, height, width)`, as H.264 mp4."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, as_frames(video), plugin="pyav", codec="libx264", fps=frame_rate, out_pixel_format="yuv420p")


class VideoWriter:
    """Writes an H.264 mp4 as its frames come, in memory that does not grow with it.

    Args:
        path: Of the file, whose folder is made; or, if it is fragmented, anything to write bytes to.
        frame_rate: Frames a second.
        fragmented: Whether the file can be played while it is written, and what there is of it after a kill: all but
            the last frame is on the disk when `write` returns.
    """

    def __init__(
        self, path: str | Path | BinaryIO, frame_rate: float = FRAME_RATE, *, fragmented: bool = False
    ) -> None:
        if isinstance(path, str | Path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            path = str(path)
        self.frame_rate = Fraction(frame_rate).limit_denominator(1001)
        # Frames are shown in the order they are coded in, so that none waits for a later one.
        self._options = {"tune": "zerolatency"} if fragmented else {}
        flags = "empty_moov+default_base_moof+frag_every_frame" if fragmented else "faststart"
        options = {"movflags": flags, "flush_packets": "1"}
        self._container = av.open(path, "w", format="mp4", options=options)
        self._stream: av.VideoStream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._mux(self._stream.encode())
        self._container.close()

    def write(self, frames: np.ndarray) -> None:
        """Adds uint8 frames `(t, height, width, 3)`; height and width are even, and those of the frames before."""
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self.frame_rate, options=self._options)
            self._stream.height, self._stream.width = frames.shape[1:3]
            self._stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=self._stream.pix_fmt)
            self._mux(self._stream.encode(picture))

    def _mux(self, packets: Iterable[av.Packet]) -> None:
        for packet in packets:
            self._container.mux(packet)
