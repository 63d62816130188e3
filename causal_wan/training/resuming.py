"""Going on from a checkpoint, with the settings that are given now."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.checkpoint import CheckpointException

from causal_wan.config.changed_settings import read_settings
from causal_wan.config.settings import TrainingConfig
from causal_wan.processes import gather_lists, wait_for_all
from causal_wan.progress import announced
from causal_wan.records.checkpoint_checks import (
    SCALER_NAME,
    check_average,
    check_optimizer,
    check_process_count,
    check_strategy,
    check_trainees,
    check_weights,
)
from causal_wan.records.checkpoints import describe_damaged, find_checkpoint, load_ema, passed_over, set_aside
from causal_wan.records.metrics import METRICS_NAME, truncate_metrics
from causal_wan.training.run import Run
from causal_wan.training.strategies import clip_as_set


logger = logging.getLogger(__name__)


def resume(run: Run) -> None:
    """Loads the checkpoint that the config names, if any, and cuts the metrics file and the trackers back to it.

    Raises:
        ValueError: If the checkpoint does not fit the run.
    """
    config, accelerator = run.config, run.accelerator
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config.output_dir)
    if len(found := {*gather_lists([str(checkpoint)])}) > 1:
        raise ValueError(
            f"all processes must find the same checkpoint, but some find {' and '.join(sorted(found))}; copy it to "
            "all machines, or use a disk that they share."
        )
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
        apply_settings(run)
        if newer := passed_over(checkpoint, config.output_dir):
            logger.warning("passed over and set aside: %s", describe_damaged(newer))
            wait_for_all()  # all have looked
            if accelerator.is_main_process:
                set_aside(newer)
        logger.info("resumed from %s at step %d", checkpoint, run.state.step)
        note_processes(run)
    elif config.resume_from_checkpoint is not None:
        logger.info("no checkpoint in %s yet: starting at step 0", config.output_dir)
    run.state.num_processes, run.state.num_replicas = accelerator.num_processes, run.num_replicas
    run.metrics.sums = {name: value.to(accelerator.device) for name, value in run.metrics.sums.items()}
    last_step = -1 if checkpoint is None else run.state.step  # a start anew validates at step 0 again
    if accelerator.is_main_process:
        truncate_metrics(Path(config.output_dir) / METRICS_NAME, last_step=last_step)
    run.trackers.rewind(last_step)


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """Brings back weights, optimizer, schedule, average and counts.

    Raises:
        ValueError: If the checkpoint does not fit the run, or cannot be read.
    """
    accelerator, config = run.accelerator, run.config
    check_strategy(checkpoint, accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_process_count(checkpoint, accelerator.num_processes)
    check_trainees(checkpoint, list(run.trainees))
    for place, trainee in enumerate(run.trainees.values()):
        named = trainee.unwrapped_model.named_parameters()
        check_weights(checkpoint, {name: weight for name, weight in named if weight.requires_grad}, place)
        check_optimizer(checkpoint, config.optimizer, place)
        if trainee.ema is not None:
            check_average(checkpoint, place)
    scaler = accelerator.scaler
    if scaler is not None and not (checkpoint / SCALER_NAME).is_file():
        accelerator.scaler = None  # of a run that was not in float16: the scale is found anew
    try:
        with announced(f"reading {checkpoint}"):
            accelerator.load_state(str(checkpoint))
            for place, trainee in enumerate(run.trainees.values()):
                if trainee.ema is not None:
                    load_ema(trainee.ema, checkpoint, place)
    except (Exception, CheckpointException) as error:  # of torch, DeepSpeed, pickle and safetensors
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{checkpoint} must be a whole checkpoint of the same run, but could not be loaded "
            f"({type(error).__name__}: {reason}). Resume another one, or start anew with another --output_dir."
        ) from error
    finally:
        accelerator.scaler = scaler
    # Its count of passes is of the steps before: with another number of passes a step, no step would ever be whole.
    accelerator.step = 0
    if has_other_settings(run, checkpoint):  # the sums since the last log entry may be of other levels
        run.metrics.sums = {}
    if not accelerator.is_main_process:  # the checkpoint holds the sums of all processes
        run.metrics.sums = {name: torch.zeros_like(value) for name, value in run.metrics.sums.items()}
    if run.state.step > config.max_train_steps:
        raise ValueError(
            f"max_train_steps must be at least the steps that are done, but {checkpoint} is at step {run.state.step}, "
            f"got {config.max_train_steps}; raise it, or resume an earlier checkpoint."
        )


def has_other_settings(run: Run, checkpoint: Path) -> bool:
    """Whether a run differs from that of its checkpoint in more than settings of the loop."""
    before, own = read_settings(checkpoint), {field.name for field in fields(TrainingConfig)}
    if run.settings is None:
        return False
    return before is None or any(before.get(name, now) != now for name, now in run.settings.items() if name not in own)


def apply_settings(run: Run) -> None:
    """Gives optimizer and schedule the config's settings, where a checkpoint has brought back those of its own run.

    The schedule stays where it is. All of diffusers' schedules are a factor of the base rate, by the step.
    """
    settings = optimizer_settings(run.config)
    for trainee in run.trainees.values():
        schedule = trainee.lr_scheduler.scheduler
        schedule.base_lrs = [scale * run.config.learning_rate for scale in trainee.rate_scales]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        rates = zip(schedule._last_lr, schedule.base_lrs, strict=True)
        for group, (rate, base) in zip(trainee.optimizer.param_groups, rates, strict=True):
            group.update(settings | {"lr": rate, "initial_lr": base})
        clip_as_set(trainee.optimizer, run.config)


def optimizer_settings(config: TrainingConfig) -> dict[str, Any]:
    """Of AdamW, by torch's names."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def note_processes(run: Run) -> None:
    """Says what it means that a run goes on with another number of processes."""
    state, num_processes = run.state, run.accelerator.num_processes
    if (state.num_processes, state.num_replicas) != (num_processes, run.num_replicas):
        logger.info(
            "the checkpoint is from %d process(es), now there are %d: the samples go on in the same order, a step "
            "has %d of them, and results agree to rounding, not to the last bit",
            state.num_processes,
            num_processes,
            run.config.samples_per_step(run.num_replicas),
        )
