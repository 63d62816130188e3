"""A run that trains a student by regression, whatever its data and its loss: the two are functions of the script.

A script says how a batch of the data loader becomes noisy latents, and what is minimised; `run_regression` does what
remains. A method with a loop of its own takes `begin_run` and `finish_run`, and what lies between is its affair.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, S = prompt tokens,
D = text dimension, T = video frames.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from tqdm.auto import tqdm

from causal_wan.basics import num_valid_latent_frames
from causal_wan.checkpoints import check_output_dir
from causal_wan.compiling import seconds_compiling
from causal_wan.config import flat_dict, user_errors, write_recipe
from causal_wan.data_config import ClipShape
from causal_wan.devices import to_device
from causal_wan.encoding import check_video_size, encode_videos, pad_prompt_embeds
from causal_wan.hub import DATA_SUMMARY_NAME, HubUploads, start_uploads
from causal_wan.losses import level_statistics
from causal_wan.memory import on_device
from causal_wan.models import check_generator_ckpt
from causal_wan.regression import NoisyBatch, summarize_levels
from causal_wan.run_config import RunConfig
from causal_wan.run_data import RunData, load_run_data
from causal_wan.run_parts import (
    embed_prompts,
    latent_shape,
    make_student,
    make_vae,
    save_student,
    text_dtype,
    with_absolute_paths,
    with_checkpointing_of_launch,
)
from causal_wan.run_plan import describe_memory, describe_plan
from causal_wan.strategies import count_replicas
from causal_wan.trackers import Trackers, resolve_trackers
from causal_wan.training import (
    EXIT_STOPPED,
    Batch,
    Run,
    Sums,
    ema_weights,
    gather_weights,
    make_accelerator,
    prepare_run,
    start_trackers,
    train,
)
from causal_wan.transformer import CausalWanTransformer3DModel
from causal_wan.validation import Validation, share
from dataset_utils import name_clips_of_dead_workers, normalize_videos


@dataclass
class Inputs:
    """What a method has beside the transformer, and what makes latents and embeddings of its batches.

    Attributes:
        config: Of the run.
        prompt_embeds: Prompt -> `(S, D)`.
        vae: Its weights are not there if the run needs none.
        device: Of the passes.
        data: Of the run.
    """

    config: RunConfig
    prompt_embeds: Mapping[str, torch.Tensor]
    vae: AutoencoderKLWan
    device: torch.device
    data: RunData
    bad_clips: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.levels = self.config.method.levels()
        self.seed = self.config.training.seed

    def find_latents(self, batch: Batch) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of a batch of clips, some of which may be latents already."""
        clips = [to_device(clip, self.device) for clip in batch["clips"]]
        if self.data.keeper is None and not clips[0].is_floating_point():
            return self.encode(torch.stack(clips))
        for number, (clip, key) in enumerate(zip(clips, batch["cache_keys"], strict=True)):
            if not clip.is_floating_point():  # encoded on its own: what is kept does not depend on the batch
                shape, num_valid = ClipShape(*clip.shape[1:]), int(batch["num_valid_frames"][number])
                clips[number] = self.data.keeper.keep(key, self.encode(clip[None])[0], shape, num_valid)
        return torch.stack([clip.float() for clip in clips])

    def encode(self, videos: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of uint8 videos `(B, 3, T, height, width)`."""
        with on_device(self.vae, self.device):
            return encode_videos(self.vae, normalize_videos(videos.to(self.device)))

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Padded embeddings `(B, S, D)` of prompts that were embedded before training."""
        embeds = [self.prompt_embeds[prompt] for prompt in prompts]
        return to_device(pad_prompt_embeds(embeds, self.config.model.max_sequence_length), self.device)

    def count_valid_frames(self, batch: Batch) -> list[int]:
        """Latent frames before padding, of each clip of a batch."""
        factor = self.config.data.time_division_factor
        return [num_valid_latent_frames(frames, factor) for frames in batch["num_valid_frames"].tolist()]

    def with_prompts(self, noisy: NoisyBatch, batch: Batch) -> Batch:
        """What `compute_loss` gets: noisy latents, the embeddings of a batch, and what the loop counts."""
        return {
            "noisy": noisy,
            "prompt_embeds": self.embed(batch["prompts"]),
            "num_bad_samples": len(batch["errors"]),
            "num_items": noisy.mask.sum(),
            "num_tokens": noisy.latents[:, 0].numel() // 4,  # patches of 1 x 2 x 2
        }

    def count_errors(self, batch: Batch, predicted_latents: torch.Tensor) -> Sums:
        """What `summarize` makes metrics of, for a prepared batch and predicted clean latents `(B, C, F, H, W)`."""
        noisy = batch["noisy"]
        statistics = level_statistics(
            predicted_latents, noisy.latents, noisy.level_indices, noisy.mask, len(self.levels)
        )
        return {"levels": statistics, "num_bad_samples": statistics.new_full((), batch["num_bad_samples"])}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Sums of `compute_loss` over steps and processes -> metrics by level."""
        metrics = summarize_levels(sums["levels"].cpu(), self.levels, bin_width=self.config.method.bin_width)
        metrics["num_bad_samples"] = float(sums["num_bad_samples"])
        return metrics | ({"compile_seconds": seconds_compiling()} if self.config.compile else {})

    def take_note(self, batch: Batch) -> None:
        """Remembers how far the batch has come in the streams, and reports clips of it that broke and were replaced.

        Raises:
            ValueError: Above `max_bad_samples`.
        """
        if "lane_states" in batch:
            self.data.lane_states.update(batch)
        for error in batch["errors"]:
            if error not in self.bad_clips:  # said once, though it comes back every epoch
                tqdm.write(f"replaced a clip that does not decode: {error}")
        self.bad_clips.update(batch["errors"])
        if len(self.bad_clips) > self.config.data.max_bad_samples:
            raise ValueError(
                f"at most max_bad_samples={self.config.data.max_bad_samples} clips may fail to decode, but "
                f"{len(self.bad_clips)} did, last: {batch['errors'][-1]}. Repair or remove them, or raise "
                "--max_bad_samples."
            )


PrepareBatch = Callable[[Inputs, Batch], Batch]
ComputeLoss = Callable[[Inputs, torch.nn.Module, Batch, torch.Tensor], tuple[torch.Tensor, Sums]]


# --- the run ---------------------------------------------------------------------------------------------------------


def load_clips(config: RunConfig) -> RunData:
    """The clips of a run's tables or streams.

    Raises:
        ValueError: If they cannot be used.
    """
    data = load_run_data(
        config.data,
        validation_metadata_path=config.validation.validation_metadata_path,
        num_validation_samples=config.validation.num_validation_samples,
        cache_dir=config.cache_dir,
    )
    data.check_stream(config.training.seed)
    return data


def load_held_out_clips(config: RunConfig) -> RunData:
    """The held-out clips of a run that trains on something else.

    Raises:
        ValueError: If they cannot be used.
    """
    return load_run_data(
        config.data,
        validation_metadata_path=config.validation.validation_metadata_path,
        num_validation_samples=config.validation.num_validation_samples,
        cache_dir=config.cache_dir,
        held_out_only=True,
    )


def run_regression(
    config: RunConfig,
    prepare_batch: PrepareBatch,
    compute_loss: ComputeLoss,
    *,
    load_data: Callable[[RunConfig], RunData] = load_clips,
    prepare_held_out: PrepareBatch | None = None,
) -> None:
    """Checks everything that needs no weights, then trains, and saves the result.

    Args:
        config: Of the run.
        prepare_batch: A batch of the data loader -> `Inputs.with_prompts`; called without gradients.
        compute_loss: The loss of a batch as its share of the step's mean, and sums for `Inputs.summarize`.
        load_data: What is trained on; raises ValueError if it cannot be used.
        prepare_held_out: Like prepare_batch, of held-out clips; None is the same.
    """
    with user_errors():
        check_generator_ckpt(config.model.generator_ckpt)
        check_output_dir(config.training.output_dir, config.training.resume_from_checkpoint)
        resolve_trackers(config.training.report_to)
        data = load_data(config)
    if config.dry_run:
        print_plan(config, data)
        return
    begun = begin_run(config, data)
    accelerator, inputs, config = begun.accelerator, begun.inputs, begun.inputs.config
    dataset = data.dataset()
    if data.streams:
        accelerator.register_for_checkpointing(data.lane_states)
    with user_errors():
        run = prepare_run(accelerator, config.training, begun.transformer, begun.trackers)
    compute_loss = partial(compute_loss, inputs)
    validate = Validation(
        accelerator,
        inputs,
        compute_loss,
        output_dir=config.training.output_dir,
        prompts=validation_prompts(config, data),
        batches=validation_batches(accelerator, inputs, prepare_held_out or prepare_batch),
        latent_shape=latent_shape(config, inputs.vae),
    )

    @torch.no_grad()
    def prepare(batch: Batch) -> Batch:
        inputs.take_note(batch)
        return prepare_batch(inputs, batch)

    with name_clips_of_dead_workers(dataset), data.keeper or contextlib.nullcontext():
        complete = train(
            run,
            make_dataloader=partial(data.make_loader, dataset, **loader_settings(config, run)),
            prepare_batch=prepare,
            compute_loss=compute_loss,
            summarize=inputs.summarize,
            validate=validate if validate.prompts else None,
            before_checkpoint=data.gather_lane_states if data.streams else None,
            after_checkpoint=begun.uploads.upload_checkpoint if begun.uploads else None,
        )
    finish_run(begun, run, complete=complete)


def print_plan(config: RunConfig, data: RunData) -> None:
    """What a run is going to do, and what it takes, without weights."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.training.mixed_precision
    )
    config = with_checkpointing_of_launch(config, accelerator)
    if not accelerator.is_main_process:
        return
    print(describe_plan(config, data, count_replicas(accelerator)))
    try:
        print(describe_memory(config, accelerator))
    except OSError as error:  # the checkpoint is on the hub, and the hub out of reach
        print(f"memory      unknown without the checkpoint's configuration: {error}")


@dataclass
class BegunRun:
    """A run with its parts loaded, before anything is trained."""

    accelerator: Accelerator
    inputs: Inputs
    transformer: CausalWanTransformer3DModel
    trackers: Trackers
    uploads: HubUploads | None


def begin_run(config: RunConfig, data: RunData) -> BegunRun:
    """Says what is going to happen, opens the cache, and loads what the run needs; ends with status 2 if it cannot."""
    accelerator = make_accelerator(config.training)
    config = with_checkpointing_of_launch(config, accelerator)
    if accelerator.is_main_process:
        write_recipe(with_absolute_paths(config), Path(config.training.output_dir) / "config.yaml")
        print(describe_plan(config, data, count_replicas(accelerator)))
        with user_errors():
            print(describe_memory(config, accelerator))
    held_out = validation_prompts(config, data)
    prompts = [*data.prompts, *held_out, *config.validation.negative_prompts]
    with user_errors():
        trackers = start_trackers(accelerator, config.training, flat_dict(config))
        uploads = start_uploads(config.hub, config.training.output_dir) if accelerator.is_main_process else None
        check_streaming(config, accelerator)
        data.open_cache(
            config.cache,
            config.model,
            prompts,
            vae_tiling=config.memory.vae_tiling,
            text_dtype="bf16" if text_dtype(accelerator) == torch.bfloat16 else "fp32",
            encodes=config.encodes,
        )
    prompt_embeds = embed_prompts(accelerator, config.model, prompts, data.cached, streaming=config.data.streaming)
    with user_errors():
        transformer = make_student(config, accelerator)
    vae = make_vae(config, accelerator.device, is_needed=(config.encodes and data.has_clips) or bool(held_out))
    with user_errors():
        for shape in config.data.all_shapes():
            check_video_size(*shape, vae=vae, transformer=transformer)
    inputs = Inputs(config, prompt_embeds, vae, accelerator.device, data)
    return BegunRun(accelerator, inputs, transformer, trackers, uploads)


def finish_run(begun: BegunRun, run: Run, *, complete: bool) -> None:
    """Saves the result; or ends the program with `EXIT_STOPPED` if it is not complete."""
    accelerator, config = begun.accelerator, begun.inputs.config
    if not complete:
        begun.trackers.finish()
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    with ema_weights(run.ema, run.unwrapped_model):
        weights = gather_weights(run)
    if accelerator.is_main_process:
        save_student(run.unwrapped_model, weights, config)
        (Path(config.training.output_dir) / DATA_SUMMARY_NAME).write_text(json.dumps(begun.inputs.data.count()))
        print(f"saved: generate.py --checkpoint {config.training.output_dir} --prompt '...'")
    accelerator.wait_for_everyone()
    begun.trackers.finish()
    accelerator.end_training()
    if begun.uploads:
        begun.uploads.finish()


def check_streaming(config: RunConfig, accelerator: Accelerator) -> None:
    """Checks that each process may read clips of its own.

    Raises:
        ValueError: If groups of processes share clips.
    """
    if config.data.streaming and count_replicas(accelerator) != accelerator.num_processes:
        raise ValueError("--streaming gives each process clips of its own; launch without context parallelism.")


def loader_settings(config: RunConfig, run: Run) -> dict[str, Any]:
    """Those of `RunData.make_loader` that stay the same through a run."""
    return {
        "seed": config.training.seed,
        "samples_per_step": config.training.samples_per_step(run.num_replicas),
        "batch_size": config.training.train_batch_size,
        "num_workers": config.training.dataloader_num_workers,
        "num_processes": run.accelerator.num_processes,
        "pin_memory": run.accelerator.device.type == "cuda",
    }


def validation_prompts(config: RunConfig, data: RunData) -> list[str]:
    """The prompts that are sampled at each validation: of the held-out clips, then those that are given."""
    return [row.prompts[0] for row in data.validation_rows] + list(config.validation.validation_prompts)


@torch.no_grad()
def validation_batches(
    accelerator: Accelerator, inputs: Inputs, prepare_batch: PrepareBatch
) -> list[tuple[Batch, bool]]:
    """This process's share of the held-out clips, encoded and noised once: the same draws at every validation."""
    data, dataset = inputs.data, inputs.data.dataset(held_out=True)
    numbers = share(len(dataset), accelerator.process_index, accelerator.num_processes)
    return [(prepare_batch(inputs, data.validation_batch(dataset, number)), counts) for number, counts in numbers]
