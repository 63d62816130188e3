"""WebDataset tars -> rows: the members that are wanted, as bytes and texts, and no others.

WebDataset splits the name of a member at its first dot, so that clip.v2.mp4 would be a part `v2.mp4` of `clip`. Here
what belongs to a clip is its name without the wanted ending: clip.v2.mp4 goes with clip.v2.txt. Nothing is unpickled,
and what a tar may take is limited, whatever its headers say.
"""

import bz2
import functools
import gzip
import json
import logging
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Self

from causal_wan.tables.prompt_schedules import ENDING
from causal_wan.tables.text_files import MAX_TEXT_BYTES, decode_text


logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 1 << 30
MAX_PENDING = 16  # clips whose members do not come one after another
MAX_PEEKED = 1000  # members that are looked at for the endings that are wanted
# A compressed tar may unpack to so many times its bytes, and some more; videos hardly shrink, and texts to a tenth.
MAX_RATIO, FREE_BYTES = 100, 1 << 24
UNPACKERS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile}
DAMAGES = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
ERROR = "__error__"  # the column that says why a clip cannot be used


@dataclass
class Clip:
    """The members of a clip so far, by their endings.

    Attributes:
        name: The path in the tar without the ending.
        group: The same up to the first dot.
        parts: Contents of its members.
        error: Why it cannot be used.
    """

    name: str
    group: str
    parts: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None


class _Counted:
    """What is read of a file, counted."""

    def __init__(self, file: BinaryIO, start: bytes = b"") -> None:
        self.file, self.start, self.count = file, start, 0

    def read(self, size: int = -1) -> bytes:
        taken, self.start = self.start[: max(size, 0)], self.start[max(size, 0) :]
        content = taken + self.file.read(size - len(taken) if size >= 0 else size)
        self.count += len(content)
        return content


class _Unpacked(_Counted):
    """What a compressed file unpacks to, as long as that is in proportion."""

    def __init__(self, file: BinaryIO, packed: _Counted) -> None:
        super().__init__(file)
        self.packed = packed

    def read(self, size: int = -1) -> bytes:
        content = super().read(size)
        if self.count > FREE_BYTES + MAX_RATIO * self.packed.count:
            raise ValueError(f"it unpacks to more than {MAX_RATIO} times its size")
        return content


def _unpack(file: BinaryIO) -> _Counted:
    start = file.read(6)
    if start.startswith(b"PK\3\4"):
        raise ValueError("it is a zip archive; pack a tar")
    packed = _Counted(file, start)
    for mark, unpacker in UNPACKERS.items():
        if start.startswith(mark):
            return _Unpacked(unpacker(packed) if unpacker is not gzip.GzipFile else unpacker(fileobj=packed), packed)
    return packed


class _Header(tarfile.TarInfo):
    """A member's header; one that is cut or damaged is no end of the tar, for which `tarfile` takes it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Self:
        """Called by `tarfile` for the next header."""
        if buf and not buf.strip(b"\0"):
            raise tarfile.EOFHeaderError("end of file header")  # also of a part of the last blocks
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(f"a header is cut or damaged ({error})") from error


@functools.cache
def _say_has_no_end(name: str, count: int) -> None:
    """Says it once, however often a tar is read."""
    logger.warning(
        "%s ends after %d member(s) without the two empty blocks that end a tar: it was cut between members, or "
        "written by a tool that leaves them out. See that none is missing",
        name,
        count,
    )


def _members(file: BinaryIO, name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """All members but folders and hidden files.

    Args:
        file: The tar.
        name: Of it, for people.

    Raises:
        ValueError: If the file is no whole tar; names the last member that came.
    """
    last, count = None, 0
    try:
        content = _unpack(file)
        with tarfile.open(fileobj=content, mode="r|", tarinfo=_Header) as tar:
            for member in tar:
                last, count = member.name, count + 1
                if not member.isdir() and not PurePosixPath(member.name).name.startswith((".", "__")):
                    yield tar, member
                tar.members = []  # else all are kept
            while rest := tar.fileobj.read(1 << 20):
                if rest.count(0) < len(rest):
                    raise tarfile.ReadError("something follows its end, as in tars that were put together with `cat`")
            if content.count == tar.offset:
                _say_has_no_end(name, count)
    except (*DAMAGES, ValueError) as error:
        raise _damage(error, "" if last is None else f" after its member {last!r:.100}") from error


def _damage(error: Exception, place: str) -> ValueError:
    return ValueError(f"it cannot be read as a tar{place}: {str(error) or type(error).__name__}")


def find_endings(file: BinaryIO, wanted: Sequence[str], *, name: str = "the tar") -> list[str]:
    """Those of the wanted endings that the first members of a tar have, and what others end in.

    Args:
        file: The tar.
        wanted: Endings without the first dot.
        name: Of the tar, for people.

    Raises:
        ValueError: If it cannot be read, or has no members.
    """
    found: dict[str, None] = {}
    for number, (_, member) in enumerate(_members(file, name)):
        ending = _ending(member.name, wanted) or PurePosixPath(member.name).suffix.removeprefix(".")
        found[ending or member.name] = None
        if set(wanted) <= set(found) or number == MAX_PEEKED:
            break
    if not found:
        raise ValueError("it has no members; pack videos and their texts into it")
    return list(found)


def _ending(name: str, wanted: Sequence[str]) -> str | None:
    endings = [ending for ending in wanted if name.lower().endswith(f".{ending.lower()}")]
    return max(endings, key=len, default=None)


def read_clips(
    file: BinaryIO, video: str, captions: Sequence[str], controls: Sequence[str] = (), *, name: str = "the tar"
) -> Iterator[dict[str, Any]]:
    """The clips of a tar, in its order.

    Args:
        file: Need not be seekable.
        video: What the names of clips end in, without the first dot,
        captions: those of prompts: texts, or JSON with a text or a list of texts, but `prompt_schedule.json`,
        controls: and those of the videos that control clips.
        name: Of the tar, for people.

    Yields:
        For each of the videos bytes and path, the name in the tar; for each of the captions a list of texts; `ERROR`,
        why the clip cannot be used, or None.

    Raises:
        ValueError: If the tar cannot be read to its end.
    """
    videos = [video, *controls]
    wanted = list(dict.fromkeys([*videos, *captions]))
    pending: dict[str, Clip] = {}
    whole: set[str] = set()  # groups with a clip that WebDataset would see: what else is in them may be other parts
    for tar, member in _members(file, name):
        ending = _ending(member.name, wanted)
        group = _group(member.name)
        for clip in [clip for clip in pending.values() if clip.group != group]:
            yield from _finish(pending.pop(clip.name), videos, captions, whole)
        if ending is None:
            continue
        stem = member.name[: -len(ending) - 1]
        whole = {group} & (whole | ({stem} if ending == video else set()))
        clip = pending.setdefault(stem, Clip(stem, group))
        _take(clip, ending, tar, member, is_video=ending in videos)
        if len(clip.parts) == len(wanted) or len(pending) > MAX_PENDING:
            oldest = clip if len(clip.parts) == len(wanted) else next(iter(pending.values()))
            yield from _finish(pending.pop(oldest.name), videos, captions, whole)
    for clip in pending.values():
        yield from _finish(clip, videos, captions, whole)


def _group(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _take(clip: Clip, ending: str, tar: tarfile.TarFile, member: tarfile.TarInfo, *, is_video: bool) -> None:
    limit = MAX_MEMBER_BYTES if is_video else MAX_TEXT_BYTES
    content = b""
    if ending in clip.parts:
        clip.error = f"{member.name} is in the tar twice"
    elif member.issym() or member.islnk():
        clip.error = (
            f"{member.name} is a link in the tar; pack what it leads to (tar --dereference --hard-dereference)"
        )
    elif not member.isreg() or member.issparse():
        clip.error = f"{member.name} is no plain file; pack it anew, without --sparse"
    elif member.size > limit:
        clip.error = f"{member.name} has {member.size} bytes, more than the {limit} that a part of a clip may have"
    else:
        try:
            content = tar.extractfile(member).read()
        except (*DAMAGES, ValueError) as error:
            raise _damage(error, f" at its member {member.name!r:.100}") from error
    clip.parts[ending] = content


def _finish(clip: Clip, videos: Sequence[str], captions: Sequence[str], whole: set[str]) -> Iterator[dict[str, Any]]:
    if clip.group in whole and clip.name != clip.group and set(clip.parts) != {*videos, *captions}:
        return  # another part of the clip that the group is: a.raw.mp4 beside a.mp4 and a.txt
    texts = {}
    for name in captions:
        try:
            texts[name] = _texts(clip.parts[name], name, f"{clip.name}.{name}") if name in clip.parts else None
        except ValueError as error:
            texts[name], clip.error = None, clip.error or str(error).removesuffix(".")
    error = clip.error
    missing = next((name for name in videos if name not in clip.parts), None)
    if missing is not None or not any(name in clip.parts for name in captions):
        missing = missing or captions[0]
        error = error or (
            f"{clip.name} has no {missing} beside it in the tar; pack what belongs together one after another"
        )
    contents = {
        name: {"bytes": clip.parts.get(name, b"") if error is None else None, "path": f"{clip.name}.{name}"}
        for name in videos
    }
    yield {**contents, **texts, ERROR: error}


def _texts(content: bytes, ending: str, name: str) -> list[str]:
    text = decode_text(content, name)
    if ending == ENDING:
        return [text]
    if ending.rpartition(".")[2].lower() not in ("json", "jsn"):
        return [text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON, but is none ({error})") from None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in texts):
        raise ValueError(f"{name} must be a text or a list of texts, but is of type {type(value).__name__}")
    return texts
