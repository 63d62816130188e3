"""What accelerate's strategies mean for loading, planning and counting: who holds what, who gets clips of its own."""

from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import DeviceMesh


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
