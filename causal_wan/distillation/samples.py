"""What the samples of a validation tell that losses do not: whether they are crisp, move, and differ.

Shapes: T = frames, height, width in pixels; N = samples of all processes.
"""

import itertools

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

from causal_wan.evaluation.video_metrics import frame_changes, frame_sharpness
from causal_wan.processes import gather_lists


THUMBNAIL = (16, 28)  # height and width, in pixels
NUM_THUMBNAILS = 5  # frames of a video that are compared


class SampleMeasures:
    """Measures the videos of a validation, process by process, and puts them together."""

    def __init__(self) -> None:
        self._of_samples: list[tuple[int, float, float, torch.Tensor]] = []

    def note(self, number: int, frames: np.ndarray) -> None:
        """Measures a sample.

        Args:
            number: Of its prompt.
            frames: `(T, height, width, 3)`, uint8.
        """
        video = torch.from_numpy(frames).movedim(-1, 1).float() / 255
        chosen = torch.linspace(0, len(video) - 1, NUM_THUMBNAILS).round().long()
        thumbnails = adaptive_avg_pool2d(video[chosen], THUMBNAIL)
        motion = float(frame_changes(video).mean()) if len(video) > 1 else 0.0
        self._of_samples.append((number, float(frame_sharpness(video).mean()), motion, thumbnails))

    def summarize(self) -> dict[str, float]:
        """Means over the samples of all processes; forgets them. Called by every process.

        Returns:
            `sample_sharpness`: variance of the Laplacian; `sample_motion`: mean change of brightness from frame to
            frame, in [0, 1]; `sample_diversity`: root mean square difference of two samples, in [0, 1], the mean over
            all pairs. Noise and prompts are the same at every validation, so that it falls when videos become alike.
        """
        found, self._of_samples = sorted(gather_lists(self._of_samples), key=lambda sample: sample[0]), []
        if not found:
            return {}
        _, sharpness, motion, thumbnails = zip(*found, strict=True)
        distances = [
            float((one - other).square().mean().sqrt()) for one, other in itertools.combinations(thumbnails, 2)
        ]
        means = {"sample_sharpness": np.mean(sharpness), "sample_motion": np.mean(motion)}
        means |= {"sample_diversity": np.mean(distances)} if distances else {}
        return {name: float(mean) for name, mean in means.items()}
