"""Names of a WAN transformer's weights: WAN's own, which CausVid, Self Forcing and ComfyUI keep to, and diffusers'.

Renaming changes no tensor and loses none, so both ways are exact. Text-to-video transformers only.
"""

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


State = dict[str, torch.Tensor]
Value = TypeVar("Value")

# WAN's name -> diffusers', of what lies outside of layers and inside of them.
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
INSIDE = {
    **{
        f"{own}.{part}": f"{theirs}.{name}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, name in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
        )
    },
    "norm3": "norm2",  # before cross-attention; the other two have no weights
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
LAYER = re.compile(r"(blocks\.\d+\.)(.+)")
WRAPPERS = re.compile(r"(^|\.)(_fsdp_wrapped_module|_orig_mod|module)(?=\.)")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
COMFYUI_PREFIX = "diffusion_model."
WAN_HEAD_DIM = 128  # of all WAN models
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth")
MAX_SHOWN = 5


def to_diffusers(state: Mapping[str, torch.Tensor]) -> State:
    """Weights in WAN's or diffusers' names, with whatever prefix -> in diffusers' names.

    Raises:
        ValueError: If a name is neither's; names the first.
    """
    state = strip_prefixes(state)
    if state and all(_rename(name, _inverse(OUTSIDE), _inverse(INSIDE)) is not None for name in state):
        return dict(state)
    return _rename_all(state, OUTSIDE, INSIDE, "WAN's or diffusers'")


def to_original(state: Mapping[str, torch.Tensor]) -> State:
    """Weights in diffusers' names -> in WAN's.

    Raises:
        ValueError: If a name is not diffusers'; names the first.
    """
    return _rename_all(state, _inverse(OUTSIDE), _inverse(INSIDE), "diffusers'")


def strip_prefixes(state: Mapping[str, Value]) -> dict[str, Value]:
    """Weights without what wrappers put before their names: FSDP's, torch.compile's, DDP's, `model.`."""
    stripped = {}
    for name, weight in state.items():
        name = WRAPPERS.sub("", name).lstrip(".")
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        stripped[name] = weight
    return stripped


def _rename_all(state: Mapping[str, torch.Tensor], outside: dict, inside: dict, whose: str) -> State:
    names = {name: _rename(name, outside, inside) for name in state}
    unexpected = [name for name, new in names.items() if new is None]
    if unexpected or not names:
        raise ValueError(
            f"weights must have the names of a WAN text-to-video transformer, {whose}, but {len(unexpected)} of "
            f"{len(names)} have others, first {', '.join(unexpected[:MAX_SHOWN]) or 'none at all'}."
        )
    return {new: state[name] for name, new in names.items()}


def _rename(name: str, outside: dict[str, str], inside: dict[str, str]) -> str | None:
    found = LAYER.fullmatch(name)
    prefix, rest, table = (found[1], found[2], inside) if found else ("", name, outside)
    if rest in table:  # a parameter of its own
        return prefix + table[rest]
    module, _, parameter = rest.rpartition(".")
    return f"{prefix}{table[module]}.{parameter}" if module in table else None


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {theirs: own for own, theirs in table.items()}


def infer_architecture(state: Mapping[str, torch.Tensor], attention_head_dim: int = WAN_HEAD_DIM) -> dict[str, Any]:
    """The configuration of the transformer that weights in diffusers' names are of.

    Args:
        state: All weights.
        attention_head_dim: Which the shapes do not tell; 128 in all WAN models.

    Raises:
        ValueError: If weights are missing, or the width is no multiple of the head's.
    """
    try:
        patches = state["patch_embedding.weight"].shape  # (D, C, 1, 2, 2)
        width, in_channels, patch_size = patches[0], patches[1], tuple(patches[2:])
        layers = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
        config = {
            "patch_size": patch_size,
            "num_attention_heads": width // attention_head_dim,
            "attention_head_dim": attention_head_dim,
            "in_channels": in_channels,
            "out_channels": state["proj_out.weight"].shape[0] // (patch_size[0] * patch_size[1] * patch_size[2]),
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "num_layers": max(layers) + 1,
            "cross_attn_norm": "blocks.0.norm2.weight" in state,
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"weights must be those of a whole WAN transformer, but lack {error}.") from None
    except IndexError:
        raise ValueError("weights must have the shapes of a WAN transformer, but some lack dimensions.") from None
    if width % attention_head_dim:
        raise ValueError(
            f"the width of a transformer must be a multiple of its attention_head_dim, got {width} and "
            f"{attention_head_dim}; name the right one with --attention_head_dim."
        )
    return config


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Says which file it is that its body finds to be no safetensors, or not to fit its configuration.

    Raises:
        ValueError: In the place of the library's error.
    """
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but cannot be read ({error}); it is cut off or something else: "
            "copy or download it again."
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{path} must have weights of the shapes that its config.json says, but has others: they are of different "
            "models, or one is damaged; copy or download both again."
        ) from None


def check_weights_in(folder: Path, *, config: bool = False) -> list[Path]:
    """Checks that the weights in a folder are there and whole, by the headers of their files; returns these.

    Args:
        folder: Of a model, in diffusers format.
        config: Whether there must be the model's configuration as well.

    Raises:
        ValueError: If not.
    """
    files = sorted(folder.glob("*.safetensors"))
    parts = [
        set(json.loads(path.read_text())["weight_map"].values()) for path in folder.glob("*.safetensors.index.json")
    ]
    missing = set().union(*parts) - {path.name for path in files}
    missing |= {"config.json"} if config and not (folder / "config.json").is_file() else set()
    if missing or not files:
        raise ValueError(f"{folder} must hold whole weights, but lacks {', '.join(sorted(missing)) or 'any'}.")
    for path in files:
        with readable(path), safe_open(path, framework="pt"):
            pass
    return files


def read_state(path: str | Path, *, average: bool = True) -> State:
    """The weights in a file: safetensors, or a torch checkpoint such as CausVid's and Self Forcing's.

    Args:
        path: `.safetensors`, `.pt` or `.pth`; the latter are read as tensors alone (`weights_only`), never as objects.
        average: Whether to take `generator_ema` where there is one beside `generator`.

    Raises:
        ValueError: If it cannot be read, or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        with readable(path):
            return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of many kinds, and some of them long
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} must be a torch checkpoint that holds tensors alone, in the zip archive that torch.save "
                "writes, but is cut off or something else; copy or download it again. One of torch before 1.6 must be "
                "written anew."
            ) from None
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))  # torch also tells how to trust it
        reason = f"it holds objects too ({found[1]})" if found else f"it cannot be read ({type(error).__name__})"
        raise ValueError(
            f"{path} must be a torch checkpoint that holds tensors alone, but {reason}; save its weights by name in a "
            "file of their own."
        ) from None
    for name in CONTAINERS if average else (*CONTAINERS[1:], CONTAINERS[0]):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not all(isinstance(weight, torch.Tensor) for weight in content.values()):
        raise ValueError(f"{path} must hold weights by name, alone or under {', '.join(CONTAINERS)}.")
    return content


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a file, without the weights, where its format allows that.

    Raises:
        ValueError: As `read_state`.
    """
    if Path(path).suffix != ".safetensors":
        return {name: tuple(weight.shape) for name, weight in read_state(path).items()}
    with readable(path), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
