"""A tiny causal student overfits one clip, and then samples it block by block from noise."""

import torch
from conftest import TINY_TRANSFORMER

from causal_wan.flow import latents_from_velocity
from causal_wan.losses import frame_losses, masked_sum_over_count
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.regression import draw_noisy_batch
from causal_wan.transformer import CausalWanTransformer3DModel


LEVELS = torch.tensor([1000.0, 757.0, 522.0, 0.0])


def test_a_tiny_student_learns_a_clip_and_samples_it_in_three_steps():
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=2)
    clip = torch.tensor([1.0, -1.0, 0.5, -0.5]).view(1, 4, 1, 1, 1).expand(1, 4, 6, 4, 6)
    prompt_embeds = torch.randn(1, 3, 16)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=4e-3)
    losses = []
    for step in range(120):
        batch = draw_noisy_batch(
            clip.expand(4, -1, -1, -1, -1),
            LEVELS,
            transformer.block_lengths(6),
            seed=0,
            sample_numbers=range(4 * step, 4 * step + 4),
            num_valid_frames=[6] * 4,
        )
        velocity = transformer(batch.noisy_latents, batch.timesteps, prompt_embeds.expand(4, -1, -1)).sample
        predicted = latents_from_velocity(batch.noisy_latents, velocity, batch.sigmas)
        loss = masked_sum_over_count(frame_losses(predicted, batch.latents), batch.mask, batch.mask.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])

    pipeline = CausalWanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer.eval()
    )
    noise = torch.randn(3, 1, 4, 6, 4, 6)
    error = (pipeline.sample_latents(prompt_embeds, noise, LEVELS.tolist()) - clip).square().mean()
    assert error < 0.05 * clip.square().mean()
