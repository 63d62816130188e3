"""Prompts that change along a clip: in one pass over it, in a rollout, and in a cache that is written anew."""

import itertools

import pytest
import torch
from conftest import TINY_TRANSFORMER
from test_kv_cache import make_cache, write
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from causal_wan.blocks import frame_block_lengths, middle_frames
from causal_wan.config.settings import MemoryConfig
from causal_wan.geometry import LatentGeometry
from causal_wan.memory.levers import enable_gradient_checkpointing
from causal_wan.model.compiling import compile_layers
from causal_wan.model.conditions import Conditions, embedded
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.rollout import Rollout, SamplingSchedule, roll_out


B, C, H, W, S, D = 2, 4, 4, 6, 7, 16
KINDS = {
    "blocks of 2": ({"num_frame_per_block": 2}, 6),
    "an independent first frame": ({"num_frame_per_block": 2, "independent_first_frame": True}, 7),
    "a window": ({"num_frame_per_block": 2, "local_attn_size": 4}, 6),
}
SCHEDULE = SamplingSchedule(timesteps=torch.tensor([1000.0, 500.0]), sampler="renoise")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**causal):
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()


def by_frame(numbers_of_blocks, lengths):
    """Number of the prompt of each frame, `(B, F)`, of that of each block."""
    return torch.tensor(numbers_of_blocks).repeat_interleave(torch.tensor(lengths), dim=1)


def cached(transformer, latents, timesteps, prompts, of_frame, clean=None):
    """The velocity of each block, with the clean or the noisy blocks before it in a cache, each under its prompt."""
    cache = transformer.make_cache(B, *latents.shape[2:])
    found, start = [], 0
    for length in transformer.block_lengths(latents.shape[2]):
        own, frames = prompts[torch.arange(B), of_frame[:, start]], slice(start, start + length)
        inputs = {"cache": cache, "start_frame": start}
        block = transformer(latents[:, :, frames], timesteps[:, frames], own, **inputs).sample
        if clean is not None:
            transformer(clean[:, :, frames], torch.zeros(B), own, **inputs)
        found.append(block)
        start += length
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("context", ["noisy", "clean"])
@pytest.mark.parametrize(("causal", "num_frames"), KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_prompts_by_frame_in_one_pass_equal_a_cached_rollout_that_switches(causal, num_frames, context):
    transformer = make(**causal)
    lengths = transformer.block_lengths(num_frames)
    numbers = [[0, 1, 2, 2][: len(lengths)], [1, 1, 0, 0][: len(lengths)]]  # a prompt of its own for each clip
    of_frame, prompts = by_frame(numbers, lengths), random(B, 3, S, D, seed=1)
    latents, clean = random(B, C, num_frames, H, W, seed=2), random(B, C, num_frames, H, W, seed=3)
    timesteps = 1000 * torch.rand(B, len(lengths), generator=torch.Generator().manual_seed(4))
    timesteps = timesteps.repeat_interleave(torch.tensor(lengths), dim=1)
    given = {"context_latents": clean} if context == "clean" else {}
    whole = transformer(latents, timesteps, prompts, prompt_of_frame=of_frame, **given).sample
    expected = cached(transformer, latents, timesteps, prompts, of_frame, clean if given else None)
    assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    one = transformer(latents, timesteps, prompts[:, 0], **given).sample
    assert (whole - one).abs().mean() > 0.01


@torch.no_grad()
def test_the_prompt_of_a_block_reaches_no_earlier_block():
    transformer = make(num_frame_per_block=2)
    latents, timesteps, prompts = random(B, C, 6, H, W), torch.full((B, 6), 500.0), random(B, 2, S, D, seed=1)
    before, after = (
        transformer(latents, timesteps, prompts, prompt_of_frame=by_frame([numbers] * B, [2, 2, 2])).sample
        for numbers in ([0, 0, 0], [0, 1, 1])
    )
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert (before != after).flatten(3).any(dim=-1).any(dim=1)[:, 2:].all()


@torch.no_grad()
def test_one_prompt_for_all_frames_is_the_plain_pass_whatever_the_form_of_the_timestep():
    transformer = make(num_frame_per_block=2)
    latents, prompts, of_frame = random(B, C, 6, H, W), random(B, 2, S, D, seed=1), torch.ones(B, 6, dtype=torch.int64)
    tokens = (H // 2) * (W // 2)
    for timestep in (torch.tensor([500.0, 3.0]), random(B, 6).abs(), random(B, 6 * tokens).abs()):
        plain = transformer(latents, timestep, prompts[:, 1]).sample
        assert_close(transformer(latents, timestep, prompts, prompt_of_frame=of_frame).sample, plain)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_fused", [False, True])
def test_gradients_reach_each_prompt_and_no_other_of_its_clip(is_checkpointed, is_fused):
    transformer = make(num_frame_per_block=2)
    if is_checkpointed:
        enable_gradient_checkpointing(transformer, MemoryConfig(gradient_checkpointing=True))
    if is_fused:
        transformer.fuse_qkv_projections()
    prompts = random(B, 3, S, D, seed=1).requires_grad_()
    of_frame = by_frame([[0, 1, 1], [2, 2, 2]], [2, 2, 2])
    inputs = (random(B, C, 6, H, W), torch.full((B, 6), 500.0))
    transformer.train()(*inputs, prompts, prompt_of_frame=of_frame).sample.square().sum().backward()
    seen = prompts.grad.flatten(2).abs().sum(dim=2) > 0
    assert seen.tolist() == [[True, True, False], [False, False, True]]
    # The last block of a clip is the one that its second prompt tells something: so is its gradient there.
    plain = random(B, 3, S, D, seed=1)[:, 2].requires_grad_()
    transformer.zero_grad()
    transformer(*inputs, plain).sample[1].square().sum().backward()
    assert_close(prompts.grad[1, 2], plain.grad[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_layers_compute_what_eager_ones_do(is_checkpointed):
    """Batches with and without changes in turn, and with more prompts: a graph each, and no break in one."""
    torch.compiler.reset()
    eager, compiled = (make(num_frame_per_block=2).train() for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    if is_checkpointed:
        enable_gradient_checkpointing(compiled, MemoryConfig(gradient_checkpointing=True))
    compile_layers(compiled, 4, backend=counter)
    inputs = (random(B, C, 6, H, W), torch.full((B, 6), 500.0))
    for numbers in (None, [0, 0, 1], [0, 1, 0], [0, 1, 2], None, [0, 0, 1]):
        found = []
        for model in (eager, compiled):
            if numbers is None:
                velocity = model(*inputs, random(B, S, D, seed=1)).sample
            else:
                of_frame, count = by_frame([numbers, [0, 0, 0]], [2, 2, 2]), max(numbers) + 1
                velocity = model(*inputs, random(B, count, S, D, seed=1), prompt_of_frame=of_frame).sample
            velocity.square().sum().backward()
            found.append([velocity.detach(), *(each.grad.clone() for each in model.parameters())])
            model.zero_grad()
        for one, other in zip(*found, strict=True):
            assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert counter.frame_count <= 3
    torch.compiler.reset()


def test_prompts_that_do_not_fit_their_frames_are_refused():
    transformer = make(num_frame_per_block=2)
    latents, timesteps, prompts = random(B, C, 6, H, W), torch.full((B, 6), 500.0), random(B, 2, S, D)
    with pytest.raises(ValueError, match=r"\(B, F\) with F=6 latent frames.* got \(2, 5\) and \(2, 2, 7, 16\)"):
        transformer(latents, timesteps, prompts, prompt_of_frame=torch.zeros(B, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"with a cache give the block's one prompt"):
        cache = transformer.make_cache(B, 6, H, W)
        of_frame = torch.zeros(B, 2, dtype=torch.int64)
        transformer(latents[:, :, :2], timesteps[:, :2], prompts, prompt_of_frame=of_frame, cache=cache)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_prompts_of_blocks_become_conditions_of_frames_and_none_where_no_prompt_changes():
    embeds = {text: random(3, D, seed=number) for number, text in enumerate("abc")}
    plain = embedded(["a", ("b", "b", "b")], embeds, [1, 2, 2], S)
    assert plain.prompt_of_frame is None
    assert torch.equal(plain.prompt_embeds[:, :3], torch.stack([embeds["a"], embeds["b"]]))
    assert not plain.prompt_embeds[:, 3:].any()
    mixed = embedded(["a", ("b", "c", "b"), ("c", "a", "a")], embeds, [1, 2, 2], S)
    for number, texts in enumerate(("aaaaa", "bccbb", "caaaa")):
        for frame, text in enumerate(texts):
            assert torch.equal(mixed.at_frame(frame).prompt_embeds[number, :3], embeds[text])
    assert mixed.at_frame(100).prompt_of_frame is None


@pytest.mark.parametrize(
    ("lengths", "expected"), [([3, 3, 1], [4, 15, 23]), ([1, 3, 3], [0, 7, 19]), ([1, 1], [0, 3])]
)
def test_a_change_falls_on_the_nearest_start_of_a_block(lengths, expected):
    assert middle_frames(lengths) == expected
    starts = [LatentGeometry().num_frames(end) for end in itertools.accumulate([0, *lengths])]
    for frame in range(starts[-2] + 1):  # at which something changes
        changed = [middle >= frame for middle in middle_frames(lengths)].index(True)
        assert abs(starts[changed] - frame) == min(abs(start - frame) for start in starts)


# --- the cache written anew ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "sink", "num_blocks"), [(12, 0, 3), (12, 2, 3), (7, 0, 5), (7, 2, 5), (7, 4, 5), (6, 3, 6)]
)
def test_a_cache_that_is_written_anew_holds_what_it_held(capacity, sink, num_blocks):
    cache = make_cache(capacity, sink)
    blocks = [(start, 3) for start in range(0, 3 * num_blocks, 3)]
    for start, length in blocks:
        write(cache, start, length)
    end = 3 * num_blocks
    cache.restart()
    kept = [block for block in blocks if cache.is_kept(*block, end)]
    for start, length in kept:
        cache.leave_out(start - cache.num_frames)
        write(cache, start, length)
    for start in (end, end + 3):
        held = (
            range(start + 3)
            if start + 3 <= capacity
            else [*range(sink), *range(start + 3 - capacity + sink, start + 3)]
        )
        assert sorted(write(cache, start, 3)) == list(held)


def sample(transformer, conditions, noise, **settings):
    return torch.cat(list(roll_out(transformer, conditions, noise, SCHEDULE, **settings)), dim=2)


def switching(lengths, at):
    """Conditions that change from the first prompt to the second with a block."""
    numbers = [[0] * at + [1] * (len(lengths) - at)] * B
    return Conditions(prompt_embeds=random(B, 2, S, D, seed=1), prompt_of_frame=by_frame(numbers, lengths))


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("window", [-1, 6])
@torch.no_grad()
def test_recache_equals_a_rollout_whose_past_was_written_under_the_new_prompt(window, is_guided):
    """The past is given: as long as nothing has left the window, it is as if it had been sampled so."""
    transformer = make(num_frame_per_block=2, local_attn_size=window)
    noise, lengths = random(2, B, C, 6, H, W, seed=3), [2, 2, 2]
    guidance = {}
    if is_guided:
        guidance = {"negative_conditions": Conditions(prompt_embeds=random(B, S, D, seed=5)), "guidance_scale": 2.0}
    conditions = switching(lengths, 2)
    sampled = sample(transformer, conditions, noise, recaches=True, **guidance)
    new = conditions.at_frame(5)
    expected = sample(transformer, new, noise, initial_latents=sampled[:, :, :4], **guidance)
    assert_close(sampled, expected, rtol=1e-4, atol=1e-5)
    without = sample(transformer, conditions, noise, **guidance)
    assert torch.equal(without[:, :, :4], sampled[:, :, :4])
    assert (without - expected)[:, :, 4:].abs().mean() > 1e-3


@pytest.mark.parametrize(("window", "sink", "kept"), [(6, 2, [0, 2, 3]), (6, 0, [1, 2, 3]), (5, 1, [0, 2, 3])])
@torch.no_grad()
def test_recache_writes_the_blocks_that_the_cache_holds_the_sink_included_and_no_others(window, sink, kept):
    """Blocks of 2 frames; the fifth has the new prompt."""
    transformer = make(num_frame_per_block=2, local_attn_size=window, sink_size=sink)
    noise, lengths = random(2, B, C, 12, H, W, seed=3), [2] * 6
    conditions = switching(lengths, 4)
    sampled = sample(transformer, conditions, noise, recaches=True)
    cache = transformer.make_cache(B, 12, H, W)
    rollout = Rollout(transformer, SCHEDULE.timesteps, conditions.at_frame(11), cache=cache)
    for block in kept:
        cache.leave_out(2 * block - cache.num_frames)
        rollout.predict(sampled[:, :, 2 * block : 2 * block + 2], torch.tensor(0.0), 2 * block)
    fifth = rollout.sample_block(noise[:, :, :, 8:10], 8)
    assert_close(sampled[:, :, 8:10], fifth, rtol=1e-4, atol=1e-5)
    rollout.predict(fifth, torch.tensor(0.0), 8)
    assert_close(sampled[:, :, 10:], rollout.sample_block(noise[:, :, :, 10:], 10), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_rollout_that_switches_samples_each_block_as_the_pass_over_the_whole_clip_does():
    transformer = make(num_frame_per_block=2, independent_first_frame=True)
    lengths = transformer.block_lengths(7)
    conditions, noise = switching(lengths, 2), random(1, B, C, 7, H, W, seed=3)
    one_step = SamplingSchedule(timesteps=torch.tensor([1000.0]), sampler="euler")
    sampled = torch.cat(list(roll_out(transformer, conditions, noise, one_step)), dim=2)
    velocity = transformer(
        noise[0], torch.full((B, 7), 1000.0), context_latents=sampled, **conditions.arguments()
    ).sample
    assert_close(sampled, noise[0] - velocity, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_live_prompt_counts_from_the_next_block_on_and_the_written_past_stays_unless_recached():
    transformer = make(num_frame_per_block=2)
    prompts = [Conditions(prompt_embeds=random(B, S, D, seed=seed)) for seed in (1, 2)]
    noise, asked = random(2, B, C, 6, H, W, seed=3), []

    def next_conditions(start, length):
        asked.append((start, length))
        return prompts[1] if start == 4 else None

    live = sample(transformer, prompts[0], noise, next_conditions=next_conditions)
    assert asked == [(0, 2), (2, 2), (4, 2)]
    both = Conditions(
        prompt_embeds=torch.stack([each.prompt_embeds for each in prompts], dim=1),
        prompt_of_frame=by_frame([[0, 0, 1]] * B, [2, 2, 2]),
    )
    assert torch.equal(live, sample(transformer, both, noise))


def test_blocks_of_all_lengths_have_a_middle_that_is_theirs():
    for causal in ({"num_frame_per_block": 3}, {"num_frame_per_block": 4, "independent_first_frame": True}):
        lengths = frame_block_lengths(21, **causal)
        ends = [LatentGeometry().num_frames(end) for end in itertools.accumulate([0, *lengths])]
        for middle, (start, end) in zip(middle_frames(lengths), itertools.pairwise(ends), strict=True):
            assert start <= middle < end
