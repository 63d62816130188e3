"""What settings say of themselves: recipes go through all scripts, and paths of this machine are marked as such."""

import dataclasses
import importlib
import importlib.util
import re
import sys
import typing

import pytest
import yaml
from conftest import ROOT

from causal_wan.config.choices import LocalPath
from causal_wan.config.fields import flat_dict, flat_fields, names_of, paths_of
from causal_wan.config.parsing import parse_config, write_recipe
from causal_wan.config.ranges import checked_dataclass
from causal_wan.data.settings import DataConfig
from causal_wan.results.run_record import GROUPS_WITH_PATHS
from causal_wan.runs.parts import with_absolute_paths
from causal_wan.runs.settings import MatchingRunConfig, RunConfig, TrajectoryRunConfig
from causal_wan.tables.sources import Source


SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "dataset_utils")
OTHERS = sorted(
    path.relative_to(ROOT)
    for folder in ("benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "class Config:" in path.read_text()
)


def has_clips(module):
    """Whether a script takes a recipe of training: it has the settings of clips in a group."""
    return any(hint is DataConfig for hint in typing.get_type_hints(module.Config).values())


TAKING_RECIPES = [script for script in SCRIPTS if has_clips(importlib.import_module(script))]


def needed(module, tmp_path):
    """What a script demands beside the recipe."""
    flags = {"precompute_latents": "latents_dir"}
    return [f"--{flags[module.__name__]}", str(tmp_path)] if module.__name__ in flags else []


@pytest.fixture
def whole_recipe(tmp_path):
    """A recipe that says all that a training script can be told."""
    recipe = ROOT / "examples" / "objectives" / "recipe.yaml"
    flags = ["--config", str(recipe), "--trajectories_dir", "pairs", "--compile"]
    config = parse_config(importlib.import_module("train_ode_regression").Config, flags)
    path = tmp_path / "recipe.yaml"
    write_recipe(flat_dict(config), path)
    assert set(yaml.safe_load(path.read_text())) == names_of(RunConfig) | {"trajectories_dir"}
    return path


@pytest.mark.parametrize("script", TAKING_RECIPES)
def test_a_recipe_of_training_with_every_setting_is_taken_by_each_script_that_takes_such(
    script, whole_recipe, tmp_path
):
    module = importlib.import_module(script)
    known = names_of(module.Config) | set(getattr(module, "TRAINING_SETTINGS", ()))
    assert known >= names_of(RunConfig) | {"trajectories_dir"}
    flags = ["--config", str(whole_recipe), *needed(module, tmp_path)]
    config = parse_config(module.Config, flags, also_known=getattr(module, "TRAINING_SETTINGS", ()))
    assert config.data.num_frames == 81


def test_six_scripts_take_recipes_of_training():
    assert set(TAKING_RECIPES) == {
        *("check_dataset", "precompute_latents", "precompute_trajectories"),
        *("train_ode_regression", "train_video_regression", "train_dmd"),
    }


# --- paths -----------------------------------------------------------------------------------------------------------

# What a setting is called that names a file or a folder. A name on the hub, `hub_model_id`, is none.
NAMES_A_PATH = re.compile(
    r"(.*_)?(dir|path|ckpt|file|folder|checkpoint)|(input|output|teacher|lora|video|run|before|after|vae)|clip_model"
    r"|dataset_config|vbench_(export|prompts)|pretrained_model_name_or_path|output_dir"
)


def load(path):
    """A file of examples/ or benchmarks/ as a module, without its main."""
    sys.path.insert(0, str(path.parent))  # such files import their neighbours
    try:
        spec = importlib.util.spec_from_file_location(f"looked_at_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def holds_text(hint):
    return hint is str or any(map(holds_text, typing.get_args(hint)))


def unmarked(config_class):
    """Settings that are called like paths and are not marked as such."""
    called = {name for name, hint in flat_fields(config_class) if holds_text(hint) and NAMES_A_PATH.fullmatch(name)}
    return called - paths_of(config_class)


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_scripts_that_name_something_on_this_machine_are_marked(script):
    config_class = importlib.import_module(script).Config
    assert unmarked(config_class) == set()
    assert paths_of(config_class)


@pytest.mark.parametrize("path", OTHERS, ids=str)
def test_so_are_those_of_examples_and_benchmarks(path):
    if path.parent.name == "demo":
        pytest.importorskip("gradio")
    assert unmarked(load(ROOT / path).Config) == set()


def test_so_are_those_of_the_list_of_tables():
    assert unmarked(Source) == set()


def test_the_mark_is_found_wherever_it_is_and_nowhere_else():
    @checked_dataclass
    class Config:
        plain: LocalPath
        optional: LocalPath | None = None
        several: tuple[LocalPath, ...] = ()
        text: str = ""
        names: tuple[str, ...] = ()

    assert paths_of(Config) == {"plain", "optional", "several"}


def test_what_goes_to_the_hub_is_rid_of_all_paths_that_a_run_can_be_given():
    assert paths_of(*GROUPS_WITH_PATHS) == paths_of(TrajectoryRunConfig) | paths_of(MatchingRunConfig)
    assert paths_of(RunConfig) == paths_of(TrajectoryRunConfig) - {"trajectories_dir"}


def test_paths_of_the_model_are_absolute_in_what_a_run_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "weights.pt").touch()
    sketch = ["--config", str(ROOT / "examples" / "sketch" / "recipe.yaml")]
    config = parse_config(
        importlib.import_module("train_video_regression").Config,
        [*sketch, "--pretrained_model_name_or_path", "base", "--generator_ckpt", "weights.pt"],
    )
    model = with_absolute_paths(config).model
    assert (model.pretrained_model_name_or_path, model.generator_ckpt) == (
        str(tmp_path / "base"),
        str(tmp_path / "weights.pt"),
    )
    on_hub = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained_model_name_or_path="a/b"))
    assert with_absolute_paths(on_hub).model.pretrained_model_name_or_path == "a/b"
