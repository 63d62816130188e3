"""The processes that tests start as forks are those that `accelerate launch` starts."""

import json
import os
import time

import pytest
from conftest import launch, launch_afresh, run_python, start_python


PORTS = {"MASTER_PORT", "TORCHELASTIC_RUN_ID"}  # the run is named after it
# Where torchrun looks for reasons, what it catches itself, and what importing DeepSpeed sets.
LEFT_OUT = {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "PYTORCH_NVML_BASED_CUDA_CHECK"}


@pytest.fixture
def write_script(tmp_path):
    def write(code):
        (tmp_path / "script.py").write_text(code)
        return tmp_path / "script.py"

    return write


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_processes": 2, "strategy": "fsdp2"}, {"num_processes": 2, "strategy": "zero3"}],
    ids=["one process", "fsdp2", "zero3"],
)
def test_forks_have_the_environment_arguments_and_paths_of_real_processes(write_script, settings):
    script = write_script(
        "import json, os, sys, multiprocessing\n"
        "found = {'env': dict(os.environ), 'argv': sys.argv, 'path': sys.path[0], 'cwd': os.getcwd()}\n"
        "found |= {'name': __name__, 'start_method': multiprocessing.get_start_method()}\n"
        "open(sys.argv[1] + os.environ.get('RANK', ''), 'w').write(json.dumps(found))\n"
        "os.write(1, b'out'), os.write(2, b'err')\n"
    )
    found = {}
    for start in (launch_afresh, launch):
        folder = script.parent / start.__name__
        folder.mkdir()
        result = start(script, None, folder / "rank", **settings)
        num_processes = settings.get("num_processes", 1)
        assert result.stdout.count("out") == result.stderr.count("err") == num_processes
        found[start] = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
        assert len(found[start]) == num_processes
    for real, fork in zip(found[launch_afresh], found[launch], strict=True):
        assert real.pop("argv")[0] == fork.pop("argv")[0]
        real_env, fork_env = real.pop("env"), fork.pop("env")
        assert fork_env.keys() - LEFT_OUT == real_env.keys() - LEFT_OUT
        different = {name for name in fork_env.keys() & real_env.keys() if fork_env[name] != real_env[name]}
        assert different <= PORTS
        assert fork == real


def test_a_process_that_fails_ends_the_others_with_its_status_and_output(write_script):
    script = write_script(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('this process broke on purpose')\n"
        "time.sleep(100)\n"
    )
    start = time.monotonic()
    result = launch(script, None, num_processes=2, check=False)
    assert time.monotonic() - start < 60
    assert result.returncode == 1
    assert "this process broke on purpose" in result.stderr
    with pytest.raises(AssertionError, match="broke on purpose"):
        launch(script, None, num_processes=2)


def test_a_process_that_hangs_is_ended(write_script, tmp_path):
    script = write_script("import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(100)\n")
    with pytest.raises(TimeoutError, match="must end within 3 s"), start_python(script, tmp_path / "pid") as forks:
        forks.finish(timeout=3)
    process_id = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


def test_forks_see_nothing_of_what_others_have_done(write_script):
    script = write_script("import os, torch\nprint(torch.rand(1))\ntorch.manual_seed(5)\nos.environ['X'] = '1'\n")
    first, second = (run_python(script, env={"Y": "2"}).stdout for _ in range(2))
    assert first == second
    assert "X" not in run_python(write_script("import os\nprint(*os.environ)\n")).stdout.split()
