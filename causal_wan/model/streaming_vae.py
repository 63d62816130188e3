"""WAN's VAE, block by block: its convolutions are causal, so what they remember of a video carries on.

Shapes: B = batch, C = latent channels, f = latent frames of a block, H, W = latent height and width, t = video frames.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook

from causal_wan.geometry import LatentGeometry
from causal_wan.model.vae import decode_latents, denormalize_latents, normalize_latents


NUM_UP_BLOCKS = 2  # that features are taken of; the next one takes three times the memory of all before it


class StreamingDecoder:
    """Decodes the blocks of a video in their order, each as soon as it exists.

    What comes out is what decoding the whole clip at once gives, to the last bit on a CPU, in memory that does not
    grow with the clip. What is remembered is the decoder's own: several may use one VAE in turn. No tiling.

    Args:
        vae: Its dtype and device are used.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self._features: list[Any] | None = None  # of the last frames, one for each convolution

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames of the next block.

        Args:
            latents: Normalised latents `(B, C, f, H, W)`, f >= 1.

        Returns:
            Video in [-1, 1], `(B, 3, t, height, width)`: t = 4 f, but 4 (f - 1) + 1 for the first block.
        """
        video, self._features = _decode(self.vae, latents, self._features)
        return video.clamp(-1, 1)


class StreamingEncoder:
    """Encodes a video frame by frame: a latent frame as soon as its video frames are there.

    What comes out is what `causal_wan.model.vae.encode_videos` gives of the whole clip, up to rounding, in memory that
    does not grow with the clip. What is remembered is the encoder's own, as in `StreamingDecoder`. No tiling.

    Args:
        vae: Its dtype and device are used.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self._features: list[Any] | None = None  # of the last frames, one for each convolution

    @property
    def num_wanted(self) -> int:
        """Video frames of the next latent frame: 1 for the first, then 4."""
        return 1 if self._features is None else LatentGeometry.of(self.vae.config).temporal_factor

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """The next latent frame, normalised, `(B, C, 1, H, W)`, float32.

        Args:
            frames: In [-1, 1], `(B, 3, t, height, width)`, t = `num_wanted`.
        """
        latents, self._features = _encode(self.vae, frames, self._features)
        return normalize_latents(self.vae, latents)


@apply_forward_hook
def _encode(vae: AutoencoderKLWan, frames: torch.Tensor, features: list[Any] | None) -> tuple[torch.Tensor, list[Any]]:
    frames = frames.to(vae.device, vae.dtype)
    if vae.config.patch_size is not None:
        frames = patchify(frames, patch_size=vae.config.patch_size)
    if features is None:
        vae.clear_cache()  # which knows how many convolutions there are
        features = [None] * len(vae._enc_feat_map)
    hidden = vae.quant_conv(vae.encoder(frames, feat_cache=features, feat_idx=[0]))
    return DiagonalGaussianDistribution(hidden).mode(), features


def decode_in_parts(vae: AutoencoderKLWan, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The video of normalised latents `(B, C, F, H, W)`, in [-1, 1], in parts: see `StreamingDecoder`.

    A VAE that decodes in tiles gives the whole video at once.
    """
    if vae.use_tiling:
        yield decode_latents(vae, latents)
        return
    decoder = StreamingDecoder(vae)
    for frame in latents.split(1, dim=2):
        yield decoder.decode(frame)


@apply_forward_hook  # weights that `enable_model_cpu_offload` keeps elsewhere come, as they do for `vae.decode`
def _decode(
    vae: AutoencoderKLWan, latents: torch.Tensor, features: list[Any] | None
) -> tuple[torch.Tensor, list[Any]]:
    hidden = vae.post_quant_conv(denormalize_latents(vae, latents).to(vae.device, vae.dtype))
    frames = []
    for latent_frame in hidden.split(1, dim=2):
        first = {"first_chunk": True} if features is None else {}
        if features is None:
            vae.clear_cache()  # which knows how many convolutions there are
            features = [None] * len(vae._feat_map)
        frames.append(vae.decoder(latent_frame, feat_cache=features, feat_idx=[0], **first))
    video = torch.cat(frames, dim=2)
    if vae.config.patch_size is not None:
        video = unpatchify(video, patch_size=vae.config.patch_size)
    return video, features


def decode_features(vae: AutoencoderKLWan, latents: torch.Tensor) -> list[torch.Tensor]:
    """What the decoder makes of latents on its way to pixels: after its middle block, and after its first up blocks.

    Of the first latent frame it makes a picture, by other ways than a video: it is context here and left out. Frames
    are decoded as a whole, whatever `vae.use_tiling` says. Gradients reach the latents; weights are to be frozen.

    Args:
        vae: Its dtype and device are used, also under autocast.
        latents: Normalised latents `(B, C, f, H, W)`, f >= 2.

    Returns:
        Features `(B, D, (f - 1) k, y, x)` of each depth: k = 1, y = H and x = W after the middle block, and larger
        after each block that doubles them.
    """
    decoder = vae.decoder
    with torch.autocast(latents.device.type, enabled=False):
        hidden = vae.post_quant_conv(denormalize_latents(vae, latents).to(vae.device, vae.dtype))
        hidden = decoder.mid_block(decoder.conv_in(hidden))  # causal convolutions alone: all frames at once
        vae.clear_cache()  # which knows how many convolutions there are
        remembered: list[Any] = [None] * len(vae._feat_map)
        of_frames = []
        for number, frame in enumerate(hidden.split(1, dim=2)):
            place, features = [0], [frame]
            for block in decoder.up_blocks[:NUM_UP_BLOCKS]:
                features.append(block(features[-1], remembered, place, first_chunk=number == 0))
            of_frames.append(features)
    return [torch.cat(parts, dim=2) for parts in zip(*of_frames[1:], strict=True)]
