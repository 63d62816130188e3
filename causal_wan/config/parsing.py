"""Frozen dataclasses from a YAML recipe and the command line; flags override the recipe.

A recipe is flat: its keys are the names of the flags. Every key, whichever dataclass it belongs to, is unique.
"""

import contextlib
import difflib
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from causal_wan.config.fields import are_pairs, flat_fields, room_for_text
from causal_wan.config.ranges import check_number, is_checked, passing_mistakes
from causal_wan.config.refusals import REFUSALS, describe_refusal


Config = TypeVar("Config")

# The names that "Video Regression Training for CausVid" uses for what diffusers' scripts call otherwise.
ALIASES = {
    "batch_size": "train_batch_size",
    "lr": "learning_rate",
    "max_steps": "max_train_steps",
    "save_interval": "checkpointing_steps",
    "num_workers": "dataloader_num_workers",
    "prompt_column": "caption_column",
}

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=.*)?", re.DOTALL)  # a dash or two, and a name without spaces
NUMBER = re.compile(r"-?[\d.]+(e-?\d+)?")
TEXT = "\0"  # before a text that begins with a dash, on its way through tyro; no argument of a process can hold it


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the program with status 2 and the message alone when what it runs finds a mistake of the user's.

    So it does for what the machine refuses: files that cannot be read or written, a full disk, no network.

    Args:
        kinds: Of exceptions; `REFUSALS` by default. Around what computes, OSError alone: there, a ValueError is ours.
    """
    caught = kinds or REFUSALS
    try:
        yield
    except caught as error:
        print(f"error: {describe_refusal(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def end_quietly(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """A `sys.excepthook` that says of Ctrl-C what it is, and nothing of where the program was."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def parse_config(
    config_class: type[Config],
    argv: Sequence[str] | None = None,
    *,
    description: str = "",
    also_known: Collection[str] = (),
) -> Config:
    """Builds a config from `--config recipe.yaml` and flags; bad input ends the program with status 2 and one message.

    Args:
        config_class: A `checked_dataclass`; those in it become groups of flags.
        argv: The command line without the program's name; that of the process by default, which Ctrl-C then ends
            with one line.
        description: Shown by `--help`.
        also_known: Settings of another script, which the recipe may hold and which are passed over.

    Raises:
        TypeError: If the class is none that checks its numbers.
    """
    if not is_checked(config_class):
        raise TypeError(f"{config_class.__qualname__} must be a checked_dataclass; decorate it.")
    if argv is None:
        sys.excepthook = end_quietly
        argv = sys.argv[1:]
    argv = list(argv)
    with user_errors():
        argv = _canonical_flags(argv, config_class)
        argv, recipe_path = _pop_config_flag(argv)
        recipe = read_recipe(recipe_path, config_class, also_known) if recipe_path else {}
        rooms = _rooms_for_text(config_class)
        given = {_flag_name(token) for token in argv if token.startswith("--")}
        recipe_argv = [
            token
            for key, value in recipe.items()
            if key not in given and f"no_{key}" not in given
            for token in _to_flags(key, value, is_text=key in rooms)
        ]
        with passing_mistakes():
            return tyro.cli(
                tyro.conf.configure(tyro.conf.OmitArgPrefixes)(config_class),
                args=recipe_argv + argv,
                description=description
                + "\n\n--config RECIPE.yaml gives defaults for all flags below; flags override it.",
                use_underscores=True,
                registry=_texts(),
            )


def read_recipe(path: str | Path, config_class: type, also_known: Collection[str] = ()) -> dict[str, Any]:
    """Reads a flat YAML recipe, with aliases resolved, and without what is known to another script alone.

    Raises:
        ValueError: If the file is not there or no flat mapping, has a key that is no flag (suggests the right one), or
            a value that the setting cannot have.
    """
    loaded = read_yaml(path, "--config")
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must be a mapping of flag names to values, got {type(loaded).__name__}.")
    fields = dict(flat_fields(config_class))
    recipe = {}
    for given_key, given_value in loaded.items():
        key, value = _canonical_setting(str(given_key), given_value, fields)
        if key not in fields and key in also_known:
            continue
        if key not in fields:
            close = difflib.get_close_matches(key, [*fields, *ALIASES], n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see --help for all names."
            raise ValueError(f"{path}: {given_key!r} is not a setting of this script; {hint}")
        _check_recipe_value(f"{path}: {given_key!r}", fields[key], value)
        recipe[key] = value
    return recipe


def read_yaml(path: str | Path, name: str) -> Any:
    """What a YAML file says.

    Args:
        path: Of the file.
        name: What it is given as, for the error.

    Raises:
        ValueError: If it is not there, cannot be read, is no YAML, or says something twice.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{name} must name a YAML file, but {path} {what}.")
    try:
        return yaml.load(path.read_bytes(), OnceLoader)  # of which it sees UTF-16 by its mark
    except OSError as error:
        raise ValueError(f"{name} must name a YAML file, but {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that is none, ValueError
        raise ValueError(f"{path} must be valid YAML: {' '.join(str(error).split())}") from None


class OnceLoader(yaml.SafeLoader):
    """Refuses mappings with a key twice, of which YAML takes the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """As yaml's.

        Raises:
            yaml.YAMLError: If a key is there twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                said = f"{key.value!r} is there twice, in line {lines[key.value]} and {line}"
                raise yaml.composer.ComposerError(None, None, said, None)
            lines[key.value] = line
        return node


def _check_recipe_value(name: str, hint: Any, value: Any) -> None:
    """Checks what YAML has read as a number or a bool; of what it has read as text, 1e-4 among it, the flag will say.

    Raises:
        ValueError: If it is a mapping, or none that the setting can be.
    """
    if isinstance(value, dict):
        raise ValueError(f"{name} must be a value or a list, got a mapping; recipes are flat.")
    items = value if isinstance(value, list) else [value]
    if hint is bool or not any(isinstance(item, str) for item in items):
        is_tuple = any(typing.get_origin(kind) is tuple for kind in (hint, *typing.get_args(hint)))
        check_number(name, hint, tuple(items) if is_tuple and value is not None else value)
    if isinstance(value, bool) and hint is not bool:
        raise ValueError(f"{name} must be no bool, got {value}; in quotes yes, no, on and off are text to YAML.")


def write_recipe(settings: dict[str, Any], path: str | Path) -> None:
    """Writes the settings of a resolved config, from `flat_dict`, as a recipe that `--config` takes.

    Beside, then renamed: on a full disk, the settings that were there stay.

    Raises:
        OSError: If it cannot be written; names the file.
    """
    path, partial = Path(path), Path(path).with_name(f"partial-{Path(path).name}")
    try:
        partial.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _canonical_name(name: str, fields: Collection[str]) -> str:
    name = name.replace("-", "_")
    return name if name in fields else ALIASES.get(name, name)


def _canonical_setting(key: str, value: Any, fields: Collection[str]) -> tuple[str, Any]:
    key = _canonical_name(key, fields)
    if key == "mixed_precision" and isinstance(value, bool):  # the document writes `mixed_precision: true`
        value = "bf16" if value else "no"
    return key, value


def _flag_name(token: str) -> str:
    return token.removeprefix("--").partition("=")[0].replace("-", "_")


def _canonical_flags(argv: list[str], config_class: type) -> list[str]:
    """Resolves aliases, and `--flag true` / `--flag false` for switches, which tyro writes `--flag` / `--no_flag`.

    What begins with dashes and is no flag is a text, where one is expected.
    """
    fields, rooms = dict(flat_fields(config_class)), _rooms_for_text(config_class)
    switches = {name for name, hint in fields.items() if hint is bool}
    pairs = {name for name, hint in fields.items() if are_pairs(hint)}
    canonical: list[str] = []
    name, room = "", 0.0  # of the last flag: its name, and how many texts may still follow
    for token in argv:
        is_flag = FLAG.fullmatch(token) is not None
        is_number = name in pairs and NUMBER.fullmatch(token) is not None
        if is_flag and token.startswith("--"):
            name, equals, value = token.removeprefix("--").partition("=")
            name = _canonical_name(name, fields)
            room = rooms.get(name, 0) - bool(equals)
            if name in switches and equals and value.lower() in ("true", "false"):
                name, equals, value = (name if value.lower() == "true" else f"no_{name}"), "", ""
            canonical.append(f"--{name}{equals}{value}")
        elif name in switches and token.lower() in ("true", "false"):
            if token.lower() == "false":
                canonical[-1] = f"--no_{name}"
            name = ""
        else:
            canonical.append(_protect(token) if room > 0 and not is_flag and not is_number else token)
            name, room = (name if name in pairs else ""), room - 1
    return _join_pairs(canonical, pairs)


def _join_pairs(argv: list[str], pairs: Collection[str]) -> list[str]:
    """Flags of pairs, which may be given again and again, once with the values of all, at the end.

    Raises:
        ValueError: If values are no pairs.
    """
    rest: list[str] = []
    joined: dict[str, list[str]] = {}
    of_flag = rest
    for token in argv:
        if token.startswith("--"):
            of_flag = joined.setdefault(token, [token]) if _flag_name(token) in pairs else rest
            if of_flag is not rest:
                continue
        of_flag.append(token)
    for flag, *values in joined.values():
        if len(values) % 2:
            raise ValueError(f"{flag.removeprefix('--')} must be pairs, got {' '.join(values)!r:.100}.")
    return rest + [token for tokens in joined.values() for token in tokens]


def _rooms_for_text(config_class: type) -> dict[str, float]:
    """How many values each setting takes that is a text or several."""
    rooms = {name: room_for_text(hint) for name, hint in flat_fields(config_class)}
    return {name: room for name, room in rooms.items() if room}


def _protect(text: str) -> str:
    return TEXT + text if text.startswith(("-", TEXT)) else text


def _texts() -> tyro.constructors.ConstructorRegistry:
    """Makes texts of what `_protect` gives."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
        if info.type is not str:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="STR",
            instance_from_str=lambda texts: texts[0].removeprefix(TEXT),
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda text: [text],
        )

    return registry


def _pop_config_flag(argv: list[str]) -> tuple[list[str], str | None]:
    rest, path, tokens = [], None, iter(argv)
    for token in tokens:
        if token == "--config":
            path = next(tokens, None)
            if path is None:
                raise ValueError("--config must be followed by the path of a YAML recipe.")
        elif token.startswith("--config="):
            path = token.partition("=")[2]
        else:
            rest.append(token)
    return rest, path


def _to_flags(key: str, value: Any, *, is_text: bool) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}" if value else f"--no_{key}"]
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list) for item in items):  # pairs
        items = [part for item in items for part in (item if isinstance(item, list) else [item])]
        return [f"--{key}", *(_protect(part) if isinstance(part, str) else str(part) for part in items)]
    items = [str(item) for item in items]
    return [f"--{key}", *(map(_protect, items) if is_text else items)]
