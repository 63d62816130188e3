"""What trackers are given arrives, read back with their own readers, goes on after interruptions, and ends no run."""

import errno
import importlib.metadata
import io
import json
import shutil

import av
import pytest
from conftest import run_python, write_clip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

import train_video_regression
from causal_wan.config.parsing import parse_config
from causal_wan.records import tracker_libraries
from causal_wan.records.tracker_libraries import resolve_trackers, start_each
from causal_wan.records.trackers import CaptionedVideo, TrackedRun, Trackers, identify_run


SCRIPT = "train_video_regression.py"
ALL = {"wandb", "tensorboard", "trackio"}
PROMPTS = [f"a ball, number {number}, crosses the field" for number in (6, 7)]
TIMINGS = ("seconds", "memory", "per_second")


# --- readers ---------------------------------------------------------------------------------------------------------


def wandb_records(path):
    """Records of a .wandb file: LevelDB's log format, after 7 bytes of header, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while position < len(content):
        left = 32768 - position % 32768
        if left < 7:  # no header fits: padding
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def read_wandb(output_dir):
    """For each start of the run, oldest first: (its record, {step: values}, folder)."""
    for path in sorted(output_dir.glob("wandb/offline-run-*/*.wandb")):
        run, history = None, {}
        for record in wandb_records(path):
            if record.HasField("run"):
                run = record.run
            elif record.HasField("history"):
                row = {}
                for item in record.history.item:
                    *outer, name = item.nested_key or [item.key]
                    place = row
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[name] = json.loads(item.value_json)
                step = row.pop("_step")
                assert step not in history
                history[step] = {name: value for name, value in row.items() if not name.startswith("_")}
        yield run, history, path.parent / "files"


def read_trackio(output_dir):
    """The runs of the project: (name, config, [(step, values)]); the folder is fixed when trackio is imported."""
    code = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("sketches"))
logs = [SQLiteStorage.get_logs("sketches", run.name, run_id=run.id) for run in runs]
print("READ" + json.dumps([(run.name, run.config, log) for run, log in zip(runs, logs, strict=True)]))
"""
    script = output_dir.with_suffix(".py")
    script.write_text(code)
    result = run_python(script, env={"TRACKIO_DIR": str(output_dir / "trackio")})
    for name, config, logs in json.loads(result.stdout.partition("READ")[2]):
        rows = [({key: log[key] for key in log if key != "timestamp"}) for log in logs]
        yield name, config, [(row.pop("step"), row) for row in rows]


def read_tensorboard(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def tensorboard_scalars(accumulator):
    """{step: values}, each step once."""
    rows = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            row = rows.setdefault(event.step, {})
            assert name not in row
            row[name] = event.value
    return rows


def metrics(output_dir):
    """{step: values} of metrics.jsonl, of training and validation together."""
    rows = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        rows.setdefault(entry.pop("step"), {}).update(entry)
    return rows


def without_timings(rows):
    return {
        step: {name: value for name, value in row.items() if not any(part in name for part in TIMINGS)}
        for step, row in rows.items()
    }


def split_media(row):
    """Numbers, and the rest."""
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return numbers, {name: value for name, value in row.items() if name not in numbers}


def num_frames(source):
    with av.open(source) as container:
        return sum(1 for _ in container.decode(video=0))


# --- a run, and its continuation -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """A run of four steps, and the folder after steps 3 to 5 ran from the checkpoint of step 2."""
    import yaml

    first, resumed = (tmp_path_factory.mktemp("tracked") / name for name in ("first", "resumed"))
    settings = {
        "report_to": ["wandb", "trackio", "tensorboard"],
        "tracker_project_name": "sketches",
        "run_name": "balls",
    }
    settings |= {"validation_steps": 2, "lr_scheduler": "constant", "resume_from_checkpoint": "latest"}
    path = resumed.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, **settings, "output_dir": str(resumed)}))
    folders = {"WANDB_DIR": str(resumed), "TRACKIO_DIR": str(resumed / "trackio")}
    flags = ["--config", path]
    run_python(SCRIPT, *flags, env={"WANDB_MODE": "offline", **folders})
    shutil.copytree(resumed, first)
    shutil.rmtree(resumed / "checkpoint-4")
    run_python(SCRIPT, *flags, "--max_train_steps", 5, env={"WANDB_MODE": "offline", **folders})
    return first, resumed


def test_every_number_of_every_step_arrives(runs):
    expected = metrics(runs[0])
    assert sorted(expected) == [1, 2, 3, 4]
    for level in (1000, 757, 522):
        assert f"loss_at_time_{level}" in expected[1]
        assert f"validation_loss_at_time_{level}" in expected[2]
    ((_, history, _),) = read_wandb(runs[0])
    assert {step: split_media(row)[0] for step, row in history.items()} == expected
    ((_, _, logs),) = read_trackio(runs[0])
    for step, row in expected.items():
        merged = {}
        for row_step, part in logs:
            merged.update(split_media(part)[0] if row_step == step else {})
        assert merged == row
    scalars = tensorboard_scalars(read_tensorboard(runs[0] / "logs" / "balls"))
    assert scalars.keys() == expected.keys()
    for step, row in expected.items():
        assert scalars[step] == pytest.approx(row, rel=1e-6)  # 32 bits


def test_the_resolved_settings_arrive_under_the_names_of_the_flags(runs):
    ((run, _, _),) = read_wandb(runs[0])
    assert (run.project, run.display_name) == ("sketches", "balls")
    shown = {update.key: json.loads(update.value_json) for update in run.config.update}
    ((name, trackio_config, _),) = read_trackio(runs[0])
    assert name == f"balls-{run.run_id}"
    for config in (shown, trackio_config):
        assert config["learning_rate"] == 0.01
        assert config["denoising_step_list"] == [1000, 757, 522, 0]
        assert config["generator_ckpt"] is None
        assert config["cache_latents"] is False
        assert config["report_to"] == ["wandb", "trackio", "tensorboard"]
    assert "allow_val_change" not in trackio_config
    content = read_tensorboard(runs[0] / "logs" / "balls").PluginTagToContent("hparams")
    session = hparams_metadata.parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
    flags = {
        key: value.number_value if value.HasField("number_value") else value.string_value
        for key, value in session.hparams.items()
    }
    assert flags.keys() == shown.keys() - {"_wandb"}
    assert flags["learning_rate"] == 0.01
    assert flags["denoising_step_list"] == "[1000, 757, 522, 0]"
    assert (flags["generator_ckpt"], flags["cache_latents"]) == ("None", "False")


def test_videos_arrive_with_their_prompts_and_play(runs):
    ((_, history, files),) = read_wandb(runs[0])
    assert [step for step, row in history.items() if split_media(row)[1]] == [2, 4]
    ((_, _, logs),) = read_trackio(runs[0])
    images = read_tensorboard(runs[0] / "logs" / "balls")
    for number, prompt in enumerate(PROMPTS):
        name = f"validation/{number:02d}"
        for step in (2, 4):
            video = history[step][name]
            assert video["caption"] == prompt
            assert num_frames(files / video["path"]) == 17
            (video,) = [row[name] for row_step, row in logs if row_step == step and name in row]
            assert video["caption"] == prompt
            assert num_frames(runs[0] / "trackio" / "media" / video["file_path"]) == 17
        assert images.SummaryMetadata(name).summary_description == prompt
        assert images.SummaryMetadata(name).plugin_data.plugin_name == "images"
        events = images.Tensors(name)
        assert [event.step for event in events] == [2, 4]
        for event in events:
            width, height, gif = event.tensor_proto.string_val
            assert (width, height) == (b"48", b"32")
            assert num_frames(io.BytesIO(gif)) == 17


def test_tensorboard_draws_the_levels_of_a_metric_in_one_chart(runs):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (event,) = read_tensorboard(runs[0] / "logs" / "balls").Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert {chart.title: list(chart.multiline.tag) for chart in category.chart}["loss"] == ["^loss_at_time_.*"]


def test_a_resumed_run_goes_on_as_the_same_run_without_a_step_twice(runs):
    first, resumed = runs
    expected = without_timings(metrics(resumed))
    assert sorted(expected) == [1, 2, 3, 4, 5]

    scalars = tensorboard_scalars(read_tensorboard(resumed / "logs" / "balls"))
    assert [path.name for path in (resumed / "logs").iterdir()] == ["balls"]
    for step, row in without_timings(scalars).items():
        assert row == pytest.approx(expected[step], rel=1e-6)
    assert scalars.keys() == expected.keys()

    ((_, config, logs),) = read_trackio(resumed)
    pairs = [(step, name) for step, row in logs for name in row]
    assert len(pairs) == len(set(pairs))
    assert {step for step, _ in pairs} == {1, 2, 3, 4, 5}
    for step, row in logs:
        numbers = without_timings({step: split_media(row)[0]})[step]
        assert numbers.items() <= expected[step].items()
    assert sorted(step for step, name in pairs if name == "validation/00") == [2, 4, 5]
    assert config["max_train_steps"] == 5

    (before, _, _), (after, history, _) = read_wandb(resumed)  # one file a start, which `wandb sync` joins by the id
    assert before.run_id == after.run_id == json.loads((first / "tracker_run.json").read_text())["id"]
    assert without_timings({step: split_media(row)[0] for step, row in history.items()}) == {
        step: row for step, row in expected.items() if step > 2
    }


# --- what is asked for -----------------------------------------------------------------------------------------------


def parse(path, *flags):
    return parse_config(train_video_regression.Config, ["--config", str(path), *flags])


def test_any_number_of_trackers_can_be_named_as_flags(write_recipe):
    path, _ = write_recipe()
    assert parse(path, "--report_to", "wandb", "tensorboard").training.report_to == ("wandb", "tensorboard")
    assert resolve_trackers(("tensorboard", "wandb", "wandb")) == ["wandb", "tensorboard"]
    assert set(resolve_trackers(("all",))) == ALL
    assert resolve_trackers(("none",)) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "wandbb"], "wandb"),
        (["--report_to", "none", "wandb"], "must name trackers, or be none alone, got none wandb"),
        (["--run_name", "a/b"], "run_name must serve as the name of a folder, got 'a/b'"),
    ],
)
def test_what_cannot_be_meant_is_told(write_recipe, flags, message, capsys):
    path, _ = write_recipe()
    with pytest.raises(SystemExit) as exit_info:
        parse(path, *flags)
    assert exit_info.value.code == 2
    assert message in " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_a_tracker_that_is_not_installed_ends_the_run_before_anything_is_loaded(write_recipe, capsys, monkeypatch):
    def version(package):
        if package == "wandb":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    path, output_dir = write_recipe(pretrained_model_name_or_path="no/such-model", report_to=["wandb", "trackio"])
    with pytest.raises(SystemExit) as exit_info:
        train_video_regression.main(parse(path))
    assert exit_info.value.code == 2
    assert "wandb cannot be found; run `pip install wandb`, or leave them out" in capsys.readouterr().err
    assert not output_dir.exists()
    assert set(resolve_trackers(("all",))) == ALL - {"wandb"}


def test_a_run_keeps_its_identity_when_it_goes_on_and_gets_another_when_it_begins(tmp_path):
    run = identify_run(str(tmp_path), project="p", run_name=None, resumes=True)
    assert run.name == tmp_path.name
    assert identify_run(str(tmp_path), project="q", run_name="other", resumes=True) == run
    assert identify_run(str(tmp_path), project="p", run_name=None, resumes=False).id != run.id
    for damaged in ("", '{"project": ', "[]"):
        (tmp_path / "tracker_run.json").write_text(damaged)
        again = identify_run(str(tmp_path), project="p", run_name=None, resumes=True)
        assert again.id != run.id
        assert identify_run(str(tmp_path), project="p", run_name=None, resumes=True) == again


# --- what goes wrong -------------------------------------------------------------------------------------------------


class Service:
    """Fails while it is broken, and in the end."""

    def __init__(self, name, *, is_broken):
        self.name, self.is_broken, self.entries = name, is_broken, []

    def log(self, entry, step):
        if self.is_broken:
            raise ConnectionError("no route to host")
        self.entries.append((step, entry))

    def finish(self):
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(caplog):
    broken, whole = Service("wandb", is_broken=True), Service("trackio", is_broken=False)
    group = Trackers([broken, whole])
    for step in (1, 2):
        group.log({"loss": 1.0}, step)
    assert [record.message for record in caplog.records] == [
        "wandb could not be written to (ConnectionError: no route to host). "
        "The run goes on, and metrics.jsonl has what is missing."
    ]
    broken.is_broken = False
    group.log({"loss": 1.0}, 3)
    group.finish()
    assert len(caplog.records) == 3
    assert [step for step, _ in whole.entries] == [1, 2, 3]
    assert [step for step, _ in broken.entries] == [3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_goes_on_when_the_disk_has_room_again(tmp_path, monkeypatch, caplog):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = TrackedRun(project="p", name="n", id="i", output_dir=str(tmp_path))
    group = start_each(["tensorboard"], run, {"seed": 0}, must_start=True)
    group.log({"loss": 1.0}, 1)
    with monkeypatch.context() as full:
        full.setattr(RecordWriter, "write", write)
        for step in (2, 3):
            group.log({"loss": 2.0}, step)
    for step in (4, 5):
        group.log({"loss": 3.0}, step)
    group.finish()
    assert sum("No space left" in record.message for record in caplog.records) == 1
    steps = tensorboard_scalars(read_tensorboard(tmp_path / "logs" / "n")).keys()
    assert {1, 5} <= steps
    assert not {2, 3} & steps


def test_a_tracker_that_does_not_start_ends_a_new_run_but_not_a_resumed_one(tmp_path, monkeypatch, caplog):
    def start(run, config):
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(tracker_libraries.TRACKERS, "wandb", start)
    run = TrackedRun(project="p", name="n", id="i", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"wandb could not be started \(RuntimeError: api_key.* run `wandb login`"):
        start_each(["wandb", "tensorboard"], run, {}, must_start=True)
    group = start_each(["wandb", "tensorboard"], run, {}, must_start=False)
    assert [tracker.name for tracker in group.trackers] == ["tensorboard"]
    assert "The resumed run goes on without it" in caplog.text
    group.finish()


def test_gifs_for_tensorboard_are_small_and_as_fast_as_the_video(tmp_path):
    write_clip(tmp_path / "large.mp4", seed=0, num_frames=33, height=480, width=832)
    summary = tracker_libraries.gif_summary("validation/00", CaptionedVideo(tmp_path / "large.mp4", "a ball"))
    width, height, gif = summary.value[0].tensor.string_val
    assert (width, height) == (b"320", b"185")
    with av.open(io.BytesIO(gif)) as container:
        assert float(container.duration / av.time_base) == pytest.approx(33 / 16, rel=0.05)
