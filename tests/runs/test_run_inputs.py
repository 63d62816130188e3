"""What runs make of the batches of their data loaders, and what they ask of their data."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from causal_wan.cache.tensor_cache import CacheWriter, TensorCache
from causal_wan.cache.trajectories import FOLDER, TrajectoryName
from causal_wan.data.samples import collate
from causal_wan.data.settings import DataConfig
from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.methods.noising import draw_noisy_batch
from causal_wan.methods.settings import RegressionConfig
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.runs.data import RunData
from causal_wan.runs.inputs import Inputs
from causal_wan.runs.metrics import sum_by_level, summarize
from causal_wan.runs.training_data import LoaderSettings, TrainingData, make_loader
from causal_wan.runs.trajectory_data import TrajectoryData, load_trajectory_data


CONFIG = SimpleNamespace(
    training=SimpleNamespace(seed=3),
    data=SimpleNamespace(geometry=WAN, control_column=()),
    model=SimpleNamespace(max_sequence_length=5),
    method=RegressionConfig(num_frame_per_block=1),
    compile=False,
)


class Doubled:
    """Stands for a VAE whose latents are the videos, and for what keeps them."""

    def encode(self, videos):
        self.encoded = videos
        return videos.float()

    def keep(self, key, latents, shape, num_valid_frames):
        self.kept = (key, tuple(shape), num_valid_frames)
        return latents


def inputs(patch_size=(1, 2, 2), keeper=None):
    return Inputs(
        config=CONFIG,
        prompt_embeds={"a": torch.ones(2, 3), "b": torch.ones(4, 3)},
        vae=None,
        device=torch.device("cpu"),
        keeper=keeper,
        geometry=LatentGeometry(patch_size=patch_size),
    )


def sample(number, **clip):
    return {
        **clip,
        "prompt": "ab"[number],
        "row_index": 0,
        "sample_number": number,
        "num_valid_frames": 5,
        "errors": [],
    }


def clip_batch(*clips):
    return collate([sample(number, **clip) for number, clip in enumerate(clips)])


def prepare(patch_size=(1, 2, 2), errors=()):
    batch = clip_batch({"latents": torch.randn(4, 2, 6, 8)}, {"latents": torch.randn(4, 2, 6, 8)})
    batch.errors.extend(errors)
    made, numbers = inputs(patch_size), batch.sample_numbers
    latents, counts = made.find_latents(batch), made.count_valid_frames(batch)
    noisy = draw_noisy_batch(latents, CONFIG.method, [1, 1], seed=3, sample_numbers=numbers, num_valid_frames=counts)
    return made.with_conditions(noisy, batch)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_clips_are_encoded_unless_the_batch_says_that_they_are_latents_whatever_their_type(monkeypatch):
    keeper = Doubled()
    monkeypatch.setattr(Inputs, "encode", lambda self, videos: keeper.encode(videos))
    clips = torch.arange(2 * 3 * 1 * 2 * 2).reshape(2, 3, 1, 2, 2)
    batch = clip_batch({"latents": clips[0].to(torch.uint8)}, {"video": clips[1].half(), "cache_key": b"key"})
    latents = inputs(keeper=keeper).find_latents(batch)
    assert latents.equal(clips.float())
    assert keeper.encoded.equal(clips[1:].half())
    assert keeper.kept == (b"key", (1, 2, 2), 5)


@pytest.mark.parametrize(("patch_size", "num_tokens"), [((1, 2, 2), 2 * 2 * 3 * 4), ((1, 1, 1), 2 * 2 * 6 * 8)])
def test_tokens_are_patches_of_the_transformer(patch_size, num_tokens):
    assert prepare(patch_size).num_tokens == num_tokens


def test_a_batch_holds_what_the_forward_and_the_loop_take():
    batch = prepare(errors=["a is broken"])
    assert batch.num_bad_samples == 1
    assert int(batch.num_items) == int(batch.noisy.mask.sum())
    embeds = batch.conditions.prompt_embeds
    assert embeds.shape == (2, 5, 3)
    assert embeds.sum(dim=(1, 2)).tolist() == [6, 12]  # the prompts in their order, padded with zeros
    told = {**batch.conditions.arguments(), **batch.noisy.context, "return_dict": False}
    signature = inspect.signature(CausalWanTransformer3DModel.forward)
    bound = signature.bind(None, batch.noisy.noisy_latents, batch.noisy.timesteps, **told)
    assert bound.arguments["encoder_hidden_states"] is embeds


def test_sums_of_batches_become_metrics_by_level():
    batch = prepare(errors=["a is broken", "b is broken"])
    sums = sum_by_level(batch, batch.noisy.latents + 2, CONFIG.method)
    metrics = summarize(CONFIG, sums)
    assert metrics["num_bad_samples"] == 2
    errors = [value for name, value in metrics.items() if name.startswith("loss_at_time_")]
    drawn = batch.noisy.timesteps[batch.noisy.mask].unique()
    assert errors == pytest.approx([4.0] * len(drawn))
    assert "compile_seconds" not in metrics


# --- data ------------------------------------------------------------------------------------------------------------

ASKED = [name for name in vars(TrainingData) if not name.startswith("_")]


@pytest.mark.parametrize("kind", [RunData, TrajectoryData])
@pytest.mark.parametrize("name", ASKED)
def test_each_kind_of_data_answers_all_that_a_run_asks(kind, name):
    asked = vars(TrainingData)[name]
    if isinstance(asked, property):
        assert name in dir(kind) or name in kind.__annotations__
    else:
        parameters = [list(inspect.signature(each).parameters) for each in (asked, getattr(kind, name))]
        assert parameters[0] == parameters[1]


SETTINGS = LoaderSettings(
    seed=0, samples_per_step=2, batch_size=2, num_workers=0, num_processes=1, pin_memory=False, timeout=60.0
)


@pytest.mark.parametrize("levels", [[1000.0, 500.0, 0.0], [1000.0, 500.0]])
def test_trajectories_are_loaded_at_the_levels_of_the_step_list_and_at_their_end(tmp_path, levels):
    kept = {"num_frames": 9, "height": 16, "width": 16, "levels": [1000.0, 750.0, 500.0], "blocks": [3]}
    names = [TrajectoryName(prompt, 0, 0) for prompt in "ab"]
    with CacheWriter(tmp_path / FOLDER) as writer:
        for number, name in enumerate(names):
            latents = 10.0 * number + torch.arange(4.0).reshape(4, 1, 1, 1, 1)
            facts = {"prompt": name.prompt, "seed": name.seed, "number": name.number}
            writer.add(name.key(kept), latents, kept, **facts)
    config = DataConfig(metadata_path="", num_frames=9, height=16, width=16)
    clips = RunData(config, rows=[], validation_rows=[], streams=[], manifest=None)
    data = load_trajectory_data(str(tmp_path), clips, torch.tensor(levels), [3])
    batches = list(make_loader(data, data.dataset(), SETTINGS, start=0, end=6, step=0))
    assert [batch.sample_numbers for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert batches[0].is_latents == [True, True]
    for batch in batches:
        assert sorted(batch.prompts) == ["a", "b"]
        for prompt, clip in zip(batch.prompts, batch.clips, strict=True):
            assert clip.flatten().tolist() == [10.0 * (prompt == "b") + place for place in (0, 2, 3)]
    assert data.sample_bytes() == math.prod(batches[0].clips[0].shape) * 4
    assert len(TensorCache(tmp_path / FOLDER)) == data.num_samples == 2
