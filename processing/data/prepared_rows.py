"""Rows of a map-style data set, ready for the collator: read, checked, rendered and tokenised once.

The rows of record files (JSON, JSON Lines, CSV, image folders) are kept in the data cache (`data_cache.py`), and every
process of a machine maps the same file. Other sources, whose rows often hold the images themselves, are tokenised once
a start; their tokens are in memory.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from jnana.processing.processing_jnana import JnanaProcessor

from .checks import CheckReport, ImageChecker
from .data_cache import (
    CacheEntry,
    ChangedImages,
    DamagedEntry,
    Entry,
    UnwritableCache,
    code_key,
    default_data_cache,
    processor_key,
    source_key,
)
from .encoding import PREPARED_FEATURES, EncodedBlock, RowEncoder, encode_blocks
from .files import read_table, write_table
from .images import MAX_IMAGE_PIXELS
from .keywords import answers_as_keywords
from .progress import Progress, duration
from .readers import METADATA_FILES, read_rows
from .records import RECORD_FILES
from .rows import ROW_FEATURES, TOKEN_FEATURES, BadSampleError, RecordRows, append_bad_samples


logger = logging.getLogger(__name__)

# Smaller files are prepared in a second or two, and kept only where `data_cache` names a directory.
KEPT_BYTES = 1024 * 1024
# What makes a chat template render one chat in two ways: the date, and Jinja's random choices.
CHANGING = re.compile(r"\b(strftime_now|random|lipsum)\b")


@dataclass
class StreamReaders:
    """
    The readers of a stream, of which each gets some of its parts.

    Args:
        process, processes (`int`): the index of this process, and their number.
        workers (`int`): dataloader workers of each; with 0 the process reads itself.
    """

    process: int = 0
    processes: int = 1
    workers: int = 0


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
        data_cache (`str` or `Path`, *optional*): the directory that prepared rows are kept in; by default
            [`default_data_cache`], for files from `KEPT_BYTES` on.
        num_proc (`int`, *optional*): processes that prepare rows; by default one for each core.
        jpeg_draft (`bool`, *optional*, defaults to `False`): as in [`PixelImages`].
        mix (`str`, *optional*, defaults to `"row"`): whether a packed row may have conversations of several sources
            (`row`), or only a batch (`batch`).
        shuffle_buffer (`int`, *optional*, defaults to 0): rows of a stream from which the next one is drawn; 0 keeps
            the order of the files.
        endless (`bool`, *optional*, defaults to `False`): a stream starts over when it ends, shuffled in another order
            each time. A mixture of streams always does.
        readers (`StreamReaders`, *optional*): of a mixture of streams; by default one process.
        epochs (`float`, *optional*): of the run, if it is known. Unless there is one only, the log names the sources
            of which every epoch leaves out the same rows.
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
    data_cache: str | Path | None = None
    num_proc: int | None = None
    jpeg_draft: bool = False
    mix: str = "row"
    shuffle_buffer: int = 0
    endless: bool = False
    readers: StreamReaders = field(default_factory=StreamReaders)
    epochs: float | None = None

    @property
    def for_collator(self) -> dict[str, Any]:
        """The options that [`JnanaCollator`] takes."""
        names: tuple[str, ...] = ("max_length", "needs_images", "on_bad_sample", "bad_samples_file")
        names += ("max_image_pixels", "packing", "jpeg_draft")
        return {name: getattr(self, name) for name in names}


@dataclass
class Prepared:
    """
    The result of a preparation, as one process sends it to others.

    Args:
        report (`CheckReport`): without the lengths, which are in the columns.
        file (`Path`, *optional*): the kept rows, with their tokens.
        columns (`pa.Table` or `Path`, *optional*): where rows are not kept for later starts, those of an
            [`EncodedBlock`] with all rows; or the file that has them for the other processes of the machine.
    """

    report: CheckReport
    file: Path | None = None
    columns: pa.Table | Path | None = None

    def for_others(self, file: Path) -> "Prepared":
        """
        The same without what is in a file, for the other processes of this machine.

        Args:
            file (`Path`): where the columns are written, if they are not in a file yet.
        """
        report = replace(self.report, lengths=[], shared=[])
        if self.file is not None:
            return Prepared(replace(report, kept_indices=[]), self.file)
        write_table(self.columns, file)  # type: ignore[arg-type]  # one of the two is there
        return Prepared(report, columns=file)


class RowPreparation:
    """
    Prepares the rows of one source: [`~RowPreparation.run`] in one process of each machine, and
    [`~RowPreparation.rows_of`] with its result in every process.

    Args:
        source (`str`, `Path` or `Dataset`): as in [`load_rows`].
        processor (`JnanaProcessor`): renders and tokenises.
        options (`PrepareOptions`): how.
        rows (`Dataset`, *optional*): rows of `ROW_FEATURES` that were read from the source already; they are not kept.
    """

    def __init__(
        self,
        source: str | Path | Dataset,
        processor: JnanaProcessor,
        options: PrepareOptions,
        rows: Dataset | None = None,
    ):
        self.source, self.processor, self.options = source, processor, options
        self.name = str(source) if isinstance(source, (str, Path)) else "data set"
        self._read: Any = rows
        self.keeps = rows is None and isinstance(source, (str, Path)) and options.format != "dataset"

    def run(self) -> Prepared:
        """
        Check and tokenise the rows, or find them in the cache. Bad rows are appended to `bad_samples_file`.

        Raises:
            FileNotFoundError, ValueError: as [`load_rows`], and if the cache can't be written.
        """
        files = self.files()
        if files is None:
            prepared = self.in_memory()
        else:
            entry = CacheEntry(Path(self.options.data_cache or default_data_cache()), self.key(files))
            try:
                prepared = self.kept(entry, files)
            except UnwritableCache as error:
                if self.options.data_cache is not None:
                    raise
                logger.warning(f"{error}. These data are prepared at every start until then")
                self._read = None
                prepared = self.in_memory()
        if self.options.bad_samples_file is not None:
            append_bad_samples(self.options.bad_samples_file, prepared.report.problems, prepared.report.kinds)
        return prepared

    def rows_of(self, prepared: Prepared) -> tuple[Dataset, CheckReport]:
        """
        The rows that can be used.

        Args:
            prepared (`Prepared`): what [`~RowPreparation.run`] gave in one of the processes.

        Returns:
            `tuple[Dataset, CheckReport]`: as [`~RowPreparation.rows`], and the report with all lengths.
        """
        rows, report = self._prepared_rows(prepared), prepared.report
        sizes = rows.select_columns(["lengths", "shared"]).with_format("arrow")[:]
        report.lengths, report.shared = sizes.column("lengths").to_pylist(), sizes.column("shared").to_pylist()
        return rows.select_columns(self.columns), report

    def rows(self, prepared: Prepared) -> Dataset:
        """
        The rows that can be used: of `ROW_FEATURES` and `TOKEN_FEATURES`, without the latter where the chat template
        renders a chat differently every day.
        """
        return self._prepared_rows(prepared).select_columns(self.columns)

    @property
    def columns(self) -> list[str]:
        return [*ROW_FEATURES] if self.renders_differently else [*ROW_FEATURES, *TOKEN_FEATURES]

    def _prepared_rows(self, prepared: Prepared) -> Dataset:
        if prepared.file is not None:
            return Dataset.from_file(str(prepared.file))
        table: Any = prepared.columns
        table = read_table(table) if isinstance(table, Path) else table
        if table.column_names != list(PREPARED_FEATURES):
            source = self.read().with_format("arrow")[:]
            columns = [*source.columns, *table.columns]
            table = pa.Table.from_arrays(columns, schema=PREPARED_FEATURES.arrow_schema)
        rows, kept = Dataset(table), prepared.report.kept_indices
        return rows.select(kept) if len(rows) > len(kept) else rows

    # ------------------------------------------------------------------ building

    def read(self) -> Dataset | RecordRows:
        """The rows of the source, opened once."""
        if self._read is None:
            self._read = read_source(self.source, self.options)
        return self._read

    def encoded(self, report: CheckReport, stamps: dict[str, Any]) -> Iterator[EncodedBlock]:
        """All rows, block by block; fills the report, and the stamps of the image files."""
        rows, options = self.read(), self.options
        encoder = RowEncoder(
            rows,
            self.processor,
            max_length=options.max_length,
            image_check=options.image_check,
            max_image_pixels=options.max_image_pixels,
            needs_images=options.needs_images,
        )
        with Progress(len(rows), "Preparing rows", options.progress) as bar:
            for block in encode_blocks(encoder, rows, options.num_proc):
                kept = (n for n in range(block.num_rows) if n not in block.bad)
                report.kept_indices += [report.num_rows + number for number in kept]
                report.problems += [row.problem for row in block.bad.values()]
                report.kinds += [row.kind for row in block.bad.values()]
                report.unreadable += [row.images for row in block.bad.values() if row.images]
                report.num_truncated += block.num_truncated
                report.num_rows += block.num_rows
                stamps |= block.stamps
                bar.update(block.num_rows)
                yield block

    def in_memory(self) -> Prepared:
        report = CheckReport()
        blocks = [block.columns for block in self.encoded(report, {})]
        return Prepared(report, columns=pa.concat_tables(blocks or [PREPARED_FEATURES.arrow_schema.empty_table()]))

    def kept(self, entry: CacheEntry, files: list[Path]) -> Prepared:
        """The rows from the cache, built first if they are not in it."""
        try:
            found = self.entry_of(entry)
        except DamagedEntry:
            found = None
        if found is not None:
            return self.found(found)
        elsewhere = False
        with entry.lock(lambda: logger.info(f"{self.name}: another run prepares these data; waiting for it")):
            try:
                found = self.entry_of(entry)  # another run may have built it
            except DamagedEntry as problem:
                elsewhere = isinstance(problem, ChangedImages)
                logger.warning(f"{self.name}: prepared anew, because in {str(entry.folder)!r} {problem}")
            if found is not None:
                return self.found(found)
            if not isinstance(self.read(), RecordRows):
                return self.in_memory()
            report, stamps = CheckReport(), {}
            schema = PREPARED_FEATURES.arrow_schema
            tables = (block.columns for block in self.encoded(report, stamps))

            def finished() -> dict[str, Any]:
                if json.loads(json.dumps(source_key(files))) != entry.key["files"]:
                    raise ValueError(f"{self.name} changed while it was read; start again when it is whole")
                return _as_json(report)

            file = entry.write(tables, schema, finished, stamps, keep_replaced=elsewhere)
        self._read = None
        logger.info(f"{self.name}: prepared rows are kept in {str(entry.folder)!r}")
        return Prepared(report, file)

    def entry_of(self, entry: CacheEntry) -> Entry | None:
        """
        The entry, if it is there and still says what is true of the images.

        Raises:
            DamagedEntry: as [`CacheEntry.read`], or if images that could not be read can be read now.
        """
        found = entry.read()
        images = ImageChecker(self.processor, self.options.image_check, self.options.max_image_pixels)
        for paths in found.report["unreadable"] if found is not None else []:
            with contextlib.suppress(BadSampleError):
                for path in paths:
                    images({"path": path, "bytes": None}, "")
                raise DamagedEntry(f"image {paths[0]!r} could not be used, and can be now")
        return found

    def found(self, entry: Entry) -> Prepared:
        logger.info(
            f"{self.name}: uses the rows that were prepared {duration(entry.age)} ago and kept in "
            f"{str(entry.rows.parent)!r}"
        )
        return Prepared(_from_json(entry.report), entry.rows)

    # ------------------------------------------------------------------ what is kept

    @property
    def renders_differently(self) -> bool:
        """Whether the chat template may render one chat in two ways: with the date of the day, or a random choice."""
        return CHANGING.search(json_text(self.processor.chat_template)) is not None

    def files(self) -> list[Path] | None:
        """The files that the source consists of; `None` if its rows are not kept."""
        if not self.keeps or self.renders_differently:
            return None
        path = Path(self.source)  # type: ignore[arg-type]  # of a data set nothing is kept
        candidates = [path]
        if path.is_dir():
            folders = (path, path / self.options.split)
            candidates = [folder / name for folder in folders for name in METADATA_FILES]
        files = [file for file in candidates if file.suffix.lower() in RECORD_FILES and file.is_file()]
        if not files or (self.options.data_cache is None and sum(f.stat().st_size for f in files) < KEPT_BYTES):
            return None
        return files

    def key(self, files: list[Path]) -> dict[str, Any]:
        """All that the prepared rows depend on."""
        options, folder = self.options, self.options.image_folder
        names = (
            *("format", "split", "independent_turns", "prompt", "text_column", "needs_images", "max_rows"),
            *("answer_keywords", "max_length", "max_image_pixels", "image_check"),
        )
        return {
            "source": [str(self.source), str(Path(self.source).absolute())],  # type: ignore[arg-type]
            "image_folder": None if folder is None else [str(folder), str(Path(folder).absolute())],
            "files": source_key(files),
            "options": {name: getattr(options, name) for name in names},
            "processor": processor_key(self.processor),
            "code": code_key(),
        }


def read_source(source: Any, options: PrepareOptions, read: Callable[..., Any] = read_rows) -> Any:
    """The rows of a source, as [`read_rows`] or [`load_rows`] gives them with these options."""
    rows = read(
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
    if not options.answer_keywords:
        return rows
    if isinstance(rows, RecordRows):
        return RecordRows(len(rows), map(answers_as_keywords, rows))
    return rows.map(answers_as_keywords)


def json_text(template: Any) -> str:
    """A chat template, or several by their names, as one text."""
    return "\n".join(template.values()) if isinstance(template, dict) else str(template)


def _as_json(report: CheckReport) -> dict[str, Any]:
    problems = list(zip(report.kinds, report.problems, strict=True))
    numbers = {"num_rows": report.num_rows, "num_truncated": report.num_truncated}
    return {**numbers, "problems": problems, "unreadable": report.unreadable}


def _from_json(report: dict[str, Any]) -> CheckReport:
    kinds, problems = [kind for kind, _ in report["problems"]], [problem for _, problem in report["problems"]]
    return CheckReport(
        num_rows=report["num_rows"],
        num_truncated=report["num_truncated"],
        problems=problems,
        kinds=kinds,
        unreadable=report["unreadable"],
    )
