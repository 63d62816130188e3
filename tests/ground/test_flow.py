import math

import pytest
import torch

from causal_wan import flow
from causal_wan.blocks import frame_block_lengths
from causal_wan.timesteps import check_denoising_step_list, check_timestep_shift


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 6, 3, 5, generator=generator)
    noise = torch.randn(2, 4, 6, 3, 5, generator=generator)
    sigmas = torch.rand(2, 6, generator=generator) * 0.9 + 0.1
    return latents, noise, sigmas


def test_sigma_0_is_data_and_sigma_1_is_noise_to_the_last_bit(tensors):
    latents, noise, _ = tensors
    assert torch.equal(flow.add_noise(latents, noise, torch.zeros(2)), latents)
    assert torch.equal(flow.add_noise(latents, noise, torch.ones(2, 6)), noise)


def test_velocity_and_latents_are_inverse_to_each_other(tensors):
    latents, noise, sigmas = tensors
    noisy = flow.add_noise(latents, noise, sigmas)
    velocity = flow.velocity(latents, noise)
    torch.testing.assert_close(flow.latents_from_velocity(noisy, velocity, sigmas), latents)
    torch.testing.assert_close(flow.velocity_from_latents(noisy, latents, sigmas), velocity, rtol=1e-4, atol=1e-4)


def test_velocity_is_the_derivative_of_noising_by_sigma(tensors):
    latents, noise, _ = tensors

    def noised(sigma):
        return flow.add_noise(latents, noise, sigma.expand(2))

    _, derivative = torch.func.jvp(noised, (torch.tensor(0.3),), (torch.tensor(1.0),))
    torch.testing.assert_close(derivative, flow.velocity(latents, noise))


def test_each_frame_gets_its_own_level(tensors):
    latents, noise, _ = tensors
    sigmas = torch.zeros(2, 6)
    sigmas[:, 3] = 1.0
    noisy = flow.add_noise(latents, noise, sigmas)
    assert torch.equal(noisy[:, :, 3], noise[:, :, 3])
    assert torch.equal(noisy[:, :, :3], latents[:, :, :3])


def test_timestep_757_is_sigma_0_757_exactly():
    assert flow.sigmas_from_timesteps(torch.tensor([1000, 757, 0])).tolist() == [1.0, pytest.approx(0.757), 0.0]
    assert flow.sigmas_from_timesteps(torch.tensor(757.0)).item() == torch.tensor(0.757).item()


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        (3, [1000, 900, 750, 500, 0]),
        (5, [1000, 937.5, 833.3333, 625, 0]),
        (8, [1000, 960, 888.8889, 727.2727, 0]),
        (1, [1000, 750, 500, 250, 0]),
    ],
)
def test_warping_equals_the_published_lists(shift, expected):
    warped = flow.shift_timesteps(torch.tensor([1000, 750, 500, 250, 0]), shift)
    torch.testing.assert_close(warped, torch.tensor(expected, dtype=torch.float32))


def test_warping_equals_the_table_of_the_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    table = FlowMatchEulerDiscreteScheduler(shift=5.0).timesteps
    torch.testing.assert_close(flow.shift_timesteps(torch.arange(1000, 0, -1), 5.0), table, rtol=1e-5, atol=1e-3)


def test_sampling_drops_the_trailing_0_that_training_keeps():
    assert flow.training_timesteps([1000, 757, 522, 0]).tolist() == [1000, 757, 522, 0]
    assert flow.sampling_timesteps([1000, 757, 522, 0]).tolist() == [1000, 757, 522]
    assert flow.sampling_timesteps([1000, 500], warp_denoising_step=True, timestep_shift=3.0).tolist() == [1000, 750]


def test_a_step_list_is_warped_only_when_that_is_asked_for():
    for timesteps in (flow.training_timesteps, flow.sampling_timesteps):
        assert timesteps([1000, 500], timestep_shift=3.0).tolist() == [1000, 500]
        assert timesteps([1000, 500]).dtype == torch.float32
        assert timesteps([1000, 500], warp_denoising_step=True).tolist() == [1000, 500]  # by a shift of 1
    warped = flow.training_timesteps([1000, 500, 0], warp_denoising_step=True, timestep_shift=3.0)
    assert warped.tolist() == [1000, 750, 0]
    assert flow.sampling_timesteps([1000, 0.5, 0]).tolist() == [1000, 0.5]
    with pytest.raises(ValueError, match="must fall from noise to data"):
        flow.training_timesteps([500, 1000])


def test_warping_rounds_once():
    timesteps = torch.arange(1001)
    exact = [5000 * timestep / (1000 + 4 * timestep) for timestep in range(1001)]
    assert torch.equal(flow.shift_timesteps(timesteps, 5.0), torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_leads_to_latents_and_back_is_computed_in_float32(tensors, dtype):
    latents, noise, sigmas = tensors
    latents, noise = latents.to(dtype), noise.to(dtype)
    rounded = latents.float(), noise.float()
    found = flow.latents_from_velocity(latents, noise, sigmas)
    assert torch.equal(found, flow.latents_from_velocity(*rounded, sigmas))
    found = flow.velocity_from_latents(latents, noise, sigmas)
    assert torch.equal(found, flow.velocity_from_latents(*rounded, sigmas))
    found = flow.euler_step(latents, noise, sigmas, sigmas / 2)
    assert torch.equal(found, flow.euler_step(*rounded, sigmas, sigmas / 2))
    assert flow.sigmas_from_timesteps(torch.tensor(757).to(dtype)).dtype == torch.float32


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "^denoising_step_list must begin with a timestep above 0, got"),
        ([0], r"must begin with a timestep above 0, got \[0\]; use 1000 757 522 0\.$"),
        ([-5], "must begin with a timestep above 0"),
        ([500, 757], r"^denoising_step_list must fall from noise to data, got \[500, 757\]; sort it and drop doubles"),
        ([1000, 1000], "must fall from noise to data"),
        ([1001, 0], r"^denoising_step_list must lie in \[0, 1000\], got \[1001, 0\]\.$"),
        ([1000, -1], r"must lie in \[0, 1000\]"),
    ],
)
def test_step_lists_that_cannot_be_sampled_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        check_denoising_step_list(steps)


def test_step_lists_may_be_of_any_levels_that_fall():
    for steps in ([1000, 757, 522, 0], (1000.0,), [0.5], [1, 0], iter([3, 2])):
        check_denoising_step_list(steps)


def test_shifts_are_above_0_and_finite():
    for shift in (1e-3, 1, 8.0):
        check_timestep_shift(shift)
    for shift in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^timestep_shift must be above 0 and finite, got {shift}; 1 shifts "):
            check_timestep_shift(shift)


OWN = ([1000.0, 500.0], "euler")


@pytest.mark.parametrize(
    ("asked", "timesteps", "sampler"),
    [
        ({}, [1000, 500], "euler"),
        ({"sampler": "renoise"}, [1000, 500], "renoise"),
        ({"denoising_step_list": (900, 300)}, [900, 300], "renoise"),
        ({"denoising_step_list": (900, 300), "sampler": "euler"}, [900, 300], "euler"),
        ({"num_inference_steps": 2}, [1000, 2500 / 3], "euler"),  # by a shift of 5
        ({"num_inference_steps": 2, "timestep_shift": 1.0}, [1000, 500], "euler"),
        ({"num_inference_steps": 2, "sampler": "renoise"}, [1000, 2500 / 3], "renoise"),
    ],
)
def test_what_is_asked_for_comes_before_what_a_student_has_of_its_own(asked, timesteps, sampler):
    found, by = flow.choose_sampling(tuple(OWN[0]), OWN[1], **asked)
    assert found == pytest.approx(timesteps)
    assert isinstance(found, list)
    assert by == sampler
    if asked == {}:
        assert flow.choose_sampling(OWN[0], "renoise")[1] == "renoise"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"denoising_step_list": [1000], "num_inference_steps": 3}, "got both; give one"),
        ({"timestep_shift": 3.0}, "timestep_shift shifts the steps of num_inference_steps; give both, or neither"),
        ({"timestep_shift": 3.0, "denoising_step_list": [1000]}, "give both, or neither"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more, got 0"),
    ],
)
def test_ways_of_sampling_that_exclude_each_other_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        flow.choose_sampling(*OWN, **asked)


def test_euler_steps_of_the_true_velocity_follow_the_noising_to_the_data(tensors):
    latents, noise, _ = tensors
    velocity, at_noise = flow.velocity(latents, noise), torch.ones(2)
    there = flow.euler_step(noise, velocity, at_noise, torch.full((2,), 0.4))
    torch.testing.assert_close(there, flow.add_noise(latents, noise, torch.full((2,), 0.4)))
    at_data = flow.euler_step(noise, velocity, at_noise, torch.zeros(2))
    assert torch.equal(at_data, flow.latents_from_velocity(noise, velocity, at_noise))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_many_steps_and_their_euler_steps_are_those_of_the_diffusers_scheduler(tensors, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    timesteps = flow.inference_timesteps(7, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - step / 7 for step in range(7)])
    torch.testing.assert_close(timesteps, scheduler.timesteps.float())
    ours = theirs = tensors[1]
    sigmas = [*flow.sigmas_from_timesteps(timesteps), torch.tensor(0.0)]
    for timestep, sigma, next_sigma in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        ours = flow.euler_step(ours, ours.sin(), sigma.expand(2), next_sigma.expand(2))
        theirs = scheduler.step(theirs.sin(), timestep, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_many_steps_with_shift_8_pass_through_the_step_list_of_causvid():
    timesteps = flow.inference_timesteps(50, 8.0)
    torch.testing.assert_close(timesteps[[0, 36, 44]], torch.tensor([1000, 756.7568, 521.7391]))


def test_many_steps_are_even_before_they_are_shifted_and_rounded_once():
    assert flow.inference_timesteps(1, 5.0).tolist() == [1000]
    even = torch.tensor([1000 * (1 - step / 7) for step in range(7)], dtype=torch.float64)
    assert torch.equal(flow.inference_timesteps(7, 1.0), even.float())
    shifted = 3000 * even / 1000 / (1 + 2 * even / 1000)
    assert torch.equal(flow.inference_timesteps(7, 3.0), shifted.float())


def test_steps_that_cannot_be_sampled_are_refused():
    with pytest.raises(ValueError, match="num_inference_steps must be 1 or more, got 0"):
        flow.inference_timesteps(0, 5.0)
    for shift in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"timestep_shift must be above 0 and finite, got {shift}"):
            flow.inference_timesteps(50, shift)


def test_frames_fall_into_blocks():
    assert frame_block_lengths(21, 3) == [3] * 7
    assert frame_block_lengths(21, None) == [21]
    assert frame_block_lengths(21, 21) == [21]
    assert frame_block_lengths(21, 4, independent_first_frame=True) == [1, 4, 4, 4, 4, 4]
    assert frame_block_lengths(1, 3) == [1]


def test_frames_that_do_not_divide_name_the_nearest_that_do():
    with pytest.raises(ValueError, match=r"got 20; use 18 or 21 latent frames \(num_frames 69 or 81\)"):
        frame_block_lengths(20, 3)


def test_levels_of_blocks_repeat_over_their_frames():
    assert flow.per_frame(torch.tensor([[1, 2]]), [1, 3]).tolist() == [[1, 2, 2, 2]]
    assert flow.per_frame(torch.tensor([[1, 2], [3, 4]]), (2, 1)).tolist() == [[1, 1, 2], [3, 3, 4]]


def test_levels_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"^levels must have shape \(B,\) or \(B, F\), got \(1, 2, 3\)\.$"):
        flow.broadcast_over_latents(torch.zeros(1, 2, 3))
