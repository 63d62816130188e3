"""The libraries of trackers: which are there, and each as `Trackers` wants it."""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
from PIL import Image

from causal_wan.records.trackers import CaptionedVideo, TrackedRun, Tracker, TrackerName, Trackers


logger = logging.getLogger(__name__)

GIF_SIDE = 320  # pixels at most: a GIF is some ten times as large as the mp4 it shows
CHARTED = ("loss", "validation_loss", "pred_latent_std", "blur_gap")
"""Metrics by level, each drawn as one chart of all its levels where the tracker can be told so."""


def resolve_trackers(report_to: Iterable[str]) -> list[TrackerName]:
    """The trackers that `--report_to` means: `all` are those that are installed, `none` none.

    Raises:
        ValueError: If one is not installed.
    """
    if "all" in report_to:
        return [name for name in TRACKERS if _is_installed(name)]
    names = [name for name in TRACKERS if name in report_to]
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"report_to must name trackers that are installed, but {' and '.join(missing)} cannot be found; run "
            f"`pip install {' '.join(missing)}`, or leave them out (metrics.jsonl is written in any case)."
        )
    return names


def _is_installed(package: str) -> bool:
    try:  # a folder called `wandb`, as its runs leave behind, can be found but is no package
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return importlib.util.find_spec(package) is not None


def start_each(names: Iterable[TrackerName], run: TrackedRun, config: dict[str, Any], *, must_start: bool) -> Trackers:
    """Starts trackers and shows them the config.

    Raises:
        ValueError: If one does not start that must: that of a new run, of which nothing is lost yet.
    """
    started = []
    for name in names:
        try:
            started.append(TRACKERS[name](run, config))
        except Exception as error:
            reason = f"{name} could not be started ({type(error).__name__}: {' '.join(str(error).split())})"
            if must_start:
                advice = "; run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
                raise ValueError(f"{reason}{advice}; or leave {name} out of --report_to.") from error
            logger.error("%s. The resumed run goes on without it, and metrics.jsonl has what is missing.", reason)
    return Trackers(started)


class Wandb:
    """Resumes by id. Of steps that come again the server keeps the first, which are the same but for timings."""

    name = "wandb"

    def __init__(self, run: TrackedRun, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=run.project, name=run.name, id=run.id, resume="allow", config=config, allow_val_change=True
        )

    def rewind(self, step: int) -> None:
        """Nothing to do: see above."""

    def log(self, entry: dict[str, float], step: int) -> None:
        self.run.log(entry, step=step)

    def log_videos(self, videos: dict[str, CaptionedVideo], step: int) -> None:
        import wandb

        media = {name: wandb.Video(str(video.path), caption=video.caption) for name, video in videos.items()}
        self.run.log(media, step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in `logs/NAME` of the output folder. Videos are GIFs, which its image tab plays."""

    name = "tensorboard"

    def __init__(self, run: TrackedRun, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.folder = Path(run.output_dir) / "logs" / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer: Any = None
        # Numbers are axes of its plots; all else is text. Not add_hparams, which makes a run of its own of them.
        flags = {key: value if type(value) in (int, float) else str(value) for key, value in config.items()}
        experiment, session, _ = hparams(flags, dict.fromkeys(["generator_loss", "validation_loss"], 0))
        charts = {name: ["Multiline", [f"^{name}_at_time_.*"]] for name in CHARTED}
        with self._open_writer() as writer:
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(session)
            writer.add_custom_scalars({"by level": charts})

    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        with self._open_writer() as writer:
            start = max(step + 1, 1)  # the settings are at step 0
            writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), start)

    def log(self, entry: dict[str, float], step: int) -> None:
        with self._open_writer() as writer:
            for name, value in entry.items():
                writer.add_scalar(name, value, step)

    def log_videos(self, videos: dict[str, CaptionedVideo], step: int) -> None:
        with self._open_writer() as writer:
            for name, video in videos.items():
                writer.file_writer.add_summary(gif_summary(name, video), step)

    def finish(self) -> None:
        with self._open_writer() as writer:
            writer.close()

    @contextlib.contextmanager
    def _open_writer(self) -> Iterator[Any]:
        """The writer, flushed in the end. One that failed is of no more use; once there is room, a new one goes on."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            room = self.folder / "room"
            room.write_bytes(bytes(1 << 16))
            room.unlink()
            self._writer = SummaryWriter(str(self.folder))
        try:
            yield self._writer
            self._writer.flush()
        except OSError:
            self._writer = None
            raise


class Trackio:
    """Resumes by name, which is made unique. Shows all that it is given, so what comes again is left out."""

    name = "trackio"

    def __init__(self, run: TrackedRun, config: dict[str, Any]) -> None:
        import trackio

        self.run = trackio.init(project=run.project, name=f"{run.name}-{run.id}", resume="allow", config=config)
        self.known: set[tuple[int, str]] = set()

    def rewind(self, step: int) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        logs = SQLiteStorage.get_logs(self.run.project, self.run.name, run_id=self.run.id)
        self.known = {(log["step"], name) for log in logs if log["step"] > step for name in log}

    def log(self, entry: dict[str, Any], step: int) -> None:
        new = {name: value for name, value in entry.items() if (step, name) not in self.known}
        if new:
            self.run.log(new, step=step)

    def log_videos(self, videos: dict[str, CaptionedVideo], step: int) -> None:
        import trackio

        self.log({name: trackio.Video(video.path, caption=video.caption) for name, video in videos.items()}, step)

    def finish(self) -> None:
        self.run.finish()


TRACKERS: dict[TrackerName, Callable[[TrackedRun, dict[str, Any]], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}


def gif_summary(name: str, video: CaptionedVideo) -> Any:
    """A summary for tensorboard of a video as a GIF in an image, with its caption as the description.

    `SummaryWriter.add_video` makes the same of tensors, but needs a moviepy older than 2 and knows no captions.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.image.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    frames = [Image.fromarray(frame) for frame in iio.imread(video.path, plugin="pyav")]
    for frame in frames:
        frame.thumbnail((GIF_SIDE, GIF_SIDE))
    buffer = io.BytesIO()
    milliseconds = 1000 / iio.immeta(video.path, plugin="pyav")["fps"]
    frames[0].save(buffer, "gif", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    width, height = frames[0].size
    image = make_tensor_proto([b"%d" % width, b"%d" % height, buffer.getvalue()])
    metadata = create_summary_metadata(display_name=name, description=video.caption)
    return Summary(value=[Summary.Value(tag=name, metadata=metadata, tensor=image)])
