"""`JnanaCollator`: turns rows into batches of tensors.

Labels come from the chat template's `{% generation %}` blocks only: an answer and its closing token are supervised;
images, questions, separators and padding never are. `packing.py` builds the labels, `images.py` loads the images.
"""

import itertools
import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jnana.modeling.packed_layout_jnana import PackedLayout
from jnana.processing.processing_jnana import JnanaProcessor

from .checks import check_row, check_size, has_images
from .counting import CountedBatch, count_rows
from .feature_cache import FeatureCache
from .images import MAX_IMAGE_PIXELS
from .packing import PACKINGS, EncodedConversation, expand_images, measure_conversation, pack_row, stack_rows
from .pixels import PixelImages
from .rows import IMAGE_PART, ORIGIN, BadSampleError, append_bad_samples, message, text_part


logger = logging.getLogger(__name__)

# One row of a batch: groups of conversations; those of a group are about the same images
Groups = list[list[EncodedConversation]]

BLANK_SIZE = (32, 32)  # (height, width) in pixels of the grey image


@dataclass
class _Images:
    """The images of a batch, each once: the loaded images, and the index of each by its key."""

    loaded: list[Any] = field(default_factory=list)
    indices: dict[Hashable, int] = field(default_factory=dict)


class JnanaCollator:
    """
    Turns rows into a batch of tensors.

    With `packing="none"` every conversation of every row is a sequence. With `rows` and `shared_image` several
    conversations make one long row, in which none attends to another: each packed row of [`packed_rows`] is one row of
    the batch, and so is each single row of a data set. `shared_image` lays out the conversations of each data row as
    prefix and branches, so that their image is encoded once. An image that occurs several times in a batch is loaded
    and encoded once.

    Sequences are padded on the right. A conversation longer than `max_length` loses the end of its answer. If that
    would remove an image or the whole answer, the row is a bad sample. The first token of a sequence is never
    supervised, because no token predicts it.

    With `on_bad_sample="skip"` bad rows are removed from their batch and listed in `bad_samples_file`. A batch without
    a good row repeats the first conversation of the last good batch, or, before any good batch, a grey image of which
    only the closing token is supervised. So every process has a sequence in every step and `num_items_in_batch` is
    never 0, which would make the loss NaN.

    Args:
        processor (`JnanaProcessor`): renders and tokenises rows that are not tokenised yet, and prepares images.
        max_length (`int`, *optional*): tokens a conversation may have.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `raise` or `skip`.
        bad_samples_file (`str` or `Path`, *optional*): JSON Lines file that skipped rows are appended to.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images are not decoded.
        pad_to_multiple_of (`int`, *optional*): pad the sequence length to a multiple of it.
        packing (`str`, *optional*, defaults to `"none"`): `none`, `rows` or `shared_image`.
        images (`PixelImages` or `FeatureCache`, *optional*): loads images as model inputs; by default `PixelImages`,
            as `pixel_values`.
        needs_images (`bool`, *optional*, defaults to `False`): whether a conversation without an image can't be used.
        normalize_on_device (`bool`, *optional*, defaults to `False`): leave `pixel_values` as bytes, which the model
            of this version normalises: a quarter of the memory in the dataloader's queue, and nothing to compute in
            its workers. The training scripts set it. For other models, also for the code in an older checkpoint,
            leave it out.
        jpeg_draft (`bool`, *optional*, defaults to `False`): as in [`PixelImages`].
        sources (`Sequence[str]`, *optional*): the names of the sources of a mixture, which batches are counted by.

    Attributes:
        num_bad_samples (`int`): rows that this object skipped. Each dataloader worker has a copy of the collator, so
            the lines of `bad_samples_file` give the total.
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
        needs_images: bool = False,
        normalize_on_device: bool = False,
        jpeg_draft: bool = False,
        sources: Sequence[str] = (),
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
        self.needs_images = needs_images
        if images is None:
            images = PixelImages(processor, max_image_pixels, normalize_on_device, jpeg_draft)
        self.images = images
        self.sources = tuple(sources)
        self.num_bad_samples = 0
        self._checked_processor = False
        self._last_good: tuple[EncodedConversation, list[Any]] | None = None

    def __call__(self, items: list[dict]) -> CountedBatch:
        """
        Args:
            items (`list[dict]`): rows of `ROW_FEATURES`, or packed rows: `{"groups": rows of ROW_FEATURES}`. Rows that
                [`prepare`] has tokenised have `TOKEN_FEATURES` beside these; other columns are ignored.

        Returns:
            [`CountedBatch`], a `dict[str, Any]` of the arguments of the model's `forward`, with the batch's counts.

            - `input_ids` and `labels` `(batch_size, sequence_length)`; with `none` also `attention_mask`, otherwise
              `position_ids`, `segment_ids`, `branch_ids` and `shift_labels`, of the same shape, and
              `packed_layout`, the [`PackedLayout`] that they describe, which moves to a device like a tensor.
            - `logit_positions` `(num_labels,)` and `image_positions` `(num_image_tokens,)`: the positions that predict
              a label, and those of image tokens, as indices into the rows laid end to end; `max_row_image_tokens`
              (`int`). So that the model counts nothing on a GPU, which would have to wait.
            - `skip_logits` (`True`): training needs no logits.
            - if there are images, what `images` gives, each image once in the order of its first occurrence:
              `pixel_values` `(num_views, channels, height, width)` (with `normalize_on_device` as bytes, beside
              `pixel_table` `(channels, 256)`) or `image_features`, and where images are cut into tiles
              `image_sizes`, a list of (height, width). Also `image_indices` `(num_occurrences,)`, the index of
              the image at each occurrence in reading order (not with `none` if each image occurs once); a list where
              images are cut into tiles.

        Raises:
            BadSampleError: with `on_bad_sample="raise"`, for the first row that can't be used.
            ValueError: if the rows were tokenised by another processor.
        """
        problems: list[str] = []
        images = _Images()
        rows: list[Groups] = self._encode([item.get("groups") or [item] for item in items], images, problems)
        if problems:
            self.num_bad_samples += len(problems)
            logger.warning("Skipped %d bad sample(s): %s", len(problems), "; ".join(problems))
            if self.bad_samples_file is not None:
                append_bad_samples(self.bad_samples_file, problems)
        if rows:
            good = rows[0][0][0]
            kept = [images.loaded[index] for index in good.images]
            self._last_good = replace(good, images=list(range(len(kept)))), kept
        else:
            conversation, images.loaded = self._last_good or self._blank()
            rows = [[[conversation]]]
        return self._stack(rows, images)

    def _handle(self, error: BadSampleError, problems: list[str]) -> None:
        """Raise the error, or list it in `problems` if bad samples are skipped."""
        if self.on_bad_sample == "raise":
            raise error
        problems.append(str(error))

    def _encode(self, items: list[list[dict]], images: _Images, problems: list[str]) -> list[Groups]:
        """The rows of the batch as token ids, without bad rows and without rows that bad rows leave empty."""
        usable: list[list[tuple[dict, list[int]]]] = []  # for each item its good rows with the indices of their images
        for item in items:
            usable.append([])
            for row in item:
                try:
                    if self.needs_images or "token_ids" not in row:
                        check_row(row, self.needs_images)
                    usable[-1].append((row, [self._load(image, row["source"], images) for image in row["images"]]))
                except BadSampleError as error:
                    self._handle(error, problems)
        encoded = self._tokens([row for item in usable for row, _ in item])
        rows: list[Groups] = []
        for good in usable:
            groups: Groups = []
            for row, indices in good:
                group = []
                for chat in row["conversations"]:
                    ids, mask = next(encoded)
                    of_chat = indices if has_images(chat) else []
                    conversation = self._fit(ids, mask, of_chat, images, row, problems)
                    group += [conversation] if conversation is not None else []
                groups.append(group)
            if any(groups):
                rows.append([group for group in groups if group])
        return rows

    def _tokens(self, rows: list[dict]) -> Iterator[tuple[list[int], list[int]]]:
        """Token ids and answer mask of each conversation: those of the row, if [`prepare`] has made them."""
        raw = [chat for row in rows if "token_ids" not in row for chat in row["conversations"]]
        encoded = zip(*self.processor.encode_chats(raw), strict=True) if raw else iter(())
        for row in rows:
            if "token_ids" in row:
                self._check_same_processor(row)
                yield from zip(row["token_ids"], row["answer_mask"], strict=True)
            else:
                yield from itertools.islice(encoded, len(row["conversations"]))

    def _check_same_processor(self, row: dict) -> None:
        """Compare the tokens of the first prepared row with those that this processor gives."""
        if self._checked_processor:
            return
        (ids,), (mask,) = self.processor.encode_chats(row["conversations"][:1])
        if (ids, mask) != (row["token_ids"][0], row["answer_mask"][0]):
            raise ValueError(
                f"{row['source']}: was tokenised by another processor, or with another chat template. Prepare the "
                "data with the processor that the collator has."
            )
        self._checked_processor = True

    def _load(self, image: Any, source: str, images: _Images) -> int:
        """The index of an image in this batch. An image is loaded at its first occurrence."""
        key = self.images.key(image)
        if key not in images.indices:
            images.loaded.append(self.images.load(image, source))
            images.indices[key] = len(images.loaded) - 1
        return images.indices[key]

    def _count_tokens(self, image: Any) -> int:
        """The number of image tokens of a loaded image."""
        return self.processor.count_image_tokens(self.images.size(image))

    def _fit(
        self, ids: list[int], mask: list[int], indices: list[int], images: _Images, row: dict, problems: list[str]
    ) -> EncodedConversation | None:
        """A conversation with all image tokens, cut to `max_length`, or `None` if it can't be cut."""
        image_token_id = self.processor.image_token_id
        counts = [self._count_tokens(images.loaded[index]) for index in indices]
        try:
            size = measure_conversation(ids, mask, image_token_id, counts, row["source"])
            check_size(size, self.max_length, row["source"])
        except BadSampleError as error:
            self._handle(error, problems)
            return None
        ids, mask = expand_images(ids, mask, image_token_id, counts)
        return EncodedConversation(ids[: self.max_length], mask[: self.max_length], indices, counts, row.get(ORIGIN))

    def _stack(self, rows: list[Groups], images: _Images) -> CountedBatch:
        """Rows and their images as arguments of the model."""
        if self.packing == "none":
            rows = [[[conversation]] for groups in rows for group in groups for conversation in group]
        image_token_id, share = self.processor.image_token_id, self.packing == "shared_image"
        packed = [pack_row(groups, image_token_id, share) for groups in rows]
        batch: dict[str, Any] = stack_rows(packed, self.processor.tokenizer.pad_token_id, self.pad_to_multiple_of)
        if self.packing == "none":
            batch["attention_mask"] = (batch["segment_ids"] >= 0).long()
            for name in ("position_ids", "segment_ids", "branch_ids", "shift_labels"):
                del batch[name]
        else:
            ids = (batch["segment_ids"], batch["branch_ids"], batch["position_ids"])
            batch["packed_layout"] = PackedLayout.from_ids(*ids)
        occurrences = [index for row in packed for index in row.images]
        order = list(dict.fromkeys(occurrences))  # without the images of skipped rows
        batch |= self._find_images(batch["input_ids"], [images.loaded[index] for index in occurrences])
        batch |= self.images.stack([images.loaded[index] for index in order])
        if occurrences and (self.packing != "none" or len(order) < len(occurrences)):
            indices = [order.index(index) for index in occurrences]
            # Images of several numbers of vectors are selected by numbers that must be known without a GPU.
            batch["image_indices"] = indices if "image_sizes" in batch else torch.tensor(indices)
        conversations = sum(len(group) for groups in rows for group in groups)
        return CountedBatch(batch | {"skip_logits": True}, count_rows(packed, conversations, batch, self.sources))

    def _find_images(self, input_ids: torch.Tensor, shown: list[Any]) -> dict[str, Any]:
        """
        The positions of image tokens, compared with the images here, so that the model need not count on a GPU.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the rows.
            shown (`list`): the loaded image of each occurrence, in reading order.

        Raises:
            RuntimeError: if their numbers differ, which is an error of this class.
        """
        is_image = input_ids == self.processor.image_token_id
        positions = is_image.flatten().nonzero()[:, 0]
        expected = sum(self._count_tokens(image) for image in shown)
        if len(positions) != expected:
            raise RuntimeError(f"A batch has {len(positions)} image tokens, but its images take {expected}.")
        return {"image_positions": positions, "max_row_image_tokens": int(is_image.sum(1).max())}

    def _blank(self) -> tuple[EncodedConversation, list[Any]]:
        """A conversation with a grey image and an empty answer, and that image."""
        image = self.images.blank(BLANK_SIZE, self.processor.count_views(BLANK_SIZE))
        counts = [self._count_tokens(image)]
        chat = [message("user", IMAGE_PART), message("assistant", text_part(""))]
        (ids,), (mask,) = self.processor.encode_chats([chat])
        ids, mask = expand_images(ids, mask, self.processor.image_token_id, counts)
        return EncodedConversation(ids, mask, [0], counts), [image]
