"""A student on disk -> a pipeline to sample with, and the settings that it was trained with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from causal_wan.config.settings import KVCacheDtype
from causal_wan.flow import choose_sampling
from causal_wan.methods.settings import method_of_run
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.progress import announced
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.timesteps import Sampler, check_denoising_step_list
from causal_wan.weights.lora import LORA_WEIGHTS_NAME
from causal_wan.weights.parts import DTYPES, load_vae
from causal_wan.weights.transformer import check_generator_ckpt, load_transformer
from causal_wan.weights.wan_names import WEIGHTS_SUFFIXES, infer_architecture, read_state, to_diffusers


# (width, latent channels) of a transformer -> where the other parts of its pipeline are.
BASES = {
    (1536, 16): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (5120, 16): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    (3072, 48): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
LINEAGE_BLOCK = 3  # latent frames of a block in CausVid's and Self Forcing's checkpoints


@dataclass(frozen=True)
class SamplingSettings:
    """Video frames, pixels, timesteps from noise to data, tokens of prompts, the sampler, precision of its cache."""

    num_frames: int
    height: int
    width: int
    timesteps: list[float]
    max_sequence_length: int
    sampler: Sampler
    kv_cache_dtype: KVCacheDtype

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Of remembered keys and values; None is that of the passes."""
        return CACHE_DTYPES[self.kv_cache_dtype]


def read_run(checkpoint: str, base: str | None = None) -> dict[str, Any]:
    """The resolved config of a run's output folder; empty for a plain diffusers folder or hub id.

    A file of weights gets the config of a run that starts from it, without training.

    Args:
        checkpoint: Output folder of a run, diffusers folder, hub id, or file of weights.
        base: Diffusers folder or hub id with the parts that a file of weights lacks; None is WAN's own for its size.

    Raises:
        ValueError: If a local folder holds neither, or the file's size is none of WAN's and there is no base.
    """
    path = Path(checkpoint)
    if path.suffix in WEIGHTS_SUFFIXES:
        check_generator_ckpt(checkpoint)
        return _run_of_weights(path, base)
    if not path.is_dir() or (path / "model_index.json").is_file():
        return {}
    has_result = (path / "transformer").is_dir() or (path / LORA_WEIGHTS_NAME).is_file()
    if not ((path / "config.yaml").is_file() and has_result):
        raise ValueError(
            f"checkpoint must be the output folder of a finished run (config.yaml and transformer/ or "
            f"{LORA_WEIGHTS_NAME}), a diffusers folder (model_index.json) or a file of weights, got {checkpoint}, "
            "which has neither."
        )
    run = yaml.safe_load((path / "config.yaml").read_text())
    return run if base is None else run | {"pretrained_model_name_or_path": base}


def _run_of_weights(path: Path, base: str | None) -> dict[str, Any]:
    if base is None:
        architecture = infer_architecture(to_diffusers(read_state(path)))
        size = (architecture["num_attention_heads"] * architecture["attention_head_dim"], architecture["in_channels"])
        if size not in BASES:
            raise ValueError(
                f"{path} must have the size of a WAN model for its VAE and text encoder to be known, got a width of "
                f"{size[0]} and {size[1]} latent channels; name a checkpoint with --pretrained_model_name_or_path."
            )
        base = BASES[size]
    return {
        "pretrained_model_name_or_path": base,
        "revision": None,
        "generator_ckpt": str(path),
        "generator_task": "causal_video" if path.suffix != ".safetensors" else "bidirectional_video",
        "num_frame_per_block": LINEAGE_BLOCK,
        "local_attn_size": -1,
        "sink_size": 0,
        "independent_first_frame": False,
    }


def choose_device(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What is given, else the GPU if there is one; and else bf16 on a GPU, fp32 on a CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, DTYPES[dtype or ("fp32" if device == "cpu" else "bf16")]


def resolve_settings(
    run: dict[str, Any],
    *,
    checkpoint: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    denoising_step_list: tuple[float, ...] | None = None,
    num_inference_steps: int | None = None,
    timestep_shift: float | None = None,
    sampler: Sampler | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
) -> SamplingSettings:
    """What is given, else the run's settings, else WAN's own.

    A run on a step list is sampled at the list, one on continuous levels in its `num_inference_steps` along the flow.

    Args:
        run: From `read_run`.
        checkpoint: Where it was read; a pipeline's folder may say how it is sampled.
        num_frames, height, width: Of the videos.
        denoising_step_list, num_inference_steps, timestep_shift, sampler: See `causal_wan.flow.choose_sampling`; of a
            number of steps and their shift, one that is not given is the run's.
        kv_cache_dtype: See `causal_wan.config.settings.MemoryConfig`.

    Raises:
        ValueError: If ways of sampling are given that exclude each other.
    """
    method = method_of_run(run)
    own = method.inference_timesteps() if method.is_continuous else method.levels()
    index = Path(checkpoint or "", "model_index.json")
    stated = json.loads(index.read_text()) if checkpoint and not run and index.is_file() else {}
    if run and num_inference_steps is not None and timestep_shift is None:
        timestep_shift = method.timestep_shift
    if method.is_continuous and timestep_shift is not None and denoising_step_list is None:
        num_inference_steps = num_inference_steps or method.num_inference_steps
    timesteps, sampler = choose_sampling(
        stated.get("denoising_step_list") or own.tolist(),
        stated.get("sampler") or method.student_sampler,
        denoising_step_list=denoising_step_list,
        num_inference_steps=num_inference_steps,
        timestep_shift=timestep_shift,
        sampler=sampler,
    )
    check_denoising_step_list(timesteps)
    return SamplingSettings(
        num_frames=num_frames or run.get("num_frames", 81),
        height=height or run.get("height", 480),
        width=width or run.get("width", 832),
        timesteps=timesteps,
        max_sequence_length=stated.get("max_sequence_length") or run.get("max_sequence_length", 512),
        sampler=sampler,
        kv_cache_dtype=kv_cache_dtype or run.get("kv_cache_dtype", "auto"),
    )


def load_student(
    checkpoint: str,
    run: dict[str, Any],
    dtype: torch.dtype,
    *,
    denoising_step_list: list[float] | None = None,
    sampler: Sampler | None = None,
    max_sequence_length: int | None = None,
    **causal: int | None,
) -> CausalWanPipeline:
    """The base checkpoint's pipeline with the run's transformer or LoRA in it.

    Args:
        checkpoint: Output folder of a run, a diffusers WAN folder or hub id, or a file of weights.
        run: From `read_run`.
        dtype: Of transformer and text encoder; the VAE stays in float32.
        denoising_step_list: What the pipeline samples at if a call does not say.
        sampler: How, likewise.
        max_sequence_length: Tokens that it pads prompts to, likewise.
        causal: `num_frame_per_block`, `local_attn_size`, `sink_size`; None is the checkpoint's own setting.

    Raises:
        ValueError: If weights do not fit, or the causal settings do not go together.
    """
    base = run.get("pretrained_model_name_or_path", checkpoint)
    parts = {"vae": load_vae(base, revision=run.get("revision")), "dtype": dtype}
    folder = Path(checkpoint)
    if run and (folder / "transformer").is_dir():
        parts["transformer"] = CausalWanTransformer3DModel.from_pretrained(
            folder, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
    elif run:
        parts["transformer"] = load_transformer(
            base,
            method_of_run(run).causal,
            generator_ckpt=run["generator_ckpt"],
            revision=run["revision"],
            dtype=dtype,
        )
    own = {"denoising_step_list": denoising_step_list, "sampler": sampler, "max_sequence_length": max_sequence_length}
    parts |= {name: value for name, value in own.items() if value is not None}
    with announced(f"loading the other parts of {base}"):
        pipeline = CausalWanPipeline.from_pretrained(base, revision=run.get("revision"), **parts, **causal)
        if run and (folder / LORA_WEIGHTS_NAME).is_file():
            pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS_NAME)
    return pipeline
