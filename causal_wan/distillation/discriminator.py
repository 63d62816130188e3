"""A discriminator: a small head on what the layers of the frozen teacher make of a noised clip.

Shapes: B = batch, F = latent frames, N = tokens of a frame, D = channels of the transformer, L = depths.

Source: a head on a frozen teacher as in FastGen's recipes; DMD2, arXiv 2405.14867, section 4.3, has it on the critic.
"""

from collections.abc import Iterable
from typing import Self

import torch
from torch import nn

from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel


WIDTH = 256


def feature_depths(num_layers: int) -> list[int]:
    """Numbers of the layers whose output is looked at: at a half, at three quarters and at the end."""
    return sorted({num_layers // 2, 3 * num_layers // 4, num_layers - 1})


class Discriminator(nn.Module):
    """Features of some depths -> an answer for each latent frame.

    Args:
        num_channels: D.
        num_depths: L.
    """

    def __init__(self, num_channels: int, num_depths: int) -> None:
        super().__init__()
        self.looks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(num_channels), nn.Linear(num_channels, WIDTH), nn.SiLU())
            for _ in range(num_depths)
        )
        self.answer = nn.Sequential(nn.Linear(num_depths * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    @classmethod
    def of(cls, transformer: CausalWanTransformer3DModel, seed: int) -> Self:
        """One on the features of this transformer, on its device; the same in every process."""
        config = transformer.config
        num_depths = len(feature_depths(config.num_layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            discriminator = cls(config.num_attention_heads * config.attention_head_dim, num_depths)
        return discriminator.to(transformer.device)

    def forward(self, features: Iterable[torch.Tensor]) -> torch.Tensor:
        """Logits.

        Args:
            features: `(B, F, N, D)` each, L of them.

        Returns:
            `(B, F)`, float32; above 0 is real.
        """
        seen = [look(of_depth.float()).mean(dim=2) for look, of_depth in zip(self.looks, features, strict=True)]
        return self.answer(torch.cat(seen, dim=-1))[..., 0].float()


def look_inside(
    transformer: CausalWanTransformer3DModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditions: Conditions,
) -> list[torch.Tensor]:
    """What layers of a bidirectional transformer make of noisy clips.

    Args:
        transformer: Frozen; gradients go through it to the latents.
        noisy_latents: `(B, C, F, H, W)`.
        timesteps: `(B,)`.
        conditions: Prompts.

    Returns:
        Of each of `feature_depths`, `(B, F, N, D)`.
    """
    depths = feature_depths(len(transformer.blocks))
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        transformer.blocks[depth].register_forward_hook(
            lambda layer, given, tokens, depth=depth: seen.update({depth: tokens})
        )
        for depth in depths
    ]
    try:
        transformer(noisy_latents, timesteps, **conditions.arguments(), return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[depth].unflatten(1, (noisy_latents.shape[2], -1)) for depth in depths]
