"""Trains a complete small WAN on sketches from nothing: VAE, tokenizer, text encoder, transformer. No GPU needed.

    python examples/sketch/build_tiny_wan.py --stage vae
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 4 examples/sketch/build_tiny_wan.py --stage base

The result, `tiny-wan/`, is in diffusers' own folder format and loads in the stock `WanPipeline`. The VAE learns the
strokes of all kinds of sketch; the text encoder and the transformer see BASE_KINDS in KNOWN_COLOURS only, so that
NEW_KINDS are left to teach. Flow matching: noisy latents are (1 - sigma) latents + sigma noise, the target is the
velocity noise - latents, the loss its squared error, with one sigma a clip.

The base trains on some of the 21 latent frames of a clip at a time, at their own places in time: frames resemble each
other, so many clips with few frames each teach more a second than few whole clips. A third of the clips is pure noise,
from which a few-step student has to find the whole drawing.

Shapes: B clips, T frames, F latent frames, L text tokens.
"""

import copy
import hashlib
import io
import itertools
import math
import os
import random
import re
import shutil
import string
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from av.video.reformatter import VideoReformatter
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, unpatchify
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from ink import colour_error, ink_f1, inside_loops, mean_ink_f1, open_loops, psnr
from make_dataset import (
    BASE_KINDS,
    COLOURS,
    HEIGHT,
    KINDS,
    KNOWN_COLOURS,
    NUM_FRAMES,
    WIDTH,
    Sketch,
    draw,
    prompt,
    sketches,
    write_mp4,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.functional import max_pool3d, smooth_l1_loss
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm, trange
from transformers import BatchEncoding, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import (
    GuidanceScale,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    TimestepShift,
    checked_dataclass,
)
from causal_wan.model.transformer import whole_config


TEXT_DIM = 96
TEXT_LENGTH = 512  # what WanPipeline pads prompts to
TRAIN_TEXT_LENGTH = 52  # the prompts fit; CountedPadding makes training at this length exact
HELDOUT_PER_KIND = 2
NUM_LATENT_FRAMES = (NUM_FRAMES - 1) // 4 + 1
# Latent frames of a clip that a step of the base sees -> how often.
FRAMES_AT_FIRST = {2: 0.2, 3: 0.4, 6: 0.25, NUM_LATENT_FRAMES: 0.15}
FRAMES_AT_LAST = {6: 0.4, NUM_LATENT_FRAMES: 0.6}
LOOPS_LR = 1.5e-3  # peak learning rate


@checked_dataclass
class Config:
    """How long to train, and where to put the result."""

    output_dir: LocalPath = str(Path(__file__).parent / "tiny-wan")
    """Folder of the checkpoint; replaced whole at every export."""
    work_dir: LocalPath = "outputs/tiny-wan-work"
    """Folder for the latents that the base is trained on, and the report."""
    stage: Literal["new", "vae", "details", "colours", "decoder", "loops", "base", "continue", "report"] = "vae"
    """`new`: untrained parts. `details`, `colours`, `decoder` and `loops` are phases of the VAE and go on with those
    after them; the last two leave the latents as they are, so that the base stays. `base` starts anew with the VAE in
    output_dir, `continue` goes on with the base there."""
    seed: Annotated[int, Range(ge=0, le=2**32 - 1, hint="numpy takes no other")] = 0
    """Seeds the sketches, the initial weights and the noise."""
    num_threads: PositiveInt = 3
    """Threads of torch in the stages of the VAE; the base has one process a core instead."""
    vae_clips: PositiveInt = 500
    """Clips that the VAE is trained on."""
    vae_frame_steps: NonNegativeInt = 800
    """VAE steps on 32 single frames; comes first, because on clips alone the VAE collapses to plain white."""
    vae_clip_steps: NonNegativeInt = 1600
    """VAE steps on 4 short clips."""
    vae_detail_steps: NonNegativeInt = 950
    """VAE steps on short clips in which the white near the ink counts as much as the ink."""
    vae_colour_steps: NonNegativeInt = 1300
    """VAE steps in which colour weighs most."""
    vae_decoder_steps: NonNegativeInt = 400
    """VAE steps of the decoder alone, on whole clips: from short ones it learns colours that drift in long ones."""
    vae_loop_steps: NonNegativeInt = 1000
    """VAE steps of the decoder alone, on stretches of whole clips, that open small loops: wings, petals, eyes."""
    base_steps: PositiveInt = 16_000
    """Optimizer steps of the base."""
    base_frames: PositiveInt = 96
    """Latent frames a step, over all processes."""
    base_lr: PositiveFloat = 1.5e-3
    """Peak learning rate of the base."""
    pure_noise: Share = 0.33
    """Share of clips at sigma 1."""
    shift: TimestepShift = 3.0
    """Other training sigmas are shift u / (1 + (shift - 1) u) with u uniform; also the sampler's flow_shift."""
    guidance_scale: GuidanceScale = 3.0
    """Guidance of the samples in the report."""
    export_every: PositiveInt = 1000
    """Steps of the base between two exports."""


# ---- the sketches


def heldout_sketches(seed: int) -> list[Sketch]:
    """HELDOUT_PER_KIND sketches of every kind, in the order of KINDS, that nothing is trained on."""
    rng = random.Random(seed)
    return [sketch for kind in KINDS for sketch in rng.sample(sketches((kind,), KNOWN_COLOURS), HELDOUT_PER_KIND)]


def training_sketches(kinds: tuple[str, ...], colours: tuple[str, ...], seed: int) -> list[Sketch]:
    """All sketches of these kinds and colours that are not held out, shuffled."""
    heldout = set(heldout_sketches(seed))
    candidates = [sketch for sketch in sketches(kinds, colours) if sketch not in heldout]
    return random.Random(seed + 1).sample(candidates, len(candidates))


def filmed(sketch: Sketch) -> np.ndarray:  # (T, H, W, 3) uint8
    """The clip as it comes out of its mp4 file, with the codec's blurred colours."""
    file = io.BytesIO()
    write_mp4(draw(sketch), file)
    file.seek(0)
    to_rgb = VideoReformatter()  # one for all frames and one thread: ten times faster than PyAV's defaults
    with av.open(file) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([to_rgb.reformat(frame, format="rgb24").to_ndarray() for frame in container.decode(video=0)])


def film(wanted: list[Sketch]) -> Iterator[np.ndarray]:
    """`filmed` for many sketches, in order."""
    with ProcessPoolExecutor(2) as workers:
        yield from tqdm(workers.map(filmed, wanted, chunksize=4), total=len(wanted), desc="drawing", unit="clip")


def to_videos(frames: torch.Tensor) -> torch.Tensor:  # (B, T, H, W, 3) uint8 -> (B, 3, T, H, W) in [-1, 1]
    return frames.movedim(-1, 1).float() / 127.5 - 1


def to_frames(videos: torch.Tensor) -> torch.Tensor:  # (B, 3, T, H, W) in [-1, 1] -> (B, T, H, W, 3) uint8
    return ((videos.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1)


# ---- the parts, untrained


def new_vae() -> AutoencoderKLWan:
    """A WAN VAE that first treats frames singly: its temporal taps other than the present are zero.

    As in WAN 2.2 pixels are folded 2 x 2 into channels, then come two stages that halve space and time.
    """
    vae = AutoencoderKLWan(
        base_dim=12,
        z_dim=16,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.weight[:, :, :-1] = 0
        for module in vae.modules():
            if isinstance(module, WanResample) and hasattr(module, "time_conv"):
                out_channels, in_channels = module.time_conv.weight.shape[:2]
                module.time_conv.weight[:, :, -1, 0, 0] = torch.eye(in_channels).repeat(out_channels // in_channels, 1)
                module.time_conv.bias.zero_()
    return vae


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in the manner of T5: pad 0, end of sequence 1, a piece for every word of the prompts.

    Other words fall apart into letters, and what is not ASCII into bytes.
    """
    words = Counter(word for sketch in sketches(tuple(KINDS)) for word in re.findall(r"\w+", prompt(sketch)))
    vocabulary = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(character, -10.0) for character in "▁" + string.ascii_letters + string.digits + string.punctuation]
    frequencies = [(word, number / words.total()) for word, number in words.most_common() if len(word) > 1]
    vocabulary += [(f"▁{word}", math.log(frequency)) for word, frequency in frequencies]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def new_transformer() -> WanTransformer3DModel:
    """A WAN transformer of 3.4 million weights whose start suits a short training.

    Self-attention and feed-forward begin half open instead of nearly shut, and cross-attention begins sharp, since
    else the 470 equal padding tokens drown the 40 of the prompt.
    """
    transformer = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=48, text_dim=TEXT_DIM, freq_dim=64, ffn_dim=768, num_layers=5
    )
    with torch.no_grad():
        text_embedder = transformer.condition_embedder.text_embedder
        for bias in (text_embedder.linear_1.bias, text_embedder.linear_2.bias):
            bias.zero_()
        for layer in transformer.blocks:
            layer.scale_shift_table.zero_()
            layer.scale_shift_table[:, (2, 5)] = 0.5
            layer.attn2.norm_q.weight.fill_(2.0)
            layer.attn2.to_k.bias.zero_()
    return transformer


def new_pipeline(config: Config) -> WanPipeline:
    """All parts of a small WAN 2.1, with untrained weights."""
    tokenizer = new_tokenizer()
    shape = {"d_model": TEXT_DIM, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4}
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **shape)),
        vae=new_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift, solver_order=2
        ),
        transformer=new_transformer(),
    )


def export(pipeline: WanPipeline, output_dir: str) -> None:
    """Writes the checkpoint beside output_dir, then puts it in place; VAE and transformer in half precision.

    The text encoder stays float32, because transformers loads it in the precision it finds.
    """
    target, partial = Path(output_dir), Path(output_dir + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.register_to_config(_name_or_path=target.name)
    pipeline.tokenizer.backend_tokenizer.no_padding()  # else that of the last training batch is stored
    pipeline.save_pretrained(partial)
    for part in (pipeline.vae, pipeline.transformer):
        in_half_precision(part).save_pretrained(partial / ("vae" if part is pipeline.vae else "transformer"))
    if (target / "README.md").exists():
        shutil.copy(target / "README.md", partial)
    old = Path(output_dir + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def has_bf16() -> bool:
    """Whether the CPU computes in bf16; one that does not takes several times as long as in float32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def autocast() -> torch.autocast:
    """Passes in bf16, where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16())


def in_half_precision(part: ModelMixin) -> ModelMixin:
    """A copy that does not say where it comes from."""
    half = type(part).from_config({key: value for key, value in whole_config(part).items() if key != "_name_or_path"})
    half.load_state_dict(part.state_dict())
    return half.half()


# ---- the VAE


def cosine(step: int, num_steps: int, warmup: int = 50) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine to 2 %."""
    return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / num_steps)))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of VAE training with its own cosine of the learning rate."""

    name: str
    num_steps: int
    peak_lr: float
    batches: tuple[tuple[int, int], ...]  # clips and frames, one pair is drawn each step
    reach: int
    noise_std: float
    chroma_weight: float = 1.0
    decoder_only: bool = False


def reconstruction_loss(vae: AutoencoderKLWan, videos: torch.Tensor, phase: Phase) -> torch.Tensor:
    """Squared error from slightly noisy latents kept near unit size; pixels within `reach` of ink weigh elevenfold.

    The error is split into its mean over RGB and the rest, the chroma, which may weigh more: thin lines are mostly a
    matter of light and dark, and their colour is learned last.
    """
    with autocast():
        latents = vae.encode(videos).latent_dist.mode()
        reconstruction = vae.decode(latents + phase.noise_std * torch.randn_like(latents)).sample
    ink = (videos.amin(dim=1, keepdim=True) < 0.9).float()
    near_ink = max_pool3d(
        ink, (1, 2 * phase.reach + 1, 2 * phase.reach + 1), stride=1, padding=(0, phase.reach, phase.reach)
    )
    error = reconstruction.float() - videos
    luma = error.mean(dim=1, keepdim=True)
    squared = luma.square() + phase.chroma_weight * (error - luma).square()
    return ((1 + 10 * near_ink) * squared).mean() + 1e-3 * latents.float().square().mean()


def crop(clips: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:  # (N, T, H, W, 3) -> (B, 3, length, H, W)
    """Random stretches of random clips; every other one from the very beginning, and mirrored at random."""
    stretches = []
    for clip in torch.randint(len(clips), (batch_size,)).tolist():
        latest = clips.shape[1] - length
        start = 0 if length > 1 and random.random() < 0.3 else random.randint(0, latest)
        stretch = clips[clip, start : start + length]
        mirrored = [axis for axis in (1, 2) if random.random() < 0.5]
        stretches.append(stretch.flip(mirrored) if mirrored else stretch)
    return to_videos(torch.stack(stretches))


def vae_phases(config: Config) -> list[Phase]:
    """Single frames, then short clips, then attention to the white between strokes."""
    short_clips = ((6, 5), (4, 9), (2, 17))
    phases = [
        Phase(
            name="frames", num_steps=config.vae_frame_steps, peak_lr=2e-3, batches=((32, 1),), reach=0, noise_std=0.1
        ),
        Phase(
            name="clips", num_steps=config.vae_clip_steps, peak_lr=1.5e-3, batches=short_clips, reach=0, noise_std=0.1
        ),
        Phase(
            name="details",
            num_steps=config.vae_detail_steps,
            peak_lr=2e-3,
            batches=short_clips,
            reach=2,
            noise_std=0.05,
        ),
        Phase(
            name="colours",
            num_steps=config.vae_colour_steps,
            peak_lr=2e-3,
            batches=short_clips,
            reach=1,
            noise_std=0.05,
            chroma_weight=8.0,
        ),
        Phase(
            name="decoder",
            num_steps=config.vae_decoder_steps,
            peak_lr=1.5e-3,
            batches=((2, NUM_FRAMES),),
            reach=1,
            noise_std=0.05,
            chroma_weight=8.0,
            decoder_only=True,
        ),
    ]
    names = [phase.name for phase in phases]
    return phases[names.index(config.stage) :] if config.stage in names else phases


@dataclass
class Lane:
    """A clip on its way through the decoder, and what the decoder remembers of the frames that have passed."""

    videos: torch.Tensor  # (1, 3, T, H, W)
    hidden: torch.Tensor  # (1, 16, F, h, w), noisy latents
    memory: list[torch.Tensor | str | None]  # one for each convolution
    frame: int = 0  # the next latent frame

    @classmethod
    @torch.no_grad()
    def start(cls, vae: AutoencoderKLWan, clip: torch.Tensor, noise_std: float) -> "Lane":
        videos = to_videos(clip[None])
        with autocast():
            latents = vae.encode(videos).latent_dist.mode().float()
        vae.clear_cache()  # which knows how many convolutions there are
        return cls(videos, latents + noise_std * torch.randn_like(latents), [None] * len(vae._feat_map))

    def advance(self, vae: AutoencoderKLWan, num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next frames, decoded, and as they should be; gradients do not reach back into those before."""
        decoded, first = [], self.frame
        self.memory = [kept.detach() if isinstance(kept, torch.Tensor) else kept for kept in self.memory]
        with autocast():
            for self.frame in range(first, min(first + num_frames, NUM_LATENT_FRAMES)):
                latents = vae.post_quant_conv(self.hidden[:, :, self.frame : self.frame + 1])
                is_first = {"first_chunk": True} if self.frame == 0 else {}
                decoded.append(vae.decoder(latents, feat_cache=self.memory, feat_idx=[0], **is_first))
        self.frame += 1
        video = unpatchify(torch.cat(decoded, dim=2).float(), patch_size=vae.config.patch_size)
        video = video + (video.clamp(-1, 1) - video).detach()  # ink that comes out far too white has a gradient, too
        return video, self.videos[:, :, max(4 * first - 3, 0) : 4 * self.frame - 3]

    @property
    def is_over(self) -> bool:
        return self.frame == NUM_LATENT_FRAMES


def sharp_error(video: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Error whose least is at the median, which is ink or paper, where that of `reconstruction_loss` is at the mean,
    which is grey. Pixels within 2 of ink weigh elevenfold, and those within 2 of the inside of a small loop 31fold.
    """
    ink = target.amin(dim=1) < 0.9  # (1, T, H, W)
    loops = inside_loops(to_frames(target)[0])[None]
    near_ink, near_loops = (max_pool3d(mask.float(), (1, 5, 5), stride=1, padding=(0, 2, 2)) for mask in (ink, loops))
    error = video - target
    luma = error.mean(dim=1, keepdim=True)
    absolute = partial(smooth_l1_loss, reduction="none", beta=0.2)
    distance = absolute(luma, torch.zeros_like(luma)) + 2 * absolute(error, luma.expand_as(error))
    return ((1 + 10 * near_ink + 20 * near_loops)[:, None] * distance).mean()


def train_loops(vae: AutoencoderKLWan, config: Config, *, num_lanes: int = 16, num_frames: int = 3) -> None:
    """Trains the decoder on a few latent frames at a time of many clips that are decoded side by side.

    Frames of a clip resemble each other, so a step has two clips instead of all frames of one. The decoder goes
    through whole clips all the same: from short ones it would learn colours that drift in long ones.
    """
    other_colours = tuple(colour for colour in COLOURS if colour not in KNOWN_COLOURS)
    num_known = config.vae_clips * 3 // 4
    wanted = training_sketches(tuple(KINDS), KNOWN_COLOURS, config.seed)[:num_known]
    wanted += training_sketches(tuple(KINDS), other_colours, config.seed)[: config.vae_clips - num_known]
    clips = torch.from_numpy(np.stack(list(film(wanted))))
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    vae.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=LOOPS_LR, betas=(0.9, 0.98))
    order = itertools.cycle(torch.randperm(len(clips)).tolist())
    lanes = [Lane.start(vae, clips[next(order)], noise_std=0.05) for _ in range(num_lanes)]
    with torch.no_grad():  # else all lanes would be at the same frame at all times
        for number, lane in enumerate(lanes[1:], start=1):
            lane.advance(vae, number * NUM_LATENT_FRAMES // num_lanes)
    random.shuffle(lanes)
    bar, smooth = trange(config.vae_loop_steps, desc="VAE, loops"), 0.0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = LOOPS_LR * cosine(step, config.vae_loop_steps)
        optimizer.zero_grad()
        for number in (2 * step % num_lanes, (2 * step + 1) % num_lanes):
            loss = sharp_error(*lanes[number].advance(vae, num_frames))
            loss.backward()
            smooth += max(0.01, 1 / (2 * step + 1)) * (loss.item() - smooth)
            if lanes[number].is_over:
                lanes[number] = Lane.start(vae, clips[next(order)], noise_std=0.05)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
    vae.requires_grad_(True).to(torch.float16).to(torch.float32)  # what is stored


def train_vae(vae: AutoencoderKLWan, config: Config) -> None:
    """Goes through the phases, clips by way of the chunked encoder and decoder; then fits the normalisation."""
    clips = torch.from_numpy(
        np.stack(list(film(training_sketches(tuple(KINDS), tuple(COLOURS), config.seed)[: config.vae_clips])))
    )
    for phase in vae_phases(config):
        vae.requires_grad_(True)
        for frozen in (vae.encoder, vae.quant_conv):
            frozen.requires_grad_(not phase.decoder_only)
        trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=phase.peak_lr, betas=(0.9, 0.98))
        bar, smooth = trange(phase.num_steps, desc=f"VAE, {phase.name}"), 0.0
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = phase.peak_lr * cosine(step, phase.num_steps)
            videos = crop(clips, *random.choice(phase.batches))
            loss = reconstruction_loss(vae, videos, phase)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            smooth += max(0.02, 1 / (step + 1)) * (loss.item() - smooth)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{smooth:.4f}")
    vae.requires_grad_(True).to(torch.float16).to(torch.float32)  # what is stored
    if config.stage != "decoder":
        fit_normalisation(vae, clips[torch.randperm(len(clips))[:64]])


@torch.no_grad()
def fit_normalisation(vae: AutoencoderKLWan, clips: torch.Tensor) -> None:
    """Sets latents_mean and latents_std so that (latents - mean) / std has zero mean and unit variance a channel."""
    latents = torch.cat([vae.encode(to_videos(some)).latent_dist.mode() for some in clips.split(4)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def latent_statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:  # (16, 1, 1, 1) each
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)


@torch.no_grad()
def encode_clips(wanted: list[Sketch], checkpoint: str) -> torch.Tensor:  # (N, 16, F, h, w) float16, normalised
    """Latents of the clips, on one thread: the convolutions are so small that threads get in each other's way."""
    torch.set_num_threads(1)
    vae = AutoencoderKLWan.from_pretrained(checkpoint, subfolder="vae")
    mean, std = latent_statistics(vae)
    videos = to_videos(torch.from_numpy(np.stack([filmed(sketch) for sketch in wanted])))
    return ((vae.encode(videos).latent_dist.mode() - mean) / std).half()


def cached_latents(wanted: list[Sketch], config: Config) -> torch.Tensor:
    """`encode_clips` in a process a core, kept in work_dir for the next run with the same VAE and clips."""
    file = Path(config.work_dir) / "latents.pt"
    weights = (Path(config.output_dir) / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    fingerprint = (hashlib.sha256(weights).hexdigest(), [prompt(sketch) for sketch in wanted])
    if file.exists():
        kept = torch.load(file, weights_only=True)
        if kept["fingerprint"] == fingerprint:
            return kept["latents"]
    portions = [wanted[start : start + 4] for start in range(0, len(wanted), 4)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as workers:
        encoded = workers.map(partial(encode_clips, checkpoint=config.output_dir), portions)
        latents = torch.cat(list(tqdm(encoded, total=len(portions), desc="encoding", unit="4 clips")))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"fingerprint": fingerprint, "latents": latents}, file)
    return latents


# ---- text encoder and transformer


class CountedPadding(WanAttnProcessor):
    """Cross-attention in which the last text token stands for all the zero tokens up to TEXT_LENGTH.

    Padding is not masked in WAN but zero, so n equal tokens are one token with log(n) added to its logit: the same
    result as with TEXT_LENGTH tokens, at the price of TRAIN_TEXT_LENGTH.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        length = encoder_hidden_states.shape[1]
        bias = hidden_states.new_zeros(1, 1, 1, length)
        bias[..., -1] = math.log(TEXT_LENGTH - length + 1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, bias, rotary_emb)


class ChosenFrames(nn.Module):
    """Rotary embedding of some latent frames of a clip, at their places in the whole clip.

    `frames` holds the indices of those that the transformer is given.
    """

    def __init__(self, rope: WanRotaryPosEmbed) -> None:
        super().__init__()
        self.rope, self.frames = rope, torch.arange(NUM_LATENT_FRAMES)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self.rope(hidden_states[:, :, :1].expand(-1, -1, NUM_LATENT_FRAMES, -1, -1))
        return tuple(part.unflatten(1, (NUM_LATENT_FRAMES, -1))[:, self.frames].flatten(1, 2) for part in whole)


def train_on_chosen_frames(transformer: WanTransformer3DModel) -> ChosenFrames:
    """Gives a transformer `ChosenFrames`, which comes back, and `CountedPadding`; `stock` takes them away."""
    transformer.rope = ChosenFrames(transformer.rope)
    for layer in transformer.blocks:
        layer.attn2.set_processor(CountedPadding())
    return transformer.rope


def stock(transformer: WanTransformer3DModel) -> None:
    """Takes the changes of `train_on_chosen_frames` back."""
    transformer.rope = transformer.rope.rope
    transformer.set_attn_processor(WanAttnProcessor())


class FlowMatching(nn.Module):
    """Text encoder and transformer as one module whose forward is the loss."""

    def __init__(self, pipeline: WanPipeline) -> None:
        super().__init__()
        self.text_encoder, self.transformer = pipeline.text_encoder, pipeline.transformer
        self.rope = train_on_chosen_frames(self.transformer)

    def forward(
        self,
        latents: torch.Tensor,  # (B, 16, F, h, w)
        frames: torch.Tensor,  # (F,)
        tokens: BatchEncoding,
        sigmas: torch.Tensor,  # (B,)
    ) -> torch.Tensor:
        """Mean squared error of the predicted velocity noise - latents."""
        self.rope.frames = frames
        noise, mix = torch.randn_like(latents), sigmas.view(-1, 1, 1, 1, 1)
        embeds = self.text_encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state
        prompt_embeds = embeds * tokens["attention_mask"][..., None]  # zeros after the end, as in WanPipeline
        velocity = self.transformer((1 - mix) * latents + mix * noise, 1000 * sigmas, prompt_embeds).sample
        return (velocity.float() - (noise - latents)).square().mean()


def draw_sigmas(batch_size: int, *, shift: float, pure_noise: float) -> torch.Tensor:  # (B,) in [0, 1]
    """Shifted-uniform sigmas, one from each part of [0, 1]; some are 1 instead."""
    uniform = (torch.arange(batch_size) + torch.rand(batch_size)) / batch_size
    sigmas = shift * uniform / (1 + (shift - 1) * uniform)
    return torch.where(torch.rand(batch_size) < pure_noise, torch.ones(batch_size), sigmas)


def train_base(pipeline: WanPipeline, config: Config) -> None:
    """Trains text encoder and transformer together; exports their moving average from time to time."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if has_bf16() else "no")
    wanted = training_sketches(BASE_KINDS, KNOWN_COLOURS, config.seed)
    with accelerator.main_process_first():
        latents = cached_latents(wanted, config)
    prompts = [prompt(sketch) for sketch in wanted]
    set_seed(config.seed, device_specific=True)
    same_everywhere = random.Random(config.seed)
    model = FlowMatching(pipeline)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.base_lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = LambdaLR(optimizer, partial(cosine, num_steps=config.base_steps, warmup=100))
    model, optimizer = accelerator.prepare(model, optimizer)
    bar, smooth = trange(config.base_steps, desc="base", disable=not accelerator.is_main_process), None
    for step in bar:
        share = FRAMES_AT_FIRST if step < 0.8 * config.base_steps else FRAMES_AT_LAST
        (num_frames,) = same_everywhere.choices(list(share), list(share.values()))
        batch_size = max(2, config.base_frames // accelerator.num_processes // num_frames)
        frames = torch.randperm(NUM_LATENT_FRAMES)[:num_frames].sort().values
        chosen = torch.randint(len(wanted), (batch_size,)).tolist()
        texts = ["" if random.random() < 0.1 else prompts[index] for index in chosen]
        tokens = pipeline.tokenizer(texts, padding="max_length", max_length=TRAIN_TEXT_LENGTH, return_tensors="pt")
        sigmas = draw_sigmas(batch_size, shift=config.shift, pure_noise=config.pure_noise)
        loss = model(latents[chosen][:, :, frames].float(), frames, tokens, sigmas)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(accelerator.unwrap_model(model))
        smooth = loss.item() if smooth is None else smooth + 0.01 * (loss.item() - smooth)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if accelerator.is_main_process and ((step + 1) % config.export_every == 0 or step + 1 == config.base_steps):
            averaged = copy.deepcopy(average.module)
            stock(averaged.transformer)
            pipeline.text_encoder, pipeline.transformer = averaged.text_encoder, averaged.transformer
            export(pipeline, config.output_dir)
            tqdm.write(f"exported after {step + 1} steps, loss {smooth:.4f}")
    accelerator.end_training()


# ---- figures


@torch.no_grad()
def report(pipeline: WanPipeline, config: Config) -> None:
    """Prints tables of held-out sketches, the trivial answers beside ours, and writes contact sheets to work_dir."""
    wanted = heldout_sketches(config.seed)
    targets = np.stack(list(film(wanted)))
    decoded = [pipeline.vae(to_videos(some)).sample for some in torch.from_numpy(targets).split(4)]
    answers = {
        "white clip": np.full_like(targets, 255),
        "mean training clip": np.broadcast_to(mean_clip(config), targets.shape),
        "VAE reconstruction": to_frames(torch.cat(decoded)).numpy(),
    }
    print_table("VAE, all kinds", targets, answers)
    contact_sheet(targets, answers["VAE reconstruction"], Path(config.work_dir) / "vae.png")
    answers["50 steps"] = sample(pipeline, [prompt(sketch) for sketch in wanted], config)
    known = np.array([sketch.kind in BASE_KINDS for sketch in wanted])
    for name, chosen in (("known", known), ("unknown", ~known)):
        print_table(f"Base, {name} kinds", targets[chosen], {key: clips[chosen] for key, clips in answers.items()})
        contact_sheet(targets[chosen], answers["50 steps"][chosen], Path(config.work_dir) / f"base_{name}.png")


def mean_clip(config: Config, num_clips: int = 200) -> np.ndarray:  # (T, H, W, 3)
    """The average of training clips of all kinds."""
    clips = [draw(sketch) for sketch in training_sketches(tuple(KINDS), KNOWN_COLOURS, config.seed)[:num_clips]]
    return np.mean(clips, axis=0).round().astype(np.uint8)


def sample(pipeline: WanPipeline, prompts: list[str], config: Config) -> np.ndarray:  # (B, T, H, W, 3)
    """What the stock pipeline draws, at its own text length."""
    clips = pipeline(
        prompts,
        height=HEIGHT,
        width=WIDTH,
        num_frames=NUM_FRAMES,
        num_inference_steps=50,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(config.seed),
    ).frames
    return np.rint(np.asarray(clips) * 255).astype(np.uint8)


def print_table(title: str, targets: np.ndarray, answers: dict[str, np.ndarray]) -> None:
    """Means over the clips, as a Markdown table."""
    columns = ("ink F1, 1 px", "ink F1, 2 px", "last frame, 2 px", "open loops", "colour error", "PSNR")
    print(f"\n| {title}, {len(targets)} clips | " + " | ".join(columns) + " |\n|---" + "|---:" * len(columns) + "|")
    for name, clips in answers.items():
        pairs = list(zip(clips, targets, strict=True))
        figures = (
            np.mean([mean_ink_f1(*pair, tolerance=1) for pair in pairs]),
            np.mean([mean_ink_f1(*pair, tolerance=2) for pair in pairs]),
            np.mean([ink_f1(clip[-1:], target[-1:], tolerance=2) for clip, target in pairs]),
            np.nanmean([open_loops(*pair) for pair in pairs]),  # umbrellas have no small loops
            np.mean([colour_error(*pair) for pair in pairs]),
        )
        print(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures), end="")
        print(f" | {np.mean([psnr(*pair) for pair in pairs]):.1f} dB |")


def contact_sheet(targets: np.ndarray, clips: np.ndarray, file: Path, moments: tuple[int, ...] = (20, 45, 80)) -> None:
    """A row a clip: target left, ours right, at three moments."""
    pictures = np.concatenate([targets[:, moments], clips[:, moments]], axis=1)  # (N, 2 M, H, W, 3)
    pictures = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=160)
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures])
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize((2 * sheet.shape[1], 2 * sheet.shape[0]), Image.Resampling.NEAREST).save(file)


def main(config: Config) -> None:
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    pipeline = new_pipeline(config)
    if config.stage not in ("new", "vae"):
        stored = WanPipeline.from_pretrained(config.output_dir)
        pipeline.vae = stored.vae
        pipeline = stored if config.stage in ("decoder", "loops", "continue") else pipeline
    if config.stage in ("base", "continue"):
        train_base(pipeline, config)
    elif config.stage == "report":
        report(stored, config)
    else:
        if config.stage not in ("new", "loops"):
            train_vae(pipeline.vae, config)
        if config.stage != "new":
            train_loops(pipeline.vae, config)
        export(pipeline, config.output_dir)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
