"""The embeddings of a run's prompts: made once, before training, and kept where there is room for them.

Shapes: S = prompt tokens, D = text dimension.
"""

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from causal_wan.cache.encoded_clips import PROMPT_SHARD_BYTES, CachedData, CachedPrompts
from causal_wan.cache.tensor_cache import CacheWriter, TensorCache, settings_key
from causal_wan.config.settings import BaseModelConfig
from causal_wan.model.text import PromptEncoder, encode_prompts, warn_of_cut_prompts
from causal_wan.processes import gather_lists, gather_on_machine, num_processes, process_index, wait_for_all
from causal_wan.progress import announced, show_progress
from causal_wan.runs.parts import text_dtype
from causal_wan.weights.parts import load_text_encoder


PROMPTS_AT_ONCE = 64  # on the device as embeddings, of 4 MB each at most
IN_MEMORY = 1 << 30  # bytes of embeddings that every process may keep in memory; more of them stay on disk
PREFIX = ".prompt-embeddings-"  # of a folder in the output folder, while a run is on
SECONDS_TO_SEE = 90.0  # until what another machine has written to a shared disk is seen, at most

Encode = Callable[[Sequence[str]], Iterator[tuple[str, torch.Tensor]]]  # prompts -> each with its embedding `(S, D)`


def embed_prompts(
    accelerator: Any,
    model: BaseModelConfig,
    prompts: list[str],
    cached: CachedData | None,
    *,
    output_dir: str | Path,
    streaming: bool = False,
) -> Mapping[str, torch.Tensor]:
    """Embeds each distinct prompt once, split over the processes; the text encoder is freed on return.

    Called by every process. 20,000 embeddings can be 80 GB: they leave the device as they are made, and what may be
    more than `IN_MEMORY` is written to disk, and read one by one.

    Returns:
        Prompt -> `(S, D)` of its true length S, on the CPU; read from the cache if there is one, or from a folder in
        the output folder that goes with the mapping; encoded when needed if clips are streamed, since their prompts
        are not known beforehand.

    Raises:
        ValueError: If a process does not see the folder of the cache, or the output folder has no room for them.
    """
    found = []
    if process_index() == 0:  # for all: on a shared disk, others may not see the same
        found = sorted(set(prompts)) if cached is None else cached.missing_prompts(prompts)
    missing = gather_lists(found)
    if not missing and not streaming:
        return {} if cached is None else _wait_to_see(prompts, cached)
    tokenizer, text_encoder = load_text_encoder(
        model.pretrained_model_name_or_path,
        dtype=text_dtype(accelerator),
        revision=model.revision,
        device=accelerator.device,
    )
    length = model.max_sequence_length
    if streaming:
        return PromptEncoder(tokenizer, text_encoder, length)
    if process_index() == 0:
        warn_of_cut_prompts(tokenizer, missing, length)

    encode, own = partial(_encode, tokenizer, text_encoder, length), missing[process_index() :: num_processes()]
    if cached is not None:
        with cached.prompt_writer() as writer:
            for prompt, embed in encode(own):
                writer.add(cached.prompt_key(prompt), embed, cached.prompt_settings)
        wait_for_all()
        return _wait_to_see(prompts, cached)
    if len(missing) * length * text_encoder.config.d_model * text_encoder.dtype.itemsize > IN_MEMORY:
        return _embed_into_folder(missing, encode, Path(output_dir).resolve())
    return dict(gather_lists(list(encode(own))))


def _encode(
    tokenizer: PreTrainedTokenizerBase, text_encoder: UMT5EncoderModel, length: int, prompts: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each prompt with its embedding `(S, D)` on the CPU; few at a time are on the device."""
    said = announced(f"embedding {len(prompts)} prompt(s)")  # a bar has nothing to show before its first step
    with said, show_progress(total=len(prompts), desc="prompts") as bar:
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            batch = prompts[start : start + PROMPTS_AT_ONCE]
            for prompt, embed in zip(batch, encode_prompts(tokenizer, text_encoder, batch, length), strict=True):
                yield prompt, embed.cpu()
            bar.update(len(batch))


def _wait_to_see(prompts: Sequence[str], cached: CachedData) -> CachedPrompts:
    """The embeddings of a cache, once this process sees all of them: on a shared disk that may take its time.

    Raises:
        ValueError: If it does not.
    """
    deadline = time.monotonic() + SECONDS_TO_SEE
    cached.prompts.refresh()
    while (unseen := cached.missing_prompts(prompts)) and time.monotonic() < deadline:
        time.sleep(1)
        cached.prompts.refresh()
    if unseen:
        raise ValueError(
            f"latents_dir must be a folder that all machines of the launch see, but {len(unseen)} embeddings that "
            f"other processes have written are not in {cached.folder}; use a shared disk, or train without a cache."
        )
    return CachedPrompts(cached.prompts, cached.prompt_key)


def _embed_into_folder(missing: Sequence[str], encode: Encode, output_dir: Path) -> CachedPrompts:
    """Writes embeddings to a folder of each machine's own, so that machines need no disk in common.

    Each machine embeds all prompts, split over its processes: a minute or so of work, for 20,000 of them.

    Raises:
        ValueError: If there is no room.
    """
    of_machine = gather_on_machine([process_index()])
    number = of_machine.index(process_index())
    if number == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        for left_behind in output_dir.glob(PREFIX + "*"):  # by a run that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
    wait_for_all()  # or one machine would take the new folder of another for an old one
    made = [tempfile.mkdtemp(prefix=PREFIX, dir=output_dir)] if number == 0 else []
    (folder,) = gather_on_machine(made)
    prompts = CachedPrompts(TensorCache(folder), partial(settings_key, {}))
    if made:
        weakref.finalize(prompts, _remove, folder, os.getpid())
    try:
        with CacheWriter(folder, shard_bytes=PROMPT_SHARD_BYTES) as writer:
            for prompt, embed in encode(missing[number :: len(of_machine)]):
                writer.add(prompts.key(prompt), embed, {})
    except OSError as error:
        raise ValueError(
            f"output_dir must have room for the embeddings of {len(missing)} prompts while the run is on, but they "
            f"cannot be written: {error}; make room, or use another --output_dir."
        ) from error
    wait_for_all()
    prompts.cache.refresh()
    return prompts


def _remove(folder: str, process_id: int) -> None:
    """Removes a folder; not where a process that was forked off comes to its end."""
    if os.getpid() == process_id:
        shutil.rmtree(folder, ignore_errors=True)
