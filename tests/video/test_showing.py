"""Frames are read as a player shows them: square pixels, turned and mirrored as the file says."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from causal_wan.data.buckets import clip_shapes
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.facts import Traits
from causal_wan.video.limits import VideoLimits


# Grey levels of the quarters of a stored picture, 48 x 80: top left, top right, bottom left, bottom right.
QUARTERS = np.array([[20, 90], [160, 230]], np.uint8)
ONE = 1 << 16
MATRICES = {  # (a, b, c, d): where x and y go
    "upright": (ONE, 0, 0, ONE),
    "mirrored": (-ONE, 0, 0, ONE),
    "upside down": (-ONE, 0, 0, -ONE),
    "mirrored and upside down": (ONE, 0, 0, -ONE),
    "turned right": (0, ONE, -ONE, 0),
    "turned left": (0, -ONE, ONE, 0),
    "turned and mirrored": (0, ONE, ONE, 0),
    "turned and mirrored the other way": (0, -ONE, -ONE, 0),
    "all zero": (0, 0, 0, 0),
}


def write_quarters(path, *, matrix=None, aspect=None, num_frames=3, rate=16, codec="libx264", **options):
    picture = np.kron(QUARTERS, np.ones((24, 40), np.uint8))[..., None].repeat(3, -1)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, width=80, height=48)
        stream.pix_fmt = "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if matrix is not None:
            a, b, c, d = matrix
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for _ in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def quarters_of(frame):
    """The grey levels of the quarters of a frame `(3, height, width)`, in tens."""
    height, width = frame.shape[-2:]
    rows, columns = [height // 4, 3 * height // 4], [width // 4, 3 * width // 4]
    return [[int(frame[0, y - 4 : y + 4, x - 4 : x + 4].float().mean() / 10 + 0.5) for x in columns] for y in rows]


def placed(matrix):
    """The quarters, each where the matrix sends its centre."""
    a, b, c, d = np.sign(matrix)
    shown = np.zeros((2, 2), int)
    for y, x in np.ndindex(2, 2):
        right, down = 2 * x - 1, 2 * y - 1
        to = a * right + c * down, b * right + d * down
        shown[(to[1] + 1) // 2, (to[0] + 1) // 2] = QUARTERS[y, x] // 10
    return shown.tolist()


@pytest.mark.parametrize("name", MATRICES)
def test_frames_are_turned_and_mirrored_as_the_header_says(tmp_path, name):
    matrix = MATRICES[name]
    path = write_quarters(tmp_path / "clip.mp4", matrix=matrix)
    (frame,) = decode_frames(path, torch.tensor([0]))
    is_turned = "turned" in name
    assert quarters_of(frame) == placed(matrix if any(matrix) else MATRICES["upright"])
    assert frame.shape == ((3, 80, 48) if is_turned else (3, 48, 80))
    facts = probe_video(path, as_shown=True)
    assert facts[2:4] == frame.shape[1:]
    assert facts.traits == (Traits.MIRRORED if "mirrored" in name else 0)


def test_angles_between_are_taken_for_the_nearest_right_one(tmp_path):
    turn = [int(ONE * value) for value in (np.sin(0.1), np.cos(0.1), -np.cos(0.1), np.sin(0.1))]
    (frame,) = decode_frames(write_quarters(tmp_path / "clip.mp4", matrix=turn), torch.tensor([0]))
    assert quarters_of(frame) == placed(MATRICES["turned right"])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize(("aspect", "width"), [("2", 160), ("1/2", 40), ("16/11", 116), ("1", 80), ("80/81", 79)])
def test_pixels_become_square(tmp_path, aspect, width, ending):
    path = write_quarters(tmp_path / f"clip.{ending}", aspect=aspect)
    facts = probe_video(path)
    (frame,) = decode_frames(path, torch.tensor([0]))
    assert frame.shape == (3, 48, width)
    assert facts[2:4] == (48, width)
    assert facts.traits == (Traits.NON_SQUARE_PIXELS if width != 80 else 0)
    assert quarters_of(frame) == (QUARTERS // 10).tolist()


def test_pixels_are_squared_before_frames_are_turned_and_buckets_chosen(tmp_path):
    path = write_quarters(tmp_path / "clip.mp4", aspect="2", matrix=MATRICES["turned right"])
    assert probe_video(path, as_shown=True)[2:4] == (160, 48)
    (tmp_path / "rows.csv").write_text("video,prompt\nclip.mp4,a\n")
    config = DataConfig(
        dataset_base_path=str(tmp_path),
        metadata_path=str(tmp_path / "rows.csv"),
        num_frames=1,
        resolution_buckets=("32x96", "32x48", "48x32", "96x32"),
    )
    (row,) = load_rows(config)
    assert [shape[1:] for shape in clip_shapes(row, config)] == [(96, 32)]
    (kept,) = load_rows(config, FileManifest(tmp_path / "cache"))
    assert (kept.height, kept.width, kept.traits) == (160, 48, Traits.NON_SQUARE_PIXELS)


@pytest.mark.parametrize("spacing", [(200, 1), (1, 200), (2**31 - 1, 1)])
def test_pixels_of_any_length_take_no_memory(tmp_path, spacing):
    path = write_quarters(tmp_path / "clip.mp4", aspect="2")
    header = path.read_bytes()
    at = header.index(b"pasp") + 4
    path.write_bytes(header[:at] + struct.pack(">2I", *spacing) + header[at + 8 :])
    for read in (probe_video, lambda path: decode_frames(path, torch.tensor([0]))):
        with pytest.raises(ValueError, match="pixels must be at most 16 times as wide as high"):
            read(path)


def test_limits_hold_for_the_size_with_square_pixels(tmp_path):
    path = write_quarters(tmp_path / "clip.mp4", aspect="4")
    limits = VideoLimits(max_video_pixels=48 * 300)
    for read in (probe_video, lambda path, limits: decode_frames(path, torch.tensor([0]), limits=limits)):
        with pytest.raises(ValueError, match="got 48 x 320; scale the video down"):
            read(path, limits=limits)
