"""Processes tell each other things beside the GPUs, and wait for one that works; prompts are embedded once."""

import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import in_processes

import train_video_regression
from causal_wan.cache import opening
from causal_wan.config.parsing import parse_config
from causal_wan.config.settings import BaseModelConfig
from causal_wan.model.text import encode_prompts
from causal_wan.processes import gather_lists, gather_on_machine, num_processes, process_index, wait_for_all
from causal_wan.records.checkpoints import list_checkpoints, save_checkpoint
from causal_wan.records.trackers import Trackers
from causal_wan.runs import parts, prompt_embeddings
from causal_wan.runs import regression as regression_run
from causal_wan.runs.prompt_embeddings import embed_prompts
from causal_wan.runs.regression import begin_run, finish_run, load_clips, upload_checkpoint
from causal_wan.training.setup import make_accelerator
from causal_wan.weights.parts import load_text_encoder


SHORT, LONG = 6.0, 8.0  # seconds: the timeout of the group of all processes, and what takes longer


# --- gathering and waiting -------------------------------------------------------------------------------------------


def tell(rank):
    return gather_lists([(process_index(), num_processes())] * (rank + 1)), gather_on_machine([rank])


def test_objects_are_gathered_in_order_and_not_through_the_devices():
    for found in in_processes(tell):
        assert found == ([(0, 2), (1, 2), (1, 2)], [0, 1])


def tell_from_machines(rank):
    socket.gethostname = lambda: f"machine-{rank}"
    return gather_on_machine([rank])


def test_a_machine_is_told_by_its_name():
    assert in_processes(tell_from_machines) == [[0], [1]]


def come_late(rank):
    if rank == 0:
        time.sleep(LONG)
    wait_for_all()
    return time.monotonic()


def test_processes_wait_longer_than_the_group_of_the_steps_would():
    one, other = in_processes(come_late, backend="gloo", timeout=SHORT)
    assert abs(one - other) < LONG / 2


def end_early(rank):
    wait_for_all()
    if rank == 0:
        torch.distributed.destroy_process_group()
        return None
    with pytest.raises(RuntimeError, match="by peer"):
        wait_for_all()
    return "noticed"


def test_a_process_that_ends_is_noticed_at_once():
    assert in_processes(end_early, backend="gloo")[1] == "noticed"


def test_one_process_alone_waits_for_nobody():
    wait_for_all()
    assert gather_lists([1, 2]) == gather_on_machine([1, 2]) == [1, 2]


# --- one works, the others wait --------------------------------------------------------------------------------------


def read_config(path, *flags):
    return parse_config(train_video_regression.Config, ["--config", str(path), *map(str, flags)])


def slowly(action, rank):
    """An action that takes its time on the main process."""

    def slow(*arguments, **options):
        if rank == 0:
            time.sleep(LONG)
        return action(*arguments, **options)

    return slow


def meet(accelerator):
    """What the next step does: it fails unless all processes come to it at about the same time."""
    assert int(accelerator.reduce(torch.ones(1))) == 2


def plan_nothing(*arguments):
    """The plan of the memory goes backward through a model, which torch does not do in a fork."""


def begin_slowly(rank, path):
    """The main process takes long to tell the encoders, and again to load the student, which it alone may load."""
    opening.identify_encoders = slowly(opening.identify_encoders, rank)
    regression_run.print_memory = plan_nothing
    config = read_config(path, "--cache_latents")
    begun = begin_run(config, load_clips(config), make_transformer=slowly(parts.make_student, rank))
    meet(begun.accelerator)
    return len(begun.inputs.prompt_embeds)


def test_others_wait_while_one_reads_encoders_and_weights(write_recipe):
    path, _ = write_recipe()
    assert in_processes(begin_slowly, path, backend="gloo", timeout=SHORT) == [8, 8]


def save_slowly(rank, path):
    config = read_config(path)
    accelerator = make_accelerator(config.training)
    accelerator.save_state = slowly(lambda folder: Path(folder).mkdir(exist_ok=True), rank)
    save_checkpoint(accelerator, config.training.output_dir, 3, averages=(), total_limit=1)
    meet(accelerator)
    uploads = SimpleNamespace(upload_checkpoint=slowly(lambda checkpoint: None, rank)) if rank == 0 else None
    upload_checkpoint(uploads, Path(config.training.output_dir) / "checkpoint-3")
    meet(accelerator)


def test_others_wait_while_one_writes_a_checkpoint_and_sets_it_aside(write_recipe):
    path, output_dir = write_recipe()
    in_processes(save_slowly, path, backend="gloo", timeout=SHORT)
    assert [checkpoint.name for checkpoint in list_checkpoints(output_dir)] == ["checkpoint-3"]


def finish_slowly(rank, path, complete):
    config = read_config(path)
    accelerator = make_accelerator(config.training)
    parts.gather_weights = lambda accelerator, trainee: {}
    parts.save_student = slowly(lambda *parts: None, rank)
    trackers = SimpleNamespace(finish=slowly(Trackers().finish, rank))
    inputs, data = SimpleNamespace(config=config), SimpleNamespace(count=dict)
    begun = SimpleNamespace(accelerator=accelerator, data=data, inputs=inputs, trackers=trackers, uploads=None)
    if complete:
        student = SimpleNamespace(ema=None, unwrapped_model=None)
        parts.save_result(SimpleNamespace(accelerator=accelerator, student=student), config, data)
        meet(accelerator)
    work_ends = time.monotonic() + LONG
    try:
        finish_run(begun, complete=complete)
    except SystemExit as stopped:
        return stopped.code, work_ends, time.monotonic()
    return 0, work_ends, time.monotonic()


@pytest.mark.parametrize(("complete", "status"), [(True, 0), (False, 75)])
def test_others_wait_while_one_saves_the_result_and_ends_its_trackers(write_recipe, complete, status):
    path, _ = write_recipe()
    one, other = in_processes(finish_slowly, path, complete, backend="gloo", timeout=SHORT)
    assert one[0] == other[0] == status
    assert other[2] >= one[1]  # what the main process took its time for


def timeout_of_the_steps(rank, path):
    torch.distributed.destroy_process_group()  # that of the test: accelerate is to make its own
    make_accelerator(read_config(path, "--dataloader_timeout", 400).training)
    return torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout


def test_a_step_waits_for_clips_and_ten_minutes(write_recipe, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    path, _ = write_recipe()
    assert in_processes(timeout_of_the_steps, path, backend="gloo") == [timedelta(seconds=1000)] * 2


# --- prompts ---------------------------------------------------------------------------------------------------------


PROMPTS = [f"{number} balls" + number * " roll" for number in range(11)]


def embed(rank, checkpoint, output_dir):
    """Embeds prompts, and returns them, where they are kept, and how many were embedded at once here."""
    sizes = []

    def noted(tokenizer, text_encoder, prompts, *rest):
        sizes.append(len(prompts))
        return encode_prompts(tokenizer, text_encoder, prompts, *rest)

    prompt_embeddings.encode_prompts = noted
    config = BaseModelConfig(pretrained_model_name_or_path=str(checkpoint))
    mapping = embed_prompts(Accelerator(cpu=True), config, [*PROMPTS, *PROMPTS], None, output_dir=output_dir)
    found = {prompt: mapping[prompt].tolist() for prompt in PROMPTS}
    folders = [path.name for path in Path(output_dir).glob(".prompt-embeddings-*")]
    kind = type(mapping).__name__
    wait_for_all()
    del mapping
    wait_for_all()
    assert not list(Path(output_dir).glob(".prompt-embeddings-*"))  # gone with the mapping
    return found, kind, folders, sizes


@pytest.fixture
def expected(checkpoint):
    embeds = encode_prompts(*load_text_encoder(str(checkpoint)), PROMPTS)
    return {
        prompt: pytest.approx(embed.flatten().tolist(), abs=1e-6)
        for prompt, embed in zip(PROMPTS, embeds, strict=True)
    }


def flat(found):
    return {prompt: [value for row in embed for value in row] for prompt, embed in found.items()}


def test_few_embeddings_are_kept_in_memory(checkpoint, tmp_path, expected):
    for found, kind, folders, _ in in_processes(embed, checkpoint, tmp_path):
        assert flat(found) == expected
        assert (kind, folders) == ("dict", [])


def test_prompts_that_are_cut_are_said_before_training(checkpoint, tmp_path, caplog):
    config = BaseModelConfig(pretrained_model_name_or_path=str(checkpoint), max_sequence_length=8)
    embed_prompts(make_plain_accelerator(), config, [*PROMPTS, *PROMPTS], None, output_dir=tmp_path)
    assert "of 11 prompt(s) are cut at max_sequence_length=8 tokens" in caplog.text


def test_many_embeddings_are_kept_on_disk_while_the_run_is_on(checkpoint, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(prompt_embeddings, "IN_MEMORY", 0)
    monkeypatch.setattr(prompt_embeddings, "PROMPTS_AT_ONCE", 2)
    (tmp_path / ".prompt-embeddings-of-a-run-that-was-killed").mkdir()
    for found, kind, folders, sizes in in_processes(embed, checkpoint, tmp_path):
        assert flat(found) == expected
        assert (kind, len(folders), max(sizes)) == ("CachedPrompts", 1, 2)
        assert sum(sizes) in (5, 6)  # a share


def make_plain_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's
    return Accelerator(cpu=True)


def embed_on_machines(rank, checkpoint, output_dir):
    socket.gethostname = lambda: f"machine-{rank}"
    return embed(rank, checkpoint, output_dir / f"disk-of-{rank}")


def test_machines_need_no_disk_in_common_for_embeddings(checkpoint, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(prompt_embeddings, "IN_MEMORY", 0)
    for found, _, folders, sizes in in_processes(embed_on_machines, checkpoint, tmp_path):
        assert flat(found) == expected
        assert (len(folders), sum(sizes)) == (1, len(PROMPTS))


def test_a_full_disk_is_a_mistake_that_is_said(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_embeddings, "IN_MEMORY", 0)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causal_wan.cache.tensor_cache._write_whole", fail)
    config = BaseModelConfig(pretrained_model_name_or_path=str(checkpoint))
    with pytest.raises(ValueError, match="output_dir must have room for the embeddings of 11 prompts"):
        embed_prompts(make_plain_accelerator(), config, PROMPTS, None, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def embed_into_cache(rank, path):
    """The other process has another disk under the path of the cache."""
    prompt_embeddings.SECONDS_TO_SEE = 2.0
    regression_run.print_memory = plan_nothing
    config = read_config(path, *(("--latents_dir", f"{path}-of-{rank}") if rank else ()))
    with pytest.raises(SystemExit):
        begin_run(config, load_clips(config))


def test_a_cache_that_not_all_machines_see_is_refused(write_recipe, capfd):
    path, output_dir = write_recipe(cache_latents=True)
    in_processes(embed_into_cache, path)
    assert capfd.readouterr().err.count("latents_dir must be a folder that all machines of the launch see") == 2
    assert not (output_dir / "transformer").exists()
