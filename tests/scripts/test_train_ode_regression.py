"""precompute_trajectories.py and train_ode_regression.py as users run them, on a tiny WAN."""

import json
import shutil
import time

import pytest
import torch
import yaml
from conftest import flip_last_bit, launch, run_here, run_python, run_shell_script, start_python
from run_outputs import NEEDS_DEEPSPEED, flat, metrics, result, weights

import precompute_trajectories
import train_ode_regression
from causal_wan.cache.tensor_cache import TensorCache
from causal_wan.cache.trajectories import FOLDER, TrajectoryName
from causal_wan.config.parsing import parse_config
from causal_wan.results.model_card import DATA_SUMMARY_NAME
from causal_wan.results.run_record import find_run
from causal_wan.results.student import resolve_settings
from causal_wan.results.uploads import stage_result
from causal_wan.training.stopping import EXIT_STOPPED


PRECOMPUTE, TRAINING = "precompute_trajectories.py", "train_ode_regression.py"
FEW_STEPS = ("--num_inference_steps", 6, "--guidance_scale", 2)


def entries(folder):
    """Key -> tensor of all trajectories."""
    cache = TensorCache(folder / FOLDER)
    return {key: cache.read(key)[0] for key in cache.in_order()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture(scope="module")
def recipe_path(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": str(folder / "run")}))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def filled(recipe_path, tmp_path_factory):
    """Two trajectories a prompt, made by one process."""
    folder = tmp_path_factory.mktemp("filled")
    flags = (*FEW_STEPS, "--num_trajectories_per_prompt", 2, "--trajectories_dir", folder)
    launch(PRECOMPUTE, recipe_path, *flags)
    return folder


def test_trajectories_have_the_levels_and_the_size_that_were_asked_for(filled):
    cache = TensorCache(filled / FOLDER)
    assert len(cache) == 12
    (settings,) = cache.settings
    assert settings["levels"] == [1000, 757, 522]
    assert settings["blocks"] == [5]
    for tensor in entries(filled).values():
        assert tensor.shape == (4, 16, 5, 4, 6)
        assert tensor.dtype == torch.bfloat16
        assert torch.isfinite(tensor).all()


def test_the_first_latents_of_a_trajectory_are_noise_of_its_own(filled):
    cache = TensorCache(filled / FOLDER)
    (settings,) = cache.settings
    names = {(facts["prompt"], facts["number"]) for _, facts in cache.facts()}
    assert len(names) == 12
    for prompt, number in names:
        name = TrajectoryName(prompt, 0, number)
        noise = torch.randn(16, 5, 4, 6, generator=name.generator()).bfloat16()
        assert torch.equal(cache.read(name.key(settings))[0][0], noise)


def test_a_second_run_samples_nothing_and_another_setting_samples_anew(filled, recipe_path, tmp_path, capsys):
    folder = tmp_path / "trajectories"
    shutil.copytree(filled, folder)
    before, flags = entries(folder), ("--config", recipe_path, "--trajectories_dir", folder, "--dry_run")
    for changes, missing in (
        ((), "missing     0 of 12"),
        (("--num_trajectories_per_prompt", 3), "missing     6 of 18"),
        (("--seed", 1), "missing     12 of 12"),
        (("--num_inference_steps", 7), "missing     12 of 12"),
        (("--guidance_scale", 3), "missing     12 of 12"),
        (("--negative_prompt", "blurry"), "missing     12 of 12"),
        (("--timestep_shift", 2), "missing     12 of 12"),
        (("--denoising_step_list", 1000, 500), "missing     12 of 12"),
        (("--num_frames", 9), "missing     12 of 12"),
        (("--mixed_precision", "bf16"), "missing     12 of 12"),
        (("--latents_dtype", "fp32"), "missing     12 of 12"),
    ):
        run_here(PRECOMPUTE, *flags, *FEW_STEPS, "--num_trajectories_per_prompt", 2, *changes)
        assert missing in capsys.readouterr().out, changes
    run_here(PRECOMPUTE, *flags[:-1], *FEW_STEPS, "--num_trajectories_per_prompt", 2)
    assert "0 trajectories sampled" in capsys.readouterr().out
    assert same(entries(folder), before)


def test_two_processes_make_what_one_makes(filled, recipe_path, tmp_path):
    folder = tmp_path / "trajectories"
    flags = (*FEW_STEPS, "--num_trajectories_per_prompt", 2, "--trajectories_dir", folder)
    launch(PRECOMPUTE, recipe_path, *flags, num_processes=2)
    assert same(entries(folder), entries(filled))


def test_a_damaged_trajectory_is_made_anew(filled, recipe_path, tmp_path, capsys):
    folder = tmp_path / "trajectories"
    shutil.copytree(filled, folder)
    flip_last_bit(min((folder / FOLDER).glob("*.safetensors")))  # there are several where sampling took long
    flags = (*FEW_STEPS, "--num_trajectories_per_prompt", 2, "--trajectories_dir", folder, "--verify")
    run_here(PRECOMPUTE, "--config", recipe_path, *flags)
    shown = capsys.readouterr().out
    assert "1 of 12 entries" in shown
    assert "1 trajectories sampled" in shown
    assert same(entries(folder), entries(filled))


def test_an_interrupted_run_goes_on_where_it_was(filled, recipe_path, tmp_path):
    folder = tmp_path / "trajectories"
    flags = ["--config", recipe_path, "--trajectories_dir", folder, *FEW_STEPS, "--num_trajectories_per_prompt", 2]
    slow = [PRECOMPUTE, *flags, "--num_inference_steps", 100]
    cpu = {"ACCELERATE_USE_CPU": "true"}
    with start_python(*slow, env=cpu) as forks:
        deadline = time.monotonic() + 120
        while not list((folder / FOLDER).glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        forks.processes[0].terminate()
        assert forks.finish().returncode == EXIT_STOPPED
    done = entries(folder)
    assert 0 < len(done) < 12
    shown = run_python(*slow, env=cpu).stdout
    assert f"missing     {12 - len(done)} of 12 trajectories" in shown
    assert f"{12 - len(done)} trajectories sampled" in shown
    after = entries(folder)
    assert len(after) == 12
    assert all(torch.equal(after[key], tensor) for key, tensor in done.items())


def test_prompts_come_from_a_file_in_the_place_of_a_table(recipe_path, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a ball\n\na box\na ball\n")
    flags = ("--prompts_file", tmp_path / "prompts.txt", "--trajectories_dir", tmp_path / "x", "--dry_run")
    run_here(PRECOMPUTE, "--config", recipe_path, *flags)
    assert "missing     2 of 2 trajectories" in capsys.readouterr().out


def test_a_bidirectional_teacher_of_a_causal_student_is_told_of(recipe_path, tmp_path, capsys):
    flags = ("--config", recipe_path, "--trajectories_dir", tmp_path / "x", "--dry_run")
    run_here(PRECOMPUTE, *flags)
    assert "the teacher is bidirectional and the student causal" in capsys.readouterr().out
    run_here(PRECOMPUTE, *flags, "--generator_task", "bidirectional_video")
    assert "note" not in capsys.readouterr().out


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe, filled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    settings = {**recipe, "output_dir": str(folder / "run"), "trajectories_dir": str(filled), "max_train_steps": 6}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    launch(TRAINING, folder / "recipe.yaml")
    return folder / "recipe.yaml", folder / "run"


def test_a_run_learns_logs_and_validates_as_video_regression_does(finished):
    _, output_dir = finished
    logged = metrics(output_dir)
    everything = set().union(*logged)
    assert [entry["step"] for entry in logged if "generator_loss" in entry] == [1, 2, 3, 4, 5, 6]
    for level in (1000, 757, 522):
        assert f"loss_at_time_{level}" in everything
        assert f"validation_loss_at_time_{level}" in everything
    assert len(list((output_dir / "validation").rglob("*.mp4"))) >= 2
    assert json.loads((output_dir / DATA_SUMMARY_NAME).read_text())["trajectories"] == 12


def test_a_student_of_trajectories_keeps_its_noise_from_step_to_step(finished):
    _, output_dir = finished
    settings = resolve_settings(find_run(str(output_dir)), student=str(output_dir))
    assert (settings.timesteps, settings.sampler) == ([1000, 757, 522, 0], "euler")


def test_a_resumed_run_ends_with_the_same_weights(finished, write_recipe, filled):
    _, whole = finished
    changes = {"trajectories_dir": str(filled), "max_train_steps": 6}
    path, output_dir = write_recipe("resumed", **changes, resume_from_checkpoint="latest")
    output_dir.mkdir()
    shutil.copytree(whole / "checkpoint-2", output_dir / "checkpoint-2")
    launch(TRAINING, path)
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(output_dir).items())


@pytest.mark.parametrize(
    ("strategy", "lora_rank"),
    [
        (None, 0),
        ("fsdp2", 4),
        pytest.param("fsdp2", 0, marks=pytest.mark.slow),
        pytest.param("zero2", 0, marks=[pytest.mark.slow, NEEDS_DEEPSPEED]),
        pytest.param("zero3", 4, marks=[pytest.mark.slow, NEEDS_DEEPSPEED]),
    ],
    ids=["ddp", "fsdp2-lora", "fsdp2", "zero2", "zero3-lora"],
)
def test_two_processes_learn_what_one_learns(write_recipe, filled, strategy, lora_rank):
    changes = {"trajectories_dir": str(filled), "max_train_steps": 6, "lora_rank": lora_rank, "mixed_precision": "no"}
    path, alone = write_recipe("one", train_batch_size=2, **changes)
    run_here(TRAINING, "--config", path)
    path, together = write_recipe("two", train_batch_size=1, **changes)
    launch(TRAINING, path, num_processes=2, strategy=strategy)
    expected, learned = flat(result(alone)), flat(result(together))
    assert (learned - expected).norm() < 1e-3 * expected.norm()


def test_a_run_without_held_out_clips_loads_no_encoder(write_recipe, filled, monkeypatch):
    monkeypatch.delattr("causal_wan.runs.parts.load_vae")
    monkeypatch.delattr("causal_wan.runs.prompt_embeddings.load_text_encoder")
    changes = {"trajectories_dir": str(filled), "max_train_steps": 1, "validation_metadata_path": None}
    path, output_dir = write_recipe(**changes)
    run_here(TRAINING, "--config", path)
    assert (output_dir / "transformer").is_dir()


def test_a_damaged_trajectory_is_replaced_and_counted(write_recipe, filled, tmp_path, capsys):
    folder = tmp_path / "trajectories"
    shutil.copytree(filled, folder)
    flip_last_bit(min((folder / FOLDER).glob("*.safetensors")))  # there are several where sampling took long
    changes = {"trajectories_dir": str(folder), "max_train_steps": 6, "validation_metadata_path": None}
    path, output_dir = write_recipe(**changes)
    run_here(TRAINING, "--config", path)
    assert sum(entry.get("num_bad_samples", 0) for entry in metrics(output_dir)) == 1
    assert "is damaged" in "".join(capsys.readouterr())


def test_neither_tables_nor_videos_are_needed(write_recipe, filled):
    changes = {"trajectories_dir": str(filled), "max_train_steps": 1, "validation_metadata_path": None}
    path, output_dir = write_recipe(**changes)
    settings = yaml.safe_load(path.read_text())
    del settings["metadata_path"], settings["dataset_base_path"]
    path.write_text(yaml.safe_dump(settings))
    run_here(TRAINING, "--config", path)
    assert (output_dir / "transformer").is_dir()


def test_the_loss_on_held_out_clips_is_what_evaluation_finds(finished, clips, tmp_path):
    _, output_dir = finished
    (logged,) = [entry for entry in metrics(output_dir) if "validation_loss" in entry and entry["step"] == 6]
    table = ("--metadata_path", clips / "heldout.csv", "--dataset_base_path", clips / "videos")
    run_here("evaluate.py", "--checkpoint", output_dir, *table, "--lpips_net", None, "--output_dir", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["heldout_loss"]["loss"]
    assert found == pytest.approx(logged["validation_loss"], rel=1e-4)


def test_the_card_of_the_result_says_what_it_was_trained_on_and_names_no_folder(finished, filled):
    _, output_dir = finished
    with stage_result(output_dir, "me/ode") as staged:
        card, config = ((staged / name).read_text() for name in ("README.md", "config.yaml"))
    assert "ODE regression: trajectories of a teacher" in card
    assert "ode-regression" in card
    assert "Video regression" not in card
    assert "12 trajectories" in card
    assert str(filled) not in card + config


def test_the_recipe_of_an_ode_run_trains_on_videos_and_its_result_generates_and_goes_on(finished, tmp_path):
    _, output_dir = finished
    settings = yaml.safe_load((output_dir / "config.yaml").read_text())
    settings |= {"output_dir": str(tmp_path / "videos"), "generator_ckpt": str(output_dir), "max_train_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    run_here("train_video_regression.py", "--config", tmp_path / "recipe.yaml")
    assert (tmp_path / "videos" / "transformer").is_dir()
    run_here("generate.py", "--checkpoint", output_dir, "--prompt", "a ball", "--output", tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").is_file()


def test_a_run_is_a_causal_teacher_for_a_student_of_the_same_blocks(finished, recipe_path, tmp_path, capsys):
    _, teacher = finished
    folder = tmp_path / "trajectories"
    flags = ("--teacher", teacher, "--trajectories_dir", folder, *FEW_STEPS)
    run_here(PRECOMPUTE, "--config", recipe_path, *flags)
    assert "causal, 5 blocks" in capsys.readouterr().out
    assert TensorCache(folder / FOLDER).settings[0]["blocks"] == [1] * 5
    flags = ("--config", recipe_path, "--trajectories_dir", folder, "--max_train_steps", 1)
    run_here(TRAINING, *flags, "--output_dir", tmp_path / "run", "--context", "clean")
    assert (tmp_path / "run" / "transformer").is_dir()
    for script, more in ((TRAINING, ("--output_dir", tmp_path / "other")), (PRECOMPUTE, ("--teacher", teacher))):
        with pytest.raises(SystemExit):
            run_here(script, *flags[:4], *more, "--num_frame_per_block", 5)
        assert "a causal teacher's blocks must be the student's" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_here(PRECOMPUTE, *flags[:4], "--teacher", teacher, "--max_sequence_length", 64)
    assert (
        "max_sequence_length must be the teacher's, got 64; use --max_sequence_length 512" in capsys.readouterr().err
    )


def test_lora_runs_teach_too_and_are_another_teacher_than_their_base(write_recipe, recipe_path, tmp_path):
    path, teacher = write_recipe("lora", lora_rank=2, max_train_steps=1, validation_metadata_path=None)
    run_here("train_video_regression.py", "--config", path)
    found = {}
    for name in (None, teacher):
        folder = tmp_path / f"of-{name is None}"
        more = ("--teacher", name) if name else ()
        run_here(PRECOMPUTE, "--config", recipe_path, "--trajectories_dir", folder, *FEW_STEPS, *more)
        found[name] = TensorCache(folder / FOLDER).settings[0]["teacher"]
    assert found[None] != found[teacher]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--denoising_step_list", "1000", "600", "0"], "levels is [1000.0, 757.0, 522.0] in the cache"),
        (["--height", "48"], "height is 32 in the cache, 48 in this run"),
        (["--num_frames", "9"], "num_frames is 17 in the cache, 9 in this run"),
        (["--trajectories_dir", "nowhere"], "nowhere/trajectories has none that fit (there are none)"),
        (["--timestep_sampling", "uniform"], "trajectories are kept at the levels of denoising_step_list"),
        (["--frames_schedule", "0:9,2:17"], "trajectories have one size and length"),
    ],
)
def test_what_the_trajectories_do_not_hold_is_refused_with_what_differs(filled, recipe_path, flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        argv = ["--config", str(recipe_path), "--trajectories_dir", str(filled), "--dry_run", *flags]
        train_ode_regression.main(parse_config(train_ode_regression.Config, argv))
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_a_shorter_step_list_finds_its_levels_among_those_that_are_there(filled, recipe_path, capsys):
    flags = ("--trajectories_dir", filled, "--denoising_step_list", 1000, 522, "--dry_run")
    run_here(TRAINING, "--config", recipe_path, *flags)
    assert "12 trajectories of 6 prompts" in capsys.readouterr().out


def test_two_kinds_of_trajectories_in_a_folder_are_told_apart_by_name(filled, recipe_path, tmp_path, capsys):
    folder = tmp_path / "trajectories"
    shutil.copytree(filled, folder)
    run_here(PRECOMPUTE, "--config", recipe_path, "--trajectories_dir", folder, *FEW_STEPS, "--guidance_scale", 3)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_here(TRAINING, "--config", recipe_path, "--trajectories_dir", folder, "--dry_run")
    error = capsys.readouterr().err
    assert "must hold one kind of trajectories" in error
    assert "has 2: guidance_scale is 2.0 and 3.0. Keep" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_inference_steps", "2"], "num_inference_steps must be enough"),
        (["--num_trajectories_per_prompt", "0"], "num_trajectories_per_prompt must be 1 or more, got 0"),
        (["--timestep_sampling", "uniform"], "trajectories are kept at the levels of denoising_step_list"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--streaming"], "the prompts of streams are not known beforehand; list them in a --prompts_file"),
        (["--frames_schedule", "0:9,2:17"], "trajectories have one size and length"),
        (["--teacher", "tests"], "which has neither"),
    ],
)
def test_bad_settings_end_with_one_message_before_anything_is_sampled(recipe_path, tmp_path, flags, message, capsys):
    argv = ["--config", str(recipe_path), "--trajectories_dir", str(tmp_path / "x"), *flags]
    with pytest.raises(SystemExit) as exit_info:
        also_known = precompute_trajectories.TRAINING_SETTINGS
        precompute_trajectories.main(parse_config(precompute_trajectories.Config, argv, also_known=also_known))
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())


def test_a_tiny_student_overfits_one_pair(write_recipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("a ball\n")
    path, output_dir = write_recipe(
        max_train_steps=150,
        train_batch_size=4,
        learning_rate=0.004,
        adam_beta2=0.95,
        validation_metadata_path=None,
        validation_steps=1000,
        checkpointing_steps=1000,
        logging_steps=10,
    )
    pairs = ("--trajectories_dir", tmp_path / "pairs")
    run_here(PRECOMPUTE, "--config", path, *pairs, "--prompts_file", tmp_path / "prompts.txt", *FEW_STEPS)
    run_here(TRAINING, "--config", path, *pairs)
    losses = [entry["generator_loss"] for entry in metrics(output_dir) if "generator_loss" in entry]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_ladder_climbs_all_rungs_in_one_command_and_again_without_work(tmp_path):
    env = {
        "OUTPUT_DIR": str(tmp_path),
        "MAX_TRAIN_STEPS": "2",
        "NUM_INFERENCE_STEPS": "4",
        "NUM_TRAJECTORIES_PER_PROMPT": "1",
        "MATCHING_STEPS": "2",
        "MATCHING_FLAGS": "--learning_rate 1e-4 --critic_learning_rate 4e-4 --critic_warmup_steps 1 --student_every 1",
        "DATASET_FLAGS": "--kinds bird --num_clips 8 --num_targets 2 --num_heldout 1",
    }
    flags = ("--train_batch_size", 2, "--validation_steps", 100)
    shown = run_shell_script(["examples/ladder.sh", *flags], env=env).stdout
    entries = json.loads((tmp_path / "comparison.json").read_text())
    rungs = [("video-regression, renoise", "3"), ("teacher, euler", "3"), ("teacher, euler", "4")]
    rungs += [("student, renoise", "3"), ("student, euler", "3"), ("bidirectional, euler", "4")]
    rungs += [("matched, renoise", "3"), ("matched, euler", "3")]
    assert [(entry["method"], entry["steps"]) for entry in entries[2:]] == rungs
    assert "causal, 7 blocks" in shown
    assert "0 trajectories sampled" in run_shell_script(["examples/ladder.sh", *flags], env=env).stdout
