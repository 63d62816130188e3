import pickle

import pytest
import torch
from conftest import TINY_TRANSFORMER, run_here
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from causal_wan.blocks import CausalConfig
from causal_wan.weights.transformer import check_generator_ckpt, load_transformer
from causal_wan.weights.wan_names import infer_architecture, read_state, strip_prefixes, to_diffusers, to_original


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY_TRANSFORMER)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_weight_has_a_name_of_wan_s_own_and_comes_back(transformer):
    state = transformer.state_dict()
    original = to_original(state)
    assert len(original) == len(state)
    assert "blocks.0.self_attn.q.weight" in original
    assert "blocks.1.modulation" in original
    assert "head.modulation" in original
    assert not original.keys() & {name for name in state if "attn" in name}
    assert same(to_diffusers(original), state)


def test_names_are_those_that_diffusers_reads(transformer):
    converted = convert_wan_transformer_to_diffusers(to_original(transformer.state_dict()))
    assert same(converted, transformer.state_dict())


@pytest.mark.parametrize(
    "prefix",
    ("", "model.", "model._fsdp_wrapped_module.", "module.model.", "_orig_mod.", "model.diffusion_model."),
)
def test_prefixes_of_wrappers_and_containers_are_passed_over(transformer, prefix):
    state = transformer.state_dict()
    for names in (state, to_original(state)):
        prefixed = {prefix + name: weight for name, weight in names.items()}
        assert same(to_diffusers(prefixed), state)
    nested = {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): weight for name, weight in state.items()}
    assert same(strip_prefixes(nested), state)


def test_the_architecture_follows_from_the_shapes(transformer):
    config = infer_architecture(transformer.state_dict(), attention_head_dim=24)
    assert all(config[name] == value for name, value in TINY_TRANSFORMER.items())
    assert WanTransformer3DModel(**config).load_state_dict(transformer.state_dict())
    with pytest.raises(ValueError, match="multiple of its attention_head_dim, got 48 and 128"):
        infer_architecture(transformer.state_dict())


def test_other_weights_are_refused_with_the_first_names(transformer):
    state = {**to_original(transformer.state_dict()), "img_emb.proj.0.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"1 of \d+ have others, first img_emb.proj.0.weight"):
        to_diffusers(state)
    with pytest.raises(ValueError, match="none at all"):
        to_diffusers({})
    with pytest.raises(ValueError, match=r"lack 'proj_out\.weight'"):
        infer_architecture({k: v for k, v in transformer.state_dict().items() if "proj_out" not in k}, 24)


def test_checkpoints_of_self_forcing_are_read_average_first(transformer, tmp_path):
    state = to_original(transformer.state_dict())
    average = {name: weight + 1 for name, weight in state.items()}
    torch.save({"generator": state, "generator_ema": average, "critic": {}}, tmp_path / "model.pt")
    assert same(read_state(tmp_path / "model.pt"), average)
    assert same(read_state(tmp_path / "model.pt", average=False), state)
    torch.save(state, tmp_path / "bare.pt")
    assert same(read_state(tmp_path / "bare.pt"), state)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"generator": Evil()}))
    torch.save({"generator": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="must be a torch checkpoint that holds tensors alone"):
            read_state(tmp_path / name)
    torch.save({"generator": {}, "args": tmp_path}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match=r"but it holds objects too \(pathlib\.PosixPath\); save its weights by name"):
        read_state(tmp_path / "objects.pt")
    torch.save({"step": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must hold weights by name"):
        read_state(tmp_path / "other.pt")


# --- the script ------------------------------------------------------------------------------------------------------


def convert(*flags):
    run_here("convert_checkpoint.py", *flags, "--attention_head_dim", 24)


def test_files_go_to_diffusers_and_back_bit_by_bit(transformer, tmp_path):
    state = transformer.state_dict()
    torch.save({"generator": {f"model.{n}": w for n, w in to_original(state).items()}}, tmp_path / "theirs.pt")
    convert("--input", tmp_path / "theirs.pt", "--output", tmp_path / "ours")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "ours" / "transformer")
    assert same(loaded.state_dict(), state)
    run_here(
        "convert_checkpoint.py", "--input", tmp_path / "ours", "--output", tmp_path / "by-config"
    )  # a config says it
    again = WanTransformer3DModel.from_pretrained(tmp_path / "by-config" / "transformer")
    assert same(again.state_dict(), state)
    assert again.config.attention_head_dim == 24
    convert("--input", tmp_path / "ours", "--output", tmp_path / "back.pt", "--to", "original")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["generator"]
    assert same(back, {f"model.{name}": weight for name, weight in to_original(state).items()})
    convert("--input", tmp_path / "back.pt", "--output", tmp_path / "wan.safetensors", "--to", "original")
    assert same(load_file(tmp_path / "wan.safetensors"), to_original(state))
    convert("--input", tmp_path / "wan.safetensors", "--output", tmp_path / "comfy.safetensors", "--to", "comfyui")
    assert all(name.startswith("diffusion_model.") for name in load_file(tmp_path / "comfy.safetensors"))
    convert("--input", tmp_path / "comfy.safetensors", "--output", tmp_path / "again")
    assert same(WanTransformer3DModel.from_pretrained(tmp_path / "again" / "transformer").state_dict(), state)


def test_files_that_fit_nothing_are_refused(tmp_path, capsys):
    save_file({"encoder.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        convert("--input", tmp_path / "other.safetensors", "--output", tmp_path / "new")
    assert "first encoder.weight" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_student_starts_from_a_checkpoint_of_self_forcing(checkpoint, tmp_path):
    base = load_transformer(str(checkpoint), CausalConfig(num_frame_per_block=1))
    changed = {name: weight + 1 for name, weight in base.state_dict().items()}
    theirs = {f"model.{name}": weight for name, weight in to_original(changed).items()}
    torch.save({"generator": theirs}, tmp_path / "theirs.pt")
    check_generator_ckpt(str(tmp_path / "theirs.pt"))
    student = load_transformer(
        str(checkpoint), CausalConfig(num_frame_per_block=1), generator_ckpt=str(tmp_path / "theirs.pt")
    )
    assert same(student.state_dict(), changed)
    torch.save({"generator": {**theirs, "critic.weight": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="keys are unexpected, first "):
        load_transformer(
            str(checkpoint), CausalConfig(num_frame_per_block=1), generator_ckpt=str(tmp_path / "other.pt")
        )
