"""Holds back what libraries print unasked and nobody who runs these scripts can act on.

diffusers, peft and accelerate import bitsandbytes, torchao and DeepSpeed wherever these are installed, needed or not.
Called by the package's `__init__`, before any library is imported, and imports none.
"""

import logging
import os


UNNEEDED = {
    # A kernel for 4-bit weights on CPUs, where the scripts have none.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    # For the authors of torchao.
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported by",
    # Weights that torchao has saved, which no script reads.
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    # Said on a machine without a GPU by DeepSpeed; of use where it trains.
    "DeepSpeed": "Setting accelerator to CPU",
}
"""Name of a logger -> how the message begins, before its arguments are in it."""

SECONDS_BEFORE_A_BAR = 2


def hold_back(environ: dict[str, str] = os.environ) -> None:
    """Drops these messages, and progress bars that are short or another process's.

    All other messages of the same loggers come through.

    Args:
        environ: Of the process, as accelerate or torchrun has made it.
    """
    for name, beginning in UNNEEDED.items():
        if name == "DeepSpeed" and environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            continue
        logging.getLogger(name).addFilter(lambda record, beginning=beginning: not record.msg.startswith(beginning))
    # tqdm's own settings, which libraries that load weights follow too.
    environ.setdefault("TQDM_DELAY", str(SECONDS_BEFORE_A_BAR))
    if environ.get("LOCAL_RANK", "0") != "0":
        environ.setdefault("TQDM_DISABLE", "1")
