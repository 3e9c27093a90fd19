"""Converts the data arguments of a training script to data sets for the Trainer."""

from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    MAX_IMAGE_PIXELS,
    CheckReport,
    PrepareOptions,
    check_rows,
    load_text,
    pack_blocks,
    pack_documents,
    prepare,
)

from .distributed import run_on_main_process
from .options.arguments import DataArguments, TextDataArguments


BAD_SAMPLES_FILE = "bad_samples.jsonl"


def load_conversations(
    args: DataArguments,
    processor: JnanaProcessor,
    output_dir: str,
    *,
    evaluation: bool = False,
    needs_images: bool = False,
    should_write: bool = True,
    seed: int = 0,
) -> Dataset | IterableDataset | None:
    """
    The training or validation rows of a run, read, checked and packed ([`jnana.processing.data.prepare`]).

    Args:
        args (`DataArguments`): the run's.
        processor (`JnanaProcessor`): measures the rows.
        output_dir (`str`): directory for the list of skipped rows.
        evaluation (`bool`, *optional*, defaults to `False`): the validation rows instead of the training rows.
        needs_images (`bool`, *optional*, defaults to `False`): as run_align, take no conversation without an image.
        should_write (`bool`, *optional*, defaults to `True`): whether this process shows progress.
        seed (`int`, *optional*, defaults to 0): decides which training conversations share a packed row.

    Returns:
        `Dataset`, `IterableDataset` or `None`: `None` if the run has no validation data.

    Raises:
        ValueError: if rows can't be trained on and `on_bad_sample` is `raise`; the message lists the first of them.
    """
    source = args.eval_data if evaluation else args.train_data
    if source is None:
        return None
    options = prepare_options(args, output_dir, evaluation, should_write, None if evaluation else seed, needs_images)
    return endless(prepare(source, processor, options, check_rows_once), evaluation)


def prepare_options(
    args: DataArguments,
    output_dir: str,
    evaluation: bool = False,
    progress: bool = True,
    seed: int | None = None,
    needs_images: bool = False,
) -> PrepareOptions:
    """The data arguments as options of [`jnana.processing.data.prepare`]."""
    return PrepareOptions(
        format=args.eval_format if evaluation else args.train_format,
        image_folder=(args.eval_image_folder or args.image_folder) if evaluation else args.image_folder,
        split=args.eval_split if evaluation else args.train_split,
        streaming=args.streaming and not evaluation,
        independent_turns=args.independent_turns,
        prompt=args.prompt,
        text_column=args.text_column,
        needs_images=needs_images,
        max_rows=args.max_eval_rows if evaluation else args.max_train_rows,
        answer_keywords=args.answer_keywords,
        max_length=args.max_length,
        max_image_pixels=MAX_IMAGE_PIXELS if args.max_image_pixels is None else args.max_image_pixels,
        image_check=args.image_check,
        on_bad_sample=args.on_bad_sample,
        bad_samples_file=str(Path(output_dir) / BAD_SAMPLES_FILE),
        progress=progress,
        packing=args.packing,
        max_row_tokens=args.max_row_tokens,
        seed=seed,
    )


def collator_options(args: DataArguments, output_dir: str, needs_images: bool = False) -> dict[str, Any]:
    """The options of `JnanaCollator` among the data arguments."""
    return prepare_options(args, output_dir, needs_images=needs_images).for_collator


def check_rows_once(rows: Dataset, processor: JnanaProcessor, **options: Any) -> CheckReport:
    """[`check_rows`] in the first process. The others wait, longer than the training's process group would, and get
    the same report or error."""
    return run_on_main_process(lambda: check_rows(rows, processor, **options))


def endless(rows: Dataset | IterableDataset, evaluation: bool) -> Dataset | IterableDataset:
    """A training stream that starts over when it ends, so that the Trainer sees one epoch.

    The Trainer does not know the length of a stream. Resumed after the first end of the stream, it would skip too few
    batches.
    """
    return rows.repeat(None) if isinstance(rows, IterableDataset) and not evaluation else rows


def load_blocks(
    args: TextDataArguments, tokenizer: PreTrainedTokenizerBase, evaluation: bool = False
) -> Dataset | IterableDataset | None:
    """A text corpus in blocks or rows of `block_size` tokens, or `None` if the run has no validation data.

    Raises:
        ValueError: if the corpus is shorter than one block.
    """
    source = args.eval_data if evaluation else args.train_data
    if source is None:
        return None
    pack = pack_documents if args.packing == "rows" else pack_blocks
    return endless(pack(load_documents(args, evaluation), tokenizer, args.block_size), evaluation)


def load_documents(args: TextDataArguments, evaluation: bool = False) -> Dataset | IterableDataset:
    """The documents of the corpus, in a column `text`."""
    return load_text(
        args.eval_data if evaluation else args.train_data,
        streaming=args.streaming and not evaluation,
        split=args.eval_split if evaluation else args.train_split,
        text_column=args.text_column,
        max_rows=None if evaluation else args.max_train_rows,
    )
