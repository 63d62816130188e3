"""The samples of a run in their order, and batches of them."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from causal_wan.data.clips import Loadable
from causal_wan.data.sample_order import SampleOrder
from causal_wan.data.settings import DataConfig
from causal_wan.seeds import RandomStream, seeded_generator


MAX_REPLACEMENTS = 10


class SampleStream(Dataset):
    """The samples of a run in their order: item i is sample number start + i, epoch after epoch, each shuffled anew.

    A data loader goes through it in sequence; shuffling, resuming and splitting over processes all follow from the
    numbers. A clip that does not decode is replaced by the next of its epoch and reported in `errors`. Of several
    prompts each sample draws one, or the empty prompt with a probability of `caption_dropout`.

    Args:
        dataset: Rows to stream.
        order: Their order, and that of their buckets.
        config: Gives each bucket its shape, and the caption dropout.
        start: Samples that the run has seen already.
        end: End of the run, in samples, all processes together.
    """

    def __init__(self, dataset: Loadable, order: SampleOrder, config: DataConfig, *, start: int, end: int) -> None:
        self.dataset, self.order, self.config = dataset, order, config
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < len(self):
            raise IndexError(item)
        number, errors = self.start + item, []
        generator = seeded_generator(self.order.seed, RandomStream.CLIP, number)
        shape = self.config.shape_at(self.order.bucket(number), self.order.step(number))
        for index in itertools.islice(self.order.candidates(number), MAX_REPLACEMENTS):
            try:
                sample = self.dataset.load(index, generator, shape)
            except ValueError as error:
                errors.append(str(error))
                continue
            prompt = choose_prompt(sample.pop("prompts"), self.config, seed=self.order.seed, number=number)
            return {**sample, "prompt": prompt, "sample_number": number, "errors": errors}
        raise ValueError(f"{len(errors)} clips in a row did not decode; the last: {errors[-1]}")


def choose_prompt(prompts: Sequence[str], config: DataConfig, *, seed: int, number: int) -> str:
    """The prompt of a sample, one of several, or the empty one."""
    if len(prompts) == 1 and not config.caption_dropout:
        return prompts[0]
    drop, choice = torch.rand(
        2, generator=seeded_generator(seed, RandomStream.CAPTION, number), dtype=torch.float64
    ).tolist()
    return "" if drop < config.caption_dropout else prompts[int(choice * len(prompts))]


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples -> a batch.

    Returns:
        Lists. clips: videos, uint8 `(3, T, height, width)`, and latents, float `(C, F, H, W)`; cache_keys: of videos
        whose latents are to be kept, else None; prompts and errors; row_indices, sample_numbers and num_valid_frames:
        ints and no tensors, which would wait for a GPU to tell them.
    """
    return {
        "clips": [sample["latents"] if "latents" in sample else sample["video"] for sample in samples],
        "cache_keys": [sample.get("cache_key") for sample in samples],
        "prompts": [sample["prompt"] for sample in samples],
        "row_indices": [sample["row_index"] for sample in samples],
        "sample_numbers": [sample["sample_number"] for sample in samples],
        "num_valid_frames": [sample["num_valid_frames"] for sample in samples],
        "errors": [error for sample in samples for error in sample["errors"]],
    }
