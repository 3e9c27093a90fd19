"""Tokenises a rendered chat piece by piece.

A chat is split at two kinds of positions, and each piece is tokenised separately:

* where an answer starts and ends. No token then crosses the border between prompt and answer, whatever the tokenizer.
  A prompt made for generation is an exact token prefix of the training row, and the mask of answer tokens needs no
  character offsets. (If byte-pair merging crosses that border, the model has to continue after a token that never
  ended there in training. No error is raised.)
* inside each passage of a message that spells a control token, such as `<image>` or `<|endoftext|>`. Both halves are
  ordinary text to the tokenizer: the model reads the same characters, and no control token.

The positions are marked by three private-use characters, which are removed from messages beforehand. Before that, the
recordings in a chat are replaced by their transcripts (`transcribe_chat`). This file is copied beside
`processing_jnana.py` into every saved checkpoint.
"""

import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


BREAK = "\U0010fa00"
ANSWER_START = "\U0010fa01"
ANSWER_END = "\U0010fa02"
MARKS = re.compile(f"([{BREAK}{ANSWER_START}{ANSWER_END}])")

# transformers marks passages with two characters of its own. In a message they would hide a placeholder from it.
FOREIGN_MARKS = re.compile(f"[{BREAK}{ANSWER_START}{ANSWER_END}\U000f0000\U000f0001]")


@lru_cache
def _control_pattern(control_tokens: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(control_tokens, key=len, reverse=True)
    # Case is ignored because an added token may be matched after a lower-casing normalizer
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)


class ChatEncoder:
    """
    Neutralises and tokenises chats with one tokenizer.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer; its added tokens, special or not, are the control tokens.
        extra_tokens (`tuple[str, ...]`, *optional*): more strings to treat as control tokens (the image token).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, extra_tokens: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.added_tokens = {index: token.content for index, token in added.items()}
        # Runs of spaces, which Phi-2's tokenizer has as added tokens, and added words are ordinary text
        control = [token.content for token in added.values() if token.special or not is_word(token.content)]
        self.pattern = _control_pattern(tuple({t: None for t in (*control, *extra_tokens) if len(t) > 1}))
        # A control token of one character can't be broken in two, so it is removed from messages
        self.single = [token.content for token in added.values() if token.special and len(token.content) == 1]

    def neutralise(self, value: Any) -> Any:
        """
        Break every control token in messages, so that it is tokenised as plain text.

        Args:
            value (`Any`): a string, or a list or dict (conversations, messages, tools) of them.

        Returns:
            `Any`: a copy with a break after the first character of each control token, also in the keys of dicts (the
            arguments of a tool may have any name). Adjacent text parts of one message are joined first, so that two
            parts can't spell a token together.
        """
        if isinstance(value, str):
            return self._neutralise_text(value)
        if isinstance(value, (list, tuple)):
            return [self.neutralise(item) for item in _join_text_parts(value)]
        if isinstance(value, dict):
            return {self.neutralise(k): self.neutralise(v) for k, v in value.items()}
        return value

    def _neutralise_text(self, text: str) -> str:
        text = FOREIGN_MARKS.sub("", text)
        for character in self.single:
            text = text.replace(character, "")
        pieces, last = [], 0
        while match := self.pattern.search(text, last):
            pieces += [text[last : match.start() + 1], BREAK]
            last = match.start() + 1
        return "".join([*pieces, text[last:]])

    def encode(self, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """
        Tokenise marked texts, with no special tokens but those the texts spell.

        Args:
            texts (`list[str]`): rendered chats with marks.

        Returns:
            `tuple[list[list[int]], list[list[int]]]`: token ids, and for each id 1 inside an answer and 0 elsewhere.
        """
        split = [MARKS.split(text) for text in texts]
        pieces = [piece for parts in split for piece in parts[::2] if piece]
        if not pieces:
            return [[] for _ in texts], [[] for _ in texts]
        encoded = iter(self._encode_all(pieces)) if self._pieces_are_independent() else None

        all_ids, all_masks = [], []
        for parts in split:
            ids: list[int] = []
            mask: list[int] = []
            in_answer = 0
            for position, part in enumerate(parts):
                if position % 2:
                    in_answer = 1 if part == ANSWER_START else 0 if part == ANSWER_END else in_answer
                elif part:
                    piece_ids = next(encoded) if encoded is not None else self._encode_after(ids, part)
                    ids += piece_ids
                    mask += [in_answer] * len(piece_ids)
            all_ids.append(ids)
            all_masks.append(mask)
        return all_ids, all_masks

    def _encode_all(self, pieces: list[str]) -> list[list[int]]:
        different = list(dict.fromkeys(pieces))  # the chats of a data set have many passages in common
        ids = self.tokenizer(different, add_special_tokens=False, return_attention_mask=False, verbose=False)
        found = dict(zip(different, ids["input_ids"], strict=True))
        return [found[piece] for piece in pieces]

    def _pieces_are_independent(self) -> bool:
        """Whether a text is tokenised in the middle of a chat as at its start: true of byte-level BPE, false of
        tokenizers that put a space in front of what they are given (Llama, Phi-3)."""
        line, letter, both = self._encode_all(["\n", "a", "\na"])
        return both == line + letter

    def _encode_after(self, ids: list[int], piece: str) -> list[int]:
        """Tokenise `piece` as it would be after `ids`, for tokenizers that put a space in front of a text."""
        if not ids:
            return self._encode_all([piece])[0]
        before = self.added_tokens.get(ids[-1], "\n")
        context, both = self._encode_all([before, before + piece])
        return both[len(context) :] if both[: len(context)] == context else self._encode_all([piece])[0]


def truncate_rows(
    ids: list[list[int]], masks: list[list[int]], max_length: int, image_token_id: int, keep_end: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Shorten rows of tokens to a length, but never by image tokens: the model gets all vectors of each image.

    Args:
        ids, masks (`list[list[int]]`): token ids, and 1 for each that is part of an answer.
        max_length (`int`): the length in tokens.
        image_token_id (`int`): id of the image token.
        keep_end (`bool`, *optional*, defaults to `False`): cut off the start of a row instead of its end.

    Returns:
        `tuple[list[list[int]], list[list[int]]]`: the rows, none longer than `max_length`.

    Raises:
        ValueError: if image tokens would be cut off.
    """
    for row, tokens in enumerate(ids):
        positions = [position for position, token in enumerate(tokens) if token == image_token_id]
        needed = 0
        if positions:
            needed = len(tokens) - positions[0] if keep_end else positions[-1] + 1
        if needed > max_length:
            raise ValueError(
                f"max_length={max_length} would cut off image tokens: row {row} has {len(tokens)} tokens, and its "
                f"images need {needed} of them. Set max_length to {needed} or more, or to None, or shorten the text "
                f"{'behind' if keep_end else 'before'} the images."
            )
    kept = slice(-max_length, None) if keep_end else slice(max_length)
    return [row[kept] for row in ids], [row[kept] for row in masks]


def transcribe_chat(chat: list[dict], transcriber: Any) -> list[dict]:
    """
    Replace the recordings of a chat, its `{"type": "audio", ...}` parts, by their transcripts.

    A transcript takes the position of its recording, separated by a space from the text beside it. A recording without
    speech is removed.

    Args:
        chat (`list[dict]`): messages. An audio part holds a file's path under `path`, or under `audio` a path, samples
            `(num_samples,)` with their `sampling_rate` beside them, or a dict of `array` and `sampling_rate`.
        transcriber (`Any`): has a method `transcribe(recording)`, or `transcribe(samples, sampling_rate)`, that
            returns something with a `text`: a `jnana.Transcriber`, for one.

    Returns:
        `list[dict]`: the chat itself if it has no recordings, else a copy.

    Raises:
        ValueError: if there are recordings but no transcriber, a part has no local recording, or no text and no speech
            is left in a message.
    """
    contents = [message.get("content") for message in chat]
    if not any(_is_audio(part) for content in contents if isinstance(content, list) for part in content):
        return chat
    if not hasattr(transcriber, "transcribe"):
        raise ValueError(
            "The chat holds a recording, and transcriber=None. Give one, as in "
            "`apply_chat_template(chat, transcriber=jnana.Transcriber())`, or give the words as text."
        )
    return [
        {**message, "content": _in_words(content, transcriber)} if isinstance(content, list) else message
        for message, content in zip(chat, contents, strict=True)
    ]


def _is_audio(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "audio"


def _in_words(parts: list[dict], transcriber: Any) -> list[dict]:
    words: list[dict] = []
    after_speech = silent = False
    for part in parts:
        spoken = _is_audio(part)
        if spoken:
            text = transcriber.transcribe(*_recording(part)).text.strip()
            if not text:
                silent = True
                continue
            part = {"type": "text", "text": text}
        if words and words[-1].get("type") == part.get("type") == "text" and (spoken or after_speech):
            part = {**part, "text": " " + part["text"].lstrip()}
        words.append(part)
        after_speech = spoken
    if silent and not any(part.get("type") == "text" and (part.get("text") or "").strip() for part in words):
        raise ValueError("No speech was heard in the recording, and the message has no text. Type the question.")
    return words


def _recording(part: dict) -> tuple:
    recording = next((part[key] for key in ("audio", "path") if part.get(key) is not None), None)
    rate = part.get("sampling_rate")
    if isinstance(recording, dict) and recording.get("array") is not None:
        recording, rate = recording["array"], recording.get("sampling_rate", rate)
    if recording is None or isinstance(recording, dict):
        raise ValueError(
            f"An audio part with {', '.join(sorted(part))}: give a local file under 'path' or samples under 'audio'."
        )
    return (recording,) if rate is None else (recording, rate)


def is_word(token: str) -> bool:
    """Whether an added token is ordinary text: white space or a word, not a control token such as `<tool>`."""
    return token.isspace() or token.strip()[:1].isalnum()


def mark_answers(text: str, spans: list[tuple[int, int]]) -> str:
    """Mark the answers of a rendered chat, at the character `spans` of its `{% generation %}` blocks."""
    pieces, last = [], 0
    for start, end in spans:  # an answer to be continued ends with the text
        pieces += [text[last:start], ANSWER_START, text[start:end], ANSWER_END]
        last = min(end, len(text))
    return "".join([*pieces, text[last:]])


def _join_text_parts(items: list | tuple) -> list:
    def is_text(item: Any) -> bool:
        return isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str)

    joined: list = []
    for item in items:
        if joined and is_text(item) and is_text(joined[-1]):
            joined[-1] = {**joined[-1], "text": joined[-1]["text"] + item["text"]}
        else:
            joined.append(item)
    return joined
