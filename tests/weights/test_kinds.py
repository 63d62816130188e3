"""Which checkpoints of the WAN family a student can start from: told by configs, before anything is loaded."""

import pytest

from causal_wan.weights.kinds import check_kind, check_weights


# Of the published checkpoints: transformer, VAE, model_index.
T2V = {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16, "image_dim": None}
WAN_21, WAN_22 = {"z_dim": 16}, {"z_dim": 48}
EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
TI2V_5B = T2V | {"in_channels": 48, "out_channels": 48}
I2V_14B = T2V | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
VACE = T2V | {"_class_name": "WanVACETransformer3DModel", "vace_layers": [0, 2], "vace_in_channels": 96}


@pytest.mark.parametrize(
    ("transformer", "vae", "pipeline"),
    [
        (T2V, WAN_21, {"transformer_2": [None, None], "boundary_ratio": None}),
        (T2V | {"_class_name": "CausalWanTransformer3DModel"}, WAN_21, None),
        (TI2V_5B, WAN_22, {"expand_timesteps": True}),
        (T2V, None, None),  # weights without their VAE
    ],
)
def test_text_to_video_checkpoints_of_wan_are_taken(transformer, vae, pipeline):
    check_kind("base", transformer, vae, pipeline)


@pytest.mark.parametrize(
    ("transformer", "vae", "pipeline", "message"),
    [
        (T2V, WAN_21, EXPERTS, "two experts"),
        (VACE, WAN_21, None, "VACE"),
        (VACE | {"_class_name": "WanTransformer3DModel"}, WAN_21, None, "VACE"),  # read as another class
        (I2V_14B, WAN_21, None, "image-to-video model that sees its picture"),
        (T2V | {"in_channels": 36}, WAN_21, EXPERTS, "two experts"),
        (T2V | {"in_channels": 48}, WAN_21, None, "48 input and 16 output channels"),
        (T2V | {"_class_name": "WanAnimateTransformer3DModel"}, WAN_21, None, "Animate"),
        (T2V | {"_class_name": "LTXVideoTransformer3DModel"}, WAN_21, None, "a LTXVideoTransformer3DModel"),
        (T2V, WAN_22, None, "same latent channels, but have 16 and 48"),
    ],
)
def test_other_checkpoints_are_refused_for_what_they_are(transformer, vae, pipeline, message):
    with pytest.raises(ValueError, match=message):
        check_kind("base", transformer, vae, pipeline)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "whole weights, but is a LoRA, .* BASE --lora some.pt"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "whole weights, but is a LoRA"),
        ("model.diffusion_model.blocks.0.ffn.0.scale_weight", "but has them scaled to 8 bits"),
        ("scaled_fp8", "but has them scaled to 8 bits"),
    ],
)
def test_files_that_are_no_plain_weights_are_refused_for_what_they_are(name, message):
    shapes = {"blocks.0.ffn.0.weight": (8, 8)}
    check_weights("some.pt", shapes)
    with pytest.raises(ValueError, match=f"some.pt must .*{message}"):
        check_weights("some.pt", shapes | {name: (2,)})
