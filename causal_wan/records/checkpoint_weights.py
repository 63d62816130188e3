"""The weights in a checkpoint: read, whatever strategy wrote them, and written without those that are frozen."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException

from causal_wan.records.checkpoint_checks import (
    DEEPSPEED_NAME,
    EMA_NAME,
    FSDP_NAME,
    TRAINABLE_WEIGHTS_NAME,
    WHOLE_NAMES,
    at_place,
)


def read_weights(
    checkpoint: Path, trainable: dict[str, torch.Tensor], *, average: bool = True
) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint of any strategy, whole and in float32.

    Args:
        checkpoint: Folder.
        trainable: Weights of the model by name; their shapes and order count, not their values.
        average: Whether to take the moving average, if there is one.

    Raises:
        ValueError: If names or shapes are not those of the checkpoint.
    """
    weights = {name: torch.empty(weight.shape) for name, weight in trainable.items()}
    if average and (checkpoint / EMA_NAME).is_dir():
        _read_shards(
            {f"shadow_params.{i}": weight for i, weight in enumerate(weights.values())}, checkpoint / EMA_NAME
        )
    elif (checkpoint / FSDP_NAME).is_dir():
        _read_shards({f"model.{name}": weight for name, weight in weights.items()}, checkpoint / FSDP_NAME)
    else:
        read = _read_files(checkpoint)
        if not weights.keys() <= read.keys():
            missing = sorted(weights.keys() - read.keys())
            raise ValueError(f"{checkpoint} must hold the weights that the run trains, but lacks {missing[:3]}, ...")
        weights = {name: read[name].float() for name in weights}
    return weights


def _read_shards(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Reads a folder of torch.distributed.checkpoint into tensors.

    Raises:
        ValueError: If a name or a shape is not that of the folder.
    """
    try:
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder} must hold the weights that the run trains: {reason}") from None


def _read_files(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint that is whole, or DeepSpeed's."""
    for name in WHOLE_NAMES:
        if (checkpoint / name).is_file():
            return load_file(checkpoint / name)
    if not (checkpoint / DEEPSPEED_NAME).is_dir():
        raise ValueError(f"{checkpoint} must be a checkpoint of a training run, but has no weights in it.")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint), tag=DEEPSPEED_NAME, exclude_frozen_parameters=True
    )


def checkpoint_trainable_weights_only(accelerator: Any) -> None:
    """Makes checkpoints hold the trainable weights alone: a LoRA run need not store its frozen base each time."""

    def save(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        weights.clear()  # tells accelerate that they are dealt with
        if accelerator.is_main_process:
            for place, model in enumerate(models):
                path = Path(output_dir) / at_place(TRAINABLE_WEIGHTS_NAME, place)
                save_file(_trainable_state(accelerator.unwrap_model(model)), path)

    def load(models: list[torch.nn.Module], input_dir: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop())
            path = Path(input_dir) / at_place(TRAINABLE_WEIGHTS_NAME, len(models))  # the last is taken first
            saved, own = load_file(path), _trainable_state(model)
            if saved.keys() != own.keys():
                raise ValueError(
                    f"{input_dir} must come from a run with the same trainable weights; "
                    f"{len(saved.keys() ^ own.keys())} names differ, first "
                    f"{sorted(saved.keys() ^ own.keys())[:3]}. Use the same LoRA settings."
                )
            model.load_state_dict(saved, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
