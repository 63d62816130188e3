"""The parts of a run that trains a student: the student and the VAE; and how its result is saved.

Knows no loss: any method that trains a student takes its parts from here, whoever owns its loop.
"""

import contextlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors import SafetensorError
from tqdm.auto import tqdm

from causal_wan.blocks import CausalConfig
from causal_wan.config.fields import paths_of
from causal_wan.config.settings import BaseModelConfig, ModelConfig
from causal_wan.data.clips import shown_prompts
from causal_wan.data.settings import DataConfig
from causal_wan.memory.levers import (
    check_can_quantize,
    cut_up_vae,
    enable_gradient_checkpointing,
    quantization_config,
    store_in_fp8,
)
from causal_wan.model.compiling import compile_layers
from causal_wan.model.control import PATCH_EMBEDDING, check_controls
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.processes import gather_lists
from causal_wan.progress import announced
from causal_wan.records.checkpoints import list_checkpoints, step_of
from causal_wan.results.export import write_pipeline_file
from causal_wan.results.model_card import DATA_SUMMARY_NAME
from causal_wan.results.teacher import Teacher, find_teacher
from causal_wan.runs.settings import MatchingRunConfig, RunConfig
from causal_wan.runs.training_data import TrainingData
from causal_wan.tables.prompt_schedules import FramePrompts
from causal_wan.training.run import Run
from causal_wan.training.setup import check_optimizer, check_strategy_can
from causal_wan.training.strategies import (
    beside_fp8,
    check_can_be_compiled,
    context_mesh,
    is_sharded,
    keeps_weights_in_16_bits,
    loads_weights,
    takes_over_checkpointing,
)
from causal_wan.training.weights import ema_weights, gather_weights
from causal_wan.weights.kinds import check_base
from causal_wan.weights.lora import add_lora, save_lora
from causal_wan.weights.parts import DTYPES, load_vae, load_vae_config
from causal_wan.weights.transformer import load_transformer, load_transformer_config, save_transformer


def weight_dtype(accelerator: Any) -> torch.dtype:
    """What weights that are not trained are kept in, and passes computed in."""
    return DTYPES.get(beside_fp8(accelerator.mixed_precision), torch.float32)


def text_dtype(accelerator: Any) -> torch.dtype:
    """Of the text encoder: UMT5 overflows in float16."""
    dtype = weight_dtype(accelerator)
    return torch.float32 if dtype == torch.float16 else dtype


def with_checkpointing_of_launch(config: RunConfig, accelerator: Any) -> RunConfig:
    """The config with gradient checkpointing if the launch's config file asks for it."""
    if not takes_over_checkpointing(accelerator):
        return config
    return replace(config, memory=replace(config.memory, gradient_checkpointing=True))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with local checkpoints named so that `generate.py` finds them from any folder."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    paths = {name: absolute(vars(config.model)[name]) for name in paths_of(ModelConfig)}
    return replace(config, model=replace(config.model, **paths))


def fit_to_checkpoint(data: DataConfig, model: BaseModelConfig, generator_ckpt: str | None = None) -> DataConfig:
    """The settings of the clips with what is left to the checkpoint, which is checked, by its configs alone.

    Of a checkpoint that is out of reach they stay as they are: whatever needs it says so.

    Raises:
        ValueError: If it is of another kind than WAN's text-to-video, or the clips' sizes do not fit it.
    """
    name, revision = model.pretrained_model_name_or_path, model.revision
    try:
        geometry = check_base(name, generator_ckpt=generator_ckpt, revision=revision)
    except OSError:
        return data
    return data.for_checkpoint(geometry)


def check_takes_controls(config: RunConfig) -> None:
    """Checks, by its config alone, that a student can begin with the controls of a run; passes what is out of reach.

    Raises:
        ValueError: If it takes others already.
    """
    model = config.model
    with contextlib.suppress(OSError):
        architecture = load_transformer_config(
            model.pretrained_model_name_or_path, generator_ckpt=model.generator_ckpt, revision=model.revision
        )
        check_controls(architecture, config.data.control_column)


def check_strategy(config: RunConfig, accelerator: Any, *, num_models: int = 1) -> None:
    """Checks, before anything is encoded, that so many models can be trained as the run is launched, on what is there.

    Raises:
        ValueError: If settings do not fit the strategy, or need a GPU or a library that is missing.
    """
    check_strategy_can(accelerator, config.training, num_models=num_models)
    check_optimizer(config.training)
    if config.compile:
        check_can_be_compiled(accelerator)
    quantize_base = config.memory.quantize_base
    if quantize_base and is_sharded(accelerator):
        raise ValueError(
            f"quantize_base {quantize_base} needs the whole base on each GPU; launch with "
            "accelerate_configs/single_gpu.yaml or ddp.yaml, or leave it out."
        )
    check_can_quantize(quantize_base, accelerator.device)


def make_student(config: RunConfig, accelerator: Any) -> CausalWanTransformer3DModel:
    """The transformer to train: float32 weights, or frozen ones in 16 bits or fewer with LoRA adapters in float32.

    Raises:
        ValueError: If weights or memory levers do not fit the checkpoint.
    """
    transformer = load_student(config, accelerator)
    if config.model.lora_rank > 0:
        add_own_adapters(transformer, config.model)
    save_memory(transformer, config)
    return transformer


def add_own_adapters(transformer: CausalWanTransformer3DModel, model: ModelConfig) -> None:
    """The new LoRA adapters that a run trains."""
    add_lora(
        transformer,
        rank=model.lora_rank,
        alpha=model.lora_rank if model.lora_alpha is None else model.lora_alpha,
        target_modules=model.lora_target_modules,
    )


def load_student(config: RunConfig, accelerator: Any) -> CausalWanTransformer3DModel:
    """The weights that the student starts from, or the base of its LoRA, frozen or not as they come.

    Raises:
        ValueError: If they do not fit the checkpoint.
    """
    return load_trained(
        config,
        accelerator,
        config.model.pretrained_model_name_or_path,
        config.method.causal,
        generator_ckpt=config.model.generator_ckpt,
        control_names=config.data.control_column,
        revision=config.model.revision,
    )


def load_trained(
    config: RunConfig, accelerator: Any, name: str, causal: CausalConfig, **weights: Any
) -> CausalWanTransformer3DModel:
    """A transformer to train, or the base of a LoRA to train, in the precision and the place that the strategy wants.

    Args:
        config: Of the run.
        accelerator: Of the run.
        name: Diffusers folder or hub id.
        causal: Its blocks and what they see.
        weights: `generator_ckpt`, `revision` and `control_names` of `load_transformer`.
    """
    lora, memory, dtype = config.model.lora_rank > 0, config.memory, weight_dtype(accelerator)
    transformer = load_transformer(
        name,
        causal,
        dtype=dtype if lora or keeps_weights_in_16_bits(accelerator) else torch.float32,
        device="cpu" if is_sharded(accelerator) else accelerator.device,
        quantization=quantization_config(memory.quantize_base, dtype),
        empty=not loads_weights(accelerator),
        **weights,
    )
    transformer.enable_context_parallel(context_mesh(accelerator))
    if memory.quantize_base == "fp8":
        store_in_fp8(transformer, dtype)
    return transformer


def save_memory(transformer: CausalWanTransformer3DModel, config: RunConfig) -> None:
    """Has what is trained recompute and compile its layers as the config says."""
    if config.memory.gradient_checkpointing:
        enable_gradient_checkpointing(transformer, config.memory)
    if config.compile:
        compile_layers(transformer, len(config.data.all_shapes()))


def find_matching_teacher(config: MatchingRunConfig) -> Teacher:
    """The teacher; the base model if none is named.

    Raises:
        ValueError: If it is none.
    """
    return _find_scorer(config, config.matching.teacher)


def find_critic(config: MatchingRunConfig) -> Teacher:
    """What the critic starts as; the teacher if nothing is named.

    Raises:
        ValueError: If it is no model.
    """
    return _find_scorer(config, config.matching.critic or config.matching.teacher)


def _find_scorer(config: MatchingRunConfig, named: str | None) -> Teacher:
    base, revision = config.model.pretrained_model_name_or_path, config.model.revision
    return find_teacher(named or base, base, revision)


def has_base_of_student(teacher: Teacher, config: MatchingRunConfig) -> bool:
    """Whether a teacher is, but for its LoRA, the weights that the student starts from."""
    model = config.model
    return teacher.has_base(model.pretrained_model_name_or_path, model.revision, model.generator_ckpt)


def rate_scales(config: RunConfig) -> dict[str, float]:
    """Learning rates of weights over that of the others, for `causal_wan.training.setup.prepare_run`."""
    return {PATCH_EMBEDDING: config.model.control_learning_rate_scale} if config.data.control_column else {}


def make_vae(config: RunConfig, device: torch.device, *, is_needed: bool) -> AutoencoderKLWan:
    """The VAE where it waits between uses, cut up as the config says; its config alone where it is not needed."""
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    if not is_needed:
        return load_vae_config(name, revision=revision)
    vae = load_vae(name, dtype=DTYPES[config.model.vae_dtype], revision=revision)
    cut_up_vae(vae, config.memory)
    return vae if config.memory.offload_vae else vae.to(device)


def save_student(
    transformer: CausalWanTransformer3DModel, weights: dict[str, torch.Tensor], config: RunConfig
) -> None:
    """Writes `transformer/` in diffusers format, or the LoRA file, and `pipeline.py` into the output folder.

    Beside, then renamed: half a result would be taken for one.
    """
    folder = Path(config.training.output_dir)
    write_pipeline_file(folder)
    if config.model.lora_rank > 0:
        save_lora(transformer, weights, folder)  # safetensors itself writes beside
        return
    written, final = folder / "partial-transformer", folder / "transformer"
    try:
        save_transformer(transformer, weights, written)
        shutil.rmtree(final, ignore_errors=True)
        written.rename(final)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def save_result(run: Run, config: RunConfig, data: TrainingData) -> None:
    """Writes the weights of the result, and what a model card says of the data.

    Ends the program with status 1 where that cannot be: a full disk, a folder that became read-only.
    """
    accelerator, output_dir, failure = run.accelerator, Path(config.training.output_dir), None
    with announced("saving the result"):
        with ema_weights(run.student):
            weights = gather_weights(accelerator, run.student)
        if accelerator.is_main_process:
            try:
                save_student(run.student.unwrapped_model, weights, config)
                (output_dir / DATA_SUMMARY_NAME).write_text(json.dumps(data.count()))
            except (OSError, SafetensorError) as error:
                failure = describe_unsaved(output_dir, run.state.step, error)
    if accelerator.is_main_process:
        saved = f"saved: generate.py --checkpoint {output_dir} --prompt '...'"
        tqdm.write(failure or saved, file=sys.stderr if failure else sys.stdout)  # beside the bar of steps
    if any(gather_lists([failure is not None])):
        sys.exit(1)


def describe_unsaved(output_dir: Path, step: int, error: Exception) -> str:
    """Why a result could not be saved, and how to come by it all the same."""
    newest = next(reversed(list_checkpoints(output_dir)), None)
    reason = f"error: the result could not be saved to {output_dir} ({type(error).__name__}: {error})."
    if newest is None:
        return f"{reason} No checkpoint could be written either. Make room, and run the same command again."
    where = "Its weights are safe" if step_of(newest) == step else f"Weights of step {step_of(newest)} are kept"
    return (
        f"{reason} {where} in {newest}. Make room and run the same command with --resume_from_checkpoint latest, or "
        f"make a result on another disk: python convert_checkpoint.py --input {newest} --output FOLDER"
    )


def validation_prompts(config: RunConfig, data: TrainingData) -> list[str | FramePrompts]:
    """The prompts that are sampled at each validation: of the held-out clips, then those that are given.

    Of clips along which the prompt changes, that of each frame.
    """
    if not config.validates:
        return []
    shown = (config.data.shape, config.data.for_validation(), torch.Generator())
    held_out = [shown_prompts(row, *shown)[0] for row in data.validation_rows]
    return held_out + list(config.validation.validation_prompts)
