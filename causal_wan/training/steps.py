"""An optimizer step: its passes, and what may keep it from being taken."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from causal_wan.records.checkpoints import list_checkpoints, say_how_to_go_on
from causal_wan.records.metrics import MetricSums, StepLog, Sums, sum_name
from causal_wan.training.profiling import StepProfiler
from causal_wan.training.run import Run, Trainee
from causal_wan.training.stopping import StopRequest
from causal_wan.training.weights import trainable_parameters


logger = logging.getLogger(__name__)


ComputeLoss = Callable[[torch.nn.Module, Any, torch.Tensor], tuple[torch.Tensor, Sums]]


class PreparedBatch(Protocol):
    """What a step must know of a batch, beside what the loss makes of it.

    Attributes:
        num_items: How many elements its loss is a mean over, a scalar tensor.
        num_tokens: For the throughput.
    """

    @property
    def num_items(self) -> torch.Tensor: ...
    @property
    def num_tokens(self) -> int: ...


def prepare_passes(
    batches: Iterator[Any],
    prepare_batch: Callable[[Any], PreparedBatch],
    num_passes: int,
    log: StepLog,
    profiler: StepProfiler,
) -> list[PreparedBatch]:
    """The prepared batches of a step, each as it comes: no more than one is there that is not prepared."""
    prepared = []
    for _ in range(num_passes):
        with log.timed("data"), profiler.part("data"):
            batch = next(batches)
        with log.timed("compute"), profiler.part("encode and noise"):
            prepared.append(prepare_batch(batch))
        del batch  # before the next one is waited for
    return prepared


def take_turns(
    run: Run,
    roles: Sequence[str],
    batches: list[PreparedBatch],
    losses: Mapping[str, ComputeLoss],
    *,
    stop: StopRequest,
    profiler: StepProfiler,
) -> None:
    """A step of the run: one of each of these trainees, in turn; schedules of all count it, whoever's turn it is."""
    for role in roles:
        train_step(run, role, batches, losses[role], stop=stop, profiler=profiler)
    with warnings.catch_warnings():  # torch wants the optimizer to have stepped before, and some have had no turn yet
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        for trainee in run.trainees.values():
            trainee.lr_scheduler.step()


def train_step(
    run: Run,
    role: str,
    batches: list[PreparedBatch],
    compute_loss: ComputeLoss,
    *,
    stop: StopRequest,
    profiler: StepProfiler,
) -> None:
    """One step of the trainee in a role, over the passes that make it up; skipped if it is not finite.

    It adds to the run's metrics. All processes learn of a request to stop that one has received. Nothing here waits
    for the device: what the host must know of a step it learns a step later (see `LateReader`).

    Raises:
        RuntimeError: If `max_nonfinite_steps` steps in a row had to be skipped, or the first steps changed no weight.
    """
    accelerator, config, trainee = run.accelerator, run.config, run.trainees[role]
    check = ChangeCheck(accelerator, trainee)
    num_items = torch.stack([batch.num_items for batch in batches]).sum()
    num_items, num_stops = accelerator.reduce(torch.stack([num_items, torch.full_like(num_items, stop.received)]))
    # Those that share a clip all count its items and compute its whole loss, each with the gradients of its tokens.
    num_sharing = accelerator.num_processes // run.num_replicas
    num_items = num_items // num_sharing
    # Gradients are averaged over processes and divided by the accumulation; num_items already counts all of them.
    scale = accelerator.num_processes * config.gradient_accumulation_steps
    step_sums = MetricSums()
    for batch in batches:
        with accelerator.accumulate(trainee.model):
            with profiler.part("forward"):
                loss, sums = compute_loss(trainee.model, batch, num_items)
            with profiler.part("backward"):
                accelerator.backward(loss * scale)
        sums = {sum_name(role, "loss"): loss.detach().double(), **sums}
        step_sums.add({name: value / num_sharing for name, value in sums.items()})
    with profiler.part("optimizer"):
        grad_norm, took_step = update_weights(run, trainee)

    # Counts and the norm are the same on all processes, and sums are added up over them.
    counts = {sum_name(role, "num_steps"): took_step, "num_nonfinite_steps": ~took_step}
    is_main = accelerator.is_main_process
    step_sums.add({sum_name(role, "grad_norm"): grad_norm.double() * is_main})
    run.metrics.add({name: value.where(took_step, torch.zeros_like(value)) for name, value in step_sums.sums.items()})
    run.metrics.add({name: value.double() * is_main for name, value in counts.items()})
    news = torch.stack([~took_step, num_stops > 0, took_step & check.changed_nothing()])
    run.late.hand_in(news, partial(note_step, run, stop, role, run.state.step + 1))


def update_weights(run: Run, trainee: Trainee) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips, steps, averages; the norm of the gradients before, and whether the step was taken, on the device."""
    accelerator, max_norm = run.accelerator, run.config.max_grad_norm
    parameters, max_norm = trainable_parameters(trainee.model), max_norm or float("inf")
    if accelerator.is_fsdp2 and (accelerator.scaler is not None or len(run.trainees) > 1):
        # accelerate divides by the scale twice where some weights are frozen, and looks for a model by comparing its
        # weights with those of all others, by their numbers.
        accelerator.unscale_gradients()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        grad_norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if isinstance(grad_norm, DTensor):  # FSDP2
        grad_norm = grad_norm.full_tensor()
    grad_norm = torch.as_tensor(grad_norm)  # DeepSpeed has a float
    took_step = step_optimizer(accelerator, trainee.optimizer, grad_norm)
    for each in run.trainees.values():
        each.optimizer.zero_grad()  # what a loss has left in others is nobody's gradient
    if trainee.ema is not None:
        trainee.ema.step(trainable_parameters(trainee.unwrapped_model))
    return grad_norm.to(accelerator.device), took_step.to(accelerator.device)


def step_optimizer(accelerator: Accelerator, prepared: AcceleratedOptimizer, grad_norm: torch.Tensor) -> torch.Tensor:
    """Takes the step if the gradients are finite; whether it did, as a bool scalar.

    AdamW is told where its weights are, as `GradScaler` tells it, so that the host need not wait for the gradients of
    a GPU. A CPU that has offloaded weights must wait for them, and does.
    """
    optimizer, is_finite = prepared.optimizer, torch.isfinite(grad_norm)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # has stepped in the backward pass, or not
        return is_finite & (not prepared.step_was_skipped)
    if accelerator.scaler is not None:  # float16's skips by the same gradients, of which accelerate hears nothing
        prepared.step()
    elif isinstance(optimizer, torch.optim.AdamW):
        is_finite = is_finite.to(optimizer.param_groups[0]["params"][0].device)
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()
        prepared.step()
    elif is_finite:
        prepared.step()
    return is_finite


class ChangeCheck:
    """Whether a step changes the weights of the optimizer: a sum over their bits, before and after.

    Looked at in the first steps of a trainee, on each process, with a learning rate above 0. A run that logs losses
    and trains nothing, whatever the reason, ends there. Made before the passes of the step.
    """

    NUM_STEPS = 3

    def __init__(self, accelerator: Accelerator, trainee: Trainee) -> None:
        self.accelerator = accelerator
        self.is_on = trainee.num_checked < self.NUM_STEPS and trainee.optimizer.param_groups[0]["lr"] > 0
        trainee.num_checked += self.is_on
        self.weights = optimized_weights(trainee) if self.is_on else []
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


def optimized_weights(trainee: Trainee) -> list[torch.Tensor]:
    """What the optimizer changes on this process: whole weights, its shards of them, or DeepSpeed's own copies."""
    weights = [weight for group in trainee.optimizer.param_groups for weight in group["params"]]
    if not weights:  # ZeRO-3 lends them to the optimizer while it steps
        from deepspeed.utils import safe_get_local_fp32_param

        weights = [safe_get_local_fp32_param(parameter) for parameter in trainable_parameters(trainee.model)]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights if weight is not None]


def note_step(
    run: Run, stop: StopRequest, role: str, step: int, was_skipped: bool, is_to_stop: bool, changed_nothing: bool
) -> None:
    """Notes on the host what became of a role's turn, and stops the run when too many were skipped in a row.

    Raises:
        RuntimeError: After `max_nonfinite_steps` in a row, or after a step that changed no weight.
    """
    state, limit = run.state, run.config.max_nonfinite_steps
    stop.agreed = stop.agreed or is_to_stop
    in_a_row = state.nonfinite_in_a_row.get(role, 0) + 1 if was_skipped else 0
    state.nonfinite_in_a_row[role] = in_a_row
    if changed_nothing:
        raise RuntimeError(
            f"a step must change the weights, but step {step} was taken and changed none of them; nothing was saved. "
            "All gradients are zero, or the learning rate is too small for the weights' precision: look at "
            "--learning_rate, --lora_alpha and the data."
        )
    if not was_skipped:
        return
    whose, steps = ("its", "steps") if len(run.trainees) == 1 else (f"the {role}'s", f"turns of the {role}")
    logger.warning("step %d skipped: %s loss or gradient is not finite", step, whose)
    if in_a_row >= limit:
        checkpoints = list_checkpoints(run.config.output_dir)
        kept = f"the last good checkpoint is {checkpoints[-1]}" if checkpoints else "no checkpoint was written yet"
        raise RuntimeError(
            f"the loss must be finite, but {limit} {steps} in a row up to step {step} were not; nothing was "
            f"saved over earlier checkpoints ({kept}). Lower --learning_rate, use --mixed_precision bf16 instead of "
            f"fp16, or check the data. {say_how_to_go_on(run.config.output_dir)}"
        )
