import math

import pytest
import torch

from causal_wan.flow import add_noise, latents_from_velocity, shift_timesteps, velocity
from causal_wan.methods import losses


def test_masked_mean_is_the_plain_mean_over_kept_frames_however_the_batch_is_split():
    generator = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 4, 3, 5, 2, 2, generator=generator)
    mask = torch.rand(4, 5, generator=generator) > 0.5
    errors = losses.frame_losses(predicted, target)
    expected = ((predicted - target) ** 2).movedim(2, 1)[mask].mean()
    whole = losses.masked_sum_over_count(errors, mask, mask.sum())
    parts = sum(losses.masked_sum_over_count(errors[i : i + 2], mask[i : i + 2], mask.sum()) for i in (0, 2))
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(parts, expected)


def test_masked_frames_give_no_gradient_even_when_they_are_not_finite():
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    losses.masked_sum_over_count(values, torch.tensor([True, False]), torch.tensor(1)).backward()
    assert values.grad.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("loss_type", "expected"), [("mse", 9.0), ("l1", 3.0), ("huber", 2.5)])
def test_loss_types_follow_their_formulas(loss_type, expected):
    predicted = torch.full((1, 2, 3, 2, 2), 3.0)
    assert losses.frame_losses(predicted, torch.zeros_like(predicted), loss_type).tolist() == [[expected] * 3]


def test_mse_of_latents_is_sigma_squared_times_mse_of_velocity():
    generator = torch.Generator().manual_seed(3)
    latents, noise, predicted = torch.randn(3, 2, 4, 5, 2, 2, generator=generator)
    sigmas = torch.rand(2, 5, generator=generator)
    noisy = add_noise(latents, noise, sigmas)
    of_latents = losses.frame_losses(latents_from_velocity(noisy, predicted, sigmas), latents)
    of_velocity = losses.frame_losses(predicted, velocity(latents, noise))
    torch.testing.assert_close(of_latents, sigmas.square() * of_velocity)


def test_bell_weights_are_the_lineages_and_have_mean_1_under_the_shift():
    levels = torch.tensor([1000, 937.5, 833, 625, 522, 100, 10]) / 1000
    expected = torch.tensor([0, 0.40, 1.02, 1.91, 2.07, 0.64, 0.06])  # the table of shift 5, to two digits
    torch.testing.assert_close(losses.bell_weights(levels, 5.0), expected, atol=0.02, rtol=0)
    for shift in (1.0, 3.0, 8.0):
        u = (torch.arange(10000) + 0.5) / 10
        drawn = losses.bell_weights(shift_timesteps(u, shift) / 1000, shift)
        torch.testing.assert_close(drawn.mean(), torch.tensor(1.0), atol=2e-3, rtol=0)


def test_bell_weights_without_a_shift_have_a_closed_form():
    sigmas = torch.linspace(0, 1, 11)
    mean = math.sqrt(math.pi / 2) * math.erf(1 / math.sqrt(2)) - math.exp(-0.5)
    expected = ((-2 * (sigmas - 0.5).square()).exp() - math.exp(-0.5)) / mean
    torch.testing.assert_close(losses.bell_weights(sigmas), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_bell_weights_of_the_shifted_table_have_mean_1(shift):
    table = shift_timesteps(torch.arange(1, 1001), shift) / 1000
    mean = losses.bell_weights(table, shift).double().mean().item()
    assert mean == pytest.approx(1, abs=3e-6)  # the mean over every other entry is 1e-5 off


def test_min_snr_weights_are_the_snr_up_to_gamma():
    sigmas = torch.tensor([0.0, 1 / 3, 0.5, 0.75, 1.0])
    expected = torch.tensor([3.0, 3.0, 1.0, 1 / 9, 0.0])
    torch.testing.assert_close(losses.min_snr_weights(sigmas, 3.0), expected)
    of_level = losses.level_weights(sigmas, "min_snr", loss_space="latents", snr_gamma=3.0)
    torch.testing.assert_close(of_level, expected)


def test_weights_that_are_not_told_otherwise_have_gamma_5_no_shift_and_no_minimum():
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    of_snr = losses.level_weights(sigmas, "min_snr", loss_space="latents")
    assert losses.min_snr_weights(sigmas).tolist() == of_snr.tolist() == [5, 1, 0]
    bell = losses.level_weights(sigmas, "bell", loss_space="latents")
    assert torch.equal(bell, losses.bell_weights(sigmas, 1.0).clamp(min=0))
    assert bell[2] == 0


def test_min_snr_is_the_same_loss_in_both_spaces_and_keeps_weight_on_pure_noise():
    sigmas = torch.tensor([[0.05, 0.3, 0.757, 1.0]])
    settings = {"snr_gamma": 5.0, "min_loss_weight": 0.1}
    of_latents, of_velocity = (
        losses.level_weights(sigmas, "min_snr", loss_space=space, **settings) for space in ("latents", "velocity")
    )
    torch.testing.assert_close(of_latents[0], torch.tensor([5.0, 5.0, 0.1030, 0.1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(of_velocity, sigmas.square() * of_latents)


@pytest.mark.parametrize("space", ["latents", "velocity"])
def test_bell_and_no_weights_act_on_either_space_as_they_are(space):
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    assert losses.level_weights(sigmas, "none", loss_space=space).tolist() == [1, 1, 1]
    bell = losses.level_weights(sigmas, "bell", loss_space=space, timestep_shift=5.0, min_loss_weight=0.2)
    torch.testing.assert_close(bell[:2], losses.bell_weights(sigmas, 5.0)[:2])
    assert bell[2] == torch.tensor(0.2)


def test_losses_are_float32_whatever_comes_in():
    half = torch.ones(1, 1, 1, 1, 1, dtype=torch.bfloat16)
    assert losses.frame_losses(half, half).dtype == torch.float32


def statistics(predicted, target, indices, mask=None, levels=3):
    mask = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    return losses.level_statistics(predicted, target, indices, mask, levels)


def test_statistics_of_parts_add_up_and_never_mix_levels():
    generator = torch.Generator().manual_seed(1)
    predicted, target = torch.randn(2, 4, 3, 5, 2, 2, generator=generator)
    indices = torch.randint(3, (4, 5), generator=generator)
    whole = statistics(predicted, target, indices)
    torch.testing.assert_close(
        whole,
        statistics(predicted[:1], target[:1], indices[:1]) + statistics(predicted[1:], target[1:], indices[1:]),
    )
    metrics = losses.level_metrics(whole)
    for level in range(3):
        kept_p, kept_t = (x.movedim(2, 1)[indices == level].double() for x in (predicted, target))
        torch.testing.assert_close(metrics["mse"][level], (kept_p - kept_t).square().mean())
        torch.testing.assert_close(metrics["predicted_std"][level], kept_p.std(correction=0))
        torch.testing.assert_close(metrics["target_mean"][level], kept_t.mean())


def test_metrics_are_those_of_a_small_example():
    predicted, target = (torch.tensor(values).reshape(1, 2, 1, 1, 1) for values in ([0.1, 0.3], [0.2, 0.6]))
    metrics = losses.level_metrics(statistics(predicted, target, torch.tensor([[0]]), levels=1)[0])
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "mse": (0.1**2 + 0.3**2) / 2,
            "predicted_mean": 0.2,
            "predicted_std": 0.1,
            "target_mean": 0.4,
            "target_std": 0.2,
            "blur_gap": (0.04 - 0.01 - 0.05) / 0.04,
            "count": 2,
        }
    )


def test_masked_frames_do_not_count():
    predicted = torch.ones(1, 1, 2, 1, 1)
    sums = statistics(predicted, 0 * predicted, torch.tensor([[0, 0]]), torch.tensor([[True, False]]))
    assert sums[0, 0] == 1


def test_blur_gap_is_0_for_the_conditional_mean_and_not_for_an_untrained_prediction():
    generator = torch.Generator().manual_seed(2)
    known = torch.randn(1, 1, 1, 300, 300, generator=generator)
    hidden = torch.randn(1, 1, 1, 300, 300, generator=generator)
    target, indices = known + hidden, torch.zeros(1, 1, dtype=torch.int64)
    optimal = losses.level_metrics(statistics(known, target, indices))
    assert abs(optimal["blur_gap"][0]) < 0.01
    shrunk = losses.level_metrics(statistics(0.5 * known, target, indices))
    assert shrunk["blur_gap"][0] > 0.2
    overshooting = losses.level_metrics(statistics(1.5 * known, target, indices))
    assert overshooting["blur_gap"][0] < -0.2
