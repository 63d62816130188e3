"""What users and machines do wrong ends a command with one line that says what to do, and never with a traceback."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import run_here
from safetensors import SafetensorError

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
