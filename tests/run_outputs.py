"""What runs leave, for tests to compare."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file


TIMINGS = ("seconds", "memory", "per_second")


def weights(output_dir):
    return load_file(output_dir / "transformer" / "diffusion_pytorch_model.safetensors")


def metrics(output_dir):
    """Logged entries without what depends on the machine's speed."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not any(part in key for part in TIMINGS)}
        for line in lines
    ]


NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="optional: pip install deepspeed"
)


def result(output_dir):
    """The weights that a run leaves."""
    lora = output_dir / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else output_dir / "transformer" / "diffusion_pytorch_model.safetensors")


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])
