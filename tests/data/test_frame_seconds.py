"""When the frames of a clip are shown in their file, by which prompts along it fall to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grey_videos import write_timed_video

from causal_wan.data.clips import shown_prompts
from causal_wan.data.frames import sample_frame_indices, sample_frame_seconds
from causal_wan.data.rows import Row, load_rows
from causal_wan.data.settings import DataConfig
from causal_wan.tables.prompt_schedules import PromptSchedule
from causal_wan.video.timing import read_frame_times


CHOICES = {
    "all of the clip": {},
    "a part of it": {"temporal_crop": 0.5},
    "the beginning": {"frame_sampling": "head", "frame_rate": 12.0},
    "any part": {"frame_sampling": "random", "frame_rate": 24.0},
    "a clip that is too short": {"frame_sampling": "head", "frame_rate": 3.0, "short_clips": "pad"},
}


def config(**changes):
    return DataConfig(**{"num_frames": 17, "height": 32, "width": 48, **changes})


@pytest.mark.parametrize("changes", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_the_seconds_are_those_of_the_frames_that_are_taken(changes, seed):
    settings = config(**changes)
    inputs = (61, 30.0, 17, settings)
    indices, _ = sample_frame_indices(*inputs, torch.Generator().manual_seed(seed))
    seconds = sample_frame_seconds(*inputs, torch.Generator().manual_seed(seed), is_even=True)
    torch.testing.assert_close(seconds, indices.double() / 30)


@pytest.mark.parametrize("changes", [{}, {"frame_sampling": "head"}, {"frame_sampling": "random"}])
def test_where_the_rate_varies_they_are_moments_at_which_the_file_shows_these_frames(changes, tmp_path):
    steps = [1, 1, 1, 6, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1]
    write_timed_video(tmp_path / "a.mkv", (np.cumsum([0, *steps]) * 64).tolist())
    (tmp_path / "t.csv").write_text("video,prompt\na.mkv,a\n")
    settings = config(
        dataset_base_path=str(tmp_path), metadata_path=str(tmp_path / "t.csv"), num_frames=9, frame_rate=8.0, **changes
    )
    (row,) = load_rows(settings)
    in_file = read_frame_times(row.video)

    def generator():
        return torch.Generator().manual_seed(1)

    inputs = (row.num_frames, row.frame_rate, 9, settings)
    indices, _ = sample_frame_indices(*inputs, generator(), times=in_file)
    seconds = sample_frame_seconds(*inputs, generator(), is_even=False).numpy()
    on_screen = np.searchsorted(in_file, seconds + 0.032, side="right") - 1  # the next within half an interval
    assert np.array_equal(on_screen, indices.numpy())
    change = int(indices[5])
    schedule = PromptSchedule((0.0, float(in_file[change]) - 0.032), ("a", "b"))
    (shown,) = shown_prompts(replace(row, prompts=(schedule,)), settings.shape, settings, generator())
    assert [prompt == "b" for prompt in shown] == (indices >= change).tolist()
    assert set(shown) == {"a", "b"}


def test_the_generator_is_left_as_it_is():
    generator = torch.Generator().manual_seed(0)
    row = Row(1, "a", (PromptSchedule((0.0, 1.0), ("a", "b")),), 61, 30.0, 32, 48)
    settings = config(frame_sampling="random")
    shown_prompts(row, settings.shape, settings, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
