"""The count of operations, against torch's own counter, and against figures worked out elsewhere."""

import pytest
import torch
from flops import count_forward_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causal_wan.model.transformer import CausalWanTransformer3DModel


SMALL = {
    **{"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4},
    **{"text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2},
}
WAN_1_3B = {
    **{"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16},
    **{"text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30},
}


@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("has_clean_context", [False, True])
def test_the_count_is_that_of_torch(window, has_clean_context):
    shape = (4, 6, 4, 6)
    student = CausalWanTransformer3DModel(**SMALL, num_frame_per_block=2, local_attn_size=window)
    latents = torch.randn(1, *shape)
    context = {"context_latents": latents} if has_clean_context else {}
    # The counter knows products of matrices, and not the fused attention of a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        student(latents, torch.rand(1, 6), torch.randn(1, 7, 16), **context)
    flops = count_forward_flops(
        SMALL,
        shape,
        [2, 2, 2],
        num_text_tokens=7,
        local_attn_size=window,
        has_clean_context=has_clean_context,
    )
    assert flops.total == counter.get_total_flops()


def test_wan_1_3b_does_what_was_worked_out_on_paper():
    # 32,760 tokens: 6 D^2 + 2 D ffn weights a token and layer; 4 L^2 D a layer of attention, 28/49 of it in 7 blocks.
    shape = (16, 21, 60, 104)
    both_ways, causal = (count_forward_flops(WAN_1_3B, shape, lengths) for lengths in ([21], [3] * 7))
    assert both_ways.self_attention == 30 * 4 * 32_760**2 * 1536
    assert causal.self_attention * 49 == both_ways.self_attention * 28
    assert both_ways.total == pytest.approx(283e12, rel=0.01)
    assert causal.total == pytest.approx(198e12, rel=0.01)
    assert causal.step() == pytest.approx(0.59e15, rel=0.01)
    assert causal.step(recomputes=True) == pytest.approx(0.79e15, rel=0.01)
