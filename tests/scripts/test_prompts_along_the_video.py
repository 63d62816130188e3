"""Prompts along the video through the scripts: trained, cached, streamed, resumed, validated, evaluated, generated."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import launch, run_here
from run_outputs import flat, metrics, result, weights
from torch.testing import assert_close

import evaluate
from causal_wan.model.transformer import CausalWanTransformer3DModel
from causal_wan.sampling.pipeline import CausalWanPipeline


TRAIN = "train_video_regression.py"
# Clips of 17 frames at 16 a second: 5 blocks of a latent frame, whose middles are at 0, 3, 7, 11 and 15 sixteenths.
SCHEDULES = {
    0: [[0, "a ball"], [0.5, "the ball goes on"]],  # from the fourth block on
    1: [[0, "a ball"], [0.15, "a box"], [0.5, "a ball"], [0.9, "the ball goes on"]],
    2: None,
    3: [[0, "a box"], [0.9375, "a ball"]],  # exactly in the middle of the last block
    4: [[0, "a box"], [0.94, "a ball"]],  # too late for it
    5: None,
}
BLOCKS = {
    0: ["a ball"] * 3 + ["the ball goes on"] * 2,
    1: ["a ball", "a box", "a box", "a ball", "the ball goes on"],
    2: ["number 2"] * 5,
    3: ["a box"] * 4 + ["a ball"],
    4: ["a box"] * 5,
    5: ["number 5"] * 5,
}


def write_table(path, numbers):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "prompt", "prompt_schedule"])
        for number in numbers:
            pairs = SCHEDULES[number % 6]
            writer.writerow([f"{number}.mp4", f"number {number}", "" if pairs is None else json.dumps(pairs)])
    return str(path)


@pytest.fixture
def tables(clips, tmp_path):
    """Settings of a run on clips with schedules."""
    train, held_out = (write_table(tmp_path / f"{name}.csv", numbers) for name, numbers in TABLES.items())
    return {"metadata_path": train, "validation_metadata_path": held_out}


TABLES = {"train": range(6), "heldout": (6, 7)}


@pytest.fixture
def told(monkeypatch):
    """The embeddings of each block `(5, S, D)`, of each clip of the passes that a run trains with."""
    found, forward = [], CausalWanTransformer3DModel.forward

    def note(model, hidden_states, timestep, encoder_hidden_states, **others):
        if model.training and type(hidden_states) is torch.Tensor:  # and none of the memory plan
            frames = hidden_states.shape[2]
            of_frame, prompts = others.get("prompt_of_frame"), encoder_hidden_states
            if of_frame is None:
                prompts, of_frame = prompts[:, None], torch.zeros(len(prompts), frames, dtype=torch.int64)
            found.extend(prompts[number, row] for number, row in enumerate(of_frame.detach()))
        return forward(model, hidden_states, timestep, encoder_hidden_states, **others)

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", note)
    return found


def as_texts(told, checkpoint, texts):
    """The prompts of the blocks of each clip, told by their embeddings."""
    from causal_wan.model.text import encode_prompts, pad_prompt_embeds
    from causal_wan.weights.parts import load_text_encoder

    tokenizer, encoder = load_text_encoder(str(checkpoint))
    known = pad_prompt_embeds(encode_prompts(tokenizer, encoder, texts))
    distances = [[(block - each).abs().max() for each in known] for clip in told for block in clip]
    nearest = [texts[int(torch.stack(row).argmin())] for row in distances]
    assert max(float(min(row)) for row in distances) < 1e-3
    return [nearest[start : start + 5] for start in range(0, len(nearest), 5)]


TEXTS = ["", "a ball", "a box", "the ball goes on", "number 2", "number 5"]


@pytest.mark.parametrize("method", [{}, {"context": "clean"}, {"timestep_sampling": "uniform"}], ids=str)
def test_each_block_of_a_clip_is_trained_under_the_prompt_in_its_middle(
    write_recipe, tables, told, checkpoint, method
):
    recipe, run = write_recipe(**tables, **method, max_train_steps=3, validation_steps=100, lr_scheduler="constant")
    run_here(TRAIN, "--config", recipe)
    found = as_texts(told, checkpoint, TEXTS)
    assert len(found) == 6  # three steps of two: an epoch
    assert sorted(found) == sorted(BLOCKS.values())
    assert np.isfinite([entry["generator_loss"] for entry in metrics(run) if "generator_loss" in entry]).all()


def test_caption_dropout_drops_a_schedule_whole(write_recipe, tables, told, checkpoint):
    recipe, _ = write_recipe(**tables, max_train_steps=9, validation_steps=100, caption_dropout=0.5)
    run_here(TRAIN, "--config", recipe)
    found = as_texts(told, checkpoint, TEXTS)
    dropped = [blocks for blocks in found if "" in blocks]
    assert 3 <= len(dropped) <= 15
    assert all(blocks == [""] * 5 for blocks in dropped)
    assert [blocks for blocks in found if len(set(blocks)) > 1]


def test_a_cache_and_a_resumed_run_see_the_same_prompts(write_recipe, tables, told, clips, tmp_path):
    """Latents in full precision; the second and third run read them, and the files are gone."""
    folder = tmp_path / "videos"
    shutil.copytree(clips / "videos", folder)
    cache = {"latents_dir": str(tmp_path / "latents"), "cache_latents": True, "latents_dtype": "fp32"}
    common = {**tables, "dataset_base_path": str(folder), "validation_steps": 100}
    runs = {}
    for name, changes in (("plain", {}), ("filling", cache)):
        recipe, runs[name] = write_recipe(name, **common, **changes)
        told.clear()
        run_here(TRAIN, "--config", recipe)
        runs[name, "told"] = list(told)
    shutil.rmtree(folder)
    folder.mkdir()
    reading = {**cache, "cache_latents": False}
    recipe, runs["reading"] = write_recipe("reading", **common, **reading)
    told.clear()
    run_here(TRAIN, "--config", recipe)
    shutil.rmtree(runs["reading"] / "checkpoint-4")
    expected = weights(runs["reading"])
    run_here(TRAIN, "--config", recipe, "--resume_from_checkpoint", "latest")
    for one, other in zip(runs["plain", "told"], runs["filling", "told"], strict=True):
        assert torch.equal(one, other)
    in_order = [runs["plain", "told"][place] for place in (*range(8), *range(4, 8))]  # the last two steps once more
    assert all(torch.equal(one, other) for one, other in zip(in_order, told, strict=True))
    of = {name: weights(runs[name]) for name in ("plain", "filling", "reading")}
    for name in expected:
        assert torch.equal(of["reading"][name], expected[name])
        assert torch.equal(of["reading"][name], of["filling"][name])
        assert_close(of["plain"][name], of["filling"][name], rtol=1e-2, atol=1e-3)


def test_a_stream_has_schedules(write_recipe, clips, told, checkpoint, tmp_path):
    lines = [
        {"video": f"{number}.mp4", "prompt": f"number {number}", "prompt_schedule": SCHEDULES[number]}
        for number in range(6)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stream = {"streaming": True, "metadata_path": str(tmp_path / "t.jsonl"), "validation_metadata_path": None}
    recipe, _ = write_recipe(**stream, lr_scheduler="constant", max_train_steps=3)
    run_here(TRAIN, "--config", recipe)
    assert sorted(as_texts(told, checkpoint, TEXTS)) == sorted(BLOCKS.values())


def test_what_a_run_validates_is_what_evaluation_measures_and_generation_writes(
    write_recipe, tables, clips, tmp_path, frames_by_path, monkeypatch
):
    recipe, run = write_recipe(**tables, max_train_steps=1, seed=3)
    run_here(TRAIN, "--config", recipe)
    validated = [frames_by_path(run / "validation" / "step-000001" / f"{number:02d}.mp4") for number in range(2)]
    flags = ["--checkpoint", run, "--seed", 3]
    run_here("generate.py", *flags, "--prompts_file", tables["validation_metadata_path"], "--output", tmp_path / "v")
    for number, video in enumerate(validated):
        assert np.array_equal(frames_by_path(tmp_path / "v" / f"{number:02d}.mp4"), video)
    plain = tmp_path / "plain.csv"
    plain.write_text("prompt\na ball\n")
    run_here("generate.py", *flags, "--prompts_file", plain, "--output", tmp_path / "plain")
    without = frames_by_path(tmp_path / "plain" / "00.mp4")
    assert np.array_equal(without[:9], validated[0][:9])  # three blocks
    assert not np.array_equal(without[9:], validated[0][9:])

    evaluation = ["--metadata_path", tables["validation_metadata_path"], "--dataset_base_path", clips / "videos"]
    evaluation += ["--lpips_net", "None", "--output_dir", tmp_path / "evaluation", "--num_base_steps", 1]
    shown, write = [], evaluate.write_videos

    def note(folder, columns, *others):
        shown.extend(columns["student"])
        return write(folder, columns, *others)

    monkeypatch.setattr(evaluate, "write_videos", note)
    run_here("evaluate.py", *flags, *evaluation)
    measured = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    logged = {key: value for entry in metrics(run) for key, value in entry.items()}
    assert measured["heldout_loss"]["loss"] == pytest.approx(logged["validation_loss"], rel=1e-4)
    assert any("have the first one alone" in note for note in measured["notes"])
    for video, expected in zip(shown, validated, strict=True):
        assert np.abs(255 * video.movedim(1, -1).numpy() - expected).max() <= 1
    assert "a ball | the ball goes on" in (tmp_path / "evaluation" / "report.html").read_text()


@pytest.mark.parametrize(("block", "is_said"), [(1, False), (5, True)])
def test_the_plan_of_a_run_says_that_clips_of_one_block_have_one_prompt(
    write_recipe, tables, told, checkpoint, capsys, block, is_said
):
    recipe, _ = write_recipe(**tables, num_frame_per_block=block, max_train_steps=3, validation_steps=0)
    run_here(TRAIN, "--config", recipe)
    assert (
        "these clips are one block, and have the prompt in their middle alone" in capsys.readouterr().out
    ) == is_said
    assert any(len(set(blocks)) > 1 for blocks in as_texts(told, checkpoint, TEXTS)) != is_said


# --- generation ------------------------------------------------------------------------------------------------------

SIZE = ["--num_frames", 17, "--height", 32, "--width", 48, "--num_frame_per_block", 1]


@pytest.fixture
def generate(checkpoint, tmp_path, frames_by_path):
    def run(*flags):
        output = tmp_path / "video.mp4"
        run_here("generate.py", "--checkpoint", checkpoint, "--prompt", "a ball", *SIZE, "--output", output, *flags)
        return frames_by_path(output)

    return run


def test_prompt_at_is_a_flag_that_repeats_and_a_list_of_pairs_in_a_recipe(generate, tmp_path):
    plain = generate()
    again = generate("--prompt_at", 0.5, "a box", "--seed", 0, "--prompt_at", 0.9, "- it rolls")
    at_once = generate("--prompt_at", 0.5, "a box", 0.9, "- it rolls")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"prompt_at": [[0.5, "a box"], [0.9, "- it rolls"]]}))
    of_recipe = generate("--config", tmp_path / "recipe.yaml")
    assert np.array_equal(again, at_once)
    assert np.array_equal(again, of_recipe)
    assert np.array_equal(again[:9], plain[:9])
    assert (again != plain).reshape(17, -1).any(axis=1)[9:].all()
    shorter = generate("--prompt_at", 0.5, "a box")
    assert np.array_equal(shorter[:13], again[:13])
    assert not np.array_equal(shorter[13:], again[13:])


def test_recache_changes_the_blocks_after_the_change_and_no_earlier_ones(generate):
    switched, recached = (generate("--prompt_at", 0.5, "a box", *flags) for flags in ([], ["--recache"]))
    assert np.array_equal(switched[:9], recached[:9])
    assert not np.array_equal(switched[9:], recached[9:])
    assert np.array_equal(generate(), generate("--recache"))


def test_at_another_frame_rate_the_seconds_are_those_of_the_file(generate):
    """Half as many frames a second: what is at 1 s there is at 0.5 s here."""
    assert np.array_equal(
        generate("--prompt_at", 1.0, "a box", "--frame_rate", 8), generate("--prompt_at", 0.5, "a box")
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt_at", 2, "b"], "must begin before the video ends, which is at 1.062 s, got 2 s"),
        (["--prompt_at", -1, "b"], "each of prompt_at must be above 0, got -1"),
        (["--prompt_at", 0.5, "b", 0.2, "c"], "must rise, got 0, 0.5, 0.2"),
        (["--prompt_at", 0.5, " "], "must not be empty, but that at 0.5 s is"),
        (["--prompt_at", 0.5], "prompt_at must be pairs, got '0.5'"),
        (["--prompt_at", 0.5, "b", "--num_frame_per_block", 5], "but the video is one block of 5 latent frames"),
    ],
)
def test_schedules_that_cannot_be_followed_end_with_one_line(generate, flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        generate(*flags)
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line


def test_prompt_at_goes_on_from_a_prompt(checkpoint, capsys):
    with pytest.raises(SystemExit):
        run_here("generate.py", "--checkpoint", checkpoint, "--prompts_file", "a.txt", "--prompt_at", 1, "b")
    assert "of a prompts_file, use a column prompt_schedule" in capsys.readouterr().err


CALL = {"num_frames": 17, "height": 32, "width": 48, "denoising_step_list": (1000, 500), "output_type": "latent"}


@pytest.fixture
def pipeline(checkpoint):
    pipeline = CausalWanPipeline.from_pretrained(checkpoint, num_frame_per_block=1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, prompt, changes=None, **settings):
    return pipeline(
        prompt,
        prompt_schedule=changes,
        generator=[torch.Generator().manual_seed(seed) for seed in range(settings.pop("count", 1))],
        **{**CALL, **settings},
    ).frames


@pytest.mark.parametrize(
    "guidance", [{}, {"guidance_scale": 3.0, "negative_prompt": "a fish"}], ids=["plain", "guided"]
)
def test_a_call_follows_a_schedule_a_function_and_a_callback_alike(pipeline, guidance):
    at_half = call(pipeline, "a ball", [(0.5, "a box")], **guidance)
    assert torch.equal(at_half, call(pipeline, None, [(0, "a ball"), (0.5, "a box")], **guidance))
    asked = []

    def ask(seconds):
        asked.append(seconds)
        return "a box" if seconds >= 0.5 else None

    assert_close(call(pipeline, "a ball", ask, **guidance), at_half, rtol=1e-4, atol=1e-5)
    assert asked == [0, 3 / 16, 7 / 16, 11 / 16, 15 / 16]
    plain = call(pipeline, "a ball", **guidance)
    assert torch.equal(plain[:, :, :3], at_half[:, :, :3])
    assert not torch.equal(plain[:, :, 3:], at_half[:, :, 3:])


def test_schedules_are_one_for_all_or_one_for_each_prompt(pipeline):
    both = call(pipeline, ["a ball", "a cat"], [[(0.5, "a box")], [(0.2, "a dog"), (0.9, "a fish")]], count=2)
    for number, (prompt, changes) in enumerate(
        [("a ball", [(0.5, "a box")]), ("a cat", [(0.2, "a dog"), (0.9, "a fish")])]
    ):
        noise = pipeline.draw_noise(1, 17, 32, 48, (1000, 500), generator=torch.Generator().manual_seed(number))
        alone = pipeline(prompt, prompt_schedule=changes, noise=noise, **CALL).frames
        assert_close(both[number : number + 1], alone, rtol=1e-4, atol=1e-5)
    twice = call(pipeline, "a ball", [(0.5, "a box")], count=2, num_videos_per_prompt=2)
    assert_close(twice[:1], both[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one prompt_schedule, or one for each of 3 prompts, got 2"):
        call(pipeline, ["a", "b", "c"], [[(0.5, "d")], [(0.5, "e")]])
    with pytest.raises(ValueError, match="not with prompt_embeds"):
        pipeline(prompt_embeds=torch.zeros(1, 512, 16), prompt_schedule=[(0.5, "a")], **CALL)


def test_a_video_without_end_follows_a_schedule_and_a_prompt_that_no_block_sees_is_said(pipeline, caplog):
    endless = CausalWanPipeline.from_pretrained(
        pipeline.config._name_or_path, num_frame_per_block=1, local_attn_size=3, transformer=pipeline.transformer
    )
    endless.set_progress_bar_config(disable=True)
    settings = {**CALL, "num_frames": None}
    changes = [(0.5, "a box"), (0.51, "a cat"), (0.9, "a dog")]
    blocks = endless.stream("a ball", prompt_schedule=changes, generator=torch.Generator().manual_seed(0), **settings)
    found = torch.cat([block for _, block in zip(range(8), blocks, strict=False)], dim=2)
    assert "the prompt 'a box' is not seen" in caplog.text
    blocks = endless.stream(
        "a ball",
        prompt_schedule=lambda seconds: "a ball" if seconds < 0.5 else "a cat" if seconds < 0.9 else "a dog",
        generator=torch.Generator().manual_seed(0),
        **settings,
    )
    expected = torch.cat([block for _, block in zip(range(8), blocks, strict=False)], dim=2)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- what takes no schedules, or checks them -------------------------------------------------------------------------


def test_trajectories_are_refused_for_prompts_that_change(write_recipe, tables, tmp_path, capsys):
    recipe, _ = write_recipe(**tables)
    with pytest.raises(SystemExit) as error:
        run_here("precompute_trajectories.py", "--config", recipe, "--trajectories_dir", tmp_path / "t")
    assert error.value.code == 2
    assert "a trajectory has one prompt, but the table has 4 along which it changes, first 0 s: a ball" in (
        capsys.readouterr().err
    )


def test_the_check_of_a_data_set_counts_schedules_and_names_rows_with_bad_ones(clips, tmp_path, capsys):
    rows = [
        ("0.mp4", "a", json.dumps(SCHEDULES[0])),
        ("1.mp4", "b", json.dumps([[0, "a"], [1.2, "b"]])),  # the clip ends at 1.0625 s
        ("2.mp4", "c", "[[0, 'a']]"),
        ("3.mp4", "d", ""),
    ]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt", "prompt_schedule"), *rows])
    flags = ["--metadata_path", tmp_path / "t.csv", "--dataset_base_path", clips / "videos", "--num_frames", 17]
    flags += ["--height", 32, "--width", 48, "--num_processes", 0, "--output_dir", tmp_path / "check"]
    run_here("check_dataset.py", *flags)
    said = capsys.readouterr().out
    assert "prompts change along the clips of 2 rows" in said
    assert "2 of 4 rows can be used, 2 are bad" in said
    with (tmp_path / "check" / "bad_rows.csv").open(newline="") as file:
        bad = {row["row"]: row["reason"] for row in csv.DictReader(file)}
    assert bad.keys() == {"2", "3"}
    assert "before the video ends, which is at 1.062 s, got 1.2 s" in bad["2"]
    assert "must be JSON" in bad["3"]
    assert "clips along which the prompt changes" in (tmp_path / "check" / "dataset_report.html").read_text()
    # A schedule that is corrected is checked again, though the file is the same.
    text = (tmp_path / "t.csv").read_text().replace("1.2", "0.9")
    (tmp_path / "t.csv").write_text(text)
    run_here("check_dataset.py", *flags)
    assert "3 of 4 rows can be used, 1 are bad" in capsys.readouterr().out


# --- processes -------------------------------------------------------------------------------------------------------


def test_two_processes_that_share_each_clip_and_shard_the_weights_learn_what_one_does(write_recipe, tables):
    """FSDP2 with context parallelism: the gradients of all prompts are there before those of weights are summed."""
    settings = {**tables, "num_frame_per_block": 2, "independent_first_frame": True, "context": "clean"}
    settings |= {"validation_steps": 2, "mixed_precision": "no", "max_grad_norm": 0.01, "adam_epsilon": 1e-4}
    path, alone = write_recipe("alone", **settings)
    run_here(TRAIN, "--config", path)
    path, together = write_recipe("together", **settings)
    sizes = {"dp_shard_size": 1, "cp_size": 2}
    flags = [f"--parallelism_config_{name}={size}" for name, size in sizes.items()]
    launch(TRAIN, path, strategy="fsdp2_context_parallel", num_processes=2, launch_flags=flags)
    for name in ("generator_loss", "generator_grad_norm", "validation_loss"):
        expected = [entry[name] for entry in metrics(alone) if name in entry]
        assert [entry[name] for entry in metrics(together) if name in entry] == pytest.approx(expected, rel=1e-3)
    expected, learned = flat(result(alone)), flat(result(together))
    assert (learned - expected).norm() < 1e-3 * expected.norm()
