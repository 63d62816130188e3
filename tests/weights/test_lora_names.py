import json

import pytest
import torch
from conftest import ROOT, run_here
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from causal_wan.blocks import CausalConfig
from causal_wan.config.settings import DEFAULT_LORA_TARGETS
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.weights.lora import LORA_WEIGHTS_NAME, add_lora, load_lora, save_lora
from causal_wan.weights.lora_names import find_lora, lora_file, parse_lora, peft_config, read_lora
from causal_wan.weights.transformer import load_transformer


TINY_WAN = str(ROOT / "examples" / "sketch" / "tiny-wan")
FORMS = ("comfyui", "kohya", "original")
Q = "blocks.0.attn1.to_q"


def convert(*flags):
    run_here("convert_checkpoint.py", *flags)


def read(path):
    """Tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def pair(rank=2, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator)


def deltas(lora):
    """Module -> what it adds to the weight."""
    return {name: adapter.alpha / adapter.rank * adapter.up @ adapter.down for name, adapter in lora.items()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a LoRA run leaves: all common targets, rank 4 and alpha 6, nothing zero."""
    transformer = load_transformer(TINY_WAN, CausalConfig(num_frame_per_block=1))
    add_lora(transformer, rank=4, alpha=6, target_modules=DEFAULT_LORA_TARGETS)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(weight.shape, generator=generator) / 8
        for name, weight in transformer.named_parameters()
        if weight.requires_grad
    }
    folder = tmp_path_factory.mktemp("run")
    save_lora(transformer, weights, folder)
    return folder


@pytest.fixture
def uneven():
    """A LoRA whose modules differ in rank, alpha and dtype, some of them outside of layers."""
    state = {}
    modules = (Q, "blocks.11.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "proj_out", "condition_embedder.time_proj")
    for seed, module in enumerate(modules):
        down, up = pair(rank=seed // 2 + 1, seed=seed)
        dtype = torch.bfloat16 if seed % 2 else torch.float32
        state[f"transformer.{module}.lora_A.weight"] = down.to(dtype)
        state[f"transformer.{module}.lora_B.weight"] = up.to(dtype)
    alphas = {Q: 0.1, "blocks.1.ffn.net.0.proj": 1 / 3}  # no numbers of float32
    return parse_lora(state, {"r": 1, "lora_alpha": 2, "alpha_pattern": alphas})


@pytest.mark.parametrize("damage", ["wide", "long", "lost", "none", "whole", "empty"])
def test_a_lora_of_another_model_is_refused_and_changes_nothing(run_folder, tmp_path, damage):
    """Diffusers ends with a traceback of torch where shapes differ, and leaves out what has no place."""
    pipeline = CausalWanPipeline(None, None, None, None, load_transformer(TINY_WAN, None))
    state, _ = read(run_folder / LORA_WEIGHTS_NAME)
    down, up = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
    message = rf"1 of its {len(state)} weights find no place of their shape in it, first transformer\."
    if damage == "wide":
        state[down] = torch.zeros(4, state[down].shape[1] + 2)
    elif damage == "long":
        state[up] = torch.zeros(state[up].shape[0] + 2, 4)
    elif damage == "lost":
        state |= {name.replace("to_q", "add_q_proj"): state[name].clone() for name in (down, up)}
        message = rf"2 of its {len(state)} weights find no place"
    else:
        state = {"patch_embedding.weight": torch.zeros(1)} if damage == "none" else {}
        message = "lora must be files, folders or hub ids, but .* holds no LoRA"
    path = tmp_path / "lora.safetensors"
    if damage == "whole":
        path = f"{TINY_WAN}/transformer"
    elif damage == "empty":
        path = tmp_path
    else:
        save_file(state, path)
    with pytest.raises(ValueError, match=message):
        load_lora(pipeline, path)
    assert not pipeline.get_list_adapters()
    load_lora(pipeline, run_folder, weight_name=LORA_WEIGHTS_NAME)
    assert pipeline.get_list_adapters()["transformer"]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_files_of_a_run_go_to_every_form_and_back_bit_by_bit(run_folder, tmp_path, form):
    convert("--input", run_folder, "--output", tmp_path / "theirs.safetensors", "--to", form)
    convert("--input", tmp_path / "theirs.safetensors", "--output", tmp_path / "back-1.3b")
    state, metadata = read(run_folder / LORA_WEIGHTS_NAME)
    back, back_metadata = read(tmp_path / "back-1.3b" / LORA_WEIGHTS_NAME)
    assert same(back, state)
    before, after = (json.loads(data["lora_adapter_metadata"]) for data in (metadata, back_metadata))
    for name, value in after.items():
        if name != "transformer.target_modules":
            assert before[name] == value
    convert("--input", tmp_path / "back-1.3b", "--output", tmp_path / "again.safetensors", "--to", form)
    assert read(tmp_path / "again.safetensors")[1] == {"format": "pt"}
    assert same(load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "theirs.safetensors"))


def test_names_are_those_of_comfyui_and_kohya(run_folder, tmp_path):
    lora, _ = read_lora(run_folder / LORA_WEIGHTS_NAME)
    comfyui, kohya = (lora_file(lora, form)[0] for form in ("comfyui", "kohya"))
    assert {name for name in comfyui if "blocks.1." in name and "ffn" in name} == {
        f"diffusion_model.blocks.1.ffn.{layer}.{part}"
        for layer in (0, 2)
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert {name for name in kohya if "_1_cross_attn_o" in name} == {
        f"lora_unet_blocks_1_cross_attn_o.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert kohya["lora_unet_blocks_0_self_attn_q.alpha"] == 6


@pytest.mark.parametrize("form", FORMS)
def test_ranks_alphas_and_dtypes_of_every_module_are_kept(uneven, form):
    assert [adapter.alpha for adapter in uneven.values()] == [0.1, 2, 1 / 3, 2, 2]
    state, _ = lora_file(uneven, form)
    state, metadata = lora_file(parse_lora(state), "diffusers")
    config = json.loads(metadata["lora_adapter_metadata"])
    back = parse_lora(state, {name.removeprefix("transformer."): value for name, value in config.items()})
    assert list(back) == list(uneven)
    for module, adapter in uneven.items():
        assert (back[module].alpha, back[module].rank) == (adapter.alpha, adapter.rank)
        assert back[module].down.dtype == adapter.down.dtype
        assert torch.equal(back[module].down, adapter.down)
        assert torch.equal(back[module].up, adapter.up)


def test_where_nothing_tells_alpha_it_is_the_rank_and_comfyui_needs_none(tmp_path):
    down, up = pair(rank=3)
    lora = parse_lora({f"transformer.{Q}.lora_A.weight": down, f"transformer.{Q}.lora_B.weight": up})
    assert lora[Q].alpha == 3
    assert set(lora_file(lora, "comfyui")[0]) == {
        f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight" for part in ("down", "up")
    }
    assert lora_file(lora, "kohya")[0]["lora_unet_blocks_0_self_attn_q.alpha"] == 3


@pytest.mark.parametrize(
    "stem",
    (
        "transformer.blocks.0.attn1.to_q",
        "blocks.0.attn1.to_q",
        "diffusion_model.blocks.0.self_attn.q",
        "model.diffusion_model.blocks.0.self_attn.q",
        "blocks.0.self_attn.q",
        "lora_unet_blocks_0_self_attn_q",
        "lora_unet__blocks_0_self_attn_q",
    ),
)
@pytest.mark.parametrize(("down", "up"), (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default",) * 2))
def test_every_spelling_of_a_module_is_known(stem, down, up):
    up = up.replace("_A", "_B")
    one, other = pair()
    state = {f"{stem}.{down}.weight": one, f"{stem}.{up}.weight": other, f"{stem}.alpha": torch.tensor(8)}
    assert parse_lora(state)[Q].alpha == 8
    assert torch.equal(parse_lora(state)[Q].down, one)
    assert torch.equal(parse_lora(state)[Q].up, other)


def test_metadata_of_their_tools_are_kept_but_for_hashes(tmp_path):
    down, up = pair()
    stem = "lora_unet_blocks_0_self_attn_q"
    state = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "k.safetensors", metadata={"ss_tag": "a bird", "sshs_model_hash": "1", "format": "pt"})
    convert("--input", tmp_path / "k.safetensors", "--output", tmp_path / "new")
    metadata = read(tmp_path / "new" / LORA_WEIGHTS_NAME)[1]
    assert metadata.keys() == {"ss_tag", "format", "lora_adapter_metadata"}
    convert("--input", tmp_path / "new", "--output", tmp_path / "k2.safetensors", "--to", "kohya")
    assert read(tmp_path / "k2.safetensors")[1] == {"ss_tag": "a bird", "format": "pt"}
    assert same(load_file(tmp_path / "k2.safetensors"), state)


def test_adapters_of_peft_have_alpha_in_the_file_beside_them(tmp_path):
    down, up = pair()
    state = {
        f"base_model.model.blocks.0.attn1.to_q.lora_{part}.weight": weight
        for part, weight in zip("AB", (down, up), strict=True)
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"keeps alpha in adapter_config\.json, which is not there"):
        read_lora(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5, "peft_type": "LORA"}))
    lora, _ = read_lora(find_lora(tmp_path))
    assert lora[Q].alpha == 5


def test_rslora_goes_to_a_plain_alpha_of_the_same_scale():
    down, up = pair(rank=8)
    state = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    adapter = parse_lora(state, {"r": 8, "lora_alpha": 5, "use_rslora": True})[Q]
    assert adapter.alpha / 8 == 5 / 8**0.5


# --- what diffusers makes of them ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(pipeline_class, lora):
    """Velocity of the pipeline's transformer with the LoRA in it."""
    pipeline = pipeline_class.from_pretrained(TINY_WAN)
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, transformer.config.in_channels, 3, 4, 4, generator=generator)
    embeds = torch.randn(1, 5, transformer.config.text_dim, generator=generator)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    return transformer(latents, torch.tensor([500.0]), embeds, return_dict=False)[0]


@pytest.mark.parametrize("pipeline_class", (CausalWanPipeline, WanPipeline))
@pytest.mark.parametrize("form", ("comfyui", "kohya"))
def test_a_converted_lora_does_what_it_did(run_folder, tmp_path, pipeline_class, form):
    convert("--input", run_folder, "--output", tmp_path / "theirs.safetensors", "--to", form)
    convert("--input", tmp_path / "theirs.safetensors", "--output", tmp_path / "ours")
    plain = sample(pipeline_class, None)
    before = sample(pipeline_class, run_folder / LORA_WEIGHTS_NAME)
    assert (before - plain).abs().max() > 0.01
    assert torch.equal(sample(pipeline_class, tmp_path / "ours" / LORA_WEIGHTS_NAME), before)
    # diffusers converts the file by itself as well, but scales the weights by alpha / rank.
    torch.testing.assert_close(sample(pipeline_class, tmp_path / "theirs.safetensors"), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ("comfyui", "kohya"))
def test_diffusers_reads_the_same_change_of_weights(run_folder, tmp_path, form):
    lora, _ = read_lora(run_folder / LORA_WEIGHTS_NAME)
    expected = deltas(lora)  # before diffusers, which scales in place
    converted = deltas(parse_lora(WanPipeline.lora_state_dict(lora_file(lora, form)[0])))
    assert expected.keys() == converted.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(converted[module], delta)


def test_modules_outside_of_layers_are_read_by_diffusers_at_scale_one():
    state = {}
    for module in (Q, "proj_out", "condition_embedder.time_proj", "condition_embedder.text_embedder.linear_2"):
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = pair()
    lora = parse_lora(state)
    theirs = parse_lora(WanPipeline.lora_state_dict(lora_file(lora, "comfyui")[0]))
    assert theirs.keys() == lora.keys()


def test_uneven_ranks_and_alphas_reach_the_layers(tmp_path):
    transformer = load_transformer(TINY_WAN, CausalConfig(num_frame_per_block=1))
    state = {}
    for seed, name in enumerate((Q, "blocks.1.attn1.to_q", "blocks.1.ffn.net.2", "proj_out")):
        layer = transformer.get_submodule(name)
        state[f"transformer.{name}.lora_A.weight"] = pair(seed + 1, layer.in_features)[0]
        state[f"transformer.{name}.lora_B.weight"] = pair(seed + 1, layer.out_features)[1]
    lora = parse_lora(state, {"lora_alpha": 3, "alpha_pattern": {r"blocks\.1\..*": 0.7}})
    weights, metadata = lora_file(lora, "diffusers")
    save_file(weights, tmp_path / LORA_WEIGHTS_NAME, metadata=metadata)
    transformer.load_lora_adapter(str(tmp_path), weight_name=LORA_WEIGHTS_NAME, prefix="transformer")
    for name, adapter in lora.items():
        layer = transformer.get_submodule(name)
        assert list(layer.scaling.values()) == [adapter.alpha / adapter.rank]
        assert torch.equal(layer.lora_A["default_0"].weight, adapter.down)
    assert peft_config(lora)["alpha_pattern"]


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = dict(zip((f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight" for part in "AB"), pair(), strict=True))
STEM = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({f"{STEM}.diff_b": torch.ones(4)}, rf"1 of 3 keys are changes of whole .*, first {STEM}\.diff_b"),
        ({"diffusion_model.blocks.0.norm3.diff": torch.ones(4)}, r"first diffusion_model\.blocks\.0\.norm3\.diff"),
        ({"lora_te_x.lora_up.weight": torch.ones(4)}, r"1 of 3 keys have others, first lora_te_x\.lora_up"),
        ({"lora_unet_blocks_0_self_attn_q_img.alpha": torch.ones(1)}, "first lora_unet_blocks_0_self_attn_q_img"),
        ({f"{STEM}.dora_scale": torch.ones(4)}, "first .*dora_scale"),
        ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4)}, "first transformer_2"),
        ({f"transformer.{Q}.lora_A.weight": torch.ones(4)}, rf"down of {Q} once"),
        (
            {"lora_unet_blocks_0_ffn_0.lora_up.weight": torch.ones(4, 1)},
            r"down of blocks\.0\.ffn\.net\.0\.proj is",
        ),
        ({f"{STEM}.alpha": torch.ones(2)}, r"one number, got \(2,\)"),
        ({f"{STEM}.alpha": torch.zeros(())}, r"finite number other than 0, got 0\.0"),
        ({f"{STEM}.lora_B.weight": torch.ones(4, 3)}, r"got \(2, 4\) and \(4, 3\)"),
    ),
)
def test_what_cannot_be_kept_is_refused_by_name(more, message):
    with pytest.raises(ValueError, match=message):
        parse_lora({**GOOD, **more})


def test_two_alphas_are_refused_if_they_differ():
    state = {**GOOD, f"{STEM}.alpha": torch.tensor(3.0)}
    assert parse_lora(state, {"lora_alpha": 3})["blocks.0.attn1.to_q"].alpha == 3
    with pytest.raises(ValueError, match=r"is 3\.0 in the file and 4 in metadata"):
        parse_lora(state, {"lora_alpha": 4})


def test_the_script_refuses_what_it_cannot_write(run_folder, tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit):
            convert(*flags)
        return capsys.readouterr().err

    save_file({"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.ones(2)}, tmp_path / "i2v.safetensors")
    assert "first diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight" in refused(
        "--input", tmp_path / "i2v.safetensors", "--output", tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()
    wrong = refused("--input", run_folder, "--output", tmp_path / "new.pt", "--to", "comfyui")
    assert "output must be a new file that ends in .safetensors" in wrong
    assert "must be a new folder" in refused("--input", run_folder, "--output", run_folder)
    whole = refused("--input", TINY_WAN, "--output", tmp_path / "new.safetensors", "--to", "kohya")
    assert "--to kohya must be of a LoRA" in whole
