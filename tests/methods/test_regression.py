import itertools
import math

import pytest
import torch

from causal_wan.flow import add_noise, shift_timesteps, sigmas_from_timesteps
from causal_wan.geometry import WAN
from causal_wan.methods.noising import (
    draw_continuous_timesteps,
    draw_level_indices,
    draw_noisy_batch,
    summarize_levels,
)
from causal_wan.methods.settings import RegressionConfig
from causal_wan.seeds import RandomPurpose, noise_generator, seeded_generator


LEVELS = torch.tensor([1000.0, 757.0, 522.0, 0.0])
METHODS = {
    "step list": {},
    "uniform": {"timestep_sampling": "uniform", "clean_block_probability": 0.25},
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "clean context": {"context": "clean"},
    "augmented context": {"context": "augmented", "timestep_sampling": "uniform"},
}


def draws(block_lengths, count, num_valid=None, levels=LEVELS):
    num_valid = sum(block_lengths) if num_valid is None else num_valid
    return torch.stack(
        [draw_level_indices(noise_generator(0, n), levels, block_lengths, num_valid) for n in range(count)]
    )


def test_order_clips_and_noise_draw_from_streams_of_their_own():
    generators = [
        seeded_generator(0, stream, n) for stream in (RandomPurpose.ORDER, RandomPurpose.CLIP) for n in range(3)
    ]
    generators += [noise_generator(0, n) for n in range(3)] + [noise_generator(1, 0)]
    assert len({generator.initial_seed() for generator in generators}) == len(generators)


def test_frames_of_a_block_share_a_level_and_blocks_do_not():
    indices = draws([3] * 7, 200).view(200, 7, 3)
    assert (indices == indices[..., :1]).all()
    assert (indices[:, 0, 0] != indices[:, 1, 0]).any()


def test_every_entry_is_drawn_equally_often_by_long_clips():
    frequencies = draws([1] * 21, 2000).flatten().bincount(minlength=4) / (2000 * 21)
    torch.testing.assert_close(frequencies, torch.full((4,), 0.25), atol=0.01, rtol=0)


@pytest.mark.parametrize(("block_lengths", "num_valid"), [([21], 21), ([3] * 7, 21), ([3] * 7, 2), ([1, 1], 1)])
def test_no_clip_is_clean_all_over_where_it_is_not_padding(block_lengths, num_valid):
    indices = draws(block_lengths, 500, num_valid)
    assert (LEVELS[indices[:, :num_valid]] > 0).any(dim=1).all()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_draws_are_a_function_of_seed_and_sample_number(method):
    latents, method = torch.randn(3, 4, 6, 2, 2), RegressionConfig(**method)
    kwargs = {"seed": 7, "num_valid_frames": [6, 6, 6]}
    together = draw_noisy_batch(latents, method, [3, 3], sample_numbers=[4, 5, 6], **kwargs)
    alone = draw_noisy_batch(latents[1:2], method, [3, 3], seed=7, sample_numbers=[5], num_valid_frames=[6])
    for name in ("noisy_latents", "timesteps", "level_indices", "context_latents", "context_timesteps"):
        of_both = [getattr(batch, name) for batch in (together, alone)]
        assert of_both == [None, None] or torch.equal(of_both[0][1:2], of_both[1])
    other = draw_noisy_batch(latents, method, [3, 3], sample_numbers=[4, 5, 7], **kwargs)
    assert torch.equal(other.noise[:2], together.noise[:2])
    assert not torch.equal(other.noise[2], together.noise[2])


@pytest.mark.parametrize("method", [METHODS["step list"], METHODS["uniform"]], ids=["step list", "uniform"])
def test_clean_blocks_are_exactly_clean_and_do_not_count(method):
    latents = torch.randn(8, 4, 6, 2, 2)
    batch = draw_noisy_batch(
        latents,
        RegressionConfig(**method),
        [3, 3],
        seed=0,
        sample_numbers=range(8),
        num_valid_frames=[6] * 7 + [4],
    )
    clean = batch.timesteps == 0
    assert clean.any()
    assert torch.equal(batch.noisy_latents.movedim(2, 1)[clean], latents.movedim(2, 1)[clean])
    assert not batch.mask[clean].any()
    assert batch.mask[:7][~clean[:7]].all()
    assert not batch.mask[7, 4:].any()


@pytest.mark.parametrize("method", [METHODS["step list"], METHODS["uniform"]], ids=["step list", "uniform"])
def test_a_padded_clip_has_something_to_learn_before_its_padding(method):
    kwargs = {"seed": 0, "sample_numbers": range(100), "num_valid_frames": [1] * 100}
    batch = draw_noisy_batch(torch.zeros(100, 1, 4, 1, 1), RegressionConfig(**method), [1] * 4, **kwargs)
    assert batch.mask[:, 0].all()


def test_a_batch_keeps_its_latents_and_its_levels_as_sigmas():
    latents = torch.randn(2, 4, 6, 2, 2)
    kwargs = {"seed": 0, "sample_numbers": [0, 1], "num_valid_frames": [6, 6]}
    batch = draw_noisy_batch(latents, RegressionConfig(), [3, 3], **kwargs)
    assert batch.latents is latents
    assert torch.equal(batch.sigmas, batch.timesteps / 1000)
    assert torch.equal(batch.noisy_latents, add_noise(latents, batch.noise, batch.sigmas))


def test_each_sample_needs_its_number_of_valid_frames():
    with pytest.raises(ValueError, match="zip"):
        draw_noisy_batch(
            torch.zeros(2, 4, 6, 2, 2), RegressionConfig(), [6], seed=0, sample_numbers=[0, 1], num_valid_frames=[6]
        )


def test_every_level_above_0_is_learned_however_low():
    config = RegressionConfig(denoising_step_list=(1000, 0.5))
    kwargs = {"seed": 0, "sample_numbers": range(20), "num_valid_frames": [1] * 20}
    batch = draw_noisy_batch(torch.zeros(20, 1, 1, 1, 1), config, [1], **kwargs)
    assert batch.timesteps.unique().tolist() == [0.5, 1000]
    assert batch.mask.all()


def test_pure_noise_is_in_the_last_bin():
    config = RegressionConfig(timestep_sampling="logit_normal", logit_mean=20.0)
    kwargs = {"seed": 0, "sample_numbers": [0], "num_valid_frames": [2]}
    batch = draw_noisy_batch(torch.zeros(1, 1, 2, 1, 1), config, [1, 1], **kwargs)
    assert batch.timesteps.tolist() == [[1000, 1000]]
    assert batch.level_indices.tolist() == [[9, 9]]


def test_padding_counts_a_latent_frame_only_when_all_its_video_frames_are_real():
    assert [WAN.num_latent_frames(frames) for frames in (1, 4, 5, 6, 8, 9, 81)] == [1, 1, 2, 2, 2, 3, 21]


def test_bidirectional_video_is_one_block():
    config = RegressionConfig(generator_task="bidirectional_video", denoising_step_list=(1000, 500))
    assert config.block_lengths(20) == [20]
    assert config.causal.num_frame_per_block is None


def continuous_draws(count, block_lengths, num_valid=None, **settings):
    method = RegressionConfig(**settings)
    num_valid = num_valid or sum(block_lengths)
    return torch.stack(
        [draw_continuous_timesteps(noise_generator(0, n), method, block_lengths, num_valid) for n in range(count)]
    )


def test_continuous_levels_are_drawn_for_each_block_independently_and_once_for_a_clip_of_one_block():
    timesteps = continuous_draws(2000, [3] * 7, timestep_sampling="uniform").view(2000, 7, 3)
    assert (timesteps == timesteps[..., :1]).all()
    correlations = torch.corrcoef(timesteps[..., 0].T)
    torch.testing.assert_close(correlations, torch.eye(7), atol=0.08, rtol=0)
    config = RegressionConfig(generator_task="bidirectional_video", timestep_sampling="uniform")
    (whole,) = continuous_draws(1, config.block_lengths(21), timestep_sampling="uniform")
    assert (whole == whole[0]).all()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_uniform_levels_have_the_quantiles_of_shifted_uniform_numbers(shift):
    timesteps = continuous_draws(1000, [1] * 21, timestep_sampling="uniform", timestep_shift=shift).flatten()
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    expected = shift_timesteps(1000 * shares, shift)
    assert ((timesteps > 0) & (timesteps <= 1000)).all()
    torch.testing.assert_close(timesteps.quantile(shares), expected, atol=15.0, rtol=0)


def test_logit_normal_levels_have_a_logit_of_their_mean_and_deviation_under_the_shift():
    settings = {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 1.5, "timestep_shift": 3.0}
    logits = torch.logit(continuous_draws(1000, [1] * 21, **settings).flatten().double() / 1000)
    logits = logits[logits.isfinite()]
    # a shift by k adds log k to the logit
    torch.testing.assert_close(logits.mean().item(), 0.5 + math.log(3), atol=0.05, rtol=0)
    torch.testing.assert_close(logits.std().item(), 1.5, atol=0.05, rtol=0)


def test_logit_normal_levels_rise_with_the_normal_numbers_that_are_drawn():
    (drawn,) = continuous_draws(1, [2, 1], timestep_sampling="logit_normal", logit_mean=1.0, timestep_shift=3.0)
    normal = torch.randn(2, generator=noise_generator(0, 0))
    expected = shift_timesteps(1000 * torch.sigmoid(1 + normal), 3.0)
    torch.testing.assert_close(drawn, expected[[0, 0, 1]])


def test_levels_of_a_clip_may_all_be_low():
    timesteps = continuous_draws(5, [1, 1], timestep_sampling="logit_normal", logit_mean=-12.0)
    assert ((timesteps > 0) & (timesteps < 1)).all()


def test_without_a_share_no_block_enters_clean_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(*shape))
    assert continuous_draws(1, [1, 1], timestep_sampling="uniform").tolist() == [[1000, 1000]]


def test_a_share_of_the_blocks_enters_clean_under_continuous_levels_and_never_all_of_a_clip():
    settings = {"timestep_sampling": "uniform", "clean_block_probability": 0.5}
    assert (continuous_draws(1000, [1] * 21, **settings) == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (continuous_draws(500, [1] * 4, num_valid=2, **settings)[:, :2] > 0).any(dim=1).all()
    without = continuous_draws(2000, [1] * 21, timestep_sampling="uniform")
    assert (without < 50).float().mean().item() == pytest.approx(0.0104, abs=0.002)  # as the help says


def test_continuous_levels_are_told_by_bins_of_100_frame_by_frame():
    config = RegressionConfig(timestep_sampling="uniform")
    latents = torch.randn(50, 1, 21, 1, 1)
    kwargs = {"seed": 0, "sample_numbers": range(50), "num_valid_frames": [21] * 50}
    batch = draw_noisy_batch(latents, config, config.block_lengths(21), **kwargs)
    levels = config.levels()[batch.level_indices]
    assert config.levels().tolist() == list(range(0, 1000, 100))
    assert ((levels <= batch.timesteps) & (batch.timesteps <= levels + 100)).all()
    assert batch.mask.all()
    sums = torch.ones(10, 6, dtype=torch.float64)
    names = summarize_levels(sums, config.levels(), bin_width=config.bin_width)
    assert {"loss_at_time_0_to_100", "loss_at_time_900_to_1000", "blur_gap_at_time_500_to_600"} <= names.keys()


@pytest.mark.parametrize("sampling", ["step_list", "uniform"])
def test_with_a_clean_context_all_blocks_are_noisy_and_see_the_clip(sampling):
    config = RegressionConfig(context="clean", timestep_sampling=sampling)
    latents = torch.randn(8, 4, 6, 2, 2)
    kwargs = {"seed": 0, "sample_numbers": range(8), "num_valid_frames": [6] * 8}
    batch = draw_noisy_batch(latents, config, [3, 3], **kwargs)
    assert batch.mask.all()
    assert batch.context_latents is latents
    assert batch.context_timesteps.tolist() == [0.0] * 8
    if sampling == "step_list":
        assert config.levels().tolist() == [1000, 757, 522]
        assert set(batch.timesteps.unique().tolist()) == {1000, 757, 522}


def test_an_augmented_context_has_noise_of_its_own_of_one_drawn_level_a_clip():
    config = RegressionConfig(context="augmented", context_noise=200)
    latents = torch.randn(64, 4, 6, 2, 2)
    kwargs = {"seed": 0, "sample_numbers": range(64), "num_valid_frames": [6] * 64}
    batch = draw_noisy_batch(latents, config, [3, 3], **kwargs)
    levels = batch.context_timesteps
    assert levels.shape == (64,)
    assert levels.mean().item() == pytest.approx(100, abs=25)
    assert 0 <= levels.min() < 20 < 180 < levels.max() <= 200
    sigmas = sigmas_from_timesteps(levels)
    without = add_noise(latents, torch.zeros_like(latents), sigmas)
    added = (batch.context_latents - without) / sigmas.view(-1, 1, 1, 1, 1)
    assert added.std().item() == pytest.approx(1, abs=0.05)
    assert torch.corrcoef(torch.stack([added.flatten(), batch.noise.flatten()]))[0, 1].abs() < 0.05
    same_noise = draw_noisy_batch(latents, RegressionConfig(context="clean"), [3, 3], **kwargs)
    assert torch.equal(same_noise.noisy_latents, batch.noisy_latents)


def test_students_of_continuous_levels_are_sampled_in_many_steps_and_others_at_their_list():
    assert RegressionConfig().inference_timesteps().tolist() == [1000, 757, 522]
    assert RegressionConfig().student_sampler == "renoise"
    many = RegressionConfig(timestep_sampling="uniform", num_inference_steps=4, timestep_shift=3.0)
    torch.testing.assert_close(many.inference_timesteps(), torch.tensor([1000.0, 900.0, 750.0, 500.0]))
    assert many.student_sampler == "euler"


def test_all_losses_go_with_all_weights_levels_and_contexts():
    choices = {
        "loss_type": ("mse", "l1", "huber"),
        "loss_space": ("latents", "velocity"),
        "loss_weighting": ("none", "bell", "min_snr"),
        "timestep_sampling": ("step_list", "uniform", "logit_normal"),
        "context": ("noisy", "clean", "augmented"),
    }
    for values in itertools.product(*choices.values()):
        config = RegressionConfig(**dict(zip(choices, values, strict=True)))
        weights = config.loss_weights(torch.tensor([[1.0, 0.757, 0.001]]))
        assert weights.isfinite().all()
        assert weights[0, 0] >= (1.0 if config.loss_weighting == "none" else config.min_loss_weight)
        assert config.describe().count(",") >= 2


def test_warping_acts_on_the_levels():
    config = RegressionConfig(denoising_step_list=(1000, 750, 500, 250), warp_denoising_step=True, timestep_shift=5)
    torch.testing.assert_close(config.levels(), torch.tensor([1000, 937.5, 833.3333, 625.0]))


def test_metrics_have_one_name_for_each_level_that_was_drawn():
    sums = torch.zeros(4, 6, dtype=torch.float64)
    sums[0] = torch.tensor([2.0, 4.0, 0.0, 2.0, 2.0, 6.0])
    sums[2] = torch.tensor([2.0, 8.0, 6.0, 20.0, 2.0, 4.0])
    assert summarize_levels(sums, LEVELS) == pytest.approx(
        {
            "target_latent_mean": 1.0,
            "target_latent_std": 1.5**0.5,
            "pred_latent_mean": 1.5,
            "pred_latent_std": 3.25**0.5,
            "loss_at_time_1000": 2.0,
            "pred_latent_std_at_time_1000": 1.0,
            "blur_gap_at_time_1000": -0.5,
            "loss_at_time_522": 4.0,
            "pred_latent_std_at_time_522": 1.0,
            "blur_gap_at_time_522": -4.0,
        }
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_step_list": (0,)}, "must begin with a timestep above 0"),
        ({"timestep_shift": 0.0}, r"timestep_shift must be in \[0\.001, 1000\], got 0\.0"),
        ({"timestep_shift": 1e-300}, "timestep_shift must be in"),  # all levels would be 0, and none ever drawn
        ({"logit_mean": -1000.0}, "far from 0 all levels are the same"),
        ({"num_frame_per_block": 0}, "num_frame_per_block must be 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps must be 1 or more"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"clean_block_probability": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"clean_block_probability": 0.1}, "put a 0 at the end of denoising_step_list"),
        ({"timestep_sampling": "uniform", "warp_denoising_step": True}, "leave it out: timestep_shift acts"),
        ({"context": "clean", "generator_task": "bidirectional_video"}, "use --context noisy or --generator_task"),
        (
            {"context": "clean", "timestep_sampling": "uniform", "clean_block_probability": 0.1},
            "all blocks have a clean past; use one or the other",
        ),
        ({"context": "augmented", "context_noise": 0.0}, "for none use --context clean"),
        ({"snr_gamma": 0.0}, "snr_gamma must be above 0"),
        ({"min_loss_weight": -1.0}, "min_loss_weight must be 0 or more"),
        ({"loss_weighting": "bell", "min_loss_weight": 0.0}, "the first step of sampling would never be learned"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RegressionConfig(**settings)


@pytest.mark.parametrize("context", ["noisy", "clean"])
@pytest.mark.parametrize("timestep_sampling", ["step_list", "uniform"])
@pytest.mark.parametrize("steps", [(1000, 500, 0), (1000, 500)])
def test_the_number_of_levels_is_that_of_the_levels(context, timestep_sampling, steps):
    method = RegressionConfig(context=context, timestep_sampling=timestep_sampling, denoising_step_list=steps)
    assert method.num_levels == len(method.levels())
