"""The strategies of accelerate_configs on two CPU processes: they learn what one process learns, and go on exactly."""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import launch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file


SCRIPT = "train_video_regression.py"
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="optional: pip install deepspeed"
)
STRATEGIES = ["fsdp2", pytest.param("zero2", marks=NEEDS_DEEPSPEED), pytest.param("zero3", marks=NEEDS_DEEPSPEED)]
LOGGED = ("generator_loss", "generator_grad_norm", "loss_at_time_1000", "validation_loss")


def metrics(output_dir):
    """What was logged and does not depend on the clock."""
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: entry[name] for name in LOGGED if name in entry} for entry in entries]


def result(output_dir):
    """The weights that a run leaves."""
    lora = output_dir / "pytorch_lora_weights.safetensors"
    return load_file(lora if lora.exists() else output_dir / "transformer" / "diffusion_pytorch_model.safetensors")


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_learn_what_one_does_and_save_the_same_files(write_recipe, strategy, lora_rank):
    common = {"lora_rank": lora_rank, "validation_steps": 2, "use_ema": strategy == "fsdp2", "mixed_precision": "no"}
    path, alone = write_recipe("alone", train_batch_size=2, **common)
    launch(SCRIPT, path)
    path, together = write_recipe("together", train_batch_size=1, **common)
    launch(SCRIPT, path, num_processes=2, strategy=strategy)
    for entry, expected in zip(metrics(together), metrics(alone), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    assert result(together).keys() == result(alone).keys()
    expected, learned = flat(result(alone)), flat(result(together))
    assert (learned - expected).norm() < 1e-3 * expected.norm()  # where gradients vanish, Adam amplifies rounding
    if not lora_rank:
        WanTransformer3DModel.from_pretrained(together / "transformer")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_broken_run_goes_on_exactly_and_with_another_number_of_processes(write_recipe, strategy):
    path, output_dir = write_recipe(train_batch_size=1, use_ema=strategy == "fsdp2", mixed_precision="no")
    launch(SCRIPT, path, num_processes=2, strategy=strategy)
    expected, logged = flat(result(output_dir)), metrics(output_dir)

    def break_after_step_2():
        shutil.rmtree(output_dir / "checkpoint-4")
        shutil.rmtree(output_dir / "transformer")

    break_after_step_2()
    launch(SCRIPT, path, "--resume_from_checkpoint", "latest", num_processes=2, strategy=strategy)
    assert torch.equal(flat(result(output_dir)), expected)
    assert metrics(output_dir) == logged

    break_after_step_2()
    flags = ["--resume_from_checkpoint", "latest", "--train_batch_size", "2"]
    run = launch(SCRIPT, path, *flags, num_processes=1, strategy=strategy, check=False)
    if strategy != "fsdp2":
        assert run.returncode != 0
        assert "must be resumed by as many processes as wrote it, 2, got 1" in run.stderr
        return
    assert "the checkpoint is from 2 process(es), now there are 1" in run.stderr
    assert (flat(result(output_dir)) - expected).norm() < 1e-3 * expected.norm()
    for entry, wanted in zip(metrics(output_dir), logged, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-3)
