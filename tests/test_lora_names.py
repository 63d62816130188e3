"""LoRA files, from everybody's names to everybody's, bit by bit; and as diffusers reads them itself."""

import pytest
import torch
from conftest import run_here
from diffusers import WanPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_musubi_wan_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from causal_wan.lora_names import read_lora
from causal_wan.models import add_lora, load_transformer, save_lora
from causal_wan.pipeline import CausalWanPipeline


SCRIPT = "convert_checkpoint.py"
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


@pytest.fixture
def source(checkpoint, tmp_path):
    """The output folder of a LoRA run: rank 4, alpha 6."""
    transformer = load_transformer(checkpoint, num_frame_per_block=1)
    add_lora(transformer, rank=4, alpha=6, target_modules=MODULES)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) for name, weight in transformer.named_parameters() if "lora_" in name}
    save_lora(transformer, weights, tmp_path / "run")
    return tmp_path / "run"


def convert(source, output, names):
    run_here(SCRIPT, "--input", source, "--output", output, "--to", names)
    return output


def same(one, other):
    assert one.alphas == other.alphas
    for ours, theirs in ((one.down, other.down), (one.up, other.up)):
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(weight, theirs[name]) and weight.dtype == theirs[name].dtype for name, weight in ours.items()
        )
    return True


@pytest.mark.parametrize("names", ["comfyui", "original", "kohya"])
def test_there_and_back_changes_no_bit(source, names, tmp_path):
    file = source / "pytorch_lora_weights.safetensors"
    there = convert(source, tmp_path / "there.safetensors", names)
    back = convert(there, tmp_path / "back", "diffusers") / "pytorch_lora_weights.safetensors"
    assert set(read_lora(file).alphas.values()) == {6.0}
    assert same(read_lora(file), read_lora(there))
    assert same(read_lora(file), read_lora(back))
    expected, found = load_file(file), load_file(back)
    assert expected.keys() == found.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_the_others_names_are_theirs(source, tmp_path):
    comfyui = load_file(convert(source, tmp_path / "a.safetensors", "comfyui"))
    assert "diffusion_model.blocks.0.self_attn.q.lora_down.weight" in comfyui
    assert "diffusion_model.blocks.1.ffn.2.lora_up.weight" in comfyui
    assert comfyui["diffusion_model.blocks.0.cross_attn.o.alpha"] == 6
    kohya = load_file(convert(source, tmp_path / "b.safetensors", "kohya"))
    assert "lora_unet_blocks_0_self_attn_q.lora_down.weight" in kohya
    assert kohya["lora_unet_blocks_1_ffn_0.alpha"] == 6
    assert len(kohya) == len(comfyui)


@pytest.mark.parametrize("names", ["comfyui", "kohya"])
def test_diffusers_own_reading_of_the_others_gives_the_same_update(source, names, tmp_path):
    state = load_file(convert(source, tmp_path / "a.safetensors", names))
    reader = (
        _convert_non_diffusers_wan_lora_to_diffusers if names == "comfyui" else _convert_musubi_wan_lora_to_diffusers
    )
    theirs, lora = reader(state), read_lora(source / "pytorch_lora_weights.safetensors")
    for module, down in lora.down.items():
        update = 6 / 4 * lora.up[module] @ down
        found = theirs[f"transformer.{module}.lora_B.weight"] @ theirs[f"transformer.{module}.lora_A.weight"]
        torch.testing.assert_close(found, update)


def sample(checkpoint, lora, pipeline_class=CausalWanPipeline):
    pipeline = pipeline_class.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    steps = {} if pipeline_class is CausalWanPipeline else {"num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a ball", num_frames=9, height=32, width=48, generator=generator, output_type="latent", **steps
    ).frames


@pytest.mark.parametrize("pipeline_class", [CausalWanPipeline, WanPipeline])
def test_pipelines_sample_the_same_with_a_lora_that_went_there_and_back(checkpoint, source, pipeline_class, tmp_path):
    there = convert(source, tmp_path / "there.safetensors", "kohya")
    back = convert(there, tmp_path / "back", "diffusers")
    expected = sample(checkpoint, source, pipeline_class)
    assert torch.equal(sample(checkpoint, back, pipeline_class), expected)
    assert not torch.allclose(sample(checkpoint, None, pipeline_class), expected, atol=1e-3)


def test_ranks_and_alphas_by_module_survive(checkpoint, tmp_path):
    transformer = load_transformer(checkpoint, num_frame_per_block=1)
    patterns = {"rank_pattern": {"blocks.0.attn1.to_q": 2}, "alpha_pattern": {"to_k": 3, "blocks.1.ffn.net.2": 10}}
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "ffn.net.2"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **patterns)
    transformer.add_adapter(config)
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()}
    WanPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer), **metadata)
    there = convert(tmp_path / "lora", tmp_path / "there.safetensors", "comfyui")
    lora = read_lora(there)
    assert lora.down["blocks.0.attn1.to_q"].shape[0] == 2
    assert lora.alphas["blocks.0.attn1.to_q"] == 8
    assert lora.alphas["blocks.1.attn2.to_k"] == 3
    assert lora.alphas["blocks.1.ffn.net.2"] == 10
    back = convert(there, tmp_path / "back", "diffusers")
    assert torch.equal(sample(checkpoint, back), sample(checkpoint, tmp_path / "lora"))


def test_a_scale_of_1_needs_no_alpha(source, tmp_path):
    state = {
        name: weight
        for name, weight in load_file(convert(source, tmp_path / "a.safetensors", "comfyui")).items()
        if not name.endswith(".alpha")
    }
    save_file(state, tmp_path / "plain.safetensors")
    assert set(read_lora(tmp_path / "plain.safetensors").alphas.values()) == {4.0}
    back = convert(tmp_path / "plain.safetensors", tmp_path / "b", "diffusers")
    again = load_file(convert(back, tmp_path / "c.safetensors", "comfyui"))
    assert again.keys() == state.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"diffusion_model.blocks.0.norm3.diff_b": 1},
            "1 of 31 names are others, first diffusion_model.blocks.0.norm3",
        ),
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": 1}, "self_attn.q.dora_scale"),
        ({"diffusion_model.blocks.0.self_attn.x.lora_down.weight": 1}, "self_attn.x.lora_down.weight"),
        ({"lora_unet_blocks_0_nowhere.alpha": 1}, "lora_unet_blocks_0_nowhere.alpha"),
        ({"diffusion_model.head.head.lora_down.weight": 1}, r"proj_out \(one of its two weights alone\)"),
    ],
)
def test_what_is_no_lora_of_wan_is_refused_by_name(source, changes, message, tmp_path, capsys):
    state = load_file(convert(source, tmp_path / "a.safetensors", "comfyui"))
    state = dict(list(state.items())[:30])
    save_file({**state, **{name: torch.zeros(1) for name in changes}}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "b.safetensors")
    with pytest.raises(SystemExit):
        convert(tmp_path / "b.safetensors", tmp_path / "c", "diffusers")
    assert not (tmp_path / "c").exists()


def test_whole_weights_have_no_kohya_names(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(checkpoint, tmp_path / "a.safetensors", "kohya")
    assert "kohya has names for LoRAs only" in capsys.readouterr().err
