"""Tiny causal students overfit a clip or two, and then sample them block by block from noise."""

import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.flow import latents_from_velocity, velocity
from causal_wan.methods.losses import frame_losses, masked_sum_over_count
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.noise import count_draws
from causal_wan.sampling.pipeline import CausalWanPipeline


METHODS = {
    "three steps": RegressionConfig(),
    "many steps after teacher forcing": RegressionConfig(
        **{"timestep_sampling": "uniform", "context": "clean", "loss_weighting": "min_snr", "timestep_shift": 3.0},
        num_inference_steps=10,
    ),
}


def train(transformer, method, make_clips, prompt_embeds, num_steps):
    """Losses of steps on clips that are noised as a run does."""
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=4e-3)
    losses = []
    for step in range(num_steps):
        clips = make_clips()
        batch = draw_noisy_batch(
            clips,
            method,
            transformer.block_lengths(clips.shape[2]),
            seed=0,
            sample_numbers=range(len(clips) * step, len(clips) * (step + 1)),
            num_valid_frames=[clips.shape[2]] * len(clips),
        )
        embeds = prompt_embeds.expand(len(clips), -1, -1)
        predicted = transformer(batch.noisy_latents, batch.timesteps, embeds, **batch.context).sample
        if method.loss_space == "latents":
            predicted = latents_from_velocity(batch.noisy_latents, predicted, batch.sigmas)
            errors = frame_losses(predicted, batch.latents)
        else:
            errors = frame_losses(predicted, velocity(batch.latents, batch.noise))
        loss = masked_sum_over_count(method.loss_weights(batch.sigmas) * errors, batch.mask, batch.mask.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sample(transformer, method, prompt_embeds, latent_shape, count=1):
    """Clips as the method samples them."""
    pipeline = CausalWanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer.eval()
    )
    timesteps = method.inference_timesteps().tolist()
    noise = torch.randn(count_draws(len(timesteps), method.student_sampler), count, *latent_shape)
    conditions = Conditions(prompt_embeds=prompt_embeds.repeat(count, 1, 1))
    return pipeline.sample_latents(conditions, noise, timesteps, sampler=method.student_sampler)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_tiny_student_learns_a_clip_and_samples_it(method):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=2)
    clip = torch.tensor([1.0, -1.0, 0.5, -0.5]).view(1, 4, 1, 1, 1).expand(1, 4, 6, 4, 6)
    prompt_embeds = torch.randn(1, 3, 16)
    losses = train(transformer, method, lambda: clip.expand(4, -1, -1, -1, -1), prompt_embeds, num_steps=120)
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    error = (sample(transformer, method, prompt_embeds, (4, 6, 4, 6)) - clip).square().mean()
    assert error < 0.05 * clip.square().mean()


def test_of_two_clips_that_the_prompt_leaves_open_many_steps_draw_one_and_a_single_step_their_mean():
    torch.manual_seed(0)
    prompt_embeds, means = torch.randn(1, 3, 16), {}

    def black_or_white():
        signs = torch.randint(2, (16, 1, 1, 1, 1)) * 2.0 - 1
        return signs.expand(-1, 4, 2, 4, 4)

    many = {"timestep_sampling": "uniform", "timestep_shift": 3.0, "num_inference_steps": 10}
    methods = {
        "many": RegressionConfig(**many, context="clean", loss_space="velocity"),
        "one": RegressionConfig(denoising_step_list=(1000,), context="clean"),
    }
    for name, method in methods.items():
        transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=1)
        train(transformer, method, black_or_white, prompt_embeds, num_steps=150)
        clips = sample(transformer, method, prompt_embeds, (4, 2, 4, 4), count=16)
        means[name] = clips.mean(dim=(1, 3, 4))  # (16, F)
    assert means["many"].abs().min() > 0.5
    assert set(means["many"][:, 0].sign().tolist()) == {-1.0, 1.0}
    assert torch.equal(means["many"][:, 0].sign(), means["many"][:, 1].sign())  # the second block keeps to the first
    assert means["one"][:, 0].abs().mean() < 0.2
