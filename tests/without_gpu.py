"""Runs a script as `accelerate launch` would on GPUs, on CPUs: accelerate has no CPU path for FSDP and DeepSpeed.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 tests/without_gpu.py SCRIPT ...

Only tests use it. It tells accelerate that gloo is a GPU backend and that the device is the CPU.
"""

import os
import runpy
import sys

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType


os.environ["DS_ACCELERATOR"] = "cpu"
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
torch.Tensor.pin_memory = lambda self, *args: self  # offloading pins memory, which needs a GPU's driver
stock_init = Accelerator.__init__
Accelerator.__init__ = lambda self, **kwargs: stock_init(self, **{**kwargs, "cpu": False})

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
