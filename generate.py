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

from tqdm.auto import tqdm

from causal_wan.config import parse_config, user_errors
from causal_wan.encoding import check_video_size, decode_latents, encode_prompts, pad_prompt_embeds
from causal_wan.regression import sample_generator
from causal_wan.student import choose_device, load_student, read_run, resolve_settings
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


def main(config: Config) -> None:
    """Loads the checkpoint, samples each prompt and writes mp4 files."""
    device, dtype = choose_device(config.device, config.dtype)
    with user_errors():
        prompts = read_prompts(config)
        run = read_run(config.checkpoint)
        settings = resolve_settings(
            run,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            denoising_step_list=config.denoising_step_list,
        )
        pipeline = load_student(config.checkpoint, run, dtype, num_frame_per_block=config.num_frame_per_block)
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


def output_paths(config: Config, count: int) -> list[Path]:
    """One mp4 a prompt."""
    if config.prompt is not None:
        return [Path(config.output)]
    return [Path(config.output) / f"{number:02d}.mp4" for number in range(count)]


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
