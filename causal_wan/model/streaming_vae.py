"""WAN's VAE, decoding a video block by block: its convolutions are causal, so what they remember carries on.

Shapes: B = batch, C = latent channels, f = latent frames of a block, H, W = latent height and width.
"""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook

from causal_wan.model.vae import decode_latents, denormalize_latents


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
