"""Features of the VAE's decoder are those that the stock decoder has, and lead gradients to the latents."""

import pytest
import torch

from causal_wan.model.streaming_vae import NUM_UP_BLOCKS, decode_features
from causal_wan.model.vae import decode_latents
from causal_wan.weights.parts import load_vae


@pytest.fixture(scope="module", params=["checkpoint", "checkpoint_5b"])
def vae(request):
    """Of WAN 2.1's kind, and of 2.2's, with shortcuts that know whether a frame is the first."""
    return load_vae(str(request.getfixturevalue(request.param)))


def latents(vae, num_frames=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, vae.config.z_dim, num_frames, 4, 6, generator=generator)


def stock_features(vae, latents):
    """What the blocks of the stock decoder give, frame by frame, seen by hooks while it decodes the whole video."""
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks[:NUM_UP_BLOCKS]]
    seen = [[] for _ in blocks]
    hooks = [
        block.register_forward_hook(lambda module, given, made, frames=frames: frames.append(made))
        for block, frames in zip(blocks, seen, strict=True)
    ]
    decode_latents(vae, latents)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("num_frames", [2, 3, 5])
def test_features_are_those_of_the_stock_decoder_without_its_first_frame(vae, num_frames):
    given = latents(vae, num_frames)
    expected = stock_features(vae, given)
    features = decode_features(vae, given)
    assert len(features) == len(expected) == 1 + NUM_UP_BLOCKS
    for of_depth, frames in zip(features, expected, strict=True):
        assert len(frames) == num_frames
        assert of_depth.shape[2] == sum(frame.shape[2] for frame in frames[1:])
        torch.testing.assert_close(of_depth, torch.cat(frames[1:], dim=2), rtol=1e-4, atol=1e-4)


def test_the_first_frame_is_context_of_the_others(vae):
    given, changed = latents(vae), latents(vae)
    changed[:, :, 0] += 1
    for before, after in zip(decode_features(vae, given), decode_features(vae, changed), strict=True):
        assert not torch.allclose(before, after)


def test_gradients_reach_all_latents_and_no_weight(vae):
    given = latents(vae).requires_grad_()
    sum(features.square().sum() for features in decode_features(vae, given)).backward()
    assert torch.isfinite(given.grad).all()
    assert (given.grad.abs().amax(dim=(1, 3, 4)) > 0).all()
    assert all(weight.grad is None for weight in vae.parameters())


def test_autocast_changes_nothing_and_the_vae_keeps_its_precision(vae):
    given = latents(vae)
    expected = decode_features(vae, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(decode_features(vae, given), expected, strict=True))
    vae.to(torch.bfloat16)
    assert {features.dtype for features in decode_features(vae, given)} == {torch.bfloat16}
    vae.float()


def test_tiles_are_for_whole_frames_and_what_others_decode_is_undisturbed(vae):
    given = latents(vae)
    expected, video = decode_features(vae, given), decode_latents(vae, given)
    vae.enable_tiling(16, 16, 8, 8)
    assert all(torch.equal(*pair) for pair in zip(decode_features(vae, given), expected, strict=True))
    vae.use_tiling = False
    assert torch.equal(decode_latents(vae, given), video)
