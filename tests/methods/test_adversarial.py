"""Losses of a discriminator, and of the student that it looks at."""

import math

import pytest
import torch

from causal_wan.methods.adversarial import discriminator_losses, ramp, student_losses


ALL = torch.ones(1, 3, dtype=torch.bool)


def test_the_students_loss_is_minus_the_log_of_the_probability_of_real():
    logits = torch.tensor([[-2.0, 0.0, 3.0]])
    torch.testing.assert_close(student_losses(logits), -torch.sigmoid(logits).log())


def test_a_discriminator_that_knows_nothing_pays_for_both_answers():
    zeros = torch.zeros(1, 3)
    losses = discriminator_losses(zeros, zeros, ALL, zeros, 100.0)
    torch.testing.assert_close(losses, torch.full((1, 3), 2 * math.log(2)))


def test_right_answers_cost_less_and_a_change_by_noise_costs_its_square():
    real, drawn = torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[-3.0, 0.0, 3.0]])
    expected = -torch.sigmoid(real).log() - torch.sigmoid(-drawn).log()
    torch.testing.assert_close(discriminator_losses(real, drawn, ALL, real, 100.0), expected)
    changed = discriminator_losses(real, drawn, ALL, real - 0.5, 100.0)
    torch.testing.assert_close(changed, expected + 25)


def test_padding_of_real_clips_is_no_example_of_what_is_real():
    real = torch.tensor([[1.0, 1.0, 1.0]], requires_grad=True)
    is_real = torch.tensor([[True, True, False]])
    discriminator_losses(real, torch.zeros(1, 3), is_real, torch.zeros(1, 3), 1.0).sum().backward()
    assert [bool(value) for value in real.grad[0] != 0] == [True, True, False]


@pytest.mark.parametrize(
    ("step", "num_steps", "share"),
    [(0, 0, 1.0), (0, 4, 0.0), (4, 4, 0.0), (6, 4, 0.5), (8, 4, 1.0), (99, 4, 1.0)],
)
def test_its_weight_grows_after_the_warm_up_over_as_many_steps(step, num_steps, share):
    assert ramp(step, num_steps) == share
