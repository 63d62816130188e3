"""The training loop: passes, steps, logging, validation, checkpoints.

Knows no video and no diffusion: a batch is opaque but for two numbers (see `PreparedBatch`), and losses are arguments.
Everything random in a step comes from the batch, whose samples are numbered through the whole run; so a resumed run
needs no state of random generators, and neither the number of processes nor gradient accumulation changes what is
learned.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from causal_wan.progress import announced
from causal_wan.records.checkpoints import save_checkpoint
from causal_wan.records.metrics import STUDENT, StepLog, Sums
from causal_wan.records.trackers import CaptionedVideo
from causal_wan.training.profiling import StepProfiler
from causal_wan.training.run import Run
from causal_wan.training.steps import ComputeLoss, PreparedBatch, prepare_passes, take_turns
from causal_wan.training.stopping import StopRequest
from causal_wan.training.validation_runs import ValidationRuns, is_due


logger = logging.getLogger(__name__)


def train(
    run: Run,
    *,
    make_dataloader: Callable[..., DataLoader],
    prepare_batch: Callable[[Any], PreparedBatch],
    losses: Mapping[str, ComputeLoss],
    turns: Callable[[int], Sequence[str]] = lambda step: (STUDENT,),
    summarize: Callable[[Sums], dict[str, float]],
    validate: Callable[[torch.nn.Module, int], tuple[dict[str, float], dict[str, CaptionedVideo]]] | None = None,
    before_checkpoint: Callable[[], None] | None = None,
    after_checkpoint: Callable[[Path], None] | None = None,
    save_result: Callable[[], None] | None = None,
) -> bool:
    """Trains until `max_train_steps`. The result is in the model, or in the average: see `ema_weights`.

    What was computed is on disk before anything else may fail: the checkpoint, and at the end the result, come before
    the validation of the same step.

    Args:
        run: From `prepare_run`.
        make_dataloader: (*, start, end, step) -> the batches of the run's samples from `start`, the first of `step`,
            to `end`, in order.
        prepare_batch: A batch of the loader, on the host -> what the losses take, on the device. No gradients.
        losses: Role of each trainee -> its loss. (wrapped model, prepared batch, num_items of the whole step over all
            processes) -> (this batch's share: a sum over its elements divided by that number, sums to log).
        turns: Number of steps that are done -> roles of what the next one trains, one after the other, on the same
            batches. It must depend on nothing else, or a resumed run would take other turns.
        summarize: Sums over processes and steps -> metrics.
        validate: (unwrapped model with the weights of the result, step) -> (metrics, mp4 files by name). Called
            on every process.
        before_checkpoint: Called on every process before a checkpoint is written, to gather what goes into it.
        after_checkpoint: Called with its folder, which is not there if it could not be written.
        save_result: Called on every process when the run is complete.

    Returns:
        Whether the run is complete; after Ctrl-C, SIGTERM or SIGUSR1 to any process it stops early, with a checkpoint.

    Raises:
        RuntimeError: If `max_nonfinite_steps` steps in a row had to be skipped, or the first steps changed no weight.
    """
    config, state = run.config, run.state
    samples_per_step = config.samples_per_step(run.num_replicas)
    end_sample = state.num_samples + (config.max_train_steps - state.step) * samples_per_step
    loader = make_dataloader(start=state.num_samples, end=end_sample, step=state.step)
    # On the device, the clips of all passes would wait for their turn to be encoded.
    batches = iter(run.accelerator.prepare_data_loader(loader, device_placement=False))
    log = StepLog(run, summarize)
    validation = None if validate is None else ValidationRuns(run, validate, log)
    progress = tqdm(
        total=config.max_train_steps,
        initial=state.step,
        desc="steps",
        delay=0,  # seen before the first step, which may take long
        disable=not run.accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    profiler = StepProfiler(run.accelerator, config.profile, config.output_dir, state.step)
    for trainee in run.trainees.values():
        trainee.model.train()
    is_owed = False  # a validation, by a run that was told to stop
    with StopRequest() as stop, progress, profiler:
        if state.step == config.max_train_steps and save_result is not None:  # it ended after its last checkpoint
            save_result()
        if validation is not None and validation.is_owed():
            validation()
        while state.step < config.max_train_steps and not stop.agreed:
            prepared = prepare_passes(batches, prepare_batch, config.gradient_accumulation_steps, log, profiler)
            with log.timed("compute"):
                take_turns(run, turns(state.step), prepared, losses, stop=stop, profiler=profiler)
            profiler.end_step()
            log.count_step(num_tokens=sum(batch.num_tokens for batch in prepared))
            state.num_samples += samples_per_step
            state.step += 1

            progress.update()
            if is_due(state.step, config.logging_steps, config):
                run.late.flush()
                entry = log.write()
                shown = next((value for name, value in entry.items() if name.endswith("_loss")), float("nan"))
                progress.set_postfix(loss=f"{shown:.4f}")
            if stop.agreed or is_due(state.step, config.checkpointing_steps, config):
                write_checkpoint(run, before_checkpoint, after_checkpoint)
            if state.step == config.max_train_steps and save_result is not None:
                save_result()
            if validation is not None and validation.is_due():
                is_owed = stop.agreed
                if not is_owed:
                    validation()
    return state.step == config.max_train_steps and not is_owed


def write_checkpoint(
    run: Run, before: Callable[[], None] | None = None, after: Callable[[Path], None] | None = None
) -> None:
    """Writes a checkpoint of the step that is done; before and after it as in `train`."""
    config, step = run.config, run.state.step
    run.late.flush()
    run.metrics.reduce_to_main(run.accelerator)
    if before is not None:
        before()
    with announced(f"writing checkpoint-{step}"):
        save_checkpoint(
            run.accelerator,
            config.output_dir,
            step,
            averages=[trainee.ema for trainee in run.trainees.values()],
            total_limit=config.checkpoints_total_limit,
            settings=run.settings,
        )
    if after is not None:
        after(Path(config.output_dir) / f"checkpoint-{step}")
