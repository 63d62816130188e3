"""A page on which a prompt starts a video that plays while it is generated.

    pip install gradio
    python examples/demo/app.py --checkpoint outputs/sketch/run
    python examples/demo/app.py --checkpoint outputs/my-wan --local_attn_size 21 --sink_size 3

Blocks are sampled, decoded, coded and sent one after the other, as fragments of one mp4, which the browser plays as
they arrive. A prompt that is changed meanwhile counts from the next block on. A video may begin with a picture, of a
student that was trained so. Closing the page or asking for another video ends the sampling.
"""

import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated


sys.path.insert(0, str(Path(__file__).parents[2]))

import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from PIL.Image import Image

from causal_wan.config.choices import LocalPath
from causal_wan.config.parsing import parse_config, user_errors
from causal_wan.config.ranges import AttentionWindow, NonNegativeInt, PositiveInt, Range, checked_dataclass
from causal_wan.model.streaming_vae import StreamingDecoder
from causal_wan.results.run_record import find_run
from causal_wan.results.student import SamplingSettings, choose_device, find_layout, load_student, resolve_settings
from causal_wan.sampling.pipeline import CausalWanPipeline
from causal_wan.video.writing import VideoWriter, as_frames


SKETCH = Path(__file__).parents[1] / "sketch" / "tiny-wan"
NUM_KEPT = 8  # finished videos, to be seen again
PATIENCE = 5.0  # seconds for which a video is made that nobody looks at
PLAYER = '<video autoplay muted controls playsinline style="width: 100%; background: #eee"></video>'
# Hands each fragment to the player as it arrives; a plain <video src> would wait for some more.
PLAY = """
async (name) => {
    const video = document.querySelector("#player video"), source = new MediaSource();
    video.src = URL.createObjectURL(source);
    await new Promise((resolve) => source.addEventListener("sourceopen", resolve, {once: true}));
    const buffer = source.addSourceBuffer('video/mp4; codecs="avc1.64001f"');
    const reader = (await fetch(`video/${name}`)).body.getReader();
    for (;;) {
        const {done, value} = await reader.read();
        if (source.readyState != "open") return reader.cancel();  // another video has begun
        if (done) return source.endOfStream();
        buffer.appendBuffer(value);
        await new Promise((resolve) => buffer.addEventListener("updateend", resolve, {once: true}));
    }
}
"""


@checked_dataclass
class Config:
    """What to show, and where."""

    checkpoint: LocalPath = str(SKETCH)
    """Output folder of a run, a diffusers WAN folder or hub id, or a .safetensors or .pt file of weights."""
    pretrained_model_name_or_path: LocalPath | None = None
    """Where VAE and text encoder are: None is what the run was made from, or WAN's own for the size of a file."""
    num_frame_per_block: PositiveInt | None = None
    """Latent frames of a block; None is the checkpoint's own setting, and 3 if it has none."""
    local_attn_size: AttentionWindow | None = None
    """Latent frames that are remembered; -1 is all, None the checkpoint's own setting."""
    sink_size: NonNegativeInt | None = None
    """How many of them are the clip's first; None is the checkpoint's own setting."""
    max_num_frames: PositiveInt = 957
    """The longest video that can be asked for."""
    height: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 64 for the embedded checkpoint and else 480."""
    width: PositiveInt | None = None
    """Pixels; None is what the run was trained on, or 112 for the embedded checkpoint and else 832."""
    prompt: str = "Draw a sketch of a house step by step"
    """What the page begins with."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Range(ge=1, le=65535)] = 7860
    """Port to listen at."""
    recache: bool = False
    """Where the prompt is changed, compute the keys and values of what is remembered anew, under the new prompt."""
    compile: bool = False
    """Compile the layers: the first video takes a minute longer."""


class Video:
    """One that was asked for: a file that is read while it is written, by any number of readers.

    Attributes:
        prompt: That of the next block; may be changed.
        image: Picture that it begins with; None is none.
        state: "waiting", "playing" while it is generated, "done" or "stopped".
        num_made: Frames so far.
        first_seconds: From the start of sampling to the first frames.
        seconds: Of sampling, decoding and coding so far.
    """

    def __init__(self, prompt: str, num_frames: int, seed: int, image: Image | None = None) -> None:
        self.prompt, self.num_frames, self.seed, self.image = prompt, num_frames, seed, image
        self.state = "waiting"
        self.num_made, self.first_seconds, self.seconds = 0, 0.0, 0.0
        self._parts: list[bytes] = []
        self._changed = threading.Condition()
        self._num_readers, self._last_read = 0, time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether nothing is to come."""
        return self.state in ("done", "stopped")

    @property
    def is_wanted(self) -> bool:
        """Whether somebody reads it, or did a moment ago."""
        return self._num_readers > 0 or time.monotonic() - self._last_read < PATIENCE

    def write(self, part: bytes) -> int:
        """Adds to the file."""
        self._parts.append(bytes(part))
        return len(part)

    def set_state(self, state: str) -> None:
        """Tells the readers, as well that there is more to read."""
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def read(self) -> Iterator[bytes]:
        """The file from its beginning, as it grows."""
        self._num_readers += 1
        num_read = 0
        try:
            while num_read < len(self._parts) or not self.is_over:
                with self._changed:
                    if num_read == len(self._parts) and not self.is_over:
                        self._changed.wait(timeout=1)
                parts = self._parts[num_read:]
                num_read += len(parts)
                yield b"".join(parts)
        finally:
            self._num_readers, self._last_read = self._num_readers - 1, time.monotonic()

    def describe(self) -> str:
        """What there is of it, in a line."""
        if not self.num_made:
            return self.state
        return (
            f"{self.state}: {self.num_made} of {self.num_frames} frames, the first after {self.first_seconds:.2f} s, "
            f"{self.num_made / self.seconds:.1f} frames a second"
        )


class Studio:
    """Makes one video at a time."""

    def __init__(self, pipeline: CausalWanPipeline, settings: SamplingSettings, *, recache: bool = False) -> None:
        self.pipeline, self.settings, self.recache = pipeline, settings, recache
        self.videos: dict[str, Video] = {}
        self._free = threading.Lock()

    def order(self, prompt: str, num_frames: int, seed: int, image: Image | None = None) -> str:
        """Begins a video, or has it wait for its turn, and returns its name."""
        for old in [name for name, video in self.videos.items() if video.is_over][:-NUM_KEPT]:
            del self.videos[old]
        name = secrets.token_urlsafe(12)
        self.videos[name] = video = Video(prompt, num_frames, seed, image)
        threading.Thread(target=self.make, args=[video], daemon=True).start()
        return name

    def make(self, video: Video) -> None:
        """Samples, decodes and codes block by block, for as long as somebody looks."""
        with self._free:
            start = time.perf_counter()
            try:
                with VideoWriter(video, self.pipeline.geometry.frame_rate, fragmented=True) as writer:
                    for block in self.sample(video):
                        writer.write(as_frames(block))
                        video.num_made += block.shape[1]
                        video.seconds = time.perf_counter() - start
                        video.first_seconds = video.first_seconds or video.seconds
                        video.set_state("playing")
                        if not video.is_wanted:
                            break
            finally:
                video.set_state("done" if video.num_made == video.num_frames else "stopped")

    def sample(self, video: Video) -> Iterator[torch.Tensor]:
        """The frames of each block in [-1, 1], `(3, t, height, width)`."""
        decoder = StreamingDecoder(self.pipeline.vae)
        blocks = self.pipeline.stream(
            video.prompt,
            prompt_schedule=lambda seconds: video.prompt,
            recache=self.recache,
            image=video.image,
            num_frames=video.num_frames,
            height=self.settings.height,
            width=self.settings.width,
            generator=torch.Generator().manual_seed(video.seed),
            output_type="latent",
            cache_dtype=self.settings.cache_dtype,
        )
        for block in blocks:
            yield decoder.decode(block)[0]


def make_app(studio: Studio, config: Config) -> FastAPI:
    """The page at /, and the videos at /video/NAME."""
    app = FastAPI()

    @app.get("/video/{name}")
    def send_video(name: str) -> StreamingResponse:
        if name not in studio.videos:
            raise HTTPException(404, "there is no such video any more; ask for it again")
        return StreamingResponse(studio.videos[name].read(), media_type="video/mp4")

    def order(prompt: str, num_frames: float, seed: float, image: Image | None) -> str:
        if not prompt.strip():
            raise gr.Error("A prompt is wanted.")
        return studio.order(prompt, int(num_frames), int(seed), image)

    def change(name: str, prompt: str) -> None:
        if not prompt.strip():
            raise gr.Error("A prompt is wanted.")
        if name not in studio.videos or studio.videos[name].is_over:
            raise gr.Error("No video is being made; begin one.")
        studio.videos[name].prompt = prompt

    def describe(name: str) -> str:
        return studio.videos[name].describe() if name in studio.videos else ""

    fewest, step = shortest_video(studio)
    most = max(config.max_num_frames - (config.max_num_frames - fewest) % step, fewest + step)
    with gr.Blocks(title="Causal WAN") as page:
        gr.Markdown("# Causal WAN\nThe video plays while it is generated.")
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(config.prompt, label="Prompt", lines=3, elem_id="prompt")
                length = gr.Slider(
                    fewest,
                    most,
                    studio.settings.num_frames,
                    step=step,
                    label="Frames",
                    elem_id="frames",
                )
                seed = gr.Number(0, precision=0, label="Seed")
                image = gr.Image(label="First picture, if there is to be one", type="pil", elem_id="image")
                button = gr.Button("Generate", variant="primary", elem_id="generate")
            with gr.Column(scale=2):
                gr.HTML(PLAYER, elem_id="player")
                with gr.Row():
                    next_prompt = gr.Textbox(label="Go on with", scale=4, elem_id="next-prompt")
                    change_button = gr.Button("Change", scale=1, elem_id="change")
                status = gr.Textbox(label="Status", interactive=False, elem_id="status")
        name = gr.Textbox(visible="hidden")
        button.click(order, [prompt, length, seed, image], name, show_progress="hidden")
        gr.on([change_button.click, next_prompt.submit], change, [name, next_prompt], None, show_progress="hidden")
        name.change(None, name, js=PLAY)
        gr.Timer(0.5).tick(describe, name, status, show_progress="hidden")
    return gr.mount_gradio_app(app, page, path="/")


def shortest_video(studio: Studio) -> tuple[int, int]:
    """Frames of a video of one block, and those that each further block adds."""
    causal, geometry = studio.pipeline.transformer.causal_config, studio.pipeline.geometry
    first = 1 if causal.independent_first_frame else causal.num_frame_per_block
    return geometry.num_frames(first), geometry.temporal_factor * causal.num_frame_per_block


def make_studio(config: Config) -> Studio:
    """Loads the student.

    Raises:
        ValueError: If it cannot be loaded.
    """
    device, dtype = choose_device(None, None)
    run = find_run(config.checkpoint, config.pretrained_model_name_or_path)
    is_embedded = Path(config.checkpoint).resolve() == SKETCH
    height, width = (64, 112) if is_embedded else (None, None)
    settings = resolve_settings(
        run, student=config.checkpoint, height=config.height or height, width=config.width or width
    )
    causal = {name: vars(config)[name] for name in ("num_frame_per_block", "local_attn_size", "sink_size")}
    find_layout(config.checkpoint, run, **causal).check_size(settings)
    pipeline = load_student(
        config.checkpoint,
        run,
        dtype,
        denoising_step_list=settings.timesteps,
        sampler=settings.sampler,
        max_sequence_length=settings.max_sequence_length,
        **causal,
    )
    if pipeline.transformer.config.num_frame_per_block is None:
        causal = pipeline.transformer.causal_config
        pipeline.transformer.set_causal_config(replace(causal, num_frame_per_block=3))
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    if config.compile:
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    return Studio(pipeline, settings, recache=config.recache)


def main(config: Config) -> None:
    """Serves the page until it is interrupted."""
    with user_errors():
        studio = make_studio(config)
    print(f"http://{config.host}:{config.port}")
    uvicorn.run(make_app(studio, config), host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__))
