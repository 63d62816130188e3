"""Validation of a student: samples of fixed noise, and the loss on held-out clips with fixed draws.

The same prompts, noise and draws at every validation and in every run of the same seed, so that curves and videos can
be laid side by side.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm

from causal_wan.data.clips import Loadable
from causal_wan.data.samples import ClipBatch, collate
from causal_wan.data.settings import ClipShape
from causal_wan.memory.levers import on_device
from causal_wan.model.conditions import Conditions
from causal_wan.model.kv_cache import CACHE_DTYPES
from causal_wan.model.streaming_vae import decode_in_parts
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.processes import wait_for_all
from causal_wan.progress import show_progress
from causal_wan.records.metrics import MetricSums, Sums
from causal_wan.records.trackers import CaptionedVideo
from causal_wan.runs.inputs import Inputs, PrepareBatch, RegressionBatch
from causal_wan.sampling.noise import draw_noise
from causal_wan.sampling.rollout import Rollout, SamplingSchedule, roll_out
from causal_wan.seeds import noise_generator
from causal_wan.tables.prompt_schedules import FramePrompts, caption_of
from causal_wan.training.strategies import is_sharded
from causal_wan.video.writing import VideoWriter, as_frames


logger = logging.getLogger(__name__)


def share(count: int, process_index: int, num_processes: int) -> list[tuple[int, bool]]:
    """The items of `count` that a process takes, and whether each counts.

    All processes get equally many, since a sharded model's forward is a common effort: the last item is repeated, and
    repeats do not count.
    """
    numbers = range(process_index, -(-count // num_processes) * num_processes, num_processes)
    return [(min(number, count - 1), number < count) for number in numbers]


@torch.no_grad()
def validation_batches(
    accelerator: Any, inputs: Inputs, held_out: Loadable, prepare_batch: PrepareBatch
) -> list[tuple[RegressionBatch, bool]]:
    """This process's share of the held-out clips, encoded and noised once: the same draws at every validation."""
    numbers = share(len(held_out), accelerator.process_index, accelerator.num_processes)
    return [
        (prepare_batch(inputs, batch_of_one(held_out, number, inputs.config.data.shape)), counts)
        for number, counts in show_progress(numbers, desc="held-out clips")
    ]


def batch_of_one(held_out: Loadable, number: int, shape: ClipShape) -> ClipBatch:
    """A batch of one held-out clip, the same every time."""
    sample = held_out.load(number, torch.Generator(), shape)
    prompt = sample.pop("prompts")[0]
    return collate([sample | {"prompt": prompt, "sample_number": number, "errors": []}])


class Measures(Protocol):
    """What looks at the videos of a validation, as `causal_wan.distillation.samples.SampleMeasures` does."""

    def note(self, number: int, frames: np.ndarray) -> None:
        """Looks at the video of a prompt, `(T, height, width, 3)`, uint8."""

    def summarize(self) -> dict[str, float]:
        """What was found since the last time, over all processes, which all call this."""


class Validation:
    """Samples prompts and measures the loss on held-out batches; each process takes its share.

    Args:
        accelerator: Of the run.
        inputs: Of the run.
        compute_loss: Of a transformer, a batch and the number of its items.
        summarize: Sums over processes and batches -> metrics.
        output_dir: Videos go to `validation/step-N` in it.
        prompts: All prompts, of all processes; one a video, or one for each of its frames.
        batches: This process's prepared batches, and whether each counts.
        latent_shape: (C, F, H, W) of the videos to sample.
        measures: Looks at the videos; what it finds is among the metrics.

    The first prompts are those of the held-out clips. A student that was trained with given first frames, or with
    controls, gets theirs.
    """

    def __init__(
        self,
        accelerator: Any,
        inputs: Inputs,
        compute_loss: Callable[[Any, RegressionBatch, torch.Tensor], tuple[torch.Tensor, Sums]],
        *,
        summarize: Callable[[Sums], dict[str, float]],
        output_dir: str,
        prompts: list[str | FramePrompts],
        batches: list[tuple[RegressionBatch, bool]],
        latent_shape: tuple[int, int, int, int],
        measures: Measures | None = None,
    ) -> None:
        self.accelerator, self.inputs = accelerator, inputs
        self.compute_loss, self.summarize = compute_loss, summarize
        self.output_dir, self.prompts, self.batches = Path(output_dir), prompts, batches
        self.latent_shape, self.measures = latent_shape, measures
        num_items = sum(batch.num_items for batch, counts in batches if counts)
        wait_for_all()  # some have had more to encode than others
        self.num_items = accelerator.reduce(torch.as_tensor(num_items, device=accelerator.device))
        # A clip and its prompt have the same number, and so are with the same process, in the same place.
        self.first_frames: list[torch.Tensor] = []
        if inputs.config.method.first_frame_probability:
            self.first_frames = [batch.noisy.latents[:, :, :1] for batch, counts in batches if counts]
        self.controls = [batch.conditions.control_latents for batch, counts in batches if counts]
        self.skips_given_blocks = not is_sharded(accelerator)  # whose processes make each pass in common

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # layers that are compiled are so for whole clips, not for each block
    def __call__(
        self, transformer: CausalWanTransformer3DModel, step: int
    ) -> tuple[dict[str, float], dict[str, CaptionedVideo]]:
        """Metrics, and a video for each prompt, named `validation/NN`.

        What fails (memory, disk, a codec) is reported and counted in the metric `validation_failed`; the rest is done.

        Raises:
            Exception: Whatever a pass of sharded weights ends with, which processes make together.
        """
        transformer.eval()
        folder = self.output_dir / "validation" / f"step-{step:06d}"
        videos = {
            f"validation/{number:02d}": CaptionedVideo(folder / f"{number:02d}.mp4", caption_of(prompt))
            for number, prompt in enumerate(self.prompts)
        }
        own = share(len(self.prompts), self.accelerator.process_index, self.accelerator.num_processes)
        sample_failures: list[str] = []
        sums, loss_failures = MetricSums(), []
        with self._show_progress(own) as progress:
            for place, (number, counts) in enumerate(own, start=1):
                progress.set_postfix_str(f"video {place} of {len(own)}", refresh=False)
                name = f"validation/{number:02d}"
                with self._noted(name, sample_failures):
                    given = self.first_frames[place - 1] if place <= len(self.first_frames) else None
                    controls = self.controls[place - 1] if place <= len(self.controls) else None
                    latents = self.sample(transformer, number, progress, given, controls)
                    if counts:
                        with self._noted(name, sample_failures, is_common=False):
                            self.write(latents, videos[name].path, number, progress)
            progress.set_postfix_str("loss", refresh=False)
            with self._noted("the loss on held-out clips", loss_failures):
                sums = self.sum_losses(transformer, progress)
        metrics = self._gather(sums, len(sample_failures), len(loss_failures))
        return metrics, {name: video for name, video in videos.items() if video.path.is_file()}

    def _show_progress(self, own: list[tuple[int, bool]]) -> tqdm:
        """A bar that counts passes of samplers, latent frames that are decoded, and held-out batches."""
        num_frames, method = self.latent_shape[1], self.inputs.config.method
        lengths, num_steps = method.block_lengths(num_frames), len(method.inference_timesteps())
        num_passes = len(own) * len(lengths) * num_steps
        if self.skips_given_blocks and lengths[0] == 1:
            num_passes -= len(self.first_frames) * num_steps
        num_decoded = sum(counts for _, counts in own) * num_frames
        return show_progress(total=num_passes + num_decoded + len(self.batches), desc="validation")

    @contextlib.contextmanager
    def _noted(self, name: str, failures: list[str], *, is_common: bool = True) -> Iterator[None]:
        """Reports what its body raises, and notes it; but for a pass that others wait for, in common with this one."""
        try:
            yield
        except Exception as error:
            if is_common and is_sharded(self.accelerator) and self.accelerator.num_processes > 1:
                raise
            is_of_the_machine = isinstance(error, OSError | torch.OutOfMemoryError)
            logger.error(
                "%s failed (%s: %s); the run goes on",
                name,
                type(error).__name__,
                error,
                exc_info=None if is_of_the_machine else error,
            )
            failures.append(name)
        if failures:  # outside of the handler, which holds the tensors of the failed pass
            clear_device_cache(garbage_collection=True)

    def _gather(self, sums: MetricSums, num_failed_samples: int, num_failed_losses: int) -> dict[str, float]:
        """Metrics of all processes, on the main one."""
        wait_for_all()  # some have more to sample than others
        counts = torch.tensor([num_failed_samples, num_failed_losses], device=self.accelerator.device)
        num_failed_samples, num_failed_losses = self.accelerator.reduce(counts).tolist()
        failed = num_failed_samples + num_failed_losses
        metrics = {"validation_failed": float(failed)} if failed else {}
        metrics |= {} if self.measures is None else self.measures.summarize()
        if self.batches and not num_failed_losses:
            sums.reduce_to_main(self.accelerator)
            if self.accelerator.is_main_process:
                losses = {"loss": float(sums.sums.pop("loss")), **self.summarize(sums.sums)}
                metrics |= {f"validation_{name}": value for name, value in losses.items()}
        return metrics

    def sample(
        self,
        transformer: CausalWanTransformer3DModel,
        number: int,
        progress: tqdm,
        first_frame: torch.Tensor | None = None,
        controls: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The latents of a prompt's video `(1, C, F, H, W)`, from noise of the prompt's own number.

        Args:
            transformer: The student.
            number: Of the prompt.
            progress: Is told of each pass.
            first_frame: Latents `(1, C, 1, H, W)` that the video begins with.
            controls: Latents `(1, C', F, H, W)` that it follows.
        """
        method, validation = self.inputs.config.method, self.inputs.config.validation
        schedule = SamplingSchedule(timesteps=method.inference_timesteps(), sampler=method.student_sampler)
        generator = noise_generator(self.inputs.seed, number)
        noise = draw_noise(1, self.latent_shape, schedule.num_draws, generator=generator)

        def note(rollout: Rollout, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            progress.update()
            return latents

        def tell(prompt: str | FramePrompts) -> Conditions:
            return self.inputs.tell([prompt], self.latent_shape[1])

        blocks = roll_out(
            transformer,
            replace(tell(self.prompts[number]), control_latents=controls),
            noise.to(self.accelerator.device),
            schedule,
            negative_conditions=tell("") if validation.negative_prompts else None,
            guidance_scale=validation.validation_guidance_scale,
            cache_dtype=CACHE_DTYPES[self.inputs.config.memory.kv_cache_dtype],
            on_step_end=note,
            initial_latents=first_frame,
            skips_given_blocks=self.skips_given_blocks,
        )
        return torch.cat(list(blocks), dim=2)

    def write(self, latents: torch.Tensor, path: Path, number: int, progress: tqdm) -> None:
        """Decodes latents `(1, C, F, H, W)` of a prompt to an mp4, part by part; measured, it is kept whole."""
        vae, geometry, written = self.inputs.vae, self.inputs.geometry, []
        partial = path.with_name(f"partial-{path.name}")
        try:
            with on_device(vae, self.accelerator.device), VideoWriter(partial, geometry.frame_rate) as writer:
                for frames in decode_in_parts(vae, latents):
                    pictures = as_frames(frames[0])
                    writer.write(pictures)
                    written += [] if self.measures is None else [pictures]
                    progress.update(-(-frames.shape[2] // geometry.temporal_factor))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        if self.measures is not None:
            self.measures.note(number, np.concatenate(written))

    def sum_losses(self, transformer: CausalWanTransformer3DModel, progress: tqdm) -> MetricSums:
        """The training loss on this process's held-out batches, as sums in all and by level."""
        sums = MetricSums()
        for batch, counts in self.batches:
            loss, batch_sums = self.compute_loss(transformer, batch, self.num_items)
            weight = float(counts)
            sums.add({"loss": weight * loss, **{name: weight * value for name, value in batch_sums.items()}})
            progress.update()
        return sums
