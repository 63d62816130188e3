import multiprocessing
import os
import pickle
import random
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

from causal_wan.tensor_cache import (
    CacheWriter,
    CorruptTensorError,
    TensorCache,
    describe_differences,
    remove_stale_shards,
    settings_key,
)


SETTINGS = {"num_frames": 17, "dtype": "bfloat16"}


def key(number):
    return settings_key(SETTINGS, str(number))


def tensor(number, dtype=torch.bfloat16):
    return torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(number)).to(dtype)


def write(folder, numbers, **settings):
    with CacheWriter(folder, **settings) as writer:
        for number in numbers:
            writer.add(key(number), tensor(number), SETTINGS, num_valid_frames=number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_read_is_what_was_written_to_the_last_bit(tmp_path, dtype):
    with CacheWriter(tmp_path) as writer:
        writer.add(key(1), tensor(1, dtype).movedim(0, 1), SETTINGS, num_valid_frames=9)
    read, facts = TensorCache(tmp_path).read(key(1))
    assert read.dtype == dtype
    assert torch.equal(read, tensor(1, dtype).movedim(0, 1))
    assert facts == {"num_valid_frames": 9}


def test_shards_are_written_when_they_are_full_and_read_front_to_back(tmp_path):
    write(tmp_path, range(20), shard_bytes=5 * tensor(0).nbytes)
    cache = TensorCache(tmp_path)
    assert (len(cache), len(cache.shards)) == (20, 4)
    order = list(cache.in_order())
    assert sorted(order) == sorted(map(key, range(20)))
    shards = [cache._entries[name] for name in order]
    assert shards == sorted(shards)
    for number in range(20):
        assert torch.equal(cache.read(key(number))[0], tensor(number))


def test_an_exception_writes_what_was_collected(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), CacheWriter(tmp_path) as writer:
        writer.add(key(1), tensor(1), SETTINGS)
        raise RuntimeError("out of memory")
    assert key(1) in TensorCache(tmp_path)


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


def test_processes_write_side_by_side(tmp_path):
    ranges = [range(start, start + 50) for start in (0, 40, 80)]  # they overlap
    processes = [multiprocessing.Process(target=write, args=(tmp_path, numbers)) for numbers in ranges]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    cache = TensorCache(tmp_path)
    assert len(cache) == 130
    assert all(torch.equal(cache.read(key(number))[0], tensor(number)) for number in range(130))


def write_for_ever(folder):
    for number in range(10**6):
        write(folder, range(10 * number, 10 * number + 10))


def test_a_kill_at_any_moment_leaves_whole_shards_alone(tmp_path):
    rng = random.Random(0)
    for _ in range(5):
        process = multiprocessing.Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.1 + rng.random() / 5)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    cache = TensorCache(tmp_path)
    assert len(cache) > 0
    assert list(cache.corrupt_keys()) == []
    for partial in tmp_path.glob(".*"):
        os.utime(partial, (0, 0))
    remove_stale_shards(tmp_path)
    assert list(tmp_path.glob(".*")) == []


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_the_others_kept(tmp_path):
    write(tmp_path, range(4))
    cache = TensorCache(tmp_path)
    flip_bit(cache.shards[0], -1)  # of the last tensor
    (damaged,) = cache.corrupt_keys()
    with pytest.raises(CorruptTensorError, match=r"is damaged .* precompute_latents.py --verify makes it anew"):
        cache.read(damaged)
    cache.drop([damaged])
    again = TensorCache(tmp_path)
    assert damaged not in again
    assert len(again) == 3
    assert list(again.corrupt_keys()) == []


def test_truncated_and_foreign_files_are_reported_and_left_out(tmp_path, caplog):
    write(tmp_path, range(3))
    (whole,) = tmp_path.glob("*.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    (tmp_path / "text.safetensors").write_text("not a shard")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    cache = TensorCache(tmp_path)
    assert len(cache) == 3
    for name in ("cut", "text", "model"):
        assert f"{name}.safetensors" in caplog.text


def test_of_two_entries_with_a_key_the_last_counts(tmp_path):
    write(tmp_path, [1])
    (damaged,) = tmp_path.glob("*.safetensors")
    flip_bit(damaged, -1)
    os.utime(damaged, (0, 0))
    write(tmp_path, [1])
    assert torch.equal(TensorCache(tmp_path).read(key(1))[0], tensor(1))


def test_new_shards_of_others_are_found(tmp_path):
    reader = TensorCache(tmp_path / "later")
    assert len(reader) == 0
    write(tmp_path / "later", [1])
    assert key(1) not in reader
    reader.refresh()
    assert torch.equal(reader.read(key(1))[0], tensor(1))


class Entries:
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return 12

    def __getitem__(self, item):
        return self.cache.read(key(item))[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_read(tmp_path, context):
    write(tmp_path, range(12))
    entries = Entries(TensorCache(tmp_path))
    assert len(pickle.loads(pickle.dumps(entries.cache))) == 12
    loader = DataLoader(entries, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert all(torch.equal(read, tensor(number)) for number, read in enumerate(loader))


def test_every_setting_and_part_makes_another_key():
    keys = {settings_key(SETTINGS, "a"), settings_key(SETTINGS, "b"), settings_key({**SETTINGS, "num_frames": 9}, "a")}
    assert len(keys) == 3
    assert settings_key(dict(reversed(SETTINGS.items())), "a") in keys


def test_differences_are_those_to_the_most_similar_settings():
    others = [{"height": 480, "width": 832, "vae": "x"}, {"height": 240, "width": 416, "vae": "y"}]
    text = describe_differences({"height": 512, "width": 832, "vae": "x"}, others)
    assert text == "height is 480 in the cache, 512 in this run"
    assert describe_differences({}, []) == ""


def test_a_full_disk_is_an_error_that_says_so(tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causal_wan.tensor_cache.save_file", full)
    with pytest.raises(OSError, match="No space left"), CacheWriter(tmp_path) as writer:
        writer.add(key(1), tensor(1), SETTINGS)
    assert list(tmp_path.iterdir()) == []
