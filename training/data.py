"""From data arguments to what the Trainer trains on; reading, checking and packing are `processing`'s."""

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    CheckReport,
    answers_as_keywords,
    check_rows,
    flatten_conversations,
    load_rows,
    load_text,
    pack_blocks,
    pack_documents,
    packed_rows,
    packed_stream,
    plan_rows,
)

from .arguments import DataArguments, TextDataArguments


logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.jsonl"


def load_conversations(
    args: DataArguments,
    processor: JnanaProcessor,
    output_dir: str,
    *,
    evaluation: bool = False,
    should_write: bool = True,
    seed: int = 0,
) -> Dataset | IterableDataset | None:
    """Rows of one conversation, or with `packing` rows of several, read and checked.

    Args:
        args (`DataArguments`): Where from.
        processor (`JnanaProcessor`): Measures the rows.
        output_dir (`str`): Where the list of skipped rows goes.
        evaluation (`bool`, defaults to `False`): The validation rows instead of the training rows.
        should_write (`bool`, defaults to `True`): Whether this is the process that writes files and shows progress.
        seed (`int`, defaults to 0): Decides which training conversations share a packed row.

    Returns:
        `Dataset`, `IterableDataset` or `None`: `None` when no validation data was asked for.

    Raises:
        ValueError: if rows cannot be trained on and `on_bad_sample` is `raise`; the message lists the first of them.
    """
    source = args.eval_data if evaluation else args.train_data
    if source is None:
        return None
    rows = load_rows(
        source,
        format=args.eval_format if evaluation else args.train_format,
        image_folder=(args.eval_image_folder or args.image_folder) if evaluation else args.image_folder,
        split=args.eval_split if evaluation else args.train_split,
        streaming=args.streaming and not evaluation,
        independent_turns=args.independent_turns,
        prompt=args.prompt,
        max_rows=args.max_eval_rows if evaluation else args.max_train_rows,
    )
    if args.answer_keywords:
        rows = rows.map(answers_as_keywords)
    share = args.packing == "shared_image"
    if isinstance(rows, IterableDataset):
        if args.packing == "none":
            return endless(flatten_conversations(rows), evaluation)
        limits = {"max_row_tokens": args.max_row_tokens, "max_length": args.max_length}
        return endless(packed_stream(rows, processor, share=share, **limits), evaluation)
    options = collator_options(args, output_dir)
    del options["packing"]
    report = check_rows_once(rows, processor, image_check=args.image_check, progress=should_write, **options)
    logger.info(describe_check(source, report, args.max_length))
    if report.problems:
        rows = rows.select(report.kept_indices)
    if args.packing == "none":
        return flatten_conversations(rows)
    plan = plan_rows(
        report.lengths,
        report.shared if share else None,
        args.max_row_tokens,
        max_length=args.max_length,
        seed=None if evaluation else seed,
    )
    logger.info(f"{source}: {plan}")
    return packed_rows(rows, plan)


def check_rows_once(rows: Dataset, processor: JnanaProcessor, **options: Any) -> CheckReport:
    """[`check_rows`] by the first process, whose report, or error, all others take over."""
    outcome: list[CheckReport | ValueError | None] = [None]
    if PartialState().is_main_process:
        try:
            outcome[0] = check_rows(rows, processor, **options)
        except ValueError as error:
            outcome[0] = error
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    assert outcome[0] is not None
    return outcome[0]


def describe_check(source: str, report: CheckReport, max_length: int | None) -> str:
    lengths = sorted(length for row in report.lengths for length in row)
    text = f"{source}: {len(report.kept_indices):,} of {report.num_rows:,} rows, {len(lengths):,} conversations of "
    text += f"{lengths[0]} to {lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}"
    if report.num_truncated:
        text += f"; {report.num_truncated:,} are cut to max_length {max_length}"
    return text


def collator_options(args: DataArguments, output_dir: str) -> dict[str, Any]:
    """The options of `JnanaCollator` among the data arguments."""
    options = {"max_length": args.max_length, "on_bad_sample": args.on_bad_sample, "packing": args.packing}
    if args.max_image_pixels is not None:
        options["max_image_pixels"] = args.max_image_pixels
    return {**options, "bad_samples_file": str(Path(output_dir) / BAD_SAMPLES_FILE)}


def load_blocks(
    args: TextDataArguments, tokenizer: PreTrainedTokenizerBase, evaluation: bool = False
) -> Dataset | IterableDataset | None:
    """A text corpus in blocks or rows of `block_size` tokens; `None` when no validation data was asked for.

    Raises:
        ValueError: if the corpus is shorter than one block.
    """
    source = args.eval_data if evaluation else args.train_data
    if source is None:
        return None
    pack = pack_documents if args.packing == "rows" else pack_blocks
    return endless(pack(load_documents(args, evaluation), tokenizer, args.block_size), evaluation)


def endless(rows: Dataset | IterableDataset, evaluation: bool) -> Dataset | IterableDataset:
    """A training stream that starts over when it ends, so that the Trainer sees one epoch.

    The Trainer does not know how long a stream is: resumed after its first end, it would read past too few batches.
    """
    return rows.repeat(None) if isinstance(rows, IterableDataset) and not evaluation else rows


def load_documents(args: TextDataArguments, evaluation: bool = False) -> Dataset | IterableDataset:
    """The documents of the corpus, in a column `text`."""
    return load_text(
        args.eval_data if evaluation else args.train_data,
        streaming=args.streaming and not evaluation,
        split=args.eval_split if evaluation else args.train_split,
        text_column=args.text_column,
        max_rows=None if evaluation else args.max_train_rows,
    )
