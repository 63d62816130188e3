"""Buckets and frames of clips, as functions of what is known of a file."""

from pathlib import Path

import pytest
import torch

from causal_wan.data.buckets import choose_bucket, clip_shapes, describe_shapes, order_samples
from causal_wan.data.frames import min_num_frames, num_sampleable_frames, sample_frame_indices
from causal_wan.data.rows import Row
from causal_wan.data.settings import DataConfig


def config(**changes):
    return DataConfig(**{"num_frames": 9, "height": 32, "width": 48, **changes})


def row(height=32, width=48, num_frames=100, frame_rate=16.0, source=0):
    return Row(1, Path("a"), ("a",), num_frames, frame_rate, height, width, source=source)


# --- frames ----------------------------------------------------------------------------------------------------------


def test_a_clip_needs_the_frames_of_the_shortest_bucket_or_of_the_longest_stage():
    assert min_num_frames(config()) == 9
    assert min_num_frames(config(frame_buckets=(49, 17))) == 17
    assert min_num_frames(config(frames_schedule="0:5,2:13,5:9")) == 13


def test_a_file_has_as_many_moments_as_frames_or_as_the_rate_gives():
    assert num_sampleable_frames(24, 30.0, config()) == 24
    at_rate = {"frame_sampling": "head", "frame_rate": 16.0}
    assert num_sampleable_frames(24, 16.0, config(**at_rate)) == 24
    assert num_sampleable_frames(24, 32.0, config(**at_rate)) == 12  # frame 23 is half a moment after the last one
    assert num_sampleable_frames(25, 32.0, config(**at_rate)) == 13
    assert num_sampleable_frames(1, 32.0, config(**at_rate)) == 1
    assert num_sampleable_frames(24, 8.0, config(**at_rate)) == 47
    assert 70 / 3.0 * 0.3 < 7  # as computers round, while it is 7
    assert num_sampleable_frames(71, 3.0, config(frame_sampling="random", frame_rate=0.3)) == 8


@pytest.mark.parametrize("sampling", ["uniform", "head", "random"])
def test_a_short_clip_is_padded_with_its_last_frame(sampling):
    indices, num_valid = sample_frame_indices(5, 16.0, 9, config(frame_sampling=sampling), torch.Generator())
    assert indices.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert indices.dtype == torch.int64
    assert num_valid == 5


def draws(count, num_frames, **settings):
    return torch.stack(
        [
            sample_frame_indices(num_frames, 16.0, 9, config(**settings), torch.Generator().manual_seed(seed))[0]
            for seed in range(count)
        ]
    )


def test_windows_of_a_temporal_crop_have_every_length_and_place_equally_often():
    indices = draws(1000, 1001, temporal_crop=0.6).double()
    lengths, starts = indices[:, -1] - indices[:, 0], indices[:, 0]
    assert 600 <= lengths.min() < 605 < 995 < lengths.max() <= 1000
    assert lengths.mean().item() == pytest.approx(800, abs=12)
    places = (starts / (1000 - lengths))[lengths < 950]
    assert -0.01 <= places.min() < 0.02 and 0.98 < places.max() <= 1.01
    assert places.mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.corrcoef(torch.stack([lengths[lengths < 950], places]))[0, 1].abs() < 0.1
    middle = (indices[:, 0] + indices[:, -1]) / 2
    assert (indices[:, 4] - middle).abs().max() <= 1  # evenly spread


def test_a_temporal_crop_shows_no_frame_twice():
    indices = draws(200, 11, temporal_crop=0.1)
    assert (indices.diff() >= 1).all()
    assert indices.min() == 0 and indices.max() == 10
    assert (indices[:, -1] - indices[:, 0]).min() == 8  # the 9 frames one after the other


def test_random_starts_are_equally_likely_up_to_the_last_that_fits():
    indices = draws(2000, 109, frame_sampling="random", frame_rate=8.0)
    assert (indices.diff() == 2).all()
    starts = indices[:, 0].double()
    assert starts.min() == 0 and starts.max() == 92
    assert starts.mean().item() == pytest.approx(46, abs=2)
    assert starts.std().item() == pytest.approx(92 / 12**0.5, abs=1)


def test_starts_and_windows_come_from_the_generator_that_is_given():
    r = torch.rand((), generator=torch.Generator().manual_seed(7), dtype=torch.float64).item()
    share, place = torch.rand(2, generator=torch.Generator().manual_seed(7), dtype=torch.float64).tolist()
    for seed in range(2):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(7)
        indices, _ = sample_frame_indices(10009, 16.0, 9, config(frame_sampling="random"), generator)
        assert indices[0].item() == round(10000 * r)
        generator = torch.Generator().manual_seed(7)
        indices, _ = sample_frame_indices(10001, 16.0, 9, config(temporal_crop=0.5), generator)
        start, window = place * (5000 - 5000 * share), 5000 + 5000 * share
        assert (indices[0].item(), indices[-1].item()) == (round(start), round(start + window))


def test_frames_of_very_long_files_are_the_right_ones():
    indices, _ = sample_frame_indices(100_000_002, 16.0, 9, config(), torch.Generator())
    assert indices[-1] == 100_000_001  # float32 has only even numbers there
    at_rate = config(frame_sampling="head", frame_rate=0.0011, num_frames=21)
    indices, _ = sample_frame_indices(100_000_000, 1000.0, 21, at_rate, torch.Generator())
    assert indices.tolist() == [round(moment * 1000 / 0.0011) for moment in range(21)]


def test_uniform_sampling_without_a_crop_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    sample_frame_indices(100, 16.0, 9, config(), generator)
    sample_frame_indices(100, 16.0, 9, config(frame_sampling="head"), generator)
    assert torch.equal(generator.get_state(), before)


# --- buckets ---------------------------------------------------------------------------------------------------------


def test_one_bucket_fits_all_and_of_two_the_second_may_fit_better():
    assert choose_bucket(row(), config()) == 0
    assert choose_bucket(row(48, 32), config(resolution_buckets=("32x48", "48x32"))) == 1


def test_frames_of_a_bucket_count_at_the_rate_of_the_samples():
    buckets = {"frame_buckets": (17, 49), "frame_sampling": "head", "frame_rate": 16.0}
    assert clip_shapes(row(num_frames=97, frame_rate=32.0), config(**buckets)) == [(49, 32, 48)]
    assert clip_shapes(row(num_frames=96, frame_rate=32.0), config(**buckets)) == [(17, 32, 48)]


def test_a_nearer_aspect_ratio_comes_before_more_pixels():
    sizes = {"resolution_buckets": ("640x800", "480x832")}
    assert clip_shapes(row(960, 1664), config(**sizes)) == [(9, 480, 832)]
    assert clip_shapes(row(960, 1200), config(**sizes)) == [(9, 640, 800)]


@pytest.mark.parametrize("sizes", [("80x160", "160x80"), ("160x80", "80x160")])
def test_of_buckets_that_fit_equally_well_the_first_is_taken(sizes):
    assert choose_bucket(row(100, 100), config(resolution_buckets=sizes)) == 0


def test_samples_are_ordered_by_bucket_and_source_of_their_rows():
    rows = [row(32, 48), row(48, 32), row(48, 32, source=1), row(32, 48, source=1)]
    order = order_samples(
        rows, config(resolution_buckets=("32x48", "48x32")), seed=3, samples_per_step=2, weights=[1, 0.5]
    )
    cells = [[cell.tolist() for cell in cells] for cells in order.cells]
    assert cells == [[[0], [3]], [[1], [2]]]
    assert order.seed == 3


def test_shapes_are_described_only_where_there_are_several():
    assert describe_shapes([row()], config()) == []


def test_buckets_are_described_with_their_clips():
    rows = [row(32, 48), row(48, 32, 10), row(32, 48, 10), row(32, 48)]
    settings = config(resolution_buckets=("32x48", "48x32"), frame_buckets=(9, 17))
    assert describe_shapes(rows, settings) == [
        "buckets     9 x 32 x 48: 1 clips, 9 x 48 x 32: 1 clips, 17 x 32 x 48: 2 clips, 17 x 48 x 32: 0 clips"
    ]


def test_buckets_of_a_schedule_are_described_by_their_last_shape():
    settings = config(resolution_buckets=("32x48", "48x32"), frames_schedule="0:5,1:9")
    buckets, schedule = describe_shapes([row()], settings)
    assert buckets == "buckets     9 x 32 x 48: 1 clips, 9 x 48 x 32: 0 clips"
    assert schedule == "schedule    frames: 5 from step 0, 9 from step 1"


def test_schedules_are_described_by_step():
    settings = config(frames_schedule="0:5,2:9", resolution_schedule="0:16x32,4:16x48,6:32x48")
    assert describe_shapes([row()], settings) == [
        "schedule    frames: 5 from step 0, 9 from step 2",
        "schedule    resolution: 16 x 32 from step 0, 16 x 48 from step 4, 32 x 48 from step 6",
    ]
