"""Dense calls against a mask, and what their backward pass writes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from causal_wan.model.block_attention import (
    apply_rotary_emb,
    attend_in_spans,
    block_causal_spans,
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
