"""Errors that would come after the model is loaded, or after an hour: found first, from the arguments alone."""

import tempfile
from pathlib import Path

from peft import PeftConfig
from transformers import TrainingArguments

from processing.feature_cache import KEY_FILE

from .arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TextDataArguments,
    TextModelArguments,
)


FILE_SUFFIXES = {".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow", ".gz"}


def check_run(args: TrainingArguments, data_args: DataArguments | TextDataArguments, run_args: RunArguments) -> None:
    """Check every path and every pair of options that must agree.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    check_output_dir(args.output_dir)
    if data_args.train_data is None:
        raise ValueError("train_data is not set; give a file, a folder or a Hub data set")
    check_source("train_data", data_args.train_data)
    if data_args.eval_data is not None:
        check_source("eval_data", data_args.eval_data)
    if isinstance(data_args, DataArguments):
        for name in ("image_folder", "eval_image_folder"):
            folder = getattr(data_args, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{name} {folder!r} is not a folder; give the folder that holds the images")
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but the Trainer would smooth each token's "
                "own label instead of the next token's, as it does not know this model; leave it out"
            )
        check_feature_cache(data_args)
    least = {"max_length": 2, "block_size": 2, "max_image_pixels": 1, "max_train_rows": 1, "max_eval_rows": 1}
    least |= {"max_row_tokens": 2}
    least |= {"sample_count": 1, "sample_max_new_tokens": 1, "sample_steps": 0}
    for name, value in {**vars(data_args), **vars(run_args)}.items():
        if name in least and value is not None and value < least[name]:
            raise ValueError(f"{name} is {value}; it must be at least {least[name]}, or be left out")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel would cut rows and pictures apart; start with "
            f"`accelerate launch --num_processes {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if data_args.eval_data is None:
        if args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value!r} but eval_data is not set; give it, or `no`"
            )
        if run_args.sample_steps > 0:
            raise ValueError(f"sample_steps is {run_args.sample_steps} but eval_data is not set; give it, or 0")
    if isinstance(data_args, DataArguments) and data_args.packing != "none":
        longest = data_args.max_length
        if data_args.streaming and (longest is None or longest > data_args.max_row_tokens):
            raise ValueError(
                f"a stream is packed into rows of max_row_tokens {data_args.max_row_tokens} before all of it is "
                f"measured, but max_length is {longest}; give max_length, at most max_row_tokens"
            )
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError(
            f"streaming is true but max_steps is {args.max_steps}; a stream has no length, so give max_steps"
        )


def check_feature_cache(args: DataArguments) -> None:
    """Check the options of the feature cache.

    Raises:
        ValueError: if it can't be made, or options contradict each other.
    """
    if args.feature_cache is None:
        if args.feature_cache_dtype is not None:
            raise ValueError(
                f"feature_cache_dtype is {args.feature_cache_dtype!r} but feature_cache is not set; give a folder, or "
                "leave both out"
            )
        return
    if args.streaming:
        raise ValueError(
            f"feature_cache is {args.feature_cache!r} but streaming is true: every picture must be known before "
            "training. Leave one of them out"
        )
    folder = Path(args.feature_cache)
    if not (folder / KEY_FILE).is_file():  # a finished one may be read-only
        check_output_dir(args.feature_cache, "feature_cache")


def check_models(args: ModelArguments | TextModelArguments) -> None:
    """Refuse models that look like folders and are none; the others may be Hub ids."""
    names = ("model_name_or_path", "vision_model", "text_model", "config_name_or_path", "tokenizer_name_or_path")
    for name in names:
        value = vars(args).get(name)
        if value is not None:
            check_source(name, value, "give a folder or a Hub id; the recipes' earlier stages write such folders")


def check_output_dir(folder: str, name: str = "output_dir") -> None:
    """Create the folder and write a file in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder!r} cannot be written to ({error.strerror}); choose another") from error


def check_source(name: str, source: str, remedy: str = "give a file, a folder or a Hub data set") -> None:
    """Refuse what looks like a path and does not exist; anything else may be a Hub id."""
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith(".") or path.suffix in FILE_SUFFIXES or len(path.parts) > 2
    if looks_local and not path.exists() and not any(mark in source for mark in "*?["):
        raise ValueError(f"{name} {source!r} does not exist; {remedy}")


def check_lora(args: LoraArguments, adapter: str | None) -> None:
    """Check the options of an adapter.

    Args:
        args (`LoraArguments`): The options.
        adapter (`str`, *optional*): The adapter folder or Hub id that is continued, if one is.

    Raises:
        ValueError: if `lora_r` contradicts the adapter to continue, or `merge_adapter` has nothing to merge.
    """
    if args.lora_r < 0 or not 0 <= args.lora_dropout < 1:
        raise ValueError(
            f"lora_r is {args.lora_r} and lora_dropout {args.lora_dropout}; give a rank >= 0 and 0 <= p < 1"
        )
    if adapter is not None:
        rank = PeftConfig.from_pretrained(adapter).r
        if args.lora_r not in (0, rank):
            raise ValueError(
                f"lora_r is {args.lora_r}, but the adapter {adapter!r} to continue has rank {rank}; leave it out, or "
                "merge that adapter and start from the merged checkpoint"
            )
    elif args.merge_adapter and args.lora_r == 0:
        raise ValueError("merge_adapter is true but lora_r is 0, so there is no adapter; set lora_r, or leave it out")
