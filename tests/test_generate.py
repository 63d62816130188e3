"""generate.py as users run it: on the folder of a run, and on a plain diffusers folder."""

import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import run_here, run_script

from causal_wan.encoding import decode_latents, encode_prompts, encode_videos
from causal_wan.models import load_text_encoder, load_vae
from causal_wan.pipeline import CausalWanPipeline


SCRIPT = "generate.py"
SIZE = ["--num_frames", 17, "--height", 32, "--width", 48]


def test_plain_diffusers_folder_generates_the_same_video_from_the_same_seed(checkpoint, tmp_path):
    videos = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = ["--checkpoint", checkpoint, "--prompt", "a ball", "--seed", seed, "--num_frame_per_block", 1]
        run_here(SCRIPT, *flags, *SIZE, "--output", tmp_path / f"{name}.mp4")
        videos.append(iio.imread(tmp_path / f"{name}.mp4", plugin="pyav"))
    assert videos[0].shape == (17, 32, 48, 3)
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_prompts_come_from_text_files_and_csv_files(checkpoint, clips, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\n\na box\n")
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", 5, *SIZE, "--denoising_step_list", 1000]
    run_here(SCRIPT, *flags, "--prompts_file", tmp_path / "prompts.txt", "--output", tmp_path / "text")
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"00.mp4", "01.mp4"}
    csv_flags = ["--prompts_file", clips / "train.csv", "--num_prompts", 1, "--output", tmp_path / "csv"]
    run_script([sys.executable, SCRIPT, *flags, *csv_flags])
    assert {path.name for path in (tmp_path / "csv").iterdir()} == {"00.mp4"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "x"], "give either --prompt or --prompts_file"),
        (["--checkpoint", "x", "--prompts_file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--checkpoint", "tests", "--prompt", "a"], "got tests, which has neither"),
        (["--checkpoint", "x", "--prompt", " "], "must not be empty"),
    ],
)
def test_bad_input_ends_with_one_message(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, *flags)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_sizes_that_do_not_fit_the_checkpoint_are_refused(checkpoint, capsys):
    flags = ["--checkpoint", checkpoint, "--prompt", "a", "--num_frames", 16, "--height", 32, "--width", 48]
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, *flags)
    assert exit_info.value.code == 2
    assert "num_frames must be 4k + 1 for the WAN VAE, got 16; use 13 or 17" in capsys.readouterr().err


def test_pipeline_call_gives_frames_in_every_output_type(checkpoint):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    call = {"num_frames": 9, "height": 32, "width": 48, "denoising_step_list": (1000, 500, 0)}
    frames = {
        kind: pipeline("a ball", generator=torch.Generator().manual_seed(0), output_type=kind, **call).frames
        for kind in ("np", "pt", "pil", "latent")
    }
    assert frames["np"].shape == (1, 9, 32, 48, 3)
    assert 0 <= frames["np"].min() <= frames["np"].max() <= 1
    assert frames["pt"].shape == (1, 9, 3, 32, 48)
    assert len(frames["pil"][0]) == 9
    assert frames["latent"].shape == (1, 16, 3, 4, 6)
    with pytest.raises(ValueError, match="use 32 or 48"):
        pipeline("a ball", **{**call, "height": 40})
    with pytest.raises(ValueError, match="either prompt or prompt_embeds"):
        pipeline(**call)


def test_prompt_embeddings_equal_those_of_the_stock_pipeline(checkpoint):
    from diffusers import WanPipeline

    prompts = ["a ball  crosses\nthe field", "Draw a sketch of a bird step by step: first the body &amp; the head."]
    stock = WanPipeline.from_pretrained(checkpoint)
    expected, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=64)
    tokenizer, text_encoder = load_text_encoder(checkpoint)
    embeds = encode_prompts(tokenizer, text_encoder, prompts, 64)
    for embed, row in zip(embeds, expected, strict=True):
        torch.testing.assert_close(embed, row[: len(embed)])
        assert not row[len(embed) :].any()


def test_latents_are_the_normalised_posterior_mode_and_decode_undoes_the_normalising(checkpoint):
    vae = load_vae(checkpoint)
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    videos = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    mode = vae.encode(videos).latent_dist.mode()
    latents = encode_videos(vae, videos)
    torch.testing.assert_close(latents, (mode - 0.5) / 2)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mode).sample, rtol=1e-4, atol=1e-4)
