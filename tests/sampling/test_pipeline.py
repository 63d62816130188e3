import inspect
import pydoc

import imageio.v3 as iio
import PIL.Image
import pytest
import torch
from conftest import TINY_TRANSFORMER
from diffusers import WanPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from peft import LoraConfig, get_peft_model_state_dict
from torch._dynamo.testing import CompileCounter

from causal_wan.flow import add_noise, choose_sampling, latents_from_velocity
from causal_wan.model.conditions import Conditions
from causal_wan.model.text import encode_prompts, pad_prompt_embeds
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import decode_latents, encode_videos
from causal_wan.sampling.noise import draw_frame_noise, draw_noise
from causal_wan.sampling.pipeline import CausalWanPipeline


B, F, H, W = 2, 6, 4, 6
STEPS = (1000, 757, 522)


def make_pipeline(**causal):
    torch.manual_seed(0)
    transformer = CausalWanTransformer3DModel(**TINY_TRANSFORMER, **causal).eval()
    return CausalWanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


@pytest.fixture
def embeds():
    return torch.randn(B, 7, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def conditions(embeds):
    return Conditions(prompt_embeds=embeds)


@pytest.fixture
def noise():
    return torch.randn(len(STEPS), B, 4, F, H, W, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def sample_without_cache(transformer, embeds, noise, block):
    """The same algorithm by recomputing: clean earlier blocks at timestep 0 before the noisy block, in one forward."""
    clean = noise[0, :, :, :0]
    for start in range(0, F, block):
        x = noise[0, :, :, start : start + block]
        for step, timestep in enumerate(STEPS):
            frames = torch.cat([clean, x], dim=2)
            timesteps = torch.zeros(B, frames.shape[2])
            timesteps[:, start:] = timestep
            velocity = transformer(frames, timesteps, embeds).sample[:, :, start:]
            predicted = latents_from_velocity(x, velocity, torch.full((B,), timestep / 1000))
            if step + 1 < len(STEPS):
                fresh = noise[step + 1, :, :, start : start + block]
                x = add_noise(predicted, fresh, torch.full((B,), STEPS[step + 1] / 1000))
        clean = torch.cat([clean, predicted], dim=2)
    return clean


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_sampling_with_the_cache_equals_recomputing_the_past(embeds, conditions, noise, block):
    pipeline = make_pipeline(num_frame_per_block=block)
    expected = sample_without_cache(pipeline.transformer, embeds, noise, block)
    torch.testing.assert_close(pipeline.sample_latents(conditions, noise, STEPS), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def follow_flow_without_cache(transformer, embeds, noise, block, timesteps):
    """The ODE by recomputing: clean earlier blocks at timestep 0 before the block, which goes from level to level."""
    clean = noise[:, :, :0]
    for start in range(0, F, block):
        x = noise[:, :, start : start + block]
        for timestep, following in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
            frames = torch.cat([clean, x], dim=2)
            levels = torch.zeros(B, frames.shape[2])
            levels[:, start:] = timestep
            x = x + (following - timestep) / 1000 * transformer(frames, levels, embeds).sample[:, :, start:]
        clean = torch.cat([clean, x], dim=2)
    return clean


@pytest.mark.parametrize("block", [1, 2, 6])
def test_many_steps_follow_the_flow_block_by_block_from_one_draw_of_noise(embeds, conditions, noise, block):
    pipeline = make_pipeline(num_frame_per_block=block)
    timesteps = [1000, 900, 750, 500]  # of 4 steps under shift 3
    expected = follow_flow_without_cache(pipeline.transformer, embeds, noise[0], block, timesteps)
    steps = {"num_inference_steps": 4, "timestep_shift": 3.0}
    found = pipeline.sample_latents(conditions, noise[:1], **steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipeline.sample_latents(conditions, noise[:1], timesteps, sampler="euler"), found)
    pipeline.register_to_config(denoising_step_list=timesteps, sampler="euler")
    torch.testing.assert_close(pipeline.sample_latents(conditions, noise[:1]), found)
    renoised = pipeline.sample_latents(conditions, noise, STEPS)  # a list has a sampler of its own
    torch.testing.assert_close(
        renoised, sample_without_cache(pipeline.transformer, embeds, noise, block), atol=1e-4, rtol=1e-4
    )


def test_many_steps_are_guided_with_both_pasts_kept(embeds, conditions, noise):
    pipeline, steps = make_pipeline(num_frame_per_block=2), {"num_inference_steps": 3}
    plain = pipeline.sample_latents(conditions, noise[:1], **steps)
    guided = {"guidance_scale": 4.0, "negative_conditions": Conditions(prompt_embeds=embeds.clone())}
    torch.testing.assert_close(
        pipeline.sample_latents(conditions, noise[:1], **steps, **guided), plain, rtol=1e-4, atol=1e-4
    )
    guided["negative_conditions"] = Conditions(prompt_embeds=-embeds)
    assert not torch.allclose(pipeline.sample_latents(conditions, noise[:1], **steps, **guided), plain, atol=1e-2)


def test_ways_of_sampling_that_exclude_each_other_are_refused(conditions, noise):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="got both; give one"):
        pipeline.sample_latents(conditions, noise, STEPS, num_inference_steps=3)
    with pytest.raises(ValueError, match="timestep_shift shifts the steps of num_inference_steps; give both"):
        pipeline.sample_latents(conditions, noise, STEPS, timestep_shift=3.0)
    with pytest.raises(ValueError, match="num_draws=1 for 50 steps of the sampler euler"):
        pipeline.sample_latents(conditions, noise, num_inference_steps=50)


def test_a_sample_is_a_function_of_its_inputs_alone(embeds, conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    first = pipeline.sample_latents(conditions, noise, STEPS)
    torch.manual_seed(123)
    assert torch.equal(pipeline.sample_latents(conditions, noise, STEPS), first)
    alone = pipeline.sample_latents(Conditions(prompt_embeds=embeds[:1]), noise[:, :1], STEPS)
    torch.testing.assert_close(alone, first[:1])


def test_the_training_list_samples_like_the_list_without_its_0(conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    assert torch.equal(
        pipeline.sample_latents(conditions, noise, [*STEPS, 0]), pipeline.sample_latents(conditions, noise, STEPS)
    )


def test_later_noise_leaves_earlier_blocks_bitwise_alone(conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    before = pipeline.sample_latents(conditions, noise, STEPS)
    changed = noise.clone()
    changed[:, :, :, 4:] += 1
    after = pipeline.sample_latents(conditions, changed, STEPS)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


def test_blocks_are_handed_over_as_they_are_made(conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    blocks = []
    latents = pipeline.sample_latents(
        conditions, noise, STEPS, on_block_end=lambda number, block: blocks.append(block)
    )
    assert torch.equal(torch.cat(blocks, dim=2), latents)


def test_noise_must_have_one_entry_a_step(conditions, noise):
    with pytest.raises(ValueError, match="num_draws=2 for 2 steps of the sampler renoise"):
        make_pipeline().sample_latents(conditions, noise, [1000, 500])


def test_a_window_makes_rollouts_of_any_length_run_in_a_cache_of_fixed_size(conditions):
    pipeline = make_pipeline(num_frame_per_block=2, local_attn_size=4, sink_size=1)
    long_noise = torch.randn(len(STEPS), B, 4, 20, H, W, generator=torch.Generator().manual_seed(3))
    assert pipeline.transformer.make_cache(B, 20, H, W).capacity == 4
    assert pipeline.sample_latents(conditions, long_noise, STEPS).shape == (B, 4, 20, H, W)


def test_noise_of_a_frame_depends_neither_on_the_length_of_the_clip_nor_on_the_batch():
    def draw(num_frames, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return draw_noise(len(seeds), (4, num_frames, H, W), 3, generator=generators)

    whole = draw(6, [1, 2])
    assert whole.shape == (3, 2, 4, 6, H, W)
    assert torch.equal(draw(2, [1, 2]), whole[:, :, :, :2])
    assert torch.equal(draw(6, [2]), whole[:, 1:])
    assert abs(whole.mean()) < 0.1
    assert abs(whole.std() - 1) < 0.1


def test_guidance_leads_away_from_the_negative_prompt(embeds, conditions, noise):
    pipeline = make_pipeline()
    negative = Conditions(prompt_embeds=-embeds)  # not its tokens in another order, which are the same prompt
    one_step = noise[:1]
    positive, away = (pipeline.sample_latents(each, one_step, [1000]) for each in (conditions, negative))
    assert not torch.allclose(positive, away, atol=1e-2)
    guided = pipeline.sample_latents(
        conditions, one_step, [1000], negative_conditions=negative, guidance_scale=3.0
    )  # of one step from pure noise, clean latents are linear in the velocity
    torch.testing.assert_close(guided, away + 3 * (positive - away), rtol=1e-4, atol=1e-4)


def test_guided_rollouts_keep_both_pasts(embeds, conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    plain = pipeline.sample_latents(conditions, noise, STEPS)
    own, opposite = (Conditions(prompt_embeds=each) for each in (embeds.clone(), -embeds))
    same = pipeline.sample_latents(conditions, noise, STEPS, negative_conditions=own, guidance_scale=4.0)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    other = pipeline.sample_latents(conditions, noise, STEPS, negative_conditions=opposite, guidance_scale=4.0)
    assert not torch.allclose(other, plain, atol=1e-2)


def test_a_clip_goes_on_from_its_first_blocks_as_if_they_had_been_sampled(conditions, noise):
    pipeline = make_pipeline(num_frame_per_block=2)
    whole = pipeline.sample_latents(conditions, noise, STEPS)
    continued = pipeline.sample_latents(conditions, noise, STEPS, initial_latents=whole[:, :, :4])
    assert torch.equal(continued, whole)
    changed = pipeline.sample_latents(conditions, noise, STEPS, initial_latents=whole[:, :, :4] + 1)
    assert torch.equal(changed[:, :, :4], whole[:, :, :4] + 1)
    assert not torch.allclose(changed[:, :, 4:], whole[:, :, 4:], atol=1e-3)


@pytest.mark.parametrize(("num_given", "advice"), [(3, "give 5 or 13 frames"), (6, "give 13 frames"), (5, "give 13")])
def test_only_whole_blocks_before_the_end_can_be_continued(conditions, noise, num_given, advice):
    given = torch.zeros(B, 4, num_given, H, W)
    with pytest.raises(ValueError, match=advice):
        make_pipeline(num_frame_per_block=2).sample_latents(conditions, noise, STEPS, initial_latents=given)


def test_a_video_without_end_is_sampled_in_fixed_memory_and_begins_as_any_other(conditions):
    pipeline = make_pipeline(num_frame_per_block=2, local_attn_size=4, sink_size=1)

    def frames():
        return draw_frame_noise(B, (4, H, W), len(STEPS), generator=torch.Generator().manual_seed(5))

    endless = pipeline.sample_blocks(conditions, frames(), STEPS)
    blocks = [next(endless) for _ in range(4)]
    of_eight = pipeline.sample_latents(
        conditions, draw_noise(B, (4, 8, H, W), 3, generator=torch.Generator().manual_seed(5)), STEPS
    )
    assert torch.equal(torch.cat(blocks, dim=2), of_eight)
    with pytest.raises(ValueError, match="must be sampled in blocks with a window"):
        next(make_pipeline(num_frame_per_block=2).sample_blocks(conditions, frames(), STEPS))


def test_sampling_goes_on_beyond_the_rotary_table(conditions):
    pipeline = make_pipeline(num_frame_per_block=2, local_attn_size=4)
    noise = torch.randn(1, B, 4, 20, H, W, generator=torch.Generator().manual_seed(3))
    expected = pipeline.sample_latents(conditions, noise, [1000])
    pipeline.transformer.rope = WanRotaryPosEmbed(24, (1, 2, 2), 7)
    assert torch.equal(pipeline.sample_latents(conditions, noise, [1000]), expected)


def test_one_graph_serves_all_layers_and_few_serve_a_rollout(conditions):
    pipeline = make_pipeline(num_frame_per_block=2, local_attn_size=4, sink_size=1)
    noise = torch.randn(len(STEPS), B, 4, 20, H, W, generator=torch.Generator().manual_seed(3))
    expected = pipeline.sample_latents(conditions, noise, STEPS)
    torch._dynamo.reset()
    counter = CompileCounter()
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(pipeline.sample_latents(conditions, noise, STEPS), expected)
    # With the prompt's keys to be computed or at hand, and the cache full or growing.
    assert 1 <= counter.frame_count <= 4
    compiled = counter.frame_count
    pipeline.sample_latents(conditions, noise, STEPS)
    assert counter.frame_count == compiled
    torch._dynamo.reset()


# --- calls, as of any diffusers pipeline -----------------------------------------------------------------------------

CALL = {"num_frames": 13, "height": 32, "width": 48, "denoising_step_list": (1000, 500), "output_type": "pt"}


@pytest.fixture
def pipeline(checkpoint):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, prompt="a ball", seed=0, **changes):
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **{**CALL, **changes}).frames


def test_a_call_takes_noise_as_it_would_draw_it(pipeline):
    generator = torch.Generator().manual_seed(0)
    noise = pipeline.draw_noise(1, 13, 32, 48, (1000, 500), generator=generator)
    assert torch.equal(call(pipeline, noise=noise), call(pipeline))


def test_help_shows_all_arguments_of_a_call():
    shown, streamed = (
        inspect.signature(each).parameters for each in (CausalWanPipeline.__call__, CausalWanPipeline.stream)
    )
    assert list(shown) == [*streamed, "return_dict"]
    assert {name: shown[name].default for name in ("height", "num_frames", "output_type", "return_dict")} == {
        "height": 480,
        "num_frames": 81,
        "output_type": "np",
        "return_dict": True,
    }
    explained = CausalWanPipeline.__call__.__doc__
    assert all(f" {name}: " in explained for name in shown if name != "self")
    assert "guidance_scale: float = 1.0" in pydoc.plain(pydoc.render_doc(CausalWanPipeline.__call__))


def test_how_to_sample_is_chosen_once_for_a_video(pipeline, monkeypatch):
    chosen = []

    def count(*given, **settings):
        chosen.append(given)
        return choose_sampling(*given, **settings)

    monkeypatch.setattr("causal_wan.sampling.pipeline.choose_sampling", count)
    call(pipeline)
    assert len(chosen) == 1


def test_several_videos_of_a_prompt_differ_and_lie_side_by_side(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    videos = pipeline(["a ball", "a box"], num_videos_per_prompt=2, generator=generators, **CALL).frames
    assert videos.shape == (4, 13, 3, 32, 48)
    torch.testing.assert_close(videos[2:3], call(pipeline, "a box", seed=2), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(videos[0], videos[1], atol=1e-2)


def test_guidance_of_a_call_uses_the_negative_prompt(pipeline):
    plain, guided, other = (
        call(pipeline, **settings)
        for settings in ({}, {"guidance_scale": 6.0}, {"guidance_scale": 6.0, "negative_prompt": "a box"})
    )
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided, other)
    assert torch.equal(call(pipeline, guidance_scale=1.0, negative_prompt="a box"), plain)
    with pytest.raises(ValueError, match="one negative prompt, or one for each prompt, got 2 for 1 videos"):
        call(pipeline, guidance_scale=2.0, negative_prompt=["a", "b"])


def test_a_call_continues_a_video(pipeline, clips):
    frames = iio.imread(next(clips.glob("**/*.mp4")), plugin="pyav")[:5]
    given = [PIL.Image.fromarray(frame).resize((48, 32)) for frame in frames]
    video = call(pipeline, video=given)
    latents = encode_videos(pipeline.vae, pipeline.video_processor.preprocess_video(given))
    expected = call(pipeline, initial_latents=latents)
    assert torch.equal(video, expected)
    decoded = decode_latents(pipeline.vae, latents)
    torch.testing.assert_close(video[0, :5], (decoded[0].transpose(0, 1) + 1) / 2)
    streamed = pipeline.stream("a ball", generator=torch.Generator().manual_seed(0), video=given, **CALL)
    assert torch.equal(torch.cat(list(streamed), dim=1), expected)
    with pytest.raises(ValueError, match="num_frames must be 4k"):
        call(pipeline, video=given[:4])


def test_a_call_in_many_steps_draws_once_and_streams_the_same_video(pipeline):
    steps = {**CALL, "denoising_step_list": None, "num_inference_steps": 4, "timestep_shift": 3.0}
    video = pipeline("a ball", generator=torch.Generator().manual_seed(0), **steps).frames
    streamed = pipeline.stream("a ball", generator=torch.Generator().manual_seed(0), **steps)
    torch.testing.assert_close(torch.cat(list(streamed), dim=1), video)
    size = {name: CALL[name] for name in ("num_frames", "height", "width")}
    noise = pipeline.draw_noise(1, **size, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    assert len(noise) == 1
    assert torch.equal(pipeline("a ball", noise=noise, **steps).frames, video)


def test_a_callback_sees_and_changes_each_step(pipeline):
    seen = []

    def look(pipe, step, timestep, tensors):
        assert pipe is pipeline
        seen.append((step, float(timestep), tuple(tensors)))
        return tensors

    call(pipeline, callback_on_step_end=look)
    assert seen == [(step, (1000.0, 500.0)[step % 2], ("latents",)) for step in range(8)]
    blank = call(pipeline, callback_on_step_end=lambda *step: {"latents": torch.zeros_like(step[-1]["latents"])})
    expected = decode_latents(pipeline.vae, torch.zeros(1, 16, 4, 4, 6))
    torch.testing.assert_close(blank[0], (expected[0].transpose(0, 1) + 1) / 2)
    with pytest.raises(ValueError, match="must be of latents, prompt_embeds, negative_prompt_embeds, got noise"):
        call(pipeline, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["noise"])


def test_a_callback_changes_the_prompt_from_a_step_on(pipeline):
    other = pad_prompt_embeds(encode_prompts(pipeline.tokenizer, pipeline.text_encoder, ["a box"], 512))

    def swap(pipe, step, timestep, tensors):
        return {"prompt_embeds": other} if step >= 3 else {}

    names = ["prompt_embeds"]
    swapped = call(pipeline, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
    plain = call(pipeline)
    assert torch.equal(swapped[:, :5], plain[:, :5])  # two steps for each of two blocks
    assert not torch.equal(swapped[:, 5:], plain[:, 5:])


def test_a_callback_ends_a_video_after_the_current_block(pipeline):
    class Stop(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipe, step, timestep, tensors):
            pipe._interrupt = step == 3
            return tensors

    stopped = call(pipeline, callback_on_step_end=Stop())
    assert stopped.shape[1] == 5
    torch.testing.assert_close(stopped, call(pipeline)[:, :5])


def test_adapters_load_combine_fuse_and_leave(pipeline, tmp_path):
    plain = call(pipeline)
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        source = CausalWanPipeline.from_pretrained(pipeline.config._name_or_path).transformer
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False)
        source.add_adapter(config)
        CausalWanPipeline.save_lora_weights(tmp_path / name, get_peft_model_state_dict(source))
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    torch.testing.assert_close(call(pipeline, attention_kwargs={"scale": 0.0}), plain)
    videos = {}
    for name, adapters, weights in (("one", ["one"], [1.0]), ("both", ["one", "two"], [1.0, 0.5])):
        pipeline.set_adapters(adapters, weights)
        videos[name] = call(pipeline)
    assert not torch.allclose(videos["one"], plain, atol=1e-3)
    assert not torch.allclose(videos["one"], videos["both"], atol=1e-3)
    pipeline.fuse_lora(adapter_names=["one", "two"])
    torch.testing.assert_close(call(pipeline), videos["both"], rtol=1e-3, atol=1e-3)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(call(pipeline), plain, rtol=1e-3, atol=1e-3)


def test_a_pipeline_takes_stock_parts_and_knows_its_step_list(checkpoint, tmp_path):
    stock = WanPipeline.from_pretrained(checkpoint)
    stock.transformer.register_to_config(num_frame_per_block=1)
    pipeline = CausalWanPipeline(**stock.components, denoising_step_list=[1000, 500])
    assert isinstance(pipeline.transformer, CausalWanTransformer3DModel)
    seeded = pipeline("a ball", generator=torch.Generator().manual_seed(0), **{**CALL, "denoising_step_list": None})
    same = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    assert torch.equal(seeded.frames, call(same))
    with pytest.raises(ValueError, match="one transformer, got two"):
        CausalWanPipeline(**{**stock.components, "transformer_2": stock.transformer})
