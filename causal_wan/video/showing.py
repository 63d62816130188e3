"""Frames as a player shows them: with square pixels, turned and mirrored as their file says.

Shapes: height, width in pixels.
"""

from fractions import Fraction

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer

from causal_wan.video.limits import VideoLimits


MAX_ASPECT = 16  # of a pixel; those of broadcasts and discs are between 1:2 and 3:1


def shown_size(stream: av.video.stream.VideoStream, limits: VideoLimits) -> tuple[int, int]:
    """Height and width of a stream's frames with square pixels, before they are turned: lines are kept.

    Raises:
        ValueError: If that is more than the limits allow, or pixels are more than 16 times as long as wide.
    """
    width = _squared_width(stream.width, pixel_aspect(stream))
    limits.check_pixels(stream.height, width)
    return stream.height, width


def pixel_aspect(stream: av.video.stream.VideoStream) -> Fraction:
    """Width of a pixel by its height.

    Raises:
        ValueError: If one is more than 16 times the other.
    """
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise ValueError(
            f"pixels must be at most {MAX_ASPECT} times as wide as high or as high as wide, but the header says "
            f"{aspect.numerator}:{aspect.denominator}; encode the video anew with square ones"
        )
    return aspect


def _squared_width(width: int, aspect: Fraction) -> int:
    return max(1, round(width * aspect))


def show_frame(
    frame: av.VideoFrame, aspect: Fraction, limits: VideoLimits, *, opacity: av.VideoFrame | None = None
) -> torch.Tensor:
    """A frame as a player shows it, uint8 `(3, height, width)`, with the channels last in memory.

    Args:
        frame: As it was decoded.
        aspect: Width of its pixels by their height.
        limits: For the size with square pixels.
        opacity: A grey frame of the same size, where a file has it as a stream of its own.
    """
    width = _squared_width(frame.width, aspect)
    scaling = {}
    if width != frame.width:
        limits.check_pixels(frame.height, width)
        scaling = {"width": width, "height": frame.height, "interpolation": "BICUBIC"}
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", **scaling)
    if opacity is not None:
        pixels = np.dstack([pixels[..., :3], opacity.to_ndarray(format="gray", **scaling)])
    return _turn(torch.from_numpy(lay_on_white(pixels)).movedim(-1, 0), display_matrix(frame))


def lay_on_white(pixels: np.ndarray) -> np.ndarray:
    """Pixels (height, width, 3 or 4) in uint8, the fourth how opaque they are -> (height, width, 3) before white."""
    if pixels.shape[-1] == 3:
        return pixels
    colours, opacity = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    if opacity.min() == 255:
        return np.ascontiguousarray(colours)
    return ((colours * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def _turn(picture: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """A picture `(3, height, width)` whose point (x, y) goes to (x, y) @ matrix, that is turned and mirrored."""
    if np.abs(matrix[0, 1]) > np.abs(matrix[0, 0]):
        picture, matrix = picture.transpose(-2, -1), matrix[::-1]
    mirrored = [axis for axis, factor in ((-1, matrix[0, 0]), (-2, matrix[1, 1])) if factor < 0]
    return picture.flip(mirrored) if mirrored else picture


def is_mirrored(matrix: np.ndarray) -> bool:
    """Whether a matrix shows writing the wrong way round."""
    return bool(np.linalg.det(matrix) < 0)


def display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """The (2, 2) matrix by which points (x, y) of a frame are turned and mirrored; upright is the identity."""
    try:
        # The frame's own `side_data` refers back to it, so that its pixels would wait for the garbage collector.
        data = SideDataContainer(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV refuses all side data where it does not know one kind, such as EXIF
        angle = np.deg2rad(frame.rotation)
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if data is None:
        return np.eye(2)
    return np.frombuffer(bytes(data), "=i4").reshape(3, 3)[:2, :2] / 2.0**16
