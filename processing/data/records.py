"""Reads a local `.json`, `.jsonl` or `.csv` file into plain records, with file, line and column in every error.

Plain records, not Arrow tables: those would take the columns of the first record for all of them, turn `007` into 7,
and refuse a chat whose messages hold strings and lists of parts.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from .rows import IMAGE_PART, make_row, message, text_part


RECORD_FILES = (".csv", ".json", ".jsonl")


def parse_json(path: Path) -> Any:
    """The content of a `.json` file, or the list of a `.jsonl` file's records.

    Raises:
        FileNotFoundError, ValueError: if it is missing, is not UTF-8, or does not parse (file, line, column).
    """
    text = _read_text(path)
    return parse_lines(text, path) if path.suffix.lower() == ".jsonl" else _parse(text, path, 1)


def parse_lines(text: str, path: Path) -> list:
    """The records of a `.jsonl` file whose text has been read; errors as [`parse_json`]."""
    return [_parse(line, path, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_records(path: Path) -> list[dict]:
    """The records of a file; those of a `.csv` have strings only.

    Raises:
        FileNotFoundError, ValueError: as [`parse_json`], and if the file is not a list of records.
    """
    records = _read_csv(path) if path.suffix.lower() == ".csv" else parse_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: a list of records is needed, not {type(records).__name__}.")
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {index}: an object with named fields is needed, not {record!r:.80}.")
    return records


def column_names(records: list[dict]) -> list[str]:
    """Every field that some record has, in the order of first appearance."""
    return list(dict.fromkeys(name for record in records for name in record))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from error


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}.") from error


def _read_csv(path: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    records = []
    try:
        for record in reader:
            if None in record:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than the header has columns. Put a text that holds "
                    "commas in quotes."
                )
            records.append(record)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}.") from error
    return records


LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
PLACEHOLDER_LINE = re.compile(r"(^|\n)\s*<image>\s*(\n|$)")


def llava_row(record: dict, images: list[dict], source: str, independent_turns: bool) -> dict:
    """
    The row of one LLaVA-Instruct record.

    Beside `conversations`, a record or one of its answering turns may hold `category` (a question type, or one an
    answer) and `answers` (the accepted answers of its one question, or a list of such lists, one an answer).
    """
    turns = [turn for turn in record.get("conversations") or [] if isinstance(turn, dict)]
    messages = _llava_messages(turns, len(images))
    answering = [turn for turn in turns if LLAVA_ROLES.get(str(turn.get("from"))) == "assistant"]
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
        answers, categories = answers[-1:], categories[-1:]  # of the answer that closes the conversation
    missing = max(len(chats) - len(answers), 0)
    answers, categories = answers[: len(chats)] + [[]] * missing, categories[: len(chats)] + [None] * missing
    return make_row(images, chats, source, categories=categories, answers=answers)


def _llava_messages(turns: list[dict], num_images: int) -> list[dict]:
    """LLaVA's turns as messages; placeholders in the user's text become image parts, one an image."""
    messages, left = [], num_images
    for turn in turns:
        role = LLAVA_ROLES.get(str(turn.get("from")), str(turn.get("from")))
        text = turn.get("value")
        text = "" if text is None else str(text)
        if role != "user":
            messages.append(message(role, text_part(text)))
            continue
        if num_images == 0:
            # The mark of an image on a line of its own, and no image: let the check find it. Elsewhere it is text
            parts = [IMAGE_PART] if PLACEHOLDER_LINE.search(text) else []
            text = PLACEHOLDER_LINE.sub(r"\1", text) if parts else text
            messages.append(message(role, *parts, text_part(text)))
            continue
        pieces = text.split(PLACEHOLDER, left)
        left -= len(pieces) - 1
        parts = [text_part(pieces[0].strip())]
        for piece in pieces[1:]:
            parts += [IMAGE_PART, text_part(piece.strip())]
        messages.append(message(role, *[part for part in parts if part["type"] == "image" or part["text"]]))
    first = next((m for m in messages if m["role"] == "user"), None)
    if left and num_images and first is not None:  # images that no placeholder stands for come first
        first["content"] = [IMAGE_PART] * left + first["content"]
    return messages


def _split_turns(messages: list[dict]) -> list[list[dict]]:
    """Each question with its answer as a conversation of its own, system message and every image in front of it."""
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
        chats.append(question)  # without an answer: the check names it
    for chat in chats:
        users = [m for m in chat if m["role"] == "user"]
        held = sum(part["type"] == "image" for m in users for part in m["content"])
        if users and held != len(image_parts):
            for m in users:
                m["content"] = [part for part in m["content"] if part["type"] != "image"]
            users[0]["content"] = image_parts + users[0]["content"]
    return [system + chat for chat in chats]


def _one_each(value: Any, count: int) -> list:
    """A list of `count` values from one value for all, or from a list."""
    if isinstance(value, list):
        return [value[i] if i < len(value) else None for i in range(count)]
    return [value] * count
