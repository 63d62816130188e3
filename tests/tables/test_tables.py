"""Tables of every kind give the same rows, keep text as it is, and let no path out of its folder."""

import csv
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, Value, Video
from grey_videos import write_video

import causal_wan.tables.table
import check_dataset
from causal_wan.data.file_manifest import FileFacts, FileManifest, hash_content, stat_of
from causal_wan.data.rows import find_video, load_rows, read_tables, source_weights, sources_of
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.settings import DataConfig
from causal_wan.tables.sources import Source, read_sources
from causal_wan.tables.table import Tables, read_table
from causal_wan.video.opening import EmbeddedVideo


PROMPTS = ["123", "None", "NA", "2024-01-01 10:00:00"]
SHAPE = {"num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4").read_bytes()


@pytest.fixture
def folder(tmp_path, clip):
    (tmp_path / "videos").mkdir()
    for number in range(4):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(clip)
    return tmp_path


def source(path, **changes):
    return Source(metadata_path=str(path), **{"dataset_base_path": str(path.parent / "videos"), **changes})


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path, rows):
    """Rows of values by name, as the suffix of the path says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(v) if isinstance(v, list) else v for name, v in r.items()} for r in rows
            )
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix:
        write_jsonl(path, rows)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return path


# --- files -----------------------------------------------------------------------------------------------------------


KINDS = ["rows.csv", "rows.jsonl", "rows.ndjson", "rows.parquet", "saved"]


@pytest.mark.parametrize("name", KINDS)
def test_tables_of_all_kinds_give_the_same_rows_and_values_stay_text(tmp_path, name):
    rows = [{"video": f"{n}.mp4", "note": 1, "prompt": f" {prompt}\n"} for n, prompt in enumerate(PROMPTS)]
    table = read_table(source(write_table(tmp_path / name, rows)))
    assert len(table) == 4
    assert [row.number for row in table] == [1, 2, 3, 4]
    assert [row.video for row in table] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert [row.prompts for row in table] == [(prompt,) for prompt in PROMPTS]
    assert [table[index] for index in range(4)] == list(table)
    assert table[-1] == table[3]
    with pytest.raises(IndexError):
        table[4]


@pytest.mark.parametrize("name", KINDS)
def test_several_prompts_come_from_a_column_of_lists_and_from_several_columns(tmp_path, name):
    rows = [
        {"video": "0.mp4", "short": "a", "long": ["b", " ", "c "]},
        {"video": "1.mp4", "short": "", "long": ["d"]},
        {"video": "2.mp4", "short": " ", "long": []},
    ]
    table = read_table(source(write_table(tmp_path / name, rows), caption_column=("short", "long")))
    assert [row.prompts for row in table] == [("a", "b", "c"), ("d",), ()]


def test_only_a_json_list_of_texts_in_a_csv_is_several_prompts(tmp_path):
    prompts = ['["a", "b"]', "[wide shot] a dog", "[1, 2]", '["a", 2]', '{"a": 1}']
    rows = [{"video": "0.mp4", "prompt": prompt} for prompt in prompts]
    found = [row.prompts for row in read_table(source(write_table(tmp_path / "rows.csv", rows)))]
    assert found == [("a", "b"), *((prompt,) for prompt in prompts[1:])]
    found = [row.prompts for row in read_table(source(write_table(tmp_path / "rows.jsonl", rows)))]
    assert found == [(prompt,) for prompt in prompts]


def test_rows_may_lack_values(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": None}, {"video": "0.mp4", "prompt": ["a", None]}])
    rows = list(read_table(source(tmp_path / "rows.jsonl")))
    assert [(row.video, row.prompts) for row in rows] == [(None, ()), ("0.mp4", ("a",))]


def test_long_tables_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(causal_wan.tables.table, "CHUNK_ROWS", 3)
    rows = [{"video": f"{number}.mp4", "prompt": str(number)} for number in range(10)]
    table = read_table(source(write_table(tmp_path / "rows.jsonl", rows)))
    assert [(row.number, row.video) for row in table] == [(n + 1, f"{n}.mp4") for n in range(10)]


def test_categories_of_pandas_are_text(tmp_path):
    prompts = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"video": ["0.mp4", "1.mp4", "2.mp4"], "prompt": prompts}), tmp_path / "rows.parquet")
    assert [row.prompts for row in read_table(source(tmp_path / "rows.parquet"))] == [("a",), ("b",), ("a",)]


BAD_FILES = {
    "columns.jsonl": ('{"file": "0.mp4", "prompt": "a"}', "has file, prompt; name yours with --video_column"),
    "broken.jsonl": ('{"video": "0.mp4", "prompt": "a"}\n\n{"video"\n', "line 3 is none"),
    "list.jsonl": ("[1]\n", "line 1 is of type list"),
    "deep.jsonl": ("[" * 100_000, "line 1 is none"),
    "number.jsonl": (
        '{"video": "0.mp4", "prompt": "a"}\n{"video": "1.mp4", "prompt": 5}',
        "line 2: prompt must be text",
    ),
    "numbers.jsonl": ('{"video": "0.mp4", "prompt": ["a", 5]}', "line 1: prompt must be text or a list of texts"),
    "path.jsonl": ('{"video": ["0.mp4"], "prompt": "a"}', "line 1: video must be text, but holds .'0.mp4'.; put"),
    "half.jsonl": ('{"video": "0.mp4", "prompt": "\\ud800"}', "line 1: prompt is no Unicode text"),
    "empty.jsonl": ("\n", "must have at least one row"),
    "fake.parquet": ("no parquet", "is no Parquet file that can be read"),
    "rows.xlsx": ("", "must end in .csv, .tsv, .* .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_files_are_refused_with_the_reason(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(source(tmp_path / name))


def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"video": "0.mp4", "prompt": "café"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.jsonl must be text in UTF-8"):
        read_table(source(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video": ["0.mp4"], "prompt": [5]}, "text or lists of text in the column prompt, but holds int64"),
        ({"video": ["0.mp4"], "prompt": [[5]]}, "in the column prompt, but holds list"),
        (
            {"video": [b"0000"], "prompt": ["a"]},
            "paths as text in the column video, but holds binary; .* save_to_disk",
        ),
        ({"video": ["0.mp4"], "text": ["a"]}, "has video, text; name yours with --video_column"),
        ({"video": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}, "at least one row"),
    ],
)
def test_parquet_of_other_columns_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        read_table(source(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_files_need_a_folder_for_their_paths(tmp_path, name):
    path = write_table(tmp_path / name, [{"video": "0.mp4", "prompt": "a"}])
    with pytest.raises(ValueError, match="dataset_base_path must name the folder that the paths in"):
        read_table(source(path, dataset_base_path=None))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_videos_and_texts_is_a_table(tmp_path, clip):
    for name in ("b/0.mp4", "b/c.d/0.MKV", "a.v2.mp4"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip)
        path.with_suffix(".txt").write_text(f" prompt of {name}\n")
    (tmp_path / "set" / "._a.mp4").touch()
    (tmp_path / "set" / ".hidden").mkdir()
    (tmp_path / "set" / ".hidden" / "x.mp4").touch()
    (tmp_path / "set" / "README.md").touch()
    table = read_table(Source(metadata_path=str(tmp_path / "set")))
    names = ["a.v2.mp4", "b/0.mp4", "b/c.d/0.MKV"]
    assert [(row.video, row.prompts) for row in table] == [(name, (f"prompt of {name}",)) for name in names]
    rows = load_rows(DataConfig(metadata_path=str(tmp_path / "set"), **SHAPE))
    assert [row.video for row in rows] == [(tmp_path / "set" / name).resolve() for name in names]
    above = DataConfig(metadata_path=str(tmp_path / "set"), dataset_base_path=str(tmp_path), **SHAPE)
    assert [row.video for row in load_rows(above)] == [row.video for row in rows]
    assert [row.name for row in load_rows(above)] == [f"set/{name}" for name in names]


def test_videos_and_texts_without_partner_are_named(folder):
    for number in (1, 2, 3):
        (folder / "videos" / f"{number}.txt").write_text("a")
    (folder / "videos" / "lost.txt").write_text("a")
    with pytest.raises(ValueError, match=r"0.mp4 has no 0.txt, lost.txt has no video\."):
        read_table(Source(metadata_path=str(folder / "videos")))


ENDINGS = ["ts", "m2ts", "mts", "mpg", "mpeg", "3gp", "flv", "ogv", "wmv", "gif", "m4v", "MOV", "h264", "mjpeg"]


def test_a_folder_may_hold_videos_of_every_kind_that_is_read(tmp_path, caplog):
    for ending in ENDINGS:
        (tmp_path / f"of {ending}.{ending}").write_bytes(b"1")
        (tmp_path / f"of {ending}.txt").write_text(f"prompt of {ending}")
    table = read_table(Source(metadata_path=str(tmp_path)))
    found = {row.video: row.prompts for row in table}
    assert found == {f"of {ending}.{ending}": (f"prompt of {ending}",) for ending in ENDINGS}
    assert not caplog.text


@pytest.mark.parametrize(("ending", "codec"), [("ts", "mpeg2video"), ("wmv", "wmv2"), ("gif", "gif"), ("flv", "flv")])
def test_videos_of_a_folder_are_opened_whatever_their_kind(tmp_path, ending, codec):
    with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
        stream = container.add_stream(codec, rate=25, height=32, width=48)
        stream.pix_fmt = "rgb8" if ending == "gif" else "yuv420p"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "a.txt").write_text("a")
    (row,) = load_rows(DataConfig(metadata_path=str(tmp_path), **SHAPE))
    assert (row.num_frames, row.height, row.width) == (9, 32, 48)


def test_media_of_a_folder_that_are_not_read_are_counted(tmp_path, caplog):
    for name in ("a.mp4", "a.gif", "a.jpg", "a.wav", "b.gif", "c/d.mkv", "c/e.mxf", "c/f.JPG", "notes.md", "a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for name in ("a.txt", "b.txt", "c/d.txt"):
        (tmp_path / name).write_text("a")
    assert [row.video for row in read_table(Source(metadata_path=str(tmp_path)))] == ["a.mp4", "b.gif", "c/d.mkv"]
    said = "left out 5 file(s) that are not read as videos: 2 .jpg, 1 .gif, 1 .wav, 1 .mxf"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: {said}"]
    (tmp_path / "c" / "e.txt").write_text("a")
    with pytest.raises(ValueError, match=r"c/e\.txt has no video, only c/e\.mxf, which is not read\."):
        read_table(Source(metadata_path=str(tmp_path)))


def test_a_folder_of_media_that_are_not_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.mxf").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"has no video, only 1 file\(s\) that are not read as videos: 1 \.mxf; name"):
        read_table(Source(metadata_path=str(tmp_path)))


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no video; name a table in it by its file"):
        read_table(Source(metadata_path=str(tmp_path)))


def test_a_text_is_not_read_from_outside_its_folder(tmp_path, clip):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret").write_text("password")
    (tmp_path / "set" / "0.mp4").write_bytes(clip)
    os.symlink(tmp_path / "secret", tmp_path / "set" / "0.txt")
    with pytest.raises(ValueError, match=r"0.txt must be a text below .*set: the path leaves"):
        read_table(Source(metadata_path=str(tmp_path / "set")))


def test_an_empty_text_is_a_bad_row(tmp_path, clip):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(clip)
        (tmp_path / f"{name}.txt").write_text("a prompt" if name == "a" else "")
    config = DataConfig(metadata_path=str(tmp_path), **SHAPE)
    with pytest.raises(ValueError, match=r"row 2, b.mp4: the prompt is empty"):
        load_rows(config)


def test_a_text_that_is_not_utf_8_is_refused_by_name(tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a.txt must be text in UTF-8"):
        read_table(Source(metadata_path=str(tmp_path)))


# --- `datasets` ------------------------------------------------------------------------------------------------------


def data_set(videos, feature=None, **columns):
    prompts = [f"prompt {number}" for number in range(len(videos))]
    features = datasets.Features({"video": feature or Video(), "prompt": Value("string")})
    columns = {"video": videos, "prompt": prompts} | columns
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)


@pytest.mark.parametrize("feature", [Video(), Video(decode=False), Value("binary"), Value("large_binary")], ids=str)
def test_a_data_set_on_disk_gives_the_videos_in_it_without_torchcodec(tmp_path, clip, feature, monkeypatch):
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    data_set([clip, clip], feature).save_to_disk(tmp_path / "saved")
    (first, second) = load_rows(DataConfig(metadata_path=str(tmp_path / "saved"), **SHAPE))
    assert isinstance(second.video, EmbeddedVideo)
    assert second.video.open("rb").read() == clip
    assert (second.num_frames, second.prompts, second.number) == (24, ("prompt 1",), 2)
    assert second.name == str(second.video)
    assert first.name != second.name


def test_whether_there_are_bytes_is_seen_without_reading_them(tmp_path, clip):
    data_set([clip] * 3).save_to_disk(tmp_path / "saved")
    table = read_table(Source(metadata_path=str(tmp_path / "saved")))
    before = pa.total_allocated_bytes()
    assert all(isinstance(row.video, EmbeddedVideo) for row in table)
    assert pa.total_allocated_bytes() - before < len(clip)


def test_a_split_of_a_saved_data_set_is_chosen_and_others_are_named(tmp_path, clip):
    splits = {"train": data_set([clip]), "test": data_set([clip, clip])}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(read_table(Source(metadata_path=str(tmp_path / "saved")))) == 1
    assert len(read_table(Source(metadata_path=str(tmp_path / "saved"), split="test"))) == 2
    with pytest.raises(ValueError, match="must have the split dev, but has train, test"):
        read_table(Source(metadata_path=str(tmp_path / "saved"), split="dev"))


def test_paths_in_a_data_set_are_followed_only_below_a_folder_that_is_named(folder, clip, monkeypatch):
    write_video(folder / "outside.mp4")
    paths = [str(folder / "videos" / "0.mp4"), "1.mp4", str(folder / "outside.mp4"), clip]
    data_set([clip]).save_to_disk(folder / "saved")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: data_set(paths))  # what is saved has its bytes
    without = list(read_table(Source(metadata_path=str(folder / "saved"))))
    for row in without[:3]:
        with pytest.raises(ValueError, match=r"holds no bytes of the video, .* --dataset_base_path"):
            find_video(row)
    assert find_video(without[3])[0].open("rb").read() == clip
    rows = list(read_table(source(folder / "saved")))
    assert [find_video(row)[0].name for row in rows[:2]] == ["0.mp4", "1.mp4"]
    with pytest.raises(ValueError, match="the path leaves dataset_base_path"):
        find_video(rows[2])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"clip": ["0.mp4"], "prompt": ["a"]}, "has clip, prompt; name yours"),
        ({"video": [5], "prompt": ["a"]}, "as Video, bytes or paths, but holds Value"),
        ({"video": ["0.mp4"], "prompt": [5]}, "text or lists of text in the column prompt, but holds int64"),
    ],
)
def test_data_sets_of_other_columns_are_refused(tmp_path, columns, message):
    Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=message):
        read_table(source(tmp_path / "saved"))


def test_a_broken_data_set_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is no data set that `datasets` can load"):
        read_table(source(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """What `load_dataset` is called with, and gives."""
    calls = {}

    def load(path, *, split, revision, streaming):
        assert not streaming
        calls.update(name=path, split=split, revision=revision)
        if isinstance(calls["gives"], Exception):
            raise calls["gives"]
        return calls["gives"]

    monkeypatch.setattr("causal_wan.tables.undecoded.load_dataset_builder", lambda path, *, revision: None)
    monkeypatch.setattr("causal_wan.tables.undecoded.load_dataset", load)
    return calls


def test_a_data_set_of_the_hub_is_loaded_by_name_split_and_revision(hub, clip):
    hub["gives"] = data_set([clip])
    (row,) = read_table(Source(metadata_path="owner/name", split="test", revision="v2"))
    assert (hub["name"], hub["split"], hub["revision"]) == ("owner/name", "test", "v2")
    assert row.video.open("rb").read() == clip


def test_paths_in_a_data_set_of_the_hub_stay_in_what_was_downloaded(hub, tmp_path, clip, monkeypatch):
    monkeypatch.setattr(causal_wan.tables.table, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    places = [
        tmp_path / "hub/datasets--owner--name/snapshots/0/0.mp4",
        tmp_path / "downloads/extracted/0.mp4",
        tmp_path / "hub/datasets--owner--other/0.mp4",
        tmp_path / "0.mp4",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(clip)
    hub["gives"] = data_set([*map(str, places), f"{tmp_path}/downloads/../0.mp4", "hf://datasets/a/b/0.mp4"])
    rows = list(read_table(Source(metadata_path="owner/name")))
    assert [find_video(row)[0] for row in rows[:2]] == [place.resolve() for place in places[:2]]
    for row in rows[2:]:
        with pytest.raises(ValueError, match=r"leaves dataset_base_path|not a URL or protocol"):
            find_video(row)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no such data set"), ConnectionError("offline"), ValueError("no")]
)
def test_a_data_set_that_cannot_be_had_is_named(hub, error):
    hub["gives"] = error
    with pytest.raises(ValueError, match=f"owner/name is not here, and loading the split train .*{error}"):
        read_table(Source(metadata_path="owner/name"))


@pytest.mark.parametrize("name", ["data/rows.csv", "data/rows.parquet", "https://host/rows", "/nowhere", "s3://a/b"])
def test_names_of_files_and_addresses_are_no_data_sets_of_the_hub(hub, name):
    with pytest.raises(ValueError, match="does not exist"):
        read_table(Source(metadata_path=name))
    assert "name" not in hub


def write_tars(folder, clip):
    folder.mkdir()
    for file in range(2):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for name, content in ((f"videos/{file}.mp4", clip), (f"videos/{file}.txt", b"prompt %d" % file)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_tars_of_clips_and_texts_are_web_data_sets(folder, clip, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    write_tars(folder / "tars", clip)
    columns = {"video_column": "mp4", "caption_column": ("txt",)}
    monkeypatch.chdir(folder)  # where videos/0.mp4 is a file, too, that must not be taken for the member of the tar
    (folder / "videos" / "0.mp4").write_bytes(b"another")
    rows = load_rows(DataConfig(metadata_path="tars", **columns, **SHAPE))
    assert [(row.number, row.prompts) for row in rows] == [(1, ("prompt 0",)), (2, ("prompt 1",))]
    assert [row.video.open("rb").read() for row in rows] == [clip, clip]
    (row,) = load_rows(DataConfig(metadata_path="tars/1.tar", **columns, **SHAPE))
    assert row.prompts == ("prompt 1",)
    with pytest.raises(ValueError, match=r"but has .*txt.*; name yours with --video_column and --caption_column"):
        read_table(Source(metadata_path="tars"))
    (folder / "tars" / "0.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="tars must be WebDataset tars, but cannot be read as such"):
        read_table(Source(metadata_path="tars", **columns))


# --- several tables --------------------------------------------------------------------------------------------------


def write_list(folder, items):
    (folder / "tables.yaml").write_text(yaml.safe_dump(items))
    return str(folder / "tables.yaml")


def test_a_list_of_tables_is_read_relative_to_its_file(folder):
    (folder / "rows.csv").touch()
    path = write_list(
        folder,
        [
            {"metadata_path": "rows.csv", "dataset_base_path": "videos", "weight": 3},
            {"metadata_path": "owner/name", "weight": 0.5, "split": "test", "caption_column": ["a", "b"]},
            {"metadata_path": "videos", "weight": 1, "video_column": "clip", "caption_column": "text"},
        ],
    )
    first, second, third = read_sources(path)
    assert first.metadata_path == str(folder / "rows.csv")
    assert first.dataset_base_path == str(folder / "videos")
    assert (first.weight, first.caption_column) == (3.0, ("prompt",))
    assert (second.metadata_path, second.split, second.caption_column) == ("owner/name", "test", ("a", "b"))
    assert third.metadata_path == str(folder / "videos")
    assert third.caption_column == ("text",)
    assert source_weights(DataConfig(dataset_config=path)) == [3.0, 0.5, 1.0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_of_tables_may_have_a_mark(tmp_path, encoding):
    (tmp_path / "tables.yaml").write_bytes("- metadata_path: owner/café\n".encode(encoding))
    (table,) = read_sources(str(tmp_path / "tables.yaml"))
    assert table.metadata_path == "owner/café"
    (tmp_path / "tables.yaml").write_bytes("- metadata_path: café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"tables\.yaml must be valid YAML"):
        read_sources(str(tmp_path / "tables.yaml"))


BAD_LISTS = [
    ({"metadata_path": "a.csv"}, "must be a list of tables"),
    ([], "must be a list of tables"),
    (["a.csv"], "must be a list of tables"),
    ([{"metadata_pth": "a.csv"}], "table 1: 'metadata_pth' is not a setting of a table; did you mean 'metadata_path'"),
    ([{"metadata_path": "a.csv"}, {"weight": 1}], "table 2: metadata_path must be given"),
    ([{"metadata_path": "a.csv", "weight": 1}, {"metadata_path": "b.csv"}], "all tables or to none, but 2 of 2"),
    ([{"metadata_path": "a.csv", "weight": 0}], "weight must be a number above 0, got 0"),
    ([{"metadata_path": "a.csv", "weight": float("nan")}], "weight must be a number above 0, got nan"),
    ([{"metadata_path": "a.csv", "weight": True}], "weight must be a number above 0, got True"),
    ([{"metadata_path": "a.csv", "revision": 1.0}], "revision must be text, got 1.0; put it in quotes"),
    ([{"metadata_path": "a.csv", "caption_column": []}], "caption_column must be a name or a list of names"),
]


@pytest.mark.parametrize(("items", "message"), BAD_LISTS)
def test_unusable_lists_are_refused(tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        read_sources(write_list(tmp_path, items))


def test_a_list_that_is_missing_or_no_yaml_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.yaml does not exist"):
        read_sources(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "tables.yaml").write_text("- [")
    with pytest.raises(ValueError, match=r"tables.yaml must be valid YAML"):
        read_sources(str(tmp_path / "tables.yaml"))


def test_one_table_or_a_list_must_be_given():
    with pytest.raises(ValueError, match="exactly one of metadata_path and dataset_config must be given, got neither"):
        sources_of(DataConfig())
    with pytest.raises(ValueError, match="got both"):
        DataConfig(metadata_path="a.csv", dataset_config="b.yaml")


def test_files_of_a_list_may_share_a_folder_and_folders_have_their_own(folder):
    path = write_list(folder, [{"metadata_path": "rows.csv"}, {"metadata_path": "videos"}])
    first, second = sources_of(DataConfig(dataset_config=path, dataset_base_path="shared"))
    assert (first.dataset_base_path, second.dataset_base_path) == ("shared", None)


@pytest.fixture
def three_tables(folder, clip):
    """A table, a folder and a data set, with one bad row in the table."""
    rows = [{"video": "0.mp4", "prompt": "a"}, {"video": "no.mp4", "prompt": "b"}]
    write_table(folder / "rows.csv", rows)
    for number in range(4):
        (folder / "videos" / f"{number}.txt").write_text("c")
    data_set([clip]).save_to_disk(folder / "saved")
    items = [
        {"metadata_path": "rows.csv", "dataset_base_path": "videos", "weight": 2},
        {"metadata_path": "videos", "weight": 1},
        {"metadata_path": "saved", "weight": 1},
    ]
    return DataConfig(dataset_config=write_list(folder, items), **SHAPE)


def test_bad_rows_of_several_tables_are_listed_with_their_table(three_tables, folder):
    with pytest.raises(ValueError) as error:
        load_rows(three_tables)
    assert "1 of 7 rows of" in str(error.value)
    assert f"{folder}/rows.csv, row 2, no.mp4: the file does not exist" in str(error.value)


def test_rows_know_their_table_and_weights_are_shares_of_samples(three_tables, folder):
    write_table(folder / "rows.csv", [{"video": "0.mp4", "prompt": "a"}])
    rows = load_rows(three_tables)
    assert [(row.source, row.number) for row in rows] == [(0, 1), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1)]
    order = SampleOrder(
        [0] * 6, [row.source for row in rows], weights=source_weights(three_tables), seed=0, samples_per_step=1
    )
    shown = [rows[next(order.candidates(number))].source for number in range(400)]
    assert np.bincount(shown) == pytest.approx([200, 100, 100], abs=2)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_table_without_usable_rows_leaves_its_share_to_the_others(empty):
    sources = [source for source in range(3) if source != empty]
    order = SampleOrder([0, 0], sources, weights=[1.0, 1.0, 1.0], seed=0, samples_per_step=1)
    assert np.bincount([next(order.candidates(number)) for number in range(100)]).tolist() == [50, 50]


def test_it_is_said_when_a_table_has_no_usable_row(three_tables, folder, caplog):
    write_table(folder / "rows.csv", [{"video": "no.mp4", "prompt": "a"}])
    rows = load_rows(replace(three_tables, on_bad_sample="skip"))
    assert {row.source for row in rows} == {1, 2}
    assert "rows.csv has no usable row: the other tables fill its share" in caplog.text


def test_several_tables_are_one_sequence(three_tables):
    table = Tables(read_tables(three_tables))
    assert len(table) == 7
    assert [table[index] for index in range(7)] == list(table)
    assert [Path(table.name(index)).name for index in range(7)] == ["rows.csv"] * 2 + ["videos"] * 4 + ["saved"]
    with pytest.raises(IndexError):
        table[7]


# --- what is known of files ------------------------------------------------------------------------------------------


def facts_of(row, **changes):
    path, size, mtime_ns = stat_of(row.video)
    known = {"num_frames": 17, "frame_rate": 8.0, "height": 480, "width": 832}
    return FileFacts(path, row.name, size, mtime_ns, hash_content(row.video), **{**known, **changes})


@pytest.fixture
def one_clip(folder):
    write_table(folder / "rows.csv", [{"video": "0.mp4", "prompt": "a"}])
    base = str(folder / "videos")
    return DataConfig(metadata_path=str(folder / "rows.csv"), dataset_base_path=base, **SHAPE)


def test_facts_of_a_manifest_take_the_place_of_opening_files(one_clip, folder, monkeypatch):
    manifest = FileManifest(folder / "cache")
    (row,) = load_rows(one_clip, manifest)
    assert (row.name, row.content, row.num_frames) == ("0.mp4", "", 24)
    manifest.add([facts_of(row)])
    monkeypatch.setattr("causal_wan.data.rows.probe_video", None)
    (known,) = load_rows(one_clip, manifest)
    assert (known.num_frames, known.frame_rate, known.height, known.width) == (17, 8.0, 480, 832)
    assert (known.content, known.video) == (hash_content(row.video), row.video)


def test_a_file_that_has_changed_or_is_known_as_no_video_is_opened(one_clip, folder):
    (row,) = load_rows(one_clip)
    manifest = FileManifest(folder / "cache")
    manifest.add([facts_of(row, num_frames=0)])
    assert load_rows(one_clip, manifest)[0].num_frames == 24
    manifest.add([facts_of(row)])
    os.utime(row.video, (1, 1))
    (again,) = load_rows(one_clip, manifest)
    assert (again.num_frames, again.content) == (24, "")


def test_videos_that_are_elsewhere_are_known_by_name(one_clip, folder):
    (row,) = load_rows(one_clip)
    manifest = FileManifest(folder / "cache")
    manifest.add([facts_of(row)])
    (folder / "videos").rename(folder / "elsewhere")
    (known,) = load_rows(one_clip, manifest)
    assert (known.num_frames, known.content) == (17, hash_content(folder / "elsewhere" / "0.mp4"))
    write_table(folder / "rows.csv", [{"video": "0.mp4", "prompt": "a"}, {"video": "5.mp4", "prompt": "b"}])
    with pytest.raises(ValueError, match=r"row 2, 5.mp4: the file does not exist"):
        load_rows(one_clip, manifest)
    with pytest.raises(ValueError, match="dataset_base_path must be a folder"):
        load_rows(one_clip)


def test_a_name_in_a_manifest_lets_no_path_out_of_its_folder(one_clip, folder):
    (row,) = load_rows(one_clip)
    manifest = FileManifest(folder / "cache")
    names = ["../gone.mp4", "/gone.mp4", "http://host/gone.mp4"]
    manifest.add(FileFacts(name, name, 1, 1, row.content, 24, 8.0, 48, 80) for name in names)
    write_table(folder / "rows.csv", [{"video": name, "prompt": "a"} for name in names[:2]])
    with pytest.raises(ValueError, match=r"(?s)2 of 2 .*gone.mp4: the path leaves.*gone.mp4: the path leaves"):
        load_rows(one_clip, manifest)


def test_embedded_videos_are_known_by_data_set_and_row(tmp_path, clip):
    data_set([clip, clip]).save_to_disk(tmp_path / "saved")
    config, manifest = DataConfig(metadata_path=str(tmp_path / "saved"), **SHAPE), FileManifest(tmp_path / "cache")
    rows = load_rows(config, manifest)
    manifest.add([facts_of(rows[1])])
    again = load_rows(config, manifest)
    assert [row.num_frames for row in again] == [24, 17]
    assert [bool(row.content) for row in again] == [False, True]


# --- the check of a data set -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [0, 2])
def test_several_tables_are_checked_together_and_bad_rows_named_with_theirs(three_tables, tmp_path, num_processes):
    config = check_dataset.Config(
        data=three_tables, output_dir=str(tmp_path / "out"), num_processes=num_processes, num_samples=7
    )
    assert check_dataset.main(config) == 1
    (bad,) = csv.DictReader((tmp_path / "out" / "bad_rows.csv").open())
    assert bad["row"] == "2"
    assert bad["video"].endswith("rows.csv: no.mp4")
    records = (tmp_path / "out" / "records.jsonl").read_text()
    assert len(records.splitlines()) == 7
    assert check_dataset.main(config) == 1
    assert (tmp_path / "out" / "records.jsonl").read_text() == records
