"""Control videos in the transformer: input channels that begin as zeros, block by block as all else."""

import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import WanTransformer3DModel

from causal_wan.model.conditions import Conditions
from causal_wan.model.control import widen_for_controls, with_control_names
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.rollout import SamplingSchedule, roll_out
from causal_wan.weights.kinds import check_kind
from causal_wan.weights.lora import add_lora, save_lora
from causal_wan.weights.transformer import load_transformer, save_transformer


B, C, F, H, W = 2, 4, 6, 4, 6
NAMES = ["outline", "depth"]
LEVELS = torch.tensor([1000.0, 400.0])
BLOCKS = [(1, False), (2, False), (3, False), (5, True)]


def make_base(**causal):
    torch.manual_seed(0)
    return CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()


def make_student(**causal):
    """A transformer with controls whose weights are no zeros."""
    transformer = make_base(**causal)
    widen_for_controls(transformer, NAMES)
    with torch.no_grad():
        transformer.patch_embedding.weight[:, C:] = torch.randn(transformer.patch_embedding.weight[:, C:].shape)
    return transformer


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(B, C, F, H, W, generator=generator),
        "timestep": 1000 * torch.rand(B, F, generator=generator),
        "encoder_hidden_states": torch.randn(B, 7, 16, generator=generator),
    }


@pytest.fixture
def controls():
    return torch.randn(B, 2 * C, F, H, W, generator=torch.Generator().manual_seed(2))


# --- widening --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_widened_transformer_begins_as_its_base_to_the_bit(inputs, controls):
    transformer = make_base(num_frame_per_block=2)
    expected = transformer(**inputs).sample
    widen_for_controls(transformer, NAMES)
    assert torch.equal(transformer(**inputs).sample, expected)
    assert torch.equal(transformer(**inputs, control_latents=controls).sample, expected)


def test_its_new_weights_learn_from_the_first_step(inputs, controls):
    transformer = make_base(num_frame_per_block=2)
    widen_for_controls(transformer, NAMES)
    transformer(**inputs, control_latents=controls).sample.square().sum().backward()
    gradient = transformer.patch_embedding.weight.grad
    old, new = gradient[:, :C].norm(), gradient[:, C:].norm()
    assert 0.1 < new / old < 10


@torch.no_grad()
def test_absent_controls_are_zeros_and_their_order_counts(inputs, controls):
    transformer = make_student(num_frame_per_block=2)
    without = transformer(**inputs).sample
    assert torch.equal(transformer(**inputs, control_latents=torch.zeros_like(controls)).sample, without)
    given = transformer(**inputs, control_latents=controls).sample
    swapped = transformer(**inputs, control_latents=controls.roll(C, dims=1)).sample
    assert not torch.allclose(given, without, atol=1e-3)
    assert not torch.allclose(given, swapped, atol=1e-3)


@torch.no_grad()
def test_a_student_with_controls_is_saved_and_loaded_by_this_class_and_by_the_stock_one(inputs, controls, tmp_path):
    transformer = make_student(num_frame_per_block=2)
    save_transformer(transformer, transformer.state_dict(), tmp_path / "transformer")
    again = load_transformer(str(tmp_path), None, control_names=NAMES)
    assert list(again.config.control_names) == NAMES
    assert again.config.in_channels == 3 * C
    given = {**inputs, "control_latents": controls}
    assert torch.equal(again(**given).sample, transformer(**given).sample)
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "transformer")
    assert stock.patch_embedding.weight.shape == transformer.patch_embedding.weight.shape
    with pytest.raises(ValueError, match="takes already, in their order, outline depth, got depth outline"):
        load_transformer(str(tmp_path), None, control_names=NAMES[::-1])
    with pytest.raises(ValueError, match="got none"):
        load_transformer(str(tmp_path), None, control_names=())


@torch.no_grad()
def test_a_lora_has_the_patch_embedding_beside_it_in_float32(inputs, controls, tmp_path):
    def pipeline_of(transformer):
        from causal_wan.sampling.pipeline import CausalWanPipeline

        return CausalWanPipeline(
            **dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=transformer
        )

    transformer = make_base(num_frame_per_block=2).to(torch.bfloat16)
    widen_for_controls(transformer, NAMES)
    add_lora(transformer, rank=2, alpha=2, target_modules=["to_q"])
    trainable = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert {name for name in trainable if "lora" not in name} == {"patch_embedding.weight", "patch_embedding.bias"}
    assert {weight.dtype for weight in trainable.values()} == {torch.float32}
    for weight in trainable.values():
        weight.copy_(torch.randn(weight.shape))
    save_lora(transformer, trainable, tmp_path)
    again = make_base(num_frame_per_block=2)
    pipeline_of(again).load_lora_weights(str(tmp_path))
    assert list(again.config.control_names) == NAMES
    given = {**inputs, "control_latents": controls}
    expected = transformer.to(torch.float32)(**given).sample
    again.load_state_dict({k: v for k, v in transformer.state_dict().items() if "lora" not in k}, strict=False)
    torch.testing.assert_close(again(**given).sample, expected, atol=1e-5, rtol=1e-4)


def test_the_config_of_a_student_is_that_of_its_base_with_controls():
    base, student = make_base(), make_base()
    widen_for_controls(student, NAMES)
    planned = with_control_names(base.config, NAMES)
    assert planned["in_channels"] == student.config.in_channels
    assert planned["control_names"] == student.config.control_names
    check_kind("student", student.config, {"z_dim": C}, None)
    with pytest.raises(ValueError, match="12 input and 4 output channels"):
        check_kind("another", {**student.config, "control_names": []}, {"z_dim": C}, None)


def test_controls_of_other_frames_are_refused(inputs, controls):
    with pytest.raises(
        ValueError, match=r"control_latents must have the shape \(2, 8, 6, 4, 6\).*got \(2, 8, 5, 4, 6"
    ):
        make_student(num_frame_per_block=2)(**inputs, control_latents=controls[:, :, :5])
    with pytest.raises(ValueError, match=r"must have the shape \(2, 0, 6, 4, 6\)"):
        make_base(num_frame_per_block=2)(**inputs, control_latents=controls)


def test_a_control_that_says_the_clip_lowers_the_loss_and_a_wrong_one_does_not():
    """From pure noise, of latents that are new at every step: nothing else says what they are."""
    losses = {}
    for kind in ("own", "wrong"):
        transformer = make_base(num_frame_per_block=1)
        widen_for_controls(transformer, NAMES[:1])
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
        generator, embeds, recent = torch.Generator().manual_seed(4), torch.zeros(8, 3, 16), []
        for _ in range(150):
            latents, noise = (torch.randn(8, C, 1, H, W, generator=generator) for _ in range(2))
            control = latents if kind == "own" else latents.roll(1, dims=0)
            timestep = torch.full((8,), 1000.0)
            predicted = transformer(noise, timestep, embeds, control_latents=control).sample
            loss = (noise - predicted - latents).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent.append(loss.item())
        losses[kind] = sum(recent[-20:]) / 20
    assert losses["own"] < 0.5 < 0.9 < losses["wrong"]


# --- block by block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per_block", "first"), BLOCKS)
@torch.no_grad()
def test_the_control_of_a_block_changes_no_earlier_one(inputs, controls, per_block, first):
    transformer = make_student(num_frame_per_block=per_block, independent_first_frame=first)
    start = sum(transformer.block_lengths(F)[:-1])
    changed = torch.cat([controls[:, :, :start], controls[:, :, start:] + 1], dim=2)
    one, other = (transformer(**inputs, control_latents=each).sample for each in (controls, changed))
    assert torch.equal(one[:, :, :start], other[:, :, :start])
    assert not torch.allclose(one[:, :, start:], other[:, :, start:], atol=1e-3)


@pytest.mark.parametrize(("per_block", "first"), BLOCKS)
@torch.no_grad()
def test_passes_with_a_cache_are_the_training_forward_block_by_block(inputs, controls, per_block, first):
    transformer = make_student(num_frame_per_block=per_block, independent_first_frame=first)
    lengths = transformer.block_lengths(F)
    timesteps = torch.cat(
        [
            level.expand(B, length)
            for level, length in zip(torch.linspace(900, 100, len(lengths)), lengths, strict=True)
        ],
        dim=1,
    )
    whole = transformer(**{**inputs, "timestep": timesteps}, control_latents=controls).sample
    cache, start, parts = transformer.make_cache(B, F, H, W), 0, []
    for length in lengths:
        block = slice(start, start + length)
        given = {"encoder_hidden_states": inputs["encoder_hidden_states"], "control_latents": controls[:, :, block]}
        latents, level = inputs["hidden_states"][:, :, block], timesteps[:, start]
        parts.append(transformer(latents, level, **given, cache=cache, start_frame=start).sample)
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("per_block", "first"), BLOCKS)
@torch.no_grad()
def test_a_rollout_gives_each_block_the_passes_of_training_with_clean_context(
    inputs, controls, per_block, first, guidance_scale
):
    """Teacher forcing on the rollout's own clip predicts in one pass what the last steps of all blocks predicted."""
    transformer = make_student(num_frame_per_block=per_block, independent_first_frame=first)
    embeds, seen = inputs["encoder_hidden_states"], []
    schedule = SamplingSchedule(timesteps=LEVELS, sampler="euler")
    noise = torch.randn(1, B, C, F, H, W, generator=torch.Generator().manual_seed(3))

    def note(rollout, step, timestep, latents):
        seen.append((timestep, latents))
        return latents

    guided = {"negative_conditions": Conditions(prompt_embeds=-embeds), "guidance_scale": guidance_scale}
    conditions = Conditions(prompt_embeds=embeds, control_latents=controls)
    blocks = list(
        roll_out(transformer, conditions, noise, schedule, on_step_end=note, **(guided if guidance_scale > 1 else {}))
    )
    clip = torch.cat(blocks, dim=2)
    entering = torch.cat([latents for timestep, latents in seen if timestep == LEVELS[0]], dim=2)  # the second step

    def velocity(prompt_embeds):
        conditions = Conditions(prompt_embeds=prompt_embeds, control_latents=controls)
        timesteps = LEVELS[1].expand(B, F)
        return transformer(entering, timesteps, **conditions.arguments(), context_latents=clip).sample

    expected = velocity(embeds)
    if guidance_scale > 1:
        negative = velocity(-embeds)
        expected = negative + guidance_scale * (expected - negative)
    torch.testing.assert_close(entering - 0.4 * expected, clip, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_controls_that_come_frame_by_frame_are_taken_block_by_block_and_end_the_clip(inputs, controls):
    transformer = make_student(num_frame_per_block=2, local_attn_size=4)
    conditions = Conditions(prompt_embeds=inputs["encoder_hidden_states"])
    schedule = SamplingSchedule(timesteps=LEVELS, sampler="euler")
    taken = []

    def come():
        for number, control in enumerate(controls.split(1, dim=2)):
            taken.append(number)
            yield control

    noise = torch.randn(1, B, C, F, H, W, generator=torch.Generator().manual_seed(3))
    blocks = []
    for block in roll_out(transformer, conditions, iter(noise.repeat(1, 1, 1, 2, 1, 1).split(1, dim=3)), schedule,
                          control_latents=come()):  # fmt: skip
        blocks.append(block)
        assert len(taken) == 2 * len(blocks)
    whole = Conditions(prompt_embeds=inputs["encoder_hidden_states"], control_latents=controls)
    expected = torch.cat(list(roll_out(transformer, whole, noise, schedule)), dim=2)
    torch.testing.assert_close(torch.cat(blocks, dim=2), expected)
    with pytest.raises(ValueError, match="control_latents must have the 6 latent frames of the clip, got 5"):
        list(roll_out(transformer, Conditions(prompt_embeds=whole.prompt_embeds, control_latents=controls[:, :, :5]),
                      noise, schedule))  # fmt: skip
