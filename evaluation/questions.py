"""A test set as a list of questions, each with its images and its accepted answers.

Rows come from `jnana.load_rows`. Images stay references (a path, or the bytes of a file) until a dataloader worker
decodes them, so a test set takes memory for its text only.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from jnana.processing.data import BadSampleError, check_image, load_image, message_text, with_images
from jnana.processing.data.checks import check_readable, check_turns
from jnana.processing.data.rows import bad_sample

from .measures import GENERAL, Scoring


GREY = (128, 128, 128)
MAX_LISTED = 10  # rows in an error message


@dataclass
class Question:
    """One question of a test set.

    Attributes:
        source (`str`): File and record it comes from, for messages.
        row (`int`): Index of the row that holds its images.
        messages (`list[dict]`): The conversation up to the answer; earlier turns with their true answers.
        references (`list[str]`): Accepted answers, as `vqa_accuracy` and `exact_match` take them.
        category (`str`, *optional*): Question type.
        key (`str`): Hash of the question's source, text, references and images; the same after a restart.
        image_key (`str`): Equal for questions about the same images in the same order; empty without images.
        details (`dict`): What a benchmark's scores and server need besides: `question_id` ...
    """

    source: str
    row: int
    messages: list[dict[str, Any]]
    references: list[str]
    category: str | None
    key: str = ""
    image_key: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def shows_images(self) -> bool:
        """Whether a message has an image part."""
        return any(part["type"] == "image" for message in self.messages for part in message["content"])

    @property
    def text(self) -> str:
        """The text of the last message."""
        return message_text(self.messages[-1])

    @property
    def history(self) -> str:
        """Earlier turns, one on each line; empty for the first question of a conversation."""
        return "\n".join(f"{message['role']}: {message_text(message)}" for message in self.messages[:-1])


class QuestionSet:
    """All questions of a data set. Images are decoded on request.

    Each assistant turn is the answer to one question, which is asked after the turns before it as the data has them.
    Conversations of one row with identical messages (five captions of one image) become one question with all their
    answers as references.

    Args:
        rows (`datasets.Dataset`, `datasets.IterableDataset` or `list[dict]`):
            Rows as `jnana.load_rows` gives them. A stream is read to its end and kept in memory, image bytes
            included.

    Attributes:
        questions (`list[Question]`): In the order of the rows.
        scoring (`Scoring`): What the answers are scored by.
        scored (`bool`): Whether there are references to score them with.

    Raises:
        ValueError: if the rows hold no question, or a row can't be scored: a value is no text, a question is missing,
            or a reference answer is missing or empty.
    """

    scoring: Scoring = GENERAL
    scored = True

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self.rows = rows if hasattr(rows, "__len__") else list(rows)
        self.questions: list[Question] = []
        _check_rows(self.rows)
        states = []
        for index, row in enumerate(self.rows):
            self.questions += _questions_of_row(row, index)
            states.append(image_state(row["images"]))
        if not self.questions:
            raise ValueError(
                "the evaluation data holds no question: no row has an assistant message to compare answers with"
            )
        self._set_keys(states)

    def _set_keys(self, states: list[str]) -> None:
        """Give each question its keys, from [`image_state`] of each row.

        A data set may hold a record twice; both are asked, so the second one gets a key of its own.
        """
        seen: dict[str, int] = {}
        for question in self.questions:
            key = question_key(question, states[question.row])
            seen[key] = seen.get(key, 0) + 1
            question.key = key if seen[key] == 1 else f"{key}-{seen[key]}"
            question.image_key = states[question.row] if question.shows_images else ""

    def __len__(self) -> int:
        return len(self.questions)

    def images(self, question: Question, blind: bool = False, **limits) -> list[Image.Image]:
        """Decode the images of a question.

        Args:
            question (`Question`): A question of this set.
            blind (`bool`): Return a grey image of the same size for each image.
            limits: Passed to `jnana.processing.data.load_image`.

        Returns:
            `list[PIL.Image.Image]`: Mode RGB, in the order of the image parts.

        Raises:
            BadSampleError: if an image is missing, broken or too large.
        """
        images = [load_image(image, source=question.source, **limits) for image in self._references(question)]
        return [Image.new("RGB", image.size, GREY) for image in images] if blind else images

    def image_sizes(self, question: Question) -> list[tuple[int, int]]:
        """(height, width) in pixels of the images of a question, from their headers; without those that can't be read.

        Args:
            question (`Question`): A question of this set.
        """
        sizes = []
        for image in self._references(question):
            with suppress(BadSampleError):  # `images` raises it
                sizes.append(check_image(image, source=question.source))
        return sizes

    def _references(self, question: Question) -> list[dict[str, Any]]:
        """The images that a question shows: all of its row, or none."""
        return self.rows[question.row]["images"] if question.shows_images else []

    def messages_with_images(self, question: Question, images: list[Image.Image]) -> list[dict[str, Any]]:
        """The question's messages with its images in the image parts, as `apply_chat_template` takes them.

        Raises:
            BadSampleError: if the number of images differs from the number of image parts.
        """
        count = sum(part["type"] == "image" for message in question.messages for part in message["content"])
        if count != len(images):
            raise BadSampleError(
                f"{question.source}: the conversation has {count} image parts, the row has {len(images)} images"
            )
        return with_images(question.messages, images)


def _check_rows(rows: Iterable[dict[str, Any]]) -> None:
    """Raise for rows that can't be scored. Their images are not opened; a question whose image can't be read fails."""
    problems = []
    for row in rows:
        try:
            for chat in row["conversations"]:
                check_readable(chat, row["source"])
                check_turns(chat, row["source"])
            if any(not answer.strip() for accepted in row["answers"] for answer in accepted):
                raise bad_sample(row["source"], "an empty accepted answer.", "Write it or remove it.")
        except BadSampleError as error:
            problems.append(str(error))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:MAX_LISTED])
        more = f"\n  ... and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(f"{len(problems)} rows of the evaluation data can't be scored:\n{listed}{more}")


def _questions_of_row(row: dict[str, Any], index: int) -> list[Question]:
    """The questions of one row; questions with identical messages are merged."""
    merged: dict[str, Question] = {}
    for conversation, answers, category in zip(row["conversations"], row["answers"], row["categories"], strict=True):
        turns = [position for position, message in enumerate(conversation) if message["role"] == "assistant"]
        for position in turns:
            if position == 0:
                continue  # an answer without a question
            # `answers` and `category` of a conversation belong to its last question
            closing = position == turns[-1]
            accepted = answers if answers and closing else [message_text(conversation[position])]
            messages = conversation[:position]
            asked = json.dumps(messages, sort_keys=True)
            if asked in merged:
                merged[asked].references += accepted
            else:
                merged[asked] = Question(row["source"], index, messages, list(accepted), category if closing else None)
    return list(merged.values())


def question_key(question: Question, images: str) -> str:
    """A hash of all that makes a question.

    Args:
        question (`Question`): Without its key.
        images (`str`): Return value of [`image_state`] for its images.
    """
    asked = json.dumps(question.messages, sort_keys=True)
    content = json.dumps([question.source, asked, question.references, images])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def image_state(references: list[dict[str, Any]]) -> str:
    """A text that changes with any of these images.

    Args:
        references (`list[dict]`): As a row's `images`.
    """
    return json.dumps([_image_state(reference) for reference in references])


def _image_state(reference: dict[str, Any]) -> list[Any]:
    """Values that change with an image: a hash of its bytes, or path, size and modification time of its file."""
    if reference["bytes"] is not None:
        return [hashlib.sha256(reference["bytes"]).hexdigest()]
    try:
        status = os.stat(reference["path"])
    except OSError:
        return [reference["path"]]
    return [reference["path"], status.st_size, status.st_mtime_ns]
