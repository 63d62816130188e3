"""What a run was: its settings, read again from the config.yaml that it left, for whatever is made of its result."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from causal_wan.blocks import CausalConfig
from causal_wan.config.changed_settings import SETTINGS_NAME, read_settings
from causal_wan.config.fields import check_type, flat_fields, paths_of
from causal_wan.config.parsing import read_yaml
from causal_wan.config.ranges import check_number
from causal_wan.config.settings import (
    CacheConfig,
    KVCacheDtype,
    MemoryConfig,
    ModelConfig,
    TrainingConfig,
    TrajectoriesConfig,
    ValidationConfig,
)
from causal_wan.data.settings import DataConfig
from causal_wan.methods.matching_settings import MatchingConfig
from causal_wan.methods.settings import RegressionConfig
from causal_wan.records.checkpoints import check_is_no_checkpoint
from causal_wan.weights.kinds import check_weights
from causal_wan.weights.lora import LORA_WEIGHTS_NAME
from causal_wan.weights.transformer import check_generator_ckpt
from causal_wan.weights.wan_names import WEIGHTS_SUFFIXES, infer_architecture, read_state, to_diffusers


Settings = TypeVar("Settings")

# (width, latent channels) of a transformer -> where the other parts of its pipeline are.
BASES = {
    (1536, 16): "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    (5120, 16): "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    (3072, 48): "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
}
LINEAGE_BLOCK = 3  # latent frames of a block in the weights of CausVid and Self Forcing
# What the result knows of its data: how clips were shown, not where they are.
SHAPE_SETTINGS = (
    *("num_frames", "height", "width", "time_division_factor", "frame_sampling", "frame_rate"),
    "control_column",
)
# All groups of which one has settings that name something on this machine.
GROUPS_WITH_PATHS = (
    CacheConfig,
    DataConfig,
    ModelConfig,
    TrainingConfig,
    TrajectoriesConfig,
    ValidationConfig,
    MatchingConfig,
)


Objective = Literal["video-regression", "ode-regression", "distribution-matching"]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its result has to know it. Settings that an older run does not have are the defaults.

    Where there is no run, as with a plain pipeline, there is no record either, but None.

    Attributes:
        folder: With the result in it; None of a file of weights, and of a checkpoint.
        model: The base model, and what of it was trained.
        method: How.
        data: `SHAPE_SETTINGS` of the clips; the others are not those of the run.
        kv_cache_dtype: What validation remembered keys and values in.
        seed: None if it is not known.
        objective: What was trained: by which of the scripts.
        settings: All, flat, as the run wrote them: to be shown, and to be written again.
    """

    folder: Path | None = None
    model: ModelConfig
    method: RegressionConfig
    data: DataConfig
    kv_cache_dtype: KVCacheDtype
    seed: int | None
    objective: Objective
    settings: dict[str, Any]

    @classmethod
    def from_settings(cls, settings: Any, folder: Path | None = None) -> Self:
        """The record of resolved settings, flat, as in a config.yaml.

        Raises:
            ValueError: If they are not those of a run.
        """
        place = f"{SETTINGS_NAME} of the run" if folder is None else folder / SETTINGS_NAME
        if not isinstance(settings, dict) or not isinstance(settings.get("pretrained_model_name_or_path"), str):
            raise ValueError(
                f"{place} must be a mapping that names pretrained_model_name_or_path, but does not; put it back as "
                "the run has written it."
            )
        hint = dict(flat_fields(TrainingConfig))["seed"]
        try:
            if settings.get("seed") is not None:
                check_number("seed", hint, settings["seed"])
            return cls(
                folder=folder,
                model=_group(ModelConfig, settings),
                method=_group(RegressionConfig, settings),
                data=_group(DataConfig, settings, SHAPE_SETTINGS),
                kv_cache_dtype=_group(MemoryConfig, settings, ("kv_cache_dtype",)).kv_cache_dtype,
                seed=settings.get("seed"),
                objective=_objective_of(settings),
                settings=settings,
            )
        except ValueError as error:
            raise ValueError(f"{place} must be as the run has written it, but {error}") from None

    @classmethod
    def of_folder(cls, folder: Path) -> Self | None:
        """The record of an output folder; None if there is no config.yaml in it.

        Raises:
            ValueError: If it is none of a run.
        """
        path = folder / SETTINGS_NAME
        return cls.from_settings(read_yaml(path, SETTINGS_NAME), folder) if path.is_file() else None

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Self:
        """The record of the run that a checkpoint belongs to.

        Raises:
            ValueError: If it is not in the output folder of a run.
        """
        settings = read_settings(checkpoint.resolve()) if checkpoint.is_dir() else None
        if settings is None:
            raise ValueError(
                "input must be a checkpoint-STEP folder of a run, with config.yaml in it or beside it, got "
                f"{checkpoint}."
            )
        return cls.from_settings(settings)

    @classmethod
    def of_weights(cls, path: Path, base: str | None = None) -> Self:
        """The record of a run that starts from a file of weights, without training.

        Args:
            path: The file.
            base: Diffusers folder or hub id with the parts that it lacks; None is WAN's own for its size.

        Raises:
            ValueError: If it is no file of weights, or its size is none of WAN's and there is no base.
        """
        check_generator_ckpt(str(path), "checkpoint")
        return cls.from_settings(
            {
                "pretrained_model_name_or_path": base or _base_of_size(path),
                "generator_ckpt": str(path),
                "generator_task": "causal_video" if path.suffix != ".safetensors" else "bidirectional_video",
                "num_frame_per_block": LINEAGE_BLOCK,
            }
        )

    def public_settings(self) -> dict[str, Any]:
        """The settings without the paths of this machine: of each, the last part is left."""
        local = paths_of(*GROUPS_WITH_PATHS)
        return {name: _last_part(value) if name in local else value for name, value in self.settings.items()}

    @property
    def has_transformer(self) -> bool:
        """Whether the result is a transformer of its own, rather than a LoRA or what the run began with."""
        return self.folder is not None and (self.folder / "transformer").is_dir()

    @property
    def has_lora(self) -> bool:
        """Whether the result is a LoRA."""
        return self.folder is not None and (self.folder / LORA_WEIGHTS_NAME).is_file()

    @property
    def weights(self) -> str | None:
        """Where its transformer is, or what a LoRA's is; None is in the base model."""
        return str(self.folder) if self.has_transformer else self.model.generator_ckpt

    @property
    def causal(self) -> CausalConfig:
        """Its blocks, and what they see."""
        return self.method.causal


def find_run(result: str, base: str | None = None) -> RunRecord | None:
    """The record of what a student, or a teacher, is given as; None for a plain diffusers folder or hub id.

    A pipeline that was made of a run has the run's config.yaml in it, and is its own base model.

    Args:
        result: Output folder of a run, diffusers folder, hub id, or file of weights.
        base: Diffusers folder or hub id in the place of the run's base model; of a file of weights, None is WAN's own
            for its size.

    Raises:
        ValueError: If a local folder is neither, or a file cannot be used.
    """
    path = Path(result)
    if path.suffix in WEIGHTS_SUFFIXES:
        return RunRecord.of_weights(path, base)
    if path.is_file():
        raise ValueError(f"a file of weights must end in {', '.join(WEIGHTS_SUFFIXES)}, got {result}.")
    if not path.is_dir():
        return None
    if (path / "model_index.json").is_file():
        return _run_of_pipeline(path, base)
    has_result = (path / "transformer").is_dir() or (path / LORA_WEIGHTS_NAME).is_file()
    run = RunRecord.of_folder(path) if has_result else None
    if run is None:
        if not has_result:
            check_is_no_checkpoint("checkpoint", result)
        raise ValueError(
            f"checkpoint must be the output folder of a finished run (config.yaml and transformer/ or "
            f"{LORA_WEIGHTS_NAME}), a diffusers folder (model_index.json) or a file of weights, got {result}, which "
            + ("lacks config.yaml, the settings of its run." if has_result else "has neither.")
        )
    if base is None:
        return run
    return RunRecord.from_settings(run.settings | {"pretrained_model_name_or_path": base}, path)


def _run_of_pipeline(folder: Path, base: str | None) -> RunRecord | None:
    """The record that a pipeline's folder keeps; None if it keeps none."""
    path = folder / SETTINGS_NAME
    settings = read_yaml(path, SETTINGS_NAME) if path.is_file() else None
    if not isinstance(settings, dict) or "pretrained_model_name_or_path" not in settings:
        return None
    run = RunRecord.from_settings(settings, folder)
    own = {"pretrained_model_name_or_path": base or str(folder), "generator_ckpt": None, "revision": None}
    return replace(run, model=replace(run.model, **own))


def base_of(result: str, run: RunRecord | None) -> tuple[str, str | None]:
    """Where the parts are that a result lacks: diffusers folder or hub id, and revision; a pipeline lacks none."""
    return (result, None) if run is None else (run.model.pretrained_model_name_or_path, run.model.revision)


def _group(config_class: type[Settings], settings: dict[str, Any], names: Collection[str] | None = None) -> Settings:
    """A group of settings, or some of it; those that are not there are the defaults."""
    hints = dict(flat_fields(config_class))
    own = {name: settings[name] for name in (hints if names is None else names) if name in settings}
    for name, value in own.items():
        check_type(name, hints[name], value)
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in own.items()})


def _base_of_size(path: Path) -> str:
    """The model of WAN's that a file of weights has the size of."""
    try:
        state = read_state(path)
        check_weights(str(path), {name: weight.shape for name, weight in state.items()})
        architecture = infer_architecture(to_diffusers(state))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    size = (architecture["num_attention_heads"] * architecture["attention_head_dim"], architecture["in_channels"])
    if size not in BASES:
        raise ValueError(
            f"{path} must have the size of a WAN model for its VAE and text encoder to be known, got a width of "
            f"{size[0]} and {size[1]} latent channels; name a checkpoint with --pretrained_model_name_or_path."
        )
    return BASES[size]


def _last_part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    is_local = Path(value).is_absolute() or Path(value).exists() or value.startswith((".", "~"))
    return Path(value).name if is_local else value


def _objective_of(settings: dict[str, Any]) -> Objective:
    """Told by settings that no other script has."""
    if "critic_learning_rate" in settings:
        return "distribution-matching"
    return "ode-regression" if "trajectories_dir" in settings else "video-regression"
