"""Validation of a student: samples of fixed noise, and the loss on held-out clips with fixed draws.

The same prompts, noise and draws at every validation and in every run of the same seed, so that curves and videos can
be laid side by side.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from causal_wan.encoding import decode_latents
from causal_wan.memory import on_device
from causal_wan.pipeline import CausalWanPipeline
from causal_wan.processes import wait_for_all
from causal_wan.regression import sample_generator
from causal_wan.rollout import count_draws, draw_noise
from causal_wan.run_log import MetricSums, Sums
from causal_wan.trackers import CaptionedVideo
from causal_wan.transformer import CausalWanTransformer3DModel
from causal_wan.video_writing import write_video


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
        for number, counts in share(len(self.prompts), self.accelerator.process_index, self.accelerator.num_processes):
            video = self.sample(transformer, number)
            if counts:
                write_video(videos[f"validation/{number:02d}"].path, video)
        wait_for_all()
        return self.measure_loss(transformer) if self.batches else {}, videos

    def sample(self, transformer: CausalWanTransformer3DModel, number: int) -> torch.Tensor:
        """The video of a prompt, from noise of the prompt's own number, in [-1, 1], `(3, T, height, width)`."""
        method, validation = self.inputs.config.method, self.inputs.config.validation
        timesteps, generator = method.inference_timesteps().tolist(), sample_generator(self.inputs.seed, number)
        sampler = method.student_sampler
        noise = draw_noise(1, self.latent_shape, count_draws(len(timesteps), sampler), generator=generator)
        pipeline = CausalWanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer
        )
        latents = pipeline.sample_latents(
            self.inputs.embed([self.prompts[number]]),
            noise.to(self.accelerator.device),
            timesteps,
            sampler=sampler,
            negative_prompt_embeds=self.inputs.embed([""]) if validation.negative_prompts else None,
            guidance_scale=validation.validation_guidance_scale,
        )
        with on_device(self.inputs.vae, self.accelerator.device):
            return decode_latents(self.inputs.vae, latents)[0]

    def measure_loss(self, transformer: CausalWanTransformer3DModel) -> dict[str, float]:
        """The training loss on the held-out batches, in all and by level."""
        sums = MetricSums()
        num_items = sum(batch["num_items"] for batch, counts in self.batches if counts)
        num_items = self.accelerator.reduce(torch.as_tensor(num_items, device=self.accelerator.device))
        for batch, counts in self.batches:
            loss, batch_sums = self.compute_loss(transformer, batch, num_items)
            weight = float(counts)
            sums.add({"loss": weight * loss, **{name: weight * value for name, value in batch_sums.items()}})
        sums.reduce_to_main(self.accelerator)
        if not self.accelerator.is_main_process:
            return {}
        metrics = {"loss": float(sums.sums.pop("loss")), **self.inputs.summarize(sums.sums)}
        return {f"validation_{name}": value for name, value in metrics.items()}
