import pytest

from causal_wan.blocks import CausalConfig, frame_block_lengths


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


def test_clips_that_do_not_divide_after_their_first_frame_are_refused():
    message = (
        r"must be 1 \+ a multiple of num_frame_per_block=3, got 21; use 19 or 22 latent frames \(num_frames 73 or 85\)"
    )
    with pytest.raises(ValueError, match=message):
        frame_block_lengths(21, 3, independent_first_frame=True)
