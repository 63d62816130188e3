"""evaluate.py as users run it, on a plain diffusers folder."""

import csv
import json
import re

import pytest
from conftest import run_here


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
    return ["--checkpoint", checkpoint, *data, *size, "--output_dir", tmp_path / "evaluation"]


def test_student_and_base_are_measured_against_the_clips_and_shown_beside_them(flags, tmp_path, capsys):
    run_here(SCRIPT, *flags, "--num_base_steps", 2, "--guidance_scale", 1)
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
    assert len(list((folder / "videos").glob("*.mp4"))) == 6
    page = (folder / "report.html").read_text()
    assert page.count('src="data:video/mp4;base64,') == 6
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_clip_compared_with_itself_is_perfect():
    import torch

    from causal_wan.video_metrics import first_frames_of_blocks
    from evaluate import measure

    clip = torch.rand(17, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    starts = first_frames_of_blocks([1, 2, 2])
    means = measure([(clip, {})], [clip], starts)["mean"]
    assert (means["psnr"], means["sharpness_ratio"], means["motion_ratio"]) == (100.0, 1.0, 1.0)
    assert means["ssim"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--num_samples", 0], "num_samples must be 1 or more"),
        (["--num_base_steps", -1], "num_base_steps must be 0"),
        (["--num_frames", 16], "num_frames must be 4k + 1"),
        (["--metadata_path", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_ends_with_one_message(flags, changes, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, *flags, *changes)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
