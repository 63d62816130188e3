"""How the latent frames of a clip fall into blocks, and what a block sees. Imports no library."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from causal_wan.geometry import WAN, LatentGeometry


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

    def iterate_block_lengths(self, num_latent_frames: int | None) -> Iterator[int]:
        """Latent frames of each block of a clip, one after another; None has no end.

        Raises:
            ValueError: If the clip does not divide into blocks, or has no end and neither blocks nor a window.
        """
        if num_latent_frames is not None:
            return iter(self.block_lengths(num_latent_frames))
        if self.num_frame_per_block is None or self.local_attn_size == -1:
            raise ValueError(
                "a video without end must be sampled in blocks with a window, got num_frame_per_block="
                f"{self.num_frame_per_block} and local_attn_size={self.local_attn_size}; set both, as in "
                "transformer.set_causal_config(num_frame_per_block=3, local_attn_size=21), or give num_frames."
            )
        return itertools.chain([1] * self.independent_first_frame, itertools.repeat(self.num_frame_per_block))

    def check_continues(self, num_given: int, num_latent_frames: int | None, geometry: LatentGeometry = WAN) -> None:
        """Checks that a clip can be continued from its first frames; from the first alone, a picture, it always can.

        Args:
            num_given: Latent frames that are given.
            num_latent_frames: Of the clip; None has no end.
            geometry: Of the checkpoint, for the error.

        Raises:
            ValueError: If they are more than one and do not end with a block, or leave nothing to sample.
        """
        leading = itertools.islice(self.iterate_block_lengths(num_latent_frames), num_given + 1)
        ends = list(itertools.accumulate(leading))
        if num_given in (1, *ends) and num_given != num_latent_frames:
            return
        below = max((end for end in ends if end < num_given), default=None)
        above = next((end for end in ends if end > num_given), None)
        fitting = [geometry.num_frames(end) for end in (below, above) if end not in (None, num_latent_frames)]
        raise ValueError(
            "a video to continue must end with a block and before the clip does, which has "
            f"{'no end' if num_latent_frames is None else f'{num_latent_frames} latent frames'}, got {num_given} "
            f"latent frames ({geometry.num_frames(num_given)} frames); "
            + (f"give {' or '.join(map(str, fitting))} frames." if fitting else "ask for more frames.")
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
        is_alone_too_many = not first and num_frame_per_block > 0 and rest % num_frame_per_block == 1
        raise ValueError(
            f"the number of latent frames must be {'1 + ' if first else ''}a multiple of num_frame_per_block="
            f"{num_frame_per_block}, got {num_latent_frames}; use {below} or {above} latent frames "
            f"(num_frames {WAN.num_frames(below)} or {WAN.num_frames(above)}), or another "
            f"num_frame_per_block{', or independent_first_frame' if is_alone_too_many else ''}."
        )
    return first + [num_frame_per_block] * (rest // num_frame_per_block)


def middle_frames(block_lengths: Sequence[int], geometry: LatentGeometry = WAN) -> list[int]:
    """The video frame in the middle of each block, by which what changes along a video falls to blocks.

    Of an even number of frames, the later one of the two: so a change falls on the nearest start of a block.

    Args:
        block_lengths: Latent frames of each block.
        geometry: Of the checkpoint.
    """
    ends = list(itertools.accumulate(block_lengths))
    starts = [0, *ends][: len(ends)]
    return [
        (geometry.num_frames(start) + geometry.num_frames(end)) // 2 for start, end in zip(starts, ends, strict=True)
    ]
