"""The one place that builds labels, and where images are decoded: in the dataloader's workers.

Labels come from the chat template's `{% generation %}` blocks and from nowhere else: an answer and its closing token
are supervised; images, questions, separators and padding are never.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .bad_samples import BadSampleError, append_bad_samples
from .chat_encoding_jnana import measure_sequence
from .data_checks import check_row, check_size
from .data_rows import with_images
from .image_loading import MAX_IMAGE_PIXELS, load_image
from .processing_jnana import JnanaProcessor


logger = logging.getLogger(__name__)

IGNORED = -100


class JnanaCollator:
    """
    Rows to a batch of tensors, every conversation of every row a sequence.

    Sequences are padded on the right. One longer than `max_length` loses the end of its answer; if an image or the
    whole answer would be lost, it is a bad sample. The first token of a sequence is never supervised: nothing predicts
    it.

    With `on_bad_sample="skip"` bad rows are left out of their batch and listed in `bad_samples_file`. If a batch has
    no good row, the last good batch's first sequence takes its place, or before any good batch a blank picture of
    which only the closing token is learned: every process has a sequence in every step, and `num_items_in_batch` is
    never 0 (0 would make the loss NaN).

    Args:
        processor (`JnanaProcessor`): renders, tokenises, and prepares images.
        max_length (`int`, *optional*): tokens a sequence may have.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): `raise` or `skip`.
        bad_samples_file (`str` or `Path`, *optional*): JSON Lines file that skipped rows are appended to.
        max_image_pixels (`int`, *optional*, defaults to 67,108,864): larger images are not decoded.
        pad_to_multiple_of (`int`, *optional*): pad the sequence length to a multiple of it.

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
    ):
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"on_bad_sample={on_bad_sample!r} must be 'raise' or 'skip'.")
        self.processor = processor
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.bad_samples_file = bad_samples_file
        self.max_image_pixels = max_image_pixels
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_bad_samples = 0
        self._last_good: tuple[list[dict], str] | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`list[dict]`): rows of `ROW_FEATURES`; other columns are ignored.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` `(batch_size, sequence_length)`, and
            if there are images `pixel_values` `(num_images, channels, height, width)`, in reading order over the
            batch.

        Raises:
            BadSampleError: with `on_bad_sample="raise"`, for the first row that can't be used.
        """
        chats: list[tuple[list[dict], str]] = []
        problems: list[str] = []
        for row in rows:
            try:
                chats += self._chats_of(row)
            except BadSampleError as error:
                self._judge(error, problems)
        batch = self._tokenize(chats, problems)
        if problems:
            self.num_bad_samples += len(problems)
            logger.warning("Left out %d bad sample(s): %s", len(problems), "; ".join(problems))
            if self.bad_samples_file is not None:
                append_bad_samples(self.bad_samples_file, problems)
        return self._pad(batch if batch["input_ids"] else self._tokenize([self._substitute()], []))

    def _judge(self, error: BadSampleError, problems: list[str]) -> None:
        if self.on_bad_sample == "raise":
            raise error
        problems.append(str(error))

    def _chats_of(self, row: dict) -> list[tuple[list[dict], str]]:
        """A row's conversations with their decoded images, each with the row's source."""
        check_row(row)
        source = row["source"]
        images = [load_image(image, source=source, max_image_pixels=self.max_image_pixels) for image in row["images"]]
        return [(with_images(chat, images), source) for chat in row["conversations"]]

    def _tokenize(self, chats: list[tuple[list[dict], str]], problems: list[str]) -> dict[str, Any]:
        """One call of the processor for the batch; sequences that do not fit are taken out of it."""
        if not chats:
            return {"input_ids": []}
        encoded = self.processor.apply_chat_template(
            [chat for chat, _ in chats],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": False, "images_kwargs": {"return_tensors": "pt"}},
        )
        kept, keep_image = [], []
        for index, (chat, source) in enumerate(chats):
            ids, mask = encoded["input_ids"][index], encoded["assistant_masks"][index]
            try:
                check_size(*measure_sequence(ids, mask, self.processor.image_token_id), self.max_length, source)
                kept.append(index)
            except BadSampleError as error:
                self._judge(error, problems)
            num_images = sum(part["type"] == "image" for message in chat for part in message["content"])
            keep_image += [index in kept[-1:]] * num_images
        batch: dict[str, Any] = {
            "input_ids": [encoded["input_ids"][index][: self.max_length] for index in kept],
            "masks": [encoded["assistant_masks"][index][: self.max_length] for index in kept],
        }
        if any(keep_image):
            pixel_values = encoded["pixel_values"]
            batch["pixel_values"] = pixel_values if all(keep_image) else pixel_values[torch.tensor(keep_image)]
        if kept:
            self._last_good = chats[kept[0]]
        return batch

    def _pad(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Lists to tensors, padded on the right; labels from the answer mask."""
        width = max(len(ids) for ids in batch["input_ids"])
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(batch["input_ids"]), width)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["masks"], strict=True)):
            tokens = torch.tensor(ids)
            input_ids[row, : len(ids)] = tokens
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = torch.where(torch.tensor(mask, dtype=torch.bool), tokens, IGNORED)
        labels[:, 0] = IGNORED
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if "pixel_values" in batch:
            tensors["pixel_values"] = batch["pixel_values"]
        return tensors

    def _substitute(self) -> tuple[list[dict], str]:
        """What stands in for a batch without a good row."""
        if self._last_good is not None:
            return self._last_good
        blank = {"type": "image", "image": Image.new("RGB", (32, 32), "grey")}
        chat = [
            {"role": "user", "content": [blank]},
            {"role": "assistant", "content": [{"type": "text", "text": ""}]},
        ]
        return chat, "substitute for a batch without a good row"
