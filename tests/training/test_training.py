"""The loop on a model of two weights: it knows no video, so neither do these tests."""

import errno
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import fork_context
from line_fit import Line, Numbers, config, entries, kill_at_step, run_training

from causal_wan.records.checkpoints import check_output_dir, list_checkpoints


def test_loss_falls(tmp_path):
    training = config(tmp_path, max_train_steps=60)
    run_training(training)
    logged = entries(training)
    assert logged[-1]["generator_loss"] < 0.2 * logged[0]["generator_loss"]
    assert [entry["step"] for entry in logged][:3] == [3, 6, 9]


@pytest.mark.parametrize("use_ema", [False, True])
def test_resumed_run_equals_the_unbroken_one_to_the_last_bit(tmp_path, use_ema):
    unbroken = config(tmp_path / "unbroken", use_ema=use_ema)
    _, expected = run_training(unbroken)

    broken = config(tmp_path / "broken", use_ema=use_ema)
    with pytest.raises(KeyboardInterrupt):
        run_training(broken, validate=kill_at_step(5))
    assert [path.name for path in list_checkpoints(broken.output_dir)] == ["checkpoint-4"]
    resumed = replace(broken, resume_from_checkpoint="latest")
    run, result = run_training(resumed)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert run.state.num_samples == 32
    assert entries(resumed) == entries(unbroken)


@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_any_moment_change_nothing(tmp_path, num_kills):
    settings = {"max_train_steps": 8 * num_kills, "checkpointing_steps": 1, "use_ema": True}
    _, expected = run_training(config(tmp_path / "unbroken", checkpoints_total_limit=2, **settings))
    broken = config(tmp_path / "broken", checkpoints_total_limit=2, resume_from_checkpoint="latest", **settings)
    context, moments = fork_context(), random.Random(0)
    for _ in range(num_kills):
        before = list_checkpoints(broken.output_dir)[-1:]
        process = context.Process(target=run_training, args=(broken,))
        process.start()
        while process.is_alive() and list_checkpoints(broken.output_dir)[-1:] == before:
            time.sleep(0.001)  # until it has written a checkpoint
        time.sleep(moments.uniform(0, 0.05))  # some two checkpoints long
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert list_checkpoints(broken.output_dir)
    _, result = run_training(broken)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    assert not list(Path(broken.output_dir).glob("partial-*"))


def test_a_full_disk_is_reported_and_costs_nothing_but_the_checkpoint(tmp_path, monkeypatch, caplog):
    stock = Accelerator.save_state

    def save_state(self, output_dir):
        if output_dir.endswith("-4"):
            Path(output_dir).mkdir()
            (Path(output_dir) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(self, output_dir)

    monkeypatch.setattr(Accelerator, "save_state", save_state)
    training = config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1, max_train_steps=4)
    run, _ = run_training(training)
    assert run.state.step == 4
    assert [path.name for path in Path(training.output_dir).glob("*checkpoint*")] == ["checkpoint-2"]
    assert "could not be written (OSError: [Errno 28] No space left on device)" in caplog.text


def logged_steps(training):
    lines = (Path(training.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["validated"]) for entry in map(json.loads, lines) if "validated" in entry]


def note_weight(model, step):
    return {"validated": float(model.linear.weight)}, {}


def test_a_run_can_validate_before_its_first_step(tmp_path):
    training = config(tmp_path, validate_first=True, validation_steps=4, use_ema=True)
    run_training(training, validate=note_weight)
    (first, weight), *others = logged_steps(training)
    assert (first, weight) == (0, 0.5)  # as it is made
    assert [step for step, _ in others] == [4, 8]
    without = config(tmp_path / "without", validation_steps=4, use_ema=True)
    run_training(without, validate=note_weight)
    assert logged_steps(without) == others
    assert entries(without) == entries(training)


def test_the_first_validation_is_that_of_a_new_run_and_logged_once(tmp_path):
    training = config(tmp_path, validate_first=True, validation_steps=2, resume_from_checkpoint="latest")
    for _ in range(2):  # interrupted before there is a checkpoint, so the second time is a start anew
        with pytest.raises(KeyboardInterrupt):
            run_training(training, validate=lambda model, step: kill_at_step(2)(model, step) and note_weight(model, 0))
        assert logged_steps(training) == [(0, 0.5)]
    (Path(training.output_dir) / "metrics.jsonl").unlink()
    run_training(replace(training, max_train_steps=4), validate=note_weight)
    run_training(training, validate=note_weight)  # goes on from step 4
    assert [step for step, _ in logged_steps(training)] == [0, 2, 4, 6, 8]


def test_a_run_with_validation_steps_0_never_validates(tmp_path):
    validated = []
    training = config(tmp_path, validation_steps=0)
    run_training(training, validate=lambda model, step: validated.append(step) or ({}, {}))
    assert validated == []


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    # Masks make the two halves of a step unequal: a mean of means would differ.
    whole = config(tmp_path / "whole")
    halves = config(tmp_path / "halves", train_batch_size=2, gradient_accumulation_steps=2)
    _, expected = run_training(whole)
    _, result = run_training(halves)
    torch.testing.assert_close(result, expected)
    for a, b in zip(entries(halves), entries(whole), strict=True):
        assert a == pytest.approx(b)


def test_the_passes_of_a_step_are_prepared_as_their_batches_come(tmp_path, monkeypatch):
    read, waiting = [], []
    load = Numbers.__getitem__
    monkeypatch.setattr(Numbers, "__getitem__", lambda self, index: read.append(index) or load(self, index))
    passes = config(tmp_path, train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=2)
    run_training(passes, on_prepare=lambda batch: waiting.append(len(read) - len(waiting)))
    assert len(waiting) == 8
    assert set(waiting[:-1]) == {2}  # the batch itself, and the next one, which accelerate reads ahead


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    training = config(tmp_path)
    _, result = run_training(training, break_samples=(5.0,))
    assert all(torch.isfinite(parameter).all() for parameter in result)
    assert [entry["num_nonfinite_steps"] for entry in entries(training)] == [1, 0, 0]


def test_too_many_steps_that_are_not_finite_stop_the_run_and_leave_the_last_checkpoint(tmp_path):
    training = config(tmp_path, max_nonfinite_steps=3, max_train_steps=20)
    with pytest.raises(RuntimeError, match=r"3 steps in a row up to step 8 were not.*checkpoint-4"):
        run_training(training, break_samples=tuple(map(float, range(20, 100))))
    assert [path.name for path in list_checkpoints(training.output_dir)] == ["checkpoint-4"]


def test_old_checkpoints_go_when_the_new_one_is_complete(tmp_path):
    training = config(tmp_path, checkpointing_steps=2, checkpoints_total_limit=2)
    run_training(training)
    assert [path.name for path in list_checkpoints(training.output_dir)] == ["checkpoint-6", "checkpoint-8"]
    assert not list(Path(training.output_dir).glob("partial-*"))


def test_partial_checkpoints_are_not_taken_for_whole_ones(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "partial-checkpoint-12", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


def test_a_new_run_does_not_write_among_old_checkpoints(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-7; add --resume_from_checkpoint latest"):
        check_output_dir(tmp_path, None)
    check_output_dir(tmp_path / "new", "latest")
    with pytest.raises(ValueError, match=r"does not exist; .* has: checkpoint-7"):
        check_output_dir(tmp_path, "checkpoint-8")


def test_only_trainable_weights_are_stored_when_others_are_frozen(tmp_path, monkeypatch):
    original = Line.__init__

    def freeze(self):
        original(self)
        self.frozen = torch.nn.Linear(100, 100).requires_grad_(False)

    monkeypatch.setattr(Line, "__init__", freeze)
    training = config(tmp_path, max_train_steps=4)
    _, expected = run_training(training)
    checkpoint = Path(training.output_dir) / "checkpoint-4"
    assert (checkpoint / "trainable.safetensors").stat().st_size < 1000
    assert not (checkpoint / "model.safetensors").exists()
    _, result = run_training(replace(training, resume_from_checkpoint="latest"))
    assert all(torch.equal(a, b) for a, b in zip(result[:2], expected[:2], strict=True))


def test_ema_is_lent_to_the_model_and_taken_back(tmp_path):
    run, averaged = run_training(config(tmp_path, use_ema=True, ema_decay=0.9))
    own = [parameter.detach() for parameter in run.student.unwrapped_model.parameters()]
    assert not torch.equal(own[0], averaged[0])
    torch.testing.assert_close(averaged, [p.detach() for p in run.student.ema.shadow_params])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps must be 1 or more, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more, got -1.0; 0 leaves gradients as they are"),
        ({"seed": 2**32}, r"seed must be in \[0, 4294967295\], got 4294967296; numpy takes no other"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "use --lr_scheduler constant_with_warmup"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be 1 or more, got 0; the default is None"),
        ({"validation_steps": -1}, "validation_steps must be 0 or more, got -1; 0 is no validation"),
        ({"validation_steps": 0, "validate_first": True}, "validation_steps 0 for none; leave one out"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)
