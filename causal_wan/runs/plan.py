"""What a run that trains a student is going to do and take, in words, before it begins."""

import math
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from transformers import UMT5Config

from causal_wan.config.changed_settings import compare_settings, read_settings
from causal_wan.config.fields import flat_dict
from causal_wan.config.parsing import user_errors
from causal_wan.config.refusals import describe_refusal
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.geometry import LatentGeometry
from causal_wan.memory.matching import plan_matching
from causal_wan.memory.plan import MemoryPlan, describe_shortage, plan_training, text_encoder_bytes, with_vae
from causal_wan.memory.simulation import ValidationWorkload, Workload
from causal_wan.model.control import with_control_names
from causal_wan.records.checkpoints import describe_damaged, find_checkpoint, passed_over
from causal_wan.results.teacher import Teacher
from causal_wan.runs.parts import (
    find_critic,
    find_matching_teacher,
    has_base_of_student,
    text_dtype,
    validation_prompts,
    weight_dtype,
    with_absolute_paths,
    with_checkpointing_of_launch,
)
from causal_wan.runs.settings import MatchingRunConfig, RunConfig
from causal_wan.runs.training_data import TrainingData
from causal_wan.sampling.noise import count_draws
from causal_wan.training.strategies import (
    beside_fp8,
    context_mesh,
    count_replicas,
    follow_settings,
    free_memory,
    is_sharded,
    sharding,
)
from causal_wan.weights.parts import DTYPES, load_vae_config
from causal_wan.weights.transformer import load_transformer_config


def describe_plan(config: RunConfig, run_data: TrainingData, num_replicas: int) -> str:
    """What is going to happen, in numbers."""
    training, method, data, described = config.training, config.method, config.data, run_data.describe()
    lengths = method.block_lengths(config.num_latent_frames(data.shape))
    samples_per_step = training.samples_per_step(num_replicas)
    num_samples = training.max_train_steps * samples_per_step
    passes = f" = {num_samples / run_data.num_samples:.1f} passes over the data" if run_data.num_samples else ""
    weights = f"LoRA of rank {config.model.lora_rank}" if config.model.lora_rank else "all weights"
    lines = [
        f"checkpoint  {config.model.pretrained_model_name_or_path}"
        + (f", weights of {config.model.generator_ckpt}" if config.model.generator_ckpt else ""),
        f"data        {described.summary}",
        f"clips       {data.num_frames} frames of {data.height} x {data.width}, {data.frame_sampling} sampling: "
        f"{sum(lengths)} latent frames in {len(lengths)} block(s) of {' '.join(map(str, sorted(set(lengths))))}",
        *describe_controls(data),
        *described.shapes,
        f"method      {method.describe()}",
        *describe_matching(config),
        f"training    {weights}, {training.max_train_steps} steps of {samples_per_step} clips "
        f"({training.train_batch_size} x {training.gradient_accumulation_steps} accumulated x {num_replicas} "
        f"process(es)){passes}",
        f"validation  {describe_validation(config, run_data)}",
        f"result      {training.output_dir}",
    ]
    notes = list(described.notes)
    if described.num_scheduled and len(lengths) == 1:
        notes.append(
            "prompts change from block to block; these clips are one block, and have the prompt in their middle alone"
        )
    return "\n".join(lines + [f"note        {note}" for note in notes])


def describe_matching(config: RunConfig) -> list[str]:
    """Lines on the teacher and the turns of a run of distribution matching."""
    if not isinstance(config, MatchingRunConfig):
        return []
    teacher = config.matching.teacher or config.model.pretrained_model_name_or_path
    critic = [f"critic      {config.matching.critic}"] if config.matching.critic else []
    return [f"teacher     {teacher}", *critic, f"matching    {config.matching.describe()}"]


def describe_controls(data: DataConfig) -> list[str]:
    """A line on the videos that the student is to follow, if there are any."""
    if not data.control_column:
        return []
    dropped = f"; each left out of {100 * data.control_dropout:g}% of the samples" if data.control_dropout else ""
    return [f"controls    {', '.join(data.control_column)}{dropped}"]


def describe_validation(config: RunConfig, run_data: TrainingData) -> str:
    """What is validated, and when."""
    if not config.validates:
        return "none (--validation_steps 0)"
    num_videos, num_clips = len(validation_prompts(config, run_data)), len(run_data.validation_rows)
    if not num_videos:
        return "none (neither --validation_prompts nor --validation_metadata_path)"
    at_first = "before the first step, " if config.training.validate_first else ""
    loss = f" and the loss on {num_clips} held-out clip(s)" if num_clips else ""
    return f"{at_first}every {config.training.validation_steps} steps and at the end: {num_videos} video(s){loss}"


def describe_resumption(config: RunConfig) -> list[str]:
    """Lines on the checkpoint that a run goes on from, and on each setting that differs from that run's.

    Raises:
        ValueError: If the checkpoint is none, or depends on other settings.
    """
    training = config.training
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    if checkpoint is None:
        return []
    newer = passed_over(checkpoint, training.output_dir)
    lines = [f"resumes     {checkpoint}" + (f"; sets aside {describe_damaged(newer)}" if newer else "")]
    name, _, number = checkpoint.name.partition("-")
    if name == "checkpoint" and number.isdecimal() and int(number) > training.max_train_steps:
        raise ValueError(
            f"max_train_steps must be at least the steps that are done, but {checkpoint} is at step {number}, got "
            f"{training.max_train_steps}; raise it, or resume an earlier checkpoint."
        )
    before = read_settings(checkpoint)
    if before is None:
        return [*lines, "note        the settings of the checkpoint's run are not known: nothing is compared"]
    changes = compare_settings(checkpoint, before, flat_dict(with_absolute_paths(config)))
    return lines + [f"changed     {change}" for change in changes]


def print_plan(config: RunConfig, data: TrainingData) -> None:
    """What a run is going to do, and what it takes, without weights."""
    precision = beside_fp8(config.training.mixed_precision)  # without weights there is nothing in 8 bits
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    with user_errors():
        follow_settings(accelerator, config.training)
    config = with_checkpointing_of_launch(config, accelerator)
    if not accelerator.is_main_process:
        return
    with user_errors():
        print("\n".join([describe_plan(config, data, count_replicas(accelerator)), *describe_resumption(config)]))
    print_memory(config, data, accelerator)


def print_memory(config: RunConfig, data: TrainingData, accelerator: Accelerator) -> None:
    """What a run takes of a GPU's memory, if that can be told."""
    with user_errors():
        try:
            print(describe_memory(config, data, accelerator))
        except OSError as error:  # the checkpoint is on the hub, and the hub out of reach; or it lacks a part
            print(f"memory      unknown without the checkpoint's configuration: {describe_refusal(error)}")


# --- memory ----------------------------------------------------------------------------------------------------------


def describe_memory(config: RunConfig, run_data: TrainingData, accelerator: Any) -> str:
    """What the run is going to take of a GPU's memory, and what to do if that is more than there is."""
    plan = plan_run(config, run_data, accelerator)
    where = "process, beside libraries and mapped files," if accelerator.device.type == "cpu" else "GPU"
    lines = [f"memory      of each {where} {plan}"]
    if plan.workload.validation is not None:
        lines.append(f"            in validation: {plan.validation}")
        if context_mesh(accelerator) is not None:
            lines.append(
                "note        context parallelism shares the tokens of steps, not of validation: there each process "
                "has whole clips of its own (--validation_steps 0 leaves it out)"
            )
    shortage = describe_shortage(plan, free_memory(accelerator))
    return "\n".join(lines + ([f"warning     {shortage}"] if shortage else []))


def plan_run(config: RunConfig, run_data: TrainingData, accelerator: Any) -> MemoryPlan:
    """The memory of a run that embeds prompts, then encodes clips, trains and validates; loads no weights."""
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    vae = load_vae_config(name, revision=revision)
    workload = make_workload(config, run_data, accelerator, vae)
    is_matching = isinstance(config, MatchingRunConfig)
    plan = plan_matching_run(config, workload, accelerator) if is_matching else plan_training(workload)
    if config.encodes:
        text_config = UMT5Config.from_pretrained(name, subfolder="text_encoder", revision=revision)
        text_encoder = text_encoder_bytes(text_config, text_dtype(accelerator))
        plan = replace(plan, text_encoder=text_encoder, keeps_text_encoder=config.data.streaming)
    encodes_clips = config.encodes and run_data.has_clips
    if config.needs_vae(run_data.has_clips, workload.validation is not None):
        shape = largest_shape(config) if encodes_clips else None
        plan = with_vae(plan, dict(vae.config), dtype=DTYPES[config.model.vae_dtype], video_shape=shape)
    return plan


def plan_matching_run(config: MatchingRunConfig, student: Workload, accelerator: Any) -> MemoryPlan:
    """The memory of a run of distribution matching, from what its student takes in a run of regression."""
    method, matching, lora_rank = config.method, config.matching, config.model.lora_rank
    teacher, source = find_matching_teacher(config), find_critic(config)
    critic = replace(
        student,
        architecture=architecture_of(source),
        lora_rank=lora_rank and (matching.critic_lora_rank or lora_rank),
        use_ema=False,
        comparing_vae=None,
    )
    shares = lora_rank > 0 and not is_sharded(accelerator)
    return plan_matching(
        replace(student, has_clean_context=method.causal.num_frame_per_block is not None),
        replace(critic, has_clean_context=False),
        replace(critic, architecture=architecture_of(teacher), lora_rank=0, sharding="none"),
        num_draws=count_draws(len(method.inference_timesteps()), method.student_sampler),
        critic_shares_base=shares and has_base_of_student(source, config),
        looks_inside=matching.adversarial_weight > 0,
        teacher_shares_base=shares and teacher.has_base_of(source),
    )


def architecture_of(teacher: Teacher) -> dict[str, Any]:
    """Config of its transformer, with its blocks."""
    config = load_transformer_config(teacher.base, generator_ckpt=teacher.generator_ckpt, revision=teacher.revision)
    return {**config, **teacher.causal.as_dict()}


def make_workload(config: RunConfig, run_data: TrainingData, accelerator: Any, vae: AutoencoderKLWan) -> Workload:
    """What of a run decides how much memory it takes."""
    model, training = config.model, config.training
    architecture = load_transformer_config(
        model.pretrained_model_name_or_path, generator_ckpt=model.generator_ckpt, revision=model.revision
    )
    architecture = with_control_names(architecture, config.data.control_column)
    geometry = LatentGeometry.of(vae.config, architecture)
    return Workload(
        architecture={
            **with_control_names(architecture, config.data.control_column),
            **config.method.causal.as_dict(),
        },
        latent_shape=geometry.latent_shape(*largest_shape(config)),
        batch_size=training.train_batch_size,
        num_passes=training.gradient_accumulation_steps,
        keeps_gradients=accelerator.num_processes > 1 and not is_sharded(accelerator),  # in DDP's buckets
        max_sequence_length=model.max_sequence_length,
        lora_rank=model.lora_rank,
        lora_target_modules=model.lora_target_modules,
        has_clean_context=config.method.has_clean_context,
        dtype=weight_dtype(accelerator),
        memory=config.memory,
        optimizer=training.optimizer,
        use_ema=training.use_ema,
        validation=make_validation_workload(config, run_data, accelerator, geometry),
        comparing_vae=dict(vae.config) if config.method.perceptual_weight else None,
        vae_dtype=DTYPES[model.vae_dtype],
        **sharding(accelerator),
    )


def make_validation_workload(
    config: RunConfig, run_data: TrainingData, accelerator: Any, geometry: LatentGeometry
) -> ValidationWorkload | None:
    """The same of its validation, if there is one."""
    if not validation_prompts(config, run_data):
        return None
    method = config.method
    return ValidationWorkload(
        latent_shape=geometry.latent_shape(*config.data.shape),
        measures_loss=bool(run_data.validation_rows),
        is_guided=bool(config.validation.negative_prompts),
        num_draws=count_draws(len(method.inference_timesteps()), method.student_sampler),
        keeps_copy=config.training.use_ema and accelerator.device.type == "cpu",  # it goes to the host
    )


def largest_shape(config: RunConfig) -> ClipShape:
    """That of the clips which take the most memory."""
    return max(config.data.all_shapes(), key=math.prod)
