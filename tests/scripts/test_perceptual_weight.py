"""`--perceptual_weight` in the training scripts: what is learned, logged, resumed and shared by processes."""

import shutil

import pytest
import torch
from conftest import ROOT, launch, run_here
from run_outputs import flat, metrics, result, weights

from causal_wan.methods.losses import masked_sum_over_count
from causal_wan.runs import parts


SCRIPT, ODE_SCRIPT = "train_video_regression.py", "train_ode_regression.py"
PERCEPTUAL = {"perceptual_weight": 3.0, "mixed_precision": "no"}


@pytest.fixture
def learn(write_recipe):
    """Runs the recipe with changes in this process, and returns the output folder."""

    def run(name, *, script=SCRIPT, **changes):
        path, output_dir = write_recipe(name, **changes)
        run_here(script, "--config", path)
        return output_dir

    return run


def test_a_run_compares_logs_and_validates_beside_the_error_of_the_latents(learn, capsys):
    plain = metrics(learn("plain", max_train_steps=2))
    entries = metrics(learn("compared", max_train_steps=2, **PERCEPTUAL))
    printed = capsys.readouterr().out
    assert "mse of latents + 3 x decoder features up to timestep 700" in printed
    *steps, held_out = entries
    assert {"perceptual_loss", "validation_perceptual_loss"} <= set().union(*entries)
    assert not {"perceptual_loss", "validation_perceptual_loss"} & set().union(*plain)
    first = next(entry for entry in steps if "perceptual_loss" in entry)
    assert 0 < first["perceptual_loss"] < 10
    expected = plain[0]  # of the same weights, before the first step
    assert entries[0]["loss_at_time_1000"] == expected["loss_at_time_1000"]
    assert entries[0]["generator_loss"] > expected["generator_loss"]
    assert held_out["validation_loss"] > 0


def test_without_a_weight_the_loss_is_what_it_was_to_the_last_bit(learn, monkeypatch):
    losses = []

    def note(*given):
        losses.append(masked_sum_over_count(*given))
        return losses[-1]

    monkeypatch.setattr("train_video_regression.masked_sum_over_count", note)
    monkeypatch.delattr("causal_wan.runs.inputs.decode_features")
    changes = {"max_train_steps": 2, "validation_metadata_path": None, "perceptual_max_timestep": 600.0}
    entries = metrics(learn("plain", **changes))
    assert [entry["generator_loss"] for entry in entries] == [float(loss.detach()) for loss in losses]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_and_metrics(learn, write_recipe):
    whole = learn("whole", cache_latents=True, **PERCEPTUAL)
    _, output_dir = write_recipe("resumed")
    output_dir.mkdir()
    shutil.copytree(whole / "checkpoint-2", output_dir / "checkpoint-2")
    learn("resumed", cache_latents=True, resume_from_checkpoint="latest", **PERCEPTUAL)
    assert all(torch.equal(weights(output_dir)[name], value) for name, value in weights(whole).items())
    assert metrics(output_dir) == [entry for entry in metrics(whole) if entry["step"] > 2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, "fsdp2"], ids=["ddp", "fsdp2"])
def test_two_processes_and_two_passes_learn_what_one_pass_does(learn, write_recipe, strategy):
    alone = learn("alone", train_batch_size=2, **PERCEPTUAL)
    twice = learn("twice", train_batch_size=1, gradient_accumulation_steps=2, **PERCEPTUAL)
    path, together = write_recipe("together", train_batch_size=1, **PERCEPTUAL)
    launch(SCRIPT, path, num_processes=2, strategy=strategy)
    names = ("generator_loss", "generator_grad_norm", "perceptual_loss", "validation_perceptual_loss")
    for other in (twice, together):
        for entry, expected in zip(metrics(other), metrics(alone), strict=True):
            assert entry.keys() == expected.keys()
            compared = [name for name in names if name in expected]
            assert [entry[name] for name in compared] == pytest.approx([expected[name] for name in compared], rel=1e-3)
        learned, expected = flat(result(other)), flat(result(alone))
        assert (learned - expected).norm() < 1e-3 * expected.norm()


def test_the_vae_is_loaded_for_its_decoder_alone_and_stays_as_it_is(learn, tmp_path, monkeypatch):
    loaded, load_vae = [], parts.load_vae

    def note_vae(*given, **named):
        loaded.append(load_vae(*given, **named))
        return loaded[-1]

    monkeypatch.setattr(parts, "load_vae", note_vae)
    changes = {"latents_dir": str(tmp_path / "latents"), "validation_metadata_path": None, "max_train_steps": 3}
    learn("filling", cache_latents=True, **changes)
    before = {name: value.clone() for name, value in loaded.pop().state_dict().items()}
    entries = metrics(learn("read", **changes, **PERCEPTUAL))
    assert "perceptual_loss" in set().union(*entries)
    vae = loaded.pop()
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    learn("without", **changes)
    assert not loaded


@pytest.mark.slow
def test_trajectories_are_compared_too_with_the_vae_in_16_bits(learn, write_recipe, tmp_path):
    trajectories = {"trajectories_dir": str(tmp_path / "trajectories"), "validation_metadata_path": None}
    path, _ = write_recipe("teacher", **trajectories)
    run_here("precompute_trajectories.py", "--config", path, "--num_inference_steps", 4, "--guidance_scale", 2)
    changes = {**trajectories, **PERCEPTUAL, "perceptual_max_timestep": 1000.0}
    changes |= {"vae_dtype": "bf16", "mixed_precision": "bf16", "vae_tiling": True, "max_train_steps": 2}
    entries = metrics(learn("student", script=ODE_SCRIPT, **changes))
    assert all(entry["perceptual_loss"] > 0 for entry in entries)


@pytest.mark.slow
def test_the_embedded_checkpoint_takes_it_with_continuous_levels(learn):
    entries = metrics(
        learn(
            "sketch",
            pretrained_model_name_or_path=str(ROOT / "examples" / "sketch" / "tiny-wan"),
            max_sequence_length=64,
            timestep_sampling="logit_normal",
            num_inference_steps=2,
            max_train_steps=2,
            learning_rate=1e-3,
            **PERCEPTUAL,
        )
    )
    assert "perceptual_loss" in set().union(*entries)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--perceptual_weight", "1", "--offload_vae"], "leave one out (--vae_dtype bf16 halves the VAE)"),
        (["--perceptual_weight", "1", "--num_frames", "1"], "raise num_frames, or leave perceptual_weight out"),
        (["--perceptual_weight", "1", "--denoising_step_list", "1000", "800"], "800, got 700: no frame would ever"),
        (["--perceptual_weight", "-1"], "perceptual_weight must be 0 or more, got -1.0"),
        (["--perceptual_max_timestep", "1001"], "perceptual_max_timestep must be in (0, 1000], got 1001.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(write_recipe, flags, message, capsys):
    path, _ = write_recipe()
    with pytest.raises(SystemExit) as exit_info:
        run_here(SCRIPT, "--config", path, "--dry_run", *flags)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
