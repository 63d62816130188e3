"""A run that goes on: with other settings, from a damaged checkpoint, after a validation that broke."""

import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import in_processes
from diffusers.training_utils import EMAModel
from line_fit import Line, config, entries, kill_at_step, run_training

from causal_wan.config import changed_settings
from causal_wan.config.changed_settings import compare_settings, read_settings
from causal_wan.config.fields import names_of
from causal_wan.records.checkpoint_checks import (
    check_optimizer,
    check_strategy,
    check_weights,
    find_damage,
    find_strategy,
)
from causal_wan.records.checkpoints import check_output_dir, find_checkpoint, list_checkpoints, save_checkpoint
from causal_wan.records.metrics import read_metrics, truncate_metrics
from causal_wan.runs.settings import RunConfig
from causal_wan.training.steps import ChangeCheck, step_optimizer


def resumed(training, **changes):
    return replace(training, resume_from_checkpoint="latest", **changes)


def weights(run):
    return [parameter.detach().clone() for parameter in run.student.unwrapped_model.parameters()]


# --- other settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_passes", "batch_size"), [(4, 1), (2, 2)])
def test_a_run_resumed_with_other_accumulation_learns_what_the_unbroken_one_does(tmp_path, num_passes, batch_size):
    _, expected = run_training(config(tmp_path / "unbroken", lr_scheduler="constant"))
    first = config(tmp_path / "broken", lr_scheduler="constant", max_train_steps=3, checkpointing_steps=3)
    run_training(first)
    changes = {"max_train_steps": 8, "gradient_accumulation_steps": num_passes, "train_batch_size": batch_size}
    _, result = run_training(resumed(first, **changes))
    torch.testing.assert_close(result, expected)


def test_changed_settings_of_the_optimizer_are_taken(tmp_path):
    first = config(tmp_path, max_train_steps=4)
    run_training(first)
    changes = {"learning_rate": 0.02, "adam_beta1": 0.5, "adam_weight_decay": 0.2, "adam_epsilon": 1e-6}
    run, _ = run_training(resumed(first, max_train_steps=6, lr_scheduler="constant", logging_steps=1, **changes))
    (group,) = run.student.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.02, (0.5, 0.999), 0.2, 1e-6)
    assert [entry["lr"] for entry in entries(first) if entry["step"] > 4] == [0.02, 0.02]


def test_a_changed_learning_rate_goes_on_along_the_schedule(tmp_path):
    unbroken = config(tmp_path / "unbroken", logging_steps=1)
    run_training(unbroken)
    first = config(tmp_path / "broken", logging_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run_training(first, validate=kill_at_step(5))
    run_training(resumed(first, learning_rate=0.5 * first.learning_rate))
    rates, expected = ([entry["lr"] for entry in entries(training)] for training in (first, unbroken))
    assert rates[4:] == pytest.approx([0.5 * rate for rate in expected[4:]])


def test_a_run_that_has_more_steps_than_are_asked_for_is_refused(tmp_path):
    first = config(tmp_path)
    run_training(first)
    with pytest.raises(ValueError, match=r"checkpoint-8 is at step 8, got 4; raise it, or resume an earlier"):
        run_training(resumed(first, max_train_steps=4))


def test_every_setting_that_is_not_just_taken_is_one():
    named = {*changed_settings.REFUSED, *changed_settings.OVERRIDDEN, *changed_settings.OVERRIDDEN_IF_ALL_WEIGHTS}
    assert named | {*changed_settings.REMARKS, *changed_settings.NOT_COMPARED} <= names_of(RunConfig)


def test_settings_that_differ_are_listed_with_what_becomes_of_them():
    before = {"learning_rate": 1e-4, "lora_rank": 0, "generator_ckpt": None, "run_name": None, "report_to": ["none"]}
    now = before | {"learning_rate": 2e-4, "generator_ckpt": "a.pt", "run_name": "new", "a_new_setting": 1}
    assert compare_settings(Path("run/checkpoint-2"), before, now) == [
        "learning_rate 0.0001 -> 0.0002 (taken)",
        "generator_ckpt None -> a.pt (overridden: the weights are the checkpoint's)",
        "run_name None -> new (overridden: a resumed run keeps its name)",
    ]
    assert compare_settings(Path("run/checkpoint-2"), before, before) == []
    with_lora = [settings | {"lora_rank": 4} for settings in (before, now)]
    assert "generator_ckpt None -> a.pt (taken: the frozen base comes from there)" in compare_settings(
        Path("run/checkpoint-2"), *with_lora
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"lora_rank was 4, got 8 \(the checkpoint holds weights of another shape\)"),
        ({"optimizer": "adamw8bit"}, r"optimizer was adamw, got adamw8bit \(the checkpoint holds the states"),
        ({"use_ema": True}, r"use_ema was False, got True \(the checkpoint holds no moving average\)"),
        ({"lora_rank": 0, "optimizer": "adamw8bit"}, "lora_rank was 4, got 0.*; optimizer was adamw, got adamw8bit"),
    ],
)
def test_settings_that_the_checkpoint_depends_on_are_refused(changes, message):
    before = {"lora_rank": 4, "optimizer": "adamw", "use_ema": False}
    with pytest.raises(ValueError, match=message):
        compare_settings(Path("run/checkpoint-2"), before, before | changes)
    compare_settings(Path("run/checkpoint-2"), before | {"use_ema": True}, before)  # the average is let go


def test_layers_of_adapters_may_be_named_in_any_order_and_mean_nothing_without_adapters():
    before, now = ({"lora_rank": 4, "lora_target_modules": names} for names in (["to_q", "to_k"], ["to_k", "to_q"]))
    assert "taken" in compare_settings(Path("run/checkpoint-2"), before, now)[0]
    with pytest.raises(ValueError, match="lora_target_modules was to_q to_k, got to_q"):
        compare_settings(Path("run/checkpoint-2"), before, now | {"lora_target_modules": ["to_q"]})
    before, now = ({"lora_rank": 0, "lora_target_modules": names} for names in (["to_q", "to_k"], ["to_q"]))
    compare_settings(Path("run/checkpoint-2"), before, now)


def test_a_run_in_another_folder_has_its_own_name():
    before, now = ({"run_name": name, "output_dir": "new"} for name in (None, "new"))
    assert compare_settings(Path("old/checkpoint-2"), before, now) == ["run_name None -> new (taken)"]
    assert "overridden" in compare_settings(Path("new/checkpoint-2"), before, now)[0]


def test_sums_of_other_settings_are_not_logged(tmp_path):
    first = config(tmp_path, max_train_steps=4, logging_steps=6)
    with pytest.raises(KeyboardInterrupt):
        run_training(
            replace(first, max_train_steps=6),
            settings={"denoising_step_list": [1000, 500, 0]},
            validate=kill_at_step(5),
        )
    for levels, first_sample in (([1000, 500, 0], 0), ([1000, 500], 16)):
        folder = tmp_path / f"{first_sample}"
        shutil.copytree(first.output_dir, folder)
        own = resumed(first, max_train_steps=6, output_dir=str(folder))
        run_training(own, settings={"denoising_step_list": levels})
        (entry,) = entries(own)
        assert entry["count"] == sum(number % 3 != 0 for number in range(first_sample, 24))


def test_a_checkpoint_has_the_settings_of_the_run_that_wrote_it(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    assert read_settings(checkpoint) is None
    (tmp_path / "config.yaml").write_text("lora_rank: 4")
    assert read_settings(checkpoint) == {"lora_rank": 4}
    (checkpoint / "config.yaml").write_text("lora_rank: 8")
    assert read_settings(checkpoint) == {"lora_rank": 8}
    (checkpoint / "config.yaml").write_text("{broken")
    assert read_settings(checkpoint) == {"lora_rank": 4}


# --- damaged checkpoints, and those of other runs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoint-4 and checkpoint-8, and a moving average."""
    training = config(tmp_path_factory.mktemp("finished"), use_ema=True)
    run_training(training)
    return training


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return replace(finished, output_dir=str(tmp_path / "run"))


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


DAMAGES = {
    "cut weights": ("model.safetensors", cut, "model.safetensors is damaged"),
    "empty weights": ("model.safetensors", lambda path: os.truncate(path, 0), "model.safetensors is damaged"),
    "no weights": ("model.safetensors", Path.unlink, "it has no weights"),
    "no optimizer": ("optimizer.bin", Path.unlink, "optimizer.bin is missing"),
    "cut optimizer": ("optimizer.bin", cut, "optimizer.bin is damaged"),
    "no schedule": ("scheduler.bin", Path.unlink, "scheduler.bin is missing"),
    "no counts": ("custom_checkpoint_1.pkl", Path.unlink, "custom_checkpoint_1.pkl is missing"),
    "cut counts": ("custom_checkpoint_0.pkl", cut, "custom_checkpoint_0.pkl is damaged"),
    "cut average": ("ema/__0_0.distcp", cut, "ema/__0_0.distcp is cut off"),
    "no average": ("ema/.metadata", Path.unlink, "ema/.metadata is missing"),
    "nothing": ("model.safetensors", empty, "it is empty"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(copied, caplog, name, damage, message):
    newest = Path(copied.output_dir) / "checkpoint-8"
    damage(newest / name)
    assert find_checkpoint("latest", copied.output_dir).name == "checkpoint-4"
    with pytest.raises(ValueError, match=f"checkpoint-8 must be a whole checkpoint.* {message}"):
        find_checkpoint("checkpoint-8", copied.output_dir)
    run, _ = run_training(resumed(copied, max_train_steps=5))
    assert run.state.step == 5
    assert f"passed over and set aside: checkpoint-8: {message}" in caplog.text
    assert [path.name for path in list_checkpoints(copied.output_dir)] == ["checkpoint-4", "checkpoint-5"]
    assert (newest.parent / "set-aside-checkpoint-8").is_dir()


def test_with_no_whole_checkpoint_nothing_is_started_among_the_damaged_ones(copied):
    for checkpoint in list_checkpoints(copied.output_dir):
        (checkpoint / "optimizer.bin").unlink()
    with pytest.raises(ValueError, match=r"none is \(checkpoint-4: optimizer.bin is missing; checkpoint-8"):
        find_checkpoint("latest", copied.output_dir)


def test_an_output_folder_is_no_checkpoint(copied):
    with pytest.raises(ValueError, match=r"the output folder of a run; its newest checkpoint is .*checkpoint-8"):
        find_checkpoint(copied.output_dir, copied.output_dir)


def test_a_file_that_only_looks_whole_is_one_message(copied):
    path = Path(copied.output_dir) / "checkpoint-8" / "custom_checkpoint_0.pkl"
    torch.save("what no run has", path)
    with pytest.raises(ValueError, match=r"checkpoint-8 must be a whole checkpoint of the same run, but could not be"):
        run_training(resumed(copied, max_train_steps=9))


@pytest.mark.parametrize("part", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_damage_of_sharded_checkpoints_is_found(tmp_path, part):
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"weight": torch.ones(1000)}, checkpoint_id=tmp_path / name, no_dist=True)
    for name in ("scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        torch.save({}, tmp_path / name)
    assert (find_strategy(tmp_path), find_damage(tmp_path)) == ("FSDP2", None)
    (shard,) = (tmp_path / part).glob("*.distcp")
    cut(shard)
    assert find_damage(tmp_path) == f"{part}/{shard.name} is cut off"
    shard.unlink()
    assert find_damage(tmp_path) == f"{part}/{shard.name} is missing"
    (tmp_path / part / ".metadata").write_bytes(b"no pickle")
    assert find_damage(tmp_path).startswith(f"{part}/.metadata is damaged")


def test_damage_of_deepspeeds_checkpoints_is_found(tmp_path):
    folder = tmp_path / "pytorch_model"
    folder.mkdir()
    for name in ("scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        torch.save({}, tmp_path / name)
    torch.save({}, folder / "mp_rank_00_model_states.pt")
    assert find_damage(tmp_path) == "pytorch_model/*_optim_states.pt is missing"
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert (find_strategy(tmp_path), find_damage(tmp_path)) == ("DeepSpeed", None)
    cut(folder / "mp_rank_00_model_states.pt")
    assert "mp_rank_00_model_states.pt is damaged" in find_damage(tmp_path)


@pytest.mark.parametrize(
    ("strategy", "fits"),
    [(DistributedType.MULTI_GPU, True), (DistributedType.NO, True), (DistributedType.FSDP, False)],
)
def test_a_checkpoint_of_another_strategy_is_refused(finished, strategy, fits):
    checkpoint, accelerator = list_checkpoints(finished.output_dir)[-1], SimpleNamespace(distributed_type=strategy)
    if fits:
        check_strategy(checkpoint, accelerator)
        return
    with pytest.raises(ValueError, match=r"that wrote it, one process or DDP, but this run is launched with FSDP2"):
        check_strategy(checkpoint, accelerator)


def test_weights_of_another_run_are_refused_by_name_and_shape(finished):
    checkpoint = list_checkpoints(finished.output_dir)[-1]
    trainable = dict(Line().named_parameters())
    check_weights(checkpoint, trainable)
    with pytest.raises(ValueError, match=r"linear\.weight: \(1, 1\) there, \(2, 1\) here"):
        check_weights(checkpoint, trainable | {"linear.weight": torch.empty(2, 1)})
    with pytest.raises(ValueError, match="it trains all weights, this run LoRA adapters"):
        check_weights(checkpoint, {"linear.lora_A.default.weight": torch.empty(2, 1)})


def test_states_of_another_optimizer_are_refused(finished, tmp_path):
    checkpoint = list_checkpoints(finished.output_dir)[-1]
    check_optimizer(checkpoint, "adamw")
    with pytest.raises(ValueError, match="the same optimizer, which was adamw, got adamw8bit"):
        check_optimizer(checkpoint, "adamw8bit")
    for nesting in (lambda state: state, lambda state: {"__bnb_optimizer_quant_state__": state}):
        states = {"state": {0: nesting({"state1": torch.zeros(1)})}, "param_groups": []}
        torch.save(states, tmp_path / "optimizer.bin")
        with pytest.raises(ValueError, match="the same optimizer, which was adamw8bit, got adamw"):
            check_optimizer(tmp_path, "adamw")
    torch.save("no states", tmp_path / "optimizer.bin")
    with pytest.raises(ValueError, match=r"its optimizer\.bin is damaged"):
        check_optimizer(tmp_path, "adamw")


def test_a_run_that_goes_on_from_an_earlier_checkpoint_keeps_its_own(copied, caplog):
    changes = {"max_train_steps": 7, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    run_training(replace(copied, resume_from_checkpoint="checkpoint-4", **changes))
    assert [path.name for path in list_checkpoints(copied.output_dir)] == ["checkpoint-7"]
    assert "set aside: checkpoint-8: whole, but newer" in caplog.text


def test_what_only_has_the_name_of_a_checkpoint_is_none(copied):
    (Path(copied.output_dir) / "checkpoint-99").write_text("a file")
    (Path(copied.output_dir) / "checkpoint-²").mkdir()
    assert find_checkpoint("latest", copied.output_dir).name == "checkpoint-8"
    with pytest.raises(ValueError, match="which is a file"):
        find_checkpoint("checkpoint-99", copied.output_dir)
    with pytest.raises(ValueError, match=r"output_dir must be a folder, but .* is a file"):
        check_output_dir(Path(copied.output_dir) / "checkpoint-99", None)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(copied, monkeypatch):
    stock = Path.iterdir

    def iterdir(self):
        if self.name == "checkpoint-8":
            raise PermissionError(13, "Permission denied")
        return stock(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert find_checkpoint("latest", copied.output_dir).name == "checkpoint-4"


def test_an_average_that_is_not_there_or_does_not_load_is_one_message(copied):
    newest = Path(copied.output_dir) / "checkpoint-8"
    shard = newest / "ema" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="checkpoint-8 must be a whole checkpoint of the same run, but could not be"):
        run_training(resumed(copied, max_train_steps=9))
    shutil.rmtree(newest / "ema")
    with pytest.raises(ValueError, match="checkpoint-8 must come from a run with use_ema"):
        run_training(resumed(copied, max_train_steps=9))


def save_on_a_full_disk(rank, folder):
    """Of the main process alone, which writes the checkpoint, as DDP does it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    ema = EMAModel(Line().parameters())

    def save_state(folder):
        if rank == 0:
            raise OSError(28, "No space left on device")

    accelerator.save_state = save_state
    save_checkpoint(accelerator, folder, 4, averages=[ema], total_limit=None)
    return [path.name for path in Path(folder).iterdir()]


def test_one_process_whose_disk_is_full_keeps_no_other_waiting(tmp_path):
    assert in_processes(save_on_a_full_disk, tmp_path, backend="gloo") == [[], []]


# --- validation, after what is worth keeping -------------------------------------------------------------------------


def test_checkpoint_and_result_are_written_before_a_validation_that_ends_the_run(tmp_path):
    training, saved = config(tmp_path, max_train_steps=4), []
    with pytest.raises(KeyboardInterrupt):
        run_training(training, validate=kill_at_step(4), save_result=lambda: saved.append("result"))
    assert [path.name for path in list_checkpoints(training.output_dir)] == ["checkpoint-4"]
    assert saved == ["result"]


def test_a_result_that_was_not_saved_is_saved_when_the_run_goes_on(tmp_path):
    training, saved = config(tmp_path, max_train_steps=4), []

    def save_result():
        saved.append("result")
        if len(saved) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(training, save_result=save_result)
    run_training(resumed(training), save_result=save_result)
    assert saved == 2 * ["result"]


def test_a_validation_in_which_the_run_died_is_not_tried_again(tmp_path, caplog):
    training = config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_training(training, validate=kill_at_step(4))
    seen = []
    run_training(resumed(training), validate=lambda model, step: seen.append(step) or ({}, {}))
    assert seen == [5, 6, 7, 8]
    assert "the validation of step 4 is left out: the run ended in it" in caplog.text


def test_a_validation_that_a_stop_prevented_comes_first_when_the_run_goes_on(tmp_path):
    unbroken, stopped = config(tmp_path / "unbroken"), config(tmp_path / "stopped")
    logged = {}
    for training in (unbroken, stopped):
        seen = logged[training.output_dir] = []

        def validate(model, step, seen=seen, stops=training is stopped):
            seen.append(step)
            if stops and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"validation_loss": float(step)}, {}

        run, _ = run_training(training, validate=validate)
    assert run.state.step == 3
    run_training(resumed(stopped), validate=validate)
    assert logged[stopped.output_dir] == logged[unbroken.output_dir] == list(range(1, 9))
    lines = [(Path(training.output_dir) / "metrics.jsonl").read_text() for training in (unbroken, stopped)]
    steps = [[json.loads(line)["step"] for line in text.splitlines()] for text in lines]
    assert steps[0] == steps[1]


def test_a_metrics_file_whose_last_line_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    training = config(tmp_path, logging_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run_training(training, validate=kill_at_step(6))
    path = Path(training.output_dir) / "metrics.jsonl"
    cut(path)
    before = path.read_text().splitlines()[:-1]
    run_training(resumed(training))
    lines = path.read_text().splitlines()
    assert lines[: len(before)] == before
    assert json.loads(lines[-1])["step"] == 8


def test_a_disk_that_is_full_when_a_run_goes_on_leaves_the_metrics_as_they_are(tmp_path, monkeypatch):
    training = config(tmp_path)
    run_training(training)
    path = Path(training.output_dir) / "metrics.jsonl"
    before, stock = path.read_text(), Path.write_text

    def write_text(self, text, *given, **settings):
        if "metrics" in self.name:
            stock(self, "", *given, **settings)
            raise OSError(28, "No space left on device")
        return stock(self, text, *given, **settings)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="No space left"):
        truncate_metrics(path, last_step=4)
    assert path.read_text() == before


@pytest.mark.parametrize("line", ["5", "null", "[1]", "{}", '{"step": "a"}', "\udce9"])
def test_lines_of_a_metrics_file_that_are_no_entries_are_passed_over(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + line.encode(errors="surrogateescape") + b'\n{"step": 2}\n')
    truncate_metrics(path, last_step=1)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n'


def test_what_follows_a_line_that_was_cut_off_is_not_lost(tmp_path, monkeypatch):
    training, stock, full = config(tmp_path, logging_steps=1), Path.open, []

    class FullDisk(io.TextIOWrapper):
        def write(self, text):
            super().write(text[: len(text) // 2])
            raise OSError(28, "No space left on device")

    def open_(self, mode="r", **settings):
        if self.name == "metrics.jsonl" and mode == "a" and self.exists():
            with stock(self) as file:
                if len(file.readlines()) == 2 and not full:
                    full.append(True)
                    return FullDisk(stock(self, "ab"))
        return stock(self, mode, **settings)

    monkeypatch.setattr(Path, "open", open_)
    run_training(training)
    monkeypatch.undo()
    logged = [entry["step"] for entry in read_metrics(Path(training.output_dir) / "metrics.jsonl")]
    assert logged == [1, 2, 4, 5, 6, 7, 8]


def test_a_marker_that_cannot_be_read_or_removed_ends_no_run(tmp_path, monkeypatch):
    training = config(tmp_path, validation_steps=4)
    run_training(replace(training, max_train_steps=4))
    (Path(training.output_dir) / "validation-begun").write_bytes(b"\xff\xfe")

    def refuse(self, **settings):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    run, _ = run_training(resumed(training), validate=lambda model, step: ({}, {}))
    assert run.state.step == 8


def test_a_run_that_is_told_to_stop_in_its_last_steps_owes_its_validation(tmp_path):
    training, seen = config(tmp_path, max_train_steps=3, validation_steps=2), []

    def validate(model, step):
        seen.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}, {}

    assert not run_training(training, validate=validate)[0].is_complete
    assert seen == [2]
    assert run_training(resumed(training), validate=validate)[0].is_complete
    assert seen == [2, 3]


# --- steps that are none ---------------------------------------------------------------------------------------------


def test_steps_that_change_no_weight_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "forward", lambda self, x: 0 * self.linear(x))
    training = config(tmp_path, adam_weight_decay=0.0)
    with pytest.raises(RuntimeError, match="step 1 was taken and changed none of them"):
        run_training(training)
    assert not list_checkpoints(training.output_dir)


def test_a_warm_up_that_begins_at_0_is_no_step_that_changes_nothing(tmp_path):
    run, _ = run_training(config(tmp_path, lr_scheduler="constant_with_warmup", lr_warmup_steps=4))
    assert run.student.num_checked == ChangeCheck.NUM_STEPS


class HalfPrecision:
    """Gives an accelerator on the CPU what it has under float16 on a GPU: a scaler of losses, which it uses."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, accelerator):
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=4.0), True
        self.monkeypatch.setitem(accelerator.state._shared_state, "_mixed_precision", "fp16")


def test_steps_that_float16s_scaler_skips_are_noticed(tmp_path, monkeypatch):
    training = config(tmp_path)
    _, result = run_training(training, break_samples=(5.0,), change=HalfPrecision(monkeypatch))
    assert all(torch.isfinite(parameter).all() for parameter in result)
    assert [entry["num_nonfinite_steps"] for entry in entries(training)] == [1, 0, 0]
    assert all(torch.isfinite(torch.tensor(entry["generator_grad_norm"])) for entry in entries(training))
    training = config(tmp_path / "broken", max_nonfinite_steps=3, max_train_steps=20)
    with pytest.raises(RuntimeError, match="3 steps in a row up to step 8 were not"):
        run_training(training, break_samples=tuple(map(float, range(20, 100))), change=HalfPrecision(monkeypatch))


def test_a_run_goes_on_in_float16(tmp_path, monkeypatch):
    first = config(tmp_path, max_train_steps=4)
    run_training(first)
    run, _ = run_training(resumed(first, max_train_steps=6), change=HalfPrecision(monkeypatch))
    assert run.state.step == 6
    assert run.accelerator.scaler is not None


def test_offloaded_weights_hear_of_gradients_that_are_not_finite_where_they_are():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), float("nan"))
    optimizer, seen = torch.optim.AdamW([parameter], fused=True), []
    optimizer.register_step_pre_hook(lambda optimizer, *given: seen.append(optimizer.found_inf.device.type))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, scaler=None, device=torch.device("meta"))
    prepared = SimpleNamespace(optimizer=optimizer, step=optimizer.step)
    assert not step_optimizer(accelerator, prepared, parameter.grad.norm())
    assert seen == ["cpu"]
    assert torch.equal(parameter.detach(), torch.ones(2))
