"""Rollouts of clips of which more is given or told than one prompt, by hand-written loops and the passes asked."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from test_rollout import (
    CACHE,
    TIMESTEPS,
    B,
    C,
    H,
    KnownField,
    W,
    flow_of,
    frames_of,
    make_rollout,
    prompt_of,
    random,
    renoised,
)

from causal_wan.flow import add_noise
from causal_wan.geometry import LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.sampling.noise import count_draws
from causal_wan.sampling.rollout import Rollout, SamplingSchedule, conditions_by_block, roll_out


# --- a block of which the first frames are given ---------------------------------------------------------------------


def completed(noise, given, embeds, sampler):
    """By frames: those that are given are clean in each pass, at timestep 0; the others go from level to level."""
    count = given.shape[2]
    x = torch.cat([given, noise[0][:, :, count:]], dim=2)
    for step, timestep in enumerate(TIMESTEPS):
        levels = torch.cat([torch.zeros(B, count), timestep.expand(B, x.shape[2] - count)], dim=1)
        velocity = flow_of(x, levels, embeds)[:, :, count:]
        latents = x[:, :, count:] - timestep / 1000 * velocity
        following = TIMESTEPS[step + 1] / 1000 if step + 1 < len(TIMESTEPS) else torch.tensor(0.0)
        if sampler == "euler":
            rest = x[:, :, count:] + (following - timestep / 1000) * velocity
        else:
            rest = (
                latents if following == 0 else add_noise(latents, noise[step + 1][:, :, count:], following.expand(B))
            )
        x = torch.cat([given, rest], dim=2)
    return x


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
@pytest.mark.parametrize("num_given", [1, 2])
def test_the_others_of_a_block_are_sampled_beside_its_given_frames(num_given, sampler):
    noise, given = random(count_draws(3, sampler), B, C, 5, H, W), random(B, C, num_given, H, W, seed=9)
    rollout = make_rollout(sampler=sampler, cache=CACHE)
    first, second = rollout.run(frames_of(noise), [3, 2], given)
    embeds = rollout.conditions.prompt_embeds
    assert torch.equal(first[:, :, :num_given], given)
    torch.testing.assert_close(first, completed(noise[:, :, :, :3], given, embeds, sampler))
    torch.testing.assert_close(second, completed(noise[:, :, :, 3:], given[:, :, :0], embeds, sampler))
    passes = rollout.transformer.passes
    levels = [[[0.0] * num_given + [t] * (3 - num_given)] * B for t in TIMESTEPS.tolist()]
    assert [asked.timestep.tolist() for asked in passes[:3]] == levels
    assert all(torch.equal(asked.latents[:, :, :num_given], given) for asked in passes[:3])
    assert passes[3].timestep.tolist() == [0.0] * B  # by which the block is written


def test_a_block_that_is_begun_is_sampled_where_its_noise_is():
    prompt = Conditions(prompt_embeds=random(B, 3, 5).to("meta"))
    rollout = Rollout(KnownField(), TIMESTEPS.to("meta"), prompt)
    (block,) = rollout.run(frames_of(random(3, B, C, 2, H, W).to("meta")), [2], random(B, C, 1, H, W))
    assert block.device.type == "meta"


def test_a_given_block_may_be_passed_through_as_others_are_and_comes_out_as_it_is():
    noise, given = random(3, B, C, 4, H, W), random(B, C, 2, H, W, seed=9)
    rollout = make_rollout(cache=CACHE, skips_given_blocks=False)
    first, second = rollout.run(frames_of(noise), [2, 2], given)
    assert torch.equal(first, given)
    torch.testing.assert_close(second, renoised(noise[:, :, :, 2:], rollout.conditions.prompt_embeds))
    assert [asked.start_frame for asked in rollout.transformer.passes] == [0] * 4 + [2] * 3
    assert all(torch.equal(asked.latents, given) for asked in rollout.transformer.passes[:4])


def test_a_clip_that_is_stopped_in_a_block_keeps_the_frames_that_are_given():
    given = random(B, C, 1, H, W, seed=9)

    def stop(rollout, number, timestep, latents):
        assert torch.equal(latents[:, :, :1], given)
        rollout.is_stopped = True
        return latents

    rollout = make_rollout(on_step_end=stop)
    (block,) = rollout.run(frames_of(random(3, B, C, 4, H, W)), [2, 2], given)
    (asked,) = rollout.transformer.passes
    assert torch.equal(block[:, :, :1], given)
    clean = asked.latents - flow_of(asked.latents, asked.timestep, asked.embeds)  # at timestep 1000
    torch.testing.assert_close(block[:, :, 1:], clean[:, :, 1:])


# --- controls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_guided", [False, True])
def test_each_pass_has_the_controls_of_its_block_for_the_prompt_and_the_negative_one(is_guided):
    controls, guidance = random(B, 3, 5, H, W, seed=8), {}
    if is_guided:
        guidance = {"negative_conditions": prompt_of(B, 3, 5, seed=2)}
    rollout = make_rollout(cache=CACHE, **guidance)
    list(rollout.run(frames_of(random(3, B, C, 5, H, W)), [1, 2, 2], control_latents=controls.split(1, dim=2)))
    frames = {0: slice(0, 1), 1: slice(1, 3), 3: slice(3, 5)}
    assert [asked.start_frame for asked in rollout.transformer.passes] == [0] * 4 + [1] * 4 + [3] * 3
    for asked in rollout.transformer.passes:
        own = controls[:, :, frames[asked.start_frame]]
        assert torch.equal(asked.control_latents, torch.cat([own] * (1 + is_guided)))


def test_without_controls_the_transformer_is_told_of_none():
    rollout = make_rollout()
    list(rollout.run(frames_of(random(3, B, C, 1, H, W)), [1]))
    assert not any(hasattr(asked, "control_latents") for asked in rollout.transformer.passes)


@pytest.mark.parametrize(("num_controls", "lengths"), [(2, [1]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2, 2])])
def test_a_clip_ends_with_the_last_block_of_which_all_controls_come(num_controls, lengths):
    rollout, controls = make_rollout(), random(B, 3, num_controls, H, W)
    blocks = rollout.run(frames_of(random(3, B, C, 5, H, W)), [1, 2, 2], control_latents=controls.split(1, dim=2))
    assert [block.shape[2] for block in blocks] == lengths


# --- conditions that change, and the cache ---------------------------------------------------------------------------


@dataclass
class NotedCache:
    """Stands for a cache of any length, and notes what is asked of it in the passes of the transformer."""

    passes: list
    num_frames: int = 0
    kept: tuple = (0, 1, 3)

    def is_kept(self, start, length, end):
        self.passes.append(("is kept", start, length, end))
        return start in self.kept

    def restart(self):
        self.passes.append(("restart",))
        self.num_frames = 0

    def leave_out(self, count):
        self.passes.append(("leave out", count))


def changing(at, prompt, asked=None):
    def next_conditions(start, length):
        if asked is not None:
            asked.append((start, length))
        return prompt if start == at else None

    return next_conditions


def prompts_told(passes):
    """First frame, timestep and prompt of each pass."""
    return [(asked.start_frame, asked.timestep[0].item(), asked.embeds) for asked in passes]


@pytest.mark.parametrize("at", [0, 1, 3])
def test_conditions_change_with_a_block_and_what_is_written_of_earlier_ones_stays(at):
    asked, new, negative = [], prompt_of(B, 3, 5, seed=6), prompt_of(B, 3, 5, seed=2)
    rollout = make_rollout(
        cache=CACHE, next_conditions=changing(at, new, asked), negative_conditions=negative, guidance_scale=2.0
    )
    old = rollout.conditions
    list(rollout.run(frames_of(random(3, B, C, 5, H, W)), [1, 2, 2]))
    assert asked == [(0, 1), (1, 2), (3, 2)]
    steps = TIMESTEPS.tolist()
    told = prompts_told(rollout.transformer.passes)
    assert [each[:2] for each in told] == [(start, t) for start in (0, 1, 3) for t in [*steps, 0.0]][:-1]
    for start, _, embeds in told:
        prompt = new if start >= at else old
        assert torch.equal(embeds, torch.cat([prompt.prompt_embeds, negative.prompt_embeds]))


def test_a_clip_of_one_block_is_asked_once_what_it_is_told():
    asked, new = [], prompt_of(B, 3, 5, seed=6)
    rollout = make_rollout(next_conditions=changing(0, new, asked))
    list(rollout.run(frames_of(random(3, B, C, 2, H, W)), [2]))
    assert asked == [(0, 2)]
    assert all(torch.equal(each.embeds, new.prompt_embeds) for each in rollout.transformer.passes)


def test_a_recache_passes_through_the_blocks_that_are_held_with_their_controls_and_the_new_prompt():
    """The blocks of 1, 2, 2 and 2 frames; the last has the new prompt, and the second has left the cache by then."""
    new, controls, noise = prompt_of(B, 3, 5, seed=6), random(B, 3, 7, H, W, seed=8), random(3, B, C, 7, H, W)
    rollout = make_rollout(next_conditions=changing(5, new), recaches=True)
    passes, old = rollout.transformer.passes, rollout.conditions
    rollout.cache = NotedCache(passes, kept=(0, 3))
    blocks = list(rollout.run(frames_of(noise), [1, 2, 2, 2], control_latents=controls.split(1, dim=2)))
    others = [asked for asked in passes if isinstance(asked, tuple)]
    held = [("is kept", 0, 1, 3), ("is kept", 0, 1, 5), ("is kept", 1, 2, 5)]
    assert others == [*held, ("restart",), ("leave out", 0), ("leave out", 3)]
    made = [asked for asked in passes if not isinstance(asked, tuple)]
    steps = [(start, t) for start in (0, 1) for t in [*TIMESTEPS.tolist(), 0.0]] + [(3, t) for t in TIMESTEPS.tolist()]
    rewritten = [(0, 0.0), (3, 0.0)]
    last = [(5, t) for t in TIMESTEPS.tolist()]
    assert [each[:2] for each in prompts_told(made)] == steps + rewritten + last
    for asked in made[: len(steps)]:
        assert torch.equal(asked.embeds, old.prompt_embeds)
    for asked in made[len(steps) :]:
        assert torch.equal(asked.embeds, new.prompt_embeds)
    first, third = made[len(steps) : len(steps) + 2]
    assert torch.equal(first.latents, blocks[0])
    assert torch.equal(third.latents, blocks[2])
    assert torch.equal(first.control_latents, controls[:, :, :1])
    assert torch.equal(third.control_latents, controls[:, :, 3:5])
    assert all(torch.equal(asked.control_latents, controls[:, :, 5:]) for asked in made[-3:])


def test_a_rollout_that_recaches_writes_blocks_once_where_nothing_changes():
    rollout = make_rollout(next_conditions=lambda start, length: None, recaches=True)
    passes = rollout.transformer.passes
    rollout.cache = NotedCache(passes)
    list(rollout.run(frames_of(random(3, B, C, 5, H, W)), [1, 2, 2]))
    assert not any(asked[0] == "restart" for asked in passes if isinstance(asked, tuple))
    made = [asked for asked in passes if not isinstance(asked, tuple)]
    assert [asked.start_frame for asked in made] == [0] * 4 + [1] * 4 + [3] * 3


def test_conditions_by_block_are_those_of_its_first_frame_and_said_only_where_one_clip_changes():
    prompts = random(B, 3, 3, 5)
    of_frame = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    ask = conditions_by_block(Conditions(prompt_embeds=prompts, prompt_of_frame=of_frame))
    assert ask(0, 1) is None
    for start, numbers in ((1, (0, 1)), (3, (1, 1))):
        found = ask(start, 2)
        assert torch.equal(found.prompt_embeds, torch.stack([prompts[0, numbers[0]], prompts[1, numbers[1]]]))
        assert found.prompt_of_frame is None
    assert ask(5, 2) is None  # beyond the last frame it is that of the last
    assert ask(100, 2) is None
    at_the_end = Conditions(prompt_embeds=prompts, prompt_of_frame=torch.tensor([[0, 0, 2], [1, 1, 1]]))
    ask = conditions_by_block(at_the_end)
    assert [ask(start, 1) is None for start in range(3)] == [True, True, False]
    assert torch.equal(conditions_by_block(at_the_end)(7, 1).prompt_embeds, prompts[[0, 1], [2, 1]])


# --- whole clips -----------------------------------------------------------------------------------------------------


SCHEDULE = SamplingSchedule(timesteps=TIMESTEPS, sampler="renoise")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (B, 6, H, W, "cpu", None)),
        ({"cache_dtype": torch.int8}, (B, 6, H, W, "cpu", torch.int8)),
        ({"negative_conditions": prompt_of(B, 3, 5, seed=2)}, (2 * B, 6, H, W, "cpu", None)),
    ],
    ids=["plain", "int8", "guided"],
)
def test_a_clip_of_blocks_has_one_cache_of_all_its_frames_and_passes(settings, expected):
    transformer = KnownField()
    blocks = list(roll_out(transformer, prompt_of(B, 3, 5, seed=1), random(3, B, C, 6, H, W), SCHEDULE, **settings))
    assert [block.shape for block in blocks] == [(B, C, 2, H, W)] * 3
    assert transformer.caches == [expected]
    assert all(asked.cache is CACHE for asked in transformer.passes)


def test_a_clip_of_one_block_is_sampled_without_a_cache():
    transformer, noise, prompt = KnownField(), random(3, B, C, 2, H, W), prompt_of(B, 3, 5, seed=1)
    (block,) = roll_out(transformer, prompt, noise, SCHEDULE)
    torch.testing.assert_close(block, renoised(noise, prompt.prompt_embeds))
    assert transformer.caches == []
    assert [asked.cache for asked in transformer.passes] == [None] * 3


def test_noise_frame_by_frame_makes_a_clip_of_so_many_frames_or_one_without_end():
    noise, prompt = random(3, B, C, 8, H, W), prompt_of(B, 3, 5, seed=1)
    expected = list(roll_out(KnownField(), prompt, noise, SCHEDULE))
    of_six, endless = KnownField(), KnownField()
    found = list(roll_out(of_six, prompt, frames_of(noise), SCHEDULE, num_latent_frames=6))
    assert torch.equal(torch.cat(found, dim=2), torch.cat(expected[:3], dim=2))
    assert [shape[1] for shape in of_six.caches] == [6]
    blocks = roll_out(endless, prompt, itertools.cycle(frames_of(noise)), SCHEDULE)
    found = [next(blocks) for _ in range(5)]
    assert torch.equal(torch.cat(found, dim=2), torch.cat([*expected, expected[0]], dim=2))
    assert [shape[1] for shape in endless.caches] == [4]  # frames of the window


def test_no_gradients_are_computed():
    prompt = Conditions(prompt_embeds=random(B, 3, 5).requires_grad_())
    blocks = roll_out(KnownField(), prompt, random(3, B, C, 4, H, W), SCHEDULE)
    assert not any(block.requires_grad for block in blocks)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, B, C, 4, H, W),
            r"^noise must have shape \(num_draws, B, C, F, H, W\) with num_draws=3 for 3 steps of the ",
        ),
        ((2, B, C, 4, H, W), r"sampler renoise, got \(2, 2, 4, 1, 4, 6\)\.$"),
        ((3, C, 4, H, W), r"got \(3, 4, 4, 4, 6\)\.$"),
        ((3, C), r"got \(3, 4\)\.$"),
    ],
)
def test_noise_of_another_shape_is_refused_with_its_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        next(roll_out(KnownField(), prompt_of(B, 3, 5), random(*shape), SCHEDULE))


def test_what_is_given_must_fit_the_clip_in_the_geometry_of_the_checkpoint():
    geometry, prompt = LatentGeometry(temporal_factor=8), prompt_of(B, 3, 5)
    with pytest.raises(ValueError, match=r"got 3 latent frames \(17 frames\); give 9 or 25 frames\.$"):
        next(
            roll_out(
                KnownField(),
                prompt,
                random(3, B, C, 6, H, W),
                SCHEDULE,
                initial_latents=random(B, C, 3, H, W),
                geometry=geometry,
            )
        )


@pytest.mark.parametrize("is_apart", [False, True])
def test_controls_of_a_clip_come_with_its_conditions_or_apart(is_apart):
    controls, prompt, transformer = random(B, 3, 4, H, W, seed=8), prompt_of(B, 3, 5), KnownField()
    given = {"control_latents": controls.split(1, dim=2)} if is_apart else {}
    of_clip = torch.zeros_like(controls) if is_apart else controls  # what comes apart comes in their place
    conditions = replace(prompt, control_latents=of_clip)
    list(roll_out(transformer, conditions, random(3, B, C, 4, H, W), SCHEDULE, **given))
    for asked in transformer.passes:
        assert torch.equal(asked.control_latents, controls[:, :, asked.start_frame : asked.start_frame + 2])


def test_controls_of_conditions_must_be_as_many_as_the_frames():
    conditions = replace(prompt_of(B, 3, 5), control_latents=random(B, 3, 5, H, W))
    message = "^control_latents must have the 6 latent frames of the clip, got 5\\.$"
    with pytest.raises(ValueError, match=message):
        next(roll_out(KnownField(), conditions, random(3, B, C, 6, H, W), SCHEDULE))
    frames = frames_of(random(3, B, C, 6, H, W))  # without end, it ends with its controls
    assert len(list(roll_out(KnownField(), conditions, frames, SCHEDULE))) == 2


def test_prompts_by_frame_are_told_block_by_block():
    prompts, transformer = random(B, 2, 3, 5), KnownField()
    conditions = Conditions(prompt_embeds=prompts, prompt_of_frame=torch.tensor([[0, 0, 0, 0, 1, 1]] * B))
    list(roll_out(transformer, conditions, random(3, B, C, 6, H, W), SCHEDULE))
    for asked in transformer.passes:
        assert torch.equal(asked.embeds, prompts[:, int(asked.start_frame >= 4)])
