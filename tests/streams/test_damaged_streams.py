"""Streams that break after training has begun end the run with one line: the file, the place, and how to go on."""

import gzip
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_here
from huggingface_hub.errors import HTTPError

from causal_wan.config.refusals import DataError
from causal_wan.data.samples import BadClips
from causal_wan.streams.sources import open_stream
from causal_wan.tables.sources import Source


SCRIPT = "train_video_regression.py"


def read_all(path, **columns):
    """The rows that come, and what is said when no more do."""
    stream, rows = open_stream(Source(metadata_path=str(path), **columns)), []
    try:
        for file in range(stream.num_files):
            for row in stream.read_file(file):
                rows.append(row)
    except DataError as error:
        return rows, str(error)
    return rows, None


def texts(count):
    rng = np.random.default_rng(0)
    return [{"video": f"{number}.mp4", "prompt": rng.bytes(400).hex()} for number in range(count)]


def break_middle(path, content=b"\x5a" * 200):
    whole = bytearray(path.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + len(content)] = content
    path.write_bytes(whole)


def test_a_parquet_file_that_is_damaged_in_its_middle_is_named(tmp_path):
    pq.write_table(pa.Table.from_pylist(texts(400)), tmp_path / "a.parquet", row_group_size=40)
    break_middle(tmp_path / "a.parquet")
    rows, said = read_all(tmp_path / "a.parquet")
    assert 40 <= len(rows) < 400
    assert said.startswith(f"{tmp_path}/a.parquet cannot be read after row {len(rows)}: ")
    assert said.endswith("Repair or remove it, or see to the connection.")
    assert "\n" not in said and "resume" not in said


def test_json_lines_of_which_one_is_broken_late_are_named(tmp_path):
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"video": "0.mp4", "prompt": "a" * 400_000})] * 60  # more than are parsed at once
    (tmp_path / "rows" / "a.jsonl").write_text("\n".join(lines))
    lines[-5] = lines[-5][:40]
    (tmp_path / "rows" / "b.jsonl").write_text("\n".join(lines))
    rows, said = read_all(tmp_path / "rows")
    assert len(rows) >= 60 + 20
    assert said.startswith(f"{tmp_path}/rows/b.jsonl cannot be read after row ")
    assert "JSON parse error" in said


def test_json_lines_that_cannot_be_read_at_all_say_why(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"video": "0.mp4", "prompt": "a"}\n{"video": "1.m')
    with pytest.raises(ValueError, match=r"a\.jsonl could not be opened as a stream: .*JSON parse error"):
        open_stream(Source(metadata_path=str(tmp_path / "a.jsonl")))


def write_tar(path, count, clip=None, pack=bytes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(count):
            for ending, content in (("mp4", clip or bytes(3000)), ("txt", b"a ball")):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    path.write_bytes(pack(buffer.getvalue()))
    return path


@pytest.mark.parametrize(("pack", "cut"), [(bytes, 2 / 3), (gzip.compress, 2 / 3), (bytes, None)])
def test_a_tar_that_is_damaged_after_its_first_clips_is_named_with_the_member(tmp_path, pack, cut):
    path = write_tar(tmp_path / "a.tar", 60, clip=np.random.default_rng(0).bytes(3000), pack=pack)
    if cut is None:  # a header among others
        break_middle(path, b"x" * 6000)
    else:
        path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    rows, said = read_all(path, video_column="mp4", caption_column=("txt",))
    assert 10 <= len(rows) <= 41
    assert said.startswith(f"{path} cannot be read after row {len(rows)}: it cannot be read as a tar ")
    assert " member '" in said and said.count(str(path)) == 1


@pytest.mark.parametrize("error", [HTTPError("peer closed connection"), ConnectionError("Server Disconnected")])
def test_a_connection_that_is_lost_is_an_error_of_the_data(tmp_path, monkeypatch, error):
    path = write_tar(tmp_path / "a.tar", 3)
    stream = open_stream(Source(metadata_path=str(path), video_column="mp4", caption_column=("txt",)))

    def lose(self, batch_size):
        yield {"mp4": [{"bytes": b"1", "path": "0.mp4"}], "txt": ["a"], "__error__": [None]}
        raise error

    monkeypatch.setattr("datasets.IterableDataset.iter", lose)
    rows = stream.read_file(0)
    next(rows)
    with pytest.raises(DataError, match=rf"a\.tar cannot be read after row 1: {error}\. Repair or remove it, or see"):
        next(rows)


def test_what_a_library_lacks_for_an_address_is_said(monkeypatch):
    def lacks(*_, **__):
        raise ImportError('HTTPFileSystem requires "requests" and "aiohttp" to be installed')

    monkeypatch.setattr("causal_wan.streams.sources.load_undecoded", lacks)
    with pytest.raises(ValueError, match=r"could not be opened as a stream: HTTPFileSystem requires"):
        open_stream(Source(metadata_path="https://host/0.tar"))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_an_error_of_data_comes_through_a_traceback_as_its_own_words():
    wrapped = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
        "causal_wan.config.refusals.DataError: a.tar cannot be read.\n"
    )
    assert str(DataError(wrapped)) == str(DataError("a.tar cannot be read.")) == "a.tar cannot be read."
    with pytest.raises(DataError, match="at most max_bad_samples=0"):
        BadClips(0).note(["it is broken"])


@pytest.mark.parametrize(("num_workers", "steps"), [(0, 1), (1, 1), (0, 100)])
def test_a_run_whose_stream_breaks_ends_with_one_line_and_names_a_checkpoint_if_there_is_one(
    write_recipe, tars, clips, tmp_path, capsys, num_workers, steps
):
    content = (clips / "videos" / "0.mp4").read_bytes()
    path = write_tar(tmp_path / "a.tar", 6, clip=content)
    with tarfile.open(path) as tar:
        last = tar.getmember("5.mp4")
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size // 2])
    changes = {"metadata_path": str(path), "frames_schedule": None, "max_train_steps": 8, "checkpointing_steps": steps}
    recipe, output_dir = write_recipe(**{**tars, **changes, "dataloader_num_workers": num_workers})
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, "--config", recipe)
    assert exit_info.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {path} cannot be read after row 5: it cannot be read as a tar at its member '5.")
    checkpoints = sorted(folder.name for folder in output_dir.glob("checkpoint-*"))
    assert bool(checkpoints) == (steps == 1)
    if checkpoints:
        assert said.endswith(f"with --resume_from_checkpoint latest, which goes on from {checkpoints[-1]}.")
    else:
        assert said.endswith("Then run the same command again.")
