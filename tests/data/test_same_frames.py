"""Whether a video that is to control a clip has the clip's frames, by what is known of the two files."""

from pathlib import Path

import pytest

from causal_wan.data.frames import _aspects_differ, check_same_frames
from causal_wan.video.facts import Traits, VideoFacts
from causal_wan.video.limits import DEFAULT_LIMITS


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


@pytest.mark.parametrize(
    ("size", "other", "differ"),
    [
        ((480, 832), (240, 416), False),
        ((480, 832), (480, 832), False),
        ((480, 832), (832, 480), True),
        ((480, 832), (480, 848), True),  # 2 percent
        ((480, 832), (480, 836), False),  # half a percent
        ((1080, 1920), (34, 60), False),  # rounded to even pixels
        ((1080, 1920), (34, 66), True),
        ((480, 832), (480, 640), True),
    ],
)
def test_aspect_ratios_may_differ_by_rounding_alone(size, other, differ):
    assert _aspects_differ(size, other) == differ
    assert _aspects_differ(other, size) == differ
