"""Runs a script of which the process with RANK 1 breaks at the third step: `failing_rank.py raise|die SCRIPT ...`."""

import os
import runpy
import signal
import sys


sys.path.insert(0, os.getcwd())

import causal_wan.training.steps


stock_step, how, steps = causal_wan.training.steps.train_step, sys.argv[1], []


def train_step(*arguments, **settings):
    steps.append(None)
    if os.environ.get("RANK") == "1" and len(steps) == 3:
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("this process broke on purpose")
    stock_step(*arguments, **settings)


if __name__ == "__main__":
    sys.argv = sys.argv[2:]
    causal_wan.training.steps.train_step = train_step
    runpy.run_path(sys.argv[0], run_name="__main__")
