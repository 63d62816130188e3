"""evaluate.py as users run it, on a plain diffusers folder and on a run."""

import csv
import json
import math
import re

import pytest
import torch
import torchvision
from conftest import run_here

from causal_wan.evaluation import learned_metrics
from causal_wan.evaluation.figures import measure
from causal_wan.evaluation.heldout_loss import summarize_heldout_loss
from causal_wan.evaluation.video_metrics import first_frames_of_blocks


SCRIPT = "evaluate.py"


@pytest.fixture
def flags(checkpoint, clips, tmp_path):
    with (tmp_path / "heldout.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt"])
        writer.writerow(["6.mp4", "a ball <script>alert(1)</script>"])
        writer.writerow(["7.mp4", "a ball"])
    size = ["--num_frames", 17, "--height", 32, "--width", 48, "--num_frame_per_block", 1]
    data = ["--metadata_path", tmp_path / "heldout.csv", "--dataset_base_path", clips / "videos"]
    output = ["--output_dir", tmp_path / "evaluation", "--lpips_net", None]
    return ["--checkpoint", checkpoint, *data, *size, *output]


def test_student_and_base_are_measured_against_the_clips_and_shown_beside_them(flags, tmp_path, capsys, caplog):
    table = tmp_path / "heldout.csv"
    table.write_text(table.read_text().rstrip() + " rolls" * 600 + "\n")
    run_here(SCRIPT, *flags, "--num_base_steps", 2, "--guidance_scale", 1)
    assert "1 of 2 prompt(s) are cut at max_sequence_length=512 tokens" in caplog.text
    assert "student   psnr" in capsys.readouterr().out
    folder = tmp_path / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == [1, 2]
    for name in ("student", "base"):
        figures = metrics[name]
        assert len(figures["samples"]) == 2
        assert {len(curve) for curve in figures["by_block"].values()} == {5}
        for key in ("psnr", "ssim", "sharpness_ratio", "motion_ratio", "frames_per_second"):
            expected = sum(sample[key] for sample in figures["samples"]) / 2
            assert figures["mean"][key] == pytest.approx(expected)
    assert metrics["student"]["mean"]["first_block_seconds"] > 0
    assert metrics["student"]["mean"]["lpips"] is None
    assert metrics["notes"] == []
    levels = metrics["heldout_loss"]["by_level"]
    assert [level["timestep"] for level in levels] == [1000, 757, 522]
    assert all(level["loss"] is None or level["loss"] > 0 for level in levels)
    assert len(list((folder / "videos").glob("*.mp4"))) == 6
    page = (folder / "report.html").read_text()
    assert page.count('src="data:video/mp4;base64,') == 6
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_clip_compared_with_itself_is_perfect():
    clip = torch.rand(17, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    starts = first_frames_of_blocks([1, 2, 2])
    means = measure([(clip, {})], [clip], ["a ball"], starts)["mean"]
    assert (means["psnr"], means["sharpness_ratio"], means["motion_ratio"]) == (100.0, 1.0, 1.0)
    assert means["ssim"] == pytest.approx(1)
    assert math.isnan(means["lpips"])


def test_networks_of_others_measure_where_they_are(flags, tmp_path, clip_folder, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(learned_metrics, "HF_HUB_OFFLINE", True)
    networks = ["--lpips_net", "alex", "--clip_model", clip_folder, "--num_clip_frames", 2]
    run_here(SCRIPT, *flags, *networks, "--num_samples", 1)
    path = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    assert str(path) in capsys.readouterr().out
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert str(path) in metrics["notes"][0]
    assert metrics["student"]["mean"]["lpips"] is None
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.alexnet().state_dict(), path)
    run_here(SCRIPT, *flags, *networks, "--num_samples", 1)
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["notes"] == []
    assert metrics["student"]["mean"]["lpips"] > 0
    assert len(metrics["student"]["by_block"]["lpips"]) == 5
    assert -100 < metrics["student"]["mean"]["clip_score"] < 100
    assert metrics["clips"]["mean"]["clip_score"] != metrics["student"]["mean"]["clip_score"]
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "LPIPS by block" in page
    assert "CLIP score" in page


OBJECTIVES = {
    "step list": {},
    "continuous levels, teacher forcing": {
        **{"timestep_sampling": "uniform", "context": "augmented", "num_inference_steps": 2, "timestep_shift": 3.0},
        **{"validation_guidance_scale": 3.0, "caption_dropout": 0.5},
    },
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_loss_is_that_of_the_run_s_own_validation(write_recipe, clips, tmp_path, objective):
    recipe, run = write_recipe(max_train_steps=2, validation_steps=2, seed=7, **objective)
    run_here("train_video_regression.py", "--config", recipe)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = next(entry for entry in logged if "validation_loss" in entry)
    table = ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos"]
    flags = ["--lpips_net", None, "--output_dir", tmp_path / "evaluation", "--student_guidance_scale", 3]
    run_here(SCRIPT, "--checkpoint", run, *table, *flags)
    found = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["heldout_loss"]
    assert found["loss"] == pytest.approx(logged["validation_loss"], rel=1e-4)
    for level in found["by_level"]:
        for key in ("loss", "blur_gap", "pred_latent_std"):
            name = f"validation_{key}_at_time_{level['timestep']:g}"
            name += f"_to_{level['timestep'] + 100:g}" if objective else ""
            assert level[key] == (None if name not in logged else pytest.approx(logged[name], rel=1e-4, abs=1e-6))
    assert any(level["loss"] is not None for level in found["by_level"])


def test_a_level_without_draws_has_no_figures_and_a_mean_has_no_blur_gap():
    # 4 elements at level 0: targets 0, 0, 2, 2, all predicted as their mean; none at level 1
    sums = torch.tensor([[4.0, 4.0, 4.0, 4.0, 4.0, 8.0], [0.0] * 6], dtype=torch.float64)
    found = summarize_heldout_loss(sums, torch.tensor([1000.0, 500.0]))
    drawn, other = found["by_level"]
    assert drawn == {
        **{"timestep": 1000.0, "loss": 1.0, "blur_gap": 0.0},
        **{"pred_latent_std": 0.0, "target_latent_std": 1.0},
    }
    assert math.isnan(other["loss"])
    assert found["loss"] == 1.0


def test_videos_for_vbench_are_those_of_its_prompts_and_seeds(flags, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a ball\n\na ball on a lawn / field\na ball\n")
    folder = tmp_path / "vbench"
    vbench = ["--vbench_export", folder, "--vbench_prompts", tmp_path / "prompts.txt", "--num_vbench_samples", 2]
    run_here(SCRIPT, *flags, *vbench, "--num_samples", 1)
    assert f"--prompt_file {folder / 'prompts.json'}" in capsys.readouterr().out
    prompts = json.loads((folder / "prompts.json").read_text())
    assert list(prompts.values()) == ["a ball"] * 2 + ["a ball on a lawn / field"] * 2
    videos = {path.name: path.read_bytes() for path in (folder / "videos").iterdir()}
    assert videos.keys() == prompts.keys()
    assert len(set(videos.values())) == 4
    kept = folder / "videos" / "a ball-1.mp4"
    kept.unlink()
    others = {path: path.stat().st_mtime_ns for path in (folder / "videos").iterdir()}
    run_here(SCRIPT, *flags, *vbench, "--num_samples", 1)
    assert kept.read_bytes() == videos["a ball-1.mp4"]  # the same seed again
    assert others == {path: path.stat().st_mtime_ns for path in others}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_samples", 0], "num_samples must be 1 or more"),
        (["--num_base_steps", -1], "num_base_steps must be 0 or more"),
        (["--num_frames", 16], "num_frames must be 4k + 1"),
        (["--num_clip_frames", 0], "num_clip_frames must be 1 or more"),
        (["--clip_model", "nowhere/at-all"], "clip_model must be a folder or hub id"),
        (["--num_vbench_samples", 0], "num_vbench_samples must be in [1, 1000], got 0; the default is 5."),
        (["--vbench_prompts", "prompts.txt"], "vbench_prompts are written to vbench_export"),
        (["--vbench_export", "out", "--vbench_prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--metadata_path", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_ends_with_one_message(flags, changes, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, *flags, *changes)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_frame_per_block", 2], "must be a multiple of num_frame_per_block=2, got 5; use 4 or 6 latent frames"),
        (["--width", 40], "width must be a multiple of 16 for this checkpoint, got 40"),
        (["--num_frames", 1, "--first_frame", "given"], "must end with a block and before the clip does"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(flags, loads_nothing, changes, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run_here(SCRIPT, *flags, *changes)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
