"""Compares ways to train and to sample on held-out prompts, such as those of an ambiguous data set, in one table.

    python examples/sketch/compare.py --data_dir outputs/ambiguous/data --output_dir outputs/ambiguous \\
        --samples regression:3=outputs/ambiguous/regression-3 ode:3=outputs/ambiguous/ode-3

A folder of samples is what `generate.py --prompts_file heldout.csv` writes: 00.mp4, 01.mp4, ... for the rows of
`heldout.csv`. Rows with the same prompt are samples of it from noise of their own; so are folders with the same METHOD
and STEPS, made with another `--seed`. They are compared with all drawings that the prompt may mean: those of
`targets.csv` if there is one, else the clips of the rows.

    recognised  share of samples whose last frame `judge.py` takes for a kind that the prompt may mean
    kinds       how many different ones there are among the samples
    expected    how many there would be among as many targets, drawn at random
    blank       share of samples whose last frame has less than a tenth of the ink of the targets'
    ink         of all frames beside the targets'; above 1 is blots or too many lines
    sharpness   of fine detail beside the targets'; below 1 is blurred, or there is little ink
    per ink     sharpness for the ink that there is: how crisp it is
    ink F1      of the last frame with the nearest of the targets, mean over samples: does ink lie where it might?
    PSNR        of the whole clip with the nearest of the targets
    diversity   distance between samples of a prompt beside that between its targets; 0 is always the same drawing

Two rows to compare with: `targets` are the clips of heldout.csv, `their mean` is what the least squared error draws
from noise alone; with `--vae` a third, what the VAE leaves of the targets. Read them from left to right: noise is
sharp, blots are sharper than drawings, scribbles have ink F1 and diversity, and none of them is recognised.

`--run` shows a run of regression at its limit: its blur gaps over the steps, beside the sharpness of its samples.
"""

import csv
import itertools
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from ink import ink_amount, ink_f1, psnr
from judge import recognise
from report import TOLERANCE, contact_sheet, plot_by_level, read_metrics, read_video


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import checked_dataclass
from causal_wan.evaluation.video_metrics import MAX_PSNR, frame_sharpness


COLUMNS = (
    *("recognised", "kinds", "expected", "blank", "ink", "sharpness", "per ink"),
    *("ink F1", "PSNR [dB]", "diversity"),
)
BLANK = 0.1  # of the targets' ink
NUM_SHOWN = 2  # targets and samples of each prompt on the contact sheet, if there are so many
NUM_PROMPTS_SHOWN = 4


@checked_dataclass
class Config:
    """What to compare."""

    data_dir: LocalPath
    """Folder with heldout.csv, perhaps targets.csv, and videos/."""
    samples: tuple[str, ...]
    """METHOD:STEPS=FOLDER each."""
    output_dir: LocalPath
    """Folder for comparison.json, comparison.md, comparison.png and blur_gaps.png."""
    vae: LocalPath | None = None
    """A checkpoint, for a row of the targets encoded and decoded by its VAE: no sample can be sharper."""
    run: LocalPath | None = None
    """Output folder of a run, with metrics.jsonl and validation/, whose blur gaps are to be plotted."""


def parse_samples(text: str) -> tuple[str, str, Path]:
    """Method, steps and folder of METHOD:STEPS=FOLDER.

    Raises:
        ValueError: If it is anything else, or the folder does not exist.
    """
    label, equals, folder = text.partition("=")
    method, colon, steps = label.rpartition(":")
    if not (equals and colon and method and Path(folder).is_dir()):
        raise ValueError(f"samples must be METHOD:STEPS=FOLDER with a folder that exists, got {text!r}.")
    return method, steps, Path(folder)


def read_table(path: Path) -> list[tuple[str, Path]]:
    """(Prompt, clip) of each row."""
    with path.open(newline="") as file:
        return [(row["prompt"], path.parent / "videos" / row["video"]) for row in csv.DictReader(file)]


def by_prompt(prompts: list[str], videos: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Videos of each prompt, in their order."""
    groups: dict[str, list[np.ndarray]] = {}
    for prompt, video in zip(prompts, videos, strict=True):
        groups.setdefault(prompt, []).append(video)
    return groups


def sharpness(videos: list[np.ndarray]) -> float:
    """Mean over videos and frames; see `causal_wan.evaluation.video_metrics.frame_sharpness`."""
    return float(np.mean([frame_sharpness(torch.from_numpy(v).movedim(-1, 1) / 255).mean() for v in videos]))


def spread(videos: list[np.ndarray]) -> float:
    """Mean distance between two of the videos: the root of the mean squared difference of pixels; nan of one video."""
    pairs = list(itertools.combinations([video.astype(np.float32) / 255 for video in videos], 2))
    return float(np.mean([np.sqrt(np.square(one - other).mean()) for one, other in pairs])) if pairs else float("nan")


def last_ink(videos: list[np.ndarray]) -> np.ndarray:
    """Amount of ink in the last frame of each video."""
    return np.array([ink_amount(video[-1:]).item() for video in videos])


def name_kinds(videos: list[np.ndarray]) -> list[str | None]:
    """The kind of drawing that each video ends with; None is not recognised."""
    return recognise(np.stack([video[-1] for video in videos]))


class Targets:
    """What samples are compared with: the drawings that each prompt may mean, and figures of them."""

    def __init__(self, by_prompt: dict[str, list[np.ndarray]]) -> None:
        everything = list(itertools.chain(*by_prompt.values()))
        self.by_prompt = by_prompt
        self.sharpness = sharpness(everything)
        self.ink = float(np.mean([ink_amount(video).mean() for video in everything]))
        self.last_ink = float(last_ink(everything).mean())
        self.spread = {prompt: spread(videos) for prompt, videos in by_prompt.items()}
        self.kinds = {prompt: name_kinds(videos) for prompt, videos in by_prompt.items()}

    def expected_kinds(self, num_samples: dict[str, int]) -> float:
        """How many different kinds so many random targets of each prompt have on average.

        A kind is missing with the probability that no target of any prompt has it.
        """
        expected = 0.0
        for kind in {kind for kinds in self.kinds.values() for kind in kinds if kind is not None}:
            shares = [(np.mean([k == kind for k in self.kinds[prompt]]), n) for prompt, n in num_samples.items()]
            expected += 1 - np.prod([(1 - share) ** number for share, number in shares])
        return expected


def score_kinds(samples: dict[str, list[np.ndarray]], targets: Targets) -> dict[str, float]:
    """What the samples show, by the judge."""
    named = [
        kind if kind in targets.kinds[prompt] else None
        for prompt, videos in samples.items()
        for kind in name_kinds(videos)
    ]
    recognised = [kind for kind in named if kind is not None]
    return {
        "recognised": len(recognised) / len(named),
        "kinds": len(set(recognised)),
        "expected": targets.expected_kinds({prompt: len(videos) for prompt, videos in samples.items()}),
    }


def score_ink(videos: list[np.ndarray], targets: Targets) -> dict[str, float]:
    """How much ink the samples have, and how sharp it is."""
    amount = np.mean([ink_amount(video).mean() for video in videos]) / targets.ink
    sharp = sharpness(videos) / targets.sharpness
    return {
        "blank": np.mean(last_ink(videos) < BLANK * targets.last_ink),
        "ink": amount,
        "sharpness": sharp,
        "per ink": sharp / amount if amount > 0 else float("nan"),
    }


def score_likeness(samples: dict[str, list[np.ndarray]], targets: Targets) -> dict[str, float]:
    """How near the samples are to the targets, and to each other."""
    f1, likeness = [], []
    for prompt, videos in samples.items():
        for video in videos:
            likely = targets.by_prompt[prompt]
            f1.append(max(ink_f1(video[-1:], target[-1:], TOLERANCE).item() for target in likely))
            likeness.append(min(MAX_PSNR, max(psnr(video, target) for target in likely)))
    spreads = [spread(videos) / targets.spread[prompt] for prompt, videos in samples.items()]
    return {"ink F1": np.mean(f1), "PSNR [dB]": np.mean(likeness), "diversity": np.mean(spreads)}


def score(samples: dict[str, list[np.ndarray]], targets: Targets) -> dict[str, float]:
    """The figures of a method, over all prompts."""
    videos = list(itertools.chain(*samples.values()))
    figures = score_kinds(samples, targets) | score_ink(videos, targets) | score_likeness(samples, targets)
    return {column: float(figures[column]) for column in COLUMNS}


def mean_video(videos: list[np.ndarray]) -> np.ndarray:
    """The mean of videos, frame by frame."""
    return np.mean(videos, axis=0).round().astype(np.uint8)


def encode_and_decode(checkpoint: str, videos: list[np.ndarray]) -> list[np.ndarray]:
    """What a checkpoint's VAE leaves of videos."""
    from causal_wan.model.vae import decode_latents, encode_videos  # it takes seconds, and not all need it
    from causal_wan.weights.parts import load_vae

    vae, decoded = load_vae(checkpoint), []
    for video in videos:
        pixels = torch.from_numpy(video).movedim(-1, 0)[None].float() / 127.5 - 1  # (1, 3, T, height, width)
        pixels = decode_latents(vae, encode_videos(vae, pixels))[0].movedim(0, -1)
        decoded.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy())
    return decoded


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    """A Markdown table with a row for each method and number of steps."""
    lines = [f"| {'method':24} | {'steps':>5} | " + " | ".join(f"{column:>10}" for column in COLUMNS) + " |"]
    lines.append("|" + "-" * 26 + "|" + "-" * 6 + ":|" + "|".join("-" * 11 + ":" for _ in COLUMNS) + "|")
    for (method, steps), figures in rows.items():
        cells = " | ".join(f"{figures[column]:10.3f}" for column in COLUMNS)
        lines.append(f"| {method:24} | {steps:>5} | {cells} |")
    return "\n".join(lines)


def plot_blur_gaps(run: Path, targets: Targets, path: Path) -> None:
    """Blur gaps of a run over its steps, and beside them the sharpness of the samples that its validations left."""
    figure, (gaps, samples) = plt.subplots(1, 2, figsize=(10, 3.5))
    plot_by_level(gaps, read_metrics(run), "blur_gap_at_time_")
    gaps.axhline(0, color="black", linewidth=0.8)
    gaps.set(ylabel="blur gap")
    gaps.legend()
    folders = sorted((run / "validation").glob("step-*"))
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    values = [sharpness([read_video(path) for path in sorted(folder.glob("*.mp4"))]) for folder in folders]
    samples.plot(steps, np.array(values) / targets.sharpness, marker="o", label="validation samples")
    samples.axhline(1, color="black", linewidth=0.8, label="targets")
    samples.set(xlabel="step", ylabel="sharpness", ylim=(0, 1.1))
    samples.grid(alpha=0.3)
    samples.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(config: Config) -> None:
    data_dir, output_dir = Path(config.data_dir), Path(config.output_dir)
    try:
        folders = [parse_samples(text) for text in config.samples]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if config.run is not None and not (Path(config.run) / "metrics.jsonl").is_file():
        raise SystemExit(f"error: run must be the output folder of a run, with metrics.jsonl, got {config.run!r}.")
    heldout = read_table(data_dir / "heldout.csv")
    all_targets = data_dir / "targets.csv"
    possible = read_table(all_targets) if all_targets.is_file() else heldout
    targets = Targets(by_prompt([prompt for prompt, _ in possible], [read_video(path) for _, path in possible]))
    prompts = [prompt for prompt, _ in heldout]
    clips = [read_video(path) for _, path in heldout]
    shown = {("targets", ""): by_prompt(prompts, clips)}
    shown["their mean", ""] = {
        prompt: NUM_SHOWN * [mean_video(targets.by_prompt[prompt])] for prompt in shown["targets", ""]
    }
    if config.vae is not None:
        shown["encoded, decoded", ""] = by_prompt(prompts, encode_and_decode(config.vae, clips))
    for method, steps, folder in folders:
        videos = [read_video(folder / f"{number:02d}.mp4") for number in range(len(prompts))]
        for prompt, samples in by_prompt(prompts, videos).items():
            shown.setdefault((method, steps), {}).setdefault(prompt, []).extend(samples)
    rows = {label: score(samples, targets) for label, samples in shown.items()}
    write_comparison(rows, output_dir)
    if config.run is not None:
        plot_blur_gaps(Path(config.run), targets, output_dir / "blur_gaps.png")
    distinct = list(dict.fromkeys(prompts))
    num_shown = min(NUM_SHOWN, *(len(videos) for samples in shown.values() for videos in samples.values()))
    groups = [
        [video for samples in shown.values() for video in samples[prompt][:num_shown]]
        for prompt in distinct[:NUM_PROMPTS_SHOWN]
    ]
    labels = [f"{method} {steps}".strip() for method, steps in shown for _ in range(num_shown)]
    contact_sheet(groups, output_dir / "comparison.png", labels)
    print(f"\n{len(distinct)} held-out prompts, {len(prompts)} samples or more by each method:\n\n{table(rows)}")
    print(f"\ncontact sheet  {output_dir / 'comparison.png'}: {num_shown} of each for {len(groups)} prompts")


def write_comparison(rows: dict[tuple[str, str], dict[str, float]], output_dir: Path) -> None:
    """Writes the table for readers and for programs; figures that do not exist are null in the latter."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "comparison.md").write_text(table(rows) + "\n")
    entries = [
        {"method": method, "steps": steps, **{name: None if np.isnan(value) else value for name, value in row.items()}}
        for (method, steps), row in rows.items()
    ]
    (output_dir / "comparison.json").write_text(json.dumps(entries, indent=2))


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
