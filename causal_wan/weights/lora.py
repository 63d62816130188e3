"""LoRA adapters: added to a transformer, loaded and saved.

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


MAX_SHOWN = 3
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
ADAPTER = "default"  # what peft calls the adapters that are trained


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


def go_on_from_lora(transformer: CausalWanTransformer3DModel, path: str | Path) -> LoraConfig:
    """Freezes a transformer and adds the adapters of a LoRA to it, to be trained on, in float32.

    Args:
        transformer: Changed in place.
        path: A file or folder in any names that diffusers reads, or a hub id.

    Returns:
        What the adapters are.

    Raises:
        ValueError: If it holds no LoRA, or one of another model.
    """
    transformer.requires_grad_(False)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    load_lora(WanPipeline(**parts, transformer=transformer), path, adapter_name=ADAPTER)
    for name, weight in transformer.named_parameters():
        weight.requires_grad_("lora_" in name)
    cast_training_params(transformer, dtype=torch.float32)
    return transformer.peft_config[ADAPTER]


def check_is_no_lora(name: str, path: str | Path) -> None:
    """Checks that what is to be whole weights is not the folder of a LoRA.

    Args:
        name: Of the setting.
        path: Its value.

    Raises:
        ValueError: If it is; names the command that makes whole weights of it.
    """
    if (Path(path) / LORA_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{name} must be whole weights, got {path}, which is a LoRA; make them of it: python "
            f"convert_checkpoint.py --input {path} --output {str(path).rstrip('/')}-whole --to pipeline"
        )


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
            name.replace(f".{ADAPTER}.", "."): weight for name, weight in weights.items() if name not in patches
        },
        transformer_lora_adapter_metadata=transformer.peft_config[ADAPTER].to_dict(),
    )


def load_lora(
    pipeline: WanPipeline, path: str | Path, *, adapter_name: str | None = None, weight_name: str | None = None
) -> None:
    """Adds a LoRA to the transformer of a pipeline, the whole of it or nothing.

    Args:
        pipeline: Of diffusers, or ours; its transformer is changed.
        path: A file or folder in any names that diffusers reads, or a hub id.
        adapter_name: What the adapter is called.
        weight_name: Of the file in a folder.

    Raises:
        ValueError: If it holds no LoRA, or one of another model.
    """
    try:
        state = pipeline.lora_state_dict(str(path), weight_name=weight_name)
    except OSError:
        if not Path(path).is_dir():
            raise
        state = {}
    _check_fits(pipeline.transformer, state, path)
    pipeline.load_lora_weights(str(path), adapter_name=adapter_name, weight_name=weight_name)


def _check_fits(transformer: CausalWanTransformer3DModel, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Diffusers fails in many lines on other shapes, and leaves out what has no place."""
    factors = {name: weight for name, weight in state.items() if name.endswith((".lora_A.weight", ".lora_B.weight"))}
    if not factors:
        raise ValueError(f"lora must be files, folders or hub ids, but {path} holds no LoRA.")
    modules = dict(transformer.named_modules())
    lost = []
    for name, weight in factors.items():
        module, _, factor = name.removeprefix("transformer.").rpartition(".lora_")
        side = 1 if factor == "A.weight" else 0  # of the weight (out, in), that which the rank does not take
        if module not in modules or weight.shape[side] != modules[module].weight.shape[side]:
            lost.append(name)
    if lost:
        raise ValueError(
            f"the LoRA {path} must be of this checkpoint's transformer, but {len(lost)} of its {len(factors)} weights "
            f"find no place of their shape in it, first {', '.join(lost[:MAX_SHOWN])}; it is of a model of another "
            "size or kind: use one that was trained on this one."
        )
