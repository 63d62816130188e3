"""Samples ODE trajectories from a teacher once: prompts -> pairs of noisy and clean latents to train a student on.

    accelerate launch precompute_trajectories.py --config examples/wan_1.3b_full.yaml \\
        --prompts_file prompts.txt --trajectories_dir data/trajectories

    accelerate launch train_ode_regression.py --config examples/wan_1.3b_full.yaml --trajectories_dir data/trajectories

From fresh noise the flow's ODE is solved in `num_inference_steps` steps by Euler's method, on a grid that contains the
levels of `denoising_step_list` exactly; latents are kept there and at the end. The teacher is the recipe's base model,
or `--teacher`, such as the output of a run. A causal teacher is sampled block by block, each after the clean ones
before it, for a causal student; a bidirectional one suits a bidirectional student.

Takes the recipe of the training script; its other settings are passed over. Every process of the launch takes its
share. Trajectories are found by all that shapes them: prompt, seed, number, teacher, steps, guidance, shift, levels,
size. So a second run does nothing, more prompts are their own work alone, an interrupted run goes on where it was, and
`--verify` makes damaged ones anew.

Exit status: 0 if all is there, 2 if settings cannot be used, 75 if it was asked to stop (Ctrl-C, SIGTERM,
SIGUSR1): run the same command again.

Source: CausVid, arXiv 2412.07772, section 4.3; with a causal teacher Causal Forcing, arXiv 2602.02214.
"""

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from causal_wan.config.choices import LocalPath
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import GuidanceScale, PositiveInt, Seed, checked_dataclass
from causal_wan.config.settings import BaseModelConfig, CacheConfig, LatentsDtype
from causal_wan.data.settings import DataConfig
from causal_wan.methods.settings import RegressionConfig
from causal_wan.runs.settings import TRAINING_SETTINGS


@checked_dataclass
class Config:
    """What to sample, from whom, and where it goes."""

    data: DataConfig
    model: BaseModelConfig
    method: RegressionConfig
    trajectories_dir: LocalPath
    """Folder of the result."""
    teacher: LocalPath | None = None
    """Output folder of a run, diffusers folder, hub id or file of weights; None is the checkpoint of the recipe."""
    prompts_file: LocalPath | None = None
    """Text with a prompt a line, or CSV or JSON lines with a `prompt` column; in the place of the tables' prompts."""
    num_trajectories_per_prompt: PositiveInt = 1
    """Each from noise of its own."""
    guidance_scale: GuidanceScale = 5.0
    """Classifier-free guidance above 1, which the student learns to do without."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: Seed = 0
    """Seeds the noise."""
    latents_dtype: LatentsDtype = "bf16"
    """Precision that trajectories are kept in."""
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None
    """Precision of teacher and text encoder; what the launch says by default."""
    sample_batch_size: PositiveInt = 1
    """Trajectories that the teacher samples at once; more than one may change the last bits."""
    verify: bool = False
    """Read all that is there, and make anew what is damaged."""
    dry_run: bool = False
    """Say what is missing and how much disk it takes, and sample nothing."""

    def __post_init__(self) -> None:
        if len(self.data.all_shapes()) > 1:
            raise ValueError("trajectories have one size and length; leave out buckets and schedules.")
        if self.method.is_continuous:
            raise ValueError(
                "trajectories are kept at the levels of denoising_step_list, got timestep_sampling "
                f"{self.method.timestep_sampling}; leave it out for a student of trajectories."
            )
        if self.data.streaming and self.prompts_file is None:
            raise ValueError("the prompts of streams are not known beforehand; list them in a --prompts_file.")

    @property
    def num_latent_frames(self) -> int:
        """F."""
        return self.data.geometry.num_latent_frames(self.data.num_frames)


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__, also_known=TRAINING_SETTINGS)

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

from causal_wan.cache.encoded_clips import CachedData
from causal_wan.cache.opening import drop_damaged, open_cache
from causal_wan.cache.tensor_cache import GIB, CacheWriter, TensorCache, check_disk, free_bytes, remove_stale_shards
from causal_wan.cache.trajectories import FOLDER, TrajectoryName, student_settings
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.rows import read_tables
from causal_wan.geometry import LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.model.text import pad_prompt_embeds
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import check_video_size
from causal_wan.processes import PATIENCE, gather_lists
from causal_wan.progress import show_progress
from causal_wan.results.teacher import Teacher, find_teacher, identify_teacher, load_teacher
from causal_wan.runs.parts import fit_to_checkpoint, weight_dtype
from causal_wan.runs.prompt_embeddings import embed_prompts
from causal_wan.sampling.trajectories import sample_trajectories, trajectory_timesteps
from causal_wan.tables.prompt_schedules import PromptSchedule
from causal_wan.tables.prompts import read_prompts_file
from causal_wan.training.stopping import EXIT_STOPPED, StopRequest
from causal_wan.training.strategies import beside_fp8
from causal_wan.weights.kinds import check_base
from causal_wan.weights.parts import DTYPES, load_vae_config


@user_errors(OSError)
def main(config: Config) -> None:
    """Finds what is missing, and samples it."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    with user_errors():
        check_output_folder("trajectories_dir", config.trajectories_dir)
        teacher_timesteps(config)  # may not fit
        base = config.model.pretrained_model_name_or_path
        config = replace(config, data=fit_to_checkpoint(config.data, config.model))
        prompts = find_prompts(config)
        teacher = find_teacher(config.teacher or base, base, config.model.revision)
        config.data.for_checkpoint(
            check_base(teacher.base, generator_ckpt=teacher.generator_ckpt, revision=teacher.revision)
        )
        check_blocks(config, teacher)
        check_text_length(config, teacher)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=beside_fp8(config.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    with user_errors():
        embeddings = open_embeddings(accelerator, config)
    cache = TensorCache(f"{config.trajectories_dir}/{FOLDER}")
    if config.verify:
        drop_damaged((cache, embeddings.prompts))
    found = []
    if accelerator.is_main_process:  # for all: on a shared disk, others may not see the newest shards yet
        remove_stale_shards(cache.folder)
        settings = trajectory_settings(accelerator, config, teacher, embeddings)
        found = [(settings, find_missing(config, cache, settings, prompts))]
    ((settings, missing),) = gather_lists(found)
    if config.dry_run:
        return
    guides = [config.negative_prompt] if config.guidance_scale > 1 else []
    with user_errors():
        embeds = embed_prompts(
            accelerator,
            config.model,
            [*{name.prompt for name in missing}, *guides],
            embeddings,
            output_dir=config.trajectories_dir,
        )
    with StopRequest() as stop, user_errors():
        own = missing[accelerator.process_index :: accelerator.num_processes]
        if own:
            with CacheWriter(cache.folder, eager=True) as writer:
                sample_missing(accelerator, config, teacher, settings, own, embeds=embeds, writer=writer, stop=stop)
    stopped = any(gather_lists([stop.received]))
    accelerator.end_training()
    if accelerator.is_main_process and stopped:
        print(f"stopped: the trajectories so far are kept in {config.trajectories_dir}; the same command goes on.")
    if stopped:
        sys.exit(EXIT_STOPPED)
    if accelerator.is_main_process:
        print(f"{len(missing)} trajectories sampled in {config.trajectories_dir}")


def kept_levels(config: Config) -> torch.Tensor:
    """Timesteps at which latents are kept, beside the clean end."""
    levels = config.method.levels()
    return levels[levels > 0]


def teacher_timesteps(config: Config) -> torch.Tensor:
    """Timesteps that the teacher is sampled at.

    Raises:
        ValueError: If there are fewer than levels to keep.
    """
    method = config.method
    return trajectory_timesteps(kept_levels(config), method.num_inference_steps, method.timestep_shift)


# --- what is wanted --------------------------------------------------------------------------------------------------


def find_prompts(config: Config) -> list[str]:
    """The distinct prompts of the file or of the tables, in their order.

    Raises:
        ValueError: If they cannot be read, or some change along a video.
    """
    if config.prompts_file is not None:
        prompts, where = list(dict.fromkeys(read_prompts_file(config.prompts_file))), config.prompts_file
    else:
        tables, where = read_tables(config.data, need_files=False), "the table"
        prompts = list(dict.fromkeys(prompt for table in tables for row in table for prompt in row.prompts))
    scheduled = [prompt for prompt in prompts if isinstance(prompt, PromptSchedule)]
    if scheduled:
        raise ValueError(
            f"a trajectory has one prompt, but {where} has {len(scheduled)} along which it changes, first "
            f"{scheduled[0]}; list plain prompts in a --prompts_file."
        )
    return prompts


def find_missing(
    config: Config, cache: TensorCache, settings: dict[str, Any], prompts: list[str]
) -> list[TrajectoryName]:
    """The trajectories that are not there; says how many they are, and ends the program if they find no room."""
    wanted = [
        TrajectoryName(prompt, config.seed, number)
        for number in range(config.num_trajectories_per_prompt)
        for prompt in prompts
    ]
    missing = [name for name in wanted if name.key(settings) not in cache]
    num_bytes = len(missing) * trajectory_bytes(config)
    print(describe_work(config, settings, len(wanted), len(missing), num_bytes))
    with user_errors():
        check_disk("trajectories_dir", config.trajectories_dir, num_bytes)
    return missing


def check_blocks(config: Config, teacher: Teacher) -> None:
    """Checks that the clip divides into a causal teacher's blocks, and that they are the student's.

    Raises:
        ValueError: If not.
    """
    of_teacher = teacher_blocks(config, teacher)
    of_student = config.method.block_lengths(config.num_latent_frames)
    if len(of_teacher) > 1 and of_teacher != of_student:
        raise ValueError(
            f"a causal teacher's blocks must be the student's, got {of_teacher} latent frames and {of_student}; set "
            "--num_frame_per_block, --independent_first_frame and --generator_task as they were for the teacher."
        )


def check_text_length(config: Config, teacher: Teacher) -> None:
    """Checks that prompts are padded as they were in the teacher's training: it attends to the padding.

    Raises:
        ValueError: If not.
    """
    length = config.model.max_sequence_length
    if teacher.max_sequence_length not in (None, length):
        raise ValueError(
            f"max_sequence_length must be the teacher's, got {length}; use --max_sequence_length "
            f"{teacher.max_sequence_length}."
        )


def teacher_blocks(config: Config, teacher: Teacher) -> list[int]:
    """Latent frames of each block of the teacher; one block of a bidirectional one."""
    return teacher.causal.block_lengths(config.num_latent_frames)


def open_embeddings(accelerator: Accelerator, config: Config) -> CachedData:
    """The embeddings beside the trajectories. Called by every process.

    Raises:
        ValueError: If they cannot be told.
    """
    clips, _ = open_cache(
        CacheConfig(latents_dir=config.trajectories_dir),
        replace(config.data.for_validation(), streaming=False),
        config.model,
        [],
        FileManifest(config.trajectories_dir),
        vae_tiling=False,
        text_dtype="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
        encodes=True,
    )
    return clips


def trajectory_settings(
    accelerator: Accelerator, config: Config, teacher: Teacher, embeddings: CachedData
) -> dict[str, Any]:
    """All that a trajectory depends on beside its name."""
    manifest = FileManifest(config.trajectories_dir)
    is_guided = config.guidance_scale > 1
    settings = {
        **student_settings(config.data.shape, kept_levels(config)),
        **embeddings.prompt_settings,
        "teacher": identify_teacher(teacher, manifest.content),
        "blocks": teacher_blocks(config, teacher),
        "local_attn_size": teacher.causal.local_attn_size,
        "sink_size": teacher.causal.sink_size,
        "num_inference_steps": config.method.num_inference_steps,
        "timestep_shift": config.method.timestep_shift,
        "guidance_scale": config.guidance_scale if is_guided else 1.0,
        "negative_prompt": config.negative_prompt if is_guided else "",
        "precision": str(weight_dtype(accelerator)).removeprefix("torch."),
        "dtype": config.latents_dtype,
    }
    manifest.save()
    return settings


def trajectory_bytes(config: Config) -> int:
    """Disk that one takes."""
    vae = load_vae_config(config.model.pretrained_model_name_or_path, revision=config.model.revision)
    num_values = math.prod(LatentGeometry.of(vae.config).latent_shape(*config.data.shape))
    return (len(kept_levels(config)) + 1) * num_values * DTYPES[config.latents_dtype].itemsize


def describe_work(config: Config, settings: dict[str, Any], num_wanted: int, num_missing: int, num_bytes: int) -> str:
    """What is there and what is going to be done."""
    blocks, timesteps, levels = settings["blocks"], teacher_timesteps(config), kept_levels(config)
    steps = [int((timesteps == level).nonzero()) for level in levels]
    kept = ", ".join(f"{level:g} after {step}" for level, step in zip(levels.tolist(), steps, strict=True))
    is_mixed = len(blocks) == 1 and len(config.method.block_lengths(config.num_latent_frames)) > 1
    note = (
        "note        the teacher is bidirectional and the student causal: what a block becomes depends on noise of "
        "later blocks too, which the student does not see (arXiv 2602.02214)"
    )
    return "\n".join(
        [
            f"teacher     {config.teacher or config.model.pretrained_model_name_or_path}, "
            + (f"causal, {len(blocks)} blocks" if len(blocks) > 1 else "bidirectional")
            + f", guidance {settings['guidance_scale']:g}",
            f"steps       {config.method.num_inference_steps}, shift {settings['timestep_shift']:g}; kept are "
            f"{kept} steps, and the clean end",
            f"missing     {num_missing} of {num_wanted} trajectories",
            f"disk        {num_bytes / GIB:.2f} GiB needed, {free_bytes(config.trajectories_dir) / GIB:.1f} GiB free",
            f"result      {config.trajectories_dir}",
            *[note] * is_mixed,
        ]
    )


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_missing(
    accelerator: Accelerator,
    config: Config,
    teacher: Teacher,
    settings: dict[str, Any],
    names: Sequence[TrajectoryName],
    *,
    embeds: Mapping[str, torch.Tensor],
    writer: CacheWriter,
    stop: StopRequest,
) -> None:
    """Samples this process's share of the trajectories.

    Raises:
        ValueError: If the teacher's weights or the size do not fit.
    """
    transformer = load_teacher(teacher, weight_dtype(accelerator), accelerator.device)
    vae = load_vae_config(config.model.pretrained_model_name_or_path, revision=config.model.revision)
    check_video_size(*config.data.shape, vae=vae, transformer=transformer)
    shape = LatentGeometry.of(vae.config).latent_shape(*config.data.shape)
    bar = tqdm(total=len(names), desc="trajectories", disable=not accelerator.is_main_process)
    num_steps = len(teacher_blocks(config, teacher)) * config.method.num_inference_steps
    for start in range(0, len(names), config.sample_batch_size):
        if stop.received:
            return
        batch = names[start : start + config.sample_batch_size]
        with show_progress(total=num_steps, desc="steps") as progress:
            trajectories = sample_batch(transformer, config, batch, embeds, progress, latent_shape=shape)
        for name, trajectory in zip(batch, trajectories, strict=True):
            facts = {"prompt": name.prompt, "seed": name.seed, "number": name.number}
            writer.add(name.key(settings), trajectory.to(DTYPES[config.latents_dtype]), settings, **facts)
        bar.update(len(batch))
    bar.close()


def sample_batch(
    transformer: CausalWanTransformer3DModel,
    config: Config,
    names: Sequence[TrajectoryName],
    embeds: Mapping[str, torch.Tensor],
    progress: tqdm,
    *,
    latent_shape: tuple[int, int, int, int],
) -> torch.Tensor:
    """Trajectories `(B, K, C, F, H, W)`, each from noise of its own."""
    noise = torch.stack([torch.randn(latent_shape, generator=name.generator()) for name in names])
    noise = noise.to(transformer.device)

    def embed(prompts: list[str]) -> Conditions:
        padded = pad_prompt_embeds([embeds[prompt] for prompt in prompts], config.model.max_sequence_length)
        return Conditions(prompt_embeds=padded.to(transformer.device, transformer.dtype))

    is_guided = config.guidance_scale > 1
    return sample_trajectories(
        transformer,
        noise,
        embed([name.prompt for name in names]),
        teacher_timesteps(config),
        kept_levels(config),
        progress=progress,
        negative_conditions=embed([config.negative_prompt] * len(names)) if is_guided else None,
        guidance_scale=config.guidance_scale,
    )


if __name__ == "__main__":
    main(config)
