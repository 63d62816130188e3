"""Pictures in the place of videos: told by how their files begin, and read as clips of one frame."""

import warnings
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import Video, picture_kind
from causal_wan.video.showing import lay_on_white


READ_AS_CLIPS = ("PNG", "JPEG", "WebP")


def read_picture(video: Video, limits: VideoLimits) -> torch.Tensor:
    """A picture as a viewer shows it, turned as its EXIF says, on white, uint8 `(3, height, width)`.

    The channels are last in memory.

    Raises:
        ValueError: If it is of a kind that is not read, moves, is damaged, or has more pixels than the limits allow.
    """
    with video.open("rb") as file:
        kind = picture_kind(file)
        if kind not in READ_AS_CLIPS:
            raise ValueError(
                f"a {kind} picture and not a video that can be read; pictures may be {', '.join(READ_AS_CLIPS)}"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is below or meant
                return _read(file, kind, limits)
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"a {kind} picture that cannot be read ({error})") from error


def _read(file: BinaryIO, kind: str, limits: VideoLimits) -> torch.Tensor:
    file.seek(0)
    with PIL.Image.open(file, formats=[kind.upper()]) as picture:
        limits.check_pixels(picture.height, picture.width)
        if kind != "JPEG" and picture.is_animated:
            raise ValueError(f"a {kind} picture that moves and not a video that can be read; save it as mp4")
        if picture.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
            return torch.from_numpy(np.asarray(picture) >> 8).to(torch.uint8).expand(3, -1, -1)
        upright = PIL.ImageOps.exif_transpose(picture)
        shown = np.array(upright.convert("RGBA" if upright.has_transparency_data else "RGB"))
    return torch.from_numpy(lay_on_white(shown)).movedim(-1, 0)
