"""What is saved of a transformer is what it is, whatever it was when it was made."""

import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import WanTransformer3DModel

from causal_wan.blocks import CausalConfig
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.weights.transformer import save_transformer


# Of each field another value than its default; what they need beside.
CHANGES = {
    "num_frame_per_block": {"num_frame_per_block": 3},
    "local_attn_size": {"local_attn_size": 4},
    "sink_size": {"sink_size": 2},
    "independent_first_frame": {"independent_first_frame": True},
}


def saved_config(transformer, folder):
    save_transformer(transformer, transformer.state_dict(), folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("field", [field.name for field in fields(CausalConfig)])
def test_a_causal_setting_that_was_changed_is_saved_as_it_is(field, tmp_path):
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER)
    transformer.set_causal_config(replace(transformer.causal_config, **CHANGES[field]))
    assert saved_config(transformer, tmp_path)[field] == CHANGES[field][field]
    loaded = CausalWanTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.causal_config == transformer.causal_config


def test_every_setting_is_saved_as_it_is(tmp_path):
    made_with = {name: size for name, size in TINY_TRANSFORMER.items() if "channels" not in name}
    transformer = CausalWanTransformer3DModel(**made_with, num_frame_per_block=3)
    patches = transformer.patch_embedding
    kernel, stride = patches.kernel_size, patches.stride
    transformer.patch_embedding = torch.nn.Conv3d(32, patches.out_channels, kernel, stride)  # takes controls beside
    transformer.register_to_config(in_channels=32, eps=1e-5, rope_max_seq_len=64)
    config = saved_config(transformer, tmp_path)
    own = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    assert {name: config[name] for name in own} == json.loads(json.dumps(own))
    assert (config["in_channels"], config["eps"], config["rope_max_seq_len"]) == (32, 1e-5, 64)
    assert CausalWanTransformer3DModel.from_pretrained(tmp_path).patch_embedding.in_channels == 32


def test_a_stock_transformer_turns_causal_with_the_settings_that_it_has_by_then():
    stock = WanTransformer3DModel(**TINY_TRANSFORMER)
    stock.register_to_config(eps=1e-5)
    assert CausalWanTransformer3DModel.from_stock(stock).config.eps == 1e-5
