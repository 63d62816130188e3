"""Validation of a student: samples of fixed noise, and the loss on held-out clips with fixed draws.

The same prompts, noise and draws at every validation and in every run of the same seed, so that curves and videos can
be laid side by side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from causal_wan.kv_cache import CACHE_DTYPES
from causal_wan.memory import on_device
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.progress import show_progress
from causal_wan.regression import sample_generator
from causal_wan.rollout import Rollout, count_draws, draw_noise
from causal_wan.run_log import MetricSums, Sums
from causal_wan.streaming_vae import decode_in_parts
from causal_wan.trackers import CaptionedVideo
from causal_wan.transformer import CausalWanTransformer3DModel
from causal_wan.video_writing import VideoWriter, as_frames


def share(count: int, process_index: int, num_processes: int) -> list[tuple[int, bool]]:
    """The items of `count` that a process takes, and whether each counts.

    All processes get equally many, since a sharded model's forward is a common effort: the last item is repeated, and
    repeats do not count.
    """
    numbers = range(process_index, -(-count // num_processes) * num_processes, num_processes)
    return [(min(number, count - 1), number < count) for number in numbers]


class Validation:
    """Samples prompts and measures the loss on held-out batches; each process takes its share.

    Args:
        accelerator: Of the run.
        inputs: Has `config`, `seed`, `vae`, `embed(prompts)` and `summarize`, as `causal_wan.method_inputs.Inputs`.
        compute_loss: Of a transformer, a batch and the number of its items.
        output_dir: Videos go to `validation/step-N` in it.
        prompts: All prompts, of all processes.
        batches: This process's prepared batches, and whether each counts.
        latent_shape: (C, F, H, W) of the videos to sample.
    """

    def __init__(
        self,
        accelerator: Any,
        inputs: Any,
        compute_loss: Callable[[Any, dict, torch.Tensor], tuple[torch.Tensor, Sums]],
        *,
        output_dir: str,
        prompts: list[str],
        batches: list[tuple[dict, bool]],
        latent_shape: tuple[int, int, int, int],
    ) -> None:
        self.accelerator, self.inputs, self.compute_loss = accelerator, inputs, compute_loss
        self.output_dir, self.prompts, self.batches = Path(output_dir), prompts, batches
        self.latent_shape = latent_shape

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # layers that are compiled are so for whole clips, not for each block
    def __call__(
        self, transformer: CausalWanTransformer3DModel, step: int
    ) -> tuple[dict[str, float], dict[str, CaptionedVideo]]:
        """Metrics, and a video for each prompt, named `validation/NN`."""
        transformer.eval()
        folder = self.output_dir / "validation" / f"step-{step:06d}"
        videos = {
            f"validation/{number:02d}": CaptionedVideo(folder / f"{number:02d}.mp4", prompt)
            for number, prompt in enumerate(self.prompts)
        }
        own = share(len(self.prompts), self.accelerator.process_index, self.accelerator.num_processes)
        with self._show_progress(own) as progress:
            for place, (number, counts) in enumerate(own, start=1):
                progress.set_postfix_str(f"video {place} of {len(own)}", refresh=False)
                latents = self.sample(transformer, number, progress)
                if counts:
                    self.write(latents, videos[f"validation/{number:02d}"].path, progress)
            self.accelerator.wait_for_everyone()
            progress.set_postfix_str("loss", refresh=False)
            return self.measure_loss(transformer, progress) if self.batches else {}, videos

    def _show_progress(self, own: list[tuple[int, bool]]) -> tqdm:
        """A bar that counts passes of samplers, latent frames that are decoded, and held-out batches."""
        num_frames, method = self.latent_shape[1], self.inputs.config.method
        num_passes = len(method.block_lengths(num_frames)) * len(method.inference_timesteps())
        num_decoded = sum(counts for _, counts in own) * num_frames
        return show_progress(total=len(own) * num_passes + num_decoded + len(self.batches), desc="validation")

    def sample(self, transformer: CausalWanTransformer3DModel, number: int, progress: tqdm) -> torch.Tensor:
        """The latents of a prompt's video `(1, C, F, H, W)`, from noise of the prompt's own number."""
        config = self.inputs.config
        method, validation = config.method, config.validation
        timesteps, generator = method.inference_timesteps().tolist(), sample_generator(self.inputs.seed, number)
        sampler = method.student_sampler
        noise = draw_noise(1, self.latent_shape, count_draws(len(timesteps), sampler), generator=generator)
        pipeline = CausalWanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer
        )

        def note(rollout: Rollout, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            progress.update()
            return latents

        return pipeline.sample_latents(
            self.inputs.embed([self.prompts[number]]),
            noise.to(self.accelerator.device),
            timesteps,
            sampler=sampler,
            negative_prompt_embeds=self.inputs.embed([""]) if validation.negative_prompts else None,
            guidance_scale=validation.validation_guidance_scale,
            cache_dtype=CACHE_DTYPES[config.memory.kv_cache_dtype],
            on_step_end=note,
        )

    def write(self, latents: torch.Tensor, path: Path, progress: tqdm) -> None:
        """Decodes latents `(1, C, F, H, W)` to an mp4, in memory that does not grow with the clip."""
        vae = self.inputs.vae
        with on_device(vae, self.accelerator.device), VideoWriter(path) as writer:
            for frames in decode_in_parts(vae, latents):
                writer.write(as_frames(frames[0]))
                progress.update(-(-frames.shape[2] // vae.config.scale_factor_temporal))

    def measure_loss(self, transformer: CausalWanTransformer3DModel, progress: tqdm) -> dict[str, float]:
        """The training loss on the held-out batches, in all and by level."""
        sums = MetricSums()
        num_items = sum(batch["num_items"] for batch, counts in self.batches if counts)
        num_items = self.accelerator.reduce(torch.as_tensor(num_items, device=self.accelerator.device))
        for batch, counts in self.batches:
            loss, batch_sums = self.compute_loss(transformer, batch, num_items)
            weight = float(counts)
            sums.add({"loss": weight * loss, **{name: weight * value for name, value in batch_sums.items()}})
            progress.update()
        sums.reduce_to_main(self.accelerator)
        if not self.accelerator.is_main_process:
            return {}
        metrics = {"loss": float(sums.sums.pop("loss")), **self.inputs.summarize(sums.sums)}
        return {f"validation_{name}": value for name, value in metrics.items()}
