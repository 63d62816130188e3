"""Videos -> latents and back, as WAN does.

Shapes: B = batch, T = video frames, height, width in pixels, C = latent channels, F = latent frames, H, W = latent
height and width.
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook

from causal_wan.devices import to_device
from causal_wan.geometry import LatentGeometry
from causal_wan.model.context_parallel import check_divides_by_group
from causal_wan.model.transformer import CausalWanTransformer3DModel


MAX_SMALL_FRAME = 480 * 832 // 2  # pixels: 8 such frames take no more memory than 4 of WAN's


def _latents_mean_std(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (
        to_device(torch.tensor(values, dtype=torch.float32), like.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@torch.no_grad()
def encode_videos(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    """Encodes videos to normalised latents: (posterior mode - latents_mean) / latents_std.

    Args:
        vae: Its dtype and device are used.
        videos: In [-1, 1], `(B, 3, T, height, width)`, T = 4k + 1.

    Returns:
        Latents `(B, C, F, H, W)`, float32, F = (T - 1) / 4 + 1. Inverse of `decode_latents`, up to the VAE's loss.
    """
    return normalize_latents(vae, _posterior_mode(vae, videos))


@apply_forward_hook  # weights that `enable_model_cpu_offload` keeps elsewhere come, as they do for `vae.encode`
def _posterior_mode(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    """What `vae.encode` gives, up to rounding; small frames go through it 8 at a time, not 4: faster on a CPU."""
    videos = videos.to(vae.device, vae.dtype)
    if vae.use_slicing or vae.use_tiling or videos[0, 0, 0].numel() > MAX_SMALL_FRAME:
        return vae.encode(videos).latent_dist.mode()
    return encode_in_passes(vae, videos, 8)


def encode_in_passes(vae: AutoencoderKLWan, videos: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The posterior's mode, as `vae.encode` finds it with 4 frames a pass: not normalised, neither sliced nor tiled.

    Args:
        vae: Its convolutions remember the frames of the passes before.
        videos: In [-1, 1], `(B, 3, T, height, width)`, T = 4k + 1, where the VAE is and in its dtype.
        num_frames: Of a pass after the first frame's; a multiple of 4.
    """
    if vae.config.patch_size is not None:
        videos = patchify(videos, patch_size=vae.config.patch_size)
    vae.clear_cache()
    hidden = [
        vae.encoder(frames, feat_cache=vae._enc_feat_map, feat_idx=[0])
        for frames in (videos[:, :, :1], *videos[:, :, 1:].split(num_frames, dim=2))
        if frames.shape[2]
    ]
    vae.clear_cache()
    return DiagonalGaussianDistribution(vae.quant_conv(torch.cat(hidden, dim=2))).mode()


@torch.no_grad()
@apply_forward_hook
def decode_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decodes normalised latents `(B, C, F, H, W)` to videos in [-1, 1], `(B, 3, T, height, width)`."""
    return vae.decode(denormalize_latents(vae, latents).to(vae.device, vae.dtype), return_dict=False)[0]


def normalize_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents `(B, C, F, H, W)` as the VAE's encoder gives them -> normalised, float32."""
    latents = latents.float()
    mean, std = _latents_mean_std(vae, latents)
    return (latents - mean) / std


def denormalize_latents(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents `(B, C, F, H, W)` -> as the VAE's decoder takes them, float32."""
    mean, std = _latents_mean_std(vae, latents)
    return latents.float() * std + mean


def check_video_size(
    num_frames: int,
    height: int,
    width: int,
    *,
    vae: AutoencoderKLWan,
    transformer: CausalWanTransformer3DModel,
    in_blocks: bool = True,
) -> None:
    """Checks that a video of this size fits the VAE, the patches, the blocks and the processes that share a clip.

    Args:
        num_frames: Of the video.
        height: Pixels.
        width: Pixels.
        vae: Of the checkpoint.
        transformer: Of the checkpoint.
        in_blocks: Whether the latent frames must divide into blocks.

    Raises:
        ValueError: If it does not; names the nearest sizes that do.
    """
    geometry = LatentGeometry.of(vae.config, transformer.config)
    geometry.check_num_frames(num_frames)
    geometry.check_size(height, width, of=" for this checkpoint")
    if in_blocks:
        transformer.block_lengths(geometry.num_latent_frames(num_frames))
    frame_tokens = geometry.num_tokens(geometry.latent_shape(1, height, width))
    check_divides_by_group("the tokens of a frame", frame_tokens, transformer.context_mesh)
