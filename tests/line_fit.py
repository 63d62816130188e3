"""The smallest run of the loop: y = 3 x, fitted by one weight."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, Dataset

from causal_wan.config.settings import TrainingConfig
from causal_wan.records.metrics import STUDENT
from causal_wan.training.loop import train
from causal_wan.training.setup import make_accelerator, prepare_run
from causal_wan.training.weights import ema_weights, gather_weights


class Numbers(Dataset):
    """Sample p of the run is the number p."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def __len__(self):
        return self.end - self.start

    def __getitem__(self, index):
        return torch.tensor(float(self.start + index))


class LineBatch(NamedTuple):
    """A batch as `train` and the loss want it."""

    x: torch.Tensor
    mask: torch.Tensor
    num_items: torch.Tensor
    num_tokens: int


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.linear.weight, 0.5)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)


def config(tmp_path, **changes):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 8,
        "train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler": "cosine",
        "logging_steps": 3,
        "checkpointing_steps": 4,
        "validation_steps": 1,
        "report_to": ("none",),
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
    }
    return TrainingConfig(**{**defaults, **changes})


def run_training(
    training,
    break_samples=(),
    validate=None,
    save_result=None,
    change=lambda accelerator: None,
    settings=None,
    on_prepare=lambda batch: None,
    roles=(STUDENT,),
    turns=lambda step: (STUDENT,),
    role_rates=None,
    is_broken=lambda role, step: False,
):
    """Fits y = 3 x of numbers modulo 7, with every third number masked out of the loss."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator(training)
    change(accelerator)

    def prepare_batch(batch):
        on_prepare(batch)
        batch = batch.to(accelerator.device)
        x = (batch % 7)[:, None] / 7
        x = torch.where(torch.isin(batch, torch.tensor(break_samples, device=batch.device))[:, None], float("nan"), x)
        mask = batch % 3 != 0
        return LineBatch(x, mask, mask.sum(), len(batch))

    def compute_loss(role, model, batch, num_items):
        errors = (model(batch.x) - 3 * batch.x).square()[:, 0]
        loss = torch.where(batch.mask, errors, 0.0).sum() / num_items
        if is_broken(role, run.state.step):
            loss = float("nan") * loss
        return loss, {"count": batch.mask.sum().double()}

    models = {role: Line() for role in roles}
    run = prepare_run(accelerator, training, models, settings=settings, role_rates=role_rates)
    run.is_complete = train(
        run,
        make_dataloader=lambda start, end, step: DataLoader(Numbers(start, end), batch_size=training.train_batch_size),
        prepare_batch=prepare_batch,
        losses={role: partial(compute_loss, role) for role in roles},
        turns=turns,
        summarize=lambda sums: {"count": float(sums["count"])},
        validate=validate,
        save_result=save_result,
    )
    result = []
    for trainee in run.trainees.values():
        with ema_weights(trainee):
            result += gather_weights(accelerator, trainee).values()
    return run, result


def entries(training):
    lines = (Path(training.output_dir) / "metrics.jsonl").read_text().splitlines()
    deterministic = ["step", "generator_loss", "generator_grad_norm", "lr", "count", "num_nonfinite_steps"]
    deterministic += ["critic_loss", "critic_grad_norm", "critic_lr"]
    logged = [json.loads(line) for line in lines]
    return [{key: entry[key] for key in deterministic if key in entry} for entry in logged if "lr" in entry]


def kill_at_step(step):
    def validate(model, now):
        if now == step:
            raise KeyboardInterrupt
        return {}, {}

    return validate
