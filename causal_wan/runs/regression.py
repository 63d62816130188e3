"""A run that trains a student by regression, whatever its data and its loss: the two are functions of the script.

A script says how a batch of the data loader becomes noisy latents, and what is minimised; `run_regression` does what
remains. A method with a loop of its own takes `begin_run` and `finish_run`, and what lies between is its affair.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from causal_wan.config.changed_settings import SETTINGS_NAME
from causal_wan.config.fields import flat_dict
from causal_wan.config.parsing import user_errors, write_recipe
from causal_wan.config.refusals import DataError
from causal_wan.data.samples import BadClips, ClipBatch
from causal_wan.data.shared_memory import check_shared_memory, shared_memory_here
from causal_wan.data.workers import name_clips_of_dead_workers
from causal_wan.geometry import LatentGeometry
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import check_video_size
from causal_wan.processes import gather_lists, wait_for_all
from causal_wan.records.checkpoints import (
    check_is_no_checkpoint,
    check_output_dir,
    list_checkpoints,
    say_how_to_go_on,
)
from causal_wan.records.metrics import STUDENT
from causal_wan.records.tracker_libraries import resolve_trackers
from causal_wan.records.trackers import Trackers
from causal_wan.results.uploads import HubUploads, start_uploads
from causal_wan.runs.data import RunData, load_run_data
from causal_wan.runs.inputs import Inputs, PrepareBatch, RegressionBatch
from causal_wan.runs.metrics import summarize
from causal_wan.runs.parts import (
    check_strategy,
    check_takes_controls,
    fit_to_checkpoint,
    make_student,
    make_vae,
    rate_scales,
    save_result,
    text_dtype,
    validation_prompts,
    with_absolute_paths,
    with_checkpointing_of_launch,
)
from causal_wan.runs.plan import describe_plan, describe_resumption, print_memory, print_plan
from causal_wan.runs.prompt_embeddings import embed_prompts
from causal_wan.runs.settings import RunConfig
from causal_wan.runs.training_data import LoaderSettings, TrainingData, make_loader
from causal_wan.runs.validation import Measures, Validation, validation_batches
from causal_wan.streams.lanes import LaneStates
from causal_wan.tables.prompt_schedules import texts_of
from causal_wan.training.loop import Sums, train
from causal_wan.training.run import Run
from causal_wan.training.setup import check_precision, make_accelerator, prepare_run, start_trackers
from causal_wan.training.steps import PreparedBatch
from causal_wan.training.stopping import EXIT_STOPPED
from causal_wan.training.strategies import count_replicas
from causal_wan.weights.lora import check_is_no_lora
from causal_wan.weights.transformer import check_generator_ckpt


ComputeLoss = Callable[[RegressionConfig, torch.nn.Module, RegressionBatch, torch.Tensor], tuple[torch.Tensor, Sums]]


def load_clips(config: RunConfig, *, held_out_only: bool = False) -> RunData:
    """The clips of a run's tables or streams; the held-out ones alone of a run that trains on something else.

    Raises:
        ValueError: If they cannot be used.
    """
    data = load_run_data(
        config.data,
        validation_metadata_path=config.held_out_path,
        num_validation_samples=config.validation.num_validation_samples,
        cache_dir=config.cache_dir,
        held_out_only=held_out_only,
    )
    data.check_stream(config.training.seed)
    return data


def run_regression(
    config: RunConfig,
    prepare_batch: PrepareBatch,
    compute_loss: ComputeLoss,
    *,
    load_data: Callable[[RunConfig], TrainingData] = load_clips,
    prepare_held_out: PrepareBatch | None = None,
) -> None:
    """Checks everything that needs no weights, then trains, and saves the result.

    Args:
        config: Of the run.
        prepare_batch: A batch of the data loader -> `Inputs.with_conditions`; called without gradients.
        compute_loss: The loss of a batch as its share of the step's mean, and its `sum_by_level`.
        load_data: What is trained on; raises ValueError if it cannot be used.
        prepare_held_out: Like prepare_batch, of held-out clips; None is the same.
    """
    with user_errors():
        config = check_settings(config)
        data = load_data(config)
    if config.dry_run:
        print_plan(config, data)
        return
    begun = begin_run(config, data)
    run = start_training(begun, {STUDENT: begun.transformer})
    compute_loss = partial(compute_loss, begun.inputs.config.method)
    train_run(
        begun,
        run,
        prepare_batch=partial(prepare_batch, begun.inputs),
        losses={STUDENT: compute_loss},
        summarize=partial(summarize, begun.inputs.config),
        validate=make_validation(begun, compute_loss, prepare_held_out or prepare_batch),
    )


def check_settings(config: RunConfig) -> RunConfig:
    """Checks what needs neither clips nor weights; gives the settings with what is left to the checkpoint.

    Raises:
        ValueError: If a setting cannot be used.
    """
    generator_ckpt = config.model.generator_ckpt
    if generator_ckpt is not None and not Path(generator_ckpt, "transformer").is_dir():
        check_is_no_lora("generator_ckpt", generator_ckpt)
        check_is_no_checkpoint("generator_ckpt", generator_ckpt)
    check_generator_ckpt(generator_ckpt)
    clips = fit_to_checkpoint(config.data, config.model, generator_ckpt)
    check_takes_controls(config)
    check_output_dir(config.training.output_dir, config.training.resume_from_checkpoint)
    resolve_trackers(config.training.report_to)
    check_precision(config.training.mixed_precision)
    return replace(config, data=clips)


@dataclass
class BegunRun:
    """A run with its parts loaded, before anything is trained."""

    accelerator: Accelerator
    data: TrainingData
    inputs: Inputs
    transformer: CausalWanTransformer3DModel
    trackers: Trackers
    uploads: HubUploads | None


def begin_run(
    config: RunConfig,
    data: TrainingData,
    *,
    check_launch: Callable[[RunConfig, Accelerator], None] = check_strategy,
    make_transformer: Callable[[RunConfig, Accelerator], CausalWanTransformer3DModel] = make_student,
    also_embedded: Sequence[str] = (),
) -> BegunRun:
    """Says what is going to happen, opens the cache, and loads what the run needs; ends with status 2 if it cannot.

    Args:
        config: Of the run.
        data: That it trains on.
        check_launch: Raises ValueError if what the run trains cannot be trained as it is launched.
        make_transformer: Loads the student.
        also_embedded: Prompts beside those of the data and of validation.
    """
    with user_errors():
        accelerator = make_accelerator(config.training)
        check_launch(config, accelerator)
    config = with_checkpointing_of_launch(config, accelerator)
    with user_errors():
        resumption = describe_resumption(config)
    if accelerator.is_main_process:
        print("\n".join([describe_plan(config, data, count_replicas(accelerator)), *resumption]))
        print_memory(config, data, accelerator)
    held_out = validation_prompts(config, data)
    prompts = [*data.prompts, *texts_of(held_out), *(config.validation.negative_prompts if held_out else [])]
    prompts += also_embedded
    with user_errors():
        trackers = start_trackers(accelerator, config.training, flat_dict(config))
        uploads = start_uploads(config.hub, config.training.output_dir) if accelerator.is_main_process else None
        check_streaming(config, accelerator)
        data.open_cache(
            config.cache,
            config.model,
            prompts,
            vae_tiling=config.memory.vae_tiling,
            text_dtype="bf16" if text_dtype(accelerator) == torch.bfloat16 else "fp32",
            encodes=config.encodes,
        )
        check_room_for_batches(config, data, accelerator)
        prompt_embeds = embed_prompts(
            accelerator,
            config.model,
            prompts,
            data.cached,
            output_dir=config.training.output_dir,
            streaming=config.data.streaming,
        )
        transformer = make_transformer(config, accelerator)
    vae = make_vae(config, accelerator.device, is_needed=config.needs_vae(data.has_clips, bool(held_out)))
    with user_errors():
        for shape in config.data.all_shapes():
            check_video_size(*shape, vae=vae, transformer=transformer)
    inputs = Inputs(
        config=config,
        prompt_embeds=prompt_embeds,
        vae=vae,
        device=accelerator.device,
        keeper=data.keeper,
        geometry=LatentGeometry.of(vae.config, transformer.config),
    )
    wait_for_all()  # the main process alone may have had to download and read the weights, which it shares out next
    return BegunRun(accelerator, data, inputs, transformer, trackers, uploads)


def start_training(
    begun: BegunRun, models: Mapping[str, torch.nn.Module], *, role_rates: Mapping[str, float] | None = None
) -> Run:
    """The run of models that are to be trained, prepared and, if asked for, resumed; its settings are written down.

    Args:
        begun: From `begin_run`.
        models: By role.
        role_rates: Learning rates of some roles, as in `prepare_run`.
    """
    accelerator, data, config = begun.accelerator, begun.data, begun.inputs.config
    if data.lane_states is not None:
        accelerator.register_for_checkpointing(data.lane_states)
    with user_errors():
        settings = flat_dict(with_absolute_paths(config))
        run = prepare_run(
            accelerator,
            config.training,
            models,
            begun.trackers,
            settings,
            rate_scales=rate_scales(config),
            role_rates=role_rates,
        )
    if accelerator.is_main_process:  # not before: a run that cannot be resumed keeps its own
        with user_errors():
            write_recipe(settings, Path(config.training.output_dir) / SETTINGS_NAME)
    return run


def make_validation(
    begun: BegunRun,
    compute_loss: Callable[..., tuple[torch.Tensor, Sums]],
    prepare_held_out: PrepareBatch,
    measures: Measures | None = None,
) -> Validation | None:
    """Samples of a run's prompts, and a loss of regression on its held-out clips; None of a run without prompts.

    Args:
        begun: From `begin_run`.
        compute_loss: Of a transformer, a batch and the number of its items.
        prepare_held_out: A batch of held-out clips -> what the loss takes.
        measures: Looks at the samples.
    """
    accelerator, data, inputs = begun.accelerator, begun.data, begun.inputs
    validate = Validation(
        accelerator,
        inputs,
        compute_loss,
        summarize=partial(summarize, inputs.config),
        output_dir=inputs.config.training.output_dir,
        prompts=validation_prompts(inputs.config, data),
        batches=validation_batches(accelerator, inputs, data.held_out_dataset(), prepare_held_out),
        latent_shape=inputs.geometry.latent_shape(*inputs.config.data.shape),
        measures=measures,
    )
    return validate if validate.prompts else None


def train_run(
    begun: BegunRun, run: Run, *, prepare_batch: Callable[[ClipBatch], PreparedBatch], **method: Any
) -> None:
    """Trains, saves the result, and ends the run.

    Args:
        begun: From `begin_run`.
        run: From `start_training`.
        prepare_batch: A batch of the data loader -> what the losses take; called without gradients.
        method: `losses`, `turns`, `summarize` and `validate` of `causal_wan.training.loop.train`.
    """
    data, config = begun.data, begun.inputs.config
    bad_clips, dataset = BadClips(config.data.max_bad_samples), data.dataset()

    @torch.no_grad()
    def prepare(batch: ClipBatch) -> PreparedBatch:
        bad_clips.note(batch.errors)
        if data.lane_states is not None:
            data.lane_states.update(batch.lane_states)
        return prepare_batch(batch)

    go_on = partial(say_how_to_go_on, config.training.output_dir)
    with user_errors(DataError), name_clips_of_dead_workers(dataset, go_on), data.keeper or contextlib.nullcontext():
        complete = train(
            run,
            make_dataloader=partial(make_loader, data, dataset, loader_settings(config, run)),
            prepare_batch=prepare,
            before_checkpoint=None if data.lane_states is None else partial(gather_lane_states, data.lane_states),
            after_checkpoint=partial(upload_checkpoint, begun.uploads) if config.hub.push_to_hub else None,
            save_result=partial(save_result, run, config, data),
            **method,
        )
    finish_run(begun, complete=complete)


def finish_run(begun: BegunRun, *, complete: bool) -> None:
    """Waits for trackers and uploads; or ends the program with `EXIT_STOPPED` if the run is not complete."""
    begun.trackers.finish()
    wait_for_all()
    begun.accelerator.end_training()
    if not complete and begun.accelerator.is_main_process:
        kept = list_checkpoints(output_dir := begun.inputs.config.training.output_dir)
        again = "To go on, run the same command with --resume_from_checkpoint latest."
        none = f"no checkpoint could be written to {output_dir}. Make room, and run the same command again."
        print(f"stopped: {kept[-1]}. {again}" if kept else f"stopped: {none}")
    if not complete:
        sys.exit(EXIT_STOPPED)
    if begun.uploads:
        begun.uploads.finish()


def check_room_for_batches(config: RunConfig, data: TrainingData, accelerator: Accelerator) -> None:
    """Checks that the workers of the data loaders can hand over their batches. Called by every process.

    Raises:
        ValueError: If they cannot.
    """
    warning = check_shared_memory(
        gather_lists([shared_memory_here()]),
        batch_bytes=config.training.train_batch_size * data.sample_bytes(),
        num_workers=config.training.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    if warning and accelerator.is_main_process:
        print(f"warning     {warning}")


def upload_checkpoint(uploads: HubUploads | None, checkpoint: Path) -> None:
    """Begins to upload a checkpoint, on the process that uploads, for which the others wait.

    It has to set the files aside first, and copies them where the disk knows no hard links.
    """
    if uploads is not None:
        uploads.upload_checkpoint(checkpoint)
    wait_for_all()


def check_streaming(config: RunConfig, accelerator: Accelerator) -> None:
    """Checks that each process may read clips of its own.

    Raises:
        ValueError: If groups of processes share clips.
    """
    if config.data.streaming and count_replicas(accelerator) != accelerator.num_processes:
        raise ValueError("--streaming gives each process clips of its own; launch without context parallelism.")


def gather_lane_states(lane_states: LaneStates) -> None:
    """Collects how far each process has come in the streams. Called by every process."""
    lane_states.merge(gather_lists([lane_states.state_dict()]))


def loader_settings(config: RunConfig, run: Run) -> LoaderSettings:
    """How a run loads its batches on this process."""
    training, accelerator = config.training, run.accelerator
    return LoaderSettings(
        seed=training.seed,
        samples_per_step=training.samples_per_step(run.num_replicas),
        batch_size=training.train_batch_size,
        num_workers=training.dataloader_num_workers,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
        timeout=training.dataloader_timeout,
    )
