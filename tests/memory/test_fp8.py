"""Products in 8 bits, as torchao and accelerate do them; on a CPU as well."""

import json

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file

from causal_wan.training import setup as training_setup


pytest.importorskip("torchao", reason="optional: pip install torchao")


def run(write_recipe, name, **changes):
    path, output_dir = write_recipe(name, max_train_steps=4, **changes)
    run_here("train_video_regression.py", "--config", path)
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return output_dir, [entry["generator_loss"] for entry in entries if "generator_loss" in entry]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_fp8_learns_about_what_bf16_does_and_leaves_the_same_files(write_recipe, monkeypatch, lora_rank):
    chosen = []
    is_computed_in_fp8 = training_setup._is_computed_in_fp8

    def watched(module, name):
        chosen.append(name) if is_computed_in_fp8(module, name) else None
        return is_computed_in_fp8(module, name)

    monkeypatch.setattr(training_setup, "_is_computed_in_fp8", watched)
    folders, losses = zip(
        *(
            run(write_recipe, precision, mixed_precision=precision, lora_rank=lora_rank, learning_rate=1e-3)
            for precision in ("bf16", "fp8")
        ),
        strict=True,
    )
    assert any("ffn" in name for name in chosen)
    assert not any("patch" in name or "condition" in name for name in chosen)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    name = "pytorch_lora_weights.safetensors" if lora_rank else "transformer/diffusion_pytorch_model.safetensors"
    weights = [load_file(folder / name) for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.isfinite(weight).all() for weight in weights[1].values())


def test_a_missing_library_is_named_before_anything_is_loaded(write_recipe, monkeypatch, capsys):
    monkeypatch.setattr(training_setup.importlib.util, "find_spec", lambda name: None)
    path, _ = write_recipe(mixed_precision="fp8")
    with pytest.raises(SystemExit):
        run_here("train_video_regression.py", "--config", path)
    assert "pip install torchao" in capsys.readouterr().err
