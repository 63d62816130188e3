"""The parts of a WAN checkpoint: found, checked and loaded."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5EncoderModel

from causal_wan.progress import announced
from causal_wan.weights.wan_names import readable


# Precisions by the names of flags.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- loading ---------------------------------------------------------------------------------------------------------


def find_part(checkpoint: str, part: str, *, revision: str | None = None, download: bool = True) -> Path | None:
    """The folder of a part of a checkpoint, such as `vae`.

    Args:
        checkpoint: Diffusers folder or hub id.
        part: Name of the folder in it.
        revision: Of a hub repository.
        download: Whether to fetch what is not there; else it is None.

    Raises:
        OSError: If it is to be fetched and cannot be.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint) / part
    patterns = [f"{part}/*.{ending}" for ending in ("json", "model", "safetensors")]
    try:
        folder = snapshot_download(
            checkpoint, revision=revision, allow_patterns=patterns, local_files_only=not download
        )
    except LocalEntryNotFoundError:
        if download:
            raise
        return None
    found = Path(folder) / part
    return found if any(found.glob("*.safetensors")) or any(found.glob("*.model")) else None


def find_transformer(checkpoint: str, generator_ckpt: str | None, revision: str | None) -> dict[str, str | None]:
    """Where the transformer lies: what `from_pretrained` and `load_config` want to know.

    Args:
        checkpoint: Diffusers folder or hub id.
        generator_ckpt: A folder with a transformer in the place of the checkpoint's, or whatever else is none.
        revision: Of a hub repository.
    """
    if generator_ckpt is not None and Path(generator_ckpt).is_dir():
        subfolder = "transformer" if (Path(generator_ckpt) / "transformer").is_dir() else ""
        return {"pretrained_model_name_or_path": generator_ckpt, "subfolder": subfolder, "revision": None}
    return {"pretrained_model_name_or_path": checkpoint, "subfolder": "transformer", "revision": revision}


def load_vae(
    pretrained_model_name_or_path: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> AutoencoderKLWan:
    """Loads the VAE, frozen and in eval mode."""
    with announced(f"loading the VAE of {pretrained_model_name_or_path}"):
        vae = AutoencoderKLWan.from_pretrained(
            pretrained_model_name_or_path, subfolder="vae", dtype=dtype, revision=revision, use_safetensors=True
        )
    return vae.requires_grad_(False).eval()


def load_vae_config(pretrained_model_name_or_path: str, *, revision: str | None = None) -> AutoencoderKLWan:
    """The VAE without weights, for what its config tells."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(
            AutoencoderKLWan.load_config(pretrained_model_name_or_path, subfolder="vae", revision=revision)
        )


def check_text_parts(checkpoint: str) -> None:
    """Checks what `transformers` reads of a folder without saying which file it cannot read, if it is one.

    Args:
        checkpoint: Diffusers folder or hub id.

    Raises:
        ValueError: If the tokenizer or the configuration of the text encoder is missing or damaged.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return
    wanted = {"text_encoder": ("config.json",), "tokenizer": ("tokenizer.json", "spiece.model")}
    for part, names in wanted.items():
        if not any((folder / part / name).is_file() for name in names):
            raise ValueError(
                f"{folder / part} must be a whole part in diffusers format, but lacks {' and '.join(names)}; copy or "
                "download it again."
            )
    for path in sorted((folder / "tokenizer").glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # of JSON, or of letters
            raise ValueError(
                f"{path} must be valid JSON, but is cut off or something else; copy or download it again."
            ) from None


def load_text_encoder(
    pretrained_model_name_or_path: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    """Loads tokenizer and UMT5 text encoder, frozen and in eval mode, straight to the device."""
    name = pretrained_model_name_or_path
    check_text_parts(name)
    with announced(f"loading the text encoder of {name}"), readable(f"the text encoder of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", revision=revision)
        text_encoder = UMT5EncoderModel.from_pretrained(
            name,
            subfolder="text_encoder",
            dtype=dtype,
            revision=revision,
            device_map={"": device},
            use_safetensors=True,
        )
    return tokenizer, text_encoder.requires_grad_(False).eval()
