"""Distribution matching against closed forms: Gaussians whose scores are known."""

import pytest
import torch

from causal_wan.flow import add_noise
from causal_wan.methods.distribution_matching import (
    distribution_matching_losses,
    draw_exit,
    draw_scored,
    draw_uses_clip,
    guided,
    matching_direction,
    takes_student_turn,
)
from causal_wan.methods.matching_settings import MatchingConfig
from causal_wan.seeds import RandomPurpose


SHAPE = (3, 4, 2, 5, 6)  # (B, C, F, H, W)
STUDENT, TEACHER, STD = 0.7, -0.4, 0.8


def denoised(noisy, sigma, mean, std):
    """The mean of the clean value given the noisy one, where clean values are normal."""
    share = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return mean + share * (noisy - (1 - sigma) * mean)


def losses_of(latents, critic_latents, teacher_latents):
    return distribution_matching_losses(latents, *matching_direction(latents, critic_latents, teacher_latents))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98])
def test_between_normal_distributions_of_one_width_the_direction_is_their_distance_everywhere(sigma):
    latents = STUDENT + STD * random(*SHAPE)
    noisy = (1 - sigma) * latents + sigma * random(*SHAPE, seed=1)
    predictions = [denoised(noisy, sigma, mean, STD) for mean in (STUDENT, TEACHER)]
    direction, _ = matching_direction(latents, *predictions)
    expected = (STUDENT - TEACHER) * sigma**2 / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    torch.testing.assert_close(direction, torch.full(SHAPE, expected, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.1, 0.6])
def test_the_direction_is_the_gradient_of_the_divergence_of_the_noised_clips(sigma):
    """dKL/dmean of normal distributions, through x = mean + std z, with the weight (1 - sigma) / sigma^2 of scores."""
    noisy = (1 - sigma) * (STUDENT + STD * random(*SHAPE)) + sigma * random(*SHAPE, seed=1)
    direction, _ = matching_direction(
        torch.zeros(SHAPE), denoised(noisy, sigma, STUDENT, STD), denoised(noisy, sigma, TEACHER, STD)
    )
    mean = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    divergence = ((1 - sigma) * (mean - TEACHER)) ** 2 / (2 * variance)
    (gradient,) = torch.autograd.grad(divergence, mean)
    through_x = (1 - sigma) * (1 - sigma) / sigma**2 * direction.mean()
    torch.testing.assert_close(through_x, gradient)


def test_the_gradient_of_the_mean_loss_is_the_direction_over_normaliser_and_number():
    latents, critic, teacher = (random(*SHAPE, seed=seed) for seed in range(3))
    latents.requires_grad_()
    losses_of(latents, critic, teacher).mean().backward()
    normalizer = torch.stack([(x - t).abs().mean() for x, t in zip(latents, teacher, strict=True)])
    expected = (critic - teacher) / normalizer[:, None, None, None, None] / latents.numel()
    torch.testing.assert_close(latents.grad, expected)


def test_the_loss_has_a_value_for_each_frame_half_the_square_of_its_gradient():
    latents, critic, teacher = (random(*SHAPE, seed=seed) for seed in range(3))
    direction, normalizer = matching_direction(latents, critic, teacher)
    expected = 0.5 * (direction / normalizer).square().mean(dim=(1, 3, 4))
    assert losses_of(latents, critic, teacher).shape == SHAPE[:1] + SHAPE[2:3]
    torch.testing.assert_close(losses_of(latents, critic, teacher), expected)


def test_a_critic_that_is_the_teacher_moves_nothing():
    latents, teacher = random(*SHAPE).requires_grad_(), random(*SHAPE, seed=1)
    losses_of(latents, teacher, teacher).mean().backward()
    assert not latents.grad.any()


def test_the_step_does_not_depend_on_the_scale_of_latents():
    latents, critic, teacher = (random(*SHAPE, seed=seed) for seed in range(3))
    for scale in (1e-3, 1e3):
        direction, normalizer = matching_direction(scale * latents, scale * critic, scale * teacher)
        torch.testing.assert_close(
            direction / normalizer, torch.div(*matching_direction(latents, critic, teacher)), rtol=1e-6, atol=0
        )


def test_clips_that_are_the_teachers_own_do_not_divide_by_zero():
    latents = random(*SHAPE)
    assert torch.isfinite(losses_of(latents, latents + 1e-9, latents)).all()


def test_float32_latents_get_a_gradient_that_is_exact_though_it_is_small():
    """A target in float32 would round a step of 1e-7 away."""
    latents = 100 + random(*SHAPE).float()
    critic, teacher = latents.double() + 1e-6, latents.double() - 1.0
    latents.requires_grad_()
    losses_of(latents, teacher + 1e-7, teacher).sum().backward()
    expected = 1e-7 / (latents.detach().double() - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True) / (4 * 5 * 6)
    torch.testing.assert_close(latents.grad, expected.float().expand_as(latents), rtol=1e-3, atol=0)
    assert critic.dtype == torch.float64


def test_steps_against_the_gradient_bring_a_student_to_its_teacher():
    mean = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    for step in range(60):
        latents = mean + STD * random(64, 1, 1, 1, 1, seed=step)
        noisy = 0.5 * latents.detach() + 0.5 * random(64, 1, 1, 1, 1, seed=1000 + step)
        predictions = [denoised(noisy, 0.5, center, STD) for center in (mean.detach(), TEACHER)]
        direction, _ = matching_direction(latents, *predictions)
        (gradient,) = torch.autograd.grad((latents * direction).mean(), mean)  # one-element clips: no normaliser
        mean = (mean - 0.2 * gradient).detach().requires_grad_()
    assert abs(float(mean.detach()) - TEACHER) < 0.01


def of_two(noisy, sigma, std=0.1):
    """The mean of the clean value given the noisy one, where clean values lie around -1 and 1, half of them each."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    share_of_upper = torch.sigmoid(2 * (1 - sigma) * noisy / variance)
    return share_of_upper * denoised(noisy, sigma, 1, std) + (1 - share_of_upper) * denoised(noisy, sigma, -1, std)


def make_mlp(num_inputs):
    layers = [torch.nn.Linear(num_inputs, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))


def as_clips(values):
    return values[..., None, None, None]


@pytest.mark.slow
def test_a_student_draws_both_of_two_modes_where_a_squared_error_draws_their_mean():
    """With a critic that learns the student's values; one-element clips have no normaliser to speak of."""
    torch.manual_seed(0)
    student, critic = make_mlp(1), make_mlp(2)
    optimizer, critic_optimizer = (
        torch.optim.Adam(model.parameters(), lr=rate, betas=(0.0, 0.999))
        for model, rate in ((student, 1e-3), (critic, 2e-3))
    )

    def look_at(values):
        sigma = 0.02 + 0.96 * torch.rand(len(values), 1)
        return sigma, (1 - sigma) * values + sigma * torch.randn_like(values)

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for number in range(2000):
        values = student(torch.randn(256, 1)).detach()
        sigma, noisy = look_at(values)
        errors = (critic(torch.cat([noisy, sigma], dim=1)) - values).square() / sigma**2
        step(critic_optimizer, errors.mean())
        if number >= 100 and number % 5 == 0:
            values = student(torch.randn(256, 1))
            sigma, noisy = look_at(values.detach())
            with torch.no_grad():
                predicted = critic(torch.cat([noisy, sigma], dim=1)), of_two(noisy, sigma)
            direction, _ = matching_direction(*map(as_clips, (values, *predicted)))
            losses = distribution_matching_losses(as_clips(values), direction, torch.ones_like(direction))
            step(optimizer, losses.mean())
    with torch.no_grad():
        values = student(torch.randn(4096, 1))
    assert values.std() > 0.9
    assert 0.4 < (values > 0).float().mean() < 0.6

    regression = make_mlp(1)
    optimizer = torch.optim.Adam(regression.parameters(), lr=1e-3)
    for _ in range(400):
        values = torch.randint(2, (256, 1)) * 2 - 1 + 0.1 * torch.randn(256, 1)
        step(optimizer, (regression(torch.randn(256, 1)) - values).square().mean())
    assert regression(torch.randn(4096, 1)).std() < 0.1


def test_guidance_of_four_adds_three_times_the_difference_to_the_conditional():
    conditional, unconditional = random(2), random(2, seed=1)
    torch.testing.assert_close(
        guided(conditional, unconditional, 4.0), conditional + 3 * (conditional - unconditional)
    )
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)


def draws(numbers, purpose=RandomPurpose.CRITIC, **settings):
    config = MatchingConfig(**settings)
    return draw_scored((1, 2, 3, 4), config, seed=5, purpose=purpose, sample_numbers=numbers)


def test_draws_belong_to_the_sample_and_to_the_purpose():
    noise, timesteps = draws([3, 4, 5])
    for place, number in enumerate([3, 4, 5]):
        alone = draws([number])
        assert torch.equal(noise[place], alone[0][0])
        assert torch.equal(timesteps[place], alone[1][0])
    other = draws([3, 4, 5], RandomPurpose.MATCHING)
    assert not torch.equal(noise, other[0])
    assert not torch.equal(timesteps, other[1])


def test_timesteps_are_uniform_then_shifted_then_clamped():
    numbers = range(4000)
    _, plain = draws(numbers, matching_timestep_shift=1.0, matching_timesteps=(1e-3, 1000.0))
    assert abs(plain.mean() - 500) < 15
    _, shifted = draws(numbers, matching_timestep_shift=5.0, matching_timesteps=(1e-3, 1000.0))
    torch.testing.assert_close(shifted, 5 * plain / (1 + 4 * plain / 1000), rtol=1e-5, atol=1e-3)
    _, clamped = draws(numbers, matching_timestep_shift=5.0)
    assert torch.equal(clamped, shifted.clamp(20, 980))
    assert (clamped == 980).any()


def test_noise_is_standard_normal():
    noise, _ = draws(range(500))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    sigmas = torch.full((500,), 0.3)
    assert add_noise(torch.zeros_like(noise), noise, sigmas).std() == pytest.approx(0.3, rel=0.03)


def test_real_clips_are_looked_at_as_often_as_asked_and_never_where_they_are_padded():
    numbers = range(2000)
    chosen = draw_uses_clip(0.3, seed=1, sample_numbers=numbers, are_whole=[True] * 2000)
    assert abs(float(chosen.float().mean()) - 0.3) < 0.03
    halves = [number % 2 == 0 for number in numbers]
    padded = draw_uses_clip(0.3, seed=1, sample_numbers=numbers, are_whole=halves)
    assert torch.equal(padded, chosen & torch.tensor(halves))
    assert draw_uses_clip(1.0, seed=1, sample_numbers=[7], are_whole=[True]).all()
    assert not draw_uses_clip(0.0, seed=1, sample_numbers=range(50), are_whole=[True] * 50).any()


def test_exits_are_uniform_and_belong_to_the_step():
    exits = [draw_exit(3, seed=2, step=step) for step in range(600)]
    assert exits == [draw_exit(3, seed=2, step=step) for step in range(600)]
    assert all(150 < exits.count(number) < 250 for number in range(3))
    assert exits != [draw_exit(3, seed=3, step=step) for step in range(600)]


def test_the_student_has_its_turn_after_the_warm_up_and_then_every_so_often():
    config = MatchingConfig(critic_warmup_steps=4, student_every=3)
    assert [step for step in range(12) if takes_student_turn(step, config)] == [4, 7, 10]
    always = MatchingConfig(critic_warmup_steps=0, student_every=1)
    assert all(takes_student_turn(step, always) for step in range(5))


@pytest.mark.parametrize("timesteps", [(0.0, 980.0), (500.0, 500.0), (600.0, 20.0)])
def test_a_range_of_timesteps_without_noise_or_without_width_is_refused(timesteps):
    with pytest.raises(ValueError, match=r"matching_timesteps must be the least and the largest, above 0, got"):
        MatchingConfig(matching_timesteps=timesteps)
