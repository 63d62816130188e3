"""Control videos, from tables and streams to students, and from students to videos."""

import contextlib
import csv
import importlib.util
import io
import json
import shutil
import tarfile
from dataclasses import replace

import av
import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from conftest import launch, run_here, write_clip
from diffusers import WanPipeline, WanTransformer3DModel
from run_outputs import NEEDS_DEEPSPEED, metrics, weights
from safetensors.torch import load_file
from torch.testing import assert_close

from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.data.buckets import choose_bucket
from causal_wan.data.clips import VideoDataset, load_videos, normalize_videos
from causal_wan.data.rows import load_rows
from causal_wan.data.settings import ClipShape, DataConfig
from causal_wan.model.vae import encode_videos
from causal_wan.results.run_record import find_run
from causal_wan.sampling.controls import as_pixels
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.streams.clips import StreamDecoder
from causal_wan.streams.sources import open_stream
from causal_wan.tables.sources import Source
from causal_wan.weights.parts import load_vae


SCRIPT = "train_video_regression.py"


def write_table(folder, name, numbers, prompt="a ball"):
    """Rows whose controls are the clip itself, and another one."""
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt", "copy", "other"])
        for number in numbers:
            writer.writerow([f"{number}.mp4", prompt, f"copy/{number}.mp4", f"{(number + 1) % 8}.mp4"])


@pytest.fixture(scope="module")
def controlled(clips, tmp_path_factory):
    """The clips with tables that have controls, `copy` and `other`."""
    folder = tmp_path_factory.mktemp("controlled")
    shutil.copytree(clips / "videos", folder / "videos")
    shutil.copytree(clips / "videos", folder / "videos" / "copy")
    write_table(folder, "train.csv", range(6))
    write_table(folder, "heldout.csv", (6, 7))
    return folder


def data_config(folder, **settings):
    base = {"dataset_base_path": str(folder / "videos"), "metadata_path": str(folder / "train.csv")}
    size = {"num_frames": 9, "height": 32, "width": 32}
    return DataConfig(**{**base, **size, "control_column": ("copy", "other"), **settings})


# --- data ------------------------------------------------------------------------------------------------------------

VIEWS = {
    "uniform": {},
    "flipped": {"horizontal_flip": 0.5},
    "cropped in time": {"temporal_crop": 0.5},
    "random frames": {"frame_sampling": "random", "frame_rate": 12.0},
    "buckets": {"resolution_buckets": ("32x32", "32x48"), "frame_buckets": (5, 9)},
}


@pytest.mark.parametrize("settings", VIEWS.values(), ids=VIEWS)
def test_a_clip_and_its_copy_as_control_are_the_same_tensors_in_every_view(controlled, settings):
    config = data_config(controlled, **settings)
    rows, views = load_rows(config), set()
    for seed in range(8):
        shape = config.shape_at(choose_bucket(rows[0], config), 0)
        generator = torch.Generator().manual_seed(seed)
        loaded = VideoDataset(rows, config).load(0, generator, shape)
        copy, other = loaded["controls"]
        assert torch.equal(loaded["video"], copy)
        assert not torch.equal(loaded["video"], other)
        views.add(copy.numpy().tobytes())
    assert (len(views) > 1) == (settings.keys() <= {"horizontal_flip", "temporal_crop", "frame_sampling", "frame_rate"}
                                and bool(settings))  # fmt: skip


def test_colours_change_of_the_clip_alone(controlled):
    config = data_config(controlled, color_jitter=(0.5, 0.5, 0.5, 0.1))
    (video, copy, _), _ = load_videos(load_rows(config)[0], config.shape, config, torch.Generator().manual_seed(0))
    plain = replace(config, color_jitter=())
    (expected, *_), _ = load_videos(load_rows(config)[0], config.shape, plain, torch.Generator())
    assert torch.equal(copy, expected)
    assert not torch.equal(video, expected)


def test_controls_are_left_out_at_random_each_by_itself(controlled):
    from causal_wan.data.buckets import order_samples
    from causal_wan.data.samples import SampleStream

    config = data_config(controlled, control_dropout=0.5)
    rows = load_rows(config)
    order = order_samples(rows, config, seed=0, samples_per_step=2)
    stream = SampleStream(VideoDataset(rows, config), order, config, start=0, end=48)
    kept = [tuple(control is not None for control in stream[item]["controls"]) for item in range(48)]
    assert set(kept) == {(a, b) for a in (True, False) for b in (True, False)}
    again = SampleStream(VideoDataset(rows, config), order, config, start=20, end=48)
    assert tuple(control is not None for control in again[0]["controls"]) == kept[20]


def write_tars(folder, controlled, endings=("copy.mp4", "other.mp4")):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(4):
            for ending in ("mp4", *endings):
                source = number + 1 if ending.startswith("other") else number
                tar.add(controlled / "videos" / f"{source}.mp4", f"{number}.{ending}")
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 6
            tar.addfile(info, io.BytesIO(b"a ball"))


def test_controls_of_a_tar_go_with_their_clip_streamed_or_read(controlled, tmp_path):
    write_tars(tmp_path, controlled)
    names = {"video_column": "mp4", "caption_column": ("txt",), "control_column": ("copy.mp4", "other.mp4")}
    config = data_config(controlled, metadata_path=str(tmp_path), dataset_base_path=None, **names)
    rows = load_rows(config)
    (video, copy, other), _ = load_videos(rows[1], config.shape, config, torch.Generator())
    assert torch.equal(video, copy)
    (following, *_), _ = load_videos(rows[2], config.shape, config, torch.Generator())
    assert torch.equal(other, following)

    stream = open_stream(Source(metadata_path=str(tmp_path), **names))
    row = list(stream.read_file(0))[1]
    decoder = StreamDecoder(config, seed=0, samples_per_step=1)
    sample = decoder(row.find_video(None), row.prompts, 0, *row.find_controls(None))
    assert torch.equal(sample["video"], video)
    assert torch.equal(sample["controls"][0], copy)
    assert torch.equal(sample["controls"][1], other)


def test_controls_of_data_sets_and_other_tables_are_read_alike(controlled, tmp_path):
    rows = list(csv.DictReader((controlled / "train.csv").open()))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    embedded = [
        {**row, **{name: (controlled / "videos" / row[name]).read_bytes() for name in ("video", "copy", "other")}}
        for row in rows
    ]
    datasets.Dataset.from_list(embedded).save_to_disk(tmp_path / "saved")
    config = data_config(controlled)
    expected = load_videos(load_rows(config)[2], config.shape, config, torch.Generator())[0]
    for name in ("t.jsonl", "t.parquet", "saved"):
        other = replace(config, metadata_path=str(tmp_path / name))
        videos, _ = load_videos(load_rows(other)[2], config.shape, other, torch.Generator())
        assert all(torch.equal(a, b) for a, b in zip(videos, expected, strict=True)), name


def rewrite(folder, tmp_path, change):
    """A table with another control `copy` in its second row."""
    rows = list(csv.DictReader((folder / "train.csv").open()))
    rows[1]["copy"] = str(change)
    path = tmp_path / "changed.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_other(path, **settings):
    write_clip(path, 1, **settings)


def write_slow(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, width=48, height=32)
        for time in range(17):
            frame = np.full((32, 48, 3), time, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_varying(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, width=48, height=32)
        for time in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), time, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time + 4 * (time > 5), 1 / stream.codec_context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: write_other(path, num_frames=16), "must have the 17 frames of its clip, got 16"),
        (write_slow, "must have the frame rate of its clip, 16 a second, got 8"),
        (lambda path: write_other(path, height=48, width=32), "must have the aspect ratio of its clip.*48 x 32"),
        (lambda path: path.write_bytes(b"no video"), "its control copy"),
        (lambda path: None, "its control copy, .*does not exist"),
    ],
)
def test_controls_that_do_not_belong_to_their_clip_are_named_with_the_row(controlled, tmp_path, write, message):
    path = controlled / "videos" / "wrong.mp4"
    write(path)
    try:
        config = data_config(controlled, metadata_path=str(rewrite(controlled, tmp_path, "wrong.mp4")))
        with pytest.raises(ValueError, match=message) as error:
            load_rows(config)
        assert "row 2, 1.mp4: its control copy, " in str(error.value)
    finally:
        path.unlink(missing_ok=True)


def test_a_control_at_other_times_than_its_clip_is_named(controlled, tmp_path):
    path = controlled / "videos" / "varying.mp4"
    write_varying(path)
    config = data_config(controlled, metadata_path=str(rewrite(controlled, tmp_path, "varying.mp4")))
    with pytest.raises(ValueError, match="frame rate"):
        load_rows(config)
    path.unlink()


def test_a_smaller_or_larger_control_of_the_same_picture_is_taken(controlled, tmp_path):
    write_clip(controlled / "videos" / "large.mp4", 1, height=64, width=96)
    config = data_config(controlled, metadata_path=str(rewrite(controlled, tmp_path, "large.mp4")))
    (_, control, _), _ = load_videos(load_rows(config)[1], config.shape, config, torch.Generator())
    assert control.shape == (3, 9, 32, 32)
    (controlled / "videos" / "large.mp4").unlink()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_column": ("copy", "copy")}, "must name each column once"),
        ({"control_column": ("video",)}, "must be other videos than the clips, got video"),
        ({"control_column": (), "control_dropout": 0.1}, "control_dropout is about controls"),
    ],
)
def test_settings_of_controls_that_do_not_go_together_are_refused(controlled, settings, message):
    with pytest.raises(ValueError, match=message):
        data_config(controlled, **settings)


def test_empty_cells_and_missing_columns_are_named(controlled, tmp_path):
    config = data_config(controlled, metadata_path=str(rewrite(controlled, tmp_path, " ")))
    with pytest.raises(ValueError, match=r"row 2, 1\.mp4: its control copy, .*: the cell is empty"):
        load_rows(config)
    with pytest.raises(ValueError, match=r"must have the columns video and depth and prompt.*--control_column"):
        load_rows(data_config(controlled, control_column=("depth",)))
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a ball")
    with pytest.raises(ValueError, match="is a folder of videos and texts; write a CSV"):
        load_rows(data_config(controlled, metadata_path=str(tmp_path)))


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(controlled):
    return {
        "dataset_base_path": str(controlled / "videos"),
        "metadata_path": str(controlled / "train.csv"),
        "validation_metadata_path": str(controlled / "heldout.csv"),
        "control_column": ["copy", "other"],
        "num_frame_per_block": 5,
    }


def test_a_run_without_a_control_is_that_of_before_to_the_bit(write_recipe, settings):
    """All controls left out, and an input layer that is not yet anything else: the losses of a run without them."""
    runs = {}
    for name, changes in {"plain": {"control_column": []}, "left out": {"control_dropout": 1.0}}.items():
        path, runs[name] = write_recipe(name, **{**settings, **changes, "max_train_steps": 3})
        run_here(SCRIPT, "--config", path)
    one, other = (metrics(run) for run in runs.values())
    assert [entry["generator_loss"] for entry in one if "generator_loss" in entry] == [
        entry["generator_loss"] for entry in other if "generator_loss" in entry
    ]
    wide, narrow = (
        weights(runs["left out"])["patch_embedding.weight"],
        weights(runs["plain"])["patch_embedding.weight"],
    )
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[:, narrow.shape[1] :].any()


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_run_follows_its_controls_from_training_to_a_pipeline_of_its_own(
    write_recipe, settings, controlled, checkpoint, tmp_path, lora_rank, frames_by_path, capsys
):
    changes = {
        "cache_latents": True,
        "lora_rank": lora_rank,
        "control_learning_rate_scale": 5.0,
        "control_dropout": 0.1,
    }
    path, run = write_recipe(**{**settings, **changes})
    run_here(SCRIPT, "--config", path)
    assert find_run(str(run)).data.control_column == ("copy", "other")
    assert len(TensorCache(run / "cache" / "latents")) == 8  # of a clip, its copy and what it controls, one
    names = {"full": ["transformer"], "lora": ["pytorch_lora_weights.safetensors", "patch_embedding.safetensors"]}
    for name in names["lora" if lora_rank else "full"]:
        assert (run / name).exists()
    validated = [frames_by_path(run / "validation" / "step-000004" / f"{number:02d}.mp4") for number in range(2)]

    # generate.py, from a table with columns of the controls' names, gives what validation gave
    table = tmp_path / "prompts.csv"
    rows = [f"a ball,{controlled}/videos/{number}.mp4,{controlled}/videos/{(number + 1) % 8}.mp4" for number in (6, 7)]
    table.write_text("\n".join(["prompt,copy,other", *rows]))
    run_here("generate.py", "--checkpoint", run, "--prompts_file", table, "--output", tmp_path / "videos")
    for number, video in enumerate(validated):
        assert np.abs(frames_by_path(tmp_path / "videos" / f"{number:02d}.mp4").astype(int) - video).max() <= 1
    # and so does the table of the held-out clips, as in training
    base = ["--prompts_file", controlled / "heldout.csv", "--dataset_base_path", controlled / "videos"]
    run_here("generate.py", "--checkpoint", run, *base, "--num_prompts", 1, "--output", tmp_path / "heldout")
    first = frames_by_path(tmp_path / "heldout" / "00.mp4")
    assert np.abs(first.astype(int) - validated[0]).max() <= 1
    flags = ["--checkpoint", run, "--prompt", "a ball", "--control"]
    videos = controlled / "videos"
    for name, control in {"same": (videos / "6.mp4", videos / "7.mp4"), "one": ("none", videos / "7.mp4")}.items():
        run_here("generate.py", *flags, *control, "--output", tmp_path / f"{name}.mp4")
    same, one = (frames_by_path(tmp_path / f"{name}.mp4") for name in ("same", "one"))
    assert np.abs(same.astype(int) - validated[0]).max() <= 1
    assert np.abs(one.astype(int) - validated[0]).max() > 1

    # evaluate.py follows them, and says so
    flags = ["--metadata_path", controlled / "heldout.csv", "--dataset_base_path", videos, "--lpips_net", "None"]
    found = {}
    for control in ("given", "none"):
        folder = tmp_path / control
        run_here("evaluate.py", "--checkpoint", run, *flags, "--output_dir", folder, "--control", control)
        found[control] = json.loads((folder / "metrics.json").read_text())
        assert any("follows the videos of copy and other" in note for note in found[control]["notes"]) == (
            control == "given"
        )
    logged = [entry for entry in metrics(run) if "validation_loss" in entry][-1]
    assert found["given"]["heldout_loss"]["loss"] == pytest.approx(logged["validation_loss"], rel=1e-4)
    assert found["none"]["heldout_loss"]["loss"] != pytest.approx(logged["validation_loss"], rel=1e-4)

    # a whole pipeline streams with controls, in this class and in the one file beside it
    run_here("convert_checkpoint.py", "--input", run, "--output", tmp_path / "pipeline", "--to", "pipeline")
    WanTransformer3DModel.from_pretrained(tmp_path / "pipeline" / "transformer")
    WanPipeline.from_pretrained(tmp_path / "pipeline")
    frames = [PIL.Image.fromarray(frame) for frame in decode(videos / "6.mp4")]
    call = {"num_frames": 17, "height": 32, "width": 48, "output_type": "np", "num_inference_steps": 2}
    results = []
    spec = importlib.util.spec_from_file_location("exported", tmp_path / "pipeline" / "pipeline.py")
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    for pipeline_class in (CausalWanPipeline, exported.CausalWanPipeline):
        pipeline = pipeline_class.from_pretrained(tmp_path / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        parts = pipeline.stream("a ball", control={"copy": frames}, generator=torch.Generator().manual_seed(0), **call)
        results.append(np.concatenate(list(parts), axis=1))
    assert_close(torch.from_numpy(results[0]), torch.from_numpy(results[1]))
    capsys.readouterr()


def decode(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_broken_run_goes_on_exactly_with_its_controls_and_refuses_others(write_recipe, settings, tmp_path, capsys):
    changes = {"lora_rank": 4, "cache_latents": True, "control_dropout": 0.3, "control_learning_rate_scale": 2.0}
    path, whole = write_recipe("whole", **{**settings, **changes})
    run_here(SCRIPT, "--config", path)
    path, run = write_recipe("run", **{**settings, **changes, "resume_from_checkpoint": "latest"})
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    for name in ("pytorch_lora_weights.safetensors", "patch_embedding.safetensors"):
        (run / name).unlink()
    run_here(SCRIPT, "--config", path)
    for name in ("pytorch_lora_weights.safetensors", "patch_embedding.safetensors"):
        one, other = load_file(whole / name), load_file(run / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    run_here("convert_checkpoint.py", "--input", whole / "checkpoint-4", "--output", tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "patch_embedding.safetensors")
    assert torch.equal(converted["patch_embedding.weight"], one["patch_embedding.weight"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path, "--control_column", "copy")
    assert "control_column was copy other, got copy" in capsys.readouterr().err


def test_the_rate_of_the_input_layer_is_its_own(write_recipe, settings):
    """With 0 steps of warm-up AdamW moves each weight by its rate in the first step."""
    path, run = write_recipe(
        **{**settings, "max_train_steps": 1, "control_learning_rate_scale": 10.0, "learning_rate": 1e-3,
           "lr_scheduler": "constant", "validation_metadata_path": None, "adam_weight_decay": 0.0}
    )  # fmt: skip
    run_here(SCRIPT, "--config", path)
    moved = weights(run)
    base = load_file(f"{yaml.safe_load(path.read_text())['pretrained_model_name_or_path']}/transformer/"
                     "diffusion_pytorch_model.safetensors")  # fmt: skip
    controls = moved["patch_embedding.weight"][:, 16:].abs()
    assert controls.median() == pytest.approx(1e-2, rel=0.05)
    assert (moved["proj_out.weight"] - base["proj_out.weight"]).abs().median() == pytest.approx(1e-3, rel=0.05)


def test_a_student_of_the_5b_layout_follows_controls_too(write_recipe, settings, checkpoint_5b, controlled, tmp_path):
    changes = {"pretrained_model_name_or_path": str(checkpoint_5b), "width": 64, "max_train_steps": 1}
    path, run = write_recipe(**{**settings, **changes})
    run_here(SCRIPT, "--config", path)
    assert weights(run)["patch_embedding.weight"].shape[1] == 3 * 48
    flags = ["--prompt", "a ball", "--control", controlled / "videos" / "6.mp4", "--output", tmp_path / "a.mp4"]
    run_here("generate.py", "--checkpoint", run, *flags)
    assert len(decode(tmp_path / "a.mp4")) == 17


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_shards_learn_what_one_process_does(write_recipe, settings, lora_rank):
    changes = {"lora_rank": lora_rank, "mixed_precision": "no", "validation_metadata_path": None, "max_train_steps": 2}
    changes |= {"control_learning_rate_scale": 3.0, "max_grad_norm": 0.01, "adam_epsilon": 1e-4, "num_frames": 9}
    changes |= {"num_frame_per_block": 3}
    path, alone = write_recipe("alone", **{**settings, **changes, "train_batch_size": 2})
    run_here(SCRIPT, "--config", path)
    path, together = write_recipe("together", **{**settings, **changes, "train_batch_size": 1})
    launch(SCRIPT, path, num_processes=2, strategy="fsdp2")
    name = "patch_embedding.safetensors" if lora_rank else "transformer/diffusion_pytorch_model.safetensors"
    one, other = (load_file(run / name)["patch_embedding.weight"] for run in (alone, together))
    assert other.shape[1] == 48
    assert (one - other).norm() < 1e-3 * one.norm()


def test_a_run_reads_what_was_precomputed_of_clips_and_controls(write_recipe, settings, tmp_path):
    path, whole = write_recipe("encoded", **{**settings, "max_train_steps": 2})
    run_here(SCRIPT, "--config", path)
    latents = tmp_path / "latents"
    run_here("precompute_latents.py", "--config", path, "--latents_dir", latents, "--latents_dtype", "fp32")
    path, run = write_recipe("read", **{**settings, "max_train_steps": 2, "latents_dir": str(latents)})
    run_here(SCRIPT, "--config", path, "--latents_dtype", "fp32")
    for one, other in zip(metrics(whole), metrics(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_run_streams_clips_with_their_controls(write_recipe, settings, controlled, tmp_path, capsys):
    write_tars(tmp_path, controlled)
    changes = {"streaming": True, "metadata_path": str(tmp_path), "dataset_base_path": None, "video_column": "mp4"}
    changes |= {"caption_column": ["txt"], "control_column": ["copy.mp4", "other.mp4"], "control_dropout": 0.2}
    path, run = write_recipe(**{**settings, **changes, "validation_metadata_path": None, "max_train_steps": 2})
    run_here(SCRIPT, "--config", path)
    assert weights(run)["patch_embedding.weight"][:, 16:].any()
    assert "controls    copy.mp4, other.mp4; each left out of 20% of the samples" in capsys.readouterr().out


def test_the_check_of_a_data_set_decodes_controls_and_looks_again_when_one_changes(controlled, tmp_path):
    table, control = rewrite(controlled, tmp_path, "cut.mp4"), controlled / "videos" / "cut.mp4"
    flags = ["--dataset_base_path", controlled / "videos", "--metadata_path", table, "--control_column", "copy"]
    flags += ["--num_frames", 9, "--height", 32, "--width", 32, "--output_dir", tmp_path / "report"]
    content = (controlled / "videos" / "1.mp4").read_bytes()
    found = []
    for part in (content, content[:-400] + bytes(400)):  # the last frames are no pictures
        control.write_bytes(part)
        with contextlib.suppress(SystemExit):
            run_here("check_dataset.py", *flags)
        bad = tmp_path / "report" / "bad_rows.csv"
        found.append(bad.read_text() if bad.exists() else "")
    control.unlink()
    assert "control" not in found[0]
    assert "its control copy, cut.mp4" in found[1]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
def test_a_student_with_controls_does_not_go_to_tools_that_know_none(
    write_recipe, settings, tmp_path, lora_rank, capsys
):
    path, run = write_recipe(**{**settings, "lora_rank": lora_rank, "max_train_steps": 1, "validation_steps": 0})
    run_here(SCRIPT, "--config", path)
    with pytest.raises(SystemExit):
        run_here("convert_checkpoint.py", "--input", run, "--output", tmp_path / "x.safetensors", "--to", "comfyui")
    assert "follows control videos" in capsys.readouterr().err


@NEEDS_DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_learns_what_one_process_does(write_recipe, settings, strategy):
    changes = {"mixed_precision": "no", "validation_metadata_path": None, "max_train_steps": 2, "num_frames": 9}
    changes |= {"control_learning_rate_scale": 3.0, "max_grad_norm": 0.01, "adam_epsilon": 1e-4, "lora_rank": 4}
    changes |= {"num_frame_per_block": 3}
    path, alone = write_recipe("alone", **{**settings, **changes, "train_batch_size": 2})
    run_here(SCRIPT, "--config", path)
    path, together = write_recipe("together", **{**settings, **changes, "train_batch_size": 1})
    launch(SCRIPT, path, num_processes=2, strategy=strategy)
    one, other = (
        load_file(run / "patch_embedding.safetensors")["patch_embedding.weight"] for run in (alone, together)
    )
    assert (one - other).norm() < 1e-3 * one.norm()


def test_what_cannot_begin_a_run_with_controls_is_said_at_once(write_recipe, settings, tmp_path, capsys):
    """A LoRA is no whole weights; a student with controls takes no others; a resumed run is told to start anew."""
    lora, adapters = write_recipe("lora", **{**settings, "lora_rank": 4, "max_train_steps": 2, "validation_steps": 0})
    run_here(SCRIPT, "--config", lora)
    run_here("convert_checkpoint.py", "--input", adapters, "--output", tmp_path / "whole", "--to", "pipeline")
    capsys.readouterr()
    changes = {"validation_steps": 0, "max_train_steps": 1, "generator_ckpt": str(adapters)}
    path, _ = write_recipe("next", **{**settings, **changes})
    cases = {
        (): f"which is a LoRA; make them of it: python convert_checkpoint.py --input {adapters}",
        ("--generator_ckpt", tmp_path / "whole", "--control_column", "copy"): "in their order, copy other, got copy",
    }
    for flags, message in cases.items():
        with pytest.raises(SystemExit):
            run_here(SCRIPT, "--config", path, "--dry_run", *flags)
        out, err = capsys.readouterr()
        assert message in err
        assert "data  " not in out
    run_here(SCRIPT, "--config", path, "--dry_run", "--generator_ckpt", tmp_path / "whole")
    resumed, _ = write_recipe("lora", **{**settings, "lora_rank": 4, "resume_from_checkpoint": "latest"})
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", resumed, "--control_column", "copy")
    message = capsys.readouterr().err
    assert "start anew with another --output_dir" in message
    assert "--generator_ckpt WEIGHTS" not in message


def test_generation_says_which_controls_are_not_given(write_recipe, settings, controlled, tmp_path, capsys):
    path, run = write_recipe(**{**settings, "max_train_steps": 1, "validation_steps": 0})
    run_here(SCRIPT, "--config", path)
    table = tmp_path / "p.csv"
    table.write_text(f"prompt,copy,other\na,{controlled}/videos/6.mp4,none\nb,{controlled}/videos/6.mp4,\n")
    capsys.readouterr()
    run_here("generate.py", "--checkpoint", run, "--prompts_file", table, "--output", tmp_path / "videos")
    said = "controls, other is not given for some videos, so they do without; none was left out"
    assert said in capsys.readouterr().err
    # a cell wins over the flag
    flags = [
        "--prompts_file",
        table,
        "--output",
        tmp_path / "again",
        "--control",
        "none",
        controlled / "videos" / "7.mp4",
    ]
    run_here("generate.py", "--checkpoint", run, *flags)
    one, other = ((tmp_path / folder / "00.mp4").read_bytes() for folder in ("videos", "again"))
    assert one == other
    one, other = ((tmp_path / folder / "01.mp4").read_bytes() for folder in ("videos", "again"))
    assert one != other
    write_clip(tmp_path / "short.mp4", 0, num_frames=5)
    for control, message in {
        "missing.mp4": "control copy must be a file that decodes, but missing.mp4 does not exist (paths in a",
        str(tmp_path / "short.mp4"): "control copy must have frames for the 17 of the video, but",
    }.items():
        flags = ["--prompt", "a", "--output", tmp_path / "a.mp4", "--control", control]
        with pytest.raises(SystemExit):
            run_here("generate.py", "--checkpoint", run, *flags)
        assert message in capsys.readouterr().err


# --- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(checkpoint):
    from causal_wan.model.control import widen_for_controls

    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=2, local_attn_size=4)
    widen_for_controls(pipeline.transformer, ["depth"])
    torch.nn.init.normal_(pipeline.transformer.patch_embedding.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CALL = {"num_frames": 13, "height": 32, "width": 48, "denoising_step_list": (1000, 500), "output_type": "latent"}


def test_a_call_takes_a_video_a_prompt_or_frames_as_they_come(pipeline, clips):
    frames = [PIL.Image.fromarray(frame) for frame in decode(clips / "videos" / "0.mp4")]
    seed = {"generator": torch.Generator().manual_seed(0)}
    whole = pipeline("a ball", control={"depth": frames}, **seed, **CALL).frames
    video = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames[:13]])).permute(3, 0, 1, 2)
    latents = encode_videos(pipeline.vae, normalize_videos(video[None]))
    assert latents.shape[2] == 4
    live = pipeline.stream("a ball", control={"depth": iter(frames[:13])}, generator=torch.Generator().manual_seed(0),
                           **{**CALL, "num_frames": None})  # fmt: skip
    assert_close(torch.cat(list(live), dim=2), whole, atol=1e-4, rtol=1e-4)
    others = [PIL.Image.fromarray(frame) for frame in decode(clips / "videos" / "1.mp4")]
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    both = pipeline(["a ball"] * 2, control={"depth": [frames, others]}, generator=generators, **CALL).frames
    assert_close(both[:1], whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[1:], whole, atol=1e-3)


def test_what_can_be_seen_through_of_a_control_is_white(pipeline):
    pixels = np.full((32, 48, 4), (200, 120, 30, 255), np.uint8)
    pixels[:, :24, 3] = 0
    frames = as_pixels(pipeline, [PIL.Image.fromarray(pixels)], 32, 48)[0, :, 0]
    assert frames[:, 16, 10].tolist() == [1, 1, 1]
    assert frames[:, 16, 40].tolist() == pytest.approx([200 / 127.5 - 1, 120 / 127.5 - 1, 30 / 127.5 - 1])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ([1, 2], "must name the control of each video, such as"),
        ({"depth": []}, "control depth must be frames in a form"),
        ({"depth": "clip.mp4"}, "control depth must be frames in a form"),
        ({"sketch": []}, "names of controls that the student was trained with, depth, got sketch"),
        ({"depth": [PIL.Image.new("RGB", (48, 32))] * 5}, "control depth must have the 13 frames of the video, got 5"),
        ({"depth": [[PIL.Image.new("RGB", (48, 32))] * 13] * 3}, "one video, or one for each of 1, got 3"),
    ],
)
def test_controls_that_cannot_be_followed_are_refused_by_a_call(pipeline, control, message):
    with pytest.raises(ValueError, match=message):
        pipeline("a ball", control=control, **CALL)


def test_videos_that_cannot_control_are_refused_before_anything_is_loaded(checkpoint, clips, tmp_path, capsys):
    flags = ["--checkpoint", checkpoint, "--prompt", "a ball", "--output", tmp_path / "a.mp4"]
    with pytest.raises(SystemExit):
        run_here("generate.py", *flags, "--control", clips / "videos" / "0.mp4")
    assert "a video for each control of the student, which has none, got 1" in capsys.readouterr().err


def test_trajectories_have_no_controls(write_recipe, settings, capsys):
    path, _ = write_recipe(**settings)
    with pytest.raises(SystemExit):
        run_here("train_ode_regression.py", "--config", path, "--trajectories_dir", "somewhere")
    assert "control_column needs clips to control" in capsys.readouterr().err


def test_shapes_of_latents_of_controls(checkpoint):
    """Of a bucket's shape, not of the run's."""
    assert encode_videos(load_vae(checkpoint), torch.zeros(1, 3, *ClipShape(5, 32, 48))).shape == (1, 16, 2, 4, 6)
