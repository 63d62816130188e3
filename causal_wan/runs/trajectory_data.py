"""The trajectories in a folder: what each depends on, and what a training run asks of them.

`trajectories/` holds tensors by key; `prompts/`, `files.parquet` and `models.json` are as in
`causal_wan.cache.encoded_clips`.

Shapes: C = latent channels, F = latent frames, H, W = latent height and width, K = levels that the student learns
from: its step list, then the clean end if the list has no 0.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causal_wan.cache.encoded_clips import CachedData
from causal_wan.cache.opening import open_cache
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.cache.trajectories import FOLDER, TrajectoryName, find_settings, names_in
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.runs.data import BesideHeldOut, RunData
from causal_wan.runs.training_data import DataDescription
from causal_wan.tables.prompt_schedules import texts_of


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of one kind, as a data set.

    Attributes:
        cache: Has them.
        settings: Of them.
        names: In an order that does not depend on who made them.
        slots: Where in a trajectory the levels are that the student learns from: its step list, and the clean end.
    """

    cache: TensorCache
    settings: dict[str, Any]
    names: list[TrajectoryName]
    slots: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """A trajectory: `latents` `(K, C, F, H, W)`, and its prompt.

        Raises:
            ValueError: If it is damaged.
        """
        latents = self.read(index)
        return {
            "latents": latents,
            "prompts": (self.names[index].prompt,),
            "row_index": index,
            "num_valid_frames": shape.num_frames,
        }

    def read(self, index: int) -> torch.Tensor:
        """The latents of a trajectory, as in `load`."""
        kept, _ = self.cache.read(self.names[index].key(self.settings))
        return kept[self.slots]


@dataclass
class TrajectoryData(BesideHeldOut):
    """The trajectories of a run, and its held-out clips; see `load_trajectory_data`.

    Attributes:
        config: Settings of the clips.
        folder: Of the trajectories.
        trajectories: To train on.
        clips: The held-out clips, and no others.
        cached: The embeddings of the prompts, once they are open.
    """

    config: DataConfig
    folder: Path
    trajectories: Trajectories
    clips: RunData
    cached: CachedData | None = None

    @property
    def num_samples(self) -> int:
        """Trajectories."""
        return len(self.trajectories)

    @property
    def prompts(self) -> list[str]:
        """All prompts, held-out ones and the empty one, if it is used, included."""
        return [*{name.prompt: None for name in self.trajectories.names}, *self.clips.prompts]

    def count(self) -> dict[str, int]:
        """How much there is of it, for a model card."""
        num_prompts = len({name.prompt for name in self.trajectories.names})
        return {
            "trajectories": len(self.trajectories),
            "distinct prompts": num_prompts,
            "held-out clips": len(self.validation_rows),
        }

    def describe(self) -> DataDescription:
        """Trajectories, prompts and how they were sampled."""
        settings, counts = self.trajectories.settings, self.count()
        blocks = settings["blocks"]
        teacher = "a bidirectional teacher" if len(blocks) == 1 else f"a causal teacher, {len(blocks)} blocks"
        return DataDescription(
            summary=f"{counts['trajectories']} trajectories of {counts['distinct prompts']} prompts, {teacher} "
            f"({settings['teacher'][:8]}), {settings['num_inference_steps']} steps, guidance "
            f"{settings['guidance_scale']:g}, shift {settings['timestep_shift']:g}"
        )

    def open_cache(self, cache: CacheConfig, model: BaseModelConfig, prompts: Iterable[str], **encoding: Any) -> None:
        """Opens the embeddings beside the trajectories, and the cache of held-out clips, if there is one.

        Raises:
            ValueError: If they cannot be used.
        """
        held_out = texts_of(row.prompts[0] for row in self.validation_rows)
        self.clips.open_cache(cache, model, held_out, **encoding)
        own = CacheConfig(latents_dir=str(self.folder))
        manifest = FileManifest(self.folder)
        data = self.config.for_validation()
        self.cached, _ = open_cache(own, data, model, [], manifest, **{**encoding, "encodes": False})

    def dataset(self) -> Trajectories:
        """The trajectories."""
        return self.trajectories

    def sample_bytes(self) -> int:
        """Of a trajectory that a loader hands over.

        Raises:
            ValueError: If the first is damaged.
        """
        return self.trajectories.read(0).nbytes


def load_trajectory_data(
    trajectories_dir: str, clips: RunData, levels: torch.Tensor, block_lengths: list[int]
) -> TrajectoryData:
    """The trajectories of a folder that a run can learn from.

    Args:
        trajectories_dir: Filled by precompute_trajectories.py.
        clips: The held-out clips, and no others.
        levels: Timesteps of the step list.
        block_lengths: Latent frames of each of the student's blocks.

    Raises:
        ValueError: If there are none that fit, or several kinds of them.
    """
    folder, config = Path(trajectories_dir), clips.config
    if len(config.all_shapes()) > 1:
        raise ValueError("trajectories have one size and length; leave out buckets and schedules.")
    cache = TensorCache(folder / FOLDER)
    settings = find_settings(cache, config.shape, levels, block_lengths)
    names = sorted(names_in(cache, settings))
    places = [*settings["levels"], 0.0]
    wanted = levels.tolist() + ([] if levels[-1] == 0 else [0.0])
    slots = [places.index(level) for level in wanted]
    return TrajectoryData(config, folder, Trajectories(cache, settings, names, slots), clips)
