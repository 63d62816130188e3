"""A teacher on disk -> its transformer, and what it is, told by the content of its weights."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from causal_wan.blocks import CausalConfig
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.results.run_record import find_run
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.weights.lora import LORA_WEIGHTS_NAME, load_lora
from causal_wan.weights.parts import find_part
from causal_wan.weights.transformer import load_transformer, load_transformer_config


WEIGHTS = {".json", ".safetensors"}


@dataclass(frozen=True)
class Teacher:
    """Where a teacher is.

    Attributes:
        base: Diffusers folder or hub id.
        revision: Of a hub repository.
        generator_ckpt: Weights in the place of the base's: a folder or a file; or None.
        lora: Folder with a LoRA on top; or None.
        causal: Its blocks and what they see.
        max_sequence_length: Tokens that prompts were padded to in its training; None if it is no run.
    """

    base: str
    revision: str | None
    generator_ckpt: str | None
    lora: Path | None
    causal: CausalConfig
    max_sequence_length: int | None = None

    def has_base(self, base: str, revision: str | None, generator_ckpt: str | None) -> bool:
        """Whether these are its weights, but for its LoRA."""
        pairs = ((self.base, base), (self.generator_ckpt, generator_ckpt))
        is_same_place = all(a == b or (a and b and Path(a).resolve() == Path(b).resolve()) for a, b in pairs)
        return bool(is_same_place) and self.revision == revision

    def has_base_of(self, other: Self) -> bool:
        """Whether the weights of two, but for their LoRAs, are the same."""
        return self.has_base(other.base, other.revision, other.generator_ckpt)


def find_teacher(teacher: str, base: str, revision: str | None) -> Teacher:
    """What a teacher is: of a run as it was trained, of any other folder as its configuration says.

    Args:
        teacher: Output folder of a run, diffusers folder, hub id or file of weights.
        base: Diffusers folder or hub id that a file of weights belongs to.
        revision: Of base, if it is a hub repository.

    Raises:
        ValueError: If it is none of these.
    """
    run = find_run(teacher, base if Path(teacher).is_file() else None)
    if run is None:
        own = revision if teacher == base else None
        return Teacher(teacher, own, None, None, CausalConfig.of(load_transformer_config(teacher, revision=own)))
    return Teacher(
        run.model.pretrained_model_name_or_path,
        run.model.revision,
        run.weights,
        run.folder if run.has_lora else None,
        run.causal,
        None if run.folder is None else run.model.max_sequence_length,
    )


def load_teacher(teacher: Teacher, dtype: torch.dtype, device: torch.device) -> CausalWanTransformer3DModel:
    """The teacher's transformer, frozen and in eval mode.

    Raises:
        ValueError: If weights do not fit.
    """
    transformer = load_transformer(
        teacher.base,
        teacher.causal,
        generator_ckpt=teacher.generator_ckpt,
        revision=teacher.revision,
        dtype=dtype,
        device=device,
    )
    add_own_lora(transformer, teacher)
    return transformer.requires_grad_(False).eval()


def add_own_lora(transformer: CausalWanTransformer3DModel, teacher: Teacher) -> None:
    """Adds the teacher's LoRA to its base, if it is one.

    Raises:
        ValueError: If it does not fit.
    """
    if teacher.lora is not None:
        _with_lora(transformer, teacher.lora)


def fuse_lora(transformer: CausalWanTransformer3DModel, folder: Path) -> None:
    """Adds the LoRA of a run to the weights.

    Raises:
        ValueError: If it does not fit.
    """
    pipeline = _with_lora(transformer, folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _with_lora(transformer: CausalWanTransformer3DModel, folder: Path) -> CausalWanPipeline:
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    load_lora(pipeline, folder, weight_name=LORA_WEIGHTS_NAME)
    return pipeline


def identify_teacher(teacher: Teacher, content_of: Callable[[Path], str]) -> str:
    """SHA-256 over the weights and configuration of a teacher; two folders with the same files are the same teacher.

    Args:
        teacher: From `find_teacher`.
        content_of: File -> SHA-256 of its bytes.
    """
    files: list[Path] = []
    if teacher.generator_ckpt is not None and Path(teacher.generator_ckpt).is_file():
        files.append(Path(teacher.generator_ckpt))
    elif teacher.generator_ckpt is not None:
        folder = Path(teacher.generator_ckpt)
        files += _weights_in(folder / "transformer" if (folder / "transformer").is_dir() else folder)
    else:
        files += _weights_in(find_part(teacher.base, "transformer", revision=teacher.revision))
    if teacher.lora is not None:
        files.append(teacher.lora / LORA_WEIGHTS_NAME)
    return hashlib.sha256(str([(path.name, content_of(path)) for path in files]).encode()).hexdigest()


def _weights_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS]
