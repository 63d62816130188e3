"""The model card of a result: what it is, how it is used, how it was trained, and samples to look at."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from causal_wan.data.settings import DataConfig
from causal_wan.methods.settings import RegressionConfig
from causal_wan.records.metrics import METRICS_NAME, read_metrics
from causal_wan.results.run_record import RunRecord
from causal_wan.timesteps import Sampler
from causal_wan.weights.lora import LORA_WEIGHTS_NAME


logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
DATA_SUMMARY_NAME = "data_summary.json"
MAX_SAMPLES = 4
MAX_FEW_STEPS = 8  # of a block, to be called few
SHOWN = (
    *("generator_task", "num_frame_per_block", "local_attn_size", "independent_first_frame", "denoising_step_list"),
    *("num_frames", "height", "width", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler", "optimizer", "mixed_precision", "use_ema", "lora_rank", "loss_type", "seed"),
    *("timestep_sampling", "timestep_shift", "context", "loss_space", "loss_weighting"),
    *("teacher", "teacher_guidance_scale", "critic", "critic_learning_rate", "student_every", "critic_warmup_steps"),
    *("real_clip_probability", "regression_weight", "adversarial_weight"),
)


def make_card(folder: Path, run: RunRecord | None, repo_id: str, samples: list[str]) -> ModelCard:
    """The card of a result.

    Args:
        folder: Of the result.
        run: That made it; None of a pipeline.
        repo_id: On the hub.
        samples: Videos beside it.
    """
    is_lora, is_pipeline = (folder / LORA_WEIGHTS_NAME).is_file(), (folder / "model_index.json").is_file()
    base = None if run is None else run.public_settings()["pretrained_model_name_or_path"]
    is_on_hub = base is not None and "/" in base
    method = RegressionConfig() if run is None else run.method
    is_causal = method.causal.num_frame_per_block is not None
    steps, sampler = sampled_at(folder, run)
    has_step_list = sampler == "renoise" if run is None else not method.is_continuous
    is_few_step = len(steps) <= MAX_FEW_STEPS if steps else sampler == "renoise"
    objective = "video-regression" if run is None else run.objective
    settings = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-video",
        "license": None if run is None else base_license(run.model.pretrained_model_name_or_path),
        "base_model": base if is_on_hub else None,
        "base_model_relation": ("adapter" if is_lora else "finetune") if is_on_hub else None,
        "tags": [
            *("wan", "video", objective),
            *["few-step"] * is_few_step,
            *["causal"] * is_causal,
            *["lora"] * is_lora,
        ],
        "widget": [{"text": "held out while training", "output": {"url": name}} for name in samples] or None,
    }
    return ModelCard.from_template(
        ModelCardData(**{name: value for name, value in settings.items() if value is not None}),
        template_path=str(CARD_TEMPLATE),
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        base=base or "",
        is_on_hub=is_on_hub,
        license=settings["license"],
        is_lora=is_lora,
        is_pipeline=is_pipeline,
        is_causal=is_causal,
        has_run=run is not None,
        objective=objective,
        method=method,
        clips=DataConfig() if run is None else run.data,
        max_sequence_length=None if run is None else run.model.max_sequence_length,
        steps=steps,
        is_few_step=is_few_step,
        has_step_list=has_step_list,
        sampler=sampler,
        shown={} if run is None else shown_settings(run),
        data=_read_json(folder / DATA_SUMMARY_NAME),
        metrics=last_metrics(folder),
        samples=samples,
    )


def sampled_at(folder: Path, run: RunRecord | None) -> tuple[list[float], Sampler]:
    """The timesteps that a student is sampled at, none if they are not known, and the sampler."""
    if run is None:
        index = _read_json(folder / "model_index.json")
        return [step for step in index.get("denoising_step_list") or [] if step], index.get("sampler", "renoise")
    return [round(step, 3) for step in run.method.inference_timesteps().tolist()], run.method.student_sampler


def base_license(base: str) -> str | None:
    """The licence that a base model states on the hub, or in its folder; None if it is not known."""
    readme = Path(base) / "README.md"
    try:
        if readme.is_file():
            return ModelCard.load(readme).data.license
        card_data = None if Path(base).is_dir() else HfApi().model_info(base).card_data
        return None if card_data is None else card_data.license
    except (HTTPError, OSError, OfflineModeIsEnabled, ValueError) as error:
        logger.info("the licence of %s is not known: %s", base, describe(error))
        return None


def shown_settings(run: RunRecord) -> dict[str, Any]:
    """The settings that the card shows, of those that the run has."""
    has_no_say, settings = {"denoising_step_list"} if run.method.is_continuous else set(), run.public_settings()
    return {name: settings[name] for name in SHOWN if settings.get(name) is not None and name not in has_no_say}


def last_metrics(folder: Path) -> dict[str, float]:
    """The last value of each metric of losses and validation."""
    found: dict[str, float] = {}
    for entry in read_metrics(folder / METRICS_NAME):
        found |= {name: entry[name] for name in entry if name == "step" or "loss" in name}
    return found


def copy_samples(folder: Path, staged: Path) -> list[str]:
    """The first videos of the last validation, as `samples/NN.mp4`."""
    folders = sorted((folder / "validation").glob("step-*"))
    videos = sorted(folders[-1].glob("*.mp4"))[:MAX_SAMPLES] if folders else []
    names = [f"samples/{video.name}" for video in videos]
    for video, name in zip(videos, names, strict=True):
        (staged / "samples").mkdir(exist_ok=True)
        shutil.copy2(video, staged / name)
    return names


def describe(error: BaseException) -> str:
    """An error in a line, with what caused it."""
    cause = f", because of {type(error.__cause__).__name__}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{cause}"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
