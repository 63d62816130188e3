import itertools

import pytest

from causal_wan.blocks import CausalConfig, frame_block_lengths, middle_frames
from causal_wan.geometry import LatentGeometry
from causal_wan.methods.settings import RegressionConfig


def test_a_causal_config_divides_clips_by_all_of_its_settings():
    assert CausalConfig(num_frame_per_block=3).block_lengths(9) == [3, 3, 3]
    assert CausalConfig(num_frame_per_block=3, independent_first_frame=True).block_lengths(7) == [1, 3, 3]
    assert CausalConfig(num_frame_per_block=None).block_lengths(7) == [7]


def test_a_causal_config_goes_by_the_names_of_the_transformers():
    config = CausalConfig(num_frame_per_block=3, local_attn_size=9, sink_size=1, independent_first_frame=True)
    assert config.as_dict() == {
        "num_frame_per_block": 3,
        "local_attn_size": 9,
        "sink_size": 1,
        "independent_first_frame": True,
    }
    defaults = {"local_attn_size": -1, "sink_size": 0, "independent_first_frame": False}
    assert CausalConfig(num_frame_per_block=2).as_dict() == {"num_frame_per_block": 2, **defaults}


@pytest.mark.parametrize(
    ("num_latent_frames", "num_frame_per_block", "expected"),
    [
        (1, 3, [1]),
        (2, 3, [1, 1]),
        (4, 3, [1, 3]),
        (5, 4, [1, 4]),
        (9, 4, [1, 4, 4]),
        (7, None, [7]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_an_independent_first_frame_is_a_block_before_the_others(num_latent_frames, num_frame_per_block, expected):
    lengths = frame_block_lengths(num_latent_frames, num_frame_per_block, independent_first_frame=True)
    assert lengths == expected


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (
            (5, 3),
            r"^the number of latent frames must be a multiple of num_frame_per_block=3, got 5; use 3 or 6 latent ",
        ),
        ((5, 3), r"use 3 or 6 latent frames \(num_frames 9 or 21\), or another num_frame_per_block\.$"),
        ((5, 0), r"num_frame_per_block=0, got 5; "),
        ((5, -3), r"num_frame_per_block=-3, got 5; "),
    ],
)
def test_clips_that_do_not_divide_are_refused(frames, message):
    with pytest.raises(ValueError, match=message):
        frame_block_lengths(*frames)


def test_clips_with_one_frame_too_many_may_have_it_alone():
    with pytest.raises(ValueError, match=r"got 31; .*, or another num_frame_per_block, or independent_first_frame"):
        frame_block_lengths(31, 3)
    assert frame_block_lengths(31, 3, independent_first_frame=True) == [1] + [3] * 10


def test_clips_that_do_not_divide_after_their_first_frame_are_refused():
    message = (
        r"must be 1 \+ a multiple of num_frame_per_block=3, got 21; use 19 or 22 latent frames \(num_frames 73 or 85\)"
    )
    with pytest.raises(ValueError, match=message):
        frame_block_lengths(21, 3, independent_first_frame=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frame_per_block": 0}, "num_frame_per_block must be 1 or more, or None, got 0"),
        ({"num_frame_per_block": 3, "sink_size": -1}, "sink_size must be 0 or more latent frames, got -1"),
        (
            {"num_frame_per_block": 3, "local_attn_size": 2},
            "must hold one block and the sink, 3 ",
        ),
        ({"num_frame_per_block": 3, "sink_size": 2, "local_attn_size": 4}, "must hold one block and the sink, 5 "),
        ({"num_frame_per_block": None, "sink_size": 2, "local_attn_size": 2}, "must hold one block and the sink, 3 "),
    ],
)
def test_causal_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CausalConfig(**settings)


def test_a_window_may_be_as_small_as_a_block_and_the_sink():
    assert CausalConfig(num_frame_per_block=3, sink_size=2, local_attn_size=5).local_attn_size == 5


def test_the_config_of_a_stock_transformer_is_bidirectional():
    assert CausalConfig.of({"num_layers": 2}) == CausalConfig(num_frame_per_block=None)
    causal = CausalConfig(num_frame_per_block=4, local_attn_size=6, sink_size=1, independent_first_frame=True)
    assert CausalConfig.of({"num_layers": 2, **causal.as_dict()}) == causal
    assert causal.block_lengths(9) == [1, 4, 4]


def test_a_window_that_is_too_small_is_refused_with_the_settings_of_a_run():
    """Not when the weights are there."""
    with pytest.raises(ValueError, match="local_attn_size must hold one block and the sink, 4 latent frames"):
        RegressionConfig(num_frame_per_block=3, sink_size=1, local_attn_size=3)
    bidirectional = RegressionConfig(generator_task="bidirectional_video", sink_size=1, local_attn_size=3)
    assert bidirectional.causal == CausalConfig(num_frame_per_block=None, sink_size=1, local_attn_size=3)


@pytest.mark.parametrize(
    ("num_given", "num_frame_per_block", "num_latent_frames", "message"),
    [
        (3, 2, 6, r"which has 6 latent frames, got 3 latent frames \(9 frames\); give 5 or 13 frames\.$"),
        (5, 2, 6, r"got 5 latent frames \(17 frames\); give 13 frames\.$"),
        (4, 2, 4, r"got 4 latent frames \(13 frames\); give 5 frames\.$"),
        (3, 3, 3, r"got 3 latent frames \(9 frames\); ask for more frames\.$"),
        (3, 2, None, r"which has no end, got 3 latent frames \(9 frames\); give 5 or 13 frames\.$"),
    ],
)
def test_first_frames_that_cannot_be_continued_name_the_nearest_that_can(
    num_given, num_frame_per_block, num_latent_frames, message
):
    with pytest.raises(ValueError, match=message):
        windowed(num_frame_per_block).check_continues(num_given, num_latent_frames)


def windowed(num_frame_per_block):
    return CausalConfig(num_frame_per_block=num_frame_per_block, local_attn_size=6)


def test_whole_blocks_and_a_picture_can_be_continued():
    for num_given in (1, 2, 4):
        windowed(2).check_continues(num_given, 6)
        windowed(2).check_continues(num_given, None)
    for num_given in range(1, 6):
        windowed(1).check_continues(num_given, 6)
    windowed(None).check_continues(1, 6)
    with pytest.raises(ValueError, match=r"got 2 latent frames \(5 frames\); give 9 frames\.$"):
        windowed(3).check_continues(2, 6)


def test_frames_to_be_continued_are_told_in_the_geometry_of_the_checkpoint():
    with pytest.raises(ValueError, match=r"got 3 latent frames \(17 frames\); give 9 or 25 frames\.$"):
        windowed(2).check_continues(3, 6, LatentGeometry(temporal_factor=8))


@pytest.mark.parametrize(
    ("num_frame_per_block", "independent_first_frame", "expected"),
    [(2, False, [2, 2, 2, 2]), (2, True, [1, 2, 2, 2]), (1, True, [1, 1, 1, 1])],
)
def test_a_clip_without_end_goes_on_in_blocks(num_frame_per_block, independent_first_frame, expected):
    config = CausalConfig(
        num_frame_per_block=num_frame_per_block, local_attn_size=6, independent_first_frame=independent_first_frame
    )
    assert list(itertools.islice(config.iterate_block_lengths(None), 4)) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_frame_per_block": None, "local_attn_size": 6}, "num_frame_per_block=None and local_attn_size=6"),
        ({"num_frame_per_block": 2}, "num_frame_per_block=2 and local_attn_size=-1"),
    ],
)
def test_a_clip_without_end_has_blocks_and_a_window(settings, named):
    with pytest.raises(ValueError, match=f"must be sampled in blocks with a window, got {named}; set both"):
        CausalConfig(**settings).iterate_block_lengths(None)
    assert sum(CausalConfig(**settings).iterate_block_lengths(6)) == 6


def test_the_middle_of_a_block_is_counted_in_video_frames_and_of_two_the_later():
    assert middle_frames([1, 2, 2]) == [0, 5, 13]  # of frames 0, 1 to 8 and 9 to 16
    assert middle_frames([3, 3]) == [4, 15]  # of frames 0 to 8 and 9 to 20
    assert middle_frames([2, 1], LatentGeometry(temporal_factor=8)) == [4, 13]  # of frames 0 to 8 and 9 to 16
    assert middle_frames([]) == []
