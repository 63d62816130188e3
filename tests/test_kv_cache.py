import pytest
import torch
from conftest import TINY_TRANSFORMER

from causal_wan.kv_cache import KVCache, LayerCache
from causal_wan.transformer import CausalWanTransformer3DModel


def make_cache(capacity, sink_size, frame_tokens=2):
    buffers = [torch.full((1, capacity * frame_tokens, 1, 1), -1.0) for _ in range(2)]
    return KVCache([LayerCache(*buffers)], frame_tokens=frame_tokens, sink_size=sink_size)


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
    cache, end = make_cache(capacity, sink), 0
    buffers = (cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr())
    for length in lengths:
        seen = write(cache, end, length)
        end += length
        expected = range(end) if end <= capacity else [*range(sink), *range(end - (capacity - sink), end)]
        assert sorted(seen) == list(expected)
    assert (cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()) == buffers


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
