"""What a video file may ask for."""

from causal_wan.config.ranges import (
    PositiveFloat,
    PositiveInt,
    checked_dataclass,
)


@checked_dataclass
class VideoLimits:
    """What a video file may ask for at most, so that none takes all memory or time."""

    max_video_pixels: PositiveInt = 8192 * 4320
    """Pixels of a frame of a file; the default allows 8K."""
    max_video_frames: PositiveInt = 1_000_000
    """Frames of a file."""
    max_video_seconds: PositiveFloat = 6 * 3600.0
    """Duration of a file."""
    decode_timeout: PositiveFloat = 300.0
    """Seconds that decoding one clip may take; uniform and random sampling decode files to their end."""


DEFAULT_LIMITS = VideoLimits()
