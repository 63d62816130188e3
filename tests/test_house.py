"""The rules of the house: who imports whom, and that what the documents show works."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SCRIPT_ENV


ROOT = Path(__file__).parents[1]
PACKAGE = sorted(path.stem for path in (ROOT / "causal_wan").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "dataset_utils")

# module -> the modules of ours that it may import, beside `basics`, which knows nothing
ALLOWED = {
    "basics": set(),
    "settings": set(),
    "progress": set(),
    "flow": set(),
    "losses": {"flow"},
    "context_parallel": set(),
    "block_attention": set(),
    "devices": set(),
    "flops": {"block_attention"},
    "compiling": {"transformer"},
    "transformer": {"block_attention", "context_parallel", "kv_cache"},
    "wan_names": set(),
    "lora_names": {"wan_names"},
    "models": {"progress", "transformer", "wan_names"},
    "memory": {"settings", "transformer"},
    "memory_simulation": {
        *("encoding", "kv_cache", "memory", "models", "rollout", "settings", "streaming_vae", "transformer"),
    },
    "memory_plan": {"memory_simulation", "settings"},
    "streaming_vae": {"encoding"},
    "kv_cache": set(),
    "export": set(),
    "hub": {"regression_config", "settings"},
    "encoding": {"context_parallel", "devices", "transformer"},
    "rollout": {"flow", "kv_cache", "transformer"},
    "video_writing": set(),
    "pipeline": {"encoding", "flow", "rollout", "streaming_vae", "transformer"},
    "regression_config": {"flow", "losses"},
    "regression": {"devices", "flow", "losses", "regression_config"},
    "student": {
        *("flow", "kv_cache", "models", "pipeline", "progress", "regression_config", "settings", "transformer"),
        *("wan_names",),
    },
    "video_files": {"data_config"},
    "video_metrics": set(),
    "learned_metrics": set(),
    "sample_figures": {"learned_metrics", "progress", "video_metrics"},
    "heldout_loss": {
        *("dataset_utils", "encoding", "flow", "losses", "pipeline", "progress", "regression", "regression_config"),
    },
    "evaluation_report": {"video_writing"},
    "vbench_export": {"video_writing"},
    "sample_order": set(),
    "data_config": set(),
    "tensor_cache": set(),
    "cached_data": {"data_config", "file_manifest", "models", "settings", "tensor_cache"},
    "table_sources": set(),
    "table_files": {"table_sources", "video_files"},
    "stream_sources": {"table_sources", "video_files"},
    "streaming": {"sample_order", "stream_sources", "video_files"},
    "tables": {"stream_sources", "table_files", "table_sources", "video_files"},
    "file_manifest": {"video_files"},
    "run_data": {
        *("cached_data", "data_config", "dataset_utils", "file_manifest", "settings", "stream_sources", "streaming"),
        *("video_files",),
    },
    "prompt_files": set(),
    "trajectories": {"devices", "flow", "pipeline", "regression", "regression_config", "rollout", "transformer"},
    "teacher": {"models", "pipeline", "student", "transformer"},
    "trajectory_data": {
        *("cached_data", "data_config", "dataset_utils", "file_manifest", "run_data", "sample_order", "settings"),
        *("streaming", "tensor_cache"),
    },
    "run_config": {"data_config", "regression_config", "settings"},
    "run_parts": {
        *("cached_data", "compiling", "config", "data_config", "encoding", "export", "memory", "models"),
        *("run_config", "run_data", "settings", "strategies", "transformer"),
    },
    "run_plan": {
        *("config", "data_config", "memory_plan", "memory_simulation", "models", "rollout"),
        *("run_config", "run_data", "run_parts", "strategies"),
    },
    "method_inputs": {
        *("compiling", "data_config", "dataset_utils", "devices", "encoding", "losses", "memory", "regression"),
        *("run_config", "run_data", "training"),
    },
    "regression_run": {
        *("checkpoints", "config", "dataset_utils", "encoding", "hub", "method_inputs", "models", "progress"),
        *("run_config",),
        *("run_data", "run_parts", "run_plan", "strategies", "trackers", "training", "training_setup"),
        *("transformer", "validation"),
    },
    "row_records": {"data_config", "dataset_utils", "file_manifest", "tables", "video_files"},
    "dataset_survey": {"data_config"},
    "dataset_report": {"dataset_survey"},
    "config": set(),
    "trackers": set(),
    "run_log": {"trackers"},
    "checkpoints": set(),
    "strategies": set(),
    "profiling": set(),
    "training_setup": {"checkpoints", "devices", "progress", "run_log", "settings", "strategies", "trackers"},
    "training": {"checkpoints", "profiling", "progress", "run_log", "settings", "trackers", "training_setup"},
    "validation": {
        *("kv_cache", "memory", "pipeline", "progress", "regression", "rollout", "run_log", "streaming_vae"),
        *("trackers", "transformer", "video_writing"),
    },
}

# What knows files and samples, and no noise, models or devices.
DATA = {"data_config", "file_manifest", "sample_order", "table_sources", "tables", "video_files"}


def imports(path):
    """Names of all imported modules, ours as `flow`, `dataset_utils`, ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found |= {name.removeprefix("causal_wan.") for name in names}
    return found


@pytest.mark.parametrize("module", PACKAGE)
def test_package_modules_import_only_what_they_may_know(module):
    ours = imports(ROOT / "causal_wan" / f"{module}.py") & {*PACKAGE, *SCRIPTS, "dataset_utils"}
    assert ours - {"basics"} <= ALLOWED[module]


def test_dataset_utils_imports_what_knows_files_alone():
    assert imports(ROOT / "dataset_utils.py") & {*PACKAGE, *SCRIPTS} <= DATA


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "status", "answer"), [(["--help"], 0, "usage"), (["--no_such_flag", "1"], 2, "no_such_flag")]
)
def test_help_and_mistakes_are_answered_before_anything_is_imported_that_takes_time(
    script, flags, status, answer, tmp_path
):
    for library in ("torch", "diffusers", "transformers", "accelerate", "numpy", "av"):
        (tmp_path / f"{library}.py").write_text("raise SystemExit('imported before the flags were read')")
    env = {**SCRIPT_ENV, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, f"{script}.py", *flags]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert answer in result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_never_import_each_other(script):
    assert not imports(ROOT / f"{script}.py") & set(SCRIPTS)


def test_only_training_and_the_runs_of_scripts_know_accelerate():
    knowing = {
        m for m in PACKAGE if any(n.split(".")[0] == "accelerate" for n in imports(ROOT / f"causal_wan/{m}.py"))
    }
    assert knowing == {"regression_run", "strategies", "training", "training_setup"}


def test_flow_and_losses_draw_no_random_numbers_of_their_own():
    for module in ("flow", "losses"):
        source = (ROOT / "causal_wan" / f"{module}.py").read_text()
        assert not re.search(r"torch\.(randn?|randint|randperm|bernoulli|multinomial|normal)\b|_like\(.*rand", source)


OURS = [path for path in ROOT.rglob("*.py") if not {".venv", "outputs"} & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_of_ours_unpickles_a_file_or_trusts_remote_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom) and "tests" not in path.parts:
            assert not {"pickle", "dill", "joblib", "cloudpickle"} & {alias.name for alias in node.names}
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        refused = {"allow_pickle"} if path.name == "test_export.py" else {"allow_pickle", "trust_remote_code"}
        assert not refused & arguments.keys()
        if name == "torch.load":
            assert arguments.get("weights_only") == "True"


def test_config_is_never_read_with_a_default_of_its_own():
    for path in [*ROOT.glob("*.py"), *(ROOT / "causal_wan").glob("*.py")]:
        assert not re.search(r"getattr\((self\.)?config, \"", path.read_text()), path


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_configs_load_and_say_when_to_use_them(path):
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))
    assert path.read_text().startswith("# ")


def documented_commands():
    """Every whole command line of ours in the README, the recipes and the docstrings: (script, arguments)."""
    files = [ROOT / "README.md", *(ROOT / "examples").rglob("*.yaml"), *(ROOT / "examples").rglob("*.sh")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS]
    for file in files:
        text = re.sub(r" \\+\n[#\s]*", " ", file.read_text())
        for line in text.splitlines():
            launcher = r"^[#\s]*(?:\w+=\S+ )*(?:python|accelerate launch\b.*?) "
            match = re.match(launcher + "(" + "|".join(SCRIPTS) + r")\.py +(--[^#$]*)$", line)
            if match:
                name = f"{file.name}: {match[1]} {match[2]}"[:80]
                yield pytest.param(match[1], shlex.split(match[2]), id=name)


def test_there_are_documented_commands():
    scripts = {parameters.values[0] for parameters in documented_commands()}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize(("script", "arguments"), documented_commands())
def test_documented_commands_parse(script, arguments, monkeypatch):
    import importlib

    from causal_wan.config import parse_config

    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script)
    parse_config(module.Config, arguments, also_known=getattr(module, "TRAINING_SETTINGS", ()))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("wan_*.yaml")), ids=lambda path: path.name)
def test_recipes_parse_and_name_a_hub_checkpoint(path):
    recipe = yaml.safe_load(path.read_text())
    assert recipe["pretrained_model_name_or_path"].startswith("Wan-AI/")
