"""Uploads to a hub on this machine: what goes there, what does not, and what happens when it fails."""

import io
import logging
import shutil
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import ROOT, launch_afresh, run_here
from fake_hub import TOKEN, FakeHub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData
from huggingface_hub.utils import tqdm as HubBar
from safetensors.torch import save_file
from tqdm.auto import tqdm

from causal_wan.config.settings import HubConfig
from causal_wan.results import uploads
from causal_wan.results.run_record import RunRecord
from causal_wan.results.uploads import HubUploads, open_repository, stage_result


@pytest.fixture
def hub(monkeypatch):
    """A hub, and a user who is logged in."""
    hub = FakeHub()
    constants = {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(uploads, "WAITS", (0, 0))
    yield hub
    hub.close()


@pytest.fixture
def run_folder(checkpoint, tmp_path):
    """What a run leaves, with all that must stay where it is."""
    folder = tmp_path / "private-folder" / "my-wan"
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text('{"num_layers": 2}')
    weights = {"weight": torch.arange(5000)}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    run = {
        "pretrained_model_name_or_path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "generator_ckpt": None,
        "dataset_base_path": str(tmp_path / "private-folder" / "videos"),
        "metadata_path": "/home/somebody/secret/metadata.csv",
        "output_dir": str(folder),
        "generator_task": "causal_video",
        "num_frame_per_block": 3,
        "local_attn_size": -1,
        "denoising_step_list": [1000.0, 757.0, 522.0, 0.0],
        "num_frames": 81,
        "height": 480,
        "width": 832,
        "lora_rank": 0,
        "learning_rate": 2e-6,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(run))
    (folder / "pipeline.py").write_text("# a pipeline\n")
    (folder / "data_summary.json").write_text('{"clips": 120, "distinct prompts": 118, "held-out clips": 4}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "generator_loss": 2.0}\n{"step": 2, "generator_loss": 0.51}\n')
    for step in (5, 10):
        (folder / "validation" / f"step-{step:06d}").mkdir(parents=True)
        (folder / "validation" / f"step-{step:06d}" / "00.mp4").write_bytes(b"video of step %d" % step)
    for private in (
        "cache/latents/0.safetensors",
        "checkpoint-5/model.safetensors",
        "logs/events",
        "tracker_run.json",
    ):
        (folder / private).parent.mkdir(parents=True, exist_ok=True)
        (folder / private).write_text("private")
    return folder


def push(folder, *flags):
    run_here("push_to_hub.py", "--checkpoint", folder, "--hub_model_id", "me/my-wan", *flags)


def test_the_result_its_card_and_nothing_else_go_up(hub, run_folder, capsys):
    push(run_folder)
    files = hub.repos["me/my-wan"]
    assert set(files) - {".gitattributes"} == {
        *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "pipeline.py", "README.md"),
        *("config.yaml", "metrics.jsonl", "data_summary.json", "samples/00.mp4"),
    }
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files[weights] == (run_folder / weights).read_bytes()
    assert files["samples/00.mp4"] == b"video of step 10"
    assert f"uploaded: {hub.endpoint}/me/my-wan" in capsys.readouterr().out
    assert not [path for path in run_folder.iterdir() if path.name.startswith("uploading")]
    for content in files.values():
        for secret in (b"private", b"/home/", b"somebody", str(run_folder.parent).encode(), TOKEN.encode()):
            assert secret not in content
    settings = yaml.safe_load(files["config.yaml"])
    assert settings["metadata_path"] == "metadata.csv"
    assert settings["pretrained_model_name_or_path"] == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_the_card_says_what_it_is_and_is_valid(hub, run_folder):
    hub.licenses["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"] = "apache-2.0"
    push(run_folder)
    card = ModelCard(hub.repos["me/my-wan"]["README.md"].decode())
    card.validate()
    data = card.data
    assert isinstance(data, ModelCardData)
    assert data.license == "apache-2.0"
    assert data.base_model == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert data.pipeline_tag == "text-to-video"
    assert data.library_name == "diffusers"
    assert {"wan", "causal", "few-step", "video-regression"} <= set(data.tags)
    assert data.to_dict()["widget"][0]["output"]["url"] == "samples/00.mp4"
    for text in (
        "3 latent frames each",
        "at the timesteps 1000, 757, 522.",
        "step_list=[1000.0, 757.0, 522.0],",
        "| `learning_rate` | 2e-06 |",
        "120 clips, 118 distinct",
        "| 0.51 |",
    ):
        assert text in card.text, text
    assert 'from_pretrained("me/my-wan", subfolder="transformer"' in card.text
    compile(card.text.split("```python")[1].split("```")[0], "card", "exec")


@pytest.fixture
def card_of(hub, run_folder):
    """The card of the run with other settings, or as a LoRA; its code compiles."""

    def make(is_lora=False, **changes):
        run = yaml.safe_load((run_folder / "config.yaml").read_text())
        (run_folder / "config.yaml").write_text(yaml.safe_dump(run | changes))
        if is_lora:
            shutil.rmtree(run_folder / "transformer")
            (run_folder / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
        push(run_folder)
        card = ModelCard(hub.repos["me/my-wan"]["README.md"].decode())
        compile(card.text.split("```python")[1].split("```")[0], "card", "exec")
        return card

    return make


@pytest.mark.parametrize("is_lora", [False, True])
def test_the_card_of_a_student_in_many_steps_says_how_many(card_of, is_lora):
    changes = {"timestep_sampling": "uniform", "timestep_shift": 3.0, "context": "clean", "num_inference_steps": 40}
    card = card_of(is_lora, **changes)
    assert "few-step" not in card.data.tags
    for text in (
        "A **causal** WAN",
        "in 40 steps along",
        "num_inference_steps=40, timestep_shift=3.0",
        "| `context` |",
    ):
        assert text in card.text, text
    for text in ("few-step", "denoising_step_list"):
        assert text not in card.text, text


def test_the_card_of_a_student_of_any_level_in_three_steps_calls_them_few(card_of):
    card = card_of(timestep_sampling="logit_normal", num_inference_steps=3)
    assert "few-step" in card.data.tags
    for text in (
        "A **causal, few-step** WAN",
        "in 3 steps along the flow",
        "num_inference_steps=3, timestep_shift=5.0",
    ):
        assert text in card.text, text
    assert "denoising_step_list" not in card.text


@pytest.mark.parametrize("is_lora", [False, True])
def test_the_card_pads_prompts_as_they_were_in_training(card_of, is_lora):
    card = card_of(is_lora, timestep_sampling="logit_normal", num_inference_steps=3, max_sequence_length=64)
    assert "width=832, max_sequence_length=64,\n    num_inference_steps=3" in card.text


@pytest.mark.parametrize("is_lora", [False, True])
def test_the_card_of_a_student_of_trajectories_follows_the_flow_at_its_list(card_of, is_lora):
    card = card_of(is_lora, trajectories_dir="trajectories", sampler="euler")
    assert {"few-step", "ode-regression"} <= set(card.data.tags)
    assert 'denoising_step_list=[1000.0, 757.0, 522.0], sampler="euler",' in card.text


@pytest.mark.parametrize("is_lora", [False, True])
def test_the_card_shows_pictures_and_controls_of_a_student_that_takes_them(card_of, is_lora):
    card = card_of(is_lora, first_frame_probability=0.3, control_column=["depth", "outline"])
    assert 'image=picture,\n    control={"depth": frames, "outline": other_frames}' in card.text
    assert "`image` is a PIL picture" in card.text
    assert "frame for frame, as lists of PIL pictures: depth, outline." in card.text


def test_the_card_of_a_student_without_conditions_says_nothing_of_them(card_of):
    card = card_of()
    assert "control" not in card.text
    assert "image=" not in card.text


def test_a_lora_is_said_to_be_an_adapter(card_of):
    card = card_of(is_lora=True)
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "lora" in card.data.tags
    assert 'pipeline.load_lora_weights("me/my-wan")' in card.text
    assert "license" not in card.data.to_dict()


def test_a_base_model_on_this_disk_is_named_without_its_path_and_gives_its_licence(hub, run_folder, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    run = yaml.safe_load((run_folder / "config.yaml").read_text())
    run["pretrained_model_name_or_path"] = str(tmp_path / "base")
    (run_folder / "config.yaml").write_text(yaml.safe_dump(run))
    assert RunRecord.of_folder(run_folder).public_settings()["pretrained_model_name_or_path"] == "base"
    push(run_folder)
    card = ModelCard(hub.repos["me/my-wan"]["README.md"].decode())
    assert card.data.license == "apache-2.0"
    assert "base_model" not in card.data.to_dict()
    assert str(tmp_path) not in card.text


def test_the_card_of_a_pipeline_streams_in_the_size_of_its_run(hub, run_folder):
    (run_folder / "model_index.json").write_text('{"denoising_step_list": [1000, 600, 0], "sampler": "renoise"}')
    run = yaml.safe_load((run_folder / "config.yaml").read_text()) | {"num_frames": 17, "height": 64, "width": 112}
    (run_folder / "config.yaml").write_text(yaml.safe_dump(run))
    push(run_folder)
    card = hub.repos["me/my-wan"]["README.md"].decode()
    assert 'pipeline.stream("a prompt", num_frames=17, height=64, width=112):' in card
    assert "Stock `WanPipeline` loads it as well." in card


def test_private_repositories_are_private(hub, run_folder):
    push(run_folder, "--hub_private_repo", "True")
    assert hub.private == {"me/my-wan": True}


def test_what_fails_in_passing_is_tried_again(hub, run_folder):
    failures = iter([-1, 500])

    def fail(method, path):
        return next(failures, None) if method == "PUT" or path.endswith("/commit/main") else None

    hub.fail = fail
    push(run_folder)
    assert "README.md" in hub.repos["me/my-wan"]


def test_an_upload_that_fails_half_way_is_finished_by_the_command_that_is_printed(hub, run_folder, caplog, capsys):
    hub.fail = lambda method, path: 503 if path.endswith("/commit/main") else None
    monkey = HubConfig(push_to_hub=True, hub_model_id="me/my-wan")
    with caplog.at_level(logging.ERROR):
        assert not HubUploads(monkey, run_folder, open_repository(monkey, run_folder)).finish()
    assert hub.repos["me/my-wan"] == {}
    assert hub.num_uploaded == 1  # the weights are there, and no commit of them
    assert f"python push_to_hub.py --checkpoint {run_folder} --hub_model_id me/my-wan" in caplog.text
    assert TOKEN not in caplog.text
    assert (run_folder / "transformer" / "config.json").is_file()
    with pytest.raises(SystemExit) as exit_info:
        push(run_folder)
    assert exit_info.value.code == 1
    hub.fail = lambda method, path: None
    push(run_folder)
    assert hub.num_uploaded == 1  # not sent again
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.repos["me/my-wan"]


def test_what_cannot_help_is_not_tried_again(hub, run_folder):
    hub.fail = lambda method, path: 403 if path.endswith("/commit/main") else None
    with pytest.raises(SystemExit):
        push(run_folder)
    assert [path for _, path in hub.calls].count("/api/models/me/my-wan/commit/main") == 1


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/my-wan", None, "run `hf auth login`"),
        ("me/my-wan", "hf_wrong", "another token"),
        ("others/my-wan", TOKEN, "You don't have the rights"),
    ],
)
def test_who_may_not_write_is_told_before_anything_is_loaded(hub, run_folder, monkeypatch, name, token, message):
    monkeypatch.setattr(uploads, "get_token", lambda: token)
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(ValueError, match=message):
        open_repository(HubConfig(push_to_hub=True, hub_model_id=name), run_folder)


def test_a_folder_that_is_no_result_is_not_pushed(hub, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"private")
    with pytest.raises(SystemExit):
        push(tmp_path)
    assert "checkpoint must be the result of a run" in capsys.readouterr().err
    assert not hub.repos


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be a name on the hub"):
        HubConfig(push_to_hub=True, hub_model_id="a/b/c")
    with pytest.raises(ValueError, match="add --push_to_hub"):
        HubConfig(hub_model_id="me/my-wan")


def test_a_hub_out_of_reach_stops_nothing(hub, run_folder, caplog):
    hub.fail = lambda method, path: 502
    config = HubConfig(push_to_hub=True)
    assert open_repository(config, run_folder) == "my-wan"
    assert "will be tried at the end" in caplog.text


def test_a_machine_without_a_network_stops_nothing_and_says_how_to_finish(hub, run_folder, caplog):
    hub.close()
    config = HubConfig(push_to_hub=True, hub_model_id="me/my-wan", hub_strategy="every_save")
    uploads_of_run = HubUploads(config, run_folder, open_repository(config, run_folder))
    assert "will be tried at the end" in caplog.text
    uploads_of_run.upload_checkpoint(run_folder / "checkpoint-5")
    assert not uploads_of_run.finish()
    assert "checkpoint-5 could not be uploaded" in caplog.text
    assert f"python push_to_hub.py --checkpoint {run_folder} --hub_model_id me/my-wan" in caplog.text


def test_folders_without_a_result_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither transformer/ nor"), stage_result(tmp_path, "me/a"):
        pass


def test_checkpoints_go_up_in_the_background_one_at_a_time_even_if_they_are_rotated_away(hub, run_folder, caplog):
    import threading

    let_go = threading.Event()

    def wait(method, path):
        if path.endswith("/commit/main"):
            let_go.wait(20)

    hub.fail = wait
    config = HubConfig(push_to_hub=True, hub_model_id="me/my-wan", hub_strategy="every_save")
    sender = HubUploads(config, run_folder, open_repository(config, run_folder))
    (run_folder / "checkpoint-5" / "config.yaml").write_text(f"output_dir: {run_folder}")
    sender.upload_checkpoint(run_folder / "checkpoint-5")
    shutil.rmtree(run_folder / "checkpoint-5")
    (run_folder / "checkpoint-9").mkdir()
    sender.upload_checkpoint(run_folder / "checkpoint-9")
    assert "checkpoint-9 does not go to the hub" in caplog.text
    let_go.set()
    assert sender.finish()
    files = hub.repos["me/my-wan"]
    assert files["last-checkpoint/model.safetensors"] == b"private"
    assert "last-checkpoint/config.yaml" not in files  # it has paths of the machine
    assert "README.md" in files
    assert hub.commits == ["Upload checkpoint-5", "Upload the result of training"]


def test_a_checkpoint_that_finds_no_room_to_be_sent_from_costs_the_run_nothing(hub, run_folder, caplog, monkeypatch):
    def fail(**settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", fail)
    config = HubConfig(push_to_hub=True, hub_model_id="me/my-wan", hub_strategy="every_save")
    HubUploads(config, run_folder, open_repository(config, run_folder)).upload_checkpoint(run_folder / "checkpoint-5")
    assert "checkpoint-5 does not go to the hub: OSError: [Errno 28] No space left" in caplog.text


def test_a_run_pushes_its_result_and_its_checkpoints(hub, write_recipe):
    path, output = write_recipe(max_train_steps=2, checkpointing_steps=1)
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    flags = ["--push_to_hub", "--hub_model_id", "me/sketch", "--hub_strategy", "every_save"]
    result = launch_afresh("train_video_regression.py", path, *flags, env=env)
    files = hub.repos["me/sketch"]
    assert {"README.md", "config.yaml", "pipeline.py", "data_summary.json"} <= set(files)
    assert any(name.startswith("transformer/") for name in files)
    assert any(name.startswith("last-checkpoint/") for name in files)
    assert str(ROOT).encode() not in files["config.yaml"] + files["README.md"]
    assert str(output.parent).encode() not in files["config.yaml"] + files["README.md"]
    assert TOKEN not in result.stdout + result.stderr
    assert TOKEN.encode() not in b"".join(files.values())


def test_bars_of_an_upload_come_and_go_while_no_line_is_written_beside_bars():
    """All bars are in one list, which writing a line goes through; a bar that came meanwhile would end the run."""
    upload = threading.Thread(target=lambda: HubBar(total=1, file=io.StringIO()).close())
    with tqdm.external_write_mode(file=io.StringIO()):
        upload.start()
        upload.join(0.5)
        assert upload.is_alive()
    upload.join()


def test_a_run_whose_upload_fails_is_a_success_with_a_command_to_finish(hub, write_recipe, caplog):
    hub.fail = lambda method, path: 403 if path.endswith("/preupload/main") else None
    path, output = write_recipe(max_train_steps=1)
    run_here("train_video_regression.py", "--config", path, "--push_to_hub", "--hub_model_id", "me/sketch")
    assert (output / "transformer" / "config.json").is_file()
    hub.fail = lambda method, path: None
    line = next(line for line in caplog.text.splitlines() if "python push_to_hub.py" in line)
    run_here(*line.split()[1:])
    assert "README.md" in hub.repos["me/sketch"]


def test_all_patterns_of_what_goes_up_are_names_and_not_everything():
    for pattern in (*uploads.RESULT, *uploads.PIPELINE):
        assert not pattern.startswith(("*", "/", "."))
        assert Path(pattern).parts[0] not in ("cache", "validation", "logs")
