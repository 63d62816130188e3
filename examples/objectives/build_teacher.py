"""Trains a bidirectional teacher that draws where a prompt leaves the drawing open. No GPU needed.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/objectives/build_teacher.py --output_dir outputs/my-teacher

It is the transformer of `tiny-wan`, trained on by plain flow matching as `build_tiny_wan.py` does, with its text
encoder and VAE as they are. The clips are those of `make_dataset.py --ambiguous`; no clip of its two held-out prompts
is seen. The result is the output folder of a run: `--checkpoint`, `--teacher` and `--generator_ckpt` take it. After
an interruption run the same command again.

What differs from the base, whose prompts say all: the noise chooses the drawing, at levels so near to pure noise that
a sampler has few steps there. The more frames a clip has, the earlier it shows through the noise, so the shift of the
levels grows with the root of their number. And so that new compositions of words are understood, prompts are mixed:
most are ambiguous, some say less (`a blue drawing`), some all (`prompt`), some nothing.

Shapes: B clips, F latent frames, L text tokens.
"""

import itertools
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import WanPipeline, WanTransformer3DModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository
sys.path.insert(0, str(Path(__file__).parents[1] / "sketch"))

import build_tiny_wan
from build_tiny_wan import (
    NUM_LATENT_FRAMES,
    cached_latents,
    draw_sigmas,
    in_half_precision,
    train_on_chosen_frames,
)
from make_dataset import (
    HEIGHT,
    KINDS,
    KNOWN_COLOURS,
    NEW_KINDS,
    NUM_FRAMES,
    WIDTH,
    Sketch,
    ambiguous_prompt,
    prompt,
    split_by_prompt,
)

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import Decay, PositiveFloat, PositiveInt, Range, Share, TimestepShift, checked_dataclass


# Latent frames of a clip that a step sees -> how often.
FRAMES_AT_FIRST = {3: 0.2, 6: 0.25, 11: 0.25, NUM_LATENT_FRAMES: 0.3}
FRAMES_AT_LAST = {11: 0.2, NUM_LATENT_FRAMES: 0.8}
MIN_SIGMA = 0.01
SAMPLING_SHIFT = 5.0  # of the levels at which the result is sampled, if nothing else is asked for
NO_PROMPT, SHORTER_PROMPT, WHOLE_PROMPT = 0.05, 0.15, 0.1  # shares of the clips; the last one falls to 0


@checked_dataclass
class Config:
    """How long to train, and where to put the result."""

    output_dir: LocalPath
    """Folder that gets the result: transformer/, in half precision, and config.yaml."""
    checkpoint: LocalPath = "examples/sketch/tiny-wan"
    """What it starts from, and whose VAE and text encoder it uses."""
    work_dir: LocalPath = "outputs/teacher"
    """Folder for the latents, the state to go on from, and results on the way, step-*/."""
    kinds: Literal["new", "all"] = "new"
    """Kinds that are drawn: those of the ambiguous data set, or all."""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1, hint="numpy takes no other")] = 0
    """Seeds the choice of clips and the noise; the held-out prompts are those of the data set with seed 0."""
    steps: PositiveInt = 6000
    """Optimizer steps."""
    frames: PositiveInt = 96
    """Latent frames a step, over all processes."""
    lr: PositiveFloat = 1.5e-3
    """Learning rate, until it falls to a fiftieth in the last `decay` of the steps."""
    decay: Share = 0.35
    """Share of the steps in which the learning rate falls."""
    average: Decay = 0.995
    """Decay of the moving average of the weights."""
    pure_noise: Share = 0.02
    """Share of clips at sigma 1."""
    shift: TimestepShift = 32.0
    """Other sigmas are shift u / (1 + (shift - 1) u) with u uniform; this is the shift for whole clips."""
    save_every: PositiveInt = 250
    """Steps between two states to go on from, and two results."""


def training_sketches(config: Config) -> list[Sketch]:
    """All sketches but those of the held-out prompts."""
    kinds = tuple(KINDS) if config.kinds == "all" else NEW_KINDS
    return split_by_prompt(kinds, KNOWN_COLOURS, num_clips=None, num_heldout=2, num_targets=1, seed=0)[0]


# ---- prompts


def shorter_prompts(sketch: Sketch) -> list[str]:
    """What is left of an ambiguous prompt without one or more of colour, line and proportion."""
    shorter = []
    for said in itertools.product((True, False), repeat=3):
        words = [word for word, kept in zip((sketch.proportion, sketch.colour), said[:2], strict=True) if kept]
        drawing = " a " + " ".join([*words, "drawing"]) if words else ""
        parts = [part for part in (drawing, f" {sketch.line} lines" if said[2] else "") if part]
        if parts and not all(said):
            shorter.append(f"Draw a sketch of something step by step;{','.join(parts)}.")
    return shorter


def draw_prompt(sketch: Sketch, progress: float) -> str:
    """The prompt that a clip is shown with; those that say all become rare as training goes on."""
    shares = (NO_PROMPT, SHORTER_PROMPT, WHOLE_PROMPT * (1 - progress))
    choices = ("", random.choice(shorter_prompts(sketch)), prompt(sketch), ambiguous_prompt(sketch))
    return random.choices(choices, (*shares, 1 - sum(shares)))[0]


def clips_of_prompts(sketches: list[Sketch]) -> dict[str, list[int]]:
    """All that `draw_prompt` may say -> numbers of the sketches that it may say it of."""
    numbers: dict[str, list[int]] = {}
    for number, sketch in enumerate(sketches):
        for text in ("", ambiguous_prompt(sketch), prompt(sketch), *shorter_prompts(sketch)):
            numbers.setdefault(text, []).append(number)
    return numbers


@torch.no_grad()
def embed(
    prompts: Iterable[str], pipeline: WanPipeline
) -> dict[str, torch.Tensor]:  # prompt -> (L, TEXT_DIM), unpadded
    """What the text encoder makes of distinct prompts."""
    embeds = {}
    for text in dict.fromkeys(prompts):
        tokens = pipeline.tokenizer([text], return_tensors="pt")
        embeds[text] = pipeline.text_encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0]
    return embeds


def pad(embeds: list[torch.Tensor]) -> torch.Tensor:  # (B, L, TEXT_DIM)
    """A batch whose last token is a zero for every prompt, as CountedPadding wants it."""
    return nn.functional.pad(pad_sequence(embeds, batch_first=True), (0, 0, 0, 1))


# ---- training


class Teacher(nn.Module):
    """A transformer whose forward is the loss."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.rope = train_on_chosen_frames(transformer)

    def forward(
        self, latents: torch.Tensor, possible: list[torch.Tensor], prompt_embeds: torch.Tensor, sigmas: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the velocity, noise - expected latents, that each prompt and noisy clip determine.

        Args:
            latents: Clips, `(B, 16, F, h, w)`.
            possible: Of each, all clips that its prompt may mean, `(N, 16, F, h, w)`.
            prompt_embeds: `(B, L, TEXT_DIM)`.
            sigmas: `(B,)`, above 0.
        """
        mix = sigmas.view(-1, 1, 1, 1, 1)
        noisy_latents = (1 - mix) * latents + mix * torch.randn_like(latents)
        expected = torch.stack(list(map(expected_latents, noisy_latents, sigmas, possible)))
        velocity = self.transformer(noisy_latents, 1000 * sigmas, prompt_embeds).sample
        return (velocity - (noisy_latents - expected) / mix).square().mean()


def expected_latents(noisy: torch.Tensor, sigma: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
    """The mean of all clips that a noisy one may be, each as likely as its noise: (16, F, h, w).

    With it in the place of the clip that was drawn, the squared error has the same minimum, and gradients less noise.
    """
    squared = (noisy - (1 - sigma) * possible).square().sum(dim=(1, 2, 3, 4))
    return torch.einsum("n,ncfhw->cfhw", (-squared / (2 * sigma**2)).softmax(dim=0), possible)


def share_of_lr(step: int, config: Config, warmup: int = 50) -> float:
    """Linear warm-up, constant, then linear to a fiftieth in the last `decay` of the steps."""
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return max(0.02, min((step + 1) / warmup, left, 1.0))


def draw_frames(step: int, config: Config, rng: random.Random) -> torch.Tensor:  # (F,)
    """Which latent frames a step sees; in the last part mostly all."""
    share = FRAMES_AT_FIRST if step < (1 - config.decay) * config.steps else FRAMES_AT_LAST
    (number,) = rng.choices(list(share), list(share.values()))
    return torch.randperm(NUM_LATENT_FRAMES)[:number].sort().values


def main(config: Config) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    pipeline = WanPipeline.from_pretrained(config.checkpoint, vae=None, scheduler=None)
    sketches = training_sketches(config)
    with accelerator.main_process_first():
        settings = build_tiny_wan.Config(output_dir=config.checkpoint, work_dir=config.work_dir)
        latents = cached_latents(sketches, settings)
    shown_with = clips_of_prompts(sketches)
    embeds = embed(shown_with, pipeline)
    model = Teacher(pipeline.transformer)
    rope = model.rope
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = Path(config.work_dir) / "state.pt"
    first = load_state(state, model, average, optimizer) if state.exists() else 0
    schedule = LambdaLR(optimizer, lambda step: share_of_lr(first + step, config))
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(config.seed + first, device_specific=True)
    same_everywhere = random.Random(config.seed + first)
    bar, smooth = tqdm(range(first, config.steps), disable=not accelerator.is_main_process, mininterval=10), None
    for step in bar:
        frames = draw_frames(step, config, same_everywhere)
        batch_size = max(2, round(config.frames / accelerator.num_processes / len(frames)))
        chosen = torch.randint(len(sketches), (batch_size,)).tolist()
        said = [draw_prompt(sketches[index], step / config.steps) for index in chosen]
        shift = max(1.0, config.shift * len(frames) / NUM_LATENT_FRAMES)
        sigmas = draw_sigmas(batch_size, shift=shift, pure_noise=config.pure_noise).clamp(min=MIN_SIGMA)
        possible = [latents[shown_with[text]][:, :, frames].float() for text in said]
        rope.frames = frames
        loss = model(latents[chosen][:, :, frames].float(), possible, pad([embeds[text] for text in said]), sigmas)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(accelerator.unwrap_model(model))
        smooth = loss.item() if smooth is None else smooth + 0.01 * (loss.item() - smooth)
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if accelerator.is_main_process and ((step + 1) % config.save_every == 0 or step + 1 == config.steps):
            save_state(state, accelerator.unwrap_model(model), average, optimizer, step + 1)
            save_result(average.module.transformer, Path(config.work_dir) / f"step-{step + 1}", config)
            tqdm.write(f"saved after {step + 1} steps, loss {smooth:.4f}")
    if accelerator.is_main_process:
        save_result(average.module.transformer, Path(config.output_dir), config)
    accelerator.end_training()


def save_state(file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes all that is needed to go on, beside the old state until it is whole."""
    state = {"model": model, "average": average, "optimizer": optimizer}
    partial = file.with_suffix(".partial")
    torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, partial)
    partial.rename(file)


def load_state(file: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads a state, but for the learning rate; returns how many steps it has seen."""
    state = torch.load(file, weights_only=True)
    for group, now in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        group.pop("initial_lr", None)
        group["lr"] = now["lr"]
    for name, part in {"model": model, "average": average, "optimizer": optimizer}.items():
        part.load_state_dict(state[name])
    return state["step"]


def save_result(transformer: WanTransformer3DModel, folder: Path, config: Config) -> None:
    """Writes an ordinary transformer, and the settings by which it is known as the result of a run."""
    in_half_precision(transformer).save_pretrained(folder / "transformer")
    settings = {
        "pretrained_model_name_or_path": config.checkpoint,
        "generator_task": "bidirectional_video",
        "timestep_sampling": "uniform",
        "timestep_shift": SAMPLING_SHIFT,
        "loss_space": "velocity",
        "num_frames": NUM_FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "seed": config.seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
