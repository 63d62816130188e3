"""Links are followed where that is safe or asked for; else they are named, and none is left out in silence."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from grey_videos import write_video

from causal_wan.data.rows import find_video, load_rows, read_tables, sources_of
from causal_wan.data.settings import DataConfig
from causal_wan.streams.sources import open_stream
from causal_wan.tables.sources import Source
from causal_wan.tables.table import read_table
from causal_wan.video.paths import resolve_path, visible_files


SHAPE = {"num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4").read_bytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def snapshot(folder, files, name="datasets--owner--clips"):
    """A repository as `hf download` leaves it in the hub's cache: names that link to blobs."""
    repository, home = folder / name, folder / name / "snapshots" / "0123abc"
    for number, (file, content) in enumerate(files.items()):
        blob = write(repository / "blobs" / f"{number:064x}", content)
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).symlink_to(os.path.relpath(blob, (home / file).parent))
    return home


def pairs(clip, *names):
    return {f"{name}.{end}": clip if end == "mp4" else name.encode() for name in names for end in ("mp4", "txt")}


# --- the hub's cache -------------------------------------------------------------------------------------------------


def test_a_snapshot_of_the_hub_is_a_folder_of_pairs_and_a_folder_for_paths(tmp_path, clip):
    home = snapshot(tmp_path, pairs(clip, "a", "more/b") | {"rows.csv": b"video,prompt\na.mp4,one\nmore/b.mp4,two\n"})
    rows = load_rows(DataConfig(metadata_path=str(home), **SHAPE))
    assert [(row.name, row.prompts) for row in rows] == [("a.mp4", ("a",)), ("more/b.mp4", ("more/b",))]
    table = DataConfig(metadata_path=str(home / "rows.csv"), dataset_base_path=str(home), **SHAPE)
    assert [row.prompts for row in load_rows(table)] == [("one",), ("two",)]
    below = DataConfig(metadata_path=str(home / "more"), **SHAPE)
    assert [row.name for row in load_rows(below)] == ["b.mp4"]
    (tmp_path / "link").symlink_to(home)
    assert len(load_rows(replace(table, dataset_base_path=str(tmp_path / "link")))) == 2


def test_a_snapshot_leads_to_the_blobs_of_its_own_repository_alone(tmp_path, clip):
    home = snapshot(tmp_path, {"a.mp4": clip})
    other = snapshot(tmp_path, {"secret.mp4": clip}, name="datasets--owner--private")
    repository = home.parents[1]
    write(repository / "refs" / "main", clip)
    targets = {
        "other.mp4": other / "secret.mp4",
        "outside.mp4": write(tmp_path / "outside.mp4", clip),
        "refs.mp4": repository / "refs" / "main",
        "up.mp4": repository / "blobs" / ".." / "refs" / "main",
    }
    for name, target in targets.items():
        (home / name).symlink_to(target)
        with pytest.raises(ValueError, match=r"the path leaves dataset_base_path by a link, to .*--follow_links"):
            resolve_path(name, home)
    for path in ("../../blobs/" + "0" * 64, str(repository / "blobs" / ("0" * 64))):
        with pytest.raises(ValueError, match=r"leaves dataset_base_path$"):
            resolve_path(path, home)


def test_a_folder_that_only_looks_like_a_snapshot_leads_nowhere_else(tmp_path, clip):
    write(tmp_path / "blobs" / "0", clip)
    for home in (tmp_path / "snapshots" / "0", tmp_path / "clips" / "snapshots" / "0"):
        home.mkdir(parents=True)
        (home / "a.mp4").symlink_to(tmp_path / "blobs" / "0")
        with pytest.raises(ValueError, match="by a link"):
            resolve_path("a.mp4", home)


def test_a_file_of_a_snapshot_that_was_never_downloaded_is_said_to_be_missing(tmp_path, clip, caplog):
    home = snapshot(tmp_path, pairs(clip, "a"))
    os.remove(os.path.realpath(home / "a.mp4"))
    with pytest.raises(ValueError, match=r"row 1, a\.mp4: the file does not exist"):
        load_rows(DataConfig(metadata_path=str(home), **SHAPE))
    assert "a.mp4 is a link that leads nowhere" in caplog.text


# --- other links -----------------------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path, clip):
    """A folder with a pair of its own, a linked pair, and a linked folder with a pair."""
    for name, content in pairs(clip, "set/a", "store/b", "other/c").items():
        write(tmp_path / name, content)
    for end in ("mp4", "txt"):
        (tmp_path / "set" / f"b.{end}").symlink_to(tmp_path / "store" / f"b.{end}")
    (tmp_path / "set" / "sub").symlink_to(tmp_path / "other")
    return tmp_path / "set"


def test_linked_clips_and_folders_are_read_if_that_is_asked_for(linked):
    config = DataConfig(metadata_path=str(linked), follow_links=True, **SHAPE)
    assert [(row.name, row.prompts) for row in load_rows(config)] == [
        ("a.mp4", ("set/a",)),
        ("b.mp4", ("store/b",)),
        ("sub/c.mp4", ("other/c",)),
    ]


def test_else_links_are_named_with_what_to_do(linked):
    config = DataConfig(metadata_path=str(linked), **SHAPE)
    with pytest.raises(ValueError, match=r"set/sub is a link to the folder .*other; .* --follow_links"):
        load_rows(config)
    (linked / "sub").unlink()
    with pytest.raises(
        ValueError, match=r"b\.txt must be a text below .*by a link, to .*store/b\.txt; .*--follow_links"
    ):
        load_rows(config)
    (linked / "b.txt").unlink()
    (linked / "b.txt").write_text("b")
    with pytest.raises(
        ValueError, match=r"row 2, b\.mp4: the path leaves .* by a link, to .*store/b\.mp4; .*--follow"
    ):
        load_rows(config)


def test_a_list_of_tables_follows_links_where_it_says_so(linked, tmp_path):
    rows = "video,prompt\nb.mp4,a\n"
    (tmp_path / "rows.csv").write_text(rows)
    table = "- {metadata_path: rows.csv, dataset_base_path: set, follow_links: %s}\n"
    (tmp_path / "tables.yaml").write_text(table % "true" + table % "false")
    config = DataConfig(dataset_config=str(tmp_path / "tables.yaml"), **SHAPE)
    assert [source.follow_links for source in sources_of(config)] == [True, False]
    assert [source.follow_links for source in sources_of(replace(config, follow_links=True))] == [True, True]
    first, second = (next(iter(table)) for table in read_tables(config))
    assert find_video(first)[0] == (tmp_path / "store" / "b.mp4").resolve()
    with pytest.raises(ValueError, match="--follow_links"):
        find_video(second)
    (tmp_path / "tables.yaml").write_text(table % "sometimes")
    with pytest.raises(ValueError, match="follow_links must be true or false, got 'sometimes'"):
        sources_of(config)


def test_a_path_leaves_its_folder_by_links_of_the_folder_alone(linked, tmp_path, clip):
    write(tmp_path / "other.mp4", clip)
    for path in ("../other.mp4", "sub/../../other.mp4", str(tmp_path / "other.mp4"), "/etc/passwd"):
        with pytest.raises(ValueError, match=r"leaves dataset_base_path$"):
            resolve_path(path, linked, follow_links=True)
    with pytest.raises(ValueError, match="does not exist"):  # not that of the folder above the one that `sub` leads to
        resolve_path("sub/../other.mp4", linked, follow_links=True)
    (linked / "device.mp4").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="a pipe, socket or device"):
        resolve_path("device.mp4", linked, follow_links=True)


def test_links_below_the_folder_are_followed_and_every_folder_is_read_once(tmp_path, clip, caplog):
    for name, content in pairs(clip, "set/real/a", "set/.hidden/b").items():
        write(tmp_path / name, content)
    (tmp_path / "set" / "again").symlink_to("real")
    (tmp_path / "set" / "shown").symlink_to(".hidden")
    names = sorted(visible_files(tmp_path / "set"))
    assert names == ["real/a.mp4", "real/a.txt", "shown/b.mp4", "shown/b.txt"]
    assert "again is a link to" in caplog.text and "read already, and once" in caplog.text
    assert len(load_rows(DataConfig(metadata_path=str(tmp_path / "set"), **SHAPE))) == 2


def test_circles_of_links_end(tmp_path, clip):
    for name, content in pairs(clip, "set/a", "other/b").items():
        write(tmp_path / name, content)
    for number in range(8):  # each of which leads to all
        (tmp_path / "set" / f"self{number}").symlink_to(".")
        (tmp_path / "set" / f"up{number}").symlink_to("../other")
        (tmp_path / "other" / f"back{number}").symlink_to("../set")
    (tmp_path / "set" / "loop").symlink_to("loop")
    names = sorted(visible_files(tmp_path / "set", follow_links=True))
    assert names == ["a.mp4", "a.txt", "loop", "up0/b.mp4", "up0/b.txt"]
    (tmp_path / "set" / "loop").rename(tmp_path / "set" / "b.mp4")
    (tmp_path / "set" / "b.mp4").unlink()
    (tmp_path / "set" / "b.mp4").symlink_to("b.mp4")
    with pytest.raises(ValueError, match="its link leads in a circle"):
        resolve_path("b.mp4", tmp_path / "set", follow_links=True)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"must be a folder that can be read \(Permission denied\)"):
        read_table(Source(metadata_path=str(tmp_path)))


# --- streams ---------------------------------------------------------------------------------------------------------


def jsonl(*names):
    return "".join(json.dumps({"video": name, "prompt": name}) + "\n" for name in names).encode()


def test_streams_find_linked_files_and_end_in_circles(tmp_path):
    write(tmp_path / "set" / "0.jsonl", jsonl("a.mp4"))
    write(tmp_path / "store" / "1.jsonl", jsonl("b.mp4"))
    (tmp_path / "set" / "sub").symlink_to(tmp_path / "store")
    for number in range(4):
        (tmp_path / "store" / f"loop{number}").symlink_to(tmp_path / "set")
    source = Source(metadata_path=str(tmp_path / "set"), dataset_base_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"sub is a link to the folder .*--follow_links"):
        open_stream(source)
    stream = open_stream(replace(source, follow_links=True))
    assert [row.video for file in range(stream.num_files) for row in stream.read_file(file)] == ["a.mp4", "b.mp4"]


def test_streams_read_a_snapshot_of_the_hub_and_name_links_that_leave(tmp_path):
    home = snapshot(tmp_path, {"0.jsonl": jsonl("a.mp4")})
    source = Source(metadata_path=str(home), dataset_base_path=str(home))
    (row,) = open_stream(source).read_file(0)
    assert row.video == "a.mp4"
    (home / "1.jsonl").symlink_to(write(tmp_path / "outside.jsonl", jsonl("b.mp4")))
    with pytest.raises(ValueError, match=r"1\.jsonl must be a file below .*by a link, to .*outside\.jsonl"):
        open_stream(source)


def test_paths_of_a_stream_follow_links_if_that_is_asked_for(linked, tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl("b.mp4"))
    source = Source(metadata_path=str(path), dataset_base_path=str(linked))
    for follow_links in (False, True):
        (row,) = open_stream(replace(source, follow_links=follow_links)).read_file(0)
        if follow_links:
            assert row.find_video(str(linked)) == Path(tmp_path / "store" / "b.mp4").resolve()
        else:
            with pytest.raises(ValueError, match="--follow_links"):
                row.find_video(str(linked))
