"""What a pass of the transformer is told beside latents and timesteps.

Shapes: B = batch, S = prompt tokens, D = text dimension.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Travels as one from a batch or a call to the transformer's forward.

    Attributes:
        prompt_embeds: `(B, S, D)`.
    """

    prompt_embeds: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        """As the transformer's forward takes them."""
        return {"encoder_hidden_states": self.prompt_embeds}
