"""The strategies of accelerate_configs on two CPU processes: they learn what one process learns, and go on exactly."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from conftest import ROOT, launch, launch_afresh
from diffusers import WanTransformer3DModel

import convert_checkpoint
from causal_wan.config.settings import TrainingConfig
from causal_wan.records.checkpoint_checks import check_process_count
from causal_wan.training.setup import make_accelerator, prepare_run
from causal_wan.training.steps import update_weights
from causal_wan.training.strategies import follow_settings, replaces_optimizer
from outputs import NEEDS_DEEPSPEED, flat, result


SCRIPT = "train_video_regression.py"
STRATEGIES = ["fsdp2", pytest.param("zero2", marks=NEEDS_DEEPSPEED), pytest.param("zero3", marks=NEEDS_DEEPSPEED)]
LOGGED = ("generator_loss", "generator_grad_norm", "loss_at_time_1000", "validation_loss")


def metrics(output_dir):
    """What was logged and does not depend on the clock."""
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: entry[name] for name in LOGGED if name in entry} for entry in entries]


@pytest.fixture(scope="module")
def train(recipe, tmp_path_factory):
    """Runs the recipe, each way once for all tests, and returns recipe and output folder."""
    done = {}

    def run(strategy, *, lora_rank=0, use_ema=False):
        """A strategy of None is one process alone."""
        key = (strategy, lora_rank, use_ema)
        if key not in done:
            folder = tmp_path_factory.mktemp("strategy")
            path, output_dir = folder / "recipe.yaml", folder / "run"
            changes = {
                "output_dir": str(output_dir),
                "lora_rank": lora_rank,
                "use_ema": use_ema,
                "validation_steps": 2,
                "mixed_precision": "no",
                "train_batch_size": 1 if strategy else 2,
                # Gradients are clipped at every step, and to less than Adam would undo.
                "max_grad_norm": 0.01,
                "adam_epsilon": 1e-4,
            }
            path.write_text(yaml.safe_dump({**recipe, **changes}))
            start = launch_afresh if strategy and not lora_rank else launch  # the real thing, once a strategy
            start(SCRIPT, path, num_processes=2 if strategy else 1, strategy=None if strategy == "ddp" else strategy)
            done[key] = path, output_dir
        return done[key]

    return run


def keeps_average(strategy, lora_rank=0):
    """DeepSpeed cannot; with LoRA the other strategies go without, too."""
    return strategy in ("ddp", "fsdp2") and not lora_rank


def copy_of(finished, folder, *, without=()):
    """A run's recipe and output in another folder, where it can be broken."""
    path, output_dir = finished
    shutil.copytree(output_dir, folder / "run", ignore=lambda _, names: set(names) & set(without))
    text = path.read_text().replace(str(output_dir), str(folder / "run"))
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml", folder / "run"


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", *STRATEGIES])
def test_two_processes_learn_what_one_does_and_save_the_same_files(train, strategy, lora_rank):
    settings = {"lora_rank": lora_rank, "use_ema": keeps_average(strategy, lora_rank)}
    (_, alone), (_, together) = train(None, **settings), train(strategy, **settings)
    for entry, expected in zip(metrics(together), metrics(alone), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    assert result(together).keys() == result(alone).keys()
    expected, learned = flat(result(alone)), flat(result(together))
    assert (learned - expected).norm() < 1e-3 * expected.norm()  # where gradients vanish, Adam amplifies rounding
    if not lora_rank:
        WanTransformer3DModel.from_pretrained(together / "transformer")


def context_parallel(num_groups, group_size):
    """Arguments of `launch` for groups of processes, each of which shares its clips."""
    sizes = {"dp_shard_size": num_groups, "cp_size": group_size}
    return {
        "strategy": "fsdp2_context_parallel",
        "num_processes": num_groups * group_size,
        "launch_flags": [f"--parallelism_config_{name}={size}" for name, size in sizes.items()],
    }


@pytest.mark.parametrize(
    ("num_groups", "lora_rank", "context", "resumes"),
    [
        pytest.param(1, 0, "noisy", False, marks=pytest.mark.slow),
        (1, 0, "augmented", False),
        pytest.param(1, 0, "noisy", True, marks=pytest.mark.slow),
        pytest.param(1, 4, "noisy", True, marks=pytest.mark.slow),
        pytest.param(2, 0, "noisy", True, marks=pytest.mark.slow),
    ],
    ids=["full", "teacher-forcing", "resumed", "lora-resumed", "two_groups-resumed"],
)
def test_two_processes_that_share_each_clip_learn_what_one_does(write_recipe, num_groups, lora_rank, context, resumes):
    settings = {"lora_rank": lora_rank, "validation_steps": 2, "use_ema": True, "mixed_precision": "no"}
    settings |= {"context": context}
    settings |= {"num_frame_per_block": 2, "independent_first_frame": True}
    path, alone = write_recipe("alone", train_batch_size=2, **settings)
    launch(SCRIPT, path)
    path, together = write_recipe("together", train_batch_size=2 // num_groups, **settings)
    start = launch_afresh if context == "augmented" else launch
    run = start(SCRIPT, path, **context_parallel(num_groups, group_size=2))
    assert f"4 steps of 2 clips ({2 // num_groups} x 1 accumulated x {num_groups} process(es))" in run.stdout

    def assert_equal_to_one_process():
        for entry, expected in zip(metrics(together), metrics(alone), strict=True):
            assert entry == pytest.approx(expected, rel=1e-3)
        assert result(together).keys() == result(alone).keys()
        expected, learned = flat(result(alone)), flat(result(together))
        assert (learned - expected).norm() < 1e-3 * expected.norm()

    assert_equal_to_one_process()
    if not resumes:
        return
    expected, logged = flat(result(together)), metrics(together)
    shutil.rmtree(together / "checkpoint-4")
    resume = ["--resume_from_checkpoint", "latest"]
    launch(SCRIPT, path, *resume, **context_parallel(num_groups, group_size=2))
    assert torch.equal(flat(result(together)), expected)
    assert metrics(together) == logged

    shutil.rmtree(together / "checkpoint-4")
    run = launch(SCRIPT, path, *resume, "--train_batch_size", "1", num_processes=2, strategy="fsdp2")
    assert "a step has 2 of them" in run.stderr
    assert_equal_to_one_process()


@pytest.fixture
def first_of_two(monkeypatch, tmp_path):
    """This process as the first of two under fsdp2.yaml; the second is not there, and sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    settings |= {"fsdp_transformer_cls_to_wrap": "Linear", "fsdp_cpu_ram_efficient_loading": False}
    settings |= {"accelerate_use_fsdp": True, "rank": 0, "local_rank": 0, "world_size": 2}
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))
    backend = ("fake", DistributedType.MULTI_GPU)
    monkeypatch.setattr(PartialState, "_prepare_backend", lambda self, *given, **named: backend)
    monkeypatch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
    stock_init = Accelerator.__init__
    monkeypatch.setattr(Accelerator, "__init__", lambda self, **given: stock_init(self, **{**given, "cpu": False}))
    # A group of gloo's would look for the second process.
    monkeypatch.setattr("causal_wan.processes.cpu_group", lambda: torch.distributed.group.WORLD)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_between_accumulated_passes_a_process_keeps_its_shard_of_the_gradients_alone(first_of_two, tmp_path):
    accelerator = make_accelerator(TrainingConfig(output_dir=str(tmp_path), gradient_accumulation_steps=3))
    assert accelerator.is_fsdp2
    assert accelerator.num_processes == 2
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    took_part = []
    for _ in range(3):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 8)).sum())
        took_part.append(accelerator.sync_gradients)
        for parameter in model.parameters():
            assert parameter.grad is not None, "whole gradients are kept elsewhere"
            assert parameter.grad.to_local().numel() == parameter.numel() / 2
    assert took_part == [False, False, True]  # it is still one step


def test_two_models_in_shards_are_trained_each_in_its_turn(first_of_two, tmp_path, monkeypatch):
    monkeypatch.setattr("causal_wan.training.resuming.gather_lists", list)  # nothing comes from the second
    config = TrainingConfig(output_dir=str(tmp_path), report_to=("none",))
    models = {role: torch.nn.Sequential(torch.nn.Linear(8, 8)) for role in ("student", "critic")}
    run = prepare_run(make_accelerator(config), config, models)

    def shards():
        return {role: each.model[0].weight.to_local().detach().clone() for role, each in run.trainees.items()}

    for role, other in (("student", "critic"), ("critic", "student")):
        before, trainee = shards(), run.trainees[role]
        run.accelerator.backward(trainee.model(torch.ones(2, 8)).sum())
        grad_norm, took_step = update_weights(run, trainee)
        assert took_step
        assert grad_norm > 0
        after = shards()
        assert not torch.equal(before[role], after[role])
        assert torch.equal(before[other], after[other])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulated_passes_of_two_processes_learn_what_one_pass_does(write_recipe, strategy):
    settings = {"mixed_precision": "no", "max_train_steps": 3}
    path, alone = write_recipe("alone", train_batch_size=4, **settings)
    launch(SCRIPT, path)
    path, together = write_recipe("together", train_batch_size=1, gradient_accumulation_steps=2, **settings)
    launch(SCRIPT, path, num_processes=2, strategy=strategy)
    for entry, expected in zip(metrics(together), metrics(alone), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3)
    expected, learned = flat(result(alone)), flat(result(together))
    assert (learned - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_broken_run_goes_on_exactly(train, strategy, tmp_path):
    finished = train(strategy, use_ema=keeps_average(strategy))
    path, output_dir = copy_of(finished, tmp_path, without=("checkpoint-4", "transformer"))
    launch(SCRIPT, path, "--resume_from_checkpoint", "latest", num_processes=2, strategy=strategy)
    assert torch.equal(flat(result(output_dir)), flat(result(finished[1])))
    assert metrics(output_dir) == metrics(finished[1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_broken_run_goes_on_with_another_number_of_processes(train, strategy, tmp_path):
    finished = train(strategy, use_ema=keeps_average(strategy))
    path, output_dir = copy_of(finished, tmp_path, without=("checkpoint-4", "transformer"))
    flags = ["--resume_from_checkpoint", "latest", "--train_batch_size", "2"]
    run = launch(SCRIPT, path, *flags, num_processes=1, strategy=None if strategy == "ddp" else strategy)
    assert "the checkpoint is from 2 process(es), now there are 1" in run.stderr
    expected = flat(result(finished[1]))
    assert (flat(result(output_dir)) - expected).norm() < 1e-3 * expected.norm()
    for entry, wanted in zip(metrics(output_dir), metrics(finished[1]), strict=True):
        assert entry == pytest.approx(wanted, rel=1e-3)


@NEEDS_DEEPSPEED
def test_a_run_that_deepspeed_resumes_clips_at_the_norm_that_is_given_now(train, tmp_path):
    """Its own checkpoint brings the norm of the run before, with which the weights would be those of that run."""
    finished = train("zero2")
    path, output_dir = copy_of(finished, tmp_path, without=("checkpoint-4", "transformer"))
    flags = ["--resume_from_checkpoint", "latest", "--max_grad_norm", "0.001"]
    launch(SCRIPT, path, *flags, num_processes=2, strategy="zero2")
    assert metrics(output_dir)[:3] == metrics(finished[1])[:3]
    assert not torch.equal(flat(result(output_dir)), flat(result(finished[1])))


def with_deepspeed(monkeypatch, *, launched="bf16", **config):
    """As much of an Accelerator as says what DeepSpeed is told, of two processes.

    Args:
        launched: Precision that accelerate was told.
        config: Of the launch; with `file` the content of a file of DeepSpeed's own.
    """
    for name, value in config.items():
        variable = "ACCELERATE_DEEPSPEED_" if name.startswith("offload") else "ACCELERATE_"
        if name != "file":
            monkeypatch.setenv(variable + name.upper(), str(value))
    plugin = DeepSpeedPlugin(hf_ds_config=config.get("file"))
    plugin.set_mixed_precision(launched)
    fp16, bf16 = (plugin.get_value(f"{name}.enabled") for name in ("fp16", "bf16"))
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        mixed_precision="fp16" if fp16 else "bf16" if bf16 else "no",
        parallelism_config=None,
        num_processes=2,
        is_fsdp2=False,
    )


SETTINGS = {"output_dir": "x", "train_batch_size": 3, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"},
        {"file": {**ZERO2, "gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}},
        {"file": {**ZERO2, "gradient_accumulation_steps": 2, "train_batch_size": 12, "bf16": {"enabled": "auto"}}},
    ],
    ids=["nothing", "auto", "auto in a file", "agreement"],
)
def test_deepspeed_is_told_what_the_settings_say(monkeypatch, config, max_grad_norm):
    accelerator = with_deepspeed(monkeypatch, **config)
    follow_settings(accelerator, TrainingConfig(**SETTINGS, max_grad_norm=max_grad_norm))
    told = accelerator.state.deepspeed_plugin.deepspeed_config
    assert told["gradient_clipping"] == max_grad_norm
    assert told["gradient_accumulation_steps"] == 2
    assert told["train_micro_batch_size_per_gpu"] == 3
    assert told["train_batch_size"] == 12
    assert told["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            "gradient_clipping .* max_grad_norm, got 0.5 and 1.0; write auto there",
        ),
        ({"gradient_clipping": 0.0}, "gradient_clipping .* got 0.0 and 1.0"),
        ({"gradient_accumulation_steps": 1}, "agree with gradient_accumulation_steps, got 1 and 2"),
        ({"file": {**ZERO2, "gradient_clipping": 2}}, "agree with max_grad_norm, got 2 and 1.0"),
        ({"file": {**ZERO2, "gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1}}, "got 1 and 3"),
        ({"file": {**ZERO2, "gradient_accumulation_steps": 2, "train_batch_size": 6}}, "all processes, got 6 and 12"),
        (
            {"file": {**ZERO2, "gradient_accumulation_steps": 2, "bf16": {"enabled": False}}},
            "agree with mixed_precision, got no and bf16",
        ),
    ],
)
def test_a_config_of_deepspeed_that_contradicts_the_settings_is_refused(monkeypatch, config, message):
    accelerator = with_deepspeed(monkeypatch, **config)
    with pytest.raises(ValueError, match=message):
        follow_settings(accelerator, TrainingConfig(**SETTINGS))


def test_deepspeed_replaces_the_optimizer_where_its_states_are_on_the_cpu(monkeypatch):
    assert not replaces_optimizer(with_deepspeed(monkeypatch))
    assert replaces_optimizer(with_deepspeed(monkeypatch, offload_optimizer_device="cpu"))
    config = TrainingConfig(**SETTINGS, optimizer="adamw8bit")
    with pytest.raises(ValueError, match=r"use --optimizer adamw, or launch with accelerate_configs/zero2\.yaml"):
        prepare_run(with_deepspeed(monkeypatch), config, {"student": torch.nn.Linear(1, 1)})


def test_deepspeed_is_not_asked_to_train_two_models(monkeypatch):
    models = {"student": torch.nn.Linear(1, 1), "critic": torch.nn.Linear(1, 1)}
    with pytest.raises(ValueError, match="DeepSpeed trains one model in a run, but this one trains 2; launch with"):
        prepare_run(with_deepspeed(monkeypatch), TrainingConfig(**SETTINGS), models)


def test_deepspeed_refuses_another_number_of_processes(tmp_path):
    for rank in range(2):
        (tmp_path / f"random_states_{rank}.pkl").touch()
    check_process_count(tmp_path, 2)
    with pytest.raises(ValueError, match="must be resumed by as many processes as wrote it, 2, got 1"):
        check_process_count(tmp_path, 1)


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", *STRATEGIES])
def test_the_last_checkpoint_converts_to_the_result_in_one_process(train, strategy, lora_rank, tmp_path):
    _, output_dir = train(strategy, lora_rank=lora_rank, use_ema=keeps_average(strategy, lora_rank))
    convert_checkpoint.main(
        convert_checkpoint.Config(input=str(output_dir / "checkpoint-4"), output=str(tmp_path / "converted"))
    )
    converted, expected = result(tmp_path / "converted"), result(output_dir)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    assert (tmp_path / "converted" / "config.yaml").read_text() == (output_dir / "config.yaml").read_text()
    if not lora_rank:
        WanTransformer3DModel.from_pretrained(tmp_path / "converted" / "transformer")


def test_what_is_no_checkpoint_of_a_run_is_not_converted(train, tmp_path, capsys):
    _, output_dir = train("ddp", use_ema=True)
    for folder in (tmp_path, output_dir / "validation", output_dir / "checkpoint-7"):
        with pytest.raises(SystemExit, match="2"):
            convert_checkpoint.main(convert_checkpoint.Config(input=str(folder), output=str(tmp_path / "new")))
        message = capsys.readouterr().err
        assert "input must be a checkpoint-STEP folder" in message or "has no weights in it" in message
    with pytest.raises(SystemExit, match="2"):
        checkpoint = str(output_dir / "checkpoint-4")
        convert_checkpoint.main(convert_checkpoint.Config(input=checkpoint, output=str(tmp_path)))
    assert "output must be a new folder" in capsys.readouterr().err
