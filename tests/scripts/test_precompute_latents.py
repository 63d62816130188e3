"""precompute_latents.py and training from what it makes."""

import csv
import os
import shutil
import signal

import pytest
import torch
import yaml
from conftest import flip_last_bit, launch, run_here, write_clip
from run_outputs import metrics, weights

import precompute_latents
from causal_wan.cache import opening
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.config.parsing import parse_config
from causal_wan.data.clips import VideoDataset, normalize_videos
from causal_wan.data.file_manifest import FileManifest
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.model.text import encode_prompts
from causal_wan.model.vae import encode_videos
from causal_wan.runs import inputs as method_inputs
from causal_wan.weights.parts import load_text_encoder, load_vae


SCRIPT = "precompute_latents.py"
TRAINING = "train_video_regression.py"


@pytest.fixture
def own_clips(clips, tmp_path):
    """Clips that a test may change, and the settings that name them."""
    folder = tmp_path / "own"
    shutil.copytree(clips, folder)
    return folder, {
        "dataset_base_path": str(folder / "videos"),
        "metadata_path": str(folder / "train.csv"),
        "validation_metadata_path": str(folder / "heldout.csv"),
    }


def entries(folder):
    """Everything in a cache, by key."""
    return {
        kind: {key: cache.read(key)[0].clone() for key in cache.in_order()}
        for kind, cache in (("latents", TensorCache(folder / "latents")), ("prompts", TensorCache(folder / "prompts")))
    }


def said(capsys):
    captured = capsys.readouterr()
    return captured.out + captured.err


def add_row(folder, name, prompt):
    with (folder / "train.csv").open("a", newline="") as file:
        csv.writer(file).writerow([name, prompt])


def test_a_second_run_does_nothing_and_changes_redo_just_what_they_touch(
    own_clips, write_recipe, tmp_path, capsys, monkeypatch
):
    folder, data = own_clips
    path, _ = write_recipe(**data)
    cache = tmp_path / "cache"
    command = [SCRIPT, "--config", path, "--latents_dir", cache]
    run_here(*command)
    assert "missing     8 clips of 17 x 32 x 48, 9 prompts" in said(capsys)  # 6 + 2 held out, and the empty prompt
    first = entries(cache)
    assert (len(first["latents"]), len(first["prompts"])) == (8, 9)
    assert {tensor.dtype for tensor in first["latents"].values()} == {torch.bfloat16}
    assert {tuple(tensor.shape) for tensor in first["latents"].values()} == {(16, 5, 4, 6)}

    with monkeypatch.context() as patch:
        for name in ("load_text_encoder", "load_vae"):
            patch.delattr(precompute_latents, name)  # nothing is loaded
        run_here(*command)
    assert "missing     0 clips, 0 prompts" in said(capsys)

    os.utime(folder / "videos" / "0.mp4")  # touched, not changed
    write_clip(folder / "videos" / "1.mp4", seed=100)
    write_clip(folder / "videos" / "new.mp4", seed=101)
    add_row(folder, "new.mp4", "a new ball")
    run_here(*command)
    assert "missing     2 clips of 17 x 32 x 48, 1 prompts" in said(capsys)
    assert entries(cache)["latents"].keys() > first["latents"].keys()

    run_here(*command, "--height", 48)
    assert "missing     9 clips of 17 x 48 x 48, 0 prompts" in said(capsys)
    shutil.copy(folder / "videos" / "0.mp4", folder / "videos" / "copy.mp4")
    add_row(folder, "copy.mp4", "a new ball")
    run_here(*command, "--dry_run")
    assert "missing     0 clips, 0 prompts" in said(capsys)


def test_two_processes_make_the_same_entries_as_one(write_recipe, tmp_path):
    path, _ = write_recipe(frame_buckets=[9, 17], resolution_buckets=["32x48", "32x32"])
    run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "one")
    result = launch(SCRIPT, path, "--latents_dir", tmp_path / "two", num_processes=2)
    assert "8 clips and 9 prompts encoded" in result.stdout
    one, two = entries(tmp_path / "one"), entries(tmp_path / "two")
    for kind in one:
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(two[kind][key], tensor) for key, tensor in one[kind].items())
    assert len(TensorCache(tmp_path / "two" / "latents").shards) >= 2


def test_damaged_entries_are_found_and_made_anew(write_recipe, tmp_path, capsys, caplog):
    path, _ = write_recipe()
    cache = tmp_path / "cache"
    command = [SCRIPT, "--config", path, "--latents_dir", cache]
    run_here(*command)
    whole = entries(cache)
    (shard,) = (cache / "latents").glob("*.safetensors")
    flip_last_bit(shard)
    run_here(*command, "--verify")
    output = said(capsys)
    assert f"1 of 8 entries of {cache / 'latents'} are damaged" in output
    assert "missing     1 clips" in output
    assert all(torch.equal(entries(cache)["latents"][key], tensor) for key, tensor in whole["latents"].items())
    (cache / "latents" / shard.name).write_bytes(b"cut")
    run_here(*command)  # a shard that cannot be read needs no looking for
    assert f"{shard.name} is damaged and left out" in caplog.text
    assert entries(cache)["latents"].keys() == whole["latents"].keys()


def test_a_clip_that_breaks_is_named_and_the_others_are_kept(own_clips, write_recipe, tmp_path, capsys):
    folder, data = own_clips
    path, _ = write_recipe(**data)
    content = bytearray((folder / "videos" / "2.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    end = content.index(b"moov") - 4 if content.index(b"moov") > start else len(content)
    last = end - (end - start) // 8  # the first frames decode: it passes the check of rows
    content[last:end] = bytes(end - last)
    (folder / "videos" / "2.mp4").write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "cache")
    assert exit_info.value.code == 1
    assert "left out: row 3, " in said(capsys)
    assert len(entries(tmp_path / "cache")["latents"]) == 7
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "cache", "--max_bad_samples", 0)


def test_a_plan_that_does_not_fit_the_disk_is_refused(write_recipe, tmp_path, capsys, monkeypatch):
    path, _ = write_recipe()
    monkeypatch.setattr("causal_wan.cache.tensor_cache.free_bytes", lambda folder: 1000)
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "cache")
    assert "latents_dir must have room for" in said(capsys)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frame_sampling", "random"], "--frame_sampling random makes each another"),
        (["--encode_batch_size", "0"], "encode_batch_size must be 1 or more"),
        (["--latents_dtype", "int8"], "invalid choice"),
    ],
)
def test_settings_that_cannot_work_are_refused(write_recipe, tmp_path, capsys, flags, message):
    path, _ = write_recipe()
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "cache", *flags)
    assert exit_info.value.code == 2
    assert message in " ".join(said(capsys).replace("│", " ").split())


# --- training from it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(recipe, tmp_path_factory):
    """The cache of the recipe of the tests."""
    import yaml

    folder = tmp_path_factory.mktemp("filled")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": "unused"}))
    run_here(SCRIPT, "--config", folder / "recipe.yaml", "--latents_dir", folder / "cache")
    return folder / "cache"


def losses(output_dir):
    return [entry["generator_loss"] for entry in metrics(output_dir) if "generator_loss" in entry]


def test_training_from_a_cache_loads_no_encoder_and_needs_no_videos(write_recipe, filled, monkeypatch, capsys, clips):
    path, plain = write_recipe("plain")
    run_here(TRAINING, "--config", path)
    moved = clips / "elsewhere"
    (clips / "videos").rename(moved)
    try:
        monkeypatch.delattr("causal_wan.runs.parts.load_vae")
        monkeypatch.delattr("causal_wan.runs.prompt_embeddings.load_text_encoder")
        nothing = {"validation_metadata_path": None}
        path, cached = write_recipe("cached", latents_dir=str(filled), dataloader_num_workers=2, **nothing)
        run_here(TRAINING, "--config", path)
    finally:
        moved.rename(clips / "videos")
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-2)
    assert losses(cached) != losses(plain)  # rounded to bf16


def test_a_cache_that_may_only_be_read_serves_files_that_were_moved(own_clips, write_recipe, filled, monkeypatch):
    _, data = own_clips  # copies: other paths and times, the same contents

    def refuse(manifest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileManifest, "save", refuse)
    path, output_dir = write_recipe(latents_dir=str(filled), max_train_steps=1, **data)
    run_here(TRAINING, "--config", path)
    assert (output_dir / "transformer").is_dir()


def test_a_damaged_manifest_is_made_anew(write_recipe, tmp_path, caplog):
    path, _ = write_recipe()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "files.parquet").write_bytes(b"cut")
    run_here(SCRIPT, "--config", path, "--latents_dir", tmp_path / "cache")
    assert "files.parquet is damaged, so files are read anew" in caplog.text
    assert len(FileManifest(tmp_path / "cache").by_name) >= 8


def test_filling_reading_and_resuming_give_the_same_numbers(write_recipe, filled, capsys):
    path, reading = write_recipe("reading", latents_dir=str(filled), max_train_steps=6)
    run_here(TRAINING, "--config", path)
    path, filling = write_recipe("filling", cache_latents=True, max_train_steps=6)
    run_here(TRAINING, "--config", path)
    assert all(torch.equal(weight, weights(reading)[name]) for name, weight in weights(filling).items())
    # As a kill after step 2, in the first epoch, would leave it.
    path, resumed = write_recipe(
        "resumed", cache_latents=True, max_train_steps=6, resume_from_checkpoint="latest", latents_dir=str(filled)
    )
    resumed.mkdir()
    shutil.copytree(filling / "checkpoint-2", resumed / "checkpoint-2")
    run_here(TRAINING, "--config", path)
    assert all(torch.equal(weight, weights(reading)[name]) for name, weight in weights(resumed).items())


def test_clips_are_encoded_in_the_first_epoch_alone(write_recipe, monkeypatch):
    encoded, encode = [], method_inputs.encode_videos

    def count(vae, videos):
        encoded.append(len(videos))
        return encode(vae, videos)

    monkeypatch.setattr(method_inputs, "encode_videos", count)
    monkeypatch.setattr("causal_wan.cache.tensor_cache.EAGER_SECONDS", 0.0)
    path, output_dir = write_recipe(cache_latents=True, max_train_steps=12)  # four epochs
    run_here(TRAINING, "--config", path)
    assert 8 <= sum(encoded) <= 12  # 6, 2 held out, and those that came again before their shard was written
    assert len(entries(output_dir / "cache")["latents"]) == 8
    assert len(FileManifest(output_dir / "cache").by_path) >= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 48}, "lacks 8 of 8 clips and 0 of 8 prompts (height is 32 in the cache, 48 in this run)"),
        ({"latents_dtype": "fp16"}, "dtype is bfloat16 in the cache, float16 in this run"),
        ({"vae_dtype": "bf16"}, "vae_dtype is fp32 in the cache, bf16 in this run"),
        ({"frame_sampling": "head"}, "frame_sampling is uniform in the cache, head in this run"),
        ({"max_sequence_length": 64}, "max_sequence_length is 512 in the cache, 64 in this run"),
        ({"mixed_precision": "bf16"}, "text_dtype is fp32 in the cache, bf16 in this run"),
    ],
)
def test_a_cache_of_other_settings_is_refused_with_the_difference(write_recipe, filled, capsys, changes, message):
    path, output_dir = write_recipe(latents_dir=str(filled), **changes)
    with pytest.raises(SystemExit):
        run_here(TRAINING, "--config", path)
    assert message in said(capsys)
    assert not (output_dir / "transformer").exists()


def test_changed_and_new_clips_are_named(own_clips, write_recipe, filled, capsys):
    folder, data = own_clips
    write_clip(folder / "videos" / "1.mp4", seed=100)
    path, _ = write_recipe(latents_dir=str(filled), **data)
    with pytest.raises(SystemExit):
        run_here(TRAINING, "--config", path)
    output = said(capsys)
    assert "lacks 1 of 8 clips and 0 of 8 prompts (new or changed: row 2, " in output
    assert "1.mp4). Run precompute_latents.py with the same settings" in output


def test_another_checkpoint_is_refused(write_recipe, filled, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other" / "vae" / "config.json").write_text(
        (checkpoint / "vae" / "config.json").read_text().replace("}", " }")
    )
    path, _ = write_recipe(latents_dir=str(filled), pretrained_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(SystemExit):
        run_here(TRAINING, "--config", path)
    assert "vae is " in said(capsys)


# --- what is done, and what is not -----------------------------------------------------------------------------------


NUM_CLIPS, NUM_PROMPTS = 8, 9  # 6 rows to train on, 2 held out; and the empty prompt


class Work:
    """What a run of the script loads and encodes."""

    def __init__(self):
        self.loaded, self.shapes, self.prompts = [], [], []

    @property
    def nothing(self):
        return not (self.loaded or self.shapes or self.prompts)


@pytest.fixture
def run(write_recipe, tmp_path, monkeypatch):
    """Runs the script on the recipe with changes, calls `interrupt` before clip number `after`; returns its work."""

    def run(latents_dir=tmp_path / "latents", after=None, interrupt=None, **changes):
        work = Work()

        def note(patch, name, action):
            original = getattr(precompute_latents, name)

            def noted(*arguments, **options):
                action(*arguments)
                return original(*arguments, **options)

            patch.setattr(precompute_latents, name, noted)

        def encode(vae, videos):
            work.shapes += [tuple(video.shape[1:]) for video in videos]
            if after is not None and len(work.shapes) >= after:
                interrupt()

        path, _ = write_recipe(**changes)
        with monkeypatch.context() as patch:
            note(patch, "load_vae", lambda *arguments: work.loaded.append("vae"))
            note(patch, "load_text_encoder", lambda *arguments: work.loaded.append("text_encoder"))
            note(patch, "encode_videos", encode)
            note(patch, "encode_prompts", lambda tokenizer, encoder, prompts, *rest: work.prompts.extend(prompts))
            run_here(SCRIPT, "--config", path, "--latents_dir", latents_dir)
        return work

    return run


@pytest.fixture(scope="module")
def encoded(recipe, tmp_path_factory):
    """A folder that the script has filled with the recipe's clips and prompts."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_here(SCRIPT, "--config", folder / "recipe.yaml", "--latents_dir", folder / "latents")
    return folder / "latents"


@pytest.fixture
def latents(encoded, tmp_path):
    """A copy of `encoded` that may be changed."""
    return shutil.copytree(encoded, tmp_path / "latents")


def assert_same(folder, other):
    ours, theirs = entries(folder), entries(other)
    for kind, tensors in ours.items():
        assert tensors.keys() == theirs[kind].keys()
        assert all(torch.equal(theirs[kind][key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_latents_and_embeddings_are_those_that_training_computes(run, recipe, checkpoint, tmp_path, dtype):
    run(latents_dtype=dtype)
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    vae = load_vae(str(checkpoint))
    cached = entries(tmp_path / "latents")
    found = cached["latents"].values()
    assert len(found) == NUM_CLIPS
    prompts = [""]
    for name in ("metadata_path", "validation_metadata_path"):
        sizes = {size: recipe[size] for size in ("dataset_base_path", "num_frames", "height", "width")}
        config = DataConfig(metadata_path=recipe[name], **sizes)
        videos = VideoDataset(load_rows(config), config)
        for index, row in enumerate(videos.rows):
            video = videos.load(index, torch.Generator(), config.shape)["video"]
            expected = encode_videos(vae, normalize_videos(video[None]))[0].to(torch_dtype)
            assert sum(torch.equal(expected, latent) for latent in found) == 1
            prompts += row.prompts

    embeds = encode_prompts(*load_text_encoder(str(checkpoint)), prompts)
    found = cached["prompts"].values()
    assert len(found) == len(prompts) == NUM_PROMPTS
    for expected in embeds:
        assert sum(torch.equal(expected, embed) for embed in found) == 1
    assert len({embed.shape[0] for embed in embeds}) > 1  # their own lengths


def test_prompts_that_are_cut_are_said(run, caplog):
    run(max_sequence_length=3)
    assert "8 of 9 prompt(s) are cut at max_sequence_length=3 tokens" in caplog.text


def test_batches_of_clips_change_no_more_than_rounding(run, tmp_path):
    run(latents_dtype="fp32", latents_dir=tmp_path / "one")
    run(latents_dtype="fp32", latents_dir=tmp_path / "three", encode_batch_size=3)
    one, three = entries(tmp_path / "one")["latents"], entries(tmp_path / "three")["latents"]
    assert one.keys() == three.keys()
    for key, expected in one.items():
        torch.testing.assert_close(three[key], expected, rtol=0, atol=1e-5)


def test_every_shape_of_a_schedule_and_of_buckets_is_made(run, tmp_path):
    work = run(frames_schedule="0:5,2:17", validation_metadata_path=None)
    assert sorted(work.shapes) == [(5, 32, 48)] * 6 + [(17, 32, 48)] * 6
    work = run(resolution_buckets=["32x48", "48x32"], encode_batch_size=4)
    assert work.shapes == [(17, 32, 48)] * 2  # the rest is there: those held out
    shapes = {tuple(latents.shape[1:]) for latents in entries(tmp_path / "latents")["latents"].values()}
    assert shapes == {(2, 4, 6), (5, 4, 6)}


def test_files_that_are_known_are_not_read_again(run, latents, monkeypatch):
    def read(video):
        raise AssertionError(f"{video} was read")

    monkeypatch.setattr(opening, "hash_content", read)
    assert run().nothing


def test_data_that_moved_and_files_that_were_touched_are_no_work(run, latents, own_clips):
    folder, data = own_clips
    for path in (folder / "videos").iterdir():
        os.utime(path)
    assert run(**data).nothing


@pytest.mark.parametrize(
    ("changes", "num_clips", "num_prompts"),
    [
        ({"num_frames": 5}, NUM_CLIPS, 0),
        ({"height": 48}, NUM_CLIPS, 0),
        ({"frame_sampling": "head"}, NUM_CLIPS, 0),
        ({"vae_dtype": "bf16"}, NUM_CLIPS, 0),
        ({"latents_dtype": "fp16"}, NUM_CLIPS, 0),
        ({"max_sequence_length": 64}, 0, NUM_PROMPTS),
        ({"validation_prompts": ["one more"]}, 0, 1),
        ({"num_validation_samples": 1}, 0, 0),
        ({"learning_rate": 0.5, "num_frame_per_block": 5, "lora_rank": 4, "seed": 7}, 0, 0),
        ({"encode_batch_size": 3, "dataloader_num_workers": 1}, 0, 0),
    ],
    ids=str,
)
def test_a_changed_setting_redoes_what_it_shapes(run, latents, changes, num_clips, num_prompts):
    work = run(**changes)
    assert (len(work.shapes), len(work.prompts)) == (num_clips, num_prompts)
    assert run(**changes).nothing
    assert run().nothing  # what was there stays


def test_another_vae_redoes_the_latents_alone(run, latents, checkpoint, tmp_path):
    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert run(pretrained_model_name_or_path=str(other)).nothing  # a copy is the same
    vae = load_vae(str(other))
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    vae.save_pretrained(other / "vae")
    work = run(pretrained_model_name_or_path=str(other))
    assert (len(work.shapes), work.prompts) == (NUM_CLIPS, [])


def test_what_was_encoded_before_an_error_is_kept(run, encoded, tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(after=4, interrupt=fail)
    work = run()
    assert (len(work.shapes), work.prompts) == (NUM_CLIPS - 3, [])
    assert_same(tmp_path / "latents", encoded)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_with_status_75_and_the_same_command_goes_on(run, encoded, tmp_path, number, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(after=2, interrupt=lambda: os.kill(os.getpid(), number))
    assert stopped.value.code == 75
    assert f"what is encoded so far is kept in {tmp_path / 'latents'}" in capsys.readouterr().out
    work = run()
    assert 0 < len(work.shapes) < NUM_CLIPS
    assert work.prompts == []
    assert_same(tmp_path / "latents", encoded)


def test_the_disk_that_is_announced_is_that_which_is_taken(encoded, write_recipe):
    path, _ = write_recipe()
    arguments = ["--config", str(path), "--latents_dir", str(encoded)]
    known = precompute_latents.TRAINING_SETTINGS
    config = parse_config(precompute_latents.Config, arguments, also_known=known)
    announced = precompute_latents.needed_bytes(config, [(0, ClipShape(17, 32, 48))] * NUM_CLIPS, [])
    assert announced == sum(tensor.nbytes for tensor in entries(encoded)["latents"].values())
