"""Text corpora for stage 0: reading, training a tokenizer, packing into blocks or rows."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, default_data_collator

from jnana.modeling.packed_layout_jnana import PackedLayout

from .packing import IGNORED, WINDOW, fill_rows, longest_first
from .paths import names_local_path
from .records import read_json_lines
from .shards import TAR_FEATURES, check_whole, load_source, read_parquet
from .values import encodable, shown


END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TEXT_FILES = (".txt", ".jsonl", ".parquet")
TEXT_FEATURES = Features({"text": Value("string")})


def load_text(
    source: str | Path,
    *,
    streaming: bool = False,
    split: str = "train",
    text_column: str = "text",
    max_rows: int | None = None,
    **load_options: Any,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Read a text corpus, one document per row.

    Args:
        source (`str` or `Path`): a `.txt` file (documents are separated by blank lines), a `.jsonl` or `.parquet`
            file, a directory written by `save_to_disk`, a directory of shards, or a Hub id.
        streaming (`bool`, *optional*, defaults to `False`): read while training; a Hub corpus is then not downloaded
            as a whole.
        split (`str`, *optional*, defaults to `"train"`): the split of a Hub corpus.
        text_column (`str`, *optional*, defaults to `"text"`): the column or key that holds the text; of WebDataset's
            archives the ending of the files (`txt`), or a field of their JSON.
        max_rows (`int`, *optional*): read the first documents only.
        load_options: passed to `datasets.load_dataset`.

    Returns:
        `Dataset` or `IterableDataset` with the one column `text`.

    Raises:
        FileNotFoundError, ValueError: if the source is missing, lacks the column, or does not parse (file, line,
        column).
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in TEXT_FILES:
        if not path.is_file():
            raise FileNotFoundError(f"source={str(source)!r} does not exist.")
        if streaming:
            corpus = datasets.IterableDataset.from_generator(
                _documents, gen_kwargs={"path": str(path), "text_column": text_column}, features=TEXT_FEATURES
            )
        elif suffix == ".parquet":
            corpus = _text_only(datasets.Dataset(read_parquet(path)), text_column, str(path))
        else:
            texts = list(_texts(path, text_column))
            corpus = datasets.Dataset(pa.table({"text": pa.array(texts, pa.string())}))
    elif not path.exists() and names_local_path(str(source)):
        raise FileNotFoundError(f"source={str(source)!r} does not exist.")
    elif path.is_file():
        raise ValueError(f"source={str(source)!r}: text files read are {', '.join(TEXT_FILES)}.")
    else:
        corpus = _text_only(load_source(str(source), split, streaming, **load_options), text_column, str(source))
    if max_rows is None:
        return corpus
    if isinstance(corpus, datasets.IterableDataset):
        return corpus.take(max_rows)
    return corpus.select(range(min(max_rows, len(corpus))))


def _text_only(corpus: Any, text_column: str, name: str) -> Any:
    """The one column of texts; each is checked, those of a stream when it is read."""
    if corpus.features == TAR_FEATURES:
        options = {"fn_kwargs": {"text_column": text_column}, "remove_columns": list(TAR_FEATURES)}
        return corpus.map(_document_of, features=TEXT_FEATURES, **options)
    columns = corpus.column_names or list(next(iter(corpus)))
    if text_column not in columns:
        raise ValueError(f"{name}: no column {text_column!r}; it has {columns}. Set text_column.")
    corpus = corpus.select_columns([text_column]).with_format(None)
    corpus = corpus if text_column == "text" else corpus.rename_column(text_column, "text")
    if isinstance(corpus, datasets.IterableDataset):
        return corpus.map(_checked, with_indices=True, fn_kwargs={"name": name}, features=TEXT_FEATURES)
    column = corpus.with_format("arrow")[:].column("text")
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        for index, text in enumerate(row["text"] for row in corpus):
            _text(text, name, index)
    return corpus


def _checked(document: dict, index: int, name: str) -> dict:
    return {"text": _text(document["text"], name, index)}


def _text(value: Any, name: str, index: int) -> str:
    """A document.

    Raises:
        ValueError: if it is no text, naming the corpus and the record.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"{name}, record {index}: {shown(value)} is not a text. Remove the record, or set text_column to a column "
            "that holds texts only."
        )
    return encodable(value)


def _document_of(sample: dict, text_column: str) -> dict:
    """The text of a sample of an archive: its file with the ending `text_column`, or that field of its `.json` file.

    Raises:
        ValueError: if it has none, naming the archive and the sample.
    """
    texts = json.loads(sample["texts"])
    name = f"{sample['__url__']}, sample {sample['__key__']}"
    if text_column in texts:
        return {"text": encodable(texts[text_column])}
    try:
        fields = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: its .json file is not valid JSON: {error}. Remove the sample.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get(text_column), str):
        raise ValueError(
            f"{name}: no text {text_column!r}. Remove the sample, or set text_column to the ending of texts (txt), "
            "or to a field of the JSON files that holds texts only."
        )
    return {"text": encodable(fields[text_column])}


def _documents(path: str, text_column: str) -> Iterator[dict]:
    for text in _texts(Path(path), text_column):
        yield {"text": text}


def _texts(path: Path, text_column: str) -> Iterator[str]:
    """The documents of a local file, which is not read as a whole."""
    if path.suffix.lower() == ".parquet":
        check_whole(str(path), "parquet")
        parquet = pa.parquet.ParquetFile(path)
        if text_column not in parquet.schema_arrow.names:
            raise ValueError(
                f"{path}: no column {text_column!r}; it has {parquet.schema_arrow.names}. Set text_column."
            )
        batches = parquet.iter_batches(columns=[text_column])
        for index, value in enumerate(value for batch in batches for value in batch.column(0).to_pylist()):
            yield _text(value, str(path), index)
    elif path.suffix.lower() == ".jsonl":
        for index, record in enumerate(read_json_lines(path)):
            if not isinstance(record, dict) or text_column not in record:
                raise ValueError(f"{path}, record {index}: no text under {text_column!r}. Set text_column.")
            yield _text(record[text_column], str(path), index)
    else:
        try:
            with open(path, encoding="utf-8-sig") as file:
                yield from _paragraphs(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Documents separated by blank lines."""
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).rstrip("\n")
            document = []
    if document:
        yield "".join(document).rstrip("\n")


def pack_blocks(
    corpus: datasets.Dataset | datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Pack documents into blocks of one length, without padding.

    Each document is closed by the closing token. All documents are concatenated and cut every `block_size` tokens. An
    incomplete block at the end is dropped. Special tokens spelt in the text are tokenised as plain text.

    Args:
        corpus (`Dataset` or `IterableDataset`): with the column `text`.
        tokenizer (`PreTrainedTokenizerBase`): its `eos_token` closes documents.
        block_size (`int`): tokens in each block.

    Returns:
        `Dataset` (in memory; for a corpus larger than memory, stream) or `IterableDataset`: columns `input_ids` and
        `labels`, lists of `block_size` ids. The first label of a block is -100, because no token predicts it.

    Raises:
        ValueError: if `block_size` is below 2, the tokenizer has no closing token, or the corpus is shorter than a
            block.
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token to close documents with.")
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    if isinstance(corpus, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(
            _stream_blocks,
            gen_kwargs={"corpus": corpus, "tokenizer": tokenizer, "block_size": block_size},
            features=features,
        )
    blocks = [np.array(block, dtype=np.int32) for block in _token_blocks(corpus, tokenizer, block_size)]
    if not blocks:
        raise ValueError(f"The corpus is shorter than one block of block_size={block_size} tokens.")
    input_ids = np.stack(blocks)  # => [blocks, block_size]
    labels = input_ids.copy()
    labels[:, 0] = -100
    offsets = pa.array(np.arange(len(blocks) + 1, dtype=np.int32) * block_size)
    columns = [pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1))) for values in (input_ids, labels)]
    return datasets.Dataset(pa.Table.from_arrays(columns, schema=features.arrow_schema))


def _stream_blocks(corpus: Any, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[dict]:
    for block in _token_blocks(corpus, tokenizer, block_size):
        yield {"input_ids": block, "labels": [-100, *block[1:]]}


def _token_blocks(corpus: Any, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[list[int]]:
    remaining: list[int] = []
    for batch in corpus.iter(batch_size=200):
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        for ids in encoded["input_ids"]:
            remaining += ids
            remaining.append(tokenizer.eos_token_id)
        whole = len(remaining) // block_size * block_size
        for start in range(0, whole, block_size):
            yield remaining[start : start + block_size]
        remaining = remaining[whole:]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer like those of GPT-2 and Phi.

    The same texts give the same ids under any `PYTHONHASHSEED`, because the texts and the initial alphabet reach the
    trainer in a fixed order. (`train_new_from_iterator` of transformers needs an existing tokenizer to start from, and
    passes the alphabet unsorted.)

    Args:
        texts (`Iterable[str]`): the corpus, in a fixed order; not a `set`.
        vocab_size (`int`): number of entries, at least 258 (256 bytes and two special tokens).

    Returns:
        `PreTrainedTokenizerFast`: `<|endoftext|>` (id 0) begins and ends texts, `<|pad|>` (id 1) pads.

    Raises:
        ValueError: if `vocab_size` is below 258.
        TypeError: if `texts` is a set.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} must be at least 258: 256 bytes and two special tokens.")
    if isinstance(texts, (set, frozenset)):
        raise TypeError("texts is a set: its order, and so the ids, depend on PYTHONHASHSEED. Give a sorted list.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PAD,
    )


TEXT_ROW_FEATURES = Features({name: List(Value("int32")) for name in ("input_ids", "position_ids", "labels")})


def pack_documents(
    corpus: datasets.Dataset | datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, row_tokens: int
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Pack documents into rows of one length.

    Each document is closed by the closing token; a document longer than a row is cut. About two thousand documents are
    packed together, out of order, so that little room is left. The rest of a row is padded. Special tokens spelt in
    the text are tokenised as plain text.

    Args:
        corpus (`Dataset` or `IterableDataset`): with the column `text`.
        tokenizer (`PreTrainedTokenizerBase`): its `eos_token` closes documents.
        row_tokens (`int`): tokens in each row.

    Returns:
        `Dataset` (in memory; for a corpus larger than memory, stream) or `IterableDataset`: columns `input_ids`,
        `position_ids` and `labels`, lists of `row_tokens` ids. The first label of a document is -100, because no token
        predicts it.

    Raises:
        ValueError: if `row_tokens` is below 2, the tokenizer has no closing token, or the corpus is empty.
    """
    if row_tokens < 2:
        raise ValueError(f"row_tokens={row_tokens} must be at least 2.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token to close documents with.")
    given = {"corpus": corpus, "tokenizer": tokenizer, "row_tokens": row_tokens}
    if isinstance(corpus, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(_text_rows, gen_kwargs=given, features=TEXT_ROW_FEATURES)
    rows = list(_text_rows(corpus, tokenizer, row_tokens))
    if not rows:
        raise ValueError("The corpus holds no text.")
    return datasets.Dataset.from_list(rows, features=TEXT_ROW_FEATURES)


def collate_documents(rows: list[dict]) -> dict[str, Any]:
    """
    Rows of [`pack_documents`] as a batch for a language model with the attention `jnana_packed`.

    Returns:
        `dict[str, Any]`: `input_ids`, `position_ids` and `labels` of shape `(num_rows, row_tokens)`, `packed_layout`,
        and an `attention_mask` of one element, by which transformers makes no other.
    """
    batch = default_data_collator(rows)
    starts = batch["position_ids"] == 0
    # A document has two tokens at least, so a first token that no second one follows is padding.
    padding = starts & torch.nn.functional.pad(starts[:, 1:], (0, 1), value=True)
    segment_ids = starts.cumsum(1).masked_fill(padding, -1)
    layout = PackedLayout.from_ids(segment_ids, torch.zeros_like(segment_ids), batch["position_ids"])
    return {**batch, "attention_mask": torch.zeros(1, 1, 1, 1), "packed_layout": layout}


def _text_rows(corpus: Any, tokenizer: PreTrainedTokenizerBase, row_tokens: int) -> Iterator[dict]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for batch in corpus.iter(batch_size=WINDOW):
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        documents = [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
        pieces = [ids[i : i + row_tokens] for ids in documents for i in range(0, len(ids), row_tokens)]
        pieces = [piece for piece in pieces if len(piece) > 1]  # a single token has no label
        sizes = [len(piece) for piece in pieces]
        order = longest_first(sizes, range(len(pieces)))
        for members, size in fill_rows(sizes, order, row_tokens):
            padding = row_tokens - size
            chosen = [pieces[index] for index in members]
            yield {
                "input_ids": [token for piece in chosen for token in piece] + [pad] * padding,
                "position_ids": [position for piece in chosen for position in range(len(piece))] + [0] * padding,
                "labels": [label for piece in chosen for label in (IGNORED, *piece[1:])] + [IGNORED] * padding,
            }
