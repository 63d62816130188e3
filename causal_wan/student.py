"""A student on disk -> a pipeline to sample with, and the settings that it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from causal_wan.flow import training_timesteps
from causal_wan.models import DTYPES, LORA_WEIGHTS_NAME, causal_settings, load_transformer, load_vae
from causal_wan.pipeline import DEFAULT_STEP_LIST, CausalWanPipeline
from causal_wan.transformer import CausalWanTransformer3DModel


@dataclass(frozen=True)
class SamplingSettings:
    """Video frames, pixels, timesteps from noise to data, and tokens that prompts are padded to."""

    num_frames: int
    height: int
    width: int
    timesteps: list[float]
    max_sequence_length: int


def read_run(checkpoint: str) -> dict[str, Any]:
    """The resolved config of a run's output folder; empty for a plain diffusers folder or hub id.

    Raises:
        ValueError: If a local folder holds neither.
    """
    folder = Path(checkpoint)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return {}
    has_result = (folder / "transformer").is_dir() or (folder / LORA_WEIGHTS_NAME).is_file()
    if not ((folder / "config.yaml").is_file() and has_result):
        raise ValueError(
            f"checkpoint must be the output folder of a finished run (config.yaml and transformer/ or "
            f"{LORA_WEIGHTS_NAME}) or a diffusers folder (model_index.json), got {checkpoint}, which has neither."
        )
    return yaml.safe_load((folder / "config.yaml").read_text())


def choose_device(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What is given, else the GPU if there is one; and else bf16 on a GPU, fp32 on a CPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, DTYPES[dtype or ("fp32" if device == "cpu" else "bf16")]


def resolve_settings(
    run: dict[str, Any],
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    denoising_step_list: tuple[float, ...] | None = None,
) -> SamplingSettings:
    """What is given, else the run's settings, else WAN's own."""
    if denoising_step_list is not None or not run:
        timesteps = training_timesteps(denoising_step_list or DEFAULT_STEP_LIST)
    else:
        timesteps = training_timesteps(
            run["denoising_step_list"],
            warp_denoising_step=run["warp_denoising_step"],
            timestep_shift=run["timestep_shift"],
        )
    return SamplingSettings(
        num_frames=num_frames or run.get("num_frames", 81),
        height=height or run.get("height", 480),
        width=width or run.get("width", 832),
        timesteps=timesteps.tolist(),
        max_sequence_length=run.get("max_sequence_length", 512),
    )


def load_student(
    checkpoint: str, run: dict[str, Any], dtype: torch.dtype, *, num_frame_per_block: int | None = None
) -> CausalWanPipeline:
    """The base checkpoint's pipeline with the run's transformer or LoRA in it.

    Args:
        checkpoint: Output folder of a run, or a diffusers WAN folder or hub id.
        run: From `read_run`.
        dtype: Of transformer and text encoder; the VAE stays in float32.
        num_frame_per_block: Latent frames of a block; None is the checkpoint's own setting.
    """
    base = run.get("pretrained_model_name_or_path", checkpoint)
    causal = {} if num_frame_per_block is None else {"num_frame_per_block": num_frame_per_block}
    parts = {"vae": load_vae(base, revision=run.get("revision")), "dtype": dtype}
    if not run:
        return CausalWanPipeline.from_pretrained(base, **parts, **causal)
    folder = Path(checkpoint)
    if (folder / "transformer").is_dir():
        transformer = CausalWanTransformer3DModel.from_pretrained(
            folder, subfolder="transformer", dtype=dtype, use_safetensors=True, **causal
        )
        return CausalWanPipeline.from_pretrained(base, transformer=transformer, **parts)
    causal = {**causal_settings(run), **causal}
    transformer = load_transformer(
        base, generator_ckpt=run["generator_ckpt"], revision=run["revision"], dtype=dtype, **causal
    )
    pipeline = CausalWanPipeline.from_pretrained(base, transformer=transformer, **parts)
    pipeline.load_lora_weights(str(folder), weight_name=LORA_WEIGHTS_NAME)
    return pipeline
