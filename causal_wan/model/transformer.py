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

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils import apply_lora_scale
from torch.distributed.device_mesh import DeviceMesh

from causal_wan.blocks import frame_block_lengths
from causal_wan.devices import to_device
from causal_wan.model.block_attention import (
    TokenSpan,
    apply_rotary_emb,
    attend_in_spans,
    block_causal_spans,
    teacher_forcing_spans,
)
from causal_wan.model.context_parallel import ContextParallel, check_divides_by_group
from causal_wan.model.kv_cache import KeptStates, KVCache, LayerCache


@dataclass
class AttentionContext:
    """What self-attention needs beside its tokens. Travels to the layers in the place of the rotary embedding.

    Attributes:
        rotary_emb: cos and sin, each `(1, L, 1, E)`.
        spans: Dense calls of block-causal attention; None with a cache, whose content is seen whole.
        parallel: How processes share the clip, or None.
        cache: What the layer remembers of earlier blocks, or None.
        places: Where in the cache the block belongs, `(L,)`.
        num_held: Tokens of the cache in use, the current block included.
    """

    rotary_emb: tuple[torch.Tensor, torch.Tensor]
    spans: list[TokenSpan] | None = None
    parallel: ContextParallel | None = None
    cache: LayerCache | None = None
    places: torch.Tensor | None = None
    num_held: int = 0


@dataclass
class KeptText:
    """Embedded prompts `(B, S, D)` of a rollout, and where a layer keeps their keys and values."""

    states: torch.Tensor
    cache: LayerCache


class CausalWanSelfAttnProcessor:
    """Block-causal self-attention over tokens whose frames are folded into the batch."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,  # (B G, L / G, D)
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        rotary_emb: AttentionContext | None = None,
    ) -> torch.Tensor:
        context, folded_shape = rotary_emb, hidden_states.shape
        cos, sin = context.rotary_emb
        num_processes = 1 if context.parallel is None else context.parallel.mesh.size()
        hidden_states = hidden_states.reshape(-1, cos.shape[1] // num_processes, folded_shape[-1])  # (B, L / P, D)

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))  # (B, L, N, E)
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        if context.parallel is not None:
            query, key, value = (context.parallel.gather_tokens(states) for states in (query, key, value))
        # Under autocast the norms give float32, which attention does not take: cast once, not for each call.
        query, key = (apply_rotary_emb(states, cos, sin).type_as(value) for states in (query, key))

        if context.cache is not None:
            out = self._attend(query, *context.cache.update(key, value, context.places, context.num_held))
        else:
            out = attend_in_spans(self._attend, query, key, value, context.spans)
        if context.parallel is not None:
            out = context.parallel.gather_heads(out)
        out = out.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out)).reshape(folded_shape)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )


class FoldedCrossAttnProcessor(WanAttnProcessor):
    """The stock processor (text, image, fused projections) over tokens whose frames are folded into the batch.

    In a rollout the prompt's keys and values are computed once.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,  # (B G, L / G, D)
        encoder_hidden_states: torch.Tensor | KeptText,  # (B, S, D)
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        kept = isinstance(encoder_hidden_states, KeptText)
        text = encoder_hidden_states.states if kept else encoder_hidden_states
        unfolded = hidden_states.reshape(text.shape[0], -1, hidden_states.shape[-1])
        if not kept:
            return super().__call__(attn, unfolded, text).reshape(hidden_states.shape)
        cache = encoder_hidden_states.cache
        if cache.text is None:
            key, value = (
                attn.to_kv(text).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
            )
            key = attn.norm_k(key).type_as(value)  # as attention takes it
            cache.text = tuple(states.unflatten(2, (attn.heads, -1)) for states in (key, value))
        query = attn.norm_q(attn.to_q(unfolded)).type_as(cache.text[1]).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(query, *cache.text, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query))).reshape(hidden_states.shape)


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
        _check_causal_config(num_frame_per_block, local_attn_size, sink_size)
        if patch_size[0] != 1:
            raise ValueError(f"patch_size must be 1 in time so that frames have own timesteps, got {patch_size}.")
        self._set_processors()
        self.context_mesh: DeviceMesh | None = None

    def _set_processors(self) -> None:
        for layer in self.blocks:
            layer.attn1.set_processor(CausalWanSelfAttnProcessor())
            layer.attn2.set_processor(FoldedCrossAttnProcessor())

    @classmethod
    def from_stock(
        cls, transformer: WanTransformer3DModel, **causal_config: int | bool | None
    ) -> "CausalWanTransformer3DModel":
        """A causal transformer of the very layers of a stock one, which is not to be used afterwards.

        Args:
            transformer: Its config may hold the causal settings, as that of a saved causal transformer does.
            causal_config: `num_frame_per_block`, `local_attn_size`, `sink_size`, `independent_first_frame`.
        """
        with torch.device("meta"):
            causal = cls.from_config(transformer.config, **causal_config)
        for name, module in transformer.named_children():
            setattr(causal, name, module)
        causal.scale_shift_table = transformer.scale_shift_table
        causal._set_processors()
        return causal.train(transformer.training)

    def set_causal_config(self, **settings: int | bool | None) -> None:
        """Changes `num_frame_per_block`, `local_attn_size`, `sink_size` or `independent_first_frame`.

        Raises:
            ValueError: If they do not go together.
        """
        config = {name: self.config[name] for name in ("num_frame_per_block", "local_attn_size", "sink_size")}
        _check_causal_config(**config | {name: value for name, value in settings.items() if name in config})
        self.register_to_config(**settings)

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
        """Latent frames of each block of a clip; see `causal_wan.flow.frame_block_lengths`."""
        return frame_block_lengths(
            num_latent_frames,
            self.config.num_frame_per_block,
            independent_first_frame=self.config.independent_first_frame,
        )

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
        frame_tokens = (height // self.config.patch_size[1]) * (width // self.config.patch_size[2])
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
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity of noisy latents.

        Args:
            hidden_states: Noisy latents `(B, C, F, H, W)`; with a cache, those of one block.
            timestep: 1000 sigma, in [0, 1000]: `(B,)`, one a frame `(B, F)`, or one a token `(B, L)`.
            encoder_hidden_states: Prompt embeddings `(B, S, text_dim)`.
            encoder_hidden_states_image: Image embeddings of image-to-video models.
            return_dict: False returns a tuple.
            attention_kwargs: May hold `scale`, the LoRA scale, as in diffusers.
            cache: Keys and values of the earlier blocks (from `make_cache`). Without one the whole clip is given and
                attention is block-causal. The prompt's are kept as long as the same tensor of embeddings comes.
            start_frame: The block's first latent frame in the whole clip; only with a cache.
            context_latents: The clip itself `(B, C, F, H, W)`, for teacher forcing: a block then sees these latents of
                the blocks before it in the place of the noisy ones. Without a cache only.
            context_timestep: Their noise level, `(B,)` or `(B, F)`; None is 0, clean.

        Returns:
            `.sample`: velocity `(B, C, F, H, W)`.

        Raises:
            ValueError: If F does not divide into blocks, the timestep's shape fits none of the above, the tokens with
                a common timestep do not divide among the processes of a clip, or the context does not fit.
        """
        batch_size, _, num_frames, height, width = hidden_states.shape
        _, p_h, p_w = self.config.patch_size
        frame_tokens = (height // p_h) * (width // p_w)

        context, num_context = AttentionContext(rotary_emb=self._rotary_emb(hidden_states, start_frame)), 0
        if context_latents is not None:
            _check_context(hidden_states, timestep, context_latents, context_timestep, cache)
            lengths = self.block_lengths(num_frames)
            num_context = num_frames - lengths[-1]
            context = AttentionContext(
                rotary_emb=_repeat_first(context.rotary_emb, num_context * frame_tokens),
                spans=teacher_forcing_spans(lengths, frame_tokens, self.config.local_attn_size),
            )
            hidden_states, timestep = _prepend_context(
                hidden_states, timestep, context_latents[:, :, :num_context], context_timestep
            )
        elif cache is None:
            spans = block_causal_spans(self.block_lengths(num_frames), frame_tokens, self.config.local_attn_size)
            context = replace(context, spans=spans)
        else:
            cache.reserve(start_frame, num_frames)
            if cache.keep_prompt(encoder_hidden_states) and encoder_hidden_states_image is None:
                encoder_hidden_states = encoder_hidden_states[:, :0]  # only their number is asked for
            context = replace(context, places=cache.places, num_held=cache.num_held)

        dtype = self.patch_embedding.weight.dtype  # of the weights; under autocast, layers choose for themselves
        tokens = self.patch_embedding(hidden_states.to(dtype)).flatten(2).transpose(1, 2)  # (B, L, D)
        num_groups = _num_timestep_groups(timestep, num_context + num_frames, tokens.shape[1])
        temb, timestep_proj, encoder_hidden_states, encoder_hidden_states_image = self.condition_embedder(
            timestep.flatten(),
            encoder_hidden_states.to(dtype),
            encoder_hidden_states_image,
            timestep_seq_len=None if timestep.ndim == 1 else num_groups,
        )
        if encoder_hidden_states_image is not None:
            encoder_hidden_states = torch.cat([encoder_hidden_states_image, encoder_hidden_states], dim=1)

        parallel = None
        if self.context_mesh is not None and self.training and cache is None:
            check_divides_by_group("the tokens of a timestep", tokens.shape[1] // num_groups, self.context_mesh)
            parallel = ContextParallel(self.context_mesh, num_groups)
            context = replace(context, parallel=parallel)

        temb = temb.reshape(batch_size * num_groups, 1, -1)  # (B G, 1, D)
        timestep_proj = timestep_proj.reshape(batch_size * num_groups, 6, -1)  # (B G, 6, D)
        tokens = tokens.reshape(batch_size * num_groups, -1, tokens.shape[-1])  # (B G, L / G, D)
        if parallel is not None:
            tokens = parallel.split(tokens)
        for index, layer in enumerate(self.blocks):
            text, own = encoder_hidden_states, context
            if cache is not None:
                own = replace(context, cache=cache.layers[index])
                text = KeptText(text, cache.layers[index]) if encoder_hidden_states_image is None else text
            inputs = (tokens, text, timestep_proj, own)
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
        tokens = (self.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens)
        tokens = self.proj_out(tokens)
        if parallel is not None:
            tokens = parallel.join(tokens)
        tokens = tokens.reshape(batch_size, num_frames, height // p_h, width // p_w, p_h, p_w, -1)
        output = tokens.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (B, C, F, H, W)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _rotary_emb(self, hidden_states: torch.Tensor, start_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `(1, L, 1, E)` of the frames from `start_frame` on; positions are those of the whole clip.

        Beyond the stock table of `rope_max_seq_len` frames, the same formula goes on.
        """
        _, _, num_frames, height, width = hidden_states.shape
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


def _repeat_first(rotary_emb: tuple[torch.Tensor, torch.Tensor], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the first tokens once more before those of all: clean frames have the positions of noisy ones."""
    cos, sin = (torch.cat([table[:, :num_tokens], table], dim=1) for table in rotary_emb)
    return cos, sin


def _prepend_context(
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    context_latents: torch.Tensor,
    context_timestep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[context | noisy] latents `(B, C, F' + F, H, W)` and timesteps `(B, F' + F)`, of a context of F' frames."""
    num_context, num_frames = context_latents.shape[2], hidden_states.shape[2]
    if context_timestep is None:
        context_timestep = timestep.new_zeros(len(timestep))
    by_frame = [
        level[:, None].expand(-1, length) if level.ndim == 1 else level[:, :length]
        for level, length in ((context_timestep, num_context), (timestep, num_frames))
    ]
    return torch.cat([context_latents, hidden_states], dim=2), torch.cat(by_frame, dim=1)


def _check_context(
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    context_latents: torch.Tensor,
    context_timestep: torch.Tensor | None,
    cache: KVCache | None,
) -> None:
    if cache is not None:
        raise ValueError("context_latents are for training; with a cache the context is in it, so leave them out.")
    if context_latents.shape != hidden_states.shape:
        raise ValueError(
            f"context_latents must have the shape of the noisy latents, {tuple(hidden_states.shape)}, got "
            f"{tuple(context_latents.shape)}."
        )
    batch_size, num_frames = hidden_states.shape[0], hidden_states.shape[2]
    for name, given in (("timestep", timestep), ("context_timestep", context_timestep)):
        if given is not None and given.shape not in ((batch_size,), (batch_size, num_frames)):
            raise ValueError(
                f"with context_latents, {name} must have shape (B,) or (B, F) with F={num_frames} latent frames, got "
                f"{tuple(given.shape)}."
            )


def _check_causal_config(num_frame_per_block: int | None, local_attn_size: int, sink_size: int) -> None:
    if num_frame_per_block is not None and num_frame_per_block < 1:
        raise ValueError(f"num_frame_per_block must be 1 or more, or None, got {num_frame_per_block}.")
    if sink_size < 0:
        raise ValueError(f"sink_size must be 0 or more latent frames, got {sink_size}.")
    smallest_window = (num_frame_per_block or 1) + sink_size
    if local_attn_size != -1 and local_attn_size < smallest_window:
        raise ValueError(
            f"local_attn_size must hold one block and the sink, {smallest_window} latent frames or more, or be -1 "
            f"for no window, got {local_attn_size}."
        )
