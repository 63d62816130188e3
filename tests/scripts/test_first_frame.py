"""A first picture: given in training to a share of the clips, and to videos that are sampled."""

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import TINY_TRANSFORMER, run_here
from diffusers.video_processor import VideoProcessor
from torch.testing import assert_close

from causal_wan.data.clips import normalize_videos
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.methods.trajectories import take_noisy_batch
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import decode_latents, encode_videos
from causal_wan.sampling.arguments import _pixels_of_image
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.rollout import SamplingSchedule, roll_out
from causal_wan.video.decoding import decode_frames
from causal_wan.weights.parts import load_vae


B, C, F, H, W = 2, 4, 6, 4, 6
SHAPE = (B, C, F, H, W)
METHODS = {
    "step list": {},
    "any level": {"timestep_sampling": "uniform", "clean_block_probability": 0.5},
    "teacher forcing": {"context": "clean"},
    "one block": {"generator_task": "bidirectional_video"},
    "first block of one frame": {"independent_first_frame": True, "num_frame_per_block": 5},
}


def draw(probability, count=64, num_valid=F, **settings):
    """The noisy batches of so many samples."""
    method = RegressionConfig(**{"num_frame_per_block": 2, **settings, "first_frame_probability": probability})
    latents = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(0)).expand(count, *SHAPE[1:])
    valid = [num_valid] * count
    lengths = method.block_lengths(F)
    return draw_noisy_batch(latents, method, lengths, seed=1, sample_numbers=range(count), num_valid_frames=valid)


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_given_frame_enters_clean_and_is_in_no_loss_and_something_else_is_to_be_learned(settings):
    batch = draw(1.0, num_valid=3, **settings)
    assert not batch.timesteps[:, 0].any()
    assert not batch.mask[:, 0].any()
    assert torch.equal(batch.noisy_latents[:, :, 0], batch.latents[:, :, 0])
    assert batch.mask[:, 1:3].any(dim=1).all()
    assert not batch.mask[:, 3:].any()


def test_a_share_of_the_clips_is_given_its_first_frame_and_the_rest_of_a_block_keeps_its_level():
    batch = draw(0.25, count=800, denoising_step_list=(1000, 757, 522))  # no block enters clean by itself
    is_given = batch.timesteps[:, 0] == 0
    assert 0.2 < is_given.float().mean() < 0.3
    assert (batch.timesteps[:, 1] > 0).all()
    assert torch.equal(batch.timesteps[~is_given, 0], batch.timesteps[~is_given, 1])


def test_a_clip_of_one_frame_is_not_given_away_and_one_of_two_is_given_its_first():
    assert draw(1.0, num_valid=1).mask[:, 0].all()
    of_two = draw(1.0, num_valid=2).mask
    assert not of_two[:, 0].any()
    assert of_two[:, 1].all()


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_without_a_share_nothing_else_is_drawn_than_before(settings):
    """The draws of a run without the setting: levels, then noise, of the generator of the sample."""
    method = RegressionConfig(**{"num_frame_per_block": 2, **settings})
    one = draw(0.0, count=4, **settings)
    lengths = method.block_lengths(F)
    other = draw_noisy_batch(one.latents, method, lengths, seed=1, sample_numbers=range(4), num_valid_frames=[F] * 4)
    assert torch.equal(one.noisy_latents, other.noisy_latents)
    assert torch.equal(one.timesteps, other.timesteps)
    with_share = draw(0.001, count=4, **settings)
    assert not torch.equal(with_share.noise, one.noise)  # its draw comes first


def test_on_a_trajectory_the_given_frame_is_that_of_its_end():
    method = RegressionConfig(num_frame_per_block=2, first_frame_probability=1.0)
    trajectories = torch.randn(B, 4, *SHAPE[1:], generator=torch.Generator().manual_seed(0))
    latents = trajectories[:, -1]
    batch = take_noisy_batch(trajectories, latents, method, [2, 2, 2], seed=0, sample_numbers=range(B))
    assert torch.equal(batch.noisy_latents[:, :, 0], latents[:, :, 0])
    assert not batch.mask[:, 0].any()
    assert batch.noise.isfinite().all()


# --- sampling --------------------------------------------------------------------------------------------------------


def make_transformer(**causal):
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()


SCHEDULE = SamplingSchedule(timesteps=torch.tensor([1000.0, 500.0]), sampler="renoise")


@pytest.fixture
def conditions():
    return Conditions(prompt_embeds=torch.randn(B, 7, 16, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def noise():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def picture():
    return torch.randn(B, C, 1, H, W, generator=torch.Generator().manual_seed(3))


def sample(transformer, conditions, noise, picture=None, **settings):
    return torch.cat(
        list(roll_out(transformer, conditions, noise, SCHEDULE, initial_latents=picture, **settings)), dim=2
    )


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("block", [2, 3, 6])
def test_the_rest_of_the_first_block_is_sampled_beside_the_picture(conditions, noise, picture, block, sampler):
    """As in training: one pass over the block with the picture at timestep 0."""
    transformer = make_transformer(num_frame_per_block=block)
    schedule = SamplingSchedule(timesteps=SCHEDULE.timesteps, sampler=sampler)
    draws = noise[: schedule.num_draws]
    sampled = torch.cat(list(roll_out(transformer, conditions, draws, schedule, initial_latents=picture)), dim=2)
    assert torch.equal(sampled[:, :, :1], picture)
    x = torch.cat([picture, noise[0, :, :, 1:block]], dim=2)
    for level, following in ((1.0, 0.5), (0.5, 0.0)):
        timesteps = torch.full((B, block), 1000 * level)
        timesteps[:, 0] = 0
        with torch.no_grad():
            velocity = transformer(x, timesteps, conditions.prompt_embeds).sample
        clean = x - level * velocity
        again = noise[1, :, :, :block] if sampler == "renoise" else x + (1 - level) * velocity
        x = (1 - following) * clean + following * again
        x = torch.cat([picture, x[:, :, 1:]], dim=2)
    assert_close(sampled[:, :, :block], x, atol=1e-5, rtol=1e-4)


def test_later_blocks_see_the_picture(conditions, noise, picture):
    transformer = make_transformer(num_frame_per_block=3)
    one, other = (sample(transformer, conditions, noise, each) for each in (picture, picture + 1))
    assert not torch.allclose(one[:, :, 3:], other[:, :, 3:], atol=1e-4)


def test_blocks_that_are_passed_through_though_they_are_given_come_out_the_same(conditions, noise, picture):
    """As validation does where all processes make each pass in common."""
    transformer = make_transformer(num_frame_per_block=5, independent_first_frame=True)
    passes = []
    transformer.register_forward_hook(lambda *given: passes.append(1))
    one = sample(transformer, conditions, noise, picture)
    num_skipping = len(passes)
    other = sample(transformer, conditions, noise, picture, skips_given_blocks=False)
    without = len(passes) - num_skipping
    assert torch.equal(one, other)
    passes.clear()
    sample(transformer, conditions, noise)
    assert without == len(passes) == num_skipping + len(SCHEDULE.timesteps)


# --- the pipeline and the scripts ------------------------------------------------------------------------------------

CALL = {"num_frames": 13, "height": 32, "width": 48, "denoising_step_list": (1000, 500), "output_type": "pt"}
ORANGE = np.full((60, 48, 3), (200, 120, 30), np.uint8)  # taller than the clip: above and below are cut off
ORANGE[:14] = ORANGE[-14:] = 255


def test_what_can_be_seen_through_of_a_picture_is_white():
    pixels = np.full((32, 48, 4), (200, 120, 30, 255), np.uint8)
    pixels[:, :24, 3] = 0
    pipeline = SimpleNamespace(video_processor=VideoProcessor(vae_scale_factor=8))
    (picture,) = _pixels_of_image(pipeline, PIL.Image.fromarray(pixels), 32, 48)
    assert picture[:, 16, 10].tolist() == [1, 1, 1]
    assert picture[:, 16, 40].tolist() == pytest.approx([200 / 127.5 - 1, 120 / 127.5 - 1, 30 / 127.5 - 1])


@pytest.mark.parametrize("block", [2, 4])
def test_a_call_begins_with_the_picture_as_the_vae_gives_it_back(checkpoint, block):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=block)
    pipeline.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray(ORANGE)
    frames = pipeline("a ball", image=image, generator=torch.Generator().manual_seed(0), **CALL).frames
    cut = torch.from_numpy(ORANGE[14:46]).movedim(-1, 0)[None, :, None]
    expected = decode_latents(pipeline.vae, encode_videos(pipeline.vae, normalize_videos(cut)))
    assert_close(frames[:, 0], (expected[:, :, 0] / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    streamed = pipeline.stream("a ball", image=image, generator=torch.Generator().manual_seed(0), **CALL)
    assert_close(torch.cat(list(streamed), dim=1), frames, atol=1e-4, rtol=0)


def test_pictures_are_one_a_prompt_and_the_only_beginning(checkpoint):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=2)
    pipeline.set_progress_bar_config(disable=True)
    image = PIL.Image.fromarray(ORANGE)
    with pytest.raises(ValueError, match="a video has one beginning"):
        pipeline("a ball", image=image, video=[image] * 5, **CALL)
    with pytest.raises(ValueError, match="one image, or one for each of 1 prompts, got 2"):
        pipeline("a ball", image=[image, image], **CALL)
    black = PIL.Image.new("RGB", (48, 32))
    pair = pipeline(["a ball", "a ball"], image=[image, black], **CALL).frames
    for number, picture in enumerate((image, black)):
        alone = pipeline("a ball", image=picture, **CALL).frames
        assert_close(pair[number, 0], alone[0, 0], atol=1e-5, rtol=0)


@pytest.fixture
def trained(write_recipe, frames_by_path):
    """The folder of a run that gives all clips their first frame."""
    recipe, run = write_recipe(max_train_steps=1, num_frame_per_block=5, first_frame_probability=1.0)
    run_here("train_video_regression.py", "--config", recipe)
    return run


def as_the_vae_gives_it_back(checkpoint, clip):
    """The first frame of a clip of 32 x 48, uint8 `(32, 48, 3)`."""
    vae = load_vae(checkpoint)
    video = decode_frames(clip, torch.tensor([0])).movedim(0, 1)[None]
    decoded = decode_latents(vae, encode_videos(vae, normalize_videos(video)))[0, :, 0]
    return ((decoded.clamp(-1, 1) + 1) * 127.5).round().movedim(0, -1).numpy()


def test_a_run_validates_evaluates_and_generates_with_first_frames(
    trained, checkpoint, clips, tmp_path, frames_by_path, capsys
):
    held_out = [line.split(",")[0] for line in (clips / "heldout.csv").read_text().splitlines()[1:3]]
    validated = [frames_by_path(trained / "validation" / "step-000001" / f"{number:02d}.mp4") for number in range(2)]
    for name, video in zip(held_out, validated, strict=True):
        expected = as_the_vae_gives_it_back(checkpoint, clips / "videos" / name)
        assert np.abs(video[0] - expected).max() <= 1
    # the same from a table of prompts with a column of pictures
    table = tmp_path / "prompts.csv"
    prompts = [line.split(",", 1)[1] for line in (clips / "heldout.csv").read_text().splitlines()[1:3]]
    rows = [f"{prompt},{clips / 'videos' / name}" for prompt, name in zip(prompts, held_out, strict=True)]
    table.write_text("\n".join(["prompt,image", *rows]))
    run_here("generate.py", "--checkpoint", trained, "--prompts_file", table, "--output", tmp_path / "videos")
    for number, video in enumerate(validated):
        assert np.array_equal(frames_by_path(tmp_path / "videos" / f"{number:02d}.mp4"), video)
    assert "trained without given first frames" not in capsys.readouterr().err
    # and from held-out clips
    flags = ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos", "--lpips_net", "None"]
    flags += ["--checkpoint", trained, "--num_samples", 1]
    figures = {}
    for first_frame in ("auto", "none"):
        folder = tmp_path / first_frame
        run_here("evaluate.py", *flags, "--output_dir", folder, "--first_frame", first_frame)
        content = json.loads((folder / "metrics.json").read_text())
        figures[first_frame] = content["student"]["mean"]["psnr"]
        is_said = any("begin with the first frame" in note for note in content["notes"])
        assert is_said == (first_frame == "auto")
    assert figures["auto"] != figures["none"]


def test_a_student_that_was_trained_without_first_frames_says_so(write_recipe, tmp_path, capsys):
    recipe, run = write_recipe(max_train_steps=1, num_frame_per_block=5, validation_metadata_path=None)
    run_here("train_video_regression.py", "--config", recipe)
    PIL.Image.fromarray(ORANGE).save(tmp_path / "photo.jpg")
    flags = ["--checkpoint", run, "--prompt", "a ball", "--output", tmp_path / "ball.mp4"]
    run_here("generate.py", *flags, "--image", tmp_path / "photo.jpg")
    assert "trained without given first frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "a.png", "--video", "b.mp4"], "give either --image or --video, and not both"),
        (["--image", "no.png"], "image must be a file that decodes, but no.png does not exist"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused(checkpoint, tmp_path, flags, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        run_here("generate.py", "--checkpoint", checkpoint, "--prompt", "a", "--output", tmp_path / "a.mp4", *flags)
    assert message in str(error.value) + capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


def test_runs_of_before_have_no_first_frames(trained, tmp_path):
    """A recipe without the setting is one with 0, and the plan says which it is."""
    assert yaml.safe_load((trained / "config.yaml").read_text())["first_frame_probability"] == 1.0
    assert RegressionConfig().first_frame_probability == 0
    assert "first frame given to 100% of the clips" in RegressionConfig(first_frame_probability=1.0).describe()
