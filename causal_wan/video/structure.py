"""What the bytes of a file tell of it without FFmpeg: whether it was cut, and whether a JPEG is the first of many.

Files are cut by downloads and copies that broke off. How long a file says it lasts tells nothing by itself: sound may
be longer than pictures, durations are rounded, and a last frame may be shown for long. How many bytes it says it has
is exact.
"""

import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO


MP4_BOXES = b"ftyp moov mdat free skip wide pnot styp uuid junk sidx moof".split()  # that an mp4 or mov begins with
INDICES = (b"moov", b"moof", b"meta")  # of a file, of a part of it, and of pictures
EBML, SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
ASF_HEADER_BYTES = 1 << 16  # in which the properties of the file come
RIFF_SLACK = 9  # some writers count the head, or padding
ASF_EMPTY_BYTES = 50  # that data have which were written as they came
FLV_BYTES = re.compile(rb"\0\x08filesize\0(.{8})", re.DOTALL)
FLV_HEADER_BYTES = 1 << 16  # in which a script tag may state them
MAX_OGG_PAGE = 27 + 255 + 255 * 255
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers after which height and width follow
JPEG_SCAN, JPEG_APP2, JPEG_FILL = 0xDA, 0xE2, 0xFF
JPEG_ALONE = {1, *range(0xD0, 0xDA)}  # markers that nothing follows
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within a scan
MAX_JPEG_BYTES = 1 << 26
FLV_TAG_BYTES, FLV_LENGTH_BYTES = 11, 4  # before what is in a tag, and after it


def is_mp4(file: BinaryIO) -> bool:
    """Whether a file begins as an mp4 or mov does; others are not read as one, so that their tables are checked."""
    file.seek(0)
    return file.read(8)[4:] in MP4_BOXES


def mp4_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """The outermost boxes of an mp4 or mov: kind, where it begins, and where it says that it ends."""
    size, position = file.seek(0, os.SEEK_END), 0
    while position < size:
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16])
        end = position + length if length >= 8 else size  # 0 is all that follows
        end = end if len(head) >= 8 else position + 8
        yield kind, position, end
        position = end


def check_has_index(file: BinaryIO) -> None:
    """Checks that an mp4 or mov has its index; any other file passes.

    Raises:
        ValueError: If it has none, or a part of it, as files that are cut and whose index is at their end.
    """
    if not is_mp4(file):
        return
    size = file.seek(0, os.SEEK_END)
    ends = [end for kind, _, end in mp4_boxes(file) if kind in INDICES]
    if not ends or ends[0] > size:
        raise ValueError(
            "the file was cut: its index (moov), without which nothing can be read, is missing or not whole; copy or "
            "download it again"
        )


def is_cut(file: BinaryIO) -> bool:
    """Whether a file ends before it says it does: mp4, mkv, webm, avi, wmv, flv and ogg; others say nothing of it.

    Nor does a file that was written as it came, such as a recording that was killed: it is not cut.
    """
    if is_mp4(file):
        size = file.seek(0, os.SEEK_END)
        return any(end > size for kind, _, end in mp4_boxes(file) if kind in MP4_BOXES or len(kind) < 4)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(16)
    if start.startswith(EBML):
        return _matroska_bytes(file) > size
    if start.startswith(b"RIFF"):
        return _riff_bytes(file, size) > size + RIFF_SLACK
    if start == ASF_HEADER:
        return any(end > size for end in _asf_ends(file, size))
    if start.startswith(b"FLV"):
        return _flv_bytes(file) > size or not _has_whole_last_tag(file, size)
    return start.startswith(b"OggS") and not _has_last_page(file, size)


def is_whole_frame(content: bytes, container: str) -> bool:
    """Whether the last frame of a file is whole, where nothing but the frame itself tells; else True.

    Args:
        content: Of its packet.
        container: Its format, as FFmpeg calls it.
    """
    if container == "mjpeg":
        return content.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    try:
        return container != "gif" or _ends_whole_gif(content)
    except IndexError:
        return False


def _ends_whole_gif(content: bytes) -> bool:
    """Whether the blocks of a GIF's frame go to its end, or to that of the file; raises IndexError if they go on."""
    place = 13 + _palette_bytes(content[10]) if content.startswith(b"GIF8") else 0
    while place < len(content) and content[place] in b"!,":
        if content[place] == ord(","):
            place += 11 + _palette_bytes(content[place + 9])
        else:
            place += 2
        while content[place]:
            place += 1 + content[place]
        place += 1
    return True


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _matroska_bytes(file: BinaryIO) -> int:
    """Bytes that a Matroska file states, or 0."""
    end = 0
    for wanted in (EBML, SEGMENT):
        file.seek(end)
        head = file.read(12)
        if len(head) < 12 or head[:4] != wanted or not head[4]:
            return 0
        width = 9 - head[4].bit_length()
        length = int.from_bytes(head[4 : 4 + width]) - (1 << 7 * width)
        if length == (1 << 7 * width) - 1:  # of one that was written as it came
            return 0
        end += 4 + width + length
    return end


def _riff_bytes(file: BinaryIO, size: int) -> int:
    """Bytes that the parts of an avi state together."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if not head.startswith(b"RIFF") or length in (0, (1 << 32) - 1):
            break
        end += 8 + length + length % 2
    return end


def _asf_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Where the objects of a wmv say they end."""
    position = 0
    while position < size:
        file.seek(position + 16)
        length = int.from_bytes(file.read(8), "little")
        if length <= ASF_EMPTY_BYTES:
            return
        position += length
        yield position


def asf_seconds(file: BinaryIO) -> float:
    """When pictures and sound of a wmv end, in seconds of their timestamps; 0 if its header does not say."""
    file.seek(0)
    properties = file.read(ASF_HEADER_BYTES).partition(ASF_PROPERTIES)[2]
    if len(properties) < 72:
        return 0.0
    duration, _, preroll = struct.unpack_from("<3Q", properties, 48)
    return max(0.0, duration / 10**7 - preroll / 1000)


def _flv_bytes(file: BinaryIO) -> float:
    """Bytes that an flv states, or 0."""
    file.seek(0)
    found = FLV_BYTES.search(file.read(FLV_HEADER_BYTES))
    return struct.unpack(">d", found[1])[0] if found else 0.0


def _has_whole_last_tag(file: BinaryIO, size: int) -> bool:
    """Whether the length after the last tag is that which it states itself."""
    file.seek(max(size - FLV_LENGTH_BYTES, 0))
    length = int.from_bytes(file.read(FLV_LENGTH_BYTES))
    start = size - FLV_LENGTH_BYTES - length
    if length < FLV_TAG_BYTES or start < 0:
        return False
    file.seek(start + 1)
    return int.from_bytes(file.read(3)) == length - FLV_TAG_BYTES


def _has_last_page(file: BinaryIO, size: int) -> bool:
    """Whether an ogg ends with a page that is marked as the last of its stream."""
    file.seek(max(size - MAX_OGG_PAGE, 0))
    page = file.read().rpartition(b"OggS\0")[2]
    lengths = page[22 : 22 + page[21]] if len(page) > 21 else b""
    return bool(lengths) and bool(page[0] & 4) and len(page) >= 22 + len(lengths) + sum(lengths)


# --- JPEGs -----------------------------------------------------------------------------------------------------------


def is_motion_jpeg(file: BinaryIO) -> bool:
    """Whether a JPEG is followed by another of its size: they are the frames of a video.

    Previews and the like, which cameras write behind a picture, are smaller, or announced in it.
    """
    file.seek(0)
    content = b""
    while len(content) < MAX_JPEG_BYTES and (more := file.read(max(1 << 20, len(content)))):
        content += more
        try:
            return _has_second_frame(content)
        except IndexError:  # more is needed
            continue
    return False


def _has_second_frame(content: bytes) -> bool:
    sizes = []
    for marker, segment in _jpeg_segments(content):
        if marker == JPEG_APP2 and segment.startswith(b"MPF"):
            return False
        if marker in JPEG_SIZES:
            sizes.append(segment[1:5])
            if len(sizes) == 2:
                return sizes[0] == sizes[1]
    return False


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers of JPEGs in a row, each with the first bytes behind it; raises IndexError where the content ends."""
    place = 0
    while content[place] == JPEG_FILL:
        marker = content[place + 1]
        if marker == JPEG_FILL:
            place += 1
            continue
        yield marker, content[place + 4 : place + 9]
        place += 2
        if marker not in JPEG_ALONE:
            place += content[place] << 8 | content[place + 1]
        if marker == JPEG_SCAN:
            found = JPEG_MARKER.search(content, place)
            place = found.start() if found else len(content)
