"""Names what is drawn: one of the kinds of `make_dataset.py`, or nothing that it knows.

    from judge import recognise
    recognise(np.stack([video[-1] for video in videos]))  # ["bird", None, "rocket", ...]

A small convolutional network. `build_judge.py` trains it on drawings of any colour, size, place and line, clean and as
the VAE of `tiny-wan` leaves them, and on what is no drawing: white paper, unfinished drawings, means, overlays, blots,
scribbles. README.md says how often it is right.

Shapes: N frames of height x width pixels, C classes.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import interpolate


WEIGHTS = Path(__file__).parent / "judge.safetensors"
SIZE = (64, 112)  # height and width that it was trained on
UNFINISHED, NO_DRAWING = "unfinished", "no drawing"
"""Classes beside the kinds."""
CHUNK = 256  # frames at a time


class Judge(nn.Module):
    """Logits of the classes from the darkness of a picture.

    Args:
        classes: Names of the kinds, then UNFINISHED and NO_DRAWING.
        threshold: Probability from which on a kind counts as recognised.
    """

    def __init__(self, classes: tuple[str, ...], threshold: float = 1.0) -> None:
        super().__init__()
        self.classes, self.threshold = classes, threshold
        self.layers = nn.Sequential(
            _layer(1, 16, stride=2),
            _layer(16, 32, stride=2),
            _layer(32, 32),
            _layer(32, 48, stride=2),
            _layer(48, 48),
            _layer(48, 48),
            _layer(48, 64, stride=2),
            _layer(64, 64),
        )
        self.head = nn.Linear(2 * 64, len(classes))

    def forward(self, darkness: torch.Tensor) -> torch.Tensor:  # (N, 1, 64, 112) in [0, 1] -> (N, C)
        features = self.layers(darkness)  # (N, 64, 4, 7)
        return self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))

    @torch.no_grad()
    def probabilities(
        self, frames: np.ndarray | torch.Tensor
    ) -> torch.Tensor:  # (N, height, width, 3) uint8 -> (N, C)
        """Of the classes, for each frame."""
        some = [self(darkness_of(chunk)).softmax(dim=1) for chunk in torch.as_tensor(frames).split(CHUNK)]
        return torch.cat(some)

    def recognise(self, frames: np.ndarray | torch.Tensor) -> list[str | None]:
        """The kind that each frame shows, None where none is likely enough; see the module's function."""
        if not len(frames):
            return []
        best, index = self.probabilities(frames)[:, :-2].max(dim=1)
        pairs = zip(best.tolist(), index.tolist(), strict=True)
        return [self.classes[number] if probability >= self.threshold else None for probability, number in pairs]


def _layer(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def darkness_of(frames: torch.Tensor) -> torch.Tensor:  # (N, height, width, 3) uint8 -> (N, 1, 64, 112) in [0, 1]
    """How far the darkest channel of each pixel is below white: ink of any colour alike."""
    darkness = 1 - frames.amin(dim=-1)[:, None].float() / 255
    if darkness.shape[2:] != SIZE:
        darkness = interpolate(darkness, SIZE, mode="bilinear", antialias=True)
    return darkness


@cache
def load_judge(path: Path = WEIGHTS) -> Judge:
    """The judge that is stored, in float32."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    judge = Judge(tuple(json.loads(about["classes"])), float(about["threshold"])).eval()
    judge.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    )
    return judge


def recognise(frames: np.ndarray | torch.Tensor) -> list[str | None]:
    """The kind of drawing that each frame shows, or None: no drawing, an unfinished one, or one that is not clear.

    Args:
        frames: uint8 `(N, height, width, 3)`, RGB, such as the last frames of N clips. Trained on 64 x 112 pixels;
            others are scaled to that.
    """
    return load_judge().recognise(frames)
