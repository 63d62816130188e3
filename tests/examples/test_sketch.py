"""The embedded example: the data set, its checkpoint, and the figures that judge drawings."""

import csv
import json
import shutil

import av
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, run_python, run_shell_script
from diffusers import WanPipeline
from PIL import Image, ImageFilter
from transformers import AutoTokenizer

from causal_wan.config.parsing import parse_config
from causal_wan.methods.settings import RegressionConfig
from examples.sketch import ink, make_dataset
from train_video_regression import Config


TINY_WAN = ROOT / "examples" / "sketch" / "tiny-wan"
MAKE = ROOT / "examples" / "sketch" / "make_dataset.py"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small data set on disk."""
    folder = tmp_path_factory.mktemp("sketch")
    run_python(MAKE, "--output_dir", folder, "--num_clips", 6, "--num_heldout", 2)
    return folder


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_clips_are_h264_of_the_size_that_the_recipe_asks_for(drawn):
    for row in rows(drawn / "train.csv") + rows(drawn / "heldout.csv"):
        with av.open(drawn / "videos" / row["video"]) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 112, 64)
            assert sum(1 for _ in container.decode(stream)) == 81


def test_heldout_prompts_are_not_in_the_training_set_and_the_seed_decides_both(drawn, tmp_path):
    train, heldout = ({row["prompt"] for row in rows(drawn / f"{name}.csv")} for name in ("train", "heldout"))
    assert len(train) == 6
    assert len(heldout) == 2
    assert not train & heldout
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        run_python(MAKE, "--output_dir", folder, "--num_clips", 6, "--num_heldout", 2, "--seed", seed)
        assert ((folder / "train.csv").read_bytes() == (drawn / "train.csv").read_bytes()) is same


def test_every_clip_has_a_prompt_of_its_own():
    everything = make_dataset.sketches(tuple(make_dataset.KINDS))
    assert len({make_dataset.prompt(sketch) for sketch in everything}) == len(everything)


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory):
    """A small ambiguous data set on disk: two held-out prompts of four clips each."""
    folder = tmp_path_factory.mktemp("ambiguous")
    run_python(MAKE, "--output_dir", folder, "--ambiguous", "--kinds", "bird,rocket")
    return folder


def test_an_ambiguous_prompt_has_many_clips_and_says_nothing_of_kind_size_and_place(ambiguous):
    tables = {name: rows(ambiguous / f"{name}.csv") for name in ("train", "heldout", "targets")}
    train, heldout, targets = ({row["prompt"] for row in table} for table in tables.values())
    assert len(tables["train"]) == 10 * 12
    assert len({row["video"] for table in (tables["train"], tables["targets"]) for row in table}) == 12 * 12
    assert len(train) == 10
    assert not train & heldout
    assert heldout == targets
    for table in tables.values():
        for row in table:
            assert (ambiguous / "videos" / row["video"]).is_file()
            kind, colour, size, place, line, proportion = row["video"].removesuffix(".mp4").split("-")
            assert all(word in row["prompt"] for word in (colour, line, proportion))
            assert not any(word.replace("_", " ") in row["prompt"] for word in (kind, size, place))


def test_heldout_rows_give_each_ambiguous_prompt_in_turn_a_target_of_its_own(ambiguous):
    heldout = rows(ambiguous / "heldout.csv")
    prompts = [row["prompt"] for row in heldout]
    assert len(heldout) == 8
    assert prompts[:2] * 4 == prompts
    assert prompts[0] != prompts[1]
    assert len({row["video"] for row in heldout}) == 8


def read_video(path):
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def with_samples(folder, ambiguous):
    """METHOD:STEPS=FOLDER for samples that are other targets, always the same one, white paper, and blots."""
    heldout, targets = rows(ambiguous / "heldout.csv"), rows(ambiguous / "targets.csv")
    for number, row in enumerate(heldout):
        others = [t["video"] for t in targets if t["prompt"] == row["prompt"] and t not in heldout]
        other, same = (ambiguous / "videos" / others[which] for which in (number // 2, 0))
        blots = [np.asarray(Image.fromarray(f).filter(ImageFilter.MinFilter(15))) for f in read_video(other)]
        for name in ("other", "same", "white", "blots"):
            (folder / name).mkdir(exist_ok=True)
            clip = folder / name / f"{number:02d}.mp4"
            if name in ("other", "same"):
                shutil.copy(other if name == "other" else same, clip)
            else:
                make_dataset.write_mp4(np.stack(blots) if name == "blots" else np.full_like(blots, 255), clip)
    samples = [f"{name}:3={folder / name}" for name in ("other", "same", "white", "blots")]
    return samples + [f"both:3={folder / name}" for name in ("other", "same")]


@pytest.mark.slow
def test_comparison_tells_drawings_from_their_mean_and_from_blots_and_many_from_one(ambiguous, tmp_path):
    run = tmp_path / "run"
    samples = with_samples(tmp_path, ambiguous)
    shutil.copytree(tmp_path / "same", run / "validation" / "step-000002")
    run.joinpath("metrics.jsonl").write_text('{"step": 1, "blur_gap_at_time_1000": 0.5}\n{"step": 2}\n')
    flags = ["--data_dir", ambiguous, "--output_dir", tmp_path / "out", "--run", run]
    flags += ["--vae", MAKE.parent / "tiny-wan", "--samples", *samples]
    shown = run_python(MAKE.parent / "compare.py", *flags).stdout
    entries = json.loads((tmp_path / "out" / "comparison.json").read_text())
    figures = {entry["method"]: entry for entry in entries}
    assert figures["targets"]["ink F1"] == figures["other"]["ink F1"] == figures["same"]["ink F1"] == 1
    assert figures["targets"]["diversity"] == pytest.approx(1, abs=0.3)
    assert figures["other"]["diversity"] == pytest.approx(1, abs=0.3)
    assert figures["same"]["diversity"] == figures["their mean"]["diversity"] == 0
    assert 0 < figures["both"]["diversity"] < figures["other"]["diversity"]
    assert figures["their mean"]["sharpness"] < 0.3
    assert 0.5 < figures["encoded, decoded"]["sharpness"] < 1
    assert figures["their mean"]["ink F1"] < 0.7
    assert figures["other"]["sharpness"] == pytest.approx(1, abs=0.3)
    assert "| same                     |     3 |" in shown
    for name in ("comparison.png", "blur_gaps.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000

    for name in ("targets", "other", "same", "both", "encoded, decoded"):
        assert figures[name]["recognised"] == 1
        assert figures[name]["blank"] == 0
        assert figures[name]["ink"] == pytest.approx(1, abs=0.3)
    for name in ("their mean", "white", "blots"):
        assert figures[name]["recognised"] == figures[name]["kinds"] == 0
    assert figures["other"]["kinds"] == figures["targets"]["kinds"] == 2
    assert figures["targets"]["expected"] == pytest.approx(2 * (1 - 0.5**8))
    assert figures["both"]["expected"] == pytest.approx(2 * (1 - 0.5**16))
    assert figures["white"]["blank"] == 1
    assert figures["white"]["ink"] == figures["white"]["sharpness"] == 0
    assert figures["white"]["per ink"] is None
    assert figures["their mean"]["ink"] == pytest.approx(1, abs=0.02)
    assert figures["their mean"]["per ink"] < 0.3
    assert figures["blots"]["ink"] > 3
    assert figures["blots"]["per ink"] < 0.5


def test_comparison_refuses_what_is_no_folder_of_samples(ambiguous, tmp_path):
    flags = ["--data_dir", ambiguous, "--output_dir", tmp_path, "--samples", "a:3=nowhere"]
    result = run_python(MAKE.parent / "compare.py", *flags, check=False)
    assert result.returncode != 0
    assert "samples must be METHOD:STEPS=FOLDER with a folder that exists, got 'a:3=nowhere'" in result.stderr
    flags = ["--data_dir", ambiguous, "--output_dir", tmp_path, "--samples", f"a:3={tmp_path}", "--run", tmp_path]
    result = run_python(MAKE.parent / "compare.py", *flags, check=False)
    assert "run must be the output folder of a run, with metrics.jsonl" in result.stderr


def test_a_drawing_grows_from_nothing_stays_inside_and_rests_at_the_end():
    for kind in make_dataset.KINDS:
        for size, place in (("small", "on the left"), ("large", "on the right")):
            clip = make_dataset.draw(make_dataset.Sketch(kind, "green", size, place, "thick", "wide"))
            amount = ink.ink_mask(clip).sum(dim=(1, 2))
            assert (amount.diff() >= 0).all()
            assert amount[0] < 0.1 * amount[-1]
            assert amount[75] == amount[-1]
            border = np.concatenate([clip[-1][[0, -1]].ravel(), clip[-1][:, [0, -1]].ravel()])
            assert (border == 255).all()


def test_unknown_kinds_and_too_many_clips_are_refused(tmp_path):
    for flags, message in (
        (("--kinds", "bird,cow"), "got cow"),
        (("--num_clips", 10_000), "num_clips + num_heldout must be at most 288"),
        (("--ambiguous", "--num_targets", 25), "num_targets at most 24"),
    ):
        result = run_python(MAKE, "--output_dir", tmp_path, *flags, check=False)
        assert result.returncode != 0
        assert message in result.stderr


def test_ink_f1_forgives_as_many_pixels_as_it_is_told():
    clip = make_dataset.draw(make_dataset.Sketch("bird", "blue", "large", "in the middle", "thin", "tall"))
    white = np.full_like(clip, 255)
    assert ink.mean_ink_f1(clip, clip, tolerance=0) == 1
    assert ink.mean_ink_f1(np.roll(clip, 2, axis=2), clip, tolerance=2) == 1
    assert ink.mean_ink_f1(np.roll(clip, 2, axis=2), clip, tolerance=0) < 0.6
    assert ink.mean_ink_f1(white, clip, tolerance=2) == 0
    assert (ink.ink_f1(white, white) == 1).all()
    assert ink.colour_error(clip, clip) == 0


def test_open_loops_see_the_filled_wing_that_ink_f1_forgives():
    clip = make_dataset.draw(make_dataset.Sketch("bird", "blue", "large", "in the middle", "thin", "tall"))
    frame = clip[-1:]
    wing = np.zeros(frame.shape[:3], bool)
    wing[0, 25:50, 40:66] = ink.inside_loops(frame)[0, 25:50, 40:66]
    filled = np.where(wing[..., None], np.uint8(30), frame)
    assert ink.open_loops(frame, frame) == ink.open_loops(np.full_like(frame, 255), frame) == 1
    assert ink.open_loops(np.zeros_like(frame), frame) == 0
    assert 0.2 < ink.open_loops(filled, frame) < 0.9
    assert np.isnan(ink.open_loops(clip[:5], clip[:5]))


def test_tiny_wan_is_a_stock_pipeline_of_at_most_12_mb():
    pipeline = WanPipeline.from_pretrained(TINY_WAN)
    assert sum(path.stat().st_size for path in TINY_WAN.rglob("*")) < 12e6
    pipeline.set_progress_bar_config(disable=True)
    clip = pipeline("a bird", height=64, width=112, num_frames=9, num_inference_steps=2).frames[0]
    assert clip.shape == (9, 64, 112, 3)
    assert np.isfinite(clip).all()


@torch.no_grad()
def test_the_vae_of_tiny_wan_keeps_the_strokes():
    clip = make_dataset.draw(make_dataset.Sketch("rocket", "purple", "small", "on the left", "thin", "wide"))
    video = torch.from_numpy(clip).movedim(-1, 0)[None].float() / 127.5 - 1
    decoded = WanPipeline.from_pretrained(TINY_WAN).vae(video).sample
    frames = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)
    assert ink.mean_ink_f1(frames, clip, tolerance=1) > 0.95


def test_report_compares_with_the_trivial_answer(drawn, tmp_path):
    heldout = rows(drawn / "heldout.csv")
    for name, shown in (("before", heldout[::-1]), ("after", heldout)):
        (tmp_path / name).mkdir()
        for number, row in enumerate(shown):
            clip = (drawn / "videos" / row["video"]).read_bytes()
            (tmp_path / name / f"{number:02d}.mp4").write_bytes(clip)
    entries = [{"step": step, "generator_loss": 1 / step, "loss_at_time_1000": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    folders = ["--data_dir", drawn, "--before", tmp_path / "before", "--after", tmp_path / "after", "--run", tmp_path]
    run_python(MAKE.parent / "report.py", *folders, "--output_dir", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["white paper"]["ink F1, last frame"] == 0
    assert scores["before"]["ink F1, last frame"] < 1
    assert scores["after"]["ink F1, last frame"] == 1
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000
    assert (tmp_path / "loss.png").stat().st_size > 1000


def read_recipe(folder):
    """The settings of a run that a recipe of the examples asks for."""
    return parse_config(Config, ["--config", str(ROOT / "examples" / folder / "recipe.yaml")])


def test_the_quickstart_learns_any_level_while_objectives_and_scripts_begin_with_the_step_list():
    quickstart, objectives = read_recipe("sketch"), read_recipe("objectives")
    assert quickstart.method.is_continuous
    assert quickstart.method.student_sampler == "euler"
    assert len(quickstart.method.inference_timesteps()) == 2
    assert objectives.method == RegressionConfig()
    assert objectives.method.levels().tolist() == [1000, 757, 522, 0]
    assert objectives.model.max_sequence_length == 512
    assert objectives.data == quickstart.data


def test_no_prompt_of_a_sketch_is_cut_in_the_quickstart():
    tokenizer = AutoTokenizer.from_pretrained(TINY_WAN / "tokenizer")
    prompts = [make_dataset.prompt(sketch) for sketch in make_dataset.sketches(tuple(make_dataset.KINDS))]
    longest = max(map(len, tokenizer(prompts).input_ids))
    assert longest <= read_recipe("sketch").model.max_sequence_length


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_objectives_stand_side_by_side_in_one_command(tmp_path):
    env = {
        "OUTPUT_DIR": str(tmp_path),
        "DATA": "ambiguous",
        "METHODS": "regression teacher-forcing ode",
        "MAX_TRAIN_STEPS": "2",
        "NUM_INFERENCE_STEPS": "4",
        "NUM_TRAJECTORIES": "2",
        "DATASET_FLAGS": "--kinds bird --num_clips 8 --num_targets 2 --num_heldout 1",
    }
    run_shell_script(["examples/objectives/run.sh", "--train_batch_size", 2], env=env)
    entries = json.loads((tmp_path / "ambiguous" / "comparison.json").read_text())
    of_student = [("regression, renoise", "3"), ("regression, euler", "3"), ("regression, euler", "4")]
    of_teacher = [
        ("teacher-forcing, renoise", "3"),
        *(("teacher-forcing, euler", number) for number in ("1", "2", "3")),
    ]
    rows = [(entry["method"], entry["steps"]) for entry in entries]
    assert rows[:10] == [("targets", ""), ("their mean", ""), ("encoded, decoded", ""), *of_student, *of_teacher]
    assert rows[-2:] == [("ode-2, renoise", "3"), ("ode-2, euler", "3")]
    assert (tmp_path / "ambiguous" / "blur_gaps.png").is_file()
    for method, levels in (("regression", "step_list"), ("teacher-forcing", "logit_normal")):
        run = yaml.safe_load((tmp_path / "ambiguous" / method / "config.yaml").read_text())
        assert (run["timestep_sampling"], run["max_sequence_length"]) == (levels, 512)
