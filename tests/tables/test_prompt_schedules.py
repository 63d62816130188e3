"""The column prompt_schedule, in tables of all kinds, and what cannot be a schedule."""

import io
import json
import tarfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causal_wan.tables.prompt_schedules import PromptSchedule, parse_prompt_schedule, texts_of
from causal_wan.tables.prompts import read_prompt_rows
from causal_wan.tables.sources import Source
from causal_wan.tables.table import read_table


PAIRS = [[0, "a cat, sitting"], [2.5, "the cat jumps"]]
SCHEDULE = PromptSchedule((0.0, 2.5), ("a cat, sitting", "the cat jumps"))
ROWS = [("0.mp4", PAIRS, "a cat"), ("1.mp4", None, "a dog"), ("2.mp4", [[0, "a bird"]], "not this")]
EXPECTED = [(SCHEDULE,), ("a dog",), ("a bird",)]


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def prompts(path, base, **columns):
    table = read_table(Source(metadata_path=str(path), dataset_base_path=str(base), **columns))
    assert [table[index] for index in range(len(table))] == list(table)
    return [row.prompts for row in table]


def write_csv(path, with_prompts, separator=","):
    lines = [["video", "prompt_schedule", *["prompt"] * with_prompts]]
    for video, pairs, prompt in ROWS:
        cell = "" if pairs is None else quoted(json.dumps(pairs))
        lines.append([video, cell, *[prompt] * with_prompts])
    path.write_text("\n".join(separator.join(line) for line in lines))


@pytest.mark.parametrize(("name", "separator"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_a_schedule_of_a_csv_wins_over_the_prompt_where_its_cell_is_filled(tmp_path, name, separator):
    write_csv(tmp_path / name, True, separator)
    assert prompts(tmp_path / name, tmp_path) == EXPECTED


def test_a_table_may_have_schedules_in_the_place_of_prompts(tmp_path):
    write_csv(tmp_path / "t.csv", False)
    assert prompts(tmp_path / "t.csv", tmp_path) == [(SCHEDULE,), (), ("a bird",)]


@pytest.mark.parametrize("is_text", [False, True])
def test_schedules_of_json_lines_are_lists_or_json(tmp_path, is_text):
    path = tmp_path / "t.jsonl"
    rows = [
        {"video": video, "prompt_schedule": json.dumps(pairs) if is_text and pairs else pairs, "prompt": prompt}
        for video, pairs, prompt in ROWS
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert prompts(path, tmp_path) == EXPECTED


FORMS = {
    "JSON": (pa.string(), json.dumps),
    "lists of texts": (pa.list_(pa.list_(pa.string())), lambda pairs: [[str(second), text] for second, text in pairs]),
    "structs": (
        pa.list_(pa.struct({"seconds": pa.float64(), "prompt": pa.string()})),
        lambda pairs: [{"seconds": second, "prompt": text} for second, text in pairs],
    ),
}


@pytest.mark.parametrize(("kind", "form"), FORMS.values(), ids=FORMS)
def test_schedules_of_parquet_are_json_or_lists(tmp_path, kind, form):
    columns = {
        "video": pa.array([video for video, _, _ in ROWS]),
        "prompt": pa.array([prompt for _, _, prompt in ROWS]),
        "prompt_schedule": pa.array([pairs and form(pairs) for _, pairs, _ in ROWS], kind),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert prompts(tmp_path / "t.parquet", tmp_path) == EXPECTED
    data_set = datasets.Dataset(pa.table(columns))
    data_set.save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved", tmp_path) == EXPECTED


def test_a_data_set_that_was_loaded_of_mixed_lists_has_schedules(tmp_path):
    """`datasets` keeps what is of several types as JSON."""
    rows = [{"video": video, "prompt_schedule": pairs, "prompt": prompt} for video, pairs, prompt in ROWS]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "t.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    loaded.save_to_disk(tmp_path / "saved")
    assert prompts(tmp_path / "saved", tmp_path) == EXPECTED


def test_a_tar_has_schedules_beside_its_clips(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, content in (
            ("a.mp4", b"a clip"),
            ("a.prompt_schedule.json", json.dumps(PAIRS).encode()),
            ("b.mp4", b"another"),
            ("b.txt", b"a dog"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    columns = {"video_column": "mp4", "caption_column": ("txt", "prompt_schedule.json")}
    assert prompts(tmp_path / "t.tar", tmp_path, **columns) == [(SCHEDULE,), ("a dog",)]


BAD = [
    ("[[0, 'a']]", "must be JSON"),
    ("a cat", "must be JSON"),
    ('{"0": "a"}', "must be pairs"),
    ('[[0, "a", 1]]', "must be pairs"),
    ('[["soon", "a"]]', "must be pairs"),
    ("[[0, 5]]", "must be pairs"),
    ('[[true, "a"]]', "must be pairs"),
    ('["a", "b"]', "must be pairs"),
    ("5", "must be pairs"),
    ('[[1, "a"]]', "must begin at 0 seconds, got 1"),
    ('[[0, "a"], [-1, "b"]]', "must be 0 or more, got 0, -1"),
    ('[[0, "a"], [NaN, "b"]]', "must be 0 or more, got 0, nan"),
    ('[[0, "a"], [2, "b"], [2, "c"]]', "must rise, got 0, 2, 2"),
    ('[[0, "a"], [3, "b"], [2, "c"]]', "must rise, got 0, 3, 2"),
    ('[[0, "a"], [1, " "]]', "must not be empty, but that at 1 s is"),
]


@pytest.mark.parametrize(("cell", "message"), BAD)
def test_what_is_no_schedule_is_an_error_of_its_row(tmp_path, cell, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt_schedule(cell)
    (tmp_path / "t.csv").write_text(f"video,prompt,prompt_schedule\n0.mp4,a,\n1.mp4,b,{quoted(cell)}\n")
    table = read_table(Source(metadata_path=str(tmp_path / "t.csv"), dataset_base_path=str(tmp_path)))
    assert table[0].error is None
    assert message in table[1].error
    (tmp_path / "p.csv").write_text(f"prompt,prompt_schedule\na,\nb,{quoted(cell)}\n")
    with pytest.raises(ValueError, match=rf"p\.csv, row 2: .*{message}"):
        read_prompt_rows(str(tmp_path / "p.csv"))


@pytest.mark.parametrize("cell", ["", "  ", None, [], "null", "[]"])
def test_an_empty_cell_is_no_schedule(cell):
    assert parse_prompt_schedule(cell) is None


def test_a_file_of_prompts_may_have_schedules(tmp_path):
    (tmp_path / "p.csv").write_text(f"prompt,prompt_schedule\na dog,\nb,{quoted(json.dumps(PAIRS))}\n")
    assert [row.prompt for row in read_prompt_rows(str(tmp_path / "p.csv"))] == ["a dog", SCHEDULE]
    (tmp_path / "p.csv").write_text(f"prompt_schedule\n{quoted(json.dumps(PAIRS))}\n")
    assert [row.prompt for row in read_prompt_rows(str(tmp_path / "p.csv"))] == [SCHEDULE]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt_schedule": PAIRS}) + '\n{"prompt": "a dog"}\n')
    assert [row.prompt for row in read_prompt_rows(str(tmp_path / "p.jsonl"))] == [SCHEDULE, "a dog"]


def test_a_table_without_prompts_and_schedules_and_one_with_two_columns_of_them_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("video,text\n0.mp4,a\n")
    with pytest.raises(ValueError, match="must have the columns video and prompt, but has video, text"):
        prompts(tmp_path / "t.csv", tmp_path)
    (tmp_path / "t.csv").write_text("video,prompt_schedule,prompt_schedule\n0.mp4,,\n")
    with pytest.raises(ValueError, match="must have one column prompt_schedule, but has 2"):
        prompts(tmp_path / "t.csv", tmp_path)


def test_the_prompt_in_force_is_the_last_that_has_begun():
    schedule = PromptSchedule((0.0, 1.0, 2.0), ("a", "b", "a"))
    assert schedule.by_frame([0, 0.99, 1, 1.5, 2, 100]) == ("a", "a", "b", "b", "a", "a")
    assert texts_of([schedule, "c", ("b", "d", "d"), "a"]) == ["a", "b", "c", "d"]
    schedule.check_ends_before(2.1)
    with pytest.raises(ValueError, match="before the video ends, which is at 2 s, got 2 s"):
        schedule.check_ends_before(2.0)
