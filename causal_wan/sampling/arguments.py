"""What the arguments of a pipeline's call become.

Shapes: B = batch, S = prompt tokens, D = text dimension.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from diffusers import WanPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from causal_wan.model.conditions import Conditions
from causal_wan.model.text import encode_prompts, pad_prompt_embeds, warn_of_cut_prompts
from causal_wan.model.vae import check_video_size, encode_videos
from causal_wan.sampling.controls import fit_picture
from causal_wan.sampling.prompt_changes import PromptChanges, as_schedules, embed_schedules
from causal_wan.sampling.rollout import Rollout


CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")  # by diffusers' names


def shown_with_arguments_of(function: Callable) -> Callable[[Callable], Callable]:
    """For a method that hands its arguments on to another: `help` and `inspect` show the other's, and its own."""

    def decorate(method: Callable) -> Callable:
        signature, parameters = inspect.signature(method), inspect.signature(function).parameters
        own = {name: each for name, each in signature.parameters.items() if each.kind is each.KEYWORD_ONLY}
        method.__signature__ = signature.replace(parameters=list({**parameters, **own}.values()))
        return method

    return decorate


def prepare_conditions(
    pipeline: WanPipeline,
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    *,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    is_guided: bool,
    num_videos_per_prompt: int,
    max_sequence_length: int,
    prompt_schedule: PromptChanges | None = None,
    num_frames: int | None = None,
) -> tuple[Conditions, Conditions | None]:
    """What the videos are to show, and what guidance leads away from, for each video of a call.

    Raises:
        ValueError: If there is no prompt, or there are two, or negative prompts are not one or as many, or a schedule
            is not valid.
    """
    schedules = None
    if prompt_schedule is not None and prompt_embeds is not None:
        raise ValueError("a prompt_schedule goes with prompt, not with prompt_embeds; give the texts.")
    if prompt_schedule is not None and not callable(prompt_schedule):
        schedules = as_schedules(prompt, prompt_schedule)
    elif (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds, and not both.")

    def embed(texts: str | list[str] | None, embeds: torch.Tensor | None) -> torch.Tensor:
        if embeds is None:
            texts = [texts] if isinstance(texts, str) else list(texts)
            warn_of_cut_prompts(pipeline.tokenizer, texts, max_sequence_length)
            embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, max_sequence_length)
            embeds = pad_prompt_embeds(embeds, max_sequence_length)
        embeds = embeds.to(pipeline._execution_device, pipeline.transformer.dtype)
        return embeds.repeat_interleave(num_videos_per_prompt, dim=0)

    if schedules is None:
        told = Conditions(prompt_embeds=embed(prompt, prompt_embeds))
    else:
        told = embed_schedules(pipeline, schedules, num_frames, max_sequence_length, num_videos_per_prompt)
    if not is_guided:
        return told, None
    positive, negative = told.at_frame(0).prompt_embeds, embed(negative_prompt or "", negative_prompt_embeds)
    negative = negative.expand(len(positive), -1, -1) if len(negative) == 1 else negative
    if negative.shape != positive.shape:
        raise ValueError(
            f"there must be one negative prompt, or one for each prompt, got {len(negative)} for {len(positive)} "
            "videos."
        )
    return told, Conditions(prompt_embeds=negative)


def prepare_beginning(
    pipeline: WanPipeline,
    image: PipelineImageInput | None,
    video: Any,
    initial_latents: torch.Tensor | None,
    shape: tuple[int, int, int],
) -> torch.Tensor | None:
    """Latents `(B, C, F', H, W)` of the first frames that a call gives, or None.

    Args:
        pipeline: Its VAE encodes them.
        image: One frame, see `CausalWanPipeline.__call__`.
        video: Some.
        initial_latents: Some, encoded.
        shape: (B, height, width).

    Raises:
        ValueError: If there are two beginnings, or neither one nor B, or they do not fit the VAE.
    """
    if sum(given is not None for given in (image, video, initial_latents)) > 1:
        raise ValueError("a video has one beginning; give one of image, video and initial_latents.")
    batch_size, height, width = shape
    if image is not None:
        frames = _pixels_of_image(pipeline, image, height, width)[:, :, None]
    elif video is not None:
        frames = pipeline.video_processor.preprocess_video(video, height=height, width=width)
        parts = {"vae": pipeline.vae, "transformer": pipeline.transformer}
        check_video_size(frames.shape[2], height, width, **parts, in_blocks=False)
    else:
        return initial_latents
    if len(frames) not in (1, batch_size):
        what = "video" if image is None else "image"
        raise ValueError(f"there must be one {what}, or one for each of {batch_size} prompts, got {len(frames)}.")
    return encode_videos(pipeline.vae, frames).expand(batch_size, -1, -1, -1, -1)


def _pixels_of_image(pipeline: WanPipeline, image: PipelineImageInput, height: int, width: int) -> torch.Tensor:
    """Pictures `(B, 3, height, width)` in [-1, 1]; PIL images are turned as they say, scaled and cut as clips are."""
    pictures = [image] if isinstance(image, PIL.Image.Image) else image
    if isinstance(pictures, list | tuple) and all(isinstance(each, PIL.Image.Image) for each in pictures):
        pictures = [fit_picture(PIL.ImageOps.exif_transpose(each), height, width) for each in pictures]
    return pipeline.video_processor.preprocess(pictures, height=height, width=width)


def as_on_step_end(
    pipeline: WanPipeline, callback: Callable | PipelineCallback | MultiPipelineCallbacks | None, names: Sequence[str]
) -> Callable | None:
    """What a `Rollout` calls, of a callback as diffusers has them.

    Args:
        pipeline: Handed to the callback; its `_interrupt` stops the rollout.
        callback: Gets a dict of tensors, and returns those that it changes.
        names: Of the tensors, some of `CALLBACK_TENSORS`; an object of diffusers has its own.

    Raises:
        ValueError: If there are other names.
    """
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    unknown = set(names) - set(CALLBACK_TENSORS)
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be of {', '.join(CALLBACK_TENSORS)}, got "
            f"{', '.join(sorted(unknown))}."
        )
    if callback is None:
        return None

    def on_step_end(rollout: Rollout, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        guides = (rollout.conditions, rollout.negative_conditions)
        embeds = tuple(None if each is None else each.prompt_embeds for each in guides)
        tensors = dict(zip(CALLBACK_TENSORS, (latents, *embeds), strict=True))
        returned = callback(pipeline, step, timestep, {name: tensors[name] for name in names})
        changed = tuple(returned.get(name, tensors[name]) for name in CALLBACK_TENSORS[1:])
        if any(new is not old for new, old in zip(changed, embeds, strict=True)):
            rollout.replace_conditions(*map(with_prompt, guides, changed))
        rollout.is_stopped = pipeline._interrupt
        return returned.get("latents", latents)

    return on_step_end


def with_prompt(conditions: Conditions | None, prompt_embeds: torch.Tensor | None) -> Conditions | None:
    """The conditions with another prompt; None without one."""
    if prompt_embeds is None:
        return None
    if conditions is None:
        return Conditions(prompt_embeds=prompt_embeds)
    return replace(conditions, prompt_embeds=prompt_embeds)
