from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from fake_cuda import FakeCuda
from peft import LoraConfig

from causal_wan.blocks import CausalConfig
from causal_wan.config.settings import MemoryConfig
from causal_wan.memory.levers import enable_gradient_checkpointing
from causal_wan.model.block_attention import block_causal_spans
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.weights.lora import add_lora


B, F, H, W, S = 2, 6, 4, 6, 7
TOKENS = (H // 2) * (W // 2)


def make(stock=None, **causal):
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()
    if stock is not None:
        model.load_state_dict(stock.state_dict())
    return model


@pytest.fixture
def stock():
    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY_TRANSFORMER).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(B, 4, F, H, W, generator=generator),
        "timestep": 1000 * torch.rand(B, F, generator=generator),
        "encoder_hidden_states": torch.randn(B, S, 16, generator=generator),
    }


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


@pytest.mark.parametrize("num_frame_per_block", [None, F, 100])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_one_block_is_the_stock_model_to_the_last_bit(stock, inputs, num_frame_per_block, autocast):
    timestep = torch.tensor([757.0, 3.0])
    model = make(stock, num_frame_per_block=num_frame_per_block)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(run(model, inputs, timestep=timestep), run(stock, inputs, timestep=timestep))


def test_timesteps_by_frame_equal_the_stock_timesteps_by_token(stock, inputs):
    by_token = inputs["timestep"].repeat_interleave(TOKENS, dim=1)
    expected = run(stock, inputs, timestep=by_token)
    torch.testing.assert_close(run(make(stock), inputs), expected)
    torch.testing.assert_close(run(make(stock), inputs, timestep=by_token), expected)


@pytest.mark.parametrize("num_frame_per_block", [1, 2, 3])
def test_changing_a_frame_leaves_every_earlier_block_bitwise_alone_and_reaches_every_later_one(
    stock, inputs, num_frame_per_block
):
    model = make(stock, num_frame_per_block=num_frame_per_block)
    before = run(model, inputs)
    for frame in range(F):
        changed = inputs["hidden_states"].clone()
        changed[:, :, frame] += 1
        after = run(model, inputs, hidden_states=changed)
        block_start = frame // num_frame_per_block * num_frame_per_block
        assert torch.equal(after[:, :, :block_start], before[:, :, :block_start])
        differs = (after != before).flatten(3).any(dim=-1).any(dim=1)  # (B, F)
        assert differs[:, block_start:].all()


def dense_mask(num_frame_per_block, local_attn_size, independent_first_frame=False):
    """The definition of Self Forcing's mask, frame by frame: kv < end(q), and kv >= end(q) - window."""
    offset = 1 if independent_first_frame else 0
    mask = torch.zeros(F, F, dtype=torch.bool)
    for query in range(F):
        if query < offset:
            end = offset
        else:
            end = ((query - offset) // num_frame_per_block + 1) * num_frame_per_block + offset
        for key in range(F):
            mask[query, key] = key < end and (local_attn_size == -1 or key >= end - local_attn_size)
    return mask


@pytest.mark.parametrize(
    ("per_block", "window", "first"), [(1, -1, False), (2, -1, False), (2, 4, False), (1, 2, False), (5, -1, True)]
)
def test_dense_calls_per_block_equal_attention_with_a_dense_mask(per_block, window, first):
    model = make(num_frame_per_block=per_block, local_attn_size=window, independent_first_frame=first)
    spans = block_causal_spans(model.block_lengths(F), TOKENS, window)
    mask = dense_mask(per_block, window, first).repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1)
    covered = torch.zeros_like(mask)
    for span in spans:
        covered[span.query_start : span.query_end, span.key_start : span.query_end] = True
    assert torch.equal(covered, mask)


def test_processes_share_a_clip_in_equal_parts_only_and_only_in_training(inputs):
    model = make()
    with pytest.raises(ValueError, match=r"num_attention_heads must be a multiple of the 3 processes .* got 2"):
        model.enable_context_parallel(SimpleNamespace(size=lambda: 3))
    model.enable_context_parallel(SimpleNamespace(size=lambda: 2))
    by_token = inputs["timestep"].repeat_interleave(TOKENS, dim=1)
    with pytest.raises(ValueError, match=r"the tokens of a timestep must be a multiple of the 2 processes .* got 1"):
        run(model.train(), inputs, timestep=by_token)
    run(model.eval(), inputs, timestep=by_token)


def rollout(model, inputs, block, num_frames=F, dtype=None):
    """Runs the blocks one by one; each is first written with other content, as the denoising steps do."""
    cache = model.make_cache(B, num_frames, H, W, dtype=dtype)
    outputs = []
    for start in range(0, num_frames, block):
        piece = {
            "hidden_states": inputs["hidden_states"][:, :, start : start + block],
            "timestep": inputs["timestep"][:, start : start + block],
            "encoder_hidden_states": inputs["encoder_hidden_states"],
            "cache": cache,
            "start_frame": start,
        }
        run(model, piece, hidden_states=torch.randn_like(piece["hidden_states"]))
        outputs.append(run(model, piece))
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize(("block", "window"), [(1, -1), (2, -1), (3, -1), (2, 4), (1, 3)])
def test_rollout_with_the_cache_equals_the_full_forward(stock, inputs, block, window):
    model = make(stock, num_frame_per_block=block, local_attn_size=window)
    torch.testing.assert_close(rollout(model, inputs, block), run(model, inputs))


@pytest.mark.parametrize("first", [0, 4, 1500])
def test_positions_beyond_the_rotary_table_are_those_of_a_larger_table(stock, inputs, first):
    small = CausalWanTransformer3DModel(**TINY_TRANSFORMER, rope_max_seq_len=3)
    large = CausalWanTransformer3DModel(**TINY_TRANSFORMER, rope_max_seq_len=first + F)
    whole_clip = torch.empty((1, 1, first + F, H, W), device="meta")
    tables = zip(small._rotary_emb(inputs["hidden_states"].shape[1:], first), large.rope(whole_clip), strict=True)
    for table, expected in tables:
        assert torch.equal(table, expected[:, first * TOKENS :])


def test_a_rollout_embeds_its_prompt_once_and_notices_another_one(stock, inputs):
    model = make(stock, num_frame_per_block=2)
    calls = []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    expected = rollout(model, inputs, 2)
    assert len(calls) == 1
    other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"] + 1}
    cache = model.make_cache(B, F, H, W)
    block = {"hidden_states": inputs["hidden_states"][:, :, :2], "timestep": inputs["timestep"][:, :2]}
    texts = (inputs["encoder_hidden_states"], other["encoder_hidden_states"])
    first, second = (run(model, {**block, "encoder_hidden_states": text}, cache=cache) for text in texts)
    torch.testing.assert_close(first, expected[:, :, :2])
    torch.testing.assert_close(second, rollout(model, other, 2)[:, :, :2])
    assert not torch.allclose(first, second)


def test_a_stock_transformer_turns_causal_with_its_own_layers(stock, inputs):
    expected = run(make(stock, num_frame_per_block=2), inputs)
    weights = dict(stock.named_parameters())
    stock.register_to_config(num_frame_per_block=3)
    causal = CausalWanTransformer3DModel.from_stock(stock)
    assert causal.config.num_frame_per_block == 3
    causal.set_causal_config(CausalConfig(num_frame_per_block=2))
    assert causal.causal_config == CausalConfig(num_frame_per_block=2)
    assert torch.equal(run(causal, inputs), expected)
    assert all(weight is weights[name] for name, weight in causal.named_parameters())
    causal.set_causal_config(CausalConfig(num_frame_per_block=2, local_attn_size=3, sink_size=1))
    assert causal.make_cache(1, 10, 4, 4).capacity == 3


def test_gradient_checkpointing_changes_no_gradient(stock, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make(stock, num_frame_per_block=2).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_under_teacher_forcing_a_noisy_frame_reaches_its_own_block_and_a_clean_one_all_later_blocks(stock, inputs):
    model, clean = make(stock, num_frame_per_block=2), inputs["hidden_states"].flip(2)
    before = run(model, inputs, context_latents=clean)
    for frame in range(F):
        start = frame // 2 * 2
        changed = {"hidden_states": inputs["hidden_states"].clone(), "context_latents": clean.clone()}
        for name, reached in (("hidden_states", range(start, start + 2)), ("context_latents", range(start + 2, F))):
            changed[name][:, :, frame] += 1
            after = run(model, {**inputs, "context_latents": clean}, **{name: changed[name]})
            differs = (after != before).transpose(1, 2).flatten(2).any(dim=-1)  # (B, F)
            assert differs.tolist() == [[number in reached for number in range(F)]] * B


def test_teacher_forcing_of_one_block_has_no_context_and_changes_nothing(stock, inputs):
    model, clean = make(stock), inputs["hidden_states"].flip(2)
    torch.testing.assert_close(run(model, inputs, context_latents=clean), run(model, inputs))


def test_under_teacher_forcing_gradients_flow_through_the_context_and_recomputing_changes_none(stock, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make(stock, num_frame_per_block=2).train()
        clean = inputs["hidden_states"].flip(2).requires_grad_()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs, context_latents=clean).sample[:, :, 2:].square().mean().backward()
        assert (clean.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).tolist() == [True] * (F - 2) + [False] * 2
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, checkpointed)


def test_teacher_forcing_goes_together_with_adapters_and_a_timestep_for_the_whole_clip(stock, inputs):
    model, clean = make(stock, num_frame_per_block=2), inputs["hidden_states"].flip(2)
    given = {"context_latents": clean, "timestep": torch.tensor([700.0, 20.0])}
    before = run(model, inputs, **given)
    by_frame = given["timestep"][:, None].expand(-1, F)
    assert torch.equal(run(model, inputs, **{**given, "timestep": by_frame}), before)
    assert torch.equal(run(model, inputs, **given, context_timestep=torch.zeros(B, F)), before)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_k", "ffn.net.2"], init_lora_weights=False))
    assert not torch.allclose(run(model, inputs, **given), before, atol=1e-3)
    torch.testing.assert_close(run(model, inputs, **given, attention_kwargs={"scale": 0.0}), before)


def test_weights_go_from_stock_to_causal_and_back(stock, inputs, tmp_path):
    stock.save_pretrained(tmp_path / "stock")
    causal = CausalWanTransformer3DModel.from_pretrained(tmp_path / "stock", num_frame_per_block=3)
    assert causal.config.num_frame_per_block == 3
    causal.save_pretrained(tmp_path / "causal")
    assert CausalWanTransformer3DModel.from_pretrained(tmp_path / "causal").config.num_frame_per_block == 3
    back = WanTransformer3DModel.from_pretrained(tmp_path / "causal")
    timestep = torch.tensor([500.0, 20.0])
    assert torch.equal(run(back.eval(), inputs, timestep=timestep), run(stock, inputs, timestep=timestep))


def test_lora_adapters_attach_and_scale(stock, inputs):
    model = make(stock, num_frame_per_block=2)
    before = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False))
    assert not torch.equal(run(model, inputs), before)
    torch.testing.assert_close(run(model, inputs, attention_kwargs={"scale": 0.0}), before)


def test_fused_projections_change_nothing_but_rounding(stock, inputs):
    model = make(stock, num_frame_per_block=2)
    before, rolled_out = run(model, inputs), rollout(model, inputs, 2)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model, inputs), before)
    torch.testing.assert_close(rollout(model, inputs, 2), rolled_out)


def test_image_embeddings_of_image_to_video_models_pass_through():
    torch.manual_seed(0)
    config = {**TINY_TRANSFORMER, "image_dim": 20, "added_kv_proj_dim": 48}
    stock = WanTransformer3DModel(**config).eval()
    causal = CausalWanTransformer3DModel(**config).eval()
    causal.load_state_dict(stock.state_dict())
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, H, W),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 5, 20),
    }
    assert torch.equal(run(causal, inputs), run(stock, inputs))


REAL_CONFIGS = {
    "WAN 2.1 1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "WAN 2.1 14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "WAN 2.2 5B": {
        "num_attention_heads": 24,
        "ffn_dim": 14336,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
}


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_real_models_have_the_stock_names_and_shapes(name):
    with torch.device("meta"):
        stock = WanTransformer3DModel(**REAL_CONFIGS[name])
        causal = CausalWanTransformer3DModel(**REAL_CONFIGS[name], num_frame_per_block=3)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (stock, causal)]
    assert shapes[0] == shapes[1]
    for parameter, _ in list(causal.named_parameters())[:3]:
        assert causal.get_parameter_or_buffer(parameter) is dict(causal.named_parameters())[parameter]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frame_per_block": 0}, "num_frame_per_block must be 1 or more"),
        ({"sink_size": -1}, "sink_size must be 0 or more"),
        ({"num_frame_per_block": 3, "local_attn_size": 2}, "local_attn_size must hold one block and the sink, 3"),
        ({"patch_size": (2, 2, 2)}, "patch_size must be 1 in time"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_wrong_inputs_are_refused(stock, inputs):
    with pytest.raises(ValueError, match="timestep must have shape"):
        run(make(stock), inputs, timestep=torch.zeros(B, F + 1))
    with pytest.raises(ValueError, match="use 4 or 8 latent frames"):
        run(make(stock, num_frame_per_block=4), inputs)
    clean, model = inputs["hidden_states"], make(stock, num_frame_per_block=2)
    with pytest.raises(
        ValueError, match=r"context_latents must have the shape of the noisy latents, .* got \(2, 4, 5,"
    ):
        run(model, inputs, context_latents=clean[:, :, 1:])
    with pytest.raises(
        ValueError, match=r"context_timestep must have shape \(B,\) or \(B, F\) with F=6 .* got \(3,\)"
    ):
        run(model, inputs, context_latents=clean, context_timestep=torch.zeros(3))
    with pytest.raises(ValueError, match="context_latents are for training"):
        run(model, inputs, context_latents=clean, cache=model.make_cache(B, F, H, W))


def kept_for_the_backward_pass(num_layers):
    """Types of the tensors of all tokens that a forward pass in bf16 keeps, layers recomputed."""
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER | {"num_layers": num_layers}, num_frame_per_block=1).train()
    enable_gradient_checkpointing(model, MemoryConfig(gradient_checkpointing=True))
    latents, embeds, kept = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 7, 16), []

    def keep(tensor):
        if tensor.numel() == 3 * 8 * 48:  # L D
            kept.append(tensor.dtype)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model(latents, torch.rand(1, 3), embeds)
    return Counter(kept)


def test_between_layers_nothing_is_kept_in_float32():
    few, many = kept_for_the_backward_pass(2), kept_for_the_backward_pass(5)
    assert few[torch.float32] == many[torch.float32]  # what the last norm has
    assert many[torch.bfloat16] - few[torch.bfloat16] == 3  # the input of each layer


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The host, or a GPU that is not there: autocast is not the same on both."""
    if request.param == "cpu":
        yield "cpu"
        return
    if torch.cuda.is_available():
        pytest.skip("stands for a GPU where there is none")
    with FakeCuda():
        yield "cuda"


@pytest.fixture
def attended(monkeypatch):
    """Queries, keys and values of each call of attention."""
    calls = []

    def attend(*states, **settings):
        calls.append(states)
        return dispatch_attention_fn(*states, **settings)

    monkeypatch.setattr("causal_wan.model.attention.dispatch_attention_fn", attend)
    return calls


def types_and_memory(calls):
    """Types of what attention is given, and how many memories hold its keys."""
    types = {states.dtype for call in calls for states in call}
    return types, len({key.untyped_storage()._cdata for _, key, _ in calls})


@pytest.mark.parametrize(
    ("weights", "autocast", "rank", "expected"),
    [
        (torch.float32, False, 0, torch.float32),
        (torch.float32, True, 0, torch.bfloat16),
        (torch.bfloat16, False, 0, torch.bfloat16),
        (torch.bfloat16, True, 2, torch.bfloat16),
        (torch.float64, False, 0, torch.float64),
    ],
    ids=["float32", "autocast", "sharded in 16 bits", "adapters on 16 bits", "float64"],
)
@pytest.mark.parametrize("teacher_forcing", [False, True], ids=["causal", "teacher-forcing"])
def test_attention_gets_one_type_and_the_keys_of_a_layer_once(
    inputs, attended, device, teacher_forcing, weights, autocast, rank, expected
):
    model = make(num_frame_per_block=2).to(device, weights)
    if rank:
        add_lora(model, rank=rank, alpha=rank, target_modules=["to_q", "to_k", "to_v"])
    inputs = {name: states.to(device) for name, states in inputs.items()}
    context = inputs["hidden_states"] if teacher_forcing else None
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        run(model, inputs, context_latents=context)
    types, num_memories = types_and_memory(attended)
    assert types == {expected}
    # Two noisy blocks have clean ones before them, which lie elsewhere: their keys are put together.
    assert num_memories == len(model.blocks) * (1 + 2 * teacher_forcing)


def test_a_rollout_under_autocast_attends_to_its_cache_without_copies(inputs, attended, device):
    model = make(num_frame_per_block=2).to(device)
    inputs = {name: states.to(device) for name, states in inputs.items()}
    with torch.autocast(device, torch.bfloat16):
        rollout(model, inputs, 2, dtype=torch.bfloat16)
    types, num_memories = types_and_memory(attended)
    assert types == {torch.bfloat16}
    assert len(attended) == 3 * 2 * 2 * len(model.blocks)  # blocks, passes, attention to the past and to the prompt
    assert num_memories == 2 * len(model.blocks)


def test_causal_settings_are_changed_all_or_some_alone():
    """As the code of a model card does."""
    model = CausalWanTransformer3DModel(**TINY_TRANSFORMER)
    model.set_causal_config(num_frame_per_block=3, local_attn_size=6)
    model.set_causal_config(sink_size=2)
    assert model.causal_config == CausalConfig(num_frame_per_block=3, local_attn_size=6, sink_size=2)
    model.set_causal_config(CausalConfig(num_frame_per_block=1))
    assert model.causal_config == CausalConfig(num_frame_per_block=1)
    with pytest.raises(ValueError, match="local_attn_size must hold"):
        model.set_causal_config(num_frame_per_block=7, local_attn_size=6)
