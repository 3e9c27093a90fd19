"""Checks every row before training: images by their headers, texts by tokenising them.

A header can't show that a file is truncated. Such a file is found in the dataloader worker, or here with
`image_check="decode"`.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jnana.processing.processing_jnana import JnanaProcessor

from .images import MAX_IMAGE_PIXELS, check_image, image_size, load_image
from .packing import ConversationSize, measure_conversation, shared_length
from .progress import Progress
from .rows import BadSampleError, append_bad_samples, bad_sample, iterate_rows, message_text
from .values import shown


IMAGE_CHECKS = ("none", "header", "decode")
# What of a row can't be used: its record or texts, an image, or its length in tokens
PROBLEM_KINDS = ("conversation", "image", "length")

# (height, width) in pixels of one image; None where it is not known
ImageSize = tuple[int, int] | None


@dataclass
class CheckReport:
    """
    The result of checking a data set.

    Args:
        num_rows (`int`): number of rows checked.
        kept_indices (`list[int]`): the rows that can be used, in order.
        lengths (`list[list[int]]`): tokens of every conversation of every kept row, image tokens included, before it
            is cut to `max_length`.
        shared (`list[int]`): tokens in the prefix that the conversations of each kept row share ([`shared_length`]).
        num_truncated (`int`): conversations longer than `max_length`, whose answers will be cut.
        problems (`list[str]`): file, record, problem and remedy of every row that can't be used.
        kinds (`list[str]`): for each problem its kind, one of `PROBLEM_KINDS`.
        unreadable (`list[list[str]]`): for each problem with an image, the files of that row's images.
    """

    num_rows: int = 0
    kept_indices: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    num_truncated: int = 0
    problems: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    unreadable: list[list[str]] = field(default_factory=list)

    def add(self, outcomes: "Iterable[RowSizes | BadRow]", max_length: int | None) -> None:
        """Add the next rows, each with its sizes or its problem."""
        for outcome in outcomes:
            if isinstance(outcome, BadRow):
                self.problems.append(outcome.problem)
                self.kinds.append(outcome.kind)
            else:
                self.kept_indices.append(self.num_rows)
                self.lengths.append(outcome.lengths)
                self.shared.append(outcome.shared)
                self.num_truncated += outcome.count_longer(max_length)
            self.num_rows += 1


def check_rows(
    rows: Any,
    processor: JnanaProcessor,
    *,
    max_length: int | None = None,
    image_check: str = "header",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    needs_images: bool = False,
    on_bad_sample: str = "raise",
    bad_samples_file: str | Path | None = None,
    max_listed: int = 10,
    batch_size: int = 500,
    progress: bool = True,
) -> CheckReport:
    """
    Find every row that can't be trained on, before training.

    Args:
        rows (`Dataset`, `IterableDataset` or list of rows): as given by [`load_rows`].
        processor (`JnanaProcessor`): its tokenizer and chat template measure the conversations.
        max_length (`int`, *optional*): tokens a sequence may have. The images and at least one answer token of a
            conversation must fit.
        image_check (`str`, *optional*, defaults to `"header"`): `header`, `decode` (also finds truncated files), or
            `none`. Where images are cut into tiles, `none` reads the headers too, because the number of image tokens
            depends on an image's size.
        max_image_pixels (`int`, *optional*): larger images can't be used.
        needs_images (`bool`, *optional*, defaults to `False`): whether a conversation without an image can't be used,
            as in run_align.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `raise` one error that lists the bad rows, or `skip`
            them.
        bad_samples_file (`str` or `Path`, *optional*): JSON Lines file to which all bad rows are appended.
        max_listed (`int`, *optional*, defaults to 10): number of bad rows that the error lists.
        batch_size (`int`, *optional*): rows tokenised together.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `CheckReport`.

    Raises:
        BadSampleError: with `raise`, if any row can't be used; with `skip`, if no row can.
        ValueError: if an option has an unknown value.
    """
    check_options(image_check, on_bad_sample)
    report = CheckReport()
    images = ImageChecker(processor, image_check, max_image_pixels)
    waiting = iter(iterate_rows(rows))
    total = len(rows) if hasattr(rows, "__len__") else None
    with Progress(total, "Checking rows", progress) as bar:
        while block := list(itertools.islice(waiting, batch_size)):
            report.add(check_block(block, processor, images, max_length, needs_images), max_length)
            bar.update(len(block))
    if bad_samples_file is not None:
        append_bad_samples(bad_samples_file, report.problems, report.kinds)
    raise_for_problems(report, on_bad_sample, max_listed)
    return report


def check_options(image_check: str, on_bad_sample: str) -> None:
    """Raise `ValueError` for an unknown value."""
    for name, value, known in (
        ("image_check", image_check, IMAGE_CHECKS),
        ("on_bad_sample", on_bad_sample, ("raise", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")


def raise_for_problems(report: CheckReport, on_bad_sample: str, max_listed: int = 10) -> None:
    """
    Raise one error for all rows that can't be used.

    Args:
        report (`CheckReport`): of all rows.
        on_bad_sample (`str`): with `skip`, raise only if no row can be used.
        max_listed (`int`, *optional*, defaults to 10): number of bad rows that the error lists.

    Raises:
        BadSampleError: as described.
    """
    if not report.problems or (on_bad_sample == "skip" and report.lengths):
        return
    listed = "\n".join(f"  {problem}" for problem in report.problems[:max_listed])
    more = len(report.problems) - max_listed
    rest = f"\n  ... and {more} more" if more > 0 else ""
    raise BadSampleError(
        f"{len(report.problems)} of {report.num_rows} rows can't be used "
        f"(on_bad_sample='skip' leaves them out):\n{listed}{rest}"
    )


def check_row(row: dict, needs_images: bool = False) -> None:
    """
    Check the text of a row, without opening its images.

    Args:
        row (`dict`): with the columns of `ROW_FEATURES`.
        needs_images (`bool`, *optional*, defaults to `False`): whether each conversation must be about an image.

    Raises:
        BadSampleError: if a value of the record can't be read, it has no conversation, a question is missing, an
            answer is missing or empty, or image parts and images differ in number.
    """
    source, num_images = row["source"], len(row["images"])
    if not row["conversations"]:
        raise bad_sample(source, "no conversation, so no answer to learn.", "Give it a caption or an answer.")
    for chat in row["conversations"]:
        check_readable(chat, source)
        num_parts = sum(part["type"] == "image" for m in chat for part in m["content"])
        if num_parts and not num_images:
            raise bad_sample(source, "asks about an image but has none.", "Add the image's file name to the record.")
        if num_parts not in (0, num_images):
            raise bad_sample(
                source,
                f"{num_images} images but {num_parts} image parts or <image> marks in the conversation.",
                "Write one mark for each image, or none: then the images come first.",
            )
        if needs_images and not num_parts:
            raise bad_sample(
                source,
                "a conversation without an image, which trains nothing in run_align.",
                "Leave it out (on_bad_sample: skip does), or train it with run_sft.",
            )
        check_turns(chat, source)


def check_readable(chat: list[dict], source: str) -> None:
    """Raise the `BadSampleError` of a record that the reader could not read."""
    for m in chat:
        for part in m["content"]:
            if part["type"] == "problem":
                raise bad_sample(source, part["text"])


def check_turns(chat: list[dict], source: str) -> None:
    """
    Check the roles and answers of a conversation.

    Raises:
        BadSampleError: if there is no question or no answer, an answer is empty, or a role is not known.
    """
    answers = [m for m in chat if m["role"] == "assistant"]
    if not answers:
        raise bad_sample(source, "no answer.", "Add an assistant (or gpt) turn.")
    for answer in answers:
        if not message_text(answer).strip():
            raise bad_sample(source, "an answer or caption without text: no token to learn.", "Write it or remove it.")
    roles = {m["role"] for m in chat}
    unknown = roles - {"system", "user", "assistant"}
    if unknown:
        raise bad_sample(source, f"unknown role {shown(min(unknown))}.", "Roles are system, user and assistant.")
    if "user" not in roles:
        raise bad_sample(source, "an answer without a question.", "Add a user (or human) turn before it.")


class ImageChecker:
    """
    Checks images and finds their sizes; a path that repeats in nearby rows is checked once.

    Args:
        processor (`JnanaProcessor`): if it cuts images into tiles, their sizes are read whatever `how` is.
        how (`str`): `none`, `header` or `decode`.
        max_image_pixels (`int`): larger images can't be used.
    """

    def __init__(self, processor: JnanaProcessor, how: str, max_image_pixels: int):
        self.how = "header" if how == "none" and processor.image_grid_pinpoints is not None else how
        self.max_image_pixels = max_image_pixels
        self.passed: dict[str, ImageSize] = {}

    def __call__(self, image: dict, source: str) -> ImageSize:
        """
        The (height, width) of an image in pixels; `None` if images are not opened.

        Args:
            image (`dict`): a row's reference `{"path": str | None, "bytes": bytes | None}`.
            source (`str`): file and record that refer to it, for the error.

        Raises:
            BadSampleError: if the image can't be used.
        """
        path = image["path"] if image["bytes"] is None else None
        if self.how == "none":
            return None
        if path is not None and path in self.passed:
            return self.passed[path]
        limits: dict[str, Any] = {"source": source, "max_image_pixels": self.max_image_pixels}
        size = image_size(load_image(image, **limits)) if self.how == "decode" else check_image(image, **limits)
        if path is not None:
            if len(self.passed) > 10_000:
                self.passed.clear()
            self.passed[path] = size
        return size


@dataclass
class BadRow:
    """
    A row that can't be used.

    Args:
        problem (`str`): file, record, problem and remedy.
        kind (`str`): one of `PROBLEM_KINDS`.
        images (`list[str]`): the files of its images, if one of them is the problem.
    """

    problem: str
    kind: str
    images: list[str] = field(default_factory=list)


def check_block(
    rows: list[dict],
    processor: JnanaProcessor,
    images: ImageChecker,
    max_length: int | None = None,
    needs_images: bool = False,
) -> "list[RowSizes | BadRow]":
    """
    Check and tokenise rows. All their conversations are tokenised together.

    Args:
        rows (`list[dict]`): with the columns of `ROW_FEATURES`.
        processor (`JnanaProcessor`): renders and tokenises.
        images (`ImageChecker`): checks the images.
        max_length, needs_images: as in [`check_rows`].

    Returns:
        `list[RowSizes | BadRow]`: for each row its tokens and sizes, or its problem.
    """
    outcomes: list[Any] = []
    good: list[tuple[int, dict]] = []
    image_sizes: list[list[ImageSize]] = []
    for index, row in enumerate(rows):
        outcomes.append(None)
        kind = "conversation"
        try:
            check_row(row, needs_images)
            kind = "image"
            image_sizes.append([images(image, row["source"]) for image in row["images"]])
            good.append((index, row))
        except BadSampleError as error:
            paths = [image["path"] for image in row["images"] if image["path"]] if kind == "image" else []
            outcomes[index] = BadRow(str(error), kind, paths)
    measured = measure_rows([row for _, row in good], processor, image_sizes)
    for (index, row), sizes in zip(good, measured, strict=True):
        outcomes[index] = sizes
        try:
            for size in sizes.conversations:
                check_size(size, max_length, row["source"])
        except BadSampleError as error:
            outcomes[index] = BadRow(str(error), "length")
    return outcomes


@dataclass
class RowSizes:
    """
    The tokens of a row, and its size in tokens.

    Args:
        conversations (`list[ConversationSize]`): size of each conversation.
        shared (`int`): tokens in the prefix that they share, see [`shared_length`].
        ids, masks (`list[list[int]]`): token ids of each conversation, with one image token for each image, and for
            each id 1 inside an answer and 0 elsewhere.
        image_sizes (`list[tuple[int, int] | None]`): (height, width) of each image in pixels, where it was read.
    """

    conversations: list[ConversationSize]
    shared: int
    ids: Sequence[list[int]] = ()
    masks: Sequence[list[int]] = ()
    image_sizes: Sequence[ImageSize] = ()

    @property
    def lengths(self) -> list[int]:
        return [size.length for size in self.conversations]

    def count_longer(self, max_length: int | None) -> int:
        """The number of conversations that are longer than `max_length`."""
        return sum(max_length is not None and length > max_length for length in self.lengths)


def measure_rows(
    rows: list[dict], processor: JnanaProcessor, image_sizes: Sequence[Sequence[ImageSize]] | None = None
) -> list[RowSizes]:
    """
    Measure rows without opening their images. All conversations are tokenised together.

    Args:
        rows (`list[dict]`): rows that pass [`check_row`].
        processor (`JnanaProcessor`): tokenises, and counts the tokens of each image.
        image_sizes (`Sequence[Sequence[tuple[int, int] | None]]`, *optional*): (height, width) in pixels of each image
            of each row, where it is known. Needed where images are cut into tiles.

    Raises:
        ValueError: if the chat template writes another number of image tokens than a conversation has images.
    """
    chats = [chat for row in rows for chat in row["conversations"]]
    if not chats:
        return []
    image_token_id = processor.image_token_id
    encoded = iter(zip(*processor.encode_chats(chats), strict=True))
    measured = []
    for number, row in enumerate(rows):
        known = image_sizes[number] if image_sizes is not None else [None] * len(row["images"])
        counts = [processor.count_image_tokens(size) for size in known]
        ids, masks = zip(*[next(encoded) for _ in row["conversations"]], strict=True)
        sizes = [
            measure_conversation(tokens, mask, image_token_id, counts if has_images(chat) else [], row["source"])
            for chat, tokens, mask in zip(row["conversations"], ids, masks, strict=True)
        ]
        shared = shared_length(ids, masks, image_token_id)
        in_prefix = ids[0][:shared].count(image_token_id)
        measured.append(RowSizes(sizes, shared + sum(count - 1 for count in counts[:in_prefix]), ids, masks, known))
    return measured


def has_images(chat: list[dict]) -> bool:
    """Whether a conversation has image parts, and so is about the images of its row."""
    return any(part["type"] == "image" for message in chat for part in message["content"])


def check_size(size: ConversationSize, max_length: int | None, source: str) -> None:
    """
    Check that a conversation fits into `max_length` with its images and at least one answer token. A longer
    conversation is cut at its end.

    Args:
        size (`ConversationSize`): of the conversation.
        max_length (`int`, *optional*): tokens a sequence may have.
        source (`str`): file and record.

    Raises:
        BadSampleError: if nothing is supervised, or if an image or the whole answer would be cut off.
    """
    if size.first_label is None:
        raise bad_sample(
            source, "no supervised token.", "The chat template must put answers in {% generation %} blocks."
        )
    if max_length is not None and max(size.first_label + 1, size.images_end) > max_length:
        raise bad_sample(
            source,
            f"does not fit: {size.length} tokens, its images end at {size.images_end} and its first answer token is "
            f"at {size.first_label}, but max_length={max_length}.",
            "Raise max_length or shorten the question.",
        )
