"""`train_data` and `eval_data` as lists of sources, in JSON: given on the command line, or made of a recipe's list."""

import dataclasses
import difflib
import json
import math
import re
from typing import TYPE_CHECKING, Any

from jnana.processing.data.mixture import DataSource, check_streams, source_names, weights
from jnana.processing.data.readers import FORMATS


if TYPE_CHECKING:
    from .arguments import DataArguments


KEYS = tuple(field.name for field in dataclasses.fields(DataSource))
NUMBERS = {"weight": "a number above 0", "samples": "a whole number from 1 on", "repeat": "a whole number from 1 on"}
SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
# Of validation data all rows are read, each once
TRAINING_KEYS = ("weight", "samples", "repeat")
# The log has tokens_per_second and samples_per_second of all sources, beside tokens_<name> and samples_<name>.
RESERVED = "per_second"


def is_list(value: str | None) -> bool:
    """Whether an option is a list of sources, and not a path such as `[0-9].tar`."""
    return value is not None and re.match(r"\s*\[\s*[{\"\]]", value) is not None


def check_no_mapping(option: str, value: str | None) -> None:
    """
    Check that sources are not given as a mapping.

    Raises:
        ValueError: with the list that is meant.
    """
    if value is None or not value.lstrip().startswith("{"):
        return
    try:
        given = json.loads(value)
    except json.JSONDecodeError:  # a path
        return
    named = [{"name": name, **(of if isinstance(of, dict) else {"data": of})} for name, of in given.items()]
    meant = json.dumps([given] if "data" in given else named, ensure_ascii=False)
    raise ValueError(f"{option} is a mapping; give a list of sources: {meant}")


def source_entries(option: str, value: str) -> list[dict[str, Any]]:
    """
    The sources that an option lists, as they are given.

    Args:
        option (`str`): `train_data` or `eval_data`.
        value (`str`): JSON, a list of paths, or of objects with the fields of [`DataSource`]. Numbers may be texts, as
            in a recipe.

    Returns:
        `list[dict]`: The fields that are set, with the types of [`DataSource`].

    Raises:
        ValueError: naming the option, the source and the remedy.
    """
    try:
        # A name or a path may look like a number, so the field decides what a number is.
        entries = json.loads(value, parse_float=str, parse_int=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not valid JSON ({error}); give a list of sources, or one path") from error
    return [_entry(option, number, entry) for number, entry in enumerate(entries)]


def parse_sources(option: str, value: str) -> list[DataSource]:
    """
    The sources that an option lists, each with a name.

    Args:
        option, value: As for [`source_entries`].

    Raises:
        ValueError: as [`source_entries`]; or if two sources have one name, or only some have a weight.
    """
    sources = [DataSource(**entry) for entry in source_entries(option, value)]
    try:
        names = source_names(sources)
        weights(sources)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    if RESERVED in names:
        raise ValueError(
            f"{option}, source {names.index(RESERVED)} is named {RESERVED!r}, but the log has tokens_{RESERVED} and "
            f"samples_{RESERVED} of all sources; give it another `name`"
        )
    return [dataclasses.replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def _entry(option: str, number: int, entry: Any) -> dict[str, Any]:
    where = f"{option}, source {number}"
    if isinstance(entry, str):
        entry = {"data": entry}
    if not isinstance(entry, dict) or entry.get("data") is None:
        raise ValueError(f"{where} has no `data`; give a file, a directory or a Hub data set: - data: ...")
    for key in entry:
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; the nearest known key is {nearest!r}")
        if option == "eval_data" and key in TRAINING_KEYS:
            raise ValueError(
                f"{where}: {key!r} is of train_data; of validation data every row is read, so leave it out"
            )
    if entry.get("weight") is not None and entry.get("samples") is not None:
        raise ValueError(f"{where} has weight {entry['weight']} and samples {entry['samples']}; give one of them")
    return {key: _value(where, key, value) for key, value in entry.items() if value is not None}


def _value(where: str, key: str, value: Any) -> Any:
    """The value of a field with its type."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if key in NUMBERS:
        parsed = _number(text) if key == "weight" else _whole_number(text)
        if parsed is None or parsed <= 0:
            raise ValueError(f"{where}: {key} is {text}; it must be {NUMBERS[key]}")
        return parsed
    if key == "independent_turns":
        if text.lower() not in SWITCHES:
            raise ValueError(f"{where}: {key} is {text}; it must be true or false")
        return SWITCHES[text.lower()]
    if isinstance(value, (dict, list)):
        raise ValueError(f"{where}: {key} is {text}; give one text")
    if key == "format":
        check_format(f"{where}: format", text)
    return text


def _number(text: str) -> float | None:
    """A finite number, or `None`."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _whole_number(text: str) -> int | None:
    """A whole number, written with an exponent too, or `None`."""
    try:
        return int(text)
    except ValueError:
        number = _number(text)
        return int(number) if number is not None and number.is_integer() else None


def check_format(name: str, value: str) -> None:
    """
    Check that a format exists.

    Raises:
        ValueError: naming the option, its value and the nearest format.
    """
    known = ("auto", *FORMATS)
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}. The nearest is {nearest!r}")


def sources_of(args: "DataArguments", evaluation: bool = False) -> list[DataSource]:
    """
    The sources of a run, each with its name, format, split and image folder; one for a single path.

    Args:
        args (`DataArguments`): The run's.
        evaluation (`bool`, *optional*, defaults to `False`): Those of the validation data.

    Raises:
        ValueError: as [`parse_sources`].
    """
    option, value = ("eval_data", args.eval_data) if evaluation else ("train_data", args.train_data)
    if value is None:
        return []
    check_no_mapping(option, value)
    sources = parse_sources(option, value) if is_list(value) else [DataSource(value)]
    folder = (args.eval_image_folder or args.image_folder) if evaluation else args.image_folder
    return [
        dataclasses.replace(
            source,
            image_folder=source.image_folder or folder,
            format=source.format or (args.eval_format if evaluation else args.train_format),
            split=source.split or (args.eval_split if evaluation else args.train_split),
        )
        for source in sources
    ]


def mixture_names(args: "DataArguments") -> tuple[str, ...]:
    """The names of the training sources, if there are several."""
    sources = sources_of(args)
    return tuple(source_names(sources)) if len(sources) > 1 else ()


def check_mixture(args: "DataArguments") -> None:
    """
    Check that a stream can be mixed as the sources say.

    Raises:
        ValueError: as [`check_streams`].
    """
    sources = sources_of(args)
    if args.streaming and len(sources) > 1:
        try:
            check_streams(sources, args.packing, args.mix)
        except ValueError as error:
            raise ValueError(f"train_data: {error}") from error
    elif args.streaming and (sources[0].samples is not None or sources[0].repeat != 1):
        raise ValueError(
            "train_data: a stream has no epoch to count `samples` or `repeat` in; leave them out, or set "
            "streaming: false"
        )
    if args.shuffle_buffer and not args.streaming:
        raise ValueError(
            f"shuffle_buffer is {args.shuffle_buffer} but streaming is false, so all rows are shuffled; leave it out"
        )
