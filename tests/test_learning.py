"""A tiny causal student overfits one clip, and then samples it block by block from noise."""

import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.flow import latents_from_velocity
from causal_wan.losses import frame_losses, masked_sum_over_count
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.regression import draw_noisy_batch
from causal_wan.regression_config import RegressionConfig
from causal_wan.rollout import count_draws
from causal_wan.transformer import CausalWanTransformer3DModel


METHODS = {
    "three steps": RegressionConfig(),
    "many steps after teacher forcing": RegressionConfig(
        **{"timestep_sampling": "uniform", "context": "clean", "loss_weighting": "min_snr", "timestep_shift": 3.0},
        num_inference_steps=10,
    ),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_tiny_student_learns_a_clip_and_samples_it(method):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=2)
    clip = torch.tensor([1.0, -1.0, 0.5, -0.5]).view(1, 4, 1, 1, 1).expand(1, 4, 6, 4, 6)
    prompt_embeds = torch.randn(1, 3, 16)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=4e-3)
    losses = []
    for step in range(120):
        batch = draw_noisy_batch(
            clip.expand(4, -1, -1, -1, -1),
            method,
            transformer.block_lengths(6),
            seed=0,
            sample_numbers=range(4 * step, 4 * step + 4),
            num_valid_frames=[6] * 4,
        )
        embeds = prompt_embeds.expand(4, -1, -1)
        velocity = transformer(batch.noisy_latents, batch.timesteps, embeds, **batch.context).sample
        predicted = latents_from_velocity(batch.noisy_latents, velocity, batch.sigmas)
        errors = method.loss_weights(batch.sigmas) * frame_losses(predicted, batch.latents)
        loss = masked_sum_over_count(errors, batch.mask, batch.mask.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])

    pipeline = CausalWanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer.eval()
    )
    timesteps = method.inference_timesteps().tolist()
    noise = torch.randn(count_draws(len(timesteps), method.sampler), 1, 4, 6, 4, 6)
    sampled = pipeline.sample_latents(prompt_embeds, noise, timesteps, sampler=method.sampler)
    error = (sampled - clip).square().mean()
    assert error < 0.05 * clip.square().mean()
