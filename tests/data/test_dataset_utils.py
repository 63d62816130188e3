import os
import pickle
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from grey_videos import shown_indices, write_playlists, write_video
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import dataset_utils
from causal_wan.data.buckets import clip_shapes, order_samples
from causal_wan.data.clips import VideoDataset, augment_videos, build_video_transform, normalize_videos
from causal_wan.data.descriptions import describe_flip, describe_rows, describe_speed_up
from causal_wan.data.frames import sample_frame_indices
from causal_wan.data.rows import Row, load_rows
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.samples import BadClips, SampleStream, collate
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.video.decoding import decode_frames


SHAPE = ClipShape(9, 32, 48)


@pytest.fixture
def folder(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for number in range(4):
        write_video(videos / f"{number}.mp4")
    return tmp_path


def config(folder, text=None, **changes):
    if text is not None:
        (folder / "rows.csv").write_text(text, encoding="utf-8")
    defaults = {"num_frames": 9, "height": 32, "width": 48}
    return DataConfig(
        dataset_base_path=str(folder / "videos"), metadata_path=str(folder / "rows.csv"), **{**defaults, **changes}
    )


GOOD = "video,prompt\n0.mp4,a\n1.mp4,b\n2.mp4,c\n3.mp4,d\n"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_text(folder):
    text = 'prompt,video,note\n"one, two\nthree",0.mp4,x\n123,1.mp4,\nNone,2.mp4,\nNA,3.mp4,\n'
    rows = load_rows(config(folder, text))
    assert [row.prompts[0] for row in rows] == ["one, two\nthree", "123", "None", "NA"]
    assert [row.video.name for row in rows] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert (rows[0].num_frames, rows[0].frame_rate, rows[0].height, rows[0].width) == (24, 16.0, 48, 80)


def test_a_changed_csv_is_read_anew(folder):
    assert len(load_rows(config(folder, GOOD))) == 4
    assert len(load_rows(config(folder, "video,prompt\n0.mp4,a\n"))) == 1


def test_other_columns_can_be_named(folder):
    settings = config(folder, "file,caption\n0.mp4,a\n", video_column="file", caption_column=("caption",))
    assert load_rows(settings)[0].prompts[0] == "a"


BAD_ROWS = {
    "missing.mp4": "the file does not exist",
    "text.mp4": "not a video that can be read",
    "empty.mp4": "the file is empty",
    "sound.mp4": "the file has no video stream",
    "short.mp4": "5 frames, fewer than num_frames=9",
    "../outside.mp4": "the path leaves dataset_base_path",
    "link.mp4": "the path leaves dataset_base_path",
    "http://host/a.mp4": "not a URL or protocol",
    "concat:0.mp4|1.mp4": "not a URL or protocol",
    "file:0.mp4": "not a URL or protocol",
    "playlist.m3u8": "not a video that can be read",
    "list.mp4": "not a video that can be read",
    "picture.mp4": "not a video that can be read",
    "codec.mp4": "codec is not known",
    "loop.mp4": "the file does not exist",
    "sub": "the path is a folder",
    "": "the path is empty",
}


def write_bad_files(folder):
    videos = folder / "videos"
    (videos / "sub").mkdir()
    (videos / "text.mp4").write_text("this is no video\n" * 100)
    (videos / "empty.mp4").touch()
    write_video(videos / "short.mp4", num_frames=5)
    write_video(folder / "outside.mp4")
    os.symlink(folder / "outside.mp4", videos / "link.mp4")
    os.symlink(videos / "loop.mp4", videos / "loop.mp4")
    mp4 = (videos / "0.mp4").read_bytes()
    (videos / "codec.mp4").write_bytes(mp4.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    with av.open(str(videos / "picture.mp4"), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", width=80, height=48)
        stream.pix_fmt = "rgb24"
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 80, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(picture))
    write_playlists(videos)
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_all_bad_rows_are_listed_at_once_with_number_path_and_reason(folder):
    write_bad_files(folder)
    lines = ["video,prompt", "0.mp4,good", *(f"{path},prompt" for path in BAD_ROWS), "1.mp4,", '2.mp4,"  "']
    with pytest.raises(ValueError) as error:
        load_rows(config(folder, "\n".join(lines) + "\n"))
    message = str(error.value)
    assert f"{len(BAD_ROWS) + 2} of {len(BAD_ROWS) + 3} rows" in message
    listed = message.splitlines()
    for number, (path, reason) in enumerate(BAD_ROWS.items(), 2):
        (line,) = [line for line in listed if line.startswith(f"  row {number}, ")]
        assert path in line
        assert reason in line
    assert sum("the prompt is empty" in line for line in listed) == 2
    assert "--on_bad_sample skip" in listed[-1]


def test_bad_rows_can_be_left_out(folder, caplog):
    rows = load_rows(config(folder, "video,prompt\nno.mp4,a\n1.mp4,b\n", on_bad_sample="skip"))
    assert [(row.number, row.prompts[0]) for row in rows] == [(2, "b")]
    assert "row 1, no.mp4: the file does not exist" in caplog.text


def test_long_lists_are_cut_after_20_with_a_count(folder):
    text = "video,prompt\n" + "no.mp4,a\n" * 25
    with pytest.raises(ValueError) as error:
        load_rows(config(folder, text))
    assert str(error.value).count("does not exist") == 20
    assert "and 5 more" in str(error.value)


def test_short_clips_can_be_left_out_or_padded(folder, caplog):
    write_video(folder / "videos" / "short.mp4", num_frames=5)
    text = "video,prompt\n0.mp4,a\nshort.mp4,b\n"
    assert [row.prompts[0] for row in load_rows(config(folder, text, short_clips="skip"))] == ["a"]
    assert "left out 1 clip(s) with too few frames" in caplog.text
    rows = load_rows(config(folder, text, short_clips="pad"))
    sample = VideoDataset(rows, config(folder, short_clips="pad")).load(1, torch.Generator(), SHAPE)
    assert sample["num_valid_frames"] == 5
    assert shown_indices(sample["video"].movedim(1, 0)) == [0, 1, 2, 3, 4, 4, 4, 4, 4]


def test_clips_are_short_at_a_rate_when_their_time_is(folder):
    # 24 frames at 16 a second are 1.4 s: 12 frames at 8 a second, 24 at 16.
    ok = config(folder, "video,prompt\n0.mp4,a\n", frame_sampling="head", frame_rate=8.0)
    assert load_rows(ok)
    with pytest.raises(ValueError, match="6 frames at 4 frames a second, fewer than num_frames=9"):
        load_rows(replace(ok, frame_rate=4.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("video,prompt\n", "has none"),
        ("video,caption\n0.mp4,a\n", "has video, caption; name yours with --video_column and --caption_column"),
        ("video,prompt\nno.mp4,a\n", "1 of 1 rows"),
        ("video,prompt\n0.mp4,a dog, running\n", r"2 fields a row, but row 1 \(line 2\) has 3; .*put quotes around"),
        ("video,prompt\n0.mp4,a\n1.mp4,a dog, running\n", r"row 2 \(line 3\) has 3; .*put quotes around"),
        ('video,prompt\n0.mp4,a\n1.mp4,"b\n2.mp4,c\n', r"row 2 \(line 3\) opens a quote that never closes"),
    ],
)
def test_unusable_csv_files_are_refused(folder, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(config(folder, text))


def test_text_that_is_not_utf_8_is_refused_by_name(folder):
    settings = config(folder, GOOD)
    (folder / "rows.csv").write_bytes("video,prompt\n0.mp4,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows.csv must be text in UTF-8"):
        load_rows(settings)


@pytest.mark.parametrize("name", ["rows[1].csv", "rows*.csv"])
def test_the_name_of_a_csv_is_no_pattern(folder, name):
    settings = replace(config(folder, GOOD), metadata_path=str(folder / name))
    (folder / name).write_text("video,prompt\n1.mp4,only\n")
    assert [row.prompts[0] for row in load_rows(settings)] == ["only"]


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"rows.csv does not exist"):
        load_rows(config(folder))
    settings = replace(config(folder, GOOD), dataset_base_path=str(folder / "nowhere"))
    with pytest.raises(ValueError, match="nowhere is not one"):
        load_rows(settings)


def test_no_row_left_is_an_error_even_when_skipping(folder):
    with pytest.raises(ValueError, match="none of 1 is left"):
        load_rows(config(folder, "video,prompt\nno.mp4,a\n", on_bad_sample="skip"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 80}, "num_frames must be 4k \\+ 1 for the WAN VAE, got 80; use 77 or 81"),
        ({"num_frames": 0}, "num_frames must be 1 or more, got 0; the default is 81"),
        ({"num_frames": 2}, "use 1 or 5"),
        ({"num_frames": 80, "time_division_factor": 8}, "8k \\+ 1 .* use 73 or 81"),
        ({"height": 470}, "height must be a multiple of 16, got 470; use 464 or 480"),
        ({"width": 8}, "width must be a multiple of 16, got 8; use 16 or 32"),
        ({"frame_rate": 0.0}, r"frame_rate must be in \[0\.001, 1000\], got 0\.0; WAN's is 16"),
        ({"frame_rate": float("nan")}, "frame_rate must be a finite number"),
        ({"frame_rate": float("inf")}, "frame_rate must be a finite number"),
        ({"max_bad_samples": -1}, "max_bad_samples must be 0 or more"),
    ],
)
def test_settings_that_cannot_work_name_the_nearest_that_do(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **changes)


# --- sampling and decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 3, 6, 9, 12, 14, 17, 20, 23]),
        ({"frame_sampling": "head"}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"frame_sampling": "head", "frame_rate": 8.0}, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        ({"frame_sampling": "head", "frame_rate": 32.0}, [0, 0, 1, 2, 2, 2, 3, 4, 4]),
    ],
)
def test_sampled_frames_are_the_right_ones(folder, changes, expected):
    settings = config(folder, GOOD, **changes)
    indices, num_valid = sample_frame_indices(24, 16.0, 9, settings, torch.Generator())
    assert num_valid == 9
    assert indices.tolist() == expected
    assert shown_indices(decode_frames(folder / "videos" / "0.mp4", indices)) == expected


def test_random_sampling_starts_anywhere_and_keeps_the_rate(folder):
    settings = config(folder, GOOD, frame_sampling="random")
    starts = set()
    for seed in range(200):
        torch.manual_seed(0)  # the start comes from the generator that is given, not from this
        indices, _ = sample_frame_indices(24, 16.0, 9, settings, torch.Generator().manual_seed(seed))
        assert (indices.diff() == 1).all()
        starts.add(int(indices[0]))
    assert starts == set(range(16))


def test_frames_are_resized_to_cover_and_cropped_in_the_centre():
    frame = torch.zeros(3, 90, 200, dtype=torch.uint8)
    frame[:, 35:55, 90:110] = 255  # a square in the centre
    out = build_video_transform(48, 48)(frame)
    assert out.shape == (3, 48, 48)
    rows, columns = (out[0] > 127).nonzero(as_tuple=True)
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert abs(height - width) <= 1  # nothing is squashed
    assert abs(rows.float().mean() - 23.5) < 1
    assert abs(columns.float().mean() - 23.5) < 1


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (17, 33), (33, 500)])
def test_every_aspect_ratio_covers_the_target(size):
    assert build_video_transform(32, 48)(torch.full((3, *size), 7, dtype=torch.uint8)).eq(7).all()


def test_pixels_become_minus_1_to_1():
    videos = normalize_videos(torch.tensor([0, 255], dtype=torch.uint8))
    assert videos.tolist() == [-1.0, 1.0]
    assert videos.dtype == torch.float32


# --- order -----------------------------------------------------------------------------------------------------------


class Rows:
    """Rows that are their own index and draw one number."""

    def __init__(self, count, broken=(), prompts=1):
        self.count, self.broken, self.prompts = count, broken, prompts

    def __len__(self):
        return self.count

    def load(self, index, generator, shape):
        if index in self.broken:
            raise ValueError(f"row {index} is broken")
        draw = float(torch.rand((), generator=generator))
        prompts = tuple(f"{index}, {number}" for number in range(self.prompts))
        return {"latents": torch.tensor([draw]), "prompts": prompts, "row_index": index, "num_valid_frames": 1}


def stream_of(dataset, end, *, seed=0, start=0, **settings):
    """Rows without buckets, 2 samples a step."""
    order = SampleOrder([0] * len(dataset), [0] * len(dataset), seed=seed, samples_per_step=2)
    return SampleStream(
        dataset, order, DataConfig(dataset_base_path="", metadata_path="", **settings), start=start, end=end
    )


def row_indices(stream):
    return [sample["row_index"] for sample in stream]


def test_every_epoch_is_another_permutation():
    rows = row_indices(stream_of(Rows(10), 30))
    epochs = [rows[:10], rows[10:20], rows[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert row_indices(stream_of(Rows(10), 30, seed=1)) != rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_goes_on_where_the_unbroken_one_would(num_workers):
    def batches(start):
        stream = stream_of(Rows(7, prompts=2), 24, seed=3, start=start, caption_dropout=0.2)
        return list(DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=num_workers))

    whole, resumed = batches(0), batches(10)
    assert len(resumed) == 7
    for expected, batch in zip(whole[5:], resumed, strict=True):
        assert batch.prompts == expected.prompts
        assert batch.sample_numbers == expected.sample_numbers
        assert all(map(torch.equal, batch.clips, expected.clips))


def test_samples_do_not_share_their_randomness():
    draws = [float(sample["latents"]) for sample in stream_of(Rows(2), 50)]
    assert len(set(draws)) == 50


def test_of_several_prompts_each_sample_draws_one():
    prompts = [sample["prompt"] for sample in stream_of(Rows(2, prompts=3), 600)]
    counts = Counter(prompts)
    assert set(counts) == {f"{row}, {number}" for row in range(2) for number in range(3)}
    assert min(counts.values()) > 60


def test_dropped_captions_are_empty_and_as_many_as_asked_for():
    prompts = [sample["prompt"] for sample in stream_of(Rows(2), 1000, caption_dropout=0.1)]
    assert 70 < prompts.count("") < 130
    kept = [sample["prompt"] for sample in stream_of(Rows(2), 1000)]
    assert all(prompt in ("", expected) for prompt, expected in zip(prompts, kept, strict=True))


def test_a_broken_clip_is_replaced_by_the_next_of_its_epoch_and_reported():
    whole = stream_of(Rows(6), 6)
    broken = whole[2]["row_index"]
    stream = stream_of(Rows(6, broken={broken}), 6)
    assert row_indices(stream)[2] == row_indices(whole)[3]
    assert stream[2]["errors"] == [f"row {broken} is broken"]
    assert stream[1]["errors"] == []
    assert collate([stream[1], stream[2]]).errors == [f"row {broken} is broken"]


def test_a_data_set_that_is_broken_all_over_is_an_error():
    with pytest.raises(ValueError, match=r"10 clips in a row did not decode; the last: .*[^.]\.$"):
        stream_of(Rows(30, broken=range(30)), 1)[0]


def video_stream(rows, settings, end):
    order = order_samples(rows, settings, seed=0, samples_per_step=2)
    return SampleStream(VideoDataset(rows, settings), order, settings, start=0, end=end)


def test_a_clip_that_breaks_after_it_was_checked_names_row_and_file(folder):
    settings = config(folder, GOOD)
    rows = load_rows(settings)
    path = folder / "videos" / "1.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"row 2, .*1.mp4"):
        VideoDataset(rows, settings).load(1, torch.Generator(), SHAPE)
    stream = pickle.loads(pickle.dumps(video_stream(rows, settings, 8)))
    samples = list(stream)
    assert sum(len(sample["errors"]) for sample in samples) == 2
    assert 1 not in row_indices(stream)


def test_batches_hold_clips_and_what_is_known_of_them(folder):
    settings = config(folder, GOOD)
    stream = video_stream(load_rows(settings), settings, 2)
    batch = collate([stream[0], stream[1]])
    assert [clip.shape for clip in batch.clips] == [(3, 9, 32, 48)] * 2
    assert batch.clips[0].dtype == torch.uint8
    assert batch.is_latents == [False, False]
    assert batch.num_valid_frames == [9, 9]
    assert len(tensors_of(batch)) == len(batch.clips)  # all else is for the host alone


def tensors_of(batch):
    """All that a batch holds, wherever."""
    return [value for value in tree_leaves(vars(batch)) if isinstance(value, torch.Tensor)]


def test_a_batch_says_which_clips_are_latents_whatever_their_type():
    video, latents = {"video": torch.zeros(3, 1, 2, 2)}, {"latents": torch.zeros(4, dtype=torch.uint8)}
    known = {"prompt": "", "row_index": 0, "sample_number": 0, "num_valid_frames": 1, "errors": []}
    batch = collate([{**known, **video}, {**known, **latents}, {**known, **video}])
    assert batch.is_latents == [False, True, False]
    assert batch.lane_states == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none")
def test_a_loader_pins_all_tensors_of_a_batch_and_loses_nothing():
    samples = [stream_of(Rows(4), 4, start=2)[number] for number in range(2)]
    samples[1] |= {"errors": ["broken"], "cache_key": b"key", "lane_state": (0, 0, 1, 2, 3, 4)}
    with FakeCuda() as gpu:
        (batch,) = DataLoader(samples, batch_size=2, collate_fn=collate, pin_memory=True)
        assert len(tensors_of(batch)) == 2
        assert all(map(gpu.is_pinned, tensors_of(batch)))
    expected = collate(samples)
    assert all(map(torch.equal, batch.clips, expected.clips))
    assert replace(batch, clips=[]) == replace(expected, clips=[])


def test_bad_clips_are_reported_once_and_counted_up_to_a_limit(capsys):
    bad_clips = BadClips(2)
    bad_clips.note(["a is broken"])
    bad_clips.note([])
    bad_clips.note(["a is broken", "b is broken"])
    assert capsys.readouterr().out.count("replaced a clip that does not decode: a is broken") == 1
    with pytest.raises(ValueError, match=r"max_bad_samples=2 clips may fail to decode, but 3 did, last: c is broken"):
        bad_clips.note(["c is broken"])


def test_the_example_of_the_front_door_runs(clips, monkeypatch):
    monkeypatch.chdir(clips)
    code = textwrap.dedent(dataset_utils.__doc__.split("\n\n")[1])
    for shown, here in {
        "metadata.csv": "train.csv",
        "num_frames=81": "num_frames=17, height=32, width=48",
        "end=8000": "end=8",
        "num_workers=4": "num_workers=1",
    }.items():
        assert code.count(shown) == 1
        code = code.replace(shown, here)
    found = {}
    exec(code, found)
    batch = found["batch"]
    assert [clip.shape for clip in batch.clips] == [(3, 17, 32, 48)] * 2
    assert (batch.clips[0].dtype, batch.sample_numbers) == (torch.uint8, [6, 7])
    assert set(batch.prompts) <= {prompt for row in found["rows"] for prompt in row.prompts}


# --- shapes ----------------------------------------------------------------------------------------------------------


def sized(height, width, num_frames=100):
    return Row(1, Path("a"), ("a",), num_frames, 16.0, height, width)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        (sized(480, 832), (49, 480, 832)),
        (sized(1080, 1920), (49, 480, 832)),
        (sized(1920, 1080), (49, 832, 480)),
        (sized(700, 710), (49, 640, 640)),
        (sized(480, 832, 48), (17, 480, 832)),
        (sized(480, 832, 5), (17, 480, 832)),  # short: see short_clips
    ],
)
def test_clips_go_to_the_bucket_that_fits_best(folder, row, shape):
    settings = config(
        folder, resolution_buckets=("480x832", "832x480", "640x640"), frame_buckets=(17, 49), num_frames=49
    )
    assert clip_shapes(row, settings) == [shape]


def test_of_sizes_with_one_aspect_ratio_the_largest_without_enlarging_is_taken(folder):
    settings = config(folder, resolution_buckets=("240x416", "480x832", "720x1248"))
    sizes = {size: clip_shapes(sized(*size), settings)[0][1:] for size in [(120, 208), (500, 866), (1080, 1872)]}
    assert sizes == {(120, 208): (240, 416), (500, 866): (480, 832), (1080, 1872): (720, 1248)}


def test_a_step_of_a_mixed_set_is_of_one_shape(folder):
    for number in range(4):
        write_video(folder / "videos" / f"tall{number}.mp4", height=80, width=48, num_frames=10 + 8 * (number % 2))
    text = GOOD + "".join(f"tall{number}.mp4,t\n" for number in range(4))
    settings = config(folder, text, resolution_buckets=("32x48", "48x32"), frame_buckets=(9, 17))
    stream = video_stream(load_rows(settings), settings, 40)
    shapes = [tuple(sample["video"].shape) for sample in stream]
    assert shapes[::2] == shapes[1::2]
    assert set(shapes) == {(3, 17, 32, 48), (3, 9, 48, 32), (3, 17, 48, 32)}


def test_a_schedule_gives_each_step_its_shape(folder):
    settings = config(
        folder, GOOD, num_frames=17, height=48, frames_schedule="0:5, 2:9,5:17", resolution_schedule="0:32x48,4:48x48"
    )
    shapes = [tuple(sample["video"].shape[1:]) for sample in video_stream(load_rows(settings), settings, 14)]
    expected = [(5, 32, 48)] * 2 + [(9, 32, 48)] * 2 + [(9, 48, 48)] + [(17, 48, 48)] * 2
    assert shapes[::2] == shapes[1::2] == expected
    assert settings.all_shapes() == sorted(set(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_buckets": (9, 10)}, "frame_buckets and frames_schedule must be 4k \\+ 1 .* got 10; use 9 or 13"),
        ({"resolution_buckets": ("32x50",)}, "must be a multiple of 16, got 50; use 48 or 64"),
        ({"resolution_buckets": ("480p",)}, "such as 480x832, got '480p'"),
        ({"frames_schedule": "0:5,2:13"}, "must end with num_frames, the shape of the result, which is 9"),
        ({"frames_schedule": "1:5,2:9"}, "must begin at step 0"),
        ({"frames_schedule": "0:5,9"}, "must be step:value"),
        ({"frames_schedule": "0:9", "frame_buckets": (9,)}, "from a schedule or from buckets, not from both"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\]"),
        ({"temporal_crop": 0.0}, r"temporal_crop must be in \(0, 1\]"),
        ({"temporal_crop": 0.5, "frame_sampling": "head"}, "temporal_crop goes with --frame_sampling uniform"),
        ({"color_jitter": (0.1,)}, "color_jitter must be four numbers"),
        ({"color_jitter": (0.1, 0.1, float("nan"), 0.1)}, "each of color_jitter must be a finite number"),
    ],
)
def test_shapes_and_augmentations_that_cannot_work_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **changes)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_a_temporal_crop_is_a_window_of_at_least_its_share(folder):
    settings = config(folder, GOOD, temporal_crop=0.6)
    starts, ends = set(), set()
    for seed in range(300):
        indices, num_valid = sample_frame_indices(101, 16.0, 9, settings, torch.Generator().manual_seed(seed))
        starts.add(int(indices[0]))
        ends.add(int(indices[-1]))
        assert num_valid == 9
        assert 60 <= int(indices[-1] - indices[0]) <= 100
    assert len(starts) > 20
    assert max(ends) == 100
    short, _ = sample_frame_indices(9, 16.0, 9, settings, torch.Generator())
    assert short.tolist() == list(range(9))  # no frame twice


def test_augmentations_are_the_same_in_all_frames_and_follow_the_generator(folder):
    settings = config(folder, horizontal_flip=0.5, color_jitter=(0.3, 0.3, 0.3, 0.1))
    frame = torch.randint(0, 255, (3, 1, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video = frame.expand(3, 5, 32, 48).clone()
    results = [augment_videos([video], settings, torch.Generator().manual_seed(seed))[0] for seed in range(20)]
    for result in results:
        assert (result == result[:, :1]).all()
    assert len({tuple(result.flatten().tolist()) for result in results}) == 20
    assert torch.equal(results[3], augment_videos([video], settings, torch.Generator().manual_seed(3))[0])
    assert torch.equal(augment_videos([video], config(folder), torch.Generator())[0], video)


def test_half_of_the_clips_are_mirrored(folder):
    video = torch.zeros(3, 2, 16, 16, dtype=torch.uint8)
    video[..., :8] = 255
    settings = config(folder, horizontal_flip=0.5)
    mirrored = [
        int(augment_videos([video], settings, torch.Generator().manual_seed(s))[0][0, 0, 0, 0]) for s in range(200)
    ]
    assert 70 < mirrored.count(0) < 130


# --- descriptions ----------------------------------------------------------------------------------------------------


def rows_of(seconds, rate=16.0):
    return [Row(1, Path("a"), (str(s),), round(s * rate), rate, 48, 80) for s in seconds]


def test_speeding_up_is_said_with_numbers_and_only_when_it_happens(folder):
    settings = config(folder, num_frames=81)
    assert describe_speed_up(rows_of([5.0, 6.0]), settings) is None
    note = describe_speed_up(rows_of([10.125, 10.125, 20.25]), settings)
    assert "2.0 times as fast (up to 4.0)" in note
    assert "--frame_sampling head" in note
    assert describe_speed_up(rows_of([60.0]), replace(settings, frame_sampling="head")) is None


def test_mirroring_warns_of_prompts_that_know_sides(folder):
    rows = [replace(sized(48, 80), prompts=prompts) for prompts in (("turn LEFT", "go"), ("it is bright",))]
    assert describe_flip(rows, config(folder)) is None
    assert "1 prompts here say left or right" in describe_flip(rows, config(folder, horizontal_flip=0.5))


def test_rows_are_described_in_numbers():
    text = describe_rows(rows_of([2.0, 4.0, 4.0]))
    assert "3 clips, 2 prompts; 32 to 64 frames (median 64) at 16 a second, 48 x 80; 0.2 minutes in all" in text
