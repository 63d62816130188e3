"""The kinds of checkpoints of the WAN family, told by their configs, and which of them a student can start from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel


TEXT_TO_VIDEO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Wan-AI/Wan2.1-T2V-14B-Diffusers or Wan-AI/Wan2.2-TI2V-5B-Diffusers"
OTHER_CLASSES = {
    "WanVACETransformer3DModel": "VACE, which has a second stack of layers for its controls",
    "WanAnimateTransformer3DModel": "WAN Animate, which follows a pose and a face",
    "SkyReelsV2Transformer3DModel": "SkyReels",
    "ChronoEditTransformer3DModel": "ChronoEdit",
}


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
        raise ValueError(f"{base} must be a text-to-video model of WAN, but it is {kind}; use {TEXT_TO_VIDEO}.")
    if vae is not None and vae["z_dim"] != transformer["in_channels"]:
        raise ValueError(
            f"transformer and VAE of {base} must have the same latent channels, but have {transformer['in_channels']} "
            f"and {vae['z_dim']}: they are parts of different models; use those of one."
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
    num_in, num_out = transformer["in_channels"], transformer["out_channels"]
    if transformer.get("image_dim") is not None or transformer.get("added_kv_proj_dim") is not None:
        return f"an image-to-video model that sees its picture through CLIP ({num_in} input channels)"
    if num_in != num_out:
        return f"a model of {num_in} input and {num_out} output channels, so that it needs pictures or controls"
    return None


def check_base(base: str, *, revision: str | None = None) -> None:
    """The same of a folder or a repository of the hub, by its configs alone.

    Raises:
        ValueError: If it is of another kind.
        OSError: If it is not there.
    """
    where = {"pretrained_model_name_or_path": base, "revision": revision}
    pipeline = WanPipeline.load_config(**where) if _has_index(base) else None
    check_kind(
        base,
        WanTransformer3DModel.load_config(**where, subfolder="transformer"),
        AutoencoderKLWan.load_config(**where, subfolder="vae"),
        pipeline,
    )


def _has_index(base: str) -> bool:
    return not Path(base).is_dir() or (Path(base) / WanPipeline.config_name).is_file()
