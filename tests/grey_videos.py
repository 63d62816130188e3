"""Videos whose frames carry their number as a grey level."""

from fractions import Fraction

import av
import numpy as np


GREY_STEP = 8  # frame i of a test clip is 8 i grey all over


def write_video(path, num_frames=24, height=48, width=80, rate=16, frames=None):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, width=width, height=height, options={"crf": "1"})
        stream.pix_fmt = "yuv444p"
        for index in range(num_frames):
            picture = np.full((height, width, 3), GREY_STEP * index, np.uint8) if frames is None else frames[index]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_timed_video(path, milliseconds, *, hold=None, codec="libx264", size=(48, 80), **options):
    """A video whose frames are shown at these times, the last for `hold` milliseconds."""
    options |= {} if hold is None else {"bf": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000, height=size[0], width=size[1], options={"crf": "1", **options})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        pictures = [np.full((*size, 3), GREY_STEP * (index % 32), np.uint8) for index in range(len(milliseconds))]
        packets = []
        for picture, time in zip(pictures, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            if packet.pts == milliseconds[-1] and hold is not None:
                packet.duration = hold  # of the last packet, so there are no B-frames
            container.mux(packet)
    return path


def shown_indices(frames):
    """The index that each frame of a test clip carries in its grey level."""
    return (frames.float().mean(dim=(-3, -2, -1)) / GREY_STEP).round().int().tolist()


def write_playlists(videos):
    """Files that make FFmpeg open 0.mp4 beside them, if it is let."""
    (videos / "playlist.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n0.mp4\n#EXT-X-ENDLIST\n")
    (videos / "list.mp4").write_text("ffconcat version 1.0\nfile 0.mp4\n")
