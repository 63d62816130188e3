"""A run: what it trains, one model or more by role, and all that changes as it is trained."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from causal_wan.config.settings import TrainingConfig
from causal_wan.devices import LateReader
from causal_wan.records.metrics import STUDENT, MetricSums
from causal_wan.records.trackers import Trackers
from causal_wan.training.strategies import count_replicas


@dataclass
class RunState:
    """How far a run is; stored in checkpoints."""

    step: int = 0
    num_samples: int = 0  # seen by all processes together
    num_processes: int = 1
    num_replicas: int = 1
    nonfinite_in_a_row: dict[str, int] = field(default_factory=dict)  # by role

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name in vars(self)})


@dataclass
class Trainee:
    """What a run trains in one role, prepared: a model, and all that changes it."""

    model: torch.nn.Module  # as wrapped by accelerate: the forward must go through it
    unwrapped_model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    rate_scales: tuple[float, ...] = (1.0,)  # learning rates of the optimizer's groups, over that of the config
    num_checked: int = 0  # first steps of this process that were checked to change weights


@dataclass
class Run:
    """The prepared parts of a run."""

    accelerator: Accelerator
    config: TrainingConfig
    trainees: dict[str, Trainee]  # by role; checkpoints number their files in this order
    state: RunState
    metrics: MetricSums
    trackers: Trackers
    settings: dict[str, Any] | None = None  # of the run, as a recipe; kept in checkpoints
    late: LateReader = field(default_factory=LateReader)

    @property
    def student(self) -> Trainee:
        """What the result is made of."""
        return self.trainees[STUDENT]

    @property
    def num_replicas(self) -> int:
        return count_replicas(self.accelerator)
