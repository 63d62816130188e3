"""CausalWanPipeline: text to video in few steps or many, block by block; videos stream while they are sampled.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, N = sampling steps,
M = draws of noise (N, or 1 where steps add none), S = prompt tokens, T = video frames.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from causal_wan.flow import choose_sampling, sampling_timesteps
from causal_wan.geometry import LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import check_video_size, decode_latents
from causal_wan.sampling.arguments import (
    as_on_step_end,
    prepare_beginning,
    prepare_conditions,
    shown_with_arguments_of,
)
from causal_wan.sampling.controls import load_beside, prepare_controls
from causal_wan.sampling.noise import Generators, draw_frame_noise, draw_noise
from causal_wan.sampling.prompt_changes import PromptChanges, as_next_conditions
from causal_wan.sampling.rollout import SamplingSchedule, roll_out
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

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers; loads the patch embedding, too, that lies beside the LoRA of a student with controls.

        Raises:
            ValueError: If the transformer takes other controls.
        """
        load_beside(pretrained_model_name_or_path_or_dict, self.transformer, kwargs.get("revision"))
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name=adapter_name, **kwargs)

    @property
    def geometry(self) -> LatentGeometry:
        """How its videos and their latents measure up."""
        return LatentGeometry.of({} if self.vae is None else self.vae.config, self.transformer.config)

    # --- latents -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_latents(
        self,
        conditions: Conditions,
        noise: torch.Tensor,
        denoising_step_list: Sequence[float] | None = None,
        *,
        on_block_end: Callable[[int, torch.Tensor], None] | None = None,
        **settings: Any,
    ) -> torch.Tensor:
        """Samples clean latents; a function of its inputs alone.

        Args:
            conditions: What the videos are to show, B of them.
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
        for number, block in enumerate(self.sample_blocks(conditions, noise, denoising_step_list, **settings)):
            blocks.append(block)
            if on_block_end is not None:
                on_block_end(number, block)
        return torch.cat(blocks, dim=2)

    def sample_blocks(
        self,
        conditions: Conditions,
        noise: torch.Tensor | Iterable[torch.Tensor],
        denoising_step_list: Sequence[float] | None = None,
        *,
        num_inference_steps: int | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        **settings: Any,
    ) -> Iterator[torch.Tensor]:
        """Samples clean latents, and gives each block `(B, C, f, H, W)` as soon as it exists.

        Args:
            conditions: As in `sample_latents`.
            noise: As in `sample_latents`; or that of one frame after the other, `(M, B, C, 1, H, W)`.
            denoising_step_list: As in `sample_latents`.
            num_inference_steps: In its place: so many steps from 1000 to 0, evenly spaced but for the shift.
            timestep_shift: Of these steps towards noise; None is 5.
            sampler: None is "renoise" with a list, "euler" with a number of steps.
            settings: Others of `causal_wan.sampling.rollout.roll_out`.

        Raises:
            ValueError: As `roll_out`; if steps are given in two ways.
        """
        schedule = self.choose_schedule(denoising_step_list, num_inference_steps, timestep_shift, sampler)
        return roll_out(self.transformer, conditions, noise, schedule, geometry=self.geometry, **settings)

    def choose_schedule(
        self,
        denoising_step_list: Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
    ) -> SamplingSchedule:
        """What is asked for, or the pipeline's own; see `causal_wan.flow.choose_sampling`."""
        timesteps, sampler = choose_sampling(
            self.config.denoising_step_list,
            self.config.sampler,
            denoising_step_list=denoising_step_list,
            num_inference_steps=num_inference_steps,
            timestep_shift=timestep_shift,
            sampler=sampler,
        )
        return SamplingSchedule(timesteps=sampling_timesteps(timesteps), sampler=sampler)

    def draw_noise(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        denoising_step_list: Sequence[float] | None = None,
        *,
        generator: Generators = None,
        **steps: Any,
    ) -> torch.Tensor:
        """Noise for `sample_latents`, `(M, B, C, F, H, W)`, of a video of num_frames x height x width pixels.

        It is what a call with these settings (`num_inference_steps`, `timestep_shift` and `sampler` are `steps`) draws
        from the same generators; see `causal_wan.sampling.noise.draw_frame_noise`.
        """
        shape = self.geometry.latent_shape(num_frames, height, width)
        num_draws = self.choose_schedule(denoising_step_list, **steps).num_draws
        return draw_noise(batch_size, shape, num_draws, generator=generator, device=self._execution_device)

    # --- videos ------------------------------------------------------------------------------------------------------

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
        prompt_schedule: PromptChanges | None = None,
        recache: bool = False,
        denoising_step_list: Sequence[float] | None = None,
        timestep_shift: float | None = None,
        sampler: Sampler | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        image: PipelineImageInput | None = None,
        video: Any = None,
        initial_latents: torch.Tensor | None = None,
        control: Mapping[str, Any] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> Iterator[Any]:
        """Generates videos from prompts, and gives the frames of each block as soon as they are decoded.

        Arguments, errors and the format of the frames are those of `__call__`; together they are its video. Decoding
        takes no more memory for a longer clip, and with a window (`local_attn_size`) neither does sampling; with
        num_frames None the video has no end.
        """
        parts = {"vae": self.vae, "transformer": self.transformer}
        check_video_size(num_frames or 1, height, width, **parts, in_blocks=num_frames is not None)
        text_length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        conditions, negative_conditions = prepare_conditions(
            self,
            prompt,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            is_guided=guidance_scale > 1,
            num_videos_per_prompt=num_videos_per_prompt,
            max_sequence_length=text_length,
            prompt_schedule=prompt_schedule,
            num_frames=num_frames,
        )
        batch_size, device, geometry = conditions.batch_size, self._execution_device, self.geometry
        schedule = self.choose_schedule(denoising_step_list, num_inference_steps, timestep_shift, sampler)
        if noise is None:
            channels, _, *size = geometry.latent_shape(1, height, width)
            frame_shape, num_draws = (channels, *size), schedule.num_draws
            noise = draw_frame_noise(batch_size, frame_shape, num_draws, generator=generator, device=device)
        else:
            noise = noise.to(device)
        initial_latents = prepare_beginning(self, image, video, initial_latents, (batch_size, height, width))
        controls = prepare_controls(self, control, (batch_size, height, width), num_frames)
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs, False
        num_latent_frames = num_frames and geometry.num_latent_frames(num_frames)
        blocks = roll_out(
            self.transformer,
            conditions,
            noise,
            schedule,
            num_latent_frames=num_latent_frames,
            initial_latents=initial_latents,
            control_latents=controls,
            cache_dtype=cache_dtype,
            geometry=geometry,
            negative_conditions=negative_conditions,
            guidance_scale=guidance_scale,
            attention_kwargs=attention_kwargs,
            on_step_end=as_on_step_end(self, callback_on_step_end, callback_on_step_end_tensor_inputs),
            next_conditions=as_next_conditions(self, prompt, prompt_schedule, conditions, text_length),
            recaches=recache,
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

    @shown_with_arguments_of(stream)
    @torch.no_grad()
    def __call__(
        self, *arguments: Any, output_type: str = "np", return_dict: bool = True, **settings: Any
    ) -> WanPipelineOutput | tuple:
        """Generates videos from prompts.

        Args:
            prompt: One prompt or a list of B.
            negative_prompt: What guidance leads away from; empty by default.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            num_frames: 4k + 1 frames, such that the latent frames divide into blocks; a given video counts.
            prompt_schedule: Prompts along the video, [(2.5, "..."), ...]: seconds from its start, and the prompt from
                there on; a list of such lists for one a prompt. A change falls on the nearest start of a block. It
                goes on from `prompt`, or begins at 0 in its place. Or a function from the seconds in the middle of
                a block to its prompt, or None for no change: it is asked when the block is begun.
            recache: Where the prompt changes, compute the keys and values in the window anew, under the new prompt.
            num_inference_steps: Samples in so many steps from 1000 to 0. None, and no list, is the student's own way.
            denoising_step_list: Timesteps in (0, 1000], falling, in its place; a trailing 0 is dropped.
            timestep_shift: Of num_inference_steps towards noise, 1000 k u / (1 + (k - 1) u); None is 5.
            sampler: "renoise" noises the prediction again, with fresh noise: the sampler of a list. "euler" follows
                the flow's ODE: the sampler of num_inference_steps.
            guidance_scale: Classifier-free guidance above 1; students of a step list are trained without.
            num_videos_per_prompt: Of each prompt, next to each other in the batch.
            generator: Source of the noise, or a list of one a video.
            noise: See `sample_latents`; drawn from `generator` when not given.
            image: The clip's first frame, or a list of one for each video, in any form that diffusers'
                `VideoProcessor` takes; a PIL image is scaled and cut to the video's size. It comes out as the VAE
                decodes it. For students that were trained with `first_frame_probability`.
            video: First frames of the clip, to be continued: 4k + 1 frames that are whole blocks, in any form that
                diffusers' `VideoProcessor` takes. They come out as the VAE decodes them.
            initial_latents: The same as latents `(B, C, F', H, W)`.
            control: Videos that the student follows, by the names that it was trained with (`control_column`), such as
                `{"sketch": frames}`: one for all, or a list of B, in any form that diffusers' `VideoProcessor` takes,
                frame for frame. Those that are not named are left out. An iterator of frames is read as the video is
                sampled; where it ends, the video ends.
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
            ValueError: If sizes do not fit the VAE, the patches or the blocks, there is no prompt, or a schedule is
                not valid.
        """
        frames = torch.cat(list(self.stream(*arguments, output_type="latent", **settings)), dim=2)
        if output_type != "latent":
            frames = self.video_processor.postprocess_video(decode_latents(self.vae, frames), output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=frames) if return_dict else (frames,)
