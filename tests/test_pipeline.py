import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.flow import add_noise, latents_from_velocity
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.transformer import CausalWanTransformer3DModel


B, F, H, W = 2, 6, 4, 6
STEPS = (1000, 757, 522)


def make_pipeline(**causal):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()
    return CausalWanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


@pytest.fixture
def embeds():
    return torch.randn(B, 7, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.randn(len(STEPS), B, 4, F, H, W, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def sample_without_cache(transformer, embeds, noise, block):
    """The same algorithm by recomputing: clean earlier blocks at timestep 0 before the noisy block, in one forward."""
    clean = noise[0, :, :, :0]
    for start in range(0, F, block):
        x = noise[0, :, :, start : start + block]
        for step, timestep in enumerate(STEPS):
            frames = torch.cat([clean, x], dim=2)
            timesteps = torch.zeros(B, frames.shape[2])
            timesteps[:, start:] = timestep
            velocity = transformer(frames, timesteps, embeds).sample[:, :, start:]
            predicted = latents_from_velocity(x, velocity, torch.full((B,), timestep / 1000))
            if step + 1 < len(STEPS):
                fresh = noise[step + 1, :, :, start : start + block]
                x = add_noise(predicted, fresh, torch.full((B,), STEPS[step + 1] / 1000))
        clean = torch.cat([clean, predicted], dim=2)
    return clean


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_sampling_with_the_cache_equals_recomputing_the_past(embeds, noise, block):
    pipeline = make_pipeline(num_frame_per_block=block)
    expected = sample_without_cache(pipeline.transformer, embeds, noise, block)
    torch.testing.assert_close(pipeline.sample_latents(embeds, noise, STEPS), expected, rtol=1e-4, atol=1e-4)


def test_a_sample_is_a_function_of_its_inputs_alone(embeds, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    first = pipeline.sample_latents(embeds, noise, STEPS)
    torch.manual_seed(123)
    assert torch.equal(pipeline.sample_latents(embeds, noise, STEPS), first)
    alone = pipeline.sample_latents(embeds[:1], noise[:, :1], STEPS)
    torch.testing.assert_close(alone, first[:1])


def test_the_training_list_samples_like_the_list_without_its_0(embeds, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    assert torch.equal(
        pipeline.sample_latents(embeds, noise, [*STEPS, 0]), pipeline.sample_latents(embeds, noise, STEPS)
    )


def test_later_noise_leaves_earlier_blocks_bitwise_alone(embeds, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    before = pipeline.sample_latents(embeds, noise, STEPS)
    changed = noise.clone()
    changed[:, :, :, 4:] += 1
    after = pipeline.sample_latents(embeds, changed, STEPS)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_blocks_are_handed_over_as_they_are_made(embeds, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    blocks = []
    latents = pipeline.sample_latents(embeds, noise, STEPS, on_block_end=lambda number, block: blocks.append(block))
    assert torch.equal(torch.cat(blocks, dim=2), latents)


def test_noise_must_have_one_entry_a_step(embeds, noise):
    with pytest.raises(ValueError, match="num_steps=2"):
        make_pipeline().sample_latents(embeds, noise, [1000, 500])


def test_a_window_makes_rollouts_of_any_length_run_in_a_cache_of_fixed_size(embeds):
    pipeline = make_pipeline(num_frame_per_block=2, local_attn_size=4, sink_size=1)
    long_noise = torch.randn(len(STEPS), B, 4, 20, H, W, generator=torch.Generator().manual_seed(3))
    assert pipeline.transformer.make_cache(B, 20, H, W).capacity == 4
    assert pipeline.sample_latents(embeds, long_noise, STEPS).shape == (B, 4, 20, H, W)
