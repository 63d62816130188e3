"""Metrics by networks of others: LPIPS (likeness as people see it), and how well a video keeps to its prompt.

Their weights are not part of this repository. Without those of LPIPS it is left out, and `load_lpips` says why.

Shapes: T = frames, height, width in pixels; videos are in [0, 1], `(T, 3, height, width)`.
"""

from pathlib import Path

import torch
import torchvision
from huggingface_hub.constants import HF_HUB_OFFLINE
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from transformers import AutoModel, AutoProcessor

from causal_wan.config.choices import LpipsNet
from causal_wan.tables.prompt_schedules import FramePrompts


BACKBONES = {
    "alex": torchvision.models.AlexNet_Weights.DEFAULT,
    "vgg": torchvision.models.VGG16_Weights.DEFAULT,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.DEFAULT,
}
FRAMES_AT_ONCE = 8


class Lpips:
    """Learned perceptual distance of each frame, 0 for equal ones, `(T,)`.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv 1801.03924.
    """

    def __init__(self, net: LpipsNet, device: str) -> None:
        self.device = device
        self.metric = LearnedPerceptualImagePatchSimilarity(net, reduction="none", normalize=True).to(device)

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for frames, wanted in zip(video.split(FRAMES_AT_ONCE), target.split(FRAMES_AT_ONCE), strict=True):
            self.metric.update(frames.to(self.device), wanted.to(self.device))
        distances = self.metric.compute().cpu().reshape(len(video))  # of one frame it is a scalar
        self.metric.reset()
        return distances


def backbone_path(net: LpipsNet) -> Path:
    """Where torch.hub keeps the weights of a backbone."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].url.rpartition("/")[2]


def load_lpips(net: LpipsNet, device: str, *, height: int, width: int) -> tuple[Lpips | None, str]:
    """LPIPS, if the weights of its backbone are there or can be downloaded; else None, and why.

    Nothing is downloaded where HF_HUB_OFFLINE is set.

    Args:
        net: Backbone.
        device: To compute on.
        height, width: Of the frames to compare, which may be too small for a backbone.
    """
    path, url = backbone_path(net), BACKBONES[net].url
    remedy = f"put {url} to {path}"
    if not path.is_file() and HF_HUB_OFFLINE:
        return None, f"LPIPS is left out, as its {net} backbone is not here and HF_HUB_OFFLINE is set; {remedy}."
    try:  # read as tensors alone, and a download is checked against the hash in its name
        BACKBONES[net].get_state_dict(progress=True, check_hash=True, weights_only=True)
        lpips = Lpips(net, device)
    except Exception as error:  # of network, disk, unpickling or shapes
        return None, f"LPIPS is left out, as its {net} backbone cannot be had ({_first_line(error)}); {remedy}."
    try:
        lpips(torch.zeros(1, 3, height, width), torch.zeros(1, 3, height, width))
    except RuntimeError as error:
        return None, f"LPIPS is left out, as frames of {height} x {width} are too small ({_first_line(error)})."
    return lpips, ""


class ClipScore:
    """How well a video keeps to its prompt: 100 times the cosine of their embeddings, averaged over frames.

    Compare with the score of the clip itself: its scale depends on the model, and prompts longer than the model reads
    are cut. torchmetrics' CLIPScore is the same for single images, but takes neither folders nor SigLIP, and clips the
    mean at 0.

    Args:
        model: Folder or hub id of a CLIP-like model of transformers (CLIP, SigLIP), in safetensors.
        device: To compute on.
        num_frames: Evenly spaced frames that are looked at, or all if there are fewer.

    Raises:
        ValueError: If the model cannot be loaded, or is not of this kind.

    Source: Hessel et al., CLIPScore, arXiv 2104.08718.
    """

    def __init__(self, model: str, device: str, num_frames: int = 8) -> None:
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, use_safetensors=True).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"clip_model must be a folder or hub id of a CLIP or SigLIP model, but {model} does not load: "
                f"{_first_line(error)}"
            ) from None
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise ValueError(
                f"clip_model must embed texts and images, as CLIP and SigLIP do, but {model} is a "
                f"{type(self.model).__name__}; use openai/clip-vit-base-patch32 or the like."
            )
        self.num_frames = num_frames

    @torch.no_grad()
    def __call__(self, video: torch.Tensor, prompt: str | FramePrompts) -> float:
        indices = torch.linspace(0, len(video) - 1, min(self.num_frames, len(video))).round().long()
        frames = (video[indices].clamp(0, 1) * 255).round().to(torch.uint8)
        images = self.processor(images=list(frames), return_tensors="pt").to(self.model.device)
        text = self.processor(
            text=[prompt] if isinstance(prompt, str) else [prompt[index] for index in indices.tolist()],
            padding="max_length",  # as SigLIP was trained; CLIP does not see it
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        image_embeds = _embeds(self.model.get_image_features(**images))
        text_embeds = _embeds(self.model.get_text_features(**text))
        return 100 * float(torch.cosine_similarity(image_embeds, text_embeds).mean())


def _embeds(features: torch.Tensor | object) -> torch.Tensor:
    """Older releases of transformers give the tensor itself."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
