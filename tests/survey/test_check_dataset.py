"""The report on a data set: what it finds, going on after an interruption, and that no text harms who reads it."""

import csv
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, SCRIPT_ENV, write_clip
from grey_videos import write_timed_video, write_video
from PIL import Image

from causal_wan.config.parsing import parse_config
from causal_wan.data.settings import DataConfig
from causal_wan.survey import row_checks
from causal_wan.survey.row_checks import FACTS
from causal_wan.survey.survey import Survey, generalize, histogram_of_numbers, suggest
from check_dataset import TRAINING_SETTINGS, Config, main


HOSTILE = '<script>alert(1)</script><img src="http://evil/x.png"> {{ 7 * 7 }} & "quotes"'


def make_rows(videos):
    """Clips of all kinds, and what is said of them."""
    for seed in range(5):
        write_clip(videos / f"{seed}.mp4", seed)
    for seed in range(2):
        write_clip(videos / f"tall{seed}.mp4", seed, height=48, width=32)
    write_clip(videos / "short.mp4", 0, num_frames=7)
    shutil.copy(videos / "1.mp4", videos / "copy.mp4")
    write_video(videos / "black.mp4", 17, 32, 48, frames=[np.zeros((32, 48, 3), np.uint8)] * 17)
    write_video(videos / "still.mp4", 17, 32, 48, frames=[np.full((32, 48, 3), 120, np.uint8)] * 17)
    (videos / "text.mp4").write_text("no video " * 99)
    (videos / "empty.mp4").touch()
    return [
        *((f"{seed}.mp4", f"a ball, number {seed}") for seed in range(4)),
        ("4.mp4", HOSTILE),
        ("tall0.mp4", "upright"),
        ("tall1.mp4", "also upright"),
        ("short.mp4", "soon over"),
        ("copy.mp4", "a ball, number  3"),
        ("black.mp4", "a night"),
        ("still.mp4", "a wall"),
        ("text.mp4", "text"),
        ("empty.mp4", "nothing"),
        ("<b>no.mp4", "gone"),
        ("../no.mp4", "out"),
        ("0.mp4", ""),
    ]


def write_rows(folder, rows):
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt"), *rows])


@pytest.fixture(scope="module")
def clips_of_all_kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "videos").mkdir()
    write_rows(folder, make_rows(folder / "videos"))
    return folder


@pytest.fixture
def folder(clips_of_all_kinds, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(clips_of_all_kinds, tmp_path / "set")
    return tmp_path / "set"


def config(folder, *, num_processes=0, num_samples=4, **data):
    defaults = {"num_frames": 17, "height": 32, "width": 48}
    paths = {"dataset_base_path": str(folder / "videos"), "metadata_path": str(folder / "rows.csv")}
    return Config(
        data=DataConfig(**paths, **{**defaults, **data}),
        output_dir=str(folder / "out"),
        num_processes=num_processes,
        num_samples=num_samples,
    )


def page(folder):
    return (folder / "out" / "dataset_report.html").read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags, attributes, and the text of each section."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.sections = set(), [], [""]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag == "section":
            self.sections.append("")
        self.sections[-1] += " "

    def handle_data(self, data):
        self.sections[-1] += data

    def section(self, title):
        (found,) = [text for text in self.sections if text.strip().startswith(title)]
        return " ".join(found.split())


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded for records, in this process."""
    files, decode = [], row_checks.decode_frames

    def count(video, *args, **more):
        files.append(video.name)
        return decode(video, *args, **more)

    monkeypatch.setattr(row_checks, "decode_frames", count)
    return files


# --- what is found ---------------------------------------------------------------------------------------------------


def test_bad_rows_are_listed_with_number_and_reason(folder):
    assert main(config(folder)) == 1
    with (folder / "out" / "bad_rows.csv").open(newline="") as file:
        rows = {int(row["row"]): (row["video"], row["reason"]) for row in csv.DictReader(file)}
    assert rows == {
        8: ("short.mp4", "7 frames, fewer than num_frames=17"),
        12: ("text.mp4", rows[12][1]),
        13: ("empty.mp4", "the file is empty"),
        14: ("<b>no.mp4", "the file does not exist"),
        15: ("../no.mp4", "the path leaves dataset_base_path"),
        16: ("0.mp4", "the prompt is empty"),
    }
    assert "not a video that can be read" in rows[12][1]
    bad = Page(page(folder)).section("Bad rows")
    assert "1 the file is empty" in bad
    assert all(f"{number} {video}" in bad for number, (video, _) in rows.items())
    assert "6 of 16 rows cannot be used as they are; 10 can." in Page(page(folder)).section("6 of 16")


def test_duplicates_and_clips_that_show_nothing_are_found(folder):
    main(config(folder))
    report = Page(page(folder))
    duplicates = report.section("Duplicates")
    assert re.search(r"The same file: 1 group 2 rows row 2 1.mp4 .* row 9 copy.mp4", duplicates)
    assert "The same prompt: 1 group 2 rows: a ball, number 3 row 4 3.mp4 row 9 copy.mp4" in duplicates
    empty = report.section("Black and nearly static clips")
    assert re.search("Black: 1 row 10 black.mp4", empty)
    assert re.search("Nearly static: 1 row 11 still.mp4", empty)
    shapes = report.section("What is in it")
    assert re.search(r"32 × 48 +9 +48 × 32 +2", shapes)
    assert re.search(r"2:3|9:16|3:4", shapes)


def test_the_contact_sheet_shows_random_rows_as_the_model_sees_them(folder):
    main(config(folder, num_samples=100))
    seen = Page(page(folder)).section("As the model sees them")
    assert seen.startswith("As the model sees them 10 random rows")
    assert "row 6 tall0.mp4 17 frames of 48 × 32 → 17 of 32 × 48 upright" in seen
    sheet = Image.open(folder / "out" / "contact_sheet.png")
    assert sheet.height > 10 * 112
    main(config(folder, num_samples=100, resolution_buckets=("32x48", "48x32")))
    assert "row 6 tall0.mp4 17 frames of 48 × 32 → 17 of 48 × 32" in Page(page(folder)).section("As the model")


def test_a_set_without_faults_is_0_and_needs_no_changes(folder):
    write_rows(folder, [(f"{seed}.mp4", f"a ball, number {seed}") for seed in range(4)])
    assert main(config(folder)) == 0
    report = Page(page(folder))
    assert "All rows can be used." in report.section("All rows")
    assert report.section("Suggestions") == "Suggestions None: the settings fit the clips."
    assert "Bad rows" not in page(folder)


@pytest.mark.parametrize(("short_clips", "status", "said"), [("skip", 0, "left out"), ("pad", 0, "padded")])
def test_short_clips_are_bad_only_where_they_stop_a_run(folder, short_clips, status, said):
    write_rows(folder, [("0.mp4", "a"), ("short.mp4", "b")])
    assert main(config(folder, short_clips=short_clips)) == status
    assert f"they are {said}" in Page(page(folder)).section("Suggestions")


def test_a_table_that_cannot_be_read_ends_with_status_2(folder, capsys):
    with pytest.raises(SystemExit) as error:
        main(config(folder, video_column="file"))
    assert error.value.code == 2
    assert "name yours with --video_column" in capsys.readouterr().err


def test_prompts_are_counted_in_tokens_of_the_checkpoint(folder):
    write_rows(folder, [("0.mp4", "a bird " * 400), ("1.mp4", "a bird")])
    main(replace(config(folder), pretrained_model_name_or_path=str(ROOT / "examples" / "sketch" / "tiny-wan")))
    report = Page(page(folder))
    assert "Prompts that are cut at 512 tokens: 1." in report.section("Suggestions")
    assert "Prompt tokens" in report.section("What is in it")


def test_words_are_counted_where_there_is_no_tokenizer_and_this_is_said(folder, capsys, tmp_path):
    write_rows(folder, [("0.mp4", "a bird"), ("1.mp4", "a cat")])
    assert main(replace(config(folder), pretrained_model_name_or_path=str(tmp_path / "nowhere"))) == 0
    assert "words are counted, not tokens: the tokenizer cannot be loaded" in capsys.readouterr().err
    assert "Prompt words" in Page(page(folder)).section("What is in it")


# --- safe to open ----------------------------------------------------------------------------------------------------


def test_the_page_fetches_and_runs_nothing_whatever_prompts_and_paths_say(folder):
    main(config(folder, num_samples=100))
    text, report = page(folder), Page(page(folder))
    assert not report.tags & {"script", "iframe", "link", "object", "embed", "b>no.mp4"}
    assert report.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in report.links)
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert HOSTILE in report.section("As the model sees them")  # as text
    assert "<b>no.mp4" in report.section("Bad rows")


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_second_run_decodes_only_what_has_changed(folder, decoded):
    main(config(folder))
    first = page(folder)
    assert len(decoded) == 11
    decoded.clear()
    main(config(folder))
    assert decoded == []
    assert page(folder) == first
    write_clip(folder / "videos" / "2.mp4", 77)
    shutil.copy(folder / "videos" / "3.mp4", folder / "videos" / "empty.mp4")
    main(config(folder))
    assert sorted(decoded) == ["2.mp4", "empty.mp4"]
    assert "the file is empty" not in page(folder)


def test_other_settings_and_rows_in_another_order_need_no_decoding(folder, decoded):
    main(config(folder))
    decoded.clear()
    write_rows(folder, [("tall0.mp4", "x"), ("3.mp4", "y")])
    assert main(config(folder, num_frames=21, height=16)) == 1
    assert decoded == []
    assert "17 frames, fewer than num_frames=21" in page(folder)


def test_a_check_that_was_killed_goes_on_and_ends_with_the_same_report(folder, decoded, monkeypatch):
    monkeypatch.setattr(row_checks, "CHUNK_ROWS", 3)
    main(config(folder))
    whole = page(folder)
    shutil.rmtree(folder / "out")
    decoded.clear()
    count = row_checks.decode_frames

    def killed(video, *args, **more):
        if len(decoded) == 5:
            raise KeyboardInterrupt
        return count(video, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_checks, "decode_frames", killed)
        main(config(folder))
    records = folder / "out" / "records.jsonl"
    num_done = len(records.read_bytes().splitlines())
    assert num_done == 3
    with records.open("ab") as file:
        file.write(b'{"row": 4, "key": 12')  # torn in writing
    decoded.clear()
    main(config(folder))
    assert len(decoded) == 11 - num_done
    assert page(folder) == whole
    assert all(json.loads(line) for line in records.read_text().splitlines())


def test_processes_find_what_one_finds(folder, monkeypatch):
    monkeypatch.setattr(row_checks, "CHUNK_ROWS", 2)
    main(config(folder))
    alone = page(folder)
    shutil.rmtree(folder / "out")
    main(config(folder, num_processes=2))
    assert page(folder) == alone


def test_a_file_that_kills_the_decoder_is_a_bad_row_and_the_others_are_checked(folder, monkeypatch):
    monkeypatch.setattr(row_checks, "CHUNK_ROWS", 2)
    decode = row_checks.decode_frames

    def dies(video, *args, **more):
        if video.name == "2.mp4":
            os._exit(1)
        return decode(video, *args, **more)

    monkeypatch.setattr(row_checks, "decode_frames", dies)
    write_rows(folder, [(f"{seed}.mp4", f"a ball, number {seed}") for seed in range(5)])
    assert main(config(folder, num_processes=2)) == 1
    assert "3 2.mp4 the decoder dies at this file" in Page(page(folder)).section("Bad rows")
    assert "1 of 5 rows cannot be used" in page(folder)


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_recipe_of_the_training_script_is_taken_and_typos_in_it_are_not(tmp_path, capsys):
    recipe = ROOT / "examples" / "sketch" / "recipe.yaml"
    argv = ["--config", str(recipe), "--output_dir", "here", "--height", "48"]
    parsed = parse_config(Config, argv, also_known=TRAINING_SETTINGS)
    assert (parsed.data.num_frames, parsed.data.height, parsed.output_dir) == (81, 48, "here")
    (tmp_path / "typo.yaml").write_text(recipe.read_text() + "\nnum_frame: 81\nbatch_size: 3\n")
    with pytest.raises(SystemExit) as error:
        parse_config(Config, ["--config", str(tmp_path / "typo.yaml")], also_known=TRAINING_SETTINGS)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "'num_frame' is not a setting of this script" in message
    assert "batch_size" not in message


# --- suggestions -----------------------------------------------------------------------------------------------------


def survey_of(count=10, short=(), unit="tokens", lengths=None, data=None, **facts):
    values = {"frames": 81, "rate": 16, "height": 480, "width": 832, "bytes": 1000, "luma": 100, "motion": 9, **facts}
    table = np.zeros(count, FACTS)
    table["content"] = np.arange(1, count + 1)
    for name, value in values.items():
        table[name] = value
    is_short = np.isin(np.arange(count), short)
    hashes = np.arange(1, count + 1, dtype=np.uint64)
    lengths = np.full(count, 50) if lengths is None else np.asarray(lengths)
    settings = DataConfig(dataset_base_path="a", metadata_path="b", **(data or {}))
    return Survey(settings, table, is_short, hashes, lengths, unit, 512)


@pytest.mark.parametrize(
    ("survey", "said"),
    [
        (survey_of(), None),
        (survey_of(frames=192), "The median clip lasts 12.0 s, and 81 frames at 16 a second are 5.1 s"),
        (survey_of(frames=192), "2.4 times as fast.*--frame_sampling head"),
        (survey_of(height=832, width=480), "10 of 10 clips; 100 % of all are portrait. Use --height 832 --width 480"),
        (
            survey_of(height=[832] * 6 + [480] * 4, width=[480] * 6 + [832] * 4),
            "60 % of all are portrait. Use --resolution_buckets 480x832 832x480",
        ),
        (survey_of(height=832, width=480, data={"resolution_buckets": ("480x832", "832x480")}), None),
        (survey_of(height=240, width=416), "10 of 10 clips are smaller than 480 x 832, in the median 2.0 times"),
        (survey_of(lengths=[50] * 7 + [513] * 3), "Prompts that are cut at 512 tokens: 3"),
        (survey_of(lengths=[600] * 10, unit="words"), None),
        (survey_of(frames=60, short=range(10)), "Clips with too few frames: 10; they stop a run.*--num_frames 57"),
        (survey_of(rate=8, data={"frame_sampling": "head"}), "Clips with fewer than 16 frames a second: 10"),
        (survey_of(content=3), "Rows that show a file of an earlier row: 9"),
        (survey_of(luma=2), "Black clips: 10"),
        (survey_of(motion=0.01), "Nearly static clips: 10"),
        (survey_of(is_bad=[True] * 2 + [False] * 8), "Bad rows: 2"),
        (survey_of(is_bad=True), "Bad rows: 10"),
    ],
)  # fmt: skip
def test_suggestions_fit_the_clips(survey, said):
    text = " ".join(suggest(survey))
    assert text == "" if said is None else re.search(said, text)


def test_bars_of_a_histogram_have_round_edges_and_add_up():
    chart = histogram_of_numbers(
        "Frames", np.array([17, 81, 81, 120, 121] * 40 + [9000]), "frames", (81, "num_frames")
    )
    assert sum(count for _, count in chart.bars) == 201
    assert [label for label, _ in chart.bars][:3] == ["15", "20", "25"]
    assert chart.bars[-1][0].endswith("to 9000")
    assert dict(chart.bars)["80"] == 80
    assert 13 <= chart.mark[0] < 14
    assert histogram_of_numbers("Frames", np.array([81, 81]), "frames").bars == [("81", 2)]


def test_reasons_are_counted_without_what_differs_from_file_to_file():
    assert generalize("5 frames, fewer than num_frames=81") == generalize("7 frames, fewer than num_frames=9")
    kinds = "a JPEG 2000 picture and not mp4, H.264, UTF-8, h264 or 4k + 1, got 80.5 x 12, row 3."
    assert generalize(kinds) == kinds.replace("80.5 x 12", "… x …").replace("row 3", "row …")
    assert generalize("/a b/1.mp4 ends before frame 30, which") == "the file ends before frame …, which"


def test_files_out_of_the_ordinary_are_counted_and_pictures_named(folder):
    write_timed_video(folder / "videos" / "varies.mp4", [*range(0, 1000, 100), *range(1000, 1300, 20)], size=(32, 48))
    Image.new("RGB", (48, 32), "red").save(folder / "videos" / "still.png")
    write_rows(folder, [("0.mp4", "a ball"), ("varies.mp4", "a wall"), ("still.png", "a stone")])
    main(config(folder, frame_sampling="head"))
    assert re.search(r'<td class="n">1</td><td>Pictures</td>', page(folder))
    (row,) = list(csv.DictReader((folder / "out" / "bad_rows.csv").open()))
    assert row["reason"].startswith("a picture and not a video that can be read as num_frames=17: it has 1 frame")
    assert "Clips whose frame rate varies: 1. Frames are chosen by the time at which they are shown." in page(folder)
    assert "25 frames of 32 × 48 → 17 of 32 × 48" in page(folder)


# --- a million rows --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_rows_take_little_memory(folder, tmp_path):
    """All rows are known already, as in going on at the very end; 77 s and 1.7 GB on four busy cores."""
    rows = [(f"{seed}.mp4", f"a ball, number {seed}") for seed in range(4)]
    write_rows(folder, rows)
    main(config(folder))
    records = folder / "out" / "records.jsonl"
    one = json.loads(records.read_text().splitlines()[0])
    with records.open("a") as file:
        for number in range(1_000_000):
            file.write(
                json.dumps({**one, "key": 2 * number + 1, "frames": number % 500 + 1, "content": number}) + "\n"
            )
    write_rows(folder, rows * 250_000)
    code = (
        "import resource, sys; from check_dataset import *; status = main(parse_config(Config)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(status)"
    )
    flags = ["--dataset_base_path", folder / "videos", "--metadata_path", folder / "rows.csv", "--output_dir"]
    flags += [folder / "out", "--num_frames", "17", "--height", "32", "--width", "48"]
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)], cwd=ROOT, env=SCRIPT_ENV, capture_output=True, text=True
    )
    seconds, megabytes = time.perf_counter() - start, int(result.stdout.split()[-1])
    print(f"{seconds:.0f} s, {megabytes} MB")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "All rows can be used" in page(folder)
    assert (folder / "out" / "dataset_report.html").stat().st_size < 2**20
    assert megabytes < 3000
    assert seconds < 600
