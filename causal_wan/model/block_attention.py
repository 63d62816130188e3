"""Block-causal attention as dense calls: which tokens each call sees, and the gradients of what they share.

Shapes: B = batch, L = tokens, N = heads, E = head dim, D = N E, C = latent channels, F = latent frames, H, W = latent
height and width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenSpan:
    """One dense attention call: queries [query_start, query_end) see keys [key_start, query_end).

    And before them the keys of [context_start, context_end), which lie elsewhere, if there are any.
    """

    query_start: int
    query_end: int
    key_start: int
    context_start: int = 0
    context_end: int = 0

    @property
    def key_ranges(self) -> tuple[tuple[int, int], ...]:
        """Tokens whose keys and values it sees."""
        own = (self.key_start, self.query_end)
        return (own,) if self.context_start == self.context_end else ((self.context_start, self.context_end), own)


def block_causal_spans(block_lengths: list[int], frame_tokens: int, local_attn_size: int = -1) -> list[TokenSpan]:
    """The dense attention calls that make up block-causal attention.

    Args:
        block_lengths: Latent frames of each block.
        frame_tokens: T, tokens of one latent frame.
        local_attn_size: Latent frames that a query sees, counted back from the end of its block; -1 is all.

    Returns:
        One span a block, in token units.

    Source: CausVid, arXiv 2412.07772, eq. 5; the window as in Self Forcing, arXiv 2506.08009.
    """
    spans, start = [], 0
    for length in block_lengths:
        end = start + length
        key_start = 0 if local_attn_size == -1 else max(0, end - local_attn_size)
        spans.append(TokenSpan(start * frame_tokens, end * frame_tokens, key_start * frame_tokens))
        start = end
    return spans


def teacher_forcing_spans(block_lengths: list[int], frame_tokens: int, local_attn_size: int = -1) -> list[TokenSpan]:
    """The dense attention calls of teacher forcing, for the tokens [clean | noisy].

    Clean blocks see clean blocks, block-causally; the last one is left out, since nobody sees it. A noisy block sees
    the clean blocks before it and itself, never its own clean block: what it sees in a rollout. Two calls a block.

    Args:
        block_lengths: Latent frames of each block of the clip.
        frame_tokens: T, tokens of one latent frame.
        local_attn_size: Latent frames that a query sees, counted back from the end of its block; -1 is all.

    Returns:
        Spans in token units, in the order of the tokens.

    Source: Self Forcing, arXiv 2506.08009, figure 2 (teacher forcing).
    """
    clean = block_causal_spans(block_lengths[:-1], frame_tokens, local_attn_size)
    num_clean = sum(block_lengths[:-1]) * frame_tokens
    noisy = [
        TokenSpan(
            query_start=num_clean + span.query_start,
            query_end=num_clean + span.query_end,
            key_start=num_clean + span.query_start,
            context_start=span.key_start,
            context_end=span.query_start,
        )
        for span in block_causal_spans(block_lengths, frame_tokens, local_attn_size)
    ]
    return [*clean, *noisy]


class _SharedKeys(torch.autograd.Function):
    """Keys (or values) of each call. Their gradients add up in one buffer.

    Plain slices would give each call's gradient a buffer of all tokens, filled with zeros, and add those up.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, states: torch.Tensor, ranges: tuple[tuple[tuple[int, int], ...], ...]
    ) -> tuple[torch.Tensor, ...]:
        ctx.ranges, ctx.num_tokens = ranges, states.shape[1]
        pieces = ([states[:, start:end] for start, end in of_call] for of_call in ranges)
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in pieces)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        batch_size, _, *heads = gradients[0].shape
        precise = torch.promote_types(gradients[0].dtype, torch.float32)  # summed in 16 bits, each call would round
        total = gradients[0].new_zeros(batch_size, ctx.num_tokens, *heads, dtype=precise)
        for of_call, gradient in zip(ctx.ranges, gradients, strict=True):
            parts = gradient.split([end - start for start, end in of_call], dim=1)
            for (start, end), part in zip(of_call, parts, strict=True):
                total[:, start:end] += part
        return total.to(gradients[0].dtype), None


def attend_in_spans(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[TokenSpan],
) -> torch.Tensor:
    """One dense call a span.

    Args:
        attend: (query, key, value) -> output, each `(B, l, N, E)`: attention without a mask.
        query: `(B, L, N, E)`.
        key: Same shape.
        value: Same shape.
        spans: Their queries are all tokens, in order.

    Returns:
        `(B, L, N, E)`.
    """
    if len(spans) == 1:
        return attend(query, key, value)
    ranges = tuple(span.key_ranges for span in spans)
    queries = query.split([span.query_end - span.query_start for span in spans], dim=1)
    calls = zip(queries, _SharedKeys.apply(key, ranges), _SharedKeys.apply(value, ranges), strict=True)
    return torch.cat([attend(*call) for call in calls], dim=1)


def apply_rotary_emb(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channel pairs of `(B, L, N, E)` by the angles in cos, sin `(1, L, 1, E)`, in float32.

    Source: RoFormer, arXiv 2104.09864, eq. 34; the layout is the one of diffusers' `WanRotaryPosEmbed`.
    """
    x1, x2 = hidden_states.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1).flatten(-2).type_as(hidden_states)


# --- clean frames before the noisy ones ------------------------------------------------------------------------------


def prepend_context(
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    context_latents: torch.Tensor,
    context_timestep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[context | noisy] latents `(B, C, F' + F, H, W)` and timesteps `(B, F' + F)`, of a context of F' frames."""
    num_context, num_frames = context_latents.shape[2], hidden_states.shape[2]
    if context_timestep is None:
        context_timestep = timestep.new_zeros(len(timestep))
    by_frame = [
        level[:, None].expand(-1, length) if level.ndim == 1 else level[:, :length]
        for level, length in ((context_timestep, num_context), (timestep, num_frames))
    ]
    return torch.cat([context_latents, hidden_states], dim=2), torch.cat(by_frame, dim=1)


def check_context(
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    context_latents: torch.Tensor,
    context_timestep: torch.Tensor | None,
    cache: Any,
) -> None:
    """Checks what a pass under teacher forcing is given; arguments as in the transformer's forward.

    Raises:
        ValueError: If it does not fit.
    """
    if cache is not None:
        raise ValueError("context_latents are for training; with a cache the context is in it, so leave them out.")
    if context_latents.shape != hidden_states.shape:
        raise ValueError(
            f"context_latents must have the shape of the noisy latents, {tuple(hidden_states.shape)}, got "
            f"{tuple(context_latents.shape)}."
        )
    batch_size, num_frames = hidden_states.shape[0], hidden_states.shape[2]
    for name, given in (("timestep", timestep), ("context_timestep", context_timestep)):
        if given is not None and given.shape not in ((batch_size,), (batch_size, num_frames)):
            raise ValueError(
                f"with context_latents, {name} must have shape (B,) or (B, F) with F={num_frames} latent frames, got "
                f"{tuple(given.shape)}."
            )
