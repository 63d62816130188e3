"""The cache of latents on disk: what is read is what was written, whatever happens to processes and files between."""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from causal_wan.cache.encoded_clips import CachedData, Encoders
from causal_wan.cache.tensor_cache import (
    MAX_SHARD_ENTRIES,
    STALE_SECONDS,
    CacheWriter,
    CorruptTensorError,
    TensorCache,
    describe_differences,
    remove_stale_shards,
    settings_key,
)
from causal_wan.data.file_manifest import FileManifest, hash_content
from causal_wan.data.settings import ClipShape, DataConfig


FORK = multiprocessing.get_context("fork")  # the libraries are loaded already
SETTINGS = {"num_frames": 17, "height": 480, "dtype": "bfloat16"}


def key(number, settings=SETTINGS):
    return settings_key(settings, str(number))


def tensor(number, dtype=torch.bfloat16):
    """Entry `number`: another tensor of another size for each."""
    return torch.randn(4, 2 + number % 3, 5, generator=torch.Generator().manual_seed(number)).to(dtype)


def write(folder, numbers, **options):
    with CacheWriter(folder, **options) as writer:
        for number in numbers:
            writer.add(key(number), tensor(number), SETTINGS, num_valid_frames=number)
    return TensorCache(folder)


def assert_holds(cache, numbers):
    for number in numbers:
        found, facts = cache.read(key(number))
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, tensor(number))
        assert facts == {"num_valid_frames": number}


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def flip_bit(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def header_length(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


# --- what is read is what was written --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_entries_come_back_to_the_last_bit_with_their_facts(tmp_path, dtype):
    bits = torch.randint(0, 256, (3, 7, dtype.itemsize), generator=torch.Generator().manual_seed(0))
    written = bits.to(torch.uint8).view(dtype)  # any bits: numbers, infinities, not-a-numbers, zeros of both signs
    with CacheWriter(tmp_path / "new" / "folder") as writer:
        writer.add(b"k" * 16, written, {"a": 1}, num_valid_frames=9, note="é")
    read, facts = TensorCache(tmp_path / "new" / "folder").read(b"k" * 16)
    assert read.dtype == dtype
    assert read.shape == written.shape
    assert torch.equal(read.view(torch.uint8), written.view(torch.uint8))
    assert facts == {"num_valid_frames": 9, "note": "é"}


def test_slices_of_a_batch_and_transposed_tensors_can_be_added(tmp_path):
    batch = torch.randn(3, 4, 5)
    with CacheWriter(tmp_path) as writer:
        for number, row in enumerate(batch):
            writer.add(key(number), row, SETTINGS)
        writer.add(key(3), batch[0].T, SETTINGS)
    cache = TensorCache(tmp_path)
    assert all(torch.equal(cache.read(key(number))[0], row) for number, row in enumerate(batch))
    assert torch.equal(cache.read(key(3))[0], batch[0].T)


def test_a_shard_is_written_when_it_is_full(tmp_path):
    entry_bytes = tensor(0).nbytes
    with CacheWriter(tmp_path, shard_bytes=3 * entry_bytes) as writer:
        for number in range(7):
            writer.add(key(number), tensor(0), SETTINGS)
            assert len(shards(tmp_path)) == (number + 1) // 3
    assert len(shards(tmp_path)) == 3
    assert len(TensorCache(tmp_path)) == 7
    assert not list(tmp_path.glob(".*"))


def test_an_exception_loses_nothing_that_was_added(tmp_path):
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path) as writer:
        writer.add(key(5), tensor(5), SETTINGS, num_valid_frames=5)
        raise KeyboardInterrupt
    assert_holds(TensorCache(tmp_path), [5])


def test_a_cache_that_is_not_there_yet_is_empty(tmp_path):
    cache = TensorCache(tmp_path / "nowhere")
    assert len(cache) == 0
    assert key(0) not in cache
    assert list(cache.in_order()) == []
    with pytest.raises(KeyError):
        cache.read(key(0))


def test_reading_in_order_gives_what_random_reading_gives_and_goes_through_each_file_once(tmp_path):
    cache = write(tmp_path, range(20), shard_bytes=300)
    in_order = list(cache.in_order())
    assert sorted(in_order) == sorted(key(number) for number in range(20))
    shuffled = random.Random(0).sample(range(20), 20)
    assert_holds(cache, shuffled)
    places = []
    for entry in in_order:
        (path,) = [path for path in shards(tmp_path) if entry.hex() in path.read_bytes().decode("latin-1")]
        header = json.loads(path.read_bytes()[8 : header_length(path)])
        places.append((path.name, header[entry.hex()]["data_offsets"][0]))
    files = list(dict.fromkeys(name for name, _ in places))
    assert places == sorted(places, key=lambda place: (files.index(place[0]), place[1]))
    assert len(shards(tmp_path)) > 3


def test_new_shards_of_others_are_seen_after_a_refresh(tmp_path):
    cache = write(tmp_path, range(3))
    write(tmp_path, range(3, 6))
    assert key(4) not in cache
    cache.refresh()
    assert_holds(cache, range(6))
    assert len(cache) == 6


# --- processes -------------------------------------------------------------------------------------------------------


def test_an_eager_writer_shows_others_what_is_new_in_few_shards(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    reader, writer = TensorCache(tmp_path), CacheWriter(tmp_path, eager=True)
    for number in range(1000):
        clock[0] += 1
        writer.add(key(number), tensor(number), SETTINGS)
    reader.refresh()
    assert 850 < len(reader) < 1000
    assert 20 < len(reader.shards) < 70


def test_a_full_disk_is_an_error_that_says_so(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causal_wan.cache.tensor_cache.save_file", full)
    with pytest.raises(OSError, match="No space left"), CacheWriter(tmp_path) as writer:
        writer.add(key(1), tensor(1), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_any_number_of_processes_write_at_once(tmp_path):
    writers = [
        FORK.Process(target=write, args=(tmp_path, range(first, 40, 3)), kwargs={"shard_bytes": 200})
        for first in (0, 1, 2, 2)  # the last two write the same
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    cache = TensorCache(tmp_path)
    assert len(cache) == 40
    assert_holds(cache, range(40))


def write_on_and_on(folder, start):
    with CacheWriter(folder, shard_bytes=1 << 20) as writer:
        for number in range(start, start + 1_000_000):
            writer.add(key(number), torch.full((64, 1024), float(number)), SETTINGS)


def test_a_kill_at_any_moment_leaves_whole_shards_alone(tmp_path, caplog):
    moments, counts = random.Random(0), []
    for attempt in range(8):
        known = set(tmp_path.glob(".*"))
        writer = FORK.Process(target=write_on_and_on, args=(tmp_path, 1_000_000 * attempt))
        writer.start()
        time.sleep(0.05 * moments.random())
        while attempt % 2 and writer.is_alive() and set(tmp_path.glob(".*")) <= known:
            pass  # every second one is killed while it writes a shard
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(60)
        counts.append(len(TensorCache(tmp_path)))
    assert list(tmp_path.glob(".*"))  # halves, some of them those of safetensors, which writes beside by itself
    assert not list(TensorCache(tmp_path).corrupt_keys())
    assert not caplog.records
    assert counts[-1] > 0


def test_only_old_halves_of_shards_are_removed(tmp_path):
    old, new = tmp_path / ".a.partial", tmp_path / ".b.partial"
    for path in (old, new):
        path.touch()
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    write(tmp_path, [0])
    remove_stale_shards(tmp_path)
    assert not old.exists()
    assert new.exists()  # it may be another process that writes now
    assert_holds(TensorCache(tmp_path), [0])


class Entries(Dataset):
    """Reads entries in the workers of a data loader."""

    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return 12

    def __getitem__(self, number):
        return self.cache.read(key(number))


def test_a_cache_that_has_been_read_goes_into_the_workers_of_a_data_loader(tmp_path):
    cache = write(tmp_path, range(12), shard_bytes=200)
    assert_holds(cache, range(12))
    copy = pickle.loads(pickle.dumps(cache))
    assert_holds(copy, range(12))
    assert len(pickle.dumps(cache)) < 4096  # an index, no handles and no tensors
    loader = DataLoader(Entries(cache), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for number, (found, facts) in enumerate(loader):
        assert torch.equal(found, tensor(number))
        assert facts == {"num_valid_frames": number}


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_and_named_and_the_other_entries_stay(tmp_path):
    cache = write(tmp_path, range(3))
    (path,) = shards(tmp_path)
    flip_bit(path, path.stat().st_size - 1)
    (damaged,) = cache.corrupt_keys()
    with pytest.raises(CorruptTensorError, match=rf"entry {damaged.hex()} of {path} .* precompute_latents.py"):
        cache.read(damaged)
    others = [number for number in range(3) if key(number) != damaged]
    assert_holds(cache, others)

    cache.drop([damaged])
    for seen in (cache, TensorCache(tmp_path)):
        assert damaged not in seen
        assert len(seen) == 2
        assert_holds(seen, others)
    write(tmp_path, range(3))
    assert_holds(TensorCache(tmp_path), range(3))


def test_no_flipped_bit_anywhere_in_a_shard_gives_something_else_or_stops_a_run(tmp_path):
    write(tmp_path, range(3))
    (path,) = shards(tmp_path)
    content, outcomes = path.read_bytes(), Counter()
    for position in range(len(content)):
        path.write_bytes(content)
        flip_bit(path, position, bit=position % 8)
        cache = TensorCache(tmp_path)
        for number in range(3):
            if key(number) not in cache:
                outcomes["missing"] += 1
                continue
            try:
                found, facts = cache.read(key(number))
            except CorruptTensorError:
                outcomes["damaged"] += 1
                continue
            outcomes["whole"] += 1
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, tensor(number))
            assert facts == {"num_valid_frames": number}
    assert outcomes["damaged"] >= sum(tensor(number).nbytes for number in range(3))
    assert outcomes["whole"]


def test_of_two_entries_with_one_key_the_newest_counts(tmp_path):
    write(tmp_path, [0])
    for number in range(8):  # names are random
        time.sleep(0.01)
        with CacheWriter(tmp_path) as writer:
            writer.add(key(0), torch.full((3,), float(number)), SETTINGS)
        assert torch.equal(TensorCache(tmp_path).read(key(0))[0], torch.full((3,), float(number)))
    assert len(shards(tmp_path)) == 9


def test_halves_that_safetensors_leaves_are_removed_too(tmp_path):
    half = tmp_path / ".tmpa1B2c3"
    half.touch()
    os.utime(half, (0, 0))
    remove_stale_shards(tmp_path)
    assert not half.exists()


def test_small_entries_do_not_share_a_header_of_thousands(tmp_path):
    with CacheWriter(tmp_path) as writer:
        for number in range(MAX_SHARD_ENTRIES + 1):
            writer.add(key(number), torch.zeros(1), SETTINGS)
    assert len(shards(tmp_path)) == 2


def test_a_shard_with_nothing_whole_in_it_is_removed(tmp_path):
    cache = write(tmp_path, [0])
    cache.drop([key(0)])
    assert not shards(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_cut_off_shard_is_reported_and_its_entries_are_missing(tmp_path, caplog, share):
    write(tmp_path, range(3))
    (cut,) = shards(tmp_path)
    write(tmp_path, range(3, 6))
    os.truncate(cut, int(share * cut.stat().st_size))
    cache = TensorCache(tmp_path)
    assert key(0) not in cache
    assert f"{cut} is damaged and left out" in caplog.text
    assert_holds(cache, range(3, 6))


def test_a_shard_that_is_cut_off_or_removed_while_it_is_in_use_is_an_error_that_names_it(tmp_path):
    cache = write(tmp_path, range(3))
    (path,) = shards(tmp_path)
    content, last = path.read_bytes(), list(cache.in_order())[-1]
    for size in (len(content) - 10, header_length(path), header_length(path) - 10, 8, 0):
        path.unlink()
        path.write_bytes(content[:size])
        with pytest.raises(CorruptTensorError, match=str(path)):
            cache.read(last)
    path.unlink()
    with pytest.raises(CorruptTensorError, match=str(path)):
        cache.read(last)


def test_files_of_others_are_left_out_and_left_alone(tmp_path, caplog):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    (tmp_path / "notes.txt").write_text("notes")
    cache = write(tmp_path, [0])
    assert len(cache) == 1
    assert_holds(cache, [0])
    assert "model.safetensors is no shard of this cache" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "text.safetensors", "notes.txt"}


# --- keys and settings -----------------------------------------------------------------------------------------------


ENCODERS = Encoders(
    vae="v" * 64,
    text_encoder="t" * 64,
    vae_dtype="fp32",
    vae_tiling=False,
    text_dtype="bf16",
    max_sequence_length=512,
)
DATA = DataConfig(
    dataset_base_path="videos", metadata_path="rows.csv", num_frames=17, height=32, width=48, frame_sampling="head"
)
SHAPE = ClipShape(17, 32, 48)


def cached_data(folder, data=DATA, encoders=ENCODERS, dtype="bf16"):
    return CachedData(folder, data, encoders, dtype)


LATENT_CHANGES = {
    "content": lambda folder: cached_data(folder).latent_key("b", SHAPE),
    "num_frames": lambda folder: cached_data(folder).latent_key("a", SHAPE._replace(num_frames=21)),
    "height": lambda folder: cached_data(folder).latent_key("a", SHAPE._replace(height=48)),
    "width": lambda folder: cached_data(folder).latent_key("a", SHAPE._replace(width=32)),
    "frame_sampling": lambda folder: cached_data(folder, replace(DATA, frame_sampling="uniform")).latent_key(
        "a", SHAPE
    ),
    "frame_rate": lambda folder: cached_data(folder, replace(DATA, frame_rate=8.0)).latent_key("a", SHAPE),
    "vae": lambda folder: cached_data(folder, encoders=replace(ENCODERS, vae="w" * 64)).latent_key("a", SHAPE),
    "vae_dtype": lambda folder: cached_data(folder, encoders=replace(ENCODERS, vae_dtype="bf16")).latent_key(
        "a", SHAPE
    ),
    "vae_tiling": lambda folder: cached_data(folder, encoders=replace(ENCODERS, vae_tiling=True)).latent_key(
        "a", SHAPE
    ),
    "dtype": lambda folder: cached_data(folder, dtype="fp16").latent_key("a", SHAPE),
}


def test_the_key_of_latents_changes_with_all_that_shapes_them(tmp_path):
    keys = {name: change(tmp_path) for name, change in LATENT_CHANGES.items()}
    keys["none"] = cached_data(tmp_path).latent_key("a", SHAPE)
    assert len(set(keys.values())) == len(keys)


def test_the_key_of_latents_stays_with_what_does_not_shape_them(tmp_path):
    same = [
        cached_data(tmp_path, replace(DATA, dataset_base_path="elsewhere", metadata_path="other.csv")),
        cached_data(tmp_path, replace(DATA, short_clips="pad", max_bad_samples=0, caption_column=("caption",))),
        cached_data(tmp_path, encoders=replace(ENCODERS, text_encoder="u" * 64, max_sequence_length=64)),
    ]
    expected = cached_data(tmp_path).latent_key("a", SHAPE)
    assert {cached.latent_key("a", SHAPE) for cached in same} == {expected}
    uniform = [cached_data(tmp_path, replace(DATA, frame_sampling="uniform", frame_rate=rate)) for rate in (8.0, 16.0)]
    assert len({cached.latent_key("a", SHAPE) for cached in uniform}) == 1  # uniform sampling knows no rate


def test_the_key_of_a_prompt_changes_with_the_prompt_and_what_embeds_it(tmp_path):
    changed = [
        cached_data(tmp_path, encoders=replace(ENCODERS, **change)).prompt_key("a bird")
        for change in ({}, {"text_encoder": "u" * 64}, {"text_dtype": "fp32"}, {"max_sequence_length": 64})
    ]
    changed += [cached_data(tmp_path).prompt_key(prompt) for prompt in ("a bird ", "A bird", "")]
    assert len(set(changed)) == len(changed)
    other_vae = cached_data(tmp_path, encoders=replace(ENCODERS, vae="w" * 64), dtype="fp16")
    assert other_vae.prompt_key("a bird") == changed[0]


def test_a_key_does_not_depend_on_the_order_of_settings():
    assert settings_key({"a": 1, "b": 2}, "c") == settings_key({"b": 2, "a": 1}, "c")
    assert settings_key({"a": 1}, "b", "c") != settings_key({"a": 1}, "bc")


def test_differences_from_the_most_similar_settings_are_named():
    others = [{"num_frames": 81, "height": 480, "vae": "a"}, {"num_frames": 17, "height": 480, "vae": "b"}]
    wanted = {"num_frames": 17, "height": 512, "vae": "b"}
    assert describe_differences(wanted, others) == "height is 480 in the cache, 512 in this run"
    named = describe_differences({**wanted, "frame_rate": 8.0}, others)
    assert "frame_rate is not set in the cache, 8.0 in this run" in named
    assert describe_differences(wanted, []) == ""


# --- files -----------------------------------------------------------------------------------------------------------


def facts_of(path, manifest):
    known = manifest.find(path)
    return known and known.content


def test_a_file_is_known_as_long_as_its_size_and_time_stay(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")
    manifest = FileManifest(tmp_path / "cache")
    content = manifest.content(path)
    assert content == hash_content(path)
    manifest.save()

    manifest = FileManifest(tmp_path / "cache")
    assert facts_of(path, manifest) == content
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert facts_of(path, manifest) == content  # as git does: neither size nor time say that it has changed
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert facts_of(path, manifest) is None
    assert manifest.content(path) != content
    path.write_bytes(b"three")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert facts_of(path, manifest) is None


def test_blobs_of_the_hub_are_not_read_to_know_their_content(tmp_path):
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert FileManifest(tmp_path).content(tmp_path / "model.safetensors") == "ab" * 32


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")
    manifest = FileManifest(tmp_path)
    content = manifest.content(path)
    manifest.save()
    path.write_bytes(b"other")
    manifest.content(path)

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with contextlib.suppress(OSError):
        manifest.save()
    assert {facts.content for facts in FileManifest(tmp_path).by_path.values()} == {content}
