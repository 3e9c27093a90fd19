"""Reads recipes and command lines into the dataclasses of `arguments.py`, and finds the recipes that are installed.

A recipe is a flat YAML file; every key of it may be overridden on the command line as `--key value`. All values, from
YAML too, are parsed by argparse as text, so `1e-4` is a number and `no` is a string (YAML 1.1 reads it as `false`). An
unknown key raises an error that names the nearest known one.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

import jnana

from .arguments import TRAINING_DEFAULTS


UNSET = ("null", "~")  # YAML's words for no value
SOURCES = ("train_data", "eval_data")  # options that may be lists of sources


def parse_arguments(classes: Sequence[type], argv: Sequence[str]) -> tuple:
    """Read `[recipe.yaml] [--key value ...]` into one instance of each dataclass.

    Args:
        classes (`Sequence[type]`): Dataclasses, `TrainingArguments` among them; no field name may occur twice.
        argv (`Sequence[str]`): Command line without the program's name.

    Returns:
        `tuple`: One instance of each class, in the order given.

    Raises:
        ValueError: if the recipe cannot be read, a value follows no option, or a key is unknown (the message names
            the nearest known key).
    """
    recipe = recipe_name(argv)
    argv = list(argv[0 if recipe is None else 1 :])
    known = sorted({f.name for cls in classes for f in dataclasses.fields(cls) if f.init})
    values: dict[str, Any] = dict(TRAINING_DEFAULTS) if TrainingArguments in classes else {}
    if recipe is not None:
        from_recipe = read_recipe(recipe)
        for key in from_recipe:
            if key not in known:
                raise ValueError(unknown_key_message(key, known, where=recipe))
        values.update(from_recipe)
    argv, unset = split_unset(argv, known)
    values = {key: value for key, value in values.items() if key not in unset}
    parser = HfArgumentParser(list(classes), allow_abbrev=False)
    # nargs="+" would take values that follow an option of the recipe, hence recipe first, command line after it
    *parsed, remaining = parser.parse_args_into_dataclasses(
        [*as_command_line(values), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if remaining and not remaining[0].startswith("-"):
        raise ValueError(
            f"{remaining[0]!r} belongs to no option; give the recipe as the first argument, and one value to an "
            "option that takes one"
        )
    if remaining:
        key = remaining[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(unknown_key_message(key, known, where="the command line"))
    return tuple(parsed)


def split_unset(argv: Sequence[str], known: Sequence[str]) -> tuple[list[str], set[str]]:
    """Take `--key null` from a command line: like `key: null` in a recipe, it leaves an option at its default.

    Args:
        argv (`Sequence[str]`): Options and values.
        known (`Sequence[str]`): The options that exist; others are kept, for the error that names them.

    Returns:
        `tuple[list[str], set[str]]`: The remaining command line, and the options that are unset.
    """
    remaining: list[str] = []
    unset: set[str] = set()
    position = 0
    while position < len(argv):
        word = argv[position]
        key, equals, value = word.removeprefix("--").partition("=")
        key, size = key.replace("-", "_"), 1
        if not equals and position + 1 < len(argv):
            value, size = argv[position + 1], 2
        followed = position + size < len(argv) and not argv[position + size].startswith("-")  # one of several values
        if word.startswith("--") and key in known and value in UNSET and not followed:
            unset.add(key)
            position += size
        else:
            remaining.append(word)
            position += 1
    return remaining, unset


def recipe_name(argv: Sequence[str]) -> str | None:
    """The recipe on a command line: its first argument, unless that is an option."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: `name` itself or, if there is no such file, `recipes/...` as it was installed with jnana.

    Args:
        name (`str` or `Path`): A path, for example `recipes/jnana/sft.yaml`.
    """
    path = Path(name)
    if path.exists() or path.is_absolute() or path.parts[:1] != ("recipes",):
        return path
    # In a clone the recipes lie beside the package's directories, in an installation in the package.
    found = [Path(folder) / path for folder in jnana.__path__ if (Path(folder) / path).is_file()]
    return found[0] if found else path


def accelerate_config(name: str) -> str:
    """The path of a configuration for `accelerate launch --config_file`, for messages: relative where it is shorter.

    Args:
        name (`str`): A file of recipes/accelerate/, for example `fsdp2.yaml`.
    """
    path = recipe_path(f"recipes/accelerate/{name}").resolve()
    return min(str(path), os.path.relpath(path), key=len)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file as a dict whose scalars are text; keys with an empty value or `null` are left out.

    Raises:
        ValueError: if the file does not exist, is not YAML, is not a mapping, or names a key twice.
    """
    path = recipe_path(path)
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file; the first argument is a YAML file, or starts with `--`")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":  # JSON is YAML, except for tabs as indentation
            text = text.replace("\t", " ")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {str(path)!r} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} holds a {type(values).__name__}; it must be a mapping `key: value`")
    keys = [key.value for key, _ in root.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"recipe {str(path)!r} sets {key!r} {keys.count(key)} times; keep one")
    return without_unset(values)


def as_command_line(values: dict[str, Any]) -> list[str]:
    """`{"learning_rate": "1e-4"}` as `["--learning_rate=1e-4"]`; lists as several arguments, mappings and lists of
    sources as JSON, in which the scalars of sources stay texts."""
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, list) and key in SOURCES:
            words.append(f"--{key}={json.dumps(list(map(without_unset, value)))}")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            words.append(f"--{key}={json.dumps(typed(value))}")
        elif isinstance(value, list):
            words += [f"--{key}", *value]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(typed(value))}")
        else:
            words.append(f"--{key}={value}")
    return words


def without_unset(value: Any) -> Any:
    """A mapping without the keys that have an empty value or `null`."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if item not in ("", *UNSET, [])}


def typed(value: Any) -> Any:
    """The scalars of a nested value as JSON types: `"1e-5"` -> 1e-05, `"true"` -> True; other text is unchanged."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def unknown_key_message(key: str, known: Sequence[str], where: str) -> str:
    """The error for an unknown option, with the most similar known one."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"unknown key {key!r} in {where}; the nearest known key is {nearest!r} (--help lists all)"
