"""The example of prompts along the video: its data, and the figures by which it is judged."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, run_python

from causal_wan.tables.prompt_schedules import parse_prompt_schedule
from examples.conditioning import prompts_figures
from examples.conditioning.prompts_dataset import Config, choose_changes
from examples.sketch.make_dataset import FRAME_RATE, draw, prompt, write_mp4


MAKE = ROOT / "examples" / "conditioning" / "prompts_dataset.py"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    run_python(MAKE, "--output_dir", folder, "--num_clips", 4, "--num_heldout", 2)
    return folder


@pytest.fixture(scope="module")
def changes():
    return choose_changes(Config(output_dir="x", num_clips=4, num_heldout=2))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_have_the_prompts_of_the_two_colours_and_clips_that_change_at_that_second(drawn, changes):
    train, heldout = changes
    for name, expected in (("train", train), ("heldout", heldout)):
        for row, change in zip(rows(drawn / f"{name}.csv"), expected, strict=True):
            schedule = parse_prompt_schedule(row["prompt_schedule"])
            after = replace(change.sketch, colour=change.colour)
            assert schedule.prompts == (prompt(change.sketch), prompt(after))
            assert schedule.seconds == (0, change.second)
            clip = prompts_figures.read_video(drawn / "videos" / row["video"])
            colours = prompts_figures.nearest_colours(clip)
            first = int(np.ceil(change.second * FRAME_RATE))
            assert colours[first - 1] != colours[first]
            assert len(set(colours[first:])) == 1
    plain = [row["prompt"] for row in rows(drawn / "plain.csv")]
    assert plain == [prompt(change.sketch) for change in train]
    for row, change in zip(rows(drawn / "wrong.csv"), heldout, strict=True):
        (_, before), (_, after) = json.loads(row["prompt_schedule"])
        assert before == prompt(change.sketch)
        assert f" {change.other} " in after
        assert change.other not in (change.sketch.colour, change.colour)


def test_figures_tell_videos_that_follow_from_those_that_do_not(drawn, changes, tmp_path):
    heldout = list(prompts_figures.read_heldout(drawn))
    found = {}
    for name, colour in (("right", "colour"), ("wrong", "other"), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        for number, change in enumerate(changes[1]):
            sketch = change.sketch
            frames = draw(sketch) if colour is None else replace(change, colour=vars(change)[colour]).frames()
            write_mp4(frames, folder / f"{number:02d}.mp4")
        found[name] = [prompts_figures.measure(folder, heldout)]
    for name, figures in found.items():
        assert figures[0]["colour, before"] == 1
        for part in ("first block", "later"):
            assert figures[0][f"colour, {part}"] == (name == "right")
            assert figures[0][f"ink F1, {part}"] > 0.9
    table = prompts_figures.as_table(found | {"right": found["right"] * 2})
    assert "| right | 1.00 ± 0.00 |" in table
    assert "| wrong | 1.00 | 0.00 |" in table
