"""Scripts on a GPU that is not there: no run mixes devices or reads too early, and no training step waits for the GPU.

What a real one shows beside is in `test_gpu.py`.
"""

import shutil
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from conftest import ROOT, run_here
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from fake_cuda import FakeCuda, on_fake_gpu
from transformers import UMT5Config

import causal_wan.runs.inputs
import causal_wan.training.loop
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.devices import LateCopy, to_device
from causal_wan.model.transformer import CausalWanTransformer3DModel


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU where there is none")

SCRIPT = "train_video_regression.py"
TRAINING = {
    "mixed_precision": "bf16",
    "num_frames": 9,
    "max_train_steps": 2,
    "gradient_accumulation_steps": 2,
    "num_validation_samples": 1,
    "logging_steps": 100,
    "checkpointing_steps": 100,
    "validation_steps": 100,  # and at the end
}


@pytest.fixture
def write_short_recipe(write_recipe, recipe):
    """Writes recipes of two steps of two passes, and returns their path and the output folder."""

    def write(validates=False, **changes):
        held_out = recipe["validation_metadata_path"] if validates else None
        return write_recipe(**{**TRAINING, "validation_metadata_path": held_out, **changes})

    return write


@dataclass
class WatchedRun:
    """A script on a fake GPU.

    Attributes:
        gpu: Has noted the events of all of the run.
        steps: The events of each training step, from its first batch to its end.
    """

    gpu: FakeCuda
    steps: list[Counter] = field(default_factory=list)

    def begin_step(self):
        self.steps.append(self.gpu.events.copy())

    def end_step(self):
        self.steps[-1] = self.gpu.events - self.steps[-1]


@pytest.fixture
def run_on_gpu(monkeypatch):
    """Runs a script, and checks what holds of all."""

    def run(script, *flags, **settings):
        with on_fake_gpu(**settings) as gpu, monkeypatch.context() as patch:
            watched = WatchedRun(gpu)

            def before(method, note):
                return lambda *given, **named: (note(), method(*given, **named))[1]

            prepare, count = causal_wan.training.steps.prepare_passes, causal_wan.training.loop.StepLog.count_step
            patch.setattr(causal_wan.training.loop, "prepare_passes", before(prepare, watched.begin_step))
            patch.setattr(causal_wan.training.loop.StepLog, "count_step", before(count, watched.end_step))
            run_here(script, *flags)
        assert gpu.found("mismatch", "unsafe") == []
        assert [dict(step) for step in watched.steps] == [{}] * len(watched.steps)
        return watched

    return run


# --- training --------------------------------------------------------------------------------------------------------

VIDEO_RUNS = {
    "plain": {},
    "validated": {"validates": True, "offload_vae": True},
    "recomputed": {"use_ema": True, "gradient_checkpointing": True, "offload_activations": True},
    "kept attention": {"gradient_checkpointing": True, "keep_attention_outputs": True},
    "lora": {"lora_rank": 2, "offload_vae": True},
    "fp8 base": {"lora_rank": 2, "quantize_base": "fp8"},
    "teacher forcing": {"context": "clean", "timestep_sampling": "logit_normal", "loss_weighting": "bell"},
    "augmented": {"context": "augmented", "loss_space": "velocity", "local_attn_size": 2},
    "keeping latents": {"cache_latents": True},
    "compared": {"validates": True, "perceptual_weight": 1.0},
}


@pytest.mark.parametrize("changes", VIDEO_RUNS.values(), ids=VIDEO_RUNS.keys())
def test_a_step_of_video_regression_waits_for_nothing(write_short_recipe, run_on_gpu, changes):
    path, _ = write_short_recipe(**changes)
    assert len(run_on_gpu(SCRIPT, "--config", path).steps) == 2


def test_a_step_on_streamed_clips_waits_for_nothing_though_it_embeds_their_prompts(
    write_short_recipe, tars, run_on_gpu
):
    path, _ = write_short_recipe(**{**tars, "frames_schedule": None, "max_train_steps": 2})
    assert len(run_on_gpu(SCRIPT, "--config", path).steps) == 2


def test_a_step_on_latents_that_were_encoded_before_waits_for_nothing(write_short_recipe, run_on_gpu, tmp_path):
    path, _ = write_short_recipe(latents_dir=str(tmp_path / "latents"))
    run_on_gpu("precompute_latents.py", "--config", path)
    assert len(run_on_gpu(SCRIPT, "--config", path).steps) == 2


def test_a_step_on_trajectories_waits_for_nothing(write_short_recipe, run_on_gpu, tmp_path):
    path, _ = write_short_recipe(trajectories_dir=str(tmp_path / "trajectories"), context="clean")
    run_on_gpu("precompute_trajectories.py", "--config", path, "--num_inference_steps", 4, "--guidance_scale", 2)
    assert len(run_on_gpu("train_ode_regression.py", "--config", path).steps) == 2


MATCHING_RUNS = [
    pytest.param({"use_ema": True, "validates": True}, id="all weights", marks=pytest.mark.slow),
    pytest.param({"lora_rank": 2, "gradient_checkpointing": True}, id="lora", marks=pytest.mark.slow),
    pytest.param({"real_clip_probability": 0.5, "regression_weight": 0.1, "cache_latents": True}, id="with clips"),
    pytest.param(
        {"adversarial_weight": 1.0, "adversarial_warmup_steps": 0, "gradient_checkpointing": True},
        id="discriminator",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("changes", MATCHING_RUNS)
def test_a_step_of_distribution_matching_waits_for_nothing(write_short_recipe, run_on_gpu, changes):
    turns = {"critic_warmup_steps": 1, "student_every": 1, "critic_learning_rate": 0.01}
    path, _ = write_short_recipe(**turns, **changes)
    assert len(run_on_gpu("train_dmd.py", "--config", path).steps) == 2


def test_what_the_host_gets_late_has_arrived_and_nothing_is_lost():
    late, used = LateCopy(), []
    with FakeCuda() as gpu:
        late.hand_in(torch.zeros(2, device="cuda"), used.append)
        assert used == []
        late.hand_in(torch.ones(3, device="cuda"), used.append)
        assert [(copy + 1).shape for copy in used] == [(2,)]
        late.flush()
        assert [(copy + 1).shape for copy in used] == [(2,), (3,)]
    assert not gpu.events


# --- sampling --------------------------------------------------------------------------------------------------------


def test_generating_waits_for_the_frames_of_each_block_and_nothing_else(checkpoint, clips, run_on_gpu, tmp_path):
    flags = ["--checkpoint", checkpoint, "--prompt", "a ball", "--output", tmp_path / "out.mp4", "--stream"]
    flags += ["--num_frames", 17, "--height", 32, "--width", 48, "--num_frame_per_block", 1, "--guidance_scale", 2]
    flags += ["--local_attn_size", 3, "--sink_size", 1, "--video", clips / "videos" / "6.mp4", "--num_video_frames", 5]
    gpu = run_on_gpu("generate.py", *flags).gpu
    waits = {event.place.split(":")[0]: count for event, count in gpu.events.items() if event.kind == "wait"}
    assert waits == {"causal_wan/video/writing.py": 5}
    # Weights, and the clip that is continued: both before the first block.
    assert {event.place.split(":")[0] for event in gpu.found("upload")} == {
        "generate.py",
        "causal_wan/model/vae.py",
    }


def test_a_student_and_its_base_are_evaluated(checkpoint, clips, run_on_gpu, tmp_path):
    flags = ["--checkpoint", checkpoint, "--num_frame_per_block", 1, "--num_frames", 9, "--height", 32, "--width", 48]
    flags += ["--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos", "--num_samples", 1]
    flags += ["--lpips_net", "None", "--num_base_steps", 1, "--output_dir", tmp_path / "out"]
    run_on_gpu("evaluate.py", *flags)
    assert (tmp_path / "out" / "metrics.json").is_file()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_latents", [False, True], ids=["plain", "kept"])
def test_clips_are_gone_from_the_gpu_before_the_next_ones_come_and_their_latents_are_kept_to_the_last(
    write_short_recipe, run_on_gpu, monkeypatch, keeps_latents
):
    clips, num_others = [], []

    def upload(tensor, device):
        moved = to_device(tensor, device)
        if tensor.dtype == torch.uint8:
            num_others.append(sum(clip() is not None for clip in clips))
            clips.append(weakref.ref(moved.untyped_storage()))
        return moved

    monkeypatch.setattr(causal_wan.runs.inputs, "to_device", upload)
    path, output_dir = write_short_recipe(max_train_steps=1, cache_latents=keeps_latents)
    run_on_gpu(SCRIPT, "--config", path)
    assert num_others == ([0, 0, 0, 0] if keeps_latents else [0, 1, 0, 1])  # on its own, or with the other of its pass
    if keeps_latents:
        assert len(TensorCache(output_dir / "cache" / "latents")) == 4


WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096}
GIB = 2**30


def bytes_kept_for_gradients(num_layers, *, block, teacher_forcing):
    """By a forward pass of WAN 1.3B over 81 x 480 x 832, in bf16."""
    with FakeCuda(counts_memory=True) as gpu:
        with torch.device("cuda"):
            transformer = CausalWanTransformer3DModel(**WAN, num_layers=num_layers, num_frame_per_block=block)
            latents, timesteps = torch.zeros(1, 16, 21, 60, 104), torch.zeros(1, 21)
            prompt_embeds = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        context, before = latents if teacher_forcing else None, gpu.allocated
        with torch.autocast("cuda", torch.bfloat16):
            given = (latents, timesteps, prompt_embeds)
            velocity = transformer(*given, return_dict=False, context_latents=context)
        assert velocity[0].requires_grad
        return gpu.allocated - before


@pytest.mark.parametrize(("block", "teacher_forcing", "gib"), [(None, False, 3.91), (3, False, 4.00), (3, True, 8.08)])
def test_a_layer_keeps_the_keys_of_all_blocks_once_and_in_16_bits(block, teacher_forcing, gib):
    settings = {"block": block, "teacher_forcing": teacher_forcing}
    of_a_layer = bytes_kept_for_gradients(2, **settings) - bytes_kept_for_gradients(1, **settings)
    assert of_a_layer / GIB == pytest.approx(gib, abs=0.01)


# --- WAN 1.3B at its real size, with 2 of its layers -----------------------------------------------------------------

UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
REAL_SIZE = {
    **{"num_frames": 81, "height": 480, "width": 832, "num_frame_per_block": 3, "short_clips": "pad"},
    **{"train_batch_size": 1, "vae_dtype": "bf16"},
}


@pytest.fixture(scope="session")
def wan(tmp_path_factory):
    """A WAN folder of configurations without weights."""
    folder = tmp_path_factory.mktemp("wan")
    with torch.device("meta"):
        WanTransformer3DModel(**WAN, num_layers=2).save_config(folder / "transformer")
        AutoencoderKLWan().save_config(folder / "vae")
    UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu").save_pretrained(folder / "text_encoder")
    shutil.copytree(ROOT / "examples" / "sketch" / "tiny-wan" / "tokenizer", folder / "tokenizer")
    (folder / "model_index.json").write_text("{}")
    return {"pretrained_model_name_or_path": str(folder), **REAL_SIZE}


REAL_RUNS = {**VIDEO_RUNS, "compared": {"perceptual_weight": 1.0}}  # minutes with a validation, which "validated" has


@pytest.mark.slow
@pytest.mark.parametrize("changes", REAL_RUNS.values(), ids=REAL_RUNS.keys())
def test_a_step_of_wan_1_3b_waits_for_nothing(write_short_recipe, run_on_gpu, wan, changes):
    window = {"local_attn_size": 9} if "local_attn_size" in changes else {}
    path, _ = write_short_recipe(**{**wan, **changes, **window})
    watched = run_on_gpu(SCRIPT, "--config", path, has_weights=False, counts_memory=True)
    assert len(watched.steps) == 2
    assert watched.gpu.peak < 80 * GIB


@pytest.mark.slow
def test_a_step_of_wan_1_3b_on_streamed_clips_waits_for_nothing(write_short_recipe, run_on_gpu, wan, tars):
    path, _ = write_short_recipe(**{**tars, **wan, "frames_schedule": None, "max_train_steps": 2})
    assert len(run_on_gpu(SCRIPT, "--config", path, has_weights=False).steps) == 2


@pytest.mark.slow
def test_a_step_of_wan_1_3b_on_trajectories_waits_for_nothing(write_short_recipe, run_on_gpu, wan, tmp_path):
    path, _ = write_short_recipe(**wan, trajectories_dir=str(tmp_path / "trajectories"))
    flags = ["--config", path, "--num_inference_steps", 4]
    run_on_gpu("precompute_trajectories.py", *flags, has_weights=False)
    assert len(run_on_gpu("train_ode_regression.py", "--config", path, has_weights=False).steps) == 2
