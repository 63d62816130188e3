"""A rollout's last step, made again in one pass with gradients."""

import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.flow import latents_from_velocity, sigmas_from_timesteps
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.rollout import SamplingSchedule, roll_out
from causal_wan.sampling.self_forcing import roll_out_to_exit


TIMESTEPS = torch.tensor([1000.0, 757.0, 522.0])
KINDS = {
    "blocks": {"num_frame_per_block": 2},
    "ragged": {"num_frame_per_block": 2, "independent_first_frame": True},
    "window": {"num_frame_per_block": 1, "local_attn_size": 2},
    "whole": {"num_frame_per_block": None},
}


def make(kind, num_frames):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for weight in transformer.parameters():  # tables and gates start at zero, where nothing depends on much
        with torch.no_grad():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    noise = torch.randn(3, 2, TINY_TRANSFORMER["in_channels"], num_frames, 4, 6, generator=generator)
    return transformer, Conditions(prompt_embeds=torch.randn(2, 5, 16, generator=generator)), noise


def frames_of(kind):
    return 5 if kind == "ragged" else 4


def replay(transformer, conditions, rollout):
    velocity = transformer(
        rollout.exit_inputs,
        rollout.exit_timesteps,
        **conditions.arguments(),
        **rollout.context,
        return_dict=False,
    )[0]
    return latents_from_velocity(rollout.exit_inputs, velocity, sigmas_from_timesteps(rollout.exit_timesteps))


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("exit_step", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_of_the_last_step_is_the_rollout(kind, exit_step, sampler):
    transformer, conditions, noise = make(kind, frames_of(kind))
    schedule = SamplingSchedule(timesteps=TIMESTEPS, sampler=sampler)
    rollout = roll_out_to_exit(transformer, conditions, noise, schedule, exit_step)
    assert not rollout.latents.requires_grad
    assert rollout.exit_timesteps.unique().tolist() == [TIMESTEPS[exit_step]]
    torch.testing.assert_close(replay(transformer, conditions, rollout), rollout.latents, rtol=1e-4, atol=1e-5)


def test_the_last_exit_draws_what_sampling_draws():
    transformer, conditions, noise = make("blocks", 4)
    schedule = SamplingSchedule(timesteps=TIMESTEPS, sampler="renoise")
    sampled = torch.cat(list(roll_out(transformer, conditions, noise, schedule)), dim=2)
    assert torch.equal(roll_out_to_exit(transformer, conditions, noise, schedule, 2).latents, sampled)


def test_an_earlier_exit_is_sampling_in_fewer_steps_with_the_same_noise():
    transformer, conditions, noise = make("blocks", 4)
    schedule = SamplingSchedule(timesteps=TIMESTEPS, sampler="renoise")
    few = SamplingSchedule(timesteps=TIMESTEPS[:2], sampler="renoise")
    sampled = torch.cat(list(roll_out(transformer, conditions, noise[:2], few)), dim=2)
    assert torch.equal(roll_out_to_exit(transformer, conditions, noise, schedule, 1).latents, sampled)


def test_a_later_block_draws_a_gradient_through_attention_to_an_earlier_one():
    """To the inputs of the pass alone: the steps before the last are no part of it."""
    transformer, conditions, noise = make("blocks", 4)
    schedule = SamplingSchedule(timesteps=TIMESTEPS, sampler="renoise")
    rollout = roll_out_to_exit(transformer, conditions, noise, schedule, 1)
    weights = [layer.attn1.to_k.weight for layer in transformer.blocks]
    of_last_block = replay(transformer, conditions, rollout)[:, :, 2:].square().sum()
    gradients = torch.autograd.grad(of_last_block, weights, retain_graph=True)
    assert all(gradient.any() for gradient in gradients)

    inputs = rollout.exit_inputs.clone().requires_grad_()
    context = rollout.latents.clone().requires_grad_()
    velocity = transformer(
        inputs, rollout.exit_timesteps, **conditions.arguments(), context_latents=context, return_dict=False
    )[0]
    to_inputs, to_context = torch.autograd.grad(velocity[:, :, 2:].square().sum(), [inputs, context])
    assert not to_inputs[:, :, :2].any()  # the last block sees the clean first one, not its noisy self
    assert to_context[:, :, :2].any()
    assert not to_context[:, :, 2:].any()


def test_gradients_are_equal_with_and_without_checkpointing():
    transformer, conditions, noise = make("blocks", 4)
    schedule = SamplingSchedule(timesteps=TIMESTEPS, sampler="euler")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        rollout = roll_out_to_exit(transformer, conditions, noise, schedule, 2)
        loss = replay(transformer, conditions, rollout).square().mean()
        found.append(torch.autograd.grad(loss, list(transformer.parameters()), allow_unused=True))
    pairs = [(a, b) for a, b in zip(*found, strict=True) if a is not None]
    assert len(pairs) > 20
    for one, other in pairs:
        torch.testing.assert_close(one, other)
