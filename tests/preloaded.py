"""What the process has loaded that `launching.py` forks: the scripts, and the libraries that runs come to load."""

import gc
import importlib
import importlib.util
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# Later in a run, or by tests. Not trackio, whose folder is fixed when it is imported.
LIBRARIES = ["deepspeed", "bitsandbytes", "matplotlib.pyplot", "typeguard", "av.subtitles", "torch.utils.tensorboard"]

for name in SCRIPTS:
    importlib.import_module(name)
for name in LIBRARIES:
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)

# jemalloc, of pyarrow, has one that minds forks.
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
others = [name for name in threads if name != "jemalloc_bg_thd"]
assert len(others) <= 1, f"a process that is forked must have one thread, got {others}"
# Garbage is collected by imageio at the end of each file: not among half a million objects that stay.
gc.collect()
gc.freeze()
