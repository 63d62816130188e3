import imageio.v3 as iio
import numpy as np
import pytest

from causal_wan.video.writing import VideoWriter


def frames(count, start=0):
    """Grey frames that become brighter, two levels a frame."""
    return np.stack([np.full((32, 48, 3), 20 + 2 * (start + number), dtype=np.uint8) for number in range(count)])


def brightness(path):
    return iio.imread(path, plugin="pyav").mean(axis=(1, 2, 3))


@pytest.mark.parametrize("fragmented", [False, True])
def test_frames_that_come_in_parts_make_one_video(tmp_path, fragmented):
    path = tmp_path / "new" / "video.mp4"
    with VideoWriter(path, 12.5, fragmented=fragmented) as writer:
        for start, count in ((0, 5), (5, 8), (13, 8)):
            writer.write(frames(count, start))
    assert np.abs(brightness(path) - frames(21).mean(axis=(1, 2, 3))).max() < 2
    assert iio.immeta(path, plugin="pyav")["fps"] == 12.5


def test_a_fragmented_video_plays_while_it_is_written(tmp_path):
    writer = VideoWriter(tmp_path / "video.mp4", fragmented=True)
    counts = []
    for start in (0, 5, 10):
        writer.write(frames(5, start))
        counts.append(len(brightness(tmp_path / "video.mp4")))
    assert counts == [4, 9, 14]  # the last frame waits to know how long it is shown
    writer.__exit__(None, None, None)
    assert len(brightness(tmp_path / "video.mp4")) == 15
