"""Profiles of steps: which steps are traced, what their parts take, and runs that go on whatever happens."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import launch, run_here
from PIL import Image

from causal_wan.config.settings import TrainingConfig


PARTS = {"data", "encode and noise", "forward", "backward", "optimizer", "communication (within the others)"}

SMALL = {"num_frames": 5, "validation_metadata_path": None}  # traces are long


def traced_steps(path):
    """How often the optimizer's part is in a trace."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "optimizer" and event.get("cat") == "user_annotation" for event in events)


def test_chosen_steps_are_traced_and_split_into_parts(write_recipe):
    path, output_dir = write_recipe(**SMALL, max_train_steps=4, gradient_accumulation_steps=2, profile=[2, 3])
    run_here("train_video_regression.py", "--config", path)
    assert traced_steps(output_dir / "profile" / "trace-0.json.gz") == 2
    parts = json.loads((output_dir / "profile" / "step.json").read_text())
    assert set(parts) == PARTS
    assert all(seconds > 0 for name, seconds in parts.items() if "within" not in name)
    assert Image.open(output_dir / "profile" / "step.png").width > 400


def test_a_resumed_run_profiles_what_is_left_of_the_steps(write_recipe):
    path, output_dir = write_recipe(**SMALL, max_train_steps=4, checkpointing_steps=2)
    run_here("train_video_regression.py", "--config", path, "--max_train_steps", 2)
    run_here(
        "train_video_regression.py", "--config", path, "--resume_from_checkpoint", "latest", "--profile", "1", "3"
    )
    assert traced_steps(output_dir / "profile" / "trace-0.json.gz") == 1


def test_every_process_leaves_a_trace_and_communication_is_measured(write_recipe):
    path, output_dir = write_recipe(**SMALL, max_train_steps=3)
    launch("train_video_regression.py", path, "--profile", 2, 3, num_processes=2)
    assert {file.name for file in (output_dir / "profile").iterdir()} == {
        *("trace-0.json.gz", "trace-1.json.gz", "step.json", "step.png")
    }
    assert json.loads((output_dir / "profile" / "step.json").read_text())["communication (within the others)"] > 0


def test_a_profile_that_cannot_be_written_costs_the_run_nothing(write_recipe, caplog):
    path, output_dir = write_recipe(**SMALL, max_train_steps=2, profile=[1, 1])
    Path(output_dir).mkdir()
    (output_dir / "profile").write_text("a file where the folder should be")
    run_here("train_video_regression.py", "--config", path)
    assert "the profile could not be written" in caplog.text
    assert (output_dir / "transformer" / "config.json").is_file()


@pytest.mark.parametrize(
    ("steps", "message"),
    [((0, 1), "each of profile must be 1 or more"), ((3, 2), "a first and a last"), ((9, 11), "a first and a last")],
)
def test_steps_that_there_are_not_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(output_dir="", max_train_steps=10, profile=steps)
