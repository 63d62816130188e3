"""Whether a video that is to control a clip has the clip's frames, by what is known of the two files."""

from pathlib import Path

import numpy as np
import pytest

from causal_wan.data.frames import _aspects_differ, check_same_frames
from causal_wan.video.facts import Traits, VideoFacts
from causal_wan.video.limits import DEFAULT_LIMITS, VideoLimits


CLIP = VideoFacts(81, 16.0, 480, 832)


def check(**changes):
    """The facts of a control like the clip, but for changes; no file is there to be opened."""
    video = (Path("no-control.mp4"), CLIP._replace(**changes))
    return check_same_frames(video, (Path("no-clip.mp4"), CLIP), DEFAULT_LIMITS)


def test_a_control_has_the_rate_of_its_clip_to_the_last_digit_and_its_own_size():
    found = check(frame_rate=16.1, height=240, width=416)
    assert found == CLIP._replace(height=240, width=416)
    assert check(traits=Traits.MIRRORED).traits == Traits.MIRRORED


def test_where_files_are_gone_a_varying_rate_is_the_clips_affair():
    assert not check(traits=Traits.VARIABLE_RATE).traits
    varying = CLIP._replace(traits=Traits.VARIABLE_RATE)
    found = check_same_frames((Path("a.mp4"), CLIP), (Path("b.mp4"), varying), DEFAULT_LIMITS)
    assert found.traits == Traits.VARIABLE_RATE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 80}, "must have the 81 frames of its clip, got 80"),
        ({"frame_rate": 16.2}, r"must have the frame rate of its clip, 16 a second, got 16\.2"),
        ({"frame_rate": 15.8}, r"got 15\.8"),
    ],
)
def test_other_frames_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


def test_the_rate_of_pictures_says_nothing():
    one, other = CLIP._replace(num_frames=1), CLIP._replace(num_frames=1, frame_rate=25.0)
    assert check_same_frames((Path("a.png"), other), (Path("b.png"), one), DEFAULT_LIMITS).frame_rate == 16
    two, faster = CLIP._replace(num_frames=2), CLIP._replace(num_frames=2, frame_rate=25.0)
    with pytest.raises(ValueError, match=r"got 25; make it of the clip"):
        check_same_frames((Path("a.mp4"), faster), (Path("b.mp4"), two), DEFAULT_LIMITS)


@pytest.mark.parametrize(
    ("size", "other", "differ"),
    [
        ((480, 832), (240, 416), False),
        ((480, 832), (480, 832), False),
        ((480, 832), (832, 480), True),
        ((480, 832), (480, 848), True),  # 2 percent
        ((480, 832), (480, 836), False),  # half a percent
        ((1080, 1920), (34, 60), False),  # rounded to even pixels
        ((1080, 1920), (34, 62), False),
        ((1080, 1920), (34, 66), True),
        ((480, 832), (480, 640), True),
    ],
)
def test_aspect_ratios_may_differ_by_rounding_alone(size, other, differ):
    assert _aspects_differ(size, other) == differ
    assert _aspects_differ(other, size) == differ


# --- what the files themselves tell ----------------------------------------------------------------------------------


LIMITS = VideoLimits(max_video_frames=1000)
TIMES = [0.0, 0.1, 0.2, 1.0]  # at a mean rate of 3 a second
VARYING = VideoFacts(4, 3.0, 480, 832, Traits.VARIABLE_RATE)


@pytest.fixture
def check_files(tmp_path, monkeypatch):
    """Checks a control and a clip that are there, of which the reading of files tells what is given here."""

    def check(video, clip, *, times=(TIMES, TIMES), shown=((480, 832), (480, 832))):
        paths = [tmp_path / "control.mp4", tmp_path / "clip.mp4"]
        for path in paths:
            path.touch()
        reads = []

        def read_times(file, *, limits):
            assert limits is LIMITS
            reads.append("times")
            return np.array(times[paths.index(file)])

        def probe(file, *, limits, as_shown):
            assert limits is LIMITS
            assert as_shown
            reads.append("size")
            height, width = shown[paths.index(file)]
            return VideoFacts(4, 3.0, height, width)

        monkeypatch.setattr("causal_wan.data.frames.read_frame_times", read_times)
        monkeypatch.setattr("causal_wan.data.frames.probe_video", probe)
        return check_same_frames((paths[0], video), (paths[1], clip), LIMITS), reads

    return check


def test_files_that_are_alike_as_far_as_is_known_are_not_read(check_files):
    even = VARYING._replace(traits=Traits.MIRRORED)
    assert check_files(even, even) == (even, [])


@pytest.mark.parametrize("later", [[0.0, 0.1, 0.2, 1.0], [0.0, 0.26, 0.36, 1.16], [0.0, 0.1, 0.04, 0.84]])
def test_frames_may_be_shown_half_an_interval_earlier_or_later_than_those_of_the_clip(check_files, later):
    even = VARYING._replace(traits=Traits.MIRRORED)
    assert check_files(VARYING, VARYING, times=(later, TIMES)) == (VARYING, ["times"] * 2)
    for video, clip in ((VARYING, even), (even, VARYING)):
        found, reads = check_files(video, clip, times=(later, TIMES))
        assert reads == ["times"] * 2
        assert found.traits & Traits.VARIABLE_RATE == clip.traits & Traits.VARIABLE_RATE


@pytest.mark.parametrize(
    "other", [[0.0, 0.1, 0.2, 1.18], [0.0, 0.1, 0.02, 1.0], [0.0, 0.1, 0.2], [0.0, 0.1, 0.2, 1, 1]]
)
def test_frames_that_are_shown_at_other_times_are_refused_where_a_rate_varies(check_files, other):
    message = "^it must show its frames when its clip does, but the frame rate of one of the two varies; convert the "
    for times in ((other, TIMES), (TIMES, other)):
        with pytest.raises(ValueError, match=message):
            check_files(VARYING, VARYING, times=times)


def test_sizes_that_differ_as_stored_are_those_of_the_pictures_as_shown(check_files):
    stored = CLIP._replace(height=832, width=480)
    found, reads = check_files(stored, CLIP, shown=((240, 416), (480, 832)))
    assert reads == ["size"] * 2
    assert found == stored
    message = (
        r"^it must have the aspect ratio of its clip, as both are cut to shape alike, but is 240 x 300, and the clip "
        r"480 x 830; make it of the clip, frame by frame$"
    )
    with pytest.raises(ValueError, match=message):
        check_files(stored, CLIP, shown=((240, 300), (480, 830)))
