"""Random numbers: each purpose in a run has a sequence of its own, so that none depends on what others draw."""

from enum import IntEnum, unique

import numpy as np
import torch


@unique
class RandomPurpose(IntEnum):
    """What random numbers are for. A number, once given, stays: runs of before go on with it."""

    ORDER = 0  # of an epoch's rows
    CLIP = 1  # frames and augmentation of a sample
    NOISE = 2  # levels and noise of a sample
    CAPTION = 3  # prompt of a sample
    BUCKET = 4  # whose turn it is, by step
    SOURCE = 5  # and by sample
    FILE = 6  # order of a stream's files
    WINDOW = 7  # of its rows
    TRAJECTORY = 8  # noise of a teacher's trajectory
    CONTROL = 9  # which controls of a sample are left out
    ROLLOUT = 10  # noise of a student's rollout in training
    CROP = 11  # where a sample's latents are compared as the VAE's decoder sees them
    CRITIC = 12  # level and noise at which a critic is trained
    MATCHING = 13  # and at which it is compared with its teacher
    EXIT = 14  # step at which rollouts end, by step of the run
    REAL_CLIP = 15  # whether the teacher sees the real clip
    ADVERSARIAL = 16  # level and noise at which a discriminator looks at clips
    PERTURBATION = 17  # the little noise on top that is to change nothing


def seed_sequence(seed: int, purpose: RandomPurpose, *numbers: int) -> np.random.SeedSequence:
    """The seeds for one purpose in a run, e.g. (CLIP, sample number) or (ORDER, epoch)."""
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *numbers))


def seeded_generator(seed: int, purpose: RandomPurpose, *numbers: int) -> torch.Generator:
    """A CPU generator for one purpose in a run. Drawing on the CPU makes a run the same on every device."""
    (state,) = seed_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))


def noise_generator(seed: int, sample_number: int) -> torch.Generator:
    """For levels and noise of a sample, in training, or of a video that is sampled."""
    return seeded_generator(seed, RandomPurpose.NOISE, sample_number)
