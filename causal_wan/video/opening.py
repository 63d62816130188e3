"""Video files, opened safely.

A file may come from anyone. FFmpeg opens none itself: it is handed an open one, and reads containers that hold their
own pictures only. What a file may ask for is limited, whatever its header says.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import av

from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits
from causal_wan.video.structure import check_has_index, is_cut, is_motion_jpeg, is_mp4, mp4_boxes


# FFmpeg may also read playlists and lists of files; containers that hold their own pictures are all a clip needs.
CONTAINERS = "matroska,webm,avi,mpeg,mpegts,flv,ogg,gif,asf,m4v,h264,hevc"
STREAMED = ("mpegts", "mpeg")  # containers that state decoding times, and nothing of their end
ENDLESS = (*STREAMED, "h264", "hevc", "m4v", "mjpeg")  # all that state nothing of their end
VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".flv", ".wmv", ".asf"),
    *(".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".ogv", ".ogm", ".gif"),
    *(".mjpeg", ".mjpg", ".h264", ".264", ".avc", ".h265", ".265", ".hevc"),
}
"""Of files that are taken for videos where nobody names them; what a table names is read whatever its suffix."""
OTHER_MEDIA_SUFFIXES = {
    *(".mxf", ".y4m", ".yuv", ".dv", ".ivf", ".nut", ".rm", ".rmvb", ".swf", ".wtv", ".mj2", ".braw", ".r3d", ".ogg"),
    *(".png", ".apng", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2", ".jxl"),
    *(".wav", ".mp3", ".m4a", ".aac", ".flac", ".opus"),
}
"""Of files that are not, though they hold pictures or sound."""
MP4_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2"
MP4_SAMPLE_TABLES = re.compile(rb"stsz.{4}(.{4})(.{4})|trun.(.{3})(.{4})|cmov", re.DOTALL)
CHUNK_BYTES = 1 << 20
PICTURES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP"),
    (re.compile(rb"BM.{4}\0{4}", re.DOTALL), "BMP"),
    (re.compile(rb"II[*+]\0|MM\0[*+]"), "TIFF"),
    (re.compile(rb"....ftyp(heic|heix|heim|heis|mif1)", re.DOTALL), "HEIC"),
    (re.compile(rb"\xff\x0a|\0{3}\x0cJXL "), "JPEG XL"),
    (re.compile(rb"\0{3}\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"8BPS"), "Photoshop"),
)
OTHERS = (  # what lies where a video should after a download that was not one
    (re.compile(rb"version https://git-lfs"), "a pointer of Git LFS and not the video itself; run `git lfs pull`"),
    (re.compile(rb"(\.\./)*(\.git/annex|/annex)/objects/"), "a pointer of git-annex and not the video itself; get it"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "a web page and not a video; download the video again"),
    (
        re.compile(rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|.{257}ustar", re.DOTALL),
        "an archive and not a video; unpack it",
    ),
)
FORMATS = "mp4, mov, mkv, webm, avi, mpeg, ts, flv, ogg, gif, wmv or a picture"
AVIF_BRANDS = ("avif", "avis")
DISPOSITION = av.stream.Disposition
NO_CLIPS = DISPOSITION.attached_pic | DISPOSITION.timed_thumbnails | DISPOSITION.dependent


class PictureError(ValueError):
    """The file is a picture and no video."""


@dataclass(frozen=True)
class EmbeddedVideo:
    """A clip whose bytes a `datasets` data set holds; opens like a path.

    Args:
        dataset: A `datasets.Dataset`.
        index: Of the row, from 0.
        column: With bytes, or with what `datasets.Video(decode=False)` gives.
        name: What the data set calls the file, for people.
    """

    dataset: Any
    index: int
    column: str
    name: str = ""

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file.

        Raises:
            ValueError: If the row holds no bytes: a path in their place is not followed.
        """
        if mode != "rb":
            raise ValueError(f"an embedded video can be read only, with mode rb, got {mode}.")
        value = self.dataset[self.index][self.column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes) or not content:
            raise ValueError("the data set holds no bytes of the video; embed the files, or name them in a CSV")
        return io.BytesIO(content)

    def __str__(self) -> str:
        files = [file["filename"] for file in self.dataset.cache_files]
        name = f" ({os.path.basename(self.name):.100})" if self.name else ""
        return f"row {self.index + 1} of {files[0] if files else self.dataset._fingerprint}{name}"


Video = Path | EmbeddedVideo


@contextlib.contextmanager
def open_video(
    video: Video, limits: VideoLimits = DEFAULT_LIMITS
) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """A video's container and its best video stream; FFmpeg itself opens no file and reads no playlist.

    Raises:
        PictureError: If it is a picture, see `causal_wan.video.pictures`.
        ValueError: If it has another format, no video stream, a codec that is not known, or asks for more than the
            limits.
        av.FFmpegError: If it is no video.
    """
    with video.open("rb") as file:
        if (kind := picture_kind(file)) is not None:
            raise PictureError(f"a {kind} picture and not a video that can be read")
        check_is_no_other(file)
        containers = f"{MP4_CONTAINERS},{CONTAINERS}" if is_mp4(file) else CONTAINERS
        only = "mjpeg" if _kind_of(file) == "JPEG" else None  # of several pictures, as one alone is no video
        check_has_index(file)
        check_sample_counts(file)
        file.seek(0)
        pixels = {"max_pixels": str(limits.max_video_pixels)}
        options = {"format_whitelist": only or containers, "protocol_whitelist": "", "enable_drefs": "0", **pixels}
        try:
            with _open_container(file, only, options, limits) as container:
                stream = choose_stream(container)
                if stream.codec_context is None:
                    raise ValueError("the video's codec is not known to FFmpeg")
                opacity = find_opacity(container, stream)
                for read in (stream,) if opacity is None else (stream, opacity):
                    read.codec_context.options = pixels  # those of the container are not the decoder's
                    # Threads of a frame each may give one out before they see that it is torn, as the last may be.
                    read.thread_type = "SLICE" if container.format.name in ENDLESS else "AUTO"
                _check_header(stream, limits)
                yield container, stream
        except av.error.ExitError:
            raise limits.timeout_error() from None


def _open_container(
    file: BinaryIO, only: str | None, options: dict[str, str], limits: VideoLimits
) -> av.container.InputContainer:
    try:
        return av.open(file, format=only, options=options, io_open=_refuse_to_open, timeout=limits.decode_timeout)
    except av.error.ArgumentError as error:  # all that FFmpeg says of a format that is not among those allowed
        raise ValueError(f"not a video that can be read: its format is not {FORMATS}") from error
    except av.FFmpegError as error:
        if isinstance(error, av.error.ExitError) or not is_cut(file):
            raise
        raise ValueError("the file was cut: too little is left to be read; copy or download it again") from error


def picture_kind(file: BinaryIO) -> str | None:
    """What kind of picture a file is, by its first bytes; None if it is none, or a GIF or AVIF, which FFmpeg reads.

    JPEGs in a row are none: they are Motion JPEG.
    """
    kind = _kind_of(file)
    return None if kind == "JPEG" and is_motion_jpeg(file) else kind


def _kind_of(file: BinaryIO) -> str | None:
    file.seek(0)
    head = file.read(16)
    return next((kind for pattern, kind in PICTURES if pattern.match(head)), None)


def check_is_no_other(file: BinaryIO) -> None:
    """Checks that a file is not empty, or something that often lies in the place of a video.

    Raises:
        ValueError: If it is; says what.
    """
    file.seek(0)
    head = file.read(512)
    if not head:
        raise ValueError("the file is empty")
    for pattern, what in OTHERS:
        if pattern.match(head):
            raise ValueError(what)


def choose_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """The video stream that a player takes: the default one if one is marked so, of these the one of most pixels.

    Cover art, thumbnails and layers on top of other streams are none; nor is the still of an animated picture.

    Raises:
        ValueError: If there is none.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & NO_CLIPS]
    if not streams:
        pictures = ", only cover art or thumbnails" if container.streams.video else ""
        raise ValueError(f"the file has no video stream{pictures}")
    return max(streams, key=_rank)


def find_opacity(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> av.video.stream.VideoStream | None:
    """The grey stream that says how opaque the pixels of an AVIF's stream are; None if there is none."""
    brands = "".join(container.metadata.get(name, "") for name in ("major_brand", "compatible_brands"))
    if not any(brand in brands for brand in AVIF_BRANDS):
        return None
    size = stream.frames, stream.height, stream.width
    others = (other for other in container.streams.video if other.index > stream.index and other.codec_context)
    greys = (other for other in others if (other.pix_fmt or "").startswith("gray"))
    return next((grey for grey in greys if (grey.frames, grey.height, grey.width) == size), None)


def _rank(stream: av.video.stream.VideoStream) -> tuple[bool, bool, bool, int]:
    if stream.codec_context is None:
        return False, False, False, 0
    is_default = bool(stream.disposition & DISPOSITION.default)
    return True, stream.frames != 1, is_default, stream.height * stream.width


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise ValueError(f"the file refers to another file or address, {url}")


def check_sample_counts(file: BinaryIO) -> None:
    """Checks that the tables of an mp4 or mov state no more samples than the file has bytes; any other file passes.

    FFmpeg takes some 30 bytes for each sample that a table states, before it reads the first. A table of samples of
    one size takes 20 bytes of the file, however many it states.

    Raises:
        ValueError: If they state more, or if the header is compressed.
    """
    size, stated = file.seek(0, os.SEEK_END), 0
    for found in _find_sample_tables(file, size):
        constant, count, fields, run_count = found.groups()
        if constant is not None:
            stated += int.from_bytes(count) * int.from_bytes(constant)
        elif fields is None:
            raise ValueError("the header of the mov is compressed; encode it anew")
        elif not int.from_bytes(fields) & 0xF00:  # samples without durations, sizes, flags and offsets of their own
            stated += int.from_bytes(run_count)
    if stated > size:
        raise ValueError(f"the header states {stated} bytes of samples, but the file has {size}; encode it anew")


def _find_sample_tables(file: BinaryIO, size: int) -> Iterator[re.Match[bytes]]:
    """Goes through all of an mp4 or mov but its pictures and sound."""
    for kind, first, stated_end in mp4_boxes(file) if is_mp4(file) else ():
        end = min(stated_end, size)
        for start in range(first, end, CHUNK_BYTES) if kind != b"mdat" else ():
            file.seek(start)
            chunk = file.read(min(CHUNK_BYTES + 16, end - start))  # a table may lie across the end
            yield from (found for found in MP4_SAMPLE_TABLES.finditer(chunk) if found.start() < CHUNK_BYTES)


def _check_header(stream: av.video.stream.VideoStream, limits: VideoLimits) -> None:
    if not stream.height * stream.width:
        raise ValueError(
            f"the size of its frames cannot be read, or is above max_video_pixels={limits.max_video_pixels}"
        )
    limits.check_pixels(stream.height, stream.width)
    limits.check_frames(stream.frames)
    limits.check_seconds(float((stream.duration or 0) * (stream.time_base or 0)))


def describe_error(error: Exception) -> str:
    """What is wrong with a file, in words."""
    if isinstance(error, av.FFmpegError):
        return f"not a video that can be read ({error.strerror})"
    return str(error)
