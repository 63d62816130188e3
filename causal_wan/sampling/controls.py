"""Control videos of a pipeline's call -> latents, frame by frame as the video is sampled.

Shapes: B = batch, C' = channels of all controls, H, W = latent height and width, t = video frames of a latent frame.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from diffusers import WanPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from causal_wan.model.control import PATCH_EMBEDDING_NAME, load_patch_embedding
from causal_wan.model.streaming_vae import StreamingEncoder
from causal_wan.model.transformer import CausalWanTransformer3DModel


def load_beside(lora: Any, transformer: CausalWanTransformer3DModel, revision: str | None) -> None:
    """Gives a transformer the patch embedding that lies beside a LoRA, if there is one.

    Args:
        lora: Folder, hub id, file or weights.
        transformer: Gets the controls of the patch embedding.
        revision: Of a hub repository.

    Raises:
        ValueError: If it takes other controls.
    """
    if path := _find_beside(lora, revision):
        load_patch_embedding(transformer, path)


def _find_beside(lora: Any, revision: str | None) -> Path | None:
    if not isinstance(lora, str | Path):
        return None
    folder = Path(lora)
    if folder.exists():
        path = (folder if folder.is_dir() else folder.parent) / PATCH_EMBEDDING_NAME
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(lora), PATCH_EMBEDDING_NAME, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return None


def prepare_controls(
    pipeline: WanPipeline,
    control: Mapping[str, Any] | None,
    shape: tuple[int, int, int],
    num_frames: int | None,
) -> Iterator[torch.Tensor] | None:
    """Latents of the controls `(B, C', 1, H, W)`, of one latent frame after the other, each encoded when asked for.

    Args:
        pipeline: Its VAE encodes them; its transformer says which there are. Those that are not given are zeros.
        control: Videos by the names of the controls; see `CausalWanPipeline.__call__`.
        shape: (B, height, width).
        num_frames: Of the video; None is without end, or until a control ends.

    Raises:
        ValueError: If the student has no such control, or a video is too short, or there is neither one nor B.
    """
    if control is None:
        return None
    names = tuple(pipeline.transformer.config.control_names or ())
    if not isinstance(control, Mapping):
        raise ValueError(
            "control must name the control of each video, such as {'"
            f"{next(iter(names), 'outline')}': frames}}, got {type(control).__name__}."
        )
    if unknown := [name for name in control if name not in names]:
        raise ValueError(
            f"control must have names of controls that the student was trained with, {', '.join(names) or 'none'}, "
            f"got {', '.join(map(str, unknown))}."
        )
    sources = {name: _frames_of(pipeline, video, name, shape, num_frames) for name, video in control.items()}
    return _encode_controls(pipeline, sources, names, shape)


def _frames_of(
    pipeline: WanPipeline, video: Any, name: str, shape: tuple[int, int, int], num_frames: int | None
) -> Iterator[torch.Tensor]:
    """The frames of a control in [-1, 1], `(1 or B, 3, 1, height, width)` each."""
    batch_size, height, width = shape
    if isinstance(video, Iterator):
        return (as_pixels(pipeline, [frame], height, width) for frame in video)
    try:
        pixels = as_pixels(pipeline, video, height, width)
    except (ValueError, IndexError, TypeError, AttributeError) as error:  # of diffusers
        raise ValueError(
            f"control {name} must be frames in a form that diffusers' VideoProcessor takes, such as a list of PIL "
            f"pictures, got {type(video).__name__} ({error})."
        ) from error
    if len(pixels) not in (1, batch_size):
        raise ValueError(f"control {name} must be one video, or one for each of {batch_size}, got {len(pixels)}.")
    if num_frames is not None and pixels.shape[2] < num_frames:
        raise ValueError(f"control {name} must have the {num_frames} frames of the video, got {pixels.shape[2]}.")
    return iter(pixels[:, :, :num_frames].split(1, dim=2))


def as_pixels(pipeline: WanPipeline, video: Any, height: int, width: int) -> torch.Tensor:
    """Videos in [-1, 1], `(B, 3, T, height, width)`; frames that are PIL images are scaled and cut as clips are.

    Args:
        pipeline: Its video processor takes any form of frames.
        video: One video or a list of B.
        height, width: Pixels.
    """
    is_list = isinstance(video, list | tuple)
    if is_list and video and all(isinstance(frame, PIL.Image.Image) for frame in video):
        video = [fit_picture(frame, height, width) for frame in video]
    elif is_list and video and all(isinstance(frames, list | tuple) for frames in video):
        return torch.cat([as_pixels(pipeline, frames, height, width) for frames in video])
    return pipeline.video_processor.preprocess_video(video, height=height, width=width)


def fit_picture(picture: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """A picture scaled and cut to a size in pixels, and laid on white where it can be seen through, as clips are."""
    if picture.has_transparency_data:
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
    return PIL.ImageOps.fit(picture.convert("RGB"), (width, height))


def _encode_controls(
    pipeline: WanPipeline, sources: Mapping[str, Iterator[torch.Tensor]], names: tuple[str, ...], shape: tuple
) -> Iterator[torch.Tensor]:
    batch_size, height, width = shape
    channels, _, *size = pipeline.geometry.latent_shape(1, height, width)
    device = pipeline._execution_device
    none = torch.zeros(batch_size, channels, 1, *size, device=device)
    encoders = {name: StreamingEncoder(pipeline.vae) for name in sources}
    while True:
        parts = []
        for name in names:
            if name not in sources:
                parts.append(none)
                continue
            frames = list(itertools.islice(sources[name], encoders[name].num_wanted))
            if len(frames) < encoders[name].num_wanted:
                return
            latents = encoders[name].encode(torch.cat(frames, dim=2)).to(device)
            parts.append(latents.expand(batch_size, -1, -1, -1, -1))
        yield torch.cat(parts, dim=1)
