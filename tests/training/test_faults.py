"""What goes wrong on a cluster or in a folder is said, and ends what it must end."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import SCRIPT_ENV, launch_afresh, run_python, run_script
from torch.utils.data import DataLoader

from causal_wan.blocks import CausalConfig
from causal_wan.data.buckets import order_samples
from causal_wan.data.clips import VideoDataset
from causal_wan.data.rows import load_rows
from causal_wan.data.samples import SampleStream
from causal_wan.data.settings import DataConfig
from causal_wan.data.workers import name_clips_of_dead_workers
from causal_wan.weights.parts import load_text_encoder, load_vae
from causal_wan.weights.transformer import load_transformer


SCRIPT = "train_video_regression.py"
SECRETS = {"HF_TOKEN": "hf_SecretOfTheUser", "WANDB_API_KEY": "SecretOfTheUser" + 25 * "0"}


@pytest.mark.parametrize("how", [pytest.param("raise", marks=pytest.mark.slow), "die"])
def test_a_process_that_breaks_brings_the_job_down_and_is_named(write_recipe, how):
    path, output_dir = write_recipe(train_batch_size=1, max_train_steps=1000, validation_steps=1000)
    start = time.monotonic()
    run = launch_afresh(SCRIPT, path, num_processes=2, wrapper=["tests/failing_rank.py", how], check=False)
    assert run.returncode != 0
    assert time.monotonic() - start < 120
    assert re.search(r"rank +: 1 ", run.stderr)
    assert ("this process broke on purpose" if how == "raise" else "Signal 9 (SIGKILL)") in run.stderr
    assert not (output_dir / "transformer").exists()


def data_config(clips, **changes):
    settings = {"num_frames": 17, "height": 32, "width": 48, **changes}
    return DataConfig(dataset_base_path=str(clips / "videos"), metadata_path=str(clips / "train.csv"), **settings)


class DeadlyDataset(VideoDataset):
    """Kills the process that decodes row 3."""

    def load(self, index, generator, shape):
        sample = super().load(index, generator, shape)
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return sample


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_decoding_process_that_dies_is_reported_with_its_clip(clips, num_workers):
    config = data_config(clips)
    rows = load_rows(config)
    dataset, order = DeadlyDataset(rows, config), order_samples(rows, config, seed=0, samples_per_step=1)
    stream = SampleStream(dataset, order, config, start=0, end=12)
    loader = DataLoader(stream, collate_fn=len, num_workers=num_workers)
    message = r"died at row \d+, .*/3\.mp4 \(DataLoader worker .*use fewer --dataloader_num_workers"
    with pytest.raises(RuntimeError, match=message), name_clips_of_dead_workers(dataset):
        list(loader)


def test_other_errors_than_a_death_come_through_unchanged(clips):
    config = data_config(clips)
    dataset = VideoDataset(load_rows(config), config)
    with pytest.raises(RuntimeError, match="of memory"), name_clips_of_dead_workers(dataset):
        raise RuntimeError("out of memory")


# --- configurations --------------------------------------------------------------------------------------------------


def answer_wizard(command, env, answers, timeout=120):
    """Runs a program in a terminal of its own, answers its questions, takes its suggestion where none is given."""
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.execvpe(command[0], command, env)
    shown, deadline = "", time.monotonic() + timeout
    unanswered = ""
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 0.5)
        if ready:
            try:
                text = os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                break
            shown, unanswered = shown + text, unanswered + text
        elif unanswered:  # it waits
            answer = next((answer for question, answer in answers.items() if question in unanswered), "")
            unanswered = ""
            os.write(terminal, answer.encode() + b"\r")
    _, status = os.waitpid(process_id, 0)
    assert status == 0, shown
    return shown


def test_the_file_that_the_wizard_of_accelerate_writes_launches(write_recipe, tmp_path):
    config_file = tmp_path / "wizard.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "config", "--config_file", str(config_file)]
    shown = answer_wizard(command, {**SCRIPT_ENV, "TERM": "xterm"}, {"on CPU only": "yes"})
    assert "compute environment" in shown
    assert yaml.safe_load(config_file.read_text())["use_cpu"] is True
    path, output_dir = write_recipe(max_train_steps=1)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    run_script([*launcher, SCRIPT, "--config", path])
    assert (output_dir / "transformer" / "config.json").exists()


# --- secrets and pickles ---------------------------------------------------------------------------------------------


def test_tokens_reach_no_file_and_no_output(write_recipe):
    """Of a run without a launcher, with a tracker."""
    path, output_dir = write_recipe(report_to="tensorboard", max_train_steps=2)
    run = run_python(SCRIPT, "--config", path, env=SECRETS)
    assert list((output_dir / "logs").rglob("events.out.*"))
    written = [file.read_bytes() for file in output_dir.rglob("*") if file.is_file()]
    for text in [run.stdout.encode(), run.stderr.encode(), *written]:
        assert b"SecretOfTheUser" not in text


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    ("part", "name", "load"),
    [
        (
            "transformer",
            "diffusion_pytorch_model.bin",
            lambda path: load_transformer(path, CausalConfig(num_frame_per_block=1)),
        ),
        ("vae", "diffusion_pytorch_model.bin", load_vae),
        ("text_encoder", "pytorch_model.bin", load_text_encoder),
    ],
    ids=["transformer", "vae", "text_encoder"],
)
def test_weights_in_pickles_are_not_loaded(checkpoint, tmp_path, part, name, load):
    subprocess.run(["cp", "-r", str(checkpoint), str(tmp_path / "checkpoint")], check=True)
    folder, sprung = tmp_path / "checkpoint" / part, tmp_path / "sprung"
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save({"weight": Trap(sprung)}, folder / name)
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path / "checkpoint"))
    assert not sprung.exists()
