"""Compiled layers: one graph a shape, the numbers of eager ones, and what does not go together with them."""

import pytest
import torch
from conftest import TINY_TRANSFORMER, run_here
from torch._dynamo.testing import CompileCounterWithBackend

from causal_wan.config.settings import MemoryConfig
from causal_wan.memory.levers import enable_gradient_checkpointing
from causal_wan.model import compiling
from causal_wan.model.compiling import compile_layers
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.weights.lora import add_lora


SHAPES = [(2, 6, 4, 6), (1, 6, 6, 8), (1, 4, 4, 6)]


def make_student(lora):
    torch.manual_seed(0)
    student = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=2).train()
    if lora:
        add_lora(student, rank=2, alpha=2, target_modules=("to_q", "to_v"))
    return student


def run_pass(student, shape, context):
    """The velocity of a batch and the gradients of the weights."""
    batch_size, num_frames, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    latents = torch.randn(batch_size, 4, num_frames, height, width, generator=generator)
    timesteps = 1000 * torch.rand(batch_size, num_frames, generator=generator)
    embeds = torch.randn(batch_size, 7, 16, generator=generator)
    velocity = student(latents, timesteps, embeds, context_latents=latents if context else None).sample
    velocity.square().mean().backward()
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    return velocity.detach(), gradients


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("lora", "context", "recompute", "backend"),
    [
        *((False, False, False, "aot_eager"), (True, False, True, "eager")),
        pytest.param(False, True, True, "eager", marks=pytest.mark.slow),
        pytest.param(True, True, False, "eager", marks=pytest.mark.slow),
    ],
)
def test_all_layers_share_one_graph_a_shape_and_compute_what_eager_ones_do(lora, context, recompute, backend):
    eager, compiled = make_student(lora), make_student(lora)
    counter = CompileCounterWithBackend(backend)
    if recompute:
        enable_gradient_checkpointing(compiled, MemoryConfig(gradient_checkpointing=True))
    compile_layers(compiled, len(SHAPES), backend=counter)
    for _ in range(2):  # the second time, nothing is compiled
        for shape in SHAPES:
            for ours, theirs in zip(run_pass(compiled, shape, context), run_pass(eager, shape, context), strict=True):
                torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == len(SHAPES) * (2 if lora else 1)  # the first layer's input has no gradient
    assert list(compiled.state_dict()) == list(eager.state_dict())


@torch._dynamo.config.patch(recompile_limit=8)  # other tests have raised it
def test_more_shapes_than_torch_allows_by_default_are_no_error():
    student, counter = make_student(False), CompileCounterWithBackend("eager")
    shapes = [(1, frames, height, 4) for frames in (2, 4, 6) for height in (4, 6, 8)]
    assert len(shapes) > torch._dynamo.config.recompile_limit
    compile_layers(student, len(shapes), backend=counter)
    for shape in shapes:
        run_pass(student, shape, False)
    assert counter.frame_count == len(shapes)


def test_a_run_compiles_for_its_clips_alone_and_validates_without(write_recipe, monkeypatch, capsys):
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers = compiling.compile_layers
    monkeypatch.setattr("causal_wan.runs.parts.compile_layers", lambda *given: compile_layers(*given, backend=counter))
    path, plain = write_recipe("plain", max_train_steps=3)
    run_here("train_video_regression.py", "--config", path)
    path, compiled = write_recipe("compiled", max_train_steps=3, compile=True)
    run_here("train_video_regression.py", "--config", path)
    assert counter.frame_count == 1
    losses = []
    for folder in (plain, compiled):
        entries = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "generator_loss" in line]
        losses.append([float(line.split('"generator_loss": ')[1].split(",")[0]) for line in entries])
        assert ("compile_seconds" in entries[-1]) == (folder == compiled)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True, "keep_attention_outputs": True}, {"lora_rank": 2, "quantize_base": "fp8"}],
)
def test_levers_that_compiled_layers_do_not_have_are_refused(write_recipe, capsys, changes):
    path, _ = write_recipe(compile=True, **changes)
    with pytest.raises(SystemExit):
        run_here("train_video_regression.py", "--config", path)
    assert "compile makes one operation of a layer" in capsys.readouterr().err
