"""Validation as the loop goes: when it is due, and what a run owes that was stopped before it."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from causal_wan.config.settings import TrainingConfig
from causal_wan.records.metrics import METRICS_NAME, StepLog, has_validation
from causal_wan.records.trackers import CaptionedVideo
from causal_wan.training.run import Run
from causal_wan.training.weights import ema_weights, reshard


logger = logging.getLogger(__name__)


class ValidationRuns:
    """Validates when it is due, with the weights of the result.

    A run that was told to stop, or was killed, between a checkpoint and its validation owes the validation: it comes
    first when the run goes on, as does that of a new run with `validate_first`. One in which the run died is not tried
    again, or it would cost every run that resumes.

    Args:
        run: Of the loop.
        validate: As in `train`.
        log: Where the metrics go.
    """

    BEGUN_NAME = "validation-begun"

    def __init__(
        self,
        run: Run,
        validate: Callable[[torch.nn.Module, int], tuple[dict[str, float], dict[str, CaptionedVideo]]],
        log: StepLog,
    ) -> None:
        self.run, self.validate, self.log = run, validate, log
        self._begun = Path(run.config.output_dir) / self.BEGUN_NAME

    def is_due(self) -> bool:
        """Whether the step that is done is to be validated."""
        return is_due(self.run.state.step, self.run.config.validation_steps, self.run.config)

    def is_owed(self) -> bool:
        """Whether the step that the run goes on from was to be validated and was not. Every process has to ask."""
        accelerator, step, owes = self.run.accelerator, self.run.state.step, False
        if accelerator.is_main_process and (self.is_due() if step else self.run.config.validate_first):
            is_done = has_validation(Path(self.run.config.output_dir) / METRICS_NAME, step)
            died = step > 0 and self._begun.is_file() and self._begun.read_bytes() == str(step).encode()
            if died and not is_done:
                logger.warning("the validation of step %d is left out: the run ended in it", step)
            owes = not (is_done or died)
        return bool(accelerator.reduce(torch.tensor(int(owes), device=accelerator.device)))

    def __call__(self) -> None:
        """Validates the step that is done."""
        run = self.run
        if run.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # of a full disk
                self._begun.write_text(str(run.state.step))
        student = run.student
        with ema_weights(student):
            self.log.write_validation(*self.validate(student.unwrapped_model, run.state.step))
        reshard(student.unwrapped_model)
        student.model.train()
        if run.accelerator.is_main_process:
            with contextlib.suppress(OSError):
                self._begun.unlink(missing_ok=True)


def is_due(step: int, every: int, config: TrainingConfig) -> bool:
    """Whether something that happens every so many steps (0 is never), and at the end, happens after this one."""
    return every > 0 and (step % every == 0 or step == config.max_train_steps)
