"""Rows of a stream as the model sees them, like those of a table."""

from dataclasses import dataclass
from typing import Any

from causal_wan.data.clips import load_video, shown_prompts
from causal_wan.data.rows import Row, ShortClipError, check_length, check_schedules
from causal_wan.data.samples import choose_prompt
from causal_wan.data.settings import DataConfig
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.tables.prompt_schedules import Prompt
from causal_wan.video.decoding import probe_video


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

    def __call__(self, video: Any, prompts: tuple[Prompt, ...], number: int) -> dict[str, Any] | None:
        """One clip; None if it is short and to be left out.

        Raises:
            ValueError, OSError, av.FFmpegError: If it cannot be used.
        """
        if not prompts:
            raise ValueError("the prompt is empty")
        row = Row(0, video, prompts, *probe_video(video, limits=self.config.limits))
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
        clip, num_valid = load_video(row, shape, self.config, generator)
        prompt = choose_prompt(shown, self.config, seed=self.seed, number=number)
        return {"video": clip, "prompt": prompt, "num_valid_frames": num_valid}
