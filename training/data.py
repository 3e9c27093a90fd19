"""From data arguments to what the Trainer trains on; reading, checking and packing are `processing`'s."""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from processing import JnanaProcessor, check_rows, flatten_conversations, load_rows, load_text, pack_blocks

from .arguments import DataArguments, TextDataArguments


logger = logging.getLogger(__name__)

BAD_SAMPLES_FILE = "bad_samples.txt"


def load_conversations(
    args: DataArguments, processor: JnanaProcessor, output_dir: str, evaluation: bool = False
) -> Dataset | IterableDataset | None:
    """One conversation a row, read and checked.

    Args:
        args (`DataArguments`): Where from.
        processor (`JnanaProcessor`): Measures the rows.
        output_dir (`str`): Where the list of skipped rows goes.
        evaluation (`bool`, defaults to `False`): The validation rows instead of the training rows.

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
    if isinstance(rows, Dataset):
        report = check_rows(
            rows, processor, max_length=args.max_length, image_check=args.image_check, on_bad_sample=args.on_bad_sample
        )
        del report
    return flatten_conversations(rows)


def collator_options(args: DataArguments, output_dir: str) -> dict[str, Any]:
    """The options of `JnanaCollator` among the data arguments."""
    options = {"max_length": args.max_length, "on_bad_sample": args.on_bad_sample}
    if args.max_image_pixels is not None:
        options["max_image_pixels"] = args.max_image_pixels
    return {**options, "bad_samples_file": str(Path(output_dir) / BAD_SAMPLES_FILE)}


def load_blocks(
    args: TextDataArguments, tokenizer: PreTrainedTokenizerBase, evaluation: bool = False
) -> Dataset | IterableDataset | None:
    """A text corpus in blocks of `block_size` tokens; `None` when no validation data was asked for.

    Raises:
        ValueError: if the corpus is shorter than one block.
    """
    source = args.eval_data if evaluation else args.train_data
    if source is None:
        return None
    blocks = pack_blocks(load_documents(args, evaluation), tokenizer, args.block_size)
    if isinstance(blocks, Dataset) and len(blocks) == 0:
        raise ValueError(f"{source!r} is shorter than one block of block_size {args.block_size}; take a smaller one")
    return blocks


def load_documents(args: TextDataArguments, evaluation: bool = False) -> Dataset | IterableDataset:
    """The documents of the corpus, in a column `text`."""
    documents = load_text(
        args.eval_data if evaluation else args.train_data,
        streaming=args.streaming and not evaluation,
        split=args.eval_split if evaluation else args.train_split,
        text_column=args.text_column,
    )
    if args.max_train_rows is not None and not evaluation:
        documents = documents.take(args.max_train_rows)
    return documents


def collate_blocks(blocks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Blocks as a batch: `input_ids`, `attention_mask` and `labels`, each `(batch_size, block_size)`.

    The first token of a block is unsupervised, as nothing stands before it to predict it from.
    """
    input_ids = torch.stack([torch.as_tensor(block["input_ids"]) for block in blocks])
    labels = input_ids.clone()
    labels[:, 0] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
