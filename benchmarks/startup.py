"""From the command to the first step."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import Bench, table
from steps import ROOT, make_sketches


# Runs the training script and prints the seconds since the process began: when its imports are done, when its parts
# are loaded, and when the first step is.
TIMED = """
import sys, time
sys.argv = ["train_video_regression.py", *sys.argv[2:]]
start = float(%r)
import train_video_regression as script
from causal_wan.runs import regression as regression_run
from causal_wan.training import loop as training
from causal_wan.config.parsing import parse_config
config = parse_config(script.Config)
print("\\nimports", time.time() - start, flush=True)
begin_run, train_step = regression_run.begin_run, training.train_step
def begun(*given):
    result = begin_run(*given)
    print("\\nloaded", time.time() - start, flush=True)
    return result
def stepped(*given):
    train_step(*given)
    print("\\nstep", time.time() - start, flush=True)
regression_run.begin_run, training.train_step = begun, stepped
script.main(config)
"""


def measure_startup(bench: Bench) -> list[str]:
    """What a mistake costs, and what is between the command and the first step, on the embedded checkpoint."""
    rows = []
    for name, flags in (("`--help`", ["--help"]), ("a flag that there is not", ["--no_such_flag", "1"])):
        times = [time_script(flags) for _ in range(3)]
        rows.append((name, f"{min(times):.2f}"))
    goal = bench.goal("seconds until --help and mistakes are answered", max(float(row[1]) for row in rows), at_most=2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_sketches(folder)
        flags = ["--config", "examples/objectives/recipe.yaml", "--max_train_steps", "1"]
        flags += ["--output_dir", folder / "run", "--validation_metadata_path", "None"]
        flags += ["--dataset_base_path", folder / "data" / "videos", "--metadata_path", folder / "data" / "train.csv"]
        command = [sys.executable, "-c", TIMED % time.time(), "-", *flags]
        result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    marks = {line[0]: line[1] for line in lines if len(line) == 2}
    texts = {
        "imports": "a run: imports",
        "loaded": "... and data checked, prompts embedded, weights loaded",
        "step": "... and the first step of 8 sketches, encoded",
    }
    rows += [(text, f"{float(marks[name]):.2f}") for name, text in texts.items()]
    return [*table(("from the command on", "seconds"), rows), "", goal]


def time_script(flags: list[str]) -> float:
    """Seconds of the training script with flags that end it at once."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "train_video_regression.py", *flags], cwd=ROOT, capture_output=True)
    return time.perf_counter() - start
