"""Trajectories of teachers, against closed forms and diffusers' solver; and what a student sees of them."""

import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import FlowMatchEulerDiscreteScheduler
from tqdm.auto import tqdm

from causal_wan.flow import add_noise, inference_timesteps
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.methods.trajectories import take_noisy_batch
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.trajectories import sample_trajectories, trajectory_timesteps


LEVELS = torch.tensor([1000.0, 757.0, 522.0])
METHOD = RegressionConfig(num_frame_per_block=2)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 6, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompt_embeds():
    return torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))


def tiny_teacher(num_frame_per_block=None):
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=num_frame_per_block).eval()


def told(prompt_embeds):
    return Conditions(prompt_embeds=prompt_embeds)


class KnownTeacher(CausalWanTransformer3DModel):
    """Its velocity is a times the latents, whatever the timestep: an ODE with a closed form."""

    def forward(self, hidden_states, timestep, *args, **kwargs):
        return (0.7 * hidden_states,)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("levels", [(1000.0, 757.0, 522.0), (1000.0, 937.5, 625.0, 3.0), (990.0,), (1000.0,)])
def test_the_grid_has_the_levels_exactly_and_falls_in_as_many_steps_as_asked_for(shift, levels):
    grid = trajectory_timesteps(torch.tensor(levels), 20, shift)
    assert len(grid) == 20
    assert grid[0] == 1000
    assert (grid.diff() < 0).all()
    assert set(levels) <= set(grid.tolist())


def test_the_grid_of_50_steps_with_shift_8_hardly_moves_for_the_default_list():
    """They are its entries 36 and 44, rounded."""
    grid = trajectory_timesteps(LEVELS, 50, 8.0)
    assert grid[36] == 757
    assert grid[44] == 522
    assert (grid - inference_timesteps(50, 8.0)).abs().max() < 0.3


def test_a_grid_with_too_few_steps_is_refused():
    with pytest.raises(ValueError, match=r"num_inference_steps must be enough .* got 2 with timestep_shift 1"):
        trajectory_timesteps(torch.tensor([1000.0, 757.0, 522.0]), 2, 1.0)


def test_a_known_teacher_gives_the_closed_form_of_eulers_method_and_nearly_that_of_the_ode(noise, prompt_embeds):
    teacher = KnownTeacher(**TINY_TRANSFORMER)
    timesteps = trajectory_timesteps(LEVELS, 200, 3.0)
    kept = sample_trajectories(teacher, noise, told(prompt_embeds), timesteps, LEVELS)
    factors = torch.cat([torch.ones(1), 1 + 0.7 * torch.cat([timesteps, torch.zeros(1)]).diff() / 1000]).double()
    products = factors.cumprod(0)
    for slot, level in enumerate([1000.0, 757.0, 522.0, 0.0]):
        step = int((timesteps == level).nonzero()) if level else 200
        torch.testing.assert_close(kept[:, slot], (products[step] * noise.double()).float(), rtol=1e-5, atol=1e-5)
        exact = torch.tensor(-0.7 * (1 - level / 1000)).exp() * noise
        torch.testing.assert_close(kept[:, slot], exact, rtol=5e-3, atol=1e-6)


def test_kept_latents_are_what_diffusers_solver_has_at_the_levels(noise, prompt_embeds):
    teacher = tiny_teacher()
    timesteps = trajectory_timesteps(LEVELS, 12, 5.0)
    kept = sample_trajectories(teacher, noise, told(prompt_embeds), timesteps, LEVELS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=timesteps.tolist(), sigmas=(timesteps / 1000).tolist())
    latents, found = noise, []
    for timestep in scheduler.timesteps:
        if timestep in LEVELS:
            found.append(latents)
        with torch.no_grad():
            velocity = teacher(latents, timestep.expand(2), prompt_embeds, return_dict=False)[0]
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(kept, torch.stack([*found, latents], dim=1), rtol=1e-5, atol=1e-5)


def test_going_on_from_a_kept_latent_leads_to_the_kept_end(noise, prompt_embeds):
    teacher = tiny_teacher()
    timesteps = trajectory_timesteps(LEVELS, 12, 5.0)
    kept = sample_trajectories(teacher, noise, told(prompt_embeds), timesteps, LEVELS)
    pipeline = CausalWanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=teacher)
    for slot, level in enumerate(LEVELS.tolist()):
        rest = timesteps[timesteps <= level].tolist()
        end = pipeline.sample_latents(told(prompt_embeds), kept[:, slot][None], rest, sampler="euler")
        assert torch.equal(end, kept[:, -1])


def test_guidance_leads_away_from_the_negative_prompt(noise, prompt_embeds):
    teacher = tiny_teacher()
    timesteps = trajectory_timesteps(LEVELS, 4, 1.0)

    def sample(scale, negative):
        guidance = {"guidance_scale": scale, "negative_conditions": None if negative is None else told(negative)}
        return sample_trajectories(teacher, noise, told(prompt_embeds), timesteps, LEVELS, **guidance)

    plain = sample(1.0, None)
    torch.testing.assert_close(sample(3.0, prompt_embeds), plain, rtol=1e-4, atol=1e-4)  # away from itself
    assert not torch.allclose(sample(3.0, -prompt_embeds), plain, rtol=1e-3, atol=1e-3)


def test_a_causal_teacher_solves_each_block_after_the_clean_ones_before_it(noise, prompt_embeds):
    teacher = tiny_teacher(num_frame_per_block=2)
    timesteps = trajectory_timesteps(LEVELS, 6, 3.0)
    with tqdm(delay=60) as progress:
        kept = sample_trajectories(teacher, noise, told(prompt_embeds), timesteps, LEVELS, progress=progress)
        assert progress.n == 3 * 6  # steps of all blocks
    other = noise.clone()
    other[:, :, 4:] = 0
    changed = sample_trajectories(teacher, other, told(prompt_embeds), timesteps, LEVELS)
    assert torch.equal(changed[:, :, :, :4], kept[:, :, :, :4])
    # The second block once more, from the first one's clean end alone.
    cache = teacher.make_cache(2, 6, 4, 6)
    with torch.no_grad():
        teacher(kept[:, -1, :, :2], torch.zeros(2), prompt_embeds, cache=cache)
        latents = noise[:, :, 2:4]
        for timestep, following in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
            velocity = teacher(
                latents, timestep.expand(2), prompt_embeds, cache=cache, start_frame=2, return_dict=False
            )[0]
            latents = latents + (following - timestep) / 1000 * velocity
    torch.testing.assert_close(latents, kept[:, -1, :, 2:4], rtol=1e-4, atol=1e-4)


def test_a_block_is_its_trajectory_at_the_level_that_video_regression_would_draw():
    levels = METHOD.levels()
    latents, noise = torch.randn(2, 8, 4, 6, 2, 2).unbind(0)
    straight = torch.stack([add_noise(latents, noise, (level / 1000).expand(8)) for level in levels], dim=1)
    draws = {"seed": 7, "sample_numbers": range(8)}
    taken = take_noisy_batch(straight, latents, METHOD, [2, 2, 2], **draws)
    drawn = draw_noisy_batch(latents, METHOD, [2, 2, 2], **draws, num_valid_frames=[6] * 8)
    assert torch.equal(taken.level_indices, drawn.level_indices)
    assert torch.equal(taken.mask, drawn.mask)
    torch.testing.assert_close(taken.noisy_latents, add_noise(latents, noise, taken.sigmas))
    noisy = taken.mask[:, None, :, None, None].expand_as(noise)
    torch.testing.assert_close(taken.noise[noisy], noise[noisy])  # of a straight trajectory, its own noise
    assert torch.isfinite(taken.noise).all()


def test_a_clean_context_is_the_end_of_the_trajectory():
    method = RegressionConfig(num_frame_per_block=2, context="clean")
    trajectories = torch.randn(2, 3, 4, 6, 2, 2)
    latents = torch.randn(2, 4, 6, 2, 2)
    taken = take_noisy_batch(trajectories, latents, method, [2, 2, 2], seed=0, sample_numbers=[0, 1])
    assert torch.equal(taken.context_latents, latents)
    assert taken.mask.all()


@pytest.mark.parametrize("settings", [{}, {"context": "augmented"}], ids=["noisy context", "augmented context"])
def test_what_is_taken_of_trajectories_says_where_it_comes_from(settings):
    method = RegressionConfig(num_frame_per_block=2, denoising_step_list=(1000, 0.5, 0), **settings)
    lengths, numbers = [2, 2, 2], range(5, 21)
    trajectories = torch.randn(16, 3, 4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    ends = torch.randn(16, 4, 6, 4, 6, generator=torch.Generator().manual_seed(1))
    taken = take_noisy_batch(trajectories, ends, method, lengths, seed=3, sample_numbers=numbers)
    drawn = draw_noisy_batch(ends, method, lengths, seed=3, sample_numbers=numbers, num_valid_frames=[6] * 16)
    assert taken.latents is ends
    for name in ("timesteps", "sigmas", "level_indices", "mask"):
        assert torch.equal(getattr(taken, name), getattr(drawn, name))
    assert set(taken.timesteps.unique().tolist()) == ({0.0, 0.5, 1000.0} if not settings else {0.5, 1000.0})
    is_clean = taken.timesteps[:, None, :, None, None] == 0
    assert torch.equal(taken.noise.where(is_clean, 0.0), ends.where(is_clean, 0.0))
    noised = add_noise(ends, taken.noise, taken.sigmas)
    torch.testing.assert_close(noised, taken.noisy_latents, atol=1e-5, rtol=1e-4)
    if not settings:
        assert taken.context_latents is taken.context_timesteps is None
        return
    assert len(taken.context_timesteps.unique()) == 16
    assert ((taken.context_timesteps >= 0) & (taken.context_timesteps <= method.context_noise)).all()
    alone = take_noisy_batch(trajectories[3:4], ends[3:4], method, lengths, seed=3, sample_numbers=[8])
    assert torch.equal(alone.context_timesteps, taken.context_timesteps[3:4])
    assert torch.equal(alone.context_latents, taken.context_latents[3:4])
    difference = (taken.context_latents - ends) / (taken.context_timesteps / 1000)[:, None, None, None, None]
    assert (difference + ends).std().item() == pytest.approx(1, abs=0.02)


class BlackOrWhite(CausalWanTransformer3DModel):
    """The exact flow to clips that are all 1 or all -1: its velocity has a closed form."""

    def forward(self, hidden_states, timestep, *args, **kwargs):
        sigma = timestep[0] / 1000
        evidence = (1 - sigma) / sigma**2 * hidden_states.sum(dim=(1, 2, 3, 4), keepdim=True)
        return ((hidden_states - evidence.tanh()) / sigma,)


def test_from_pairs_one_step_learns_which_of_two_clips_a_noise_becomes_and_from_clips_alone_their_mean():
    torch.manual_seed(0)
    method, levels = RegressionConfig(denoising_step_list=(1000,), num_frame_per_block=2), torch.tensor([1000.0])
    prompt_embeds = torch.randn(1, 3, 16)
    timesteps = trajectory_timesteps(levels, 20, 3.0)
    teacher = BlackOrWhite(**TINY_TRANSFORMER)

    def pairs(noise):
        return sample_trajectories(teacher, noise, told(prompt_embeds.expand(len(noise), -1, -1)), timesteps, levels)

    means = {}
    for name in ("pairs", "clips"):
        student = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=2)
        optimizer = torch.optim.AdamW(student.parameters(), lr=4e-3)
        for step in range(200):
            trajectories = pairs(torch.randn(32, 4, 2, 4, 4))
            draws = {"seed": 0, "sample_numbers": range(32 * step, 32 * step + 32)}
            if name == "pairs":
                batch = take_noisy_batch(trajectories[:, :1], trajectories[:, -1], method, [2], **draws)
            else:
                batch = draw_noisy_batch(trajectories[:, -1], method, [2], **draws, num_valid_frames=[2] * 32)
            velocity = student(batch.noisy_latents, batch.timesteps, prompt_embeds.expand(32, -1, -1)).sample
            (batch.noisy_latents - velocity - batch.latents).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        noise = torch.randn(64, 4, 2, 4, 4)
        with torch.no_grad():
            predicted = noise - student(noise, torch.full((64,), 1000.0), prompt_embeds.expand(64, -1, -1)).sample
        means[name] = predicted.mean(dim=(1, 2, 3, 4)), pairs(noise)[:, -1].mean(dim=(1, 2, 3, 4))
    predicted, ends = means["pairs"]
    assert predicted.abs().mean() > 0.5
    assert (predicted.sign() == ends.sign()).float().mean() > 0.8
    assert means["clips"][0].abs().mean() < 0.2
