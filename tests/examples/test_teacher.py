"""The teacher of ambiguous prompts: what it is trained on, how, and that its result is one of this repository's."""

import csv
import hashlib

import pytest
import torch
import yaml
from conftest import ROOT, run_python

from causal_wan.results.run_record import find_run
from causal_wan.results.teacher import find_teacher, load_teacher
from examples.objectives import build_teacher
from examples.objectives.build_teacher import Config, pad, shorter_prompts, training_sketches


# As the script finds them: examples/sketch is on the path by now.
from build_tiny_wan import TEXT_DIM, TEXT_LENGTH, new_transformer, stock, train_on_chosen_frames  # isort: skip
from make_dataset import ambiguous_prompt, prompt  # isort: skip


TINY_WAN = ROOT / "examples" / "sketch" / "tiny-wan"


def test_no_clip_and_no_prompt_of_the_data_set_that_is_held_out_is_trained_on(tmp_path):
    make = ROOT / "examples" / "sketch" / "make_dataset.py"
    run_python(make, "--output_dir", tmp_path, "--ambiguous", "--num_frames", 1)
    tables = {}
    for name in ("train", "heldout", "targets"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            tables[name] = [(row["video"], row["prompt"]) for row in csv.DictReader(file)]
    trained = training_sketches(Config(output_dir="x"))
    assert sorted(ambiguous_prompt(sketch) for sketch in trained) == sorted(said for _, said in tables["train"])
    everything = {text for sketch in trained for text in (ambiguous_prompt(sketch), *shorter_prompts(sketch))}
    assert not everything & {said for _, said in tables["heldout"]}
    more = {ambiguous_prompt(sketch) for sketch in training_sketches(Config(output_dir="x", kinds="all"))}
    assert more == {said for _, said in tables["train"]}


def test_shorter_prompts_say_a_part_of_what_the_ambiguous_one_says():
    sketch = training_sketches(Config(output_dir="x"))[0]
    shorter = shorter_prompts(sketch)
    assert len(set(shorter)) == len(shorter) == 6
    words = set(ambiguous_prompt(sketch).replace(",", "").replace(".", "").split())
    for text in shorter:
        assert set(text.replace(",", "").replace(".", "").split()) < words
    assert f"Draw a sketch of something step by step; a {sketch.colour} drawing." in shorter


def test_some_frames_and_counted_padding_give_what_the_stock_model_gives():
    torch.manual_seed(0)
    transformer = new_transformer().eval()
    latents, timesteps = torch.randn(2, 16, 21, 2, 2), torch.tensor([990.0, 300.0])
    texts = [torch.randn(3, TEXT_DIM), torch.randn(5, TEXT_DIM)]
    whole = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, TEXT_LENGTH - len(text))) for text in texts])
    with torch.no_grad():
        expected = transformer(latents, timesteps, whole).sample
        rope = train_on_chosen_frames(transformer)
        torch.testing.assert_close(transformer(latents, timesteps, pad(texts)).sample, expected, atol=1e-5, rtol=1e-4)
        rope.frames = torch.tensor([4, 5, 6])
        early = transformer(latents[:, :, 4:7], timesteps, pad(texts)).sample
        rope.frames = torch.tensor([4, 5, 16])
        late = transformer(latents[:, :, 4:7], timesteps, pad(texts)).sample
        assert not torch.allclose(early, late)  # frames stay at their places in time
        stock(transformer)
        assert transformer(latents, timesteps, whole).sample.equal(expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps that is interrupted after the first, on latents that are noise."""
    folder = tmp_path_factory.mktemp("teacher")
    sketches = training_sketches(Config(output_dir="x"))
    vae = (TINY_WAN / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    fingerprint = (hashlib.sha256(vae).hexdigest(), [prompt(sketch) for sketch in sketches])
    latents = torch.randn(len(sketches), 16, 21, 8, 14, dtype=torch.float16)
    torch.save({"fingerprint": fingerprint, "latents": latents}, folder / "latents.pt")
    for steps in (1, 2):
        run_python(
            ROOT / "examples" / "objectives" / "build_teacher.py",
            *("--output_dir", folder / "result", "--work_dir", folder, "--frames", 6, "--steps", steps),
        )
    return folder


@pytest.mark.slow
def test_an_interrupted_training_goes_on(trained):
    state = torch.load(trained / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert {entry["step"].item() for entry in state["optimizer"]["state"].values()} == {2}


@pytest.mark.slow
def test_the_result_is_a_bidirectional_teacher_and_a_run(trained):
    teacher = find_teacher(str(trained / "result"), str(TINY_WAN), None)
    assert teacher.causal.block_lengths(21) == [21]
    transformer = load_teacher(teacher, torch.float32, torch.device("cpu"))
    stored = torch.load(trained / "state.pt", weights_only=True)["average"]
    for name, weight in transformer.state_dict().items():
        assert weight.equal(stored[f"module.transformer.{name}"].half().float())
    run = find_run(str(trained / "result"))
    assert (run.data.num_frames, run.data.height, run.data.width) == (81, 64, 112)
    assert run.method.is_continuous
    assert yaml.safe_load((trained / "result" / "config.yaml").read_text())["pretrained_model_name_or_path"]


def test_the_learning_rate_warms_up_and_falls():
    config = Config(output_dir="x", steps=1000, decay=0.4)
    shares = [build_teacher.share_of_lr(step, config) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 50)
    assert shares[100] == shares[599] == 1
    assert shares[800] == pytest.approx(0.5)
    assert shares[-1] == pytest.approx(0.02)


def test_expected_latents_are_the_mean_of_all_in_noise_and_the_one_that_shows_through():
    torch.manual_seed(0)
    possible = torch.randn(5, 16, 2, 3, 3)
    noise = torch.randn(16, 2, 3, 3)
    in_noise = build_teacher.expected_latents(noise, torch.tensor(1.0), possible)
    torch.testing.assert_close(in_noise, possible.mean(dim=0))
    for sigma in (torch.tensor(0.01), torch.tensor(0.5)):
        noisy = (1 - sigma) * possible[3] + sigma * noise
        torch.testing.assert_close(build_teacher.expected_latents(noisy, sigma, possible), possible[3])


def test_prompts_know_all_clips_that_they_may_be_shown_with():
    sketches = training_sketches(Config(output_dir="x"))
    shown_with = build_teacher.clips_of_prompts(sketches)
    assert shown_with[""] == list(range(len(sketches)))
    for number, sketch in enumerate(sketches):
        said = build_teacher.draw_prompt(sketch, 0.5)
        assert number in shown_with[said]
        assert shown_with[prompt(sketch)] == [number]
        assert len(shown_with[ambiguous_prompt(sketch)]) == 24
