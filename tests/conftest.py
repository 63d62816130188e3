"""A tiny WAN with random weights and a few short clips, made once: what the script tests run on."""

import csv
import gc
import importlib
import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from launching import ROOT, SCRIPT_ENV, launch, launch_afresh, run_python, run_script, run_shell_script, start_python


__all__ = [
    "ROOT",
    "SCRIPT_ENV",
    "launch",
    "launch_afresh",
    "run_python",
    "run_script",
    "run_shell_script",
    "start_python",
]

TINY_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}


def write_clip(path, seed, num_frames=17, height=32, width=48):
    """A ball that crosses a grey field."""
    rng = np.random.default_rng(seed)
    colour, (y, x) = rng.integers(0, 255, 3), rng.integers(8, 24, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, width=width, height=height, options={"threads": "1"})
        stream.pix_fmt = "yuv420p"
        for time in range(num_frames):
            frame = np.full((height, width, 3), 200, np.uint8)
            frame[y - 4 : y + 4, x + time - 4 : x + time + 4] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with videos/, train.csv (6 rows) and heldout.csv (2 rows)."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "videos").mkdir()
    for name, seeds in (("train", range(6)), ("heldout", range(6, 8))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "prompt"])
            for seed in seeds:
                write_clip(folder / "videos" / f"{seed}.mp4", seed)
                writer.writerow([f"{seed}.mp4", f"a ball, number {seed}, crosses the field"])
    return folder


@pytest.fixture(scope="session")
def tars(clips, tmp_path_factory):
    """The clips as WebDataset tars, two clips a tar; settings of a run that streams them."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for seed in (2 * number, 2 * number + 1):
                tar.add(clips / "videos" / f"{seed}.mp4", f"{seed}.mp4")
                prompt = f"a ball, number {seed}, crosses the field".encode()
                info = tarfile.TarInfo(f"{seed}.txt")
                info.size = len(prompt)
                tar.addfile(info, io.BytesIO(prompt))
    return {
        "streaming": True,
        "dataset_base_path": None,
        "metadata_path": str(folder),
        "video_column": "mp4",
        "caption_column": "txt",
        "validation_metadata_path": None,
        "lr_scheduler": "constant",
        "max_train_steps": 6,
        "shuffle_buffer_size": 2,
        "frames_schedule": "0:9,3:17",
    }


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A complete WAN folder in which everything is as small as it can be; random weights."""
    vae = {"z_dim": 16, "dim_mult": [1, 1, 1], "temperal_downsample": [True, True]}
    return save_tiny_pipeline(tmp_path_factory.mktemp("checkpoint"), vae)


@pytest.fixture(scope="session")
def checkpoint_5b(tmp_path_factory):
    """The same of WAN 2.2 TI2V-5B: 48 latent channels, 16 pixels to a latent, a VAE with shortcuts."""
    vae = {
        "z_dim": 48,
        "dim_mult": [1, 1, 1, 1],
        "temperal_downsample": [False, True, True],
        "decoder_base_dim": 4,
        "is_residual": True,
        "latents_mean": [0.0] * 48,
        "latents_std": [1.0] * 48,
        "scale_factor_spatial": 16,
    }
    folder = tmp_path_factory.mktemp("checkpoint-5b")
    return save_tiny_pipeline(folder, vae, in_channels=48, out_channels=48, expand_timesteps=True)


def save_tiny_pipeline(folder, vae, *, expand_timesteps=False, **architecture):
    """Writes a WAN pipeline with a VAE and a transformer of these settings, and returns the folder."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "sketch" / "tiny-wan" / "tokenizer")
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(base_dim=4, num_res_blocks=1, in_channels=12, out_channels=12, patch_size=2, **vae),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            text_dim=16,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            **architecture,
        ),
        expand_timesteps=expand_timesteps,
    )
    pipeline.save_pretrained(folder)
    return folder


TINY_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip_parts():
    """A tokenizer, and settings of the text and the vision tower of models like CLIP."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "sketch" / "tiny-wan" / "tokenizer")
    text = {**TINY_TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**TINY_TOWER, "image_size": 32, "patch_size": 16}
    return tokenizer, text, vision


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP as small as it can be; random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer, text, vision = tiny_clip_parts()
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe(clips, checkpoint, tmp_path_factory):
    """Settings of a short run, as a dict of flags."""
    return {
        "pretrained_model_name_or_path": str(checkpoint),
        "dataset_base_path": str(clips / "videos"),
        "metadata_path": str(clips / "train.csv"),
        "validation_metadata_path": str(clips / "heldout.csv"),
        "num_frames": 17,
        "height": 32,
        "width": 48,
        "num_frame_per_block": 1,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 2,
        "validation_steps": 4,
        "num_validation_samples": 2,
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }


# One thread: sums over threads depend on how many there are, and the tests compare to the last bit.
torch.set_num_threads(1)


# Files whose tests take longest, the longest first: none of them is left over when all others are done.
LONGEST = (
    *("test_strategies", "test_train_ode_regression", "test_sketch", "test_check_dataset"),
    *("test_train_video_regression", "test_memory", "test_faults"),
)


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
    gc.freeze()  # what is imported by now; for the forks of `make mutants`, which would each go through it


@pytest.fixture(autouse=True, scope="module")
def nothing_lasting_in_garbage():
    """Leaves all that is loaded out of collections of garbage, of which imageio asks for two with each file."""
    gc.collect()
    gc.freeze()


def flip_last_bit(path):
    """Damages a file as little as can be."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def run_here(script, *flags):
    """A script in this process, which has the libraries loaded already."""
    from accelerate.state import AcceleratorState

    from causal_wan.config.parsing import parse_config

    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(script.removesuffix(".py"))
    also_known = getattr(module, "TRAINING_SETTINGS", ())
    module.main(parse_config(module.Config, list(map(str, flags)), also_known=also_known))


def in_processes(function, *arguments, backend="fake", timeout=600.0):
    """What `function(rank, *arguments)` returns in each of two processes that are forked off this one.

    Args:
        function: Computes no gradients, which torch refuses after a fork.
        arguments: Of it.
        backend: Of the group of all processes. That of the tests' `fake` stands for NCCL where there is no GPU: what
            is gathered through it is lost.
        timeout: Seconds that this group waits.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        processes = [
            context.Process(target=_run_as, args=(rank, folder, backend, timeout, results, function, arguments))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = dict(results.get() for _ in processes)
        for process in processes:
            process.join(30)
    errors = [result for result in found.values() if isinstance(result, Failure)]
    assert not errors, "\n".join(error.trace for error in errors)
    return [found[rank] for rank in range(2)]


@dataclass
class Failure:
    """An exception of a process, as text."""

    trace: str


def _run_as(rank, folder, backend, timeout, results, function, arguments):
    from accelerate.state import AcceleratorState
    from torch import distributed
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout))
    try:
        results.put((rank, function(rank, *arguments)))
    except BaseException:
        results.put((rank, Failure(traceback.format_exc())))
    os._exit(0)  # nothing of pytest's ends here


@pytest.fixture
def write_recipe(recipe, tmp_path):
    """Writes the recipe with changes and returns its path and the output folder."""

    def write(name="run", **changes):
        output_dir = tmp_path / name
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, "output_dir": str(output_dir), **changes}))
        return path, output_dir

    return write


@pytest.fixture
def frames_by_path(monkeypatch):
    """What is written to each mp4 file, before the codec."""
    from causal_wan.video.writing import VideoWriter

    written, start, write = {}, VideoWriter.__init__, VideoWriter.write

    def note_path(writer, path, *given, **settings):
        start(writer, path, *given, **settings)
        written[Path(path).with_name(Path(path).name.removeprefix("partial-"))] = writer.noted = []

    def note_frames(writer, frames):
        writer.noted.append(frames.copy())
        write(writer, frames)

    monkeypatch.setattr(VideoWriter, "__init__", note_path)
    monkeypatch.setattr(VideoWriter, "write", note_frames)
    return lambda path: np.concatenate(written[path])


@pytest.fixture
def loads_nothing(monkeypatch):
    """Weights, text encoders and VAEs are out of reach: what is refused with it is refused before they are loaded."""

    from causal_wan.model.transformer import CausalWanTransformer3DModel
    from causal_wan.sampling.pipeline import CausalWanPipeline

    def refuse(*arguments, **settings):
        raise AssertionError("something is loaded")

    for name in ("load_vae", "load_transformer"):
        monkeypatch.setattr(f"causal_wan.results.student.{name}", refuse)
    for model_class in (CausalWanPipeline, CausalWanTransformer3DModel):
        monkeypatch.setattr(model_class, "from_pretrained", refuse)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    """The Chromium or Chrome of the machine, without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@dataclass
class BrowserPage:
    """A page of the browser, and what it did.

    Attributes:
        page: Playwright's.
        requests: Addresses of all that it asked for.
        problems: Errors and warnings of its console, exceptions of its scripts, and requests that failed.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.problems.append(f"{request.url[:80]}: {request.failure}"))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)

    def _note(self, message):
        if message.type in ("error", "warning"):
            self.problems.append(message.text)


@pytest.fixture
def browser_page(browser):
    """A new page, 1200 x 900 pixels, with a profile of its own."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield BrowserPage(context.new_page())
    context.close()
