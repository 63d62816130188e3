"""Draws a small data set of sketches, stroke by stroke: mp4 clips and a CSV of prompts, no download.

    python examples/sketch/make_dataset.py --output_dir outputs/sketch
    python examples/sketch/make_dataset.py --output_dir outputs/sketch --kinds bird,car --num_clips 200
    python examples/sketch/make_dataset.py --output_dir outputs/ambiguous --ambiguous

Writes `videos/*.mp4`, `train.csv` and `heldout.csv` (columns `video,prompt`, paths relative to `videos/`). A clip is
81 frames of 64 x 112 pixels on white; the pen moves at an even speed, lifts between strokes without pausing, and
rests from frame 74 on. Every choice that shapes a clip is a word of its prompt, so the prompt alone determines the
clip, and no choice of words in `heldout.csv` occurs in `train.csv`.

With `--ambiguous` a prompt names colour, line and proportion alone, and many clips have the same prompt: kind, size
and place are anyone's guess. A squared error then has its least at the mean of all of them, which is no drawing. Each
held-out prompt has `--num_targets` rows in `heldout.csv`, the prompts in turn; all its drawings are in `targets.csv`.

With `--controls outline,pen` the tables get columns of such videos, for `--control_column outline pen`: the finished
drawing in thin black lines, in every frame, and the place of the pen, a dot on white. With `--drawn_at_start 0.4` the
first frame shows so much of the drawing already, as a picture to go on from does.
"""

import csv
import itertools
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, it has to find the repository

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import NonNegativeInt, PositiveInt, Seed, Share, checked_dataclass


FRAME_RATE = 16
NUM_FRAMES, HEIGHT, WIDTH = 81, 64, 112
SUPERSAMPLING = 4  # the pen draws on a canvas so many times larger
DRAWING_TIME = 75 / 81  # share of the clip after which the drawing is complete
PEN_RADIUS = 3  # of the dot that shows the pen's place, in pixels of a picture 64 pixels high
MARGIN = 0.05  # of the picture's height, kept free on every side

COLOURS = {
    "black": (20, 20, 20),
    "red": (215, 30, 40),
    "blue": (30, 70, 220),
    "green": (15, 135, 50),
    "purple": (140, 40, 170),
    "orange": (235, 120, 0),
}
KNOWN_COLOURS = ("blue", "green", "purple")
"""Colours that the base model of `tiny-wan` knows; its VAE takes black for dark blue, and red and orange for faint."""
SIZES = {"small": 0.6, "large": 0.84}  # height of the object, as a share of the picture's
PLACES = {"on the left": 0.27, "in the middle": 0.5, "on the right": 0.73}  # centre, as a share of the picture's width
LINES = {"thin": 1.7, "thick": 2.6}  # pixels of a picture 64 pixels high
PROPORTIONS = {"tall": 0.75, "wide": 1.3}  # factor on the width


@dataclass(frozen=True)
class Sketch:
    """All there is to know about a clip: one key of KINDS, COLOURS, SIZES, PLACES, LINES and PROPORTIONS each."""

    kind: str
    colour: str
    size: str
    place: str
    line: str
    proportion: str


# ---- the objects. A stroke is an (N, 2) array of x, y: x to the right, y down, the object between y = -1 and y = 1.


def _path(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


def _arc(x: float, y: float, radii: float | tuple[float, float], start: float = 0, end: float = 360) -> np.ndarray:
    """Part of an ellipse; degrees run clockwise on the screen, 0 is right, 270 is up."""
    radius_x, radius_y = radii if isinstance(radii, tuple) else (radii, radii)
    angles = np.radians(np.linspace(start, end, max(8, int(abs(end - start) / 6))))
    return np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1)


def _ray(x: float, y: float, degrees: float, inner: float, outer: float) -> np.ndarray:
    direction = np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    return np.array([x, y]) + np.outer([inner, outer], direction)


# Kind -> its parts in drawing order -> the strokes of the part.
KINDS: dict[str, dict[str, list[np.ndarray]]] = {
    "house": {
        "walls": [_path((-0.85, -0.1), (-0.85, 1), (0.85, 1), (0.85, -0.1))],
        "roof": [_path((-1.1, -0.1), (0, -1), (1.1, -0.1), (-1.1, -0.1))],
        "door": [_path((-0.5, 1), (-0.5, 0.35), (-0.1, 0.35), (-0.1, 1))],
        "window": [_path((0.2, 0.2), (0.6, 0.2), (0.6, 0.6), (0.2, 0.6), (0.2, 0.2))],
    },
    "car": {
        "body": [
            _path((-0.95, 0.6), (-1.4, 0.6), (-1.4, 0), (1.4, 0), (1.4, 0.6), (0.95, 0.6)),
            _path((-0.35, 0.6), (0.35, 0.6)),
        ],
        "roof": [_path((-0.9, 0), (-0.55, -0.8), (0.5, -0.8), (0.95, 0))],
        "window": [_path((0, -0.8), (0, 0))],
        "wheels": [_arc(-0.65, 0.65, 0.32), _arc(0.65, 0.65, 0.32)],
    },
    "fish": {
        "body": [_arc(0.25, 0, (1.0, 0.65), 180, 540)],
        "tail": [_path((-0.72, 0), (-1.35, -0.6), (-1.35, 0.6), (-0.72, 0))],
        "fin": [_path((-0.1, -0.62), (0.2, -1), (0.6, -0.6))],
        "eye": [_arc(0.75, -0.15, 0.12)],
        "mouth": [_arc(1.0, 0.25, 0.25, 180, 260)],
    },
    "tree": {
        "trunk": [_path((-0.2, 0.28), (-0.25, 1), (0.25, 1), (0.2, 0.28))],
        "crown": [_arc(0, -0.35, (0.9, 0.65), 90, 450)],
        "apples": [_arc(-0.4, -0.4, 0.14), _arc(0.15, -0.65, 0.14), _arc(0.4, -0.15, 0.14)],
        "grass": [_path((-0.9, 1), (-0.4, 1)), _path((0.4, 1), (0.9, 1))],
    },
    "flower": {
        "stem": [_path((0, 1), (0, 0.12))],
        "leaves": [_arc(0.3, 0.62, (0.3, 0.16), 180, 540), _arc(-0.3, 0.72, (0.3, 0.16), 0, 360)],
        "centre": [_arc(0, -0.42, 0.2)],
        "petals": [_arc(0.4 * math.cos(a), -0.42 + 0.4 * math.sin(a), 0.21) for a in np.radians(range(-90, 270, 60))],
    },
    "boat": {
        "hull": [_path((-1.2, 0.45), (1.2, 0.45), (0.8, 1), (-0.8, 1), (-1.2, 0.45))],
        "mast": [_path((0, 0.45), (0, -1))],
        "sail": [_path((0.15, -0.85), (0.15, 0.25), (0.95, 0.25), (0.15, -0.85))],
        "flag": [_path((0, -1), (-0.5, -0.78), (0, -0.56))],
    },
    "cat": {
        "head": [_arc(0, 0.2, (0.95, 0.8), 270, 630)],
        "ears": [_path((-0.85, -0.1), (-0.8, -1), (-0.25, -0.55)), _path((0.25, -0.55), (0.8, -1), (0.85, -0.1))],
        "eyes": [_arc(-0.35, 0.05, 0.12), _arc(0.35, 0.05, 0.12)],
        "nose": [_path((-0.12, 0.35), (0.12, 0.35), (0, 0.5), (-0.12, 0.35))],
        "whiskers": [_path((-0.4, 0.5), (-1.25, 0.38)), _path((0.4, 0.5), (1.25, 0.38))],
    },
    "sun": {
        "disc": [_arc(0, 0, 0.58, 270, 630)],
        "rays": [_ray(0, 0, degrees, 0.72, 1.0) for degrees in range(-90, 270, 45)],
        "eyes": [_arc(-0.2, -0.12, 0.07), _arc(0.2, -0.12, 0.07)],
        "smile": [_arc(0, 0.05, 0.3, 160, 20)],
    },
    "cup": {
        "rim": [_arc(-0.2, -0.3, (0.8, 0.18), 180, 540)],
        "sides": [_path((-1.0, -0.3), (-0.8, 1), (0.4, 1), (0.6, -0.3))],
        "handle": [_arc(0.55, 0.25, (0.5, 0.38), -90, 90)],
        "steam": [_path((-0.5, -0.6), (-0.35, -0.8), (-0.5, -1)), _path((0.05, -0.6), (0.2, -0.8), (0.05, -1))],
    },
    "mushroom": {
        "cap": [_arc(0, 0.1, (1.1, 1.1), 180, 360), _path((1.1, 0.1), (-1.1, 0.1))],
        "stalk": [_path((-0.35, 0.1), (-0.4, 1), (0.4, 1), (0.35, 0.1))],
        "spots": [_arc(-0.5, -0.3, 0.16), _arc(0.1, -0.6, 0.16), _arc(0.55, -0.25, 0.16)],
    },
    "bird": {
        "body": [_arc(-0.1, 0.2, (0.85, 0.5), 180, 540)],
        "head": [_arc(0.7, -0.5, 0.38, 90, 450)],
        "beak": [_path((1.05, -0.65), (1.5, -0.45), (1.05, -0.35))],
        "wing": [_path((0.25, 0.05), (-0.3, 0.5), (-0.6, 0.0), (0.25, 0.05))],
        "tail": [_path((-0.9, 0.1), (-1.45, -0.25), (-1.4, 0.3), (-0.9, 0.3))],
        "legs": [_path((-0.2, 0.7), (-0.2, 1)), _path((0.2, 0.68), (0.2, 1))],
    },
    "snowman": {
        "body": [_arc(0, 0.5, (0.62, 0.5), 270, 630)],
        "head": [_arc(0, -0.3, 0.32, 90, 450)],
        "hat": [_path((-0.5, -0.58), (0.5, -0.58)), _path((-0.28, -0.58), (-0.28, -1), (0.28, -1), (0.28, -0.58))],
        "eyes": [_arc(-0.12, -0.36, 0.05), _arc(0.12, -0.36, 0.05)],
        "arms": [_path((-0.55, 0.3), (-1.1, -0.15)), _path((0.55, 0.3), (1.1, -0.15))],
    },
    "umbrella": {
        "canopy": [_arc(0, 0, (1.15, 1.0), 180, 360)],
        "edge": [_arc(x, 0, (0.38, 0.2), 180, 360) for x in (-0.77, 0, 0.77)],
        "shaft": [_path((0, -0.2), (0, 0.8))],
        "handle": [_arc(-0.22, 0.8, (0.22, 0.2), 0, 180)],
    },
    "rocket": {
        "hull": [_path((-0.42, -0.35), (-0.42, 0.6), (0.42, 0.6), (0.42, -0.35), (-0.42, -0.35))],
        "nose": [_path((-0.42, -0.35), (0, -1), (0.42, -0.35))],
        "window": [_arc(0, 0.0, 0.2)],
        "fins": [_path((-0.42, 0.1), (-0.95, 0.75), (-0.42, 0.6)), _path((0.42, 0.1), (0.95, 0.75), (0.42, 0.6))],
        "flame": [_path((-0.25, 0.6), (0, 1), (0.25, 0.6))],
    },
}  # fmt: skip
NEW_KINDS = ("bird", "snowman", "umbrella", "rocket")
"""Kinds that the base model of `tiny-wan` has never seen; training teaches them."""
BASE_KINDS = tuple(kind for kind in KINDS if kind not in NEW_KINDS)
"""Kinds that the base model of `tiny-wan` knows."""


def sketches(kinds: tuple[str, ...], colours: tuple[str, ...] = tuple(COLOURS)) -> list[Sketch]:
    """Every sketch of these kinds and colours, in a fixed order."""
    return [Sketch(*choice) for choice in itertools.product(kinds, colours, SIZES, PLACES, LINES, PROPORTIONS)]


def prompt(sketch: Sketch) -> str:
    """The words that determine the clip: the parts in drawing order, then every other choice."""
    steps = ", then ".join(f"the {part}" for part in KINDS[sketch.kind])
    article = "an" if sketch.kind[0] in "aeiou" else "a"
    return (
        f"Draw a sketch of {article} {sketch.kind} step by step: first {steps}; "
        f"a {sketch.size} {sketch.proportion} {sketch.colour} {sketch.kind} {sketch.place}, {sketch.line} lines."
    )


def ambiguous_prompt(sketch: Sketch) -> str:
    """Words that many clips share: they say nothing of kind, size and place, nor of the parts."""
    return (
        f"Draw a sketch of something step by step; a {sketch.proportion} {sketch.colour} drawing, {sketch.line} lines."
    )


def draw(
    sketch: Sketch,
    num_frames: int = NUM_FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
    *,
    drawn_at_start: float = 0.0,
) -> np.ndarray:  # (T, H, W, 3) uint8
    """The clip of a sketch on white: frame t shows the first (t + 1) / (DRAWING_TIME num_frames) of the line.

    That is of what is not `drawn_at_start`, a share of the line.
    """
    radius = LINES[sketch.line] * height / 64 / 2 * SUPERSAMPLING
    dots = _dots(sketch, height, width)
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(canvas)
    ink = np.empty((num_frames, height, width, 1), dtype=np.float32)
    drawn = 0
    for frame in range(num_frames):
        end = _num_drawn(frame, num_frames, len(dots), drawn_at_start)
        for x, y in dots[drawn:end]:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        drawn = end
        ink[frame, ..., 0] = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255
    colour = np.array(COLOURS[sketch.colour], dtype=np.float32)
    return np.rint(255 - ink * (255 - colour)).astype(np.uint8)


def draw_outline(
    sketch: Sketch, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:  # (T, H, W, 3) uint8
    """The finished drawing in thin black lines, the same in every frame: its kind, size and place, and no colour."""
    picture = draw(replace(sketch, line="thin", colour="black"), 1, height, width)
    return np.broadcast_to(picture, (num_frames, height, width, 3))


def draw_pen(
    sketch: Sketch, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:  # (T, H, W, 3) uint8
    """A black dot on white where the pen is; it rests where the drawing ends."""
    dots, radius = _dots(sketch, height, width), PEN_RADIUS * height / 64 * SUPERSAMPLING
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for frame in range(num_frames):
        canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 255)
        x, y = dots[max(_num_drawn(frame, num_frames, len(dots)) - 1, 0)]
        ImageDraw.Draw(canvas).ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
        frames[frame] = np.asarray(canvas.reduce(SUPERSAMPLING))[..., None]
    return frames


CONTROLS = {"outline": draw_outline, "pen": draw_pen}


def _num_drawn(frame: int, num_frames: int, num_dots: int, drawn_at_start: float = 0.0) -> int:
    """How many dots are on the paper at the end of a frame."""
    share = min(1.0, (frame + 1) / (DRAWING_TIME * num_frames))
    return round((drawn_at_start + (1 - drawn_at_start) * share) * num_dots)


def _dots(sketch: Sketch, height: int, width: int) -> np.ndarray:
    """Where the pen touches, in canvas pixels, evenly spaced, in drawing order."""
    scale = height * SIZES[sketch.size] / 2 * np.array([PROPORTIONS[sketch.proportion], 1.0])
    strokes = [stroke * scale for part in KINDS[sketch.kind].values() for stroke in part]
    points = np.concatenate(strokes)
    low, high = points.min(axis=0), points.max(axis=0)
    picture, margin = np.array([width, height]), MARGIN * height
    wanted = picture * (PLACES[sketch.place], 0.5) - (low + high) / 2
    centre = np.clip(wanted, margin - low, picture - margin - high)
    return SUPERSAMPLING * (np.concatenate([evenly(stroke, 1 / SUPERSAMPLING) for stroke in strokes]) + centre)


def evenly(stroke: np.ndarray, spacing: float) -> np.ndarray:
    """The same line as points `spacing` apart."""
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(stroke, axis=0).T))])
    wanted = np.linspace(0, at[-1], max(2, math.ceil(at[-1] / spacing)))
    return np.stack([np.interp(wanted, at, stroke[:, axis]) for axis in range(2)], axis=1)


def write_mp4(frames: np.ndarray, file: Path | str | BinaryIO, crf: int = 12) -> None:
    """Writes (T, H, W, 3) uint8 frames as H.264; `file` is a path or something to write bytes to."""
    with av.open(str(file) if isinstance(file, Path) else file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"crf": str(crf), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def split(
    kinds: tuple[str, ...], colours: tuple[str, ...], *, num_clips: int, num_heldout: int, seed: int
) -> tuple[list[Sketch], list[Sketch]]:
    """Disjoint sketches for training and for testing, the kinds in turn.

    Raises:
        ValueError: there are not so many different sketches of these kinds.
    """
    available = len(sketches(kinds, colours))
    if num_clips + num_heldout > available:
        raise ValueError(
            f"num_clips + num_heldout must be at most {available}, the number of different sketches of {len(kinds)} "
            f"kinds in {len(colours)} colours, got {num_clips} + {num_heldout}; ask for fewer or name more."
        )
    rng = random.Random(seed)
    by_kind = [rng.sample(all_of_kind := sketches((kind,), colours), len(all_of_kind)) for kind in kinds]
    shuffled = [sketch for in_turn in zip(*by_kind, strict=True) for sketch in in_turn]
    return shuffled[num_heldout : num_heldout + num_clips], shuffled[:num_heldout]


def split_by_prompt(
    kinds: tuple[str, ...],
    colours: tuple[str, ...],
    *,
    num_clips: int | None,
    num_heldout: int,
    num_targets: int,
    seed: int,
) -> tuple[list[Sketch], list[Sketch], list[Sketch]]:
    """Sketches for training, those for testing, the prompts in turn, and all that the prompts for testing may mean.

    No prompt for testing is one for training.

    Raises:
        ValueError: there are not so many prompts, or drawings of one.
    """
    by_prompt: dict[str, list[Sketch]] = {}
    for sketch in sketches(kinds, colours):
        by_prompt.setdefault(ambiguous_prompt(sketch), []).append(sketch)
    rng = random.Random(seed)
    groups = [rng.sample(group, len(group)) for group in rng.sample(list(by_prompt.values()), len(by_prompt))]
    heldout, rest = groups[:num_heldout], [sketch for group in groups[num_heldout:] for sketch in group]
    if not rest or num_targets > len(groups[0]) or (num_clips or 0) > len(rest):
        raise ValueError(
            f"there are {len(groups)} ambiguous prompts of {len(groups[0])} drawings each, so num_heldout must be "
            f"below {len(groups)}, num_targets at most {len(groups[0])} and num_clips at most {len(rest)}, got "
            f"{num_heldout}, {num_targets} and {num_clips}; ask for fewer or name more kinds."
        )
    rng.shuffle(rest)
    in_turn = [group[number] for number in range(num_targets) for group in heldout]
    return rest[:num_clips], in_turn, [sketch for group in heldout for sketch in group]


@checked_dataclass
class Config:
    """What to draw, and where to put it."""

    output_dir: LocalPath
    """Folder that gets videos/, train.csv and heldout.csv."""
    kinds: str = ",".join(NEW_KINDS)
    """Comma-separated, or `all` or `base`; the default are those that the tiny WAN does not know yet."""
    colours: str = ",".join(KNOWN_COLOURS)
    """Comma-separated, or `all`; the default are those that the tiny WAN knows."""
    num_clips: PositiveInt | None = None
    """Clips in train.csv; None is 120, and all that there are with ambiguous prompts."""
    num_heldout: NonNegativeInt | None = None
    """Prompts in heldout.csv; None is 8, and 2 with ambiguous prompts."""
    ambiguous: bool = False
    """Prompts say less than a clip shows: many clips have the same prompt."""
    num_targets: PositiveInt = 4
    """Clips of each prompt in heldout.csv, if prompts are ambiguous."""
    drawn_at_start: Share = 0.0
    """Share of the line that the first frame shows already."""
    controls: str = ""
    """Comma-separated, of outline and pen: columns with such videos."""
    seed: Seed = 0
    """Chooses which sketches are drawn; the same seed gives the same files."""
    num_frames: PositiveInt = NUM_FRAMES
    """Frames of a clip; 4k + 1 for WAN."""
    height: PositiveInt = HEIGHT
    """Pixels."""
    width: PositiveInt = WIDTH
    """Pixels."""
    num_workers: PositiveInt = 2
    """Processes that draw."""


def chosen(names: str, known: tuple[str, ...], **shorthands: tuple[str, ...]) -> tuple[str, ...]:
    """The words that a comma-separated list names.

    Raises:
        ValueError: a name is not known.
    """
    named = shorthands.get(names) or tuple(name.strip() for name in names.split(","))
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ValueError(f"names must be among {', '.join(known)}, got {', '.join(unknown)}; correct the name.")
    return named


def _file_name(sketch: Sketch) -> str:
    return "-".join(astuple(sketch)).replace(" ", "_") + ".mp4"


def _write_clip(sketch: Sketch, config: Config) -> None:
    shape, folder = (config.num_frames, config.height, config.width), Path(config.output_dir) / "videos"
    write_mp4(draw(sketch, *shape, drawn_at_start=config.drawn_at_start), folder / _file_name(sketch))
    for name in controls_of(config):
        write_mp4(CONTROLS[name](sketch, *shape), folder / name / _file_name(sketch))


def controls_of(config: Config) -> tuple[str, ...]:
    """The controls that are drawn.

    Raises:
        ValueError: a name is not known.
    """
    return chosen(config.controls, tuple(CONTROLS)) if config.controls else ()


def split_tables(config: Config) -> dict[str, list[Sketch]]:
    """File name of each table -> its rows.

    Raises:
        ValueError: there are not so many sketches, or a name is not known.
    """
    kinds = chosen(config.kinds, tuple(KINDS), all=tuple(KINDS), base=BASE_KINDS)
    colours = chosen(config.colours, tuple(COLOURS), all=tuple(COLOURS))
    if not config.ambiguous:
        num_clips = 120 if config.num_clips is None else config.num_clips
        num_heldout = 8 if config.num_heldout is None else config.num_heldout
        train, heldout = split(kinds, colours, num_clips=num_clips, num_heldout=num_heldout, seed=config.seed)
        return {"train.csv": train, "heldout.csv": heldout}
    train, heldout, targets = split_by_prompt(
        kinds,
        colours,
        num_clips=config.num_clips,
        num_heldout=2 if config.num_heldout is None else config.num_heldout,
        num_targets=config.num_targets,
        seed=config.seed,
    )
    return {"train.csv": train, "heldout.csv": heldout, "targets.csv": targets}


def main(config: Config) -> None:
    folder = Path(config.output_dir)
    try:
        tables, controls = split_tables(config), controls_of(config)
        if config.drawn_at_start and "pen" in controls:
            raise ValueError("the pen begins with the drawing; leave out drawn_at_start, or pen of controls.")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    everything = list(dict.fromkeys(sketch for rows in tables.values() for sketch in rows))
    for name in ("", *controls):
        (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(config.num_workers) as workers:
        clips = workers.map(partial(_write_clip, config=config), everything, chunksize=8)
        for _ in tqdm(clips, total=len(everything), desc="drawing", unit="clip"):
            pass
    say = ambiguous_prompt if config.ambiguous else prompt
    for name, rows in tables.items():
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "prompt", *controls])
            for sketch in rows:
                clip = _file_name(sketch)
                writer.writerow([clip, say(sketch), *(f"{control}/{clip}" for control in controls)])
    num_train, num_heldout = len(tables["train.csv"]), len(tables["heldout.csv"])
    print(f"{num_train} training and {num_heldout} held-out clips are in {folder}")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
