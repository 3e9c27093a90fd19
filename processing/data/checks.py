"""Checks every row before training: images by their headers, texts by tokenising them.

What a header can't show (a truncated file) is found in the dataloader worker, or here with `image_check="decode"`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jnana.processing.chat_encoding_jnana import measure_sequence
from jnana.processing.processing_jnana import JnanaProcessor

from .images import MAX_IMAGE_PIXELS, check_image, load_image
from .packing import expanded_length, shared_length
from .rows import BadSampleError, append_bad_samples, bad_sample, iterate_rows


IMAGE_CHECKS = ("none", "header", "decode")


@dataclass
class CheckReport:
    """
    What a check of a data set found.

    Args:
        num_rows (`int`): rows looked at.
        kept_indices (`list[int]`): the rows that can be used, in order.
        lengths (`list[list[int]]`): tokens of every conversation of every kept row, image tokens included, before any
            cut.
        shared (`list[int]`): tokens that the conversations of each kept row can share ([`shared_length`]).
        num_truncated (`int`): conversations longer than `max_length`, whose answers will be cut short.
        problems (`list[str]`): file, record, problem and remedy of every row that can't be used.
    """

    num_rows: int = 0
    kept_indices: list[int] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    num_truncated: int = 0
    problems: list[str] = field(default_factory=list)


def check_rows(
    rows: Any,
    processor: JnanaProcessor,
    *,
    max_length: int | None = None,
    image_check: str = "header",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
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
        max_length (`int`, *optional*): tokens a sequence may have; a conversation must keep its images and some answer
            in it.
        image_check (`str`, *optional*, defaults to `"header"`): `header`, `decode` (also finds truncated files), or
            `none`.
        max_image_pixels (`int`, *optional*): larger images can't be used.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `raise` one error that lists them, or `skip` them.
        bad_samples_file (`str` or `Path`, *optional*): JSON Lines file to which all of them are appended.
        max_listed (`int`, *optional*, defaults to 10): how many the error spells out.
        batch_size (`int`, *optional*): rows tokenised together.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `CheckReport`.

    Raises:
        BadSampleError: with `raise`, if any row can't be used; with `skip`, if none can.
        ValueError: if an option has no such value.
    """
    for name, value, known in (
        ("image_check", image_check, IMAGE_CHECKS),
        ("on_bad_sample", on_bad_sample, ("raise", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(known)}.")
    report = CheckReport()
    images = _ImageChecker(image_check, max_image_pixels)
    total = len(rows) if hasattr(rows, "__len__") else None
    block: list[dict] = []
    with tqdm(total=total, desc="Checking rows", unit="row", disable=not progress) as bar:
        for row in iterate_rows(rows):
            block.append(row)
            if len(block) == batch_size:
                _check_block(block, processor, max_length, images, report)
                bar.update(len(block))
                block = []
        _check_block(block, processor, max_length, images, report)
        bar.update(len(block))

    if bad_samples_file is not None:
        append_bad_samples(bad_samples_file, report.problems)
    if report.problems and (on_bad_sample == "raise" or not report.kept_indices):
        listed = "\n".join(f"  {problem}" for problem in report.problems[:max_listed])
        more = len(report.problems) - max_listed
        rest = f"\n  ... and {more} more" if more > 0 else ""
        raise BadSampleError(
            f"{len(report.problems)} of {report.num_rows} rows can't be used "
            f"(on_bad_sample='skip' leaves them out):\n{listed}{rest}"
        )
    return report


def check_row(row: dict) -> None:
    """
    Check what a row says, without opening its images.

    Raises:
        BadSampleError: if it has no conversation, an answer is missing or empty, or image parts and images differ in
            number.
    """
    source, num_images = row["source"], len(row["images"])
    if not row["conversations"]:
        raise bad_sample(source, "no conversation, so no answer to learn.", "Give it a caption or an answer.")
    for chat in row["conversations"]:
        parts = [part for message in chat for part in message["content"]]
        for part in parts:
            if part["type"] == "audio":  # the reader found no words for it
                raise bad_sample(source, part["text"])
        num_parts = sum(part["type"] == "image" for part in parts)
        if num_parts and not num_images:
            raise bad_sample(source, "asks about an image but has none.", "Add the image's file name to the record.")
        if num_parts not in (0, num_images):
            raise bad_sample(source, f"{num_images} images but {num_parts} image places in the conversation.")
        answers = [m for m in chat if m["role"] == "assistant"]
        if not answers:
            raise bad_sample(source, "no answer.", "Give it an assistant's (or gpt's) turn.")
        for answer in answers:
            if not "".join(part["text"] or "" for part in answer["content"] if part["type"] == "text").strip():
                raise bad_sample(
                    source, "an answer or caption without text: no token to learn.", "Write it or leave it out."
                )
        unknown = {m["role"] for m in chat} - {"system", "user", "assistant"}
        if unknown:
            raise bad_sample(source, f"unknown role {sorted(unknown)[0]!r}.", "Roles are system, user and assistant.")


class _ImageChecker:
    """Checks images, each path once while it repeats in neighbouring rows."""

    def __init__(self, how: str, max_image_pixels: int):
        self.how, self.max_image_pixels = how, max_image_pixels
        self.passed: dict[str, None] = {}

    def __call__(self, image: dict, source: str) -> None:
        path = image["path"] if image["bytes"] is None else None
        if self.how == "none" or (path is not None and path in self.passed):
            return
        (load_image if self.how == "decode" else check_image)(
            image, source=source, max_image_pixels=self.max_image_pixels
        )
        if path is not None:
            if len(self.passed) > 10_000:
                self.passed.clear()
            self.passed[path] = None


def _check_block(block, processor, max_length, images: _ImageChecker, report: CheckReport) -> None:
    good: list[tuple[int, dict]] = []
    for row in block:
        index = report.num_rows
        report.num_rows += 1
        try:
            check_row(row)
            for image in row["images"]:
                images(image, row["source"])
        except BadSampleError as error:
            report.problems.append(str(error))
            continue
        good.append((index, row))
    if not good:
        return
    for (index, row), measured in zip(good, measure_rows([row for _, row in good], processor), strict=True):
        try:
            for length, first_label, images_end in measured.sizes:
                check_size(length, first_label, images_end, max_length, row["source"])
        except BadSampleError as error:
            report.problems.append(str(error))
            continue
        report.kept_indices.append(index)
        report.lengths.append(measured.lengths)
        report.shared.append(measured.shared)
        report.num_truncated += sum(max_length is not None and length > max_length for length in measured.lengths)


@dataclass
class RowSizes:
    """
    What a row takes in tokens.

    Args:
        sizes (`list[tuple[int, int | None, int]]`): of each conversation, as [`measure_sequence`] gives them.
        shared (`int`): tokens that they can share, see [`shared_length`].
    """

    sizes: list[tuple[int, int | None, int]]
    shared: int

    @property
    def lengths(self) -> list[int]:
        return [size[0] for size in self.sizes]


def measure_rows(rows: list[dict], processor: JnanaProcessor) -> list[RowSizes]:
    """
    Sizes of rows, all of them tokenised together and none of their images opened.

    Args:
        rows (`list[dict]`): rows that [`check_row`] lets pass.
        processor (`JnanaProcessor`): tokenises.
    """
    chats = [chat for row in rows for chat in row["conversations"]]
    if not chats:
        return []
    all_ids, all_masks = processor.encode_chats(chats)
    image, size = processor.image_token_id, processor.tokens_per_image
    measured, first = [], 0
    for row in rows:
        last = first + len(row["conversations"])
        ids, masks = all_ids[first:last], all_masks[first:last]
        sizes = [measure_sequence(tokens, mask, image, size) for tokens, mask in zip(ids, masks, strict=True)]
        shared = ids[0][: shared_length(ids, masks, image)]
        measured.append(RowSizes(sizes, expanded_length(shared, image, size)))
        first = last
    return measured


def check_size(length: int, first_label: int | None, images_end: int, max_length: int | None, source: str) -> None:
    """
    Check that a conversation fits into `max_length` with its images and some answer; what is longer is cut at its end.

    Args:
        length, first_label, images_end: as given by [`measure_sequence`].
        max_length (`int`, *optional*): tokens a sequence may have.
        source (`str`): file and record.

    Raises:
        BadSampleError: if nothing is supervised, or an image or all of the answer would be cut off.
    """
    if first_label is None:
        raise bad_sample(
            source, "no supervised token.", "The chat template must put answers in {% generation %} blocks."
        )
    if max_length is not None and max(first_label + 1, images_end) > max_length:
        raise bad_sample(
            source,
            f"does not fit: {length} tokens, its images end at {images_end} and its first answer token is at "
            f"{first_label}, but max_length={max_length}.",
            "Raise max_length or shorten the question.",
        )
