import csv
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Video, config, load_dataset

import causal_wan.sources
from causal_wan.sources import Source, read_sources
from causal_wan.tables import TableRow, read_table
from causal_wan.video_files import EmbeddedVideo, resolve_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With videos/ (whose content does not matter), and a cache of data sets of its own."""
    (tmp_path / "videos").mkdir()
    for number in range(3):
        (tmp_path / "videos" / f"{number}.mp4").write_bytes(content(number))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def content(number):
    return bytes([number]) * 100


def source(folder, name, text=None, **changes):
    if text is not None:
        (folder / name).write_text(text, encoding="utf-8")
    return Source(metadata_path=str(folder / name), dataset_base_path=str(folder / "videos"), **changes)


def plain(rows):
    return [(row.number, row.video, row.prompts) for row in rows]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# --- text ------------------------------------------------------------------------------------------------------------


def test_csv_values_stay_text(folder):
    text = 'prompt,video,note\n"one, two\nthree",0.mp4,x\n123,1.mp4,\nNone,2.mp4,\nNA,,\n,0.mp4,\n'
    rows = read_table(source(folder, "rows.csv", text))
    assert plain(rows) == [
        (1, "0.mp4", ("one, two\nthree",)),
        (2, "1.mp4", ("123",)),
        (3, "2.mp4", ("None",)),
        (4, "", ("NA",)),
        (5, "0.mp4", ("",)),
    ]
    assert rows.base_path == folder / "videos"


def test_a_cell_that_is_a_json_list_of_texts_is_several_prompts(folder):
    cells = [json.dumps(["one", 'two, "three"']), "[a dog]", "[1, 2]", '["open', "no list"]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "prompt"], *(["0.mp4", cell] for cell in cells)])
    prompts = [row.prompts for row in read_table(source(folder, "rows.csv"))]
    assert prompts == [("one", 'two, "three"'), ("[a dog]",), ("[1, 2]",), ('["open',), ("no list",)]


def test_several_columns_are_several_prompts(folder):
    captions = {"caption_columns": ("short", "long")}
    csv_rows = read_table(
        source(folder, "rows.csv", "video,long,short\n0.mp4,a long one,one\n1.mp4,,two\n", **captions)
    )
    assert [row.prompts for row in csv_rows] == [("one", "a long one"), ("two", "")]
    text = '{"video": "0.mp4", "short": ["a", "b"], "long": "c"}\n{"video": "1.mp4", "long": "d"}\n'
    assert [row.prompts for row in read_table(source(folder, "rows.jsonl", text, **captions))] == [
        ("a", "b", "c"),
        ("", "d"),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "list.json"])
def test_json_values_stay_text(folder, name):
    entries = [
        {"video": "0.mp4", "prompt": "2024-01-01", "other": 1},
        {"video": "1.mp4", "prompt": ["123", "None"]},
        {"prompt": None, "video": None},
        {"video": "2.mp4", "prompt": ["ein Käfer", None]},
    ]
    text = json.dumps(entries) if name == "list.json" else "\n\n".join(map(json.dumps, entries)) + "\n"
    assert plain(read_table(source(folder, name, text))) == [
        (1, "0.mp4", ("2024-01-01",)),
        (2, "1.mp4", ("123", "None")),
        (3, None, ("",)),
        (4, "2.mp4", ("ein Käfer", "")),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.csv", "", "is empty"),
        ("rows.csv", "video,prompt\n", "has none"),
        ("rows.csv", "file,caption\n0,a\n", "has file, caption; name yours with --video_column and --caption_column"),
        ("rows.csv", "video,prompt\n0.mp4,a dog, running\n", "2 fields a row, but its first row has 3; put quotes"),
        ("rows.csv", "video,prompt\n0.mp4,a\n1.mp4,a dog, runs\n", "Expected 2 fields in line 3, saw 3.*put quotes"),
        ("rows.csv", 'video,prompt\n0.mp4,a\n1.mp4,"b\n2.mp4,c\n', "must have 2 fields a row .*close them"),
        ("rows.jsonl", "", "must have at least one row"),
        ("rows.jsonl", '{"file": "0.mp4"}\n{"caption": "a"}\n', "columns video and prompt, but has file, caption"),
        ("rows.jsonl", '{"video": "0.mp4", "prompt": 5}', r"row 1, prompt must be text or a list.*a number \(5\)"),
        ("rows.jsonl", '{"video": "0.mp4", "prompt": ["a", {}]}', r"row 1, prompt must .*a mapping \(\{\}\)"),
        ("rows.jsonl", '{"video": ["0.mp4"], "prompt": "a"}', "video must be the path of a file, got a list"),
        ("rows.jsonl", '{"video": "0.mp4", "prompt": "a\\ud83d"}', "row 1, prompt must be text, but has half a char"),
        (
            "rows.jsonl",
            '{"video": "0.mp4", "prompt": "a"}\n{"video": \n',
            "one JSON object a line, but line 2: Expecting",
        ),
        ("rows.jsonl", '"a"\n', "line 1: got a text"),
    ],
)
def test_unusable_text_is_refused(folder, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_table(source(folder, name, text))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_text_that_is_not_utf_8_is_refused_by_name(folder, name):
    (folder / name).write_bytes("video,prompt\n0.mp4,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} must be text in UTF-8"):
        read_table(source(folder, name))


@pytest.mark.parametrize("name", ["no.csv", "no.jsonl", "no.parquet", "no.tar", "no.xlsx", "nowhere"])
def test_what_is_not_there_is_named(folder, name):
    with pytest.raises(ValueError, match=f"metadata_path must be .*{name}.* does not exist"):
        read_table(source(folder, name))


def test_paths_need_a_folder(folder):
    text = "video,prompt\n0.mp4,a\n"
    with pytest.raises(ValueError, match="nowhere is not one"):
        read_table(Source(metadata_path=source(folder, "rows.csv", text).name, dataset_base_path="nowhere"))
    with pytest.raises(ValueError, match="--dataset_base_path must say below which folder"):
        read_table(Source(metadata_path=str(folder / "rows.csv")))


def test_rows_are_a_sequence_that_is_small(folder):
    lines = (json.dumps({"video": f"{i}.mp4", "prompt": f"prompt {i}"}) for i in range(25_000))
    rows = read_table(source(folder, "rows.jsonl", "\n".join(lines)))
    assert len(rows) == 25_000
    assert rows[-1] == TableRow(25_000, "24999.mp4", ("prompt 24999",))
    assert rows[9_999:10_002] == [rows[i] for i in (9_999, 10_000, 10_001)] == list(rows)[9_999:10_002]
    with pytest.raises(IndexError):
        rows[25_000]
    assert rows._table.nbytes < 100 * len(rows)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_videos_with_texts_beside_them(folder):
    videos = folder / "videos"
    (videos / "sub").mkdir()
    (videos / "sub" / "a.b.MOV").write_bytes(b"x")
    (videos / "sub" / "a.b.TXT").write_text("below")
    (videos / ".hidden.mp4").touch()
    (videos / "notes.md").touch()
    for number in range(3):
        (videos / f"{number}.txt").write_text(f"prompt {number}\n")
    expected = [(i + 1, f"{i}.mp4", (f"prompt {i}\n",)) for i in range(3)] + [(4, "sub/a.b.MOV", ("below",))]
    rows = read_table(Source(metadata_path=str(videos)))
    assert plain(rows) == plain(read_table(Source(dataset_base_path=str(videos)))) == expected
    assert all(resolve_path(row.video, rows.base_path).is_file() for row in rows)


def test_videos_and_texts_without_a_partner_are_all_named(folder):
    videos = folder / "videos"
    (videos / "1.txt").touch()
    (videos / "lone.txt").touch()
    (videos / "1.mov").touch()
    with pytest.raises(ValueError) as error:
        read_table(Source(metadata_path=str(videos)))
    for problem in (
        "0.mp4 has no text beside it",
        "2.mp4 has no text beside it",
        "lone.txt has no video beside it",
        "1.mov and",
    ):
        assert problem in str(error.value)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="has no videos"):
        read_table(Source(metadata_path=str(folder / "empty")))


def test_a_text_cannot_be_a_link_out_of_its_folder(folder):
    for number in range(3):
        (folder / "videos" / f"{number}.txt").write_text("a")
    (folder / "secret.txt").write_text("secret")
    (folder / "videos" / "0.txt").unlink()
    os.symlink(folder / "secret.txt", folder / "videos" / "0.txt")
    with pytest.raises(ValueError, match=r"0.txt must be a file below .*, symlinks resolved"):
        read_table(Source(metadata_path=str(folder / "videos")))


# --- Parquet and data sets -------------------------------------------------------------------------------------------


def read_videos(rows):
    assert all(isinstance(row.video, EmbeddedVideo) for row in rows)
    return [row.video.open("rb").read() for row in rows]


def embedded(prompts=("a", "b", "c")):
    videos = [{"bytes": content(number), "path": f"{number}.mp4"} for number in range(3)]
    return Dataset.from_dict({"video": videos, "prompt": list(prompts)}).cast_column("video", Video())


def test_parquet_with_paths(folder):
    columns = {"video": ["0.mp4", None], "prompt": [["a", "b"], None], "other": [1, 2]}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    rows = read_table(source(folder, "rows.parquet"))
    assert plain(rows) == [(1, "0.mp4", ("a", "b")), (2, None, ("",))]
    pq.write_table(
        pa.table({"video": ["0.mp4"], "prompt": pa.array(["123"]).dictionary_encode()}), folder / "d.parquet"
    )
    assert plain(read_table(source(folder, "d.parquet"))) == [(1, "0.mp4", ("123",))]


@pytest.mark.parametrize("kind", ["Video", "bytes"])
def test_parquet_with_videos(folder, kind):
    path = str(folder / "rows.parquet")
    if kind == "Video":
        embedded().to_parquet(path)
    else:
        pq.write_table(pa.table({"video": [content(i) for i in range(3)], "prompt": ["a", "b", "c"]}), path)
    rows = read_table(Source(metadata_path=path))
    assert read_videos(rows) == [content(number) for number in range(3)]
    assert [row.prompts for row in rows] == [("a",), ("b",), ("c",)]
    assert rows.base_path is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video": ["0.mp4"], "caption": ["a"]}, "columns video and prompt, but has video, caption; name yours"),
        ({"video": ["0.mp4"], "prompt": [5]}, "the column prompt must hold text or lists of texts, but holds int64"),
        ({"video": [5], "prompt": ["a"]}, "the column video must hold paths or videos, but holds int64"),
        ({"video": [{"a": 1}], "prompt": ["a"]}, "the column video must hold paths or videos, but holds struct"),
        ({"video": pa.array([], pa.string()), "prompt": pa.array([], pa.string())}, "at least one row"),
        (None, "must be a Parquet file"),
    ],
)
def test_unusable_parquet_is_refused(folder, columns, message):
    path = folder / "rows.parquet"
    if columns is None:
        path.write_text("video,prompt\n")
    else:
        pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=message):
        read_table(source(folder, "rows.parquet"))


def test_a_saved_data_set(folder):
    embedded([["a", "1"], ["b"], []]).save_to_disk(folder / "saved")
    rows = read_table(Source(metadata_path=str(folder / "saved")))
    assert read_videos(rows) == [content(number) for number in range(3)]
    assert [row.prompts for row in rows] == [("a", "1"), ("b",), ()]
    assert "row 2 of" in str(rows[1].video)


def test_the_splits_of_a_saved_data_set(folder):
    DatasetDict(train=embedded(), test=embedded("xyz")).save_to_disk(folder / "saved")
    assert [row.prompts[0] for row in read_table(Source(metadata_path=str(folder / "saved"), split="test"))] == [
        *"xyz"
    ]
    with pytest.raises(ValueError, match="no split val, but train, test"):
        read_table(Source(metadata_path=str(folder / "saved"), split="val"))


def test_a_saved_data_set_with_paths_needs_their_folder(folder):
    paths = [str(folder / "videos" / "0.mp4"), "1.mp4", "/etc/passwd"]
    Dataset.from_dict({"video": paths, "prompt": ["a", "b", "c"]}).save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match="names files, so --dataset_base_path must say below which folder"):
        read_table(Source(metadata_path=str(folder / "saved")))
    rows = read_table(source(folder, "saved"))
    assert resolve_path(rows[0].video, rows.base_path) == resolve_path("0.mp4", folder / "videos")
    assert resolve_path(rows[1].video, rows.base_path).name == "1.mp4"
    with pytest.raises(ValueError, match="the path leaves dataset_base_path"):
        resolve_path(rows[2].video, rows.base_path)


def test_webdataset_tars(folder, monkeypatch):
    for shard in range(2):
        members = {f"videos/{i}.{end}": data for i in (0, 1) for end, data in tar_member(2 * shard + i)}
        write_tar(folder / "tars" / f"{shard}.tar", members)
    monkeypatch.chdir(folder)  # where videos/0.mp4 is a file, too, that must not be taken for the member of the tar
    columns = {"video_column": "mp4", "caption_columns": ("txt",)}
    rows = read_table(Source(metadata_path=str(folder / "tars"), **columns))
    assert read_videos(rows) == [content(number + 10) for number in range(4)]
    assert [row.prompts for row in rows] == [(f"prompt {number}",) for number in range(4)]
    one = read_table(Source(metadata_path=str(folder / "tars" / "1.tar"), **columns))
    assert [row.prompts for row in one] == [("prompt 2",), ("prompt 3",)]
    with pytest.raises(ValueError, match=r"has .*txt.*; name yours with --video_column and --caption_column"):
        read_table(Source(metadata_path=str(folder / "tars")))


def tar_member(number):
    return ("mp4", content(number + 10)), ("txt", f"prompt {number}".encode())


def test_damaged_tars_are_named(folder):
    (folder / "tars").mkdir()
    (folder / "tars" / "0.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="tars could not be loaded as a data set: "):
        read_table(Source(metadata_path=str(folder / "tars"), video_column="mp4", caption_columns=("txt",)))


def test_a_data_set_of_the_hub(folder, monkeypatch):
    (folder / "repo" / "data").mkdir(parents=True)
    embedded().to_parquet(str(folder / "repo" / "data" / "train-00000-of-00001.parquet"))
    asked = []

    def load(path, **arguments):
        asked.append((path, arguments.pop("revision", None)))
        return load_dataset(str(folder / "repo") if path == "owner/clips" else path, **arguments)

    monkeypatch.setattr(causal_wan.sources, "load_dataset", load)
    rows = read_table(Source(metadata_path="owner/clips", revision="v1"))
    assert set(asked) == {("owner/clips", "v1")}
    assert read_videos(rows) == [content(number) for number in range(3)]
    assert plain(read_table(Source(metadata_path=str(folder / "repo"))))[0][2] == ("a",)  # a clone of it
    with pytest.raises(ValueError, match=r"owner/clips could not be loaded as a data set: .*nosuch"):
        read_table(Source(metadata_path="owner/clips", split="nosuch"))


def test_files_of_a_data_set_of_the_hub_lie_in_the_cache(folder, monkeypatch):
    (folder / "cache").mkdir()
    inside = folder / "cache" / "0.mp4"
    inside.write_bytes(content(0))
    paths = Dataset.from_dict({"video": [str(inside), str(folder / "videos" / "1.mp4")], "prompt": ["a", "b"]})
    monkeypatch.setattr(causal_wan.sources, "load_dataset", lambda *_, **__: paths.cast_column("video", Video()))
    rows = read_table(Source(metadata_path="owner/clips", dataset_base_path=str(folder)))
    assert resolve_path(rows[0].video, rows.base_path) == inside.resolve()
    with pytest.raises(ValueError, match="leaves"):
        resolve_path(rows[1].video, rows.base_path)


def test_a_data_set_that_the_hub_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="owner/no-such-clips could not be loaded as a data set: "):
        read_table(Source(metadata_path="owner/no-such-clips"))


# --- several sources -------------------------------------------------------------------------------------------------


def write_config(folder, text):
    (folder / "mix.yaml").write_text(text)
    return folder / "mix.yaml"


def test_a_list_of_sources_is_relative_to_its_file(folder, monkeypatch):
    (folder / "a.csv").write_text("video,prompt\n0.mp4,a\n")
    monkeypatch.chdir("/")
    sources = read_sources(
        write_config(
            folder,
            "- metadata_path: a.csv\n  dataset_base_path: videos\n  weight: 2\n"
            "- metadata_path: owner/clips\n  caption_columns: [short, long]\n  split: test\n  weight: 0.5\n"
            "- dataset_base_path: videos\n  caption_column: text\n  weight: 1\n",
        )
    )
    first, second, third = sources
    assert read_table(first)[0].prompts == ("a",)
    assert (second.metadata_path, second.caption_columns, second.split) == ("owner/clips", ("short", "long"), "test")
    assert second.is_on_hub
    assert (third.metadata_path, third.dataset_base_path) == (None, str(folder / "videos"))
    assert third.caption_columns == ("text",)
    assert [source.weight for source in sources] == [2, 0.5, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metadata_path: a.csv", "must be a list of sources"),
        ("", "must be a list of sources"),
        ("- [", "must be valid YAML"),
        ("- a.csv", "source 1: a source must be a mapping, got 'a.csv'"),
        ("- metadata_pth: a.csv", "source 1: 'metadata_pth' is no setting of a source; did you mean metadata_path?"),
        ("- metadata_path: a.csv\n  zzz: 1", "'zzz' is no setting of a source; there are metadata_path, "),
        ("- metadata_path: 5", "metadata_path must be text, got 5"),
        ("- metadata_path: a.csv\n  weight: heavy", "weight must be a number, got 'heavy'"),
        ("- metadata_path: a.csv\n  weight: 0", "weight must be above 0 and finite, got 0"),
        ("- metadata_path: a.csv\n  weight: .nan", "weight must be above 0 and finite"),
        ("- metadata_path: a.csv\n  caption_columns: [1]", "caption_columns must be a name or a list of names"),
        ("- metadata_path: a.csv\n  caption_columns: []", "caption_columns must name at least one column"),
        ("- weight: 1", "must have a metadata_path, or a dataset_base_path"),
        ("- metadata_path: a.csv\n  weight: 1\n- metadata_path: b.csv", "or none, but source 2 has none"),
    ],
)
def test_mistakes_in_a_list_of_sources_are_named(folder, text, message):
    with pytest.raises(ValueError, match=message):
        read_sources(write_config(folder, text))
    with pytest.raises(ValueError, match="does not exist"):
        read_sources(folder / "no.yaml")
