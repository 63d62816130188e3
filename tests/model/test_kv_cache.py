import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import KeptStates, KVCache, LayerCache
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.pipeline import CausalWanPipeline


def make_cache(capacity, sink_size, frame_tokens=2):
    shape = (1, capacity * frame_tokens, 1, 1)
    return KVCache([LayerCache(KeptStates(shape), KeptStates(shape))], frame_tokens=frame_tokens, sink_size=sink_size)


def write(cache, start, length):
    """Writes a block whose keys are the numbers of its frames, and gives the frames that it may see."""
    frames = torch.arange(start, start + length).repeat_interleave(cache.frame_tokens).float()[None, :, None, None]
    for keys in (torch.zeros_like(frames), frames):  # a repeated pass overwrites
        cache.reserve(start, length)
        seen, values = cache.layers[0].update(keys, keys + 100, cache.places, cache.num_held)
    assert torch.equal(values, seen + 100)
    frames = seen.flatten().tolist()
    assert frames[:: cache.frame_tokens] == frames[1 :: cache.frame_tokens]
    return frames[:: cache.frame_tokens]


@pytest.mark.parametrize(
    ("capacity", "sink", "lengths"),
    [(4, 1, [1] * 9), (6, 0, [3] * 5), (7, 1, [3] * 6), (5, 2, [1, 2, 2, 2, 2]), (4, 3, [1] * 6), (12, 1, [4, 4, 4])],
)
def test_a_block_sees_the_sink_and_the_most_recent_frames_itself_included(capacity, sink, lengths):
    cache, end, buffers = make_cache(capacity, sink), 0, None
    for length in lengths:
        seen = write(cache, end, length)
        buffers = buffers or [states.buffer.data_ptr() for states in (cache.layers[0].keys, cache.layers[0].values)]
        end += length
        expected = range(end) if end <= capacity else [*range(sink), *range(end - (capacity - sink), end)]
        assert sorted(seen) == list(expected)
    assert [states.buffer.data_ptr() for states in (cache.layers[0].keys, cache.layers[0].values)] == buffers


def test_blocks_out_of_order_and_blocks_that_do_not_fit_are_refused():
    cache = make_cache(4, 1)
    cache.reserve(0, 2)
    with pytest.raises(ValueError, match="must begin at latent frame 2"):
        cache.reserve(4, 2)
    with pytest.raises(ValueError, match=r"1 \+ 4 latent frames, but has room for 4"):
        cache.reserve(2, 4)


def test_a_prompt_is_embedded_once_and_another_one_anew():
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=1).eval()
    cache, seen = model.make_cache(1, 2, 4, 6), []
    model.condition_embedder.text_embedder.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    latents, timestep = torch.randn(1, 4, 1, 4, 6), torch.zeros(1)
    one, other = torch.randn(2, 1, 7, 16)
    with torch.no_grad():
        for start, embeds in ((0, one), (0, one), (1, one), (1, other), (1, other)):
            model(latents, timestep, embeds, cache=cache, start_frame=start)
    assert seen == [7, 0, 0, 7, 0]


PASSES = [
    pytest.param(torch.float32, None, torch.float32, id="float32"),
    pytest.param(torch.float32, torch.float16, torch.float16, id="fp16 passes of float32 weights"),
    pytest.param(torch.float32, torch.bfloat16, torch.bfloat16, id="bf16 passes of float32 weights"),
    pytest.param(torch.bfloat16, None, torch.bfloat16, id="bf16 weights"),
]


def sample(weights, autocast, *, embeds_dtype=torch.float32, dtype=None):
    """Latents of a clip of three blocks, sampled as validation samples them: autocast is on in the passes alone."""
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, num_frame_per_block=1).eval().to(weights)
    caches, forward = [], transformer.forward

    def autocast_forward(*inputs, cache, **settings):
        caches.append(cache)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return forward(*inputs, cache=cache, **settings)

    transformer.forward = autocast_forward
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    generator = torch.Generator().manual_seed(1)
    noise, embeds = torch.randn(2, 1, 4, 3, 4, 6, generator=generator), torch.randn(1, 7, 16, generator=generator)
    conditions = Conditions(prompt_embeds=embeds.to(embeds_dtype))
    latents = pipeline.sample_latents(conditions, noise, [1000, 500], cache_dtype=dtype)
    return latents, caches[0]


@pytest.mark.parametrize(("weights", "autocast", "expected"), PASSES)
def test_keys_and_values_are_kept_in_the_precision_of_the_passes_whatever_the_prompts_is(weights, autocast, expected):
    latents, cache = sample(weights, autocast)
    for layer in cache.layers:
        assert layer.keys.buffer.dtype == layer.values.buffer.dtype == expected
    assert cache.num_bytes == 2 * 2 * (3 * 6 * 48) * expected.itemsize  # layers, keys and values, tokens and width
    wider, _ = sample(weights, autocast, dtype=torch.float32)
    assert torch.equal(latents, wider)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_8_bits_take_half_and_change_little(weights):
    latents, cache = sample(weights, None)
    in_bf16, _ = sample(weights, None, dtype=torch.bfloat16)
    in_int8, smaller = sample(weights, None, dtype=torch.int8)
    assert smaller.layers[0].keys.buffer.dtype == torch.int8
    with_scales = 1 + 4 / 24  # a float32 for each 24 values
    assert smaller.num_bytes / cache.num_bytes == pytest.approx(with_scales / weights.itemsize)
    error, of_bf16 = ((kept - latents).norm() / latents.norm() for kept in (in_int8, in_bf16))
    assert 0 < error < 0.02
    assert weights == torch.bfloat16 or error < 4 * of_bf16


def test_what_is_kept_in_8_bits_is_off_by_half_a_step_of_its_own_head_and_token():
    states = torch.randn(1, 6, 2, 24, generator=torch.Generator().manual_seed(0))
    states[:, 2] *= 1e4
    states[:, 3] = 0
    kept = KeptStates((1, 8, 2, 24), torch.int8)
    kept.write(states, torch.arange(1, 7))
    step = states.abs().amax(dim=-1, keepdim=True) / 127
    assert ((kept.read(7, torch.float32)[:, 1:] - states).abs() <= 0.501 * step).all()
