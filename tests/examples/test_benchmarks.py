"""The benchmarks on the smallest sizes: what they print, not how long it takes."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench
    import generation
    import layers
    import steps

    yield {"bench": bench, "generation": generation, "layers": layers, "steps": steps}
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def tiny(benchmarks):
    """As little as there can be of a model and a clip, once around."""
    bench = benchmarks["bench"]
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's may have another precision
    size = bench.Size(
        architecture=bench.COMMON
        | {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 32, "num_layers": 2, "text_dim": 8},
        latent_shape=(16, 9, 4, 4),
        vae={"base_dim": 4, "num_res_blocks": 1},
    )
    return bench.Bench(size, torch.device("cpu"), num_rounds=1)


@pytest.mark.parametrize(
    ("module", "measure", "rows"),
    [
        ("layers", "measure_attention", ("full attention | 1.00", "one dense call a block", "a dense mask")),
        ("layers", "measure_modulation", ("stock, a timestep a token | 1.00", "ours, a timestep a frame")),
        ("layers", "measure_checkpointing", ("all kept | 1.00", "--keep_attention_outputs")),
        ("steps", "measure_step", ("bare loop", "`training.train`", "MFU of our loop")),
        ("steps", "measure_scaling", ("21 latent frames | 1.000 | 1.000", "42 latent frames", "2 clips")),
        ("steps", "measure_context", ("--context noisy | 1.00 | 1.00", "--context clean")),
        ("generation", "measure_vae", ("stock diffusers | 1.00 | 0e+00", "16 frames a pass")),
        ("generation", "measure_sampling", ("with the cache | 1.00", "over the past again", "frames a second")),
    ],
)
def test_each_table_has_its_rows(benchmarks, tiny, monkeypatch, module, measure, rows):
    if measure == "measure_scaling":  # its first row is the size's own
        tiny.size = tiny.size.__class__(**{**vars(tiny.size), "latent_shape": (16, 21, 4, 4)})
    lines = "\n".join(getattr(benchmarks[module], measure)(tiny))
    for row in rows:
        assert row in lines, lines


def test_more_frames_a_pass_encode_what_stock_diffusers_does(benchmarks, tiny):
    vae, videos = tiny.make_vae(), torch.rand(1, 3, 17, 16, 16) * 2 - 1
    expected = vae.encode(videos).latent_dist.mode()
    for num_frames in (4, 8, 16):
        encoded = benchmarks["generation"].encode_in_passes(vae, videos, num_frames)
        torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)


def test_ratios_are_those_within_a_round_and_missed_goals_are_kept(tiny, monkeypatch):
    times = iter([9.0, 9.0, 1.0, 2.0])  # a round that warms up, and one that counts
    monkeypatch.setattr(tiny, "seconds", lambda run: next(times))
    assert tiny.compare({"a": None, "b": None}) == {"a": (1.0, 1.0), "b": (2.0, 2.0)}
    assert "met" in tiny.goal("ratio", 0.5, at_most=0.75)
    assert not tiny.missed
    assert "**missed**" in tiny.goal("ratio", 2.5, at_least=3)
    assert tiny.missed == ["ratio: 2.5"]
