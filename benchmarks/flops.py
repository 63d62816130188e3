"""Floating-point operations of a pass, counted from the architecture: what the hardware has to do at the least.

A product of matrices (m, k) and (k, n) is 2 m k n operations. Attention counts the pairs that are seen, so of
block-causal attention no others. Norms, rotations and activations are left out, as is the custom.

Shapes: F = latent frames, H, W = latent height and width, L = tokens, D = width of the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causal_wan.geometry import WAN
from causal_wan.model.block_attention import block_causal_spans, teacher_forcing_spans


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """Operations of a forward pass of one clip.

    Attributes:
        linear: Products with weights.
        self_attention: Queries with keys, and weights with values, of all layers.
        cross_attention: The same with the prompt's.
    """

    linear: int
    self_attention: int
    cross_attention: int

    @property
    def total(self) -> int:
        """Of the pass."""
        return self.linear + self.self_attention + self.cross_attention

    def step(self, *, recomputes: bool = False) -> int:
        """Of forward and backward: a backward pass is two forward ones, and a recomputed layer runs forward again.

        MFU is told with the first, whatever is recomputed; the time that the hardware needs follows from the second.
        """
        return (4 if recomputes else 3) * self.total


def count_forward_flops(
    architecture: Mapping[str, Any],
    latent_shape: Sequence[int],
    block_lengths: Sequence[int],
    *,
    num_text_tokens: int = 512,
    local_attn_size: int = -1,
    has_clean_context: bool = False,
) -> ForwardFlops:
    """Operations of a forward pass of `CausalWanTransformer3DModel` on one clip.

    Args:
        architecture: Its config: num_attention_heads, attention_head_dim, num_layers, ffn_dim, text_dim, freq_dim,
            in_channels, out_channels.
        latent_shape: (C, F, H, W).
        block_lengths: Latent frames of each block; (F,) is both ways in time.
        num_text_tokens: S.
        local_attn_size: As in the transformer.
        has_clean_context: Teacher forcing.
    """
    _, num_frames, height, width = latent_shape
    frame_tokens = WAN.frame_tokens(height, width)
    heads, head_dim = architecture["num_attention_heads"], architecture["attention_head_dim"]
    dim, ffn_dim, num_layers = heads * head_dim, architecture["ffn_dim"], architecture["num_layers"]
    make_spans = teacher_forcing_spans if has_clean_context else block_causal_spans
    spans = make_spans(list(block_lengths), frame_tokens, local_attn_size)
    num_noisy, num_tokens = num_frames * frame_tokens, spans[-1].query_end
    num_frames_in_all = num_tokens // frame_tokens
    pairs = sum(
        (span.query_end - span.query_start) * sum(end - start for start, end in span.key_ranges) for span in spans
    )
    # Self-attention's q, k, v, out; cross-attention's q and out; the feed-forward's two. Text: k and v.
    layer = 2 * num_tokens * (4 * dim * dim + 2 * dim * dim + 2 * dim * ffn_dim) + 2 * num_text_tokens * 2 * dim * dim
    patch = 4 * dim * (num_tokens * architecture["in_channels"] + num_noisy * architecture["out_channels"])
    text = num_text_tokens * (architecture["text_dim"] * dim + dim * dim)
    time = num_frames_in_all * (architecture["freq_dim"] * dim + dim * dim + 6 * dim * dim)
    return ForwardFlops(
        linear=num_layers * layer + 2 * (patch + text + time),
        self_attention=num_layers * 4 * pairs * dim,
        cross_attention=num_layers * 4 * num_tokens * num_text_tokens * dim,
    )
