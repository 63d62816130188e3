"""Videos in the folder that VBench's own runner reads, under the names that it expects.

    FOLDER/videos/{prompt}-{index}.mp4    index 0, 1, ...: what its standard mode looks for
    FOLDER/prompts.json                   {name of the video: prompt}: `--mode=custom_input --prompt_file`
    FOLDER/settings.json                  what the videos were made with; index i has the seed of index 0, plus i

A prompt that cannot be the name of a file (too long, or with a slash) gets a shortened name with a digest in it. The
custom mode finds such videos by prompts.json; the standard mode does not, but no prompt of VBench's own suite is one.

Source: Huang et al., VBench, arXiv 2311.17982.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from causal_wan.config.choices import MAX_VBENCH_SAMPLES
from causal_wan.geometry import FRAME_RATE
from causal_wan.video.writing import write_video


MAX_NAME_BYTES = 255  # of file systems
UNSAFE = re.compile(r"[/\x00-\x1f\x7f]")
DIGEST_LENGTH = 10


def file_stem(prompt: str) -> str:
    """The prompt itself where it can name a file; else its beginning, cleaned, with a digest of the whole."""
    limit = MAX_NAME_BYTES - len(f"-{MAX_VBENCH_SAMPLES - 1}.mp4")
    if not UNSAFE.search(prompt) and len(prompt.encode()) <= limit:
        return prompt
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:DIGEST_LENGTH]
    kept = UNSAFE.sub("_", prompt).encode()[: limit - len(digest) - 1].decode(errors="ignore")
    return f"{kept} {digest}"


class VBenchExport:
    """A folder of samples for VBench; one that was interrupted goes on, videos that are there are kept.

    Args:
        folder: See above.
        prompts: What to sample; each distinct one once.
        num_samples: Of each prompt; VBench expects 5, and 25 for temporal flickering.
        settings: All that shapes the videos; JSON.

    Raises:
        ValueError: If the folder holds something else, or videos of other settings.
    """

    def __init__(self, folder: str | Path, prompts: Sequence[str], num_samples: int, settings: dict[str, Any]) -> None:
        self.folder, self.num_samples = Path(folder), num_samples
        self.prompts = list(dict.fromkeys(prompts))
        self.settings = json.dumps(settings, indent=1, sort_keys=True)
        if self.folder.exists() and any(self.folder.iterdir()):
            self._check_settings()

    def _check_settings(self) -> None:
        path = self.folder / "settings.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != self.settings:
            raise ValueError(
                f"vbench_export must be a new folder or one of the same settings, but {self.folder} holds "
                f"{'videos of other settings' if path.is_file() else 'something else'}; name another, or remove it."
            )

    @property
    def renamed(self) -> list[str]:
        """Prompts that cannot be names of files."""
        return [prompt for prompt in self.prompts if file_stem(prompt) != prompt]

    def write(self, sample: Callable[[int, int, str], torch.Tensor], frame_rate: float = FRAME_RATE) -> None:
        """Samples what is not there yet.

        Args:
            sample: Index of the sample, number of the prompt, prompt -> video in [-1, 1], `(3, T, height, width)`.
            frame_rate: Frames a second of the files.
        """
        videos = self.folder / "videos"
        videos.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(self.settings, encoding="utf-8")
        names, wanted = {}, []
        for number, prompt in enumerate(self.prompts):
            for index in range(self.num_samples):
                name = f"{file_stem(prompt)}-{index}.mp4"
                names[name] = prompt
                wanted.append((videos / name, index, number, prompt))
        (self.folder / "prompts.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
        for path, index, number, prompt in tqdm(wanted, desc="videos for VBench"):
            if not path.exists():
                unfinished = self.folder / "unfinished.mp4"  # beside videos/, where VBench counts files
                write_video(unfinished, sample(index, number, prompt), frame_rate)
                unfinished.replace(path)
