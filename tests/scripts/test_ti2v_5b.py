"""WAN 2.2 TI2V-5B through all scripts: 48 latent channels, 16 pixels to a latent, 24 frames a second."""

import json
import math
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import run_here
from diffusers import WanPipeline

from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.config.settings import BaseModelConfig
from causal_wan.data.frames import num_sampleable_frames
from causal_wan.data.settings import DataConfig
from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.results.run_record import find_run
from causal_wan.results.student import load_student
from causal_wan.runs.parts import fit_to_checkpoint
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.weights.kinds import check_base


SIZE = {"num_frames": 13, "height": 64, "width": 96}  # 4 latent frames of 4 x 6: a first one, and a block of 3
WAN_2_2 = LatentGeometry(channels=48, spatial_factor=16, frame_rate=24)


def flags_of(settings):
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def settings(recipe, checkpoint_5b):
    """Of a short run: blocks of 3 after an independent first frame."""
    own = {"pretrained_model_name_or_path": str(checkpoint_5b), "num_frame_per_block": 3, "max_train_steps": 2}
    own |= {"independent_first_frame": True, "train_batch_size": 1, "lr_scheduler": "constant", "validation_steps": 2}
    return {**recipe, **own, **SIZE, "num_validation_samples": 1}


@pytest.fixture(scope="module")
def latents_dir(settings, tmp_path_factory):
    """What precompute_latents.py makes of the clips."""
    folder = tmp_path_factory.mktemp("latents")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run_here("precompute_latents.py", "--config", folder / "recipe.yaml", "--latents_dir", folder / "latents")
    return folder / "latents"


@pytest.fixture(scope="module")
def run_folder(settings, latents_dir, tmp_path_factory):
    """The output folder of a run on these latents."""
    folder = tmp_path_factory.mktemp("run")
    output = {"latents_dir": str(latents_dir), "output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**settings, **output}))
    run_here("train_video_regression.py", "--config", folder / "recipe.yaml")
    return folder / "run"


def test_latents_have_the_size_that_the_checkpoint_gives_them(latents_dir, checkpoint_5b):
    cache = TensorCache(latents_dir / "latents")
    assert {cache.read(key)[0].shape for key in cache.in_order()} == {(48, 4, 4, 6)}
    assert check_base(str(checkpoint_5b)) == WAN_2_2


def test_a_run_leaves_a_student_with_its_blocks_and_videos_of_its_rate(run_folder):
    config = json.loads((run_folder / "transformer" / "config.json").read_text())
    assert (config["in_channels"], config["independent_first_frame"], config["num_frame_per_block"]) == (48, True, 3)
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["frame_rate"] == 24
    (video,) = run_folder.glob("validation/step-000002/*.mp4")
    assert iio.immeta(video, plugin="pyav")["fps"] == 24
    assert iio.imread(video, plugin="pyav").shape == (13, 64, 96, 3)


def test_a_student_with_a_first_frame_of_its_own_is_sampled_so_without_a_flag(run_folder, tmp_path):
    PIL.Image.new("RGB", (96, 64), (200, 60, 30)).save(tmp_path / "first.jpg")
    call = ["--checkpoint", run_folder, "--prompt", "a ball", "--output", tmp_path / "video.mp4"]
    run_here("generate.py", *call)
    assert iio.imread(tmp_path / "video.mp4", plugin="pyav").shape == (13, 64, 96, 3)
    assert iio.immeta(tmp_path / "video.mp4", plugin="pyav")["fps"] == 24
    run_here("generate.py", *call, "--video", tmp_path / "first.jpg", "--frame_rate", 12)
    assert iio.immeta(tmp_path / "video.mp4", plugin="pyav")["fps"] == 12
    student = load_student(str(run_folder), find_run(str(run_folder)), torch.float32)
    assert student.transformer.block_lengths(4) == [1, 3]


def test_evaluation_measures_the_student(run_folder, settings, tmp_path):
    data = {name: settings[name] for name in ("dataset_base_path", "metadata_path")}
    more = {"output_dir": tmp_path, "num_samples": 1, "lpips_net": "None"}
    run_here("evaluate.py", "--checkpoint", run_folder, *flags_of({**data, **more}))
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert len(figures["student"]["by_block"]["psnr"]) == 2
    assert math.isfinite(figures["heldout_loss"]["loss"])
    assert iio.immeta(tmp_path / "videos" / "00-student.mp4", plugin="pyav")["fps"] == 24


def test_an_exported_student_is_the_same_model_to_stock_diffusers(run_folder, checkpoint_5b, tmp_path):
    folder = tmp_path / "pipeline"
    run_here("convert_checkpoint.py", "--input", run_folder, "--output", folder, "--to", "pipeline")
    stock, ours = WanPipeline.from_pretrained(folder), CausalWanPipeline.from_pretrained(folder)
    assert stock.config.expand_timesteps
    assert ours.geometry == WAN_2_2
    assert ours.transformer.block_lengths(4) == [1, 3]
    weights = stock.transformer.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in ours.transformer.state_dict().items())
    base = WanPipeline.from_pretrained(checkpoint_5b).transformer.state_dict()
    assert not all(torch.equal(weight, base[name]) for name, weight in weights.items())
    stock.set_progress_bar_config(disable=True)
    video = stock("a ball", **SIZE, num_inference_steps=1, guidance_scale=1.0, output_type="np").frames
    assert video.shape == (1, 13, 64, 96, 3)
    assert np.isfinite(video).all()


COMMANDS = {
    "train_video_regression.py": ["--output_dir"],
    "train_video_regression.py --dry_run": ["--dry_run", "--output_dir"],
    "precompute_latents.py": ["--latents_dir"],
    "precompute_trajectories.py": ["--trajectories_dir"],
    "check_dataset.py": ["--output_dir"],
    "evaluate.py": ["--output_dir"],
    "generate.py": ["--output"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_sizes_in_sixteens_are_refused_before_anything_is_written(command, settings, checkpoint_5b, tmp_path, capsys):
    script = command.split()[0]
    output = tmp_path / ("output.mp4" if script == "generate.py" else "output")
    settings = settings | {"height": 48, "width": 80}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    wanted = {
        "generate.py": ["prompt", "height", "width", "num_frames"],
        "evaluate.py": ["dataset_base_path", "metadata_path", "height", "width", "num_frames"],
    }.get(script)
    flags = ["--config", tmp_path / "recipe.yaml"]
    if wanted is not None:
        named = {"prompt": "a ball", **settings}
        flags = ["--checkpoint", checkpoint_5b, *flags_of({name: named[name] for name in wanted})]
    with pytest.raises(SystemExit) as exit_info:
        run_here(script, *flags, *COMMANDS[command], output)
    assert exit_info.value.code == 2
    assert "height must be a multiple of 32 for this checkpoint, got 48; use 32 or 64" in capsys.readouterr().err
    assert not output.exists()


def test_sizes_of_buckets_are_checked_too():
    data = DataConfig(num_frames=13, height=64, width=96, resolution_buckets=("64x96", "96x48"))
    with pytest.raises(ValueError, match="width must be a multiple of 32 for this checkpoint, got 48"):
        data.for_checkpoint(WAN_2_2)
    with pytest.raises(ValueError, match="height must be a multiple of 32 for this checkpoint, got 48"):
        DataConfig(num_frames=13, height=48, width=96, resolution_buckets=("64x96",)).for_checkpoint(WAN_2_2)


def test_the_rate_is_the_checkpoints_unless_it_is_given(checkpoint, checkpoint_5b):
    data = DataConfig(**SIZE, frame_sampling="head")
    rates = {}
    for name, folder in (("2.1", checkpoint), ("2.2", checkpoint_5b), ("none", "nobody/nothing")):
        model = BaseModelConfig(pretrained_model_name_or_path=str(folder))
        rates[name] = fit_to_checkpoint(data, model).frame_rate
        assert fit_to_checkpoint(replace(data, frame_rate=8.0), model).frame_rate == 8
    assert rates == {"2.1": 16, "2.2": 24, "none": None}
    assert data.sampling_rate == WAN.frame_rate
    assert num_sampleable_frames(33, 16.0, data.for_checkpoint(WAN_2_2)) == 49
