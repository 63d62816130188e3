"""Encodes clips and prompts once: a table of clips -> latents and prompt embeddings, from which training runs read.

    accelerate launch precompute_latents.py --config examples/wan_1.3b_full.yaml --latents_dir data/latents

    accelerate launch train_video_regression.py --config examples/wan_1.3b_full.yaml --latents_dir data/latents

Takes the recipe of the training script; its other settings are passed over. Every process of the launch takes its
share of the clips, on any number of GPUs and machines that see the folder. Latents are found by the content of their
file and by all that shapes them (frames, size, sampling, VAE, precision): a second run does nothing, a new row is one
clip's work, and so is a file that has changed. An interrupted run goes on where it was; damaged entries are made anew.

Exit status: 0 if all is there, 1 if clips could not be decoded, 2 if settings or tables cannot be used, 75 if it was
asked to stop (Ctrl-C, SIGTERM, SIGUSR1): run the same command again.
"""

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from causal_wan.config.choices import LocalPath
from causal_wan.config.outputs import check_output_folder
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import NonNegativeInt, PositiveFloat, PositiveInt, checked_dataclass
from causal_wan.config.settings import (
    DATALOADER_TIMEOUT,
    BaseModelConfig,
    CacheConfig,
    LatentsDtype,
    MemoryConfig,
    ValidationConfig,
)
from causal_wan.data.settings import ClipShape, DataConfig, check_can_be_cached, check_waits_for_clips
from causal_wan.geometry import LatentGeometry
from causal_wan.runs.settings import TRAINING_SETTINGS


@checked_dataclass
class Config:
    """What to encode, and where it goes."""

    data: DataConfig
    model: BaseModelConfig
    validation: ValidationConfig
    latents_dir: LocalPath
    """Folder of the result; one may serve many tables and settings."""
    latents_dtype: LatentsDtype = "bf16"
    """Precision that latents are kept in."""
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None
    """Precision of the text encoder, that of training; what the launch says by default."""
    encode_batch_size: PositiveInt = 1
    """Clips that the VAE encodes at once; more than one may change the last bits."""
    dataloader_num_workers: NonNegativeInt = 2
    """Processes that decode ahead, for each process of the launch."""
    dataloader_timeout: PositiveFloat = DATALOADER_TIMEOUT
    """Seconds to wait for the clips of a batch, at most."""
    vae_slicing: bool = False
    """The VAE encodes the clips of a batch one after the other."""
    vae_tiling: bool = False
    """The VAE encodes in tiles: less memory, slightly other latents."""
    verify: bool = False
    """Read all that is there, and make anew what is damaged."""
    dry_run: bool = False
    """Say what is missing and how much disk it takes, and encode nothing."""

    def __post_init__(self) -> None:
        check_waits_for_clips(self.data, self.dataloader_timeout)
        check_can_be_cached(self.data)


if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    config = parse_config(Config, description=__doc__, also_known=TRAINING_SETTINGS)

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import AutoencoderKLWan
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from causal_wan.cache.encoded_clips import CachedData
from causal_wan.cache.opening import drop_damaged, open_cache
from causal_wan.cache.tensor_cache import GIB, CacheWriter, check_disk, free_bytes, remove_stale_shards
from causal_wan.data.clips import VideoDataset, normalize_videos
from causal_wan.data.descriptions import describe_rows
from causal_wan.data.rows import Row
from causal_wan.data.samples import check_bad_clips
from causal_wan.data.shared_memory import check_shared_memory, collate_shared, shared_memory_here
from causal_wan.data.workers import name_clips_of_dead_workers, worker_settings
from causal_wan.memory.levers import cut_up_vae
from causal_wan.model.text import encode_prompts, warn_of_cut_prompts
from causal_wan.model.vae import encode_videos
from causal_wan.processes import PATIENCE, gather_lists, wait_for_all
from causal_wan.runs.data import RunData, load_run_data
from causal_wan.runs.parts import fit_to_checkpoint
from causal_wan.training.stopping import EXIT_STOPPED, StopRequest
from causal_wan.training.strategies import beside_fp8
from causal_wan.weights.parts import DTYPES, load_text_encoder, load_vae


PROMPT_BYTES = 1 << 20  # about what an embedding of UMT5-XXL takes in 16 bits, of a prompt of 128 tokens
PROMPTS_AT_ONCE = 64
Work = tuple[int, ClipShape]  # index of a row, and a shape in which it is wanted


@user_errors(OSError)
def main(config: Config) -> None:
    """Finds what is missing, and encodes it."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    with user_errors():
        check_output_folder("latents_dir", config.latents_dir)
        config = replace(config, data=fit_to_checkpoint(config.data, config.model))
        data = load_run_data(
            config.data,
            validation_metadata_path=config.validation.validation_metadata_path,
            num_validation_samples=config.validation.num_validation_samples,
            cache_dir=Path(config.latents_dir),
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=beside_fp8(config.mixed_precision),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    with user_errors():
        cached, rows = open_cache(
            CacheConfig(latents_dir=config.latents_dir, latents_dtype=config.latents_dtype),
            config.data,
            config.model,
            data.videos,
            data.manifest,
            vae_tiling=config.vae_tiling,
            text_dtype="bf16" if accelerator.mixed_precision == "bf16" else "fp32",
            encodes=True,
        )
    missing, missing_prompts = find_missing(accelerator, config, data, cached, rows)
    if accelerator.is_main_process:
        num_bytes = needed_bytes(config, missing, missing_prompts)
        print(describe_work(config, rows, missing, missing_prompts, num_bytes))
        with user_errors():
            check_disk("latents_dir", config.latents_dir, num_bytes)
    if config.dry_run:
        return
    wait_for_all()  # until the disk is checked
    with user_errors():
        check_room_for_batches(accelerator, config, missing)
    with StopRequest() as stop, user_errors():
        encode_missing_prompts(accelerator, config, cached, missing_prompts, stop)
        errors = encode_missing_clips(accelerator, config, cached, rows, missing, stop)
    stopped = any(gather_lists([stop.received]))
    errors = sorted(gather_lists(errors))
    accelerator.end_training()
    if accelerator.is_main_process and stopped:
        print(f"stopped: what is encoded so far is kept in {config.latents_dir}; the same command encodes the rest.")
    if accelerator.is_main_process and not stopped:
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
        print(f"{len(missing) - len(errors)} clips and {len(missing_prompts)} prompts encoded in {config.latents_dir}")
    if stopped or errors:
        sys.exit(EXIT_STOPPED if stopped else 1)


# --- what is missing -------------------------------------------------------------------------------------------------


def find_missing(
    accelerator: Accelerator, config: Config, data: RunData, cached: CachedData, rows: list[Row]
) -> tuple[list[Work], list[str]]:
    """Clips, sorted by shape, and prompts that are not there, or damaged. Called by every process."""
    if accelerator.is_main_process:
        for cache in (cached.latents, cached.prompts):
            remove_stale_shards(cache.folder)
    if config.verify:
        drop_damaged((cached.latents, cached.prompts))
    found = []
    if accelerator.is_main_process:  # for all: on a shared disk, others may not see the newest shards yet
        missing = cached.missing_clips(rows, data.wanted_shapes())
        missing.sort(key=lambda work: (work[1], work[0]))
        prompts = ["", *config.validation.validation_prompts, *data.prompts]
        found = [(missing, cached.missing_prompts(prompts))]
    ((missing, missing_prompts),) = gather_lists(found)
    return missing, missing_prompts


def describe_work(config: Config, rows: list[Row], missing: list[Work], prompts: list[str], num_bytes: int) -> str:
    """What is there and what is going to be done."""
    free = free_bytes(config.latents_dir)
    shapes = sorted({shape for _, shape in missing})
    listed = ", ".join(f"{frames} x {height} x {width}" for frames, height, width in shapes)
    return "\n".join(
        [
            f"data        {describe_rows(rows)}",
            f"missing     {len(missing)} clips" + (f" of {listed}" if shapes else "") + f", {len(prompts)} prompts",
            f"disk        {num_bytes / GIB:.2f} GiB needed, {free / GIB:.1f} GiB free",
            f"result      {config.latents_dir}",
        ]
    )


def needed_bytes(config: Config, missing: list[Work], prompts: list[str]) -> int:
    """Disk that the missing entries take; of the prompts, about."""
    vae = AutoencoderKLWan.load_config(
        config.model.pretrained_model_name_or_path, subfolder="vae", revision=config.model.revision
    )
    geometry = LatentGeometry.of(vae)
    latents = sum(math.prod(geometry.latent_shape(*shape)) for _, shape in missing)
    return latents * DTYPES[config.latents_dtype].itemsize + len(prompts) * PROMPT_BYTES


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_missing_prompts(
    accelerator: Accelerator, config: Config, cached: CachedData, prompts: list[str], stop: StopRequest
) -> None:
    """Embeds this process's share of the prompts; the text encoder is freed on return."""
    own = prompts[accelerator.process_index :: accelerator.num_processes]
    if not own:
        return
    tokenizer, text_encoder = load_text_encoder(
        config.model.pretrained_model_name_or_path,
        dtype=DTYPES[cached.encoders.text_dtype],
        revision=config.model.revision,
        device=accelerator.device,
    )
    if accelerator.is_main_process:
        warn_of_cut_prompts(tokenizer, prompts, config.model.max_sequence_length)
    bar = tqdm(total=len(own), desc="prompts", unit="prompt", disable=not accelerator.is_main_process)
    with cached.prompt_writer() as writer, bar:
        for start in range(0, len(own), PROMPTS_AT_ONCE):
            if stop.received:
                return
            batch = own[start : start + PROMPTS_AT_ONCE]
            embeds = encode_prompts(tokenizer, text_encoder, batch, config.model.max_sequence_length)
            for prompt, embed in zip(batch, embeds, strict=True):
                writer.add(cached.prompt_key(prompt), embed, cached.prompt_settings)
            bar.update(len(batch))


class MissingClips(Dataset):
    """Decodes the clips that are to be encoded.

    Args:
        videos: The data set.
        work: What to decode.
    """

    def __init__(self, videos: VideoDataset, work: Sequence[Work]) -> None:
        self.videos, self.work = videos, work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index, shape = self.work[item]
        try:
            return {**self.videos.load(index, torch.Generator(), shape), "shape": shape}
        except ValueError as error:
            return {"error": str(error)}


def batches_of_one_shape(work: Sequence[Work], batch_size: int) -> Iterator[list[int]]:
    """Items of `work`, which is sorted by shape, in batches of one shape."""
    batch: list[int] = []
    for item, (_, shape) in enumerate(work):
        if batch and (len(batch) == batch_size or work[batch[0]][1] != shape):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def check_room_for_batches(accelerator: Accelerator, config: Config, missing: list[Work]) -> None:
    """Checks that the workers of the data loaders can hand over their batches. Called by every process.

    Raises:
        ValueError: If they cannot.
    """
    warning = check_shared_memory(
        gather_lists([shared_memory_here()]),
        batch_bytes=config.encode_batch_size * max((3 * math.prod(shape) for _, shape in missing), default=0),
        num_workers=config.dataloader_num_workers,
        pin_memory=False,
    )
    if warning and accelerator.is_main_process:
        print(f"warning     {warning}")


def encode_missing_clips(
    accelerator: Accelerator,
    config: Config,
    cached: CachedData,
    rows: list[Row],
    missing: list[Work],
    stop: StopRequest,
) -> list[str]:
    """Encodes this process's share of the clips, and returns what is wrong with those that do not decode.

    Raises:
        ValueError: If more than max_bad_samples do not; what was encoded stays.
    """
    work, errors = missing[accelerator.process_index :: accelerator.num_processes], []
    if not work:
        return errors
    vae = load_vae(
        config.model.pretrained_model_name_or_path,
        dtype=DTYPES[config.model.vae_dtype],
        revision=config.model.revision,
    ).to(accelerator.device)
    cut_up_vae(vae, MemoryConfig(vae_slicing=config.vae_slicing, vae_tiling=config.vae_tiling))
    videos = VideoDataset(rows, config.data)
    loader = DataLoader(
        MissingClips(videos, work),
        batch_sampler=list(batches_of_one_shape(work, config.encode_batch_size)),
        collate_fn=partial(collate_shared, list),
        **worker_settings(config.dataloader_num_workers, config.dataloader_timeout),
    )
    # The bar of the main process stands for all: they have equal shares.
    bar = tqdm(total=len(missing), desc="clips", unit="clip", disable=not accelerator.is_main_process)
    with name_clips_of_dead_workers(videos), cached.latent_writer() as writer, bar:
        for batch in loader:
            if stop.received:
                break
            samples = [sample for sample in batch if "error" not in sample]
            errors += [sample["error"] for sample in batch if "error" in sample]
            check_bad_clips(errors, config.data.max_bad_samples)
            if samples:
                store(writer, cached, rows, samples, encode_samples(vae, samples))
            bar.update(min(len(batch) * accelerator.num_processes, len(missing) - bar.n))
    return errors


def encode_samples(vae: Any, samples: list[dict[str, Any]]) -> torch.Tensor:
    """Latents `(B, C, F, H, W)` of decoded clips."""
    return encode_videos(vae, normalize_videos(torch.stack([sample["video"].to(vae.device) for sample in samples])))


def store(
    writer: CacheWriter, cached: CachedData, rows: list[Row], samples: list[dict[str, Any]], latents: torch.Tensor
) -> None:
    """Hands latents to the writer, each under its key."""
    for sample, latent in zip(samples, latents, strict=True):
        key = cached.latent_key(rows[sample["row_index"]].content, sample["shape"])
        settings = cached.latent_settings(sample["shape"])
        writer.add(key, latent.to(cached.dtype), settings, num_valid_frames=sample["num_valid_frames"])


if __name__ == "__main__":
    main(config)
