"""The judge of drawings, on what it has to know and what it must not take for a drawing."""

import numpy as np
import pytest
import torch
from conftest import ROOT, run_python
from PIL import Image, ImageFilter
from safetensors import safe_open

from causal_wan.model.vae import decode_latents, encode_videos
from causal_wan.weights.parts import load_vae
from examples.sketch import judge, make_dataset


def last_frame(sketch):
    return make_dataset.draw(sketch, 1)[0]


@pytest.fixture(scope="module")
def sketches():
    """One of each kind in each colour, all sizes, places, lines and proportions among them."""
    rng = np.random.default_rng(0)
    options = (make_dataset.SIZES, make_dataset.PLACES, make_dataset.LINES, make_dataset.PROPORTIONS)
    return [
        make_dataset.Sketch(kind, colour, *(str(rng.choice(list(option))) for option in options))
        for kind in make_dataset.KINDS
        for colour in make_dataset.COLOURS
    ]


def filtered(frame, kernel):
    return np.asarray(Image.fromarray(frame).filter(kernel))


def test_every_kind_is_recognised_in_every_colour(sketches):
    answers = judge.recognise(np.stack([last_frame(sketch) for sketch in sketches]))
    right = [answer == sketch.kind for answer, sketch in zip(answers, sketches, strict=True)]
    assert np.mean(right) >= 0.98


def test_what_the_vae_leaves_of_clips_is_recognised():
    vae, right = load_vae("examples/sketch/tiny-wan"), []
    for number, kind in enumerate(make_dataset.KINDS):
        place = list(make_dataset.PLACES)[number % 3]
        clip = make_dataset.draw(make_dataset.Sketch(kind, "blue", "large", place, "thin", "tall"), 17)
        videos = torch.from_numpy(clip).movedim(-1, 0)[None].float() / 127.5 - 1
        decoded = decode_latents(vae, encode_videos(vae, videos))[0, :, -1].movedim(0, -1)
        frame = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte()
        right += [name == kind for name in judge.recognise(frame[None])]
    assert np.mean(right) >= 0.9


def test_white_paper_blots_and_blur_are_not_recognised(sketches):
    frames = [last_frame(sketch) for sketch in sketches]
    white = np.full_like(frames[0], 255)
    noise = np.random.default_rng(0).integers(0, 256, white.shape, dtype=np.uint8)
    blots = [filtered(frame, ImageFilter.MinFilter(15)) for frame in frames]
    blurred = [filtered(frame, ImageFilter.GaussianBlur(7)) for frame in frames]
    for nothing in ([white, 0 * white, noise], blots, blurred):
        answers = judge.recognise(np.stack(nothing))
        assert np.mean([answer is not None for answer in answers]) <= 0.02


def test_means_and_overlays_of_drawings_and_halves_are_not_recognised(sketches):
    frames = np.stack([last_frame(sketch) for sketch in sketches])
    order = np.random.default_rng(0).permutation(len(frames))
    groups = frames[order].reshape(-1, 6, *frames.shape[1:])
    halves = [make_dataset.draw(sketch, 4)[1] for sketch in sketches]
    for nothing in (groups.mean(axis=1).astype(np.uint8), groups.min(axis=1), np.stack(halves)):
        answers = judge.recognise(nothing)
        assert np.mean([answer is not None for answer in answers]) <= 0.02


def test_frames_of_another_size_are_scaled(sketches):
    frames = np.stack([make_dataset.draw(sketch, 1, 128, 224)[0] for sketch in sketches[::3]])
    right = [answer == sketch.kind for answer, sketch in zip(judge.recognise(frames), sketches[::3], strict=True)]
    assert np.mean(right) >= 0.98


def test_no_frames_have_no_answers():
    assert judge.recognise(np.empty((0, 64, 112, 3), np.uint8)) == []


def test_the_weights_are_small_and_in_half_precision():
    assert judge.WEIGHTS.stat().st_size < 300_000
    with safe_open(judge.WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}  # noqa: SIM118
    assert judge.load_judge().classes[:-2] == tuple(make_dataset.KINDS)


@pytest.mark.slow
def test_the_judge_is_built_in_one_command(tmp_path):
    flags = ["--output", tmp_path / "judge.safetensors", "--pictures_per_kind", 2, "--steps", 2]
    flags += ["--test_pictures_per_kind", 1, "--test_sketches_per_kind", 2]
    shown = run_python(ROOT / "examples" / "sketch" / "build_judge.py", *flags).stdout
    assert "| white paper |" in shown
    built = judge.load_judge(tmp_path / "judge.safetensors")
    assert built.classes == judge.load_judge().classes
    assert len(built.recognise(np.full((3, 64, 112, 3), 255, np.uint8))) == 3
