"""Which questions are asked together, and their prompts as model inputs.

Questions about the same images form a group, whose prompts share their first tokens (see `prefixes.py`). A batch holds
whole groups, or questions that are asked alone; it is one item of the dataloader. A large group is cut into several.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, image_size

from .prefixes import shared_prefix_length
from .questions import Question, QuestionSet


CHARACTERS_A_TOKEN = 4  # of English text, roughly
CALLS_A_PREFIX = 4  # `generate` calls of a process behind one prefix, if it answers that many questions
QUESTIONS_A_PREFIX = 16  # no fewer of them for the sake of small batches


def prompt_length(questions: QuestionSet, question: Question, processor: Any) -> int:
    """About the length of a question, its images included, in characters.

    Args:
        questions (`QuestionSet`): The test set.
        question (`Question`): One of its questions.
        processor (`ProcessorMixin`): If it is a [`JnanaProcessor`] that cuts images into tiles, an image counts by
            its number of tokens. Otherwise all images count alike, and none is opened.
    """
    length = sum(len(str(message)) for message in question.messages)
    if isinstance(processor, JnanaProcessor) and processor.image_grid_pinpoints is not None:
        sizes = questions.image_sizes(question)
        length += CHARACTERS_A_TOKEN * sum(processor.count_image_tokens(size) for size in sizes)
    return length


def plan_batches(
    questions: QuestionSet,
    indices: Sequence[int],
    processor: Any,
    batch_size: int,
    share_prefix: bool,
    num_processes: int = 1,
) -> list[list[list[int]]]:
    """Put questions of similar length into batches, those about the same images together.

    Args:
        questions (`QuestionSet`): The test set.
        indices (`Sequence[int]`): The questions to ask.
        processor (`ProcessorMixin`): As in [`prompt_length`].
        batch_size (`int`): Questions of a `generate` call, and of a batch. A larger group is one batch all the same,
            asked in several calls, up to four of them or 16 questions. Still larger ones are cut into equal pieces.
        share_prefix (`bool`): Group questions about the same images. Otherwise each is a group of its own.
        num_processes (`int`): Processes that share the batches. No batch has more than the part of a process of all
            questions.

    Returns:
        `list[list[list[int]]]`: Batches of groups of questions, the longest first. The questions of a group are
        ordered too.
    """
    part = max(-(-len(indices) // num_processes), 1)
    most = max(CALLS_A_PREFIX * batch_size, QUESTIONS_A_PREFIX)
    batch_size = min(batch_size, part)
    lengths = {index: prompt_length(questions, questions.questions[index], processor) for index in indices}
    groups: dict[Any, list[int]] = {}
    for index in sorted(indices, key=lambda index: -lengths[index]):
        key = questions.questions[index].image_key if share_prefix else ""
        groups.setdefault(key or index, []).append(index)

    batches: list[list[list[int]]] = []
    pieces = [piece for group in groups.values() for piece in _cut(group, most, part)]
    several = [group for group in pieces if len(group) > 1]
    alone = [group for group in pieces if len(group) == 1]
    for kind in (several, alone):
        room = 0
        for group in kind:
            if len(group) > room:
                batches.append([])
                room = batch_size
            batches[-1].append(group)
            room -= len(group)
    return sorted(batches, key=lambda batch: -lengths[batch[0][0]])


def _cut(group: list[int], most: int, part: int) -> Iterator[list[int]]:
    """Pieces of a group, of about equal size and of at most so many questions. A group that fills the `part` of
    several processes is cut into as many pieces for each of them."""
    shares = -(-len(group) // part)
    count = shares * -(-len(group) // (shares * most))
    for piece in range(count):
        yield group[piece * len(group) // count : (piece + 1) * len(group) // count]


@dataclass
class Prompts:
    """The inputs of one `generate` call.

    Attributes:
        indices (`list[int]`): The questions.
        inputs (`BatchFeature`): `input_ids` and `attention_mask` of shape `(num_questions, length)`, the prefix
            included, and without one the images.
        rows (`torch.LongTensor` of shape `(num_questions,)`, *optional*): The row of each question's prefix.
    """

    indices: list[int]
    inputs: BatchFeature
    rows: torch.Tensor | None = None


@dataclass
class PromptBatch:
    """A batch as [`PromptCollator`] makes it.

    Attributes:
        prompts (`list[Prompts]`): Those with `rows` go on behind the prefix, the others are whole.
        errors (`list[tuple[int, str]]`): Index and reason of each question whose images can't be read.
        prefix (`BatchFeature`, *optional*): The inputs of [`~prefixes.read_prefix`].
    """

    prompts: list[Prompts]
    errors: list[tuple[int, str]]
    prefix: BatchFeature | None = None


@dataclass
class _Group:
    """A group whose prompts share a prefix: its questions, their token ids, the prefix's length, and its images."""

    indices: list[int]
    ids: list[list[int]]
    length: int
    images: list[Any]


class PromptCollator:
    """Turns a batch of [`plan_batches`] into model inputs. Runs in the dataloader workers.

    A group of one question is asked alone, and so is each question of a group if an image stands behind the part that
    they have in common (a question in front of its image), or an image can't be read. All groups of a batch are asked
    so where the longest row, with its answer, would pass `limit`.

    Args:
        questions (`QuestionSet`): The test set.
        processor (`ProcessorMixin`): Renders and tokenises the messages and prepares the images.
        blind (`bool`): Use grey images.
        max_image_pixels (`int`, *optional*): Limit passed to `jnana.processing.data.load_image`.
        batch_size (`int`): Questions of a `generate` call.
        max_new_tokens (`int`): Longest answer, in tokens.
        limit (`int`, *optional*): Of [`~prefixes.length_limit`].

    Returns:
        [`PromptBatch`]: The inputs, padded on the left.
    """

    def __init__(
        self,
        questions: QuestionSet,
        processor: Any,
        blind: bool,
        max_image_pixels: int | None = None,
        *,
        batch_size: int = 16,
        max_new_tokens: int = 64,
        limit: int | None = None,
    ):
        self.questions = questions
        self.processor = processor
        self.blind = blind
        self.limits = {} if max_image_pixels is None else {"max_image_pixels": max_image_pixels}
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.limit = limit

    def __call__(self, batch: list[list[int]]) -> PromptBatch:
        found = [self._encode_group(indices) if len(indices) > 1 else None for indices in batch]
        groups = [group for group in found if group is not None]
        if groups and self.limit is not None:
            prefix = max(group.length for group in groups)
            behind = max(len(ids) - group.length for group in groups for ids in group.ids)
            if prefix + behind + self.max_new_tokens > self.limit:
                groups = []
        shared = {index for group in groups for index in group.indices}
        alone = [index for indices in batch for index in indices if index not in shared]
        prefix, prompts = self._shared_prompts(groups) if groups else (None, [])
        errors = []
        for start in range(0, len(alone), self.batch_size):
            whole, unread = self._whole_prompts(alone[start : start + self.batch_size])
            prompts += whole
            errors += unread
        return PromptBatch(prompts, errors, prefix)

    def _images(self, index: int) -> list[Any]:
        return self.questions.images(self.questions.questions[index], self.blind, **self.limits)

    def _encode_group(self, indices: list[int]) -> _Group | None:
        """The group's prompts, or `None` if they must be asked alone. Its images are read once."""
        asked = [self.questions.questions[index] for index in indices]
        try:
            images = self._images(indices[0])
            # a template may look for the image of an image part; checks their number too
            chats = [self.questions.messages_with_images(question, images) for question in asked]
        except BadSampleError:
            return None  # reported for each question
        sizes = [image_size(image) for image in images]
        ids = [self.processor.encode_chat(chat, image_sizes=sizes) for chat in chats]
        length = shared_prefix_length(ids, self.processor.image_token_id)
        return _Group(indices, ids, length, images) if length else None

    def _pad(self, ids: list[list[int]]) -> BatchFeature:
        return self.processor.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")

    def _shared_prompts(self, groups: list[_Group]) -> tuple[BatchFeature, list[Prompts]]:
        """The inputs of the groups' prefixes, and of their questions behind them."""
        prefixes = self._pad([group.ids[0][: group.length] for group in groups])
        listed = [
            (index, row, ids[group.length :])
            for row, group in enumerate(groups)
            for index, ids in zip(group.indices, group.ids, strict=True)
        ]
        prompts = []
        for start in range(0, len(listed), self.batch_size):
            indices, numbers, behind = zip(*listed[start : start + self.batch_size], strict=True)
            rows, rest = torch.tensor(numbers), self._pad(list(behind))
            # => (num_questions, prefix + rest)
            inputs = {name: torch.cat([prefixes[name][rows], rest[name]], dim=1) for name in prefixes}
            prompts.append(Prompts(list(indices), BatchFeature(inputs), rows))
        images = self.processor(images=[image for group in groups for image in group.images], return_tensors="pt")
        return BatchFeature({**prefixes, **images}), prompts

    def _whole_prompts(self, indices: list[int]) -> tuple[list[Prompts], list[tuple[int, str]]]:
        read, conversations, errors = [], [], []
        for index in indices:
            try:
                images = self._images(index)
                question = self.questions.questions[index]
                conversations.append(self.questions.messages_with_images(question, images))
                read.append(index)
            except BadSampleError as error:
                errors.append((index, str(error)))
        if not conversations:
            return [], errors
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return [Prompts(read, inputs)], errors
