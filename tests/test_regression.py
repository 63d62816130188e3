import pytest
import torch

from causal_wan.regression import (
    RegressionConfig,
    draw_level_indices,
    draw_noisy_batch,
    num_valid_latent_frames,
    sample_generator,
    summarize_levels,
)
from causal_wan.sample_order import CLIP_STREAM, ORDER_STREAM, seeded_generator


LEVELS = torch.tensor([1000.0, 757.0, 522.0, 0.0])


def draws(block_lengths, count, num_valid=None, levels=LEVELS):
    num_valid = sum(block_lengths) if num_valid is None else num_valid
    return torch.stack(
        [draw_level_indices(sample_generator(0, n), levels, block_lengths, num_valid) for n in range(count)]
    )


def test_order_clips_and_noise_draw_from_streams_of_their_own():
    generators = [seeded_generator(0, stream, n) for stream in (ORDER_STREAM, CLIP_STREAM) for n in range(3)]
    generators += [sample_generator(0, n) for n in range(3)] + [sample_generator(1, 0)]
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


def test_draws_are_a_function_of_seed_and_sample_number():
    latents = torch.randn(3, 4, 6, 2, 2)
    kwargs = {"seed": 7, "num_valid_frames": [6, 6, 6]}
    together = draw_noisy_batch(latents, LEVELS, [3, 3], sample_numbers=[4, 5, 6], **kwargs)
    alone = draw_noisy_batch(latents[1:2], LEVELS, [3, 3], seed=7, sample_numbers=[5], num_valid_frames=[6])
    assert torch.equal(together.noisy_latents[1:2], alone.noisy_latents)
    other = draw_noisy_batch(latents, LEVELS, [3, 3], sample_numbers=[4, 5, 7], **kwargs)
    assert torch.equal(other.noise[:2], together.noise[:2])
    assert not torch.equal(other.noise[2], together.noise[2])


def test_clean_blocks_are_exactly_clean_and_do_not_count():
    latents = torch.randn(8, 4, 6, 2, 2)
    batch = draw_noisy_batch(latents, LEVELS, [3, 3], seed=0, sample_numbers=range(8), num_valid_frames=[6] * 7 + [4])
    clean = batch.timesteps == 0
    assert clean.any()
    assert torch.equal(batch.noisy_latents.movedim(2, 1)[clean], latents.movedim(2, 1)[clean])
    assert not batch.mask[clean].any()
    assert batch.mask[:7][~clean[:7]].all()
    assert not batch.mask[7, 4:].any()


def test_padding_counts_a_latent_frame_only_when_all_its_video_frames_are_real():
    assert [num_valid_latent_frames(frames) for frames in (1, 4, 5, 6, 8, 9, 81)] == [1, 1, 2, 2, 2, 3, 21]


def test_bidirectional_video_is_one_block():
    config = RegressionConfig(generator_task="bidirectional_video", denoising_step_list=(1000, 500))
    assert config.block_lengths(20) == [20]
    assert config.attention_block is None


def test_warping_acts_on_the_levels():
    config = RegressionConfig(denoising_step_list=(1000, 750, 500, 250), warp_denoising_step=True, timestep_shift=5)
    torch.testing.assert_close(config.levels(), torch.tensor([1000, 937.5, 833.3333, 625.0]))


def test_metrics_have_one_name_for_each_level_that_was_drawn():
    sums = torch.zeros(4, 6, dtype=torch.float64)
    sums[0] = torch.tensor([2.0, 4.0, 0.0, 2.0, 2.0, 6.0])
    metrics = summarize_levels(sums, LEVELS)
    assert metrics["loss_at_time_1000"] == 2.0
    assert "loss_at_time_757" not in metrics
    assert metrics["target_latent_mean"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_step_list": (0,)}, "must begin with a timestep above 0"),
        ({"timestep_shift": 0.0}, "timestep_shift must be above 0"),
        ({"num_frame_per_block": 0}, "num_frame_per_block must be 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RegressionConfig(**settings)
