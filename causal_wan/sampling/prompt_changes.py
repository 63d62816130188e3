"""Prompts that change while a video is sampled: by a schedule, or as a function says that is asked block by block.

Shapes: B = batch, P = prompts of a clip, S = prompt tokens, D = text dimension.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diffusers import WanPipeline

from causal_wan.blocks import middle_frames
from causal_wan.model.conditions import Conditions, embedded
from causal_wan.model.text import encode_prompts, pad_prompt_embeds, warn_of_cut_prompts
from causal_wan.tables.prompt_schedules import FramePrompts, PromptSchedule, texts_of


logger = logging.getLogger(__name__)

Pairs = Sequence[tuple[float, str]]
PromptChanges = PromptSchedule | Pairs | Sequence[PromptSchedule | Pairs] | Callable[[float], str | None]
"""A schedule for all videos, one for each, or a function from seconds to a prompt, None for no change."""


def as_schedules(
    prompt: str | list[str] | None, changes: PromptSchedule | Pairs | Sequence[PromptSchedule | Pairs]
) -> list[PromptSchedule]:
    """The schedule of each video.

    Args:
        prompt: In force from the start, where the schedules begin later; one, or one a video.
        changes: One for all videos, or one for each.

    Raises:
        ValueError: If they are not valid, or do not go together with the prompts.
    """
    if isinstance(changes, str) or not isinstance(changes, PromptSchedule | Sequence):
        raise ValueError(
            "prompt_schedule must be pairs of seconds and a prompt such as [(2.5, 'the cat jumps')], got "
            f"{changes!r:.100}."
        )
    is_one = isinstance(changes, PromptSchedule) or all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], str) for pair in changes
    )
    each = [changes] if is_one else list(changes)
    each = [
        list(zip(one.seconds, one.prompts, strict=True)) if isinstance(one, PromptSchedule) else one for one in each
    ]
    if prompt is None:
        return [PromptSchedule.of(pairs) for pairs in each]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if len(each) not in (1, len(prompts)):
        raise ValueError(
            f"there must be one prompt_schedule, or one for each of {len(prompts)} prompts, got {len(each)}."
        )
    each = each * len(prompts) if len(each) == 1 else each
    return [PromptSchedule.of([(0, first), *pairs]) for first, pairs in zip(prompts, each, strict=True)]


def embed_schedules(
    pipeline: WanPipeline,
    schedules: Sequence[PromptSchedule],
    num_frames: int | None,
    max_sequence_length: int,
    num_videos_per_prompt: int,
) -> Conditions:
    """Conditions of videos along which prompts change: a block has the prompt that is in force in its middle.

    Args:
        pipeline: Its encoder embeds the prompts, its transformer says what the blocks are.
        schedules: One for each prompt of the call.
        num_frames: Of the videos; None has no end.
        max_sequence_length: Tokens that prompts are padded to.
        num_videos_per_prompt: Of each schedule.

    Raises:
        ValueError: If a prompt begins when the video is over, or the video is one block.
    """
    geometry = pipeline.geometry
    lengths = _blocks_until(pipeline, schedules, num_frames)
    seconds = [frame / geometry.frame_rate for frame in middle_frames(lengths, geometry)]
    check_has_blocks(lengths)
    of_blocks = [schedule.by_frame(seconds) for schedule in schedules]
    unseen = sorted(set(texts_of(schedules)) - set(texts_of(of_blocks)))
    if unseen:
        logger.warning("the prompt %r is not seen: none of the blocks has it in force in its middle", unseen[0])
    texts = texts_of(of_blocks)
    warn_of_cut_prompts(pipeline.tokenizer, texts, max_sequence_length)
    embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, max_sequence_length)
    told = embedded(of_blocks, dict(zip(texts, embeds, strict=True)), lengths, max_sequence_length)
    told = told.to(pipeline._execution_device, pipeline.transformer.dtype)
    by_frame = told.prompt_of_frame
    return replace(
        told,
        prompt_embeds=told.prompt_embeds.repeat_interleave(num_videos_per_prompt, dim=0),
        prompt_of_frame=None if by_frame is None else by_frame.repeat_interleave(num_videos_per_prompt, dim=0),
    )


def embed_frame_prompts(
    pipeline: WanPipeline, prompt: str | FramePrompts, num_latent_frames: int, max_sequence_length: int
) -> Conditions:
    """Conditions of a clip, of one prompt or that of each frame: a block has that of the frame in its middle.

    Args:
        pipeline: Its encoder embeds the prompts, its transformer says what the blocks are.
        prompt: Of the clip.
        num_latent_frames: F of the clip.
        max_sequence_length: Tokens that prompts are padded to.
    """
    lengths = pipeline.transformer.block_lengths(num_latent_frames)
    middles = middle_frames(lengths, pipeline.geometry)
    of_blocks = prompt if isinstance(prompt, str) else [prompt[frame] for frame in middles]
    texts = texts_of([of_blocks if isinstance(of_blocks, str) else tuple(of_blocks)])
    embeds = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, max_sequence_length)
    return embedded([of_blocks], dict(zip(texts, embeds, strict=True)), lengths, max_sequence_length)


def check_has_blocks(block_lengths: Sequence[int]) -> None:
    """Checks that a video has blocks at which prompts can change.

    Raises:
        ValueError: If it is one block.
    """
    if len(block_lengths) == 1:
        raise ValueError(
            "prompts change from block to block, but the video is one block of "
            f"{block_lengths[0]} latent frames; give one prompt, more frames, or a smaller num_frame_per_block."
        )


def _blocks_until(pipeline: WanPipeline, schedules: Sequence[PromptSchedule], num_frames: int | None) -> list[int]:
    """Latent frames of each block; of a video without end, until the last prompt has begun."""
    geometry, causal = pipeline.geometry, pipeline.transformer.causal_config
    if num_frames is not None:
        for schedule in schedules:
            schedule.check_ends_before(num_frames / geometry.frame_rate)
        return causal.block_lengths(geometry.num_latent_frames(num_frames))
    last = max(schedule.seconds[-1] for schedule in schedules)
    lengths: list[int] = []
    for length in causal.iterate_block_lengths(None):
        lengths.append(length)
        if middle_frames(lengths, geometry)[-1] / geometry.frame_rate >= last:
            break
    return lengths


def as_next_conditions(
    pipeline: WanPipeline,
    prompt: str | list[str] | None,
    ask: Any,
    conditions: Conditions,
    max_sequence_length: int,
) -> Callable[[int, int], Conditions | None] | None:
    """`Rollout.next_conditions` that asks for the prompt of each block, at the second in its middle.

    Args:
        pipeline: Its encoder embeds the prompts.
        prompt: What the videos begin with.
        ask: From seconds to the prompt of all videos, None for no change; anything but a function is None.
        conditions: What the videos begin with, B of them.
        max_sequence_length: Tokens that prompts are padded to.
    """
    if not callable(ask):
        return None
    geometry, current = pipeline.geometry, prompt

    def next_conditions(start: int, length: int) -> Conditions | None:
        nonlocal current
        middle = (geometry.num_frames(start) + geometry.num_frames(start + length)) // 2
        text = ask(middle / geometry.frame_rate)
        if text is None or text == current:
            return None
        if not isinstance(text, str):
            raise ValueError(f"a function as prompt_schedule must give a prompt, or None for no change, got {text!r}.")
        current = text
        (embeds,) = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [text], max_sequence_length)
        padded = pad_prompt_embeds([embeds], max_sequence_length).to(conditions.prompt_embeds)
        return replace(conditions, prompt_embeds=padded.expand(conditions.batch_size, -1, -1))

    return next_conditions
