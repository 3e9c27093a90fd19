"""Checks of where a run writes: never over the model that it starts from, and to trackers that are installed."""

import logging
import re
from pathlib import Path

from transformers import AutoConfig, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from jnana.modeling import read_base_reference
from jnana.training.loading import load_config

from .arguments import DataArguments, ModelArguments, TextModelArguments


logger = logging.getLogger(__name__)

# Directories that a run writes into its output_dir and manages there
OWN_DIRECTORIES = ("merged", "evaluate")
# Packages of trackers whose names differ
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow"}
# Known to transformers, which does not tell whether they are installed
UNCHECKED = ("flyte",)


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


def check_trackers(args: TrainingArguments) -> None:
    """Check that the packages of `report_to` are installed; the Trainer does, after the model is loaded.

    Raises:
        ValueError: naming the package and the remedy.
    """
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in names:
        if name not in ("none", "all", *UNCHECKED, *get_available_reporting_integrations()):
            raise ValueError(
                f"report_to names {name!r}, which is not installed (or not known to transformers): `pip install "
                f"{PACKAGES.get(name, name)}`, or set `report_to: none`"
            )


def limit_to_context(data_args: DataArguments, model_args: ModelArguments) -> None:
    """
    Set `max_length`, where it is not given, to the longest sequence that the language model was made for. A longer
    conversation is then cut and counted, or can't be used if its images do not fit.

    Args:
        data_args (`DataArguments`): changed in place.
        model_args (`ModelArguments`): whose config is read; no weights.
    """
    trust = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.model_name_or_path is not None:
        config = load_config(model_args.model_name_or_path, **trust).text_config
    else:
        config = AutoConfig.from_pretrained(model_args.text_model, **trust).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return
    if data_args.max_length is None:
        data_args.max_length = longest
    elif data_args.max_length > longest:
        logger.warning(
            f"max_length is {data_args.max_length}, more than the max_position_embeddings {longest} of the language "
            "model, which was not trained on longer sequences"
        )


def models_read(args: ModelArguments | TextModelArguments) -> dict[str, str | None]:
    """Option -> value of every model that the arguments name."""
    names = ("model_name_or_path", "vision_model", "text_model", "config_name_or_path", "tokenizer_name_or_path")
    return {name: vars(args)[name] for name in names if name in vars(args)}
