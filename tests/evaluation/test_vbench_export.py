"""Names and files as VBench's runner looks for them: `{prompt}-{i}.mp4` beside each other, and a prompt for each."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from causal_wan.evaluation.vbench_export import VBenchExport, file_stem


LONG = "a ball that crosses a field, " * 20
UMLAUTS = "ä" * 300


def sample(index, number, prompt):
    return torch.full((3, 5, 16, 16), (index + 2 * number) / 10)


def export(folder, prompts, num_samples=2, **settings):
    written = VBenchExport(folder, prompts, num_samples, {"seed": 0, **settings})
    written.write(sample)
    return written


def test_every_video_is_where_the_standard_mode_looks(tmp_path):
    prompts = ["A 3D model of a 1800s victorian house.", "a ball-3", "in the style of Ukiyo", "Köln: 50% off?"]
    export(tmp_path / "out", prompts, num_samples=5)
    names = os.listdir(tmp_path / "out" / "videos")
    assert {Path(name).suffix for name in names} == {".mp4"}  # it takes the suffix of any one of them for all
    assert sorted(names) == sorted(f"{prompt}-{index}.mp4" for prompt in prompts for index in range(5))
    for name in names:  # and reads prompts back from names
        assert re.sub(r"-\d+$", "", Path(name).stem) in prompts


@pytest.mark.parametrize("prompt", [LONG, UMLAUTS, "a / b", "../../up", "line\nbreak", "nul\0"])
def test_prompts_that_cannot_be_names_are_found_by_the_file_of_prompts(prompt, tmp_path):
    written = export(tmp_path / "out", [prompt, "a ball"])
    assert written.renamed == [prompt]
    videos = tmp_path / "out" / "videos"
    prompts = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert {videos / name for name in prompts} == set(videos.iterdir())
    assert [os.path.join(videos, name) for name, of in prompts.items() if of == prompt]
    assert all(len(name.encode()) <= 255 for name in prompts)


def test_prompts_that_begin_alike_do_not_take_each_other_s_names():
    assert len({file_stem(LONG + end) for end in "abc"}) == 3
    assert file_stem("a/b") not in (file_stem("a_b"), file_stem("a\nb"))
    assert file_stem("x" * 247) == "x" * 247
    assert file_stem("x" * 248) != "x" * 248


def test_a_prompt_that_comes_twice_is_sampled_once(tmp_path):
    assert export(tmp_path / "out", ["a ball", "a box", "a ball"]).prompts == ["a ball", "a box"]
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 4


def test_an_interrupted_export_goes_on_and_other_settings_are_refused(tmp_path):
    def broken(index, number, prompt):
        if number == 1:
            raise KeyboardInterrupt
        return sample(index, number, prompt)

    with pytest.raises(KeyboardInterrupt):
        VBenchExport(tmp_path / "out", ["a ball", "a box"], 2, {"seed": 0}).write(broken)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "videos").iterdir()}
    assert len(first) == 2
    export(tmp_path / "out", ["a ball", "a box"])
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 4
    assert first == {path: path.stat().st_mtime_ns for path in first}
    with pytest.raises(ValueError, match="holds videos of other settings"):
        export(tmp_path / "out", ["a ball", "a box"], seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something else"):
        export(tmp_path / "mine", ["a ball"])
