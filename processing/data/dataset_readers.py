"""Converts the records of a local or Hub data set to rows: chats with images, LLaVA records, images with texts.

Embedded images are not copied or decoded here: the rows use the Arrow buffers of the data set.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Image, List

from .records import RECORD_FILES, column_names, read_records
from .rows import IMAGE_PART, ROW_FEATURES, RecordRows, caption_conversation, make_row, message
from .shards import IMAGE_ENDINGS, SHARDS, TAR_FEATURES, load_source
from .transcripts import StoredTranscripts
from .turns import chat_row
from .values import (
    UnusableValue,
    encodable,
    image_references,
    is_missing,
    name_of,
    plain_columns,
    plain_features,
    problem_row,
    record_name,
    shown,
    text_of,
)


logger = logging.getLogger(__name__)


CAPTION_COLUMNS = ("text", "caption", "captions", "answer", "answers", "txt")
IMAGE_COLUMNS = ("images", "image", "image_path", "file_name", *IMAGE_ENDINGS)
INFERRED_SAMPLES = 100  # of a tar file, from which the columns are taken
QUESTION_COLUMNS = ("question", "query")
CHAT_COLUMNS = ("conversations", "messages")


def read_dataset(
    source: str | datasets.Dataset | datasets.IterableDataset,
    *,
    split: str = "train",
    streaming: bool = False,
    image_folder: str | Path | None = None,
    prompt: str | None = None,
    independent_turns: bool = True,
    captions: bool = False,
    max_rows: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    question_column: str | None = None,
    category_column: str | None = None,
    **load_options: Any,
) -> RecordRows | datasets.Dataset | datasets.IterableDataset:
    """
    Rows of a data set. Called by [`load_rows`], which documents the arguments.

    Columns are found by name: `messages` (chats), `conversations` (LLaVA records), or a text (`text`, `caption`,
    `captions`, `answer`, `answers`) with an optional `question`; each with an optional `images` or `image` column of
    images or paths. WebDataset's tar files hold `0001.jpg` with `0001.txt` (a caption) or `0001.json` (an object with
    the columns above).

    Raises:
        FileNotFoundError: if a local file does not exist.
        ValueError: if the columns hold neither chats nor texts; the message lists them.
    """
    name = source if isinstance(source, str) else "dataset"
    suffix = Path(name).suffix.lower()
    options = ReadOptions(
        image_folder, prompt, independent_turns, captions, image_column, text_column, question_column, category_column
    )
    if isinstance(source, str) and suffix in (*RECORD_FILES, *SHARDS):
        if load_options:
            raise ValueError(f"{', '.join(load_options)}: not an option of a local file ({name}).")
        options.image_folder = Path(source).parent if image_folder is None else image_folder
    if isinstance(source, str) and suffix in RECORD_FILES:
        records = read_records(Path(source), keep_others=True)[:max_rows]
        if not records:
            raise ValueError(f"source={source!r} holds no records.")
        return rows_of_records(records, name, options)
    data = load_source(source, split, streaming, **load_options) if isinstance(source, str) else source
    streamed = isinstance(data, datasets.IterableDataset)
    if max_rows is not None:
        data = data.take(max_rows) if streamed else data.select(range(min(max_rows, len(data))))
    if streamed and data.features is None:
        data = data._resolve_features()
    if data.features == TAR_FEATURES:
        convert = _tar_converter(name, data, options, streamed)
    else:
        columns, fields = list(data.features), data.features.get("json")
        if "__key__" in columns and isinstance(fields, dict):  # the fields of a tar file's JSON object are the columns
            columns = [column for column in columns if column != "json"] + list(fields)
        features = {**data.features, **(fields if isinstance(fields, dict) else {})}
        convert = RecordConverter(name, columns, options, streamed)
        convert.read_as_texts(dict.fromkeys(plain_features(features, convert.text_columns)))
    data = _undecoded(data, convert.image_columns)
    if streamed:
        return data.map(convert, with_indices=True, remove_columns=list(data.features), features=ROW_FEATURES)
    rows = _map_style_rows(data, convert)
    convert.report()
    return rows


@dataclass
class ReadOptions:
    """The arguments of [`read_dataset`] that concern one record."""

    image_folder: str | Path | None = None
    prompt: str | None = None
    independent_turns: bool = True
    captions: bool = False
    image_column: str | None = None
    text_column: str | None = None
    question_column: str | None = None
    category_column: str | None = None


def rows_of_records(
    records: list[Any], name: str, options: ReadOptions, source_of: Callable[[dict, int], str] | None = None
) -> RecordRows:
    """
    Rows of the records of a file.

    Args:
        records (`list`): of the file. What is no object becomes a row that `check_row` raises for.
        name (`str`): the file, for errors.
        options (`ReadOptions`): how records are read.
        source_of (`Callable`, *optional*): names a record, from the record and its index.
    """
    objects = [record for record in records if isinstance(record, dict)]
    convert = RecordConverter(name, column_names(objects), options, source_of=source_of)
    convert.read_as_texts(plain_columns(objects, convert.text_columns))

    def converted() -> Iterator[dict]:
        yield from (convert(record, index) for index, record in enumerate(records))
        convert.report()

    return RecordRows(len(records), converted())


def _tar_converter(name: str, data: Any, options: ReadOptions, streamed: bool) -> "RecordConverter":
    """The converter of a local tar file's samples; the columns are those of the first ones."""
    records = []
    for sample in data.take(INFERRED_SAMPLES):
        with contextlib.suppress(UnusableValue):
            records.append(_flat_record(sample))
    convert = RecordConverter(name, column_names(records), options, streamed, _tar_source)
    convert.image_columns = ["images"]
    convert.read_as_texts(plain_columns(records, convert.text_columns))
    return convert


def _tar_source(sample: dict, index: int) -> str:
    """Names a sample by its archive and its key."""
    return f"{sample['__url__']}, sample {sample['__key__']}"


def _undecoded(data: Any, image_columns: list[str]) -> Any:
    """Images stay paths and bytes."""
    for column in image_columns:
        feature = data.features.get(column)
        if isinstance(feature, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return data


class RecordConverter:
    """
    Converts a record to a row. A class, so that it can be pickled and sent to workers.

    Args:
        name (`str`): the file or data set, for errors.
        columns (`list[str]`): of the records.
        options (`ReadOptions`): how records are read.
        streamed (`bool`, *optional*, defaults to `False`): whether the number of records is unknown.
        source_of (`Callable`, *optional*): names a record, from the record and its index.

    Raises:
        ValueError: if a column that is asked for is missing, or none holds conversations or texts.
    """

    def __init__(
        self,
        name: str,
        columns: list[str],
        options: ReadOptions,
        streamed: bool = False,
        source_of: Callable[[dict, int], str] | None = None,
    ):
        self.name, self.options, self.streamed, self.source_of = name, options, streamed, source_of
        for column in (options.image_column, options.text_column, options.question_column, options.category_column):
            if column is not None and column not in columns:
                raise ValueError(f"{name}: no column {column!r}; it has {columns}.")
        present = [column for column in IMAGE_COLUMNS if column in columns]
        self.image_columns = [options.image_column] if options.image_column else present
        self.text_column = options.text_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
        self.chat_columns = [column for column in CHAT_COLUMNS if column in columns]
        if not self.chat_columns and self.text_column is None:
            raise ValueError(
                f"{name}: columns {columns} hold neither 'messages', 'conversations' nor a text column "
                f"({', '.join(CAPTION_COLUMNS)}). Name the column of the texts: --text_column NAME."
            )
        question = next((column for column in QUESTION_COLUMNS if column in columns), None)
        self.question_column = options.question_column or question
        self.category_column = options.category_column or ("category" if "category" in columns else None)
        self.text_columns = [column for column in (self.text_column, self.question_column) if column]
        self.plain: set[str] = set()
        self.num_opening = 0  # answers in front of the first question of their record, which are left out
        self.transcripts = StoredTranscripts(name)

    def read_as_texts(self, columns: dict[str, Any]) -> None:
        """Read the numbers or booleans of these columns, given with an example of each, as texts; say so once."""
        self.plain = set(columns)
        for column, value in columns.items():
            example = "" if value is None else f", {value!r} as {text_of(value, column, plain=True)!r}"
            logger.warning(
                f"{self.name}: column {column!r} holds numbers or booleans; they are read as texts{example}"
            )

    def report(self) -> None:
        """Say how many answers were left out, after the last record."""
        if self.num_opening:
            logger.warning(
                f"{self.name}: {self.num_opening:,} answers in front of the first question of a record are left out"
            )

    def __call__(self, record: Any, index: int, images: list[dict] | None = None) -> dict:
        """
        The row of a record.

        Args:
            record (`dict`): the record.
            index (`int`): its number.
            images (`list[dict]`, *optional*): its images, where they are not read from the record.
        """
        fields = record if isinstance(record, dict) else {}
        if self.source_of is not None:
            source = self.source_of(fields, index)
        else:
            nested = fields["json"] if "__key__" in fields and isinstance(fields.get("json"), dict) else {}
            source = record_name(self.name, index, nested.get("id", fields.get("id", fields.get("__key__"))))
        try:
            if not isinstance(record, dict):
                raise UnusableValue(f"the record is {shown(record)}, not an object.", "Write it with named fields.")
            record = _flat_record(record, images)
            return self._row(record, self._images(record) if images is None else images, source)
        except UnusableValue as problem:
            return problem_row(source, problem)

    def _images(self, record: dict) -> list[dict]:
        """The images of a record: of the first image column that holds some."""
        for column in self.image_columns:
            images = image_references(record.get(column), self.options.image_folder, column)
            if images:
                return images
        return []

    def _row(self, record: dict, images: list[dict], source: str) -> dict:
        chat = next((column for column in self.chat_columns if record.get(column) is not None), None)
        category = record.get(self.category_column) if self.category_column else None
        if chat is not None:
            row, num_opening = chat_row(
                record,
                chat,
                images,
                source,
                folder=self.options.image_folder,
                independent_turns=self.options.independent_turns and chat == "conversations",
                captions=self.options.captions,
                category=category,
                transcripts=self.transcripts,
            )
            before = len(str(self.num_opening)) if self.num_opening else 0
            self.num_opening += num_opening
            if self.streamed and num_opening and len(str(self.num_opening)) > before:  # at 1, 10, 100, ...
                logger.warning(
                    f"{source}: an answer in front of the first question is left out; so far {self.num_opening:,} of "
                    "this stream's"
                )
            return row
        if self.chat_columns and (self.text_column is None or record.get(self.text_column) is None):
            return make_row(images, [], source)
        return self._text_row(record, images, source, name_of(category, "category"))

    def _text_row(self, record: dict, images: list[dict], source: str, category: str | None) -> dict:
        """The row of a record with captions, or with a question and its accepted answers."""
        question = None
        if self.question_column is not None:
            value = record.get(self.question_column)
            question = text_of(value, self.question_column, self.question_column in self.plain)
        question = question or self.options.prompt
        text_column = str(self.text_column)
        texts = _texts(record.get(text_column), text_column, text_column in self.plain)
        has_question = self.question_column is not None
        if has_question and len(texts) > 1:  # several accepted answers: the most frequent one is trained
            chat = _with_image_parts(caption_conversation(max(texts, key=texts.count), question), images)
            return make_row(images, [chat], source, categories=[category], answers=[texts])
        chats = [caption_conversation(text, question) for text in texts]
        if has_question:
            chats = [_with_image_parts(chat, images) for chat in chats]
        return make_row(images, chats, source, categories=[category] * len(chats))


def _map_style_rows(data: Any, convert: RecordConverter) -> datasets.Dataset:
    """Rows of a map-style data set. An image column of Arrow structs or bytes is used without copying it."""
    data = data.with_format(None)
    held = [column for column in convert.image_columns if column in data.features and _holds_values(data, column)]
    arrow_images = None
    if held and (len(held) == 1 or held[0] not in IMAGE_ENDINGS):
        column = data.select_columns(held[:1]).with_format("arrow")[:].column(held[0])
        value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
        if pa.types.is_struct(value_type) or _is_binary(column.type):
            arrow_images = pa.chunked_array(
                [_as_lists(chunk) for chunk in column.chunks], ROW_FEATURES.arrow_schema.field("images").type
            )
            data = data.remove_columns(held[:1])
    tables = []
    lengths = (
        iter(()) if arrow_images is None else (n for c in arrow_images.chunks for n in c.value_lengths().to_pylist())
    )
    for start in range(0, len(data), 1000):
        block = []
        for index in range(start, min(start + 1000, len(data))):
            # the images themselves are added from Arrow below; here only their number matters
            images = None if arrow_images is None else [{"path": None, "bytes": None}] * (next(lengths) or 0)
            row = convert(data[index], index, images)
            block.append(row if arrow_images is None else {**row, "images": []})
        tables.append(pa.Table.from_pylist(block, schema=ROW_FEATURES.arrow_schema))
    table = pa.concat_tables(tables) if tables else ROW_FEATURES.arrow_schema.empty_table()
    if arrow_images is not None:
        table = table.set_column(0, ROW_FEATURES.arrow_schema.field("images"), arrow_images)
    return datasets.Dataset(table)


def _holds_values(data: Any, column: str) -> bool:
    values = data.select_columns([column]).with_format("arrow")[:].column(column)
    return values.null_count < len(values)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _flat_record(record: dict, images: list[dict] | None = None) -> dict:
    """
    A sample of a tar file with its texts, and the fields of its `.json`, as columns; other records unchanged.

    Args:
        record (`dict`): the record.
        images (`list[dict]`, *optional*): its images, where it has no column of them.

    Raises:
        UnusableValue: if its `.json` is no JSON object, or names an image where the archive has none.
    """
    if "__key__" in record and isinstance(record.get("json"), dict):  # read by `datasets`, from the Hub
        return {**record, **record["json"]}
    if not {"__url__", "texts"} <= set(record):
        return record
    texts = json.loads(record["texts"])
    fields = {}
    if "json" in texts:
        try:
            fields = json.loads(texts.pop("json"))
        except (ValueError, RecursionError) as error:
            raise UnusableValue(f"its .json file is not valid JSON: {error}.", "Write one object.") from error
        if not isinstance(fields, dict):
            raise UnusableValue(f"its .json file holds {shown(fields)}, not an object.", "Write one object.")
    named = next((name for name in IMAGE_COLUMNS if not is_missing(fields.get(name))), None)
    if named is not None and not record.get("images", images):
        raise UnusableValue(
            f"its .json file has {named} {shown(fields[named])}, but the archive holds no image of this sample.",
            f"Add the image as a file of the same name, such as {record['__key__']}.jpg.",
        )
    return {**fields, **texts, **record}


def _as_lists(chunk: pa.Array) -> pa.Array:
    """An Arrow column of images, or of lists of images, as a column of lists of images. No pixel is copied."""
    target = ROW_FEATURES.arrow_schema.field("images").type
    if pa.types.is_list(chunk.type):
        return chunk.cast(target)
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    offsets = pa.array([0, *valid.cumsum().tolist()], pa.int32())
    values = chunk.drop_null() if chunk.null_count else chunk
    if _is_binary(values.type):
        parts = [values.cast(pa.binary()), pa.nulls(len(values), pa.string())]
        values = pa.StructArray.from_arrays(parts, ["bytes", "path"])
    return pa.ListArray.from_arrays(offsets, values.cast(target.value_type))


def _texts(value: Any, name: str, plain: bool) -> list[str]:
    """One text, a list of texts, or VQA's list of `{"answer": ...}`, as a list of texts."""
    values = value if isinstance(value, list) else [value]
    values = [item.get("answer") if isinstance(item, dict) else item for item in values]
    return [encodable(text_of(item, name, plain)) for item in values]


def _with_image_parts(chat: list[dict], images: list[dict]) -> list[dict]:
    """A conversation with as many image parts as the record has images (none for a text-only question)."""
    user, answer = chat
    texts = [part for part in user["content"] if part["type"] == "text"]
    return [message("user", *[IMAGE_PART] * len(images), *texts), answer]
