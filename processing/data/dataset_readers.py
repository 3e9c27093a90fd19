"""Converts the records of a local or Hub data set to rows: chats with images, LLaVA records, images with texts.

Embedded images are not copied or decoded here: the rows use the Arrow buffers of the data set.
"""

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Image, List

from jnana.processing.chat_encoding_jnana import transcribe_chat
from jnana.processing.speech.recordings import TranscriptionError

from .paths import names_local_path
from .records import RECORD_FILES, column_names, read_records
from .rows import IMAGE_PART, ROW_FEATURES, caption_conversation, make_row, message, rows_to_dataset, text_part
from .transcripts import StoredTranscripts, with_recordings


CAPTION_COLUMNS = ("text", "caption", "captions", "answer", "answers", "txt")
# The last four are WebDataset's names: it names a column after the ending of the files.
IMAGE_COLUMNS = ("images", "image", "image_path", "file_name", "jpg", "jpeg", "png", "webp")
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
QUESTION_COLUMNS = ("question", "query")

LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
PLACEHOLDER_LINE = re.compile(r"(^|\n)\s*<image>\s*(\n|$)")


def read_dataset(
    source: str | datasets.Dataset | datasets.IterableDataset,
    *,
    split: str = "train",
    streaming: bool = False,
    image_folder: str | Path | None = None,
    prompt: str | None = None,
    independent_turns: bool = True,
    max_rows: int | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    question_column: str | None = None,
    category_column: str | None = None,
    **load_options: Any,
) -> datasets.Dataset | datasets.IterableDataset:
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
    records, data = None, source
    if isinstance(source, str) and suffix in (*RECORD_FILES, *SHARDS):
        if load_options:
            raise ValueError(f"{', '.join(load_options)}: not an option of a local file ({name}).")
        image_folder = Path(source).parent if image_folder is None else image_folder
    if isinstance(source, str) and suffix in RECORD_FILES:
        records = read_records(Path(source))[:max_rows]
        if not records:
            raise ValueError(f"source={source!r} holds no records.")
        columns = column_names(records)
    else:
        data = _load(source, split, streaming, **load_options) if isinstance(source, str) else source
        if max_rows is not None:
            streamed = isinstance(data, datasets.IterableDataset)
            data = data.take(max_rows) if streamed else data.select(range(min(max_rows, len(data))))
        if isinstance(data, datasets.IterableDataset) and data.features is None:
            data = data._resolve_features()
        columns = list(data.features)
        if "__key__" in columns and "json" in columns:  # the fields of a tar file's JSON object are the columns
            columns = [column for column in columns if column != "json"] + list(data.features["json"])
    image_column = image_column or next((column for column in IMAGE_COLUMNS if column in columns), None)
    text_column = text_column or next((column for column in CAPTION_COLUMNS if column in columns), None)
    for column in (image_column, text_column, question_column, category_column):
        if column is not None and column not in columns:
            raise ValueError(f"{name}: no column {column!r}; it has {columns}.")
    if not {"messages", "conversations", text_column} & set(columns):
        raise ValueError(
            f"{name}: columns {columns} hold neither 'messages', 'conversations' nor a text column "
            f"({', '.join(CAPTION_COLUMNS)}). Set text_column."
        )
    question_column = question_column or next((column for column in QUESTION_COLUMNS if column in columns), None)
    category_column = category_column or ("category" if "category" in columns else None)
    convert = _TextConverter(name, columns, text_column, question_column, category_column, prompt, independent_turns)
    whole_row = _RowConverter(convert, image_column, image_folder)
    if records is not None:
        rows = rows_to_dataset(whole_row(record, index) for index, record in enumerate(records))
        return rows.to_iterable_dataset(num_shards=min(len(rows), 64)) if streaming else rows
    data = _undecoded(data, image_column)
    if isinstance(data, datasets.IterableDataset):
        return data.map(whole_row, with_indices=True, remove_columns=list(data.features), features=ROW_FEATURES)
    return _map_style_rows(data, image_column, image_folder, convert)


def _load(source: str, split: str, streaming: bool, **load_options: Any) -> Any:
    path = Path(source)
    if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(source)
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
        return data.to_iterable_dataset() if streaming else data
    shards = SHARDS.get(path.suffix.lower())
    if any(mark in source for mark in "*?[") and shards is not None and not path.exists():
        if not glob.glob(source):
            raise FileNotFoundError(f"source={source!r} names no file.")
    elif not path.exists() and names_local_path(source):
        raise FileNotFoundError(f"source={source!r} does not exist.")
    elif path.is_file() and shards == "parquet" and not streaming:
        return datasets.Dataset(pa.parquet.read_table(path, memory_map=True))  # `load_dataset` would write a cache
    elif path.is_file() and shards is None:
        raise ValueError(f"{source}: files read are {', '.join((*RECORD_FILES, *SHARDS))}.")
    if shards is not None:
        # a path that exists is that file, whatever characters it has
        files = glob.escape(source) if path.exists() else source
        return datasets.load_dataset(shards, data_files=files, split="train", streaming=streaming)
    return datasets.load_dataset(source, split=split, streaming=streaming, **load_options)


def _undecoded(data: Any, image_column: str | None) -> Any:
    """Images stay paths and bytes."""
    if image_column is None:
        return data
    feature = data.features[image_column]
    if isinstance(feature, Image):
        return data.cast_column(image_column, Image(decode=False))
    if isinstance(feature, List) and isinstance(feature.feature, Image):
        return data.cast_column(image_column, List(Image(decode=False)))
    return data


class _TextConverter:
    """Converts a record to a row, given its images. A class, so that it can be pickled and sent to workers."""

    def __init__(self, name, columns, text_column, question_column, category_column, prompt, independent_turns):
        self.name, self.columns, self.prompt, self.independent_turns = name, columns, prompt, independent_turns
        self.text_column, self.question_column, self.category_column = text_column, question_column, category_column
        self.transcripts = StoredTranscripts(name)

    def __call__(self, record: dict, images: list[dict], index: int) -> dict:
        source = f"{self.name}, record {index}"
        name = record.get("id", record.get("__key__"))
        if name is not None:
            source += f" (id {name})"
        if "conversations" in self.columns:
            return llava_row(record, images, source, self.independent_turns)
        category = record.get(self.category_column) if self.category_column else None
        category = None if category is None else str(category)
        if "messages" in self.columns:
            messages = with_recordings(record.get("messages") or [], record)
            chat = _chat_messages(messages, len(images), self.transcripts)
            return make_row(images, [chat] if chat else [], source, categories=[category] if chat else None)
        question = (record.get(self.question_column) if self.question_column else None) or self.prompt
        texts = _texts(record.get(self.text_column))
        has_question = self.question_column is not None
        if has_question and len(texts) > 1:  # several accepted answers: the most frequent one is trained
            chat = _with_image_parts(caption_conversation(max(texts, key=texts.count), question), images)
            return make_row(images, [chat], source, categories=[category], answers=[texts])
        chats = [
            _with_image_parts(caption_conversation(text, question), images)
            if has_question
            else caption_conversation(text, question)
            for text in texts
        ]
        return make_row(images, chats, source, categories=[category] * len(chats))


class _RowConverter:
    """Converts a record with its image column to a row."""

    def __init__(self, convert: _TextConverter, image_column: str | None, image_folder: str | Path | None):
        self.convert, self.image_column, self.image_folder = convert, image_column, image_folder

    def __call__(self, record: dict, index: int) -> dict:
        record = _flat_record(record)
        value = record.pop(self.image_column, None) if self.image_column else None
        values = value if isinstance(value, list) else [value]
        images = [_reference(item, self.image_folder) for item in values if item]
        return self.convert(record, images, index)


def _reference(item: str | dict, image_folder: str | Path | None) -> dict:
    if isinstance(item, dict):
        return {"path": item.get("path"), "bytes": item.get("bytes")}
    if image_folder is None or "://" in item:
        return {"path": item, "bytes": None}
    return {"path": str(Path(image_folder) / item), "bytes": None}


def _map_style_rows(
    data: Any, image_column: str | None, image_folder: Any, convert: _TextConverter
) -> datasets.Dataset:
    """Rows of a map-style data set. An image column of Arrow structs is used without copying it."""
    data = data.with_format(None)
    arrow_images = None
    if image_column is not None:
        column = data.select_columns([image_column]).with_format("arrow")[:].column(image_column)
        value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
        if pa.types.is_struct(value_type):
            arrow_images = pa.chunked_array(
                [_as_lists(chunk) for chunk in column.chunks], ROW_FEATURES.arrow_schema.field("images").type
            )
            data = data.remove_columns([image_column])
    tables = []
    lengths = (
        iter(()) if arrow_images is None else (n for c in arrow_images.chunks for n in c.value_lengths().to_pylist())
    )
    for start in range(0, len(data), 1000):
        block = list(
            _converted(data, start, min(start + 1000, len(data)), image_column, image_folder, convert, lengths)
        )
        tables.append(pa.Table.from_pylist(block, schema=ROW_FEATURES.arrow_schema))
    table = pa.concat_tables(tables) if tables else ROW_FEATURES.arrow_schema.empty_table()
    if arrow_images is not None:
        table = table.set_column(0, ROW_FEATURES.arrow_schema.field("images"), arrow_images)
    return datasets.Dataset(table)


def _converted(data, start, stop, image_column, image_folder, convert, lengths) -> Iterator[dict]:
    for index in range(start, stop):
        record = _flat_record(data[index])
        if image_column in record:
            values = record.pop(image_column)
            values = values if isinstance(values, list) else [values]
            images = [_reference(item, image_folder) for item in values if item]
            yield convert(record, images, index)
        else:  # `_map_style_rows` adds the images from Arrow; here only their number matters
            placeholders = [{"path": None, "bytes": None}] * next(lengths, 0)
            yield {**convert(record, placeholders, index), "images": []}


def _flat_record(record: dict) -> dict:
    """A record of a tar file with the fields of its `.json` as columns; other records unchanged."""
    if "__key__" in record and isinstance(record.get("json"), dict):
        return {**record, **record["json"]}
    return record


def _as_lists(chunk: pa.Array) -> pa.Array:
    """An Arrow column of images, or of lists of images, as a column of lists of images. No pixel is copied."""
    target = ROW_FEATURES.arrow_schema.field("images").type
    if pa.types.is_list(chunk.type):
        return chunk.cast(target)
    valid = chunk.is_valid().to_numpy(zero_copy_only=False)
    offsets = pa.array([0, *valid.cumsum().tolist()], pa.int32())
    values = chunk.drop_null() if chunk.null_count else chunk
    return pa.ListArray.from_arrays(offsets, values.cast(target.value_type))


def _chat_messages(messages: list[dict], num_images: int, transcripts: StoredTranscripts) -> list[dict]:
    """Chat messages with `content` as text or parts. If no part is an image, the placeholders in user texts are the
    positions of the images (LLaMA-Factory, ms-swift); without placeholders all images go before the first user text.

    Recordings are replaced by their transcripts. A recording without a transcript stays an audio part whose text is
    the error, which `check_row` raises.
    """
    chat = []
    for item in messages:
        content = item.get("content")
        if not isinstance(content, list):
            parts = [text_part("" if content is None else str(content))]
        else:
            parts = [_part(part) for part in content]
            try:
                [spoken] = transcribe_chat([message(str(item.get("role")), *parts)], transcripts)
                parts = spoken["content"]
            except (TranscriptionError, ValueError) as error:
                parts = [{"type": "audio", "text": str(error)} if p["type"] == "audio" else p for p in parts]
        chat.append(message(str(item.get("role")), *parts))
    if not any(part["type"] == "image" for m in chat for part in m["content"]):
        _place_images(chat, num_images)
    return chat


def _place_images(chat: list[dict], num_images: int) -> None:
    """
    Turn the placeholders in the texts of users into image parts; without any, put the images before the first user
    text. `check_row` raises where there are not as many placeholders as images. In a record without images a
    placeholder on a line of its own is a missing image, which `check_row` raises for too; elsewhere it is text.
    """
    users = [m for m in chat if m["role"] == "user"]
    for m in users:
        parts: list[dict] = []
        for part in m["content"]:
            text = part["text"] if part["type"] == "text" else ""
            if num_images == 0 and PLACEHOLDER_LINE.search(text):
                parts += [IMAGE_PART, text_part(PLACEHOLDER_LINE.sub(r"\1", text))]
            elif num_images > 0 and PLACEHOLDER in text:
                first, *pieces = (piece.strip() for piece in text.split(PLACEHOLDER))
                parts += [text_part(first)] if first else []
                for piece in pieces:
                    parts += [IMAGE_PART, text_part(piece)] if piece else [IMAGE_PART]
            else:
                parts.append(part)
        m["content"] = parts
    if num_images and users and not any(part["type"] == "image" for m in users for part in m["content"]):
        users[0]["content"] = [IMAGE_PART] * num_images + users[0]["content"]


def _part(part: dict) -> dict:
    """One content part: an image, a recording's path, or text."""
    if part.get("type") == "audio":
        return {"type": "audio", "path": part["path"]}
    return IMAGE_PART if part.get("type") in ("image", "image_url") else text_part(part.get("text") or "")


def _texts(value: Any) -> list[str]:
    """One text, a list of texts, or VQA's list of `{"answer": ...}`, as a list of texts."""
    values = value if isinstance(value, list) else [value]
    values = [item.get("answer") if isinstance(item, dict) else item for item in values]
    return ["" if item is None else str(item) for item in values]


def _with_image_parts(chat: list[dict], images: list[dict]) -> list[dict]:
    """A conversation with as many image parts as the record has images (none for a text-only question)."""
    user, answer = chat
    texts = [part for part in user["content"] if part["type"] == "text"]
    return [message("user", *[IMAGE_PART] * len(images), *texts), answer]


# ---------------------------------------------------------------------- LLaVA-Instruct


def llava_row(record: dict, images: list[dict], source: str, independent_turns: bool) -> dict:
    """
    The row of one LLaVA-Instruct record.

    Besides `conversations`, a record or one of its assistant turns may hold `category` (a question type, or one for
    each answer) and `answers` (the accepted answers of its one question, or a list of such lists, one for each
    answer).

    Args:
        record (`dict`): the record.
        images (`list[dict]`): references to its images.
        source (`str`): file and record.
        independent_turns (`bool`): each question with its answer becomes a conversation of its own.

    Returns:
        `dict`: with the columns of `ROW_FEATURES`.
    """
    turns = _llava_turns(record)
    messages = _llava_messages(turns, len(images))
    answering = [turn for turn in turns if _role(turn) == "assistant"]
    categories = _one_each(record.get("category"), len(answering))
    references = record.get("answers") or []
    if references and not isinstance(references[0], list):
        references = [references]
    answers = [
        turn.get("answers") or (references[i] if i < len(references) else []) for i, turn in enumerate(answering)
    ]
    categories = [turn.get("category") or categories[i] for i, turn in enumerate(answering)]
    answers = [[str(answer) for answer in accepted] for accepted in answers]

    if independent_turns:
        chats = _split_turns(messages)
    else:
        chats = [messages] if messages else []
        answers, categories = answers[-1:], categories[-1:]  # those of the last answer
    missing = max(len(chats) - len(answers), 0)
    answers, categories = answers[: len(chats)] + [[]] * missing, categories[: len(chats)] + [None] * missing
    return make_row(images, chats, source, categories=categories, answers=answers)


def _llava_messages(turns: list[dict], num_images: int) -> list[dict]:
    """LLaVA's turns as messages, with image parts at the placeholders of users' texts ([`_place_images`])."""
    messages = []
    for turn in turns:
        text = turn.get("value")
        messages.append(message(_role(turn), text_part("" if text is None else str(text))))
    _place_images(messages, num_images)
    return messages


def _role(turn: dict) -> str:
    return LLAVA_ROLES.get(str(turn.get("from")), str(turn.get("from")))


def _llava_turns(record: dict) -> list[dict]:
    """The turns of a LLaVA record, its `system` text first; `role` and `content` are read as `from` and `value`."""
    turns = [turn for turn in record.get("conversations") or [] if isinstance(turn, dict)]
    turns = [
        {**turn, "from": turn.get("role"), "value": turn.get("content")}
        if "from" not in turn and isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and not any(_role(turn) == "system" for turn in turns):
        turns.insert(0, {"from": "system", "value": system})
    return turns


def _split_turns(messages: list[dict]) -> list[list[dict]]:
    """Each question with its answer as a conversation, preceded by the system message and all images."""
    image_parts = [part for m in messages for part in m["content"] if part["type"] == "image"]
    system = [m for m in messages if m["role"] == "system"]
    chats: list[list[dict]] = []
    question: list[dict] = []
    for current in (m for m in messages if m["role"] != "system"):
        question.append(current)
        if current["role"] == "assistant":
            chats.append(question)
            question = []
    if question:
        chats.append(question)  # a question without an answer, which `check_row` reports
    for chat in chats:
        users = [m for m in chat if m["role"] == "user"]
        held = sum(part["type"] == "image" for m in users for part in m["content"])
        if users and held != len(image_parts):
            for m in users:
                m["content"] = [part for part in m["content"] if part["type"] != "image"]
            users[0]["content"] = image_parts + users[0]["content"]
    return [system + chat for chat in chats]


def _one_each(value: Any, count: int) -> list:
    """A list of `count` values, from one value for all or from a list."""
    if isinstance(value, list):
        return [value[i] if i < len(value) else None for i in range(count)]
    return [value] * count
