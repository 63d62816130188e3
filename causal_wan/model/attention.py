"""The attention of a layer, over tokens whose frames are folded into the batch: in time, and to the text."""

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from causal_wan.model.block_attention import (
    TokenSpan,
    apply_rotary_emb,
    attend_in_spans,
)
from causal_wan.model.context_parallel import ContextParallel
from causal_wan.model.kv_cache import LayerCache
from causal_wan.model.text import TextByFrame


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

    In a rollout the prompt's keys and values are computed once; where prompts change along a clip, once a prompt.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,  # (B G, L / G, D)
        encoder_hidden_states: torch.Tensor | KeptText | TextByFrame,  # (B, S, D)
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> torch.Tensor:
        text = encoder_hidden_states
        if isinstance(text, torch.Tensor):
            unfolded = hidden_states.reshape(text.shape[0], -1, hidden_states.shape[-1])
            return super().__call__(attn, unfolded, text).reshape(hidden_states.shape)
        if isinstance(text, TextByFrame):
            states = [each.index_select(0, text.places) for each in self._keys_and_values(attn, text.states)]
        else:
            if text.cache.text is None:
                text.cache.text = self._keys_and_values(attn, text.states)
            states = text.cache.text
        unfolded = hidden_states.reshape(len(states[0]), -1, hidden_states.shape[-1])
        query = attn.norm_q(attn.to_q(unfolded)).type_as(states[1]).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(query, *states, backend=self._attention_backend)
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query))).reshape(hidden_states.shape)

    @staticmethod
    def _keys_and_values(attn: torch.nn.Module, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a text `(B, S, D)`, each `(B, S, N, E)`."""
        key, value = (
            attn.to_kv(text).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
        )
        key = attn.norm_k(key).type_as(value)  # as attention takes it
        return key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))
