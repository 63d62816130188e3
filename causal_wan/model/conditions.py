"""What a pass of the transformer is told beside latents and timesteps.

Shapes: B = batch, F = latent frames, P = prompts of a clip, S = prompt tokens, D = text dimension, C' = channels of
the controls, H, W = latent height and width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from causal_wan.devices import to_device
from causal_wan.model.text import pad_prompt_embeds


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Travels as one from a batch or a call to the transformer's forward.

    Attributes:
        prompt_embeds: `(B, S, D)`; of clips in which the prompt changes, `(B, P, S, D)`.
        prompt_of_frame: Number of each latent frame's prompt among these P, int64 `(B, F)`; None is one for all.
        control_latents: Of the frames of a pass, `(B, C', F, H, W)`; None is no control.
    """

    prompt_embeds: torch.Tensor
    prompt_of_frame: torch.Tensor | None = None
    control_latents: torch.Tensor | None = None

    def arguments(self) -> dict[str, torch.Tensor]:
        """As the transformer's forward takes them."""
        given = {"prompt_of_frame": self.prompt_of_frame, "control_latents": self.control_latents}
        given = {name: value for name, value in given.items() if value is not None}
        return {"encoder_hidden_states": self.prompt_embeds, **given}

    def at_frame(self, frame: int) -> Self:
        """Those of a latent frame alone; beyond the last frame, of the last."""
        if self.prompt_of_frame is None:
            return self
        number = self.prompt_of_frame[:, min(frame, self.prompt_of_frame.shape[1] - 1)]
        clips = torch.arange(len(number), device=number.device)
        return replace(self, prompt_embeds=self.prompt_embeds[clips, number], prompt_of_frame=None)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Those of several batches as one batch, in their order; of frames one by one, see `at_frame`."""
        assert all(part.prompt_of_frame is None for part in parts), "prompts of other frames would be lost"
        return cls(prompt_embeds=torch.cat([part.prompt_embeds for part in parts]))

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.prompt_embeds)

    @property
    def dtype(self) -> torch.dtype:
        """That of the passes."""
        return self.prompt_embeds.dtype

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """On a device, the embeddings in a precision."""
        by_frame = None if self.prompt_of_frame is None else to_device(self.prompt_of_frame, device)
        embeds = to_device(self.prompt_embeds, device)
        return replace(self, prompt_embeds=embeds if dtype is None else embeds.to(dtype), prompt_of_frame=by_frame)


def embedded(
    prompts: Sequence[str | Sequence[str]],
    embeds: Mapping[str, torch.Tensor],
    block_lengths: Sequence[int],
    max_sequence_length: int,
) -> Conditions:
    """Conditions of prompts; of clips that all have one prompt, `prompt_of_frame` is None.

    Else there is room for 2, 4, 8, ... prompts a clip: layers are compiled for each number anew.

    Args:
        prompts: One a clip, or one for each block of it.
        embeds: Prompt -> embedding `(S, D)` of its true length.
        block_lengths: Latent frames of each block.
        max_sequence_length: Tokens that prompts are padded to.
    """
    distinct = [[each] if isinstance(each, str) else list(dict.fromkeys(each)) for each in prompts]
    most = 1 << (max(map(len, distinct)) - 1).bit_length()
    filled = [text for texts in distinct for text in texts + texts[:1] * (most - len(texts))]
    padded = pad_prompt_embeds([embeds[text] for text in filled], max_sequence_length)
    if most == 1:
        return Conditions(prompt_embeds=padded)
    numbers = [
        [0 if isinstance(each, str) else texts.index(each[block]) for block in range(len(block_lengths))]
        for each, texts in zip(prompts, distinct, strict=True)
    ]
    of_frame = torch.tensor(numbers).repeat_interleave(torch.tensor(list(block_lengths)), dim=1)
    return Conditions(prompt_embeds=padded.unflatten(0, (-1, most)), prompt_of_frame=of_frame)
