"""Pictures for the judge of drawings: finished ones of every kind, unfinished ones, and what is no drawing at all.

A picture is the ink of a frame, uint8 (64, 112): 255 where the pen was. Finished drawings have any size, place,
proportion and width of line, and are a little rotated and wobbly. What is no drawing is what generators leave when
they fail: white paper, means and overlays of drawings, halves of different ones, parts in wrong places, blots, blur,
scribbles.
"""

import math

import numpy as np
from make_dataset import HEIGHT, KINDS, SUPERSAMPLING, WIDTH, evenly
from PIL import Image, ImageDraw, ImageFilter


Strokes = list[np.ndarray]  # (N, 2) each: x to the right, y down, in pixels
PICTURE = np.array([WIDTH, HEIGHT])
MARGIN = 2  # pixels kept free on every side


def paint(strokes: Strokes, line: float) -> np.ndarray:
    """The ink of strokes, `line` pixels wide."""
    canvas = Image.new("L", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), 0)
    pen, radius = ImageDraw.Draw(canvas), line / 2 * SUPERSAMPLING
    for stroke in strokes:
        for x, y in SUPERSAMPLING * evenly(stroke, 1 / SUPERSAMPLING):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def any_line(rng: np.random.Generator) -> float:
    """A width of line in pixels: thin is 1.7, thick is 2.6."""
    return rng.uniform(1.4, 3.1)


def any_kind(rng: np.random.Generator) -> str:
    return rng.choice(list(KINDS))


def bend(points: np.ndarray, amplitude: float, wavelength: float, rng: np.random.Generator) -> np.ndarray:
    """Points moved by a smooth field of so many pixels."""
    waves = rng.normal(size=(2, 2)) * 2 * math.pi / wavelength
    return points + amplitude * np.sin(points @ waves + rng.uniform(0, 2 * math.pi, 2))


def place_parts(kind: str, rng: np.random.Generator, centre: np.ndarray | None = None) -> list[Strokes]:
    """The strokes of each part of a drawing of any size and proportion, anywhere or about a centre."""
    height, ratio, angle = rng.uniform(0.5, 0.92) * HEIGHT, math.exp(rng.uniform(-0.4, 0.4)), rng.normal(0, 0.05)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    parts = [[(stroke * (ratio, 1)) @ rotation for stroke in part] for part in KINDS[kind].values()]
    points = np.concatenate([stroke for part in parts for stroke in part])
    low, high = points.min(axis=0), points.max(axis=0)
    scale = min(height / (high - low)[1], *((PICTURE - 2 * MARGIN - 2) / (high - low)))
    low, high = low * scale, high * scale
    first, last = MARGIN + 1 - low, PICTURE - MARGIN - 1 - high
    middle = (
        first + rng.random(2) * (last - first) if centre is None else np.clip(centre - (low + high) / 2, first, last)
    )
    return [[stroke * scale + middle for stroke in part] for part in parts]


def wobble(strokes: Strokes, rng: np.random.Generator) -> Strokes:
    """As by a hand that is not quite steady."""
    seed, amplitude, wavelength = rng.integers(2**32), rng.uniform(0, 1.2), rng.uniform(30, 80)
    return [bend(evenly(s, 1), amplitude, wavelength, np.random.default_rng(seed)) for s in strokes]


def draw_freely(kind: str, rng: np.random.Generator, centre: np.ndarray | None = None) -> np.ndarray:
    """A finished drawing."""
    strokes = [stroke for part in place_parts(kind, rng, centre) for stroke in part]
    return paint(wobble(strokes, rng), any_line(rng))


# ---- unfinished


def draw_in_part(rng: np.random.Generator) -> np.ndarray:
    """The beginning of a drawing, up to two thirds of the line, or one without parts that make up a third or more."""
    parts = place_parts(any_kind(rng), rng)
    lengths = np.array([sum(len(evenly(stroke, 1)) for stroke in part) for part in parts])
    if rng.random() < 0.3:
        order = rng.permutation(len(parts))
        num_left_out = 1 + int(np.searchsorted(np.cumsum(lengths[order]) / lengths.sum(), rng.uniform(0.35, 0.8)))
        kept = sorted(order[num_left_out:])
        return paint(wobble([stroke for number in kept for stroke in parts[number]], rng), any_line(rng))
    dots = [evenly(stroke, 1) for part in parts for stroke in part]
    left, strokes = round(rng.uniform(0.05, 0.67) * lengths.sum()), []
    for stroke in dots:
        if left > 1:
            strokes.append(stroke[:left])
        left -= len(stroke)
    return paint(wobble(strokes, rng), any_line(rng))


# ---- no drawing


def white_paper(rng: np.random.Generator) -> np.ndarray:
    """Nothing, or a few specks."""
    specks = [np.repeat(rng.uniform((0, 0), PICTURE, (1, 2)), 2, axis=0) for _ in range(rng.integers(0, 5))]
    return paint(specks, any_line(rng))


def mean_of_drawings(rng: np.random.Generator) -> np.ndarray:
    """Of 2 to 24, the first two of different kinds."""
    number = int(2 * 12 ** rng.random())
    kinds = [*rng.choice(list(KINDS), 2, replace=False), *(any_kind(rng) for _ in range(number - 2))]
    return np.mean([draw_freely(kind, rng) for kind in kinds], axis=0).astype(np.uint8)


def overlaid_drawings(rng: np.random.Generator) -> np.ndarray:
    """Two to five on top of each other."""
    kinds = rng.choice(list(KINDS), rng.integers(2, 6), replace=False)
    centre = rng.uniform((40, 30), (72, 34))
    return np.max([draw_freely(kind, rng, centre + rng.normal(0, 6, 2)) for kind in kinds], axis=0)


def halves(rng: np.random.Generator) -> np.ndarray:
    """Two drawings in the same place, cut along a line, one half of each."""
    while True:
        centre = rng.uniform((35, 30), (77, 34))
        one, other = (draw_freely(kind, rng, centre) for kind in rng.choice(list(KINDS), 2, replace=False))
        angle, (y, x) = rng.uniform(0, 2 * math.pi), np.mgrid[:HEIGHT, :WIDTH]
        along = x * math.cos(angle) + y * math.sin(angle)
        side = along < np.median(along[one > 128])
        if 0.35 < other[side].sum() / other.sum() < 0.65:
            return np.where(side, one, other)


def parts_in_wrong_places(rng: np.random.Generator) -> np.ndarray:
    """Parts of one kind or of several, each moved for itself."""
    one = rng.random() < 0.5
    kind, strokes = any_kind(rng), []
    for _ in range(rng.integers(3, 7)):
        parts = place_parts(kind if one else any_kind(rng), rng)
        part = parts[rng.integers(len(parts))]
        points = np.concatenate(part)
        low, high = MARGIN - points.min(axis=0), PICTURE - MARGIN - points.max(axis=0)
        shift = rng.uniform(np.minimum(low, high), np.maximum(low, high))
        strokes += [stroke + shift for stroke in part]
    return paint(wobble(strokes, rng), any_line(rng))


def blots(rng: np.random.Generator) -> np.ndarray:
    """A drawing in lines so wide that it runs together, or filled shapes."""
    if rng.random() < 0.6:
        parts = place_parts(any_kind(rng), rng)
        points = np.concatenate([stroke for part in parts for stroke in part])
        line = rng.uniform(0.22, 0.5) * np.ptp(points, axis=0).min()
        return paint([stroke for part in parts for stroke in part], max(line, 8))
    canvas = Image.new("L", (WIDTH, HEIGHT), 0)
    for _ in range(rng.integers(1, 7)):
        corners = rng.uniform((15, 10), (97, 54)) + rng.normal(0, rng.uniform(3, 16), (rng.integers(3, 9), 2))
        ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=int(rng.integers(120, 256)))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3))))


def blurred_drawing(rng: np.random.Generator) -> np.ndarray:
    """Blurred beyond recognition, as dark as before or fainter."""
    blurred = Image.fromarray(draw_freely(any_kind(rng), rng)).filter(ImageFilter.GaussianBlur(rng.uniform(4, 9)))
    ink = np.asarray(blurred, dtype=np.float32)
    return np.clip(ink * rng.uniform(1, 200 / max(ink.max(), 1)), 0, 255).astype(np.uint8)


def scribble(rng: np.random.Generator) -> np.ndarray:
    """Random lines, arcs and loops."""
    strokes = []
    for _ in range(rng.integers(1, 14)):
        steps = rng.integers(2, 60)
        turns = rng.normal(rng.normal(0, 0.15), rng.uniform(0, 0.5), steps).cumsum() + rng.uniform(0, 2 * math.pi)
        path = np.stack([np.cos(turns), np.sin(turns)], axis=1).cumsum(axis=0) * rng.uniform(0.6, 2.5)
        strokes.append(np.clip(path + rng.uniform((15, 8), (97, 56)), MARGIN, PICTURE - MARGIN))
    return paint(strokes, any_line(rng))


def crumpled_drawing(rng: np.random.Generator) -> np.ndarray:
    """A drawing bent out of shape."""
    strokes = [evenly(stroke, 1) for part in place_parts(any_kind(rng), rng) for stroke in part]
    for _ in range(2):
        seed, amplitude, wavelength = rng.integers(2**32), rng.uniform(3, 7), rng.uniform(15, 35)
        strokes = [bend(stroke, amplitude, wavelength, np.random.default_rng(seed)) for stroke in strokes]
    return paint([np.clip(stroke, MARGIN, PICTURE - MARGIN) for stroke in strokes], any_line(rng))


NO_DRAWINGS = (
    *(white_paper, mean_of_drawings, overlaid_drawings, halves, parts_in_wrong_places, blots, blurred_drawing),
    *(scribble, crumpled_drawing),
)
