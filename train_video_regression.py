"""Video regression: WAN learns to predict clean latents from noised latents of your own videos, in few causal steps.

    accelerate launch train_video_regression.py --config examples/sketch/recipe.yaml

    accelerate launch train_video_regression.py \\
        --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
        --dataset_base_path data/videos --metadata_path data/metadata.csv \\
        --output_dir outputs/my-wan --mixed_precision bf16 --gradient_checkpointing

For every block of `num_frame_per_block` latent frames, a level is drawn from `denoising_step_list` and the block is
noised to it. The transformer sees each block and those before it, at their levels, and predicts the velocity; the loss
is the squared error of the clean latents that follow from it, over the frames that are not clean already.

Regression learns a conditional mean: where the prompt and the past do not determine the video, few steps blur. See
`blur_gap_at_time_*` in the README for telling that from too little training.

Source: CausVid, arXiv 2412.07772, section 4.3, with (clip, fresh noise) in the place of ODE pairs.
"""

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from tqdm.auto import tqdm

from causal_wan.cached_data import (
    CacheConfig,
    CachedData,
    CachedPrompts,
    check_can_be_cached,
    gather_lists,
)
from causal_wan.checkpoints import check_output_dir
from causal_wan.config import flat_dict, parse_config, user_errors, write_recipe
from causal_wan.encoding import PromptEncoder, check_video_size, encode_prompts, encode_videos, pad_prompt_embeds
from causal_wan.export import write_pipeline_file
from causal_wan.flow import latents_from_velocity, velocity
from causal_wan.hub import DATA_SUMMARY_NAME, HubConfig, start_uploads
from causal_wan.losses import frame_losses, level_statistics, masked_sum_over_count
from causal_wan.memory import (
    MemoryConfig,
    cut_up_vae,
    enable_gradient_checkpointing,
    on_device,
    quantization_config,
    store_in_fp8,
)
from causal_wan.memory_plan import describe_shortage, plan_run
from causal_wan.models import (
    DTYPES,
    ModelConfig,
    add_lora,
    causal_settings,
    check_generator_ckpt,
    load_text_encoder,
    load_transformer,
    load_vae,
    load_vae_config,
    save_lora,
    save_transformer,
)
from causal_wan.regression import draw_noisy_batch, num_valid_latent_frames, summarize_levels
from causal_wan.regression_config import RegressionConfig
from causal_wan.run_data import RunData, load_run_data
from causal_wan.sample_order import ClipShape
from causal_wan.strategies import (
    context_mesh,
    count_replicas,
    free_memory,
    is_sharded,
    keeps_weights_in_16_bits,
    loads_weights,
    sharding,
    takes_over_checkpointing,
)
from causal_wan.trackers import resolve_trackers
from causal_wan.training import (
    EXIT_STOPPED,
    Batch,
    Sums,
    TrainingConfig,
    ema_weights,
    gather_weights,
    make_accelerator,
    prepare_run,
    start_trackers,
    train,
)
from causal_wan.transformer import CausalWanTransformer3DModel
from causal_wan.validation import Validation, ValidationConfig, share
from dataset_utils import (
    DataConfig,
    describe_flip,
    describe_shapes,
    describe_speed_up,
    name_clips_of_dead_workers,
    normalize_videos,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a run, by group."""

    model: ModelConfig
    memory: MemoryConfig
    data: DataConfig
    method: RegressionConfig
    training: TrainingConfig
    validation: ValidationConfig
    cache: CacheConfig
    hub: HubConfig
    dry_run: bool = False
    """Resolve the config, check the data, print the plan and the memory it takes, and stop; loads no weights."""

    def __post_init__(self) -> None:
        for shape in self.data.all_shapes():
            self.method.block_lengths(self.num_latent_frames(shape))
        if self.cache_dir is not None:
            check_can_be_cached(self.data)
        if self.memory.quantize_base and not self.model.lora_rank:
            raise ValueError(
                f"quantize_base {self.memory.quantize_base} freezes the base, so something else must be trained; add "
                "--lora_rank 64, or leave it out."
            )

    @property
    def vae_dtype(self) -> torch.dtype:
        """Of the VAE's weights and passes."""
        return DTYPES[self.model.vae_dtype]

    @property
    def cache_dir(self) -> Path | None:
        """Folder of latents and prompt embeddings, if there is one."""
        if self.cache.latents_dir is not None:
            return Path(self.cache.latents_dir)
        return Path(self.training.output_dir) / "cache" if self.cache.cache_latents else None

    @property
    def encodes(self) -> bool:
        """Whether clips and prompts may have to be encoded, rather than read."""
        return self.cache_dir is None or self.cache.cache_latents

    def num_latent_frames(self, shape: ClipShape) -> int:
        """F, latent frames of a clip."""
        return num_valid_latent_frames(shape.num_frames, self.data.time_division_factor)


# --- the method ------------------------------------------------------------------------------------------------------


@dataclass
class VideoRegression:
    """The loss, and what it needs beside the transformer."""

    config: Config
    prompt_embeds: Mapping[str, torch.Tensor]
    vae: AutoencoderKLWan
    device: torch.device
    seed: int
    data: RunData

    def __post_init__(self) -> None:
        self.levels = self.config.method.levels()
        self.bad_clips: set[str] = set()

    @torch.no_grad()
    def prepare_batch(self, batch: Batch) -> Batch:
        """Clips of the data loader -> latents noised block by block."""
        self.count_bad_samples(batch["errors"])
        if "lane_states" in batch:
            self.data.lane_states.update(batch)
        latents = self.find_latents(batch)
        noisy = draw_noisy_batch(
            latents,
            self.config.method,
            self.config.method.block_lengths(latents.shape[2]),
            seed=self.seed,
            sample_numbers=batch["sample_numbers"].tolist(),
            num_valid_frames=[
                num_valid_latent_frames(frames, self.config.data.time_division_factor)
                for frames in batch["num_valid_frames"].tolist()
            ],
        )
        return {
            "noisy": noisy,
            "prompt_embeds": self.embed(batch["prompts"]),
            "num_bad_samples": len(batch["errors"]),
            "num_items": noisy.mask.sum(),
            "num_tokens": latents[:, 0].numel() // 4,  # patches of 1 x 2 x 2
        }

    def find_latents(self, batch: Batch) -> torch.Tensor:
        """Latents `(B, C, F, H, W)` of a batch of clips, some of which may be latents already."""
        clips = [clip.to(self.device) for clip in batch["clips"]]
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
        return pad_prompt_embeds(embeds, self.config.model.max_sequence_length).to(self.device)

    def compute_loss(
        self, transformer: torch.nn.Module, batch: Batch, num_items: torch.Tensor
    ) -> tuple[torch.Tensor, Sums]:
        """Mean over the step's noisy frames of the error of the predicted clean latents."""
        noisy, method = batch["noisy"], self.config.method
        predicted_velocity = transformer(
            noisy.noisy_latents,
            noisy.timesteps,
            batch["prompt_embeds"],
            context_latents=noisy.context_latents,
            context_timestep=noisy.context_timesteps,
            return_dict=False,
        )[0]
        predicted_latents = latents_from_velocity(noisy.noisy_latents, predicted_velocity, noisy.sigmas)
        if method.loss_space == "latents":
            errors = frame_losses(predicted_latents, noisy.latents, method.loss_type)
        else:
            errors = frame_losses(predicted_velocity, velocity(noisy.latents, noisy.noise), method.loss_type)
        loss = masked_sum_over_count(method.loss_weights(noisy.sigmas) * errors, noisy.mask, num_items)
        statistics = level_statistics(
            predicted_latents, noisy.latents, noisy.level_indices, noisy.mask, len(self.levels)
        )
        return loss, {"levels": statistics, "num_bad_samples": loss.new_tensor(batch["num_bad_samples"])}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Sums of `compute_loss` over steps and processes -> metrics by level."""
        metrics = summarize_levels(sums["levels"].cpu(), self.levels, bin_width=self.config.method.bin_width)
        return metrics | {"num_bad_samples": float(sums["num_bad_samples"])}

    def count_bad_samples(self, errors: list[str]) -> None:
        """Reports clips that broke while decoding and were replaced.

        Raises:
            ValueError: Above `max_bad_samples`.
        """
        for error in errors:
            if error not in self.bad_clips:  # said once, though it comes back every epoch
                tqdm.write(f"replaced a clip that does not decode: {error}")
        self.bad_clips.update(errors)
        if len(self.bad_clips) > self.config.data.max_bad_samples:
            raise ValueError(
                f"at most max_bad_samples={self.config.data.max_bad_samples} clips may fail to decode, but "
                f"{len(self.bad_clips)} did, last: {errors[-1]}. Repair or remove them, or raise --max_bad_samples."
            )


# --- the run ---------------------------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Checks everything that needs no weights, then trains."""
    with user_errors():
        check_generator_ckpt(config.model.generator_ckpt)
        check_output_dir(config.training.output_dir, config.training.resume_from_checkpoint)
        resolve_trackers(config.training.report_to)
        data = load_run_data(
            config.data,
            validation_metadata_path=config.validation.validation_metadata_path,
            num_validation_samples=config.validation.num_validation_samples,
            cache_dir=config.cache_dir,
        )
        data.check_stream(config.training.seed)
    if config.dry_run:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=config.training.mixed_precision
        )
        config = with_checkpointing_of_launch(config, accelerator)
        if accelerator.is_main_process:
            print(describe_plan(config, data, count_replicas(accelerator)))
            try:
                print(describe_memory(config, accelerator))
            except OSError as error:  # the checkpoint is on the hub, and the hub out of reach
                print(f"memory      unknown without the checkpoint's configuration: {error}")
        return

    accelerator = make_accelerator(config.training)
    config = with_checkpointing_of_launch(config, accelerator)
    if accelerator.is_main_process:
        write_recipe(with_absolute_paths(config), Path(config.training.output_dir) / "config.yaml")
        print(describe_plan(config, data, count_replicas(accelerator)))
        with user_errors():
            print(describe_memory(config, accelerator))
    validation_prompts = [row.prompts[0] for row in data.validation_rows] + list(config.validation.validation_prompts)
    prompts = [*data.prompts, *validation_prompts]
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
    prompt_embeds = embed_prompts(accelerator, config, prompts, data.cached)
    with user_errors():
        transformer = make_student(config, accelerator)
    vae = make_vae(config, accelerator.device, is_needed=config.encodes or bool(validation_prompts))
    with user_errors():
        for shape in config.data.all_shapes():
            check_video_size(*shape, vae=vae, transformer=transformer)

    method = VideoRegression(config, prompt_embeds, vae, accelerator.device, config.training.seed, data)
    dataset = data.dataset()
    if data.streams:
        accelerator.register_for_checkpointing(data.lane_states)
    with user_errors():
        run = prepare_run(accelerator, config.training, transformer, trackers)
    validate = Validation(
        accelerator,
        method,
        output_dir=config.training.output_dir,
        prompts=validation_prompts,
        batches=validation_batches(accelerator, method),
        latent_shape=latent_shape(config, vae),
    )
    make_loader = partial(
        data.make_loader,
        dataset,
        seed=config.training.seed,
        samples_per_step=config.training.samples_per_step(run.num_replicas),
        batch_size=config.training.train_batch_size,
        num_workers=config.training.dataloader_num_workers,
        num_processes=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )
    with name_clips_of_dead_workers(dataset), data.keeper or contextlib.nullcontext():
        complete = train(
            run,
            make_dataloader=make_loader,
            prepare_batch=method.prepare_batch,
            compute_loss=method.compute_loss,
            summarize=method.summarize,
            validate=validate if validate.prompts else None,
            before_checkpoint=data.gather_lane_states if data.streams else None,
            after_checkpoint=uploads.upload_checkpoint if uploads else None,
        )
    if not complete:
        trackers.finish()
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    with ema_weights(run.ema, run.unwrapped_model):
        weights = gather_weights(run)
    if accelerator.is_main_process:
        save_student(run.unwrapped_model, weights, config)
        (Path(config.training.output_dir) / DATA_SUMMARY_NAME).write_text(json.dumps(data.count()))
        print(f"saved: generate.py --checkpoint {config.training.output_dir} --prompt '...'")
    accelerator.wait_for_everyone()
    trackers.finish()
    accelerator.end_training()
    if uploads:
        uploads.finish()


def check_streaming(config: Config, accelerator: Accelerator) -> None:
    """Checks that each process may read clips of its own.

    Raises:
        ValueError: If groups of processes share clips.
    """
    if config.data.streaming and count_replicas(accelerator) != accelerator.num_processes:
        raise ValueError("--streaming gives each process clips of its own; launch without context parallelism.")


def with_absolute_paths(config: Config) -> Config:
    """The config with local checkpoints named so that `generate.py` finds them from any folder."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    model = replace(
        config.model,
        pretrained_model_name_or_path=absolute(config.model.pretrained_model_name_or_path),
        generator_ckpt=absolute(config.model.generator_ckpt),
    )
    return replace(config, model=model)


def with_checkpointing_of_launch(config: Config, accelerator: Accelerator) -> Config:
    """The config with gradient checkpointing if the launch's config file asks for it."""
    if not takes_over_checkpointing(accelerator):
        return config
    return replace(config, memory=replace(config.memory, gradient_checkpointing=True))


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """What weights that are not trained are kept in, and passes computed in."""
    return DTYPES.get(accelerator.mixed_precision, torch.float32)


def text_dtype(accelerator: Accelerator) -> torch.dtype:
    """Of the text encoder: UMT5 overflows in float16."""
    dtype = weight_dtype(accelerator)
    return torch.float32 if dtype == torch.float16 else dtype


def make_student(config: Config, accelerator: Accelerator) -> CausalWanTransformer3DModel:
    """The transformer to train: float32 weights, or frozen ones in 16 bits or fewer with LoRA adapters in float32.

    Raises:
        ValueError: If weights or memory levers do not fit the checkpoint or the strategy.
    """
    lora, memory, dtype = config.model.lora_rank > 0, config.memory, weight_dtype(accelerator)
    shards = is_sharded(accelerator)
    if memory.quantize_base and shards:
        raise ValueError(
            f"quantize_base {memory.quantize_base} needs the whole base on each GPU; launch with "
            "accelerate_configs/single_gpu.yaml or ddp.yaml, or leave it out."
        )
    transformer = load_transformer(
        config.model.pretrained_model_name_or_path,
        generator_ckpt=config.model.generator_ckpt,
        dtype=dtype if lora or keeps_weights_in_16_bits(accelerator) else torch.float32,
        revision=config.model.revision,
        device="cpu" if shards else accelerator.device,
        quantization=quantization_config(memory.quantize_base, dtype),
        empty=not loads_weights(accelerator),
        **causal_settings(flat_dict(config)),
    )
    transformer.enable_context_parallel(context_mesh(accelerator))
    if memory.quantize_base == "fp8":
        store_in_fp8(transformer, dtype)
    if lora:
        add_lora(
            transformer,
            rank=config.model.lora_rank,
            alpha=config.model.lora_rank if config.model.lora_alpha is None else config.model.lora_alpha,
            target_modules=config.model.lora_target_modules,
        )
    if memory.gradient_checkpointing:
        enable_gradient_checkpointing(transformer, memory)
    return transformer


def make_vae(config: Config, device: torch.device, *, is_needed: bool) -> AutoencoderKLWan:
    """The VAE where it waits between uses, cut up as the config says; its config alone where it is not needed."""
    name, revision = config.model.pretrained_model_name_or_path, config.model.revision
    if not is_needed:
        return load_vae_config(name, revision=revision)
    vae = load_vae(name, dtype=config.vae_dtype, revision=revision)
    cut_up_vae(vae, config.memory)
    return vae if config.memory.offload_vae else vae.to(device)


def save_student(transformer: CausalWanTransformer3DModel, weights: dict[str, torch.Tensor], config: Config) -> None:
    """Writes `transformer/` in diffusers format, or the LoRA file, and `pipeline.py` into the output folder."""
    write_pipeline_file(config.training.output_dir)
    if config.model.lora_rank > 0:
        save_lora(transformer, weights, config.training.output_dir)
    else:
        save_transformer(transformer, weights, Path(config.training.output_dir) / "transformer")


def embed_prompts(
    accelerator: Accelerator, config: Config, prompts: list[str], cached: CachedData | None
) -> Mapping[str, torch.Tensor]:
    """Embeds each distinct prompt once, split over the processes; the text encoder is freed on return.

    Returns:
        Prompt -> `(S, D)` of its true length S, on the CPU; read from the cache if there is one; encoded when needed
        if clips are streamed, since their prompts are not known beforehand.
    """
    model = config.model
    missing = sorted(set(prompts)) if cached is None else cached.missing_prompts(prompts)
    own = missing[accelerator.process_index :: accelerator.num_processes]
    embeds = []
    if missing or config.data.streaming:
        tokenizer, text_encoder = load_text_encoder(
            model.pretrained_model_name_or_path,
            dtype=text_dtype(accelerator),
            revision=model.revision,
            device=accelerator.device,
        )
        if config.data.streaming:
            return PromptEncoder(tokenizer, text_encoder, model.max_sequence_length)
        embeds = encode_prompts(
            tokenizer,
            text_encoder,
            own,
            model.max_sequence_length,
            show_progress=accelerator.is_main_process,
        )
    if cached is None:
        return dict(gather_lists([(prompt, embed.cpu()) for prompt, embed in zip(own, embeds, strict=True)]))
    with cached.prompt_writer() as writer:
        for prompt, embed in zip(own, embeds, strict=True):
            writer.add(cached.prompt_key(prompt), embed, cached.prompt_settings)
    accelerator.wait_for_everyone()
    cached.prompts.refresh()
    return CachedPrompts(cached)


def latent_shape(config: Config, vae: AutoencoderKLWan) -> tuple[int, int, int, int]:
    """(C, F, H, W) of the result."""
    spatial = vae.config.scale_factor_spatial
    return (
        vae.config.z_dim,
        config.num_latent_frames(config.data.shape),
        config.data.height // spatial,
        config.data.width // spatial,
    )


def describe_plan(config: Config, run_data: RunData, num_replicas: int) -> str:
    """What is going to happen, in numbers."""
    training, method, data, rows = config.training, config.method, config.data, run_data.rows
    lengths = method.block_lengths(config.num_latent_frames(data.shape))
    samples_per_step = training.samples_per_step(num_replicas)
    num_samples = training.max_train_steps * samples_per_step
    weights = f"LoRA of rank {config.model.lora_rank}" if config.model.lora_rank else "all weights"
    levels = " ".join(f"{level:g}" for level in method.levels().tolist())
    lines = [
        f"checkpoint  {config.model.pretrained_model_name_or_path}"
        + (f", weights of {config.model.generator_ckpt}" if config.model.generator_ckpt else ""),
        f"data        {run_data.describe()}",
        f"clips       {data.num_frames} frames of {data.height} x {data.width}, {data.frame_sampling} sampling: "
        f"{sum(lengths)} latent frames in {len(lengths)} block(s) of {' '.join(map(str, sorted(set(lengths))))}",
        *describe_shapes(rows, data),
        f"method      {method.generator_task}, levels {levels}, {method.loss_type} of {method.loss_space}",
        f"training    {weights}, {training.max_train_steps} steps of {samples_per_step} clips "
        f"({training.train_batch_size} x {training.gradient_accumulation_steps} accumulated x {num_replicas} "
        f"process(es))" + (f" = {num_samples / len(rows):.1f} passes over the data" if rows else ""),
        f"result      {training.output_dir}",
    ]
    speed_up = describe_speed_up(rows, data) if rows else None
    notes = [note for note in (speed_up, describe_flip(rows, data)) if note]
    return "\n".join(lines + [f"note        {note}" for note in notes])


def describe_memory(config: Config, accelerator: Accelerator) -> str:
    """What the run is going to take of a GPU's memory, and what to do if that is more than there is."""
    model, data, training = config.model, config.data, config.training
    keeps_gradients = accelerator.num_processes > 1 and not is_sharded(accelerator)  # in DDP's buckets
    plan = plan_run(
        model.pretrained_model_name_or_path,
        max(data.all_shapes(), key=math.prod),
        causal_config=causal_settings(flat_dict(config)),
        generator_ckpt=model.generator_ckpt,
        revision=model.revision,
        vae_dtype=config.vae_dtype,
        text_dtype=text_dtype(accelerator),
        batch_size=training.train_batch_size,
        num_passes=training.gradient_accumulation_steps + keeps_gradients,
        max_sequence_length=model.max_sequence_length,
        lora_rank=model.lora_rank,
        lora_target_modules=model.lora_target_modules,
        dtype=weight_dtype(accelerator),
        memory=config.memory,
        optimizer=training.optimizer,
        use_ema=training.use_ema,
        encodes=config.encodes,
        keeps_text_encoder=config.data.streaming,
        **sharding(accelerator),
    )
    shortage = describe_shortage(plan, free_memory(accelerator))
    return f"memory      {plan}" + (f"\nwarning     {shortage}" if shortage else "")


def validation_batches(accelerator: Accelerator, method: VideoRegression) -> list[tuple[Batch, bool]]:
    """This process's share of the held-out clips, encoded and noised once: the same draws at every validation."""
    data, dataset = method.data, method.data.dataset(held_out=True)
    numbers = share(len(dataset), accelerator.process_index, accelerator.num_processes)
    return [(method.prepare_batch(data.validation_batch(dataset, number)), counts) for number, counts in numbers]


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
