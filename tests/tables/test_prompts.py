"""Files of prompts, by the rules of tables."""

import csv
import json

import pytest

from causal_wan.tables.prompts import count_blank, prompts_of, read_prompt_rows, read_prompts_file
from causal_wan.tables.sources import check_suffix


PROMPTS = ["a dog, running", "café", "--- one\u2028two\x85three", '"go" she says']


def read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts_file(str(tmp_path / name))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n \n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_has_a_prompt_a_line_and_nothing_else_ends_one(tmp_path, end, encoding):
    content = end.join(f" {prompt} " for prompt in PROMPTS).encode(encoding)
    assert read(tmp_path, "prompts.txt", content) == PROMPTS


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


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.tab"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_lists_in_cells_are_several_prompts_in_any_delimited_table(tmp_path, name, separator):
    with (tmp_path / "table").open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([("prompt", "n"), ('["a, b", "c"]', 1), ("[wide] d", 2)])
    assert read(tmp_path, name, (tmp_path / "table").read_bytes()) == ["a, b", "c", "[wide] d"]


def test_lists_are_several_prompts(tmp_path):
    lines = [{"prompt": ["a", " ", "b"]}, {"prompt": "[wide] c", "note": 1}, {"note": 2}]
    for name in ("p.jsonl", "p.NDJSON"):
        assert read(tmp_path, name, "\ufeff" + "\n".join(map(json.dumps, lines))) == ["a", "b", "[wide] c"]


@pytest.mark.parametrize(
    ("name", "content", "rows", "num_blank"),
    [
        ("p.txt", "a\n\n \nb\n\n\n", [1, 4], 2),
        ("p.csv", 'prompt\na\n\nb\n""\n', [1, 3], 1),
        ("p.csv", '\nnote,prompt\n,\nx,\ny,a\nz,"[""b"", "" "", ""c""]"\n,\n', [3, 4, 4], 2),
        ("p.tsv", "sep=\t\nprompt\tnote\n\tx\na\ty\n", [2], 1),
        ("p.jsonl", '{"prompt": ["a", "b"]}\n\n{"prompt": ""}\n{"prompt": "c"}\n', [1, 1, 4], 2),
    ],
)
def test_prompts_keep_the_numbers_of_their_rows(tmp_path, name, content, rows, num_blank):
    (tmp_path / name).write_text(content)
    found = read_prompt_rows(str(tmp_path / name))
    assert [row.row for row in found] == rows
    assert [row.prompt for row in found] == ["a", "b", "c"][: len(rows)]
    assert count_blank(found) == num_blank


@pytest.mark.parametrize(
    "name",
    [
        *("p.json", "p.jsonl.gz", "p.parquet", "p.xlsx", "p.docx", "p.ods", "p.pdf", "p.npy", "p.yaml", "p.csv.bak"),
        "VBench_full_info.JSON",
    ],
)
def test_files_of_another_kind_are_refused_by_name_as_tables_are(tmp_path, name):
    (tmp_path / name).write_text('[\n"a dog",\n"a cat"\n]\n')
    for setting in ("prompts_file", "vbench_prompts"):
        message = rf"{setting} must end in \.txt, \.csv, \.tsv, .*, got {name}; rename or convert it\."
        with pytest.raises(ValueError, match=message):
            read_prompts_file(str(tmp_path / name), setting)
    with pytest.raises(ValueError, match=rf"a table must end in \.csv, .*, got {name}; rename or convert it\."):
        check_suffix(tmp_path / name, [".csv", ".jsonl"])


def test_a_text_needs_no_ending(tmp_path):
    assert read(tmp_path, "prompts", "a dog\na cat") == ["a dog", "a cat"]


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
        ("p.txt", b"PK\x03\x04", "is a zip archive or a workbook"),
        ("p.csv", b"PAR1", "is Parquet"),
        ("p.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "line 2 is not"),
    ],
)
def test_other_files_are_refused_by_the_cause_with_its_place(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_what_is_no_file_is_named(tmp_path):
    for path, there in ((tmp_path, "is none"), (tmp_path / "nowhere.txt", "does not exist")):
        with pytest.raises(ValueError, match=f"prompts_file must be a text or CSV file, but {path} {there}"):
            read_prompts_file(str(path))


@pytest.mark.parametrize(
    ("cell", "prompts"),
    [
        ("['one', \"it's two\"]", ["one", "it's two"]),
        ('["one", "two"]', ["one", "two"]),
        ("[one, two]", ["[one, two]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[__import__('os')]", ["[__import__('os')]"]),
        ("[wide shot] a cat", ["[wide shot] a cat"]),
        ("[" * 5000, ["[" * 5000]),
    ],
)
def test_lists_that_pandas_has_written_are_several_prompts(cell, prompts):
    assert list(prompts_of(cell, has_json=True)) == prompts
