"""CausalWanPipeline: text to video in few steps or many, block by block; videos stream while they are sampled.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, N = sampling steps,
M = draws of noise (N, or 1 where steps add none), S = prompt tokens, T = video frames.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from causal_wan.devices import to_device
from causal_wan.flow import choose_sampling, sampling_timesteps
from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.model.text import encode_prompts, pad_prompt_embeds
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import check_video_size, decode_latents, encode_videos
from causal_wan.sampling.rollout import (
    Generators,
    Rollout,
    check_initial_latents,
    count_draws,
    draw_frame_noise,
    draw_noise,
)
from causal_wan.timesteps import Sampler


DEFAULT_STEP_LIST = (1000, 757, 522, 0)


class CausalWanPipeline(WanPipeline):
    """Text to video with a student, causal (block by block) or bidirectional (one block, the whole clip).

    Made as diffusers pipelines are: `CausalWanPipeline.from_pretrained(folder, num_frame_per_block=3)`, or from parts.
    With `vae=None, text_encoder=None, tokenizer=None, scheduler=None` it can do `sample_latents`.

    Args beside those of `WanPipeline`:
        denoising_step_list: Timesteps that the student is sampled at, falling; None is 1000, 757, 522.
        sampler: How it goes from one to the next: "renoise", for students of a step list, or "euler", for those of any
            level.
        max_sequence_length: Tokens that prompts are padded to, as they were in training; WAN attends to the padding.

    Source: CausVid, arXiv 2412.07772, Algorithm 2.
    """

    _interrupt = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: Any,
        transformer: WanTransformer3DModel,  # no default, or diffusers will not take one that is given
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        denoising_step_list: Sequence[float] | None = None,
        sampler: str = "renoise",  # no `Sampler`: diffusers does not take that for a type
        max_sequence_length: int = 512,
    ) -> None:
        if transformer_2 is not None:
            raise ValueError("a causal pipeline has one transformer, got two (WAN 2.2 14B); give transformer_2=None.")
        if type(transformer) is WanTransformer3DModel:
            transformer = CausalWanTransformer3DModel.from_stock(transformer)
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            transformer,
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )
        self.register_to_config(
            denoising_step_list=list(denoising_step_list or DEFAULT_STEP_LIST),
            sampler=sampler,
            max_sequence_length=max_sequence_length,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        num_frame_per_block: int | None = None,
        local_attn_size: int | None = None,
        sink_size: int | None = None,
        **kwargs: Any,
    ) -> "CausalWanPipeline":
        """Loads any diffusers WAN folder or hub repository; the transformer becomes a causal one.

        Args:
            pretrained_model_name_or_path: Folder or hub id with `model_index.json`.
            num_frame_per_block: Overrides the transformer's own setting when given.
            local_attn_size: Overrides the transformer's own setting when given.
            sink_size: Overrides the transformer's own setting when given.
            kwargs: As in `DiffusionPipeline.from_pretrained`, but weights come from safetensors alone unless
                `use_safetensors` says otherwise; `transformer` may be given.
        """
        kwargs.setdefault("use_safetensors", True)
        if "transformer" not in kwargs:
            shared = ("dtype", "torch_dtype", "revision", "cache_dir", "token", "use_safetensors")
            hub = {key: kwargs[key] for key in shared if key in kwargs}
            kwargs["transformer"] = CausalWanTransformer3DModel.from_pretrained(
                pretrained_model_name_or_path, subfolder="transformer", **hub
            )
        pipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        given = {
            "num_frame_per_block": num_frame_per_block,
            "local_attn_size": local_attn_size,
            "sink_size": sink_size,
        }
        changes = {name: size for name, size in given.items() if size is not None}
        pipeline.transformer.set_causal_config(replace(pipeline.transformer.causal_config, **changes))
        return pipeline

    # --- latents -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_latents(
        self,
        prompt_embeds: torch.Tensor,
        noise: torch.Tensor,
        denoising_step_list: Sequence[float] | None = None,
        *,
        on_block_end: Callable[[int, torch.Tensor], None] | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Samples clean latents; a function of its inputs alone.

        Args:
            prompt_embeds: `(B, S, D)`.
            noise: `(M, B, C, F, H, W)`, standard normal: entry 0 starts every block, entry i is the fresh noise for
                the step to level i, where steps add noise.
            denoising_step_list: N timesteps that fall from noise to data, in (0, 1000]; a trailing 0 (the training
                list) is dropped. None is the pipeline's own list and sampler, unless num_inference_steps is given.
            on_block_end: Called with the block's number and its clean latents `(B, C, f, H, W)` as soon as they exist.
            settings: Others of `sample_blocks`.

        Returns:
            Clean, normalised latents `(B, C, F, H, W)`, float32.

        Raises:
            ValueError: If the noise does not have the entries that the steps take, or F does not divide into blocks.
        """
        blocks = []
        for number, block in enumerate(self.sample_blocks(prompt_embeds, noise, denoising_step_list, **settings)):
            blocks.append(block)
            if on_block_end is not None:
                on_block_end(number, block)
        return torch.cat(blocks, dim=2)

    @torch.no_grad()
    def sample_blocks(
        self,
        prompt_embeds: torch.Tensor,
        noise: torch.Tensor | Iterable[torch.Tensor],
        denoising_step_list: Sequence[float] | None = None,
        *,
        num_inference_steps: int | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        num_latent_frames: int | None = None,
        initial_latents: torch.Tensor | None = None,
        cache_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Iterator[torch.Tensor]:
        """Samples clean latents, and gives each block `(B, C, f, H, W)` as soon as it exists.

        Args:
            prompt_embeds: `(B, S, D)`.
            noise: As in `sample_latents`; or that of one frame after the other, `(M, B, C, 1, H, W)`.
            denoising_step_list: As in `sample_latents`.
            num_inference_steps: In its place: so many steps from 1000 to 0, evenly spaced but for the shift.
            timestep_shift: Of these steps towards noise; None is 5.
            sampler: None is "renoise" with a list, "euler" with a number of steps.
            num_latent_frames: F, for noise that comes frame by frame; None goes on for as long as blocks are asked
                for, in memory of fixed size.
            initial_latents: First latent frames of the clip `(B, C, F', H, W)`, whole blocks, to be continued.
            cache_dtype: Of remembered keys and values: None is that of the passes, torch.int8 half of 16 bits.
            settings: `negative_prompt_embeds` with `guidance_scale`, `attention_kwargs`, `on_step_end`; see `Rollout`.

        Raises:
            ValueError: As `sample_latents`; if initial latents are no whole blocks or leave nothing to sample; if
                there is no end and no window or no blocks.
        """
        timesteps, sampler = self._sampling(denoising_step_list, num_inference_steps, timestep_shift, sampler)
        num_draws = count_draws(len(timesteps), sampler)
        frames: Iterator[torch.Tensor] = iter(noise)
        if isinstance(noise, torch.Tensor):
            num_latent_frames = noise.shape[3] if noise.ndim == 6 else None
            frames = iter(noise.split(1, dim=3)) if noise.ndim == 6 else iter([noise])
        first = next(frames)
        if first.ndim != 6 or first.shape[0] != num_draws:
            raise ValueError(
                f"noise must have shape (num_draws, B, C, F, H, W) with num_draws={num_draws} for {len(timesteps)} "
                f"steps of the sampler {sampler}, got {tuple(first.shape)}."
            )
        lengths = self._block_lengths(num_latent_frames)
        if initial_latents is not None:
            num_given = initial_latents.shape[2]
            leading = list(itertools.islice(self._block_lengths(num_latent_frames), num_given + 1))
            check_initial_latents(num_given, leading, num_latent_frames)
        rollout = Rollout(self.transformer, to_device(timesteps, first.device), prompt_embeds, sampler, **settings)
        # A one-block clip attends to itself alone: no cache, the stock computation.
        if num_latent_frames is None or len(self.transformer.block_lengths(num_latent_frames)) > 1:
            rollout.cache = self.transformer.make_cache(
                first.shape[1] * (1 + rollout.is_guided),
                num_latent_frames or self.transformer.config.local_attn_size,
                *first.shape[-2:],
                device=first.device,
                dtype=cache_dtype,
            )
        yield from rollout.run(itertools.chain([first], frames), lengths, initial_latents)

    def _sampling(
        self,
        denoising_step_list: Sequence[float] | None,
        num_inference_steps: int | None,
        timestep_shift: float | None,
        sampler: Sampler | None,
    ) -> tuple[torch.Tensor, Sampler]:
        """Timesteps `(N,)` and the sampler."""
        timesteps, sampler = choose_sampling(
            self.config.denoising_step_list,
            self.config.sampler,
            denoising_step_list=denoising_step_list,
            num_inference_steps=num_inference_steps,
            timestep_shift=timestep_shift,
            sampler=sampler,
        )
        return sampling_timesteps(timesteps), sampler

    def _block_lengths(self, num_latent_frames: int | None) -> Iterator[int]:
        if num_latent_frames is not None:
            return iter(self.transformer.block_lengths(num_latent_frames))
        config = self.transformer.config
        if config.num_frame_per_block is None or config.local_attn_size == -1:
            raise ValueError(
                "a video without end must be sampled in blocks with a window, got num_frame_per_block="
                f"{config.num_frame_per_block} and local_attn_size={config.local_attn_size}; set both (see "
                "`transformer.set_causal_config`), or give num_frames."
            )
        return itertools.chain([1] * config.independent_first_frame, itertools.repeat(config.num_frame_per_block))

    def draw_noise(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        denoising_step_list: Sequence[float] | None = None,
        *,
        num_inference_steps: int | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """Noise for `sample_latents`, `(M, B, C, F, H, W)`, of a video of num_frames x height x width pixels.

        It is what a call with these settings draws from the same generators; see
        `causal_wan.sampling.rollout.draw_frame_noise`.
        """
        channels, *size = self._frame_shape(height, width)
        num_latent_frames = (num_frames - 1) // self.vae_scale_factor_temporal + 1
        timesteps, sampler = self._sampling(denoising_step_list, num_inference_steps, timestep_shift, sampler)
        latent_shape, num_draws = (channels, num_latent_frames, *size), count_draws(len(timesteps), sampler)
        return draw_noise(batch_size, latent_shape, num_draws, generator=generator, device=self._execution_device)

    def _frame_shape(self, height: int, width: int) -> tuple[int, int, int]:
        spatial = self.vae_scale_factor_spatial
        return self.transformer.config.in_channels, height // spatial, width // spatial

    # --- videos ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = None,
        *,
        denoising_step_list: Sequence[float] | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        video: Any = None,
        initial_latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> WanPipelineOutput | tuple:
        """Generates videos from prompts.

        Args:
            prompt: One prompt or a list of B.
            negative_prompt: What guidance leads away from; empty by default.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            num_frames: 4k + 1 frames, such that the latent frames divide into blocks; a given video counts.
            num_inference_steps: Samples in so many steps from 1000 to 0. None, and no list, is the student's own way.
            denoising_step_list: Timesteps in (0, 1000], falling, in its place; a trailing 0 is dropped.
            timestep_shift: Of num_inference_steps towards noise, 1000 k u / (1 + (k - 1) u); None is 5.
            sampler: "renoise" noises the prediction again, with fresh noise: the sampler of a list. "euler" follows
                the flow's ODE: the sampler of num_inference_steps.
            guidance_scale: Classifier-free guidance above 1; students of a step list are trained without.
            num_videos_per_prompt: Of each prompt, next to each other in the batch.
            generator: Source of the noise, or a list of one a video.
            noise: See `sample_latents`; drawn from `generator` when not given.
            video: First frames of the clip, to be continued: 4k + 1 frames that are whole blocks, in any form that
                diffusers' `VideoProcessor` takes. They come out as the VAE decodes them.
            initial_latents: The same as latents `(B, C, F', H, W)`.
            prompt_embeds: `(B, S, D)`, in the place of `prompt`.
            negative_prompt_embeds: `(B, S, D)`, in the place of `negative_prompt`.
            output_type: "np" (B, T, height, width, 3 in [0, 1]), "pt", "pil" or "latent".
            return_dict: False returns a tuple.
            attention_kwargs: May hold `scale`, the LoRA scale.
            callback_on_step_end: As in diffusers: called with the pipeline, the number of the step (over all blocks),
                its timestep, and a dict of tensors, which it returns; "latents" are those of the block. It may set
                `pipeline._interrupt = True`: the video then ends with this block, as far as it got.
            callback_on_step_end_tensor_inputs: Of "latents", "prompt_embeds", "negative_prompt_embeds".
            max_sequence_length: Tokens that prompts are padded to; None is as many as the student was trained with.
            cache_dtype: Of remembered keys and values: None is that of the passes; torch.int8 takes half of 16 bits
                and rounds.

        Returns:
            `.frames`.

        Raises:
            ValueError: If sizes do not fit the VAE, the patches or the blocks, or there is no prompt.
        """
        blocks = self.stream(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            denoising_step_list=denoising_step_list,
            timestep_shift=timestep_shift,
            sampler=sampler,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            noise=noise,
            video=video,
            initial_latents=initial_latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type="latent",
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            cache_dtype=cache_dtype,
        )
        frames = torch.cat(list(blocks), dim=2)
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(decode_latents(self.vae, frames), output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int | None = 81,
        num_inference_steps: int | None = None,
        *,
        denoising_step_list: Sequence[float] | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
        video: Any = None,
        initial_latents: torch.Tensor | None = None,
        output_type: str = "np",
        **settings: Any,
    ) -> Iterator[Any]:
        """Generates videos from prompts, and gives the frames of each block as soon as they are decoded.

        Arguments (`settings` are the others), errors and the format of the frames are those of `__call__`; together
        they are its video. Decoding takes no more memory for a longer clip, and with a window (`local_attn_size`)
        neither does sampling; with num_frames None the video has no end.
        """
        parts = {"vae": self.vae, "transformer": self.transformer}
        check_video_size(num_frames or 1, height, width, **parts, in_blocks=num_frames is not None)
        settings = self._settings(prompt, negative_prompt, **settings)
        batch_size, device = len(settings["prompt_embeds"]), self._execution_device
        num_latent_frames = num_frames and (num_frames - 1) // self.vae_scale_factor_temporal + 1
        timesteps, sampler = self._sampling(denoising_step_list, num_inference_steps, timestep_shift, sampler)
        if noise is None:
            shape, num_draws = self._frame_shape(height, width), count_draws(len(timesteps), sampler)
            noise = draw_frame_noise(batch_size, shape, num_draws, generator=generator, device=device)
        else:
            noise = noise.to(device)
        if video is not None:
            initial_latents = self._encode_video(video, batch_size, height, width)
        blocks = self.sample_blocks(
            noise=noise,
            denoising_step_list=timesteps.tolist(),
            sampler=sampler,
            num_latent_frames=num_latent_frames,
            initial_latents=initial_latents,
            **settings,
        )
        decoder = StreamingDecoder(self.vae)
        num_blocks = num_latent_frames and len(self.transformer.block_lengths(num_latent_frames))
        with self.progress_bar(total=num_blocks or 0) as bar:
            for block in blocks:
                bar.update()
                if output_type == "latent":
                    yield block
                else:
                    yield self.video_processor.postprocess_video(decoder.decode(block), output_type=output_type)

    def _settings(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        *,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Those of `sample_blocks` that do not shape the clip."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both.")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(self._callback_tensor_inputs)}, got "
                f"{', '.join(sorted(unknown))}."
            )

        length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length

        def embed(texts: str | list[str] | None, embeds: torch.Tensor | None) -> torch.Tensor:
            if embeds is None:
                texts = [texts] if isinstance(texts, str) else list(texts)
                embeds = pad_prompt_embeds(encode_prompts(self.tokenizer, self.text_encoder, texts, length), length)
            embeds = embeds.to(self._execution_device, self.transformer.dtype)
            return embeds.repeat_interleave(num_videos_per_prompt, dim=0)

        prompt_embeds = embed(prompt, prompt_embeds)
        negative = None
        if guidance_scale > 1:
            negative = embed(negative_prompt or "", negative_prompt_embeds)
            negative = negative.expand(len(prompt_embeds), -1, -1) if len(negative) == 1 else negative
            if negative.shape != prompt_embeds.shape:
                raise ValueError(
                    f"there must be one negative prompt, or one for each prompt, got {len(negative)} for "
                    f"{len(prompt_embeds)} videos."
                )
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs, False
        on_step_end = None
        if callback_on_step_end is not None:
            on_step_end = self._as_on_step_end(callback_on_step_end, callback_on_step_end_tensor_inputs)
        return {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative,
            "guidance_scale": guidance_scale,
            "attention_kwargs": attention_kwargs,
            "on_step_end": on_step_end,
            "cache_dtype": cache_dtype,
        }

    def _as_on_step_end(self, callback: Callable, names: Sequence[str]) -> Callable:
        """What a `Rollout` calls, of a callback as diffusers has them."""

        def on_step_end(rollout: Rollout, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            embeds = (rollout.prompt_embeds, rollout.negative_prompt_embeds)
            tensors = dict(zip(self._callback_tensor_inputs, (latents, *embeds), strict=True))
            returned = callback(self, step, timestep, {name: tensors[name] for name in names})
            changed = tuple(returned.get(name, tensors[name]) for name in self._callback_tensor_inputs[1:])
            if any(new is not old for new, old in zip(changed, embeds, strict=True)):
                rollout.replace_prompt(*changed)
            rollout.is_stopped = self._interrupt
            return returned.get("latents", latents)

        return on_step_end

    def _encode_video(self, video: Any, batch_size: int, height: int, width: int) -> torch.Tensor:
        """Latents `(B, C, F', H, W)` of frames in any form."""
        frames = self.video_processor.preprocess_video(video, height=height, width=width)  # (B, 3, T, height, width)
        check_video_size(frames.shape[2], height, width, vae=self.vae, transformer=self.transformer, in_blocks=False)
        latents = encode_videos(self.vae, frames)
        if len(latents) not in (1, batch_size):
            raise ValueError(f"there must be one video, or one for each of {batch_size} prompts, got {len(latents)}.")
        return latents.expand(batch_size, -1, -1, -1, -1)
