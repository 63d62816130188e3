"""Videos that do not begin with a key frame are read from the first one on, and counted so."""

import av
import numpy as np
import pytest
import torch
from grey_videos import GREY_STEP, shown_indices

from causal_wan.data.clips import load_video
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.facts import Traits


def write_cut(path, first, *, codec="libx264", num_frames=30, gop=10, ending="mkv", **options):
    """A video without its first packets; a key frame every `gop` frames."""
    whole = path.with_name(f"whole.{ending}")
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(codec, rate=16, width=80, height=48, options=options)
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        for index in range(num_frames):
            picture = np.full((48, 80, 3), GREY_STEP * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(path), "w") as cut:
        copy = cut.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size and number >= first:
                packet.stream = copy
                cut.mux(packet)
    return path


def rows_of(folder, **changes):
    (folder / "rows.csv").write_text("video,prompt\nclip.mp4,a\n")
    config = DataConfig(
        **{"dataset_base_path": str(folder), "metadata_path": str(folder / "rows.csv"), "num_frames": 9},
        **{"height": 32, "width": 48, **changes},
    )
    return load_rows(config), config


@pytest.mark.parametrize(
    ("codec", "ending"),
    [("libx264", "mkv"), ("libx264", "ts"), ("libvpx-vp9", "mkv"), ("libx264", "mov")],
)
def test_a_clip_without_a_first_key_frame_is_read_from_the_next_one(tmp_path, caplog, codec, ending):
    options = {"crf": "1", "x264-params": "scenecut=0"} if codec == "libx264" else {"b": "4M"}
    path = write_cut(tmp_path / f"clip.{ending}", 3, codec=codec, ending=ending, **options)
    facts = probe_video(path)
    assert (facts.num_frames, facts.frame_rate, facts.traits) == (20, 16, Traits.LATE_KEY_FRAME)
    assert shown_indices(decode_frames(path, torch.arange(20))) == list(range(10, 30))
    path.rename(tmp_path / "clip.mp4")
    (row,), config = rows_of(tmp_path)
    assert "1 clip(s) do not begin with a key frame: they are read from the first one on" in caplog.text
    clip, _ = load_video(row, config.shape, config, torch.Generator())
    assert shown_indices(clip.movedim(0, 1)) == [10, 12, 15, 17, 20, 22, 24, 27, 29]


def test_a_clip_without_any_key_frame_is_a_bad_row(tmp_path):
    write_cut(tmp_path / "clip.mov", 1, gop=100, ending="mov").rename(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="the video has no key frame"):
        rows_of(tmp_path)


def test_frames_that_lean_on_what_was_cut_off_are_not_counted(tmp_path):
    """An open group of pictures: the key frame is followed by frames that are shown before it."""
    options = {"crf": "1", "x265-params": "log-level=none:open-gop=1:keyint=10:min-keyint=10:bframes=3:scenecut=0"}
    path = write_cut(tmp_path / "clip.mkv", 0, codec="libx265", **options)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    leading = [packet for packet in packets[keys[1] :] if packet.pts < packets[keys[1]].pts]
    assert leading
    path = write_cut(tmp_path / "cut.mkv", keys[1], codec="libx265", **options)
    facts = probe_video(path)
    assert facts.num_frames == len(packets) - keys[1] - len(leading)
    assert len(decode_frames(path, torch.arange(facts.num_frames))) == facts.num_frames
