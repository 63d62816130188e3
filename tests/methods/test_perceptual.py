"""The perceptual distance: its formula, where it is measured, and what learns from it."""

import math

import pytest
import torch

from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.perceptual import (
    Comparison,
    draw_crop,
    draw_crops,
    feature_distances,
    find_outliers,
    perceptual_sum,
    relative_errors,
)
from causal_wan.methods.settings import RegressionConfig


METHOD = RegressionConfig(num_frame_per_block=1)
MAX_TIMESTEP = 700.0


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy_batch(numbers, *, num_frames=6, size=(4, 6), num_valid=None, method=METHOD):
    return draw_noisy_batch(
        randn(len(numbers), 2, num_frames, *size),
        method,
        [1] * num_frames,
        seed=5,
        sample_numbers=numbers,
        num_valid_frames=num_valid or [num_frames] * len(numbers),
    )


def twice(latents):
    """Stands for a decoder of two depths, the second of which has two frames for each latent frame."""
    features = latents[:, :, 1:] + latents[:, :, :-1]  # causal: a frame and the one before
    return [features, features.repeat_interleave(2, dim=2) * 3]


def compare(noisy, numbers, features=twice, max_timestep=MAX_TIMESTEP):
    crops = draw_crops(noisy, seed=5, sample_numbers=numbers, max_timestep=max_timestep)
    return Comparison(crops, max_timestep, features)


# --- the formula -----------------------------------------------------------------------------------------------------


def kept_places(frame):
    """Of one channel and frame `(y, x)`, which places are neither outliers nor beside one, by going through them."""
    values = frame.flatten().tolist()
    mean = sum(values) / len(values)
    margin = 2 * math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    ordered, num_extreme = sorted(values), int(0.02 * len(values))
    least, most = ordered[num_extreme] - margin, ordered[-1 - num_extreme] + margin
    far = [(y, x) for y in range(len(frame)) for x in range(len(frame[0])) if not least <= frame[y, x] <= most]
    return [
        (y, x)
        for y in range(len(frame))
        for x in range(len(frame[0]))
        if all(max(abs(y - v), abs(x - u)) > 1 for v, u in far)
    ]


def reference_distance(predicted, target, sample, frame, num_frames):
    """Of one latent frame of one sample, by loops."""
    total, total_weight = 0.0, 0.0
    for depth, (p, t) in enumerate(zip(predicted, target, strict=True)):
        means = []
        for channel in t[sample]:
            kept = [float(values[place]) ** 2 for values in channel for place in kept_places(values)]
            means.append(sum(kept) / len(kept))
        least, k, errors = sorted(means)[(len(means) - 1) // 2], t.shape[2] // num_frames, []
        for step in range(frame * k, (frame + 1) * k):
            for channel, mean in enumerate(means):
                difference = (p - t)[sample, channel, step]
                places = kept_places(t[sample, channel, step])
                errors += [float(difference[place]) ** 2 / max(mean, least) for place in places]
        total += 0.5**depth * sum(errors) / len(errors)
        total_weight += 0.5**depth
    return total / total_weight


def test_distances_follow_the_formula_with_outliers_left_out():
    target = [randn(2, 3, 2, 7, 8), randn(2, 4, 4, 9, 10, seed=1)]
    target[0][1, 2, 1, 3, 4] = 40.0
    target[1][0, 1, 0, 0, 0] = -60.0
    assert sum(int(find_outliers(features).sum()) for features in target) == 9 + 4
    predicted = [features + 0.3 * randn(*features.shape, seed=2) for features in target]
    predicted[0][1, 2, 1, 3, 4] = -1e4  # where nobody looks
    found = feature_distances(predicted, target)
    assert found.shape == (2, 2)
    expected = [[reference_distance(predicted, target, sample, frame, 2) for frame in range(2)] for sample in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_equal_features_have_no_distance_and_others_the_same_whatever_their_scale():
    target = [randn(2, 3, 2, 5, 5), randn(2, 4, 4, 10, 10)]
    assert feature_distances(target, target).eq(0).all()
    predicted = [features + 0.1 * randn(*features.shape, seed=1) for features in target]
    scaled = [[100 * features for features in each] for each in (predicted, target)]
    torch.testing.assert_close(feature_distances(*scaled), feature_distances(predicted, target))


def test_no_channel_counts_for_being_large_nor_for_being_next_to_zero():
    """What is wrong by a tenth counts alike in all channels; one that vanishes counts as the middle one of them."""
    ones = torch.ones(1, 1, 2, 4, 4)
    target = torch.cat([ones, 1000 * ones, 5 * ones], dim=1)
    assert relative_errors(1.1 * target, target, 1).item() == pytest.approx(0.01, rel=0.4)
    vanishing = torch.cat([ones, ones, 1e-9 * ones], dim=1)
    assert relative_errors(vanishing + 0.1, vanishing, 1).item() == pytest.approx(0.01, rel=1e-4)


def test_flat_and_single_places_are_no_outliers_and_their_distance_is_finite():
    for features in (torch.zeros(1, 2, 2, 4, 4), torch.full((1, 2, 2, 4, 4), 3.0), torch.ones(1, 2, 2, 1, 1)):
        assert not find_outliers(features).any()
        assert torch.isfinite(feature_distances([features + 1], [features])).all()


def test_distances_are_float32_whatever_comes_in():
    features = [randn(1, 3, 2, 4, 4).bfloat16()]
    assert feature_distances(features, features).dtype == torch.float32


# --- where it is measured --------------------------------------------------------------------------------------------


def places(crops):
    return [(crop.frames, crop.rows, crop.columns, crop.weight) for crop in crops]


def test_crops_are_a_function_of_seed_and_sample_number():
    numbers = list(range(40))
    whole = compare(noisy_batch(numbers, num_frames=9, size=(40, 50)), numbers).crops
    parts = [compare(noisy_batch([n], num_frames=9, size=(40, 50)), [n]).crops for n in numbers]
    assert [place for part in parts for place in places(part)] == places(whole)
    assert len(set(map(str, places(whole)))) == len(whole) > 20


def test_crops_lie_inside_and_hold_a_frame_to_compare_that_is_not_their_first():
    numbers = list(range(200))
    noisy = noisy_batch(numbers, num_frames=9, size=(34, 5), num_valid=[2 + n % 8 for n in numbers])
    low = noisy.mask & (noisy.timesteps <= MAX_TIMESTEP)
    crops = compare(noisy, numbers).crops
    assert {crop.sample for crop in crops} == {n for n in numbers if low[n, 1:].any()}
    for crop in crops:
        assert crop.of(noisy.latents).shape == (2, 3, 32, 5)
        of_crop = low[crop.sample, crop.frames]
        assert of_crop[1:].any()
        assert crop.weight * of_crop[1:].sum() == pytest.approx(int(low[crop.sample, 1:].sum()))
    assert {crop.rows.start for crop in crops} == {0, 1, 2}
    assert {crop.frames.start for crop in crops} == set(range(7))


def test_each_frame_that_can_be_is_compared_and_about_as_often():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(3000):
        crop = draw_crop(generator, 0, [True] * 6, (6, 4, 4))
        counts[crop.frames.start + 1 : crop.frames.stop] += crop.weight / 5
    assert counts[0] == 0
    assert (counts[1:] / 3000).tolist() == pytest.approx([0.2] * 5, abs=0.06)
    clip_of_two = draw_crop(generator, 0, [False, True], (2, 4, 4))
    assert (clip_of_two.frames, clip_of_two.weight) == (slice(0, 2), 1.0)


# --- the term of the loss --------------------------------------------------------------------------------------------


def test_without_a_comparison_there_is_neither_a_term_nor_a_metric():
    noisy = noisy_batch([0])
    assert perceptual_sum(None, noisy, noisy.latents) == (0.0, {})


def test_a_batch_with_no_frame_to_compare_has_its_sums_all_the_same():
    noisy = noisy_batch([0, 1])
    total, sums = perceptual_sum(compare(noisy, [0, 1], max_timestep=100.0), noisy, noisy.latents + 1)
    assert total == 0
    assert sums["perceptual"].tolist() == [0, 0]


def test_equal_latents_have_a_term_of_zero():
    numbers = list(range(8))
    noisy = noisy_batch(numbers)
    total, sums = perceptual_sum(compare(noisy, numbers), noisy, noisy.latents.clone())
    assert total == 0
    assert sums["perceptual"][0] == 0 < sums["perceptual"][1]


def test_the_term_counts_all_frames_of_little_noise_but_the_first_whichever_are_drawn():
    """Wrong by as much everywhere, each frame has the same distance, that of 3 from 1."""

    def constant(latents):
        return [latents.mean(dim=(1, 3, 4), keepdim=True)[:, :, 1:].expand(-1, 4, -1, 3, 3)]

    numbers = list(range(30))
    noisy = noisy_batch(numbers)
    noisy.latents.fill_(1.0)
    comparison = compare(noisy, numbers, features=constant)
    total, sums = perceptual_sum(comparison, noisy, noisy.latents * 3)
    low = noisy.mask & (noisy.timesteps <= MAX_TIMESTEP)
    assert float(total) == pytest.approx(4.0 * int(low[:, 1:].sum()), rel=1e-5)
    distance, count = sums["perceptual"].tolist()
    assert distance / count == pytest.approx(4.0)
    parts = [
        perceptual_sum(Comparison([crop], MAX_TIMESTEP, constant), noisy, noisy.latents * 3)[0]
        for crop in comparison.crops
    ]
    assert float(sum(parts)) == pytest.approx(float(total), rel=1e-5)  # however samples are split


def test_only_frames_of_little_noise_inside_of_the_crops_learn():
    numbers = list(range(12))
    noisy = noisy_batch(numbers, num_frames=8, size=(36, 40), num_valid=[3 + n % 6 for n in numbers])
    comparison = compare(noisy, numbers)
    predicted = (noisy.latents + randn(*noisy.latents.shape, seed=1)).requires_grad_()
    total, _ = perceptual_sum(comparison, noisy, predicted)
    total.backward()
    assert torch.isfinite(predicted.grad).all()
    low = noisy.mask & (noisy.timesteps <= MAX_TIMESTEP)
    learns = torch.zeros_like(predicted, dtype=torch.bool)
    for crop in comparison.crops:
        crop.of(learns)[...] = low[crop.sample, crop.frames][None, :, None, None]
    assert predicted.grad[~learns].eq(0).all()
    per_crop = [crop.of(predicted.grad).abs().sum() for crop in comparison.crops]
    assert len(per_crop) > 6 and min(per_crop) > 0


def test_what_is_not_compared_may_be_anything():
    numbers = list(range(12))
    noisy = noisy_batch(numbers)
    low = (noisy.mask & (noisy.timesteps <= MAX_TIMESTEP))[:, None, :, None, None]
    predicted = torch.where(low, noisy.latents + 0.1, math.nan).requires_grad_()
    total, sums = perceptual_sum(compare(noisy, numbers), noisy, predicted)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(sums["perceptual"]).all()
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perceptual_weight": -1.0}, "perceptual_weight must be 0 or more"),
        ({"perceptual_max_timestep": 0.0}, r"perceptual_max_timestep must be in \(0, 1000\]"),
        ({"perceptual_weight": 1.0, "perceptual_max_timestep": 500.0}, "of the step list, 522, got 500"),
        (
            {
                **{"perceptual_weight": 1.0, "denoising_step_list": (1000, 500, 250), "warp_denoising_step": True},
                **{"timestep_shift": 5.0, "perceptual_max_timestep": 600.0},
            },
            "at least the lowest level above 0 of the step list, 625, got 600",
        ),
    ],
)
def test_settings_by_which_nothing_would_be_compared_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RegressionConfig(**settings)


def test_the_method_says_that_features_are_compared():
    assert "decoder" not in RegressionConfig().describe()
    RegressionConfig(perceptual_max_timestep=100.0)  # nothing is compared by it
    described = RegressionConfig(perceptual_weight=0.5, timestep_sampling="uniform").describe()
    assert described.endswith("mse of latents + 0.5 x decoder features up to timestep 700")
