"""The transformer of a checkpoint: found, loaded as a causal one, saved."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig

from causal_wan.blocks import CausalConfig
from causal_wan.model.control import widen_for_controls
from causal_wan.model.transformer import CausalWanTransformer3DModel, whole_config
from causal_wan.progress import announced
from causal_wan.weights.parts import find_transformer
from causal_wan.weights.wan_names import WEIGHTS_SUFFIXES, read_state, strip_prefixes, to_diffusers


def load_transformer(
    pretrained_model_name_or_path: str,
    causal: CausalConfig | None,
    *,
    generator_ckpt: str | None = None,
    control_names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    quantization: BitsAndBytesConfig | None = None,
    empty: bool = False,
) -> CausalWanTransformer3DModel:
    """Loads a WAN transformer as a causal one.

    Args:
        pretrained_model_name_or_path: Diffusers folder or hub id of a WAN pipeline.
        causal: Its blocks and what they see; None is what its own config says.
        generator_ckpt: Weights to start from in the place of the base model's: a diffusers transformer folder, a
            folder with a `transformer` folder in it (the result of a run), or a safetensors file in diffusers' names.
        control_names: Of the control videos that it is to follow; None are those of its own config.
        dtype: Of the weights; time embedding, tables and norms stay float32 as in diffusers.
        revision: Of a hub repository.
        device: Where the weights go, one after another; there is no whole copy elsewhere.
        quantization: How to quantize the layers; they then go to the current GPU.
        empty: Leave the weights unset, on the CPU, where they take no memory until they are written: for processes
            that get them from another.

    Raises:
        ValueError: If `generator_ckpt` does not fit; names the first keys that do not. If it follows other controls.
    """
    settings = {} if causal is None else causal.as_dict()
    where = find_transformer(pretrained_model_name_or_path, generator_ckpt, revision)
    if empty:
        return _empty_transformer(where, dtype, settings, control_names)
    with announced(f"loading the transformer of {where['pretrained_model_name_or_path']}"):
        transformer = CausalWanTransformer3DModel.from_pretrained(
            **where,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            quantization_config=quantization,
            device_map=None if quantization else {"": device},
            **settings,
        )
        transformer.requires_grad_(quantization is None)  # loaded straight to a device, weights may come frozen
        if generator_ckpt is not None and Path(generator_ckpt).is_file():
            load_generator_file(transformer, generator_ckpt)
    if control_names is not None:
        widen_for_controls(transformer, control_names)
    return transformer


def load_transformer_config(
    pretrained_model_name_or_path: str, *, generator_ckpt: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The configuration of what `load_transformer` loads."""
    return CausalWanTransformer3DModel.load_config(
        **find_transformer(pretrained_model_name_or_path, generator_ckpt, revision)
    )


def _empty_transformer(
    where: dict[str, str | None],
    dtype: torch.dtype,
    settings: dict[str, Any],
    control_names: Sequence[str] | None,
) -> CausalWanTransformer3DModel:
    """A transformer of the dtypes that `from_pretrained` gives, whose weights are not set; its config changed so."""
    model_class = CausalWanTransformer3DModel
    with torch.device("meta"):
        transformer = model_class.from_config(model_class.load_config(**where), **settings)
        if control_names is not None:
            widen_for_controls(transformer, control_names)
    transformer.to_empty(device="cpu")
    config = transformer.config
    transformer.rope = type(transformer.rope)(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    for name, parameter in transformer.named_parameters():
        if not set(model_class._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    return transformer


def check_generator_ckpt(generator_ckpt: str | None, name: str = "generator_ckpt") -> None:
    """Checks, before anything is loaded, that a path can hold a generator.

    Args:
        generator_ckpt: The path.
        name: Of the setting, for the error.

    Raises:
        ValueError: If it does not exist, or is neither a transformer folder nor a file of weights.
    """
    if generator_ckpt is None:
        return
    path = Path(generator_ckpt)
    if path.is_dir() and any((path / sub / "config.json").is_file() for sub in ("", "transformer")):
        return
    if not (path.is_file() and path.suffix in WEIGHTS_SUFFIXES):
        raise ValueError(
            f"{name} must be a diffusers transformer folder (with config.json, or with transformer/config.json in it) "
            f"or a .safetensors or .pt file, got {generator_ckpt!r}"
            + (", which does not exist." if not path.exists() else ".")
        )


def load_generator_file(transformer: CausalWanTransformer3DModel, path: str) -> None:
    """Loads a file of weights in diffusers' or WAN's names into a transformer, all keys or none.

    Raises:
        ValueError: If keys or shapes differ; names the first of them.
    """
    weights, expected = strip_prefixes(read_state(path)), transformer.state_dict()
    if weights.keys() != expected.keys():
        with contextlib.suppress(ValueError):  # names that are nobody's are reported below
            weights = to_diffusers(weights)
    unexpected = [key for key in weights if key not in expected]
    missing = [key for key in expected if key not in weights]
    reshaped = [key for key in weights if key in expected and weights[key].shape != expected[key].shape]
    for problem, keys in (("unexpected", unexpected), ("missing", missing), ("of another shape", reshaped)):
        if keys:
            raise ValueError(
                f"generator_ckpt {path} must have the names and shapes of the base transformer, but {len(keys)} keys "
                f"are {problem}, first {', '.join(keys[:5])}; give the weights of the same architecture in diffusers "
                "format."
            )
    transformer.load_state_dict(weights)


def save_transformer(
    transformer: CausalWanTransformer3DModel, weights: dict[str, torch.Tensor], folder: str | Path
) -> None:
    """Writes a folder in diffusers format: the configuration of `transformer`, and these weights.

    Raises:
        RuntimeError: If the weights are not those of the configuration.
    """
    with torch.device("meta"):  # takes the weights as they are, without room for others
        plain = type(transformer).from_config(whole_config(transformer))
    plain.load_state_dict(weights, assign=True)
    plain.save_pretrained(folder)
