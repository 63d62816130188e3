"""How the latent frames of a clip fall into blocks, and what a block sees. Imports no library."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """What a causal transformer's config has beside that of a stock one; see `CausalWanTransformer3DModel`.

    Attributes:
        num_frame_per_block: Latent frames of a block; None makes the whole clip one block (bidirectional).
        local_attn_size: Latent frames that a block sees, counted back from its end; -1 is all.
        sink_size: First latent frames that stay in the cache although the window has left them.
        independent_first_frame: The first latent frame is a block of its own.

    Raises:
        ValueError: If they do not go together.
    """

    num_frame_per_block: int | None
    local_attn_size: int = -1
    sink_size: int = 0
    independent_first_frame: bool = False

    def __post_init__(self) -> None:
        if self.num_frame_per_block is not None and self.num_frame_per_block < 1:
            raise ValueError(f"num_frame_per_block must be 1 or more, or None, got {self.num_frame_per_block}.")
        if self.sink_size < 0:
            raise ValueError(f"sink_size must be 0 or more latent frames, got {self.sink_size}.")
        smallest_window = (self.num_frame_per_block or 1) + self.sink_size
        if self.local_attn_size != -1 and self.local_attn_size < smallest_window:
            raise ValueError(
                f"local_attn_size must hold one block and the sink, {smallest_window} latent frames or more, or be -1 "
                f"for no window, got {self.local_attn_size}."
            )

    @classmethod
    def of(cls, transformer_config: Mapping[str, Any]) -> Self:
        """What the config of a transformer says; that of a stock one says nothing, which is bidirectional."""
        known = {field.name for field in fields(cls)} & transformer_config.keys()
        return cls(**{"num_frame_per_block": None, **{name: transformer_config[name] for name in known}})

    def block_lengths(self, num_latent_frames: int) -> list[int]:
        """Latent frames of each block of a clip.

        Raises:
            ValueError: If the clip does not divide into blocks.
        """
        return frame_block_lengths(
            num_latent_frames, self.num_frame_per_block, independent_first_frame=self.independent_first_frame
        )

    def as_dict(self) -> dict[str, Any]:
        """By the names of the transformer's config."""
        return asdict(self)


def frame_block_lengths(
    num_latent_frames: int, num_frame_per_block: int | None, *, independent_first_frame: bool = False
) -> list[int]:
    """How the latent frames of a clip fall into blocks.

    Args:
        num_latent_frames: F.
        num_frame_per_block: Latent frames a block; None, or F or more, makes the whole clip one block.
        independent_first_frame: The first frame is a block of its own, later blocks have `num_frame_per_block`.

    Returns:
        Latent frames of each block, in order; they add up to F.

    Raises:
        ValueError: If F does not divide into blocks.

    Source: CausVid, arXiv 2412.07772, section 4.1; `independent_first_frame` as in Self Forcing, arXiv 2506.08009.
    """
    first = [1] if independent_first_frame and num_frame_per_block is not None else []
    rest = num_latent_frames - len(first)
    if num_frame_per_block is None or num_frame_per_block >= rest > 0:
        return [*first, rest]
    if num_frame_per_block < 1 or rest % num_frame_per_block:
        below = rest // max(num_frame_per_block, 1) * max(num_frame_per_block, 1) + len(first)
        above = below + max(num_frame_per_block, 1)
        raise ValueError(
            f"the number of latent frames must be {'1 + ' if first else ''}a multiple of num_frame_per_block="
            f"{num_frame_per_block}, got {num_latent_frames}; use {below or above} or {above} latent frames "
            f"(num_frames {4 * (below or above) - 3} or {4 * above - 3}), or another num_frame_per_block."
        )
    return first + [num_frame_per_block] * (rest // num_frame_per_block)
