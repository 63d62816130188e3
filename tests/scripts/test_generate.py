"""generate.py as users run it: on the folder of a run, and on a plain diffusers folder."""

import json
import shutil
from fractions import Fraction
from types import SimpleNamespace

import av
import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import launch, run_here, run_python
from grey_videos import write_playlists, write_timed_video
from peft import LoraConfig, get_peft_model_state_dict

from causal_wan.blocks import CausalConfig
from causal_wan.geometry import WAN
from causal_wan.model.text import encode_prompts
from causal_wan.model.vae import decode_latents, encode_videos
from causal_wan.results.student import Layout
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.video.writing import VideoWriter
from causal_wan.weights.parts import load_text_encoder, load_vae
from generate import Config, read_frames_to_continue


SCRIPT = "generate.py"
SIZE = ["--num_frames", 17, "--height", 32, "--width", 48]


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """Runs the script and gives the frames that it wrote, before the codec; x264 itself varies from run to run."""
    written, write = [], VideoWriter.write

    def note(writer, frames):
        written.append(frames.copy())
        write(writer, frames)

    def run(checkpoint, *flags):
        written.clear()
        output = ["--output", tmp_path / "video.mp4"]
        run_here(SCRIPT, "--checkpoint", checkpoint, "--prompt", "a ball", *SIZE, *output, *flags)
        assert len(iio.imread(tmp_path / "video.mp4", plugin="pyav")) == sum(map(len, written))
        return np.concatenate(written)

    monkeypatch.setattr(VideoWriter, "write", note)
    return run


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_generate_samples_what_validation_sampled(write_recipe, clips, tmp_path, frames_by_path, kv_cache_dtype):
    recipe, run = write_recipe(max_train_steps=1, num_frame_per_block=1, seed=3, kv_cache_dtype=kv_cache_dtype)
    run_here("train_video_regression.py", "--config", recipe)
    held_out = ["--checkpoint", run, "--prompts_file", clips / "heldout.csv", "--seed", 3]
    run_here("generate.py", *held_out, "--output", tmp_path / "same")
    run_here("generate.py", *held_out, "--output", tmp_path / "other", "--kv_cache_dtype", "int8")
    for name in ("00.mp4", "01.mp4"):
        validated = frames_by_path(run / "validation" / "step-000001" / name)
        assert len(validated) == 17
        assert np.array_equal(frames_by_path(tmp_path / "same" / name), validated)
        assert np.array_equal(frames_by_path(tmp_path / "other" / name), validated) == (kv_cache_dtype == "int8")


def test_plain_diffusers_folder_generates_the_same_video_from_the_same_seed(checkpoint, generate):
    flags = ["--num_frame_per_block", 1, "--seed"]
    videos = [generate(checkpoint, *flags, seed) for seed in (3, 3, 4)]
    assert videos[0].shape == (17, 32, 48, 3)
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_a_student_of_continuous_levels_generates_in_the_many_steps_of_its_run(checkpoint, generate, tmp_path):
    run = {"timestep_sampling": "logit_normal", "timestep_shift": 3.0, "num_inference_steps": 3}
    run |= {"generator_task": "causal_video", "num_frame_per_block": 1, "local_attn_size": -1, "sink_size": 0}
    run |= {"pretrained_model_name_or_path": str(checkpoint), "generator_ckpt": None, "revision": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**run, "independent_first_frame": False}))
    shutil.copytree(checkpoint / "transformer", tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text()) | {"num_frame_per_block": 1}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    own_way = generate(tmp_path)
    plain = [checkpoint, "--num_frame_per_block", 1]
    in_three_steps = generate(*plain, "--num_inference_steps", 3, "--timestep_shift", 3)
    assert np.array_equal(own_way, in_three_steps)
    euler = ["--denoising_step_list", 1000, 857.142857, 600, "--sampler", "euler"]
    assert np.array_equal(own_way, generate(*plain, *euler))
    shifted = generate(tmp_path, "--timestep_shift", 8)
    assert np.array_equal(shifted, generate(*plain, "--num_inference_steps", 3, "--timestep_shift", 8))
    assert np.array_equal(
        generate(tmp_path, "--num_inference_steps", 2),
        generate(*plain, "--num_inference_steps", 2, "--timestep_shift", 3),
    )
    assert not np.array_equal(own_way, generate(tmp_path, "--denoising_step_list", 1000, 857.142857, 600))
    assert not np.array_equal(own_way, generate(tmp_path, "--guidance_scale", 4, "--negative_prompt", "a box"))


def test_prompts_come_from_text_files_and_csv_files_and_those_that_are_cut_are_said(
    checkpoint, clips, tmp_path, caplog
):
    (tmp_path / "prompts.txt").write_text("a ball\na box" + " rolls" * 600 + "\n")
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", 5, *SIZE, "--denoising_step_list", 1000]
    run_here(SCRIPT, *flags, "--prompts_file", tmp_path / "prompts.txt", "--output", tmp_path / "text")
    assert {path.name for path in (tmp_path / "text").iterdir()} == {"00.mp4", "01.mp4"}
    assert "1 of 2 prompt(s) are cut at max_sequence_length=512 tokens" in caplog.text
    csv_flags = ["--prompts_file", clips / "train.csv", "--num_prompts", 1, "--output", tmp_path / "csv"]
    run_python(SCRIPT, *flags, *csv_flags)
    assert {path.name for path in (tmp_path / "csv").iterdir()} == {"00.mp4"}


def test_videos_have_the_numbers_and_the_noise_of_their_rows_and_blank_rows_are_said_once(
    checkpoint, tmp_path, frames_by_path, capsys
):
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", 5, *SIZE, "--denoising_step_list", 1000]
    whole = 'prompt,note\na ball,x\na cone,x\na box,x\n"[""a bird"", ""a hat""]",x\n'
    for name, content in (("whole", whole), ("gaps", whole.replace("a ball,x", "").replace("a cone", ""))):
        (tmp_path / f"{name}.csv").write_text(content)
        capsys.readouterr()
        run_here(SCRIPT, *flags, "--prompts_file", tmp_path / f"{name}.csv", "--output", tmp_path / name)
        said = capsys.readouterr().err
        assert ("2 of the first 4 rows of" in said and said.count("have no prompt") == 1) == (name == "gaps")
    kept = ["02.mp4", "03-2.mp4", "03.mp4"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["00.mp4", "01.mp4", *kept]
    assert sorted(path.name for path in (tmp_path / "gaps").iterdir()) == kept
    for name in kept:
        assert np.array_equal(frames_by_path(tmp_path / "whole" / name), frames_by_path(tmp_path / "gaps" / name))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_frame_per_block", 2], "must be a multiple of num_frame_per_block=2, got 5; use 4 or 6 latent frames"),
        (["--local_attn_size", 3, "--sink_size", 3], "local_attn_size must hold one block and the sink, 4 latent"),
        (["--num_frame_per_block", 5, "--local_attn_size", 3], "one block and the sink, 5 latent frames or more"),
        (["--num_frames", 16], "num_frames must be 4k + 1 for the WAN VAE, got 16"),
        (["--height", 40], "height must be a multiple of 16 for this checkpoint, got 40"),
        (["--lora", "nowhere.safetensors"], "lora must be files, folders or hub ids, but nowhere.safetensors does"),
        (["--lora", "CLIP"], "holds no LoRA"),
        (["--num_frame_per_block", 1, "--video", "CLIP", "--num_video_frames", 6], "num_video_frames must end with"),
        (["--video", "requirements.txt"], "video must be a file that decodes"),
        (["--num_frames", 1, "--image", "CLIP"], "a video to continue must end with a block and before the clip"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    checkpoint, clips, tmp_path, loads_nothing, flags, message, capsys
):
    clip = clips / "videos" / "0.mp4"
    if "--lora" in flags and "CLIP" in flags:
        clip = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    flags = [clip if flag == "CLIP" else flag for flag in flags]
    output = ["--output", tmp_path / "a.mp4"]
    with pytest.raises(SystemExit) as refused:
        run_here(SCRIPT, "--checkpoint", checkpoint, "--prompt", "a", *SIZE, *output, *flags)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_of_the_lineage_generate_as_the_folder_does_that_they_were_made_of(checkpoint, generate, tmp_path):
    weights = tmp_path / "generator.pt"
    run_here("convert_checkpoint.py", "--input", checkpoint, "--output", weights, "--to", "original")
    # Their blocks have 3 latent frames, so 21 frames are two blocks.
    from_weights = generate(weights, "--pretrained_model_name_or_path", checkpoint, "--num_frames", 21)
    expected = generate(checkpoint, "--num_frame_per_block", 3, "--num_frames", 21)
    assert np.array_equal(from_weights, expected)


def test_streamed_files_hold_the_same_video(checkpoint, generate, capsys):
    flags = ["--num_frame_per_block", 1]
    streamed = generate(checkpoint, *flags, "--stream")
    assert "first frames after" in capsys.readouterr().out
    assert np.array_equal(streamed, generate(checkpoint, *flags))


def test_several_processes_share_the_prompts_and_make_the_same_videos(checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\na box\na bird\n")
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", 1, *SIZE, "--prompts_file", tmp_path / "prompts.txt"]
    run_here(SCRIPT, *flags, "--stream", "--output", tmp_path / "one")
    launch(SCRIPT, None, *flags, "--stream", "--output", tmp_path / "two", num_processes=2)
    one, two = (
        [iio.imread(tmp_path / folder / name, plugin="pyav").astype(int) for name in ("00.mp4", "01.mp4", "02.mp4")]
        for folder in ("one", "two")
    )
    for same, also, other in zip(one, two, [*two[1:], two[0]], strict=True):
        assert 2 * np.abs(same - also).mean() < np.abs(same - other).mean()


def test_a_video_longer_than_the_window_of_attention_begins_as_a_short_one(checkpoint, generate):
    window = ["--num_frame_per_block", 1, "--local_attn_size", 3, "--sink_size", 1]
    long = generate(checkpoint, *window, "--num_frames", 61)
    assert len(long) == 61
    assert np.array_equal(long[:17], generate(checkpoint, *window))


def test_a_video_is_continued(checkpoint, clips, generate):
    flags = ["--num_frame_per_block", 1, "--video", clips / "videos" / "0.mp4"]
    videos = [generate(checkpoint, *flags, "--num_video_frames", 5, "--seed", seed) for seed in (0, 1)]
    assert np.array_equal(videos[0][:5], videos[1][:5])
    assert not np.array_equal(videos[0][5:], videos[1][5:])
    unasked = [generate(checkpoint, *flags, "--seed", seed) for seed in (0, 1)]  # the largest of at most 8 frames
    assert np.array_equal(unasked[0], videos[0])
    for wrong in (33, 6):
        with pytest.raises(SystemExit):
            generate(checkpoint, *flags, "--num_video_frames", wrong)


def given_frames(path, count, **changes):
    """The frames of a video that are continued, as an array."""
    config = Config(checkpoint="x", prompt="a", video=str(path), num_video_frames=count, **changes)
    settings = SimpleNamespace(num_frames=17, height=64, width=32)
    layout = Layout(geometry=WAN, causal=CausalConfig(num_frame_per_block=1))
    return np.stack([np.asarray(frame) for frame in read_frames_to_continue(config, settings, layout)["video"]])


def test_a_video_is_continued_as_a_player_shows_it_and_at_the_rate_of_the_clip(tmp_path):
    """Turned, with long pixels, and at 32 frames a second: every other of its last frames is taken."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=32, width=32, height=32, options={"crf": "1"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        stream.set_display_rotation(-90)
        for number in range(24):
            picture = np.full((32, 32, 3), 8 * number, np.uint8)
            picture[:, :4] = 255  # on the left as stored, above as shown
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    frames = given_frames(path, 5)
    assert frames.shape == (5, 64, 32, 3)
    assert (frames[:, :5].mean(axis=(1, 2, 3)) > 240).all()
    assert (frames[:, 20:].mean(axis=(1, 2, 3)) / 8).round().tolist() == [15, 17, 19, 21, 23]
    faster = given_frames(path, 5, frame_rate=32)
    assert (faster[:, 20:].mean(axis=(1, 2, 3)) / 8).round().tolist() == [19, 20, 21, 22, 23]
    with pytest.raises(ValueError, match=r"must have 13 frames or more at 16 a second to be continued, but .* has 12"):
        given_frames(path, 13)


def test_a_video_of_a_variable_rate_is_continued_by_time(tmp_path):
    path = write_timed_video(tmp_path / "clip.mp4", [*range(0, 1000, 100), *range(1000, 1300, 20)], size=(64, 32))
    shown = (given_frames(path, 9, frame_rate=10).mean(axis=(1, 2, 3)) / 8).round().tolist()
    assert shown == [4, 5, 6, 7, 8, 9, 14, 19, 24]


@pytest.mark.parametrize("name", ["no.mp4", "playlist.m3u8"])
def test_what_is_no_video_is_not_continued(tmp_path, name):
    write_playlists(tmp_path)
    with pytest.raises(ValueError, match="video must be a file that decodes"):
        given_frames(tmp_path / name, 5)


@pytest.mark.parametrize(("size", "said"), [(0, "the file is empty"), (900, r"was cut: its index \(moov\)")])
def test_a_video_that_is_empty_or_was_cut_is_not_continued(tmp_path, size, said):
    path = write_timed_video(tmp_path / "clip.mp4", range(0, 1000, 40), size=(64, 32))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"video must be a file that decodes, got .*clip.mp4: .*{said}"):
        given_frames(path, 5)


@pytest.mark.parametrize("name", ["first.jpg", "first.png", "first.webp", "first.mp4"])
def test_a_picture_is_a_video_of_one_frame_to_continue(checkpoint, generate, tmp_path, name):
    picture = np.full((64, 96, 3), (200, 60, 30), np.uint8)
    path = tmp_path / name
    if name.endswith("mp4"):
        iio.imwrite(path, picture[None], plugin="pyav", codec="libx264", fps=16)
    else:
        PIL.Image.fromarray(picture).save(path)
    flags = ["--num_frame_per_block", 1, "--video", path]
    one, other = (generate(checkpoint, *flags, "--seed", seed) for seed in (0, 1))
    assert np.array_equal(one[0], other[0])  # given
    assert not np.array_equal(one[1:], other[1:])


def test_adapters_and_guidance_change_the_video(checkpoint, generate, tmp_path):
    torch.manual_seed(0)
    source = CausalWanPipeline.from_pretrained(checkpoint).transformer
    source.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    CausalWanPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(source))
    lora = ["--lora", tmp_path / "lora", "--lora_scale"]
    guidance = ["--guidance_scale", 5, "--negative_prompt", "a box"]
    flags = ["--num_frame_per_block", 1]
    videos = [generate(checkpoint, *flags, *more) for more in ([], [*lora, 0], [*lora, 2], guidance)]
    plain, none, adapted, guided = videos
    assert np.array_equal(plain, none)
    assert not np.array_equal(plain, adapted)
    assert not np.array_equal(plain, guided)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "x"], "give either --prompt or --prompts_file"),
        (["--checkpoint", "x", "--prompts_file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--checkpoint", "tests", "--prompt", "a"], "got tests, which has neither"),
        (
            ["--checkpoint", "x", "--prompts_file", "requirements.txt", "--output", "a.mp4"],
            "output must be a folder for the",
        ),
        (["--checkpoint", "x", "--prompts_file", "requirements.txt"], "got out.mp4; name one with --output"),
        (["--checkpoint", "x", "--prompt", " "], "must not be empty"),
        (["--checkpoint", "x.pt", "--prompt", "a"], "which does not exist"),
        (["--checkpoint", "x", "--prompt", "a", "--num_video_frames", "5"], "name it with --video"),
        (["--checkpoint", "x", "--prompt", "a", "--lora_scale", "5"], "one weight for each of 0 LoRAs"),
        (["--checkpoint", "x", "--prompt", "a", "--seed", "-1"], "seed must be 0 or more, got -1; the default is 0."),
        (
            ["--checkpoint", "x", "--prompts_file", "a.txt", "--num_prompts", "-2"],
            "num_prompts must be 1 or more",
        ),
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


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 17])
def test_small_frames_are_encoded_8_a_pass_and_large_ones_as_diffusers_does(checkpoint, monkeypatch, num_frames):
    vae = load_vae(checkpoint)
    videos = torch.rand(2, 3, num_frames, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    passes = []
    vae.encoder.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[2]))
    small = encode_videos(vae, videos)
    first, *others = passes
    assert first == 1 and sum(others) == num_frames - 1 and all(frames == 8 for frames in others[:-1])
    passes.clear()
    monkeypatch.setattr("causal_wan.model.vae.MAX_SMALL_FRAME", 32 * 48 - 1)
    torch.testing.assert_close(small, encode_videos(vae, videos), rtol=1e-5, atol=1e-5)
    assert passes == [1, *(num_frames - 1) // 4 * [4]]


def test_weights_that_are_offloaded_come_before_inputs_are_put_beside_them(checkpoint):
    vae = load_vae(checkpoint).to("meta")
    vae._hf_hook = SimpleNamespace(pre_forward=lambda module: module.to_empty(device="cpu"))
    latents = encode_videos(vae, torch.zeros(1, 3, 5, 32, 48))
    assert latents.device.type == "cpu"
    vae.to("meta")
    assert decode_latents(vae, latents).device.type == "cpu"


def test_ctrl_c_keeps_the_videos_that_are_whole_and_says_so(checkpoint, tmp_path, monkeypatch, capsys):
    write, written = VideoWriter.write, []

    def write_one(writer, frames):
        written.append(frames)
        if len(written) == 7:  # of five blocks each
            raise KeyboardInterrupt
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "write", write_one)
    (tmp_path / "prompts.txt").write_text("a ball\na cube\na cone\n")
    files = ["--prompts_file", tmp_path / "prompts.txt", "--output", tmp_path / "videos"]
    with pytest.raises(SystemExit) as stopped:
        run_here(SCRIPT, "--checkpoint", checkpoint, *SIZE, *files, "--num_frame_per_block", 1)
    assert stopped.value.code == 130
    assert "stopped by Ctrl-C: 1 video(s) are whole" in capsys.readouterr().err
    assert len(iio.imread(tmp_path / "videos" / "00.mp4", plugin="pyav")) == 17
