"""The front door of the data: how a CSV of clips becomes batches.

    from torch.utils.data import DataLoader
    from dataset_utils import DataConfig, SampleStream, VideoDataset, collate, load_rows, order_samples
    config = DataConfig(metadata_path="metadata.csv", dataset_base_path="videos", num_frames=81)
    rows = load_rows(config)  # every row is checked by opening its file
    order = order_samples(rows, config, seed=42, samples_per_step=8)  # which row sample number n is
    samples = SampleStream(VideoDataset(rows, config), order, config, start=0, end=8000)
    for batch in DataLoader(samples, batch_size=2, num_workers=4, collate_fn=collate):
        batch.clips  # a list of uint8 (3, T, height, width)
        batch.prompts  # a list of their prompts, and so on: see ClipBatch

Everything in it knows files and samples, and no noise, model, rank or device. What a run sees is a function of the
seed and the sample's number: neither the number of processes and workers nor an interruption changes it.

The parts are in `causal_wan`: `tables` reads tables of any kind, `video` opens and decodes files, `data` makes rows,
clips and samples of them, and `streams` does so without a table.
"""

from causal_wan.data.buckets import order_samples
from causal_wan.data.clips import VideoDataset, load_video, normalize_videos
from causal_wan.data.rows import Row, load_rows
from causal_wan.data.samples import ClipBatch, SampleStream, collate
from causal_wan.data.settings import ClipShape, DataConfig


__all__ = [
    "ClipBatch",
    "ClipShape",
    "DataConfig",
    "Row",
    "SampleStream",
    "VideoDataset",
    "collate",
    "load_rows",
    "load_video",
    "normalize_videos",
    "order_samples",
]
