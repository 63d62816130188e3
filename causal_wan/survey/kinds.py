"""Files that are out of the ordinary: how many there are, how each is read, and what to do about it."""

from typing import NamedTuple

import numpy as np

from causal_wan.video.facts import Traits


class Kind(NamedTuple):
    """What files have in common, in words that a count follows; how they are read; and what may be done about it."""

    trait: Traits
    name: str
    reading: str
    advice: str = ""


KINDS = (
    Kind(
        Traits.VARIABLE_RATE,
        "Clips whose frame rate varies",
        "Frames are chosen by the time at which they are shown.",
    ),
    Kind(
        Traits.OTHER_RATE,
        "Clips whose header states another frame rate than their timestamps",
        "The timestamps are believed.",
    ),
    Kind(
        Traits.NON_SQUARE_PIXELS,
        "Clips whose pixels are not square",
        "They are scaled in width; sizes here and buckets are those after.",
    ),
    Kind(
        Traits.LATE_KEY_FRAME,
        "Clips that do not begin with a key frame",
        "They are read from the first one on, where players begin; what is before cannot be decoded.",
        "Cut clips at key frames, or encode them anew.",
    ),
    Kind(
        Traits.OTHER_STREAM,
        "Files whose first video stream is not the best",
        "The default stream is read, of several the one of most pixels; never cover art.",
    ),
    Kind(
        Traits.HIGH_DYNAMIC_RANGE,
        "HDR clips (PQ or HLG)",
        "They are read without tone mapping, and look pale.",
        "Convert them to SDR with FFmpeg's filters zscale and tonemap.",
    ),
    Kind(
        Traits.INTERLACED,
        "Interlaced clips",
        "Both fields are shown at once, so moving edges are combed.",
        "Deinterlace them with FFmpeg's filter bwdif.",
    ),
    Kind(Traits.PICTURE, "Pictures", "They are clips of one frame."),
    Kind(Traits.MIRRORED, "Clips that their header mirrors", "They are mirrored, as players do."),
)


class FoundKind(NamedTuple):
    """A kind, and how many files are of it."""

    kind: Kind
    count: int

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.kind.name}: {self.count:,}.", self.kind.reading, self.kind.advice]))


def find_kinds(traits: np.ndarray) -> list[FoundKind]:
    """The kinds that there are among files with these traits, uint `(num_files,)`."""
    counts = [FoundKind(kind, int(np.count_nonzero(traits & np.uint32(kind.trait)))) for kind in KINDS]
    return [found for found in counts if found.count]
