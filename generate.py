"""Generates videos from prompts with a student that `train_video_regression.py` has trained.

    python generate.py --checkpoint outputs/my-wan --prompt "Draw a sketch of bird step by step..." --output bird.mp4
    python generate.py --checkpoint outputs/my-wan --prompt "A bird" --output bird.mp4 --stream
    python generate.py --checkpoint self_forcing_dmd.pt --prompt "A bird" --output bird.mp4
    accelerate launch generate.py --checkpoint outputs/my-wan --prompts_file prompts.txt --output videos/
    python generate.py --checkpoint outputs/my-wan --prompt "A bird" --output bird.mp4 --num_inference_steps 50 \\
        --timestep_shift 5 --guidance_scale 5
    python generate.py --checkpoint outputs/my-wan --prompt "A cat sits" --prompt_at 2.5 "The cat jumps" \\
        --output cat.mp4

`--checkpoint` is the output folder of a run (full fine-tune or LoRA), any diffusers WAN folder or hub id, or a file of
weights, such as those of CausVid and Self Forcing. All other settings default to those of the run. Frames are decoded
and written block by block, in memory that does not grow with the video if attention has a window: for videos longer
than the run's, add `--local_attn_size 21 --sink_size 3`. With `--stream` the mp4 can be played while it is written.
"""

import contextlib
import itertools
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from causal_wan.config.choices import LocalPath
from causal_wan.config.outputs import check_output_file, check_output_folder
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import (
    AttentionWindow,
    FiniteFloat,
    FrameRate,
    GuidanceScale,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Timestep,
    TimestepShift,
    checked_dataclass,
)
from causal_wan.config.settings import KVCacheDtype
from causal_wan.data.settings import DataConfig
from causal_wan.tables.prompt_schedules import Prompt, PromptSchedule
from causal_wan.timesteps import Sampler


@checked_dataclass
class Config:
    """What to generate, with which checkpoint."""

    checkpoint: LocalPath
    """Output folder of a run, a diffusers WAN folder or hub id, or a .safetensors or .pt file of weights."""
    pretrained_model_name_or_path: LocalPath | None = None
    """Where VAE and text encoder are: None is what the run was made from, or WAN's own for the size of a file."""
    lora: tuple[LocalPath, ...] = ()
    """LoRA files or folders to add, in diffusers' names or others that it reads."""
    lora_scale: tuple[FiniteFloat, ...] = ()
    """Weight of each; 1 if there are none."""
    prompt: str | None = None
    """One prompt."""
    prompt_at: tuple[tuple[PositiveFloat, str], ...] = ()
    """Seconds, and the prompt from there on: `--prompt_at 2.5 "..."`, any number of times; in a recipe a list of
    pairs. A change falls on the nearest start of a block. A prompts_file may have a column `prompt_schedule`."""
    recache: bool = False
    """Where the prompt changes, compute the keys and values of what is remembered anew, under the new prompt."""
    prompts_file: LocalPath | None = None
    """Text file (.txt) with one prompt a line, or a CSV, TSV or JSON lines file with a `prompt` column."""
    dataset_base_path: LocalPath | None = None
    """Folder that pictures and controls in prompts_file are relative to; None is that of the file."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    guidance_scale: GuidanceScale = 1.0
    """Classifier-free guidance above 1: for students of any level, trained with --caption_dropout. Those of a step
    list are trained without."""
    video: LocalPath | None = None
    """A video to continue: its last frames, at --frame_rate, become the first blocks of the clip. A picture is a video
    of one frame, for students whose first block is one frame."""
    image: LocalPath | None = None
    """A picture that the video begins with, cut to the clip's shape; for students that were trained with
    --first_frame_probability. A prompts_file may name one for each prompt in a column `image`."""
    control: tuple[LocalPath, ...] = ()
    """Videos that the student follows, in the order of its controls (--control_column of its training); `none` leaves
    one out. A prompts_file may name them for each prompt, in columns of the controls' names, which win."""
    num_video_frames: PositiveInt | None = None
    """How many of its frames; None is as many as make whole blocks, and at most half of the clip."""
    output: LocalPath = "out.mp4"
    """The mp4 of one prompt; with prompts_file a folder, which gets 00.mp4, 01.mp4, ... of its first row (of a text,
    line), the second, and so on. Blank rows count; of several prompts in a row, the second is 00-2.mp4."""
    stream: bool = False
    """Write files that can be played while they are written."""
    num_prompts: PositiveInt | None = None
    """Take only the first so many prompts of prompts_file."""
    seed: Seed = 0
    """Seeds the noise; the same seed, row of the prompt and checkpoint give the same video."""
    num_frames: PositiveInt | None = None
    """Video frames, 4k + 1, a continued video's included; None is what the run was trained on, or 81."""
    height: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 480."""
    width: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 832."""
    denoising_step_list: tuple[Timestep, ...] | None = None
    """Timesteps to sample at; None is the run's own way, or 1000 757 522. A trailing 0 is dropped."""
    num_inference_steps: PositiveInt | None = None
    """Sample in so many steps instead of a list; None is the run's own way: 50 if it trained on continuous levels."""
    timestep_shift: TimestepShift | None = None
    """Shift of these steps towards noise, above 1; None is the run's, or 5."""
    sampler: Sampler | None = None
    """renoise predicts the clean latents and noises them again: for students of a step list. euler follows the flow:
    for those of any level. None is renoise for a list, euler for a number of steps."""
    num_frame_per_block: PositiveInt | None = None
    """Latent frames of a block; None is the checkpoint's own setting, and 3 for a .pt file."""
    local_attn_size: AttentionWindow | None = None
    """Latent frames that are remembered, the current block included; -1 is all, None the checkpoint's own setting."""
    sink_size: NonNegativeInt | None = None
    """How many of them are the clip's first; None is the checkpoint's own setting."""
    kv_cache_dtype: KVCacheDtype | None = None
    """Precision of what is remembered: auto is that of the passes, int8 takes half of 16 bits and rounds; None is what
    the run was validated with."""
    frame_rate: FrameRate | None = None
    """Frames a second of the mp4, and of what is taken of a video to continue; None is the checkpoint's: 16, of WAN
    2.2 5B 24."""
    compile: bool = False
    """Compile the layers: the first blocks take a minute or so, the others less time."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the transformer and the text encoder; None is bf16 on a GPU and fp32 on a CPU."""
    device: str | None = None
    """None is the GPU if there is one, and with several processes each one's own."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("give either --prompt or --prompts_file, and not both.")
        if self.lora_scale and len(self.lora_scale) != len(self.lora):
            raise ValueError(
                f"lora_scale must have one weight for each of {len(self.lora)} LoRAs, got {self.lora_scale}."
            )
        if self.dataset_base_path is not None and self.prompts_file is None:
            raise ValueError("dataset_base_path is about the paths in prompts_file, which is missing; name one.")
        if self.prompt_at and self.prompt is None:
            raise ValueError("prompt_at goes on from --prompt; of a prompts_file, use a column prompt_schedule.")
        if self.prompt_at and self.prompt.strip():
            try:
                PromptSchedule.of([(0, self.prompt), *self.prompt_at])
            except ValueError as error:
                raise ValueError(f"prompt_at cannot be followed: {error}") from None
        if self.image is not None and self.video is not None:
            raise ValueError("a video has one beginning; give either --image or --video, and not both.")
        if self.num_video_frames is not None and self.video is None:
            raise ValueError("num_video_frames is about a video to continue; name it with --video.")


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__)

import av
import PIL.Image
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from causal_wan.data.clips import build_video_transform, load_video
from causal_wan.data.frames import last_frame_indices, num_sampleable_frames
from causal_wan.data.rows import Row
from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.model.text import encode_prompts, pad_prompt_embeds, warn_of_cut_prompts
from causal_wan.processes import wait_for_all
from causal_wan.progress import announced
from causal_wan.results.run_record import RunRecord, find_run
from causal_wan.results.student import (
    Layout,
    SamplingSettings,
    choose_device,
    choose_settings,
    find_layout,
    load_student,
)
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.prompt_changes import check_has_blocks
from causal_wan.seeds import noise_generator
from causal_wan.tables.prompt_schedules import texts_of
from causal_wan.tables.prompts import PromptRow, count_blank, read_prompt_rows
from causal_wan.video.decoding import decode_frames, probe_video
from causal_wan.video.facts import Traits
from causal_wan.video.opening import describe_error
from causal_wan.video.timing import read_frame_times
from causal_wan.video.writing import VideoWriter, as_frames
from causal_wan.weights.lora import load_lora
from causal_wan.weights.lora_names import find_lora


@user_errors(OSError)
def main(config: Config) -> None:
    """Loads the checkpoint, samples this process's prompts and writes mp4 files."""
    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    with user_errors():
        device, dtype = choose_device(config.device or str(state.device), config.dtype)
        wanted = read_prompts(config)
        check_output(config)
        check_loras(config.lora)
        run = find_run(config.checkpoint, config.pretrained_model_name_or_path)
        settings = choose_settings(config, run, kv_cache_dtype=config.kv_cache_dtype)
        layout = find_layout(config.checkpoint, run, **causal_settings(config))
        wanted = with_controls(wanted, config, layout.control_names)
        layout.check_size(settings)
        num_blocks = len(layout.block_lengths(settings))
        data = clips_of(run, settings)
        check_conditions(wanted, settings, layout, data)
        check_schedules(wanted, config, settings, layout)
        beginning = read_frames_to_continue(config, settings, layout)
        if state.is_main_process:
            print(
                "".join(f"note: {note}\n" for note in notes_on(config, wanted, run, layout.control_names)),
                end="",
                file=sys.stderr,
            )
        pipeline = load_pipeline(config, run, settings, dtype)
    if state.is_main_process:
        texts = texts_of(row.prompt for row in wanted) + [config.negative_prompt] * (config.guidance_scale > 1)
        warn_of_cut_prompts(pipeline.tokenizer, texts, settings.max_sequence_length)
    pipeline.to(device)
    config = replace(config, frame_rate=config.frame_rate or layout.geometry.frame_rate)
    work = list(zip(wanted, output_paths(config, wanted), strict=True))
    own = work[state.process_index :: state.num_processes]
    total = len(own) * num_blocks * count_parts(settings)
    with tqdm(total=total, desc="steps", dynamic_ncols=True, disable=not state.is_main_process) as progress:
        for count, (row, path) in enumerate(own):
            given = dict(beginning) if row.image is None else {"image": read_image(row.image, settings)}
            given |= {"control": read_controls(row, data)} if row.controls else {}
            blocks = sample(pipeline, row.prompt, row.row - 1, settings, config, given, progress)
            with saying_what_is_kept(path, count):
                first, rate = write_blocks(blocks, path, config, progress, count_parts(settings))
            progress.write(f"{path}: first frames after {first:.2f} s, {rate:.1f} frames a second")
    wait_for_all()
    if state.is_main_process:
        print(f"{len(wanted)} video(s): {config.output}")
    state.destroy_process_group()


def causal_settings(config: Config) -> dict[str, int | None]:
    """What is given of blocks and of what they see."""
    return {name: vars(config)[name] for name in ("num_frame_per_block", "local_attn_size", "sink_size")}


def load_pipeline(
    config: Config, run: RunRecord | None, settings: SamplingSettings, dtype: torch.dtype
) -> CausalWanPipeline:
    """The student, ready to sample.

    Raises:
        ValueError: If weights or LoRAs do not fit.
    """
    pipeline = load_student(
        config.checkpoint,
        run,
        dtype,
        denoising_step_list=settings.timesteps,
        sampler=settings.sampler,
        max_sequence_length=settings.max_sequence_length,
        **causal_settings(config),
    )
    for number, path in enumerate(config.lora):
        load_lora(pipeline, path, adapter_name=f"lora_{number}")
    if config.lora:
        names = pipeline.get_list_adapters()["transformer"]  # that of the run, if it has one, comes first
        scales = config.lora_scale or (1.0,) * len(config.lora)
        pipeline.set_adapters(names, [*(1.0,) * (len(names) - len(scales)), *scales])
    if config.compile:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: CausalWanPipeline,
    prompt: Prompt,
    number: int,
    settings: SamplingSettings,
    config: Config,
    given: dict[str, Any],
    progress: tqdm,
) -> Iterator[torch.Tensor]:
    """The frames of each block in [-1, 1], `(3, t, height, width)`, as soon as they are decoded.

    Args:
        pipeline: The student.
        prompt: What to show.
        number: Of the prompt; says which noise.
        settings: Of sampling.
        config: Of the script.
        given: What the video begins with and follows, as arguments of the pipeline.
        progress: Is told of each step.
    """

    def note_step(*step: object) -> dict[str, torch.Tensor]:
        progress.update()
        return {}

    if isinstance(prompt, PromptSchedule):
        shown = {"prompt_schedule": schedule_of(prompt, config, pipeline), "negative_prompt": config.negative_prompt}
    else:
        texts = [prompt, config.negative_prompt] if config.guidance_scale > 1 else [prompt]
        with announced(f"embedding {len(texts)} prompt(s)"):
            embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, settings.max_sequence_length)
        padded = pad_prompt_embeds(embeds, settings.max_sequence_length)
        negative = padded[1:] if config.guidance_scale > 1 else None
        shown = {"prompt_embeds": padded[:1], "negative_prompt_embeds": negative}
    blocks = pipeline.stream(
        **shown,
        recache=config.recache,
        guidance_scale=config.guidance_scale,
        num_frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        **given,
        generator=noise_generator(config.seed, number),
        output_type="latent",
        callback_on_step_end=note_step,
        cache_dtype=settings.cache_dtype,
    )
    decoder = StreamingDecoder(pipeline.vae)
    for block in blocks:
        yield decoder.decode(block)[0]


def schedule_of(prompt: PromptSchedule, config: Config, pipeline: CausalWanPipeline) -> PromptSchedule:
    """A schedule in the seconds of the pipeline, whose videos are written at another rate if one is asked for."""
    rate = pipeline.geometry.frame_rate
    factor = (config.frame_rate or rate) / rate
    return replace(prompt, seconds=tuple(factor * second for second in prompt.seconds))


def check_schedules(rows: Sequence[PromptRow], config: Config, settings: SamplingSettings, layout: Layout) -> None:
    """Checks that prompts along a video begin before it ends, and that it has blocks at which they can change.

    Raises:
        ValueError: If not.
    """
    for row in rows:
        if isinstance(row.prompt, PromptSchedule):
            row.prompt.check_ends_before(settings.num_frames / (config.frame_rate or layout.geometry.frame_rate))
            check_has_blocks(layout.block_lengths(settings))


@contextlib.contextmanager
def saying_what_is_kept(path: Path, num_whole: int) -> Iterator[None]:
    """Ends the program with status 130 and a line if Ctrl-C does while a file is written."""
    try:
        yield
    except KeyboardInterrupt:
        there = f"{path} ends where it was" if path.is_file() else f"{path} was not begun"
        print(f"stopped by Ctrl-C: {num_whole} video(s) are whole, {there}.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def count_parts(settings: SamplingSettings) -> int:
    """What progress counts of a block: its steps, and decoding and writing its frames."""
    return sum(level > 0 for level in settings.timesteps) + 1


def write_blocks(
    blocks: Iterator[torch.Tensor], path: Path, config: Config, progress: tqdm, num_parts: int
) -> tuple[float, float]:
    """Writes a video as its blocks come; returns seconds until the first frames, and frames a second."""
    start = time.perf_counter()
    first, num_frames = 0.0, 0
    with VideoWriter(path, config.frame_rate, fragmented=config.stream) as writer, contextlib.closing(blocks):
        for block in blocks:
            writer.write(as_frames(block))
            first = first or time.perf_counter() - start
            num_frames += block.shape[1]
            progress.update(num_parts - progress.n % num_parts)  # blocks that are given have no steps
    return first, num_frames / (time.perf_counter() - start)


# --- input -----------------------------------------------------------------------------------------------------------


def read_frames_to_continue(
    config: Config, settings: SamplingSettings, layout: Layout
) -> dict[str, list[PIL.Image.Image]]:
    """The last frames of the video to continue, read and cut to the size of the clip as training does.

    Returns:
        The pipeline's argument, or none.

    Raises:
        ValueError: If it cannot be read, or is shorter than asked for or than a block.
    """
    if config.video is None:
        return {}
    path = Path(config.video)
    with naming_video(path):
        facts = probe_video(path)
        times = read_frame_times(path) if facts.traits & Traits.VARIABLE_RATE else None
    geometry = layout.geometry
    rate = config.frame_rate or geometry.frame_rate
    last = last_frame_indices(facts.num_frames, facts.frame_rate, settings.num_frames, rate, times)
    whole_blocks = [geometry.num_frames(end) for end in itertools.accumulate(layout.block_lengths(settings))]
    most = min(len(last), settings.num_frames // 2)
    count = config.num_video_frames or max([end for end in whole_blocks if end <= most], default=whole_blocks[0])
    if count not in whole_blocks[:-1]:
        raise ValueError(
            f"num_video_frames must end with a block and before the clip of {settings.num_frames} frames does, got "
            f"{count}; use one of {', '.join(map(str, whole_blocks[:-1])) or 'none: it has one block'}."
        )
    if count > len(last):
        raise ValueError(
            f"video must have {count} frames or more at {rate:g} a second to be continued, but "
            f"{config.video} has {len(last)}."
        )
    with naming_video(path):
        frames = decode_frames(path, last[-count:], build_video_transform(settings.height, settings.width))
    return {"video": [PIL.Image.fromarray(frame) for frame in frames.movedim(1, -1).numpy()]}


@contextlib.contextmanager
def naming_video(path: str | Path, name: str = "video") -> Iterator[None]:
    """Errors of reading a video, or the setting of that name, name it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(
            f"{name} must be a file that decodes, but {path} does not exist (paths in a prompts_file are relative to "
            "it, or to --dataset_base_path)."
        ) from None
    except (OSError, ValueError, av.FFmpegError) as error:
        raise ValueError(f"{name} must be a file that decodes, got {path}: {describe_error(error)}") from None


def check_conditions(rows: Sequence[PromptRow], settings: SamplingSettings, layout: Layout, data: DataConfig) -> None:
    """Checks that pictures decode and leave something to sample, and that controls are long enough.

    Raises:
        ValueError: If not.
    """
    for row in rows:
        if row.image is not None:
            read_image(row.image, settings)
            layout.check_first_frame(settings)
        find_controls(row, data)


def check_loras(paths: Sequence[str]) -> None:
    """Checks that those on this machine are there, and are LoRAs.

    Raises:
        ValueError: If not.
    """
    for path in paths:
        if not Path(path).exists() and Path(path).suffix:
            raise ValueError(f"lora must be files, folders or hub ids, but {path} does not exist.")
        if Path(path).is_file() and find_lora(path) is None:
            raise ValueError(f"lora must be files, folders or hub ids, but {path} holds no LoRA.")


def notes_on(
    config: Config, rows: Sequence[PromptRow], run: RunRecord | None, control_names: Sequence[str]
) -> Iterator[str]:
    """What is to be known of prompts that are left out, and of conditions that the student was not trained for."""
    if num_blank := count_blank(rows):
        yield (
            f"{num_blank} of the first {rows[-1].row} rows of {config.prompts_file} have no prompt and are left out; "
            "the others keep their numbers."
        )
    if lacking := sorted({name for name in control_names for row in rows if name not in row.controls}):
        yield (
            f"of the student's controls, {' and '.join(lacking)} is not given for some videos, so they do without"
            + ("." if run is None or run.settings.get("control_dropout") else "; none was left out in its training.")
        )
    if run is None or not any(row.image for row in rows):
        return
    knows_first_frames = run.method.has_clean_context and run.method.independent_first_frame
    if not run.method.first_frame_probability and not knows_first_frames:
        yield (
            "the student was trained without given first frames (--first_frame_probability), so it may not go on from "
            "a picture."
        )


def read_image(path: str, settings: SamplingSettings) -> PIL.Image.Image:
    """A picture, or the first frame of a video, cut to the size of the clip as training does.

    Raises:
        ValueError: If it does not decode.
    """
    with naming_video(path, "image"):
        (frame,) = decode_frames(Path(path), torch.tensor([0]), build_video_transform(settings.height, settings.width))
    return PIL.Image.fromarray(frame.movedim(0, -1).numpy())


def clips_of(run: RunRecord | None, settings: SamplingSettings) -> DataConfig:
    """How clips were shown in training, in the size of the videos."""
    size = {"num_frames": settings.num_frames, "height": settings.height, "width": settings.width}
    return replace(DataConfig() if run is None else run.data, **size).for_validation()


def find_controls(row: PromptRow, data: DataConfig) -> dict[str, Row]:
    """The videos that control a prompt's, by name, as rows that `load_video` takes.

    Raises:
        ValueError: If one cannot be read, or is too short.
    """
    found = {}
    for name, path in row.controls.items():
        with naming_video(path, f"control {name}"):
            found[name] = Row(0, Path(path), (), *probe_video(Path(path)))
        num_frames = num_sampleable_frames(found[name].num_frames, found[name].frame_rate, data)
        if num_frames < data.num_frames:
            raise ValueError(
                f"control {name} must have frames for the {data.num_frames} of the video, but {path} has {num_frames} "
                "as they were sampled in training; make it of a clip as long, or lower --num_frames."
            )
    return found


def read_controls(row: PromptRow, data: DataConfig) -> dict[str, list[PIL.Image.Image]]:
    """The frames of these videos, chosen and cut as those of clips are in training.

    Raises:
        ValueError: If one does not decode.
    """
    frames = {}
    for name, control in find_controls(row, data).items():
        with naming_video(control.video, f"control {name}"):
            video, _ = load_video(control, data.shape, data, torch.Generator())
        frames[name] = [PIL.Image.fromarray(frame) for frame in video.permute(1, 2, 3, 0).numpy()]
    return frames


def with_controls(rows: list[PromptRow], config: Config, names: Sequence[str]) -> list[PromptRow]:
    """The prompts with the videos that theirs follow: of `--control`, or of the columns of prompts_file.

    Args:
        rows: From `read_prompts`.
        config: Of the script.
        names: Of the student's controls.

    Raises:
        ValueError: If there are more videos than the student has controls.
    """
    if len(config.control) > len(names):
        raise ValueError(
            f"control must be a video for each control of the student, {' '.join(names) or 'which has none'}, got "
            f"{len(config.control)}."
        )
    shared, folder = dict(zip(names, config.control, strict=False)), base_folder(config)
    own: list[dict[str, str]] = [{} for _ in rows]
    if names and config.prompts_file is not None:  # now it is known which columns are controls
        own = [row.controls for row in read_prompt_rows(config.prompts_file, controls=names)[: len(rows)]]
    absent = ("none", "")
    found = [
        shared | {name: path if path in absent else str(folder / path) for name, path in controls.items()}
        for controls in own
    ]
    return [
        replace(row, controls={name: path for name, path in controls.items() if path not in absent})
        for row, controls in zip(rows, found, strict=True)
    ]


def base_folder(config: Config) -> Path:
    """What the paths in prompts_file are relative to."""
    return Path(config.dataset_base_path or Path(config.prompts_file or "").parent)


def read_prompts(config: Config) -> list[PromptRow]:
    """The prompts to sample, and the pictures that their videos begin with.

    Raises:
        ValueError: If the file is not there or has no prompt; if there are two pictures, or a picture and a video.
    """
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("at least one prompt must not be empty; got none.")
        prompt = (
            PromptSchedule.of([(0, config.prompt), *config.prompt_at]) if config.prompt_at else config.prompt.strip()
        )
        return [PromptRow(prompt=prompt, image=config.image)]
    rows = read_prompt_rows(config.prompts_file)[: config.num_prompts]
    if any(row.image for row in rows) and (config.image or config.video):
        raise ValueError(
            f"a video has one beginning, but {config.prompts_file} has a column image; leave out --image and --video."
        )
    images = [config.image if row.image is None else str(base_folder(config) / row.image) for row in rows]
    return [replace(row, image=image) for row, image in zip(rows, images, strict=True)]


def check_output(config: Config) -> None:
    """Checks that the videos can be written where they are to go.

    Raises:
        ValueError: If not.
    """
    if config.prompt is None:
        if Path(config.output).suffix.lower() == ".mp4":
            raise ValueError(
                f"output must be a folder for the videos of prompts_file, got {config.output}; name one with --output."
            )
        check_output_folder("output", config.output)
    else:
        check_output_file("output", config.output, (".mp4",))


def output_paths(config: Config, rows: Sequence[PromptRow]) -> list[Path]:
    """One mp4 a prompt, by the number of its row; of several in a row, the others have a number of their own."""
    if config.prompt is not None:
        return [Path(config.output)]
    names, counts = [], Counter()
    for row in rows:
        counts[row.row] += 1
        names.append(f"{row.row - 1:02d}" + (f"-{counts[row.row]}" if counts[row.row] > 1 else ""))
    return [Path(config.output) / f"{name}.mp4" for name in names]


if __name__ == "__main__":
    main(config)
