"""Tars as people make them, and as those would who mean harm: the clips that are wanted, or the cause by name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
from pathlib import Path

import datasets
import pytest
from grey_videos import write_video

from causal_wan.data.rows import load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.streams.sources import open_stream
from causal_wan.tables import tars
from causal_wan.tables.sources import Source
from causal_wan.tables.table import read_table
from causal_wan.tables.tars import ERROR, find_endings, read_clips


SHAPE = {"num_frames": 9, "height": 32, "width": 48}
COLUMNS = {"video_column": "mp4", "caption_column": ("txt",)}


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def tar_of(members, **header):
    """A tar; of a member that is no bytes, the type, or a link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            for key, value in header.items():
                setattr(info, key, value)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return buffer.getvalue()


def clips(content, video="mp4", captions=("txt",)):
    """(Name, video, texts of all captions, error) of each clip."""
    file = io.BytesIO(content if isinstance(content, bytes) else tar_of(content))
    return [
        (row[video]["path"], row[video]["bytes"], *(row[name] for name in captions), row[ERROR])
        for row in read_clips(file, video, captions)
    ]


def pair(name, number=0):
    return [(f"{name}.mp4", b"video %d" % number), (f"{name}.txt", b"text %d" % number)]


def whole(name, number=0):
    return (f"{name}.mp4", b"video %d" % number, [f"text {number}"], None)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["a", "b"], ["clip.v2", "clip.v3"], ["d.x/a", "d.x/b.1"], ["é", "A B.c"]])
def test_clips_are_told_apart_whatever_dots_are_in_their_names(names):
    members = [member for number, name in enumerate(names) for member in pair(name, number)]
    assert clips(members) == [whole(name, number) for number, name in enumerate(names)]


def test_many_clips_of_one_beginning_are_read_as_they_come():
    names = [f"clip.{number:04d}" for number in range(100)]
    file = io.BytesIO(tar_of([member for name in names for member in pair(name)]))
    rows = read_clips(file, "mp4", ["txt"])
    next(rows)
    assert file.tell() <= 2 * 10240 + 512
    assert len(list(rows)) == 99


def test_other_parts_of_a_clip_are_passed_over():
    parts = [
        ("a.json", b"{}"),
        ("a.raw.mp4", b"raw"),
        ("a.mp4", b"video 0"),
        ("a.en.txt", b"en"),
        ("a.txt", b"text 0"),
    ]
    assert clips([*parts, ("a.z.mp4", b"z"), *pair("b", 1)]) == [whole("a"), whole("b", 1)]


def test_parts_with_dots_can_be_asked_for():
    members = [("a.left.mp4", b"left"), ("a.right.mp4", b"right"), ("a.en.txt", b"en"), ("a.de.txt", b"de")]
    assert clips(members, "left.mp4", ["en.txt", "de.txt"]) == [("a.left.mp4", b"left", ["en"], ["de"], None)]
    assert clips(members, "right.mp4", ["de.txt"]) == [("a.right.mp4", b"right", ["de"], None)]


def test_endings_may_be_written_in_capitals_and_hidden_files_are_left_out():
    members = [
        ("./._a.mp4", b"mac"),
        ("a.MP4", b"video 0"),
        ("a.Txt", b"text 0"),
        ("__MACOSX", b""),
        ("d/.x.txt", b""),
    ]
    assert clips(members) == [whole("a")]


# --- clips that cannot be used ---------------------------------------------------------------------------------------


def test_a_clip_without_its_text_is_a_bad_row_and_the_others_are_read():
    found = clips([*pair("a"), ("b.mp4", b"video 1"), *pair("c.1", 2), ("c.2.mp4", b"video"), ("d.txt", b"text")])
    assert [row[0] for row in found] == ["a.mp4", "b.mp4", "c.1.mp4", "c.2.mp4", "d.mp4"]
    errors = [row[-1] for row in found]
    assert (errors[0], errors[2]) == (None, None)
    assert errors[1].startswith("b has no txt beside it in the tar; pack what belongs together one after another")
    assert errors[3].startswith("c.2 has no txt")
    assert errors[4].startswith("d has no mp4")


def test_of_several_prompts_one_is_enough():
    assert clips(pair("a"), captions=["txt", "long.txt"]) == [("a.mp4", b"video 0", ["text 0"], None, None)]


def test_texts_that_come_after_all_videos_are_said_not_to_be_beside_them():
    members = [*((f"clip.{n}.mp4", b"video") for n in range(40)), *((f"clip.{n}.txt", b"text") for n in range(40))]
    found = clips(members)
    assert sum("has no txt beside it" in (row[-1] or "") for row in found) >= 24
    assert all(row[-1] or row[1] for row in found)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ([("a.mp4", b"v"), ("a.txt", "café".encode("latin-1"))], "a.txt must be text in UTF-8, but it is not"),
        ([("a.mp4", b"v"), ("a.txt", b"x" * (1 << 20) + b"x")], "a.txt has 1048577 bytes, more than the 1048576"),
        ([("a.mp4", (tarfile.SYMTYPE, "../b.mp4")), ("a.txt", b"x")], "a.mp4 is a link in the tar; .*--dereference"),
        ([("a.mp4", (tarfile.LNKTYPE, "b.mp4")), ("a.txt", b"x")], "a.mp4 is a link in the tar"),
        ([("a.mp4", (tarfile.FIFOTYPE, "")), ("a.txt", b"x")], "a.mp4 is no plain file"),
        ([("a.mp4", b"v"), ("a.mp4", b"v"), ("a.txt", b"x")], "a.mp4 is in the tar twice"),
    ],
)
def test_a_member_that_cannot_be_used_is_named_and_the_next_clip_is_read(members, error):
    first, second = clips([*members, *pair("b", 1)])
    assert re.match(error, first[-1])
    assert first[1] is None
    assert second == whole("b", 1)


def test_a_large_member_is_passed_over_unread(monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 10)
    first, second = clips([("a.mp4", b"v" * 11), ("a.txt", b"x"), *pair("b", 1)])
    assert first[-1] == "a.mp4 has 11 bytes, more than the 10 that a part of a clip may have"
    assert second == whole("b", 1)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ({"caption": "a"}, "of type dict"),
        ([1], "of type list"),
        (None, "NoneType"),
    ],
)
def test_prompts_in_json_are_texts_or_lists_of_texts(value, expected):
    (row,) = clips([("a.mp4", b"v"), ("a.json", json.dumps(value).encode())], captions=["json"])
    assert (row[2] == expected) if isinstance(expected, list) else (expected in row[-1])


# --- harm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "mp", "cbor", "ten"])
def test_nothing_is_unpickled_or_decoded(tmp_path, ending):
    harm = pickle.dumps(Bomb(tmp_path / "harm"))
    members = [*pair("a"), (f"a.{ending}", harm)]
    assert clips(members) == [whole("a")]
    (row,) = clips(members, captions=[ending])
    assert row[1] is None or row[2]
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    (row,) = open_stream(Source(metadata_path=str(tmp_path / "0.tar"), **COLUMNS)).read_file(0)
    assert (row.video, row.prompts) == (b"video 0", ("text 0",))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_read_and_one_that_unpacks_out_of_proportion_is_refused_by_its_member(pack):
    assert clips(pack(tar_of([*pair("a"), *pair("b", 1)]))) == [whole("a"), whole("b", 1)]
    bomb = pack(tar_of([("a.txt", b"x"), ("a.mp4", bytes(40 << 20))]))
    with pytest.raises(ValueError, match=r"at its member 'a\.mp4': it unpacks to more than 100 times its size"):
        clips(bomb)
    bomb = pack(tar_of([("a.txt", b"x"), ("a.bin", bytes(40 << 20)), *pair("b")]))
    with pytest.raises(ValueError, match=r"after its member 'a\.bin': it unpacks to more than 100 times its size"):
        clips(bomb)


def test_what_is_sparse_or_says_it_is_larger_than_it_is_takes_no_memory():
    content = bytearray(tar_of([*pair("a"), *pair("b", 1)]))
    info = tarfile.TarInfo("b.mp4")
    info.size = 1 << 29
    content[2048:2560] = info.tobuf()
    with pytest.raises(ValueError, match=r"at its member 'b\.mp4': unexpected end of data"):
        clips(bytes(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no tar", "cannot be read as a tar"),
        (b"", "cannot be read as a tar"),
        (tar_of(pair("a")) + tar_of(pair("b")), r"after its member 'a\.txt': something follows its end"),
        (tar_of([*pair("a"), ("b.mp4", b"v" * 9000)])[:3000], r"at its member 'b\.mp4'"),
        (gzip.compress(tar_of(pair("a")))[:60], "cannot be read as a tar"),
        (gzip.compress(tar_of(pair("a")))[:-20] + bytes(20), "cannot be read as a tar"),
        (tar_of(pair("a"))[:1024] + b"x" * 512 + tar_of(pair("b")), r"after its member 'a\.mp4'"),
    ],
    ids=["text", "empty", "two of them", "cut", "gzip, cut", "gzip, zeros at its end", "a header of x"],
)
def test_a_damaged_tar_is_refused_with_the_last_member_that_came(content, message):
    with pytest.raises(ValueError, match=message):
        clips(content)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_that_is_cut_anywhere_is_refused_or_said_to_have_no_end(pack, caplog):
    members = [*pair("a"), *pair("b", 1), ("c" * 150 + ".txt", b"long")]
    content = tar_of(members)
    ends = []
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            ends.append(member.offset_data + 512)
    for size in [*range(1, ends[-1], 100), *ends]:
        tars._say_has_no_end.cache_clear()
        caplog.clear()
        file = io.BytesIO(pack(content[:size]))
        if size not in ends:
            with pytest.raises(ValueError, match="cannot be read as a tar"):
                list(read_clips(file, "mp4", ["txt"], name="my.tar"))
            continue
        list(read_clips(file, "mp4", ["txt"], name="my.tar"))
        count = ends.index(size) + 1
        assert (
            f"my.tar ends after {count} member(s) without the two empty blocks that end a tar: it was" in caplog.text
        )
    for size in (ends[-1] + 100, ends[-1] + 512, ends[-1] + 1024, len(content)):
        caplog.clear()
        assert len(list(read_clips(io.BytesIO(pack(content[:size])), "mp4", ["txt"]))) == 3
        assert not caplog.text


def test_a_tar_without_an_end_is_said_once_however_often_it_is_read(caplog):
    tars._say_has_no_end.cache_clear()
    for _ in range(3):
        list(read_clips(io.BytesIO(tar_of(pair("a"))[:2048]), "mp4", ["txt"], name="my.tar"))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("read", [read_table, open_stream])
def test_a_tar_without_members_is_refused_by_name(tmp_path, read):
    (tmp_path / "empty.tar").write_bytes(tar_of([]))
    with pytest.raises(ValueError, match=r"empty\.tar: it has no members; pack videos and their texts into it"):
        read(Source(metadata_path=str(tmp_path / "empty.tar"), **COLUMNS))


def test_the_endings_of_the_first_members_say_whether_columns_are_there():
    file = io.BytesIO(tar_of([("a.json", b"{}"), *pair("a"), ("README", b"")]))
    assert find_endings(file, ["mp4", "txt"]) == ["json", "mp4", "txt"]
    file.seek(0)
    assert find_endings(file, ["video", "prompt"]) == ["json", "mp4", "txt", "README"]


# --- tables and streams of them --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    clip = write_video(tmp_path / "clip.mp4").read_bytes()
    members = [("c.v2.mp4", clip), ("c.v2.txt", b"one"), ("c.v3.mp4", clip), ("d.mp4", clip), ("d.txt", b"two")]
    (tmp_path / "set" / "sub").mkdir(parents=True)
    (tmp_path / "set" / "0.tar").write_bytes(tar_of(members))
    (tmp_path / "set" / "sub" / "1.TAR").write_bytes(tar_of([("e.mp4", b"no video"), ("e.txt", b"three")]))
    return tmp_path / "set"


def test_a_table_of_tars_lists_bad_clips_by_their_names(folder, caplog):
    config = DataConfig(metadata_path=str(folder), on_bad_sample="skip", **COLUMNS, **SHAPE)
    assert [(row.number, row.prompts) for row in load_rows(config)] == [(1, ("one",)), (3, ("two",))]
    assert "row 2, c.v3.mp4: c.v3 has no txt beside it in the tar" in caplog.text
    assert "(e.mp4): not a video that can be read" in caplog.text


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.bz2", "tbz2", "TAR.XZ", "txz"])
def test_compressed_tars_are_tables_and_streams_by_their_names(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pack = next(pack for name, pack in PACKERS.items() if name[:2] in ending.lower()[-3:])
    (tmp_path / "set").mkdir()
    for number in range(2):
        packed = pack(tar_of(pair(f"clip{number}", number)))
        (tmp_path / "set" / f"{number}.{ending}").write_bytes(packed)
    for path, prompts in ((tmp_path / "set", ["text 0", "text 1"]), (tmp_path / "set" / f"1.{ending}", ["text 1"])):
        source = Source(metadata_path=str(path), **COLUMNS)
        assert [row.prompts for row in read_table(source)] == [(prompt,) for prompt in prompts]
        stream = open_stream(source)
        rows = [row for file in range(stream.num_files) for row in stream.read_file(file)]
        assert [row.prompts for row in rows] == [(prompt,) for prompt in prompts]


def test_tars_are_among_the_tables_that_are_named_when_one_is_refused(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"a table must end in \.csv, .*\.parquet, \.tar, \.tar\.gz, .*got rows\.csv\.gz"
    ):
        read_table(Source(metadata_path=str(tmp_path / "rows.csv.gz"), dataset_base_path=str(tmp_path)))


def test_a_table_of_tars_is_read_anew_when_a_tar_changes(folder):
    source = Source(metadata_path=str(folder / "0.tar"), **COLUMNS)
    assert len(read_table(source)) == 3
    (folder / "0.tar").write_bytes(tar_of(pair("a")))
    assert [row.prompts for row in read_table(source)] == [("text 0",)]


def test_a_stream_of_tars_names_bad_clips_and_goes_on(folder):
    stream = open_stream(Source(metadata_path=str(folder), **COLUMNS))
    rows = [row for file in range(stream.num_files) for row in stream.read_file(file)]
    assert [row.prompts for row in rows] == [("one",), (), ("two",), ("three",)]
    assert rows[1].name.endswith("(c.v3.mp4)")
    with pytest.raises(ValueError, match=r"c\.v3 has no txt beside it in the tar"):
        rows[1].find_video(None)
    assert rows[0].find_video(None).open().read()[4:8] == b"ftyp"


@pytest.mark.parametrize("read", [read_table, open_stream])
def test_a_bomb_and_a_tar_without_the_columns_are_refused_by_file(tmp_path, monkeypatch, read):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(gzip.compress(tar_of([("a.bin", bytes(40 << 20)), *pair("a")])))
    with pytest.raises(
        ValueError, match=r"bomb\.tar: it cannot be read as a tar .*'a\.bin': it unpacks to more than 100"
    ):
        read(Source(metadata_path=str(bomb), **COLUMNS))
    (tmp_path / "0.tar").write_bytes(tar_of(pair("a")))
    with pytest.raises(ValueError, match=r"must have the columns video and prompt, but has mp4, txt; name yours with"):
        read(Source(metadata_path=str(tmp_path / "0.tar")))
