"""Trackers of a run: wandb, tensorboard and trackio, side by side, none of which can end it.

accelerate's own wrappers log scalars alone, start all or none, and let every error through; what is shown here besides
(videos with their prompts, the config, charts by level) and what a resumed run needs differs by library anyway.
"""

import json
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol


logger = logging.getLogger(__name__)

TrackerName = Literal["wandb", "tensorboard", "trackio"]

IDENTITY_NAME = "tracker_run.json"


@dataclass(frozen=True)
class CaptionedVideo:
    """An mp4 file and what it was made from."""

    path: Path
    caption: str


@dataclass(frozen=True)
class TrackedRun:
    """What a run is known by to its trackers, over interruptions."""

    project: str
    name: str
    id: str
    output_dir: str


class Tracker(Protocol):
    """One library; whatever it raises is dealt with by `Trackers`."""

    name: TrackerName

    def rewind(self, step: int) -> None: ...
    def log(self, entry: dict[str, float], step: int) -> None: ...
    def log_videos(self, videos: dict[str, CaptionedVideo], step: int) -> None: ...
    def finish(self) -> None: ...


def identify_run(output_dir: str, *, project: str, run_name: str | None, resumes: bool) -> TrackedRun:
    """The identity kept in the output folder if the run is to go on there, else a new one, written to it."""
    path = Path(output_dir) / IDENTITY_NAME
    if resumes and path.exists():
        try:
            return TrackedRun(**json.loads(path.read_text()), output_dir=output_dir)
        except (ValueError, TypeError) as error:  # cut off by a full disk
            logger.warning("%s does not say what trackers know the run by (%s): it gets a new name", path, error)
    name = run_name or Path(output_dir).resolve().name
    run = TrackedRun(project=project, name=name, id=uuid.uuid4().hex[:8], output_dir=output_dir)
    path.write_text(json.dumps({key: value for key, value in asdict(run).items() if key != "output_dir"}) + "\n")
    return run


class Trackers:
    """The trackers of a run, of its main process; what one of them raises is a line in the log."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self.trackers = list(trackers)
        self._failing: set[str] = set()

    def rewind(self, step: int) -> None:
        """Tells them that what they have of later steps is going to come again."""
        self._each(lambda tracker: tracker.rewind(step))

    def log(self, entry: dict[str, float], step: int) -> None:
        """Writes the metrics of a step."""
        self._each(lambda tracker: tracker.log(entry, step))

    def log_videos(self, videos: dict[str, CaptionedVideo], step: int) -> None:
        """Writes the videos of a step, by name."""
        if videos:
            self._each(lambda tracker: tracker.log_videos(videos, step))

    def finish(self) -> None:
        """Waits until all is written."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in self.trackers:
            try:
                action(tracker)
                self._failing.discard(tracker.name)
            except Exception as error:  # a service, a disk: each library has errors of its own
                if tracker.name not in self._failing:  # once, until it works again
                    logger.error(
                        "%s could not be written to (%s: %s). The run goes on, and metrics.jsonl has what is missing.",
                        tracker.name,
                        type(error).__name__,
                        " ".join(str(error).split()),
                    )
                self._failing.add(tracker.name)
