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

from causal_wan.config.settings import TrainingConfig
from causal_wan.progress import announced
from causal_wan.training.checkpoints import list_checkpoints, save_checkpoint
from causal_wan.training.metrics import METRICS_NAME, MetricSums, StepLog, Sums, has_validation
from causal_wan.training.profiling import StepProfiler
from causal_wan.training.setup import Run, trainable_parameters
from causal_wan.training.trackers import CaptionedVideo


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
    save_result: Callable[[], None] | None = None,
) -> bool:
    """Trains until `max_train_steps`. The result is in the model, or in the average: see `ema_weights`.

    What was computed is on disk before anything else may fail: the checkpoint, and at the end the result, come before
    the validation of the same step.

    Args:
        run: From `prepare_run`.
        make_dataloader: (*, start, end, step) -> the batches of the run's samples from `start`, the first of `step`,
            to `end`, in order.
        prepare_batch: A batch of the loader, on the host -> what `compute_loss` takes, on the device, with at least
            `num_items`, a scalar tensor: how many elements its loss is a mean over, and `num_tokens`, an int, for the
            throughput. No gradients.
        compute_loss: (wrapped model, prepared batch, num_items of the whole step over all processes) -> (this batch's
            share of the loss: a sum over its elements divided by that number, sums to log).
        summarize: Sums over processes and steps -> metrics.
        validate: (unwrapped model with the weights of the result, step) -> (metrics, mp4 files by name). Called
            on every process.
        before_checkpoint: Called on every process before a checkpoint is written, to gather what goes into it.
        after_checkpoint: Called with its folder, which is not there if it could not be written.
        save_result: Called on every process when the run is complete.

    Returns:
        Whether the run is complete; after SIGTERM or SIGUSR1 to any process it stops early, with a checkpoint.

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
    run.model.train()
    is_owed = False  # a validation, by a run that was told to stop
    with StopRequest() as stop, progress, profiler:
        if state.step == config.max_train_steps and save_result is not None:  # it ended after its last checkpoint
            save_result()
        if validation is not None and validation.is_owed():
            validation()
        while state.step < config.max_train_steps and not stop.agreed:
            prepared = prepare_passes(batches, prepare_batch, config.gradient_accumulation_steps, log, profiler)
            with log.timed("compute"):
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
            ema=run.ema,
            total_limit=config.checkpoints_total_limit,
            settings=run.settings,
        )
    if after is not None:
        after(Path(config.output_dir) / f"checkpoint-{step}")


class ValidationRuns:
    """Validates when it is due, with the weights of the result.

    A run that was told to stop, or was killed, between a checkpoint and its validation owes the validation: it comes
    first when the run goes on, as does that of a new run with `validate_first`. One in which the run died is not tried
    again, or it would cost every run that resumes.

    Args:
        run: Of the loop.
        validate: As in `train`.
        log: Where the metrics go.
    """

    BEGUN_NAME = "validation-begun"

    def __init__(
        self,
        run: Run,
        validate: Callable[[torch.nn.Module, int], tuple[dict[str, float], dict[str, CaptionedVideo]]],
        log: StepLog,
    ) -> None:
        self.run, self.validate, self.log = run, validate, log
        self._begun = Path(run.config.output_dir) / self.BEGUN_NAME

    def is_due(self) -> bool:
        """Whether the step that is done is to be validated."""
        return is_due(self.run.state.step, self.run.config.validation_steps, self.run.config)

    def is_owed(self) -> bool:
        """Whether the step that the run goes on from was to be validated and was not. Every process has to ask."""
        accelerator, step, owes = self.run.accelerator, self.run.state.step, False
        if accelerator.is_main_process and (self.is_due() if step else self.run.config.validate_first):
            is_done = has_validation(Path(self.run.config.output_dir) / METRICS_NAME, step)
            died = step > 0 and self._begun.is_file() and self._begun.read_bytes() == str(step).encode()
            if died and not is_done:
                logger.warning("the validation of step %d is left out: the run ended in it", step)
            owes = not (is_done or died)
        return bool(accelerator.reduce(torch.tensor(int(owes), device=accelerator.device)))

    def __call__(self) -> None:
        """Validates the step that is done."""
        run = self.run
        if run.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # of a full disk
                self._begun.write_text(str(run.state.step))
        with ema_weights(run.ema, run.unwrapped_model):
            self.log.write_validation(*self.validate(run.unwrapped_model, run.state.step))
        reshard(run.unwrapped_model)
        run.model.train()
        if run.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                self._begun.unlink(missing_ok=True)


def prepare_passes(
    batches: Iterator[Batch],
    prepare_batch: Callable[[Batch], Batch],
    num_passes: int,
    log: StepLog,
    profiler: StepProfiler,
) -> list[Batch]:
    """The prepared batches of a step, each as it comes: no more than one is there that is not prepared."""
    prepared = []
    for _ in range(num_passes):
        with log.timed("data"), profiler.part("data"):
            batch = next(batches)
        with log.timed("compute"), profiler.part("encode and noise"):
            prepared.append(prepare_batch(batch))
        del batch  # before the next one is waited for
    return prepared


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
        RuntimeError: If `max_nonfinite_steps` steps in a row had to be skipped, or the first steps changed no weight.
    """
    accelerator, config = run.accelerator, run.config
    check = ChangeCheck(run)
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
    news = torch.stack([~took_step, num_stops > 0, took_step & check.changed_nothing()])
    run.late.hand_in(news, partial(note_step, run, stop, run.state.step + 1))


def update_weights(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips, steps, averages; the norm of the gradients before, and whether the step was taken, on the device."""
    accelerator, max_norm = run.accelerator, run.config.max_grad_norm
    parameters, max_norm = trainable_parameters(run.model), max_norm or float("inf")
    if accelerator.is_fsdp2 and accelerator.scaler is not None:
        # accelerate divides by the scale twice where some weights are frozen.
        accelerator.unscale_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        grad_norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if isinstance(grad_norm, DTensor):  # FSDP2
        grad_norm = grad_norm.full_tensor()
    grad_norm = torch.as_tensor(grad_norm)  # DeepSpeed has a float
    took_step = step_optimizer(run, grad_norm)
    run.lr_scheduler.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.step(trainable_parameters(run.unwrapped_model))
    return grad_norm.to(accelerator.device), took_step.to(accelerator.device)


def step_optimizer(run: Run, grad_norm: torch.Tensor) -> torch.Tensor:
    """Takes the step if the gradients are finite; whether it did, as a bool scalar.

    AdamW is told where its weights are, as `GradScaler` tells it, so that the host need not wait for the gradients of
    a GPU. A CPU that has offloaded weights must wait for them, and does.
    """
    accelerator, optimizer, is_finite = run.accelerator, run.optimizer.optimizer, torch.isfinite(grad_norm)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # has stepped in the backward pass, or not
        return is_finite & (not run.optimizer.step_was_skipped)
    if accelerator.scaler is not None:  # float16's skips by the same gradients, of which accelerate hears nothing
        run.optimizer.step()
    elif isinstance(optimizer, torch.optim.AdamW):
        is_finite = is_finite.to(optimizer.param_groups[0]["params"][0].device)
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
        run.optimizer.step()
    elif is_finite:
        run.optimizer.step()
    return is_finite


class ChangeCheck:
    """Whether a step changes the weights of the optimizer: a sum over their bits, before and after.

    Looked at in the first steps of a process with a learning rate above 0. A run that logs losses and trains nothing,
    whatever the reason, ends there. Made before the passes of the step.
    """

    NUM_STEPS = 3

    def __init__(self, run: Run) -> None:
        self.accelerator = run.accelerator
        self.is_on = run.num_checked < self.NUM_STEPS and run.optimizer.param_groups[0]["lr"] > 0
        run.num_checked += self.is_on
        self.weights = optimized_weights(run) if self.is_on else []
        self.before = self._sum_of_bits()

    def _sum_of_bits(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        for weight in self.weights:
            bits = weight.detach().view(torch.int16 if weight.element_size() == 2 else torch.int32)
            total += bits.sum(dtype=torch.int64).to(total.device)
        return total

    def changed_nothing(self) -> torch.Tensor:
        """A bool scalar, the same on all processes."""
        if not self.is_on:
            return torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        return self.accelerator.reduce((self._sum_of_bits() != self.before).long()) == 0


def optimized_weights(run: Run) -> list[torch.Tensor]:
    """What the optimizer changes on this process: whole weights, its shards of them, or DeepSpeed's own copies."""
    weights = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    if not weights:  # ZeRO-3 lends them to the optimizer while it steps
        from deepspeed.utils import safe_get_local_fp32_param

        weights = [safe_get_local_fp32_param(parameter) for parameter in trainable_parameters(run.model)]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights if weight is not None]


def note_step(
    run: Run, stop: StopRequest, step: int, was_skipped: bool, is_to_stop: bool, changed_nothing: bool
) -> None:
    """Notes on the host what became of a step, and stops the run when too many were skipped in a row.

    Raises:
        RuntimeError: After `max_nonfinite_steps` in a row, or after a step that changed no weight.
    """
    state, limit = run.state, run.config.max_nonfinite_steps
    stop.agreed = stop.agreed or is_to_stop
    state.num_nonfinite_in_a_row = state.num_nonfinite_in_a_row + 1 if was_skipped else 0
    if changed_nothing:
        raise RuntimeError(
            f"a step must change the weights, but step {step} was taken and changed none of them; nothing was saved. "
            "All gradients are zero, or the learning rate is too small for the weights' precision: look at "
            "--learning_rate, --lora_alpha and the data."
        )
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
