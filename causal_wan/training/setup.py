"""What a run has before its first step: Accelerator, trackers, and what it trains, prepared and resumed.

Knows no video and no diffusion.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
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
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import unset_hf_deepspeed_config

from causal_wan.config.settings import TrainingConfig
from causal_wan.processes import wait_for_all
from causal_wan.progress import announced
from causal_wan.records.checkpoint_weights import checkpoint_trainable_weights_only
from causal_wan.records.checkpoints import find_checkpoint
from causal_wan.records.metrics import STUDENT, MetricSums
from causal_wan.records.tracker_libraries import resolve_trackers, start_each
from causal_wan.records.trackers import Trackers, identify_run
from causal_wan.training.resuming import optimizer_settings, resume
from causal_wan.training.run import Run, RunState, Trainee
from causal_wan.training.strategies import follow_settings, is_sharded, replaces_optimizer
from causal_wan.training.weights import trainable_parameters


logger = logging.getLogger(__name__)

STEP_PATIENCE = timedelta(minutes=10)  # NCCL's own timeout


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


def _fp8_recipe() -> tuple[AORecipeKwargs]:
    # Gathering in 8 bits is for sharded weights, and would make all of them tensors of a kind that is not saved.
    return (AORecipeKwargs(module_filter_func=_is_computed_in_fp8, enable_fsdp_float8_all_gather=False),)


def _is_computed_in_fp8(module: torch.nn.Module, name: str) -> bool:
    """Whether a linear layer has its products in 8 bits: those of the layers, in which nearly all the work is."""
    is_linear = isinstance(module, torch.nn.Linear) and not (module.in_features % 16 or module.out_features % 16)
    return is_linear and "blocks." in name and "lora_" not in name


def check_precision(mixed_precision: str | None) -> None:
    """Checks that the precision can be had.

    Raises:
        ValueError: If it needs a library that is not installed.
    """
    if mixed_precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise ValueError("--mixed_precision fp8 needs torchao; run `pip install torchao`, or use bf16.")


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


def prepare_run(
    accelerator: Accelerator,
    config: TrainingConfig,
    models: Mapping[str, torch.nn.Module],
    trackers: Trackers | None = None,
    settings: dict[str, Any] | None = None,
    *,
    rate_scales: Mapping[str, float] | None = None,
    role_rates: Mapping[str, float] | None = None,
) -> Run:
    """A run of models that are to be trained, prepared by accelerate and, when the config says so, resumed.

    Args:
        accelerator: From `make_accelerator`.
        config: Of the run.
        models: To train, by role; the result is that of `STUDENT`.
        trackers: From `start_trackers`; without them metrics.jsonl is all that is written.
        settings: Of the whole run, as a recipe: kept in checkpoints.
        rate_scales: Learning rates of some weights over that of the others, by how their names begin.
        role_rates: Learning rates of some roles; that of the others is the config's.

    Raises:
        ValueError: If the strategy cannot do what is asked for, or the checkpoint to resume does not fit.
    """
    check_strategy_can(accelerator, config, num_models=len(models))
    has_frozen_weights = any(not weight.requires_grad for model in models.values() for weight in model.parameters())
    trainees = {
        role: prepare_trainee(
            accelerator,
            config,
            model,
            rate_scales or {},
            role_scale=(role_rates or {}).get(role, config.learning_rate) / config.learning_rate,
            has_average=config.use_ema and role == STUDENT,
        )
        for role, model in models.items()
    }
    run = Run(accelerator, config, trainees, RunState(), MetricSums(), trackers or Trackers(), settings)
    accelerator.register_for_checkpointing(run.state, run.metrics)
    unsharded = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if has_frozen_weights and accelerator.distributed_type in unsharded:
        checkpoint_trainable_weights_only(accelerator)
    resume(run)
    return run


def check_strategy_can(accelerator: Accelerator, config: TrainingConfig, *, num_models: int) -> None:
    """Checks that the strategy of the launch can do what a run asks for.

    Raises:
        ValueError: If it cannot.
    """
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if config.use_ema and is_deepspeed:
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
    if num_models > 1 and is_deepspeed:
        raise ValueError(
            f"DeepSpeed trains one model in a run, but this one trains {num_models}; launch with "
            "accelerate_configs/ddp.yaml or fsdp2.yaml."
        )


def prepare_trainee(
    accelerator: Accelerator,
    config: TrainingConfig,
    model: torch.nn.Module,
    rate_scales: Mapping[str, float],
    *,
    role_scale: float,
    has_average: bool,
) -> Trainee:
    """A model with its optimizer, schedule and average, prepared by accelerate; see `prepare_run`."""
    groups = [(role_scale * scale, group) for scale, group in group_parameters(model, rate_scales)]
    parameters = [{"params": group, "lr": scale * config.learning_rate} for scale, group in groups]
    optimizer = make_optimizer(parameters, config)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        # All processes have loaded the same: DDP need not send them around, and gloo could not send 8 bits.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    with announced("handing out the weights"), layers_that_are_there(accelerator, model):
        model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    unwrapped_model, ema = accelerator.unwrap_model(model), None
    if has_average:
        ema = EMAModel(trainable_parameters(unwrapped_model), decay=config.ema_decay)
    return Trainee(model, unwrapped_model, optimizer, lr_scheduler, ema, tuple(scale for scale, _ in groups))


@contextlib.contextmanager
def layers_that_are_there(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """FSDP2 is to look for no layers of the launch's config that a model lacks: a small one is sharded as a whole."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    wanted = None if plugin is None else plugin.transformer_cls_names_to_wrap
    if wanted is None:
        yield
        return
    present = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in wanted if name in present]
    try:
        yield
    finally:
        plugin.transformer_cls_names_to_wrap = wanted


def check_optimizer(config: TrainingConfig) -> None:
    """Checks that there is what the optimizer needs.

    Raises:
        ValueError: If bitsandbytes is needed and not installed.
    """
    if config.optimizer == "adamw8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise ValueError(
                "--optimizer adamw8bit needs bitsandbytes; run `pip install bitsandbytes`, or use --optimizer adamw."
            ) from None


def group_parameters(
    model: torch.nn.Module, rate_scales: Mapping[str, float]
) -> list[tuple[float, list[torch.nn.Parameter]]]:
    """The trainable parameters by learning rate, over that of the config; `rate_scales` are those of `prepare_run`."""
    groups: dict[str, list[torch.nn.Parameter]] = {"": [], **{start: [] for start in rate_scales}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[next((start for start in rate_scales if name.startswith(start)), "")].append(parameter)
    return list(zip((1.0, *rate_scales.values()), groups.values(), strict=True))


def make_optimizer(
    parameters: list[torch.nn.Parameter] | list[dict[str, Any]], config: TrainingConfig
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, or groups of them as torch has them; in 8 bits on demand."""
    settings = optimizer_settings(config)
    if config.optimizer == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=True)
