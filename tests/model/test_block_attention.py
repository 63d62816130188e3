"""Dense calls against a mask, and what their backward pass writes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from causal_wan.model.block_attention import (
    apply_rotary_emb,
    attend_in_spans,
    block_causal_spans,
    check_context,
    prepend_context,
    teacher_forcing_spans,
)


B, T, N, E = 2, 3, 2, 8
LENGTHS = [1, 2, 2]


def attend(query, key, value):
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def masked(query, key, value, spans):
    mask = torch.zeros(query.shape[1], query.shape[1], dtype=torch.bool)
    for span in spans:
        for start, end in span.key_ranges:
            mask[span.query_start : span.query_end, start:end] = True
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask)
    return out.transpose(1, 2)


def seen_frames(spans):
    """Frames whose keys each frame's queries see, by the order of the tokens; every call takes whole frames."""
    seen = []
    for span in spans:
        ranges = [range(start, end) for start, end in span.key_ranges]
        tokens = [token for tokens in ranges for token in tokens]
        assert len(tokens) % T == span.query_start % T == span.query_end % T == 0
        frames = sorted({token // T for token in tokens})
        assert len(frames) * T == len(tokens)
        seen += [frames] * ((span.query_end - span.query_start) // T)
    assert [span.query_start for span in spans] == [0, *(span.query_end for span in spans[:-1])]
    return seen


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((), [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ((-1,), [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        ((3,), [[0], [0, 1, 2], [0, 1, 2], [2, 3, 4], [2, 3, 4]]),
        ((4,), [[0], [0, 1, 2], [0, 1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]),
    ],
)
def test_a_frame_sees_its_block_and_those_before_it_as_far_as_the_window_goes(window, expected):
    assert seen_frames(block_causal_spans(LENGTHS, T, *window)) == expected


@pytest.mark.parametrize(
    ("window", "clean", "noisy"),
    [  # noisy frames are 3 to 7: those of the clip, after the clean ones of all blocks but the last
        ((), [[0], [0, 1, 2], [0, 1, 2]], [[3], [0, 4, 5], [0, 4, 5], [0, 1, 2, 6, 7], [0, 1, 2, 6, 7]]),
        ((2,), [[0], [1, 2], [1, 2]], [[3], [4, 5], [4, 5], [6, 7], [6, 7]]),
        ((3,), [[0], [0, 1, 2], [0, 1, 2]], [[3], [0, 4, 5], [0, 4, 5], [2, 6, 7], [2, 6, 7]]),
        ((4,), [[0], [0, 1, 2], [0, 1, 2]], [[3], [0, 4, 5], [0, 4, 5], [1, 2, 6, 7], [1, 2, 6, 7]]),
    ],
)
def test_under_teacher_forcing_a_noisy_frame_sees_its_block_and_the_clean_ones_before_it(window, clean, noisy):
    assert seen_frames(teacher_forcing_spans(LENGTHS, T, *window)) == clean + noisy


@pytest.mark.parametrize("make_spans", [block_causal_spans, teacher_forcing_spans])
@pytest.mark.parametrize("window", [-1, 3, 4])
def test_outputs_and_gradients_are_those_of_a_mask(make_spans, window):
    spans = make_spans(LENGTHS, T, window)
    num_tokens = spans[-1].query_end
    states = [torch.randn(B, num_tokens, N, E, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out, expected = attend_in_spans(attend, *states, spans), masked(*states, spans)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, states, upstream), torch.autograd.grad(expected, states, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_finite_differences():
    spans = block_causal_spans([1, 1], 2)
    states = [torch.randn(1, 4, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *states: attend_in_spans(attend, *states, spans), states)


class CountFilled(TorchDispatchMode):
    """Counts tensors as long as the clip that are filled with zeros."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.count = num_tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.new_zeros, torch.ops.aten.slice_backward):
            self.count += out.shape[1] == self.num_tokens
        return out


def test_the_backward_pass_fills_one_buffer_for_keys_and_one_for_values():
    spans = block_causal_spans([1] * 5, T)
    states = [torch.randn(B, 5 * T, N, E, requires_grad=True) for _ in range(3)]
    out = attend_in_spans(attend, *states, spans)
    with CountFilled(5 * T) as filled:
        out.sum().backward()
    assert filled.count == 2


def test_gradients_in_16_bits_add_up_without_losing_the_small_ones():
    spans = block_causal_spans([1] * 9, 1)
    key = torch.zeros(1, 9, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    query = torch.zeros_like(key)
    out = attend_in_spans(lambda query, key, value: key[:, :1], query, key, query, spans)
    # Each call hands the first key a gradient. In 16 bits 256 + 1 is 256.
    out.backward(torch.tensor([256.0] + [1.0] * 8, dtype=torch.bfloat16).reshape(out.shape))
    assert key.grad.flatten().tolist() == [264] + [0] * 8
    assert key.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_channels_are_rotated_as_complex_numbers_are(dtype):
    states = torch.randn(B, 5, N, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.rand(1, 5, 1, E // 2, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = (turn(angles).repeat_interleave(2, dim=-1) for turn in (torch.cos, torch.sin))
    pairs = torch.view_as_complex(states.float().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(dtype)
    rotated = apply_rotary_emb(states, cos, sin)
    torch.testing.assert_close(rotated, expected)
    assert rotated.dtype == dtype


def test_one_span_is_one_plain_call():
    calls, states = [], [torch.randn(B, 2 * T, N, E) for _ in range(3)]

    def note(*parts):
        calls.append(parts)
        return attend(*parts)

    out = attend_in_spans(note, *states, block_causal_spans([2], T))
    assert len(calls) == 1
    assert all(part is whole for part, whole in zip(calls[0], states, strict=True))
    assert torch.equal(out, attend(*states))


@torch.no_grad()
def test_keys_that_lie_together_are_not_copied():
    states, seen = [torch.randn(B, 5 * T, N, E) for _ in range(3)], []

    def note(query, key, value):
        seen.append((key.data_ptr(), value.data_ptr()))
        return query

    attend_in_spans(note, *states, block_causal_spans([2, 3], T))
    assert seen == [(states[1].data_ptr(), states[2].data_ptr())] * 2


# --- clean frames before the noisy ones ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_context", [2, 3])
@pytest.mark.parametrize("is_by_frame", [False, True])
def test_the_context_comes_before_the_noisy_frames_each_at_its_own_timestep(num_context, is_by_frame):
    noisy, context = torch.randn(B, 4, 3, 2, 2), torch.randn(B, 4, num_context, 2, 2)
    of_noisy, of_context = torch.tensor([[700, 500, 300], [20, 30, 40]]), torch.tensor([[1, 2, 3], [4, 5, 6]])
    if not is_by_frame:
        of_noisy, of_context = of_noisy[:, 0], of_context[:, 0]
    latents, timesteps = prepend_context(noisy, of_noisy, context, of_context)
    assert torch.equal(latents[:, :, :num_context], context)
    assert torch.equal(latents[:, :, num_context:], noisy)
    for clip in range(B):
        for frame in range(num_context + 3):
            level, number = (of_context, frame) if frame < num_context else (of_noisy, frame - num_context)
            assert timesteps[clip, frame] == (level[clip, number] if is_by_frame else level[clip])
    _, timesteps = prepend_context(noisy, of_noisy, context, None)
    assert timesteps.shape == (B, num_context + 3)
    assert not timesteps[:, :num_context].any()


@pytest.mark.parametrize("shape", [(B,), (B, 3)])
def test_a_context_like_the_noisy_latents_is_taken_with_a_timestep_a_clip_or_a_frame(shape):
    latents = torch.zeros(B, 4, 3, 2, 2)
    check_context(latents, torch.zeros(shape), latents, None, None)
    check_context(latents, torch.zeros(shape), latents, torch.zeros(shape), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": object()}, "^context_latents are for training; with a cache the context is in it"),
        (
            {"context_latents": torch.zeros(B, 4, 2, 2, 2)},
            r"^context_latents must have the shape of the noisy latents, \(2, 4, 3, 2, 2\), got \(2, 4, 2, 2, 2\)\.$",
        ),
        (
            {"timestep": torch.zeros(B, 2)},
            r"^with context_latents, timestep must have shape .* F=3 .* got \(2, 2\)\.$",
        ),
        ({"context_timestep": torch.zeros(3)}, r"^with context_latents, context_timestep must have .* got \(3,\)\.$"),
        ({"context_timestep": torch.zeros(B, 4)}, r"context_timestep must have shape \(B,\) .* got \(2, 4\)\.$"),
    ],
)
def test_a_context_that_does_not_fit_is_refused(changes, message):
    latents = torch.zeros(B, 4, 3, 2, 2)
    given = {"timestep": torch.zeros(B), "context_latents": latents, "context_timestep": None, "cache": None}
    with pytest.raises(ValueError, match=message):
        check_context(latents, **{**given, **changes})
