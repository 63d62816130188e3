"""Training on clips of several shapes, sources and captions: processes stay in step, resuming stays exact."""

import csv
import shutil

import pytest
import torch
import yaml
from conftest import launch, run_here, write_clip
from safetensors.torch import load_file

from outputs import metrics, weights


SCRIPT = "train_video_regression.py"


@pytest.fixture(scope="module")
def mixed(clips, tmp_path_factory):
    """The clips and four that are upright, two of them short; two columns of captions."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(clips / "videos", folder / "videos")
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt", "short"])
        for seed in range(6):
            writer.writerow([f"{seed}.mp4", f"a ball, number {seed}, crosses the field", "a ball"])
        for seed in range(4):
            write_clip(folder / "videos" / f"tall{seed}.mp4", seed, 17 if seed % 2 else 9, height=48, width=32)
            writer.writerow([f"tall{seed}.mp4", "a tall ball", ""])
    return {
        "dataset_base_path": str(folder / "videos"),
        "metadata_path": str(folder / "train.csv"),
        "caption_column": ["prompt", "short"],
        "caption_dropout": 0.2,
        "validation_metadata_path": None,
        "lr_scheduler": "constant",
        "max_train_steps": 6,
        "train_batch_size": 4,
    }


BUCKETS = {"resolution_buckets": ["32x48", "48x32"], "frame_buckets": [9, 17]}
STAGES = {"frames_schedule": "0:9,3:17", "resolution_schedule": "0:16x32,2:32x48", "short_clips": "skip"}
VARIED = {"temporal_crop": 0.7, "horizontal_flip": 0.5, "color_jitter": [0.1, 0.1, 0.1, 0.02]}


def check_resume(write_recipe, **settings):
    """A run that goes on from step 2 ends as the whole one, to the last bit."""
    path, whole = write_recipe("whole", **settings)
    run_here(SCRIPT, "--config", path)
    path, resumed = write_recipe("resumed", **settings, resume_from_checkpoint="latest")
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", resumed)
    run_here(SCRIPT, "--config", path)
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())
    assert metrics(resumed) == metrics(whole)


@pytest.mark.parametrize("settings", [BUCKETS | VARIED, STAGES], ids=["buckets", "schedule"])
def test_a_run_of_several_shapes_goes_on_from_a_checkpoint_to_the_last_bit(write_recipe, mixed, settings):
    check_resume(write_recipe, **mixed, **settings)


def test_a_mix_of_tables_trains_by_weight_and_goes_on_exactly(write_recipe, mixed, clips, tmp_path, capsys):
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for seed in range(2):
        write_clip(pairs / f"{seed}.mp4", seed=50 + seed)
        (pairs / f"{seed}.txt").write_text(f"a ball of the pair {seed}")
    tables = [
        {"metadata_path": mixed["metadata_path"], "dataset_base_path": mixed["dataset_base_path"], "weight": 1},
        {"metadata_path": "pairs", "weight": 3},
    ]
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump(tables))
    settings = {**mixed, "metadata_path": None, "dataset_base_path": None, "caption_column": "prompt"}
    settings |= {"dataset_config": str(tmp_path / "tables.yaml"), "short_clips": "skip", "cache_latents": True}
    check_resume(write_recipe, **settings)
    assert "10 clips" in capsys.readouterr().out


def test_two_processes_take_steps_of_the_same_shapes_as_one(write_recipe, mixed):
    losses = {}
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        path, output_dir = write_recipe(name, **{**mixed, **BUCKETS, **VARIED, "train_batch_size": batch})
        if processes == 1:
            run_here(SCRIPT, "--config", path)
        else:
            launch(SCRIPT, path, num_processes=2)
        losses[name] = [entry["generator_loss"] for entry in metrics(output_dir) if "generator_loss" in entry]
        assert load_file(output_dir / "transformer" / "diffusion_pytorch_model.safetensors")
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)


def test_the_plan_counts_buckets_and_stages(write_recipe, mixed, capsys):
    path, _ = write_recipe(**mixed, **BUCKETS)
    run_here(SCRIPT, "--config", path, "--dry_run")
    shown = capsys.readouterr().out
    assert "9 x 32 x 48: 0 clips, 9 x 48 x 32: 2 clips, 17 x 32 x 48: 6 clips, 17 x 48 x 32: 2 clips" in shown
    path, _ = write_recipe(**mixed, **STAGES)
    run_here(SCRIPT, "--config", path, "--dry_run")
    shown = capsys.readouterr().out
    assert "frames: 9 from step 0, 17 from step 3" in shown
    assert "resolution: 16 x 32 from step 0, 32 x 48 from step 2" in shown


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_run_goes_on_from_a_checkpoint_to_the_last_bit(write_recipe, tars, num_workers):
    check_resume(write_recipe, **tars, dataloader_num_workers=num_workers)


def test_two_processes_stream_and_resume(write_recipe, tars):
    settings = {**tars, "train_batch_size": 1, "max_train_steps": 4}
    path, whole = write_recipe("whole", **settings)
    launch(SCRIPT, path, num_processes=2)
    path, resumed = write_recipe("resumed", **settings, resume_from_checkpoint="latest")
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    launch(SCRIPT, path, num_processes=2)
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution_buckets": ["32x48", "48x32"]}, "--streaming does not go with buckets"),
        ({"cache_latents": True}, "latents of a stream are not kept"),
        ({"video_column": "mov"}, "mov"),
        ({"num_frames": 81, "frames_schedule": None}, "must be a clip that can be used, but"),
    ],
)
def test_streams_that_cannot_work_are_refused_before_anything_is_loaded(write_recipe, tars, changes, message, capsys):
    path, _ = write_recipe(**{**tars, **changes})
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path, "--dry_run")
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
