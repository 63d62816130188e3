"""CausalWanTransformer3DModel: diffusers' WAN transformer with block-causal attention, per-frame timesteps, KV cache.

Weight names and shapes are the stock model's: any diffusers WAN checkpoint loads, and what is saved loads back.

Three ideas carry the file:

* Block-causal attention needs no mask. The queries of frame block i attend to the key/value prefix up to the end of
  block i: one dense call a block, through diffusers' `dispatch_attention_fn`, so that every backend works.
* Per-frame modulation needs no per-token tensor. The stock layer broadcasts `(N, 1, D)` modulation over `(N, L, D)`
  tokens; fold the frames into N and each frame has its own. Only attention has to unfold them.
* Teacher forcing needs no mask either. Clean frames go before the noisy ones, as frames of a longer clip, and each
  noisy block attends to the clean frames before it and to itself.

Shapes: B = batch, C = latent channels, F = latent frames, H, W = latent height and width, T = tokens a frame,
L = F T tokens (in layers under teacher forcing, F and L count the clean frames too), G = groups of tokens that share a
timestep (1, F or L a sample), N = heads, E = head dim, D = N E, P = processes that share a clip, 1 without context
parallelism.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch.distributed.device_mesh import DeviceMesh

from causal_wan.blocks import CausalConfig
from causal_wan.devices import to_device
from causal_wan.geometry import LatentGeometry
from causal_wan.model.attention import AttentionContext, CausalWanSelfAttnProcessor, FoldedCrossAttnProcessor, KeptText
from causal_wan.model.block_attention import (
    block_causal_spans,
    check_context,
    prepend_context,
    teacher_forcing_spans,
)
from causal_wan.model.context_parallel import ContextParallel, check_divides_by_group
from causal_wan.model.control import with_controls
from causal_wan.model.kv_cache import KeptStates, KVCache, LayerCache
from causal_wan.model.text import TextByFrame, fold_prompts


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """WAN's transformer for block-causal training and block-by-block generation.

    `from_pretrained(folder, num_frame_per_block=3)` makes any diffusers WAN transformer causal. With
    `num_frame_per_block=None` (the default), or a block as long as the clip, it is exactly the stock model.

    Args beside those of `WanTransformer3DModel`:
        num_frame_per_block: Latent frames a block; None is bidirectional.
        local_attn_size: Latent frames that a query sees, counted back from the end of its block, the block included;
            -1 is all. In a rollout it is also the size of the cache.
        sink_size: The clip's first latent frames, kept in the cache when the window has left them. Rollouts only.
        independent_first_frame: The first latent frame is a block of its own (1 + k num_frame_per_block frames).
        control_names: Of the control videos that it follows, in the order of their input channels; see
            `causal_wan.model.control`.

    Source: CausVid, arXiv 2412.07772, section 4.1; window, sink and first frame as in Self Forcing, arXiv 2506.08009.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        num_frame_per_block: int | None = None,
        local_attn_size: int = -1,
        sink_size: int = 0,
        independent_first_frame: bool = False,
        control_names: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        _ = self.causal_config  # refuses what does not go together
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must be 1 in time so that frames have own timesteps, got {patch_size}.")
        self._set_processors()
        self.context_mesh: DeviceMesh | None = None

    def _set_processors(self) -> None:
        for layer in self.blocks:
            layer.attn1.set_processor(CausalWanSelfAttnProcessor())
            layer.attn2.set_processor(FoldedCrossAttnProcessor())

    @classmethod
    def from_stock(cls, transformer: WanTransformer3DModel) -> "CausalWanTransformer3DModel":
        """A causal transformer of the very layers of a stock one, which is not to be used afterwards.

        Args:
            transformer: Its config may hold the causal settings, as that of a saved causal transformer does.
        """
        with torch.device("meta"):
            causal = cls.from_config(whole_config(transformer))
        for name, module in transformer.named_children():
            setattr(causal, name, module)
        causal.scale_shift_table = transformer.scale_shift_table
        causal._set_processors()
        return causal.train(transformer.training)

    @property
    def causal_config(self) -> CausalConfig:
        """Blocks, window, sink and first frame, as they are in the config."""
        return CausalConfig.of(self.config)

    def set_causal_config(self, causal: CausalConfig | None = None, **changes: Any) -> None:
        """Changes them: all, or some alone, as in `set_causal_config(num_frame_per_block=3, local_attn_size=21)`.

        Raises:
            ValueError: If they do not go together.
        """
        self.register_to_config(**replace(causal or self.causal_config, **changes).as_dict())

    def enable_context_parallel(self, mesh: DeviceMesh | None) -> None:
        """Lets the processes of `mesh` share the tokens of each clip while the model trains; None changes nothing.

        They all give the same inputs and get the whole output. In `eval()` each process is on its own, as without.

        Raises:
            ValueError: If the heads do not divide among the processes.
        """
        check_divides_by_group("num_attention_heads", self.config.num_attention_heads, mesh)
        self.context_mesh = mesh

    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        """The parameter or buffer of that name. accelerate's FSDP2 asks the root module for it."""
        module_name, _, leaf = name.rpartition(".")
        return getattr(self.get_submodule(module_name), leaf)

    def block_lengths(self, num_latent_frames: int) -> list[int]:
        """Latent frames of each block of a clip; see `causal_wan.blocks.frame_block_lengths`."""
        return self.causal_config.block_lengths(num_latent_frames)

    def make_cache(
        self,
        batch_size: int,
        num_latent_frames: int,
        height: int,
        width: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache for a rollout.

        Args:
            batch_size: B.
            num_latent_frames: Latent frames of the whole clip; the cache is no larger than `local_attn_size`.
            height: Latent height H.
            width: Latent width W.
            device: Where the passes run; the model's by default.
            dtype: Of the buffers; None is that of the keys and values that come. torch.int8 takes half of 16 bits:
                they are rounded to 255 steps, scaled by the largest of each token and head.
        """
        capacity = num_latent_frames
        if self.config.local_attn_size != -1:
            capacity = min(capacity, self.config.local_attn_size)
        frame_tokens = LatentGeometry.of({}, self.config).frame_tokens(height, width)
        heads = (self.config.num_attention_heads, self.config.attention_head_dim)
        shape = (batch_size, capacity * frame_tokens, *heads)
        layers = [LayerCache(KeptStates(shape, dtype), KeptStates(shape, dtype)) for _ in self.blocks]
        device = self.device if device is None else device
        return KVCache(layers, frame_tokens=frame_tokens, sink_size=self.config.sink_size, device=device)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        cache: KVCache | None = None,
        start_frame: int = 0,
        context_latents: torch.Tensor | None = None,
        context_timestep: torch.Tensor | None = None,
        prompt_of_frame: torch.Tensor | None = None,
        control_latents: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity of noisy latents.

        Args:
            hidden_states: Noisy latents `(B, C, F, H, W)`; with a cache, those of one block.
            timestep: 1000 sigma, in [0, 1000]: `(B,)`, one a frame `(B, F)`, or one a token `(B, L)`.
            encoder_hidden_states: Prompt embeddings `(B, S, text_dim)`, or P of each clip `(B, P, S, text_dim)`.
            encoder_hidden_states_image: Image embeddings of image-to-video models.
            return_dict: False returns a tuple.
            attention_kwargs: May hold `scale`, the LoRA scale, as in diffusers.
            cache: Keys and values of the earlier blocks (from `make_cache`). Without one the whole clip is given and
                attention is block-causal. The prompt's are kept as long as the same tensor of embeddings comes.
            start_frame: The block's first latent frame in the whole clip; only with a cache.
            context_latents: The clip itself `(B, C, F, H, W)`, for teacher forcing: a block then sees these latents of
                the blocks before it in the place of the noisy ones. Without a cache only.
            context_timestep: Their noise level, `(B,)` or `(B, F)`; None is 0, clean.
            prompt_of_frame: Which of the P prompts each latent frame sees, `(B, F)`, int64. Without a cache only.
            control_latents: Latents of the control videos `(B, C', F, H, W)`, one after the other in C'; zeros are no
                control. None is all zeros.

        Returns:
            `.sample`: velocity `(B, C, F, H, W)`.

        Raises:
            ValueError: If F does not divide into blocks, the timestep's shape fits none of the above, the tokens with
                a common timestep do not divide among the processes of a clip, or the context or prompts do not fit.
        """
        is_teacher_forced = context_latents is not None
        if is_teacher_forced:
            check_context(hidden_states, timestep, context_latents, context_timestep, cache)
        latent_shape, num_context = hidden_states.shape[1:], 0
        context = self._attention_context(latent_shape, cache, start_frame, is_teacher_forced=is_teacher_forced)
        if is_teacher_forced:
            num_context = latent_shape[1] - self.block_lengths(latent_shape[1])[-1]
            hidden_states, timestep = prepend_context(
                hidden_states, timestep, context_latents[:, :, :num_context], context_timestep
            )
        hidden_states = with_controls(hidden_states, control_latents, self.config, num_context=num_context)
        given = (encoder_hidden_states, timestep, prompt_of_frame, latent_shape[1], num_context)
        is_whole = cache is None and encoder_hidden_states_image is None
        encoder_hidden_states, timestep, places = fold_prompts(*given, is_whole=is_whole)
        if cache is not None and cache.keep_prompt(encoder_hidden_states) and encoder_hidden_states_image is None:
            encoder_hidden_states = encoder_hidden_states[:, :0]  # only their number is asked for

        dtype = self.patch_embedding.weight.dtype  # of the weights; under autocast, layers choose for themselves
        tokens = self.patch_embedding(hidden_states.to(dtype)).flatten(2).transpose(1, 2)  # (B, L, D)
        batch_size, num_tokens, dim = tokens.shape
        num_groups = _num_timestep_groups(timestep, hidden_states.shape[2], num_tokens)
        temb, timestep_proj, text, image = self.condition_embedder(
            timestep.flatten(),
            encoder_hidden_states.to(dtype),
            encoder_hidden_states_image,
            timestep_seq_len=None if timestep.ndim == 1 else num_groups,
        )
        if image is not None:
            text = torch.cat([image, text], dim=1)
        text = text if places is None else TextByFrame(text, places)

        temb = temb.reshape(batch_size * num_groups, 1, -1)  # (B G, 1, D)
        timestep_proj = timestep_proj.reshape(batch_size * num_groups, 6, -1)  # (B G, 6, D)
        tokens = tokens.reshape(batch_size * num_groups, -1, dim)  # (B G, L / G, D)
        if self.context_mesh is not None and self.training and cache is None:
            check_divides_by_group("the tokens of a timestep", num_tokens // num_groups, self.context_mesh)
            context = replace(context, parallel=ContextParallel(self.context_mesh, num_groups))
            tokens = context.parallel.split(tokens)
        for index, layer in enumerate(self.blocks):
            of_layer, own = text, context
            if cache is not None:
                own = replace(context, cache=cache.layers[index])
                of_layer = KeptText(text, cache.layers[index]) if image is None else text
            inputs = (tokens, of_layer, timestep_proj, own)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(layer, *inputs)
            else:
                tokens = layer(*inputs)

        if num_context:  # only the noisy frames are predicted
            tokens, temb = (
                states.unflatten(0, (batch_size, num_groups))[:, num_context:].flatten(0, 1)
                for states in (tokens, temb)
            )
        shift, scale = (self.scale_shift_table + temb).chunk(2, dim=1)
        tokens = self.proj_out((self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))
        if context.parallel is not None:
            tokens = context.parallel.join(tokens)
        output = self._unpatchify(tokens, latent_shape)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _attention_context(
        self, latent_shape: torch.Size, cache: KVCache | None, start_frame: int, *, is_teacher_forced: bool
    ) -> AttentionContext:
        """What the layers have in common, for latents of `latent_shape` (C, F, H, W); makes room in the cache."""
        _, num_frames, height, width = latent_shape
        cos_and_sin = self._rotary_emb(latent_shape, start_frame)
        if cache is not None:
            cache.reserve(start_frame, num_frames)
            return AttentionContext(cos_and_sin, places=cache.places, num_held=cache.num_held)
        lengths, window = self.block_lengths(num_frames), self.config.local_attn_size
        frame_tokens = LatentGeometry.of({}, self.config).frame_tokens(height, width)
        if not is_teacher_forced:
            return AttentionContext(cos_and_sin, spans=block_causal_spans(lengths, frame_tokens, window))
        num_clean = sum(lengths[:-1]) * frame_tokens  # clean frames have the positions of noisy ones
        cos, sin = (torch.cat([table[:, :num_clean], table], dim=1) for table in cos_and_sin)
        return AttentionContext((cos, sin), spans=teacher_forcing_spans(lengths, frame_tokens, window))

    def _unpatchify(self, tokens: torch.Tensor, latent_shape: torch.Size) -> torch.Tensor:
        """Patches `(B G, L / G, p_h p_w C)` -> `(B, C, F, H, W)`, of latents of `latent_shape` (C, F, H, W)."""
        _, num_frames, height, width = latent_shape
        _, p_h, p_w = self.config.patch_size
        patches = tokens.reshape(-1, num_frames, height // p_h, width // p_w, p_h, p_w, self.config.out_channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def _rotary_emb(self, latent_shape: torch.Size, start_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `(1, L, 1, E)` of the frames from `start_frame` on; positions are those of the whole clip.

        Beyond the stock table of `rope_max_seq_len` frames, the same formula goes on.
        """
        _, num_frames, height, width = latent_shape
        end_frame, rope = start_frame + num_frames, self.rope
        one_frame = torch.empty((1, 1, 1, height, width), device="meta")  # only its shape is read
        if end_frame <= rope.max_seq_len:
            in_time = [table[start_frame:end_frame, : rope.t_dim] for table in (rope.freqs_cos, rope.freqs_sin)]
        else:
            frames = torch.arange(start_frame, end_frame)
            tables = get_1d_rotary_pos_embed(rope.t_dim, frames, use_real=True, freqs_dtype=torch.float64)
            in_time = [to_device(table, rope.freqs_cos.device) for table in tables]
        cos, sin = (
            torch.cat(
                [
                    time[:, None].expand(-1, table.shape[1], -1),  # (F, T, E of time)
                    table[:, :, 0, rope.t_dim :].expand(num_frames, -1, -1),
                ],
                dim=-1,
            ).flatten(0, 1)[None, :, None]
            for time, table in zip(in_time, rope(one_frame), strict=True)
        )
        return cos, sin


def whole_config(model: ConfigMixin) -> dict[str, Any]:
    """All settings of a model, as they are, to make another of: `from_config` passes over what has once been default.

    diffusers notes which settings nobody gave, and goes by that note even if they are changed afterwards.
    """
    return {name: value for name, value in model.config.items() if name != "_use_default_values"}


def _num_timestep_groups(timestep: torch.Tensor, num_frames: int, num_tokens: int) -> int:
    """How many runs of tokens of a sample have a timestep of their own: 1, F or L."""
    if timestep.ndim == 1:
        return 1
    if timestep.ndim == 2 and timestep.shape[1] in (num_frames, num_tokens):
        return timestep.shape[1]
    raise ValueError(
        f"timestep must have shape (B,), (B, F) with F={num_frames} latent frames, or (B, L) with L={num_tokens} "
        f"tokens, got {tuple(timestep.shape)}."
    )
