"""What a run left of its settings, read again: of today's runs and of older ones."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from causal_wan.config.settings import ModelConfig
from causal_wan.data.settings import DataConfig
from causal_wan.methods.settings import RegressionConfig
from causal_wan.results.run_record import RunRecord, base_of, find_run
from causal_wan.results.student import load_student, resolve_settings
from causal_wan.results.teacher import find_teacher
from causal_wan.weights.lora import add_lora, save_lora
from causal_wan.weights.transformer import load_transformer, save_transformer


@pytest.fixture
def leave(tmp_path):
    """Writes the output folder of a run that began with `base`, with these settings beside."""

    def write(result="transformer", **settings):
        folder = tmp_path / "run"
        (folder / result).mkdir(parents=True)
        settings = {"pretrained_model_name_or_path": "base", **settings}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return write


def test_settings_that_an_older_run_does_not_have_are_the_defaults(leave):
    record = RunRecord.of_folder(leave())
    assert record.model == ModelConfig(pretrained_model_name_or_path="base")
    assert (record.method, record.data) == (RegressionConfig(), DataConfig())
    assert (record.kv_cache_dtype, record.seed, record.objective) == ("auto", None, "video-regression")
    assert resolve_settings(record) == resolve_settings(None)


def test_settings_are_those_of_the_run_each_of_its_kind(leave):
    settings = {"denoising_step_list": [1000, 500], "context": "clean", "max_sequence_length": 64, "lora_rank": 4}
    settings |= {"num_frames": 17, "height": 32, "width": 48, "kv_cache_dtype": "int8", "seed": 3, "of_old": "gone"}
    record = find_run(str(leave(trajectories_dir="here", lora_target_modules=["to_q"], **settings)))
    assert record.method == RegressionConfig(denoising_step_list=(1000, 500), context="clean")
    assert (record.model.lora_rank, record.model.lora_target_modules) == (4, ("to_q",))
    assert (record.seed, record.objective, record.settings["of_old"]) == (3, "ode-regression", "gone")
    resolved = resolve_settings(record)
    assert (resolved.num_frames, resolved.height, resolved.width, resolved.timesteps) == (17, 32, 48, [1000, 500])
    assert (resolved.max_sequence_length, resolved.kv_cache_dtype) == (64, "int8")


def test_settings_that_say_nothing_of_the_result_are_not_judged_by_todays_rules(leave):
    record = find_run(str(leave(metadata_path="a.csv", dataset_config="b.yaml", keep_attention_outputs=True)))
    assert record.data == DataConfig()


def test_a_plain_pipeline_is_no_run(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert find_run(str(tmp_path)) is None
    assert find_run("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") is None
    assert base_of(str(tmp_path), None) == (str(tmp_path), None)


def test_another_base_takes_the_place_of_the_runs(leave):
    folder = leave(revision="v1")
    record = find_run(str(folder), "another")
    assert (base_of(str(folder), record), record.folder) == (("another", "v1"), folder)


@pytest.mark.parametrize(("suffix", "task"), [("safetensors", "bidirectional_video"), ("pt", "causal_video")])
def test_a_file_of_weights_is_a_run_that_trained_nothing(tmp_path, suffix, task):
    path = tmp_path / f"weights.{suffix}"
    save_file({"a": torch.zeros(1)}, path)
    record = find_run(str(path), "base")
    assert record.model == ModelConfig(pretrained_model_name_or_path="base", generator_ckpt=str(path))
    assert (record.method, record.folder, record.has_lora) == (RegressionConfig(generator_task=task), None, False)
    assert find_teacher(str(path), "base", None).max_sequence_length is None  # nobody knows


@pytest.mark.parametrize(
    ("settings", "message"),
    [("- a", "must be a mapping that names"), ("seed: 1", "must be a mapping that names"), ("a: [", "valid YAML")],
)
def test_a_config_that_is_none_of_a_run_is_refused(leave, settings, message):
    folder = leave()
    (folder / "config.yaml").write_text(settings)
    with pytest.raises(ValueError, match=message):
        find_run(str(folder))


def test_a_folder_without_a_result_is_refused(leave):
    folder = leave(result="logs")
    with pytest.raises(ValueError, match="which has neither"):
        find_run(str(folder))


def test_a_checkpoint_has_the_record_of_its_run(leave, tmp_path):
    checkpoint = leave(result="checkpoint-5", lora_rank=4) / "checkpoint-5"
    assert RunRecord.of_checkpoint(checkpoint).model.lora_rank == 4
    (checkpoint / "config.yaml").write_text("pretrained_model_name_or_path: base\nlora_rank: 8")
    assert RunRecord.of_checkpoint(checkpoint).model.lora_rank == 8
    with pytest.raises(ValueError, match="must be a checkpoint-STEP folder of a run"):
        RunRecord.of_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["transformer", "lora"])
def test_a_student_has_the_blocks_of_its_training_whatever_was_trained(kind, leave, checkpoint):
    settings = {"num_frame_per_block": 3, "independent_first_frame": True, "local_attn_size": 7, "sink_size": 1}
    run = find_run(str(leave(pretrained_model_name_or_path=str(checkpoint), **settings)))
    transformer = load_transformer(str(checkpoint), None)  # made without them
    if kind == "transformer":
        transformer.set_causal_config(run.causal)
        save_transformer(transformer, transformer.state_dict(), run.folder / "transformer")
    else:
        (run.folder / "transformer").rmdir()
        add_lora(transformer, rank=2, alpha=2, target_modules=["to_q"])
        adapters = {name: each for name, each in transformer.named_parameters() if each.requires_grad}
        save_lora(transformer, adapters, run.folder)
    student = load_student(str(run.folder), run, torch.float32)
    assert student.transformer.causal_config == run.causal
    assert student.transformer.block_lengths(7) == [1, 3, 3]
