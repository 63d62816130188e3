"""Makes the result of a run out of one of its checkpoints; turns WAN's own names of weights into diffusers', or back.

    python convert_checkpoint.py --input outputs/my-wan/checkpoint-500 --output outputs/my-wan-500
    python convert_checkpoint.py --input self_forcing_dmd.pt --output outputs/self-forcing
    python convert_checkpoint.py --input outputs/my-wan --output my-wan.pt --to original
    python convert_checkpoint.py --input outputs/my-lora --output my-lora.safetensors --to comfyui
    python convert_checkpoint.py --input outputs/my-wan --output outputs/my-wan-pipeline --to pipeline

Whatever the strategy (one GPU, DDP, FSDP2, DeepSpeed), the first makes what the run would have left had it ended
there: `transformer/` in diffusers format or the LoRA file, and `config.yaml`. `generate.py --checkpoint` takes it.
Checkpoints of runs hold files in pickle format: convert only those that you wrote.

The others read a safetensors file, a `.pt` of CausVid or Self Forcing (as tensors alone), or a folder with weights in
diffusers format, and change names only. A `.pt` with WAN's names is what Self Forcing's own inference reads.
LoRAs of runs, diffusers, peft, ComfyUI and kohya (musubi-tuner) go from any form to any other, as they are.
`--to pipeline` makes a whole diffusers folder, which stock `WanPipeline` loads, and which streams without this
repository: it has a custom pipeline in it (`causal_wan/results/export.py`).
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from causal_wan.config.choices import LocalPath, LoraNames
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import parse_config, user_errors, write_recipe
from causal_wan.config.ranges import PositiveInt, checked_dataclass


@checked_dataclass
class Config:
    """What to convert."""

    input: LocalPath
    """`checkpoint-STEP` in the output folder of a run; or weights, or a LoRA: a file or a folder of diffusers."""
    output: LocalPath
    """New folder; with `to` original, comfyui or kohya a new .safetensors, or, of whole weights, .pt."""
    to: LoraNames | Literal["pipeline"] = "diffusers"
    """Names of the weights in the output (kohya is for LoRAs, and original is comfyui there); or a whole pipeline."""
    pretrained_model_name_or_path: LocalPath | None = None
    """Where a pipeline's VAE and text encoder are: None is what the run was made from, or WAN's own."""
    use_ema: bool = True
    """Take the moving average if the checkpoint has one."""
    attention_head_dim: PositiveInt | None = None
    """Of the transformer that the weights are of; None is what the config of a folder says, and 128, as in all WAN
    models, for a file."""


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__)

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from causal_wan.config.changed_settings import SETTINGS_NAME
from causal_wan.model.control import PATCH_EMBEDDING_NAME
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.progress import announced
from causal_wan.records.checkpoint_checks import find_damage_of_weights
from causal_wan.records.checkpoint_weights import read_weights
from causal_wan.records.checkpoints import check_is_no_checkpoint, is_checkpoint
from causal_wan.results.export import export_pipeline
from causal_wan.results.run_record import RunRecord, base_of, find_run
from causal_wan.results.student import find_layout, resolve_settings
from causal_wan.results.teacher import fuse_lora
from causal_wan.weights.kinds import check_base, check_weights
from causal_wan.weights.lora import LORA_WEIGHTS_NAME, add_lora, save_lora
from causal_wan.weights.lora_names import find_lora, lora_file, read_lora
from causal_wan.weights.transformer import load_transformer, save_transformer
from causal_wan.weights.wan_names import (
    COMFYUI_PREFIX,
    WAN_HEAD_DIM,
    check_weights_in,
    infer_architecture,
    read_state,
    to_diffusers,
    to_original,
)


def main(config: Config) -> None:
    """Converts a checkpoint of a run, or weights."""
    with user_errors(), removing_half_of(Path(config.output)), announced(f"converting {config.input}"):
        if config.to == "pipeline":
            make_pipeline(config)
        elif is_checkpoint(Path(config.input)):
            convert_checkpoint(config)
        else:
            lora = find_lora(config.input)
            convert_lora(config, lora) if lora else convert_weights(config)


@contextlib.contextmanager
def removing_half_of(output: Path) -> Iterator[None]:
    """Removes what its body has begun to write when it fails: a full disk, Ctrl-C."""
    is_new = not output.exists()
    try:
        yield
    except BaseException:
        if is_new and output.is_dir():
            shutil.rmtree(output, ignore_errors=True)
        elif is_new and output.is_file():
            output.unlink()
        raise


def convert_lora(config: Config, path: Path) -> None:
    """Reads a LoRA in any names, and writes it in those that are wanted.

    Raises:
        ValueError: If input or output cannot be used.
    """
    check_has_no_controls(path.parent / PATCH_EMBEDDING_NAME)
    output = check_output(config, (".safetensors",))
    lora, kept = read_lora(path)
    state, metadata = lora_file(lora, config.to)
    file = output / LORA_WEIGHTS_NAME if config.to == "diffusers" else output
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={**kept, **metadata})
    print(f"saved: {file}")


def check_has_no_controls(path: Path) -> None:
    """Checks that a student follows no control videos, which have no place in the files of other tools.

    Args:
        path: Its patch embedding beside a LoRA, or its config.json; need not be there.

    Raises:
        ValueError: If it does.
    """
    has_controls = path.is_file() and (path.suffix != ".json" or json.loads(path.read_text()).get("control_names"))
    if has_controls:
        raise ValueError(
            f"{path.parent} follows control videos, for which WAN's names and files of LoRAs have no place; use it as "
            "it is, in diffusers' format, or make a whole pipeline of it with --to pipeline."
        )


def convert_weights(config: Config) -> None:
    """Reads weights in any names, and writes them in those that are wanted.

    Raises:
        ValueError: If input or output cannot be used.
    """
    if config.to == "kohya":
        raise ValueError(f"--to kohya must be of a LoRA, but {config.input} is none; use --to original or comfyui.")
    for place in ("config.json", "transformer/config.json"):
        check_has_no_controls(Path(config.input, place))
    output = check_output(config, (".safetensors", ".pt"))
    if Path(config.input).is_dir():
        check_base(config.input, generator_ckpt=config.input)
    weights = read_weights_of(Path(config.input), average=config.use_ema)
    check_weights(config.input, {name: weight.shape for name, weight in weights.items()})
    state = to_diffusers(weights)
    if config.to == "diffusers":
        architecture = infer_architecture(state, find_head_dim(config))
        with torch.device("meta"):
            transformer = WanTransformer3DModel(**architecture)
        transformer.load_state_dict(state, assign=True)
        transformer.save_pretrained(output / "transformer")
    else:
        prefix = COMFYUI_PREFIX if config.to == "comfyui" else ""
        state = {prefix + name: weight.contiguous() for name, weight in to_original(state).items()}
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.suffix == ".pt":
            save_torch({"generator": {f"model.{name}": weight for name, weight in state.items()}}, output)
        else:
            save_file(state, output, metadata={"format": "pt"})
    print(f"saved: {output}")


def save_torch(content: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """Writes a `.pt` file.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # as torch reports a full disk
        raise OSError(f"{path} could not be written: {error}") from error


def check_output(config: Config, suffixes: tuple[str, ...] = ()) -> Path:
    """The output: a new folder of diffusers' names or of a pipeline, or a new file with one of the suffixes.

    Raises:
        ValueError: If it is not.
    """
    output, in_folder = Path(config.output), config.to in ("diffusers", "pipeline")
    is_fit = output.suffix not in (".safetensors", ".pt", ".pth") if in_folder else output.suffix in suffixes
    if output.exists() or not is_fit:
        wanted = "folder" if in_folder else f"file that ends in {' or '.join(suffixes)}"
        raise ValueError(f"output must be a new {wanted}, got {output}" + (", which exists." * output.exists() or "."))
    check_output_folder("output", output.parent)
    return output


def read_weights_of(path: Path, *, average: bool) -> dict[str, torch.Tensor]:
    """The weights in a file, or in a folder in diffusers format.

    Raises:
        ValueError: If there are none.
    """
    if path.is_file():
        return read_state(path, average=average)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    if not files:
        check_is_no_checkpoint("input", path)
        raise ValueError(
            "input must be a checkpoint-STEP folder of a run, a .safetensors or .pt file, or a folder with weights in "
            f"diffusers format, got {path}."
        )
    return {name: weight for file in files for name, weight in read_state(file).items()}


def find_head_dim(config: Config) -> int:
    """The width of the heads of the input's attention, which its weights do not tell."""
    if config.attention_head_dim is not None:
        return config.attention_head_dim
    for path in (Path(config.input, "transformer", "config.json"), Path(config.input, "config.json")):
        if path.is_file():
            return json.loads(path.read_text()).get("attention_head_dim", WAN_HEAD_DIM)
    return WAN_HEAD_DIM


def make_pipeline(config: Config) -> None:
    """Writes a student as a whole pipeline; adapters become part of the weights.

    Raises:
        ValueError: If input or output cannot be used.
    """
    output, run = check_output(config), find_run(config.input, config.pretrained_model_name_or_path)
    base, revision = base_of(config.input, run)
    find_layout(config.input, run)  # refuses other kinds of models
    settings, student = resolve_settings(run, student=config.input), Path(config.input)
    if (student / "transformer").is_dir():
        check_weights_in(student / "transformer", config=True)
        CausalWanTransformer3DModel.load_config(student / "transformer")
        shutil.copytree(student / "transformer", output / "transformer")
    else:
        transformer = load_untrained(run) if run is not None else load_transformer(base, None)
        if (student / LORA_WEIGHTS_NAME).is_file():
            fuse_lora(transformer, student)
        transformer.save_pretrained(output / "transformer")
    export_pipeline(
        base,
        output,
        settings.timesteps,
        sampler=settings.sampler,
        max_sequence_length=settings.max_sequence_length,
        revision=revision,
    )
    if run is not None:  # for generate.py and the model card: the size of its videos, and how it was trained
        write_recipe(run.public_settings(), output / SETTINGS_NAME)
    print(f"saved: generate.py --checkpoint {output} --prompt '...'")


def convert_checkpoint(config: Config) -> None:
    """Reads the run's settings and the checkpoint's weights, and writes them as a result.

    Raises:
        ValueError: If input or output cannot be used.
    """
    if config.to != "diffusers":
        raise ValueError("a checkpoint of a run goes to diffusers first; convert the result with --to after that.")
    checkpoint, run = Path(config.input), RunRecord.of_checkpoint(Path(config.input))
    output = check_output(config)
    if damage := find_damage_of_weights(checkpoint):
        raise ValueError(f"{checkpoint} must be a whole checkpoint of a run, but {damage}; use another one.")
    transformer = make_empty_student(run)
    trainable = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    weights = read_weights(checkpoint, trainable, average=config.use_ema)
    if run.model.lora_rank:
        save_lora(transformer, weights, output)
    else:
        save_transformer(transformer, weights, output / "transformer")
    write_recipe(run.settings, output / SETTINGS_NAME)
    print(f"saved: generate.py --checkpoint {output} --prompt '...'")


def make_empty_student(run: RunRecord) -> CausalWanTransformer3DModel:
    """The transformer that the run trains; its weights are not set."""
    transformer, model = load_untrained(run, empty=True), run.model
    if model.lora_rank:
        add_lora(
            transformer,
            rank=model.lora_rank,
            alpha=model.lora_alpha or model.lora_rank,
            target_modules=model.lora_target_modules,
        )
    return transformer


def load_untrained(run: RunRecord, *, empty: bool = False) -> CausalWanTransformer3DModel:
    """The transformer that a run began with, in float32."""
    return load_transformer(
        run.model.pretrained_model_name_or_path,
        run.causal,
        generator_ckpt=run.model.generator_ckpt,
        control_names=run.data.control_column,
        revision=run.model.revision,
        empty=empty,
    )


if __name__ == "__main__":
    main(config)
