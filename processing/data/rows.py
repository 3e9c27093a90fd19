"""The shape of one row of data, and the functions that build, select and split rows.

Every source becomes rows of this shape: images (references, not pixels) and one or more conversations about them, each
a list of chat messages. Readers build the rows (`readers.py`), `check_rows` checks them, and the collator turns them
into tensors.
"""

import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Image, List, Value

from .records import read_json_lines


ROW_FEATURES = Features(
    {
        "images": List(Image(decode=False)),
        "conversations": List(
            List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
        ),
        "categories": List(Value("string")),
        "answers": List(List(Value("string"))),
        "source": Value("string"),
    }
)

# Columns that `prepare` adds: token ids of each conversation, with one image token for each image, and for each id 1
# inside an answer and 0 elsewhere. The collator then neither renders nor tokenises the row.
TOKEN_FEATURES = Features({"token_ids": List(List(Value("int32"))), "answer_mask": List(List(Value("int8")))})

# The column that a mixture of several sources adds: the name of the row's source (`mixture.py`).
ORIGIN = "origin"
OPTIONAL_COLUMNS = (*TOKEN_FEATURES, ORIGIN)

IMAGE_PART = {"type": "image", "text": None}


# ---------------------------------------------------------------------- rows that can't be used


class BadSampleError(ValueError):
    """
    A row of data that can't become a training or test sample.

    Args:
        message (`str`): the row (file and record), the problem, and the remedy.
    """


def bad_sample(source: str, problem: str, remedy: str = "") -> BadSampleError:
    """
    The error for one row.

    Args:
        source (`str`): file and record, as in the row's `source` column.
        problem (`str`): the problem, with the value that causes it.
        remedy (`str`, *optional*): how to solve it.
    """
    return BadSampleError(f"{source}: {problem}" + (f" {remedy}" if remedy else ""))


def append_bad_samples(path: str | Path, messages: list[str], kinds: Sequence[str] = ()) -> None:
    """
    Append skipped rows to a JSON Lines file.

    Several dataloader workers and processes may write to one file: each call is a single write in append mode, which
    the operating system does not interleave with others.

    Args:
        path (`str` or `Path`): the file; its directory is created when missing.
        messages (`list[str]`): one text for each row, as `str(BadSampleError)`.
        kinds (`Sequence[str]`, *optional*): the kind of each problem.
    """
    if not messages:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    records = [{"problem": message} for message in messages]
    for record, kind in zip(records, kinds, strict=False):
        record["kind"] = kind
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, lines.encode("utf-8"))
    finally:
        os.close(descriptor)


def read_bad_samples(path: str | Path) -> list[str]:
    """
    The rows listed in a file, in the order of their first appearance.

    Args:
        path (`str` or `Path`): a file written by `append_bad_samples`; need not exist.

    Returns:
        `list[str]`: the problems. A row that several epochs skipped is listed once.
    """
    return list(dict.fromkeys(record["problem"] for record in read_json_lines(path, torn="skip")))


# ---------------------------------------------------------------------- messages


def text_part(text: str) -> dict:
    """A content part that holds text. Unpaired surrogates, which JSON can hold and UTF-8 can't, become `?`."""
    return {"type": "text", "text": text.encode("utf-8", "replace").decode("utf-8")}


def message(role: str, *parts: dict) -> dict:
    """A chat message of content parts."""
    return {"role": role, "content": list(parts)}


def message_text(message: dict) -> str:
    """The text parts of a message, joined by a space."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text" and part["text"])


def with_images(chat: list[dict], images: list[Any]) -> list[dict]:
    """
    A chat with its images in its image parts, in reading order, as `JnanaProcessor.apply_chat_template` takes it.

    Args:
        chat (`list[dict]`): messages of a row.
        images (`list[PIL.Image.Image]`): as many as the chat has image parts, or more.

    Returns:
        `list[dict]`: a copy, without the empty fields that Arrow adds to each content part.
    """
    remaining = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": next(remaining)}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"] or ""}
                for part in message["content"]
            ],
        }
        for message in chat
    ]


def caption_conversation(caption: Any, question: str | None) -> list[dict]:
    """A one-turn conversation about one image; the question may be missing."""
    user = message("user", IMAGE_PART, text_part(question)) if question else message("user", IMAGE_PART)
    return [user, message("assistant", text_part("" if caption is None else str(caption)))]


# ---------------------------------------------------------------------- rows and data sets of them


def make_row(
    images: list[dict],
    conversations: list[list[dict]],
    source: str,
    *,
    categories: list[str | None] | None = None,
    answers: list[list[str]] | None = None,
) -> dict:
    """
    One row, with the columns of `ROW_FEATURES`.

    Args:
        images (`list[dict]`): references `{"path": str | None, "bytes": bytes | None}`, in the order of the image
            parts.
        conversations (`list[list[dict]]`): each with as many image parts as there are images, or none.
        source (`str`): file and record, named in every error about this row.
        categories (`list[str | None]`, *optional*): the question type of each conversation.
        answers (`list[list[str]]`, *optional*): all accepted answers of each conversation. An empty list means the
            assistant's text is the only one.
    """
    return {
        "images": images,
        "conversations": conversations,
        "categories": categories or [None] * len(conversations),
        "answers": answers or [[] for _ in conversations],
        "source": source,
    }


class RecordRows:
    """
    The rows of a file of records, made one by one.

    Args:
        number (`int`): of rows.
        rows (`Iterable[dict]`): as built by [`make_row`]; can be read once.
    """

    def __init__(self, number: int, rows: Iterable[dict]):
        self.number, self.rows = number, rows

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)


def rows_to_table(rows: list[dict]) -> pa.Table:
    """Rows as an Arrow table with the columns of `ROW_FEATURES`."""
    return pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema)


def rows_to_dataset(rows: Iterable[dict]) -> datasets.Dataset:
    """
    An in-memory `datasets.Dataset` of rows. It holds paths and text; no image is read and no cache file written.

    Args:
        rows (`Iterable[dict]`): as built by [`make_row`].
    """
    waiting = iter(rows)
    tables = []
    while block := list(itertools.islice(waiting, 10_000)):
        tables.append(rows_to_table(block))
    return datasets.Dataset(pa.concat_tables(tables or [rows_to_table([])]))


def iterate_rows(rows: Any, batch_size: int = 1000) -> Iterator[dict]:
    """Rows one by one; a map-style data set is read in blocks."""
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    for start in range(0, len(rows), batch_size):
        yield from rows_at(rows, range(start, min(start + batch_size, len(rows))))


def rows_at(rows: datasets.Dataset, indices: Any) -> list[dict]:
    """The rows at these indices, in this order."""
    return unbatched(rows[indices])


def unbatched(batch: dict[str, list]) -> list[dict]:
    """The rows of a batch of columns, as `datasets` gives it."""
    names = [*ROW_FEATURES, *(name for name in OPTIONAL_COLUMNS if name in batch)]
    return [{name: batch[name][i] for name in names} for i in range(len(batch["source"]))]


def batched(rows: Iterable[dict]) -> dict[str, list]:
    """A batch of columns from rows, the inverse of [`unbatched`]."""
    columns: dict[str, list] = {name: [] for name in ROW_FEATURES}
    for row in rows:
        for name in (*ROW_FEATURES, *(name for name in OPTIONAL_COLUMNS if name in row)):
            columns.setdefault(name, []).append(row[name])
    return columns


# ---------------------------------------------------------------------- selecting conversations


def single_conversation(row: dict, index: int) -> dict:
    """The row with conversation `index` only."""
    return select_conversations(row, [index])


def select_conversations(row: dict, indices: list[int]) -> dict:
    """The row with the conversations at `indices` only. If these are not all, the row's source names them."""
    names = ", ".join(map(str, indices))
    some = len(indices) < len(row["conversations"])
    columns = ("conversations", "categories", "answers", *(name for name in TOKEN_FEATURES if name in row))
    return {
        "images": row["images"],
        **{name: [row[name][index] for index in indices] for name in columns},
        **({ORIGIN: row[ORIGIN]} if ORIGIN in row else {}),
        "source": row["source"] + (f", conversation{'s' * (len(indices) > 1)} {names}" if some else ""),
    }


def conversation_rows(items: Any) -> Iterator[dict]:
    """Rows with their first conversation only, from rows or from the rows of a packed data set."""
    for item in items:
        for row in item.get("groups") or [item]:
            yield single_conversation(row, 0)


def flatten_conversations(rows: datasets.Dataset | datasets.IterableDataset) -> Any:
    """
    Split rows into rows of one conversation.

    A map-style data set is flattened by indices: nothing is copied, and a row is read from `rows` on access. The
    result is a `datasets.Dataset` that can be selected from and shuffled.

    Args:
        rows (`Dataset` or `IterableDataset`): rows with any number of conversations.

    Returns:
        `Dataset` or `IterableDataset`: the same kind; `conversations`, `categories` and `answers` have one entry in
            each row.
    """
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(_flatten_batch, batched=True, batch_size=16, features=stream_features(rows))
    counts = _conversations_per_row(rows)
    if (counts == 1).all():
        return rows
    row_index = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    indices = {"row": row_index, "conversation": np.arange(len(row_index)) - first}
    return datasets.Dataset.from_dict(indices).with_transform(ConversationOf(rows))


def conversation_index(lengths: Sequence[Sequence[int]]) -> datasets.Dataset:
    """
    The columns `row`, `conversation` and `length` of every conversation, for [`ConversationOf`]. The Trainer's
    `train_sampling_strategy` reads `length`.

    Args:
        lengths (`Sequence[Sequence[int]]`): tokens of each conversation of each row.
    """
    counts = np.fromiter(map(len, lengths), np.int64, len(lengths))
    rows = np.repeat(np.arange(len(counts)), counts)
    conversations = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.fromiter(itertools.chain.from_iterable(lengths), np.int64, len(rows))
    return datasets.Dataset.from_dict({"row": rows, "conversation": conversations, "length": tokens})


def stream_features(rows: datasets.IterableDataset) -> Features:
    """The columns of the rows of a stream: `ROW_FEATURES`, in a mixture with `origin`."""
    mixed = ORIGIN in (rows.features or ())
    return Features({**ROW_FEATURES, ORIGIN: Value("string")}) if mixed else ROW_FEATURES


class Origins:
    """
    The sources of the rows of a mixture, which lie one source after the other.

    Args:
        counts (`dict[str, int]`): the number of rows of each source, by its name, in the order of the rows.
    """

    def __init__(self, counts: dict[str, int]):
        self.names = list(counts)
        self.ends = list(itertools.accumulate(counts.values()))

    def __getitem__(self, row: int) -> str:
        """The name of the source of a row."""
        return self.names[bisect_right(self.ends, row)]


class RowView:
    """
    The transform of a data set of indices: reads the rows on access. A class, so that it can be pickled and sent to
    dataloader workers.

    Args:
        rows (`Dataset`): of `ROW_FEATURES`.
        origins (`Origins`, *optional*): their sources, for a column `origin`.
    """

    def __init__(self, rows: datasets.Dataset, origins: Origins | None = None):
        self.rows, self.origins = rows, origins

    def rows_by_index(self, indices: Iterable[int]) -> dict[int, dict]:
        """Each row that is needed, by its index in `rows`; read once."""
        needed = sorted(set(indices))
        found = dict(zip(needed, rows_at(self.rows, needed), strict=True))
        if self.origins is not None:
            for index, row in found.items():
                row[ORIGIN] = self.origins[index]
        return found


def viewed_rows(items: datasets.Dataset) -> datasets.Dataset:
    """
    The data rows that a data set of indices reads from.

    Args:
        items (`Dataset`): of [`flatten_conversations`] or [`packed_rows`], or data rows themselves.
    """
    transform = items.format["format_kwargs"].get("transform")
    return transform.rows if isinstance(transform, RowView) else items


class ConversationOf(RowView):
    """Reads rows by (row, conversation)."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "row" not in batch or "conversation" not in batch:  # another column was requested alone
            return batch
        rows = self.rows_by_index(batch["row"])
        others = {k: v for k, v in batch.items() if k not in ("row", "conversation")}
        pairs = zip(batch["row"], batch["conversation"], strict=True)
        return {**batched(single_conversation(rows[row], conversation) for row, conversation in pairs), **others}


def _conversations_per_row(rows: datasets.Dataset) -> np.ndarray:
    if rows.format["type"] == "custom":  # a transform builds the rows on access
        return np.array([len(row["conversations"]) for row in iterate_rows(rows)], dtype=np.int64)
    table = rows.select_columns(["conversations"]).with_format("arrow")[:]
    return pc.list_value_length(table.column("conversations")).to_numpy()


def _flatten_batch(batch: dict[str, list]) -> dict[str, list]:
    return batched(
        single_conversation(row, index) for row in unbatched(batch) for index in range(len(row["conversations"]))
    )
