"""What accelerate's strategies mean for loading, planning and counting: who holds what, who gets clips of its own."""

from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import DeviceMesh

from causal_wan.config.settings import TrainingConfig


def context_mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The processes that share each clip with this one (`parallelism_config_cp_size` of the config file), or None."""
    parallelism = accelerator.parallelism_config
    return accelerator.torch_device_mesh["cp"] if parallelism is not None and parallelism.cp_enabled else None


def count_replicas(accelerator: Accelerator) -> int:
    """How many processes get clips of their own: those that share a clip count once."""
    mesh = context_mesh(accelerator)
    return accelerator.num_processes if mesh is None else accelerator.num_processes // mesh.size()


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are split over the processes, or kept by DeepSpeed in its own way."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def keeps_weights_in_16_bits(accelerator: Accelerator) -> bool:
    """Whether the model itself is 16 bits wide and the optimizer has the float32 weights."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision != "no"


def loads_weights(accelerator: Accelerator) -> bool:
    """Whether this process has to load the weights of what is trained, or gets its shards from the main process."""
    if accelerator.is_main_process:
        return True
    if accelerator.is_fsdp2:
        return not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return not (is_deepspeed and accelerator.state.deepspeed_plugin.zero_stage == 3)


def sharding(accelerator: Accelerator) -> dict[str, Any]:
    """What is split over how many processes, and whether it waits on the host, in the words of `Workload`."""
    if accelerator.is_fsdp2:
        parallelism, mesh = accelerator.parallelism_config, context_mesh(accelerator)
        num_copies = parallelism.dp_replicate_size if parallelism is not None else 1
        return {
            "sharding": "weights",
            "num_shards": accelerator.num_processes // num_copies,
            "num_sharing_a_clip": 1 if mesh is None else mesh.size(),
            "offload": bool(accelerator.state.fsdp_plugin.cpu_offload),
        }
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        return {
            "sharding": "weights" if plugin.zero_stage == 3 else "optimizer",
            "num_shards": accelerator.num_processes,
            "offload": plugin.offload_param_device == "cpu",
        }
    return {}


def follow_settings(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Has DeepSpeed do what the settings say, where it would follow its own config or, by default, accelerate's.

    Raises:
        ValueError: If its config says something else.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    plugin, num_replicas = accelerator.state.deepspeed_plugin, count_replicas(accelerator)
    stated = {**plugin.deepspeed_config, "gradient_clipping": plugin.gradient_clipping}  # a 0 is in the latter alone
    for key, setting, value in (
        ("gradient_clipping", "max_grad_norm", config.max_grad_norm),
        ("gradient_accumulation_steps", "gradient_accumulation_steps", config.gradient_accumulation_steps),
        ("train_micro_batch_size_per_gpu", "train_batch_size", config.train_batch_size),
        ("train_batch_size", "the clips of a step over all processes", config.samples_per_step(num_replicas)),
    ):
        if stated.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{key} of the DeepSpeed config must be auto or agree with {setting}, got {stated[key]} and {value}; "
                "write auto there."
            )
        plugin.deepspeed_config[key] = value
    wanted, precision = config.mixed_precision, accelerator.mixed_precision
    if wanted is not None and precision not in (wanted, beside_fp8(wanted)):
        raise ValueError(
            f"bf16.enabled and fp16.enabled of the DeepSpeed config must be auto or agree with mixed_precision, got "
            f"{precision} and {wanted}; write auto there, or leave them out."
        )


def clip_as_set(optimizer: AcceleratedOptimizer, config: TrainingConfig) -> None:
    """Has DeepSpeed clip at the norm of these settings; a checkpoint of its has brought that of the run before."""
    if "clip_grad" in vars(optimizer.optimizer):
        optimizer.optimizer.clip_grad = config.max_grad_norm


def replaces_optimizer(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed takes its own AdamW, for the CPU and in float32, in the place of any optimizer."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    plugin = accelerator.state.deepspeed_plugin
    return plugin.offload_optimizer_device != "none" and plugin.get_value("zero_force_ds_cpu_optimizer", True)


def check_can_be_compiled(accelerator: Accelerator) -> None:
    """Checks that layers can be compiled under the strategy.

    Raises:
        ValueError: If something of it comes between the operations of a layer.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED or context_mesh(accelerator) is not None:
        raise ValueError(
            "--compile makes one operation of a layer, but DeepSpeed and context parallelism work inside of it; "
            "launch with accelerate_configs/single_gpu.yaml, ddp.yaml or fsdp2.yaml, or leave it out."
        )


def free_memory(accelerator: Accelerator) -> int:
    """Bytes that this process may take on its device."""
    if accelerator.device.type == "cpu":
        return psutil.virtual_memory().available // accelerator.num_processes
    return torch.get_device_module(accelerator.device).mem_get_info(accelerator.device)[0]


def takes_over_checkpointing(accelerator: Accelerator) -> bool:
    """Whether FSDP's config file asks for activation checkpointing, which is then the model's own to do.

    Otherwise it and --gradient_checkpointing would add up, and the flags about it would not apply.
    """
    if not accelerator.is_fsdp2 or not accelerator.state.fsdp_plugin.activation_checkpointing:
        return False
    accelerator.state.fsdp_plugin.activation_checkpointing = False
    return True


def beside_fp8(mixed_precision: str | None) -> str | None:
    """The precision of all but the products that fp8 has in 8 bits: bf16; any other precision is everything's."""
    return "bf16" if mixed_precision == "fp8" else mixed_precision
