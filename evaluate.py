"""Measures a student on held-out clips, and lays its videos beside theirs in a report.

    python evaluate.py --checkpoint outputs/my-wan --metadata_path data/heldout.csv --dataset_base_path data/videos

Writes `metrics.json`, `report.html` (self-contained: videos, curves by block, tables) and `videos/NN-student.mp4` to
`--output_dir`. `--num_base_steps 50` samples the model that the student was made from as well, in so many steps and
both ways in time. Each prompt is sampled from noise of its own number, so results can be laid side by side.

`--clip_model openai/clip-vit-base-patch32` measures how well videos keep to their prompts. `--vbench_export FOLDER`
writes five videos a prompt for VBench's own runner; with `--vbench_prompts all_dimension.txt`, of its prompts.

Keys of metrics.json; what was not measured is null:

    checkpoint, metadata_path, seed, num_samples, rows (numbers in the table), notes (what is left out, and why)
    student, base
        mean        psnr, ssim, lpips, clip_score, sharpness_ratio, motion_ratio, border_flicker, frames_per_second,
                    first_block_seconds (of the student), peak_memory_gib (on a GPU): means over the clips
        by_block    psnr, lpips, sharpness_ratio: their means over each block, in a list
        samples     the same as mean, of each clip
    clips
        mean        clip_score and border_flicker of the clips themselves, to compare with
    heldout_loss    of the student
        loss        mean squared error of predicted latents: what a run logs as validation_loss (of loss_type mse)
        by_level    timestep, loss, blur_gap, pred_latent_std, target_latent_std: as logged, with the run's draws; of
                    continuous levels by bins of 100, timestep is where a bin begins
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from causal_wan.config.choices import MAX_VBENCH_SAMPLES, LocalPath, LpipsNet
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import (
    GuidanceScale,
    NonNegativeInt,
    PositiveInt,
    Range,
    Seed,
    Timestep,
    TimestepShift,
    checked_dataclass,
)
from causal_wan.data.settings import DataConfig
from causal_wan.methods.settings import RegressionConfig
from causal_wan.timesteps import Sampler


@checked_dataclass
class Config:
    """What to measure, and on which clips."""

    checkpoint: LocalPath
    """Output folder of a run, or a diffusers WAN folder or hub id."""
    metadata_path: LocalPath
    """Table of held-out clips, as in training."""
    dataset_base_path: LocalPath | None = None
    """Folder that its paths are relative to."""
    follow_links: bool = False
    """Links in dataset_base_path may lead out of it."""
    video_column: str = "video"
    """Column with the path of the video."""
    caption_column: tuple[str, ...] = ("prompt",)
    """Column with the prompt; of several the first that is not empty is sampled."""
    control_column: tuple[str, ...] | None = None
    """Columns with the videos that the student follows; None is as in its training."""
    control: Literal["given", "none"] = "given"
    """none: a student that was trained with controls is measured without them."""
    output_dir: LocalPath = "outputs/evaluation"
    """Folder of the result."""
    num_samples: PositiveInt = 16
    """Clips that are measured, from the first row on."""
    num_base_steps: NonNegativeInt = 0
    """Steps of the base model, sampled both ways in time for comparison; 0 leaves it out."""
    guidance_scale: GuidanceScale = 5.0
    """Classifier-free guidance of the base model; 1 is none."""
    student_guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance of the student above 1: for students of any level, trained with caption dropout."""
    num_frame_per_block: PositiveInt | None = None
    """Latent frames of a block; None is the checkpoint's own setting."""
    denoising_step_list: tuple[Timestep, ...] | None = None
    """Timesteps to sample at; None is the run's own way, or 1000 757 522."""
    num_inference_steps: PositiveInt | None = None
    """Sample the student in so many steps in place of a list; None is the run's own way."""
    timestep_shift: TimestepShift | None = None
    """Shift of these steps towards noise, above 1; None is the run's, or 5."""
    sampler: Sampler | None = None
    """renoise or euler, see generate.py; None is renoise for a list, euler for a number of steps."""
    first_frame: Literal["auto", "given", "none"] = "auto"
    """given: the student's videos begin with the first frame of their clips. auto does so for a student that was
    trained with --first_frame_probability."""
    num_frames: PositiveInt | None = None
    """Video frames, 4k + 1; None is what the run was trained on, or 81."""
    height: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 480."""
    width: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 832."""
    lpips_net: LpipsNet | None = "alex"
    """Backbone of LPIPS, downloaded by torch.hub if it is not there; LPIPS is left out if it cannot be had."""
    clip_model: LocalPath | None = None
    """Folder or hub id of a CLIP or SigLIP model that says how well videos keep to their prompts."""
    num_clip_frames: PositiveInt = 8
    """Evenly spaced frames of a video that it looks at."""
    vbench_export: LocalPath | None = None
    """Folder to write videos to for VBench."""
    vbench_prompts: LocalPath | None = None
    """Text file of the prompts of these videos, one a line, or a table, as generate.py takes them; None is the prompts
    of the clips."""
    num_vbench_samples: Annotated[int, Range(ge=1, le=MAX_VBENCH_SAMPLES)] = 5
    """Videos of each of these prompts, seeded seed, seed + 1, ...; VBench wants 25 for temporal_flickering."""
    seed: Seed = 0
    """Seeds the noise."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the transformer and the text encoder; None is bf16 on a GPU and fp32 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one."""

    def __post_init__(self) -> None:
        if self.vbench_prompts is not None and self.vbench_export is None:
            raise ValueError("vbench_prompts are written to vbench_export, which is missing; name a folder with it.")


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__)

import torch
from diffusers import WanPipeline
from tqdm.auto import tqdm

from causal_wan.data.clips import normalize_videos, shown_prompts
from causal_wan.data.rows import load_rows
from causal_wan.evaluation.figures import Judges, Sample, measure, measure_clips
from causal_wan.evaluation.heldout_loss import HeldOutClip, heldout_statistics, summarize_heldout_loss
from causal_wan.evaluation.learned_metrics import ClipScore, load_lpips
from causal_wan.evaluation.report import write_metrics, write_report, write_videos
from causal_wan.evaluation.vbench_export import VBenchExport
from causal_wan.evaluation.video_metrics import first_frames_of_blocks
from causal_wan.model.streaming_vae import decode_in_parts
from causal_wan.model.text import warn_of_cut_prompts
from causal_wan.model.vae import encode_videos
from causal_wan.progress import PATIENCE, announced, show_progress
from causal_wan.results.run_record import RunRecord, base_of, find_run
from causal_wan.results.student import (
    SamplingSettings,
    choose_device,
    choose_settings,
    find_layout,
    load_student,
)
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.prompt_changes import embed_frame_prompts
from causal_wan.sampling.rollout import Rollout
from causal_wan.seeds import noise_generator
from causal_wan.tables.prompt_schedules import FramePrompts, caption_of, texts_of
from causal_wan.tables.prompts import read_prompts_file
from causal_wan.weights.parts import load_vae


@user_errors(OSError)
def main(config: Config) -> None:
    """Samples every prompt, measures, and writes the report."""
    with user_errors():
        device, dtype = choose_device(config.device, config.dtype)
        for name in ("output_dir", "vbench_export"):
            if vars(config)[name] is not None:
                check_output_folder(name, vars(config)[name])
        run = find_run(config.checkpoint)
        settings = choose_settings(config, run)
        layout = find_layout(config.checkpoint, run, num_frame_per_block=config.num_frame_per_block)
        layout.check_size(settings)
        starts = first_frames_of_blocks(layout.block_lengths(settings), layout.geometry)
        data = data_config(config, run, settings, layout.control_names)
        rows = load_rows(data)[: config.num_samples]
        prompts = [shown_prompts(row, data.shape, data, torch.Generator())[0] for row in rows]
        export = open_export(config, settings, texts_of(prompts))
        judges, notes = load_judges(config, settings, device)
        gives_first_frame = note_conditions(config, run, data, layout.control_names, notes)
        if gives_first_frame:
            layout.check_first_frame(settings)
        student = load_student(config.checkpoint, run, dtype, num_frame_per_block=config.num_frame_per_block)
    texts = texts_of(prompts) if export is None else [*texts_of(prompts), *export.prompts]
    warn_of_cut_prompts(student.tokenizer, texts, settings.max_sequence_length)
    with user_errors():
        clips = [HeldOutClip.load(row, data) for row in show_progress(rows, desc="clips")]
    targets = [clip.video.movedim(0, 1) / 255 for clip in clips]

    given = {"clips": clips, "gives_first_frames": gives_first_frame}
    sample = partial(sample_student, settings, config, config.seed, **given)
    results = {"student": sample_all(student, prompts, sample, device)}
    seed = config.seed if run is None or run.seed is None else run.seed
    heldout_loss = measure_loss(student, clips, method_to_measure(config, run), settings, seed=seed)
    if config.num_base_steps:
        student.to("cpu")
        base, first = partial(sample_base, settings, config), first_prompts(prompts, notes)
        results["base"] = sample_all(load_base(config.checkpoint, run, dtype), first, base, device)
    measured = {name: measure(samples, targets, prompts, starts, judges) for name, samples in results.items()}
    measured["clips"] = measure_clips(targets, prompts, starts, judges)

    folder = Path(config.output_dir)
    content = {"checkpoint": config.checkpoint, "metadata_path": config.metadata_path, "seed": config.seed}
    content |= {"num_samples": len(rows), "rows": [row.number for row in rows], "notes": notes}
    content |= {**measured, "heldout_loss": heldout_loss}
    write_metrics(folder / "metrics.json", content)
    columns = {"clip": targets, **{name: [video for video, _ in samples] for name, samples in results.items()}}
    with announced("writing videos and report"):
        numbered = list(zip([row.number for row in rows], map(caption_of, prompts), strict=True))
        shown = write_videos(folder, columns, numbered, student.geometry.frame_rate)
    write_report(folder / "report.html", content, measured, shown)
    print_figures(measured, heldout_loss)
    print(f"report    {folder / 'report.html'}")
    if export is not None:
        export.write(partial(sample_for_vbench, settings, config, student.to(device)), student.geometry.frame_rate)
        print(f"vbench    {export.folder / 'videos'}")


def print_figures(measured: dict[str, Any], heldout_loss: dict[str, Any]) -> None:
    """A line for each kind of video, and one for the loss."""
    lines = {name: figures["mean"] for name, figures in measured.items()}
    lines["loss"] = {f"at time {level['timestep']:g}:": level["loss"] for level in heldout_loss["by_level"]}
    for name, figures in lines.items():
        listed = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if not math.isnan(value))
        print(f"{name:9} {listed}")


def load_judges(config: Config, settings: SamplingSettings, device: str) -> tuple[Judges, list[str]]:
    """LPIPS and CLIP where they can be had, and what is left out."""
    clip = None if config.clip_model is None else ClipScore(config.clip_model, device, config.num_clip_frames)
    if config.lpips_net is None:
        return Judges(clip=clip), []
    lpips, note = load_lpips(config.lpips_net, device, height=settings.height, width=settings.width)
    return Judges(lpips, clip), [note] if note else []


def open_export(config: Config, settings: SamplingSettings, prompts: list[str]) -> VBenchExport | None:
    """The folder for VBench, if there is to be one."""
    if config.vbench_export is None:
        return None
    if config.vbench_prompts is not None:
        prompts = read_prompts_file(config.vbench_prompts, "vbench_prompts")
    made_with = {"checkpoint": config.checkpoint, "num_frame_per_block": config.num_frame_per_block}
    made_with |= {"seed_of_index_0": config.seed, "dtype": config.dtype, **asdict(settings)}
    export = VBenchExport(config.vbench_export, prompts, config.num_vbench_samples, made_with)
    if export.renamed:
        print(
            f"note      {len(export.renamed)} prompt(s) are too long for names of files or have a slash, so VBench's "
            f"standard mode will not find their videos; use --mode=custom_input --prompt_file "
            f"{export.folder / 'prompts.json'}. First: {export.renamed[0][:80]}"
        )
    return export


def data_config(
    config: Config, run: RunRecord | None, settings: SamplingSettings, control_names: tuple[str, ...]
) -> DataConfig:
    """The clips as the run was shown them."""
    data = replace(
        DataConfig() if run is None else run.data,
        dataset_base_path=config.dataset_base_path,
        follow_links=config.follow_links,
        metadata_path=config.metadata_path,
        video_column=config.video_column,
        caption_column=config.caption_column,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        control_column=control_columns(config, control_names),
        control_dropout=0.0,
    )
    return data.for_validation()


def control_columns(config: Config, names: tuple[str, ...]) -> tuple[str, ...]:
    """The columns with the videos that the student is to follow, of the names of its controls.

    Raises:
        ValueError: If they are not as many as it has controls.
    """
    if config.control_column is not None and len(config.control_column) != len(names):
        raise ValueError(
            f"control_column must name a column for each control of the student, {' '.join(names) or 'which has none'}"
            f", got {' '.join(config.control_column)}."
        )
    return () if config.control == "none" else config.control_column or names


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_all(
    pipeline: WanPipeline, prompts: list[str | FramePrompts], sample: Callable[..., Sample], device: str
) -> list[Sample]:
    """A sample of each prompt."""
    pipeline.to(device)
    return [sample(pipeline, number, prompt) for number, prompt in enumerate(tqdm(prompts, desc="videos"))]


def note_conditions(
    config: Config, run: RunRecord | None, data: DataConfig, control_names: Sequence[str], notes: list[str]
) -> bool:
    """Notes what the student is given beside prompts; returns whether videos begin with first frames of clips."""
    if data.control_column:
        notes.append(f"the student follows the videos of {' and '.join(data.control_column)}")
    elif config.control == "none" and control_names:
        notes.append("the student is given no controls")
    was_trained_so = run is not None and run.method.first_frame_probability > 0
    is_given = config.first_frame == "given" or (config.first_frame == "auto" and was_trained_so)
    if is_given:
        notes.append("the student's videos begin with the first frame of their clips, which is in the figures")
    for note in notes:
        print(f"note      {note}")
    return is_given


def sample_student(
    settings: SamplingSettings,
    config: Config,
    seed: int,
    pipeline: CausalWanPipeline,
    number: int,
    prompt: str | FramePrompts,
    *,
    clips: Sequence[HeldOutClip] | None = None,
    gives_first_frames: bool = False,
) -> Sample:
    """A video as the student is sampled, block by block.

    Args:
        settings: Of sampling.
        config: Of the script.
        seed: Of the noise.
        pipeline: The student.
        number: Of the prompt.
        prompt: What to show, or what at each frame.
        clips: Whose controls the videos follow, by number; None is none.
        gives_first_frames: Whether the videos begin with the first frames of these clips.
    """
    device, dtype = pipeline.transformer.device, pipeline.transformer.dtype
    size, steps = (settings.num_frames, settings.height, settings.width), (settings.timesteps,)
    generator = noise_generator(seed, number)
    noise = pipeline.draw_noise(1, *size, *steps, sampler=settings.sampler, generator=generator).to(device)
    shown = [prompt, ""] if config.student_guidance_scale > 1 else [prompt]
    with announced(f"embedding {len(texts_of(shown))} prompt(s)"):
        told = [
            embed_frame_prompts(pipeline, each, noise.shape[3], settings.max_sequence_length).to(device, dtype)
            for each in shown
        ]
    ends: list[float] = []
    num_frames, num_steps = noise.shape[3], sum(level > 0 for level in settings.timesteps)
    num_parts = len(pipeline.transformer.block_lengths(num_frames)) * num_steps + num_frames
    progress = show_progress(total=num_parts, desc="steps and latent frames")

    def note_time(*block: Any) -> None:
        _wait_for(device)
        ends.append(time.perf_counter())

    def note_step(rollout: Rollout, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        progress.update()
        return latents

    _reset_peak_memory(device)
    start = time.perf_counter()
    given = controls = None
    if gives_first_frames:
        given = encode_videos(pipeline.vae, normalize_videos(clips[number].video[None, :, :1].to(device)))
    if clips is not None:
        controls = clips[number].control_latents(pipeline.vae, device)
    latents = pipeline.sample_latents(
        replace(told[0], control_latents=controls),
        noise,
        *steps,
        sampler=settings.sampler,
        negative_conditions=told[1] if len(told) > 1 else None,
        guidance_scale=config.student_guidance_scale,
        on_block_end=note_time,
        on_step_end=note_step,
        cache_dtype=settings.cache_dtype,
        initial_latents=given,
    )
    parts = []
    for frames in decode_in_parts(pipeline.vae, latents):  # as generate.py does
        parts.append(frames[0])
        progress.update()
    video = torch.cat(parts, dim=1)
    _wait_for(device)
    seconds = time.perf_counter() - start
    progress.close()
    timed = {"frames_per_second": video.shape[1] / seconds, "first_block_seconds": ends[0] - start}
    return _as_target(video), timed | _peak_memory(device)


def sample_for_vbench(
    settings: SamplingSettings, config: Config, pipeline: CausalWanPipeline, index: int, number: int, prompt: str
) -> torch.Tensor:
    """The video of that index, each of a seed of its own, as `write_video` takes it."""
    video, _ = sample_student(settings, config, config.seed + index, pipeline, number, prompt)
    return video.movedim(1, 0) * 2 - 1


def load_base(checkpoint: str, run: RunRecord | None, dtype: torch.dtype) -> WanPipeline:
    """The stock pipeline of the model that the student was made from."""
    base, revision = base_of(checkpoint, run)
    with announced(f"loading {base}"):
        pipeline = WanPipeline.from_pretrained(
            base, vae=load_vae(base, revision=revision), dtype=dtype, revision=revision, use_safetensors=True
        )
    pipeline.set_progress_bar_config(desc="steps", delay=PATIENCE, leave=False)
    return pipeline


def first_prompts(prompts: list[str | FramePrompts], notes: list[str]) -> list[str]:
    """What the base model is given, which knows one prompt a video; noted where prompts change."""
    if any(isinstance(prompt, tuple) for prompt in prompts):
        notes.append("prompts change along clips, and the base model's videos have the first one alone")
        print(f"note      {notes[-1]}")
    return [prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts]


def sample_base(settings: SamplingSettings, config: Config, pipeline: WanPipeline, number: int, prompt: str) -> Sample:
    """A video in many steps, as stock diffusers makes it."""
    _reset_peak_memory(pipeline.transformer.device)
    start = time.perf_counter()
    video = pipeline(
        prompt,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        num_inference_steps=config.num_base_steps,
        guidance_scale=config.guidance_scale,
        generator=noise_generator(config.seed, number),
        output_type="pt",
    ).frames[0]
    _wait_for(pipeline.transformer.device)
    timed = {"frames_per_second": len(video) / (time.perf_counter() - start)}
    return video.float().cpu(), timed | _peak_memory(pipeline.transformer.device)


def _as_target(video: torch.Tensor) -> torch.Tensor:
    """`(3, T, height, width)` in [-1, 1] -> `(T, 3, height, width)` in [0, 1]."""
    return ((video.float().clamp(-1, 1) + 1) / 2).movedim(0, 1).cpu()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> dict[str, float]:
    """On a GPU alone: a process on the CPU shares its memory with all that it has loaded."""
    is_gpu = device.type == "cuda"
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if is_gpu else math.nan}


def method_to_measure(config: Config, run: RunRecord | None) -> RegressionConfig:
    """The levels and the context that the loss is measured with: the run's, or those of a list that is asked for."""
    method = RegressionConfig() if run is None else run.method
    if config.denoising_step_list is None:
        return method
    return replace(
        method,
        denoising_step_list=config.denoising_step_list,
        timestep_sampling="step_list",
        warp_denoising_step=False,
        clean_block_probability=0.0,
    )


def measure_loss(
    student: CausalWanPipeline,
    clips: list[HeldOutClip],
    method: RegressionConfig,
    settings: SamplingSettings,
    *,
    seed: int,
) -> dict[str, Any]:
    """The student's loss on the clips by level, with the draws that a run of that seed validates with."""
    length = settings.max_sequence_length
    sums = heldout_statistics(student, clips, method, seed=seed, max_sequence_length=length)
    return summarize_heldout_loss(sums, method.levels(), bin_width=method.bin_width)


if __name__ == "__main__":
    main(config)
