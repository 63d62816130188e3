"""A student -> a diffusers folder that streams without this repository.

The folder is a whole WAN pipeline, which stock `WanPipeline` loads, with `pipeline.py` beside: a custom pipeline in
diffusers' sense, made of the modules of this package that sampling needs.
"""

import ast
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from causal_wan.weights.parts import check_text_parts
from causal_wan.weights.wan_names import check_weights_in


# In the order in which they build on each other.
SAMPLING_MODULES = (
    *("timesteps", "geometry", "blocks", "flow", "devices", "tables.prompt_schedules", "model.block_attention"),
    *("model.context_parallel", "model.control", "model.kv_cache", "model.text", "model.attention"),
    *("model.transformer", "model.conditions", "model.vae", "model.streaming_vae", "sampling.noise"),
    *("sampling.rollout", "sampling.controls", "sampling.prompt_changes", "sampling.arguments", "sampling.pipeline"),
)
PIPELINE_NAME = "pipeline.py"
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")
HEADER = '''"""A causal, few-step WAN pipeline in one file, for use without the repository that trained it.

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    for frames in pipeline.stream("a prompt", num_frames=81):
        ...  # those of a block, as soon as they exist

It takes the parts of any WAN text-to-video model. Made by a program out of the modules {modules}.
"""
'''


def bundle_pipeline() -> str:
    """The source of `CausalWanPipeline` and all that it needs of this package, as one module."""
    folder = Path(__file__).parents[1]
    parts = [HEADER.format(modules=", ".join(SAMPLING_MODULES))]
    for name in SAMPLING_MODULES:
        source = (folder / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in reversed(ast.parse(source).body):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if is_docstring or (isinstance(node, ast.ImportFrom) and node.module.startswith("causal_wan.")):
                del lines[node.lineno - 1 : node.end_lineno]
        parts.append(f"# --- {name} " + "-" * (113 - len(name)) + "\n\n" + "\n".join(lines).strip() + "\n")
    return "\n\n".join(parts)


def write_pipeline_file(folder: str | Path) -> None:
    """Writes `pipeline.py` into a folder."""
    (Path(folder) / PIPELINE_NAME).write_text(bundle_pipeline(), encoding="utf-8")


def export_pipeline(
    base: str,
    folder: str | Path,
    denoising_step_list: Sequence[float],
    *,
    sampler: str = "renoise",
    max_sequence_length: int = 512,
    revision: str | None = None,
) -> None:
    """Completes a folder with a `transformer` in it to a whole pipeline.

    Args:
        base: Diffusers folder or hub id with the other parts; they are copied.
        folder: Gets them, `model_index.json` and `pipeline.py`.
        denoising_step_list: Timesteps that the student is sampled at.
        sampler: How; see `CausalWanPipeline`.
        max_sequence_length: Tokens that prompts are padded to.
        revision: Of a hub repository.

    Raises:
        ValueError: If the base lacks a part.
    """
    source, target = Path(base), Path(folder)
    if not source.is_dir():
        patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
        source = Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    missing = [name for name in ("model_index.json", *PARTS) if not (source / name).exists()]
    if missing:
        raise ValueError(f"the base must be a whole WAN pipeline in diffusers format, but {base} lacks {missing}.")
    check_text_parts(str(source))
    for part in (part for part in PARTS if "vae" in part or "encoder" in part):
        check_weights_in(source / part, config=True)
    for part in PARTS:
        shutil.copytree(source / part, target / part)  # follows the links of the hub's cache
    index = make_index(json.loads((source / "model_index.json").read_text()))
    index |= {"denoising_step_list": list(denoising_step_list), "sampler": sampler}
    index |= {"max_sequence_length": max_sequence_length}
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_pipeline_file(target)


def make_index(of_base: dict[str, Any]) -> dict[str, Any]:
    """The base's model_index.json for a folder with `PARTS` and a transformer, and nothing else of the base in it."""
    settings = {name: value for name, value in of_base.items() if name in PARTS or not _is_part(value)}
    settings.pop("_name_or_path", None)
    of_student = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    return settings | of_student | {"transformer_2": [None, None], "boundary_ratio": None}


def _is_part(value: Any) -> bool:
    """Whether a value of a model_index.json names a library and a class."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str | None) for name in value)
