"""Checks of the arguments alone: errors that would otherwise come after the model is loaded, or after an hour."""

from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy

from jnana.processing.data.feature_cache import KEY_FILE
from jnana.training.attention import check_attention, check_documents

from .arguments import (
    DataArguments,
    ModelArguments,
    RunArguments,
    TextDataArguments,
    TextModelArguments,
)
from .model_checks import check_model_arguments, check_models, check_text_arguments
from .path_checks import check_output_apart, check_output_dir, check_source, models_read
from .recipes import accelerate_config
from .sources import check_format, check_mixture, check_no_mapping, is_list, sources_of


# The smallest value of options that count something.
SMALLEST = {
    "max_length": 2,
    "block_size": 2,
    "max_row_tokens": 2,
    "max_image_pixels": 1,
    "max_train_rows": 1,
    "max_eval_rows": 1,
    "sample_count": 1,
    "sample_max_new_tokens": 1,
    "sample_steps": 0,
    "shuffle_buffer": 0,
}
# Packages of trackers whose names differ
PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow"}
# Known to transformers, which does not tell whether they are installed
UNCHECKED = ("flyte",)


def check_run(
    args: TrainingArguments,
    model_args: ModelArguments | TextModelArguments,
    data_args: DataArguments | TextDataArguments,
    run_args: RunArguments,
) -> None:
    """Check every path and every pair of options that must agree.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if isinstance(model_args, ModelArguments):
        check_model_arguments(model_args)
    else:
        check_text_arguments(model_args)
    check_models(model_args)
    check_output_apart(args.output_dir, models_read(model_args))
    check_output_dir(args.output_dir)
    check_trackers(args)
    check_data(args, data_args)
    for name, value in {**vars(data_args), **vars(run_args)}.items():
        if name in SMALLEST and value is not None and value < SMALLEST[name]:
            raise ValueError(f"{name} is {value}; it must be at least {SMALLEST[name]}, or be left out")
    if run_args.save_minutes is not None and run_args.save_minutes <= 0:
        raise ValueError(f"save_minutes is {run_args.save_minutes}; it must be above 0, or be left out")
    if args.n_gpu > 1 and not (isinstance(model_args, ModelArguments) and model_args.device_map):
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel would split rows from their images; start with "
            f"`accelerate launch --num_processes {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if data_args.eval_data is None:
        if args.eval_strategy != "no":
            strategy = IntervalStrategy(args.eval_strategy).value
            raise ValueError(f"eval_strategy is {strategy!r} but eval_data is not set; give it, or `no`")
        if run_args.sample_steps > 0:
            raise ValueError(f"sample_steps is {run_args.sample_steps} but eval_data is not set; give it, or 0")
    if isinstance(data_args, TextDataArguments):
        check_documents(data_args.packing, args.accelerator_config.dispatch_batches)
    if isinstance(data_args, DataArguments):
        check_attention(model_args.attn_implementation, data_args.packing)
        check_best_model(args, data_args)
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but the Trainer would smooth each token's "
                "own label instead of the next token's, because it does not know this model; leave it out"
            )


def check_data(args: TrainingArguments, data_args: DataArguments | TextDataArguments) -> None:
    """Check the paths of the data, and the options that a stream needs.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if data_args.train_data is None:
        raise ValueError("train_data is not set; give a file, a directory or a Hub data set")
    if isinstance(data_args, DataArguments):
        check_sources(data_args)
        check_mixture(data_args)
    else:
        check_one_source(data_args)
    if isinstance(data_args, DataArguments):
        for name in ("image_folder", "eval_image_folder"):
            folder = getattr(data_args, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{name} {folder!r} is not a directory; give the directory that holds the images")
        check_feature_cache(data_args)
    if not data_args.streaming:
        return
    if isinstance(data_args, DataArguments) and data_args.packing != "none":
        longest = data_args.max_length
        if longest is None or longest > data_args.max_row_tokens:
            raise ValueError(
                f"a stream is packed into rows of max_row_tokens {data_args.max_row_tokens} before all of it is "
                f"measured, but max_length is {longest}; give max_length, at most max_row_tokens"
            )
    if args.max_steps <= 0:
        raise ValueError(
            f"streaming is true but max_steps is {args.max_steps}; a stream has no length, so give max_steps"
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r} but streaming is true; the lengths of a "
            "stream are not known, so leave one of them out"
        )


def check_sources(data_args: DataArguments) -> None:
    """Check the paths and formats of all sources.

    Raises:
        ValueError: naming the option, the source and the path or format.
    """
    for option in ("train_format", "eval_format"):
        check_format(option, getattr(data_args, option))
    for option, evaluation in (("train_data", False), ("eval_data", True)):
        several = is_list(getattr(data_args, option))
        for source in sources_of(data_args, evaluation):
            name = f"{option}, source {source.name!r}:" if several else option
            check_source(name, str(source.data))
            folder = source.image_folder
            if several and folder is not None and not Path(folder).is_dir():
                raise ValueError(
                    f"{name} image_folder {str(folder)!r} is not a directory; give the directory that holds the images"
                )


def check_best_model(args: TrainingArguments, data_args: DataArguments) -> None:
    """Check that the loss that chooses the best checkpoint is one of the validation's.

    Raises:
        ValueError: naming the losses that there are.
    """
    given = args.metric_for_best_model
    if data_args.eval_data is None or given is None or not given.endswith("loss"):
        return
    named = is_list(data_args.eval_data)
    losses = [f"eval_{source.name}_loss" if named else "eval_loss" for source in sources_of(data_args, True)]
    if (given if given.startswith("eval_") else f"eval_{given}") in losses:
        return
    if named:
        what, remedy = "a list, whose sources have a loss each", f"one of {', '.join(losses)}"
    else:
        what, remedy = "a single source", "eval_loss"
    raise ValueError(f"metric_for_best_model is {given!r}, but eval_data is {what}; give {remedy}")


def check_one_source(data_args: TextDataArguments) -> None:
    """Check the paths of a text corpus, which is one source.

    Raises:
        ValueError: naming the option, the path and the remedy.
    """
    for option in ("train_data", "eval_data"):
        value = getattr(data_args, option)
        check_no_mapping(option, value)
        if is_list(value):
            raise ValueError(f"{option} is a list of sources, but run_pretrain reads one; join the files, or give one")
        if value is not None:
            check_source(option, value)


def check_feature_cache(args: DataArguments) -> None:
    """Check the options of the feature cache.

    Raises:
        ValueError: if its directory can't be written to, or options contradict each other.
    """
    if args.feature_cache is None:
        if args.feature_cache_dtype is not None:
            raise ValueError(
                f"feature_cache_dtype is {args.feature_cache_dtype!r} but feature_cache is not set; give a directory, "
                "or leave both out"
            )
        return
    if args.streaming:
        raise ValueError(
            f"feature_cache is {args.feature_cache!r} but streaming is true: every image must be known before "
            "training. Leave one of them out"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"feature_cache is {args.feature_cache!r}, but ZeRO-3 partitions the tower's weights over the processes "
            "while it loads them, so no process can compute features; train with "
            f"{accelerate_config('fsdp2.yaml')} or zero2.yaml, or leave it out"
        )
    folder = Path(args.feature_cache)
    if not (folder / KEY_FILE).is_file():  # a finished cache may be read-only
        check_output_dir(args.feature_cache, "feature_cache")


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
