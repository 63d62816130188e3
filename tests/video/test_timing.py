"""When frames are shown: clips are sampled by time where the frame rate varies, and as before where it does not."""

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from grey_videos import shown_indices, write_timed_video, write_video

from causal_wan.cache.opening import hash_rows
from causal_wan.data.clips import load_video
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.frames import last_frame_indices, sample_frame_indices
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.video import timing
from causal_wan.video.decoding import probe_video
from causal_wan.video.facts import Traits
from causal_wan.video.limits import VideoLimits
from causal_wan.video.timing import Stamp, read_frame_times, time_frames


SLOW_THEN_FAST = [*range(0, 1000, 100), *range(1000, 1300, 20)]  # 10 frames a second, then 50
WITH_A_GAP = [*range(0, 400, 40), *range(1400, 1800, 40)]  # a second without frames


def config(folder, **changes):
    (folder / "rows.csv").write_text("video,prompt\nclip.mp4,a\n")
    defaults = {"num_frames": 17, "height": 32, "width": 48, "frame_sampling": "head"}
    paths = {"dataset_base_path": str(folder), "metadata_path": str(folder / "rows.csv")}
    return DataConfig(**paths, **{**defaults, **changes})


def on_screen(times, moments, slack):
    """The frame that is on screen at each moment, or within `slack` after it."""
    return [max(index for index, time in enumerate(times) if time <= moment + slack) for moment in moments]


def sampled(path, settings, seed=0):
    """The numbers of the frames that a clip is made of."""
    (row,) = load_rows(settings)
    times = read_frame_times(path) if row.traits & Traits.VARIABLE_RATE else None
    timing = (row.num_frames, row.frame_rate, settings.num_frames)
    generator = torch.Generator().manual_seed(seed)
    indices, _ = sample_frame_indices(*timing, settings, generator, times=times)
    return indices.tolist()


@pytest.mark.parametrize("times", [SLOW_THEN_FAST, WITH_A_GAP], ids=["fast", "gap"])
def test_a_clip_of_a_variable_rate_shows_what_a_player_shows_at_each_moment(tmp_path, times):
    path = write_timed_video(tmp_path / "clip.mp4", times)
    seconds = np.array(times) / 1000
    slack = float(np.median(np.diff(seconds))) / 2
    (row,) = load_rows(config(tmp_path))
    assert row.traits == Traits.VARIABLE_RATE
    clip, num_valid = load_video(row, config(tmp_path).shape, config(tmp_path), torch.Generator())
    assert num_valid == 17
    shown = shown_indices(clip.movedim(0, 1))
    assert shown == on_screen(seconds, np.arange(17) / 16, slack)
    assert np.abs(seconds[shown] - np.arange(17) / 16).max() < max(np.diff(seconds))
    uniform = sampled(path, config(tmp_path, frame_sampling="uniform", num_frames=13))
    assert uniform == on_screen(seconds, np.linspace(0, seconds[-1], 13), slack)
    starts = np.arange(0, seconds[-1] - 0.5, 0.001)
    possible = [on_screen(seconds, start + np.arange(9) / 16, slack) for start in starts]
    drawn = [sampled(path, config(tmp_path, frame_sampling="random", num_frames=9), seed) for seed in range(20)]
    assert all(indices in possible for indices in drawn)
    assert len(set(map(tuple, drawn))) > 10


@pytest.mark.parametrize("ending", ["mkv", "mov", "webm", "avi"])
def test_variable_rates_are_seen_in_other_containers(tmp_path, ending):
    codec = "libvpx-vp9" if ending == "webm" else "mpeg4" if ending == "avi" else "libx264"
    path = write_timed_video(tmp_path / f"clip.{ending}", WITH_A_GAP, codec=codec)
    facts = probe_video(path)
    assert facts.num_frames == 20
    assert facts.traits == Traits.VARIABLE_RATE
    np.testing.assert_allclose(read_frame_times(path), np.array(WITH_A_GAP) / 1000, atol=1e-3)
    assert facts.frame_rate == pytest.approx(19 / 1.76, rel=1e-3)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_the_last_frame_is_shown_for_its_duration(tmp_path, ending):
    path = write_timed_video(tmp_path / f"clip.{ending}", range(0, 500, 50), hold=1050)
    facts = probe_video(path)
    assert (facts.num_frames, facts.traits) == (10, Traits.VARIABLE_RATE)
    assert 9 / facts.frame_rate == pytest.approx(1.45, rel=1e-3)  # 1.5 s, less a frame of 50 ms
    path.rename(tmp_path / "clip.mp4")
    assert sampled(tmp_path / "clip.mp4", config(tmp_path))[-10:] == [9] * 10
    assert sampled(tmp_path / "clip.mp4", config(tmp_path, frame_sampling="uniform", num_frames=5)) == [0, 7, 9, 9, 9]


@pytest.mark.parametrize(
    ("ending", "codec", "times"),
    [
        ("mkv", "libx264", [round(1000 * index / 30) for index in range(40)]),  # whole milliseconds
        ("mp4", "libx264", [40 * index + 6 * (index % 3 == 1) for index in range(40)]),  # as a phone's camera jitters
        ("mp4", "libx264", [40 * index + 80 for index in range(40)]),
        ("mkv", "libx264", [40 * index + 5000 for index in range(40)]),
    ],
)
def test_rates_are_constant_though_timestamps_are_rounded_jitter_or_begin_late(tmp_path, ending, codec, times):
    path = write_timed_video(tmp_path / f"clip.{ending}", times)
    facts = probe_video(path)
    assert not facts.traits & Traits.VARIABLE_RATE
    assert facts.frame_rate == pytest.approx(39 / (times[-1] - times[0]) * 1000, rel=0.005)


def test_fragments_end_with_their_last_frame(tmp_path):
    """They have no edit list, and state a duration from the first frame to be decoded on."""
    whole = write_timed_video(tmp_path / "whole.mp4", SLOW_THEN_FAST)
    path = tmp_path / "clip.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"movflags": "frag_keyframe"}) as container:
        copy = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                container.mux(packet)
    facts = probe_video(path)
    assert facts.num_frames == 25
    assert 24 / facts.frame_rate == pytest.approx(1.28)


def test_constant_rates_are_read_from_the_header_alone(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setattr(timing, "time_frames", None)
    assert probe_video(path) == (24, 16.0, 48, 80, 0)


def test_a_header_with_the_right_mean_hides_no_variable_rate(tmp_path):
    """Twice as fast, then twice as slow: as many frames in the same time as at 20 a second."""
    times = [*range(0, 500, 25), *range(500, 1500, 100)]
    path = write_timed_video(tmp_path / "clip.mp4", times)
    assert probe_video(path).traits == Traits.VARIABLE_RATE


def stamps(pts, dts=None, duration=40):
    return [Stamp(p, d, duration) for p, d in zip(pts, dts or [None] * len(pts), strict=True)]


def test_times_that_are_missing_or_begin_anew_are_made_up_for():
    even = list(range(0, 400, 40))
    assert time_frames(stamps([None] * 10, duration=None), 25.0, 1e-3).frame_rate == 25
    assert time_frames(stamps([None] * 10), 16.0, 1e-3).frame_rate == pytest.approx(25)
    assert time_frames(stamps([None] * 10, even), 25.0, 1e-3).traits == 0
    holes = [None if index in (0, 4, 9) else time for index, time in enumerate(even)]
    assert time_frames(stamps(holes), 25.0, 1e-3).traits == 0
    early = [time - 80 for time in even]
    joined = time_frames(stamps(early + even, [time - 80 for time in early] + early), 25.0, 1e-3)
    assert (joined.num_frames, joined.traits) == (20, 0)
    gap = time_frames(stamps(even[:5] + [t + 1000 for t in even[5:]]), 25.0, 1e-3)
    np.testing.assert_allclose(gap.times, [0, 0.04, 0.08, 0.12, 0.16, 1.2, 1.24, 1.28, 1.32, 1.36])


def test_a_rate_that_the_header_misstates_is_measured(tmp_path):
    """A raw stream states 25 frames a second by default, and its durations the true rate."""
    path = tmp_path / "clip.h264"
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=10, width=80, height=48)
        for index in range(20):
            picture = np.full((48, 80, 3), 8 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    facts = probe_video(path)
    assert (facts.num_frames, facts.traits) == (20, Traits.OTHER_RATE)
    assert facts.frame_rate == pytest.approx(10)


def test_the_last_frames_are_those_before_the_end():
    assert last_frame_indices(48, 16.0, 5, 16.0).tolist() == [43, 44, 45, 46, 47]
    assert last_frame_indices(96, 32.0, 5, 16.0).tolist() == [87, 89, 91, 93, 95]
    assert last_frame_indices(3, 16.0, 5, 16.0).tolist() == [0, 1, 2]
    of_hours = last_frame_indices(100_000_002, 16.0, 3, 16.0)  # float32 has only even numbers there
    assert of_hours.tolist() == [99_999_999, 100_000_000, 100_000_001]
    times = np.array(WITH_A_GAP) / 1000
    assert last_frame_indices(20, 19 / 1.76, 17, 10.0, times).tolist()[:8] == [4, 6, 9, 9, 9, 9, 9, 9]


def test_times_beyond_the_limits_are_refused(tmp_path):
    path = write_timed_video(tmp_path / "clip.mkv", [0, 40, 80, 120_000])
    with pytest.raises(ValueError, match="max_video_seconds=60"):
        probe_video(path, limits=VideoLimits(max_video_seconds=60))


# --- what was known before -------------------------------------------------------------------------------------------


def forget_traits(folder):
    """Makes a manifest what it was before it had traits."""
    path = folder / "files.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["traits"]), path)


@pytest.mark.parametrize(("times", "is_as_before"), [(range(0, 1600, 50), True), (SLOW_THEN_FAST, False)])
def test_latents_of_before_are_found_where_frames_are_the_same_and_only_there(tmp_path, times, is_as_before):
    write_timed_video(tmp_path / "clip.mp4", times, hold=50)
    manifest = FileManifest(tmp_path / "cache")
    (row,) = load_rows(config(tmp_path), manifest)
    content = keep(manifest, row)
    manifest.save()
    forget_traits(tmp_path / "cache")
    old = FileManifest(tmp_path / "cache")
    (known,) = load_rows(config(tmp_path), old)
    assert (known.content == content) == is_as_before
    assert known.content.startswith(content)
    old.save()
    (again,) = load_rows(config(tmp_path), FileManifest(tmp_path / "cache"))
    assert again == known


def keep(manifest, row):
    """Notes a file as a run with a cache does; returns its SHA-256."""
    (facts,) = hash_rows([row], [0])
    manifest.add([facts])
    return facts.content


def test_files_that_are_gone_and_were_noted_before_are_used_with_a_warning(tmp_path, caplog):
    path = write_timed_video(tmp_path / "clip.mp4", SLOW_THEN_FAST)
    manifest = FileManifest(tmp_path / "cache")
    content = keep(manifest, load_rows(config(tmp_path), manifest)[0])
    manifest.save()
    forget_traits(tmp_path / "cache")
    path.unlink()
    (row,) = load_rows(config(tmp_path), FileManifest(tmp_path / "cache"))
    assert row.content == content
    assert "1 clip(s) are known from an older cache only" in caplog.text
