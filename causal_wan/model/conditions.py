"""What a pass of the transformer is told beside latents and timesteps.

Shapes: B = batch, S = prompt tokens, D = text dimension, C' = channels of the controls, F = latent frames, H, W =
latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Travels as one from a batch or a call to the transformer's forward.

    Attributes:
        prompt_embeds: `(B, S, D)`.
        control_latents: Of the frames of a pass, `(B, C', F, H, W)`; None is no control.
    """

    prompt_embeds: torch.Tensor
    control_latents: torch.Tensor | None = None

    def arguments(self) -> dict[str, torch.Tensor | None]:
        """As the transformer's forward takes them."""
        return {"encoder_hidden_states": self.prompt_embeds, "control_latents": self.control_latents}

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Those of several batches as one batch, in their order."""
        return cls(prompt_embeds=torch.cat([part.prompt_embeds for part in parts]))

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.prompt_embeds)

    @property
    def dtype(self) -> torch.dtype:
        """That of the passes."""
        return self.prompt_embeds.dtype
