"""Names of a WAN LoRA's weights: diffusers', WAN's own as ComfyUI has them, and kohya's (musubi-tuner).

Renaming changes no tensor. The scale alpha / rank of each module goes along: as tensors in the files of the others, in
the metadata of diffusers' (as peft's config), so that nothing is multiplied into the weights.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanPipeline
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from causal_wan.wan_names import COMFYUI_PREFIX, INSIDE, OUTSIDE, strip_prefixes, to_diffusers, to_original


LoraNames = Literal["diffusers", "original", "comfyui", "kohya"]

PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
WEIGHT = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight")
PEFT_PREFIXES = ("base_model.model.", "transformer.")
KOHYA_PREFIX = "lora_unet_"
METADATA_NAME = "lora_adapter_metadata"
MAX_SHOWN = 5


@dataclass(frozen=True)
class Lora:
    """The adapters of a transformer, by diffusers' name of the module.

    Attributes:
        down: `(rank, inputs)` each.
        up: `(outputs, rank)` each.
        alphas: The update is `up @ down` times alpha / rank.
    """

    down: dict[str, torch.Tensor]
    up: dict[str, torch.Tensor]
    alphas: dict[str, float]


def is_lora(names: Mapping[str, Any]) -> bool:
    """Whether names of weights are those of a LoRA."""
    return any(".lora_" in name or name.startswith(KOHYA_PREFIX) for name in names)


def read_lora(path: str | Path) -> Lora:
    """Reads a safetensors file in any of the names.

    Raises:
        ValueError: If a name is nobody's, names the first; or a module lacks one of its two weights.
    """
    with safe_open(path, framework="pt") as file:
        state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    weights: dict[str, dict[str, torch.Tensor]] = {"down": {}, "up": {}}
    alphas, unexpected = {}, []
    for name, tensor in state.items():
        found, is_alpha = WEIGHT.fullmatch(name), name.endswith(".alpha")
        module = _module(found[1] if found else name.removesuffix(".alpha")) if found or is_alpha else None
        if module is None:
            unexpected.append(name)
        elif is_alpha:
            alphas[module] = float(tensor)
        else:
            weights[PARTS[found[2]]][module] = tensor
    down, up = weights["down"], weights["up"]
    unexpected += [f"{module} (one of its two weights alone)" for module in down.keys() ^ up.keys()]
    unexpected += [f"{module} (alpha alone)" for module in alphas.keys() - down.keys()]
    if unexpected or not down:
        raise ValueError(
            f"{path} must be a LoRA of a WAN transformer with two weights a module and perhaps alpha, in the names of "
            f"diffusers, ComfyUI or kohya, but {len(unexpected)} of {len(state)} names are others, first "
            f"{', '.join(sorted(unexpected)[:MAX_SHOWN]) or 'none at all'}."
        )
    config = {name.removeprefix("transformer."): value for name, value in _peft_config(metadata).items()}
    return Lora(down, up, {module: alphas.get(module, _peft_alpha(module, down[module], config)) for module in down})


def _module(name: str) -> str | None:
    """Diffusers' name of a module, of anybody's name."""
    if name.startswith(KOHYA_PREFIX):
        found = re.fullmatch(r"(?:blocks_(\d+)_)?(.+)", name.removeprefix(KOHYA_PREFIX))
        table = {own.replace(".", "_"): own for own in (OUTSIDE if found[1] is None else INSIDE)}
        if found[2] not in table:
            return None
        name = table[found[2]] if found[1] is None else f"blocks.{found[1]}.{table[found[2]]}"
    for prefix in PEFT_PREFIXES:
        name = name.removeprefix(prefix)
    try:
        (weight,) = to_diffusers(strip_prefixes({f"{name}.weight": torch.empty(0)}))
    except ValueError:
        return None
    return weight.removesuffix(".weight")


def _peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(metadata[METADATA_NAME]) if METADATA_NAME in metadata else {}


def _peft_alpha(module: str, down: torch.Tensor, config: Mapping[str, Any]) -> float:
    """What a peft config says of a module; without one, the scale is 1."""
    rank = down.shape[0]
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.get("lora_alpha") or rank)
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1)  # whose scale is alpha / sqrt(rank)


def write_lora(lora: Lora, output: str | Path, names: LoraNames) -> None:
    """Writes a LoRA.

    Args:
        lora: What to write.
        output: Folder for diffusers' names, which gets `pytorch_lora_weights.safetensors`; else a file.
        names: Whose names; original and comfyui are the same.
    """
    if names == "diffusers":
        layers = {f"{module}.lora_A.weight": weight.contiguous() for module, weight in lora.down.items()}
        layers |= {f"{module}.lora_B.weight": weight.contiguous() for module, weight in lora.up.items()}
        metadata = _as_peft_config(lora).to_dict()
        WanPipeline.save_lora_weights(output, layers, transformer_lora_adapter_metadata=metadata)
        return
    state = {}
    for module, down in lora.down.items():
        (original,) = to_original({f"{module}.weight": down})
        original = original.removesuffix(".weight")
        is_kohya = names == "kohya"
        name = KOHYA_PREFIX + original.replace(".", "_") if is_kohya else COMFYUI_PREFIX + original
        state |= {
            f"{name}.lora_down.weight": down.contiguous(),
            f"{name}.lora_up.weight": lora.up[module].contiguous(),
        }
        if is_kohya or lora.alphas[module] != down.shape[0]:
            state[f"{name}.alpha"] = torch.tensor(lora.alphas[module])
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output, metadata={"format": "pt"})


def _as_peft_config(lora: Lora) -> LoraConfig:
    ranks = {module: down.shape[0] for module, down in lora.down.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, lora.alphas))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={re.escape(module): other for module, other in ranks.items() if other != rank},
        alpha_pattern={re.escape(module): other for module, other in lora.alphas.items() if other != alpha},
        target_modules=sorted(ranks),
    )
