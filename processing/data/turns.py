"""Turns of a conversation as chat messages with images at their positions: LLaVA's records and chat `messages`.

One reader for both shapes: a turn holds `from` and `value`, or `role` and `content`; a content is a text or a list of
parts; `<image>` marks in users' texts are the positions of the images.
"""

import re
from typing import Any

from jnana.processing.chat_encoding_jnana import transcribe_chat
from jnana.processing.speech.recordings import TranscriptionError

from .rows import IMAGE_PART, make_row, message, text_part
from .transcripts import StoredTranscripts, with_recordings
from .values import UnusableValue, encodable, image_reference, is_missing, name_of, shown, text_of


ROLES = {"human": "user", "gpt": "assistant"}
IMAGE_PARTS = ("image", "image_url")
# The fields in which a part of a chat names its own image, as Qwen-VL and OpenAI write it
IMAGE_FIELDS = ("image", "image_url", "path", "url")
PLACEHOLDER = "<image>"
TAGGED_IMAGE = re.compile(r"<img>(.*?)</img>")  # an image named in the text, as the first Qwen-VL writes it
PLACEHOLDER_LINE = re.compile(r"(^|\n)\s*<image>\s*(\n|$)")


def chat_row(
    record: dict,
    field: str,
    images: list[dict],
    source: str,
    *,
    folder: Any = None,
    independent_turns: bool = False,
    captions: bool = False,
    category: Any = None,
    transcripts: StoredTranscripts | None = None,
) -> tuple[dict, int]:
    """
    The row of a record with a conversation.

    Besides its turns, a record or one of its assistant turns may hold `category` (a question type, or one for each
    answer) and `answers` (the accepted answers of its one question, or a list of such lists, one for each answer); a
    record may hold a `system` text. An answer in front of the first question is left out.

    Args:
        record (`dict`): the record.
        field (`str`): the field that holds the turns: `conversations` (LLaVA) or `messages`.
        images (`list[dict]`): references to its images; without any, parts may name their own.
        source (`str`): file and record.
        folder (`str` or `Path`, *optional*): the directory that images named by parts are relative to.
        independent_turns (`bool`, *optional*, defaults to `False`): each question with its answer becomes a
            conversation of its own.
        captions (`bool`, *optional*, defaults to `False`): answers of a record without questions are captions of its
            images. Otherwise `check_row` raises for them.
        category (`Any`, *optional*): the record's question type, or one for each answer.
        transcripts (`StoredTranscripts`, *optional*): of the recordings in the turns.

    Returns:
        `tuple[dict, int]`: the row, with the columns of `ROW_FEATURES`, and the number of answers that were left out.

    Raises:
        UnusableValue: if a value of the record can't be read.
    """
    turns = _turns(record, field)
    messages = [_message(turn, f"{field} {number}", transcripts) for number, turn in enumerate(turns)]
    images = _with_tagged_images(messages, _with_own_images(turns, images, folder), folder)
    if not any(part["type"] == "image" for m in messages for part in m["content"]):
        _place_images(messages, len(images))
    details = _answer_details(record, turns, messages, category)
    opening = _opening_answers(messages)
    if opening:
        messages = [m for number, m in enumerate(messages) if number not in opening]
        details = details[len(opening) :]
    alone = bool(messages) and not any(m["role"] == "user" for m in messages)
    if alone and captions and images:
        chats = _captions(messages, len(images))
    elif independent_turns:
        chats = _split_turns(messages)
    else:
        chats, details = [messages] if messages else [], details[-1:]  # those of the last answer
    details = details[: len(chats)] + [(None, [])] * (len(chats) - len(details))
    categories, answers = [kind for kind, _ in details], [accepted for _, accepted in details]
    return make_row(images, chats, source, categories=categories, answers=answers), len(opening)


def _turns(record: dict, field: str) -> list[dict]:
    """The turns of a record as messages with `role` and `content`, its `system` text first."""
    turns = record.get(field)
    turns = [] if is_missing(turns) else turns
    if not isinstance(turns, list):
        raise UnusableValue(f"{field} is {shown(turns)}, not a list of turns.", "Write one object for each turn.")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            remedy = 'Write {"from": "human", "value": "..."}, or {"role": "user", "content": "..."}.'
            raise UnusableValue(f"{field} {number} is {shown(turn)}, not an object.", remedy)
    turns = [
        {**turn, "role": turn["from"], "content": text_of(turn.get("value"), f"the value of {field} {number}")}
        if turn.get("from") is not None
        else turn
        for number, turn in enumerate(with_recordings(turns, record))
    ]
    system = record.get("system")
    if (
        not is_missing(system)
        and text_of(system, "system").strip()
        and not any(t.get("role") == "system" for t in turns)
    ):
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _message(turn: dict, name: str, transcripts: StoredTranscripts | None) -> dict:
    """
    A turn as a message of parts. Recordings are replaced by their transcripts.

    Raises:
        UnusableValue: if a value can't be read, or a recording has no transcript.
    """
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str):
        remedy = "Roles are system, user and assistant (or human and gpt, under 'from')."
        raise UnusableValue(f"the role of {name} is {shown(role)}.", remedy)
    role = ROLES.get(role, encodable(role))
    if not isinstance(content, list):
        return message(role, text_part(text_of(content, f"the content of {name}")))
    parts = [_part(part, f"part {number} of {name}") for number, part in enumerate(content)]
    try:
        [spoken] = transcribe_chat([message(role, *parts)], transcripts)
    except (TranscriptionError, ValueError) as error:
        raise UnusableValue(str(error), "") from error
    return spoken


def _part(part: Any, name: str) -> dict:
    """One content part: an image, a recording's path, or text."""
    if not isinstance(part, dict):
        remedy = 'Write {"type": "text", "text": "..."} or {"type": "image"}.'
        raise UnusableValue(f"{name} is {shown(part)}, not a part.", remedy)
    kind = part.get("type")
    if kind is None:  # Qwen-VL's {"image": ...} and {"text": ...}
        kind = "image" if _own_image(part) is not None else "text"
    if kind == "audio":
        return {"type": "audio", "path": part.get("path")}
    if kind in IMAGE_PARTS:
        return IMAGE_PART
    if kind != "text":
        raise UnusableValue(f"{name} is of type {shown(kind)}.", "Parts are of type text, image or audio.")
    return text_part(text_of(part.get("text"), f"the text of {name}"))


def _own_image(part: dict) -> Any:
    """The image that an image part names itself."""
    value = next((part[name] for name in IMAGE_FIELDS if not is_missing(part.get(name))), None)
    return None if value == {"path": None, "bytes": None} else value


def _with_own_images(turns: list[dict], images: list[dict], folder: Any) -> list[dict]:
    """The images of a record: those of its image column, or those that image parts name themselves."""
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    parts = [part for content in contents for part in content if part.get("type") in (*IMAGE_PARTS, None)]
    own = [value for part in parts if (value := _own_image(part)) is not None]
    if own and images:
        raise UnusableValue(
            f"image parts name images of their own ({shown(own[0])}), and the record has {len(images)} beside them.",
            "Keep one of them.",
        )
    return images or [image_reference(value, folder, f"image part {n}") for n, value in enumerate(own)]


def _with_tagged_images(messages: list[dict], images: list[dict], folder: Any) -> list[dict]:
    """The images of a record, or those that users' texts name in `<img>` tags, which become placeholders."""
    parts = [part for m in messages if m["role"] == "user" for part in m["content"] if part["type"] == "text"]
    tagged = [path for part in parts for path in TAGGED_IMAGE.findall(part["text"])]
    if tagged and images:
        raise UnusableValue(
            f"a text names an image of its own (<img>{shown(tagged[0])}</img>), and the record has {len(images)} "
            "beside it.",
            "Keep one of them.",
        )
    for part in parts:
        part["text"] = TAGGED_IMAGE.sub(PLACEHOLDER, part["text"])
    return images or [image_reference(path.strip(), folder, f"image tag {n}") for n, path in enumerate(tagged)]


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
            text = part["text"]
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


def _opening_answers(messages: list[dict]) -> set[int]:
    """The indices of answers in front of the first question; none if there is no question."""
    first = next((number for number, m in enumerate(messages) if m["role"] == "user"), 0)
    return {number for number, m in enumerate(messages[:first]) if m["role"] == "assistant"}


def _captions(messages: list[dict], num_images: int) -> list[list[dict]]:
    """Answers that no question asks for as conversations, each behind the system message and all images."""
    system = [m for m in messages if m["role"] == "system"]
    images = message("user", *[IMAGE_PART] * num_images)
    return [[*system, images, m] for m in messages if m["role"] == "assistant"]


def _answer_details(
    record: dict, turns: list[dict], messages: list[dict], category: Any
) -> list[tuple[str | None, list[str]]]:
    """The category and the accepted answers of each answer of a conversation."""
    answering = [turn for turn, m in zip(turns, messages, strict=True) if m["role"] == "assistant"]
    categories = _one_each(category, len(answering))
    references = _list(record.get("answers"))
    if references and not isinstance(references[0], list):
        references = [references]
    details = []
    for number, turn in enumerate(answering):
        accepted = turn.get("answers") or (references[number] if number < len(references) else [])
        kind = categories[number] if is_missing(turn.get("category")) else turn["category"]
        texts = [encodable(text_of(answer, f"an accepted answer of answer {number}")) for answer in _list(accepted)]
        details.append((name_of(kind, "category"), texts))
    return details


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if is_missing(value) else [value]


def _one_each(value: Any, count: int) -> list:
    """A list of `count` values, from one value for all or from a list."""
    if isinstance(value, list):
        return [value[i] if i < len(value) else None for i in range(count)]
    return [value] * count


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
