"""Workers hand over their batches by shared memory: if there is too little it is said, and no wait is endless."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SCRIPT_ENV, run_here
from torch.utils.data import DataLoader

import causal_wan.data.clips
from causal_wan.data import shared_memory
from causal_wan.data.clips import VideoDataset
from causal_wan.data.samples import collate
from causal_wan.data.settings import DataConfig
from causal_wan.data.shared_memory import MIB, SharedMemory, check_shared_memory
from causal_wan.data.workers import name_clips_of_dead_workers
from causal_wan.runs.data import load_run_data
from causal_wan.runs.training_data import LoaderSettings, make_loader


TRAINING, PRECOMPUTING = "train_video_regression.py", "precompute_latents.py"
CLIP_BYTES = 3 * 17 * 32 * 48


# --- before anything is loaded ---------------------------------------------------------------------------------------


def check(*free, num_workers=2, pin_memory=True, batch_bytes=100 * MIB):
    """Of processes on one machine each, or on those that are named."""
    seen = [SharedMemory("here", each) if not isinstance(each, tuple) else SharedMemory(*each) for each in free]
    return check_shared_memory(seen, batch_bytes=batch_bytes, num_workers=num_workers, pin_memory=pin_memory)


def test_room_for_all_that_is_decoded_ahead_is_enough():
    assert check(400 * MIB) is None
    assert check(800 * MIB, 800 * MIB) is None
    assert check(("one", 400 * MIB), ("other", 400 * MIB)) is None
    assert check(500 * MIB, pin_memory=False) is None


def test_no_limit_and_no_workers_need_no_room():
    assert check(None) is None
    assert check(0, num_workers=0) is None


def test_less_is_a_warning_with_what_to_do():
    for warning in (check(399 * MIB), check(700 * MIB, 700 * MIB), check(499 * MIB, pin_memory=False)):
        assert "room for the 4 batches of 100.0 MiB" in warning
        assert "--shm-size=1g or --ipc=host" in warning
        assert "--dataloader_num_workers 0" in warning


def test_no_room_for_one_batch_of_each_process_is_refused():
    with pytest.raises(
        ValueError, match=r"room for 1 batch\(es\) of 100.0 MiB for each of 1 .* 64.0 MiB free; in Doc"
    ):
        check(64 * MIB)
    with pytest.raises(ValueError, match=r"each of 2 process\(es\), but here has 199.0 MiB"):
        check(199 * MIB, 199 * MIB)
    with pytest.raises(ValueError, match="room for 2 batch"):
        check(199 * MIB, pin_memory=False)
    with pytest.raises(ValueError, match=r"but other has 1\.0 MiB"):  # all processes refuse what one machine lacks
        check(("one", 400 * MIB), ("other", MIB))


@pytest.mark.parametrize("script", [TRAINING, PRECOMPUTING])
def test_a_run_that_cannot_work_is_refused_before_weights_are_loaded(
    write_recipe, tmp_path, monkeypatch, capsys, script
):
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: CLIP_BYTES)
    for name in ("causal_wan.runs.prompt_embeddings.load_text_encoder", "precompute_latents.load_text_encoder"):
        monkeypatch.setattr(name, lambda *arguments, **options: pytest.fail("loaded"))
    path, _ = write_recipe(dataloader_num_workers=1)
    with pytest.raises(SystemExit) as exit_info:
        run_here(script, "--config", path, *(["--latents_dir", tmp_path] if script == PRECOMPUTING else []))
    assert exit_info.value.code == 2
    assert "error: shared memory, /dev/shm, must have room for 2 batch(es)" in capsys.readouterr().err


def test_latents_of_a_cache_take_the_room_that_they_take(write_recipe, tmp_path, monkeypatch, capsys):
    path, _ = write_recipe(dataloader_num_workers=1, max_train_steps=1, validation_metadata_path=None)
    run_here(PRECOMPUTING, "--config", path, "--latents_dir", tmp_path / "cache")
    latents = 2 * 16 * 5 * 4 * 6 * 2  # of a batch, in bf16
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 3 * latents)
    run_here(TRAINING, "--config", path, "--latents_dir", tmp_path / "cache")
    assert "warning     shared memory" not in capsys.readouterr().out
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 3 * latents - 1)
    path, _ = write_recipe("warned", dataloader_num_workers=1, max_train_steps=1, validation_metadata_path=None)
    run_here(TRAINING, "--config", path, "--latents_dir", tmp_path / "cache")
    assert "warning     shared memory" in capsys.readouterr().out


# --- while it runs ---------------------------------------------------------------------------------------------------


def loader_over(clips, timeout=60.0, num_workers=1):
    """A loader as runs have it, and its data set."""
    config = DataConfig(
        dataset_base_path=str(clips / "videos"),
        metadata_path=str(clips / "train.csv"),
        num_frames=17,
        height=32,
        width=48,
    )
    data = load_run_data(config, validation_metadata_path=None, num_validation_samples=1, cache_dir=None)
    dataset = data.dataset()
    settings = LoaderSettings(
        seed=0,
        samples_per_step=1,
        batch_size=1,
        num_workers=num_workers,
        num_processes=1,
        pin_memory=False,
        timeout=timeout,
    )
    return make_loader(data, dataset, settings, start=0, end=6, step=0), dataset


IN_LITTLE_ROOM = """
import sys
from functools import partial

import torch
from torch.utils.data import DataLoader

from causal_wan.data import shared_memory
from causal_wan.data.settings import DataConfig
from causal_wan.data.workers import name_clips_of_dead_workers, worker_settings
from dataset_utils import SampleStream, VideoDataset, collate, load_rows, order_samples

shared_memory.SECONDS_TO_WAIT = 1.0
base, table = sys.argv[1:]
config = DataConfig(dataset_base_path=base, metadata_path=table, num_frames=17, height=128, width=192)
rows = load_rows(config)
for strategy in torch.multiprocessing.get_all_sharing_strategies():
    torch.multiprocessing.set_sharing_strategy(strategy)
    dataset, order = VideoDataset(rows, config), order_samples(rows, config, seed=0, samples_per_step=1)
    stream = SampleStream(dataset, order, config, start=0, end=6)
    workers = worker_settings(1, 60.0)
    loader = DataLoader(stream, collate_fn=partial(shared_memory.collate_shared, collate), **workers)
    try:
        with name_clips_of_dead_workers(dataset):
            list(loader)
    except RuntimeError as error:
        print("said:", error)
"""


def test_a_full_shared_memory_is_said_at_once_with_the_clip(clips):
    """In a /dev/shm of 1 MiB, for clips of 1.2 MiB."""
    mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"']
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    command = [*mounted, sys.executable, "-c", IN_LITTLE_ROOM, str(clips / "videos"), str(clips / "train.csv")]
    run = subprocess.run(command, cwd=ROOT, env=SCRIPT_ENV, capture_output=True, text=True, timeout=120)
    said = [line for line in run.stdout.splitlines() if line.startswith("said: ")]
    assert len(said) == 2, run.stderr
    for message in said:
        assert "had no shared memory to hand over what it had decoded at row" in message
        assert ".mp4 (DataLoader worker (pid " in message
        assert "has 1.2 MiB to hand over, but /dev/shm has " in message
        assert "in Docker, run with --shm-size=16g or --ipc=host" in message


def test_all_tensors_of_a_batch_are_handed_over_in_shared_memory():
    clips = [torch.zeros(3), torch.zeros(2)]
    known = {"prompt": "", "row_index": 0, "sample_number": 0, "num_valid_frames": 1, "errors": []}
    batch = collate([{**known, "latents": clips[0]}, {**known, "video": clips[1]}])
    shared_memory.share(batch)
    assert [clip.is_shared() for clip in batch.clips] == [True, True]


def test_a_worker_waits_for_room_that_comes(clips, monkeypatch):
    first = time.monotonic()
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 0 if time.monotonic() < first + 1 else None)
    loader, _ = loader_over(clips)
    assert len(list(loader)) == 6


def test_another_error_of_handing_over_reaches_the_training_process(clips, monkeypatch):
    def fail(storage):
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    loader, dataset = loader_over(clips)
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)
    with pytest.raises(RuntimeError, match="Too many open files"), name_clips_of_dead_workers(dataset):
        list(loader)


def test_a_bus_error_is_told_from_a_kill(clips):
    _, dataset = loader_over(clips)
    said = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are"
    with pytest.raises(RuntimeError, match=r"had no shared memory .*--shm-size"), name_clips_of_dead_workers(dataset):
        raise RuntimeError(said)


def hang_at_row_4(monkeypatch):
    load_videos = causal_wan.data.clips.load_videos

    def hang(row, *arguments):
        if row.video.name == "3.mp4" and torch.utils.data.get_worker_info() is not None:
            time.sleep(600)
        return load_videos(row, *arguments)

    monkeypatch.setattr(causal_wan.data.clips, "load_videos", hang)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_decoder_that_hangs_ends_the_wait_and_its_clip_is_named(clips, monkeypatch, num_workers):
    hang_at_row_4(monkeypatch)
    loader, dataset = loader_over(clips, timeout=2.0, num_workers=num_workers)
    message = r"for 2 seconds; they are at row 4, .*/3\.mp4\. If .* raise --dataloader_timeout\."
    with pytest.raises(RuntimeError, match=message), name_clips_of_dead_workers(dataset):
        list(loader)


@pytest.mark.parametrize("script", [TRAINING, PRECOMPUTING])
def test_a_run_whose_decoder_hangs_ends_and_names_the_clip(write_recipe, tmp_path, monkeypatch, script):
    hang_at_row_4(monkeypatch)
    path, _ = write_recipe(dataloader_num_workers=1, decode_timeout=1.0, dataloader_timeout=2.0, max_train_steps=6)
    with pytest.raises(RuntimeError, match=r"for 2 seconds; they are at row 4, "):
        run_here(script, "--config", path, *(["--latents_dir", tmp_path] if script == PRECOMPUTING else []))


def test_waiting_for_clips_is_given_up_later_than_decoding_one(write_recipe, capsys):
    path, _ = write_recipe(dataloader_timeout=300.0)
    with pytest.raises(SystemExit):
        run_here(TRAINING, "--config", path, "--dry_run")
    assert "dataloader_timeout must be above decode_timeout" in " ".join(capsys.readouterr().err.split())


def test_without_workers_there_is_nothing_to_wait_for(clips):
    loader, _ = loader_over(clips, num_workers=0)
    assert isinstance(loader, DataLoader)
    assert len(list(loader)) == 6
    assert isinstance(loader.dataset.dataset, VideoDataset)
