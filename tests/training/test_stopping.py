"""Being told to stop: by Ctrl-C, by clusters, and what workers of data loaders make of it."""

import os
import signal
import time
from dataclasses import replace

import pytest
from line_fit import config, run_training
from torch.utils.data import DataLoader, Dataset

from causal_wan.data.workers import SIGNALS, worker_settings
from causal_wan.records.checkpoints import list_checkpoints


def signal_at_step(step, number=signal.SIGINT, times=1):
    def validate(model, now):
        for _ in range(times if now == step else 0):
            os.kill(os.getpid(), number)
        return {}, {}

    return validate


def test_ctrl_c_ends_a_run_after_its_step_with_a_checkpoint_from_which_it_goes_on(tmp_path, caplog):
    training = config(tmp_path, checkpointing_steps=100)
    run, _ = run_training(training, validate=signal_at_step(2))
    assert not run.is_complete
    assert [path.name for path in list_checkpoints(training.output_dir)] == [f"checkpoint-{run.state.step}"]
    assert run.state.step in (3, 4)
    assert "received SIGINT: stopping as soon as what is done can be kept; once more ends it at once" in caplog.text
    assert run_training(replace(training, resume_from_checkpoint="latest"))[0].is_complete


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    training = config(tmp_path, checkpointing_steps=100)
    with pytest.raises(KeyboardInterrupt):
        run_training(training, validate=signal_at_step(2, times=2))
    assert not list_checkpoints(training.output_dir)


class SignalledItems(Dataset):
    """Numbers; each first sends all signals to the process that it is made in."""

    def __len__(self):
        return 4

    def __getitem__(self, item):
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        return item


def test_signals_to_a_worker_of_a_data_loader_cost_no_clip():
    assert list(DataLoader(SignalledItems(), batch_size=None, **worker_settings(2, 60.0))) == [0, 1, 2, 3]


class Endless(Dataset):
    """Never brings what it is asked for; says in a file that it was asked."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, item):
        self.path.touch()
        time.sleep(1000)


def test_a_worker_that_hangs_does_not_outlive_its_loader(tmp_path):
    loader = iter(DataLoader(Endless(tmp_path / "asked"), batch_size=None, **worker_settings(1, 60.0)))
    while not (tmp_path / "asked").exists():
        time.sleep(0.01)
    (worker,) = loader._workers
    del loader  # asks it to end, and after 5 seconds tells it to
    worker.join(60)
    assert worker.exitcode == 0
