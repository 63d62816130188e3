"""The rules of the house: who imports whom, and that what the documents show works."""

import ast
import importlib
import os
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

# module -> the modules of ours that it may import, beside `basics` and `ranges`, which know nothing
ALLOWED = {
    "basics": set(),
    "ranges": set(),
    "settings": set(),
    "library_messages": set(),
    "progress": set(),
    "flow": set(),
    "losses": {"flow"},
    "context_parallel": set(),
    "block_attention": set(),
    "devices": set(),
    "flops": {"block_attention"},
    "compiling": {"transformer"},
    "transformer": {"block_attention", "context_parallel", "devices", "kv_cache"},
    "wan_names": set(),
    "lora_names": {"wan_names"},
    "models": {"progress", "transformer", "wan_names"},
    "memory": {"devices", "settings", "transformer"},
    "memory_simulation": {
        *("encoding", "kv_cache", "memory", "models", "rollout", "settings", "streaming_vae", "transformer"),
    },
    "memory_plan": {"memory_simulation", "settings"},
    "streaming_vae": {"encoding"},
    "kv_cache": {"devices"},
    "export": set(),
    "hub": {"regression_config", "run_log", "settings"},
    "encoding": {"context_parallel", "devices", "transformer"},
    "rollout": {"devices", "flow", "kv_cache", "transformer"},
    "video_writing": set(),
    "pipeline": {"devices", "encoding", "flow", "rollout", "streaming_vae", "transformer"},
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
    "processes": set(),
    "shared_memory": set(),
    "cached_data": {"data_config", "devices", "file_manifest", "models", "processes", "settings", "tensor_cache"},
    "table_sources": set(),
    "table_files": {"table_sources", "video_files"},
    "stream_sources": {"table_sources", "video_files"},
    "streaming": {"sample_order", "stream_sources", "video_files"},
    "tables": {"stream_sources", "table_files", "table_sources", "video_files"},
    "file_manifest": {"video_files"},
    "run_data": {
        *("cached_data", "data_config", "dataset_utils", "file_manifest", "processes", "settings", "shared_memory"),
        *("stream_sources", "streaming", "tensor_cache", "video_files"),
    },
    "prompt_files": set(),
    "trajectories": {"devices", "flow", "pipeline", "regression", "regression_config", "rollout", "transformer"},
    "teacher": {"models", "pipeline", "student", "transformer"},
    "trajectory_data": {
        *("cached_data", "data_config", "dataset_utils", "file_manifest", "run_data", "sample_order", "settings"),
        *("shared_memory", "streaming", "tensor_cache"),
    },
    "run_config": {"data_config", "regression_config", "settings"},
    "run_parts": {
        *("compiling", "config", "data_config", "export", "memory", "models", "run_config", "run_data", "strategies"),
        "transformer",
    },
    "prompt_embeddings": {
        *("cached_data", "encoding", "models", "processes", "progress", "run_parts", "settings", "tensor_cache"),
    },
    "run_plan": {
        *("changed_settings", "checkpoints", "config", "data_config", "memory_plan", "memory_simulation", "models"),
        "rollout",
        *("run_config", "run_data", "run_parts", "strategies"),
    },
    "method_inputs": {
        *("compiling", "data_config", "dataset_utils", "devices", "encoding", "losses", "memory", "regression"),
        *("run_config", "run_data", "training"),
    },
    "regression_run": {
        *("changed_settings", "checkpoints", "config", "dataset_utils", "encoding", "hub", "method_inputs", "models"),
        *("processes", "progress", "prompt_embeddings", "run_config", "run_data", "run_parts", "run_plan"),
        *("shared_memory", "strategies", "trackers", "training", "training_setup", "transformer", "validation"),
    },
    "row_records": {"data_config", "dataset_utils", "file_manifest", "tables", "video_files"},
    "dataset_survey": {"data_config"},
    "dataset_report": {"dataset_survey"},
    "config": set(),
    "trackers": set(),
    "run_log": {"trackers"},
    "changed_settings": set(),
    "checkpoint_checks": set(),
    "checkpoints": {"changed_settings", "checkpoint_checks", "config", "processes"},
    "strategies": {"settings"},
    "profiling": set(),
    "training_setup": {
        *("changed_settings", "checkpoint_checks", "checkpoints", "devices", "processes", "progress", "run_log"),
        *("settings", "strategies", "trackers"),
    },
    "training": {"checkpoints", "profiling", "progress", "run_log", "settings", "trackers", "training_setup"},
    "validation": {
        *("kv_cache", "memory", "pipeline", "processes", "progress", "regression", "rollout", "run_log"),
        *("strategies", "streaming_vae"),
        *("trackers", "transformer", "video_writing"),
    },
}

# What knows files and samples, and no noise, models or devices.
DATA = {"data_config", "file_manifest", "sample_order", "shared_memory", "table_sources", "tables", "video_files"}


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
    assert ours - {"basics", "ranges"} <= ALLOWED[module]


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
    assert knowing == {
        *("checkpoint_checks", "regression_run", "strategies", "training", "training_setup", "validation"),
    }


def test_processes_gather_and_wait_for_each_other_in_one_way():
    """Through `causal_wan.processes`, which is patient and keeps what is gathered off the GPUs."""
    others = {"all_gather_object", "gather_object", "broadcast_object_list", "barrier", "wait_for_everyone"}
    for path in [*ROOT.glob("*.py"), *(ROOT / "causal_wan").glob("*.py")]:
        called = {node.func.attr for node in ast.walk(ast.parse(path.read_text())) if is_method_call(node)}
        assert not called & others or path.stem == "processes", path


def is_method_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


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


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
LAUNCHER = r"(?:\w+=\S+ )*(?:python|accelerate launch\b.*?) "


def command_lines(text):
    """Its lines, those that a backslash continues as one."""
    return re.sub(r" \\+\n[#\s]*", " ", text).splitlines()


def documented_commands():
    """Every whole command line of ours in the documents, the recipes and the docstrings: (script, arguments)."""
    files = [*DOCUMENTS, *(ROOT / "examples").rglob("*.yaml"), *(ROOT / "examples").rglob("*.sh")]
    files += [ROOT / f"{script}.py" for script in SCRIPTS]
    for file in files:
        for line in command_lines(file.read_text()):
            match = re.match(r"^[#\s]*" + LAUNCHER + "(" + "|".join(SCRIPTS) + r")\.py +(--[^#$]*)$", line)
            if match:
                name = f"{file.name}: {match[1]} {match[2]}"[:80]
                yield pytest.param(match[1], shlex.split(match[2]), id=name)


def test_there_are_documented_commands():
    scripts = {parameters.values[0] for parameters in documented_commands()}
    assert scripts == set(SCRIPTS)


@pytest.mark.parametrize(("script", "arguments"), documented_commands())
def test_documented_commands_parse(script, arguments, monkeypatch):
    from causal_wan.config.parsing import parse_config

    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script)
    parse_config(module.Config, arguments, also_known=getattr(module, "TRAINING_SETTINGS", ()))


# --- the documents ---------------------------------------------------------------------------------------------------


def blocks(document, language):
    """The blocks of code of a language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def shown_commands():
    """Every line of the documents that is meant for a shell: (document, line)."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in command_lines(block):
                if line.strip():
                    name = f"{document.relative_to(ROOT)}: {line}"[:80]
                    yield pytest.param(line.split(" #")[0].strip(), id=name)


def fields_of(path):
    """Names of the settings of a script's `Config`."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    (config,) = (node for node in classes if node.name == "Config")
    return {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}


@pytest.mark.parametrize("command", shown_commands())
def test_every_command_of_the_documents_is_there(command):
    scripts = {parameters.values[0] for parameters in documented_commands()}
    if match := re.match(LAUNCHER + r"(\S+)\.py\b(.*)", command):
        if match[1] in scripts:
            assert match[2].startswith(" --")  # it is parsed above
        else:
            flags = {flag.split("=")[0] for flag in re.findall(r"--(\S+)", match[2])}
            assert flags <= fields_of(ROOT / f"{match[1]}.py")
    elif match := re.match(r"make (\w+)$", command):
        assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif match := re.match(r"(?:\w+=\S+ )*(sbatch )?(\S+\.sh)\b", command):
        assert match[1] or os.access(ROOT / match[2], os.X_OK)
        assert (ROOT / match[2]).is_file()
    else:
        assert re.match(r"(pip install [\w -]+|hf auth login)$", command)


def python_blocks():
    for document in DOCUMENTS:
        for number, block in enumerate(blocks(document, "python")):
            yield pytest.param(block, id=f"{document.relative_to(ROOT)}-{number}")


@pytest.mark.parametrize("block", python_blocks())
def test_python_of_the_documents_imports_what_there_is(block):
    imported = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert imported or "import" not in block
    for node in imported:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) for alias in node.names)


def anchors(document):
    """What GitHub calls the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_of_the_documents_lead_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = document if not path else document.parent / path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    folders = "accelerate_configs|benchmarks|causal_wan|docs|examples|tests"
    for path in re.findall(rf"`(?:\./)?((?:{folders})/[\w./*-]*)`", text):
        assert any(ROOT.glob(path)), path


def test_every_document_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_do_without_words_of_our_own(document):
    assert not re.findall(r"\b(?:levers?|rungs?|lineage)\b", document.read_text(), flags=re.IGNORECASE)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("wan_*.yaml")), ids=lambda path: path.name)
def test_recipes_parse_and_name_a_hub_checkpoint(path):
    recipe = yaml.safe_load(path.read_text())
    assert recipe["pretrained_model_name_or_path"].startswith("Wan-AI/")
