"""LoRA adapters: added to a transformer, and saved.

A student with controls has a patch embedding of its own beside them: new input channels are nothing that a LoRA could
add to. It is trained whole, and lies in a file of its own, since files of LoRAs may hold nothing else.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from causal_wan.model.control import PATCH_EMBEDDING, save_patch_embedding
from causal_wan.model.transformer import CausalWanTransformer3DModel


LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def add_lora(
    transformer: CausalWanTransformer3DModel, *, rank: int, alpha: float, target_modules: Sequence[str]
) -> None:
    """Freezes a transformer and adds trainable LoRA adapters, in float32, to the named linear layers.

    Of a transformer with controls, the patch embedding is trained too, in float32.

    Args:
        transformer: Changed in place.
        rank: Of the update, >= 1.
        alpha: The update is scaled by alpha / rank.
        target_modules: Endings of module names.

    Raises:
        ValueError: If no module has such a name (from peft, which lists what it looked for).

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=True, target_modules=list(target_modules))
    )
    if transformer.config.control_names:
        transformer.patch_embedding.requires_grad_(True)
    cast_training_params(transformer, dtype=torch.float32)


def save_lora(transformer: CausalWanTransformer3DModel, weights: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, which stock `WanPipeline.load_lora_weights` takes.

    Of a student with controls, `patch_embedding.safetensors` is written before; `CausalWanPipeline` loads both.

    Args:
        transformer: With adapters.
        weights: What is trained, by its names in `transformer`.
        folder: The files go into it.
    """
    patches = {name: weight for name, weight in weights.items() if name.startswith(PATCH_EMBEDDING)}
    if patches:
        save_patch_embedding(patches, transformer.config.control_names, folder)
    WanPipeline.save_lora_weights(
        str(folder),
        # What peft does, but for names within the wrappers of a sharded model, which peft does not know.
        transformer_lora_layers={
            name.replace(".default.", "."): weight for name, weight in weights.items() if name not in patches
        },
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
