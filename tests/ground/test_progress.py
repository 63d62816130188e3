"""Signs of life: there where something takes long, and nowhere else."""

import time

import pytest
from conftest import ROOT, run_here
from tqdm.auto import tqdm

from causal_wan import progress
from causal_wan.progress import announced, show_progress


@pytest.fixture
def patience(monkeypatch):
    """Sets how long nothing is said, in seconds."""
    return lambda seconds: monkeypatch.setattr(progress, "PATIENCE", seconds)


def test_what_takes_long_is_announced_and_what_is_quick_is_not(patience, capsys):
    patience(0.05)
    with announced("reading the news"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""
    with announced("reading the news"):
        time.sleep(0.15)
    assert capsys.readouterr().err.count("reading the news ...") == 1


def test_an_error_is_the_end_of_an_announcement(patience, capsys):
    patience(0.05)
    with pytest.raises(OSError, match="torn"), announced("reading the news"):
        raise OSError("torn")
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_bar_comes_late_and_from_the_main_process_alone(patience, capsys, monkeypatch):
    assert list(show_progress(range(3), desc="news", mininterval=0)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    patience(0)
    assert list(show_progress(range(3), desc="news", mininterval=0)) == [0, 1, 2]
    assert "news: 100%" in capsys.readouterr().err
    monkeypatch.setattr(progress, "is_shown", lambda: False)
    with announced("reading the news"):
        assert list(show_progress(range(3), desc="news", mininterval=0)) == [0, 1, 2]
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.fixture
def bars(monkeypatch):
    """What the bars of a run count: (description, how far, of how many) of each as it is closed."""
    closed, close = [], tqdm.close

    def note(bar):
        if not bar.disable and not hasattr(bar, "noted"):
            bar.noted = True
            closed.append((bar.desc.removesuffix(": "), bar.n, bar.total))
        close(bar)

    monkeypatch.setattr(tqdm, "close", note)
    return closed


def test_a_run_shows_how_far_its_validation_is_from_sampling_to_the_loss(write_recipe, bars, patience, capsys):
    path, _ = write_recipe(max_train_steps=1, num_frame_per_block=1)
    run_here("train_video_regression.py", "--config", path)
    # 2 videos of 5 blocks in 3 steps, and of 5 latent frames; 2 held-out clips.
    assert ("validation", 2 * 5 * 3 + 2 * 5 + 2, 2 * 5 * 3 + 2 * 5 + 2) in bars
    assert ("held-out clips", 2, 2) in bars
    printed = capsys.readouterr().err
    assert "validation" not in printed
    assert "loading" not in printed
    patience(0)
    path, _ = write_recipe("slow", max_train_steps=1, num_frame_per_block=1)
    run_here("train_video_regression.py", "--config", path)
    printed = capsys.readouterr().err
    assert "validation:" in printed
    for work in ("loading the text encoder", "loading the transformer", "loading the VAE", "saving the result"):
        assert f"{work}" in printed


def test_scripts_that_sample_count_each_step_and_what_is_decoded(bars, tmp_path, clips):
    checkpoint = ROOT / "examples" / "sketch" / "tiny-wan"
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", "1", "--height", "32", "--width", "48"]
    flags += ["--num_frames", "9", "--denoising_step_list", "1000", "500", "0"]
    run_here("generate.py", *flags, "--prompt", "a ball", "--output", tmp_path / "a.mp4")
    assert ("steps", 3 * (2 + 1), 3 * (2 + 1)) in bars  # blocks, their steps and the frames of each
    flags += ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos", "--num_samples", "1"]
    flags += ["--output_dir", tmp_path / "report", "--lpips_net", "None", "--num_base_steps", "2"]
    run_here("evaluate.py", *flags)
    assert ("steps and latent frames", 3 * 2 + 3, 3 * 2 + 3) in bars
    assert {("clips", 1, 1), ("held-out loss", 1, 1), ("figures", 1, 1), ("steps", 2, 2)} <= set(bars)
