"""When the frames of a video are shown, told by its header if that can tell, else by its packets, without decoding.

The header of an mp4 lists when each frame is decoded, so a constant rate costs a look at that list and at two packets:
0.2 ms more for a clip of 100 frames, 2 ms for one of 5000. Other containers have no such list, and their packets are
read to be counted anyway.
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.index import IndexEntry

from causal_wan.video.facts import NO_TRAITS, Traits
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.opening import ENDLESS, STREAMED, Video, open_video
from causal_wan.video.packets import end_error, read_frames, read_packets
from causal_wan.video.structure import asf_seconds, is_cut, is_whole_frame


UNKNOWN_RATE = 16.0  # of files that neither state one nor have timestamps
STATING_SIZES = ("matroska,webm", "avi", "asf", "flv", "ogg")  # containers of which `is_cut` knows; and mp4
STATING_THEIR_OWN_DURATION = ("matroska,webm", "asf")  # FFmpeg may call it that of a stream
MAX_DELAY = 16  # frames that a decoder holds back at most, until those to be shown before them have come
SLACK = 0.25  # of an interval: how far a frame may be off its place at a constant rate


class Stamp(NamedTuple):
    """Timestamps and duration of a frame, in units of the stream's time base; None where they are missing."""

    pts: int | None
    dts: int | None
    duration: int | None


@dataclass(frozen=True)
class Timing:
    """When the frames of a video are shown.

    Args:
        num_frames: Frames that decode.
        frame_rate: Frames a second. Where it varies, the mean from the first frame to the last moment: that is as long
            before the end as a frame is usually shown.
        times: Seconds from the first frame to each, float64 `(num_frames,)`, where the rate varies; else None.
        traits: What is out of the ordinary.
    """

    num_frames: int
    frame_rate: float
    times: np.ndarray | None = None
    traits: Traits = NO_TRAITS


def read_frame_times(video: Video, *, limits: VideoLimits = DEFAULT_LIMITS) -> np.ndarray:
    """Seconds from the first frame of a file to each, in the order in which they are shown, float64 `(num_frames,)`.

    Raises:
        ValueError, av.FFmpegError: As `probe_video`.
    """
    with open_video(video, limits) as (container, stream):
        timing = read_timing(video, container, stream, limits)
    return np.arange(timing.num_frames) / timing.frame_rate if timing.times is None else timing.times


def read_timing(
    video: Video, container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> Timing:
    """When the frames of a video are shown that has just been opened.

    Clips that were cut without encoding anew hold frames that an edit list hides; they are none of these. Nor are
    frames that cannot be decoded, because the first key frame comes after them: players begin there, too. Only such
    files are decoded to be counted.

    Raises:
        ValueError: If the file was cut, so that frames are missing, or asks for more than the limits.
    """
    _check_index(video, container, stream)
    rate, end = float(stream.average_rate or 0), _end_by_header(container, stream)
    packets = (packet for packet in read_packets(container, stream, limits) if packet.size)
    first = list(itertools.islice(packets, 2))
    traits = NO_TRAITS if not first or first[0].is_keyframe else Traits.LATE_KEY_FRAME
    if traits or _has_leading_frames(first):
        stamps = _decoded_stamps(video, limits)
    elif _is_constant_by_header(stream, rate):
        return Timing(stream.frames, rate)
    else:
        stamps, tail = [], []
        for packet in itertools.chain(first, packets):
            if not packet.is_discard:
                stamps.append(Stamp(packet.pts, packet.dts, packet.duration))
                limits.check_frames(len(stamps))
            tail = [packet] if packet.is_keyframe or container.format.name not in ENDLESS else [*tail, packet]
        is_torn = bool(stamps) and not is_whole_frame(bytes(packet), container.format.name)
        if container.format.name in ENDLESS:
            whole = _whole_stamps(stamps, int(is_torn) or _count_torn(stream, tail), container.format.name)
            stamps, end = whole, end if len(whole) == len(stamps) else None
        elif is_torn or (stamps and packet.is_corrupt):
            raise end_error(video, len(stamps) - 1)
    timing = time_frames(stamps, rate or UNKNOWN_RATE, float(stream.time_base), end=end)
    with video.open("rb") as file:
        stated, last = _stated_seconds(container, stream, file), _last_time(stamps, stream)
        if not _is_complete(container, stream, timing, last=last, stated=stated) and is_cut(file):
            raise end_error(video, len(stamps))
    limits.check_seconds((timing.num_frames - 1) / timing.frame_rate)
    return replace(timing, traits=timing.traits | traits)


def _check_index(video: Video, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> None:
    """Checks that the frames of an mp4 or mov lie in the file, as its index says."""
    index, size = stream.index_entries, container.size
    if "mp4" not in container.format.name or not len(index) or _end_of(index[len(index) - 1]) <= size:
        return
    raise end_error(video, sum(_end_of(entry) <= size for entry in index))


def _end_of(entry: IndexEntry) -> int:
    return entry.pos + entry.size


def _stated_seconds(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, file: BinaryIO
) -> float:
    """When the file ends as its header says, 0 if it says nothing."""
    if container.format.name == "avi" and stream.average_rate:
        return stream.frames / float(stream.average_rate)
    if container.format.name == "asf":  # FFmpeg adds the first timestamp, and knows none of a file that was cut
        return asf_seconds(file)
    return (container.duration or 0) / av.time_base


def _is_complete(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    timing: Timing,
    *,
    last: float,
    stated: float,
) -> bool:
    """Whether no frame is missing before the end that the header states; also where nothing can be said of that.

    Args:
        container: Of the file.
        stream: That is read.
        timing: Of its frames. Where the rate varies, some may be missing anywhere.
        last: Timestamp of the last, in seconds.
        stated: Seconds at which the file ends, 0 where it does not say.
    """
    name, rate = container.format.name, float(stream.average_rate or timing.frame_rate)
    if name not in STATING_SIZES and ("mp4" not in name or stream.frames):
        return True
    if name == "flv" and not stated:  # a recording that was killed, also within sound
        return True
    return "mp4" not in name and name != "ogg" and timing.times is None and 0 < stated <= last + 1.5 / rate


def _last_time(stamps: Sequence[Stamp], stream: av.video.stream.VideoStream) -> float:
    times = (stamp.dts if stamp.pts is None else stamp.pts for stamp in stamps)
    return float(max((time for time in times if time is not None), default=0) * stream.time_base)


def _count_torn(stream: av.video.stream.VideoStream, tail: Sequence[av.Packet]) -> int:
    """How many frames at the end are damaged because the packet that came last is torn; 0 if others are damaged too.

    Args:
        stream: That the packets are of; nothing of it was decoded.
        tail: The packets from the last key frame on.
    """
    num_torn, num_shown = _count_damaged(stream, tail)
    gives_none = num_shown == len(tail) - 1
    if len(tail) == 1:
        return num_torn + gives_none
    if num_torn or gives_none:
        stream.codec_context.flush_buffers()
        others, num_others = _count_damaged(stream, tail[:-1])
        num_torn = 0 if others else num_torn + (gives_none and num_others == num_shown)
    return num_torn


def _count_damaged(stream: av.video.stream.VideoStream, packets: Sequence[av.Packet]) -> tuple[int, int]:
    """Frames from the first damaged one on, and all; those shown before the key frame lean on others."""
    frames = []
    for packet in [*packets, None]:
        with contextlib.suppress(av.FFmpegError):  # then it gives none
            frames += stream.codec_context.decode(packet)
    shown = itertools.dropwhile(lambda frame: not frame.key_frame, frames)
    return sum(1 for _ in itertools.dropwhile(lambda frame: not frame.is_corrupt, shown)), len(frames)


def _whole_stamps(stamps: Sequence[Stamp], num_torn: int, container: str) -> list[Stamp]:
    """Those of frames that are whole, at the end of a file: it may also lack some to be shown before the last ones."""
    shown = [stamp.pts for stamp in stamps]
    decoded = [stamp.dts for stamp in stamps]
    begins_anew = None not in decoded and bool((np.diff(decoded) < 0).any())
    if None in shown or begins_anew:
        return list(stamps[: len(stamps) - num_torn])
    kept = sorted(shown)[: len(stamps) - num_torn]
    if container in STREAMED and len(stamps) > 1 and None not in decoded:
        steps, start = np.diff(decoded), max(len(kept) - MAX_DELAY, 0)
        late_steps = np.diff(kept[start:])
        if steps.min() > 0 and steps.max() < 1.5 * steps.min() and (late_steps >= 1.5 * steps.max()).any():
            kept = kept[: start + 1 + int(np.argmax(late_steps >= 1.5 * steps.max()))]
    return [stamp for stamp in stamps if kept and stamp.pts <= kept[-1]]


def _has_leading_frames(first: Sequence[av.Packet]) -> bool:
    """Whether a frame to be shown before the first key frame follows it: what it was made from may be cut off."""
    return (
        len(first) == 2
        and not first[1].is_discard
        and None not in (stamps := [p.pts for p in first])
        and (stamps[1] < stamps[0])
    )


def _decoded_stamps(video: Video, limits: VideoLimits) -> list[Stamp]:
    with open_video(video, limits) as (container, stream):
        return [Stamp(frame.pts, None, frame.duration) for frame in read_frames(container, stream, limits)]


def _is_constant_by_header(stream: av.video.stream.VideoStream, rate: float) -> bool:
    """Whether the header's list of frames is whole, hides none, agrees with its duration, and has even steps."""
    shown, index = (stream.duration or 0) * stream.time_base * rate, stream.index_entries
    if not stream.frames or abs(stream.frames - shown) >= 0.5 or len(index) != stream.frames:
        return False
    entries = [(entry.timestamp, bool(entry.size and not entry.is_discard)) for entry in index]
    times = np.array([timestamp for timestamp, _ in entries], np.float64)
    return all(is_shown for _, is_shown in entries) and _is_even(
        (times - times[0]) * float(stream.time_base), rate, float(stream.time_base)
    )


def _end_by_header(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> float | None:
    """When the last frame goes, in seconds of its timestamps; packets of an mp4 last until the next is decoded.

    A container that states how long it lasts itself, and not how long its streams do, may end with its sound.
    """
    if container.format.name in STATING_THEIR_OWN_DURATION:
        is_of_stream = bool(container.duration) and len(container.streams) == 1
        return container.duration / av.time_base if is_of_stream else None
    starts_by_edit_list = not stream.start_time  # else an mp4 states the time from its first frame to be decoded
    if stream.duration and (starts_by_edit_list or "mp4" not in container.format.name):
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return None


def _is_even(times: np.ndarray, rate: float, tick: float) -> bool:
    """Whether frame i is at i / rate, but for a quarter of an interval or one unit of time."""
    return bool(np.abs(times - np.arange(len(times)) / rate).max() <= max(SLACK / rate, tick))


def time_frames(stamps: Sequence[Stamp], rate: float, tick: float, *, end: float | None = None) -> Timing:
    """When frames are shown that have these timestamps.

    Args:
        stamps: In the order in which frames are decoded.
        rate: Frames a second that the header states.
        tick: Seconds of a unit of time.
        end: When the last frame goes, in seconds, if it is known.
    """
    times, hold = _times_of(stamps, rate, tick, end)
    steps = np.diff(times)
    if not (steps > 0).any():
        return Timing(len(stamps), rate)
    usual = float(np.median(steps[steps > 0]))
    last = max(float(times[-1]), float(times[-1]) + hold - usual)
    mean = (len(times) - 1) / last
    if last - times[-1] < usual / 2:  # the last frame is shown no longer than others
        mean = (len(times) - 1) / float(times[-1])
        for even_rate, traits in ((rate, NO_TRAITS), (mean, Traits.OTHER_RATE)):
            if _is_even(times, even_rate, tick):
                return Timing(len(times), even_rate, traits=traits)
    return Timing(len(times), mean, times, Traits.VARIABLE_RATE)


def _times_of(stamps: Sequence[Stamp], rate: float, tick: float, end: float | None) -> tuple[np.ndarray, float]:
    """Seconds from the first frame to each, sorted, and for how long the last is shown.

    Without presentation times, frames are shown as far apart as they are decoded, and without any times by their
    durations. Single missing ones lie evenly between their neighbours. Where time begins anew, as in files that were
    joined, it goes on instead.
    """
    values = [[np.nan if value is None else value for value in stamp] for stamp in stamps]
    pts, dts, durations = tick * np.array(values, np.float64).reshape(-1, 3).T
    steps = np.diff(dts)
    if (steps < 0).any():
        joins = np.where(steps < 0, steps - 1 / rate, 0).cumsum()
        pts[1:], dts[1:] = pts[1:] - joins, dts[1:] - joins
    if np.isnan(pts).any() and not np.isnan(dts).any():
        pts = dts
    elif np.isnan(pts).all() and (durations > 0).all():
        pts = np.cumsum(durations) - durations
    times = _fill_in(pts, rate)
    order = np.argsort(times, kind="stable")
    times = times[order]
    # What is shown last lasts until the next is decoded, which says nothing unless it is also decoded last.
    own = durations[-1:] if len(order) and order[-1] == len(order) - 1 else durations[:0]
    hold = own if end is None else end - times[-1:]
    return times - times[:1], float(np.nan_to_num(hold).sum())


def _fill_in(times: np.ndarray, rate: float) -> np.ndarray:
    places, known = np.arange(len(times)), np.flatnonzero(~np.isnan(times))
    if not len(known):
        return places / rate
    outside = places - np.clip(places, known[0], known[-1])
    return np.interp(places, known, times[known]) + outside / rate
