"""Generates videos from prompts with a student that `train_video_regression.py` has trained.

    python generate.py --checkpoint outputs/my-wan --prompt "Draw a sketch of bird step by step..." --output bird.mp4
    python generate.py --checkpoint outputs/my-wan --prompts_file prompts.txt --output videos/

`--checkpoint` is the output folder of a run (full fine-tune or LoRA), or any diffusers WAN folder or hub id: then the
transformer is run as it is, causally with `--num_frame_per_block`. All other settings default to those of the run.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from tqdm.auto import tqdm

from causal_wan.config import parse_config, user_errors
from causal_wan.flow import training_timesteps
from causal_wan.models import (
    LORA_WEIGHTS_NAME,
    causal_settings,
    check_video_size,
    decode_latents,
    encode_prompts,
    load_transformer,
    load_vae,
    pad_prompt_embeds,
)
from causal_wan.pipeline import DEFAULT_STEP_LIST, CausalWanPipeline
from causal_wan.regression import sample_generator
from causal_wan.transformer import CausalWanTransformer3DModel
from causal_wan.validation import FRAME_RATE, write_video


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to generate, with which checkpoint."""

    checkpoint: str
    """Output folder of a run, or a diffusers WAN folder or hub id."""
    prompt: str | None = None
    """One prompt."""
    prompts_file: str | None = None
    """Text file with one prompt a line, or a CSV with a `prompt` column."""
    output: str = "out.mp4"
    """The mp4 of one prompt; with prompts_file a folder, which gets 00.mp4, 01.mp4, ..."""
    num_prompts: int | None = None
    """Take only the first so many prompts of prompts_file."""
    seed: int = 0
    """Seeds the noise; the same seed, prompt number and checkpoint give the same video."""
    num_frames: int | None = None
    """Video frames, 4k + 1; None is what the run was trained on, or 81."""
    height: int | None = None
    """Pixels; None is what the run was trained on, or 480."""
    width: int | None = None
    """Pixels; None is what the run was trained on, or 832."""
    denoising_step_list: tuple[float, ...] | None = None
    """Timesteps to sample at; None is the run's list, or 1000 757 522. A trailing 0 is dropped."""
    num_frame_per_block: int | None = None
    """Latent frames of a block; None is the checkpoint's own setting."""
    frame_rate: float = FRAME_RATE
    """Frames a second of the mp4."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the transformer and the text encoder; None is bf16 on a GPU and fp32 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("give either --prompt or --prompts_file, and not both.")


@dataclass(frozen=True)
class Settings:
    """What the run says and the flags override."""

    num_frames: int
    height: int
    width: int
    timesteps: list[float]
    max_sequence_length: int


def main(config: Config) -> None:
    """Loads the checkpoint, samples each prompt and writes mp4 files."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = config.dtype or ("fp32" if device == "cpu" else "bf16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    with user_errors():
        prompts = read_prompts(config)
        run = read_run(config.checkpoint)
        settings = resolve_settings(config, run)
        pipeline = load_pipeline(config, run, dtype)
        size = (settings.num_frames, settings.height, settings.width)
        check_video_size(*size, vae=pipeline.vae, transformer=pipeline.transformer)
    pipeline.to(device)

    paths = output_paths(config, len(prompts))
    num_latent_frames = (settings.num_frames - 1) // pipeline.vae_scale_factor_temporal + 1
    num_blocks = len(pipeline.transformer.block_lengths(num_latent_frames))
    progress = tqdm(total=len(prompts) * num_blocks, desc="blocks", dynamic_ncols=True)
    start = time.perf_counter()
    for number, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [prompt], settings.max_sequence_length)
        noise = pipeline.draw_noise(1, *size, settings.timesteps, generator=sample_generator(config.seed, number))
        latents = pipeline.sample_latents(
            pad_prompt_embeds(embeds, settings.max_sequence_length).to(dtype),
            noise.to(device),
            settings.timesteps,
            on_block_end=lambda *_: progress.update(),
        )
        write_video(path, decode_latents(pipeline.vae, latents)[0], config.frame_rate)
    progress.close()
    seconds = time.perf_counter() - start
    frames = len(prompts) * settings.num_frames
    print(f"{len(prompts)} video(s), {frames / seconds:.1f} frames a second, decoding included: {config.output}")


def read_prompts(config: Config) -> list[str]:
    """The prompts to sample.

    Raises:
        ValueError: If the file is not there or has no prompt.
    """
    if config.prompt is not None:
        prompts = [config.prompt]
    elif not Path(config.prompts_file).is_file():
        raise ValueError(f"prompts_file must be a text or CSV file, but {config.prompts_file} does not exist.")
    elif config.prompts_file.endswith(".csv"):
        prompts = read_csv_prompts(config.prompts_file)
    else:
        prompts = Path(config.prompts_file).read_text().splitlines()
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise ValueError("at least one prompt must not be empty; got none.")
    return prompts[: config.num_prompts]


def read_csv_prompts(path: str) -> list[str]:
    """The `prompt` column of a CSV."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "prompt" not in rows[0]:
        raise ValueError(f"{path} must have a column named prompt, got {', '.join(rows[0])}.")
    return [row["prompt"] or "" for row in rows]


def read_run(checkpoint: str) -> dict:
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


def resolve_settings(config: Config, run: dict) -> Settings:
    """Flags, else the run's settings, else WAN's own."""
    if config.denoising_step_list is not None or not run:
        timesteps = training_timesteps(config.denoising_step_list or DEFAULT_STEP_LIST)
    else:
        timesteps = training_timesteps(
            run["denoising_step_list"],
            warp_denoising_step=run["warp_denoising_step"],
            timestep_shift=run["timestep_shift"],
        )
    return Settings(
        num_frames=config.num_frames or run.get("num_frames", 81),
        height=config.height or run.get("height", 480),
        width=config.width or run.get("width", 832),
        timesteps=timesteps.tolist(),
        max_sequence_length=run.get("max_sequence_length", 512),
    )


def load_pipeline(config: Config, run: dict, dtype: torch.dtype) -> CausalWanPipeline:
    """The base checkpoint's pipeline with the run's transformer or LoRA in it."""
    base = run.get("pretrained_model_name_or_path", config.checkpoint)
    causal = {} if config.num_frame_per_block is None else {"num_frame_per_block": config.num_frame_per_block}
    parts = {"vae": load_vae(base, revision=run.get("revision")), "dtype": dtype}  # the VAE stays in float32
    if not run:
        return CausalWanPipeline.from_pretrained(base, **parts, **causal)
    folder = Path(config.checkpoint)
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


def output_paths(config: Config, count: int) -> list[Path]:
    """One mp4 a prompt."""
    if config.prompt is not None:
        return [Path(config.output)]
    return [Path(config.output) / f"{number:02d}.mp4" for number in range(count)]


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
