"""What a data set holds, before a night is spent on it: sizes, what is supervised, repetitions, leaks."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm.auto import tqdm

from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, CheckReport, load_image, thumbnail
from jnana.processing.data.files import file_stamp
from jnana.processing.data.images import read_image_bytes
from jnana.processing.data.packing import RowPlan
from jnana.processing.data.rows import iterate_rows, message_text

from .report import THUMBNAIL_SIDE, drawn_at_random


BINS = 20  # of a histogram
SAMPLED = 500  # rows that the share of supervised tokens is measured on
FEWEST_IMAGES = 10  # about which the same question must be asked, before equal answers are worth a line
LISTED = 10  # examples of a finding


@dataclass
class Finding:
    """Something that is often a fault of the data.

    Args:
        title (`str`): What it is, with its number.
        examples (`list[str]`): Where, some of them.
    """

    title: str
    examples: list[str] = field(default_factory=list)


@dataclass
class Inspection:
    """
    The figures of one source.

    Args:
        name (`str`): `train` or `eval`; with the name of the source where there are several: `train chat`.
        source (`str`): The source as the recipe names it.
        trains (`bool`): Whether it is a source of the training data.
        report (`CheckReport`): Of its rows.
        rows (`Sequence[dict]`): Those that can be used.
        plan (`RowPlan`, *optional*): How they are packed.
        max_length (`int`, *optional*): Tokens after which a conversation is cut.
        digests (`list[list[str]]`): Of the content of each image of each row, equal for equal files.
        supervised_share (`float`): Of all tokens, measured on a sample; image tokens count.
        findings (`list[Finding]`): What to look at.
    """

    name: str
    source: str
    trains: bool
    report: CheckReport
    rows: Sequence[dict]
    plan: RowPlan | None
    max_length: int | None
    digests: list[list[str]] = field(default_factory=list)
    supervised_share: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @cached_property
    def lengths(self) -> list[int]:
        """`list[int]`: Tokens of each conversation, after cutting."""
        longest = self.max_length or max((length for row in self.report.lengths for length in row), default=0)
        return [min(length, longest) for row in self.report.lengths for length in row]

    @property
    def num_sequences(self) -> int:
        """`int`: Rows that a batch is made of: packed rows, or conversations."""
        return len(self.lengths) if self.plan is None else len(self.plan.rows)

    @property
    def num_tokens(self) -> int:
        """`int`: Tokens of an epoch, without padding."""
        return sum(self.lengths) if self.plan is None else sum(self.plan.sizes)

    def figures(self) -> dict[str, Any]:
        """The numbers, for `inspection.json` and the table."""
        images = Counter(map(len, self.digests))
        lengths = sorted(self.lengths)
        found = {
            "rows": self.report.num_rows,
            "rows_that_cannot_be_used": len(self.report.problems),
            "conversations": len(lengths),
            "conversations_cut_to_max_length": self.report.num_truncated,
            "images_per_row": {str(number): count for number, count in sorted(images.items())},
            "different_images": len({digest for row in self.digests for digest in row}),
            "tokens_of_a_conversation": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
            "supervised_share": self.supervised_share,
            "tokens_of_an_epoch": self.num_tokens,
            "sequences_of_an_epoch": self.num_sequences,
        }
        if self.plan is not None:
            longest = max(self.plan.sizes)
            found["padding_share_at_most"] = 1 - sum(self.plan.sizes) / (longest * len(self.plan.rows))
            found["tokens_without_packing"] = self.plan.num_unpacked
        return found


def inspect_rows(
    name: str,
    source: str,
    trains: bool,
    rows: Sequence[dict],
    report: CheckReport,
    plan: RowPlan | None,
    processor: JnanaProcessor,
    max_length: int | None = None,
) -> Inspection:
    """
    The figures of a source; [`find_repetitions`] compares its images and texts.

    Args:
        name, source, trains: As in [`Inspection`].
        rows (`Sequence[dict]`): The usable rows, of `ROW_FEATURES`, in the order of the report.
        report (`CheckReport`): Of [`check_rows`].
        plan (`RowPlan`, *optional*): Of [`plan_rows`].
        processor (`JnanaProcessor`): Marks the answers.
        max_length (`int`, *optional*): As in [`Inspection`].

    Returns:
        [`Inspection`].
    """
    found = Inspection(name, source, trains, report, rows, plan, max_length)
    found.supervised_share = supervised_share(rows, report, processor, max_length)
    if report.problems:
        found.findings.append(Finding(f"Rows that can't be used: {len(report.problems):,}", report.problems[:LISTED]))
    return found


def find_repetitions(inspections: Sequence[Inspection], progress: bool = True) -> None:
    """
    Compare the images of all sources by content, and add what repeats to their findings.

    Args:
        inspections (`Sequence[Inspection]`): Training and validation data; changed in place.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
    """
    digests = iter(image_digests((row for found in inspections for row in iterate_rows(found.rows)), progress))
    for found in inspections:
        found.digests = [next(digests) for _ in found.rows]
        found.findings += [*repeated_images(found), *repeated_conversations(found), *constant_answers(found)]
    trained = [found for found in inspections if found.trains]
    for found in inspections:
        found.findings += [] if found.trains else shared_images(trained, found)


def supervised_share(
    rows: Sequence[dict], report: CheckReport, processor: JnanaProcessor, max_length: int | None
) -> float:
    """The share of tokens with a label, on a random sample of the rows."""
    labels = tokens = 0
    for index in drawn_at_random(len(rows), SAMPLED):
        whole = report.lengths[index]
        _, masks = processor.encode_chats(rows[index]["conversations"])
        for length, mask in zip(whole, masks, strict=True):
            kept = length if max_length is None else min(length, max_length)
            tokens += kept
            labels += max(0, sum(mask) - (length - kept))  # what is cut is the end of an answer
    return labels / max(tokens, 1)


def image_digests(rows: Iterable[dict], progress: bool = True) -> list[list[str]]:
    """
    A digest of the content of every image, by row. Files of a size that no other file has are not read.

    Args:
        rows (`Iterable[dict]`): Of `ROW_FEATURES`.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
    """
    references: dict[Any, tuple[dict, str]] = {}  # each file once
    keys = []
    for row in rows:
        keys.append([reference_key(image) for image in row["images"]])
        references |= {key: (image, row["source"]) for key, image in zip(keys[-1], row["images"], strict=True)}
    sizes = {key: size_of(image) for key, (image, _) in references.items()}
    numbers = Counter(sizes.values())
    digests = {}
    for key, (image, source) in tqdm(references.items(), desc="Comparing images", disable=not progress):
        if sizes[key] is not None and numbers[sizes[key]] == 1:
            digests[key] = f"size {sizes[key]}"
            continue
        try:
            content = read_image_bytes(image, source=source)
            digests[key] = hashlib.blake2b(content, digest_size=16).hexdigest()
        except BadSampleError:  # with image_check: none nothing has read it before
            digests[key] = f"unreadable {key}"
    return [[digests[key] for key in row] for row in keys]


def reference_key(image: dict) -> Any:
    """Equal for references to one file."""
    return image["path"] if image.get("bytes") is None else hashlib.blake2b(image["bytes"], digest_size=16).digest()


def size_of(image: dict) -> int | None:
    """The size of an image file in bytes, or `None` where it takes a download to know."""
    if image.get("bytes") is not None:
        return len(image["bytes"])
    stamp = file_stamp(image["path"] or "")
    return None if stamp is None else stamp[0]


# ---------------------------------------------------------------------- findings


def repeated_images(inspection: Inspection) -> list[Finding]:
    """Images that several rows have: one file, or equal files."""
    where = defaultdict(list)
    for row, digests in zip(iterate_rows(inspection.rows), inspection.digests, strict=True):
        for digest in set(digests):
            where[digest].append(row["source"])
    repeated = [sources for sources in where.values() if len(sources) > 1]
    if not repeated:
        return []
    examples = [f"{len(sources)} rows: {_few(sources)}" for sources in repeated[:LISTED]]
    return [Finding(f"Images in several rows, and encoded once for each: {len(repeated):,}", examples)]


def repeated_conversations(inspection: Inspection) -> list[Finding]:
    """Conversations with equal texts about equal images."""
    where = defaultdict(list)
    for row, digests in zip(iterate_rows(inspection.rows), inspection.digests, strict=True):
        for chat in row["conversations"]:
            where[json.dumps([digests, chat], sort_keys=True)].append(row["source"])
    repeated = [sources for sources in where.values() if len(sources) > 1]
    if not repeated:
        return []
    examples = [f"{len(sources)} times: {_few(sources)}" for sources in repeated[:LISTED]]
    number = sum(len(sources) - 1 for sources in repeated)
    return [Finding(f"Conversations that repeat another one, with the same images: {number:,}", examples)]


def constant_answers(inspection: Inspection) -> list[Finding]:
    """Questions that get one answer, whatever the image: they can be answered without looking."""
    answers: dict[str, set[str]] = defaultdict(set)
    images: dict[str, set] = defaultdict(set)
    for row, digests in zip(iterate_rows(inspection.rows), inspection.digests, strict=True):
        if not digests:
            continue
        for chat in row["conversations"]:
            for question, answer in zip(chat[:-1], chat[1:], strict=True):
                if (question["role"], answer["role"]) == ("user", "assistant"):
                    text = message_text(question).strip()
                    answers[text].add(message_text(answer).strip())
                    images[text].add(tuple(digests))
    found = [
        f"{question!r}: always {next(iter(given))!r}, for {len(images[question])} images"
        for question, given in answers.items()
        if len(given) == 1 and len(images[question]) >= FEWEST_IMAGES
    ]
    if not found:
        return []
    return [Finding(f"Questions with the same answer for every image: {len(found):,}", found[:LISTED])]


def shared_images(train: Sequence[Inspection], evaluation: Inspection) -> list[Finding]:
    """Validation images that are trained on, by content."""
    trained = defaultdict(list)
    for source in train:
        for row, digests in zip(iterate_rows(source.rows), source.digests, strict=True):
            for digest in digests:
                trained[digest].append(row["source"])
    shared = {}
    for row, digests in zip(iterate_rows(evaluation.rows), evaluation.digests, strict=True):
        for digest in digests:
            if digest in trained:
                shared.setdefault(digest, f"{row['source']} has an image of {trained[digest][0]}")
    if not shared:
        return []
    return [Finding(f"Validation images that are trained on too: {len(shared):,}", list(shared.values())[:LISTED])]


def _few(sources: Iterable[str]) -> str:
    names = list(sources)
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


# ---------------------------------------------------------------------- shown


def labelled_parts(chat: list[dict], processor: JnanaProcessor) -> list[tuple[str, bool]]:
    """
    A conversation as the model reads it, one image token an image.

    Returns:
        `list[tuple[str, bool]]`: Runs of text, and whether their tokens are supervised.
    """
    (ids,), (mask,) = processor.encode_chats([chat])
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    return [(processor.tokenizer.decode([token for token, _ in run]), supervised) for supervised, run in runs]


def histogram(values: Sequence[int]) -> list[dict[str, Any]]:
    """Bars for the page: `label`, `count`, and `share` of the highest bar."""
    counts, edges = np.histogram(values, bins=min(BINS, len(set(values))) or 1)
    top = max(int(counts.max()), 1)
    return [
        {"label": f"{int(np.ceil(low))}-{int(high)}", "count": int(count), "share": int(count) / top}
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def write_inspection(
    path: str | Path, inspections: Sequence[Inspection], processor: JnanaProcessor, title: str, max_examples: int = 50
) -> Path:
    """
    Write the page: figures, findings and a random sample of rows, in one file that needs no network.

    Args:
        path (`str` or `Path`): The HTML file; its directory must exist.
        inspections (`Sequence[Inspection]`): Of one or two sources.
        processor (`JnanaProcessor`): Marks what is supervised.
        title (`str`): Heading.
        max_examples (`int`, *optional*, defaults to 50): Rows shown of each source.

    Returns:
        `Path`: The file.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    page = environment.get_template("inspection.html").render(
        title=title,
        inspections=inspections,
        histograms={found.name: histogram(found.lengths) for found in inspections},
        cards={found.name: _cards(found, processor, max_examples) for found in inspections},
        thumbnail_side=THUMBNAIL_SIDE,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _cards(inspection: Inspection, processor: JnanaProcessor, limit: int) -> list[dict[str, Any]]:
    cards = []
    for index in drawn_at_random(len(inspection.rows), limit):
        row = inspection.rows[index]
        try:
            images = [load_image(image, source=row["source"]) for image in row["images"]]
            pictures = [thumbnail(image, THUMBNAIL_SIDE) for image in images]
        except BadSampleError:  # with image_check: none or header
            pictures = []
        chats = [labelled_parts(chat, processor) for chat in row["conversations"][:6]]
        left = len(row["conversations"]) - len(chats)
        cards.append({"source": row["source"], "images": pictures, "chats": chats, "left": left})
    return cards
