"""Runs that train more than one model, in turns: each has its own optimizer, schedule, average and files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from line_fit import Line, config, entries, kill_at_step, run_training

from causal_wan.records.checkpoint_checks import find_damage
from causal_wan.records.checkpoints import list_checkpoints


def turns(step):
    """The student in steps 1, 4 and 7, the critic in the five others of eight."""
    return ["critic" if step % 3 else "student"]


def run_two(training, **more):
    return run_training(training, roles=("student", "critic"), **{"turns": turns, **more})


def freeze_a_part(monkeypatch):
    original = Line.__init__

    def freeze(self):
        original(self)
        self.frozen = torch.nn.Linear(100, 100).requires_grad_(False)

    monkeypatch.setattr(Line, "__init__", freeze)


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run that trains two, with averages."""
    run_two(config(tmp_path, use_ema=True, max_train_steps=4))
    return tmp_path / "run" / "checkpoint-4"


@pytest.mark.parametrize("has_frozen_weights", [False, True])
def test_two_that_are_trained_in_turns_go_on_to_the_last_bit(tmp_path, monkeypatch, has_frozen_weights):
    if has_frozen_weights:
        freeze_a_part(monkeypatch)
    unbroken = config(tmp_path / "unbroken", use_ema=True, gradient_accumulation_steps=2)
    run, expected = run_two(unbroken)
    broken = replace(unbroken, output_dir=str(tmp_path / "broken" / "run"))
    with pytest.raises(KeyboardInterrupt):
        run_two(broken, validate=kill_at_step(5))
    assert [path.name for path in list_checkpoints(broken.output_dir)] == ["checkpoint-4"]
    weights = "trainable" if has_frozen_weights else "model"
    files = {path.name for path in (Path(broken.output_dir) / "checkpoint-4").iterdir()}
    assert {f"{weights}.safetensors", f"{weights}_1.safetensors", "optimizer_1.bin", "ema"} <= files
    assert "ema_1" not in files  # the average is of what the result is made of
    resumed, result = run_two(replace(broken, resume_from_checkpoint="latest"))
    own = [[trainee.unwrapped_model.linear.weight for trainee in each.trainees.values()] for each in (resumed, run)]
    assert all(torch.equal(a, b) for a, b in zip(own[0] + result[:2], own[1] + expected[:2], strict=True))
    assert entries(broken) == entries(unbroken)


def test_each_is_trained_in_its_turns_alone_and_logged_under_its_own_name(tmp_path):
    training = config(tmp_path, logging_steps=1)
    run, _ = run_two(training)
    steps = {role: trainee.optimizer.state_dict()["state"][0]["step"] for role, trainee in run.trainees.items()}
    assert steps == {"student": 3, "critic": 5}
    logged = entries(training)
    assert ["generator_loss" in entry for entry in logged] == ["student" in turns(step) for step in range(8)]
    assert ["critic_grad_norm" in entry for entry in logged] == ["critic" in turns(step) for step in range(8)]
    assert [entry["lr"] for entry in logged] == [entry["critic_lr"] for entry in logged]  # by the steps of the run
    assert logged[2]["critic_loss"] < logged[1]["critic_loss"]


def test_a_step_of_two_turns_trains_both_on_the_same_batch_and_counts_once(tmp_path):
    training = config(tmp_path, logging_steps=1, lr_scheduler="linear")
    run, _ = run_two(training, turns=lambda step: ("student", "critic") if step % 2 else ("critic",))
    steps = {role: trainee.optimizer.state_dict()["state"][0]["step"] for role, trainee in run.trainees.items()}
    assert steps == {"student": 4, "critic": 8}
    logged, one = entries(training), replace(training, output_dir=str(tmp_path / "one"))
    rates = [training.learning_rate * (1 - step / 8) for step in range(1, 9)]
    assert [entry["lr"] for entry in logged] == [entry["critic_lr"] for entry in logged] == pytest.approx(rates)
    run_training(one)
    counts = [entry["count"] for entry in entries(one)]
    assert [entry["count"] for entry in logged] == [count * (1 + step % 2) for step, count in enumerate(counts)]


def test_a_role_has_a_learning_rate_of_its_own_which_a_resumed_run_takes_from_its_settings(tmp_path):
    training = config(tmp_path, logging_steps=1, max_train_steps=4, lr_scheduler="constant")
    run_two(training, role_rates={"critic": 0.25 * training.learning_rate})
    assert {entry["critic_lr"] / entry["lr"] for entry in entries(training)} == {0.25}
    on = replace(training, max_train_steps=6, resume_from_checkpoint="latest")
    run_two(on, role_rates={"critic": 0.5 * training.learning_rate})
    assert [entry["critic_lr"] / entry["lr"] for entry in entries(on)] == [0.25] * 4 + [0.5] * 2


def test_a_loss_that_reaches_into_another_model_changes_it_in_no_turn(tmp_path, monkeypatch):
    _, expected = run_two(config(tmp_path / "apart"))
    lines, init, forward = [], Line.__init__, Line.forward

    def remember(self):
        init(self)
        lines.append(self)

    def reach(self, x):
        student, critic = lines
        seen = forward(critic, x)
        return forward(self, x) + (seen - seen.detach() if self is student else 0.0)

    monkeypatch.setattr(Line, "__init__", remember)
    monkeypatch.setattr(Line, "forward", reach)
    _, result = run_two(config(tmp_path / "reaching"))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_a_turn_that_is_not_finite_is_skipped_alone(tmp_path, caplog):
    both = {"turns": lambda step: ("student", "critic")}
    unbroken, _ = run_two(config(tmp_path / "unbroken"), **both)
    broken, _ = run_two(
        config(tmp_path / "broken", logging_steps=1),
        is_broken=lambda role, step: role == "student" and step == 3,
        **both,
    )
    steps = [trainee.optimizer.state_dict()["state"][0]["step"] for trainee in broken.trainees.values()]
    assert steps == [7, 8]
    own = [[each.unwrapped_model.linear.weight for each in run.trainees.values()] for run in (unbroken, broken)]
    assert not torch.equal(own[0][0], own[1][0])
    assert torch.equal(own[0][1], own[1][1])
    assert "step 4 skipped: the student's loss or gradient is not finite" in caplog.text


def test_a_role_that_is_never_finite_ends_the_run_though_the_other_is(tmp_path):
    training = config(tmp_path, max_nonfinite_steps=3, max_train_steps=20)
    with pytest.raises(RuntimeError, match="3 turns of the student in a row up to step 7 were not"):
        run_two(training, is_broken=lambda role, step: role == "student")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer_1.bin", "optimizer_1.bin is missing"),
        ("model_1.safetensors", "model_1.safetensors is damaged"),
        ("scheduler_1.bin", "scheduler_1.bin is missing"),
        ("ema/.metadata", "ema/.metadata is missing"),
    ],
)
def test_the_files_of_the_second_are_looked_at_too(checkpoint, name, damage):
    assert find_damage(checkpoint) is None
    (checkpoint / name).unlink()
    assert damage in find_damage(checkpoint)


def test_a_checkpoint_of_two_is_none_of_a_run_that_trains_one(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"must come from a run that trains 1 model\(s\), student, but holds 2"):
        run_training(config(tmp_path, max_train_steps=9, resume_from_checkpoint="latest"))


def test_a_checkpoint_of_one_is_called_as_ever(tmp_path):
    run_training(config(tmp_path, use_ema=True, max_train_steps=4))
    assert {path.name for path in (tmp_path / "run" / "checkpoint-4").iterdir()} == {
        *("model.safetensors", "optimizer.bin", "scheduler.bin", "ema", "random_states_0.pkl"),
        *("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"),
    }
