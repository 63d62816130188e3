"""The rollout's steps, passes and noise, against closed forms and separate passes."""

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.blocks import CausalConfig
from causal_wan.flow import add_noise
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.noise import count_draws, draw_frame_noise, draw_noise
from causal_wan.sampling.rollout import Rollout


B, C, H, W = 2, 4, 4, 6
TIMESTEPS = torch.tensor([1000.0, 800.0, 300.0])
BLOCKS_OF_2 = CausalConfig(num_frame_per_block=2, local_attn_size=4)
CACHE = object()  # the known field keeps nothing in it


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flow_of(latents, timestep, embeds):
    """The known field's velocity: another one at each timestep, of a clip or of each frame, and for each prompt."""
    by_frame = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1)
    return 0.5 * latents + (by_frame / 1000 + embeds.mean(dim=(1, 2))[:, None])[:, None, :, None, None]


@dataclass
class KnownField:
    """Stands for a transformer, and notes the passes and the caches that are asked of it."""

    passes: list = field(default_factory=list)
    caches: list = field(default_factory=list)
    causal_config: CausalConfig = BLOCKS_OF_2

    def make_cache(self, *shape, device, dtype):
        self.caches.append((*shape, device.type, dtype))
        return CACHE

    def __call__(self, latents, timestep, encoder_hidden_states, **others):
        self.passes.append(SimpleNamespace(latents=latents, timestep=timestep, embeds=encoder_hidden_states, **others))
        return (flow_of(latents, timestep, encoder_hidden_states),)


def prompt_of(*shape, seed=0):
    return Conditions(prompt_embeds=random(*shape, seed=seed))


def make_rollout(**settings):
    return Rollout(KnownField(), TIMESTEPS, prompt_of(B, 3, 5, seed=1), **settings)


def frames_of(noise):
    return noise.split(1, dim=3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@torch.no_grad()
def test_guidance_goes_from_the_negative_prompt_through_the_prompt_by_its_scale(scale):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER).eval()
    prompt, negative, latents = prompt_of(3, 7, 16, seed=1), prompt_of(3, 7, 16, seed=2), random(3, C, 2, H, W)
    timestep = TIMESTEPS[1]
    of_prompt, of_negative = (
        transformer(latents, timestep.expand(3), each.prompt_embeds).sample for each in (prompt, negative)
    )
    assert (of_prompt - of_negative).abs().mean() > 0.01
    guided = Rollout(transformer, TIMESTEPS, prompt, negative_conditions=negative, guidance_scale=scale)
    expected = of_negative + scale * (of_prompt - of_negative)
    torch.testing.assert_close(guided.predict(latents, timestep, 0), expected, rtol=1e-4, atol=1e-4)


def test_without_a_scale_guidance_is_the_prompt_alone():
    latents = random(B, C, 1, H, W)
    guided = make_rollout(negative_conditions=prompt_of(B, 3, 5, seed=2))
    torch.testing.assert_close(
        guided.predict(latents, TIMESTEPS[0], 0), make_rollout().predict(latents, TIMESTEPS[0], 0)
    )


def test_a_pass_has_the_prompts_type_the_cache_and_the_blocks_place():
    rollout = make_rollout(cache=CACHE, attention_kwargs={"scale": 0.5})
    rollout.replace_conditions(Conditions(prompt_embeds=random(B, 3, 5).bfloat16()), None)
    rollout.predict(random(B, C, 2, H, W), TIMESTEPS[1], 4)
    (asked,) = rollout.transformer.passes
    assert asked.latents.dtype == torch.bfloat16
    assert asked.timestep.tolist() == [800.0] * B
    assert asked.cache is CACHE
    assert asked.start_frame == 4
    assert asked.attention_kwargs == {"scale": 0.5}
    assert asked.return_dict is False
    without_cache = make_rollout()
    without_cache.predict(random(B, C, 2, H, W), TIMESTEPS[1], 4)
    assert without_cache.transformer.passes[0].start_frame == 0


def test_guided_velocities_are_mixed_in_float32():
    prompt, negative = (Conditions(prompt_embeds=random(B, 3, 5, seed=seed).bfloat16()) for seed in (0, 2))
    rollout = Rollout(KnownField(), TIMESTEPS, prompt, negative_conditions=negative)
    assert rollout.predict(random(B, C, 1, H, W), TIMESTEPS[0], 0).dtype == torch.float32


def test_prompts_may_be_replaced_and_are_one_tensor_for_all_passes():
    rollout = make_rollout(negative_conditions=prompt_of(B, 3, 5, seed=2))
    prompt, negative = prompt_of(B, 3, 5, seed=3), prompt_of(B, 3, 5, seed=4)
    rollout.replace_conditions(prompt, negative)
    for _ in range(2):
        rollout.predict(random(B, C, 1, H, W), TIMESTEPS[0], 0)
    first, second = (asked.embeds for asked in rollout.transformer.passes)
    assert first is second  # by which the cache knows it again
    assert torch.equal(first, torch.cat([prompt.prompt_embeds, negative.prompt_embeds]))
    assert rollout.conditions is prompt
    assert rollout.negative_conditions is negative
    rollout.replace_conditions(prompt, None)
    assert not rollout.is_guided


def renoised(noise, embeds):
    x = noise[0]
    for step, timestep in enumerate(TIMESTEPS):
        latents = x - timestep / 1000 * flow_of(x, timestep, embeds)
        if step + 1 < len(TIMESTEPS):
            x = add_noise(latents, noise[step + 1], (TIMESTEPS[step + 1] / 1000).expand(B))
    return latents


def followed(noise, embeds):
    x = noise[0]
    for timestep, following in itertools.pairwise([*TIMESTEPS, torch.tensor(0.0)]):
        x = x + (following - timestep) / 1000 * flow_of(x, timestep, embeds)
    return x


@pytest.mark.parametrize(("sampler", "expected"), [("renoise", renoised), ("euler", followed)])
def test_a_block_is_sampled_from_level_to_level_in_float32(sampler, expected):
    rollout = make_rollout(sampler=sampler)
    noise = random(count_draws(3, sampler), B, C, 2, H, W)
    found = rollout.sample_block(noise.double(), 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(noise, rollout.conditions.prompt_embeds))
    assert [asked.timestep.tolist() for asked in rollout.transformer.passes] == [[t] * B for t in TIMESTEPS.tolist()]


def test_the_default_sampler_renoises():
    noise = random(3, B, C, 2, H, W)
    rollout = make_rollout()
    torch.testing.assert_close(rollout.sample_block(noise, 0), renoised(noise, rollout.conditions.prompt_embeds))
    assert (count_draws(3, "renoise"), count_draws(3, "euler")) == (3, 1)


def test_fresh_noise_may_come_in_half_precision():
    noise = random(3, B, C, 1, H, W).bfloat16()
    found = make_rollout().sample_block(noise, 0)
    torch.testing.assert_close(found, make_rollout().sample_block(noise.float(), 0), rtol=0, atol=0)


def test_after_each_step_of_each_block_its_latents_may_be_replaced():
    seen = []

    def replace(rollout, number, timestep, latents):
        seen.append((rollout, number, timestep.item()))
        return torch.full_like(latents, number)

    rollout = make_rollout(sampler="euler", on_step_end=replace)
    blocks = list(rollout.run(frames_of(random(1, B, C, 3, H, W)), [1, 2]))
    assert [block.shape[2] for block in blocks] == [1, 2]
    assert seen == [(rollout, number, TIMESTEPS[number % 3].item()) for number in range(6)]
    assert [block.unique().tolist() for block in blocks] == [[2.0], [5.0]]
    assert [asked.latents.unique().tolist() for asked in rollout.transformer.passes[1:3]] == [[0.0], [1.0]]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_stopped_clip_ends_with_the_block_of_its_step_clean_as_far_as_it_got(step):
    clean = []

    def stop(rollout, number, timestep, latents):
        x = rollout.transformer.passes[-1].latents
        clean.append(x - timestep / 1000 * flow_of(x, timestep, rollout.conditions.prompt_embeds))
        rollout.is_stopped = number == step
        return latents

    rollout = make_rollout(on_step_end=stop)
    blocks = list(rollout.run(frames_of(random(3, B, C, 6, H, W)), [2, 2, 2]))
    assert len(blocks) == step // 3 + 1
    torch.testing.assert_close(blocks[-1], clean[-1])
    assert len(rollout.transformer.passes) == step + 1


def test_each_block_but_the_last_is_written_to_the_cache_clean_at_its_place():
    rollout = make_rollout(cache=CACHE)
    blocks = list(rollout.run(frames_of(random(3, B, C, 5, H, W)), [1, 2, 2]))
    passes = [(asked.start_frame, asked.timestep[0].item()) for asked in rollout.transformer.passes]
    steps = TIMESTEPS.tolist()
    assert passes == [(0, t) for t in [*steps, 0]] + [(1, t) for t in [*steps, 0]] + [(3, t) for t in steps]
    assert torch.equal(rollout.transformer.passes[3].latents, blocks[0])
    assert torch.equal(rollout.transformer.passes[7].latents, blocks[1])


def test_given_blocks_come_out_as_they_are_and_later_ones_keep_their_noise():
    noise, given = random(3, B, C, 7, H, W), random(B, C, 5, H, W, seed=9)
    rollout = make_rollout(cache=CACHE)
    blocks = list(rollout.run(frames_of(noise), iter([4, 1, 2]), given.double()))
    assert torch.equal(torch.cat(blocks[:2], dim=2), given)
    assert blocks[0].dtype == torch.float32
    torch.testing.assert_close(blocks[2], renoised(noise[:, :, :, 5:], rollout.conditions.prompt_embeds))
    passes = [(asked.start_frame, asked.timestep[0].item()) for asked in rollout.transformer.passes]
    assert passes == [(0, 0.0), (4, 0.0)] + [(5, t) for t in TIMESTEPS.tolist()]


def test_given_blocks_come_to_where_the_noise_is():
    noise, given = random(3, B, C, 2, H, W).to("meta"), random(B, C, 2, H, W)
    (block,) = make_rollout().run(frames_of(noise), [2], given)
    assert block.device.type == "meta"


def test_a_clip_of_no_blocks_is_empty():
    assert list(make_rollout().run([], [])) == []
    asked = make_rollout(next_conditions=lambda start, length: pytest.fail("there is no block"))
    assert list(asked.run([], [])) == []


def test_noise_is_drawn_frame_by_frame_from_the_generators_that_are_given():
    seeds = [1, 2]
    frames = draw_frame_noise(2, (C, H, W), 3, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for frame in itertools.islice(frames, 2):
        expected = [torch.randn(1, 3, C, 1, H, W, generator=generator) for generator in generators]
        assert torch.equal(frame, torch.cat(expected).transpose(0, 1))
    one = torch.Generator().manual_seed(1)
    whole = draw_noise(2, (C, 2, H, W), 3, generator=torch.Generator().manual_seed(1))
    expected = [torch.randn(2, 3, C, 1, H, W, generator=one).transpose(0, 1) for _ in range(2)]
    assert torch.equal(whole, torch.cat(expected, dim=3))


@pytest.mark.parametrize(
    ("generator", "drawn_on"),
    [(None, "meta"), (torch.Generator(), "cpu"), ([torch.Generator()], "cpu")],
    ids=["none", "one", "list"],
)
def test_noise_is_drawn_where_its_generator_is_or_else_where_it_is_wanted(generator, drawn_on, monkeypatch):
    drawn = []

    def note(tensor, device):
        drawn.append(tensor.device.type)
        return tensor.to(device)

    monkeypatch.setattr("causal_wan.sampling.noise.to_device", note)
    frames = draw_frame_noise(1, (C, H, W), 3, generator=generator, device=torch.device("meta"))
    assert next(frames).device.type == "meta"
    assert drawn == [drawn_on]
    assert next(draw_frame_noise(1, (C, H, W), 3, generator=generator)).device.type == "cpu"
