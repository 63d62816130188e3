"""The weights of what a run trains: averaged ones put in place for a while, sharded ones gathered."""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from causal_wan.training.run import Trainee


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer changes, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def ema_weights(trainee: Trainee) -> Iterator[None]:
    """Lets the model have its averaged weights for a while, if there are any."""
    ema, model = trainee.ema, trainee.unwrapped_model
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


def gather_weights(accelerator: Accelerator, trainee: Trainee) -> dict[str, torch.Tensor]:
    """The trainable weights, whole, on the CPU of the main process; one weight at a time, so that nobody holds two.

    Every process has to call this; all but the main one get an empty dict.
    """
    gathered = {}
    for name, parameter in trainee.unwrapped_model.state_dict(keep_vars=True).items():
        if not parameter.requires_grad:
            continue
        whole = _whole(accelerator, parameter)
        if accelerator.is_main_process:
            gathered[name] = whole.detach().to("cpu", copy=True)  # the weights may change before they are written
    return gathered


def _whole(accelerator: Accelerator, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A weight without its sharding, as precise as the optimizer has it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
