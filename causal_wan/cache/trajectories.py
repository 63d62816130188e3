"""Trajectories of a teacher in a folder: what each depends on, and which of them a student can learn from."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from causal_wan.cache.tensor_cache import TensorCache, describe_differences, settings_key
from causal_wan.data.settings import ClipShape
from causal_wan.seeds import RandomPurpose, seeded_generator


FOLDER = "trajectories"


@dataclass(frozen=True, order=True)
class TrajectoryName:
    """Which of the trajectories of a teacher: the prompt, the seed, and the number among those of the prompt."""

    prompt: str
    seed: int
    number: int

    def key(self, settings: dict[str, Any]) -> bytes:
        """Under which it is found."""
        return settings_key(settings, self.prompt, str(self.seed), str(self.number))

    def generator(self) -> torch.Generator:
        """Source of its noise: whatever other prompts there are, and however the work is split."""
        of_prompt = int.from_bytes(hashlib.blake2b(self.prompt.encode(), digest_size=8).digest())
        words = (self.number, of_prompt >> 32, of_prompt & 0xFFFFFFFF)
        return seeded_generator(self.seed, RandomPurpose.TRAJECTORY, *words)


def student_settings(shape: ClipShape, levels: torch.Tensor) -> dict[str, Any]:
    """Of a trajectory's settings, those that the student shares.

    Args:
        shape: Of the clips.
        levels: Timesteps of the step list, from noise to data; a trailing 0 is the clean end, which is always there.
    """
    return {**shape._asdict(), "levels": [level for level in levels.tolist() if level > 0]}


def find_settings(
    cache: TensorCache, shape: ClipShape, levels: torch.Tensor, block_lengths: list[int]
) -> dict[str, Any]:
    """The settings of the trajectories in a cache that a student can learn from.

    Args:
        cache: Of trajectories.
        shape: Of the clips.
        levels: Timesteps of the step list.
        block_lengths: Latent frames of each of the student's blocks.

    Raises:
        ValueError: If there are none, or those of several teachers or ways to sample; says what differs.
    """
    wanted = student_settings(shape, levels)

    def fits(settings: dict[str, Any]) -> bool:
        same_shape = all(settings[name] == size for name, size in shape._asdict().items())
        return same_shape and set(wanted["levels"]) <= set(settings["levels"])

    found = [settings for settings in cache.settings if fits(settings)]
    if not found:
        known = [{name: settings[name] for name in wanted} for settings in cache.settings]
        reason = describe_differences(wanted, known) or "there are none"
        raise ValueError(
            f"trajectories_dir must hold trajectories with the size and the levels of the run, but {cache.folder} has "
            f"none that fit ({reason}). Run precompute_trajectories.py with the same settings, or train with those of "
            "the trajectories."
        )
    if len(found) > 1:
        values = {name: sorted({str(settings.get(name)) for settings in found}) for name in found[0]}
        differing = "; ".join(f"{name} is {' and '.join(each)}" for name, each in values.items() if len(each) > 1)
        raise ValueError(
            f"trajectories_dir must hold one kind of trajectories that fit the run, but {cache.folder} has "
            f"{len(found)}: {differing}. Keep them in folders of their own."
        )
    (settings,) = found
    if len(settings["blocks"]) > 1 and settings["blocks"] != block_lengths:
        raise ValueError(
            f"a causal teacher's blocks must be the student's, but the trajectories of {cache.folder} were sampled in "
            f"blocks of {settings['blocks']} latent frames and the student has {block_lengths}; set "
            "--num_frame_per_block, --independent_first_frame and --generator_task as they were for the teacher."
        )
    return settings


def names_in(cache: TensorCache, settings: dict[str, Any]) -> Iterator[TrajectoryName]:
    """The trajectories of a cache that have these settings."""
    for own, facts in cache.facts():
        if own == settings:
            yield TrajectoryName(facts["prompt"], facts["seed"], facts["number"])
