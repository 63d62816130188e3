"""Starts processes: `accelerate launch` as it is, and forks of a process that has the libraries loaded.

A start of Python loads libraries for 9 s of processor time, `accelerate launch` with two processes for 20. `launch`
therefore forks. accelerate's own launcher reads the real YAML and makes the environment, up to the point where it
would start Python; there a fork becomes each process. Strategies, signals and torchrun's report of failures have
tests that start the real thing, with `launch_afresh`.
"""

import atexit
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import accelerate.commands.launch as accelerate_launch
import torch
import torch.distributed.run


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPT_ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "10"}
# Shell scripts find the `python` and `accelerate` that the tests run with.
SCRIPT_ENV["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])


def run_script(command, *, check=True, env=None, timeout=300):
    """Runs a command of ours in the repository; its output is part of a failure."""
    full_env = {**SCRIPT_ENV, **(env or {})}
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=full_env, capture_output=True, text=True, timeout=timeout
    )
    return expect_success(result) if check else result


def run_shell_script(command, *, env, timeout=900):
    """A shell script of ours, whose `python` and `accelerate launch` are forks."""
    with ShellCommands() as commands:
        return run_script(command, env={**env, **commands.env}, timeout=timeout)


def expect_success(result):
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result


def launch_arguments(script, recipe_path, *flags, num_processes=1, strategy=None, launch_flags=(), wrapper=()):
    """Arguments of `accelerate launch` on the CPU, and its environment; a strategy for GPUs by `without_gpu.py`."""
    config = strategy or ("cpu" if num_processes == 1 else "cpu_ddp")
    arguments = ["--config_file", f"accelerate_configs/{config}.yaml", "--num_processes", num_processes]
    arguments += ["--main_process_port", 0, *launch_flags]  # any free one: tests may run side by side
    arguments += [TESTS / "without_gpu.py"] if strategy else []
    arguments += [*wrapper, script, *(["--config", recipe_path] if recipe_path else []), *flags]
    return list(map(str, arguments)), {} if strategy else {"ACCELERATE_USE_CPU": "true"}


def launch_afresh(*arguments, check=True, env=None, **settings):
    """`accelerate launch` as users start it; arguments are those of `launch_arguments`."""
    arguments, cpu_env = launch_arguments(*arguments, **settings)
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    return run_script(command, check=check, env={**cpu_env, **(env or {})})


def launch(*arguments, check=True, env=None, **settings):
    """What `accelerate launch` starts, in forks; arguments are those of `launch_arguments`."""
    arguments, cpu_env = launch_arguments(*arguments, **settings)
    num_processes, command, env = resolve_launch(arguments, {**SCRIPT_ENV, **cpu_env, **(env or {})})
    with Forks(command, env, num_processes) as forks:
        result = forks.finish()
    return expect_success(result) if check else result


def run_python(script, *flags, check=True, env=None):
    """`python SCRIPT FLAGS` in a fork."""
    with start_python(script, *flags, env=env) as forks:
        result = forks.finish()
    return expect_success(result) if check else result


def start_python(script, *flags, env=None):
    """`python SCRIPT FLAGS` in a fork that is not waited for."""
    return Forks([str(script), *map(str, flags)], {**SCRIPT_ENV, **(env or {})})


def resolve_launch(arguments, env):
    """What `accelerate launch ARGUMENTS` would start: the number of processes, or None without torchrun; the command
    without `python`; and the environment, but for what torchrun adds for each process.
    """
    started = []

    def note_processes(args):
        command = [args.training_script, *args.training_script_args]
        started.append((int(args.nproc_per_node), command, dict(os.environ)))

    def note_process(args):
        (_, *command), env = accelerate_launch.prepare_simple_launcher_cmd_env(args)
        started.append((None, command, env))

    with (
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(torch.distributed.run, "run", note_processes),
        mock.patch.object(accelerate_launch, "simple_launcher", note_process),
    ):
        accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(arguments))
    (start,) = started
    return start


def rank_environments(num_processes):
    """What torchrun adds to the environment of each process, and the store at which they meet."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
    common |= {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "ROLE_WORLD_SIZE": num_processes}
    common |= {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "ROLE_NAME": "default", "TORCHELASTIC_RUN_ID": "none"}
    common |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0, "TORCH_NCCL_ASYNC_ERROR_HANDLING": 1}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank} for rank in range(num_processes)]
    return [{name: str(value) for name, value in {**common, **own}.items()} for own in ranks], store


class Forks:
    """`python COMMAND` in forks that run already; with a number of processes as torchrun starts them.

    A context, which kills what still runs when it is left.

    Attributes:
        processes: By rank.
    """

    def __init__(self, command, env, num_processes=None):
        context = fork_context()
        self.command, self._folder = command, tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        additions, self._store = ([{}], None) if num_processes is None else rank_environments(num_processes)
        given = [(command, {**env, **own}, self._outputs) for own in additions]
        self.processes = [context.Process(target=become, args=arguments) for arguments in given]
        for process in self.processes:
            process.start()

    def finish(self, timeout=300):
        """Waits for all, or for the first that fails; status and output, as `subprocess.run` gives them."""
        deadline, running, status = time.monotonic() + timeout, list(self.processes), 0
        while running and status == 0:
            sentinels = [process.sentinel for process in running]
            ready = multiprocessing.connection.wait(sentinels, deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"the processes must end within {timeout} s")
            for process in [process for process in running if process.sentinel in ready]:
                process.join()
                running.remove(process)
                status = status or process.exitcode
        texts = [path.read_text(errors="replace") for path in self._outputs]
        return subprocess.CompletedProcess(self.command, status, *texts)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers of its data loaders
                process.kill()
            process.join()
            process.close()
        self._folder.cleanup()


SHELL_COMMAND = f"""#!{sys.executable} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(os.environ["FORKING_SOCKET"])
    connection.sendall(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ)]).encode())
    connection.shutdown(socket.SHUT_WR)
    status, stdout, stderr = json.load(connection.makefile())
sys.stdout.write(stdout)
sys.stderr.write(stderr)
sys.exit(status)
"""


class ShellCommands(socketserver.UnixStreamServer):
    """`python FILE` and `accelerate launch` of shell scripts, in forks; `python -c` and `-m` are Python's own.

    A context.

    Attributes:
        env: With which a script finds them.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        super().__init__(str(folder / "socket"), None)
        for name in ("python", "accelerate"):
            (folder / name).write_text(SHELL_COMMAND)
            (folder / name).chmod(0o755)
        self.env = {
            "FORKING_SOCKET": str(folder / "socket"),
            "PATH": os.pathsep.join([str(folder), SCRIPT_ENV["PATH"]]),
        }
        self._thread = threading.Thread(target=self.serve_forever)

    def finish_request(self, request, client_address):
        """Runs one command; they come one at a time."""
        with request.makefile("rw") as connection:
            result = self._run(*json.load(connection))
            json.dump([result.returncode, result.stdout, result.stderr], connection)

    @staticmethod
    def _run(name, arguments, env):
        if name == "python" and arguments[0].startswith("-"):
            return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
        num_processes, command = None, arguments
        if name == "accelerate":
            num_processes, command, env = resolve_launch(arguments[1:], env)
        with Forks(command, env, num_processes) as forks:
            return forks.finish(timeout=900)

    def __enter__(self):
        fork_context()
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self._thread.join()
        self.server_close()
        self._folder.cleanup()


def fork_context():
    """`multiprocessing` with processes that are forks of one with the libraries loaded, which has no threads.

    That one is started once for each process of pytest.
    """
    context = multiprocessing.get_context("forkserver")
    # Whether there is a GPU is asked in a way that leaves CUDA to the forks.
    settings = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "DS_ACCELERATOR": "cpu"}
    settings |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS)))}
    with mock.patch.dict(os.environ, {**SCRIPT_ENV, **settings}):
        context.set_forkserver_preload(["preloaded", "launching"])
        multiprocessing.forkserver.ensure_running()
    return context


def become(command, env, outputs):
    """Makes a fork what `python COMMAND` would be."""
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)  # each process adds to what there is
        os.dup2(descriptor, number)
        os.close(descriptor)
    assert "preloaded" in sys.modules, "preloaded.py could not be imported; `python tests/preloaded.py` says why"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # that of the platform, not that of this process
    sys.argv, sys.path[0] = command, os.path.dirname(os.path.abspath(command[0]))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
