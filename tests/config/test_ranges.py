"""Numbers in settings: every field of every script says which it may be, and nothing else gets through."""

import ast
import dataclasses
import importlib.util
import math
import sys
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest
from conftest import ROOT

from causal_wan.config.parsing import parse_config
from causal_wan.config.ranges import (
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
    checked_dataclass,
    is_checked,
)
from causal_wan.data.settings import DataConfig
from causal_wan.tables.sources import Source


# All other numbers of all scripts must refuse -1, and 0.
NEGATIVES_ARE_MEANT = {"local_attn_size", "logit_mean", "lora_scale"}
ZEROS_ARE_MEANT = {
    *("lora_rank", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "max_grad_norm", "ema_decay"),
    *(
        "validation_steps",
        "dataloader_num_workers",
        "caption_dropout",
        "control_dropout",
        "drawn_at_start",
        "horizontal_flip",
        "color_jitter",
        "max_bad_samples",
        "perceptual_weight",
        "critic_warmup_steps",
        "real_clip_probability",
        "regression_weight",
        "adversarial_weight",
        "adversarial_warmup_steps",
        "adversarial_penalty",
        "decay",
        "average",
        "decoded_share",
        "false_share",
        "vae_loop_steps",
        "seed",
    ),
    *(
        "sink_size",
        "denoising_step_list",
        "logit_mean",
        "clean_block_probability",
        "first_frame_probability",
        "min_loss_weight",
        "lora_scale",
    ),
    *("num_processes", "num_base_steps", "num_heldout", "pure_noise", "num_samples"),
    *(f"vae_{phase}_steps" for phase in ("frame", "clip", "detail", "colour", "decoder")),
}
NEEDS = {"app": "gradio"}


def scripts():
    """Files of ours with settings of their own, wherever they are."""
    for path in sorted(ROOT.rglob("*.py")):
        if {"tests", "causal_wan", ".venv", "outputs"} & set(path.relative_to(ROOT).parts):
            continue
        if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in ast.parse(path.read_text()).body):
            yield pytest.param(path, id=path.relative_to(ROOT).as_posix())


def load_config_class(path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module.Config


def with_groups(config_class):
    """A class of settings, and those in it."""
    yield config_class
    for hint in typing.get_type_hints(config_class).values():
        if dataclasses.is_dataclass(hint):
            yield from with_groups(hint)


def kinds_in(hint):
    """Every type that a type is made of, itself included."""
    return [hint, *(kind for argument in typing.get_args(hint) for kind in kinds_in(argument))]


def number_fields(config_class):
    """(Name, int or float, how many of them in a tuple, 0 if there is none) of all fields that hold numbers."""
    for name, hint in typing.get_type_hints(config_class).items():
        kinds = [kind for kind in kinds_in(hint) if kind in (int, float)]
        is_tuple = tuple in map(typing.get_origin, kinds_in(hint))
        if kinds:
            yield name, kinds[0], len(kinds) if is_tuple else 0


def build(config_class, **settings):
    """An object of the class; numbers are checked before anything is made of what is required beside."""
    required = {field.name for field in dataclasses.fields(config_class) if field.default is dataclasses.MISSING}
    return config_class(**{**dict.fromkeys(required, "x"), **settings})


def test_the_scripts_are_found():
    found = {parameters.values[0].stem for parameters in scripts()}
    assert {"generate", "train_ode_regression", "app", "make_dataset", "speed"} <= found
    assert len(found) >= 17


@pytest.mark.parametrize("path", scripts())
def test_no_number_of_any_script_may_be_nan_infinite_a_bool_or_senseless(path):
    for config_class in with_groups(load_config_class(path)):
        assert is_checked(config_class)
        for name, kind, count in number_fields(config_class):
            nonsense = [math.nan, math.inf, -math.inf, True, "1", 10**400]
            nonsense += [] if name in NEGATIVES_ARE_MEANT else [-1]
            nonsense += [] if name in ZEROS_ARE_MEANT else [0]
            nonsense += [1.5] if kind is int else []
            for value in nonsense:
                with pytest.raises(ValueError, match=rf"^(each of )?{name} must be [^\n]+, got [^\n]+$"):
                    build(config_class, **{name: (value,) * count if count else value})


@pytest.mark.parametrize("path", scripts())
def test_no_switch_of_any_script_may_be_a_number(path):
    for config_class in with_groups(load_config_class(path)):
        for name, hint in typing.get_type_hints(config_class).items():
            if hint is bool:
                with pytest.raises(ValueError, match=f"^{name} must be true or false, got 1; the default is"):
                    build(config_class, **{name: 1})


@pytest.mark.parametrize("path", scripts())
def test_a_senseless_number_on_the_command_line_of_any_script_ends_with_one_line(path, capsys):
    config_class = load_config_class(path)
    groups = list(with_groups(config_class))
    required = [
        token
        for group in groups
        for field in dataclasses.fields(group)
        if field.default is dataclasses.MISSING and typing.get_type_hints(group)[field.name] in (str, tuple[str, ...])
        for token in (f"--{field.name}", "x")
    ]
    for group in groups:
        for name, kind, count in number_fields(group):
            argv = [*required, f"--{name}", *["nan" if kind is float else "-7"] * max(count, 1)]
            with pytest.raises(SystemExit) as exit_info:
                parse_config(config_class, argv)
            assert exit_info.value.code == 2
            shown = capsys.readouterr()
            assert shown.out == ""
            (line,) = shown.err.splitlines()
            assert f"{name} must be " in line and line.startswith("error: ")


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


@checked_dataclass
class Inner:
    """A group."""

    rate: Annotated[float, Range(gt=0, hint="try 2e-6")] = 1e-3
    """Rate."""
    count: PositiveInt | None = None
    """Count."""
    shares: tuple[Share, ...] = (0.5,)
    """Shares."""
    span: tuple[PositiveInt, PositiveInt] | None = None
    """Span."""
    is_on: bool = False
    """Switch."""
    name: str = "a"
    """Name."""

    def __post_init__(self):
        assert self.rate > 0, "numbers are checked first"
        if self.name == "b":
            raise ValueError("name must be another, got b; use a.")


@checked_dataclass
class Outer:
    """All."""

    inner: Inner
    """Group."""
    seed: NonNegativeInt = 0
    """Seed."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate: .nan", "'rate' must be a finite number, above 0, got nan; try 2e-6."),
        ("rate: 1e400", "rate must be a finite number, above 0, got inf; try 2e-6."),
        ("rate: -1e-3", "rate must be above 0, got -0.001; try 2e-6."),
        ("rate: true", "'rate' must be a finite number, above 0, got True; try 2e-6."),
        ("count: .inf", "'count' must be a whole number, 1 or more, got inf"),
        ("count: 2.5", "'count' must be a whole number, 1 or more, got 2.5"),
        ("count: no", "'count' must be a whole number, 1 or more, got False"),
        ("count: [1, 2]", "'count' must be a whole number, 1 or more, got [1, 2]"),
        ("shares: [0.5, .nan]", "each of 'shares' must be a finite number, in [0, 1], got nan."),
        ("shares: [0.5, 1.5]", "each of 'shares' must be in [0, 1], got 1.5."),
        ("shares: 2", "each of 'shares' must be in [0, 1], got 2."),
        ("span: [3]", "'span' must be a tuple of 2 numbers, got (3,)."),
        ("span: [3, 0]", "each of 'span' must be 1 or more, got 0."),
        ("is_on: 1", "'is_on' must be true or false, got 1."),
        ("is_on: 'true'", "'is_on' must be true or false, got 'true'."),
        ("name: yes", "'name' must be no bool, got True; in quotes yes, no, on and off are text to YAML."),
        ("name: b", "name must be another, got b; use a."),
        ("seed: -1", "'seed' must be 0 or more, got -1."),
    ],
)
def test_numbers_in_a_recipe_are_refused_in_one_line(tmp_path, capsys, text, message):
    with pytest.raises(SystemExit, match="2"):
        parse_config(Outer, recipe(tmp_path, text))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message.removesuffix(".") in line.replace(f"{tmp_path}/recipe.yaml: ", "")


def test_numbers_in_a_recipe_are_taken_as_they_are(tmp_path):
    text = "rate: 1e-4\ncount: null\nshares: [0, 1.0e-2]\nspan: [1, 2]\nis_on: yes\nname: '1'\nseed: 4\n"
    inner = Inner(rate=1e-4, shares=(0.0, 0.01), span=(1, 2), is_on=True, name="1")
    assert parse_config(Outer, recipe(tmp_path, text)) == Outer(inner=inner, seed=4)
    assert parse_config(Outer, recipe(tmp_path, "shares: 1\ncount: 3")).inner == Inner(shares=(1.0,), count=3)


def test_a_number_without_a_range_is_no_setting():
    def declare(hint):
        class Config:
            field: hint

        return checked_dataclass(Config)

    @dataclass
    class Unchecked:
        field: float = 0.0

    for hint in (int, float, float | None, tuple[int, ...], tuple[PositiveInt, int], Annotated[float, "a range"]):
        with pytest.raises(TypeError, match=r"Config\.field must "):
            declare(hint)
    for hint in (dict[str, PositiveInt], list[Share], PositiveInt | str, Unchecked):
        with pytest.raises(TypeError, match=r"Config\.field must be "):
            declare(hint)
    for hint in (PositiveInt, Share | None, tuple[Share, ...] | None, str | None, tuple[str, ...], bool, Inner, Any):
        declare(hint)
    with pytest.raises(TypeError, match=r"Unchecked must be a checked_dataclass"):
        parse_config(Unchecked, [])


def test_a_class_that_adds_a_number_without_checking_it_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Heir(Inner):
        unchecked: float = 0.0

    assert is_checked(Inner) and not is_checked(Heir)
    with pytest.raises(TypeError, match=r"Heir must be a checked_dataclass"):
        parse_config(Heir, [])


def test_numbers_of_numpy_are_numbers():
    assert DataConfig(num_frames=np.int64(9), caption_dropout=np.float32(0.5)).num_frames == 9
    for value in ("nan", "inf"):
        with pytest.raises(ValueError, match="caption_dropout must be a finite number, in"):
            DataConfig(caption_dropout=np.float32(value))


@pytest.mark.parametrize(
    ("allowed", "words", "inside", "outside"),
    [
        (Range(ge=1), "1 or more", (1, 2.5), (0, -1)),
        (Range(gt=0), "above 0", (1e-300,), (0,)),
        (Range(le=3), "3 or less", (3, -9), (4,)),
        (Range(lt=3), "below 3", (2,), (3,)),
        (Range(ge=0, lt=1), "in [0, 1)", (0, 0.5), (1, -0.5)),
        (Range(gt=0, le=2**32), "in (0, 4294967296]", (2**32,), (0, 2**32 + 1)),
        (Range(ge=1, also=(-1,)), "1 or more, or -1", (1, -1), (0, -2)),
        (Range(), "finite", (0, -1e300), ()),
    ],
)
def test_a_range_says_what_it_holds(allowed, words, inside, outside):
    assert str(allowed) == words
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


def test_weights_of_tables_are_checked_when_they_are_not_from_a_file():
    for weight in (0.0, -1.0, math.nan, math.inf, True):
        with pytest.raises(ValueError, match="weight must be "):
            Source(metadata_path="a.csv", weight=weight)


def test_finite_is_the_least_that_is_asked():
    @checked_dataclass
    class Config:
        scale: FiniteFloat = 1.0
        size: PositiveFloat = 1.0

    assert Config(scale=-1e300, size=1e-300).scale == -1e300
    with pytest.raises(ValueError, match=r"^scale must be a finite number, got inf; the default is 1\.0\.$"):
        Config(scale=math.inf)
