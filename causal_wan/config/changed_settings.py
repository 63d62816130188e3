"""Which settings of a resumed run differ from those that its checkpoint was written with, and what becomes of each.

Almost all are taken from the command line or the recipe. A few cannot be, since they decide what the checkpoint holds;
a few others are overridden by what is in it.
"""

from pathlib import Path
from typing import Any

import yaml


SETTINGS_NAME = "config.yaml"

REFUSED = {
    "lora_rank": "the checkpoint holds weights of another shape",
    "lora_target_modules": "the checkpoint holds adapters of other layers",
    "control_column": "the checkpoint holds an input layer for other controls",
    "optimizer": "the checkpoint holds the states of another optimizer",
    "streaming": "a table and a stream count their clips in different ways",
}
OVERRIDDEN = {
    "run_name": "a resumed run keeps its name",
    "tracker_project_name": "a resumed run stays in its project",
}
OVERRIDDEN_IF_ALL_WEIGHTS = {
    "pretrained_model_name_or_path": "the transformer's weights are the checkpoint's; VAE and text encoder are new",
    "generator_ckpt": "the weights are the checkpoint's",
    "revision": "the transformer's weights are the checkpoint's; VAE and text encoder are new",
}
REMARKS = {
    "pretrained_model_name_or_path": "taken: frozen base, VAE and text encoder come from there",
    "generator_ckpt": "taken: the frozen base comes from there",
    "seed": "taken: order of clips and noise change from here on",
    "max_train_steps": "taken: a schedule that falls is that of the new length",
}
NOT_COMPARED = {"resume_from_checkpoint", "dry_run", "output_dir"}


def read_settings(checkpoint: Path) -> dict[str, Any] | None:
    """The resolved settings of the run that wrote a checkpoint; None if nobody kept them."""
    for folder in (checkpoint, checkpoint.parent):
        path = folder / SETTINGS_NAME
        if path.is_file():
            try:
                settings = yaml.safe_load(path.read_text())
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            if isinstance(settings, dict):
                return settings
    return None


def compare_settings(checkpoint: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs, with what becomes of it.

    Args:
        checkpoint: That is resumed.
        before: Resolved settings of the run that wrote it; those that it does not have are not compared.
        now: Of this run.

    Raises:
        ValueError: If one differs that cannot.
    """
    changed = {
        name: (before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value and name not in NOT_COMPARED
    }
    refused = [name for name in changed if name in REFUSED and not _means_the_same(name, before, now)]
    if changed.get("use_ema") == (False, True):
        refused.append("use_ema")
    if refused:
        reasons = {**REFUSED, "use_ema": "the checkpoint holds no moving average"}
        listed = "; ".join(
            f"{name} was {_show(changed[name][0])}, got {_show(changed[name][1])} ({reasons[name]})"
            for name in refused
        )
        otherwise = (
            f"start from its weights: convert_checkpoint.py --input {checkpoint} --output WEIGHTS, then "
            "--generator_ckpt WEIGHTS with another --output_dir."
        )
        if "control_column" in refused:  # no other input layer takes its weights
            otherwise = "start anew with another --output_dir."
        raise ValueError(
            f"a run must be resumed with the settings that its checkpoint depends on, but in {checkpoint} {listed}. "
            f"Give them as they were, or {otherwise}"
        )
    is_same_run = Path(now.get("output_dir", checkpoint.parent)).resolve() == checkpoint.parent.resolve()
    overridden = OVERRIDDEN if is_same_run else {}
    overridden = overridden | ({} if now.get("lora_rank") else OVERRIDDEN_IF_ALL_WEIGHTS)
    lines = []
    for name, (old, new) in changed.items():
        fate = f"overridden: {overridden[name]}" if name in overridden else REMARKS.get(name, "taken")
        lines.append(f"{name} {_show(old)} -> {_show(new)} ({fate})")
    return lines


def _means_the_same(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a setting has no say, or the same in another order."""
    if name != "lora_target_modules":
        return False
    if not (before.get("lora_rank") or now.get("lora_rank")):
        return True
    return isinstance(before[name], list) and sorted(map(str, before[name])) == sorted(now[name])


def _show(value: Any) -> str:
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
