"""Opening a cache: which files its clips come from, and which models encode them."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from causal_wan.cache.encoded_clips import CachedData, Encoders
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.config.settings import BaseModelConfig, CacheConfig
from causal_wan.data.file_manifest import FileFacts, FileManifest, hash_content, stat_of
from causal_wan.data.settings import DataConfig, check_can_be_cached
from causal_wan.processes import gather_lists, num_processes, process_index, wait_for_all
from causal_wan.progress import show_progress
from causal_wan.weights.parts import find_part


logger = logging.getLogger(__name__)


MODEL_SUFFIXES = {".json", ".model", ".safetensors"}


def open_cache(
    config: CacheConfig,
    data: DataConfig,
    model: BaseModelConfig,
    rows: Sequence[Any],
    manifest: FileManifest,
    *,
    vae_tiling: bool,
    text_dtype: str,
    encodes: bool,
) -> tuple[CachedData, list[Any]]:
    """A cache as a run wants it, and the run's rows with the content of their files. Called by every process.

    Args:
        config: Names the folder.
        data: Settings of the clips.
        model: Where the encoders are.
        rows: Their files are read, split over the processes, unless the manifest knows them.
        manifest: Of the folder; the main process writes what is new.
        vae_tiling: Whether the VAE encodes in tiles.
        text_dtype: Precision of the text encoder, as in `causal_wan.weights.parts.DTYPES`.
        encodes: Whether the run may encode, and so needs the encoders at hand.

    Raises:
        ValueError: If the data cannot be cached, or the encoders cannot be told.
        OSError: If the encoders are to be fetched and cannot be.
    """
    check_can_be_cached(data)
    is_main = process_index() == 0
    own = range(process_index(), len(rows), num_processes())
    found = gather_lists(hash_rows(rows, own))
    manifest.add(found)
    rows = [row if row.content else replace(row, content=_content(row, manifest)) for row in rows]
    encoders = None
    if is_main:  # one reads the weights
        try:
            encoders = identify_encoders(
                manifest.path.parent,
                model,
                manifest,
                vae_tiling=vae_tiling,
                text_dtype=text_dtype,
                download=encodes,
            )
        except (ValueError, OSError) as error:
            encoders = error
        try:
            manifest.save()
        except OSError as error:  # others may only read the folder
            if encodes:
                raise
            logger.info("what was found out about files is not kept: %s", error)
    (encoders,) = gather_lists([encoders] if is_main else [])
    if isinstance(encoders, ValueError | OSError):
        raise encoders
    return CachedData(manifest.path.parent, data, encoders, config.latents_dtype), rows


def drop_damaged(caches: Iterable[TensorCache]) -> None:
    """Reads all entries, each process its share, and takes out those that are damaged. Called by every process."""
    for cache in caches:
        keys = list(cache.in_order())[process_index() :: num_processes()]
        bar = show_progress(keys, desc="verifying")
        damaged = gather_lists(list(cache.corrupt_keys(bar)))
        if process_index() == 0:
            print(f"{len(damaged)} of {len(cache)} entries of {cache.folder} are damaged")
            cache.drop(damaged)
        wait_for_all()  # until they are out
        cache.forget(damaged)


def hash_rows(rows: Sequence[Any], indices: Sequence[int]) -> list[FileFacts]:
    """Reads the files of rows whose content is not known.

    Args:
        rows: With `video`, `name`, `content` and the facts of the file.
        indices: Which of them to look at, so that processes can share the work.
    """

    def facts(index: int) -> FileFacts:
        row = rows[index]
        path, size, mtime_ns = stat_of(row.video)
        known = (row.num_frames, row.frame_rate, row.height, row.width, int(row.traits))
        return FileFacts(path, row.name, size, mtime_ns, hash_content(row.video), *known)

    unknown = [index for index in indices if not rows[index].content]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(facts, unknown)
        return list(show_progress(found, total=len(unknown), desc="reading files"))


def _content(row: Any, manifest: FileManifest) -> str:
    known = manifest.find(row.video)
    return known.shown if known is not None else ""


def identify_encoders(
    folder: str | Path,
    model: BaseModelConfig,
    manifest: FileManifest,
    *,
    vae_tiling: bool,
    text_dtype: str,
    download: bool,
) -> Encoders:
    """What encodes, told by the content of its weights, which are read unless the manifest knows the files.

    Args:
        folder: Of the cache. It remembers what its checkpoints are, for runs without VAE and text encoder at hand.
        model: Where the encoders are, and the VAE's precision.
        manifest: Of the folder.
        vae_tiling: Whether the VAE encodes in tiles.
        text_dtype: Precision of the text encoder, as in `causal_wan.weights.parts.DTYPES`.
        download: Whether to fetch encoders from the hub; else those that are not at hand are remembered.

    Raises:
        ValueError: If encoders are neither at hand nor remembered.
        OSError: If they are to be fetched and cannot be.
    """
    name, path = model.pretrained_model_name_or_path, Path(folder) / "models.json"
    name = str(Path(name).resolve()) if Path(name).is_dir() else f"{name} at {model.revision or 'main'}"
    remembered = json.loads(path.read_text()) if path.is_file() else {}
    contents = dict(remembered.get(name, {}))
    for part, folders in {"vae": ["vae"], "text_encoder": ["text_encoder", "tokenizer"]}.items():
        places = [
            find_part(model.pretrained_model_name_or_path, each, revision=model.revision, download=download)
            for each in folders
        ]
        if all(place is not None and place.is_dir() for place in places):
            contents[part] = _content_of_part(places, manifest)
        elif part not in contents:
            raise ValueError(
                f"latents_dir must be made with the base model of the run, but {folder} does not know {name}; run "
                "precompute_latents.py with it."
            )
    if download and remembered.get(name) != contents:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(remembered | {name: contents}, indent=1))
        os.replace(partial, path)
    return Encoders(
        vae=contents["vae"],
        text_encoder=contents["text_encoder"],
        vae_dtype=model.vae_dtype,
        vae_tiling=vae_tiling,
        text_dtype=text_dtype,
        max_sequence_length=model.max_sequence_length,
    )


def _content_of_part(folders: Sequence[Path], manifest: FileManifest) -> str:
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES]
    return hashlib.sha256(str([(path.name, manifest.content(path)) for path in files]).encode()).hexdigest()
