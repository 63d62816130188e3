import math

import pytest
import torch

from causal_wan.evaluation.video_metrics import (
    border_flicker,
    by_block,
    first_frames_of_blocks,
    frame_changes,
    frame_jolts,
    frame_psnr,
    frame_sharpness,
    frame_ssim,
)


def noise(num_frames=9, height=32, width=48, seed=0):
    return torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def blurred(video):
    return torch.nn.functional.avg_pool2d(video, 3, stride=1, padding=1, count_include_pad=False)


def ramp(num_frames=33, slope=0.01):
    """Every pixel rises evenly."""
    return (slope * torch.arange(num_frames)).view(-1, 1, 1, 1).expand(-1, 3, 32, 48).clone()


def test_likeness_is_that_of_the_formula_and_greatest_for_equal_videos():
    video = noise()
    assert frame_psnr(video, video).tolist() == [100.0] * 9
    torch.testing.assert_close(frame_ssim(video, video), torch.ones(9))
    shifted = (video * 0.5) + 0.1
    expected = -10 * torch.log10((shifted - video).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(frame_psnr(shifted, video), expected)
    assert (frame_ssim(shifted, video) < 1).all()


def test_one_frame_is_enough():
    assert frame_ssim(noise(1), noise(1, seed=1)).shape == (1,)


def test_blur_shows_in_sharpness_though_psnr_may_like_it():
    target = blurred(noise(seed=1)) + 0.05 * noise(seed=2)
    soft, other = blurred(target), (target + 0.4 * (noise(seed=3) - 0.5)).clamp(0, 1)
    assert frame_psnr(soft, target).mean() > frame_psnr(other, target).mean()
    assert frame_sharpness(soft).mean() / frame_sharpness(target).mean() < 0.5
    assert frame_sharpness(other).mean() / frame_sharpness(target).mean() > 1


def test_motion_is_the_mean_change_and_even_motion_does_not_jolt():
    torch.testing.assert_close(frame_changes(ramp()), torch.full((32,), 0.01))
    torch.testing.assert_close(frame_jolts(ramp()), torch.zeros(31), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "starts"),
    [([3] * 7, [0, 9, 21, 33, 45, 57, 69]), ([1, 3, 3], [0, 1, 13]), ([5], [0]), ([1] * 5, [0, 1, 5, 9, 13])],
)
def test_blocks_begin_at_the_video_frame_of_their_first_latent_frame(lengths, starts):
    assert first_frames_of_blocks(lengths) == starts
    last = 1 + 4 * (sum(lengths) - 1)
    assert starts[-1] < last


def test_a_jump_between_blocks_is_flicker_and_one_inside_is_not():
    starts = first_frames_of_blocks([3, 3, 3])  # 0, 9, 21 of 33 frames
    still = ramp() + 0.001 * noise(33)
    jump, inside = still.clone(), still.clone()
    jump[9:21] += 0.2
    inside[15:18] += 0.2
    assert border_flicker(still, starts) == pytest.approx(1, abs=0.1)
    assert border_flicker(jump, starts) > 10
    assert border_flicker(inside, starts) < 0.2
    assert math.isnan(border_flicker(still, [0]))
    assert math.isnan(border_flicker(torch.zeros(33, 3, 16, 16), starts))


def test_values_are_averaged_over_each_block():
    assert by_block(torch.arange(9.0), [0, 1, 5]) == [0.0, 2.5, 6.5]


def test_videos_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"got \(9, 3, 32, 48\) and \(5, 3, 32, 48\)"):
        frame_psnr(noise(9), noise(5))
