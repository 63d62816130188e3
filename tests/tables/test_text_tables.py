"""Tables as spreadsheets, pandas and other people's machines write them: read where that is safe, else refused by the
cause, with its row."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from causal_wan.tables import delimited
from causal_wan.tables.sources import Source
from causal_wan.tables.table import read_table


ROWS = [("0.mp4", ("a dog",)), ("1.mp4", ("café",))]


def read(tmp_path, content, name="rows.csv"):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    table = read_table(Source(metadata_path=str(tmp_path / name), dataset_base_path=str(tmp_path)))
    return [(row.video, row.prompts) for row in table]


READ = {
    "the index of pandas": "Unnamed: 0,video,prompt\n0,0.mp4,a dog\n1,1.mp4,café\n",
    "an index without a name": ",video,prompt\n0,0.mp4,a dog\n1,1.mp4,café\n",
    "two indices": ",,video,prompt\n0,0,0.mp4,a dog\n1,1,1.mp4,café\n",
    "last commas": "video,prompt,,\n0.mp4,a dog,,\n1.mp4,café,,\n",
    "last commas of rows alone": "video,prompt\n0.mp4,a dog,\n1.mp4,café, ,\n",
    "a last comma of the header alone": "video,prompt,\n0.mp4,a dog\n1.mp4,café\n",
    "other columns twice": "note,video,note,prompt\nx,0.mp4,y,a dog\n,1.mp4,,café\n",
    "empty rows of a spreadsheet": "video,prompt\n0.mp4,a dog\n,\n1.mp4,café\n,\n,\n",
    "semicolons": "video;prompt\n0.mp4;a dog\n1.mp4;café\n",
    "tabs": "video\tprompt\n0.mp4\ta dog\n1.mp4\tcafé\n",
    "bars": "video|prompt\n0.mp4|a dog\n1.mp4|café\n",
    "semicolons, and more commas": "video;prompt;a, b, c, d\n0.mp4;a dog;1,2\n1.mp4;café;1,5\n",
    "a line for Excel": "sep=;\r\nvideo;prompt\r\n0.mp4;a dog\r\n1.mp4;café\r\n",
    "a line in quotes for Excel": '"sep=\t"\r\nvideo\tprompt\r\n0.mp4\ta dog\r\n1.mp4\tcafé\r\n',
    "spaces round names": " video , prompt \n0.mp4,a dog\n1.mp4, café \n",
    "spaces before quotes": 'video, prompt\n0.mp4, "a dog"\n1.mp4,  "café"\n',
    "spaces before quotes of the header": '"video",  "prompt"\n"0.mp4", "a dog"\n1.mp4, café\n',
    "spaces after quotes": 'video,prompt\n"0.mp4" ,"a dog"\n"1.mp4"  ,"café" \n',
    "spaces after quotes of the header": '"video" ;"prompt" \r\n0.mp4;"a dog"\r\n"1.mp4" ;café\r\n',
    "spaces on both sides of quotes": '"video" , "prompt" ,n\n0.mp4 , "a dog" ,\n"1.mp4", "café"  ,""" ,"\n',
    "quotes round all": '"video","prompt"\n"0.mp4","a dog"\n"1.mp4","café"\n',
    "a mark of UTF-8": "\ufeffvideo,prompt\n0.mp4,a dog\n1.mp4,café\n",
    "a mark, and quotes": '\ufeff"video";"prompt"\n0.mp4;a dog\n1.mp4;café\n',
    "Unicode text of Excel": "video\tprompt\r\n0.mp4\ta dog\r\n1.mp4\tcafé\r\n".encode("utf-16"),
    "UTF-16, the other end first": b"\xfe\xff" + "video,prompt\n0.mp4,a dog\n1.mp4,café\n".encode("utf-16-be"),
    "UTF-32": "video,prompt\n0.mp4,a dog\n1.mp4,café\n".encode("utf-32"),
    "line ends of an old Mac": "video,prompt\r0.mp4,a dog\r1.mp4,café\r",
    "line ends of both kinds": "video,prompt\r\n0.mp4,a dog\n1.mp4,café",
    "empty lines": "\n\nvideo,prompt\n\n0.mp4,a dog\n\n1.mp4,café\n\n",
    "columns that end early": "video,prompt,note\n0.mp4,a dog\n1.mp4,café,x\n",
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_tables_of_spreadsheets_and_pandas_are_read(tmp_path, content):
    found = read(tmp_path, content)
    assert [(video.strip(), prompts) for video, prompts in found] == ROWS


@pytest.mark.parametrize("name", ["rows.tsv", "rows.TAB", "rows.txt", "ROWS.CSV"])
def test_the_separator_is_that_of_the_header_whatever_the_file_is_called(tmp_path, name):
    assert read(tmp_path, "video\tprompt\n0.mp4\ta dog\n1.mp4\tcafé\n", name) == ROWS


def test_prompts_keep_their_separators_quotes_and_line_ends(tmp_path):
    prompts = ["a; b, c\td | e", 'she says "go"', "one\ntwo", "one\u2028two", "sep=;", "12" * 100_000]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt"), *((f"{n}.mp4", text) for n, text in enumerate(prompts))])
    assert [found for _, (found,) in read(tmp_path, (tmp_path / "rows.csv").read_bytes())] == prompts


def test_spaces_after_quotes_leave_prompts_as_they_are(tmp_path):
    prompts = ['"go" , she says, "', "one \ntwo ,\n three", ' "', 'a "" , b', "plain"]
    lines = [f'{n}.mp4 ,"{text.replace(chr(34), chr(34) * 2)}"  ,x' for n, text in enumerate(prompts)]
    found = read(tmp_path, "\n".join(["video,prompt,note", *lines]))
    assert [prompt for _, (prompt,) in found] == [prompt.strip() for prompt in prompts]


def test_a_quote_closed_by_a_space_and_words_is_refused_with_its_row(tmp_path):
    with pytest.raises(ValueError, match=r"row 2 \(line 3\) has a quote out of place"):
        read(tmp_path, 'video,prompt\n"0.mp4" ,a\n"1.mp4" or so,b\n')


def test_rows_have_the_numbers_that_people_count(tmp_path):
    for name, content, numbers in (
        ("rows.csv", "\nvideo,prompt\n0.mp4,a\n\n,\n3.mp4,b\n\n", [1, 4]),
        ("rows.tsv", "sep=\t\nvideo\tprompt\n\t\n1.mp4\ta\n", [2]),
        ("rows.jsonl", '\n{"video": "1.mp4", "prompt": "a"}\n\n{"video": "3.mp4", "prompt": "b"}\n', [2, 4]),
    ):
        (tmp_path / name).write_text(content)
        table = read_table(Source(metadata_path=str(tmp_path / name), dataset_base_path=str(tmp_path)))
        assert [row.number for row in table] == numbers
        assert table[len(table) - 1].number == numbers[-1]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.tab", "rows.txt"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_cell_may_have_a_list_of_prompts_in_any_delimited_table(tmp_path, name, separator):
    with (tmp_path / "table").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([("video", "prompt"), ("0.mp4", '["a, b", "c"]'), ("1.mp4", "[wide] d")])
    found = read(tmp_path, (tmp_path / "table").read_bytes(), name)
    assert found == [("0.mp4", ("a, b", "c")), ("1.mp4", ("[wide] d",))]


def test_a_name_that_begins_with_a_space_keeps_it(tmp_path):
    assert read(tmp_path, "video,prompt\n a.mp4,a\n")[0][0] == " a.mp4"


LATIN = "video,prompt\n0.mp4,a\n1.mp4,café\n"
REFUSED = {
    "Latin-1": (LATIN.encode("latin-1"), r"row 2 \(line 3\) is not; in Windows' cp1252 or Latin-1 .*1\.mp4café"),
    "cp1252": ("video,prompt\n0.mp4,“a”\n".encode("cp1252"), r"row 1 \(line 2\) is not; .*“a”"),
    "a Latin-1 header": ("Dateiü,video,prompt\n".encode("latin-1"), "its header is not; .*Dateiü"),
    "UTF-16 without a mark": ("video,prompt\n0.mp4,a\n".encode("utf-16-le"), "its header has NUL characters"),
    "NUL characters": ("video,prompt\n0.mp4,a\0b\n", r"row 1 \(line 2\) has NUL characters"),
    "UTF-16 that breaks off": ("video,prompt\n0.mp4,a".encode("utf-16")[:-1], "whole in UTF-16"),
    "a workbook": (b"PK\x03\x04" + b"\0" * 100, "is a zip archive or a workbook"),
    "compressed": (b"\x1f\x8b" + b"\0" * 100, "is compressed"),
    "a quote that never closes": ('video,prompt\n0.mp4,a\n1.mp4,"b\n2.mp4,c\n', r"row 2 \(line 3\) opens a quote"),
    "a quote of the header": ('video,"prompt\n0.mp4,a\n', r"the header \(line 1\) opens a quote that never closes"),
    "separated by spaces": ('"video" "prompt"\n"0.mp4" "a"\n', r"the header \(line 1\) .*commas, semicolons, tabs"),
    "a quote that closes late": ('video,prompt\n0.mp4,"a\n1.mp4,"b"\n', r"row 1 \(line 2\) has a quote out of place"),
    "a quote that closes early": (
        'video,prompt\n\n0.mp4,"Go" she says\n',
        r"row 2 \(line 3\) has a quote out of place",
    ),
    "too many fields": ('video,prompt\n0.mp4,"a\nb"\n1.mp4,a, b\n', r"row 2 \(line 4\) has 3; .* put quotes around"),
    "a wanted column twice": ("video,prompt,prompt\n0.mp4,a,b\n", "must have one column prompt, but has 2"),
    "no column, and quotes": ('"video";"text"\n"0.mp4";"a"\n', "has video, text; name yours"),
    "no column": ("video;text\n0.mp4;a\n", "has video, text; name yours"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_other_tables_are_refused_by_the_cause_with_its_row(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"rows\.csv must .*{message}|rows\.csv {message}"):
        read(tmp_path, content)


def test_a_field_that_takes_too_much_is_a_quote_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_FIELD", 1000)
    with pytest.raises(ValueError, match=r"at most 1000 characters, but row 1 \(line 2\) has a longer one"):
        read(tmp_path, 'video,prompt\n0.mp4,"' + "a\n" * 2000)


def test_long_tables_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "CHUNK_ROWS", 3)
    found = read(tmp_path, "video,prompt\n" + "".join(f"{number}.mp4,{number}\n" for number in range(10)))
    assert found == [(f"{number}.mp4", (str(number),)) for number in range(10)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_may_have_a_mark_and_any_character_in_a_text(tmp_path, encoding):
    lines = [json.dumps({"video": "0.mp4", "prompt": "a\u2028b\x85c"}, ensure_ascii=False), "", '{"video": "1.mp4"}']
    assert read(tmp_path, "\r\n".join(lines).encode(encoding), "rows.jsonl") == [
        ("0.mp4", ("a\u2028b\x85c",)),
        ("1.mp4", ()),
    ]


def test_lines_of_json_that_are_not_utf_8_are_named(tmp_path):
    content = '{"video": "0.mp4", "prompt": "a"}\n{"video": "1.mp4", "prompt": "café"}\n'.encode("latin-1")
    with pytest.raises(ValueError, match=r"rows\.jsonl must be text in UTF-8, but line 2 is not; .*café"):
        read(tmp_path, content, "rows.jsonl")


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1 has prompt twice"):
        read(tmp_path, '{"video": "0.mp4", "prompt": "a", "prompt": "b"}\n', "rows.jsonl")


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    columns = [pa.array(["0.mp4"]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, ["video", "prompt", "prompt"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="must have one column prompt, but has 2"):
        read(tmp_path, (tmp_path / "rows.parquet").read_bytes(), "rows.parquet")


@pytest.mark.parametrize("content", ["\ufeffa dog", "a dog".encode("utf-16"), b"a dog\r"])
def test_texts_beside_videos_may_have_marks(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(b"video")
    (tmp_path / "a.txt").write_bytes(content.encode() if isinstance(content, str) else content)
    (row,) = read_table(Source(metadata_path=str(tmp_path)))
    assert row.prompts == ("a dog",)


@pytest.mark.parametrize(
    ("video", "text"),
    [("A.MP4", "A.TXT"), ("caf\u00e9.mp4", "cafe\u0301.txt"), ("cafe\u0301/a.MOV", "cafe\u0301/a.Txt")],
)
def test_videos_and_texts_go_together_whatever_the_case_of_endings_and_the_form_of_accents(tmp_path, video, text):
    for name, content in ((video, b"video"), (text, b"a dog")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (row,) = read_table(Source(metadata_path=str(tmp_path)))
    assert (row.video, row.prompts) == (video, ("a dog",))


def test_views_of_texts_are_texts(tmp_path):
    columns = {"video": pa.array(["0.mp4"], pa.string_view()), "prompt": pa.array(["a dog"], pa.string_view())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert read(tmp_path, (tmp_path / "rows.parquet").read_bytes(), "rows.parquet") == ROWS[:1]


def test_a_text_that_is_no_prompt_is_refused_by_its_size(tmp_path):
    Path(tmp_path / "a.mp4").write_bytes(b"video")
    Path(tmp_path / "a.txt").write_bytes(b"a" * (1 << 20) + b"b")
    with pytest.raises(ValueError, match=r"a\.txt must be a text of at most 1048576 bytes"):
        read_table(Source(metadata_path=str(tmp_path)))
