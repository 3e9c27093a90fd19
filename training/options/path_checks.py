"""Checks of paths: what a run reads exists, and it never writes over the model that it starts from."""

import re
import tempfile
from pathlib import Path

from jnana.modeling import read_base_reference
from jnana.processing.data.paths import names_local_path

from .arguments import ModelArguments, TextModelArguments


# Directories that a run writes into its output_dir and manages there
OWN_DIRECTORIES = ("merged", "evaluate")


def check_output_apart(output_dir: str, models: dict[str, str | None], allowed: str | None = None) -> None:
    """
    Check that a run does not write over a model that it reads.

    Args:
        output_dir (`str`): where the run writes.
        models (`dict[str, str | None]`): option -> directory or Hub id of each model. The base of an adapter is
            checked too.
        allowed (`str`, *optional*): the directory of `OWN_DIRECTORIES` that the run may write inside a model.

    Raises:
        ValueError: if `output_dir` is the directory of a model, contains it, or lies inside it under a name that the
            model's run uses itself. Symbolic links are followed.
    """
    output = Path(output_dir).resolve()
    for name, value in models.items():
        if value is None or not Path(value).is_dir():
            continue
        folders = {f"{name} {value!r}": Path(value).resolve()}
        reference = read_base_reference(value) or {"names": {}}
        for base in reference["names"].values():
            if Path(base).is_dir():
                folders[f"the base {base!r} of {name} {value!r}"] = Path(base).resolve()
        for what, folder in folders.items():
            problem = _overlap(output, folder, allowed)
            if problem:
                raise ValueError(
                    f"output_dir {output_dir!r} {problem} {what}, which would be overwritten; give another directory, "
                    "such as one beside it"
                )


def _overlap(output: Path, model: Path, allowed: str | None) -> str | None:
    """How an output directory overlaps with a model's, if its files could replace those of the model."""
    if output == model:
        return "is the directory of"
    if output in model.parents:
        return "contains"
    if model not in output.parents:
        return None
    first = output.relative_to(model).parts[0]
    own = first in OWN_DIRECTORIES and first != allowed
    if own or re.fullmatch(r"checkpoint-\d+", first) or (model / first).is_file():
        return f"lies in {first!r}, which belongs to"
    return None


def models_read(args: ModelArguments | TextModelArguments) -> dict[str, str | None]:
    """Option -> value of every model that the arguments name."""
    names = ("model_name_or_path", "vision_model", "text_model", "config_name_or_path", "tokenizer_name_or_path")
    return {name: vars(args)[name] for name in names if name in vars(args)}


def check_output_dir(folder: str, name: str = "output_dir") -> None:
    """Create the directory and write a file in it.

    Raises:
        ValueError: naming the option and the directory.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder!r} cannot be written to ({error.strerror}); choose another") from error


def check_source(name: str, source: str, remedy: str = "give a file, a directory or a Hub data set") -> None:
    """Check that a name which can only be a local path exists; other names may be Hub ids.

    Raises:
        ValueError: naming the option, the path and the remedy.
    """
    is_pattern = any(mark in source for mark in "*?[")
    if names_local_path(source) and not Path(source).exists() and not is_pattern:
        raise ValueError(f"{name} {source!r} does not exist; {remedy}")
