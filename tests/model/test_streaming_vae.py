import gc

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.model.vae import decode_latents
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.sampling.rollout import Rollout
from causal_wan.weights.parts import load_vae


@pytest.fixture(scope="module")
def vae(checkpoint):
    return load_vae(str(checkpoint))


@pytest.fixture(scope="module")
def residual_vae(vae):
    """Of WAN 2.2's kind: around what it makes longer there are shortcuts, which know whether a frame is the first."""
    torch.manual_seed(0)
    return AutoencoderKLWan.from_config(vae.config, is_residual=True).eval()


def latents(num_frames, seed=0):
    return torch.randn(2, 16, num_frames, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [[7], [1] * 7, [3, 3, 1], [1, 4, 2]])
def test_blocks_decode_to_what_the_whole_clip_decodes_to_bit_by_bit(vae, lengths):
    whole, decoder = decode_latents(vae, latents(7)), StreamingDecoder(vae)
    parts = [decoder.decode(block) for block in latents(7).split(lengths, dim=2)]
    assert parts[0].shape[2] == 4 * (lengths[0] - 1) + 1
    assert all(part.shape[2] == 4 * length for part, length in zip(parts[1:], lengths[1:], strict=True))
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("lengths", [[4], [1, 3], [2, 2]])
def test_a_vae_with_shortcuts_decodes_the_first_frame_alone_as_the_first(residual_vae, lengths):
    whole, decoder = decode_latents(residual_vae, latents(4)), StreamingDecoder(residual_vae)
    parts = [decoder.decode(block) for block in latents(4).split(lengths, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * length - 3 * (not place) for place, length in enumerate(lengths)]
    assert torch.equal(torch.cat(parts, dim=2), whole)


def test_decoders_of_one_vae_take_turns_and_other_uses_do_not_disturb_them(vae):
    one, other = StreamingDecoder(vae), StreamingDecoder(vae)
    parts = {0: [], 1: []}
    for start in range(0, 6, 2):
        for seed, decoder in ((0, one), (1, other)):
            parts[seed].append(decoder.decode(latents(6, seed)[:, :, start : start + 2]))
        decode_latents(vae, latents(3, seed=2))
    for seed, blocks in parts.items():
        assert torch.equal(torch.cat(blocks, dim=2), decode_latents(vae, latents(6, seed)))


def held_bytes(decoder):
    return sum(feature.nbytes for feature in decoder._features if isinstance(feature, torch.Tensor))


def test_what_is_remembered_does_not_grow_with_the_clip(vae):
    decoder = StreamingDecoder(vae)
    decoder.decode(latents(3))
    decoder.decode(latents(3))
    before = held_bytes(decoder)
    for _ in range(10):
        decoder.decode(latents(3))
    gc.collect()
    assert held_bytes(decoder) == before


def test_a_streamed_video_is_the_video_of_a_call(checkpoint):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=2)
    call = {"num_frames": 21, "height": 32, "width": 48, "denoising_step_list": (1000, 500)}
    for kind in ("np", "latent"):
        whole = pipeline("a ball", generator=torch.Generator().manual_seed(0), output_type=kind, **call).frames
        stream = pipeline.stream("a ball", generator=torch.Generator().manual_seed(0), output_type=kind, **call)
        blocks = list(stream)
        assert len(blocks) == 3
        if kind == "np":
            assert [len(block[0]) for block in blocks] == [5, 8, 8]
            assert np.array_equal(np.concatenate(blocks, axis=1), whole)
        else:
            assert torch.equal(torch.cat(blocks, dim=2), whole)


def test_the_first_block_comes_before_the_second_is_begun(checkpoint, monkeypatch):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=2)
    sampled, sample = [], Rollout.sample_block

    def count(*arguments):
        sampled.append(1)
        return sample(*arguments)

    monkeypatch.setattr(Rollout, "sample_block", count)
    stream = pipeline.stream("a ball", num_frames=21, height=32, width=48, denoising_step_list=(1000,))
    next(stream)
    assert len(sampled) == 1
    with pytest.raises(ValueError, match="use 32 or 48"):
        next(pipeline.stream("a ball", num_frames=21, height=40, width=48))
