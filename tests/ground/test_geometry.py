import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import AutoencoderKLWan

from causal_wan.geometry import WAN, LatentGeometry
from causal_wan.model.conditions import Conditions
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import check_video_size, decode_latents, encode_videos
from causal_wan.sampling.pipeline import CausalWanPipeline


WAN_2_2 = LatentGeometry(channels=48, spatial_factor=16, frame_rate=24)  # of the 5B


@pytest.fixture
def pipeline():
    """A tiny model of the geometry of WAN 2.2 5B: its VAE makes patches of pixels, and halves three times."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        scale_factor_spatial=16,
    )
    architecture = {**TINY_TRANSFORMER, "in_channels": 48, "out_channels": 48}
    transformer = CausalWanTransformer3DModel(**architecture, num_frame_per_block=1).eval()
    parts = {"tokenizer": None, "text_encoder": None, "scheduler": None}
    pipeline = CausalWanPipeline(**parts, vae=vae.eval(), transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_latents_and_tokens_are_those_of_the_models_themselves(pipeline):
    geometry = pipeline.geometry
    assert geometry == WAN_2_2
    shape = geometry.latent_shape(9, 64, 96)
    assert shape == (48, 3, 4, 6)
    latents = encode_videos(pipeline.vae, torch.zeros(1, 3, 9, 64, 96))
    assert latents.shape[1:] == shape
    assert decode_latents(pipeline.vae, latents).shape[2:] == (geometry.num_frames(3), 64, 96)
    tokens = []
    pipeline.transformer.blocks[0].register_forward_pre_hook(lambda layer, inputs: tokens.append(inputs[0].shape))
    conditions = Conditions(prompt_embeds=torch.zeros(1, 7, 16))
    with torch.no_grad():
        pipeline.transformer(latents, torch.zeros(1), **conditions.arguments())
    assert tokens == [(1, geometry.num_tokens(shape), 48)] == [(1, 18, 48)]


def test_a_pipeline_samples_in_the_geometry_of_its_checkpoint(pipeline):
    size = {"num_frames": 9, "height": 64, "width": 96}
    assert pipeline.draw_noise(1, **size).shape == (3, 1, 48, 3, 4, 6)
    video = pipeline(prompt_embeds=torch.zeros(1, 7, 16), output_type="pt", **size).frames
    assert video.shape == (1, 9, 3, 64, 96)


def test_noise_has_the_channels_that_come_out_however_many_go_in():
    transformer = CausalWanTransformer3DModel(**{**TINY_TRANSFORMER, "in_channels": 8}, num_frame_per_block=1)
    parts = dict.fromkeys(("tokenizer", "text_encoder", "scheduler", "vae"))
    noise = CausalWanPipeline(**parts, transformer=transformer).draw_noise(1, num_frames=9, height=64, width=96)
    assert noise.shape[2] == transformer.config.out_channels == 4


def test_sizes_are_checked_against_the_checkpoint_once_it_is_there(pipeline):
    parts = {"vae": pipeline.vae, "transformer": pipeline.transformer}
    check_video_size(9, 64, 96, **parts)
    with pytest.raises(ValueError, match="height must be a multiple of 32 for this checkpoint, got 48; use 32 or 64"):
        check_video_size(9, 48, 96, **parts)
    with pytest.raises(ValueError, match="num_frames must be 4k \\+ 1 for the WAN VAE, got 8; use 5 or 9"):
        check_video_size(8, 64, 96, **parts)


def test_configs_that_say_nothing_are_those_of_wan_2_1():
    assert LatentGeometry.of({}, {}) == LatentGeometry.of({"z_dim": 16}) == WAN
    assert WAN.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert WAN.num_tokens((16, 21, 60, 104)) == 21 * 30 * 52
    assert WAN.size_multiples == (16, 16)
    assert (WAN.frame_rate, WAN_2_2.size_multiples) == (16, (32, 32))


def test_frames_and_latent_frames_are_each_others_inverse():
    assert [WAN.num_latent_frames(frames) for frames in (1, 4, 5, 8, 9, 81)] == [1, 1, 2, 2, 3, 21]
    assert [WAN.num_frames(latents) for latents in (0, 1, 2, 21)] == [0, 1, 5, 81]


@pytest.mark.parametrize(
    ("num_frames", "advice"), [(0, "use 1 or 5"), (-7, "use 1 or 5"), (80, "use 77 or 81"), (82, "use 81 or 85")]
)
def test_the_nearest_numbers_of_frames_are_named(num_frames, advice):
    with pytest.raises(ValueError, match=rf"num_frames must be 4k \+ 1 for the WAN VAE, got {num_frames}; {advice}"):
        WAN.check_num_frames(num_frames)
