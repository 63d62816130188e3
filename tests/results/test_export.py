"""What leaves the repository: whole pipelines that stream without it."""

import ast
import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from conftest import run_here
from diffusers import DiffusionPipeline, WanPipeline
from peft import LoraConfig, get_peft_model_state_dict

from causal_wan.results.export import SAMPLING_MODULES, bundle_pipeline
from causal_wan.results.run_record import find_run
from causal_wan.results.student import load_student, resolve_settings
from causal_wan.sampling.pipeline import CausalWanPipeline


CALL = {"num_frames": 13, "height": 32, "width": 48}

PART_LIBRARIES = ("diffusers", "transformers")

# Runs far from the repository: the folder is all that it knows.
STRANGER = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline

folder, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
changes = {"prompt_schedule": [(0.4, "a box")], "recache": True}
blocks = list(pipeline.stream("a ball", num_frames=13, height=32, width=48, generator=generator, **changes))
assert [block.shape[1] for block in blocks] == [1, 4, 4, 4]
assert not any(name.startswith("causal_wan") for name in sys.modules)
np.save(output, np.concatenate(blocks, axis=1))
"""


@pytest.fixture(scope="module")
def run_folder(checkpoint, tmp_path_factory):
    """The output folder of a run that trained nothing."""
    folder = tmp_path_factory.mktemp("run")
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    pipeline.transformer.save_pretrained(folder / "transformer")
    run = {
        "pretrained_model_name_or_path": str(checkpoint),
        "revision": None,
        "generator_ckpt": None,
        "generator_task": "causal_video",
        "num_frame_per_block": 1,
        "local_attn_size": -1,
        "sink_size": 0,
        "independent_first_frame": False,
        "denoising_step_list": [1000, 600, 0],
        "warp_denoising_step": False,
        "timestep_shift": 1.0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    run_here("convert_checkpoint.py", "--input", run_folder, "--output", folder, "--to", "pipeline")
    return folder


def sample(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a ball", generator=torch.Generator().manual_seed(0), **CALL, **settings).frames


def test_an_exported_folder_streams_without_this_repository(exported, checkpoint, tmp_path):
    (tmp_path / "stranger.py").write_text(STRANGER)
    command = [sys.executable, "stranger.py", str(exported), "video.npy"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ours = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    expected = sample(ours, denoising_step_list=(1000, 600), prompt_schedule=[(0.4, "a box")], recache=True)
    np.testing.assert_allclose(np.load(tmp_path / "video.npy"), expected, atol=1e-4)


def test_stock_and_own_pipelines_load_an_exported_folder(exported, checkpoint):
    stock = WanPipeline.from_pretrained(exported)
    base = WanPipeline.from_pretrained(checkpoint)
    videos = [sample(pipeline, num_inference_steps=2, guidance_scale=1.0) for pipeline in (stock, base)]
    assert np.array_equal(*videos)
    ours = CausalWanPipeline.from_pretrained(exported)
    assert ours.config.denoising_step_list == [1000, 600, 0]
    assert ours.transformer.config.num_frame_per_block == 1
    assert type(DiffusionPipeline.from_pretrained(exported)) is WanPipeline
    assert "_name_or_path" not in json.loads((exported / "model_index.json").read_text())


def test_an_exported_folder_names_no_part_that_is_not_in_it(run_folder, checkpoint, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "exported"
    shutil.copytree(checkpoint, base)
    index = json.loads((base / "model_index.json").read_text())
    index |= {"image_encoder": ["transformers", "CLIPVisionModel"], "image_processor": [None, None]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "boundary_ratio": 0.875}
    (base / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": True}))
    flags = ["--input", run_folder, "--output", folder, "--to", "pipeline"]
    run_here("convert_checkpoint.py", *flags, "--pretrained_model_name_or_path", base)
    exported = json.loads((folder / "model_index.json").read_text())
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    assert {
        name for name, value in exported.items() if isinstance(value, list) and value[0] in PART_LIBRARIES
    } == parts
    assert not exported.keys() & {"image_encoder", "image_processor", "feature_extractor"}
    assert (exported["transformer_2"], exported["boundary_ratio"]) == ([None, None], None)
    assert exported["expand_timesteps"]
    assert WanPipeline.from_pretrained(folder).config.boundary_ratio is None


def test_a_student_in_many_steps_leaves_as_a_pipeline_that_takes_them(run_folder, checkpoint, tmp_path):
    source, folder = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(run_folder, source)
    run = yaml.safe_load((source / "config.yaml").read_text())
    run |= {"timestep_sampling": "uniform", "timestep_shift": 3.0, "num_inference_steps": 4}
    (source / "config.yaml").write_text(yaml.safe_dump(run))
    run_here("convert_checkpoint.py", "--input", source, "--output", folder, "--to", "pipeline")
    exported = CausalWanPipeline.from_pretrained(folder)
    assert exported.config.sampler == "euler"
    assert exported.config.denoising_step_list == [1000, 900, 750, 500]
    ours = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    expected = sample(ours, num_inference_steps=4, timestep_shift=3.0)
    assert np.array_equal(sample(exported), expected)
    settings = resolve_settings(find_run(str(folder)), student=str(folder))
    assert (settings.timesteps, settings.sampler) == ([1000, 900, 750, 500], "euler")


def test_prompts_of_an_exported_student_are_padded_as_in_its_training(run_folder, checkpoint, tmp_path):
    source, folder = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(run_folder, source)
    run = yaml.safe_load((source / "config.yaml").read_text()) | {"max_sequence_length": 16}
    (source / "config.yaml").write_text(yaml.safe_dump(run))
    run_here("convert_checkpoint.py", "--input", source, "--output", folder, "--to", "pipeline")
    record = find_run(str(source))
    own = resolve_settings(record)
    loaded = load_student(str(source), record, torch.float32, max_sequence_length=own.max_sequence_length)
    exported = CausalWanPipeline.from_pretrained(folder)
    expected = sample(CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1), max_sequence_length=16)
    for pipeline in (loaded, exported):
        assert np.array_equal(sample(pipeline, denoising_step_list=(1000, 757, 522)), expected)
        assert not np.array_equal(
            sample(pipeline, denoising_step_list=(1000, 757, 522), max_sequence_length=512), expected
        )
    assert resolve_settings(find_run(str(folder)), student=str(folder)).max_sequence_length == 16


def test_a_pipeline_generates_and_is_evaluated_as_the_run_that_it_was_made_of(
    run_folder, clips, tmp_path, frames_by_path
):
    source, folder = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(run_folder, source)
    run = yaml.safe_load((source / "config.yaml").read_text()) | {"num_frames": 9, "height": 48, "width": 32}
    run |= {"timestep_sampling": "uniform", "timestep_shift": 3.0, "num_inference_steps": 3, "seed": 7}
    run |= {"kv_cache_dtype": "int8", "first_frame_probability": 0.5, "output_dir": "/home/me/secret/run"}
    (source / "config.yaml").write_text(yaml.safe_dump(run))
    run_here("convert_checkpoint.py", "--input", source, "--output", folder, "--to", "pipeline")
    assert "secret" not in (folder / "config.yaml").read_text()
    records = [find_run(str(path)) for path in (source, folder)]
    resolved = [
        resolve_settings(record, student=str(path)) for record, path in zip(records, (source, folder), strict=True)
    ]
    assert resolved[0] == resolved[1]
    assert (resolved[1].num_frames, resolved[1].height, resolved[1].width) == (9, 48, 32)
    assert (records[0].method, records[0].seed) == (records[1].method, records[1].seed)
    for more in ((), ("--num_inference_steps", 2)):  # along the run's shift
        for path in (source, folder):
            output = tmp_path / f"{path.name}.mp4"
            run_here("generate.py", "--checkpoint", path, "--prompt", "a ball", "--output", output, *more)
        videos = [frames_by_path(tmp_path / name) for name in ("run.mp4", "exported.mp4")]
        assert videos[1].shape == (9, 48, 32, 3)
        assert np.array_equal(*videos)
    again = tmp_path / "again"  # a pipeline of a pipeline knows the same
    run_here("convert_checkpoint.py", "--input", folder, "--output", again, "--to", "pipeline")
    assert (again / "config.yaml").read_text() == (folder / "config.yaml").read_text()
    assert resolve_settings(find_run(str(again)), student=str(again)) == resolved[0]
    assert type(DiffusionPipeline.from_pretrained(folder)) is WanPipeline


def test_a_pipeline_that_keeps_no_settings_of_a_run_is_none(exported, tmp_path):
    folder = tmp_path / "before"
    shutil.copytree(exported, folder)
    assert find_run(str(folder)) is not None
    (folder / "config.yaml").write_text("theme: dark\n")
    assert find_run(str(folder)) is None
    (folder / "config.yaml").unlink()
    assert find_run(str(folder)) is None
    settings = resolve_settings(None, student=str(folder))
    assert (settings.num_frames, settings.height, settings.timesteps) == (81, 480, [1000, 600, 0])


def test_parts_of_another_checkpoint_join_an_exported_pipeline_file(run_folder, exported, checkpoint):
    from diffusers import WanTransformer3DModel

    pipeline = DiffusionPipeline.from_pretrained(
        checkpoint,
        custom_pipeline=str(exported),
        trust_remote_code=True,
        transformer=WanTransformer3DModel.from_pretrained(run_folder, subfolder="transformer"),
        denoising_step_list=[1000, 600],
    )
    assert type(pipeline).__name__ == "CausalWanPipeline"
    assert pipeline.config.denoising_step_list == [1000, 600]
    assert pipeline.transformer.config.num_frame_per_block == 1
    ours = CausalWanPipeline.from_pretrained(exported)
    assert np.array_equal(sample(pipeline), sample(ours))


def test_adapters_become_part_of_an_exported_pipeline(run_folder, checkpoint, tmp_path):
    torch.manual_seed(0)
    adapted = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"], init_lora_weights=False)
    adapted.transformer.add_adapter(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    metadata = {"transformer_lora_adapter_metadata": adapted.transformer.peft_config["default"].to_dict()}
    CausalWanPipeline.save_lora_weights(tmp_path / "run", get_peft_model_state_dict(adapted.transformer), **metadata)
    flags = ["--input", tmp_path / "run", "--output", tmp_path / "out", "--to", "pipeline"]
    run_here("convert_checkpoint.py", *flags)
    expected = sample(adapted, denoising_step_list=(1000, 600))
    exported = CausalWanPipeline.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(sample(exported), expected, atol=1e-3)
    plain = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    assert np.abs(sample(plain, denoising_step_list=(1000, 600)) - expected).max() > 1e-2


def test_the_pipeline_file_has_each_name_once():
    tree = ast.parse(bundle_pipeline())
    names = Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert max(names.values()) == 1
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith("causal_wan") for module in imported)
    assert len(SAMPLING_MODULES) == 22
