"""What users and machines do wrong ends a command with one line that says what to do, and never with a traceback."""

import importlib
import json
import shutil
import sys
import typing
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import ROOT, run_here
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError

import convert_checkpoint
from causal_wan.config.fields import flat_fields, names_of
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import Range
from causal_wan.config.refusals import describe_refusal
from causal_wan.model.transformer import CausalWanTransformer3DModel


TRAIN = "train_video_regression.py"
BRIEF = {"max_train_steps": 1, "validation_steps": 0, "validation_metadata_path": None}


def refusal(capsys, *command, status=2):
    """The line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_here(*command)
    assert ended.value.code == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_result_that_finds_no_room_ends_the_run_with_the_command_that_makes_it(
    write_recipe, monkeypatch, capsys, tmp_path, error
):
    path, output_dir = write_recipe(**BRIEF)

    def save_half(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(CausalWanTransformer3DModel, "save_pretrained", save_half)
        line = refusal(capsys, TRAIN, "--config", path, status=1)
    assert "No space left" in line
    assert f"Its weights are safe in {output_dir / 'checkpoint-1'}. Make room" in line
    assert not list(output_dir.glob("*transformer"))
    script, *flags = line.partition("python ")[2].split()
    flags[flags.index("FOLDER")] = tmp_path / "made"
    run_here(script, *flags)
    run_here(TRAIN, "--config", path, "--resume_from_checkpoint", "latest")
    weights = [
        folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (output_dir, tmp_path / "made")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


SIZE = ["--num_frames", 17, "--height", 32, "--width", 48]


def users_of(result, recipe, clips, folder):
    """Commands that take a result."""
    table = ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos"]
    trajectories = ["--trajectories_dir", folder / "trajectories", "--prompts_file", clips / "heldout.csv"]
    return {
        "generate": ["generate.py", "--checkpoint", result, "--prompt", "a", "--output", folder / "a.mp4", *SIZE],
        "evaluate": ["evaluate.py", "--checkpoint", result, *table, "--output_dir", folder / "figures", *SIZE],
        "push": ["push_to_hub.py", "--checkpoint", result, "--hub_model_id", "me/run"],
        "teacher": ["precompute_trajectories.py", "--config", recipe, "--teacher", result, *trajectories],
        "start": [TRAIN, "--config", recipe, "--generator_ckpt", result],
        "pipeline": ["convert_checkpoint.py", "--input", result, "--output", folder / "made", "--to", "pipeline"],
        "weights": ["convert_checkpoint.py", "--input", result, "--output", folder / "made"],
    }


USERS = ("generate", "evaluate", "push", "teacher", "start", "pipeline", "weights")


@pytest.fixture
def refused(write_recipe, clips, tmp_path, capsys):
    """The line that a command ends with which takes a result."""
    recipe, _ = write_recipe("user")
    return lambda user, result: refusal(capsys, *users_of(result, recipe, clips, tmp_path)[user])


@pytest.mark.parametrize("given", ["run", "run/checkpoint-20"])
@pytest.mark.parametrize("user", USERS)
def test_a_checkpoint_of_a_run_is_no_result_and_the_command_that_makes_one_is_named(refused, user, given, tmp_path):
    if (user, given) == ("weights", "run/checkpoint-20"):
        return  # which is that command
    for step in (10, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("pretrained_model_name_or_path: wan\n")
    line = refused(user, tmp_path / given)
    command = f"--input {tmp_path}/run/checkpoint-20 --output {tmp_path}/run-20"
    assert line.endswith(f"make one of it: python convert_checkpoint.py {command}")


# --- config.yaml, and recipes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(checkpoint, tmp_path_factory):
    """The output folder of a run that trained nothing, and the settings that it left."""
    folder = tmp_path_factory.mktemp("result") / "run"
    shutil.copytree(checkpoint / "transformer", folder / "transformer")
    settings = {"pretrained_model_name_or_path": str(checkpoint), "num_frame_per_block": 1, "seed": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping that names pretrained_model_name_or_path"),
        ("- seed\n- 3\n", "must be a mapping that names pretrained_model_name_or_path"),
        ("seed: [\n", "config.yaml must be valid YAML: while parsing"),
        ("pretrained_model_name_or_path: [wan]\n", "must be a mapping that names pretrained_model_name_or_path"),
        (
            "pretrained_model_name_or_path: wan\nseed: many\n",
            "config.yaml must be as the run has written it, but seed",
        ),
        ("pretrained_model_name_or_path: wan\nkv_cache_dtype: int2\n", "but kv_cache_dtype must be Literal"),
        ("pretrained_model_name_or_path: wan\nrevision: 3\n", "but revision must be str | None, got 3"),
        ("pretrained_model_name_or_path: wan\nnum_frames: {}\n", "but num_frames must be a whole number"),
        ("pretrained_model_name_or_path: wan\ndenoising_step_list: 5\n", "but denoising_step_list must be a tuple"),
    ],
)
@pytest.mark.parametrize("user", [user for user in USERS if user not in ("start", "weights", "push")])
def test_a_broken_config_of_a_run_is_named(refused, result, tmp_path, user, text, message):
    shutil.copytree(result, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    line = refused(user, tmp_path / "run")
    assert message in line
    assert str(tmp_path / "run") in line


@pytest.mark.parametrize("text", ["", "{", "[1]", "\0"])
def test_a_broken_index_of_a_pipeline_is_named(refused, tmp_path, text):
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text(text)
    assert f"{tmp_path}/wan/model_index.json must" in refused("generate", tmp_path / "wan")


def test_a_checkpoint_whose_run_left_no_settings_is_not_converted(refused, tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("- 3\n")
    assert "with config.yaml in it or beside it" in refused("weights", tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nwidth: 3\nseed: 2\n", "'seed' is there twice, in line 1 and 3"),
        (b"{seed: 1, seed: 2}", "'seed' is there twice"),
        (b"\x89PNG\r\n\x1a\n\0\0", "must be valid YAML"),
        (b"\xff\xfe\x00", "must be valid YAML"),
        (b"run_name: 2024-99-99\n", "must be valid YAML"),
        (b"seed: {1: [\n", "must be valid YAML"),
        (b"? [1]\n: 2\n", "must be"),
        (b"", "must be a mapping of flag names to values, got NoneType"),
        (None, "must name a YAML file, but"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    line = refusal(capsys, TRAIN, "--config", path)
    assert message in line
    assert str(path) in line


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.safetensors", "must be a whole safetensors file, but cannot be read"),
        ("empty.safetensors", "must be a whole safetensors file, but cannot be read"),
        ("cut.safetensors", "must be a whole safetensors file, but cannot be read"),
        ("text.pt", "must be a torch checkpoint that holds tensors alone, in the zip"),
        ("empty.pth", "must be a torch checkpoint that holds tensors alone, in the zip"),
        ("cut.pt", "must be a torch checkpoint that holds tensors alone, in the zip"),
    ],
)
@pytest.mark.parametrize("user", ["generate", "evaluate", "start", "pipeline", "weights"])
def test_a_file_that_holds_no_whole_weights_is_named(refused, checkpoint, tmp_path, user, name, message):
    path = tmp_path / name
    torch.save({"generator": {"model.head": torch.zeros(1000)}}, tmp_path / "whole.pt")
    whole = tmp_path / "whole.pt"
    if path.suffix == ".safetensors":
        whole = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    content = {"text": b"a text", "empty": b"", "cut": whole.read_bytes()[:-500]}
    path.write_bytes(content[path.stem])
    line = refused(user, path)
    assert line.startswith(f"error: {path} {message}")


@pytest.mark.parametrize("user", ["generate", "evaluate", "teacher"])
def test_a_video_given_for_weights_is_no_name_on_the_hub(refused, clips, user):
    assert "a file of weights must end in .safetensors, .pt, .pth, got" in refused(user, clips / "videos" / "0.mp4")


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "config"])
@pytest.mark.parametrize("user", ["generate", "evaluate", "push", "teacher", "pipeline"])
def test_a_result_with_half_its_weights_is_named_and_not_passed_on(refused, result, tmp_path, user, damage):
    folder = shutil.copytree(result, tmp_path / "run") / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    elif damage == "index":
        index = {
            "metadata": {},
            "weight_map": {"proj_out.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"},
        }
        weights.rename(folder / "diffusion_pytorch_model-00001-of-00002.safetensors")
        (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
    else:
        (folder / "config.json").unlink()
    assert str(tmp_path / "run") in refused(user, tmp_path / "run")
    assert not (tmp_path / "made").exists()


def test_a_damaged_text_encoder_is_named(refused, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint, tmp_path / "wan")
    (base / "text_encoder" / "model.safetensors").write_bytes(b"a text")
    assert f"the text encoder of {base} must be a whole safetensors file" in refused("generate", base)


LOST_CONFIG = (
    "text_encoder/config.json",
    None,
    "text_encoder must be a whole part in diffusers format, but lacks con",
)
LOST_TOKENS = ("tokenizer/tokenizer.json", None, "tokenizer must be a whole part in diffusers format, but lacks token")
CUT_TOKENS = ("tokenizer/tokenizer.json", "{", "tokenizer.json must be valid JSON, but is cut off or something else")
EMPTY_SETTINGS = ("tokenizer/tokenizer_config.json", "", "tokenizer_config.json must be valid JSON, but is cut off")
OTHER_CONFIG = (
    *("text_encoder/config.json", '{"model_type": "umt5", "d_model": 8, "vocab_size": 12}'),
    "must have weights of the shapes that its config.json says, but has others",
)


@pytest.mark.parametrize(
    ("user", "damage"),
    [
        *(("generate", damage) for damage in (LOST_CONFIG, LOST_TOKENS, CUT_TOKENS, EMPTY_SETTINGS, OTHER_CONFIG)),
        *(("pipeline", damage) for damage in (LOST_CONFIG, CUT_TOKENS)),
        *(("train", damage) for damage in (LOST_TOKENS, OTHER_CONFIG)),
    ],
)
def test_a_part_of_the_text_encoder_that_is_missing_or_damaged_is_named(
    refused, recipe, checkpoint, tmp_path, capsys, user, damage
):
    base, (name, content, message) = shutil.copytree(checkpoint, tmp_path / "wan"), damage
    if content is None:
        (base / name).unlink()
    else:
        (base / name).write_text(content)
    if user == "train":
        settings = {**recipe, **BRIEF, "pretrained_model_name_or_path": str(base)}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "out")}))
        line = refusal(capsys, TRAIN, "--config", tmp_path / "recipe.yaml")
    else:
        line = refused(user, base)
    assert str(base) in line
    assert message in line


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A run of one step, with its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **BRIEF, "output_dir": str(folder / "run")}))
    run_here(TRAIN, "--config", folder / "recipe.yaml")
    return folder / "run"


def test_a_checkpoint_with_damaged_weights_is_not_converted_and_one_with_other_damage_is(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    command = ["convert_checkpoint.py", "--input", run / "checkpoint-1", "--output"]
    (run / "checkpoint-1" / "optimizer.bin").write_bytes(b"cut")
    run_here(*command, tmp_path / "made")
    weights = run / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors is damaged" in refusal(capsys, *command, tmp_path / "not")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("output", ["made", "made.pt", "made.safetensors"])
def test_a_conversion_that_finds_no_room_leaves_nothing_behind(result, tmp_path, monkeypatch, capsys, output):
    def fail(*given, **settings):
        (tmp_path / output).mkdir() if output == "made" else (tmp_path / output).write_bytes(b"half")
        raise RuntimeError("file write failed") if output == "made.pt" else SafetensorError("No space left on device")

    monkeypatch.setattr(convert_checkpoint, "save_file", fail)
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(convert_checkpoint.WanTransformer3DModel, "save_pretrained", fail)
    flags = [] if output == "made" else ["--to", "original"]
    flags += ["--attention_head_dim", 24]
    line = refusal(capsys, "convert_checkpoint.py", "--input", result, "--output", tmp_path / output, *flags)
    assert "write failed" in line or "No space left" in line
    assert not (tmp_path / output).exists()


# --- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "flag"),
    [
        ("generate", "--output"),
        ("evaluate", "--output_dir"),
        ("evaluate", "--vbench_export"),
        ("check", "--output_dir"),
        ("latents", "--latents_dir"),
        ("teacher", "--trajectories_dir"),
        ("start", "--output_dir"),
        ("weights", "--output"),
        ("pipeline", "--output"),
    ],
)
@pytest.mark.parametrize("where", ["/proc/nowhere", "file"])
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    write_recipe, result, clips, tmp_path, capsys, user, flag, where
):
    recipe, _ = write_recipe("user")
    table = ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos"]
    commands = users_of(result, recipe, clips, tmp_path) | {
        "check": ["check_dataset.py", *table],
        "latents": ["precompute_latents.py", "--config", recipe],
    }
    (tmp_path / "file").touch()
    place = f"{where if where.startswith('/') else tmp_path / where}/made" + ".mp4" * (user == "generate")
    line = refusal(capsys, *commands[user], flag, place)
    assert f"{flag.removeprefix('--')} must be" in line
    assert line.endswith("use another one.")


@pytest.mark.parametrize(("output", "message"), [("", "is a folder; name one in it"), ("a.txt", "ends in .mp4, got")])
def test_a_video_goes_to_an_mp4_file(checkpoint, tmp_path, capsys, output, message):
    command = ["generate.py", "--checkpoint", checkpoint, "--prompt", "a", "--output", tmp_path / output]
    assert message in refusal(capsys, *command)


def test_a_device_that_is_not_there_is_named(checkpoint, tmp_path, capsys):
    command = ["generate.py", "--checkpoint", checkpoint, "--prompt", "a", "--output", tmp_path / "a.mp4", "--device"]
    for device in ("abacus", "cuda:99"):
        assert f"device must be one that is there, such as cpu or cuda:0, got {device}" in refusal(
            capsys, *command, device
        )


# --- numbers ---------------------------------------------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "dataset_utils")
NEEDED = {"checkpoint", "input", "latents_dir", "metadata_path", "output", "output_dir", "prompt"}
NEEDED |= {"pretrained_model_name_or_path", "trajectories_dir"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_below_its_range_is_taken_by_any_script(script, capsys):
    module = importlib.import_module(script)
    demanded = NEEDED & names_of(module.Config)
    given = [token for name in sorted(demanded) for token in (f"--{name}", "x")]
    for name, hint in flat_fields(module.Config):
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is typing.Annotated]
        ranges = [mark for kind in kinds for mark in kind.__metadata__ if isinstance(mark, Range)]
        if not ranges or -7 in ranges[0]:
            continue
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            parse_config(
                module.Config, [*given, f"--{name}", *["-7"] * (2 if name in ("profile", "matching_timesteps") else 1)]
            )
        assert ended.value.code == 2
        assert f"{name} must be" in capsys.readouterr().err.replace("\n", " ")


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable(monkeypatch):
    """Commands cannot ask the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "me/nothing",
            "error: me/nothing is not on this machine, and HF_HUB_OFFLINE is set; unset it, or download it",
        ),
        ("/nowhere/x", "error: /nowhere/x must be a folder on this machine or the name of a repository, USER/NAME"),
        ("a/b/c", "error: a/b/c must be a folder on this machine or the name of a repository, USER/NAME"),
    ],
)
@pytest.mark.parametrize("user", ["generate", "evaluate", "teacher", "pipeline"])
def test_a_model_that_is_not_here_and_cannot_be_asked_for_is_named(refused, unreachable, user, name, message):
    assert refused(user, name).startswith(message)


http = sys.modules[HTTPError.__module__]  # httpx, or its successor


def answer(kind, status):
    request = http.Request("GET", "https://huggingface.co/api/models/me/wan/revision/main")
    error = kind(f"{status} Client Error for url: {request.url}.", response=http.Response(status, request=request))
    try:
        try:
            raise error
        except OSError as cause:
            raise OSError("We could not load it.\nMany sentences follow.") from cause
    except OSError as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            answer(RepositoryNotFoundError, 401),
            "me/wan must be a folder on this machine or a repository of the hub that",
        ),
        (answer(GatedRepoError, 403), "me/wan must be open to you, but has terms: accept them"),
        (answer(RevisionNotFoundError, 404), "--revision must be a branch, a tag or a commit of me/wan"),
        (
            http.ConnectError("[Errno 111] Connection refused"),
            "the model is not on this machine, and the hub is out of",
        ),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied."),
        (OSError("two\nlines"), "two lines"),
        (
            OSError(28, "No space left on device"),
            "No space left on device; make room, and run the same command again.",
        ),
        (OSError(28, "No space left on device", "a.mp4"), "a.mp4: No space left on device; make room, and run"),
    ],
)
def test_what_the_hub_or_the_machine_refuses_is_one_line(error, message):
    line = describe_refusal(error)
    assert line.startswith(message)
    assert "\n" not in line
