"""Validation samples as prompts: what a model is asked while it trains, and what it should say."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, conversation_rows, load_image, message_text, with_images


logger = logging.getLogger(__name__)


@dataclass
class Sample:
    """A prompt and the text that should follow.

    Args:
        source (`str`): File and record it comes from.
        prompt (`str`): The question, as people read it.
        truth (`str`): The reference answer.
        inputs (`dict[str, torch.Tensor]`): Model inputs of batch size 1, up to where the answer begins.
        images (`list[Image]`): The pictures asked about.
    """

    source: str
    prompt: str
    truth: str
    inputs: dict[str, torch.Tensor]
    images: list[Image] = field(default_factory=list)


def samples_from_rows(rows: Iterable[dict[str, Any]], processor: JnanaProcessor, count: int) -> list[Sample]:
    """The first question of the first `count` rows, packed or not.

    A picture that cannot be decoded is passed over with a warning: validation itself raises or skips, as asked.
    """
    samples: list[Sample] = []
    for row in conversation_rows(rows):
        if len(samples) == count:
            break
        messages = row["conversations"][0]
        answer = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        try:
            images = [load_image(reference, source=row["source"]) for reference in row["images"]]
        except BadSampleError as error:
            logger.warning(f"not among the samples: {error}")
            continue
        inputs = processor.apply_chat_template(
            with_images(messages[:answer], images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        question = " ".join(message_text(message) for message in messages[:answer])
        samples.append(Sample(row["source"], question.strip(), message_text(messages[answer]), dict(inputs), images))
    return samples


def samples_from_blocks(
    blocks: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int
) -> list[Sample]:
    """The first half of the first `count` blocks (or rows' first documents) as prompts, what follows as truth."""
    samples = []
    for number, block in enumerate(islice(blocks, count)):
        ids = torch.as_tensor(block["input_ids"])
        if "position_ids" in block:
            starts = (torch.as_tensor(block["position_ids"]) == 0).nonzero().flatten().tolist()
            ids = ids[: starts[1]] if len(starts) > 1 else ids
        half = len(ids) // 2
        inputs = {"input_ids": ids[None, :half], "attention_mask": torch.ones(1, half, dtype=torch.long)}
        truth = tokenizer.decode(ids[half : half + max_new_tokens])
        samples.append(Sample(f"validation block {number}", tokenizer.decode(ids[:half]), truth, inputs))
    return samples
