"""Whether two videos show the same frames: a clip, and one that was made of it."""

from pathlib import Path

from causal_wan.video.decoding import probe_video
from causal_wan.video.facts import Traits, VideoFacts
from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import Video
from causal_wan.video.timing import read_frame_times


MAX_DIFFERENCE = 0.01  # of rates, and of aspect ratios
REMEDY = "make it of the clip, frame by frame"


def check_same_frames(
    video: tuple[Video, VideoFacts], clip: tuple[Video, VideoFacts], limits: VideoLimits
) -> VideoFacts:
    """Checks that frame i of a video belongs to frame i of a clip, and shows the same part of the picture.

    Args:
        video: A file, and what is known of it.
        clip: Likewise.
        limits: What files may ask for.

    Returns:
        The video's facts with the clip's rate, so that the same frames are chosen of both.

    Raises:
        ValueError: If not.
        OSError, av.FFmpegError: If a file cannot be read.
    """
    facts, of_clip = video[1], clip[1]
    if facts.num_frames != of_clip.num_frames:
        raise ValueError(f"it must have the {of_clip.num_frames} frames of its clip, got {facts.num_frames}; {REMEDY}")
    if abs(facts.frame_rate / of_clip.frame_rate - 1) > MAX_DIFFERENCE and of_clip.num_frames > 1:
        raise ValueError(
            f"it must have the frame rate of its clip, {of_clip.frame_rate:g} a second, got {facts.frame_rate:g}; "
            f"{REMEDY}"
        )
    _check_times(video, clip, limits)
    size, size_of_clip = facts[2:4], of_clip[2:4]
    if _aspects_differ(size, size_of_clip):  # as stored, perhaps, and not as shown
        size, size_of_clip = (probe_video(file, limits=limits, as_shown=True)[2:4] for file in (video[0], clip[0]))
    if _aspects_differ(size, size_of_clip):
        raise ValueError(
            "it must have the aspect ratio of its clip, as both are cut to shape alike, but is {} x {}, and the clip "
            "{} x {}; ".format(*size, *size_of_clip)
            + REMEDY
        )
    varies = of_clip.traits & Traits.VARIABLE_RATE
    return facts._replace(frame_rate=of_clip.frame_rate, traits=facts.traits & ~Traits.VARIABLE_RATE | varies)


def _check_times(video: tuple[Video, VideoFacts], clip: tuple[Video, VideoFacts], limits: VideoLimits) -> None:
    """Checks that frames of the same number are those of the same moment, where the rate of either varies."""
    files = (video[0], clip[0])
    if not any(facts.traits & Traits.VARIABLE_RATE for _, facts in (video, clip)):
        return
    if any(isinstance(file, Path) and not file.exists() for file in files):  # known from a cache
        return
    times, of_clip = (read_frame_times(file, limits=limits) for file in files)
    if len(times) != len(of_clip) or abs(times - of_clip).max() > 0.5 / clip[1].frame_rate:
        raise ValueError(
            "it must show its frames when its clip does, but the frame rate of one of the two varies; convert the "
            "clip to a constant rate (ffmpeg -i clip.mp4 -fps_mode cfr -r 16 new.mp4), then make it of that, frame by "
            "frame"
        )


def _aspects_differ(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether (height, width) and another cannot be one picture in two sizes, each rounded to pixels."""
    (height, width), (other_height, other_width) = size, other
    tolerance = max(MAX_DIFFERENCE, 2 / min(*size, *other))
    return abs(height / width * other_width / other_height - 1) > tolerance
