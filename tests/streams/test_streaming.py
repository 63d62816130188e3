import dataclasses
import io
import json
import tarfile
import time
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import write_clip
from datasets import Dataset, DatasetDict, Video
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from causal_wan.config.refusals import DataError
from causal_wan.data.clips import load_video
from causal_wan.data.rows import Row
from causal_wan.data.samples import collate
from causal_wan.data.settings import DataConfig
from causal_wan.runs.data import RunData
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.streams.lanes import LaneStates, StreamedClips
from causal_wan.streams.sources import StreamedVideo, open_stream
from causal_wan.tables.sources import Source
from causal_wan.video.decoding import decode_frames, probe_video


COLUMNS = {"video_column": "mp4", "caption_column": ("txt",)}


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_tars(folder, sizes=(5, 7, 4, 6, 5, 3), *, clip=lambda number: f"clip {number}".encode()):
    """A tar of so many clips for each of the sizes, numbered through."""
    numbers = iter(range(sum(sizes)))
    for file, size in enumerate(sizes):
        members = [
            member
            for number in (next(numbers) for _ in range(size))
            for member in ((f"c{number}.mp4", clip(number)), (f"c{number}.txt", f"prompt {number}".encode()))
        ]
        write_tar(folder / f"{file:03d}.tar", members)
    return sum(sizes)


@pytest.fixture
def tars(tmp_path):
    """A stream of 30 clips in 6 files."""
    write_tars(tmp_path / "tars")
    return open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))


def read(video, prompts, number):
    """Stands for decoding: the number that the bytes hold."""
    assert isinstance(video, StreamedVideo)
    content = video.open("rb").read().decode().strip()
    if content.startswith("broken"):
        raise ValueError("it is broken")
    if content.startswith("short"):
        return None
    (prompt,) = prompts
    assert prompt.removeprefix("prompt ") == content.removeprefix("clip ")
    return {"video": int(content.removeprefix("clip ")), "prompt": prompt, "num_valid_frames": 1}


def run(stream, states=None, *, start=0, end=60, ranks=1, workers=0, batch_size=2, stop=None, **settings):
    """Trains in as many simulated processes, one after another; returns batches by their number in the run.

    `stop` is the sample at which the run is interrupted: data loaders have then read further than was trained.
    """
    streams = [stream] if not isinstance(stream, list) else stream
    states = LaneStates() if states is None else states
    noted, batches = [], {}
    for rank in range(ranks):
        own = LaneStates()
        own.load_state_dict(states.state_dict())
        clips = StreamedClips(
            streams,
            own,
            read,
            start=start,
            end=end,
            batch_size=batch_size,
            num_slots=ranks * max(workers, 1),
            **{"seed": 0, "buffer_rows": 4, **settings},
        )
        sampler = BatchSampler(SequentialSampler(clips), batch_size, drop_last=False)
        loader = DataLoader(
            clips,
            batch_sampler=BatchSamplerShard(sampler, ranks, rank),
            num_workers=workers,
            collate_fn=collate,
        )
        for turn, batch in enumerate(loader):
            number = start + (turn * ranks + rank) * batch_size
            if stop is not None and number >= stop:
                break
            assert batch.sample_numbers == list(range(number, number + batch_size))
            own.update(batch.lane_states)
            batches[number] = batch
        noted.append(own)
    states.load_state_dict(noted[0].state_dict())
    states.merge([other.state_dict() for other in noted])
    return [batches[number] for number in sorted(batches)]


def order(batches):
    return [number for batch in batches for number in batch.clips]


def by_lane(batches):
    lanes = {}
    for batch in batches:
        lanes.setdefault(batch.lane_states[0][0], []).extend(batch.clips)
    return lanes


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_lanes_share_out_each_pass_and_shuffle_it_anew(tars, ranks, workers):
    batches = run(tars, ranks=ranks, workers=workers, end=240)
    passes = {}
    for batch in batches:
        for number, (_, _, epoch, file, row, taken) in zip(batch.clips, batch.lane_states, strict=True):
            at_end = (file, row, taken) == (0, 0, 0)
            passes.setdefault(epoch - at_end, []).append(number)
    assert len(by_lane(batches)) == ranks * max(workers, 1)
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) == list(range(30))  # none twice, none left out
    assert passes[0] != passes[1] != passes[2]


def test_order_is_that_of_the_seed(tars):
    assert order(run(tars)) == order(run(tars))
    assert order(run(tars)) != order(run(tars, seed=1))
    assert order(run(tars))[:30] != list(range(30))


def test_rows_are_shuffled_among_those_of_their_window(tmp_path):
    write_tars(tmp_path / "tars", [40])
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))
    numbers = order(run(stream, buffer_rows=8, end=40))
    windows = [numbers[i : i + 8] for i in range(0, 40, 8)]
    assert all(sorted(window) == list(range(8 * i, 8 * i + 8)) for i, window in enumerate(windows))
    assert sum(window != sorted(window) for window in windows) >= 4


def test_each_row_has_an_index_of_its_own(tars):
    batches = run(tars, end=30)
    assert len({index for batch in batches for index in batch.row_indices}) == 30


@pytest.mark.parametrize("num_clips", [12, 3])
def test_fewer_files_than_workers_are_read_by_all_and_said(tmp_path, caplog, num_clips):
    write_tars(tmp_path / "tars", [num_clips])
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))
    batches = run(stream, ranks=4, batch_size=1, end=4 * num_clips)
    assert "has 1 file(s) for 4 workers" in caplog.text
    counts = torch.tensor(order(batches)).bincount(minlength=num_clips)
    assert counts.min() >= 3 and counts.max() <= 5  # rows that do not divide by workers go around
    assert (sorted(order(batches)[:12]) == list(range(12))) == (num_clips == 12)


def test_parquet_is_split_by_groups_of_rows_before_that(tmp_path, caplog):
    table = pa.table({"mp4": [f"clip {i}".encode() for i in range(12)], "txt": [f"prompt {i}" for i in range(12)]})
    pq.write_table(table, tmp_path / "clips.parquet", row_group_size=3)
    stream = open_stream(Source(metadata_path=str(tmp_path / "clips.parquet"), **COLUMNS))
    batches = run(stream, ranks=4, batch_size=1, end=12)
    assert sorted(order(batches)) == list(range(12))
    assert sorted(map(sorted, by_lane(batches).values())) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert not caplog.text


def test_streams_are_mixed_by_weight(tmp_path):
    for name, sizes in (("a", [8, 8]), ("b", [10, 20])):
        first = 0 if name == "a" else 100
        write_tars(tmp_path / name, sizes, clip=lambda number: b"")
        for file in sorted((tmp_path / name).iterdir()):
            numbers = range(first, first + sizes[int(file.stem)])
            first = numbers.stop
            members = [(f"{n}.{end}", f"{what} {n}".encode()) for n in numbers for end, what in KINDS]
            write_tar(file, members)
    streams = [open_stream(Source(metadata_path=str(tmp_path / name), **COLUMNS)) for name in "ab"]
    whole = run(streams, weights=[3.0, 1.0], ranks=2, end=80)
    for numbers in (order(whole), *by_lane(whole).values()):
        assert sum(number < 100 for number in numbers) == pytest.approx(0.75 * len(numbers), abs=2)
    states = LaneStates()
    begun = run(streams, states, weights=[3.0, 1.0], ranks=2, end=80, stop=36)
    assert order(begun + run(streams, states, weights=[3.0, 1.0], ranks=2, start=36, end=80)) == order(whole)
    with pytest.raises(ValueError, match="several streams need weights"):
        run(streams)


KINDS = (("mp4", "clip"), ("txt", "prompt"))


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_a_resumed_run_sees_what_an_unbroken_one_would(tars, ranks, workers):
    whole = order(run(tars, ranks=ranks, workers=workers, end=80))
    step = 2 * ranks
    for stop in range(step, 80, step if workers == 0 else 20):
        states = LaneStates()
        begun = run(tars, states, ranks=ranks, workers=workers, end=80, stop=stop)
        stored = json.loads(json.dumps(states.state_dict()))
        resumed = LaneStates()
        resumed.load_state_dict(stored)
        rest = run(tars, resumed, ranks=ranks, workers=workers, start=stop, end=80)
        assert order(begun + rest) == whole


def test_a_run_goes_on_with_fewer_workers_to_the_same(tars):
    whole = order(run(tars, ranks=2, workers=2, end=80))
    states = LaneStates()
    begun = run(tars, states, ranks=2, workers=2, end=80, stop=24)
    middle = run(tars, states, ranks=2, workers=0, start=24, end=80, stop=44)
    rest = run(tars, states, ranks=1, workers=2, start=44, end=80)
    assert order(begun + middle + rest) == whole


@pytest.mark.parametrize("changes", [{"workers": 3}, {"buffer_rows": 5}, {"seed": 1}])
def test_a_run_that_reads_otherwise_begins_a_new_pass_and_says_so(tars, caplog, changes):
    states = LaneStates()
    run(tars, states, end=36)  # in pass 1
    assert not caplog.text
    batches = run(tars, states, start=36, end=96, **changes)
    assert "the stream begins a new pass" in caplog.text
    assert {"workers": "num_lanes"}.get(*changes, *changes) in caplog.text
    assert min(state[2] for batch in batches for state in batch.lane_states) == 2
    assert set(order(batches)) == set(range(30))


def test_of_what_processes_note_the_furthest_counts():
    states, other = LaneStates(), LaneStates()
    states.update([(0, 0, 0, 3, 1, 5), (1, 0, 0, 0, 0, 1)])
    other.update([(0, 0, 0, 3, 1, 2), (1, 0, 1, 0, 0, 0)])
    states.merge([other.state_dict()])
    assert states.places == {(0, 0): (0, 3, 1, 5), (1, 0): (1, 0, 0, 0)}


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_bad_clips_are_passed_over_and_reported(tmp_path):
    kinds = {3: b"broken", 4: b"broken", 6: b"short", 7: b""}
    write_tars(tmp_path / "tars", [10], clip=lambda number: kinds.get(number, f"clip {number}".encode()))
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))
    batches = run(stream, batch_size=1, end=12)
    assert sorted(order(batches)[:6]) == [0, 1, 2, 5, 8, 9]
    errors = [error for batch in batches[:6] for error in batch.errors]
    assert sorted(error.partition(" of file 1 of ")[0] for error in errors) == ["row 4", "row 5", "row 8"]
    assert sum("it is broken" in error for error in errors) == 2
    assert sum("the file is empty" in error for error in errors) == 1
    states = LaneStates()
    begun = run(stream, states, batch_size=1, end=12, stop=3)
    assert order(begun + run(stream, states, batch_size=1, start=3, end=12)) == order(batches)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"broken", "10 clips in a row cannot be used; the last: row .* it is broken"),
        (b"short", "all clips of a worker were left out"),
    ],
)
def test_a_stream_without_a_usable_clip_is_an_error(tmp_path, content, message):
    write_tars(tmp_path / "tars", [40], clip=lambda number: content)
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))
    with pytest.raises(ValueError, match=message):
        run(stream)


def test_a_file_that_ends_early_is_named(tmp_path):
    write_tars(tmp_path / "tars", [3, 3])
    path = tmp_path / "tars" / "001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))
    with pytest.raises(DataError, match=r"001\.tar cannot be read after row \d.*: it cannot be read as a tar "):
        run(stream, end=12)


def test_a_stream_without_rows_is_an_error(tars, monkeypatch):
    monkeypatch.setattr(type(tars), "read_file", lambda *_: iter(()))
    with pytest.raises(ValueError, match="must hold rows for each of 1 workers, but has none for worker 1"):
        run(tars)


def test_the_buffer_is_bounded_by_bytes(tmp_path):
    size, count = 200_000, 60
    write_tars(tmp_path / "tars", [count], clip=lambda number: f"clip {number}".ljust(size).encode())
    stream = open_stream(Source(metadata_path=str(tmp_path / "tars"), **COLUMNS))

    def peak(buffer_bytes):
        tracemalloc.start()
        assert sorted(order(run(stream, buffer_rows=1000, buffer_bytes=buffer_bytes, end=count))) == list(range(count))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    assert peak(10 * size) < 18 * size  # ten clips, those at hand, and what reads the file
    assert peak(1000 * size) > count * size


def test_the_next_window_is_read_while_one_is_handed_out(tars, monkeypatch):
    read_file, seen = type(tars).read_file, []

    def note(self, file, start=0):
        for row in read_file(self, file, start):
            seen.append(row)
            yield row

    monkeypatch.setattr(type(tars), "read_file", note)
    clips = StreamedClips(
        [tars], LaneStates(), read, seed=0, start=0, end=30, batch_size=1, num_slots=1, buffer_rows=4
    )
    clips[0]
    deadline = time.monotonic() + 10
    while len(seen) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(seen) == 8


# --- formats ---------------------------------------------------------------------------------------------------------


def write_videos(folder):
    folder.mkdir()
    for number in range(3):
        write_clip(folder / f"{number}.mp4", number, num_frames=5)
    return [(folder / f"{number}.mp4").read_bytes() for number in range(3)]


def decode(video, prompts, number):
    return {"video": decode_frames(video, torch.arange(5)), "prompt": prompts, "num_valid_frames": 5}


def clips_of(stream, count=3, **settings):
    clips = StreamedClips([stream], LaneStates(), decode, seed=0, start=0, end=count, batch_size=1, num_slots=1)
    samples = [clips[item] for item in range(count)]
    assert not any(sample["errors"] for sample in samples)
    return sorted((sample["prompt"], sample["video"].float().mean().item()) for sample in samples)


def test_every_format_gives_the_same_clips(tmp_path, monkeypatch):
    contents = write_videos(tmp_path / "videos")
    videos = [decode_frames(tmp_path / "videos" / f"{i}.mp4", torch.arange(5)) for i in range(3)]
    expected = sorted(((f"p{i}",), video.float().mean().item()) for i, video in enumerate(videos))
    embedded = Dataset.from_dict(
        {
            "video": [{"bytes": content, "path": f"{i}.mp4"} for i, content in enumerate(contents)],
            "prompt": [[f"p{i}", " "] for i in range(3)],
        }
    ).cast_column("video", Video())
    embedded.save_to_disk(tmp_path / "saved")
    DatasetDict(test=embedded).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet").mkdir()
    embedded.to_parquet(str(tmp_path / "parquet" / "0.parquet"))
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(3):
            file.write(json.dumps({"video": f"{number}.mp4", "prompt": f"p{number}"}) + "\n")
    members = [
        (f"videos/{i}.{end}", data)
        for i in range(3)
        for end, data in (("mp4", contents[i]), ("txt", f"p{i}".encode()))
    ]
    write_tar(tmp_path / "tars" / "0.tar", members)
    monkeypatch.chdir(tmp_path)  # where videos/0.mp4 is a file, too, that must not be taken for the member of the tar
    for source in (
        Source(metadata_path="saved"),
        Source(metadata_path="splits", split="test"),
        Source(metadata_path="parquet"),
        Source(metadata_path="parquet/0.parquet"),
        Source(metadata_path="rows.jsonl", dataset_base_path="videos"),
        Source(metadata_path="tars", **COLUMNS),
        Source(metadata_path="tars/0.tar", **COLUMNS),
    ):
        assert clips_of(open_stream(source)) == expected, source


def test_clips_of_a_stream_are_seen_as_those_of_a_table(tmp_path):
    contents = write_videos(tmp_path / "videos")
    write_tar(tmp_path / "0.tar", [("0.mp4", contents[0]), ("0.txt", b"a")])
    config = DataConfig(metadata_path="", num_frames=5, height=16, width=32, horizontal_flip=0.5, temporal_crop=0.5)

    def decode(video, prompts, number):
        generator = seeded_generator(0, RandomPurpose.CLIP, number)
        row = Row(1, video, prompts, *probe_video(video, limits=config.limits))
        clip, num_valid = load_video(row, config.shape_at(0, 0), config, generator)
        return {"video": clip, "prompt": prompts[0], "num_valid_frames": num_valid}

    stream = open_stream(Source(metadata_path=str(tmp_path / "0.tar"), **COLUMNS))
    clips = StreamedClips([stream], LaneStates(), decode, seed=0, start=0, end=6, batch_size=1, num_slots=1)
    path = tmp_path / "videos" / "0.mp4"
    for number in range(6):
        expected = decode(path, ("a",), number)
        sample = clips[number]
        assert sample["video"].equal(expected["video"])
        assert (sample["prompt"], sample["sample_number"]) == ("a", number)
    batch = collate([sample])
    assert batch.prompts == ["a"] and batch.lane_states == [(0, 0, 6, 0, 0, 0)]


def test_files_in_the_repository_of_a_hub_data_set_are_read_and_no_others(tars, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfFileSystem.cat_file", lambda self, path: path.encode())
    stream = dataclasses.replace(tars, source=Source(metadata_path="owner/clips"))

    def video(path):
        columns = {"video": {"path": path, "bytes": None}, "prompt": "a"}
        return stream._make_row(0, 0, columns).find_video(None).open("rb").read().decode()

    own = "hf://datasets/owner/clips@0123/videos/0.mp4"
    assert video(own) == own
    for other in ("hf://datasets/owner/other@0123/0.mp4", "hf://datasets/owner/clips@0/../../other/0.mp4", "/0.mp4"):
        with pytest.raises(ValueError, match="no file may be opened"):
            video(other)


def test_paths_stay_below_their_folder(tmp_path):
    write_videos(tmp_path / "videos")
    paths = ["../rows.jsonl", "/etc/passwd", "http://host/a.mp4", "0.mp4"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"video": p, "prompt": "a"}) + "\n" for p in paths))
    source = Source(metadata_path=str(tmp_path / "rows.jsonl"), dataset_base_path=str(tmp_path / "videos"))
    rows = list(open_stream(source).read_file(0))
    for row, reason in zip(rows, ["leaves dataset_base_path", "leaves dataset_base_path", "not a URL"], strict=False):
        with pytest.raises(ValueError, match=reason):
            row.find_video(source.dataset_base_path)
    assert rows[3].find_video(source.dataset_base_path).name == "0.mp4"
    with pytest.raises(ValueError, match="no file may be opened; name the folder of its files"):
        rows[3].find_video(None)


def test_a_damaged_clip_is_reported_by_its_place(tmp_path):
    contents = write_videos(tmp_path / "videos")
    write_tar(tmp_path / "0.tar", [("0.mp4", contents[0]), ("0.txt", b"a"), ("1.mp4", b"no video"), ("1.txt", b"b")])
    stream = open_stream(Source(metadata_path=str(tmp_path / "0.tar"), **COLUMNS))
    clips = StreamedClips([stream], LaneStates(), decode, seed=0, start=0, end=4, batch_size=1, num_slots=1)
    errors = [error for item in range(4) for error in clips[item]["errors"]]
    assert errors[0].startswith(f"row 2 of file 1 of {tmp_path / '0.tar'} (1.mp4): not a video that can be")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.tar", "nowhere.tar, which does not exist"),
        ("rows.csv", "got .*rows.csv; a CSV is small, and read without --streaming"),
        ("empty", "empty must hold .tar, .tar.gz, .*, .parquet, .jsonl, .ndjson files to be streamed, but has none"),
        ("bad.tar", "bad.tar could not be opened as a stream: .*bad.tar: it cannot be read as a tar: [^:]*$"),
        ("zip.tar", "zip.tar: it cannot be read as a tar: it is a zip archive"),
        ("marked.jsonl", "marked.jsonl must be text in UTF-8 to be streamed, but is in UTF-16"),
        ("columns.parquet", "has clip, txt; name yours with --video_column and --caption_column"),
        ("types.parquet", "as Video, bytes or paths, but holds int64"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, name, message):
    (tmp_path / "rows.csv").write_text("mp4,txt\n0.mp4,a\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    (tmp_path / "zip.tar").write_bytes(b"PK\3\4" + bytes(1000))
    (tmp_path / "marked.jsonl").write_bytes('{"mp4": "0.mp4", "txt": "a"}'.encode("utf-16"))
    pq.write_table(pa.table({"clip": [b"0"], "txt": ["a"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"mp4": [0], "txt": ["a"]}), tmp_path / "types.parquet")
    with pytest.raises(ValueError, match=message):
        open_stream(Source(metadata_path=str(tmp_path / name), **COLUMNS))


def test_a_run_whose_first_file_cannot_be_read_ends_with_its_name(tmp_path):
    rows = '{"mp4": "0.mp4", "txt": "caf\u00e9"}\n'
    (tmp_path / "rows.jsonl").write_bytes(rows.encode("latin-1"))
    stream = open_stream(Source(metadata_path=str(tmp_path / "rows.jsonl"), **COLUMNS))
    with pytest.raises(ValueError, match=r"/rows\.jsonl cannot be read after row 0: "):
        RunData(DataConfig(metadata_path=""), [], [], [stream], None).check_stream(0)


def test_tars_of_a_data_set_of_the_hub_are_streamed_by_name_split_and_revision(tmp_path, monkeypatch):
    write_tars(tmp_path / "repo" / "test", [2, 2])
    write_tars(tmp_path / "repo" / "train", [1])
    asked = []

    def load(path, *, revision):
        asked.append((path, revision))
        return datasets.load_dataset_builder(str(tmp_path / "repo"))

    monkeypatch.setattr("causal_wan.tables.undecoded.load_dataset_builder", load)
    stream = open_stream(Source(metadata_path="owner/clips", revision="v1", split="test", **COLUMNS))
    assert asked == [("owner/clips", "v1")]
    assert sorted(order(run(stream, end=4))) == [0, 1, 2, 3]


def test_other_data_sets_of_the_hub_are_streamed_too(tmp_path, monkeypatch):
    (tmp_path / "repo").mkdir()
    pq.write_table(pa.table({"mp4": [b"clip 0"], "txt": ["prompt 0"]}), tmp_path / "repo" / "test-0.parquet")
    repository = str(tmp_path / "repo")
    monkeypatch.setattr(
        "causal_wan.tables.undecoded.load_dataset_builder",
        lambda path, *, revision: datasets.load_dataset_builder(repository),
    )
    monkeypatch.setattr(
        "causal_wan.tables.undecoded.load_dataset",
        lambda path, *, revision, **arguments: datasets.load_dataset(repository, **arguments),
    )
    stream = open_stream(Source(metadata_path="owner/clips", split="test", **COLUMNS))
    assert order(run(stream, end=2)) == [0, 0]


def test_a_data_set_that_the_hub_does_not_give_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="owner/no-such-clips could not be opened as a stream: "):
        open_stream(Source(metadata_path="owner/no-such-clips"))
