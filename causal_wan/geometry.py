"""How videos and their latents measure up. Imports no library, so that settings are read at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


FRAME_RATES = {48: 24}  # of models with so many latent channels (WAN 2.2 5B); configs do not say


@dataclass(frozen=True, kw_only=True)
class LatentGeometry:
    """What of a checkpoint decides how many latents and tokens a video has; WAN 2.1's by default.

    Attributes:
        channels: C.
        spatial_factor: Pixels to a latent, in height and in width.
        temporal_factor: Video frames to a latent frame; the first latent frame is one video frame.
        patch_size: Latents to a token, in time, height and width.
        frame_rate: Frames a second of the videos that it was trained on.
    """

    channels: int = 16
    spatial_factor: int = 8
    temporal_factor: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    frame_rate: int = 16

    @classmethod
    def of(cls, vae_config: Mapping[str, Any], transformer_config: Mapping[str, Any] | None = None) -> Self:
        """That of a checkpoint, by the configs of its VAE and its transformer.

        What they leave open is as in WAN 2.1, whose config.json says nothing of factors.

        Args:
            vae_config: Of an `AutoencoderKLWan`.
            transformer_config: Of a WAN transformer; None where nobody asks for tokens.
        """
        default, transformer_config = cls(), transformer_config or {}
        channels = vae_config.get("z_dim", transformer_config.get("out_channels", default.channels))
        return cls(
            channels=channels,
            spatial_factor=vae_config.get("scale_factor_spatial", default.spatial_factor),
            temporal_factor=vae_config.get("scale_factor_temporal", default.temporal_factor),
            patch_size=tuple(transformer_config.get("patch_size", default.patch_size)),
            frame_rate=FRAME_RATES.get(channels, default.frame_rate),
        )

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of so many video frames; of more than 4k + 1, those that are whole."""
        return (num_frames - 1) // self.temporal_factor + 1

    def num_frames(self, num_latent_frames: int) -> int:
        """Video frames of so many latent frames."""
        return self.temporal_factor * (num_latent_frames - 1) + 1 if num_latent_frames else 0

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a video of so many frames and pixels."""
        size = height // self.spatial_factor, width // self.spatial_factor
        return self.channels, self.num_latent_frames(num_frames), *size

    def frame_tokens(self, height: int, width: int) -> int:
        """Tokens of a latent frame of H x W latents."""
        return (height // self.patch_size[1]) * (width // self.patch_size[2])

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        """Tokens of latents of a shape (C, F, H, W)."""
        _, num_latent_frames, height, width = latent_shape
        return num_latent_frames // self.patch_size[0] * self.frame_tokens(height, width)

    @property
    def size_multiples(self) -> tuple[int, int]:
        """What height and width must be multiples of, so that they are whole tokens."""
        _, height, width = self.patch_size
        return self.spatial_factor * height, self.spatial_factor * width

    def check_num_frames(self, num_frames: int, name: str = "num_frames") -> None:
        """Checks that video frames make whole latent frames.

        Raises:
            ValueError: If not; names the nearest numbers that do.
        """
        factor = self.temporal_factor
        if num_frames < 1 or (num_frames - 1) % factor:
            below = max(self.num_frames(self.num_latent_frames(num_frames)), 1)
            raise ValueError(
                f"{name} must be {factor}k + 1 for the WAN VAE, got {num_frames}; use {below} or {below + factor}."
            )

    def check_size(
        self, height: int, width: int, names: tuple[str, str] = ("height", "width"), *, of: str = ""
    ) -> None:
        """Checks that pixels make whole tokens.

        Args:
            height: Pixels.
            width: Pixels.
            names: What the error calls them.
            of: What asks for it, for the error; by default it is WAN.

        Raises:
            ValueError: If not; names the nearest sizes that do.
        """
        for name, size, multiple in zip(names, (height, width), self.size_multiples, strict=True):
            if size < multiple or size % multiple:
                below = max(size // multiple * multiple, multiple)
                raise ValueError(
                    f"{name} must be a multiple of {multiple}{of}, got {size}; use {below} or {below + multiple}."
                )


WAN = LatentGeometry()
"""That of WAN 2.1, by which settings are checked before a checkpoint is read."""
FRAME_RATE = WAN.frame_rate
