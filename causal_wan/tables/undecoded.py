"""Data sets of `datasets`, without decoding their videos."""

from tarfile import TarError
from typing import Any

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    Video,
    load_dataset,
)
from datasets.exceptions import DatasetsError


LOADING_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError, TarError)


def load_undecoded(arguments: dict[str, Any], *, streaming: bool) -> Dataset | IterableDataset:
    """What `load_dataset` gives, but the videos in WebDataset tars as plain bytes.

    As `Video`, it would drop the bytes of any clip whose name in the tar is also that of a file below the current
    folder, and go by that file.
    """
    stream = load_dataset(**arguments, streaming=True)  # reads no more than the columns take
    features = stream.features or Features()
    if {"__key__", "__url__"} <= features.keys():
        plain = {name: Value("binary") for name, feature in features.items() if isinstance(feature, Video)}
        return load_dataset(**arguments, features=Features({**features, **plain}), streaming=streaming)
    return stream if streaming else load_dataset(**arguments)
