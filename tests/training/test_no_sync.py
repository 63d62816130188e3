"""A training step never waits for the device. On a GPU torch itself says so: `tests/gpu/test_gpu.py`."""

import pytest
import torch
from conftest import run_here
from torch.utils._python_dispatch import TorchDispatchMode

import causal_wan.training.steps


aten = torch.ops.aten
# What `.item()`, `float()`, `if tensor:` and `nonzero` come down to: the host needs the value.
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_}  # by a mask: the host needs to know how many


class RefuseReads(TorchDispatchMode):
    """Fails where the host needs what the device has computed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_masked = func.overloadpacket in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert func.overloadpacket not in READS and not is_masked, f"{func} makes the host wait"
        return func(*args, **(kwargs or {}))


def test_what_waits_is_noticed():
    value = torch.ones(3)
    for wait in (lambda: value[0].item(), lambda: bool(value.sum() > 0), lambda: value[value > 0], value.nonzero):
        with pytest.raises(AssertionError, match="makes the host wait"), RefuseReads():
            wait()


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("train_video_regression.py", {}),
        ("train_video_regression.py", {"use_ema": True, "gradient_checkpointing": True}),
        ("train_video_regression.py", {"lora_rank": 2}),
        ("train_video_regression.py", {"context": "clean"}),
        ("train_video_regression.py", {"perceptual_weight": 1.0}),
        ("train_dmd.py", {"critic_warmup_steps": 0}),
    ],
    ids=["plain", "ema", "lora", "teacher-forcing", "perceptual", "distribution-matching"],
)
def test_a_step_of_a_run_reads_nothing(write_recipe, monkeypatch, script, changes):
    train_step, num_checked = causal_wan.training.steps.train_step, 0

    def checked_step(run, *given, **settings):
        nonlocal num_checked
        hand_in, handed_in = run.late.hand_in, []
        run.late.hand_in = lambda *values: handed_in.append(values)
        with RefuseReads():
            train_step(run, *given, **settings)
        run.late.hand_in = hand_in
        hand_in(*handed_in[0])
        num_checked += 1

    monkeypatch.setattr(causal_wan.training.steps, "train_step", checked_step)
    path, _ = write_recipe(max_train_steps=2, **changes)
    run_here(script, "--config", path)
    assert num_checked == 2 + (script == "train_dmd.py")  # the student has its turn in the first step
