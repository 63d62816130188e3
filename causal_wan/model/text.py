"""Prompts -> embeddings, and which of them the frames of a clip see.

Shapes: B = batch, F = latent frames, P = prompts of a clip, S = prompt tokens, D = text dimension.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from causal_wan.devices import to_device


logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 256  # that are tokenized for their lengths
MAX_SHOWN = 100  # characters of a prompt in a message


@torch.no_grad()
def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: UMT5EncoderModel,
    prompts: Sequence[str],
    max_sequence_length: int = 512,
    *,
    batch_size: int = 8,
    show_progress: bool = False,
) -> list[torch.Tensor]:
    """Embeds prompts as WAN does: cleaned, cut at `max_sequence_length` tokens, encoded with their mask.

    Args:
        tokenizer: Of the checkpoint.
        text_encoder: Of the checkpoint; its device is used.
        prompts: Any number of texts.
        max_sequence_length: Tokens at most; 512 is what WAN was trained with.
        batch_size: Prompts in one pass.
        show_progress: Whether to show a bar.

    Returns:
        One tensor `(S, D)` a prompt, of its true length S. `pad_prompt_embeds` makes a batch of them.
    """
    embeds = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="prompts", delay=3, disable=not show_progress):
        tokens = tokenizer(
            [prompt_clean(prompt) for prompt in prompts[start : start + batch_size]],
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        lengths = tokens.attention_mask.sum(dim=1).tolist()  # on the host, which then need not wait for the encoder
        ids, mask = (to_device(part, text_encoder.device) for part in (tokens.input_ids, tokens.attention_mask))
        hidden_states = text_encoder(ids, mask).last_hidden_state
        # Cloned: a view would keep the padding in memory.
        embeds += [states[:length].clone() for states, length in zip(hidden_states, lengths, strict=True)]
    return embeds


def warn_of_cut_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_sequence_length: int) -> int:
    """Says how many prompts `encode_prompts` cuts, and which is the first; returns how many.

    Args:
        tokenizer: Of the checkpoint.
        prompts: All that are to be encoded; one that is there twice counts once.
        max_sequence_length: Tokens at most.
    """
    prompts = list(dict.fromkeys(prompts))
    cut = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        tokens = tokenizer([prompt_clean(prompt) for prompt in batch], verbose=False).input_ids
        lengths = map(len, tokens)
        cut += [
            (prompt, length) for prompt, length in zip(batch, lengths, strict=True) if length > max_sequence_length
        ]
    if cut:
        prompt, length = cut[0]
        logger.warning(
            "%d of %d prompt(s) are cut at max_sequence_length=%d tokens, and the model does not see their ends; the "
            "first has %d: %r. Shorten them.",
            *(len(cut), len(prompts), max_sequence_length, length),
            prompt if len(prompt) <= MAX_SHOWN else prompt[:MAX_SHOWN] + "...",
        )
    return len(cut)


class PromptEncoder(Mapping[str, torch.Tensor]):
    """Prompt -> embedding `(S, D)` of its true length, encoded when it is asked for; the last ones are remembered.

    Args:
        tokenizer: Of the checkpoint.
        text_encoder: Of the checkpoint; stays where it is.
        max_sequence_length: Tokens at most.
        num_remembered: Embeddings that are kept.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        max_sequence_length: int,
        num_remembered: int = 256,
    ) -> None:
        self.text_encoder = text_encoder
        has_warned = False

        def encode(prompt: str) -> torch.Tensor:
            nonlocal has_warned
            if not has_warned:  # of the first alone; nobody knows how many there will be
                has_warned = bool(warn_of_cut_prompts(tokenizer, [prompt], max_sequence_length))
            return encode_prompts(tokenizer, text_encoder, [prompt], max_sequence_length)[0]

        self._encode = functools.lru_cache(num_remembered)(encode)

    def __getitem__(self, prompt: str) -> torch.Tensor:
        return self._encode(prompt)

    def __len__(self) -> int:
        return self._encode.cache_info().currsize

    def __iter__(self) -> Iterator[str]:
        raise TypeError("any prompt can be encoded; there is no list of them")


def pad_prompt_embeds(embeds: Sequence[torch.Tensor], max_sequence_length: int = 512) -> torch.Tensor:
    """Pads embeddings `(S, D)` with zeros to `(B, max_sequence_length, D)`; WAN attends to the zeros, unmasked."""
    batch = embeds[0].new_zeros(len(embeds), max_sequence_length, embeds[0].shape[-1])
    for row, embed in zip(batch, embeds, strict=True):
        row[: len(embed)] = embed
    return batch


# --- prompts along a clip --------------------------------------------------------------------------------------------


class TextByFrame(NamedTuple):
    """Embedded prompts of clips in which the prompt changes.

    A tuple, so that a wrapper that looks for the tensors among the inputs of a layer, as FSDP does, finds these.

    Attributes:
        states: `(B P, S, D)`.
        places: The entry of `states` that each latent frame sees, `(B F,)`.
    """

    states: torch.Tensor
    places: torch.Tensor


def fold_prompts(
    prompts: torch.Tensor,
    timestep: torch.Tensor,
    prompt_of_frame: torch.Tensor | None,
    num_frames: int,
    num_context: int,
    *,
    is_whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What a pass takes of prompts that change along clips.

    Args:
        prompts: P of each clip, `(B, P, S, D)`.
        timestep: `(B,)`, or of another shape.
        prompt_of_frame: Number of each frame's prompt among the P, `(B, F)`; None changes nothing.
        num_frames: F.
        num_context: F' first frames that lie before the others once more, as the context of teacher forcing.
        is_whole: Whether the pass is over whole clips, and without image embeddings.

    Returns:
        The prompts as a batch `(B P, S, D)`; the timestep, one a frame if it was one a clip; and the place in the
        batch of the prompt of each frame, context first, `(B (F' + F),)`.

    Raises:
        ValueError: If that does not go together.
    """
    if prompt_of_frame is None:
        return prompts, timestep, None
    if not is_whole:
        raise ValueError(
            "prompt_of_frame is for whole clips without images; with a cache give the block's one prompt."
        )
    if prompts.ndim != 4 or prompt_of_frame.shape != (len(prompts), num_frames):
        raise ValueError(
            f"prompt_of_frame must have shape (B, F) with F={num_frames} latent frames, and the prompts (B, P, S, "
            f"text_dim), got {tuple(prompt_of_frame.shape)} and {tuple(prompts.shape)}."
        )
    first = prompts.shape[1] * torch.arange(len(prompts), device=prompts.device)[:, None]
    places = torch.cat([prompt_of_frame[:, :num_context], prompt_of_frame], dim=1) + first
    timestep = timestep[:, None].expand(places.shape) if timestep.ndim == 1 else timestep
    return prompts.flatten(0, 1), timestep, places.flatten()
