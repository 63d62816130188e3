"""The script as users run it: under `accelerate launch`, on mp4 files and a WAN folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, SCRIPT_ENV, launch, run_here, run_python, run_script
from diffusers import WanPipeline, WanTransformer3DModel
from run_outputs import metrics, weights
from safetensors.torch import load_file

import train_video_regression
from causal_wan.config.parsing import parse_config
from causal_wan.runs import regression, validation
from causal_wan.training.stopping import EXIT_STOPPED


SCRIPT = "train_video_regression.py"


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """One whole run, looked at by several tests."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "run"), "use_ema": True}))
    launch(SCRIPT, path)
    return path, folder / "run"


def test_run_leaves_a_transformer_that_the_stock_pipeline_takes(finished, checkpoint):
    _, output_dir = finished
    transformer = WanTransformer3DModel.from_pretrained(output_dir / "transformer")
    pipeline = WanPipeline.from_pretrained(checkpoint, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline("a ball", num_frames=17, height=32, width=48, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 17, 3, 32, 48)
    assert torch.isfinite(video).all()


def test_run_logs_every_metric_that_is_promised(finished):
    logged = metrics(finished[1])
    training = [entry for entry in logged if "generator_loss" in entry]
    assert [entry["step"] for entry in training] == [1, 2, 3, 4]
    everything = set().union(*logged)
    for name in ("generator_loss", "generator_grad_norm", "lr", "num_bad_samples", "num_nonfinite_steps"):
        assert name in everything
    for name in ("target_latent_mean", "target_latent_std", "pred_latent_mean", "pred_latent_std"):
        assert name in everything
    for level in (1000, 757, 522):
        for name in ("loss_at_time", "pred_latent_std_at_time", "blur_gap_at_time", "validation_loss_at_time"):
            assert f"{name}_{level}" in everything
    raw = json.loads((finished[1] / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("seconds_per_step", "data_seconds_per_step", "compute_seconds_per_step"):
        assert raw[name] >= 0
    assert 0.1 < raw["peak_memory_gib"] < 10
    assert raw["latent_tokens_per_second"] > 0


def test_run_leaves_checkpoints_validation_videos_and_a_config_that_runs_again(finished, capsys):
    _, output_dir = finished
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert len(list((output_dir / "validation" / "step-000004").glob("*.mp4"))) == 2
    run_here(SCRIPT, "--config", output_dir / "config.yaml", "--dry_run", "--output_dir", output_dir / "again")
    assert "5 latent frames in 5 block(s) of 1" in capsys.readouterr().out


def test_a_killed_run_goes_on_to_the_same_numbers_to_the_last_bit(finished, write_recipe):
    path, output_dir = write_recipe(use_ema=True, resume_from_checkpoint="latest")
    command = [sys.executable, SCRIPT, "--config", path]
    process = subprocess.Popen(command, cwd=ROOT, env=SCRIPT_ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (output_dir / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output_dir / "transformer").exists()
    result = launch(SCRIPT, path)
    assert "resumed from" in result.stderr
    expected, resumed = weights(finished[1]), weights(output_dir)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics(output_dir) == metrics(finished[1])


def test_sigterm_to_one_of_two_processes_leaves_a_checkpoint_from_which_the_run_goes_on(write_recipe):
    common = {"train_batch_size": 1, "max_train_steps": 12, "checkpointing_steps": 100, "validation_steps": 100}
    path, unbroken = write_recipe("unbroken", **common)
    launch(SCRIPT, path, num_processes=2)
    path, output_dir = write_recipe("stopped", resume_from_checkpoint="latest", **common)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
    with subprocess.Popen([*command, "--config", path], cwd=ROOT, env=SCRIPT_ENV, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 200
        log = output_dir / "metrics.jsonl"
        while not (log.exists() and len(metrics(output_dir)) >= 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = subprocess.check_output(["pgrep", "--parent", str(process.pid)], text=True).split()
        os.kill(int(workers[-1]), signal.SIGTERM)
        errors = process.communicate()[1].decode()
    assert f"exitcode  : {EXIT_STOPPED}" in errors
    (checkpoint,) = output_dir.glob("checkpoint-*")
    assert int(checkpoint.name.removeprefix("checkpoint-")) < 12
    assert not (output_dir / "transformer").exists()
    launch(SCRIPT, path, num_processes=2)
    expected, resumed = weights(unbroken), weights(output_dir)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert metrics(output_dir) == metrics(unbroken)


def test_a_finished_run_is_not_overwritten(finished, capsys):
    path, output_dir = finished
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path)
    assert f"{output_dir} holds checkpoint-4; add --resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run in a folder of its own, and a recipe that resumes it."""
    path, output_dir = finished
    shutil.copytree(output_dir, tmp_path / "copied")
    recipe = yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path / "copied")}
    (tmp_path / "copied.yaml").write_text(yaml.safe_dump(recipe | {"resume_from_checkpoint": "latest"}))
    return tmp_path / "copied.yaml", tmp_path / "copied"


def test_what_differs_from_the_run_that_is_resumed_is_listed_and_taken(copied, capsys):
    path, output_dir = copied
    run_here(SCRIPT, "--config", path, "--max_train_steps", 5, "--learning_rate", 0.002, "--lr_scheduler", "constant")
    shown = capsys.readouterr().out
    assert f"resumes     {output_dir / 'checkpoint-4'}" in shown
    changed = [line.partition(" ")[2].strip() for line in shown.splitlines() if line.startswith("changed ")]
    assert changed == [
        "max_train_steps 4 -> 5 (taken: a schedule that falls is that of the new length)",
        "learning_rate 0.01 -> 0.002 (taken)",
        "lr_scheduler cosine -> constant (taken)",
    ]
    assert [entry["lr"] for entry in metrics(output_dir) if "lr" in entry][-1] == 0.002
    for folder in (output_dir, output_dir / "checkpoint-5"):
        assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 0.002


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize(
    ("flags", "recorded", "found"),
    [
        (["--lora_rank", "2"], "lora_rank was 0, got 2", "it trains all weights, this run LoRA adapters"),
        (["--optimizer", "adamw8bit"], "optimizer was adamw, got adamw8bit", "which was adamw, got adamw8bit"),
        (["--max_train_steps", "3"], "is at step 4, got 3", "is at step 4, got 3"),
    ],
)
def test_a_run_that_a_checkpoint_does_not_fit_is_refused_in_one_message_and_changes_nothing(
    copied, capsys, flags, is_recorded, recorded, found
):
    """Whether the checkpoint says how it was written, or its files must tell."""
    path, output_dir = copied
    if not is_recorded:
        for config in (output_dir / "config.yaml", *output_dir.glob("checkpoint-*/config.yaml")):
            config.unlink()
    before = {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match="2"):
        run_here(SCRIPT, "--config", path, "--no_use_ema", *flags)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (recorded if is_recorded else found) in message
    assert {file: file.read_bytes() for file in output_dir.rglob("*") if file.is_file()} == before


def test_adapters_of_another_rank_are_refused_in_one_message(write_recipe, capsys):
    path, output_dir = write_recipe(lora_rank=4, max_train_steps=2, validation_prompts=[], report_to="none")
    run_here(SCRIPT, "--config", path)
    (output_dir / "config.yaml").unlink()
    (output_dir / "checkpoint-2" / "config.yaml").unlink()
    with pytest.raises(SystemExit, match="2"):
        run_here(SCRIPT, "--config", path, "--resume_from_checkpoint", "latest", "--lora_rank", 8)
    assert "(4, 48) there, (8, 48) here. Use the --lora_rank" in capsys.readouterr().err


class BrokenParts:
    """What may fail in a validation, by name: (module, function, exception)."""

    DISK = (validation.VideoWriter, "write", OSError(28, "No space left on device"))
    DECODER = (validation, "decode_in_parts", torch.OutOfMemoryError("CUDA out of memory"))
    SAMPLING = (validation, "roll_out", torch.OutOfMemoryError("CUDA out of memory"))


@pytest.mark.parametrize("part", ["DISK", "DECODER", "SAMPLING"])
def test_a_validation_that_fails_is_reported_and_costs_the_run_nothing(
    finished, write_recipe, monkeypatch, caplog, part
):
    owner, name, error = getattr(BrokenParts, part)

    def fail(*given, **settings):
        raise error

    monkeypatch.setattr(owner, name, fail)
    path, output_dir = write_recipe(use_ema=True)
    run_here(SCRIPT, "--config", path)
    assert all(torch.equal(weights(output_dir)[name], value) for name, value in weights(finished[1]).items())
    *steps, failed = metrics(output_dir)
    *expected, whole = metrics(finished[1])
    assert steps == expected
    assert failed == whole | {"validation_failed": 2.0}
    assert f"validation/00 failed ({type(error).__name__}" in caplog.text
    assert not list((output_dir / "validation").rglob("*.mp4"))


def test_a_held_out_loss_that_fails_leaves_the_samples(write_recipe, monkeypatch, caplog):
    def fail(self, *given):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(validation.Validation, "sum_losses", fail)
    path, output_dir = write_recipe(max_train_steps=1)
    run_here(SCRIPT, "--config", path)
    assert metrics(output_dir)[-1] == {"step": 1, "validation_failed": 1.0}
    assert len(list((output_dir / "validation" / "step-000001").glob("*.mp4"))) == 2
    assert "the loss on held-out clips failed (RuntimeError: a kernel failed)" in caplog.text


def test_two_processes_and_accumulation_learn_the_same(write_recipe):
    losses = {}
    for name, processes, batch, accumulate in (("one", 1, 4, 1), ("two", 2, 2, 1), ("accumulate", 1, 2, 2)):
        path, output_dir = write_recipe(
            name, train_batch_size=batch, gradient_accumulation_steps=accumulate, max_train_steps=3, use_ema=True
        )
        if processes == 1:
            run_here(SCRIPT, "--config", path)
        else:
            launch(SCRIPT, path, num_processes=processes)
        losses[name] = [
            {key: entry[key] for key in ("generator_loss", "generator_grad_norm", "target_latent_std")}
            for entry in metrics(output_dir)
            if "generator_loss" in entry
        ]
        losses[name].append({"validation": metrics(output_dir)[-1]["validation_loss"]})
    for name in ("two", "accumulate"):
        for entry, expected in zip(losses[name], losses["one"], strict=True):
            assert entry == pytest.approx(expected, rel=2e-4)


def test_lora_trains_resumes_and_loads_in_the_stock_pipeline(write_recipe, checkpoint, capsys):
    lora = {"lora_rank": 2, "max_train_steps": 4, "cache_latents": True}
    path, output_dir = write_recipe("whole", **lora)
    run_here(SCRIPT, "--config", path)
    assert (output_dir / "checkpoint-4" / "trainable.safetensors").exists()
    file = output_dir / "pytorch_lora_weights.safetensors"

    path, resumed_dir = write_recipe("resumed", **{**lora, "resume_from_checkpoint": "latest"})
    (resumed_dir).mkdir()
    (output_dir / "checkpoint-2").rename(resumed_dir / "checkpoint-2")
    run_here(SCRIPT, "--config", path)
    expected, resumed = load_file(file), load_file(resumed_dir / file.name)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)

    pipeline = WanPipeline.from_pretrained(checkpoint)
    before = pipeline.transformer(torch.ones(1, 16, 1, 4, 6), torch.tensor([500.0]), torch.ones(1, 3, 16)).sample
    pipeline.load_lora_weights(output_dir)
    after = pipeline.transformer(torch.ones(1, 16, 1, 4, 6), torch.tensor([500.0]), torch.ones(1, 3, 16)).sample
    assert not torch.allclose(before, after)
    run_here("generate.py", "--checkpoint", output_dir, "--prompt", "a ball", "--output", output_dir / "x.mp4")
    assert "1 video(s)" in capsys.readouterr().out


def test_cached_latents_give_the_same_numbers(write_recipe):
    path, plain = write_recipe("plain", max_train_steps=2, train_batch_size=1)
    run_here(SCRIPT, "--config", path, "--dataloader_num_workers", 2)
    path, cached = write_recipe(
        "cached", max_train_steps=2, train_batch_size=1, cache_latents=True, latents_dtype="fp32"
    )
    run_here(SCRIPT, "--config", path)
    assert all(torch.equal(weights(plain)[name], value) for name, value in weights(cached).items())


def test_other_tasks_losses_and_optimizers_run(write_recipe, finished):
    path, output_dir = write_recipe(
        generator_task="bidirectional_video",
        denoising_step_list=[1000, 750, 500, 0],
        warp_denoising_step=True,
        timestep_shift=5.0,
        loss_type="huber",
        loss_space="velocity",
        max_train_steps=2,
        gradient_checkpointing=True,
        mixed_precision="bf16",
        generator_ckpt=str(finished[1]),
        report_to="all",
        short_clips="pad",
        frame_sampling="head",
        num_frames=21,
        train_batch_size=1,
        validation_steps=2,
    )
    trackers = {"WANDB_MODE": "offline", "WANDB_DIR": str(output_dir), "TRACKIO_DIR": str(output_dir / "trackio")}
    launch(SCRIPT, path, env=trackers)
    assert "loss_at_time_937.5" in set().union(*metrics(output_dir))
    config = json.loads((output_dir / "transformer" / "config.json").read_text())
    assert config["num_frame_per_block"] is None
    assert list((output_dir / "logs").rglob("events.out.*"))
    assert list((output_dir / "wandb").glob("offline-run-*"))
    assert list((output_dir / "trackio").rglob("*.db")) + list((output_dir / "trackio").rglob("*.parquet"))


def test_teacher_forcing_on_continuous_levels_trains_adapters_in_16_bits_and_says_so(write_recipe, capsys):
    path, output_dir = write_recipe(
        timestep_sampling="logit_normal",
        context="augmented",
        loss_space="velocity",
        loss_type="l1",
        loss_weighting="bell",
        num_inference_steps=2,
        independent_first_frame=True,
        num_frame_per_block=2,
        lora_rank=4,
        max_train_steps=2,
        validation_steps=2,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        latents_dtype="fp32",
    )
    run_here(SCRIPT, "--config", path)
    plan = capsys.readouterr().out
    assert "logit_normal levels with shift 5, augmented context, l1 of velocity with bell weights" in plan
    names = set().union(*metrics(output_dir))
    assert any(name.startswith("blur_gap_at_time_") and "_to_" in name for name in names)
    assert any(name.startswith("validation_loss_at_time_") and "_to_" in name for name in names)
    assert (output_dir / "pytorch_lora_weights.safetensors").exists()


LEVERS = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_interval": 2,
    "keep_attention_outputs": True,
    "offload_activations": True,
    "offload_vae": True,
}


def test_levers_that_round_nothing_learn_the_same(write_recipe, finished):
    path, output_dir = write_recipe(use_ema=True, **LEVERS)
    run_here(SCRIPT, "--config", path)
    assert metrics(output_dir) == metrics(finished[1])
    assert all(torch.equal(weights(output_dir)[name], value) for name, value in weights(finished[1]).items())


def test_levers_that_round_train(write_recipe):
    pytest.importorskip("bitsandbytes", reason="optional: pip install bitsandbytes")
    path, output_dir = write_recipe(
        lora_rank=4, quantize_base="fp8", optimizer="adamw8bit", vae_slicing=True, vae_tiling=True, **LEVERS
    )
    launch(SCRIPT, path, "--mixed_precision", "bf16", num_processes=2)
    assert (output_dir / "pytorch_lora_weights.safetensors").exists()


def test_keys_of_the_document_run_as_they_stand(clips, checkpoint, tmp_path):
    path = tmp_path / "wan_video_regression.yaml"
    path.write_text(
        f"""
# Data paths
dataset_base_path: "{clips / "videos"}"
metadata_path: "{clips / "train.csv"}"
# Video settings
num_frames: 17
height: 32
width: 48
time_division_factor: 4
# Training settings
batch_size: 1
lr: 1e-4
max_steps: 2
save_interval: 1
generator_task: "causal_video"
generator_ckpt: null
denoising_step_list: [1000, 757, 522, 0]
num_frame_per_block: 1
gradient_checkpointing: true
mixed_precision: true
num_workers: 1
# Added: a model and an output folder
pretrained_model_name_or_path: {checkpoint}
output_dir: {tmp_path / "run"}
"""
    )
    launch(SCRIPT, path)
    assert (tmp_path / "run" / "checkpoint-1").exists()
    assert (tmp_path / "run" / "transformer" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_frames", "16"], "num_frames must be 4k + 1 for the WAN VAE, got 16; use 13 or 17"),
        (["--num_frame_per_block", "2"], "use 4 or 6 latent frames (num_frames 13 or 21)"),
        (["--height", "40"], "use 32 or 48"),
        (["--metadata_path", "nowhere.csv"], "nowhere.csv"),
        (["--video_column", "file"], "video, prompt"),
        (["--generator_ckpt", "nowhere"], "which does not exist"),
        (["--resume_from_checkpoint", "checkpoint-9"], "does not exist"),
        (["--quantize_base", "nf4"], "add --lora_rank 64, or leave it out"),
        (["--offload_activations"], "add --gradient_checkpointing"),
        (["--gradient_checkpointing_interval", "0"], "must be 1 or more, got 0; the default is 1."),
        (["--lora_alpha", "0"], "lora_alpha must be above 0, got 0.0; the default is None."),
        (["--seed", "-1"], "seed must be in [0, 4294967295], got -1"),
        (["--cache_latents", "--frame_sampling", "random"], "--frame_sampling random makes each another"),
        (["--latents_dir", "x", "--horizontal_flip", "0.5"], "--horizontal_flip makes each another"),
        (["--denoising_step_list", "0", "500"], "must begin with a timestep above 0"),
        (["--context", "clean", "--generator_task", "bidirectional_video"], "use --context noisy or --generator_task"),
        (["--loss_weighting", "bell", "--min_loss_weight", "0"], "the first step of sampling would never be learned"),
        (["--timestep_sampling", "uniform", "--warp_denoising_step"], "leave it out: timestep_shift acts"),
        (["--validate_first", "--validation_metadata_path", "None"], "validate_first needs something to validate"),
        (["--validate_first", "--validation_steps", "0"], "validate_first asks for a validation"),
        (["--learning_rte", "1"], "--learning_rate"),
    ],
)
def test_bad_input_ends_with_one_message_before_anything_is_loaded(write_recipe, flags, message, capsys):
    path, output_dir = write_recipe(pretrained_model_name_or_path="no/such-model")
    with pytest.raises(SystemExit) as exit_info:
        train_video_regression.main(
            parse_config(train_video_regression.Config, ["--config", str(path), "--dry_run", *flags])
        )
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert not output_dir.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantize_base", "nf4", "--lora_rank", "4"], "nf4 needs a GPU, but there is none; use --quantize_base"),
        (["--quantize_base", "int8", "--lora_rank", "4"], "int8 needs a GPU, but there is none"),
        (["--optimizer", "adamw8bit"], "needs bitsandbytes; run `pip install bitsandbytes`"),
    ],
)
def test_what_the_machine_lacks_is_said_before_prompts_are_embedded(write_recipe, flags, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # not installed
    monkeypatch.setattr(regression, "embed_prompts", lambda *given, **named: pytest.fail("embedded"))
    path, _ = write_recipe()
    with pytest.raises(SystemExit) as exit_info:
        run_here("train_video_regression.py", "--config", path, *flags)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_without_validation_nothing_of_it_is_read_or_made(write_recipe, capsys):
    held_out = {"validation_metadata_path": "nowhere.csv", "validation_prompts": ["a ball"]}
    path, output_dir = write_recipe(max_train_steps=1, validation_steps=0, **held_out)
    run_here(SCRIPT, "--config", path)
    printed = capsys.readouterr().out
    assert "validation  none (--validation_steps 0)" in printed
    assert "validation 0.0" in printed
    assert not (output_dir / "validation").exists()
    assert (output_dir / "transformer").exists()
    assert not any("validation_loss" in entry for entry in metrics(output_dir))
    assert not list(output_dir.glob("cache"))


def test_a_run_that_validates_first_leaves_videos_and_losses_of_step_0(write_recipe, capsys):
    path, output_dir = write_recipe(max_train_steps=1, validate_first=True)
    run_here(SCRIPT, "--config", path)
    assert "before the first step, every 4 steps and at the end: 2 video(s)" in capsys.readouterr().out
    steps = [entry["step"] for entry in metrics(output_dir) if "validation_loss" in entry]
    assert steps == [0, 1]
    for step in steps:
        assert len(list((output_dir / "validation" / f"step-{step:06d}").glob("*.mp4"))) == 2


def test_clips_that_break_while_training_are_replaced_counted_and_stop_the_run_above_the_limit(
    write_recipe, clips, capsys
):
    """The last two rows pass the check, since their headers are whole, but have lost pictures."""
    folder = clips.parent / "broken"
    shutil.copytree(clips, folder, dirs_exist_ok=True)
    for name in ("4.mp4", "5.mp4"):
        content = bytearray((folder / "videos" / name).read_bytes())
        start = content.index(b"mdat") + 4
        end = content.index(b"moov") - 4 if content.index(b"moov") > start else len(content)
        middle = end - 200  # a first picture is left, or the check would see it
        content[middle:end] = bytes(end - middle)
        (folder / "videos" / name).write_bytes(content)
    changes = {"dataset_base_path": str(folder / "videos"), "metadata_path": str(folder / "train.csv")}
    path, output_dir = write_recipe("some", **changes)
    run_here(SCRIPT, "--config", path)
    assert "".join(capsys.readouterr()).count("replaced a clip that does not decode") == 2
    assert sum(entry.get("num_bad_samples", 0) for entry in metrics(output_dir)) >= 2
    path, output_dir = write_recipe("many", **changes, max_bad_samples=1)
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: at most max_bad_samples=1 clips may fail to decode, but 2 did, last: row ")


def test_help_is_grouped_by_owner():
    shown = run_python(SCRIPT, "--help").stdout
    for group in ("model", "memory", "data", "method", "training", "validation"):
        assert f"{group} options" in shown
    assert "--denoising_step_list" in shown


@pytest.mark.parametrize("name", ["wan_1.3b_full", "wan_1.3b_lora", "wan_5b_full", "wan_5b_lora", "wan_14b_lora"])
def test_recipes_for_the_real_models_dry_run(name, clips, tmp_path):
    flags = ["--dataset_base_path", clips / "videos", "--metadata_path", clips / "train.csv"]
    flags += ["--output_dir", tmp_path / "run", "--short_clips", "pad", "--dry_run"]
    result = run_python(SCRIPT, "--config", f"examples/{name}.yaml", *flags)
    blocks = "31 latent frames in 11 block(s) of 1 3" if "5b" in name else "21 latent frames in 7 block(s) of 3"
    assert blocks in result.stdout
    assert not (tmp_path / "run").exists()


def test_shell_script_of_the_document_dry_runs(clips, tmp_path):
    flags = ["--dataset_base_path", clips / "videos", "--metadata_path", clips / "train.csv", "--dry_run"]
    result = run_script(
        ["examples/run_video_training.sh", *flags, "--short_clips", "pad", "--output_dir", tmp_path / "run"],
        env={"NPROC_PER_NODE": "1", "ACCELERATE_CONFIG": "accelerate_configs/cpu.yaml"},
    )
    assert "wan" in result.stdout.lower()
