"""The latents and prompt embeddings of a data set in a folder: what a run wants of them, what is there, what is not.

`latents/` and `prompts/` hold tensors by key, `files.parquet` what is known of the video files, `models.json` which
models encoded them. A latent is found by the content of its file and by all that shapes it, so a cache serves any
number of runs and of tables, and changed files and settings are never mistaken for others.

Shapes: C = latent channels, F = latent frames, H, W = latent height and width, S = prompt tokens, D = text dimension.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from causal_wan.cache.tensor_cache import CacheWriter, TensorCache, describe_differences, settings_key
from causal_wan.config.settings import LatentsDtype
from causal_wan.data.clips import shown_prompts
from causal_wan.data.settings import ClipShape, DataConfig, check_can_be_cached
from causal_wan.devices import LateCopy
from causal_wan.weights.parts import DTYPES


logger = logging.getLogger(__name__)

MAX_SHOWN = 5
PROMPT_SHARD_BYTES = 32 << 20


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
        rate = {} if self.data.frame_sampling == "uniform" else {"frame_rate": self.data.sampling_rate}
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
        """One clip: latents `(C, F, H, W)`, or video and cache_key; controls, like the clip, and control_keys.

        What is not there is decoded, and has a key; the others have None.

        Raises:
            ValueError: If latents are damaged, or a video does not decode.
        """
        row = self.videos.rows[index]
        keys = [self.cached.latent_key(each.content, shape) for each in (row, *row.controls)]
        with self.videos.noted(index):
            found = [self._find(key) for key in keys]
        if all(latents is not None for latents, _ in found):
            prompts = shown_prompts(row, shape, self.cached.data, generator)
            facts = {"prompts": prompts, "row_index": index, **found[0][1]}
            latents, *controls = (latents for latents, _ in found)
            return {"latents": latents, "controls": controls, **facts}
        loaded = self.videos.load(index, generator, shape)
        videos = [loaded.pop("video"), *loaded.pop("controls")]
        keys = [None if known is not None else key for key, (known, _) in zip(keys, found, strict=True)]
        each = [video if known is None else known for video, (known, _) in zip(videos, found, strict=True)]
        clip = {"video": each[0], "cache_key": keys[0]} if keys[0] is not None else {"latents": each[0]}
        return {**loaded, **clip, "controls": each[1:], "control_keys": keys[1:]}

    def _find(self, key: bytes) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Latents and what is known of them; None where they are not there, or damaged and to be made anew."""
        cache = self.cached.latents
        if self.fills and key not in cache:
            cache.refresh()  # another process may have made them
        if key in cache:
            try:
                return cache.read(key)
            except ValueError:
                if not self.fills:
                    raise
        return None, {}


# --- opening ---------------------------------------------------------------------------------------------------------
