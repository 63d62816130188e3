"""Metrics of a run: sums over processes and steps, written to metrics.jsonl and the trackers, and read again."""

import contextlib
import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from causal_wan.records.trackers import CaptionedVideo


logger = logging.getLogger(__name__)

Sums = dict[str, torch.Tensor]

METRICS_NAME = "metrics.jsonl"
STUDENT = "student"  # the role of what the result is made of; most runs train nothing else


class StepLog:
    """Writes the metrics of the steps since the last entry to metrics.jsonl and the trackers."""

    def __init__(self, run: Any, summarize: Callable[[Sums], dict[str, float]]) -> None:
        self.run, self.summarize = run, summarize
        self._was_cut_off = False  # the last line of the file, by a full disk
        self._start_interval()

    def _start_interval(self) -> None:
        self.seconds = {"data": 0.0, "compute": 0.0}
        self.num_tokens = 0
        self.num_steps = 0

    def count_step(self, num_tokens: int) -> None:
        """Counts a step and its latent tokens."""
        self.num_steps += 1
        self.num_tokens += num_tokens

    @contextlib.contextmanager
    def timed(self, part: Literal["data", "compute"]) -> Iterator[None]:
        """Adds the wall time of its body to a part of the step."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def write(self) -> dict[str, float]:
        """Reduces the metrics over processes, writes them on the main one and starts the next interval."""
        run, metrics = self.run, self.run.metrics
        metrics.reduce_to_main(run.accelerator)
        entry: dict[str, float] = {}
        if run.accelerator.is_main_process:
            entry = self._entry(dict(metrics.sums))
            self._record(entry)
        metrics.sums = {}
        self._start_interval()
        return entry

    def write_validation(self, metrics: dict[str, float], videos: dict[str, CaptionedVideo]) -> None:
        """Writes what a validation measured and hands its videos to the trackers; its time counts for no step."""
        if self.run.accelerator.is_main_process:
            self._record(metrics)
            self.run.trackers.log_videos(videos, self.run.state.step)

    def _entry(self, sums: Sums) -> dict[str, float]:
        seconds = sum(self.seconds.values())
        num_tokens = self.num_tokens * self.run.num_replicas
        num_skipped, entry, rates = float(sums.pop("num_nonfinite_steps")), {}, {}
        for role, trainee in self.run.trainees.items():
            entry |= pop_means(sums, role)
            rates[sum_name(role, "lr")] = trainee.lr_scheduler.get_last_lr()[0]
        if entry:
            entry |= self.summarize(sums)
        return entry | {
            **rates,
            "num_nonfinite_steps": num_skipped,
            "seconds_per_step": seconds / self.num_steps,
            "data_seconds_per_step": self.seconds["data"] / self.num_steps,
            "compute_seconds_per_step": self.seconds["compute"] / self.num_steps,
            "latent_tokens_per_second": num_tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self.run.accelerator.device),
        }

    def _record(self, entry: dict[str, float]) -> None:
        step = self.run.state.step
        try:
            with (Path(self.run.config.output_dir) / METRICS_NAME).open("a") as file:
                file.write("\n" * self._was_cut_off + json.dumps({"step": step, **entry}) + "\n")
            self._was_cut_off = False
        except OSError as error:
            self._was_cut_off = True
            logger.error("the metrics of step %d could not be written (%s); the run goes on.", step, error)
        self.run.trackers.log(entry, step)


def pop_means(sums: Sums, role: str) -> dict[str, float]:
    """Takes a role's own sums out, and returns their means over its steps; nothing if it has taken none."""
    names = [sum_name(role, name) for name in ("num_steps", "loss", "grad_norm")]
    num_taken, loss, grad_norm = (float(sums.pop(name, 0.0)) for name in names)
    logged_as = "generator" if role == STUDENT else role
    if not num_taken:
        return {}
    return {f"{logged_as}_loss": loss / num_taken, f"{logged_as}_grad_norm": grad_norm / num_taken}


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory in use so far: of tensors on a GPU, which is what the memory plan foresees.

    On a CPU it is that of the process, which nobody counts by tensors: the libraries come on top, and the pages of
    weight files that are mapped, which stay as long as the system has room for them.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricSums:
    """Sums over the steps since the last log entry; stored in checkpoints, so that a resumed run logs the same."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(self, sums: Sums) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def reduce_to_main(self, accelerator: Any) -> None:
        """Moves the sums of all processes to the main one."""
        for name, value in sorted(self.sums.items()):
            total = accelerator.reduce(value.clone())
            self.sums[name] = total if accelerator.is_main_process else torch.zeros_like(total)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = state["sums"]


def sum_name(role: str, name: str) -> str:
    """What a sum of a role's steps is called; the student's go without its name, as in checkpoints of before."""
    return name if role == STUDENT else f"{role}_{name}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file, but for what a kill or a full disk has left of some; none without a file."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drops the entries of a metrics file after `last_step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = [entry for entry in read_metrics(path) if entry["step"] <= last_step]
    partial = path.with_name(f"partial-{path.name}")  # a full disk leaves the file as it is
    partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    partial.replace(path)


def has_validation(path: Path, step: int) -> bool:
    """Whether a metrics file has the entry of a validation after a step."""
    return any(entry["step"] == step and "lr" not in entry for entry in read_metrics(path))  # of a step, it has one
