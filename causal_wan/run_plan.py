"""What a run that trains a student is going to do and take, in words, before it begins."""

import math
from typing import Any

from causal_wan.changed_settings import compare_settings, read_settings
from causal_wan.checkpoints import describe_damaged, find_checkpoint, passed_over
from causal_wan.config import flat_dict
from causal_wan.memory_plan import describe_shortage, plan_run
from causal_wan.models import DTYPES, causal_settings
from causal_wan.run_config import RunConfig
from causal_wan.run_data import RunData
from causal_wan.run_parts import text_dtype, weight_dtype, with_absolute_paths
from causal_wan.strategies import free_memory, is_sharded, sharding


def describe_plan(config: RunConfig, run_data: RunData, num_replicas: int) -> str:
    """What is going to happen, in numbers."""
    training, method, data = config.training, config.method, config.data
    lengths = method.block_lengths(config.num_latent_frames(data.shape))
    samples_per_step = training.samples_per_step(num_replicas)
    num_samples = training.max_train_steps * samples_per_step
    passes = f" = {num_samples / run_data.num_samples:.1f} passes over the data" if run_data.num_samples else ""
    weights = f"LoRA of rank {config.model.lora_rank}" if config.model.lora_rank else "all weights"
    lines = [
        f"checkpoint  {config.model.pretrained_model_name_or_path}"
        + (f", weights of {config.model.generator_ckpt}" if config.model.generator_ckpt else ""),
        f"data        {run_data.describe()}",
        f"clips       {data.num_frames} frames of {data.height} x {data.width}, {data.frame_sampling} sampling: "
        f"{sum(lengths)} latent frames in {len(lengths)} block(s) of {' '.join(map(str, sorted(set(lengths))))}",
        *run_data.describe_shapes(),
        f"method      {method.describe()}",
        f"training    {weights}, {training.max_train_steps} steps of {samples_per_step} clips "
        f"({training.train_batch_size} x {training.gradient_accumulation_steps} accumulated x {num_replicas} "
        f"process(es)){passes}",
        f"result      {training.output_dir}",
    ]
    return "\n".join(lines + [f"note        {note}" for note in run_data.describe_changes()])


def describe_resumption(config: RunConfig) -> list[str]:
    """Lines on the checkpoint that a run goes on from, and on each setting that differs from that run's.

    Raises:
        ValueError: If the checkpoint is none, or depends on other settings.
    """
    training = config.training
    checkpoint = find_checkpoint(training.resume_from_checkpoint, training.output_dir)
    if checkpoint is None:
        return []
    damaged = passed_over(checkpoint, training.output_dir)
    lines = [f"resumes     {checkpoint}" + (f"; damaged: {describe_damaged(damaged)}" if damaged else "")]
    number = checkpoint.name.rpartition("-")[2]
    if number.isdigit() and int(number) > training.max_train_steps:
        raise ValueError(
            f"max_train_steps must be at least the steps that are done, but {checkpoint} is at step {number}, got "
            f"{training.max_train_steps}; raise it, or resume an earlier checkpoint."
        )
    before = read_settings(checkpoint)
    if before is None:
        return [*lines, "note        the settings of the checkpoint's run are not known: nothing is compared"]
    changes = compare_settings(checkpoint, before, flat_dict(with_absolute_paths(config)))
    return lines + [f"changed     {change}" for change in changes]


def describe_memory(config: RunConfig, accelerator: Any) -> str:
    """What the run is going to take of a GPU's memory, and what to do if that is more than there is."""
    model, data, training = config.model, config.data, config.training
    keeps_gradients = accelerator.num_processes > 1 and not is_sharded(accelerator)  # in DDP's buckets
    plan = plan_run(
        model.pretrained_model_name_or_path,
        max(data.all_shapes(), key=math.prod),
        causal_config=causal_settings(flat_dict(config)),
        generator_ckpt=model.generator_ckpt,
        revision=model.revision,
        vae_dtype=DTYPES[config.model.vae_dtype],
        text_dtype=text_dtype(accelerator),
        batch_size=training.train_batch_size,
        num_passes=training.gradient_accumulation_steps + keeps_gradients,
        max_sequence_length=model.max_sequence_length,
        lora_rank=model.lora_rank,
        lora_target_modules=model.lora_target_modules,
        has_clean_context=config.method.has_clean_context,
        dtype=weight_dtype(accelerator),
        memory=config.memory,
        optimizer=training.optimizer,
        use_ema=training.use_ema,
        encodes=config.encodes,
        keeps_text_encoder=config.data.streaming,
        **sharding(accelerator),
    )
    shortage = describe_shortage(plan, free_memory(accelerator))
    return f"memory      {plan}" + (f"\nwarning     {shortage}" if shortage else "")
