"""Control videos: their latents are input channels of the transformer beside the noisy ones.

The patch embedding is widened by zeros, so that a student begins exactly as its base. A latent of zeros is no control.
WAN's VAE is causal, so the controls of a block are known as soon as its frames are.

Shapes: B = batch, C = latent channels, C' = K C those of K controls, F = latent frames, H, W = latent height and
width.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


PATCH_EMBEDDING = "patch_embedding."  # names of its weights in a transformer begin so
PATCH_EMBEDDING_NAME = "patch_embedding.safetensors"


def with_controls(
    latents: torch.Tensor, control_latents: torch.Tensor | None, config: Any, *, num_context: int = 0
) -> torch.Tensor:
    """Latents and those of their controls, as the patch embedding takes them, `(B, C + C', F' + F, H, W)`.

    Args:
        latents: `(B, C, F' + F, H, W)`, of F' frames of context, clean ones of the same clip, then of F noisy ones.
        control_latents: Of the F frames, `(B, C', F, H, W)`; None is no control.
        config: Of the transformer; without controls latents stay as they are.
        num_context: F'.

    Raises:
        ValueError: If the controls are those of other frames, or not as many as the transformer takes.
    """
    if not config.control_names and control_latents is None:
        return latents
    batch_size, channels, num_frames, *size = latents.shape
    shape = (batch_size, config.in_channels - channels, num_frames - num_context, *size)
    if control_latents is None:
        control_latents = latents.new_zeros(shape)
    if control_latents.shape != shape:
        raise ValueError(
            f"control_latents must have the shape {shape}, all controls of these frames, got "
            f"{tuple(control_latents.shape)}."
        )
    control_latents = torch.cat([control_latents[:, :, :num_context], control_latents], dim=2)
    return torch.cat([latents, control_latents.to(latents.dtype)], dim=1)


def widen_for_controls(transformer: Any, names: Sequence[str]) -> None:
    """Lets a transformer take control videos: more input channels, whose weights are zeros.

    Args:
        transformer: A `CausalWanTransformer3DModel`, changed in place. One that takes these controls already stays.
        names: Of the controls, in their order.

    Raises:
        ValueError: If it takes other controls.

    Source: Zero-initialised inputs as in ControlNet, arXiv 2302.05543, section 3.1, on the first layer alone.
    """
    config = transformer.config
    check_controls(config, names)
    if tuple(config.control_names or ()) == tuple(names):
        return
    narrow = transformer.patch_embedding
    num_new = len(names) * config.in_channels
    wide = type(narrow)(
        config.in_channels + num_new,
        narrow.out_channels,
        narrow.kernel_size,
        narrow.stride,
        device=narrow.weight.device,
        dtype=narrow.weight.dtype,
    )
    zeros = narrow.weight.new_zeros(narrow.out_channels, num_new, *narrow.kernel_size)
    is_trained = narrow.weight.requires_grad
    wide.weight = torch.nn.Parameter(torch.cat([narrow.weight.detach(), zeros], dim=1), requires_grad=is_trained)
    wide.bias = torch.nn.Parameter(narrow.bias.detach(), requires_grad=is_trained)
    transformer.patch_embedding = wide
    transformer.register_to_config(in_channels=wide.in_channels, control_names=list(names))


def save_patch_embedding(weights: dict[str, torch.Tensor], names: Sequence[str], folder: str | Path) -> None:
    """Writes `patch_embedding.safetensors`: what a LoRA cannot hold of a student with controls.

    Args:
        weights: Of the patch embedding, by their names in the transformer.
        names: Of the controls.
        folder: Is made if it is not there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    metadata = {"control_names": json.dumps(list(names))}
    save_file(weights, Path(folder) / PATCH_EMBEDDING_NAME, metadata=metadata)


def load_patch_embedding(transformer: Any, path: str | Path) -> None:
    """Gives a transformer the controls and the weights of a `patch_embedding.safetensors`.

    Raises:
        ValueError: If it takes other controls.
    """
    with safe_open(path, "pt") as file:
        names = json.loads((file.metadata() or {}).get("control_names", "[]"))
    widen_for_controls(transformer, names)
    transformer.load_state_dict(load_file(path), strict=False)


def with_control_names(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config of a transformer after `widen_for_controls`.

    Raises:
        ValueError: If it takes other controls.
    """
    check_controls(config, names)
    if tuple(config.get("control_names") or ()) == tuple(names):
        return dict(config)
    return {**config, "in_channels": config["in_channels"] * (1 + len(names)), "control_names": list(names)}


def check_controls(config: Any, names: Sequence[str]) -> None:
    """Checks that a transformer can be given these controls: that it has none yet, or these.

    Args:
        config: Of the transformer.
        names: Of the controls, in their order.

    Raises:
        ValueError: If not.
    """
    own = tuple(config.get("control_names") or ())
    if own and own != tuple(names):
        raise ValueError(
            f"control_column must be the controls that the student takes already, in their order, {' '.join(own)}, "
            f"got {' '.join(names) or 'none'}."
        )
