import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from conftest import ROOT

import train_video_regression
from causal_wan.config.fields import flat_dict
from causal_wan.config.parsing import parse_config, write_recipe
from causal_wan.config.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, checked_dataclass
from causal_wan.results.run_record import RunRecord


@checked_dataclass
class Inner:
    learning_rate: PositiveFloat = 1e-3
    """Rate."""
    use_ema: bool = False
    """Average."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """Precision."""
    steps: tuple[NonNegativeFloat, ...] = (1000, 0)
    """Levels."""


@checked_dataclass
class Config:
    inner: Inner
    """Group."""
    output_dir: str
    """Where."""


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_recipe_gives_defaults_and_flags_override(tmp_path):
    argv = recipe(tmp_path, "output_dir: a\nlearning_rate: 1e-4\nsteps: [1000, 500]\nuse_ema: true\n")
    config = parse_config(Config, [*argv, "--learning_rate", "2e-4", "--no_use_ema"])
    assert flat_dict(config) == {
        "learning_rate": 2e-4,
        "use_ema": False,
        "mixed_precision": None,
        "steps": [1000, 500],
        "output_dir": "a",
    }


def test_keys_of_the_document_are_accepted_in_recipes_and_flags(tmp_path):
    config = parse_config(Config, recipe(tmp_path, "output_dir: a\nlr: 0.5\nmixed_precision: true\n"))
    assert (config.inner.learning_rate, config.inner.mixed_precision) == (0.5, "bf16")
    assert parse_config(Config, ["--output-dir", "a", "--lr", "0.25"]).inner.learning_rate == 0.25
    config = parse_config(Config, recipe(tmp_path, "output_dir: a\nmixed_precision: no\n"))
    assert config.inner.mixed_precision == "no"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--use_ema"], True), (["--use_ema", "true"], True), (["--use_ema=false"], False), (["--no_use_ema"], False)],
)
def test_switches_may_be_written_with_and_without_a_value(argv, expected):
    assert parse_config(Config, ["--output_dir", "a", *argv]).inner.use_ema is expected


def test_a_written_recipe_gives_the_same_config(tmp_path):
    config = parse_config(Config, ["--output_dir", "a b", "--steps", "900", "100", "--use_ema"])
    write_recipe(flat_dict(config), tmp_path / "config.yaml")
    assert parse_config(Config, ["--config", str(tmp_path / "config.yaml")]) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["output_dir"] == "a b"


def test_the_recipe_that_a_run_leaves_gives_the_same_config(tmp_path):
    script, sketch = train_video_regression.Config, Path(__file__).parents[2] / "examples" / "sketch" / "recipe.yaml"
    flags = ["--profile", "2", "3", "--adam_epsilon", "1e-10", "--lora_rank", "4", "--no_cache_latents"]
    config = parse_config(script, ["--config", str(sketch), *flags, "--color_jitter", "0", "0.1", "0", "0"])
    write_recipe(flat_dict(config), tmp_path / "config.yaml")
    assert parse_config(script, ["--config", str(tmp_path / "config.yaml")]) == config
    record = RunRecord.of_folder(tmp_path)
    assert (record.method, record.model) == (config.method, config.model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "output_dir: a\nlearning_rat: 1\n",
            "'learning_rat' is not a setting of this script; did you mean 'learning_rate'?",
        ),
        ("- a\n- b\n", "must be a mapping"),
        ("output_dir: {a: 1}\n", "recipes are flat"),
        ("output_dir: [\n", "must be valid YAML"),
        ("output_dir: a\nlearning_rate: -1\n", "'learning_rate' must be above 0, got -1."),
    ],
)
def test_bad_recipes_end_with_one_message(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(Config, recipe(tmp_path, text))
    assert exit_info.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown


def test_a_misspelt_flag_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--output_dir", "a", "--learning_rte", "1"])
    shown = capsys.readouterr()
    assert "--learning_rate" in shown.err + shown.out


def test_a_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--config", "nowhere.yaml"])
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def test_a_name_of_the_script_itself_is_no_alias(tmp_path):
    @checked_dataclass
    class WithWorkers:
        num_workers: PositiveInt = 2
        """Processes."""

    assert parse_config(WithWorkers, ["--num_workers", "3"]).num_workers == 3
    assert parse_config(WithWorkers, recipe(tmp_path, "num_workers: 4\n")).num_workers == 4


@checked_dataclass
class Prompts:
    prompt: str | None = None
    """One."""
    prompts: tuple[str, ...] = ()
    """Several."""
    name: str = ""
    """Text."""
    use_ema: bool = False
    """Switch."""
    steps: tuple[NonNegativeFloat, ...] = ()
    """Numbers."""


DASHED = ["--- a line", "-- a-b_c", "-a dog runs", "--a dog = two", "-5 degrees", "-", "—", "---", "--=", "true"]


@pytest.mark.parametrize("text", [*DASHED, "--dog", "-d", "--prompt", "--=--", "a=b", "None of them", "-0.5"])
def test_a_text_may_begin_with_dashes(tmp_path, text):
    if text in DASHED:
        assert parse_config(Prompts, ["--prompt", text]).prompt == text
        assert parse_config(Prompts, ["--prompts", "a", text, text, "--name", text]) == Prompts(
            prompts=("a", text, text), name=text
        )
    assert parse_config(Prompts, [f"--prompt={text}"]).prompt == text
    assert parse_config(Prompts, [f"--prompts={text}", "--use_ema"]) == Prompts(prompts=(text,), use_ema=True)
    config = Prompts(prompt=text, prompts=(text, "a", text), name=text)
    write_recipe(flat_dict(config), tmp_path / "config.yaml")
    assert parse_config(Prompts, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "--use_ema"], "prompt"),
        (["--prompts", "a", "--no_such_flag", "1"], "no_such_flag"),
        (["--name", "a", "--- b"], "--- b"),
        (["--steps", "-- a"], "-- a"),
    ],
)
def test_flags_are_no_texts_and_texts_no_flags(capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        parse_config(Prompts, argv)
    assert error.value.code == 2
    assert message in "".join(capsys.readouterr())


def test_values_that_are_named_as_switches_are_values():
    config = parse_config(Prompts, ["--prompts", "use_ema", "true", "--use_ema", "true"])
    assert config == Prompts(prompts=("use_ema", "true"), use_ema=True)


def test_a_recipe_may_have_a_mark_and_one_in_another_encoding_is_named(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes("prompt: café\n".encode(encoding))
        assert parse_config(Prompts, ["--config", str(path)]).prompt == "café"
    path.write_bytes("prompt: café\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        parse_config(Prompts, ["--config", str(path)])
    assert "recipe.yaml must be valid YAML" in capsys.readouterr().err


INTERRUPTED = """
import sys
import push_to_hub
from causal_wan.config.parsing import parse_config
sys.argv[1:] = ["--checkpoint", "run", "--hub_model_id", "me/run"]
parse_config(push_to_hub.Config)
raise {error}
"""


@pytest.mark.parametrize(
    ("error", "status", "end"),
    [("KeyboardInterrupt", -signal.SIGINT, "stopped by Ctrl-C.\n"), ("TypeError('ours')", 1, "TypeError: ours\n")],
)
def test_ctrl_c_ends_a_command_with_one_line_and_faults_of_ours_with_a_traceback(error, status, end):
    command = [sys.executable, "-c", INTERRUPTED.format(error=error)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert result.stderr.endswith(end)
    assert ("Traceback" in result.stderr) == (status == 1)


def test_settings_that_find_no_room_leave_those_that_are_there_and_are_named(tmp_path, monkeypatch):
    path, write = tmp_path / "config.yaml", Path.write_text
    write_recipe({"seed": 1}, path)

    def write_half(file, text, **settings):
        write(file, text[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space left") as failed:
        write_recipe({"seed": 2}, path)
    assert failed.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    assert yaml.safe_load(path.read_text()) == {"seed": 1}
