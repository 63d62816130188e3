"""examples/demo/app.py: videos that play while they are generated."""

import importlib.util
import io
import re
import socket
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image

from causal_wan.model.vae import decode_latents, encode_videos


pytest.importorskip("gradio")
APP = Path(__file__).parents[2] / "examples" / "demo" / "app.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def studio(demo):
    return demo.make_studio(demo.Config(local_attn_size=6, sink_size=3))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_all_readers_get_the_whole_file_whenever_they_come(studio):
    video = studio.videos[studio.order("a house", 33, 0)]
    parts = list(video.read())
    assert len([part for part in parts if part]) >= 3
    content = b"".join(parts)
    assert len(iio.imread(io.BytesIO(content), plugin="pyav")) == 33
    assert b"".join(video.read()) == content
    assert video.state == "done"
    assert re.match(r"done: 33 of 33 frames, the first after \d+\.\d\d s, ", video.describe())


def test_a_prompt_that_is_changed_while_the_video_plays_counts_from_the_next_block_on(studio, monkeypatch):
    sample = studio.pipeline.stream
    found = {}

    def play(change):
        """Latents of a video whose prompt is changed after its second block."""
        blocks = []

        def note(*prompts, **settings):
            for block in sample(*prompts, **settings):
                blocks.append(block.clone())
                if change and len(blocks) == 2:
                    video.prompt = change
                yield block

        monkeypatch.setattr(studio.pipeline, "stream", note)
        video = studio.videos[studio.order("Draw a sketch of a house step by step", 57, 0)]
        assert b"".join(video.read())
        assert video.state == "done"
        return blocks

    for change in (None, "Draw a sketch of a cat step by step"):
        found[change] = play(change)
    differs = [not torch.equal(one, other) for one, other in zip(*found.values(), strict=True)]
    assert differs == [False, False, True, True, True]


def test_a_video_may_begin_with_a_picture_that_was_uploaded(studio):
    """Whose colours are those of its first frame, though the codec rounds them."""
    video = studio.videos[studio.order("a house", 9, 0, Image.new("RGB", (300, 100), (40, 160, 60)))]
    first = iio.imread(io.BytesIO(b"".join(video.read())), plugin="pyav")[0].reshape(-1, 3).mean(axis=0)
    decoded = as_the_vae_gives_it_back(studio, (40, 160, 60))
    assert first == pytest.approx(decoded, abs=6)
    plain = studio.videos[studio.order("a house", 9, 0)]
    white = iio.imread(io.BytesIO(b"".join(plain.read())), plugin="pyav")[0].reshape(-1, 3).mean(axis=0)
    assert white.min() > 200


def as_the_vae_gives_it_back(studio, colour):
    """The mean colour of a picture of one colour, encoded and decoded."""
    vae, size = studio.pipeline.vae, (studio.settings.height, studio.settings.width)
    picture = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1, 1).expand(1, 3, 1, *size) / 127.5 - 1
    decoded = decode_latents(vae, encode_videos(vae, picture)).clamp(-1, 1)
    return ((decoded + 1) * 127.5).mean(dim=(0, 2, 3, 4)).numpy()


def test_a_video_that_nobody_looks_at_is_not_made_to_its_end(demo, studio, monkeypatch):
    monkeypatch.setattr(demo, "PATIENCE", 0.0)
    abandoned = studio.videos[studio.order("a house", 957, 0)]
    next_one = studio.videos[studio.order("a bird", 9, 0)]
    reader = next_one.read()
    next(reader)
    wait_until(lambda: abandoned.is_over and next_one.is_over)
    assert abandoned.state == "stopped"
    assert 0 < abandoned.num_made < 957
    assert next_one.state == "done"


def test_what_breaks_ends_the_video_and_not_the_page(studio, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    broken = studio.videos[studio.order("a house", 10, 0)]  # no 4k + 1
    assert b"".join(broken.read()) == b""
    assert broken.state == "stopped"
    fine = studio.videos[studio.order("a house", 9, 0)]
    assert b"".join(fine.read())


def test_finished_videos_are_kept_for_a_while_only(demo, studio):
    for _ in range(demo.NUM_KEPT + 3):
        video = studio.videos[studio.order("a house", 9, 0)]
        wait_until(lambda video=video: video.is_over)
    assert len(studio.videos) <= demo.NUM_KEPT + 1


@pytest.fixture
def address(demo, studio):
    """Of the page, while it is served."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = demo.make_app(studio, demo.Config())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    server.force_exit = True
    thread.join(timeout=10)


def test_a_prompt_starts_a_video_that_plays_while_it_is_generated(browser_page, address, studio):
    page = browser_page.page
    page.goto(address)
    page.wait_for_selector("#generate")
    if not page.evaluate("MediaSource.isTypeSupported('video/mp4; codecs=\"avc1.64001f\"')"):
        pytest.skip("this browser has no H.264")
    page.fill("#prompt textarea", "Draw a sketch of a house step by step")
    page.fill("#frames input[type=number]", "897")
    page.click("#generate")
    page.wait_for_function("document.querySelector('#player video').currentTime > 0.5", timeout=60000)
    page.wait_for_function("document.querySelector('#status textarea').value.startsWith('playing')", timeout=60000)
    first = page.evaluate("document.querySelector('#player video').currentTime")
    page.wait_for_timeout(500)
    assert page.evaluate("document.querySelector('#player video').currentTime") > first
    assert page.input_value("#status textarea").startswith("playing"), "the whole video was there before it played"
    page.fill("#next-prompt textarea, #next-prompt input", "Draw a sketch of a cat step by step")
    page.click("#change")
    page.wait_for_timeout(500)
    assert [video.prompt for video in studio.videos.values()][-1] == "Draw a sketch of a cat step by step"
    page.fill("#frames input[type=number]", "33")
    page.click("#generate")  # another one takes its place
    page.wait_for_function(
        "document.querySelector('#status textarea').value.startsWith('done: 33 of 33')", timeout=60000
    )
    page.wait_for_function("document.querySelector('#player video').ended", timeout=60000)
    assert page.evaluate("document.querySelector('#player video').duration") == pytest.approx(33 / 16, abs=0.1)
    assert [url for url in browser_page.requests if not url.startswith((address, "blob:", "data:"))] == []
