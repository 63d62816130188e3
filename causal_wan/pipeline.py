"""CausalWanPipeline: few-step sampling, block by block, with a key/value cache.

For each block of latent frames: start from noise; at each level predict the clean latents and noise them again, with
fresh noise, to the next level; then one pass on the clean block at timestep 0 writes the cache for the blocks to come.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, N = sampling steps.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from causal_wan.flow import add_noise, latents_from_velocity, sampling_timesteps, sigmas_from_timesteps
from causal_wan.models import check_video_size, decode_latents, encode_prompts, pad_prompt_embeds
from causal_wan.streaming_vae import StreamingDecoder
from causal_wan.transformer import CausalWanTransformer3DModel, KVCache


DEFAULT_STEP_LIST = (1000, 757, 522, 0)


class CausalWanPipeline(WanPipeline):
    """Text to video with a few-step student, causal (block by block) or bidirectional (one block, the whole clip).

    Made as diffusers pipelines are: `CausalWanPipeline.from_pretrained(folder, num_frame_per_block=3)`, or from parts.
    With `vae=None, text_encoder=None, tokenizer=None, scheduler=None` it can do `sample_latents`.

    Source: CausVid, arXiv 2412.07772, Algorithm 2.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *, num_frame_per_block: int | None = None, **kwargs: Any
    ) -> "CausalWanPipeline":
        """Loads any diffusers WAN folder or hub repository; the transformer becomes a causal one.

        Args:
            pretrained_model_name_or_path: Folder or hub id with `model_index.json`.
            num_frame_per_block: Overrides the transformer's own setting when given.
            kwargs: As in `DiffusionPipeline.from_pretrained`, but weights come from safetensors alone unless
                `use_safetensors` says otherwise; `transformer` may be given.
        """
        kwargs.setdefault("use_safetensors", True)
        if "transformer" not in kwargs:
            causal = {} if num_frame_per_block is None else {"num_frame_per_block": num_frame_per_block}
            shared = ("dtype", "torch_dtype", "revision", "cache_dir", "token", "use_safetensors")
            hub = {key: kwargs[key] for key in shared if key in kwargs}
            kwargs["transformer"] = CausalWanTransformer3DModel.from_pretrained(
                pretrained_model_name_or_path, subfolder="transformer", **causal, **hub
            )
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def sample_latents(
        self,
        prompt_embeds: torch.Tensor,
        noise: torch.Tensor,
        denoising_step_list: Sequence[float] = DEFAULT_STEP_LIST,
        *,
        on_block_end: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Samples clean latents; a function of its inputs alone.

        Args:
            prompt_embeds: `(B, S, text_dim)`.
            noise: `(N, B, C, F, H, W)`, standard normal: entry 0 starts every block, entry i is the fresh noise for
                the step to level i.
            denoising_step_list: N timesteps that fall from noise to data, in (0, 1000]; a trailing 0 (the training
                list) is dropped.
            on_block_end: Called with the block's number and its clean latents `(B, C, f, H, W)` as soon as they exist.

        Returns:
            Clean, normalised latents `(B, C, F, H, W)`, float32.

        Raises:
            ValueError: If the noise does not have one entry a step, or F does not divide into blocks.
        """
        blocks = []
        for number, block in enumerate(self.sample_blocks(prompt_embeds, noise, denoising_step_list)):
            blocks.append(block)
            if on_block_end is not None:
                on_block_end(number, block)
        return torch.cat(blocks, dim=2)

    @torch.no_grad()
    def sample_blocks(
        self,
        prompt_embeds: torch.Tensor,
        noise: torch.Tensor,
        denoising_step_list: Sequence[float] = DEFAULT_STEP_LIST,
    ) -> Iterator[torch.Tensor]:
        """Samples clean latents, and gives each block `(B, C, f, H, W)` as soon as it exists.

        Arguments and errors are those of `sample_latents`.
        """
        timesteps = sampling_timesteps(denoising_step_list).to(noise.device)
        if noise.ndim != 6 or noise.shape[0] != len(timesteps):
            raise ValueError(
                f"noise must have shape (num_steps, B, C, F, H, W) with num_steps={len(timesteps)} for the step list "
                f"{list(denoising_step_list)}, got {tuple(noise.shape)}."
            )
        _, batch_size, _, num_frames, height, width = noise.shape
        block_lengths = self.transformer.block_lengths(num_frames)
        # A one-block clip attends to itself alone: no cache, the stock computation.
        cache = None
        if len(block_lengths) > 1:
            cache = self.transformer.make_cache(
                batch_size, num_frames, height, width, device=noise.device, dtype=prompt_embeds.dtype
            )
        start = 0
        for length in block_lengths:
            block_noise = noise[:, :, :, start : start + length]
            block = self._sample_block(prompt_embeds, block_noise, timesteps, cache, start)
            yield block
            start += length
            if cache is not None and start < num_frames:
                self._predict(block, timesteps.new_zeros(()), prompt_embeds, cache, start - length)

    def _sample_block(
        self,
        prompt_embeds: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        cache: KVCache | None,
        start_frame: int,
    ) -> torch.Tensor:
        noisy_latents = noise[0].float()
        for step, timestep in enumerate(timesteps):
            sigmas = sigmas_from_timesteps(timestep.expand(noise.shape[1]))
            velocity = self._predict(noisy_latents, timestep, prompt_embeds, cache, start_frame)
            latents = latents_from_velocity(noisy_latents, velocity, sigmas)
            if step + 1 < len(timesteps):
                next_sigmas = sigmas_from_timesteps(timesteps[step + 1].expand(noise.shape[1]))
                noisy_latents = add_noise(latents, noise[step + 1].float(), next_sigmas)
        return latents

    def _predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        cache: KVCache | None,
        start_frame: int,
    ) -> torch.Tensor:
        return self.transformer(
            latents.to(prompt_embeds.dtype),
            timestep.expand(latents.shape[0]),
            prompt_embeds,
            cache=cache,
            start_frame=start_frame if cache is not None else 0,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        denoising_step_list: Sequence[float] = DEFAULT_STEP_LIST,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        max_sequence_length: int = 512,
    ) -> WanPipelineOutput | tuple:
        """Generates videos from prompts.

        Args:
            prompt: One prompt or a list of B.
            num_frames: 4k + 1 frames, such that the latent frames divide into blocks.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            denoising_step_list: Timesteps in (0, 1000], falling; a trailing 0 is dropped.
            generator: Source of the noise, or a list of B.
            prompt_embeds: `(B, S, text_dim)`, in the place of `prompt`.
            noise: See `sample_latents`; drawn from `generator` when not given.
            output_type: "np" (B, T, height, width, 3 in [0, 1]), "pt", "pil" or "latent".
            return_dict: False returns a tuple.
            max_sequence_length: Tokens that prompts are padded to; 512 is what WAN was trained with.

        Returns:
            `.frames`.

        Raises:
            ValueError: If sizes do not fit the VAE, the patches or the blocks, or there is no prompt.
        """
        prompt_embeds, noise = self._prepare(
            prompt,
            (num_frames, height, width),
            denoising_step_list,
            generator=generator,
            prompt_embeds=prompt_embeds,
            noise=noise,
            max_sequence_length=max_sequence_length,
        )
        latents = self.sample_latents(prompt_embeds, noise, denoising_step_list)
        video = latents
        if output_type != "latent":
            video = self.video_processor.postprocess_video(decode_latents(self.vae, latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | None = None,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        denoising_step_list: Sequence[float] = DEFAULT_STEP_LIST,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *,
        prompt_embeds: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "np",
        max_sequence_length: int = 512,
    ) -> Iterator[Any]:
        """Generates videos from prompts, and gives the frames of each block as soon as they are decoded.

        Arguments, errors and the format of the frames are those of `__call__`; together they are its video. Decoding
        takes no more memory for a longer clip.
        """
        prompt_embeds, noise = self._prepare(
            prompt,
            (num_frames, height, width),
            denoising_step_list,
            generator=generator,
            prompt_embeds=prompt_embeds,
            noise=noise,
            max_sequence_length=max_sequence_length,
        )
        decoder = StreamingDecoder(self.vae)
        for block in self.sample_blocks(prompt_embeds, noise, denoising_step_list):
            if output_type == "latent":
                yield block
            else:
                yield self.video_processor.postprocess_video(decoder.decode(block), output_type=output_type)

    def _prepare(
        self,
        prompt: str | list[str] | None,
        size: tuple[int, int, int],
        denoising_step_list: Sequence[float],
        *,
        generator: torch.Generator | list[torch.Generator] | None,
        prompt_embeds: torch.Tensor | None,
        noise: torch.Tensor | None,
        max_sequence_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and noise where they are needed, checked."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds, and not both.")
        check_video_size(*size, vae=self.vae, transformer=self.transformer)
        device, dtype = self._execution_device, self.transformer.dtype
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            embeds = encode_prompts(self.tokenizer, self.text_encoder, prompts, max_sequence_length)
            prompt_embeds = pad_prompt_embeds(embeds, max_sequence_length)
        prompt_embeds = prompt_embeds.to(device, dtype)
        if noise is None:
            noise = self.draw_noise(len(prompt_embeds), *size, denoising_step_list, generator=generator)
        return prompt_embeds, noise.to(device)

    def draw_noise(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        denoising_step_list: Sequence[float],
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Noise for `sample_latents`, `(N, B, C, F, H, W)`, of a video of num_frames x height x width pixels.

        With a list of generators each sample's noise is its own generator's, whatever the batch it is drawn in.
        """
        shape = (
            batch_size,
            self.transformer.config.in_channels,
            (num_frames - 1) // self.vae_scale_factor_temporal + 1,
            height // self.vae_scale_factor_spatial,
            width // self.vae_scale_factor_spatial,
        )
        num_steps = len(sampling_timesteps(denoising_step_list))
        device = self._execution_device
        return torch.stack([randn_tensor(shape, generator=generator, device=device) for _ in range(num_steps)])
