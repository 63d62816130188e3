"""Rows of a stream as the model sees them, like those of a table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from causal_wan.data.clips import load_videos, shown_prompts
from causal_wan.data.rows import Row, ShortClipError, check_length, check_schedules, match_control
from causal_wan.data.samples import choose_prompt, drop_controls
from causal_wan.data.settings import DataConfig
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.tables.prompt_schedules import Prompt
from causal_wan.video.decoding import probe_video
from causal_wan.video.opening import describe_error


@dataclass(frozen=True)
class StreamDecoder:
    """Rows of a stream -> clips as the model sees them, like those of a table.

    Args:
        config: Settings of the clips.
        seed: Of the run.
        samples_per_step: Samples of an optimizer step, all processes together.
        start_sample: A sample that begins a step,
        start_step: and the number of that step.
    """

    config: DataConfig
    seed: int
    samples_per_step: int
    start_sample: int = 0
    start_step: int = 0

    def __call__(self, video: Any, prompts: tuple[Prompt, ...], number: int, *controls: Any) -> dict[str, Any] | None:
        """One clip with its controls; None if it is short and to be left out.

        Args:
            video: The clip.
            prompts: Of which one is drawn.
            number: Of the sample.
            controls: Videos that control it.

        Raises:
            ValueError, OSError, av.FFmpegError: If it cannot be used.
        """
        if not prompts:
            raise ValueError("the prompt is empty")
        row = self._probe([video, *controls], prompts)
        shape = self.config.shape_at(0, self.start_step + (number - self.start_sample) // self.samples_per_step)
        try:
            check_length(row, shape.num_frames, self.config)
        except ShortClipError:
            if self.config.short_clips == "skip":
                return None
            raise
        check_schedules(row)
        generator = seeded_generator(self.seed, RandomPurpose.CLIP, number)
        shown = shown_prompts(row, shape, self.config, generator)
        (clip, *controls), num_valid = load_videos(row, shape, self.config, generator)
        prompt = choose_prompt(shown, self.config, seed=self.seed, number=number)
        sample = {"video": clip, "controls": controls, "prompt": prompt, "num_valid_frames": num_valid}
        drop_controls(sample, self.config, seed=self.seed, number=number)
        return sample

    def _probe(self, videos: Sequence[Any], prompts: tuple[Prompt, ...]) -> Row:
        """The row of a clip, with those of its controls."""
        limits = self.config.limits
        clip, *controls = (Row(0, video, prompts, *probe_video(video, limits=limits)) for video in videos)
        checked = []
        for name, control in zip(self.config.control_column, controls, strict=True):
            try:
                checked.append(match_control(control, clip, self.config.limits))
            except ValueError as error:
                raise ValueError(f"its control {name}: {describe_error(error)}") from error
        return replace(clip, controls=tuple(checked))
