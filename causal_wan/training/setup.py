"""What a run has before its first step: Accelerator, optimizer, schedule, EMA and trackers, prepared and resumed.

Knows no video and no diffusion.
"""

import importlib.util
import logging
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import (
    AORecipeKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import unset_hf_deepspeed_config

from causal_wan.config.changed_settings import read_settings
from causal_wan.config.settings import TrainingConfig
from causal_wan.devices import LateReader
from causal_wan.processes import gather_lists, wait_for_all
from causal_wan.progress import announced
from causal_wan.training.checkpoint_checks import (
    SCALER_NAME,
    check_average,
    check_optimizer,
    check_process_count,
    check_strategy,
    check_weights,
)
from causal_wan.training.checkpoints import (
    checkpoint_trainable_weights_only,
    describe_damaged,
    find_checkpoint,
    load_ema,
    passed_over,
    set_aside,
)
from causal_wan.training.metrics import METRICS_NAME, MetricSums, truncate_metrics
from causal_wan.training.strategies import clip_as_set, count_replicas, follow_settings, is_sharded, replaces_optimizer
from causal_wan.training.trackers import Trackers, identify_run, resolve_trackers, start_each


logger = logging.getLogger(__name__)

STEP_PATIENCE = timedelta(minutes=10)  # NCCL's own timeout


@dataclass
class RunState:
    """How far a run is; stored in checkpoints."""

    step: int = 0
    num_samples: int = 0  # seen by all processes together
    num_nonfinite_in_a_row: int = 0
    num_processes: int = 1
    num_replicas: int = 1

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


@dataclass
class Run:
    """The prepared parts of a run."""

    accelerator: Accelerator
    config: TrainingConfig
    model: torch.nn.Module  # as wrapped by accelerate: the forward must go through it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    state: RunState
    metrics: MetricSums
    trackers: Trackers
    settings: dict[str, Any] | None = None  # of the run, as a recipe; kept in checkpoints
    num_checked: int = 0  # first steps of this process that were checked to change weights
    late: LateReader = field(default_factory=LateReader)

    @property
    def unwrapped_model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def num_replicas(self) -> int:
        return count_replicas(self.accelerator)


# --- its parts -------------------------------------------------------------------------------------------------------


def check_precision(mixed_precision: str | None) -> None:
    """Checks that the precision can be had.

    Raises:
        ValueError: If it needs a library that is not installed.
    """
    if mixed_precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise ValueError("--mixed_precision fp8 needs torchao; run `pip install torchao`, or use bf16.")


def _is_computed_in_fp8(module: torch.nn.Module, name: str) -> bool:
    """Whether a linear layer has its products in 8 bits: those of the layers, in which nearly all the work is."""
    is_linear = isinstance(module, torch.nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
    return is_linear and "blocks." in name and "lora_" not in name


def _fp8_recipe() -> tuple[AORecipeKwargs]:
    # Gathering in 8 bits is for sharded weights, and would make all of them tensors of a kind that is not saved.
    return (AORecipeKwargs(module_filter_func=_is_computed_in_fp8, enable_fsdp_float8_all_gather=False),)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run, with the output folder made.

    In a step, processes wait for one another for `STEP_PATIENCE` beyond the time that clips may take: whoever waits
    for clips in vain ends the run first, and says why. All other waits are those of `causal_wan.processes`.

    Raises:
        ValueError: If the config of the launch says other than the settings.
    """
    # The loop hands over exactly the passes of one step, so the loader's end must not force a step.
    accumulation = {"num_steps": config.gradient_accumulation_steps, "sync_with_dataloader": False}
    accelerator = Accelerator(
        # Told nothing, accelerate takes several processes on a machine without a GPU for so many separate runs.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        project_config=ProjectConfiguration(project_dir=config.output_dir),
        gradient_accumulation_plugin=GradientAccumulationPlugin(**accumulation),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False, non_blocking=True),
        step_scheduler_with_optimizer=False,
        # One copy of the gradients, not two.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.dataloader_timeout) + STEP_PATIENCE),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            *(_fp8_recipe() if config.mixed_precision == "fp8" else ()),
        ],
    )
    if accelerator.is_fsdp2:
        # Left alone it would round all that goes into a layer, timesteps included (757 to 756), sum gradients in 16
        # bits, and follow the config file where --mixed_precision says otherwise.
        plugin, half = accelerator.state.fsdp_plugin, {"bf16": torch.bfloat16, "fp16": torch.float16}
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=half.get(accelerator.mixed_precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Left alone it would keep the gradients of all passes but the last whole, in float32, on every GPU.
        GradientState(GradientAccumulationPlugin(**accumulation, sync_each_batch=True))  # which all share
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        follow_settings(accelerator, config)
        unset_hf_deepspeed_config()  # only the model that is trained is to be sharded, not the text encoder
    logging.basicConfig(
        format="%(levelname)s %(message)s", level=logging.INFO if accelerator.is_main_process else logging.ERROR
    )
    for noisy in ("httpx", "httpx2", "accelerate", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    set_seed(config.seed)
    if accelerator.is_main_process:
        try:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_dir must be a folder that can be written, but {error}; use another one."
            ) from None
    wait_for_all()
    return accelerator


def start_trackers(accelerator: Accelerator, config: TrainingConfig, settings: dict[str, Any]) -> Trackers:
    """The trackers of a run, started on the main process.

    Args:
        accelerator: Of the run.
        config: Says which trackers, and what the run is called.
        settings: The resolved settings, flat, for the trackers to show.

    Raises:
        ValueError: If a tracker is not installed, or does not start for a new run.
    """
    names = resolve_trackers(config.report_to)
    if not names or not accelerator.is_main_process:
        return Trackers()
    run = identify_run(
        config.output_dir,
        project=config.tracker_project_name,
        run_name=config.run_name,
        resumes=config.resume_from_checkpoint is not None,
    )
    has_checkpoint = find_checkpoint(config.resume_from_checkpoint, config.output_dir) is not None
    return start_each(names, run, settings, must_start=not has_checkpoint)


def make_optimizer(parameters: list[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, in 8 bits on demand.

    Raises:
        ValueError: If bitsandbytes is needed and not installed.
    """
    settings = optimizer_settings(config)
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise ValueError(
                "--optimizer adamw8bit needs bitsandbytes; run `pip install bitsandbytes`, or use --optimizer adamw."
            ) from None
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def optimizer_settings(config: TrainingConfig) -> dict[str, Any]:
    """Of AdamW, by torch's names."""
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# --- the whole -------------------------------------------------------------------------------------------------------


def prepare_run(
    accelerator: Accelerator,
    config: TrainingConfig,
    model: torch.nn.Module,
    trackers: Trackers | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Optimizer, schedule and EMA of a model, prepared by accelerate and, when the config says so, resumed.

    Args:
        accelerator: From `make_accelerator`.
        config: Of the run.
        model: To train.
        trackers: From `start_trackers`; without them metrics.jsonl is all that is written.
        settings: Of the whole run, as a recipe: kept in checkpoints.

    Raises:
        ValueError: If the strategy cannot do what the config asks for, or the checkpoint to resume does not fit.
    """
    if config.use_ema and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            "use_ema needs weights that can be read in float32 after each step, but DeepSpeed keeps them to itself; "
            "launch with accelerate_configs/fsdp2.yaml, or leave --use_ema out."
        )
    if config.optimizer == "adamw8bit" and accelerator.is_fsdp2:
        raise ValueError(
            "bitsandbytes takes sharded weights for whole ones and writes outside of them (its issue 1633); use "
            "--optimizer adamw, or launch with accelerate_configs/ddp.yaml or zero2.yaml."
        )
    if config.optimizer == "adamw8bit" and replaces_optimizer(accelerator):
        raise ValueError(
            "DeepSpeed updates states on the CPU by an AdamW of its own, in 32 bits; use --optimizer adamw, or launch "
            "with accelerate_configs/zero2.yaml or zero3.yaml."
        )
    if accelerator.mixed_precision == "fp8" and is_sharded(accelerator):
        raise ValueError(
            "mixed_precision fp8 needs whole weights on each GPU; launch with accelerate_configs/single_gpu.yaml or "
            "ddp.yaml, or use bf16."
        )
    optimizer = make_optimizer(trainable_parameters(model), config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    has_frozen_weights = any(not parameter.requires_grad for parameter in model.parameters())
    if has_frozen_weights:
        # All processes have loaded the same: DDP need not send them around, and gloo could not send 8 bits.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    with announced("handing out the weights"):
        model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    ema = None
    if config.use_ema:
        ema = EMAModel(trainable_parameters(accelerator.unwrap_model(model)), decay=config.ema_decay)
    parts = (accelerator, config, model, optimizer, lr_scheduler, ema, RunState(), MetricSums())
    run = Run(*parts, trackers or Trackers(), settings)
    accelerator.register_for_checkpointing(run.state, run.metrics)
    unsharded = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if has_frozen_weights and accelerator.distributed_type in unsharded:
        checkpoint_trainable_weights_only(accelerator)
    resume(run)
    return run


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
    named = run.unwrapped_model.named_parameters()
    check_weights(checkpoint, {name: weight for name, weight in named if weight.requires_grad})
    check_optimizer(checkpoint, config.optimizer)
    if run.ema is not None:
        check_average(checkpoint)
    scaler = accelerator.scaler
    if scaler is not None and not (checkpoint / SCALER_NAME).is_file():
        accelerator.scaler = None  # of a run that was not in float16: the scale is found anew
    try:
        with announced(f"reading {checkpoint}"):
            accelerator.load_state(str(checkpoint))
            if run.ema is not None:
                load_ema(run.ema, checkpoint)
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
    schedule, settings = run.lr_scheduler.scheduler, optimizer_settings(run.config)
    schedule.base_lrs = [run.config.learning_rate] * len(schedule.base_lrs)
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(run.optimizer.param_groups, schedule._last_lr, strict=True):
        group.update(settings | {"lr": rate, "initial_lr": run.config.learning_rate})
    clip_as_set(run.optimizer, run.config)


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
