import pytest

from causal_wan.blocks import CausalConfig
from causal_wan.methods.settings import RegressionConfig


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
