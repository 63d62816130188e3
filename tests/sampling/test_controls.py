"""Control videos of a call, of a pipeline whose VAE is known, against means of their frames."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from huggingface_hub.errors import LocalEntryNotFoundError

from causal_wan.geometry import LatentGeometry
from causal_wan.sampling import controls
from causal_wan.sampling.controls import as_pixels, fit_picture, load_beside, prepare_controls


HEIGHT, WIDTH, NUM_FRAMES = 16, 24, 9
NAMES = ["depth", "edges", "pose"]


class KnownEncoder:
    """Stands for that of the VAE: two channels, the mean over the frames of a latent frame and the last of them."""

    def __init__(self, vae):
        assert vae == "vae"
        self.num_encoded = 0

    @property
    def num_wanted(self):
        return 4 if self.num_encoded else 1

    def encode(self, frames):
        assert frames.shape[2] == self.num_wanted
        self.num_encoded += 1
        grey = frames.mean(dim=1, keepdim=True)
        kept = torch.cat([grey.mean(dim=2, keepdim=True), grey[:, :, -1:]], dim=1)
        return torch.nn.functional.avg_pool3d(kept, (1, 8, 8))


def latents_of(videos):
    """Of `(B, 3, T, height, width)`, by frames 0, 1 to 4, 5 to 8, ..."""
    ends = range(1, videos.shape[2] + 1, 4)
    spans = [videos[:, :, max(0, end - 4) : end] for end in ends]
    kept = [[span.mean(dim=(1, 2)), span[:, :, -1].mean(dim=1)] for span in spans]
    whole = torch.stack([torch.stack(parts, dim=1) for parts in kept], dim=2)
    return whole.unflatten(-2, (HEIGHT // 8, 8)).unflatten(-1, (WIDTH // 8, 8)).mean(dim=(-3, -1))


@pytest.fixture
def pipeline(monkeypatch):
    monkeypatch.setattr(controls, "StreamingEncoder", KnownEncoder)
    return SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(control_names=NAMES)),
        vae="vae",
        geometry=LatentGeometry(channels=2),
        video_processor=VideoProcessor(vae_scale_factor=8),
        _execution_device=torch.device("cpu"),
    )


def draw_videos(count, num_frames=NUM_FRAMES, seed=0):
    """Videos as arrays of bytes `(T, height, width, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (count, num_frames, HEIGHT, WIDTH, 3), np.uint8)


def pictures(video):
    return [PIL.Image.fromarray(frame) for frame in video]


def pixels(videos):
    return torch.from_numpy(videos).movedim(-1, 1).float() / 127.5 - 1


def prepare(pipeline, control, batch_size=2, num_frames=NUM_FRAMES):
    return prepare_controls(pipeline, control, (batch_size, HEIGHT, WIDTH), num_frames)


def test_each_control_has_its_channels_and_those_that_are_not_given_are_zeros(pipeline):
    depth, pose = draw_videos(2), draw_videos(2, seed=1)
    control = {"pose": [pictures(each) for each in pose], "depth": [pictures(each) for each in depth]}
    frames = list(prepare(pipeline, control))
    assert [frame.shape for frame in frames] == [(2, 6, 1, 2, 3)] * 3
    found = torch.cat(frames, dim=2)
    torch.testing.assert_close(found[:, :2], latents_of(pixels(depth)))
    assert not found[:, 2:4].any()
    torch.testing.assert_close(found[:, 4:], latents_of(pixels(pose)))


@pytest.mark.parametrize("form", ["pictures", "frames as they come", "array"])
def test_one_video_controls_all_of_a_call_in_any_form(pipeline, form):
    (video,) = draw_videos(1)
    forms = {
        "pictures": pictures(video),
        "frames as they come": iter(pictures(video)),
        "array": np.float32(video / 255),
    }
    found = torch.cat(list(prepare(pipeline, {"edges": forms[form]})), dim=2)
    expected = latents_of(pixels(video[None])).expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(found[:, 2:4], expected, atol=1e-5, rtol=1e-5)


def test_a_video_that_is_longer_is_followed_as_far_as_the_video_goes(pipeline):
    (video,) = draw_videos(1, num_frames=17)
    assert len(list(prepare(pipeline, {"depth": pictures(video)}))) == 3
    assert len(list(prepare(pipeline, {"depth": pictures(video)}, num_frames=None))) == 5
    assert len(list(prepare(pipeline, {"depth": pictures(video[:12])}, num_frames=None))) == 3  # whole latent frames


def test_frames_that_come_are_taken_when_their_latent_frame_is_asked_for(pipeline):
    (video,), taken = draw_videos(1, num_frames=17), []

    def come():
        for number, picture in enumerate(pictures(video)):
            taken.append(number)
            yield picture

    frames = prepare(pipeline, {"depth": come()}, num_frames=None)
    for number_taken in (1, 5, 9):
        next(frames)
        assert len(taken) == number_taken


def test_without_controls_nothing_is_prepared(pipeline):
    assert prepare(pipeline, None) is None
    pipeline.transformer.config.control_names = None
    with pytest.raises(ValueError, match="trained with, none, got depth"):
        prepare(pipeline, {"depth": []})
    with pytest.raises(
        ValueError, match=r"^control must name the control of each video, such as \{'outline': frames\}"
    ):
        prepare(pipeline, [])


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ([1], r"^control must name the control of each video, such as \{'depth': frames\}, got list\.$"),
        ({"depth": [], "hue": [], 3: []}, r"trained with, depth, edges, pose, got hue, 3\.$"),
        ({"edges": "a.mp4"}, r"^control edges must be frames in a form that diffusers' .* got str \("),
        ({"edges": []}, r"^control edges must be frames in a form .* got list \("),
        ({"edges": pictures(draw_videos(1)[0])[:8]}, r"^control edges must have the 9 frames of the video, got 8\.$"),
        (
            {"edges": [pictures(each) for each in draw_videos(3)]},
            r"^control edges must be one video, or one for each of 2, got 3\.$",
        ),
    ],
)
def test_controls_that_cannot_be_followed_are_refused(pipeline, control, message):
    with pytest.raises(ValueError, match=message):
        prepare(pipeline, control)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_scaled_to_cover_the_size_and_cut_around_their_middle(pipeline):
    wide = np.zeros((2 * HEIGHT, 4 * WIDTH, 3), np.uint8)  # of which the middle half is kept
    wide[:, WIDTH : 3 * WIDTH] = (10, 20, 30)
    frames = as_pixels(pipeline, [PIL.Image.fromarray(wide)] * 2, HEIGHT, WIDTH)
    assert frames.shape == (1, 3, 2, HEIGHT, WIDTH)
    expected = torch.tensor([10, 20, 30])[None, :, None, None, None] / 127.5 - 1
    torch.testing.assert_close(frames[..., 1:-1], expected.expand_as(frames[..., 1:-1]), atol=1e-5, rtol=0)


def test_videos_lie_one_after_the_other_and_tensors_are_taken_as_they_are(pipeline):
    videos = draw_videos(2)
    found = as_pixels(pipeline, [pictures(each) for each in videos], HEIGHT, WIDTH)
    torch.testing.assert_close(found, pixels(videos), atol=1e-5, rtol=0)
    found = as_pixels(pipeline, tuple(map(tuple, map(pictures, videos))), HEIGHT, WIDTH)
    torch.testing.assert_close(found, pixels(videos), atol=1e-5, rtol=0)
    frames = [torch.from_numpy(each).movedim(-1, 1) / 255 for each in videos]
    torch.testing.assert_close(as_pixels(pipeline, frames, HEIGHT, WIDTH), pixels(videos), atol=1e-5, rtol=0)


def test_what_can_be_seen_through_of_a_picture_is_laid_on_white():
    seen_through = PIL.Image.new("RGBA", (WIDTH, HEIGHT), (100, 0, 200, 51))  # a fifth of it
    found = fit_picture(seen_through, HEIGHT, WIDTH)
    assert (found.mode, found.size) == ("RGB", (WIDTH, HEIGHT))
    white, share = np.full(3, 255), 51 / 255
    expected = share * np.array([100, 0, 200]) + (1 - share) * white
    assert np.abs(np.asarray(found) - expected).max() <= 1
    in_palette = PIL.Image.new("P", (WIDTH, HEIGHT), 0)
    in_palette.putpalette([9, 9, 9])
    in_palette.info["transparency"] = 0
    assert np.asarray(fit_picture(in_palette, HEIGHT, WIDTH)).min() == 255
    grey = fit_picture(PIL.Image.new("L", (WIDTH, HEIGHT), 7), HEIGHT, WIDTH)
    assert np.asarray(grey).tolist() == [[[7, 7, 7]] * WIDTH] * HEIGHT


# --- the patch embedding beside a LoRA -------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """What is loaded, and from where on the hub it comes."""
    noted = SimpleNamespace(paths=[], asked=[])

    def download(repository, name, revision):
        noted.asked.append((repository, name, revision))
        if repository != "someone/lora":
            raise LocalEntryNotFoundError("it is not there")
        return "/cache/patch_embedding.safetensors"

    def load(transformer, path):
        assert transformer == "transformer"
        noted.paths.append(path)

    monkeypatch.setattr(controls, "hf_hub_download", download)
    monkeypatch.setattr(controls, "load_patch_embedding", load)
    return noted


@pytest.mark.parametrize("as_type", [str, Path])
def test_the_patch_embedding_lies_in_the_folder_of_a_lora_or_beside_its_file(tmp_path, loaded, as_type):
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    lora.touch()
    load_beside(as_type(tmp_path), "transformer", None)
    load_beside(as_type(lora), "transformer", None)
    assert loaded.paths == []
    (tmp_path / "patch_embedding.safetensors").touch()
    for given in itertools.product([tmp_path, lora], [None, "main"]):
        load_beside(as_type(given[0]), "transformer", given[1])
    assert loaded.paths == [tmp_path / "patch_embedding.safetensors"] * 4
    assert loaded.asked == []


def test_of_the_hub_it_is_that_of_the_revision_and_nothing_where_there_is_none(loaded):
    load_beside("someone/lora", "transformer", "v1")
    load_beside("someone/other", "transformer", None)
    load_beside({"a": torch.zeros(1)}, "transformer", None)
    assert loaded.paths == [Path("/cache/patch_embedding.safetensors")]
    name = "patch_embedding.safetensors"
    assert loaded.asked == [("someone/lora", name, "v1"), ("someone/other", name, None)]
