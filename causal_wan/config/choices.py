"""What flags of several scripts choose from. Imports no library."""

from typing import Literal


LossType = Literal["mse", "l1", "huber"]
LossSpace = Literal["latents", "velocity"]
LossWeighting = Literal["none", "bell", "min_snr"]
LpipsNet = Literal["alex", "vgg", "squeeze"]
LoraNames = Literal["diffusers", "original", "comfyui", "kohya"]
MAX_VBENCH_SAMPLES = 1000  # of a prompt
