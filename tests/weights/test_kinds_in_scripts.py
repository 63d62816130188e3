"""Every script refuses checkpoints of another kind before it encodes or loads anything."""

import json
import shutil

import pytest
import torch
from conftest import TINY_TRANSFORMER, run_here
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from safetensors.torch import save_file

from causal_wan.weights.kinds import check_base
from causal_wan.weights.wan_names import to_original


TINY = {**TINY_TRANSFORMER, "in_channels": 16, "out_channels": 16}
KINDS = {"experts": "two experts", "vace": "VACE", "pictures": "36 input and 16 output channels"}


@pytest.fixture(scope="module")
def kinds(checkpoint, tmp_path_factory):
    """A folder of each kind: name -> path. Only what tells the kind is there of weights, which nobody may load."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in KINDS:
        ignored = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(checkpoint, folder / name, ignore=ignored)
    index = json.loads((folder / "experts" / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    (folder / "experts" / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(folder / "experts" / "transformer", folder / "experts" / "transformer_2")
    for name, changes in (
        ("vace", {"_class_name": "WanVACETransformer3DModel", "vace_layers": [0], "vace_in_channels": 96}),
        ("pictures", {"in_channels": 36}),
    ):
        path = folder / name / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return {name: folder / name for name in KINDS}


def command(script, kind, clips, tmp_path):
    """A command that works with any text-to-video checkpoint."""
    clip = ["--num_frames", 17, "--height", 32, "--width", 48]
    data = ["--dataset_base_path", clips / "videos", "--metadata_path", clips / "train.csv", *clip]
    base, output = ["--pretrained_model_name_or_path", kind], tmp_path / "output"
    return {
        "train_video_regression.py": [*base, *data, "--num_frame_per_block", 1, "--output_dir", output],
        "precompute_latents.py": [*base, *data, "--latents_dir", output],
        "precompute_trajectories.py": [*base, *data, "--num_frame_per_block", 1, "--trajectories_dir", output],
        "generate.py": ["--checkpoint", kind, "--prompt", "a ball", *clip, "--output", output / "video.mp4"],
        "evaluate.py": ["--checkpoint", kind, *data, "--output_dir", output],
        "convert_checkpoint.py": ["--input", kind, "--output", output, "--to", "pipeline"],
    }[script]


SCRIPTS = (
    *("train_video_regression.py", "precompute_latents.py", "precompute_trajectories.py", "generate.py"),
    *("evaluate.py", "convert_checkpoint.py"),
)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_kind_is_refused_for_what_it_is(script, kind, kinds, clips, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_here(script, *command(script, kinds[kind], clips, tmp_path))
    assert exit_info.value.code == 2
    assert KINDS[kind] in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_and_weights_to_start_from_are_no_exception(kind, kinds, checkpoint, clips, tmp_path, capsys):
    script = "train_video_regression.py"
    of_kind, plain = (command(script, path, clips, tmp_path) for path in (kinds[kind], checkpoint))
    for flags in (
        [*of_kind, "--dry_run"],
        [*plain, "--generator_ckpt", kinds[kind], "--dry_run"],
        [*plain, "--generator_ckpt", kinds[kind] / "transformer"],
    ):
        with pytest.raises(SystemExit) as exit_info:
            run_here(script, *flags)
        assert exit_info.value.code == 2
        assert KINDS[kind] in capsys.readouterr().err


def test_a_teacher_of_another_kind_is_refused(kinds, checkpoint, clips, tmp_path, capsys):
    script = "precompute_trajectories.py"
    with pytest.raises(SystemExit):
        run_here(script, *command(script, checkpoint, clips, tmp_path), "--teacher", kinds["vace"])
    assert "VACE" in capsys.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of weights of other kinds: in diffusers' names, and where these can be had in WAN's."""
    folder = tmp_path_factory.mktemp("weights")
    vace = WanVACETransformer3DModel(**TINY, vace_layers=[0], vace_in_channels=96).state_dict()
    pictures = WanTransformer3DModel(**TINY | {"in_channels": 36}).state_dict()
    clip = WanTransformer3DModel(**TINY | {"in_channels": 36}, image_dim=8, added_kv_proj_dim=48).state_dict()
    save_file(vace, folder / "vace.safetensors")
    save_file(pictures, folder / "pictures.safetensors")
    save_file(clip, folder / "clip.safetensors")
    save_file({f"model.{name}": each for name, each in to_original(pictures).items()}, folder / "own.safetensors")
    torch.save({"generator": {f"model.{name}": each for name, each in vace.items()}}, folder / "vace.pt")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vace.safetensors", "VACE"),
        ("vace.pt", "VACE"),
        ("pictures.safetensors", "36 input and 16 output channels"),
        ("own.safetensors", "36 input and 16 output channels"),
        ("clip.safetensors", "image-to-video model that sees its picture"),
    ],
)
def test_files_of_weights_are_told_by_names_and_shapes(weights, name, message, checkpoint, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        check_base(str(checkpoint), generator_ckpt=str(weights / name))
    for flags in (["--output", tmp_path / "folder"], ["--output", tmp_path / "own.safetensors", "--to", "original"]):
        with pytest.raises(SystemExit):
            run_here("convert_checkpoint.py", "--input", weights / name, "--attention_head_dim", 24, *flags)
        assert message in capsys.readouterr().err
    for more in ([], ["--pretrained_model_name_or_path", checkpoint]):
        with pytest.raises(SystemExit):
            run_here("generate.py", "--checkpoint", weights / name, "--prompt", "a", *more)
        assert message in capsys.readouterr().err


def test_a_file_of_weights_that_is_cut_off_is_named(weights, checkpoint, tmp_path):
    content = (weights / "vace.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors must be a whole safetensors file"):
        check_base(str(checkpoint), generator_ckpt=str(tmp_path / "cut.safetensors"))


def test_a_second_expert_without_an_index_is_seen(kinds, tmp_path):
    shutil.copytree(kinds["experts"], tmp_path / "base")
    (tmp_path / "base" / "model_index.json").unlink()
    with pytest.raises(ValueError, match="two experts"):
        check_base(str(tmp_path / "base"))


def test_a_folder_is_known_by_the_parts_that_it_has(checkpoint, tmp_path):
    geometry = check_base(str(checkpoint))
    shutil.copytree(checkpoint / "transformer", tmp_path / "alone")
    assert check_base(str(checkpoint), generator_ckpt=str(tmp_path / "alone")) == geometry
    assert check_base(str(tmp_path)) == geometry  # of WAN 2.1, for want of anything else
