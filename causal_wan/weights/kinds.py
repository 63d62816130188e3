"""The kinds of checkpoints of the WAN family, told by their configs, and which of them a student can start from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin

from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.weights.parts import find_transformer
from causal_wan.weights.wan_names import read_shapes, strip_prefixes


TEXT_TO_VIDEO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan-AI/Wan2.1-T2V-14B-Diffusers or Wan-AI/Wan2.2-TI2V-5B-Diffusers"
CONDITIONS = "students of these take a first picture (--first_frame_probability) and control videos (--control_column)"
OTHER_CLASSES = {
    "WanVACETransformer3DModel": "VACE, which has a second stack of layers for its controls",
    "WanAnimateTransformer3DModel": "WAN Animate, which follows a pose and a face",
    "SkyReelsV2Transformer3DModel": "SkyReels",
    "ChronoEditTransformer3DModel": "ChronoEdit",
}
# In names of weights of transformers that see a picture through CLIP: diffusers' and WAN's own.
OF_PICTURES = ("image_embedder.", "add_k_proj.", "img_emb.", "k_img.")


# --- by configs ------------------------------------------------------------------------------------------------------


def check_base(base: str, *, generator_ckpt: str | None = None, revision: str | None = None) -> LatentGeometry:
    """Checks, by configs alone, that a student can start from a folder or a repository of the hub.

    Args:
        base: Diffusers folder or hub id.
        generator_ckpt: Weights in the place of the base's: a folder with a transformer, or a file.
        revision: Of a hub repository.

    Returns:
        How its videos and their latents measure up; a part that a folder lacks is taken for one of WAN 2.1.

    Raises:
        ValueError: If it is of another kind than WAN's text-to-video; says which, and what to use.
        OSError: If it is not there.
    """
    where = find_transformer(base, generator_ckpt, revision)
    transformer = _read_config(WanTransformer3DModel, **where) or {}
    vae = _read_config(AutoencoderKLWan, base, "vae", revision)
    check_kind(where["pretrained_model_name_or_path"], transformer, vae, _read_index(**where))
    if generator_ckpt is not None and Path(generator_ckpt).is_file():
        check_weights(generator_ckpt, read_shapes(generator_ckpt))
    return LatentGeometry.of(vae or {}, transformer)


def check_kind(
    base: str, transformer: Mapping[str, Any], vae: Mapping[str, Any] | None, pipeline: Mapping[str, Any] | None
) -> None:
    """Checks that a student can start from a checkpoint.

    Args:
        base: What it is called.
        transformer: Its config.
        vae: That of its VAE; None if there is none.
        pipeline: Its model_index.json; None if there is none.

    Raises:
        ValueError: If it is of another kind than WAN's text-to-video; says which, and what to use.
    """
    if kind := _other_kind(transformer, pipeline or {}):
        conditions = f"; {CONDITIONS}" if "picture" in kind or "control" in kind else ""
        raise ValueError(
            f"{base} must be a text-to-video model of WAN, but it is {kind}; use {TEXT_TO_VIDEO}{conditions}."
        )
    if vae is None or "in_channels" not in transformer:
        return
    num_latent, num_in = vae.get("z_dim", WAN.channels), transformer["in_channels"] // _num_inputs(transformer)
    if num_latent != num_in:
        raise ValueError(
            f"transformer and VAE of {base} must have the same latent channels, but have {num_in} and {num_latent}: "
            "they are parts of different models; use those of one."
        )


def _other_kind(transformer: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str | None:
    """What a checkpoint is that cannot be trained here, in words."""
    name = transformer.get("_class_name", "")
    if transformer.get("vace_layers") is not None:
        name = "WanVACETransformer3DModel"
    if name in OTHER_CLASSES:
        return OTHER_CLASSES[name]
    if name and not name.endswith("WanTransformer3DModel"):
        return f"a {name}"
    if (pipeline.get("transformer_2") or [None])[0] is not None:
        return (
            "one of two experts (WAN 2.2 A14B), each for a part of the noise levels, of which a student would have one"
        )
    num_in, num_out = (transformer.get(name, WAN.channels) for name in ("in_channels", "out_channels"))
    if transformer.get("image_dim") is not None or transformer.get("added_kv_proj_dim") is not None:
        return f"an image-to-video model that sees its picture through CLIP ({num_in} input channels)"
    if num_in != num_out * _num_inputs(transformer):
        return f"a model of {num_in} input and {num_out} output channels, so that it needs pictures or controls"
    return None


def _num_inputs(transformer: Mapping[str, Any]) -> int:
    """How many videos a transformer is given: the noisy one, and those that control a student."""
    return 1 + len(transformer.get("control_names") or ())


def _read_config(
    model_class: type[ConfigMixin], pretrained_model_name_or_path: str, subfolder: str, revision: str | None
) -> dict[str, Any] | None:
    """The config of a part; None if a folder lacks it."""
    folder = Path(pretrained_model_name_or_path)
    if folder.is_dir() and not (folder / subfolder / model_class.config_name).is_file():
        return None
    return model_class.load_config(pretrained_model_name_or_path, subfolder=subfolder or None, revision=revision)


def _read_index(pretrained_model_name_or_path: str, subfolder: str, revision: str | None) -> dict[str, Any] | None:
    """The model_index.json of the pipeline that a transformer lies in; None if it lies in none."""
    folder = Path(pretrained_model_name_or_path)
    if not folder.is_dir():
        return WanPipeline.load_config(pretrained_model_name_or_path, revision=revision)
    folder = folder if subfolder else folder.resolve().parent
    index = read_index(folder) or None
    if (folder / "transformer_2").is_dir():
        return {**(index or {}), "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    return index


# --- by weights ------------------------------------------------------------------------------------------------------


def check_weights(path: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """The same of weights without a config, in diffusers' or WAN's names; passes over what has neither.

    Args:
        path: What they are called.
        shapes: Of each weight by its name.

    Raises:
        ValueError: If they are of another kind, a LoRA, or in 8 bits with scales beside them.
    """
    shapes = strip_prefixes(shapes)
    if any(".lora_" in name for name in shapes):
        raise ValueError(
            f"{path} must be whole weights, but is a LoRA, which is added to such: generate.py --checkpoint BASE "
            f"--lora {path}."
        )
    if any(name == "scaled_fp8" or name.endswith((".scale_weight", ".weight_scale")) for name in shapes):
        raise ValueError(
            f"{path} must hold weights as they are, but has them scaled to 8 bits, with the scales beside them; use "
            "the file in 16 or 32 bits."
        )
    config: dict[str, Any] = {}
    patches = shapes.get("patch_embedding.weight", ())
    head = shapes.get("proj_out.weight", shapes.get("head.head.weight", ()))
    if len(patches) == 5 and head:
        config = {"in_channels": patches[1], "out_channels": head[0] // math.prod(patches[2:])}
    if any(name.startswith("vace_") for name in shapes):
        config["vace_layers"] = ()
    if any(part in name for name in shapes for part in OF_PICTURES):
        config["image_dim"] = 0
    check_kind(path, config, None, None)


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says of it; nothing if there is none.

    Raises:
        ValueError: If it cannot be read.
    """
    path = folder / "model_index.json"
    try:
        stated = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:  # of JSON, or of letters
        raise ValueError(f"{path} must be valid JSON: {error}; put it back as it was.") from None
    if not isinstance(stated, dict):
        raise ValueError(f"{path} must name the parts of a pipeline, got {type(stated).__name__}.")
    return stated
