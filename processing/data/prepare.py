"""`prepare`: from a data source to rows for [`JnanaCollator`] - read, check, plan, pack.

A map-style data set is checked as a whole and packed by a plan of all its rows. A stream is packed while it is read;
its bad rows are found by the collator.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, List

from jnana.processing.processing_jnana import JnanaProcessor

from .checks import CheckReport, ImageChecker, check_row, check_rows, check_size, measure_rows
from .images import MAX_IMAGE_PIXELS
from .keywords import answers_as_keywords
from .packing import RowPlan, plan_rows
from .readers import load_rows
from .rows import ROW_FEATURES, BadSampleError, RowView, flatten_conversations, select_conversations, unbatched


logger = logging.getLogger(__name__)

PACKED_FEATURES = Features({"groups": List(dict(ROW_FEATURES))})

# Rows of a stream that are packed together: enough to fill the packed rows well, few enough to keep in memory.
STREAM_BUFFER = 256


@dataclass
class PrepareOptions:
    """
    How a source is read, checked and packed.

    Args:
        format, image_folder, split, streaming, independent_turns, prompt, max_rows: as in [`load_rows`].
        answer_keywords (`bool`, *optional*, defaults to `False`): reduce answers to keywords
            ([`answers_as_keywords`]).
        text_column (`str`, *optional*): the column of the texts, if it has none of the known names.
        needs_images (`bool`, *optional*, defaults to `False`): as run_align, take no conversation without an image,
            and answers without a question as captions of their image.
        max_length, max_image_pixels, image_check, on_bad_sample, bad_samples_file, progress: as in [`check_rows`].
        max_length_source (`str`, *optional*): what `max_length` is, for the log: a limit of the model.
        packing (`str`, *optional*, defaults to `"none"`): `none`, `rows` or `shared_image`, as in [`JnanaCollator`].
        max_row_tokens (`int`, *optional*, defaults to 1024): tokens a packed row may have.
        seed (`int`, *optional*): of the order in which conversations are packed; by default the order of the data.
    """

    format: str = "auto"
    image_folder: str | Path | None = None
    split: str = "train"
    streaming: bool = False
    independent_turns: bool = True
    prompt: str | None = None
    text_column: str | None = None
    needs_images: bool = False
    max_rows: int | None = None
    answer_keywords: bool = False
    max_length: int | None = None
    max_length_source: str | None = None
    max_image_pixels: int = MAX_IMAGE_PIXELS
    image_check: str = "header"
    on_bad_sample: str = "raise"
    bad_samples_file: str | Path | None = None
    progress: bool = True
    packing: str = "none"
    max_row_tokens: int = 1024
    seed: int | None = None

    @property
    def for_collator(self) -> dict[str, Any]:
        """The options that [`JnanaCollator`] takes."""
        names = ("max_length", "needs_images", "on_bad_sample", "bad_samples_file", "max_image_pixels", "packing")
        return {name: getattr(self, name) for name in names}


def prepare(
    source: str | Path | Dataset | IterableDataset,
    processor: JnanaProcessor,
    options: PrepareOptions,
    check: Callable[..., CheckReport] = check_rows,
) -> Dataset | IterableDataset:
    """
    Read, check and pack a data source.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`): as in [`load_rows`].
        processor (`JnanaProcessor`): measures the rows.
        options (`PrepareOptions`): how.
        check (`Callable`, *optional*, defaults to [`check_rows`]): takes the arguments of [`check_rows`] and returns
            its report. With several processes, one that checks in a single process.

    Returns:
        `Dataset` or `IterableDataset`: rows of one conversation, or with `packing` packed rows
            ([`packed_rows`], [`packed_stream`]), for [`JnanaCollator`] with `**options.for_collator`. A `Dataset` has
            a column `length`: the tokens of each row.

    Raises:
        BadSampleError: if rows can't be used, as [`check_rows`].
        FileNotFoundError, ValueError: as [`load_rows`], and if a conversation is longer than a packed row.
    """
    rows = load_rows(
        source,
        format=options.format,
        image_folder=options.image_folder,
        split=options.split,
        streaming=options.streaming,
        independent_turns=options.independent_turns,
        prompt=options.prompt,
        captions=options.needs_images,
        max_rows=options.max_rows,
        **({} if options.text_column is None else {"text_column": options.text_column}),
    )
    if options.answer_keywords:
        rows = rows.map(answers_as_keywords)
    share = options.packing == "shared_image"
    if isinstance(rows, IterableDataset):
        if options.packing == "none":
            return flatten_conversations(rows)
        return packed_stream(
            rows,
            processor,
            share=share,
            max_row_tokens=options.max_row_tokens,
            max_length=options.max_length,
            max_image_pixels=options.max_image_pixels,
            needs_images=options.needs_images,
        )
    report = check(
        rows,
        processor,
        max_length=options.max_length,
        image_check=options.image_check,
        max_image_pixels=options.max_image_pixels,
        needs_images=options.needs_images,
        on_bad_sample=options.on_bad_sample,
        bad_samples_file=options.bad_samples_file,
        progress=options.progress,
    )
    name = source if isinstance(source, (str, Path)) else "data set"
    if not report.lengths:
        raise ValueError(f"{name} has no rows")
    logger.info(f"{name}: {describe_report(report, options.max_length, options.max_length_source)}")
    if report.problems:
        rows = rows.select(report.kept_indices)
    if options.packing == "none":
        longest = options.max_length or max(map(max, report.lengths))
        return flatten_conversations(rows, [min(length, longest) for row in report.lengths for length in row])
    shared = report.shared if share else None
    plan = plan_rows(report.lengths, shared, options.max_row_tokens, max_length=options.max_length, seed=options.seed)
    logger.info(f"{name}: {plan}")
    return packed_rows(rows, plan)


def describe_report(report: CheckReport, max_length: int | None, source: str | None = None) -> str:
    """One line for the log: the numbers of rows and conversations, and their lengths in tokens."""
    lengths = sorted(length for row in report.lengths for length in row)
    text = f"{len(report.kept_indices):,} of {report.num_rows:,} rows, {len(lengths):,} conversations of "
    text += f"{lengths[0]} to {lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}"
    if report.num_truncated:
        text += f"; {report.num_truncated:,} are cut to max_length {max_length}"
        text += f" ({source})" if source else ""
    return text


def packed_rows(rows: Dataset, plan: RowPlan) -> Dataset:
    """
    The planned rows as a data set, for [`JnanaCollator`] with the same `packing`.

    Args:
        rows (`Dataset`): the data rows of the plan, of `ROW_FEATURES`.
        plan (`RowPlan`): of their lengths.

    Returns:
        `Dataset`: the columns `groups`, a list of rows of `ROW_FEATURES` that are read from `rows` on access, and
            `length`, the row's tokens. It can be selected from and shuffled.
    """
    groups = [[{"row": row, "conversations": chosen} for row, chosen in groups] for groups in plan.rows]
    return Dataset.from_dict({"groups": groups, "length": plan.sizes}).with_transform(_GroupsOf(rows))


class _GroupsOf(RowView):
    """Reads the groups of packed rows."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if "groups" not in batch:  # another column was requested alone
            return batch
        rows = self.rows_by_index(group["row"] for groups in batch["groups"] for group in groups)
        found = [
            [select_conversations(rows[group["row"]], group["conversations"]) for group in groups]
            for groups in batch["groups"]
        ]
        return {**batch, "groups": found}


def packed_stream(
    rows: IterableDataset,
    processor: JnanaProcessor,
    *,
    share: bool,
    max_row_tokens: int,
    max_length: int | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    needs_images: bool = False,
) -> IterableDataset:
    """
    Pack a stream while it is read, `STREAM_BUFFER` data rows at a time. Each buffer is packed independently, so the
    same stream gives the same packed rows, after a resume too. No image is opened, unless the processor cuts images
    into tiles: then their headers are read, because the number of image tokens depends on an image's size.

    Args:
        rows (`IterableDataset`): data rows of `ROW_FEATURES`.
        processor (`JnanaProcessor`): measures them.
        share (`bool`): whether conversations of a data row share their prefix (`packing: shared_image`).
        max_row_tokens (`int`): tokens a row may have.
        max_length (`int`, *optional*): conversations are cut to this length.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images can't be used.
        needs_images (`bool`, *optional*, defaults to `False`): as in [`check_rows`].

    Returns:
        `IterableDataset`: one column `groups`. Each data row that can't be used is a packed row by itself, which the
            collator raises for or skips. Reading it raises `BadSampleError` if none of the first rows can be used.
    """
    return rows.map(
        _StreamPacker(processor, share, max_row_tokens, max_length, max_image_pixels, needs_images),
        batched=True,
        batch_size=STREAM_BUFFER,
        remove_columns=list(ROW_FEATURES),
        features=PACKED_FEATURES,
    )


class _StreamPacker:
    """Packs one buffer of rows. A class, so that it can be pickled and sent to dataloader workers."""

    def __init__(
        self,
        processor: JnanaProcessor,
        share: bool,
        max_row_tokens: int,
        max_length: int | None,
        max_image_pixels: int,
        needs_images: bool,
    ):
        self.processor, self.needs_images = processor, needs_images
        self.share, self.max_row_tokens, self.max_length = share, max_row_tokens, max_length
        self.size_of = ImageChecker(processor, "none", max_image_pixels)  # the collator checks the images
        self.found_good = False

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        good, image_sizes, bad, problems = [], [], [], []
        for row in unbatched(batch):
            try:
                check_row(row, self.needs_images)
                image_sizes.append([self.size_of(image, row["source"]) for image in row["images"]])
                good.append(row)
            except BadSampleError as error:
                bad.append(row)
                problems.append(str(error))
        fitting = []
        for row, sizes in zip(good, measure_rows(good, self.processor, image_sizes), strict=True):
            try:
                for size in sizes.conversations:
                    check_size(size, self.max_length, row["source"])
                fitting.append((row, sizes))
            except BadSampleError as error:
                bad.append(row)
                problems.append(str(error))
        self.found_good = self.found_good or bool(fitting)
        if not self.found_good:  # skipping all of them, a run would train on nothing
            raise BadSampleError(f"none of the first {len(bad)} rows of the stream can be used: {problems[0]}")
        plan = plan_rows(
            [sizes.lengths for _, sizes in fitting],
            [sizes.shared for _, sizes in fitting] if self.share else None,
            self.max_row_tokens,
            max_length=self.max_length,
        )
        packed = [[select_conversations(fitting[row][0], chosen) for row, chosen in groups] for groups in plan.rows]
        return {"groups": [*packed, *([row] for row in bad)]}
