"""What users and machines do wrong ends a command with one line that says what to do, and never with a traceback."""

import shutil
from pathlib import Path

import pytest
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
