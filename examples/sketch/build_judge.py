"""Trains the judge of drawings, `judge.py`, on `pictures.py`, and prints how often it is right. No GPU needed.

    OMP_NUM_THREADS=1 python examples/sketch/build_judge.py

Some of the pictures go through the VAE of `tiny-wan`, some of these with noisy latents; whenever they are shown, all
are faded, moved, blurred and made noisy by chance. The threshold is chosen on pictures of the same sort, the figures
are of others: clips as `make_dataset.py` draws and films them, what the VAE leaves of these, their means.

Shapes: N pictures, B of them in a batch.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from build_tiny_wan import autocast, cosine, film, to_frames, to_videos
from diffusers import AutoencoderKLWan
from judge import NO_DRAWING, SIZE, UNFINISHED, Judge, darkness_of, load_judge
from make_dataset import COLOURS, KINDS, KNOWN_COLOURS, Sketch, ambiguous_prompt, sketches
from pictures import NO_DRAWINGS, draw_freely, draw_in_part
from safetensors.torch import save_file
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, interpolate
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm, trange


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import PositiveFloat, PositiveInt, Seed, Share, checked_dataclass


CLASSES = (*KINDS, UNFINISHED, NO_DRAWING)
CLIP_FRAMES = 9  # of a clip in which a picture stands still, for the VAE


@checked_dataclass
class Config:
    """How much to train, and where to put the result."""

    output: LocalPath = str(Path(__file__).parent / "judge.safetensors")
    """The weights."""
    vae: LocalPath = str(Path(__file__).parent / "tiny-wan")
    """Checkpoint whose VAE some pictures go through."""
    pictures_per_kind: PositiveInt = 400
    """Training pictures of each kind; four times as many are unfinished, twelve times as many no drawing."""
    decoded_share: Share = 0.15
    """So many of the pictures go through the VAE."""
    steps: PositiveInt = 1000
    """Optimizer steps on 128 pictures."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    false_share: Share = 0.005
    """The threshold lets so many of the pictures without a kind pass."""
    test_pictures_per_kind: PositiveInt = 100
    """The same for those that the threshold is chosen on, and for those that the figures are of."""
    test_sketches_per_kind: PositiveInt = 12
    """Filmed clips of each kind that the figures are of."""
    seed: Seed = 0
    """Seeds the pictures, the initial weights and their order."""
    report_only: bool = False
    """Print the figures of the weights in output."""
    num_threads: PositiveInt = 1
    """Threads of torch."""
    num_workers: PositiveInt = 2
    """Processes that draw."""


# ---- pictures


def draw_one(number_and_label: tuple[tuple[int, int], int]) -> np.ndarray:  # (64, 112) uint8
    """The ink of the picture of that number, of the class of that label."""
    seed, label = number_and_label
    rng = np.random.default_rng(seed)
    if CLASSES[label] == NO_DRAWING:
        return NO_DRAWINGS[seed[1] % len(NO_DRAWINGS)](rng)
    return draw_in_part(rng) if CLASSES[label] == UNFINISHED else draw_freely(CLASSES[label], rng)


def draw_many(per_kind: int, seed: int, num_workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ink (N, 64, 112) uint8 of pictures of all classes, and their labels (N,), shuffled."""
    times = {UNFINISHED: 4, NO_DRAWING: 12}
    labels = np.repeat(np.arange(len(CLASSES)), [per_kind * times.get(name, 1) for name in CLASSES])
    numbers = [(seed, number) for number in range(len(labels))]
    with ProcessPoolExecutor(num_workers) as workers:
        drawn = workers.map(draw_one, zip(numbers, labels.tolist(), strict=True), chunksize=64)
        ink = torch.from_numpy(np.stack(list(tqdm(drawn, total=len(labels), desc="drawing", unit="picture"))))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return ink[order], torch.from_numpy(labels)[order]


def colour(ink: torch.Tensor, generator: torch.Generator) -> torch.Tensor:  # (N, H, W) -> (N, H, W, 3) uint8
    """In colours of the data set, every other one with colours at half the resolution, as in films."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    chosen = palette[torch.randint(len(palette), (len(ink),), generator=generator)][:, None, None]
    frames = 255 - ink[..., None].float() / 255 * (255 - chosen)
    luma = frames @ torch.tensor([0.299, 0.587, 0.114])
    chroma = avg_pool2d((frames - luma[..., None]).movedim(-1, 1), 2)
    filmed = luma[..., None] + interpolate(chroma, scale_factor=2.0).movedim(1, -1)
    is_filmed = torch.rand(len(ink), 1, 1, 1, generator=generator) < 0.5
    return torch.where(is_filmed, filmed, frames).clamp(0, 255).round().byte()


@torch.no_grad()
def through_vae(
    vae: AutoencoderKLWan, frames: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:  # (N, H, W, 3) uint8, as frames
    """What the VAE leaves of the pictures as last frames of short clips, of half of them from noisy latents.

    Some of those that are no drawing become what it makes of noise alone.
    """
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    decoded = []
    for start in trange(0, len(frames), 16, desc="VAE", unit="16 pictures"):
        clips = frames[start : start + 16, None].repeat(1, CLIP_FRAMES, 1, 1, 1)
        clips[:, 0] = 255
        with autocast():
            latents = vae.encode(to_videos(clips)).latent_dist.mode().float()
            noise = torch.randn(latents.shape, generator=generator) * std
            amount, chance, other_chance = torch.rand(3, len(clips), 1, 1, 1, 1, generator=generator)
            noisy = latents + torch.where(chance < 0.5, 0.4 * amount, 0.0) * noise
            is_drawing = (labels[start : start + 16] != CLASSES.index(NO_DRAWING)).view(-1, 1, 1, 1, 1)
            latents = torch.where(is_drawing | (other_chance > 0.13), noisy, noise)
            decoded.append(to_frames(vae.decode(latents).sample)[:, -1])
    return torch.cat(decoded)


def make_pictures(
    vae: AutoencoderKLWan, config: Config, *, per_kind: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, H, W, 3) uint8 with colours, of which some went through the VAE, and their labels (N,)."""
    ink, labels = draw_many(per_kind, seed, config.num_workers)
    generator = torch.Generator().manual_seed(seed)
    frames = colour(ink, generator)
    num_decoded = round(config.decoded_share * len(frames))
    frames[:num_decoded] = through_vae(vae, frames[:num_decoded], labels[:num_decoded], generator)
    return frames, labels


# ---- training


def vary(darkness: torch.Tensor) -> torch.Tensor:  # (B, 1, H, W) in [0, 1]
    """Faded, moved by 2 pixels at most, with noise of at most 0.1; one half of the batch is blurred as well."""
    size = len(darkness)
    faded = darkness * torch.where(torch.rand(size, 1, 1, 1) < 0.5, 1.0, 0.4 + 0.6 * torch.rand(size, 1, 1, 1))
    moved = faded.roll(torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
    sigma = 0.3 + torch.rand(()).item()  # pixels
    kernel = torch.exp(-torch.arange(-3, 4).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    across = conv2d(moved[: size // 2], kernel.view(1, 1, 1, 7), padding=(0, 3))
    moved[: size // 2] = conv2d(across, kernel.view(1, 1, 7, 1), padding=(3, 0))
    return (moved + 0.2 * torch.rand(size, 1, 1, 1).square() * (torch.rand_like(moved) - 0.5)).clamp(0, 1)


def train(frames: torch.Tensor, labels: torch.Tensor, config: Config) -> Judge:
    """The moving average of a judge that learned to tell the classes."""
    torch.manual_seed(config.seed)
    darkness = torch.cat([(255 * darkness_of(some)).byte() for some in frames.split(1024)])
    judge = Judge(CLASSES)
    average = AveragedModel(judge, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=config.lr, weight_decay=0.01)
    bar = trange(config.steps, desc="judge")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * cosine(step, config.steps)
        chosen = torch.randint(len(labels), (128,))
        with autocast():
            logits = judge(vary(darkness[chosen].float() / 255))
        loss = cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(judge)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return average.module.half().float().eval()  # what is stored


def choose_threshold(judge: Judge, frames: torch.Tensor, labels: torch.Tensor, false_share: float) -> float:
    """The probability of a kind that so many of the pictures without a kind reach; at least a half."""
    best = judge.probabilities(frames)[:, :-2].amax(dim=1)
    return max(0.5, best[labels >= len(KINDS)].quantile(1 - false_share).item())


def store(judge: Judge, path: Path) -> None:
    """In float16, with classes and threshold beside the weights."""
    about = {"classes": json.dumps(judge.classes), "threshold": f"{judge.threshold:.4f}"}
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in judge.state_dict().items()
    }
    save_file(weights, path, metadata=about)


# ---- figures


@torch.no_grad()
def decode_last_frames(vae: AutoencoderKLWan, clips: torch.Tensor) -> torch.Tensor:  # (N, T, H, W, 3) -> (N, H, W, 3)
    """Last frames of what the VAE leaves of whole clips."""
    with autocast():
        return torch.cat([to_frames(vae(to_videos(clip[None])).sample)[:, -1] for clip in tqdm(clips, desc="VAE")])


def means_by_prompt(chosen: list[Sketch], last: torch.Tensor) -> torch.Tensor:  # (N, H, W, 3) uint8
    """Means of the last frames whose sketches have the same ambiguous prompt."""
    groups: dict[str, list[int]] = {}
    for number, sketch in enumerate(chosen):
        groups.setdefault(ambiguous_prompt(sketch), []).append(number)
    return torch.stack([last[group].float().mean(dim=0).round().byte() for group in groups.values() if len(group) > 2])


def test_frames(vae: AutoencoderKLWan, config: Config) -> dict[str, tuple[torch.Tensor, list[str | None]]]:
    """Title -> frames (N, H, W, 3) that nothing was chosen on, and what they show."""
    generator = torch.Generator().manual_seed(config.seed + 2)
    chosen = []
    for kind in KINDS:
        of_kind = sketches((kind,))
        order = torch.randperm(len(of_kind), generator=generator)[: config.test_sketches_per_kind].tolist()
        chosen += [of_kind[number] for number in order]
    kinds = [sketch.kind for sketch in chosen]
    clips = torch.from_numpy(np.stack(list(film(chosen))))
    decoded, faint = decode_last_frames(vae, clips), [sketch.colour not in KNOWN_COLOURS for sketch in chosen]
    by_colour = {
        title: [number for number, is_faint in enumerate(faint) if is_faint is wanted]
        for title, wanted in (("in its colours", False), ("in other colours", True))
    }
    means = means_by_prompt(chosen, clips[:, -1])
    freely, labels = make_pictures(vae, config, per_kind=config.test_pictures_per_kind, seed=config.seed + 2)
    num_decoded = round(config.decoded_share * len(labels))
    shown = [CLASSES[label] if label < len(KINDS) else None for label in labels.tolist()]
    tests = {"clips": (clips[:, -1], kinds)}
    for title, numbers in by_colour.items():
        tests[f"clips through the VAE, {title}"] = decoded[numbers], [kinds[number] for number in numbers]
    for title, is_class in (
        ("drawn freely", labels < len(KINDS)),
        *((name, labels == CLASSES.index(name)) for name in CLASSES[-2:]),
    ):
        for way, part in (("", slice(num_decoded, None)), (", through the VAE", slice(0, num_decoded))):
            numbers = is_class[part].nonzero()[:, 0] + (part.start or 0)
            tests[title + way] = freely[numbers], [shown[number] for number in numbers.tolist()]
    tests["means of clips"] = means, [None] * len(means)
    tests["means of clips, through the VAE"] = (
        decode_last_frames(vae, means[:, None].repeat(1, CLIP_FRAMES, 1, 1, 1)),
        [None] * len(means),
    )
    tests["white paper"] = torch.full((16, *SIZE, 3), 255, dtype=torch.uint8), [None] * 16
    return tests


def report(judge: Judge, tests: dict[str, tuple[torch.Tensor, list[str | None]]]) -> None:
    """Prints a Markdown table of what is recognised, and as what it is."""
    print("| frames | number | recognised | rightly |\n|---|---:|---:|---:|")
    for title, (frames, kinds) in tests.items():
        answers = judge.recognise(frames)
        recognised = np.mean([answer is not None for answer in answers])
        right = np.mean([answer == kind for answer, kind in zip(answers, kinds, strict=True)])
        print(f"| {title} | {len(kinds)} | {recognised:.3f} | {right:.3f} |")


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    vae = AutoencoderKLWan.from_pretrained(config.vae, subfolder="vae")
    if not config.report_only:
        judge = train(*make_pictures(vae, config, per_kind=config.pictures_per_kind, seed=config.seed), config)
        chosen_on = make_pictures(vae, config, per_kind=config.test_pictures_per_kind, seed=config.seed + 1)
        judge.threshold = choose_threshold(judge, *chosen_on, config.false_share)
        store(judge, Path(config.output))
    judge = load_judge(Path(config.output))
    print(f"threshold {judge.threshold}\n")
    report(judge, test_frames(vae, config))


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
