"""What causal attention means, held to the stock model with a dense mask: Self Forcing's terms, frame by frame.

The window is `local_attn_size` latent frames counted back from the end of the query's block. In a rollout the cache
holds that many frames in all, the first `sink_size` of them the clip's first, the others the most recent, the current
block included; positions are those of the whole clip. There is no sink in training.
"""

import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from causal_wan.blocks import frame_block_lengths
from causal_wan.model.transformer import CausalWanTransformer3DModel


B, F, H, W = 2, 10, 4, 6
TOKENS = (H // 2) * (W // 2)


class MaskedProcessor(WanAttnProcessor):
    """The stock self-attention under a mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def frame_mask(lengths, window, sink):
    """Which frames (columns) each frame (row) sees."""
    ends = torch.tensor([sum(lengths[: i + 1]) for i, length in enumerate(lengths) for _ in range(length)])
    frames = torch.arange(F)
    mask = frames < ends[:, None]
    if window != -1:
        is_sink = (frames < sink) & (ends[:, None] > window)
        mask &= (frames >= ends[:, None] - (window - sink)) | is_sink | (ends[:, None] <= window)
    return mask


@torch.no_grad()
def stock_output(inputs, lengths, window, sink):
    """The stock model's velocity of the whole clip under the mask, and its weights."""
    torch.manual_seed(0)
    stock = WanTransformer3DModel(**TINY_TRANSFORMER).eval()
    mask = frame_mask(lengths, window, sink)
    for layer in stock.blocks:
        layer.attn1.set_processor(MaskedProcessor(mask.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)))
    timesteps = inputs["timestep"].repeat_interleave(TOKENS, dim=1)
    return stock(**{**inputs, "timestep": timesteps}).sample, stock.state_dict()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(B, 4, F, H, W, generator=generator),
        "timestep": 1000 * torch.rand(B, F, generator=generator),
        "encoder_hidden_states": torch.randn(B, 7, 16, generator=generator),
    }


@pytest.mark.parametrize(
    ("per_block", "window", "first"),
    [(1, -1, False), (2, -1, False), (5, -1, False), (3, -1, True), (2, 4, False), (2, 5, False), (3, 4, True)],
)
@torch.no_grad()
def test_training_forward_is_the_stock_model_under_the_mask(inputs, per_block, window, first):
    lengths = frame_block_lengths(F, per_block, independent_first_frame=first)
    expected, weights = stock_output(inputs, lengths, window, sink=0)
    causal = {"num_frame_per_block": per_block, "local_attn_size": window, "independent_first_frame": first}
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal, sink_size=1 if window > per_block else 0)
    model.load_state_dict(weights)
    torch.testing.assert_close(model(**inputs).sample, expected)


@pytest.mark.parametrize(
    ("per_block", "window", "sink", "first"),
    [
        *((1, -1, 0, False), (2, -1, 0, False), (3, -1, 0, True)),
        *((1, 4, 1, False), (2, 4, 0, False), (2, 4, 1, False), (2, 5, 2, False), (2, 7, 3, False)),
        *((3, 4, 1, True), (3, 5, 1, True), (3, 6, 2, True)),
    ],
)
@torch.no_grad()
def test_rollout_is_the_stock_model_under_the_mask_of_window_and_sink(inputs, per_block, window, sink, first):
    lengths = frame_block_lengths(F, per_block, independent_first_frame=first)
    expected, weights = stock_output(inputs, lengths, window, sink)
    causal = {"num_frame_per_block": per_block, "local_attn_size": window, "independent_first_frame": first}
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal, sink_size=sink).eval()
    model.load_state_dict(weights)
    cache, start, outputs = model.make_cache(B, F, H, W), 0, []
    for length in lengths:
        piece = {name: inputs[name][..., start : start + length] for name in ("timestep",)}
        piece["hidden_states"] = inputs["hidden_states"][:, :, start : start + length]
        text = inputs["encoder_hidden_states"]
        for states in (torch.randn_like(piece["hidden_states"]), piece["hidden_states"]):  # the last pass counts
            output = model(states, piece["timestep"], text, cache=cache, start_frame=start).sample
        outputs.append(output)
        start += length
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected)


# --- teacher forcing -------------------------------------------------------------------------------------------------

TEACHER_FORCED = [(1, -1, False), (2, -1, False), (5, -1, False), (3, -1, True), (2, 4, False), (2, 5, False)]


def teacher_forcing_mask(lengths, window):
    """Which frames of [clean | noisy] (columns) each of them (row) sees."""
    blocks = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    seen = frame_mask(lengths, window, sink=0)
    own = blocks[:, None] == blocks
    return torch.cat([torch.cat([seen, torch.zeros_like(seen)], 1), torch.cat([seen & ~own, own], 1)])


@pytest.fixture
def context(inputs):
    generator = torch.Generator().manual_seed(2)
    return {
        "context_latents": torch.randn(inputs["hidden_states"].shape, generator=generator),
        "context_timestep": 100 * torch.rand(B, generator=generator),
    }


def make_causal(weights, per_block, window, first):
    causal = {"num_frame_per_block": per_block, "local_attn_size": window, "independent_first_frame": first}
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()
    model.load_state_dict(weights)
    return model


def stock_weights():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY_TRANSFORMER).state_dict()


@pytest.mark.parametrize(("per_block", "window", "first"), TEACHER_FORCED)
@torch.no_grad()
def test_teacher_forcing_is_the_stock_model_on_clean_and_noisy_frames_under_the_mask(
    inputs, context, per_block, window, first, monkeypatch
):
    lengths = frame_block_lengths(F, per_block, independent_first_frame=first)
    torch.manual_seed(0)
    stock = WanTransformer3DModel(**TINY_TRANSFORMER).eval()
    mask = teacher_forcing_mask(lengths, window).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    for layer in stock.blocks:
        layer.attn1.set_processor(MaskedProcessor(mask))
    rope = stock.rope.forward
    monkeypatch.setattr(
        stock.rope, "forward", lambda both: [torch.cat([t, t], 1) for t in rope(both[:, :, : both.shape[2] // 2])]
    )
    timesteps = torch.cat([context["context_timestep"][:, None].expand(-1, F), inputs["timestep"]], dim=1)
    expected = stock(
        torch.cat([context["context_latents"], inputs["hidden_states"]], dim=2),
        timesteps.repeat_interleave(TOKENS, dim=1),
        inputs["encoder_hidden_states"],
    ).sample[:, :, F:]
    model = make_causal(stock.state_dict(), per_block, window, first)
    torch.testing.assert_close(model(**inputs, **context).sample, expected)


@pytest.mark.parametrize("level", [None, 60.0])
@pytest.mark.parametrize(("per_block", "window", "first"), TEACHER_FORCED)
@torch.no_grad()
def test_teacher_forcing_gives_each_block_what_it_gets_in_a_rollout(inputs, context, per_block, window, first, level):
    model = make_causal(stock_weights(), per_block, window, first)
    context = {"context_latents": context["context_latents"]}
    if level is not None:
        context["context_timestep"] = torch.full((B,), level)
    cache, start, outputs = model.make_cache(B, F, H, W), 0, []
    text, past_level = inputs["encoder_hidden_states"], torch.full((B,), level or 0.0)
    for length in frame_block_lengths(F, per_block, independent_first_frame=first):
        frames = slice(start, start + length)
        noisy, timestep = inputs["hidden_states"][:, :, frames], inputs["timestep"][:, frames]
        outputs.append(model(noisy, timestep, text, cache=cache, start_frame=start).sample)
        model(context["context_latents"][:, :, frames], past_level, text, cache=cache, start_frame=start)
        start += length
    torch.testing.assert_close(model(**inputs, **context).sample, torch.cat(outputs, dim=2))
