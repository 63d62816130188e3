"""The rules of the house: who imports whom, and that what the documents show works."""

import ast
import importlib
import os
import re
import shlex
import statistics
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, SCRIPT_ENV


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "dataset_utils")
PACKAGE = sorted(path.relative_to(ROOT) for path in (ROOT / "causal_wan").rglob("*.py"))

# A file imports its own wing, or wings left of it; those at the root of the package are the ground.
WINGS = (
    *("ground", "config", "video", "tables", "data", "streams", "model", "weights", "cache", "methods", "sampling"),
    *("memory", "records", "training", "results", "runs", "evaluation", "distillation", "survey"),
)
# Scripts whose loss has that of another one in it.
PARTS = {"train_dmd": {"train_video_regression"}}

# What some must not know though it is left of them.
UNKNOWN = {
    "methods": {"data", "model", "weights", "video"},
    "sampling": {"methods", "data", "video"},
    "training": {"methods", "model", "data", "video", "sampling"},
    "data": {"devices", "processes", "flow"},
    "streams": {"devices", "processes", "flow"},
}


def imports(path):
    """Names of all imported modules, as they are written."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def wing_of(module):
    """causal_wan.model.vae -> model, causal_wan.flow -> ground."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "ground"


def module_of(path):
    return ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_file_imports_its_own_wing_or_wings_left_of_it(path):
    wing = wing_of(module_of(path))
    ours = {name for name in imports(ROOT / path) if name.startswith("causal_wan.")}
    assert not imports(ROOT / path) & {"dataset_utils", *SCRIPTS}
    assert all(WINGS.index(wing_of(name)) <= WINGS.index(wing) for name in ours)
    assert not {part for name in ours for part in name.split(".")[1:2]} & UNKNOWN.get(wing, set())


def test_wings_are_all_in_line_and_of_a_size_to_know_ones_way_in():
    wings = {path.name for path in (ROOT / "causal_wan").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert wings | {"ground"} == set(WINGS)
    files = {wing: [path for path in PACKAGE if wing_of(module_of(path)) == wing] for wing in WINGS}
    assert all(3 <= len(paths) <= 12 for paths in files.values())
    assert len(files["ground"]) <= 10


def test_files_and_functions_are_short():
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in PACKAGE}
    assert max(lengths.values()) <= 400
    assert statistics.median(lengths.values()) <= 160
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / path for path in PACKAGE)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                assert not body or body[-1].end_lineno - body[0].lineno < 60, f"{path}: {node.name}"


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
def test_scripts_import_each_other_only_where_one_method_is_a_part_of_another(script):
    assert imports(ROOT / f"{script}.py") & set(SCRIPTS) == PARTS.get(script, set())


def test_only_training_its_records_and_the_runs_of_scripts_know_accelerate():
    knowing = {
        wing_of(module_of(path)) for path in PACKAGE if any("accelerate" in n.split(".") for n in imports(ROOT / path))
    }
    assert knowing == {"records", "training", "runs", "distillation"}


def test_processes_gather_and_wait_for_each_other_in_one_way():
    """Through `causal_wan.processes`, which is patient and keeps what is gathered off the GPUs."""
    others = {"all_gather_object", "gather_object", "broadcast_object_list", "barrier", "wait_for_everyone"}
    for path in [*ROOT.glob("*.py"), *(ROOT / path for path in PACKAGE)]:
        called = {node.func.attr for node in ast.walk(ast.parse(path.read_text())) if is_method_call(node)}
        assert not called & others or path.stem == "processes", path


def is_method_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)


def test_flow_and_losses_draw_no_random_numbers_of_their_own():
    for module in ("flow", "methods/losses"):
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
    for path in [*ROOT.glob("*.py"), *(ROOT / path for path in PACKAGE)]:
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
