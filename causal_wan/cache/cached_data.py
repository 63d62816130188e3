"""The latents and prompt embeddings of a data set in a folder: what a run wants of them, what is there, what is not.

`latents/` and `prompts/` hold tensors by key, `files.parquet` what is known of the video files, `models.json` which
models encoded them. A latent is found by the content of its file and by all that shapes it, so a cache serves any
number of runs and of tables, and changed files and settings are never mistaken for others.

Shapes: C = latent channels, F = latent frames, H, W = latent height and width, S = prompt tokens, D = text dimension.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from tqdm.auto import tqdm

from causal_wan.cache.tensor_cache import CacheWriter, TensorCache, describe_differences, settings_key
from causal_wan.config.settings import CacheConfig, CheckpointConfig, LatentsDtype
from causal_wan.data.file_manifest import FileFacts, FileManifest, hash_content, stat_of
from causal_wan.data.settings import ClipShape, DataConfig, check_can_be_cached
from causal_wan.devices import LateCopy
from causal_wan.processes import gather_lists, num_processes, process_index, wait_for_all
from causal_wan.weights.parts import DTYPES, find_part


logger = logging.getLogger(__name__)

MAX_SHOWN = 5
PROMPT_SHARD_BYTES = 32 << 20
MODEL_SUFFIXES = {".json", ".model", ".safetensors"}


@dataclass(frozen=True)
class Encoders:
    """What encodes: SHA-256 of the weights of VAE and text encoder, and their precision."""

    vae: str
    text_encoder: str
    vae_dtype: str
    vae_tiling: bool
    text_dtype: str
    max_sequence_length: int


class CachedData:
    """The cache of a folder, as a run wants it.

    Args:
        folder: Need not exist.
        data: Settings of the clips.
        encoders: What encodes them.
        dtype: Precision that latents are kept in.

    Raises:
        ValueError: If no two samples of a clip are the same, so that there is nothing to keep.
    """

    def __init__(self, folder: str | Path, data: DataConfig, encoders: Encoders, dtype: LatentsDtype) -> None:
        check_can_be_cached(data)
        self.folder, self.data, self.encoders, self.dtype = Path(folder), data, encoders, DTYPES[dtype]
        self.latents, self.prompts = TensorCache(self.folder / "latents"), TensorCache(self.folder / "prompts")

    def latent_settings(self, shape: ClipShape) -> dict[str, Any]:
        """What a latent depends on beside the content of its file."""
        rate = {} if self.data.frame_sampling == "uniform" else {"frame_rate": self.data.frame_rate}
        return {
            **shape._asdict(),
            "frame_sampling": self.data.frame_sampling,
            **rate,
            "crop": "aspect kept, centre",
            "vae": self.encoders.vae,
            "vae_dtype": self.encoders.vae_dtype,
            "vae_tiling": self.encoders.vae_tiling,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def latent_key(self, content: str, shape: ClipShape) -> bytes:
        """Of the latents of a file."""
        return settings_key(self.latent_settings(shape), content)

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """What an embedding depends on beside the prompt."""
        return {
            "text_encoder": self.encoders.text_encoder,
            "text_dtype": self.encoders.text_dtype,
            "max_sequence_length": self.encoders.max_sequence_length,
        }

    def prompt_key(self, prompt: str) -> bytes:
        """Of the embedding of a prompt."""
        return settings_key(self.prompt_settings, prompt)

    def missing_clips(self, rows: Sequence[Any], shapes: Sequence[Sequence[ClipShape]]) -> list[tuple[int, ClipShape]]:
        """(index of a row, shape) of each latent that is not there; one of those that have the same key.

        Args:
            rows: With `content`.
            shapes: In which each row is wanted.
        """
        missing: dict[bytes, tuple[int, ClipShape]] = {}
        for index, (row, wanted) in enumerate(zip(rows, shapes, strict=True)):
            for shape in wanted:
                key = self.latent_key(row.content, shape)
                if not row.content or key not in self.latents:
                    missing.setdefault(key if row.content else index.to_bytes(8), (index, shape))
        return list(missing.values())

    def missing_prompts(self, prompts: Iterable[str]) -> list[str]:
        """Distinct prompts whose embeddings are not there, sorted."""
        return sorted(prompt for prompt in set(prompts) if self.prompt_key(prompt) not in self.prompts)

    def check_complete(
        self, rows: Sequence[Any], shapes: Sequence[Sequence[ClipShape]], prompts: Iterable[str]
    ) -> None:
        """Checks that all latents and embeddings are there.

        Raises:
            ValueError: If not; names the setting in which the cache differs, or the first rows.
        """
        prompts = set(prompts)
        missing, missing_prompts = self.missing_clips(rows, shapes), self.missing_prompts(prompts)
        if not missing and not missing_prompts:
            return
        wanted = self.latent_settings(missing[0][1]) if missing else self.prompt_settings
        settings = self.latents.settings if missing else self.prompts.settings
        difference = describe_differences(wanted, settings) if wanted not in settings else ""
        first = ", ".join(f"row {rows[index].number}, {rows[index].video}" for index, _ in missing[:MAX_SHOWN])
        reason = difference or (f"new or changed: {first}" if missing else f"first {missing_prompts[0]!r}")
        raise ValueError(
            f"latents_dir must hold latents and embeddings of all clips, but {self.folder} lacks {len(missing)} of "
            f"{len(rows)} clips and {len(missing_prompts)} of {len(prompts)} prompts ({reason}). Run "
            "precompute_latents.py with the same settings, or add --cache_latents to encode them as training goes."
        )

    def latent_writer(self, *, eager: bool = False) -> CacheWriter:
        """Writes latents; `eager` is that of `CacheWriter`."""
        return CacheWriter(self.latents.folder, eager=eager)

    def prompt_writer(self) -> CacheWriter:
        """Writes prompt embeddings."""
        return CacheWriter(self.prompts.folder, shard_bytes=PROMPT_SHARD_BYTES)


class CachedPrompts(Mapping[str, torch.Tensor]):
    """Prompt -> embedding `(S, D)` of its true length, read when asked for.

    Args:
        cache: Has the embeddings.
        key: Of the embedding of a prompt.
    """

    def __init__(self, cache: TensorCache, key: Callable[[str], bytes]) -> None:
        self.cache, self.key = cache, key

    def __getitem__(self, prompt: str) -> torch.Tensor:
        return self.cache.read(self.key(prompt))[0]

    def __len__(self) -> int:
        return len(self.cache)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a cache knows the keys of prompts, not the prompts")


class LatentKeeper:
    """Keeps latents as a run encodes them; where they cannot be kept, it says so once and the run goes on.

    Args:
        cached: Where they go.
        writer: Writes them.
    """

    def __init__(self, cached: CachedData, writer: CacheWriter) -> None:
        self.cached, self.writer = cached, writer
        self.is_broken = False
        self._late = LateCopy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._late.flush()
        try:
            self.writer.flush()
        except OSError as error:
            logger.error("the last latents are not kept: %s", error)

    def keep(self, key: bytes, latents: torch.Tensor, shape: ClipShape, num_valid_frames: int) -> torch.Tensor:
        """Keeps the latents `(C, F, H, W)` of a clip, and returns them as they will be read, in float32."""
        latents = latents.to(self.cached.dtype)
        facts = {"settings": self.cached.latent_settings(shape), "num_valid_frames": num_valid_frames}
        self._late.hand_in(latents, partial(self._add, key, **facts))
        return latents.float()

    def _add(self, key: bytes, latents: torch.Tensor, **facts: Any) -> None:
        if self.is_broken:
            return
        try:
            self.writer.add(key, latents.clone(), **facts)  # pinned memory is not for waiting until a shard is full
        except OSError as error:
            self.is_broken = True
            logger.error("latents are not kept any longer, the run goes on without: %s", error)


class CachedClips:
    """A data set that gives latents where the cache has them, and else videos with the key to keep latents under.

    Args:
        videos: The data set; with `rows`, `load` and `noted`.
        cached: Its cache.
        fills: Whether missing and damaged latents are to be made anew; else they are errors.
    """

    def __init__(self, videos: Any, cached: CachedData, *, fills: bool) -> None:
        self.videos, self.cached, self.fills = videos, cached, fills

    def __len__(self) -> int:
        return len(self.videos)

    def load(self, index: int, generator: torch.Generator, shape: ClipShape) -> dict[str, Any]:
        """One clip: latents `(C, F, H, W)`, or video and cache_key; and what the data set says of it.

        Raises:
            ValueError: If the latents are damaged, or the clip does not decode.
        """
        row, cache = self.videos.rows[index], self.cached.latents
        key = self.cached.latent_key(row.content, shape)
        if self.fills and key not in cache:
            cache.refresh()  # another process may have made them
        if key in cache:
            try:
                with self.videos.noted(index):
                    latents, facts = cache.read(key)
                return {"latents": latents, "prompts": row.prompts, "row_index": index, **facts}
            except ValueError:
                if not self.fills:
                    raise
        return self.videos.load(index, generator, shape) | {"cache_key": key}


# --- opening ---------------------------------------------------------------------------------------------------------


def open_cache(
    config: CacheConfig,
    data: DataConfig,
    checkpoint: CheckpointConfig,
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
        checkpoint: Where the encoders are.
        rows: Their files are read, split over the processes, unless the manifest knows them.
        manifest: Of the folder; the main process writes what is new.
        vae_tiling: Whether the VAE encodes in tiles.
        text_dtype: Precision of the text encoder, as in `causal_wan.weights.parts.DTYPES`.
        encodes: Whether the run may encode, and so needs the encoders at hand.

    Raises:
        ValueError: If the data cannot be cached, or the encoders cannot be told.
    """
    check_can_be_cached(data)
    is_main = process_index() == 0
    own = range(process_index(), len(rows), num_processes())
    found = gather_lists(hash_rows(rows, own, show_progress=is_main))
    manifest.add(found)
    rows = [row if row.content else replace(row, content=_content(row, manifest)) for row in rows]
    encoders = None
    if is_main:  # one reads the weights
        try:
            encoders = identify_encoders(
                manifest.path.parent,
                checkpoint,
                manifest,
                vae_tiling=vae_tiling,
                text_dtype=text_dtype,
                download=encodes,
            )
        except ValueError as error:
            encoders = error
        try:
            manifest.save()
        except OSError as error:  # others may only read the folder
            if encodes:
                raise
            logger.info("what was found out about files is not kept: %s", error)
    (encoders,) = gather_lists([encoders] if is_main else [])
    if isinstance(encoders, ValueError):
        raise encoders
    return CachedData(manifest.path.parent, data, encoders, config.latents_dtype), rows


def drop_damaged(caches: Iterable[TensorCache]) -> None:
    """Reads all entries, each process its share, and takes out those that are damaged. Called by every process."""
    for cache in caches:
        keys = list(cache.in_order())[process_index() :: num_processes()]
        bar = tqdm(keys, desc="verifying", disable=process_index() != 0)
        damaged = gather_lists(list(cache.corrupt_keys(bar)))
        if process_index() == 0:
            print(f"{len(damaged)} of {len(cache)} entries of {cache.folder} are damaged")
            cache.drop(damaged)
        wait_for_all()  # until they are out
        cache.forget(damaged)


def hash_rows(rows: Sequence[Any], indices: Sequence[int], *, show_progress: bool = False) -> list[FileFacts]:
    """Reads the files of rows whose content is not known.

    Args:
        rows: With `video`, `name`, `content` and the facts of the file.
        indices: Which of them to look at, so that processes can share the work.
        show_progress: Whether to show a bar.
    """

    def facts(index: int) -> FileFacts:
        row = rows[index]
        path, size, mtime_ns = stat_of(row.video)
        known = (row.num_frames, row.frame_rate, row.height, row.width)
        return FileFacts(path, row.name, size, mtime_ns, hash_content(row.video), *known)

    unknown = [index for index in indices if not rows[index].content]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(facts, unknown)
        return list(tqdm(found, total=len(unknown), desc="reading files", delay=2, disable=not show_progress))


def _content(row: Any, manifest: FileManifest) -> str:
    known = manifest.find(row.video)
    return known.content if known is not None else ""


def identify_encoders(
    folder: str | Path,
    checkpoint: CheckpointConfig,
    manifest: FileManifest,
    *,
    vae_tiling: bool,
    text_dtype: str,
    download: bool,
) -> Encoders:
    """What encodes, told by the content of its weights, which are read unless the manifest knows the files.

    Args:
        folder: Of the cache. It remembers what its checkpoints are, for runs without VAE and text encoder at hand.
        checkpoint: Where the encoders are, and the VAE's precision.
        manifest: Of the folder.
        vae_tiling: Whether the VAE encodes in tiles.
        text_dtype: Precision of the text encoder, as in `causal_wan.weights.parts.DTYPES`.
        download: Whether to fetch encoders from the hub; else those that are not at hand are remembered.

    Raises:
        ValueError: If encoders are neither at hand nor remembered.
    """
    name, path = checkpoint.pretrained_model_name_or_path, Path(folder) / "models.json"
    name = str(Path(name).resolve()) if Path(name).is_dir() else f"{name} at {checkpoint.revision or 'main'}"
    remembered = json.loads(path.read_text()) if path.is_file() else {}
    contents = dict(remembered.get(name, {}))
    for part, folders in {"vae": ["vae"], "text_encoder": ["text_encoder", "tokenizer"]}.items():
        places = [
            find_part(checkpoint.pretrained_model_name_or_path, each, revision=checkpoint.revision, download=download)
            for each in folders
        ]
        if all(place is not None and place.is_dir() for place in places):
            contents[part] = _content_of_part(places, manifest)
        elif part not in contents:
            raise ValueError(
                f"latents_dir must be made with the checkpoint of the run, but {folder} does not know {name}; run "
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
        vae_dtype=checkpoint.vae_dtype,
        vae_tiling=vae_tiling,
        text_dtype=text_dtype,
        max_sequence_length=checkpoint.max_sequence_length,
    )


def _content_of_part(folders: Sequence[Path], manifest: FileManifest) -> str:
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES]
    return hashlib.sha256(str([(path.name, manifest.content(path)) for path in files]).encode()).hexdigest()
