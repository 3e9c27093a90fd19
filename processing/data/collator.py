"""The one place that turns rows into batches; labels are built in `packing.py`, images opened in `images.py`.

Labels come from the chat template's `{% generation %}` blocks and from nowhere else: an answer and its closing token
are supervised; images, questions, separators and padding are never.
"""

import logging
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from jnana.processing.chat_encoding_jnana import measure_sequence
from jnana.processing.processing_jnana import JnanaProcessor

from .checks import check_row, check_size
from .feature_cache import FeatureCache
from .images import MAX_IMAGE_PIXELS, PixelImages
from .packing import PACKINGS, EncodedConversation, pack_row, stack_rows
from .rows import BadSampleError, append_bad_samples


logger = logging.getLogger(__name__)

# A row of a batch: groups of conversations, those of a group about the same images
Groups = list[list[EncodedConversation]]


@dataclass
class _Images:
    """The images of a batch, each once: what was loaded, and its number by what names it."""

    loaded: list[Any] = field(default_factory=list)
    numbers: dict[Hashable, int] = field(default_factory=dict)


class JnanaCollator:
    """
    Rows to a batch of tensors.

    With `packing="none"` every conversation of every row is a sequence of its own. With `rows` and `shared_image`
    several make one long row in which none sees another: an item as [`packed_rows`] plans it is one row of the batch
    (and so is a single row of a data set). `shared_image` lays out the conversations of an item's every data row as a
    tree, their common beginning (the image) once. An image of the batch is opened and encoded once, wherever it is
    shown.

    Sequences are padded on the right. A conversation longer than `max_length` loses the end of its answer; if an image
    or the whole answer would be lost, it is a bad sample. The first token of a sequence is never supervised: nothing
    predicts it.

    With `on_bad_sample="skip"` bad rows are left out of their batch and listed in `bad_samples_file`. If a batch has
    no good row, the last good batch's first conversation takes its place, or before any good batch a blank picture of
    which only the closing token is learned: every process has a sequence in every step, and `num_items_in_batch` is
    never 0 (0 would make the loss NaN).

    Args:
        processor (`JnanaProcessor`): renders, tokenises, and prepares images.
        max_length (`int`, *optional*): tokens a conversation may have.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `raise` or `skip`.
        bad_samples_file (`str` or `Path`, *optional*): JSON Lines file that skipped rows are appended to.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images are not decoded.
        pad_to_multiple_of (`int`, *optional*): pad the sequence length to a multiple of it.
        packing (`str`, *optional*, defaults to `"none"`): `none`, `rows` or `shared_image`.
        images (`PixelImages` or `FeatureCache`, *optional*): turns references to images into model inputs; by default
            into `pixel_values`.

    Attributes:
        num_bad_samples (`int`): rows this copy left out. Dataloader workers have copies of their own: count the file's
            lines.
    """

    def __init__(
        self,
        processor: JnanaProcessor,
        max_length: int | None = None,
        on_bad_sample: str = "raise",
        bad_samples_file: str | Path | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        pad_to_multiple_of: int | None = None,
        packing: str = "none",
        images: PixelImages | FeatureCache | None = None,
    ):
        for name, value, known in (
            ("on_bad_sample", on_bad_sample, ("raise", "skip")),
            ("packing", packing, PACKINGS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")
        self.processor = processor
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.bad_samples_file = bad_samples_file
        self.pad_to_multiple_of = pad_to_multiple_of
        self.packing = packing
        self.images = PixelImages(processor, max_image_pixels) if images is None else images
        self.num_bad_samples = 0
        self._last_good: tuple[EncodedConversation, list[Any]] | None = None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            items (`list[dict]`): rows of `ROW_FEATURES` (other columns are ignored), or planned rows: `{"trees": rows
                of ROW_FEATURES}`.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `labels` and the bool `logits_to_keep` (the places that predict a
            label), all `(batch_size, sequence_length)`; with `none` `attention_mask`, else `position_ids`,
            `segment_ids`, `branch_ids` and `shift_labels`, of the same shape. If there are images, what `images`
            makes of them (`pixel_values` `(num_images, channels, height, width)`), each once in the order of its first
            place, and `image_indices` `(num_image_places,)`, the image that each place of the batch shows in reading
            order (left out with `none` if each is shown once).

        Raises:
            BadSampleError: with `on_bad_sample="raise"`, for the first row that can't be used.
        """
        problems: list[str] = []
        images = _Images()
        rows: list[Groups] = self._encode([item.get("trees") or [item] for item in items], images, problems)
        if problems:
            self.num_bad_samples += len(problems)
            logger.warning("Left out %d bad sample(s): %s", len(problems), "; ".join(problems))
            if self.bad_samples_file is not None:
                append_bad_samples(self.bad_samples_file, problems)
        if rows:
            good = rows[0][0][0]
            kept = [images.loaded[number] for number in good.images]
            self._last_good = EncodedConversation(good.ids, good.mask, list(range(len(kept)))), kept
        else:
            conversation, images.loaded = self._last_good or self._blank()
            rows = [[[conversation]]]
        return self._stack(rows, images)

    def _judge(self, error: BadSampleError, problems: list[str]) -> None:
        if self.on_bad_sample == "raise":
            raise error
        problems.append(str(error))

    def _encode(self, items: list[list[dict]], images: _Images, problems: list[str]) -> list[Groups]:
        """Rows of the batch as token ids; what can't be used, and what is then left empty, is taken out."""
        found: list[list[tuple[dict, list[int]]]] = []  # for each item its good rows with the numbers of their images
        for item in items:
            found.append([])
            for row in item:
                try:
                    check_row(row)
                    found[-1].append((row, [self._number(image, row["source"], images) for image in row["images"]]))
                except BadSampleError as error:
                    self._judge(error, problems)
        chats = [chat for item in found for row, _ in item for chat in row["conversations"]]
        encoded = zip(*self.processor.encode_chats(chats, expand=True), strict=True) if chats else iter(())
        rows: list[Groups] = []
        for good in found:
            groups: Groups = []
            for row, numbers in good:
                group = [self._fit(*next(encoded), numbers, row, problems) for _ in row["conversations"]]
                groups.append([conversation for conversation in group if conversation is not None])
            if any(groups):
                rows.append([group for group in groups if group])
        return rows

    def _number(self, image: Any, source: str, images: _Images) -> int:
        """The number of an image in this batch; it is opened when it is met first."""
        key = self.images.key(image)
        if key not in images.numbers:
            images.loaded.append(self.images.load(image, source))
            images.numbers[key] = len(images.loaded) - 1
        return images.numbers[key]

    def _fit(
        self, ids: list[int], mask: list[int], numbers: list[int], row: dict, problems: list[str]
    ) -> EncodedConversation | None:
        """A conversation cut to `max_length`; `None` if it can't be cut."""
        image_token_id = self.processor.image_token_id
        try:
            check_size(*measure_sequence(ids, mask, image_token_id), self.max_length, row["source"])
        except BadSampleError as error:
            self._judge(error, problems)
            return None
        numbers = numbers if image_token_id in ids else []
        return EncodedConversation(ids[: self.max_length], mask[: self.max_length], numbers)

    def _stack(self, rows: list[Groups], images: _Images) -> dict[str, torch.Tensor]:
        """Rows and their images to tensors."""
        if self.packing == "none":
            rows = [[[conversation]] for groups in rows for group in groups for conversation in group]
        image_token_id, size = self.processor.image_token_id, self.processor.tokens_per_image
        packed = [pack_row(groups, image_token_id, size, self.packing == "shared_image") for groups in rows]
        batch = stack_rows(packed, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of)
        if self.packing == "none":
            batch["attention_mask"] = (batch["segment_ids"] >= 0).long()
            for name in ("position_ids", "segment_ids", "branch_ids", "shift_labels"):
                del batch[name]
        shown = [number for row in packed for number in row.images]
        order = list(dict.fromkeys(shown))  # images of rows that were left out are not among them
        batch |= self.images.stack([images.loaded[number] for number in order])
        if shown and (self.packing != "none" or len(order) < len(shown)):
            batch["image_indices"] = torch.tensor([order.index(number) for number in shown])
        return batch

    def _blank(self) -> tuple[EncodedConversation, list[Any]]:
        """What stands in for a batch without a good row, before there was any."""
        image = {"type": "image", "text": None}
        chat = [
            {"role": "user", "content": [image]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
        ]
        (ids,), (mask,) = self.processor.encode_chats([chat], expand=True)
        return EncodedConversation(ids, mask, [0]), [self.images.blank()]
