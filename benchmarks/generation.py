"""The VAE's encoder, and sampling block by block: against stock diffusers, and against passes over the past."""

import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from bench import SIZES, Bench, table
from diffusers import AutoencoderKLWan
from layers import run_passes

from causal_wan.flow import add_noise, latents_from_velocity, sampling_timesteps, sigmas_from_timesteps
from causal_wan.geometry import WAN
from causal_wan.model.conditions import Conditions
from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.model.vae import encode_in_passes, encode_videos
from causal_wan.sampling.noise import draw_noise
from causal_wan.sampling.pipeline import CausalWanPipeline


STEP_LIST = (1000, 937.5, 833.333, 625)  # four steps, those of Self Forcing


# --- encoding --------------------------------------------------------------------------------------------------------


def in_channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """A copy whose convolutions have their channels innermost."""
    vae = copy.deepcopy(vae)
    for module in vae.modules():
        layout = {torch.nn.Conv2d: torch.channels_last, torch.nn.Conv3d: torch.channels_last_3d}
        for kind, memory_format in layout.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.contiguous(memory_format=memory_format)
    return vae


def measure_vae(bench: Bench) -> list[str]:
    """Ways to encode a clip, against stock diffusers'; and against a step, which is what it adds to."""
    _, num_frames, height, width = bench.size.latent_shape
    if not bench.is_gpu:
        num_frames = 9  # the encoder does the same for every four frames
    shape = (1, 3, 4 * (num_frames - 1) + 1, 8 * height, 8 * width)
    videos = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(bench.device, bench.dtype) * 2 - 1
    stock = bench.make_vae().requires_grad_(False)  # no variant is to pay for gradients
    model = bench.make_transformer(num_frame_per_block=bench.size.block).train()
    if bench.is_gpu:
        model.enable_gradient_checkpointing()
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "stock diffusers": lambda: stock.encode(videos).latent_dist.mode(),
        "8 frames a pass": lambda: encode_in_passes(stock, videos, 8),
        "16 frames a pass": lambda: encode_in_passes(stock, videos, 16),
    }
    if bench.is_gpu:  # on a CPU they take many times as long
        last = in_channels_last(stock)
        shuffled = videos.contiguous(memory_format=torch.channels_last_3d)
        variants["channels innermost"] = lambda: encode_in_passes(last, shuffled, 4)
        variants["channels innermost, 16 frames a pass"] = lambda: encode_in_passes(last, shuffled, 16)
        compiled = copy.deepcopy(last)
        compiled.encoder.compile(dynamic=False)
        variants["channels innermost, compiled"] = lambda: encode_in_passes(compiled, shuffled, 4)
    expected = variants["stock diffusers"]().float()

    def difference(latents: torch.Tensor) -> str:
        return f"{float((latents.float() - expected).abs().max() / expected.abs().max()):.0e}"

    errors = {name: difference(run()) for name, run in variants.items()}
    passes = {"forward + backward of a step": functools.partial(run_passes, bench, model, bench.make_inputs())}
    ours = {"encode_videos (ours, normalised)": lambda: encode_videos(stock, videos)}
    measured = bench.compare({**variants, **ours, **passes})
    rows = [(name, f"{ratio:.2f}", errors.get(name, "")) for name, (_, ratio) in measured.items()]
    (own,) = (measured[name][1] for name in ours)
    step = measured["forward + backward of a step"][1] * num_frames / bench.size.latent_shape[1]
    return [
        *table(
            (f"encoding a clip of {shape[2]} x {shape[3]} x {shape[4]}", "time, of stock diffusers", "differs by"),
            rows,
        ),
        "",
        f"Encoded as training goes, it is {own / (own + step):.2f} of a step; from the cache, nothing.",
    ]


# --- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_without_cache(
    transformer: CausalWanTransformer3DModel, prompt_embeds: torch.Tensor, noise: torch.Tensor, steps: tuple
) -> torch.Tensor:
    """What a rollout computes, by passes over all earlier blocks as well."""
    timesteps = sampling_timesteps(steps).to(noise.device)
    block, clean = transformer.config.num_frame_per_block, noise[0][:, :, :0]
    for start in range(0, noise.shape[3], block):
        noisy = noise[0][:, :, start : start + block]
        for step, timestep in enumerate(timesteps):
            frames = torch.cat([clean, noisy], dim=2)
            levels = torch.zeros(frames.shape[0], frames.shape[2], device=noise.device)
            levels[:, start:] = timestep
            velocity = transformer(frames.to(prompt_embeds.dtype), levels, prompt_embeds, return_dict=False)[0]
            sigmas = sigmas_from_timesteps(timestep.expand(len(frames)))
            latents = latents_from_velocity(noisy, velocity[:, :, start:], sigmas)
            if step + 1 < len(timesteps):
                fresh = noise[step + 1][:, :, start : start + block]
                noisy = add_noise(latents, fresh, sigmas_from_timesteps(timesteps[step + 1].expand(len(frames))))
        clean = torch.cat([clean, latents], dim=2)
    return clean


def measure_sampling(bench: Bench) -> list[str]:
    """The rollout with its cache, against passes over the past, and against 50 guided steps both ways in time."""
    size = bench.size
    transformer = bench.make_transformer(num_frame_per_block=size.block).to(bench.dtype).eval()
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    pipeline = CausalWanPipeline(**parts, transformer=transformer)
    noise = draw_noise(1, size.latent_shape, len(STEP_LIST)).to(bench.device)
    prompt_embeds = bench.make_inputs()[2].to(bench.dtype)
    conditions = Conditions(prompt_embeds=prompt_embeds)
    with_cache = pipeline.sample_latents(conditions, noise, STEP_LIST)
    without = sample_without_cache(transformer, prompt_embeds, noise, STEP_LIST)
    error = (with_cache - without).abs().max() / without.abs().max()
    variants = {
        "with the cache": lambda: pipeline.sample_latents(conditions, noise, STEP_LIST),
        "over the past again": lambda: sample_without_cache(transformer, prompt_embeds, noise, STEP_LIST),
        "one pass both ways in time": functools.partial(run_one_pass, bench, transformer, prompt_embeds),
    }
    measured = bench.compare(variants)
    ratio, one_pass = measured["over the past again"][1], measured["one pass both ways in time"][1]
    title = f"sampling {size.latent_shape[1]} latent frames in blocks of {size.block}, {len(STEP_LIST)} steps"
    rows = [
        ("with the cache", "1.00"),
        (f"over the past again (equal to {float(error):.0e})", f"{ratio:.2f}"),
        ("50 steps both ways in time with guidance: 100 passes, of which one was timed", f"{100 * one_pass:.1f}"),
    ]
    goals = []
    if bench.size is SIZES["mid"]:  # in smaller models attention is more of the work, and gains less
        goals = ["", bench.goal("sampling over the past again, of sampling with the cache", ratio, at_least=3)]
    return [
        *table((title, "time, of the first"), rows),
        *goals,
        *describe_stream(bench, pipeline, conditions, noise),
    ]


@torch.no_grad()
def run_one_pass(bench: Bench, transformer: CausalWanTransformer3DModel, prompt_embeds: torch.Tensor) -> None:
    """Of the whole clip as one block."""
    latents, timesteps, _ = bench.make_inputs()
    causal = transformer.causal_config
    transformer.set_causal_config(replace(causal, num_frame_per_block=None))
    transformer(latents.to(bench.dtype), timesteps[:, 0], prompt_embeds, return_dict=False)
    transformer.set_causal_config(causal)


def describe_stream(
    bench: Bench, pipeline: CausalWanPipeline, conditions: Conditions, noise: torch.Tensor
) -> list[str]:
    """Frames a second and the wait for the first ones, with WAN 2.1's VAE, random weights."""
    vae = bench.make_vae()

    def stream() -> Iterator[float]:
        decoder = StreamingDecoder(vae)
        start = bench.now()
        for block in pipeline.sample_blocks(conditions, noise, STEP_LIST):
            decoder.decode(block)
            yield bench.now() - start

    list(stream())  # warms up
    times = [list(stream()) for _ in range(max(bench.num_rounds // 2, 1))]
    first, whole = statistics.median(t[0] for t in times), statistics.median(t[-1] for t in times)
    rate = WAN.num_frames(noise.shape[3]) / whole
    lines = [
        "",
        f"Decoded block by block: the first frames after {first / whole:.2f} of the time of the clip ({first:.2f} s), "
        f"{rate:.1f} frames a second on this machine, with the VAE.",
    ]
    if bench.is_gpu:
        lines.append(bench.goal("frames a second", rate, at_least=20))
        lines.append(bench.goal("seconds until the first frames", first, at_most=0.6))
    return lines
