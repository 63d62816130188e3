"""What libraries say unasked does not reach who runs the scripts; what is meant for them does."""

import logging
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT_ENV

from causal_wan.library_messages import UNNEEDED, hold_back


# Scripts in one new process, since the libraries take seconds to load and say what they say while they do.
RUN_SCRIPTS = """
import sys
sys.path.insert(0, "tests")
from causal_wan.config.parsing import parse_config
import train_video_regression, generate
def run(script, *flags):
    script.main(parse_config(script.Config, flags))
recipe, student, video = sys.argv[1:]
run(train_video_regression, "--config", recipe, "--dry_run")
run(train_video_regression, "--config", recipe, "--max_train_steps", "1", "--lora_rank", "2")
run(generate, "--checkpoint", student, "--prompt", "a ball", "--output", video)
"""
OURS = (
    r"(checkpoint|data|clips|method|training|validation|result|memory)  |in validation: |"
    r"saved: |INFO |\d video\(s\): |"
    r".*mp4: first frames after |(steps|blocks): |"  # bars that show a loss, whatever the time
    r"(loading|embedding|writing|saving|handing) .* \.\.\.$"  # what takes long, on a busy machine
)


def test_a_dry_run_a_run_and_a_video_come_without_a_line_of_a_library(write_recipe, tmp_path):
    path, student = write_recipe()
    command = [sys.executable, "-c", RUN_SCRIPTS, path, student, tmp_path / "ball.mp4"]
    # No bar of loading gets as far as being shown: how long that takes is not what is tested.
    env = {**SCRIPT_ENV, "ACCELERATE_USE_CPU": "true", "TQDM_DELAY": "1000"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert [line for line in lines if not re.match(OURS, line)] == []
    assert sum(line.startswith("memory  ") for line in lines) == 2
    assert any(line.endswith("ball.mp4") for line in lines)


@pytest.fixture
def logger():
    """A logger of the libraries that the messages come from, as no other test has it."""
    name = "bitsandbytes.backends.cpu.ops"
    logger, filters = logging.getLogger(name), list(logging.getLogger(name).filters)
    logger.filters.clear()
    yield logger
    logger.filters[:] = filters


def test_of_a_library_only_the_message_that_is_of_no_use_is_dropped(logger, caplog):
    hold_back({})
    logger.warning(UNNEEDED[logger.name] + ": %s", "no kernels")
    logger.warning("Failed to load the library: %s", "libcudart.so")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load the library: libcudart.so"]


def test_deepspeed_says_which_device_it_trains_on_when_it_trains():
    filters = list(logging.getLogger("DeepSpeed").filters)
    hold_back({"ACCELERATE_USE_DEEPSPEED": "true"})
    assert logging.getLogger("DeepSpeed").filters == filters
    hold_back({})
    assert len(logging.getLogger("DeepSpeed").filters) == len(filters) + 1
    logging.getLogger("DeepSpeed").filters[:] = filters


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {"TQDM_DELAY": "2"}),
        ({"LOCAL_RANK": "0"}, {"TQDM_DELAY": "2"}),
        ({"LOCAL_RANK": "1"}, {"TQDM_DELAY": "2", "TQDM_DISABLE": "1"}),
        ({"TQDM_DELAY": "0"}, {"TQDM_DELAY": "0"}),
    ],
)
def test_bars_are_of_one_process_and_of_what_takes_long(environ, expected):
    environ = dict(environ)
    hold_back(environ)
    assert {name: value for name, value in environ.items() if name.startswith("TQDM")} == expected


@pytest.mark.parametrize(("rank", "num_bars"), [("0", 1), ("1", 0)])
def test_tqdm_heeds_what_is_set(rank, num_bars):
    code = (
        "import causal_wan; from tqdm.auto import tqdm; bar = tqdm(total=2, delay=0); bar.update(); bar.close();"
        "bar = tqdm(total=1); bar.update(); bar.close()"
    )
    env = {**SCRIPT_ENV, "LOCAL_RANK": rank}
    env.pop("TQDM_DELAY", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stderr.count("1/2") == num_bars
    assert "1/1" not in done.stderr
