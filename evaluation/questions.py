"""A test set as a list of questions: what is asked, about which pictures, and which answers are right.

Rows come from `jnana.load_rows`. Pictures stay references (a path, or the bytes of a file) until a dataloader
worker needs them, so a test set of any size costs only its text.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from jnana.processing.data import BadSampleError, load_image


GREY = (128, 128, 128)


@dataclass
class Question:
    """One question of a test set.

    Attributes:
        source (`str`): File and record it comes from, for messages.
        row (`int`): Index of its row in the data set, where its pictures are.
        messages (`list[dict]`): The conversation up to the answer; earlier turns with their true answers.
        references (`list[str]`): Right answers, as `vqa_accuracy` and `exact_match` read them.
        category (`str`, *optional*): Question type.
        key (`str`): Identifies question *and* content over restarts: changes with text, references or pictures.
    """

    source: str
    row: int
    messages: list[dict[str, Any]]
    references: list[str]
    category: str | None
    key: str = ""

    @property
    def text(self) -> str:
        """The question itself: the text of the last message."""
        return message_text(self.messages[-1])

    @property
    def history(self) -> str:
        """Earlier turns, one a line; empty for a conversation's first question."""
        return "\n".join(f"{message['role']}: {message_text(message)}" for message in self.messages[:-1])


def message_text(message: dict[str, Any]) -> str:
    """The text parts of a message, joined by a space."""
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text" and part["text"])


class QuestionSet:
    """All questions of a data set, with lazy access to their pictures.

    Every assistant turn is one question, asked with the turns before it as they stand in the data. Conversations of
    one row that ask the very same (five captions of a picture) are one question with all their answers as
    references.

    Args:
        rows (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            Rows as `jnana.load_rows` gives them. A stream is read to its end and kept, pictures' bytes included.

    Raises:
        ValueError: if there is no question in the rows.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self.rows = rows if hasattr(rows, "__len__") else list(rows)
        self.questions: list[Question] = []
        for index, row in enumerate(self.rows):
            self.questions += _questions_of_row(row, index)
        if not self.questions:
            raise ValueError("the evaluation data holds no question: no row has an assistant's answer to compare with")
        seen: dict[str, int] = {}
        for question in self.questions:  # a data set may hold the same record twice; each is asked
            seen[question.key] = seen.get(question.key, 0) + 1
            question.key += "" if seen[question.key] == 1 else f"-{seen[question.key]}"

    def __len__(self) -> int:
        return len(self.questions)

    def images(self, question: Question, blind: bool = False, **limits) -> list[Image.Image]:
        """Decode the pictures of a question, or make grey ones of the same sizes.

        Raises:
            processing.BadSampleError: if a picture is missing, broken or too large.
        """
        parts = [part["type"] for message in question.messages for part in message["content"]]
        references = self.rows[question.row]["images"] if "image" in parts else []
        images = [load_image(reference, source=question.source, **limits) for reference in references]
        return [Image.new("RGB", image.size, GREY) for image in images] if blind else images

    def messages_with_images(self, question: Question, images: list[Image.Image]) -> list[dict[str, Any]]:
        """The question's messages as `apply_chat_template` takes them, the pictures in their places.

        Raises:
            processing.BadSampleError: if there are not as many pictures as places.
        """
        count = sum(part["type"] == "image" for message in question.messages for part in message["content"])
        if count != len(images):
            raise BadSampleError(
                f"{question.source}: the conversation speaks of {count} images, the row has {len(images)}"
            )
        remaining = iter(images)
        messages = []
        for message in question.messages:
            parts: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "image":
                    parts.append({"type": "image", "image": next(remaining)})
                else:
                    parts.append({"type": "text", "text": part["text"] or ""})
            messages.append({"role": message["role"], "content": parts})
        return messages


def _questions_of_row(row: dict[str, Any], index: int) -> list[Question]:
    """The questions in one row, those that ask the same merged."""
    images = json.dumps([_image_state(reference) for reference in row["images"]])
    merged: dict[str, Question] = {}
    for conversation, answers, category in zip(row["conversations"], row["answers"], row["categories"], strict=True):
        turns = [position for position, message in enumerate(conversation) if message["role"] == "assistant"]
        for position in turns:
            if position == 0:
                continue  # an answer that nobody asked for
            closing = (
                position == turns[-1]
            )  # `answers` and `category` of a conversation are those of its last question
            accepted = answers if answers and closing else [message_text(conversation[position])]
            messages = conversation[:position]
            asked = json.dumps(messages, sort_keys=True)
            if asked in merged:
                merged[asked].references += accepted
            else:
                merged[asked] = Question(row["source"], index, messages, list(accepted), category if closing else None)
    for asked, question in merged.items():
        content = json.dumps([question.source, asked, question.references, images])
        question.key = hashlib.sha256(content.encode()).hexdigest()[:24]
    return list(merged.values())


def _image_state(reference: dict[str, Any]) -> list[Any]:
    """What changes when a picture does: a hash of its bytes, or path, size and modification time of its file."""
    if reference["bytes"] is not None:
        return [hashlib.sha256(reference["bytes"]).hexdigest()]
    try:
        status = os.stat(reference["path"])
    except OSError:
        return [reference["path"]]
    return [reference["path"], status.st_size, status.st_mtime_ns]
