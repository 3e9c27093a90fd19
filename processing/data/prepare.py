"""`prepare`: from a data source to rows for [`JnanaCollator`] - read, check, tokenise, plan, pack.

A map-style data set is checked and tokenised as a whole (`prepared_rows.py`) and packed by a plan of all its rows. A
stream is packed while it is read; its bad rows are found by the collator.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, List

from jnana.processing.processing_jnana import JnanaProcessor

from .checks import (
    CheckReport,
    ImageChecker,
    check_options,
    check_row,
    check_size,
    measure_rows,
    raise_for_problems,
)
from .files import write_table
from .images import MAX_IMAGE_PIXELS
from .mixture import (
    DataSource,
    SourceRows,
    check_mix,
    draws,
    mix,
    mixed_rows,
    plan_mixture,
    shares,
    source_names,
)
from .packing import RowPlan, plan_rows
from .prepared_rows import Prepared, PrepareOptions, RowPreparation, read_source
from .readers import load_rows
from .rows import (
    BadSampleError,
    ConversationOf,
    Origins,
    RowView,
    conversation_index,
    flatten_conversations,
    select_conversations,
    stream_features,
    unbatched,
)
from .streams import endless, mix_streams, shuffled
from .temporary import temporary_directory


logger = logging.getLogger(__name__)

# Rows of a stream that are packed together: enough to fill the packed rows well, few enough to keep in memory.
STREAM_BUFFER = 256


def prepare(
    source: str | Path | Dataset | IterableDataset | Sequence[DataSource],
    processor: JnanaProcessor,
    options: PrepareOptions,
    once: Callable[[Callable[[], "PreparedEpoch"]], "PreparedEpoch"] | None = None,
) -> Dataset | IterableDataset:
    """
    Read, check, render, tokenise and pack a data source, or several.

    Each row of a map-style data set is checked and tokenised once, in worker processes if there are many rows; the
    rows of record files are kept on disk for the next start ([`RowPreparation`]). Rows of a stream are tokenised by
    the collator.

    Args:
        source (`str`, `Path`, `Dataset` or `IterableDataset`): as in [`load_rows`]; or a list of [`DataSource`], of
            which one with all its rows gives what its `data` alone would give.
        processor (`JnanaProcessor`): renders and tokenises; the collator must have the same.
        options (`PrepareOptions`): how.
        once (`Callable`, *optional*): calls a function without arguments and returns its result, which can be pickled.
            With several processes, one that calls it in a single process of each machine, which then hands on files.

    Returns:
        `Dataset` or `IterableDataset`: rows of one conversation, or with `packing` packed rows
            ([`packed_rows`], [`packed_stream`]), for [`JnanaCollator`] with `**options.for_collator`. A `Dataset` has
            a column `length`: the tokens of each row. Rows of several sources have a column `origin`, the name of
            their source, which the collator counts by.

    Raises:
        BadSampleError: if rows can't be used, as [`check_rows`].
        FileNotFoundError, ValueError: as [`load_rows`]; if a conversation is longer than a packed row; if `data_cache`
            can't be written.
    """
    check_options(options.image_check, options.on_bad_sample)
    sources = [DataSource(source)] if isinstance(source, (str, Path, Dataset, IterableDataset)) else list(source)
    check_mix(options.mix)
    if options.streaming or any(isinstance(each.data, IterableDataset) for each in sources):
        streams = [read_source(each.data, each.options(options), load_rows) for each in sources]
        rows = mix_streams(sources, streams, options) if len(sources) > 1 else streams[0]
        if isinstance(rows, IterableDataset):
            if len(sources) == 1:
                rows = endless(rows, source_names(sources)[0], options) if options.endless else shuffled(rows, options)
            return flatten_conversations(rows) if options.packing == "none" else _packed(rows, processor, options)
    epoch = EpochPreparation(sources, processor, options, shared=once is not None)
    return epoch.items(epoch.run() if once is None else once(epoch.run))


@dataclass
class PreparedEpoch:
    """
    The result of an [`EpochPreparation`], as one process sends it to others.

    Args:
        prepared (`list[Prepared]`): of each source.
        index (`Dataset` or `Path`): which conversations each item of the data set has.
    """

    prepared: list[Prepared]
    index: Dataset | Path


class EpochPreparation:
    """
    Prepares the rows of all sources and plans an epoch: [`~EpochPreparation.run`] in one process of each machine, and
    [`~EpochPreparation.items`] with its result in every process.

    Args:
        sources (`list[DataSource]`): that are no streams.
        processor, options: as in [`prepare`].
        shared (`bool`): whether other processes get the result. Tokens and plan are then sent as files of this
            machine, which all of them map: no process holds a copy.
    """

    def __init__(self, sources: list[DataSource], processor: JnanaProcessor, options: PrepareOptions, shared: bool):
        self.sources, self.options, self.shared = sources, options, shared
        self.names = source_names(sources)
        self.preparations = [RowPreparation(each.data, processor, each.options(options)) for each in sources]

    def run(self) -> PreparedEpoch:
        """
        Prepare, draw and plan.

        Raises:
            BadSampleError, FileNotFoundError, ValueError: as [`prepare`].
        """
        options, prepared, parts = self.options, [], []
        for preparation, name in zip(self.preparations, self.names, strict=True):
            prepared.append(preparation.run())
            rows, report = preparation.rows_of(prepared[-1])
            raise_for_problems(report, options.on_bad_sample)
            if not report.lengths:
                raise ValueError(f"{preparation.name} has no rows")
            described = describe_report(report, options.max_length, options.max_length_source)
            logger.info(f"{preparation.name}: {described}")
            parts.append(SourceRows(name, rows, report))
        index = self.index(parts)
        if not self.shared:
            return PreparedEpoch(prepared, index)
        try:
            folder = temporary_directory()
            write_table(index.with_format("arrow")[:], folder / "index.arrow")
            sent = [each.for_others(folder / f"{number}.arrow") for number, each in enumerate(prepared)]
        except OSError as error:
            logger.warning(
                f"the cache of `datasets` can't be written ({error}), so each process holds its own copy of the "
                "tokens; name a directory for it: HF_DATASETS_CACHE=DIR"
            )
            return PreparedEpoch(prepared, index)
        return PreparedEpoch(sent, folder / "index.arrow")

    def index(self, parts: list[SourceRows]) -> Dataset:
        """Which conversations each item has."""
        options, mixture = self.options, mix(self.sources, parts, self.options.seed)
        if len(parts) > 1 or mixture.rows is not parts[0].rows:
            of_sources = shares(mixture, parts, options.max_length)
            logger.info(f"an epoch has {len(mixture.rows):,} rows: {'; '.join(map(str, of_sources))}")
            drawn = [f"{of.rows:,} of {of.usable:,} of {of.name}" for of in of_sources if of.rows < of.usable]
            if drawn and (options.epochs is None or options.epochs > 1):
                logger.info(
                    f"every epoch has the same rows ({', '.join(drawn)}); for others in each pass over the rest, "
                    "train one epoch in which the smaller sources `repeat`"
                )
        if options.packing == "none":
            longest = options.max_length or max(map(max, mixture.lengths))
            return conversation_index([[min(length, longest) for length in row] for row in mixture.lengths])
        plan = plan_mixture(mixture, options)
        logger.info(f"{self.preparations[0].name if len(parts) == 1 else 'all sources'}: {plan}")
        return packed_index(plan)

    def items(self, epoch: PreparedEpoch) -> Dataset:
        """
        The items of the epoch.

        Args:
            epoch (`PreparedEpoch`): what [`~EpochPreparation.run`] gave in one of the processes.
        """
        index = Dataset.from_file(str(epoch.index)) if isinstance(epoch.index, Path) else epoch.index
        tables = [each.rows(one) for each, one in zip(self.preparations, epoch.prepared, strict=True)]
        drawn = draws(self.sources, list(map(len, tables)), self.options.seed)
        counts = [len(rows) if of is None else len(of) for rows, of in zip(tables, drawn, strict=True)]
        origins = Origins(dict(zip(self.names, counts, strict=True))) if len(self.names) > 1 else None
        view = ConversationOf if self.options.packing == "none" else _GroupsOf
        return index.with_transform(view(mixed_rows(tables, drawn), origins))


def _packed(rows: IterableDataset, processor: JnanaProcessor, options: PrepareOptions) -> IterableDataset:
    """A stream packed as the options say."""
    return packed_stream(
        rows,
        processor,
        share=options.packing == "shared_image",
        max_row_tokens=options.max_row_tokens,
        max_length=options.max_length,
        max_image_pixels=options.max_image_pixels,
        needs_images=options.needs_images,
    )


def describe_report(report: CheckReport, max_length: int | None, source: str | None = None) -> str:
    """One line for the log: the numbers of rows and conversations, and their lengths in tokens."""
    lengths = sorted(length for row in report.lengths for length in row)
    text = f"{len(report.lengths):,} of {report.num_rows:,} rows, {len(lengths):,} conversations of "
    text += f"{lengths[0]} to {lengths[-1]} tokens, half of them up to {lengths[len(lengths) // 2]}"
    if report.num_truncated:
        text += f"; {report.num_truncated:,} are cut to max_length {max_length}"
        text += f" ({source})" if source else ""
    if report.kinds:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in Counter(report.kinds).items())
        text += f"; {len(report.kinds):,} rows are left out ({kinds})"
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
    return packed_index(plan).with_transform(_GroupsOf(rows))


def packed_index(plan: RowPlan) -> Dataset:
    """The columns `groups`, as indices of data rows and of their conversations, and `length`, for [`packed_rows`]."""
    groups = [[{"row": row, "conversations": chosen} for row, chosen in groups] for groups in plan.rows]
    return Dataset.from_dict({"groups": groups, "length": plan.sizes})


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
    features = stream_features(rows)
    return rows.map(
        _StreamPacker(processor, share, max_row_tokens, max_length, max_image_pixels, needs_images),
        batched=True,
        batch_size=STREAM_BUFFER,
        remove_columns=list(features),
        features=Features({"groups": List(dict(features))}),
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
