"""Makes the result of a run out of one of its checkpoints, without the machines that wrote it.

    python convert_checkpoint.py --input outputs/my-wan/checkpoint-500 --output outputs/my-wan-500

Whatever the strategy (one GPU, DDP, FSDP2, DeepSpeed), the output folder is what the run would have left had it ended
there: `transformer/` in diffusers format or the LoRA file, and `config.yaml`. `generate.py --checkpoint` takes it.
Checkpoints hold files in pickle format: convert only those that you wrote.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from causal_wan.checkpoints import read_weights
from causal_wan.config import parse_config, user_errors
from causal_wan.models import add_lora, causal_settings, load_transformer, save_lora, save_transformer
from causal_wan.transformer import CausalWanTransformer3DModel


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to convert."""

    input: str
    """`checkpoint-STEP` in the output folder of a run."""
    output: str
    """New folder."""
    use_ema: bool = True
    """Take the moving average if the checkpoint has one."""


def main(config: Config) -> None:
    """Reads the run's settings and the checkpoint's weights, and writes them as a result."""
    with user_errors():
        checkpoint, run = Path(config.input), read_run(config.input)
        if Path(config.output).exists():
            raise ValueError(f"output must be a new folder, but {config.output} exists.")
        transformer = make_empty_student(run)
        trainable = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
        weights = read_weights(checkpoint, trainable, average=config.use_ema)
    output = Path(config.output)
    if run["lora_rank"]:
        save_lora(transformer, weights, output)
    else:
        save_transformer(transformer, weights, output / "transformer")
    shutil.copy(checkpoint.parent / "config.yaml", output)
    print(f"saved: generate.py --checkpoint {output} --prompt '...'")


def read_run(checkpoint: str) -> dict:
    """The resolved config of the run that a checkpoint belongs to.

    Raises:
        ValueError: If it is not in the output folder of a run.
    """
    recipe = Path(checkpoint).resolve().parent / "config.yaml"
    if not (Path(checkpoint).is_dir() and recipe.is_file()):
        raise ValueError(
            f"input must be a checkpoint-STEP folder in the output folder of a run, with config.yaml beside it, got "
            f"{checkpoint}."
        )
    return yaml.safe_load(recipe.read_text())


def make_empty_student(run: dict) -> CausalWanTransformer3DModel:
    """The transformer that the run trains; its weights are not set."""
    transformer = load_transformer(
        run["pretrained_model_name_or_path"],
        generator_ckpt=run["generator_ckpt"],
        revision=run["revision"],
        dtype=torch.float32,
        empty=True,
        **causal_settings(run),
    )
    if run["lora_rank"]:
        add_lora(
            transformer,
            rank=run["lora_rank"],
            alpha=run["lora_alpha"] or run["lora_rank"],
            target_modules=run["lora_target_modules"],
        )
    return transformer


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
