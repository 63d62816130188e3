import numpy as np
import torch

from causal_wan.seeds import RandomPurpose, noise_generator, seed_sequence, seeded_generator


def test_streams_keep_their_numbers():
    """A run of before would go on with other draws."""
    names = ("ORDER", "CLIP", "NOISE", "CAPTION", "BUCKET", "SOURCE", "FILE", "WINDOW", "TRAJECTORY", "CONTROL")
    names += ("ROLLOUT", "CROP", "CRITIC", "MATCHING", "EXIT", "REAL_CLIP", "ADVERSARIAL", "PERTURBATION")
    numbers = {name: number for number, name in enumerate(names)}
    assert {stream.name: stream.value for stream in RandomPurpose} == numbers


def test_each_purpose_spawns_from_the_seed():
    found, other = seed_sequence(7, RandomPurpose.CLIP, 3, 5), seed_sequence(7, RandomPurpose.CLIP, 3)
    expected = np.random.SeedSequence(7, spawn_key=(1, 3, 5))
    assert found.generate_state(4).tolist() == expected.generate_state(4).tolist()
    assert found.generate_state(4).tolist() != other.generate_state(4).tolist()


def test_generators_are_of_64_bits_of_their_sequence_less_the_sign():
    (state,) = np.random.SeedSequence(7, spawn_key=(2, 3)).generate_state(1, np.uint64)
    for generator in (seeded_generator(7, RandomPurpose.NOISE, 3), noise_generator(7, 3)):
        assert generator.initial_seed() == int(state) // 2 < 2**63
        assert generator.device == torch.device("cpu")
    seeds = {noise_generator(7, number).initial_seed() for number in range(1000)}
    assert len(seeds) == 1000 and max(seeds) > 2**62
