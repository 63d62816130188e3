"""Kinds of flags of several scripts: what they choose from, and what names files. Imports no library."""

from typing import Annotated, Literal


LossType = Literal["mse", "l1", "huber"]
LossSpace = Literal["latents", "velocity"]
LossWeighting = Literal["none", "bell", "min_snr"]
LpipsNet = Literal["alex", "vgg", "squeeze"]
LoraNames = Literal["diffusers", "original", "comfyui", "kohya"]
MAX_VBENCH_SAMPLES = 1000  # of a prompt

ON_THIS_MACHINE = "on this machine"  # a mark that `causal_wan.config.fields.paths_of` looks for
LocalPath = Annotated[str, ON_THIS_MACHINE]
"""A file or a folder, or what may be one: nobody else finds it, nor has to know of it."""
