"""A student on disk -> a pipeline to sample with, and the settings that it was trained with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from causal_wan.blocks import CausalConfig
from causal_wan.config.settings import BaseModelConfig, KVCacheDtype, MemoryConfig
from causal_wan.data.settings import DataConfig
from causal_wan.flow import choose_sampling
from causal_wan.geometry import LatentGeometry
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.progress import announced
from causal_wan.results.run_record import RunRecord, base_of
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.timesteps import Sampler, check_denoising_step_list
from causal_wan.weights.kinds import check_base, read_index
from causal_wan.weights.lora import LORA_WEIGHTS_NAME, load_lora
from causal_wan.weights.parts import DTYPES, check_text_parts, load_vae
from causal_wan.weights.transformer import load_transformer, load_transformer_config
from causal_wan.weights.wan_names import readable


# Those of `resolve_settings` that every script that samples lets its user give.
GIVEN_SETTINGS = (
    *("num_frames", "height", "width", "denoising_step_list", "num_inference_steps", "timestep_shift", "sampler"),
)


@dataclass(frozen=True)
class SamplingSettings:
    """Video frames, pixels, timesteps from noise to data, tokens of prompts, the sampler, precision of its cache."""

    num_frames: int
    height: int
    width: int
    timesteps: list[float]
    max_sequence_length: int
    sampler: Sampler
    kv_cache_dtype: KVCacheDtype

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Of remembered keys and values; None is that of the passes."""
        return CACHE_DTYPES[self.kv_cache_dtype]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the videos of a student fall into latents and blocks, and which videos they follow."""

    geometry: LatentGeometry
    causal: CausalConfig
    control_names: tuple[str, ...] = ()

    def check_size(self, settings: SamplingSettings) -> None:
        """Checks that videos fit the VAE and the patches.

        Raises:
            ValueError: If not; names the nearest sizes that do.
        """
        self.geometry.check_num_frames(settings.num_frames)
        self.geometry.check_size(settings.height, settings.width, of=" for this checkpoint")

    def block_lengths(self, settings: SamplingSettings) -> list[int]:
        """Latent frames of each block of a video.

        Raises:
            ValueError: If it does not divide into blocks.
        """
        return self.causal.block_lengths(self.geometry.num_latent_frames(settings.num_frames))

    def check_first_frame(self, settings: SamplingSettings) -> None:
        """Checks that there is something to sample after a first frame that is given.

        Raises:
            ValueError: If not.
        """
        num_latent_frames = self.geometry.num_latent_frames(settings.num_frames)
        self.causal.check_continues(1, num_latent_frames, self.geometry)


def choose_device(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """What is given, else the GPU if there is one; and else bf16 on a GPU, fp32 on a CPU.

    Raises:
        ValueError: If there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # of torch, by the kind of device
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"device must be one that is there, such as cpu or cuda:0, got {device} ({reason})") from None
    return device, DTYPES[dtype or ("fp32" if device == "cpu" else "bf16")]


def resolve_settings(
    run: RunRecord | None,
    *,
    student: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    denoising_step_list: tuple[float, ...] | None = None,
    num_inference_steps: int | None = None,
    timestep_shift: float | None = None,
    sampler: Sampler | None = None,
    kv_cache_dtype: KVCacheDtype | None = None,
) -> SamplingSettings:
    """What is given, else the run's settings, else WAN's own.

    A run on a step list is sampled at the list, one on continuous levels in its `num_inference_steps` along the flow.

    Args:
        run: From `find_run`.
        student: Where it is; a pipeline's folder may say how it is sampled.
        num_frames, height, width: Of the videos.
        denoising_step_list, num_inference_steps, timestep_shift, sampler: See `causal_wan.flow.choose_sampling`; of a
            number of steps and their shift, one that is not given is the run's.
        kv_cache_dtype: See `causal_wan.config.settings.MemoryConfig`.

    Raises:
        ValueError: If ways of sampling are given that exclude each other, or a pipeline's folder cannot be read.
    """
    method = RegressionConfig() if run is None else run.method
    data = DataConfig() if run is None else run.data
    max_sequence_length = BaseModelConfig.max_sequence_length if run is None else run.model.max_sequence_length
    own = method.inference_timesteps() if method.is_continuous else method.levels()
    stated = read_index(Path(student)) if student else {}
    if run is not None and num_inference_steps is not None and timestep_shift is None:
        timestep_shift = method.timestep_shift
    if method.is_continuous and timestep_shift is not None and denoising_step_list is None:
        num_inference_steps = num_inference_steps or method.num_inference_steps
    timesteps, sampler = choose_sampling(
        stated.get("denoising_step_list") or own.tolist(),
        stated.get("sampler") or method.student_sampler,
        denoising_step_list=denoising_step_list,
        num_inference_steps=num_inference_steps,
        timestep_shift=timestep_shift,
        sampler=sampler,
    )
    check_denoising_step_list(timesteps)
    return SamplingSettings(
        num_frames=num_frames or data.num_frames,
        height=height or data.height,
        width=width or data.width,
        timesteps=timesteps,
        max_sequence_length=stated.get("max_sequence_length") or max_sequence_length,
        sampler=sampler,
        kv_cache_dtype=kv_cache_dtype or (MemoryConfig.kv_cache_dtype if run is None else run.kv_cache_dtype),
    )


def choose_settings(config: Any, run: RunRecord | None, **more: Any) -> SamplingSettings:
    """`resolve_settings` of a script whose config has the fields of the same names, and `checkpoint` for the student.

    Args:
        config: Of the script.
        run: From `find_run`.
        more: Further settings of `resolve_settings`.

    Raises:
        ValueError: As `resolve_settings` does.
    """
    given = {name: vars(config)[name] for name in GIVEN_SETTINGS}
    return resolve_settings(run, student=config.checkpoint, **given, **more)


def find_layout(student: str, run: RunRecord | None, **causal: int | None) -> Layout:
    """How the videos of a student fall into latents and blocks, by configs alone: before anything is loaded.

    Args:
        student: Output folder of a run, a diffusers WAN folder or hub id, or a file of weights.
        run: From `find_run`.
        causal: `num_frame_per_block`, `local_attn_size`, `sink_size`; None is the student's own setting.

    Raises:
        ValueError: If it is of another kind of models than WAN's text-to-video (see `causal_wan.weights.kinds`), or
            the causal settings do not go together.
    """
    base, revision = base_of(student, run)
    weights = None if run is None else run.weights
    geometry = check_base(base, generator_ckpt=weights, revision=revision)
    config = load_transformer_config(base, generator_ckpt=weights, revision=revision)
    own, names = CausalConfig.of(config), tuple(config.get("control_names") or ())
    if run is not None and not run.has_transformer:
        own, names = run.causal, run.data.control_column or names
    given = {name: size for name, size in causal.items() if size is not None}
    return Layout(geometry=geometry, causal=replace(own, **given), control_names=names)


def load_student(
    student: str,
    run: RunRecord | None,
    dtype: torch.dtype,
    *,
    denoising_step_list: list[float] | None = None,
    sampler: Sampler | None = None,
    max_sequence_length: int | None = None,
    **causal: int | None,
) -> CausalWanPipeline:
    """The base model's pipeline with the run's transformer or LoRA in it.

    Args:
        student: Output folder of a run, a diffusers WAN folder or hub id, or a file of weights.
        run: From `find_run`.
        dtype: Of transformer and text encoder; the VAE stays in float32.
        denoising_step_list: What the pipeline samples at if a call does not say.
        sampler: How, likewise.
        max_sequence_length: Tokens that it pads prompts to, likewise.
        causal: `num_frame_per_block`, `local_attn_size`, `sink_size`; None is the student's own setting.

    Raises:
        ValueError: If weights do not fit, or the causal settings do not go together.
    """
    base, revision = base_of(student, run)
    check_text_parts(base)
    parts = {"vae": load_vae(base, revision=revision), "dtype": dtype}
    if run is not None and run.has_transformer:
        parts["transformer"] = CausalWanTransformer3DModel.from_pretrained(
            run.folder, subfolder="transformer", dtype=dtype, use_safetensors=True
        )
    elif run is not None:
        parts["transformer"] = load_transformer(
            base, run.causal, generator_ckpt=run.model.generator_ckpt, revision=revision, dtype=dtype
        )
    own = {"denoising_step_list": denoising_step_list, "sampler": sampler, "max_sequence_length": max_sequence_length}
    parts |= {name: value for name, value in own.items() if value is not None}
    with announced(f"loading the other parts of {base}"), readable(f"the text encoder of {base}"):
        pipeline = CausalWanPipeline.from_pretrained(base, revision=revision, **parts, **causal)
        if run is not None and run.has_lora:
            load_lora(pipeline, run.folder, weight_name=LORA_WEIGHTS_NAME)
    return pipeline
