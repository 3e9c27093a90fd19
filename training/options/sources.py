"""`train_data` and `eval_data` as lists of sources: read from a recipe, or as JSON from the command line."""

import dataclasses
import difflib
import json
from typing import TYPE_CHECKING, Any

from jnana.processing.data.mixture import DataSource, check_streams, source_names, weights


if TYPE_CHECKING:
    from .arguments import DataArguments


KEYS = tuple(field.name for field in dataclasses.fields(DataSource))
TEXTS = ("data", "name", "image_folder", "format", "split")
# Of validation data all rows are read, each once
TRAINING_KEYS = ("weight", "samples", "repeat")


def is_list(value: str | None) -> bool:
    """Whether an option names a list of sources, and not a path such as `[0-9].tar`."""
    return value is not None and value.lstrip().startswith("[") and "{" in value


def parse_sources(option: str, value: str) -> list[DataSource]:
    """
    The sources that an option lists.

    Args:
        option (`str`): `train_data` or `eval_data`.
        value (`str`): JSON, a list of objects with the fields of [`DataSource`].

    Raises:
        ValueError: naming the option, the source and the remedy.
    """
    try:
        entries = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not valid JSON ({error}); give a list of sources, or one path") from error
    sources = [_source(option, number, entry) for number, entry in enumerate(entries)]
    try:
        names = source_names(sources)
        weights(sources)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    return [dataclasses.replace(source, name=name) for source, name in zip(sources, names, strict=True)]


def _source(option: str, number: int, entry: Any) -> DataSource:
    where = f"{option}, source {number}"
    if not isinstance(entry, dict) or entry.get("data") is None:
        raise ValueError(f"{where} has no `data`; give a file, a directory or a Hub data set: - data: ...")
    for key, value in entry.items():
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; the nearest known key is {nearest!r}")
        if option == "eval_data" and key in TRAINING_KEYS:
            raise ValueError(
                f"{where}: {key!r} is of train_data; of validation data every row is read, so leave it out"
            )
        if key in TEXTS and isinstance(value, (dict, list)):
            raise ValueError(f"{where}: {key} is {value!r}; give one text")
    values = {key: str(value) if key in TEXTS else value for key, value in entry.items() if value is not None}
    for key, kind, least in (("weight", (int, float), 0), ("samples", int, 1), ("repeat", int, 1)):
        value = values.get(key, least or 1)
        if isinstance(value, bool) or not isinstance(value, kind) or value < least or value == 0:
            needed = "a number above 0" if key == "weight" else "a whole number from 1 on"
            raise ValueError(f"{where}: {key} is {value!r}; it must be {needed}")
    if "weight" in values and "samples" in values:
        raise ValueError(f"{where} has weight {values['weight']} and samples {values['samples']}; give one of them")
    return DataSource(**values)


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
