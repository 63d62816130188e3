"""The trajectories in a folder: what each depends on, and what a training run asks of them.

`trajectories/` holds tensors by key; `prompts/`, `files.parquet` and `models.json` are as in
`causal_wan.cache.encoded_clips`.

Shapes: C = latent channels, F = latent frames, H, W = latent height and width, K = latents that are kept of a
trajectory, from noise to data, the clean end included.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from causal_wan.cache.encoded_clips import CachedData, LatentKeeper
from causal_wan.cache.opening import open_cache
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.cache.trajectories import FOLDER, TrajectoryName, find_settings, names_in
from causal_wan.config.settings import CacheConfig, CheckpointConfig
from causal_wan.data.clips import Loadable
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.rows import Row
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.samples import SampleStream, collate
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.data.shared_memory import collate_shared, worker_settings
from causal_wan.runs.data import RunData
from causal_wan.streams.lanes import LaneStates


@dataclass
class TrajectoryData:
    """The trajectories of a run, in the place of the clips of a `RunData`.

    Attributes:
        config: Settings of the clips.
        folder: Of the trajectories.
        cache: In it.
        settings: Of those that are used.
        slots: Where in a trajectory each entry of the step list is.
        names: The trajectories, in an order that does not depend on who made them.
        clips: The held-out clips, and no others.
        cached: The embeddings of the prompts, once they are open.
    """

    config: DataConfig
    folder: Path
    cache: TensorCache
    settings: dict[str, Any]
    slots: list[int]
    names: list[TrajectoryName]
    clips: RunData
    cached: CachedData | None = None
    streams: tuple[()] = ()
    lane_states: LaneStates = field(default_factory=LaneStates)

    @property
    def validation_rows(self) -> list[Row]:
        """Held-out clips."""
        return self.clips.validation_rows

    @property
    def keeper(self) -> LatentKeeper | None:
        """Keeps the latents of held-out clips."""
        return self.clips.keeper

    @property
    def has_clips(self) -> bool:
        """Whether there is anything that may have to be encoded: held-out clips."""
        return self.clips.has_clips

    @property
    def num_samples(self) -> int:
        """Trajectories."""
        return len(self.names)

    @property
    def prompts(self) -> list[str]:
        """All prompts, held-out ones and the empty one, if it is used, included."""
        return [*{name.prompt: None for name in self.names}, *self.clips.prompts]

    def count(self) -> dict[str, int]:
        """How much there is of it, for a model card."""
        num_prompts = len({name.prompt for name in self.names})
        return {
            "trajectories": len(self.names),
            "distinct prompts": num_prompts,
            "held-out clips": len(self.validation_rows),
        }

    def describe(self) -> str:
        """Trajectories, prompts and how they were sampled, in one line."""
        settings, counts = self.settings, self.count()
        blocks = settings["blocks"]
        teacher = "a bidirectional teacher" if len(blocks) == 1 else f"a causal teacher, {len(blocks)} blocks"
        return (
            f"{counts['trajectories']} trajectories of {counts['distinct prompts']} prompts, {teacher} "
            f"({settings['teacher'][:8]}), {settings['num_inference_steps']} steps, guidance "
            f"{settings['guidance_scale']:g}, shift {settings['timestep_shift']:g}"
        )

    def describe_shapes(self) -> list[str]:
        """Nothing: they are of one shape."""
        return []

    def describe_changes(self) -> list[str]:
        """Nothing: trajectories are what the teacher made."""
        return []

    def open_cache(
        self, cache: CacheConfig, checkpoint: CheckpointConfig, prompts: list[str], **encoding: Any
    ) -> None:
        """Opens the embeddings beside the trajectories, and the cache of held-out clips, if there is one.

        Raises:
            ValueError: If they cannot be used.
        """
        held_out = [row.prompts[0] for row in self.validation_rows]
        self.clips.open_cache(cache, checkpoint, held_out, **encoding)
        own = CacheConfig(latents_dir=str(self.folder))
        manifest = FileManifest(self.folder)
        data = self.config.for_validation()
        self.cached, _ = open_cache(own, data, checkpoint, [], manifest, **{**encoding, "encodes": False})

    def dataset(self, *, held_out: bool = False) -> Loadable:
        """Trajectories; or held-out clips."""
        return self.clips.dataset(held_out=True) if held_out else self

    def validation_batch(self, dataset: Loadable, number: int) -> dict[str, Any]:
        """A batch of one held-out clip, the same every time."""
        return self.clips.validation_batch(dataset, number)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """A trajectory: `latents` `(K, C, F, H, W)`, and its prompt.

        Raises:
            ValueError: If it is damaged.
        """
        name = self.names[index]
        latents, _ = self.cache.read(name.key(self.settings))
        return {
            "latents": latents,
            "prompts": (name.prompt,),
            "row_index": index,
            "num_valid_frames": self.config.num_frames,
        }

    def make_loader(
        self,
        dataset: Loadable,
        *,
        seed: int,
        samples_per_step: int,
        batch_size: int,
        num_workers: int,
        num_processes: int,
        pin_memory: bool,
        timeout: float,
        start: int,
        end: int,
        step: int,
    ) -> DataLoader:
        """The batches of the run's samples from `start` to `end`, in order; arguments as in `RunData.make_loader`."""
        one = [0] * len(self)
        order = SampleOrder(
            one, one, seed=seed, samples_per_step=samples_per_step, start_sample=start, start_step=step
        )
        return DataLoader(
            SampleStream(dataset, order, self.config, start=start, end=end),
            batch_size=batch_size,
            collate_fn=partial(collate_shared, collate),
            pin_memory=pin_memory,
            **worker_settings(num_workers, timeout),
        )

    def sample_bytes(self) -> int:
        """Of a trajectory that a loader hands over.

        Raises:
            ValueError: If the first is damaged.
        """
        return self.cache.read(self.names[0].key(self.settings))[0].nbytes


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
    slots = [places.index(level) for level in levels.tolist()]
    return TrajectoryData(config, folder, cache, settings, slots, names, clips)
