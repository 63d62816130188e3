"""The training loop: passes, steps, logging, validation, checkpoints.

Knows no video and no diffusion: a batch is opaque but for two keys, and the loss is an argument. Everything random in
a step comes from the batch, whose samples are numbered through the whole run; so a resumed run needs no state of
random generators, and neither the number of processes nor gradient accumulation changes what is learned.
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from causal_wan.checkpoints import list_checkpoints, save_checkpoint
from causal_wan.profiling import StepProfiler
from causal_wan.progress import announced
from causal_wan.run_log import MetricSums, StepLog, Sums
from causal_wan.settings import TrainingConfig
from causal_wan.trackers import CaptionedVideo
from causal_wan.training_setup import Run, trainable_parameters


logger = logging.getLogger(__name__)

Batch = dict[str, Any]

EXIT_STOPPED = 75
"""Exit status after SIGTERM or SIGUSR1: a checkpoint was written, the same command goes on (EX_TEMPFAIL)."""


@contextlib.contextmanager
def ema_weights(ema: EMAModel | None, model: torch.nn.Module) -> Iterator[None]:
    """Lets the model have its averaged weights for a while."""
    if ema is None:
        yield
        return
    parameters = trainable_parameters(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        reshard(model)
        ema.restore(parameters)


def reshard(model: torch.nn.Module) -> None:
    """Takes FSDP2's shards out again after a forward without a backward, which leaves the root's weights whole.

    Until then a change to the weights would be one to copies.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class StopRequest:
    """Notes SIGTERM and SIGUSR1, by which clusters announce that they want the machine back, while it is entered.

    `received` is about this process, `agreed` is what all processes act on.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> Self:
        self.received = self.agreed = False
        self._handlers = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        logger.warning("received %s: stopping as soon as what is done can be kept", signal.Signals(number).name)
        self.received = True


def gather_weights(run: Run) -> dict[str, torch.Tensor]:
    """The trainable weights, whole, on the CPU of the main process; one weight at a time, so that nobody holds two.

    Every process has to call this; all but the main one get an empty dict.
    """
    gathered = {}
    for name, parameter in run.unwrapped_model.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            continue
        whole = _whole(run.accelerator, parameter)
        if run.accelerator.is_main_process:
            gathered[name] = whole.detach().to("cpu", copy=True)  # the weights may change before they are written
    return gathered


def _whole(accelerator: Accelerator, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A weight without its sharding, as precise as the optimizer has it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def train(
    run: Run,
    *,
    make_dataloader: Callable[..., DataLoader],
    prepare_batch: Callable[[Batch], Batch],
    compute_loss: Callable[[torch.nn.Module, Batch, torch.Tensor], tuple[torch.Tensor, Sums]],
    summarize: Callable[[Sums], dict[str, float]],
    validate: Callable[[torch.nn.Module, int], tuple[dict[str, float], dict[str, CaptionedVideo]]] | None = None,
    before_checkpoint: Callable[[], None] | None = None,
    after_checkpoint: Callable[[Path], None] | None = None,
) -> bool:
    """Trains until `max_train_steps`. The result is in the model, or in the average: see `ema_weights`.

    Args:
        run: From `prepare_run`.
        make_dataloader: (*, start, end, step) -> the batches of the run's samples from `start`, the first of `step`,
            to `end`, in order.
        prepare_batch: A batch of the loader -> what `compute_loss` takes, with at least `num_items`, a scalar tensor:
            how many elements its loss is a mean over, and `num_tokens`, an int, for the throughput. No gradients.
        compute_loss: (wrapped model, prepared batch, num_items of the whole step over all processes) -> (this batch's
            share of the loss: a sum over its elements divided by that number, sums to log).
        summarize: Sums over processes and steps -> metrics.
        validate: (unwrapped model with the weights of the result, step) -> (metrics, mp4 files by name). Called
            on every process.
        before_checkpoint: Called on every process before a checkpoint is written, to gather what goes into it.
        after_checkpoint: Called with its folder, which is not there if it could not be written.

    Returns:
        Whether the run is complete; after SIGTERM or SIGUSR1 to any process it stops early, with a checkpoint.

    Raises:
        RuntimeError: If `max_nonfinite_steps` steps in a row had to be skipped.
    """
    config, state = run.config, run.state
    samples_per_step = config.samples_per_step(run.num_replicas)
    end_sample = state.num_samples + (config.max_train_steps - state.step) * samples_per_step
    batches = iter(run.accelerator.prepare(make_dataloader(start=state.num_samples, end=end_sample, step=state.step)))
    log = StepLog(run, summarize)
    progress = tqdm(
        total=config.max_train_steps,
        initial=state.step,
        desc="steps",
        disable=not run.accelerator.is_local_main_process,
        dynamic_ncols=True,
    )
    profiler = StepProfiler(run.accelerator, config.profile, config.output_dir, state.step)
    run.model.train()
    with StopRequest() as stop, progress, profiler:
        if validate is not None and config.validate_first and state.step == 0:
            validate_result(run, validate, log)
        while state.step < config.max_train_steps and not stop.agreed:
            with log.timed("data"), profiler.part("data"):
                loaded = [next(batches) for _ in range(config.gradient_accumulation_steps)]
            with log.timed("compute"):
                with profiler.part("encode and noise"):
                    prepared = [prepare_batch(batch) for batch in loaded]
                train_step(run, prepared, compute_loss, stop, profiler)
            profiler.end_step()
            log.count_step(num_tokens=sum(batch["num_tokens"] for batch in prepared))
            state.num_samples += samples_per_step
            state.step += 1

            progress.update()
            if is_due(state.step, config.logging_steps, config):
                run.late.flush()
                entry = log.write()
                progress.set_postfix(loss=f"{entry.get('generator_loss', float('nan')):.4f}")
            if validate is not None and is_due(state.step, config.validation_steps, config):
                validate_result(run, validate, log)
            if stop.agreed or is_due(state.step, config.checkpointing_steps, config):
                run.late.flush()
                run.metrics.reduce_to_main(run.accelerator)
                if before_checkpoint is not None:
                    before_checkpoint()
                limit = config.checkpoints_total_limit
                with announced(f"writing checkpoint-{state.step}"):
                    save_checkpoint(run.accelerator, config.output_dir, state.step, ema=run.ema, total_limit=limit)
                if after_checkpoint is not None:
                    after_checkpoint(Path(config.output_dir) / f"checkpoint-{state.step}")
    return state.step == config.max_train_steps


def validate_result(
    run: Run,
    validate: Callable[[torch.nn.Module, int], tuple[dict[str, float], dict[str, CaptionedVideo]]],
    log: StepLog,
) -> None:
    """Validates what would be the result now, and logs it."""
    with ema_weights(run.ema, run.unwrapped_model):
        log.write_validation(*validate(run.unwrapped_model, run.state.step))
    reshard(run.unwrapped_model)
    run.model.train()


def train_step(
    run: Run,
    batches: list[Batch],
    compute_loss: Callable[[torch.nn.Module, Batch, torch.Tensor], tuple[torch.Tensor, Sums]],
    stop: StopRequest,
    profiler: StepProfiler,
) -> None:
    """One optimizer step over the passes that make it up, added to the run's metrics; skipped if it is not finite.

    All processes learn of a request to stop that one has received. Nothing here waits for the device: what the host
    must know of a step it learns a step later (see `LateReader`).

    Raises:
        RuntimeError: If `max_nonfinite_steps` steps in a row had to be skipped.
    """
    accelerator, config = run.accelerator, run.config
    num_items = torch.stack([batch["num_items"] for batch in batches]).sum()
    num_items, num_stops = accelerator.reduce(torch.stack([num_items, torch.full_like(num_items, stop.received)]))
    # Those that share a clip all count its items and compute its whole loss, each with the gradients of its tokens.
    num_sharing = accelerator.num_processes // run.num_replicas
    num_items = num_items // num_sharing
    # Gradients are averaged over processes and divided by the accumulation; num_items already counts all of them.
    scale = accelerator.num_processes * config.gradient_accumulation_steps
    step_sums = MetricSums()
    for batch in batches:
        with accelerator.accumulate(run.model):
            with profiler.part("forward"):
                loss, sums = compute_loss(run.model, batch, num_items)
            with profiler.part("backward"):
                accelerator.backward(loss * scale)
        sums = {"loss": loss.detach().double(), **sums}
        step_sums.add({name: value / num_sharing for name, value in sums.items()})
    with profiler.part("optimizer"):
        grad_norm, took_step = update_weights(run)

    # Counts and the norm are the same on all processes, and sums are added up over them.
    counts = {"num_steps": took_step, "num_nonfinite_steps": ~took_step}
    is_main = accelerator.is_main_process
    step_sums.add({"grad_norm": grad_norm.double() * is_main})
    run.metrics.add({name: value.where(took_step, torch.zeros_like(value)) for name, value in step_sums.sums.items()})
    run.metrics.add({name: value.double() * is_main for name, value in counts.items()})
    run.late.hand_in(torch.stack([~took_step, num_stops > 0]), partial(note_step, run, stop, run.state.step + 1))


def update_weights(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips, steps, averages; the norm of the gradients before, and whether the step was taken, on the device."""
    accelerator, max_norm = run.accelerator, run.config.max_grad_norm
    grad_norm = accelerator.clip_grad_norm_(trainable_parameters(run.model), max_norm or float("inf"))
    if isinstance(grad_norm, DTensor):  # FSDP2
        grad_norm = grad_norm.full_tensor()
    grad_norm = torch.as_tensor(grad_norm, device=accelerator.device)  # DeepSpeed has a float
    took_step = step_optimizer(run, grad_norm)
    run.lr_scheduler.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.step(trainable_parameters(run.unwrapped_model))
    return grad_norm, took_step


def step_optimizer(run: Run, grad_norm: torch.Tensor) -> torch.Tensor:
    """Takes the step if the gradients are finite; whether it did, as a bool scalar on the device.

    AdamW is told on the device, as `GradScaler` tells it, so that the host need not wait for the gradients.
    """
    is_finite, optimizer = torch.isfinite(grad_norm), run.optimizer.optimizer
    if run.accelerator.scaler is not None:  # float16's scaler skips on its own
        run.optimizer.step()
        return torch.full_like(is_finite, not run.accelerator.optimizer_step_was_skipped)
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
        run.optimizer.step()
    elif is_finite:
        run.optimizer.step()
    return is_finite


def note_step(run: Run, stop: StopRequest, step: int, was_skipped: bool, is_to_stop: bool) -> None:
    """Notes on the host what became of a step, and stops the run when too many were skipped in a row.

    Raises:
        RuntimeError: After `max_nonfinite_steps` in a row.
    """
    state, limit = run.state, run.config.max_nonfinite_steps
    stop.agreed = stop.agreed or is_to_stop
    state.num_nonfinite_in_a_row = state.num_nonfinite_in_a_row + 1 if was_skipped else 0
    if not was_skipped:
        return
    logger.warning("step %d skipped: its loss or gradient is not finite", step)
    if state.num_nonfinite_in_a_row >= limit:
        checkpoints = list_checkpoints(run.config.output_dir)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
        raise RuntimeError(
            f"the loss must be finite, but {limit} steps in a row up to step {step} were not; nothing was "
            f"saved over earlier checkpoints ({kept}). Lower --learning_rate, use --mixed_precision bf16 instead of "
            "fp16, or check the data, then go on with --resume_from_checkpoint latest."
        )


def is_due(step: int, every: int, config: TrainingConfig) -> bool:
    """Whether something that happens every so many steps (0 is never), and at the end, happens after this one."""
    return every > 0 and (step % every == 0 or step == config.max_train_steps)
