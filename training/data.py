"""Converts the data arguments of a training script to data sets for the Trainer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset, load_from_disk
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    MAX_IMAGE_PIXELS,
    PrepareOptions,
    load_text,
    pack_blocks,
    pack_documents,
    prepare,
)
from jnana.processing.data.prepared_rows import StreamReaders

from .distributed import once_per_machine, run_once_per_machine, several_processes
from .options.arguments import DataArguments, TextDataArguments, TextModelArguments
from .options.sources import is_list, mixture_names, sources_of
from .text_models import prepare_tokenizer


BAD_SAMPLES_FILE = "bad_samples.jsonl"
SPLITS = ("train", "eval")


def load_training_data(
    data_args: DataArguments,
    training_args: TrainingArguments,
    processor: JnanaProcessor,
    needs_images: bool = False,
) -> tuple[Any, Any]:
    """
    The training and the validation rows of a run.

    Args:
        data_args (`DataArguments`): the run's.
        training_args (`TrainingArguments`): its directory, seed, epochs and dataloader workers.
        processor, needs_images: as in [`load_conversations`].

    Returns:
        `tuple`: twice what [`load_conversations`] returns.
    """
    where = {"output_dir": training_args.output_dir, "should_write": training_args.should_save}
    options = {**where, "needs_images": needs_images, "num_workers": training_args.dataloader_num_workers}
    epochs = None if training_args.max_steps > 0 else training_args.num_train_epochs
    train_rows = load_conversations(data_args, processor, seed=training_args.seed, epochs=epochs, **options)
    return train_rows, load_conversations(data_args, processor, evaluation=True, **options)


def load_conversations(
    args: DataArguments,
    processor: JnanaProcessor,
    output_dir: str,
    *,
    evaluation: bool = False,
    needs_images: bool = False,
    should_write: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    epochs: float | None = None,
) -> Any:
    """
    The training or validation rows of a run, read, checked, tokenised and packed ([`jnana.processing.data.prepare`]).

    The first process of each machine prepares them. The others wait, longer than the training's process group would,
    and map the same file.

    Args:
        args (`DataArguments`): the run's.
        processor (`JnanaProcessor`): measures the rows.
        output_dir (`str`): directory for the list of skipped rows.
        evaluation (`bool`, *optional*, defaults to `False`): the validation rows instead of the training rows.
        needs_images (`bool`, *optional*, defaults to `False`): as run_align, take no conversation without an image.
        should_write (`bool`, *optional*, defaults to `True`): whether this process shows progress.
        seed (`int`, *optional*, defaults to 0): decides which training conversations share a packed row.
        num_workers (`int`, *optional*, defaults to 0): dataloader workers of each process, which read a stream.
        epochs (`float`, *optional*): of the run, as in [`PrepareOptions`].

    Returns:
        `Dataset`, `IterableDataset` or `None`: a training stream starts over when it ends. `None` if the run has no
            validation data. Where `eval_data` is a list, a `dict` of one data set for each source, by its name, as the
            Trainer takes it.

    Raises:
        ValueError: if rows can't be trained on and `on_bad_sample` is `raise`; the message lists the first of them.
    """
    sources = sources_of(args, evaluation)
    if not sources:
        return None
    options = prepare_options(args, output_dir, evaluation, should_write, None if evaluation else seed, needs_images)
    state = PartialState()
    readers = StreamReaders(state.process_index, state.num_processes, num_workers)
    options = replace(options, endless=not evaluation, readers=readers, epochs=epochs)
    once = run_once_per_machine if several_processes() else None
    if evaluation and is_list(args.eval_data):
        return {each.name: prepare([each], processor, options, once) for each in sources}
    return prepare(sources, processor, options, once)


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
        max_length_source=args.max_length_source,
        max_image_pixels=MAX_IMAGE_PIXELS if args.max_image_pixels is None else args.max_image_pixels,
        image_check=args.image_check,
        on_bad_sample=args.on_bad_sample,
        bad_samples_file=str(Path(output_dir) / BAD_SAMPLES_FILE),
        progress=progress,
        packing=args.packing,
        max_row_tokens=args.max_row_tokens,
        seed=seed,
        data_cache=args.data_cache,
        num_proc=args.dataset_num_proc,
        jpeg_draft=args.jpeg_draft,
        mix=args.mix,
        shuffle_buffer=0 if evaluation else args.shuffle_buffer,
    )


def collator_options(args: DataArguments, output_dir: str, needs_images: bool = False) -> dict[str, Any]:
    """The options of `JnanaCollator` among the data arguments; the model normalises images on its device."""
    options = prepare_options(args, output_dir, needs_images=needs_images).for_collator
    return options | {"normalize_on_device": True, "sources": mixture_names(args)}


def endless(rows: Dataset | IterableDataset, evaluation: bool) -> Dataset | IterableDataset:
    """A text corpus's training stream that starts over when it ends, so that the Trainer sees one epoch.

    The Trainer does not know the length of a stream. Resumed after the first end of the stream, it would skip too few
    batches.
    """
    return rows.repeat(None) if isinstance(rows, IterableDataset) and not evaluation else rows


def prepare_text_data(
    model_args: TextModelArguments, args: TextDataArguments, checkpoint: str | None = None
) -> tuple[PreTrainedTokenizerBase, Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """The tokenizer, loaded or trained on the corpus, and the training and validation blocks of stage 0.

    The first process of each machine trains the tokenizer and packs the blocks; the others map the same files into
    memory, and wait as long as that takes. A stream is packed by each process while it trains.

    Args:
        model_args (`TextModelArguments`): which tokenizer.
        args (`TextDataArguments`): the corpus.
        checkpoint (`str`, *optional*): the checkpoint to resume from; its model must have this tokenizer.

    Raises:
        ValueError: if a model is continued with another tokenizer, or the corpus can't be read or is too short.
    """

    def make():
        tokenizer = prepare_tokenizer(model_args, load_documents(args), checkpoint)
        return tokenizer, load_blocks(args, tokenizer), load_blocks(args, tokenizer, evaluation=True)

    def save(made, folder: Path) -> None:
        tokenizer, *blocks = made
        tokenizer.save_pretrained(folder / "tokenizer")
        for name, data in zip(SPLITS, blocks, strict=True):
            if isinstance(data, Dataset):
                data.save_to_disk(folder / name)

    def load(folder: Path):
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        blocks = [
            load_from_disk(folder / name)
            if (folder / name).is_dir()
            else load_blocks(args, tokenizer, evaluation=name == "eval")
            for name in SPLITS
        ]
        return tokenizer, *blocks

    return once_per_machine(make, save, load)


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
