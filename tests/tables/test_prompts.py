"""Files of prompts, by the rules of tables."""

import csv
import json

import pytest

from causal_wan.evaluation.vbench_export import read_vbench_prompts
from causal_wan.tables.prompts import read_prompts_file


PROMPTS = ["a dog, running", "café", "--- one\u2028two\x85three", '"go" she says']


def read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts_file(str(tmp_path / name))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n \n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_has_a_prompt_a_line_and_nothing_else_ends_one(tmp_path, end, encoding):
    content = end.join(f" {prompt} " for prompt in PROMPTS).encode(encoding)
    assert read(tmp_path, "prompts.txt", content) == PROMPTS
    assert read_vbench_prompts(str(tmp_path / "prompts.txt")) == PROMPTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "separator"), [("p.csv", ","), ("P.CSV", ";"), ("p.tsv", "\t"), ("p.Csv", "|")])
def test_tables_of_prompts_are_read_as_tables_of_clips_are(tmp_path, name, separator, encoding):
    with (tmp_path / "table").open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows(
            [("", " prompt ", "note", "note"), *(("0", prompt, "x", "y") for prompt in PROMPTS), ("",) * 4]
        )
    assert read(tmp_path, name, (tmp_path / "table").read_bytes()) == PROMPTS


def test_a_table_may_have_the_column_of_prompts_alone_and_long_ones(tmp_path):
    assert read(tmp_path, "p.csv", 'prompt\na; b\n"c, d"\n\n' + "12" * 100_000) == ["a; b", "c, d", "12" * 100_000]


def test_lists_are_several_prompts(tmp_path):
    assert read(tmp_path, "p.csv", 'prompt\n"[""a"", ""b""]"\n[wide] c\n') == ["a", "b", "[wide] c"]
    lines = [{"prompt": ["a", " ", "b"]}, {"prompt": "[wide] c", "note": 1}, {"note": 2}]
    for name in ("p.jsonl", "p.NDJSON"):
        assert read(tmp_path, name, "\ufeff" + "\n".join(map(json.dumps, lines))) == ["a", "b", "[wide] c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\ncafé\n".encode("latin-1"), r"p\.txt must be text in UTF-8, but line 2 is not; .*café"),
        ("p.csv", "prompt\na\ncafé\n".encode("cp1252"), r"p\.csv must be text in UTF-8, but row 2 \(line 3\) is not"),
        ("p.jsonl", '{"prompt": "café"}'.encode("latin-1"), r"p\.jsonl must be text in UTF-8, but line 1"),
        ("p.txt", "a\0b", "line 1 has NUL characters"),
        ("p.txt", "\n \n", r"at least one prompt must not be empty; .*p\.txt has none"),
        ("p.csv", "prompt\na, b\n", r"must have 1 fields a row, but row 1 \(line 2\) has 2"),
        ("p.csv", 'prompt\na\n"b\n', r"row 2 \(line 3\) opens a quote that never closes"),
        ("p.csv", "text,note\na,b\n", "must have a column named prompt, got text, note"),
        ("p.csv", "prompt,prompt\na,b\n", "must have a column named prompt, got 2 of them"),
        ("p.csv", "", "is empty"),
        ("p.jsonl", '{"text": "a"}\n', "must have a column named prompt, got text"),
        ("p.jsonl", '{"prompt": 5}\n', "line 1: prompt must be text or a list of texts, but holds 5"),
        ("p.xlsx", b"PK\x03\x04", "is a zip archive or a workbook"),
        ("p.parquet", b"PAR1", "is Parquet"),
    ],
)
def test_other_files_are_refused_by_the_cause_with_its_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_what_is_no_file_is_named(tmp_path):
    for path, there in ((tmp_path, "is none"), (tmp_path / "nowhere.txt", "does not exist")):
        with pytest.raises(ValueError, match=f"prompts_file must be a text or CSV file, but {path} {there}"):
            read_prompts_file(str(path))
