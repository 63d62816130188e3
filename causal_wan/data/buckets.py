"""The bucket of each clip: the shape in which it fits best."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from causal_wan.data.frames import num_sampleable_frames
from causal_wan.data.rows import Row
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.settings import ClipShape, DataConfig


def choose_bucket(row: Row, config: DataConfig) -> int:
    """The bucket of a clip: nearest aspect ratio, then longest that it has the frames for.

    Among sizes of one aspect ratio, the largest that needs no enlarging is taken.
    """
    if len(config.buckets) == 1:
        return 0
    available = num_sampleable_frames(row.num_frames, row.frame_rate, config)

    def misfit(bucket: int) -> tuple[float, ...]:
        length, size = config.buckets[bucket]
        stretch = enlarging = pixels = lack = 0.0
        if size is not None:
            height, width = size
            stretch = round(abs(math.log(row.height / row.width * width / height)), 6)
            enlarging = max(height / row.height, width / row.width, 1.0) - 1
            pixels = height * width
        if length is not None:
            lack = max(length - available, 0)
        return stretch, enlarging, -pixels, lack, -(length or 0)

    return min(range(len(config.buckets)), key=misfit)


def clip_shapes(row: Row, config: DataConfig) -> list[ClipShape]:
    """Every shape in which a run may show a clip."""
    return config.shapes_of_bucket(choose_bucket(row, config))


def order_samples(rows: Sequence[Row], config: DataConfig, **settings: Any) -> SampleOrder:
    """The order of a run's samples over rows; `settings` are those of `SampleOrder`."""
    return SampleOrder([choose_bucket(row, config) for row in rows], [row.source for row in rows], **settings)


def describe_shapes(rows: Sequence[Row], config: DataConfig) -> list[str]:
    """Lines on the buckets and stages of a run that has more than one shape."""
    lines = []
    if len(config.buckets) > 1:
        counts = Counter(choose_bucket(row, config) for row in rows)
        buckets = [_describe_shape(config.shapes_of_bucket(bucket)[-1]) for bucket in range(len(config.buckets))]
        lines.append("buckets     " + ", ".join(f"{name}: {counts[i]} clips" for i, name in enumerate(buckets)))
    for stages, schedule in ((config.frame_stages, "frames"), (config.size_stages, "resolution")):
        if len(stages) > 1:
            values = [value if isinstance(value, int) else f"{value[0]} x {value[1]}" for _, value in stages]
            parts = [f"{value} from step {first}" for (first, _), value in zip(stages, values, strict=True)]
            lines.append(f"schedule    {schedule}: " + ", ".join(parts))
    return lines


def _describe_shape(shape: ClipShape) -> str:
    return f"{shape.num_frames} x {shape.height} x {shape.width}"
