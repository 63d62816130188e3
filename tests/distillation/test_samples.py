"""What is measured of a validation's samples, on videos of which it is known."""

import numpy as np
import pytest

from causal_wan.distillation.samples import SampleMeasures


def plain(value, num_frames=9):
    return np.full((num_frames, 32, 56, 3), value, dtype=np.uint8)


def measure(*videos):
    measures = SampleMeasures()
    for number, video in enumerate(videos):
        measures.note(number, video)
    found = measures.summarize()
    assert measures.summarize() == {}
    return found


def test_white_paper_is_neither_sharp_nor_moving_nor_diverse():
    assert measure(plain(255), plain(255)) == {"sample_sharpness": 0, "sample_motion": 0, "sample_diversity": 0}


def test_diversity_is_the_distance_of_pairs():
    assert measure(plain(0), plain(255))["sample_diversity"] == pytest.approx(1)
    assert measure(plain(0), plain(255), plain(255))["sample_diversity"] == pytest.approx(2 / 3)
    assert measure(plain(0), plain(51))["sample_diversity"] == pytest.approx(0.2)
    assert "sample_diversity" not in measure(plain(0))


def test_motion_is_the_change_from_frame_to_frame():
    video = plain(0)
    video[1::2] = 255
    assert measure(video)["sample_motion"] == pytest.approx(1)
    assert measure(video[:1])["sample_motion"] == 0


def test_sharpness_falls_with_blur():
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 56, 3), dtype=np.uint8)
    blurred = noise.reshape(3, 16, 2, 28, 2, 3).mean(axis=(2, 4)).repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)
    assert measure(blurred)["sample_sharpness"] < 0.5 * measure(noise)["sample_sharpness"]
