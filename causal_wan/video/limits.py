"""What a video file may ask for."""

from causal_wan.config.ranges import PositiveFloat, PositiveInt, checked_dataclass


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

    def check_pixels(self, height: int, width: int) -> None:
        """Checks the size of a frame.

        Raises:
            ValueError: If it is too large.
        """
        if height * width > self.max_video_pixels:
            raise ValueError(
                f"frames must have at most max_video_pixels={self.max_video_pixels} pixels, got {height} x {width}; "
                "scale the video down, or raise --max_video_pixels"
            )

    def check_frames(self, num_frames: int) -> None:
        """Checks how many frames a file has, as far as they were counted.

        Raises:
            ValueError: If they are too many.
        """
        if num_frames > self.max_video_frames:
            raise ValueError(
                f"a file must have at most max_video_frames={self.max_video_frames} frames, got {num_frames} or more; "
                "cut it, or raise --max_video_frames"
            )

    def check_seconds(self, seconds: float) -> None:
        """Checks how long a file lasts.

        Raises:
            ValueError: If that is too long.
        """
        if seconds > self.max_video_seconds:
            raise ValueError(
                f"a file must last at most max_video_seconds={self.max_video_seconds:g}, got {seconds:.0f}; cut it, "
                "or raise --max_video_seconds"
            )

    def timeout_error(self) -> ValueError:
        """What is wrong with a file that takes too long."""
        return ValueError(
            f"reading it took longer than decode_timeout={self.decode_timeout:g} seconds; cut or scale down the "
            "video, or raise --decode_timeout"
        )


DEFAULT_LIMITS = VideoLimits()
