"""What is known of a video file before its frames are decoded."""

import enum
from typing import NamedTuple


class Traits(enum.IntFlag):
    """What is out of the ordinary in a file. Numbers are kept in manifests and records: they never change."""

    VARIABLE_RATE = 1  # frames are chosen by their timestamps
    OTHER_RATE = 2  # constant, but another than the header states
    NON_SQUARE_PIXELS = 4
    MIRRORED = 8  # as shown; as the header says
    LATE_KEY_FRAME = 16  # begins with frames that nothing decodes
    OTHER_STREAM = 32  # not the first video stream of the file is read
    HIGH_DYNAMIC_RANGE = 64
    INTERLACED = 128
    PICTURE = 256  # a clip of one frame
    UNKNOWN = 1 << 15  # of a file that is gone, and that was noted before traits were


NO_TRAITS = Traits(0)
# Frames of such files were chosen or shown otherwise before these traits were noted.
CHANGED_TRAITS = (
    Traits.VARIABLE_RATE | Traits.OTHER_RATE | Traits.NON_SQUARE_PIXELS | Traits.MIRRORED | Traits.OTHER_STREAM
)


class VideoFacts(NamedTuple):
    """Frames that decode, frames a second (the mean where it varies), pixels, and what is out of the ordinary."""

    num_frames: int
    frame_rate: float
    height: int
    width: int
    traits: Traits = NO_TRAITS
