"""train_dmd.py as users run it, on a tiny WAN."""

import json
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, launch, run_here
from diffusers import WanTransformer3DModel
from run_outputs import flat, metrics, result
from safetensors.torch import load_file

import train_dmd
from causal_wan.config.parsing import parse_config
from causal_wan.results.model_card import DATA_SUMMARY_NAME
from causal_wan.results.run_record import find_run


SCRIPT = "train_dmd.py"
SLOW = pytest.mark.slow
SETTINGS = {
    "critic_learning_rate": 0.02,
    "critic_warmup_steps": 1,
    "student_every": 2,
    "max_train_steps": 6,
    "lr_scheduler": "constant",
    "validation_steps": 6,
}
ADVERSARIAL = {"adversarial_weight": 10.0, "adversarial_warmup_steps": 0, "adversarial_learning_rate": 0.01}


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"a drawing of thing {number}\n" for number in range(5)))
    return path


@pytest.fixture(scope="module")
def train(recipe, tmp_path_factory):
    """Runs the recipe with changes, each way once for all tests, and returns its path and the output folder."""
    done = {}

    def run(*, num_processes=1, strategy=None, **changes):
        key = (num_processes, strategy, *sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("dmd")
            path, output_dir = folder / "recipe.yaml", folder / "run"
            path.write_text(yaml.safe_dump({**recipe, **SETTINGS, "output_dir": str(output_dir), **changes}))
            launch(SCRIPT, path, num_processes=num_processes, strategy=strategy)
            done[key] = path, output_dir
        return done[key]

    return run


@pytest.fixture(scope="module")
def regression_lora(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({**recipe, "output_dir": str(folder / "run"), "lora_rank": 4, "validation_steps": 0})
    )
    launch("train_video_regression.py", folder / "recipe.yaml")
    return folder / "run"


@pytest.fixture(scope="module")
def large_teacher(recipe, tmp_path_factory):
    """A WAN with a layer more than the recipe's."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(recipe["pretrained_model_name_or_path"], folder, dirs_exist_ok=True)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    torch.manual_seed(1)
    WanTransformer3DModel.from_config({**config, "num_layers": config["num_layers"] + 1}).save_pretrained(
        folder / "transformer"
    )
    return folder


def by_role(folder, name):
    return [load_file(folder / f"{name}{suffix}.safetensors") for suffix in ("", "_1")]


def entries(output_dir):
    return [entry for entry in metrics(output_dir) if "lr" in entry]


def test_the_critic_learns_in_every_step_and_the_student_in_its_turns(train):
    _, output_dir = train()
    logged = entries(output_dir)
    assert ["generator_loss" in entry for entry in logged] == [False, True, False, True, False, True]
    assert all("critic_loss" in entry and entry["critic_grad_norm"] > 0 for entry in logged)
    assert [entry["critic_lr"] for entry in logged] == pytest.approx([0.02] * 6)
    turn = logged[1]
    assert turn["matching_gradient_norm"] > 0
    assert turn["matching_normalizer"] > 0
    shares = [turn[f"exit_share_at_time_{timestep}"] for timestep in (1000, 757, 522)]
    assert sorted(shares) == [0, 0, 1]
    assert any(name.startswith("critic_loss_at_time_") for name in turn)


def test_it_validates_by_samples_and_by_the_loss_of_regression(train):
    _, output_dir = train()
    assert len(list((output_dir / "validation" / "step-000006").glob("*.mp4"))) == 2
    (validation,) = (entry for entry in metrics(output_dir) if "validation_loss" in entry)
    assert validation["validation_loss_at_time_1000"] > 0
    assert all(validation[f"sample_{name}"] > 0 for name in ("sharpness", "motion", "diversity"))


@pytest.mark.slow
def test_turns_leave_the_other_as_it_is_to_the_last_bit(train):
    """Checkpoint 2 comes after a turn of both, 3 after one of the critic alone."""
    _, output_dir = train(checkpointing_steps=1)
    (student_1, critic_1), (student_2, critic_2), (student_3, critic_3) = (
        by_role(output_dir / f"checkpoint-{step}", "model") for step in (1, 2, 3)
    )
    assert not torch.equal(flat(student_1), flat(student_2))
    assert torch.equal(flat(student_2), flat(student_3))
    assert not torch.equal(flat(critic_1), flat(critic_2))
    assert not torch.equal(flat(critic_2), flat(critic_3))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"use_ema": True}, id="all-weights"),
        pytest.param({"lora_rank": 4}, id="lora"),
        pytest.param(ADVERSARIAL, id="discriminator", marks=SLOW),
    ],
)
@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)]
)
def test_a_run_goes_on_to_the_last_bit_from_every_phase_of_its_turns(train, tmp_path, step, changes):
    path, output_dir = train(checkpointing_steps=1, **changes)
    copy = tmp_path / "run"
    shutil.copytree(
        output_dir,
        copy,
        ignore=lambda folder, names: (
            [name for name in names if name.startswith("checkpoint-") and name != f"checkpoint-{step}"]
            if folder == str(output_dir)
            else []
        ),
    )
    flags = ("--output_dir", copy, "--resume_from_checkpoint", "latest", "--checkpointing_steps", 10)
    run_here(SCRIPT, "--config", path, *flags)
    assert torch.equal(flat(result(copy)), flat(result(output_dir)))
    assert [entry for entry in metrics(copy) if "lr" in entry] == entries(output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_two_passes_of_one_process_learn_what_two_processes_do(train, lora_rank):
    common = {"train_batch_size": 1, "lora_rank": lora_rank, "max_grad_norm": 0.01, "adam_epsilon": 1e-4}
    _, one = train(gradient_accumulation_steps=2, **common)
    _, two = train(num_processes=2, **common)
    torch.testing.assert_close(flat(result(one)), flat(result(two)), rtol=1e-3, atol=2e-5)
    for mine, other in zip(entries(one), entries(two), strict=True):
        assert mine["critic_loss"] == pytest.approx(other["critic_loss"], rel=1e-3)
        assert mine.get("generator_grad_norm", 0) == pytest.approx(other.get("generator_grad_norm", 0), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_shards_learn_what_one_process_does(train, lora_rank):
    common = {"train_batch_size": 1, "lora_rank": lora_rank, "max_grad_norm": 0.01, "adam_epsilon": 1e-4}
    common |= {"mixed_precision": "no"}
    _, one = train(gradient_accumulation_steps=2, **common)
    _, two = train(num_processes=2, strategy="fsdp2", **common)
    torch.testing.assert_close(flat(result(one)), flat(result(two)), rtol=1e-3, atol=2e-5)
    for mine, other in zip(entries(one), entries(two), strict=True):
        assert mine["critic_loss"] == pytest.approx(other["critic_loss"], rel=1e-3)


def test_deepspeed_is_refused_before_anything_is_loaded(write_recipe):
    path, _ = write_recipe(**SETTINGS)
    done = launch(SCRIPT, path, num_processes=2, strategy="zero2", check=False)
    assert done.returncode != 0
    assert "DeepSpeed trains one model in a run, but this one trains 2; launch with" in done.stderr
    assert "steps:" not in done.stderr


# --- who takes part --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_lora_goes_on_and_its_result_is_a_lora_of_the_same_base(train, regression_lora):
    _, output_dir = train(lora_rank=4, student_lora=str(regression_lora), learning_rate=1e-6, max_train_steps=2)
    before, after = result(regression_lora), result(output_dir)
    assert before.keys() == after.keys()
    torch.testing.assert_close(flat(before), flat(after), rtol=0, atol=1e-5)
    assert not torch.equal(flat(before), flat(after))
    assert find_run(str(output_dir)).has_lora


def test_a_lora_of_another_rank_is_refused_with_its_own(write_recipe, regression_lora, capsys):
    path, _ = write_recipe(**SETTINGS, lora_rank=8, student_lora=str(regression_lora))
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path)
    assert "lora_rank must be that of student_lora, 4, got 8; give --lora_rank 4." in capsys.readouterr().err


@pytest.mark.slow
def test_a_critic_starts_as_its_teacher_is_which_may_be_a_lora(train, regression_lora):
    """A critic that is the teacher, without guidance, moves nothing: the student's first gradient is zero."""
    settings = {"teacher": str(regression_lora), "teacher_guidance_scale": 1.0, "critic_warmup_steps": 0}
    for lora_rank in (0, 4):
        changes = {**settings, "lora_rank": lora_rank, "max_train_steps": 3, "student_every": 2}
        _, output_dir = train(**changes)
        first, _, third = entries(output_dir)
        assert first["matching_gradient_norm"] == pytest.approx(0, abs=1e-5)
        assert third["matching_gradient_norm"] > 1e-4


def test_with_lora_the_frozen_weights_are_there_once(recipe, tmp_path):
    from accelerate import Accelerator

    from causal_wan.distillation.roles import make_roles
    from causal_wan.runs.parts import find_critic, find_matching_teacher

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "output_dir": str(tmp_path / "run"), "lora_rank": 4}))
    config = parse_config(train_dmd.Config, ["--config", str(path)])
    roles = make_roles(config, find_matching_teacher(config), find_critic(config), Accelerator(cpu=True))
    addresses = [
        {weight.data_ptr() for name, weight in model.named_parameters() if "lora_" not in name}
        for model in (roles.student, roles.critic, roles.teacher)
    ]
    assert addresses[0] == addresses[1] == addresses[2]
    adapters = [
        {weight.data_ptr() for name, weight in model.named_parameters() if "lora_" in name}
        for model in (roles.student, roles.critic, roles.teacher)
    ]
    assert not adapters[0] & adapters[1]
    assert not adapters[2]
    models = (roles.student, roles.critic, roles.teacher)
    trained = [{name for name, weight in model.named_parameters() if weight.requires_grad} for model in models]
    assert all("lora_" in name for names in trained for name in names)
    assert [bool(names) for names in trained] == [True, True, False]
    blocks = [model.config.num_frame_per_block for model in (roles.student, roles.critic, roles.teacher)]
    assert blocks == [1, None, None]


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_critic_may_start_as_another_model_than_the_teacher(train, large_teacher, lora_rank):
    changes = {"lora_rank": lora_rank, "max_train_steps": 2, "teacher": str(large_teacher)}
    base = yaml.safe_load(train()[0].read_text())["pretrained_model_name_or_path"]
    _, output_dir = train(**changes, critic=base, checkpointing_steps=2)
    student, critic = by_role(output_dir / "checkpoint-2", "trainable" if lora_rank else "model")
    assert {name: weight.shape for name, weight in critic.items()} == {
        name: weight.shape for name, weight in student.items()
    }
    assert entries(output_dir)[1]["matching_gradient_norm"] > 0


def test_the_plan_knows_a_larger_teacher_beside_a_critic_of_the_base(write_recipe, large_teacher, capsys):
    path, _ = write_recipe(**SETTINGS, lora_rank=4)
    run_here(SCRIPT, "--config", path, "--dry_run")
    assert "critic      " not in capsys.readouterr().out
    base = yaml.safe_load(path.read_text())["pretrained_model_name_or_path"]
    run_here(SCRIPT, "--config", path, "--dry_run", "--teacher", large_teacher, "--critic", base)
    assert f"teacher     {large_teacher}\ncritic      {base}\n" in capsys.readouterr().out


# --- what it is trained on -------------------------------------------------------------------------------------------


def test_prompts_of_a_file_are_enough(train, prompts_file):
    _, output_dir = train(prompts_file=str(prompts_file), metadata_path=None, max_train_steps=2)
    assert json.loads((output_dir / DATA_SUMMARY_NAME).read_text())["distinct prompts"] == 5


@pytest.mark.slow
def test_real_clips_and_regression_have_their_part(train):
    _, plain = train()
    for changes in ({"real_clip_probability": 1.0}, {"regression_weight": 0.5}):
        _, output_dir = train(**changes)
        first, own = entries(plain)[1], entries(output_dir)[1]
        assert own["critic_loss"] == pytest.approx(first["critic_loss"])  # the same rollout of the same prompts
        assert own["generator_grad_norm"] != pytest.approx(first["generator_grad_norm"])
    assert own["loss_at_time_1000"] > 0


@pytest.mark.slow
def test_a_clip_in_the_place_of_the_students_is_what_the_teacher_sees(train):
    """The teacher's prediction, and with it the normaliser, is another; the critic's is the same."""
    _, plain = train()
    _, forced = train(real_clip_probability=1.0)
    assert entries(plain)[1]["matching_normalizer"] != entries(forced)[1]["matching_normalizer"]


@pytest.mark.parametrize("lora_rank", [0, pytest.param(4, marks=SLOW)])
def test_a_discriminator_learns_beside_and_moves_the_student(train, lora_rank):
    _, plain = train(lora_rank=lora_rank) if lora_rank else train()
    changes = {"lora_rank": lora_rank} if lora_rank else {}
    _, output_dir = train(**changes, **ADVERSARIAL, checkpointing_steps=1)
    logged = entries(output_dir)
    assert all(entry["discriminator_loss"] > 0 and entry["discriminator_lr"] == 0.01 for entry in logged)
    assert all(0 <= entry["discriminator_accuracy"] <= 1 for entry in logged)
    first, own = entries(plain)[1], logged[1]
    assert own["critic_loss"] == pytest.approx(first["critic_loss"])
    assert own["generator_grad_norm"] != pytest.approx(first["generator_grad_norm"], rel=1e-3)
    name = "trainable_2.safetensors" if lora_rank else "model_2.safetensors"
    heads = [load_file(output_dir / f"checkpoint-{step}" / name) for step in (1, 2)]
    assert not torch.equal(flat(heads[0]), flat(heads[1]))
    assert result(output_dir).keys() == result(plain).keys()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, "fsdp2"])
def test_two_processes_with_a_discriminator_learn_what_one_does(train, strategy):
    common = {
        "train_batch_size": 1,
        "max_grad_norm": 0.01,
        "adam_epsilon": 1e-4,
        "mixed_precision": "no",
        **ADVERSARIAL,
    }
    common |= {"adversarial_learning_rate": 1e-4, "adversarial_weight": 1.0}
    _, one = train(gradient_accumulation_steps=2, **common)
    _, two = train(num_processes=2, strategy=strategy, **common)
    torch.testing.assert_close(flat(result(one)), flat(result(two)), rtol=1e-3, atol=2e-5)
    for mine, other in zip(entries(one), entries(two), strict=True):
        assert mine["discriminator_loss"] == pytest.approx(other["discriminator_loss"], rel=1e-3)


REFUSALS = {
    "real clips of prompts alone": (
        {"prompts_file": "p.txt", "regression_weight": 1.0},
        "real_clip_probability, regression_weight and adversarial_weight need clips, but prompts_file gives prompts",
    ),
    "a discriminator of prompts alone": (
        {"prompts_file": "p.txt", "adversarial_weight": 1.0},
        "real_clip_probability, regression_weight and adversarial_weight need clips, but prompts_file gives prompts",
    ),
    "a sink": ({"sink_size": 1, "local_attn_size": 4}, "sink_size is for sampling"),
    "pictures": ({"first_frame_probability": 0.5}, "which the teacher knows nothing of"),
    "perception without regression": (
        {"perceptual_weight": 1.0},
        "perceptual_weight is part of the loss of regression",
    ),
    "many steps": (
        {"timestep_sampling": "uniform"},
        "num_inference_steps must be the few steps that the student is to draw in, at most 16, got 50",
    ),
    "a LoRA to go on from without LoRA": ({"student_lora": "x"}, "student_lora is about LoRA; add --lora_rank 64"),
    "a LoRA that is not there": (
        {"student_lora": "nowhere", "lora_rank": 4},
        "student_lora must be the output folder of a run with --lora_rank, which holds "
        "pytorch_lora_weights.safetensors, got nowhere, which is not there.",
    ),
    "whole weights as a LoRA": (
        {"student_lora": str(ROOT / "examples/sketch/tiny-wan"), "lora_rank": 4},
        "give whole weights as --generator_ckpt.",
    ),
    "a rank without LoRA": ({"critic_lora_rank": 4}, "critic_lora_rank is about LoRA; add --lora_rank 64"),
    "controls": ({"control_column": ["sketch"]}, "control_column is nothing that the teacher follows"),
    "buckets": ({"frame_buckets": [9, 17]}, "clips that are drawn have one size and length"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_go_together_is_said_at_once(write_recipe, capsys, case):
    changes, message = REFUSALS[case]
    path, _ = write_recipe(**{**SETTINGS, **changes})
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--config", path, "--dry_run")
    assert message in " ".join(capsys.readouterr().err.split())
