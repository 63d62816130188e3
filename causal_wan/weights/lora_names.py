"""Names of a LoRA's weights: diffusers', those of ComfyUI (WAN's own, dotted) and those of kohya (WAN's, underscored).

A LoRA adds alpha / rank * up @ down to the weight of a module. The three differ in how they call a module, in how they
call down and up, and in where alpha stands: diffusers keeps it in the metadata of the file, the others in tensors of
their own. No weight is scaled here, so all ways are exact. Text-to-video transformers only.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from causal_wan.config.choices import LoraNames
from causal_wan.weights.wan_names import (
    COMFYUI_PREFIX,
    INSIDE,
    MAX_SHOWN,
    OUTSIDE,
    PREFIXES,
    State,
    read_state,
    readable,
)


DIFFUSERS_PREFIX, KOHYA_PREFIX, PEFT_PREFIX = "transformer.", "lora_unet_", "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# WAN's name -> diffusers', of all modules that a LoRA can be of; * is the number of a layer.
MODULES = {
    layer + own: layer + theirs
    for layer, table in (("", OUTSIDE), ("blocks.*.", INSIDE))
    for own, theirs in table.items()
    if "norm" not in own and "modulation" not in own
}
ORIGINAL = {theirs: own for own, theirs in MODULES.items()}
# Any name -> diffusers'.
KNOWN = {
    **{theirs: theirs for theirs in ORIGINAL},
    **MODULES,
    **{KOHYA_PREFIX + own.replace(".", "_"): theirs for own, theirs in MODULES.items()},
}
NUMBER = re.compile(r"(?<=blocks[._])\d+(?=[._])")
TENSOR = re.compile(r"(.+)\.(?:(lora_A|lora_down|lora_B|lora_up)(?:\.default)?\.weight|(alpha))")
PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
MARKS = re.compile(rf"\.lora_|^{KOHYA_PREFIX}|\.diff(_b)?$")


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to a module: alpha / rank * up @ down.

    `down` is `(rank, in)` and `up` `(out, rank)`, of a convolution with the kernel after that.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down, columns of up."""
        return self.down.shape[0]


Lora = dict[str, Adapter]  # by diffusers' names of the modules


# --- reading ---------------------------------------------------------------------------------------------------------


def find_lora(path: str | Path) -> Path | None:
    """The LoRA file that a path is, or that lies in the folder that it is: of a run, of diffusers or of peft.

    Raises:
        ValueError: If it cannot be read.
    """
    path = Path(path)
    if (path / "transformer").is_dir():  # whole weights, as `load_student` takes them
        return None
    if path.is_dir():
        return next((path / name for name in (LORA_WEIGHT_NAME_SAFE, PEFT_WEIGHTS) if (path / name).is_file()), None)
    if not path.is_file():
        return None
    if path.suffix != ".safetensors":
        names = read_state(path)
    else:
        with readable(path), safe_open(path, framework="pt") as file:  # names alone: whole weights are large
            names = list(file.keys())
    return path if any(MARKS.search(name) for name in names) else None


def read_lora(path: str | Path) -> tuple[Lora, dict[str, str]]:
    """A LoRA file in whatever names, and what its metadata say beside alpha.

    Raises:
        ValueError: If it is no LoRA of a WAN text-to-video transformer, or one that the formats cannot hold exactly.
    """
    path, metadata, config = Path(path), {}, {}
    if path.suffix == ".safetensors":
        with readable(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    try:
        if LORA_ADAPTER_METADATA_KEY in metadata:
            config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
        elif path.name == PEFT_WEIGHTS and (path.parent / PEFT_CONFIG).is_file():
            config = json.loads((path.parent / PEFT_CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"the LoRA's settings in or beside {path} must be valid JSON: {error}.") from None
    config = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in config.items()}
    # Hashes are of the file that was.
    kept = {k: v for k, v in metadata.items() if k not in (LORA_ADAPTER_METADATA_KEY, "format") and "hash" not in k}
    return parse_lora(read_state(path), config), kept


def parse_lora(state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Lora:
    """Sorts a LoRA's tensors by the modules that they are of.

    Args:
        state: The tensors, in whatever names.
        config: Settings of peft's `LoraConfig`, if there are any. Alpha is the rank where neither they nor a tensor
            tell it, which is what diffusers and ComfyUI take.

    Raises:
        ValueError: If a name is unknown, a tensor is missing or given twice, ranks differ, or alpha is not clear.
    """
    _refuse_what_is_no_lora(state, config)
    tensors: dict[str, State] = defaultdict(dict)
    for name, tensor in state.items():
        module, part = _find_place(name)
        if part in tensors[module]:
            raise ValueError(f"a LoRA must hold {part} of {module} once, but {name} is there beside it.")
        tensors[module][part] = tensor
    return {module: _make_adapter(module, parts, config) for module, parts in tensors.items()}


def _refuse_what_is_no_lora(state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None) -> None:
    whole = [name for name in state if name.endswith((".diff", ".diff_b"))]
    if whole:
        raise ValueError(
            f"a LoRA must hold low-rank matrices alone, but {len(whole)} of {len(state)} keys are changes of whole "
            f"weights or biases, first {whole[0]}; merge it into the base model with the tool that made it, and "
            "convert the weights."
        )
    unexpected = [name for name in state if _find_place(name) is None]
    if unexpected or not state:
        raise ValueError(
            "a LoRA must have the names of a WAN text-to-video transformer, those of diffusers, ComfyUI or kohya, but "
            f"{len(unexpected)} of {len(state)} keys have others, first "
            f"{', '.join(unexpected[:MAX_SHOWN]) or 'none at all'}."
        )
    if not config and any(name.startswith(PEFT_PREFIX) for name in state):
        raise ValueError(
            f"a LoRA of peft keeps alpha in {PEFT_CONFIG}, which is not there; put it beside {PEFT_WEIGHTS}."
        )


def _find_place(name: str) -> tuple[str, str] | None:
    """The name of a tensor -> diffusers' name of the module, and down, up or alpha."""
    found = TENSOR.fullmatch(name)
    if found is None:
        return None
    module = found[1].replace(KOHYA_PREFIX + "_", KOHYA_PREFIX)  # of VideoX-Fun, whose prefix ends in two
    for prefix in (PEFT_PREFIX, DIFFUSERS_PREFIX, *PREFIXES):
        module = module.removeprefix(prefix)
    number = NUMBER.search(module)
    known = KNOWN.get(NUMBER.sub("*", module, count=1))
    return known and (known.replace("*", number[0] if number else ""), PARTS.get(found[2], "alpha"))


def _make_adapter(module: str, parts: State, config: Mapping[str, Any] | None) -> Adapter:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise ValueError(f"a LoRA must hold both down and up of a module, but {missing[0]} of {module} is missing.")
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"down and up of {module} must be (rank, in) and (out, rank), got {tuple(down.shape)} and "
            f"{tuple(up.shape)}."
        )
    told = []
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise ValueError(f"alpha of {module} must be one number, got {tuple(parts['alpha'].shape)}.")
        told.append(parts["alpha"].item())
    if config:
        told.append(_alpha_in(config, module, rank=down.shape[0]))
    alpha = told[0] if told else down.shape[0]
    if any(other != alpha for other in told):
        raise ValueError(f"alpha of {module} must be clear, but is {told[0]} in the file and {told[1]} in metadata.")
    if alpha == 0 or not math.isfinite(alpha):  # some readers take 0 for the rank, others for no change
        raise ValueError(f"alpha of {module} must be a finite number other than 0, got {alpha}.")
    return Adapter(down, up, float(alpha))


def _alpha_in(config: Mapping[str, Any], module: str, rank: int) -> float:
    config = {**LoraConfig().to_dict(), **config}
    pattern = get_pattern_key(config["alpha_pattern"] or {}, module)
    alpha = (config["alpha_pattern"] or {}).get(pattern, config["lora_alpha"])
    if not config["use_rslora"]:
        return alpha
    scale = alpha / math.sqrt(rank)
    if scale * rank / rank != scale:
        raise ValueError(
            f"rsLoRA scales {module} by alpha / sqrt(rank) = {scale}, which no alpha / {rank} equals to the last bit; "
            "the names cannot be changed without a change of the scale."
        )
    return scale * rank


# --- writing ---------------------------------------------------------------------------------------------------------


def lora_file(lora: Lora, names: LoraNames) -> tuple[State, dict[str, str]]:
    """A LoRA in some names: the tensors of the file, and its metadata.

    Args:
        lora: What `read_lora` and `parse_lora` return.
        names: `original` is `comfyui`: of LoRAs there is no other form with WAN's dotted names.
    """
    if names == "diffusers":
        state = {}
        for module, adapter in lora.items():
            state[f"{DIFFUSERS_PREFIX}{module}.lora_A.weight"] = adapter.down.contiguous()
            state[f"{DIFFUSERS_PREFIX}{module}.lora_B.weight"] = adapter.up.contiguous()
        config = {DIFFUSERS_PREFIX + name: value for name, value in peft_config(lora).items()}
        return state, {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    state = {}
    for module, adapter in lora.items():
        stem = _stem(module, names)
        state[f"{stem}.lora_down.weight"] = adapter.down.contiguous()
        state[f"{stem}.lora_up.weight"] = adapter.up.contiguous()
        # Without it the scale is 1; diffusers reads none outside of layers, and musubi-tuner cannot do without.
        if names == "kohya" or adapter.alpha != adapter.rank:
            state[f"{stem}.alpha"] = _exact(adapter.alpha)
    return state, {"format": "pt"}


def peft_config(lora: Lora) -> dict[str, Any]:
    """What peft's `LoraConfig` takes to give every module its rank and alpha: the most common, and the others."""
    rank = Counter(adapter.rank for adapter in lora.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in lora.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: adapter.rank for module, adapter in lora.items() if adapter.rank != rank},
        "alpha_pattern": {module: adapter.alpha for module, adapter in lora.items() if adapter.alpha != alpha},
        "target_modules": list(lora),
    }


def _stem(module: str, names: LoraNames) -> str:
    number = NUMBER.search(module)
    own = ORIGINAL[NUMBER.sub("*", module, count=1)].replace("*", number[0] if number else "")
    return KOHYA_PREFIX + own.replace(".", "_") if names == "kohya" else COMFYUI_PREFIX + own


def _exact(number: float) -> torch.Tensor:
    single = torch.tensor(number, dtype=torch.float32)
    return single if single.item() == number else torch.tensor(number, dtype=torch.float64)
