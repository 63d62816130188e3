"""What a discriminator sees of a clip, and that gradients go through it."""

import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.config.settings import MemoryConfig
from causal_wan.distillation.discriminator import Discriminator, feature_depths, look_inside
from causal_wan.memory.levers import enable_gradient_checkpointing
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel


NUM_LAYERS = 5


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**{**TINY_TRANSFORMER, "num_layers": NUM_LAYERS}, num_frame_per_block=None)
    return model.requires_grad_(False).eval()


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator)
    conditions = Conditions(prompt_embeds=torch.randn(2, 7, 16, generator=generator))
    return latents, torch.tensor([900.0, 100.0]), conditions


@pytest.mark.parametrize(("num_layers", "depths"), [(30, [15, 22, 29]), (2, [1]), (1, [0]), (5, [2, 3, 4])])
def test_layers_are_looked_at_from_the_middle_on(num_layers, depths):
    assert feature_depths(num_layers) == depths


def test_features_are_what_the_layers_give_frame_by_frame(teacher, given):
    latents, timesteps, conditions = given
    features = look_inside(teacher, latents, timesteps, conditions)
    assert [of_depth.shape for of_depth in features] == [(2, 3, 6, 48)] * 3
    outputs = []
    hook = teacher.blocks[-1].register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    teacher(latents, timesteps, **conditions.arguments())
    hook.remove()
    assert torch.equal(features[-1].flatten(1, 2), outputs[0])
    assert not any(layer._forward_hooks for layer in teacher.blocks)


def test_gradients_reach_the_clip_whether_layers_are_recomputed_or_not(teacher, given):
    latents, timesteps, conditions = given
    discriminator, gradients = Discriminator.of(teacher, seed=0), []
    for recomputes in (False, True):
        if recomputes:
            enable_gradient_checkpointing(teacher, MemoryConfig(gradient_checkpointing=True))
        latents = latents.clone().requires_grad_(True)
        logits = discriminator(look_inside(teacher, latents, timesteps, conditions))
        assert logits.shape == (2, 3)
        gradients += torch.autograd.grad(logits.sum(), latents)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_a_discriminator_starts_the_same_in_every_process_and_leaves_random_numbers_alone(teacher):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = Discriminator.of(teacher, seed=5)
    assert torch.equal(torch.rand(2), expected)
    two = Discriminator.of(teacher, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
