"""Samples of data sets that are read as training goes: shuffled by buffer, split over processes, exactly resumable.

A run's batches are dealt to `num_lanes` lanes in turn, and each lane to one worker of one process. Each pass over a
data set deals its files to the lanes anew; a lane reads its files in order, and shuffles them window by window. So a
lane's place is a few integers: the pass, where its window begins, and how many of the window's rows were handed out.
These travel with the samples, and a checkpoint holds the places of those that were trained on; a resumed run reads a
window again, no more, and sees what an unbroken one would.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import av
import torch
from torch.utils.data import Dataset

from causal_wan.config.refusals import DataError
from causal_wan.data.sample_order import Interleaving
from causal_wan.seeds import RandomPurpose, seeded_generator
from causal_wan.streams.sources import Stream, StreamedRow
from causal_wan.video.opening import describe_error


logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 10
MAX_EMPTY_PASSES = 100

Decode = Callable[..., dict[str, Any] | None]  # of a video, its prompts, the sample's number, and controls


class Place(NamedTuple):
    """How far a lane has come in a data set; later places are larger."""

    epoch: int = 0
    file: int = 0  # where the window begins: among the files of the lane in this pass
    row: int = 0  # and in that file
    taken: int = 0  # rows of the window that were handed out


class Lane:
    """One lane's rows of a data set, pass after pass, without end.

    Args:
        stream: The data set.
        lane: Number of the lane,
        num_lanes: of so many.
        key: Seed of the run, and number of the data set in it.
        window_rows: Rows that are shuffled among each other, at most.
        window_bytes: Bytes of a window, at most, but for its last row. Two windows are held: one is handed out while
            the next is read.
        place: Where to begin.
    """

    def __init__(
        self,
        stream: Stream,
        lane: int,
        num_lanes: int,
        *,
        key: tuple[int, int],
        window_rows: int,
        window_bytes: int,
        place: Place,
    ) -> None:
        self.stream, self.lane, self.num_lanes, self.key = stream, lane, num_lanes, key
        self.window_rows, self.window_bytes = window_rows, window_bytes
        self._reader = self._read_pass(place)
        self._pool = ThreadPoolExecutor(1)
        self._window: list[StreamedRow] = []
        self._ahead: Future = self._pool.submit(self._read_window, place._replace(taken=0))
        for _ in range(place.taken):
            self.take()

    def take(self) -> tuple[StreamedRow, Place]:
        """The next row, and the place after it.

        Raises:
            DataError: If there are no rows, or a file cannot be read.
        """
        if not self._window:
            self._taken = 0
            self._start, self._window, self._next_start = self._ahead.result()
            self._ahead = self._pool.submit(self._read_window, self._next_start)
        row = self._window.pop()
        self._taken += 1
        return row, self._start._replace(taken=self._taken) if self._window else self._next_start

    def _read_window(self, start: Place) -> tuple[Place, list[StreamedRow], Place]:
        """The next window that has rows, as (where it begins, its rows shuffled, where the next one begins)."""
        for _ in range(MAX_EMPTY_PASSES):
            rows, end, num_bytes = [], start, 0
            while len(rows) < self.window_rows and num_bytes < self.window_bytes:
                found = next(self._reader, None)
                if found is None:
                    end = Place(start.epoch + 1)
                    self._reader = self._read_pass(end)
                    break
                row, end = found
                rows.append(row)
                num_bytes += row.num_bytes
            if rows:
                seed, source = self.key
                key = (RandomPurpose.WINDOW, source, self.lane, *start[:3])
                order = torch.randperm(len(rows), generator=seeded_generator(seed, *key))
                return start, [rows[i] for i in order.tolist()], end
            start = end
        raise DataError(
            f"{self.stream.source.metadata_path} must hold rows for each of {self.num_lanes} workers, but has none "
            f"for worker {self.lane + 1}; use fewer --dataloader_num_workers."
        )

    def _read_pass(self, start: Place) -> Iterator[tuple[StreamedRow, Place]]:
        """The lane's rows of a pass from a place on, each with the place after it."""
        files, shares = self._files(start.epoch)
        for place in range(start.file, len(files)):
            first = start.row if place == start.file else 0
            for row in self.stream.read_file(files[place], first):
                if not shares or (row.row + place + start.epoch) % self.num_lanes == self.lane:
                    yield row, Place(start.epoch, place, row.row + 1)

    def _files(self, epoch: int) -> tuple[list[int], bool]:
        """The files that the lane reads in a pass, and whether it shares their rows with the other lanes."""
        seed, source = self.key
        count = self.stream.num_files
        order = torch.randperm(count, generator=seeded_generator(seed, RandomPurpose.FILE, source, epoch)).tolist()
        return (order, True) if count < self.num_lanes else (order[self.lane :: self.num_lanes], False)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class LaneStates:
    """How far each lane has come by what was trained on; goes into checkpoints."""

    def __init__(self) -> None:
        self.layout: dict[str, Any] = {}  # by which places mean something
        self.places: dict[tuple[int, int], Place] = {}  # by lane and data set
        self.first_pass = 0  # of lanes that have no place

    def update(self, lane_states: Iterable[tuple[int, ...]]) -> None:
        """Notes samples as trained on, by the `lane_state` of each."""
        for lane, source, *place in lane_states:
            self.places[lane, source] = Place(*place)

    def merge(self, states: Iterable[dict[str, Any]]) -> None:
        """Takes over what other processes have noted: of each lane, the furthest place.

        Args:
            states: What `state_dict` gives there.
        """
        for state in states:
            for lane, source, *place in state["places"]:
                self.places[lane, source] = max(Place(*place), self.places.get((lane, source), Place()))

    def state_dict(self) -> dict[str, Any]:
        places = [[*key, *place] for key, place in sorted(self.places.items())]
        return {"layout": self.layout, "places": places, "first_pass": self.first_pass}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layout, self.first_pass, self.places = dict(state["layout"]), state["first_pass"], {}
        self.merge([state])

    def begin(self, layout: dict[str, Any], num_slots: int) -> int:
        """Makes the places fit a run that begins, and returns its number of lanes.

        Args:
            layout: All else that places depend on.
            num_slots: Workers of all processes; the lanes are dealt to them.
        """
        stored = self.layout.get("num_lanes", num_slots)
        num_lanes = stored if stored % num_slots == 0 else num_slots
        layout = {**layout, "num_lanes": num_lanes}
        if self.layout not in ({}, layout):
            changed = ", ".join(name for name in layout if layout[name] != self.layout.get(name))
            logger.warning("the stream begins a new pass, because something else is read than before: %s", changed)
            self.first_pass = 1 + max((place.epoch for place in self.places.values()), default=self.first_pass)
            self.places = {}
        self.layout = layout
        return num_lanes

    def place(self, lane: int, source: int) -> Place:
        return self.places.get((lane, source), Place(self.first_pass))


# --- samples ---------------------------------------------------------------------------------------------------------


class StreamedClips(Dataset):
    """The samples of a run in their order, from streams: item i is sample number start + i.

    Looks like `SampleStream`, but a process must ask for the samples of a lane in their order, as data loaders do.
    Clips that cannot be used are passed over and reported in `errors`.

    Args:
        streams: From `open_stream`.
        states: Where to go on; is told what is read.
        decode: (video, prompts, sample number, controls...) -> video, controls, prompt, num_valid_frames; or None, to
            leave a clip out without a word; raises ValueError, OSError or av.FFmpegError if it cannot be used.
        seed: Of the order.
        start: Samples that the run has seen already.
        end: End of the run, in samples, all processes together.
        batch_size: Samples of a batch of one process.
        num_slots: Processes that get different batches, times the workers of each (at least 1).
        weights: Share of each stream in the samples, in any unit.
        buffer_rows: Rows that are shuffled among each other, at most.
        buffer_bytes: That a lane holds of each stream, about; a worker has one lane, or more if a run goes on with
            fewer workers.

    Raises:
        ValueError: If a setting cannot work.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        states: LaneStates,
        decode: Decode,
        *,
        seed: int,
        start: int,
        end: int,
        batch_size: int,
        num_slots: int,
        weights: Sequence[float] | None = None,
        buffer_rows: int = 256,
        buffer_bytes: int = 1 << 28,
    ) -> None:
        if weights is None and len(streams) > 1:
            raise ValueError("several streams need weights, as nobody knows how many rows they have; give each one.")
        if buffer_rows < 1 or buffer_bytes < 1:
            raise ValueError(f"the shuffle buffer must be 1 or more, got {buffer_rows} rows, {buffer_bytes} bytes.")
        self.decode, self.seed, self.batch_size = decode, seed, batch_size
        self.start, self.end = start, end
        self.weights = [1.0] * len(streams) if weights is None else list(weights)
        self.buffer_rows, self.buffer_bytes = buffer_rows, buffer_bytes
        layout = {
            "streams": [stream.source.metadata_path for stream in streams],
            "files": [stream.num_files for stream in streams],
            **{"seed": seed, "buffer_rows": buffer_rows, "buffer_bytes": buffer_bytes},
        }
        self.num_lanes = states.begin(layout, num_slots)
        self.states = states
        self.streams = [_split_for(stream, self.num_lanes) for stream in streams]
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._mixes: dict[int, Interleaving] = {}

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        """The next clip of the lane that a sample belongs to.

        Returns:
            What `decode` gives; row_index: a number for the row; sample_number; errors; lane_state, for `LaneStates`.

        Raises:
            DataError: If too many clips in a row cannot be used, or a file cannot be read.
        """
        if not 0 <= item < len(self):
            raise IndexError(item)
        # Data loaders begin their batches at `start`, whatever batches came before.
        turn, offset = divmod(item, self.batch_size)
        round_, lane = divmod(self.start // self.batch_size + turn, self.num_lanes)
        source = self._choose_source(lane, round_ * self.batch_size + offset)
        stream, errors, passes = self.streams[source].source, [], set()
        while len(errors) < MAX_REPLACEMENTS and len(passes) < 3:
            row, place = self._lane(lane, source).take()
            passes.add(place.epoch)
            try:
                video = row.find_video(stream.dataset_base_path)
                controls = row.find_controls(stream.dataset_base_path)
                sample = self.decode(video, row.prompts, self.start + item, *controls)
            except (ValueError, OSError, av.FFmpegError) as error:
                errors.append(f"{row.name}: {describe_error(error)}")
                continue
            if sample is not None:
                return {
                    **sample,
                    "row_index": (source << 48) + (row.file << 32) + row.row,
                    "sample_number": self.start + item,
                    "errors": errors,
                    "lane_state": (lane, source, *place),
                }
        reason = f"{len(errors)} clips in a row cannot be used" if errors else "all clips of a worker were left out"
        raise DataError(
            f"{stream.metadata_path}: {reason}" + (f"; the last: {errors[-1].removesuffix('.')}." if errors else ".")
        )

    def _choose_source(self, lane: int, position: int) -> int:
        if len(self.streams) == 1:
            return 0
        if lane not in self._mixes:
            self._mixes[lane] = Interleaving(self.weights, seed=self.seed, key=(RandomPurpose.SOURCE, lane))
        return self._mixes[lane][position][0]

    def _lane(self, lane: int, source: int) -> Lane:
        if (lane, source) not in self._lanes:
            self._lanes[lane, source] = Lane(
                self.streams[source],
                lane,
                self.num_lanes,
                key=(self.seed, source),
                window_rows=self.buffer_rows,
                window_bytes=max(self.buffer_bytes // 2, 1),
                place=self.states.place(lane, source),
            )
        return self._lanes[lane, source]


def _split_for(stream: Stream, num_lanes: int) -> Stream:
    """A stream with a file for each lane, if its format allows it; says so if not."""
    if stream.num_files >= num_lanes:
        return stream
    finer = stream.split_further()
    if finer.num_files < num_lanes:
        logger.warning(
            "%s has %d file(s) for %d workers, so each worker reads all of them and passes over what is not its own; "
            "split it into more files, or use fewer --dataloader_num_workers",
            stream.source.metadata_path,
            finer.num_files,
            num_lanes,
        )
    return finer
