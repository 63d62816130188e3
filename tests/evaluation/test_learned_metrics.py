"""LPIPS with a backbone of random weights where torch.hub looks for it; CLIP scores of tiny models made here."""

import pytest
import torch
import torchvision
from conftest import tiny_clip_parts
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from causal_wan.evaluation import learned_metrics
from causal_wan.evaluation.learned_metrics import ClipScore, backbone_path, load_lpips


def noise(num_frames=9, height=64, width=96, seed=0):
    return torch.rand(num_frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(learned_metrics, "HF_HUB_OFFLINE", True)
    return tmp_path / "torch"


@pytest.fixture
def backbone(torch_home):
    """A squeezenet of random weights under the name that torchvision looks for."""
    path = torch_home / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    return path


def test_lpips_is_that_of_torchmetrics_frame_by_frame(backbone):
    video, target = noise(), noise(seed=1)
    lpips, note = load_lpips("squeeze", "cpu", height=64, width=96)
    assert note == ""
    expected = learned_perceptual_image_patch_similarity(video, target, "squeeze", reduction="none", normalize=True)
    torch.testing.assert_close(lpips(video, target), expected)
    assert len(set(expected.tolist())) == 9
    torch.testing.assert_close(lpips(video[:1], target[:1]), expected[:1])  # nothing is left of the call before
    assert lpips(video, video).tolist() == [0.0] * 9


def test_without_its_backbone_lpips_says_which_file_goes_where(torch_home):
    lpips, note = load_lpips("vgg", "cpu", height=64, width=96)
    assert lpips is None
    assert "\n" not in note
    assert f"put https://download.pytorch.org/models/vgg16-397923af.pth to {backbone_path('vgg')}" in note
    assert backbone_path("vgg") == torch_home / "hub" / "checkpoints" / "vgg16-397923af.pth"


def test_a_download_that_fails_leaves_lpips_out(torch_home, monkeypatch):
    def refuse(url, *args, **kwargs):
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(learned_metrics, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    lpips, note = load_lpips("alex", "cpu", height=64, width=96)
    assert lpips is None
    assert "cannot be had (no route to https://download.pytorch.org/models/alexnet" in note


def test_a_damaged_backbone_and_frames_that_are_too_small_leave_lpips_out(backbone):
    lpips, note = load_lpips("squeeze", "cpu", height=1, width=1)
    assert lpips is None
    assert "frames of 1 x 1 are too small" in note
    backbone.write_bytes(b"not a checkpoint")
    lpips, note = load_lpips("squeeze", "cpu", height=64, width=96)
    assert lpips is None
    assert "cannot be had" in note


# --- CLIP ------------------------------------------------------------------------------------------------------------


def test_the_clip_score_is_the_mean_cosine_of_frames_and_prompt(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    video, prompt = noise(9), "a ball"
    with torch.no_grad():
        cosines = []
        for frame in video[[0, 4, 8]]:
            image = (frame * 255).round().to(torch.uint8)
            inputs = processor(text=[prompt], images=[image], return_tensors="pt")
            logits = model(**inputs).logits_per_image  # cosine, times a learned scale
            cosines.append(float(logits / model.logit_scale.exp()))
    score = ClipScore(str(clip_folder), "cpu", num_frames=3)
    assert score(video, prompt) == pytest.approx(100 * sum(cosines) / 3, abs=1e-3)
    assert len(set(cosines)) == 3
    assert score(video, "a ball crosses the field") != pytest.approx(score(video, prompt), abs=1e-3)
    assert score(video[:2], prompt) == pytest.approx(ClipScore(str(clip_folder), "cpu", 2)(video[:2], prompt))


def test_prompts_longer_than_the_model_reads_are_cut(clip_folder):
    score = ClipScore(str(clip_folder), "cpu")
    assert -100 <= score(noise(3), "a ball crosses the field " * 50) <= 100


def test_siglip_is_a_model_of_this_kind_too(tmp_path):
    from transformers import CLIPImageProcessor, CLIPProcessor, SiglipConfig, SiglipModel

    tokenizer, text, vision = tiny_clip_parts()
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    images = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    processor = CLIPProcessor(images, tokenizer)
    processor.save_pretrained(tmp_path)
    video = noise(1)
    image = (video[0] * 255).round().to(torch.uint8)
    inputs = processor(text=["a ball"], images=[image], padding="max_length", max_length=12, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        cosine = float((logits - model.logit_bias) / model.logit_scale.exp())
    assert ClipScore(str(tmp_path), "cpu")(video, "a ball") == pytest.approx(100 * cosine, abs=1e-3)


def test_other_models_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="clip_model must be a folder or hub id of a CLIP or SigLIP model"):
        ClipScore(str(tmp_path / "nowhere"), "cpu")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="clip_model must"):
        ClipScore(str(tmp_path / "other"), "cpu")
