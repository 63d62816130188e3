"""Data sets of `datasets`, without decoding or unpickling anything in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetInfo,
    DownloadManager,
    Features,
    GeneratorBasedBuilder,
    IterableDataset,
    List,
    SplitGenerator,
    Value,
    load_dataset,
    load_dataset_builder,
)
from datasets.builder import Key
from datasets.data_files import DataFilesDict
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen
from huggingface_hub.errors import HTTPError

from causal_wan.tables.sources import Source, check_columns
from causal_wan.tables.tars import DAMAGES, ERROR, find_endings, read_clips


LOADING_ERRORS = (DatasetsError, OSError, ValueError, RuntimeError, HTTPError, pa.ArrowException, *DAMAGES)
READING = 2  # how tars are read; 1 took those for whole that were cut between members
SAVED_DATASET_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` has made a folder."""
    return any((folder / name).is_file() for name in SAVED_DATASET_FILES)


@dataclass
class TarsConfig(BuilderConfig):
    """Which members of tars are wanted."""

    video_column: str = "mp4"
    caption_column: tuple[str, ...] = ("txt",)
    control_column: tuple[str, ...] = ()


class Tars(GeneratorBasedBuilder):
    """WebDataset tars by the rules of `causal_wan.tables.tars`.

    The builder of `datasets` decodes every member, some with torch.load, must see the same ones in each clip, and
    drops the bytes of a clip whose name in the tar is also that of a file below the current folder.
    """

    BUILDER_CONFIG_CLASS = TarsConfig
    DEFAULT_WRITER_BATCH_SIZE = 16  # clips that are held in memory

    def _info(self) -> DatasetInfo:
        video = {"bytes": Value("binary"), "path": Value("string")}
        videos = [self.config.video_column, *self.config.control_column]
        captions = dict.fromkeys(self.config.caption_column, List(Value("string")))
        return DatasetInfo(
            features=Features({**dict.fromkeys(videos, video), **captions, ERROR: Value("string")}),
        )

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        splits = dl_manager.download(self.config.data_files)
        return [SplitGenerator(name=split, gen_kwargs={"files": list(files)}) for split, files in splits.items()]

    def _generate_shards(self, files: list[str]) -> Iterator[str]:
        yield from files

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[Key, dict[str, Any]]]:
        for number, name in enumerate(files):
            with open_tar(name) as file:
                try:
                    named = self.config
                    columns = (named.video_column, named.caption_column, named.control_column)
                    clips = read_clips(file, *columns, name=name)
                    for row, clip in enumerate(clips):
                        yield Key(number, row), clip
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error


def open_tar(name: str) -> Any:
    """A file or an address, to be read from its beginning to its end."""
    return xopen(name, "rb", block_size=0)


def load_undecoded(arguments: dict[str, Any], source: Source, *, streaming: bool) -> Dataset | IterableDataset:
    """What `load_dataset` gives, but of WebDataset tars the wanted members alone.

    Args:
        arguments: Of `load_dataset`.
        source: Names the columns.
        streaming: Whether to read as it is gone through.

    Raises:
        ValueError: If the first tar lacks a column.
    """
    split = arguments["split"]
    if arguments["path"] != "webdataset":
        if "data_files" in arguments:
            return load_dataset(**arguments, streaming=streaming)
        builder = load_dataset_builder(arguments["path"], revision=arguments["revision"])
        if not isinstance(builder, WebDataset) or split not in builder.config.data_files:
            return load_dataset(**arguments, streaming=streaming)
        data_files = DataFilesDict({split: builder.config.data_files[split]})
    else:
        data_files = {split: arguments["data_files"]}
    columns = {name: vars(source)[name] for name in ("video_column", "caption_column", "control_column")}
    tars = Tars(hash=f"{READING}", data_files=data_files, **columns)
    first = tars.config.data_files[split][0]
    try:
        with open_tar(first) as file:
            endings = find_endings(file, source.columns, name=first)
    except ValueError as error:
        raise ValueError(f"{first}: {error}") from error
    check_columns(endings, source)
    if streaming:
        return tars.as_streaming_dataset(split)
    tars.download_and_prepare()
    return tars.as_dataset(split)
