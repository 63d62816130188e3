"""Whether a checkpoint is whole, and whether a run can go on from it: told by names, shapes and lengths of its files.

Weights and states of optimizers are not read for this. `causal_wan.records.checkpoints` writes and finds checkpoints.
"""

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


TRAINABLE_WEIGHTS_NAME = "trainable.safetensors"
EMA_NAME = "ema"
FSDP_NAME, FSDP_OPTIMIZER_NAME = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's names, as those that follow
DEEPSPEED_NAME = "pytorch_model"
WHOLE_NAMES = (TRAINABLE_WEIGHTS_NAME, "model.safetensors")
OPTIMIZER_NAME, SCALER_NAME = "optimizer.bin", "scaler.pt"
SCHEDULER_NAME = "scheduler.bin"
STATE_NAMES = ("random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")

OPTIMIZER_STATES = {"adamw": "exp_avg", "adamw8bit": "state1"}
"""A state that only this optimizer has."""


# --- is it whole? ----------------------------------------------------------------------------------------------------


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint: one is missing, cut off or of another kind; None is nothing.

    Bits that changed within a file are not seen.
    """
    try:
        return _find_damage(checkpoint)
    except OSError as error:
        return f"it cannot be read ({error})"


def find_damage_of_weights(checkpoint: Path) -> str | None:
    """What is wrong with the weights of a checkpoint, its average included; its other states do not count."""
    try:
        strategy = find_strategy(checkpoint)
        if strategy is None:
            return "it has no weights"
        parts = [_damage_of_weights(checkpoint, strategy, 0)]
        if (checkpoint / EMA_NAME).is_dir():
            parts.append(_damage_of_shards(checkpoint / EMA_NAME))
        return next((damage for part in parts for damage in part), None)
    except OSError as error:
        return f"it cannot be read ({error})"


def _find_damage(checkpoint: Path) -> str | None:
    if not any(checkpoint.iterdir()):
        return "it is empty"
    strategy = find_strategy(checkpoint)
    if strategy is None:
        return "it has no weights"
    parts = [_damage_of_trainee(checkpoint, strategy, place) for place in range(count_trainees(checkpoint))]
    parts += [_damage_of_archive(checkpoint / name) for name in STATE_NAMES]
    return next((damage for part in parts for damage in part), None)


def _damage_of_trainee(checkpoint: Path, strategy: str, place: int) -> Iterator[str]:
    yield from _damage_of_weights(checkpoint, strategy, place)
    if strategy == "FSDP2":
        yield from _damage_of_shards(checkpoint / at_place(FSDP_OPTIMIZER_NAME, place))
    elif strategy != "DeepSpeed":
        yield from _damage_of_archive(checkpoint / at_place(OPTIMIZER_NAME, place))
    yield from _damage_of_archive(checkpoint / at_place(SCHEDULER_NAME, place))
    if (checkpoint / at_place(EMA_NAME, place)).is_dir():
        yield from _damage_of_shards(checkpoint / at_place(EMA_NAME, place))


def _damage_of_weights(checkpoint: Path, strategy: str, place: int) -> Iterator[str]:
    """With DeepSpeed, of the optimizer's states as well, which hold the weights in float32."""
    if strategy == "FSDP2":
        yield from _damage_of_shards(checkpoint / at_place(FSDP_NAME, place))
    elif strategy == "DeepSpeed":
        yield from _damage_of_deepspeed(checkpoint / at_place(DEEPSPEED_NAME, place))
    else:
        weights = [checkpoint / at_place(name, place) for name in WHOLE_NAMES]
        yield from _damage_of_safetensors(next(filter(Path.is_file, weights), weights[-1]))


def _damage_of_safetensors(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        yield f"{path.name} is damaged ({error})"


def _damage_of_archive(path: Path) -> Iterator[str]:
    """Of a file of `torch.save`: a zip archive, whose list of contents is its end."""
    if not path.is_file():
        yield f"{path.name} is missing"
    elif not zipfile.is_zipfile(path):
        yield f"{path.name} is damaged (cut off, or not a file of torch.save)"


def _damage_of_shards(folder: Path) -> Iterator[str]:
    """Of a folder of torch.distributed.checkpoint."""
    if not (folder / ".metadata").is_file():
        yield f"{folder.name}/.metadata is missing"
        return
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:  # a pickle: whatever its bytes make of it
        yield f"{folder.name}/.metadata is damaged ({type(error).__name__})"
        return
    ends: dict[str, int] = {}
    for place in stored:
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (folder / name).is_file():
            yield f"{folder.name}/{name} is missing"
        elif (folder / name).stat().st_size < end:
            yield f"{folder.name}/{name} is cut off"


def _damage_of_deepspeed(folder: Path) -> Iterator[str]:
    files = sorted(folder.glob("*.pt"))
    for part in ("model_states", "optim_states"):
        if not any(path.stem.endswith(part) for path in files):
            yield f"{folder.name}/*_{part}.pt is missing"
    for path in files:
        for damage in _damage_of_archive(path):
            yield f"{folder.name}/{damage}"


# --- does it fit? ----------------------------------------------------------------------------------------------------


def check_strategy(checkpoint: Path, accelerator: Any) -> None:
    """Checks that the strategy of the run reads what that of the checkpoint wrote.

    Raises:
        ValueError: If not.
    """
    names = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}
    ours, theirs = names.get(accelerator.distributed_type, "one process or DDP"), find_strategy(checkpoint)
    if ours != theirs:
        raise ValueError(
            f"a checkpoint must be resumed by the strategy that wrote it, {theirs}, but this run is launched with "
            f"{ours}; launch as before, or start from its weights: convert_checkpoint.py --input {checkpoint} "
            "--output WEIGHTS, then --generator_ckpt WEIGHTS with another --output_dir."
        )


def check_process_count(checkpoint: Path, num_processes: int) -> None:
    """Checks that as many processes wrote a checkpoint as are to read it.

    Raises:
        ValueError: If not.
    """
    written_by = len(list(checkpoint.glob("random_states_*.pkl")))
    if written_by != num_processes:
        raise ValueError(
            f"a DeepSpeed checkpoint must be resumed by as many processes as wrote it, {written_by}, got "
            f"{num_processes}; launch with --num_processes {written_by}, or train with accelerate_configs/fsdp2.yaml, "
            "whose checkpoints any number can resume."
        )


def check_trainees(checkpoint: Path, roles: list[str]) -> None:
    """Checks that the run of a checkpoint has trained as many models.

    Raises:
        ValueError: If not.
    """
    if (trained := count_trainees(checkpoint)) != len(roles):
        raise ValueError(
            f"{checkpoint} must come from a run that trains {len(roles)} model(s), {' and '.join(roles)}, but holds "
            f"{trained}; resume one of the same script."
        )


def check_weights(checkpoint: Path, trainable: dict[str, torch.Tensor], place: int = 0) -> None:
    """Checks that a checkpoint has the weights that a run trains, by names and shapes.

    Args:
        checkpoint: A whole one; DeepSpeed's are not looked into.
        trainable: Weights by name, whole or sharded.
        place: Of the trainee among those of the run.

    Raises:
        ValueError: If it has others.
    """
    saved = _saved_shapes(checkpoint, place)
    if saved is None:
        return
    # Frozen weights are among them, if there are any.
    is_all = not (checkpoint / at_place(TRAINABLE_WEIGHTS_NAME, place)).is_file()
    differing = [name for name, weight in trainable.items() if saved.get(name) != tuple(weight.shape)]
    extra = [] if is_all else sorted(saved.keys() - trainable.keys())
    adapters = [any("lora_" in name for name in names) for names in (saved, trainable)]
    if not differing and not extra and adapters[0] == adapters[1]:
        return
    kinds = ["LoRA adapters" if has_adapters else "all weights" for has_adapters in adapters]
    if kinds[0] != kinds[1]:
        reason = f"it trains {kinds[0]}, this run {kinds[1]}"
    else:
        name = (differing or extra)[0]
        shapes = [names.get(name, "not there") for names in (saved, {n: tuple(w.shape) for n, w in trainable.items()})]
        reason = f"{len(differing) + len(extra)} weights differ, e.g. {name}: {shapes[0]} there, {shapes[1]} here"
    raise ValueError(
        f"{checkpoint} must come from a run that trains the same weights, but {reason}. Use the --lora_rank, "
        "--lora_target_modules and checkpoint of that run, or start from its weights: convert_checkpoint.py --input "
        f"{checkpoint} --output WEIGHTS, then --generator_ckpt WEIGHTS with another --output_dir."
    )


def _saved_shapes(checkpoint: Path, place: int) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the weights in a checkpoint; None where they are not told without reading it."""
    for path in filter(Path.is_file, (checkpoint / at_place(name, place) for name in WHOLE_NAMES)):
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shards = checkpoint / at_place(FSDP_NAME, place)
    if shards.is_dir():
        stored = dcp.FileSystemReader(shards).read_metadata().state_dict_metadata
        return {
            name.removeprefix("model."): tuple(facts.size)
            for name, facts in stored.items()
            if isinstance(facts, TensorStorageMetadata)
        }
    return None


def check_average(checkpoint: Path, place: int = 0) -> None:
    """Checks that a checkpoint has a moving average.

    Raises:
        ValueError: If it has none.
    """
    if not (checkpoint / at_place(EMA_NAME, place)).is_dir():
        raise ValueError(
            f"{checkpoint} must come from a run with use_ema, but holds no moving average; resume without --use_ema, "
            "or start anew with it."
        )


def check_optimizer(checkpoint: Path, optimizer: str, place: int = 0) -> None:
    """Checks that the states in a checkpoint are those of an optimizer, `adamw` or `adamw8bit`.

    Raises:
        ValueError: If they are another's.
    """
    path = checkpoint / at_place(OPTIMIZER_NAME, place)
    if not path.is_file():  # sharded: the strategies have one optimizer only
        return
    try:
        names = set(_names(torch.load(path, mmap=True, weights_only=True)["state"]))
    except Exception as error:  # zipped, but not what torch.save writes of an optimizer
        raise ValueError(f"{checkpoint} must be whole, but its {path.name} is damaged; resume another one.") from error
    saved = next((kind for kind, name in OPTIMIZER_STATES.items() if name in names), optimizer)
    if saved != optimizer:
        raise ValueError(
            f"{checkpoint} must come from a run with the same optimizer, which was {saved}, got {optimizer}; use "
            f"--optimizer {saved}, or start from its weights: convert_checkpoint.py --input {checkpoint} --output "
            "WEIGHTS, then --generator_ckpt WEIGHTS with another --output_dir."
        )


def _names(states: dict[Any, Any]) -> Iterator[Any]:
    """Of the states, however deep: bitsandbytes keeps its own in a dict of their own."""
    for name, state in states.items():
        yield name
        if isinstance(state, dict):
            yield from _names(state)


# --- how was it written? ---------------------------------------------------------------------------------------------


def find_strategy(checkpoint: Path) -> str | None:
    """How a checkpoint was written: whole (one process or DDP), FSDP2 or DeepSpeed; None if it holds no weights."""
    if (checkpoint / FSDP_NAME).is_dir():
        return "FSDP2"
    if (checkpoint / DEEPSPEED_NAME).is_dir():
        return "DeepSpeed"
    if any((checkpoint / name).is_file() for name in WHOLE_NAMES):
        return "one process or DDP"
    return None


def count_trainees(checkpoint: Path) -> int:
    """How many models a run has trained that left a checkpoint."""
    names = (FSDP_NAME, DEEPSPEED_NAME, *WHOLE_NAMES, OPTIMIZER_NAME, FSDP_OPTIMIZER_NAME, SCHEDULER_NAME)

    def is_there(place: int) -> bool:
        return any((checkpoint / at_place(name, place)).exists() for name in names)

    return len(list(itertools.takewhile(is_there, itertools.count())))


def at_place(name: str, place: int) -> str:
    """What a file or folder of the first trainee is called if it is that of another: accelerate numbers them."""
    if name.endswith("_0"):
        return f"{name[:-1]}{place}"
    stem, dot, suffix = name.partition(".")
    return f"{stem}_{place}{dot}{suffix}" if place else name
