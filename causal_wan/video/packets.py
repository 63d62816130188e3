"""Packets and frames of an open video, as long as its limits allow."""

import time
from collections.abc import Iterator

import av

from causal_wan.video.limits import VideoLimits
from causal_wan.video.opening import ENDLESS, Video


def read_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> Iterator[av.Packet]:
    """Packets of a stream, as long as time and duration allow."""
    deadline, first = time.monotonic() + limits.decode_timeout, None
    for packet in container.demux(stream):
        if time.monotonic() > deadline:
            raise limits.timeout_error()
        if packet.dts is not None:
            first = packet.dts if first is None else first
            limits.check_seconds(float((packet.dts - first) * packet.time_base))
        yield packet


def read_frames(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, limits: VideoLimits
) -> Iterator[av.VideoFrame]:
    """Frames of a stream from its first key frame on, as long as the limits allow.

    Raises:
        ValueError: If there is no key frame, a frame does not decode, or the limits are reached.
    """
    num_frames, num_skipped, has_begun, torn = 0, 0, False, None
    for packet in read_packets(container, stream, limits):
        has_begun |= packet.is_keyframe
        if packet.size and not has_begun:  # decoders drop these, or fill in grey
            num_skipped += 1
            continue
        if torn is not None and packet.size:
            raise torn
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            torn = ValueError(
                f"a frame does not decode ({error.strerror}): the file is damaged, or the frame has more than "
                f"max_video_pixels={limits.max_video_pixels} pixels"
            )
            if container.format.name not in ENDLESS:
                raise torn from error
            continue  # the last packet of a recording may be torn, and frames before it are still to come
        for frame in frames:
            num_frames += 1
            limits.check_frames(num_frames)
            limits.check_pixels(frame.height, frame.width)
            yield frame
    if num_skipped and not has_begun:
        raise ValueError("the video has no key frame, without which no frame can be decoded; encode it anew")


def end_error(video: Video, index: int, *, who: str = "its header promises") -> ValueError:
    """What is wrong with a file that was cut; `who` wants the frame."""
    return ValueError(f"{video} ends before frame {index}, which {who}; copy or download it again, or encode it anew.")
