"""Checkpoints of a run: written beside and renamed, found again, rotated."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.distributed import is_initialized
from torch.distributed.checkpoint import CheckpointException

from causal_wan.config.changed_settings import SETTINGS_NAME
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import write_recipe
from causal_wan.processes import cpu_group, gather_lists, wait_for_all
from causal_wan.records.checkpoint_checks import EMA_NAME, SCHEDULER_NAME, at_place, find_damage


logger = logging.getLogger(__name__)


def check_output_dir(output_dir: str | Path, resume_from_checkpoint: str | None) -> None:
    """Checks that a new run does not write among the checkpoints of an older one, and that one to resume is there.

    Raises:
        ValueError: If so.
    """
    check_output_folder("output_dir", output_dir)
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and resume_from_checkpoint is None:
        raise ValueError(
            f"output_dir must be new, or the run in it resumed, but {output_dir} holds {checkpoints[-1].name}; add "
            "--resume_from_checkpoint latest to go on, or use another --output_dir."
        )
    find_checkpoint(resume_from_checkpoint, output_dir)


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> Path | None:
    """The checkpoint to resume from; None starts anew. `latest` passes over those that are damaged.

    Raises:
        ValueError: If a path is given that is no checkpoint, or a damaged one; if all are damaged.
    """
    if resume_from_checkpoint is None:
        return None
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        whole = next((path for path in reversed(checkpoints) if find_damage(path) is None), None)
        if checkpoints and whole is None:
            raise ValueError(
                f"at least one checkpoint in {output_dir} must be whole, but none is "
                f"({describe_damaged(checkpoints)}); remove them to start anew."
            )
        return whole
    path = Path(resume_from_checkpoint)
    if not path.is_dir():
        path = Path(output_dir) / resume_from_checkpoint
    if not path.is_dir():
        names = ", ".join(checkpoint.name for checkpoint in checkpoints) or "none"
        what = "is a file" if path.exists() or Path(resume_from_checkpoint).exists() else "does not exist"
        raise ValueError(
            f"resume_from_checkpoint must be `latest` or a checkpoint folder, got {resume_from_checkpoint!r}, which "
            f"{what}; {output_dir} has: {names}."
        )
    if inside := list_checkpoints(path):
        raise ValueError(
            f"resume_from_checkpoint must be `latest` or a checkpoint folder, got {resume_from_checkpoint!r}, the "
            f"output folder of a run; its newest checkpoint is {inside[-1]}."
        )
    if damage := find_damage(path):
        raise ValueError(f"{path} must be a whole checkpoint of a training run, but {damage}; use another one.")
    return path


def passed_over(checkpoint: Path | None, output_dir: str | Path) -> list[Path]:
    """Checkpoints in a run's folder that are newer than the one it goes on from."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[checkpoints.index(checkpoint) + 1 :] if checkpoint in checkpoints else []


def set_aside(checkpoints: list[Path]) -> None:
    """Gives checkpoints another name: a run that goes on from an earlier one is another run from there on."""
    for checkpoint in checkpoints:
        target = checkpoint.with_name(f"set-aside-{checkpoint.name}")
        shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):
            checkpoint.rename(target)


def describe_damaged(checkpoints: list[Path]) -> str:
    """What is wrong with each of some checkpoints, if anything is."""
    return "; ".join(f"{path.name}: {find_damage(path) or 'whole, but newer'}" for path in checkpoints)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Partial ones have another name and are not among them."""
    named = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(filter(Path.is_dir, named), key=step_of)


def say_how_to_go_on(output_dir: str | Path) -> str:
    """How a run that was ended is continued once the cause is mended."""
    again, checkpoints = "Then run the same command again", list_checkpoints(output_dir)
    if not checkpoints:
        return f"{again}."
    return f"{again} with --resume_from_checkpoint latest, which goes on from {checkpoints[-1].name}."


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, whatever it is called: it has the state of a schedule."""
    return folder.is_dir() and (folder.resolve().name.startswith("checkpoint-") or (folder / SCHEDULER_NAME).is_file())


def check_is_no_checkpoint(name: str, path: str | Path) -> None:
    """Checks that what is to be used is neither a checkpoint of a run nor the folder of one that has nothing else.

    Args:
        name: Of the setting.
        path: Its value.

    Raises:
        ValueError: If it is; names the command that makes a result of it.
    """
    folder = Path(path)
    checkpoint = folder if is_checkpoint(folder) else next(reversed(list_checkpoints(folder)), None)
    if checkpoint is None:
        return
    what = "which is a checkpoint of a run" if checkpoint is folder else "a run that is not finished"
    output = checkpoint.resolve().parent.name + "-" + checkpoint.resolve().name.rpartition("-")[2]
    raise ValueError(
        f"{name} must be a result, got {path}, {what}; make one of it: python convert_checkpoint.py --input "
        f"{checkpoint} --output {checkpoint.parent.parent / output}"
    )


def step_of(checkpoint: Path) -> int:
    """The step in the name of one of a run's own checkpoints."""
    return int(checkpoint.name.partition("-")[2])


def save_checkpoint(
    accelerator: Any,
    output_dir: str | Path,
    step: int,
    *,
    averages: Sequence[EMAModel | None],
    total_limit: int | None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Writes `checkpoint-STEP` beside and renames it, so that a kill leaves no half of one; then drops old ones.

    What cannot be written (a full disk, a folder that became read-only) is reported and leaves the older ones alone.

    Args:
        accelerator: Of the run.
        output_dir: Of the run.
        step: That is done.
        averages: The moving average of each trainee, if it has one.
        total_limit: How many checkpoints are kept; None is all.
        settings: Of the run, as a recipe: kept with the checkpoint, for runs that resume it.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    written = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        for left_by_a_kill in Path(output_dir).glob("partial-checkpoint-*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
    wait_for_all()
    parts = [partial(_write_state, accelerator, written, settings)]
    parts += [partial(_write_average, written, ema, place) for place, ema in enumerate(averages) if ema is not None]
    # Agreed on for each part: one process alone may write the first, and all have to come to the second.
    is_complete = all(all(gather_lists([_try_to_write(part, written)])) for part in parts)
    if accelerator.is_main_process:
        if is_complete and _try_to_write(partial(_put_in_place, written, final), final):
            older = [checkpoint for checkpoint in list_checkpoints(output_dir) if step_of(checkpoint) <= step]
            for old in older[:-total_limit] if total_limit is not None else []:
                _remove(old)
        else:
            shutil.rmtree(written, ignore_errors=True)
    wait_for_all()


def _write_state(accelerator: Any, folder: Path, settings: dict[str, Any] | None) -> None:
    accelerator.save_state(str(folder))
    if settings is not None and accelerator.is_main_process:
        write_recipe(settings, folder / SETTINGS_NAME)


def _write_average(folder: Path, ema: EMAModel, place: int) -> None:
    where = {"checkpoint_id": folder / at_place(EMA_NAME, place), "process_group": cpu_group()}
    dcp.save(_ema_state(ema), **where, no_dist=not is_initialized())


def _put_in_place(written: Path, final: Path) -> None:
    shutil.rmtree(final, ignore_errors=True)
    written.rename(final)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a kill leaves no half of one under its name."""
    renamed = checkpoint.with_name(f"partial-{checkpoint.name}")
    with contextlib.suppress(OSError):
        checkpoint.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def _try_to_write(write: Callable[[], None], folder: Path) -> bool:
    """Writes a part of a checkpoint into a folder and returns whether that went well."""
    try:
        write()
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:  # as each library reports it
        logger.error(
            "%s could not be written (%s: %s). The run goes on and keeps older checkpoints; make room for the next.",
            folder,
            type(error).__name__,
            error,
        )
        return False
    return True


def load_ema(ema: EMAModel, checkpoint: Path, place: int) -> None:
    """Loads the average of the trainee at a place in a checkpoint, whatever the number of processes that wrote it."""
    state = _ema_state(ema)
    where = {"checkpoint_id": checkpoint / at_place(EMA_NAME, place), "process_group": cpu_group()}
    dcp.load(state, **where, no_dist=not is_initialized())
    ema.optimization_step = int(state["optimization_step"])


def _ema_state(ema: EMAModel) -> dict[str, torch.Tensor]:
    """The average as tensors, whole or sharded as the weights are; loading writes into those of the weights."""
    state = {f"shadow_params.{index}": shadow for index, shadow in enumerate(ema.shadow_params)}
    return state | {"optimization_step": torch.tensor(ema.optimization_step)}
