"""Where the time of a step goes: a trace of chosen steps by torch's profiler, and the parts of a step as a chart."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch.profiler import record_function


logger = logging.getLogger(__name__)

FOLDER = "profile"
COMMUNICATION = ("nccl", "gloo")  # what its events are called


class StepProfiler:
    """Profiles some steps of a run while it is entered; with no steps chosen, all it does is to name parts.

    Writes to `profile/` in the output folder, on every process: `trace-N.json.gz` for Perfetto (ui.perfetto.dev) or
    chrome://tracing, and on the main one `step.json`, seconds of each part of a step, and `step.png`.

    Args:
        accelerator: Of the run.
        steps: First and last step, counted from 1; None is none.
        output_dir: Of the run.
        start_step: Steps done before it is entered.
    """

    def __init__(
        self, accelerator: Any, steps: tuple[int, int] | None, output_dir: str | Path, start_step: int
    ) -> None:
        self.accelerator, self.folder = accelerator, Path(output_dir) / FOLDER
        self._steps = range(0) if steps is None else range(max(steps[0], start_step + 1), steps[1] + 1)
        self._step = start_step + 1  # the one that is going on
        self._marks: list[tuple[str, Any, Any]] = []
        self._stack = contextlib.ExitStack()
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> Self:
        if not self._steps:
            return self
        skipped = self._steps.start - self._step
        schedule = torch.profiler.schedule(
            skip_first=max(skipped - 1, 0), wait=0, warmup=min(skipped, 1), active=len(self._steps), repeat=1
        )
        self._profiler = self._stack.enter_context(
            torch.profiler.profile(schedule=schedule, record_shapes=True, on_trace_ready=self._write)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    def end_step(self) -> None:
        """A step is over."""
        self._step += 1
        if self._profiler is not None:
            self._profiler.step()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step, named in traces and timed while steps are profiled."""
        if self._step not in self._steps:
            with record_function(name):
                yield
            return
        start = self._now()
        with record_function(name):
            yield
        self._marks.append((name, start, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        """A point in time: of the device if there is one, whose work the host runs ahead of."""
        if self.accelerator.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _write(self, profiler: torch.profiler.profile) -> None:
        """What was measured; a full disk costs no run its life."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / f"trace-{self.accelerator.process_index}.json.gz"))
            if self.accelerator.is_main_process:
                parts = self._seconds_of_parts(profiler)
                (self.folder / "step.json").write_text(json.dumps(parts, indent=2))
                draw_parts(parts, self.folder / "step.png", f"steps {self._steps[0]} to {self._steps[-1]}, a step")
                logger.info("profiled steps %d to %d: %s", self._steps[0], self._steps[-1], self.folder)
        except OSError as error:
            logger.error("the profile could not be written (%s); the run goes on.", error)

    def _seconds_of_parts(self, profiler: torch.profiler.profile) -> dict[str, float]:
        """Seconds of each part of a step, the mean over the steps; communication is within the others."""
        parts: dict[str, float] = {}
        on_device = self.accelerator.device.type == "cuda"
        if on_device:
            torch.cuda.synchronize()
        for name, start, end in self._marks:
            seconds = start.elapsed_time(end) / 1e3 if on_device else end - start
            parts[name] = parts.get(name, 0.0) + seconds
        parts["communication (within the others)"] = sum(
            (event.device_time_total if on_device else event.cpu_time_total) / 1e6
            for event in profiler.key_averages()
            if event.key.startswith(COMMUNICATION)
        )
        return {name: seconds / len(self._steps) for name, seconds in parts.items()}


def draw_parts(parts: dict[str, float], path: str | Path, title: str) -> None:
    """A bar for each part of a step, with its share of all that do not lie within others, as a PNG.

    Args:
        parts: Name -> seconds.
        path: Of the picture.
        title: Above it.
    """
    from matplotlib.figure import Figure

    whole = sum(seconds for name, seconds in parts.items() if "within" not in name)
    figure = Figure(figsize=(8, 0.5 * len(parts) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(parts)[::-1]
    bars = axes.barh(names, [1e3 * parts[name] for name in names], color="#4477aa")
    shares = [f"{1e3 * parts[name]:.1f} ms, {100 * parts[name] / whole:.1f} %" for name in names]
    axes.bar_label(bars, shares, padding=4)
    axes.margins(x=0.3)
    axes.set_xlabel("ms")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
