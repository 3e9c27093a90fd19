"""Asks two models the same questions and compares logits and greedy answers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from jnana.evaluation import QuestionSet


MAX_LOGIT_DIFFERENCE = 1e-4  # of an exact export
MIN_SAME_ANSWERS = 0.95  # of a distilled one
COMPARED_LOGITS = 16  # chats whose logits are kept
LAST_LOGITS = 64  # of each chat: what differs in front of them, images too, changes these

QUESTIONS = ("What do you see in this picture?", "How many pieces are there?", "Is it a photograph? Answer yes or no.")
# (height, width) in pixels of the built-in images: square, wide, tall
IMAGE_SIZES = ((336, 336), (240, 320), (400, 300))

# chat, whether logits are kept -> (its last logits `(1, num_positions, vocab_size)`, ids of the greedy answer)
Answering = Callable[[list[dict[str, Any]], bool], tuple[torch.Tensor | None, list[int]]]


class ExportFailedError(ValueError):
    """The exported files do not answer as the model does; nothing was written."""


@dataclass
class Agreement:
    """How far an exported model agrees with the one it was made from.

    Args:
        max_logit_difference (`float`): The largest difference between two logits of the same position and token, over
            the first [`COMPARED_LOGITS`] questions.
        answers (`int`): Questions that both models answered greedily.
        same_answers (`int`): Answers that are equal token for token.
    """

    max_logit_difference: float
    answers: int
    same_answers: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.max_logit_difference:.2g}, "
            f"{self.same_answers} of {self.answers} greedy answers equal"
        )

    def check(self, distilled: bool = False) -> None:
        """
        Raise unless the export is good enough to be kept.

        Args:
            distilled (`bool`): Whether the projector is a fit: then only the answers count.

        Raises:
            ExportFailedError: With what was measured and what is demanded.
        """
        share = self.same_answers / self.answers
        if distilled and share < MIN_SAME_ANSWERS:
            raise ExportFailedError(
                f"nothing was written: {self}, but at least {MIN_SAME_ANSWERS:.0%} of the answers must survive a "
                "distillation; give more images (distill_images) or more steps (distill_steps), or train a projector "
                "of type mlp"
            )
        if not distilled and (self.max_logit_difference > MAX_LOGIT_DIFFERENCE or self.same_answers < self.answers):
            raise ExportFailedError(
                f"nothing was written: {self}, but an exact export differs by at most {MAX_LOGIT_DIFFERENCE:g} and "
                "answers every question alike. Export a checkpoint of 16 bits with --dtype float32; where the logits "
                "agree and the answers do not, its chat template and tokenizer join tokens across messages"
            )


def probe_chats() -> list[list[dict[str, Any]]]:
    """Built-in questions about built-in images of three shapes, and one question without an image."""
    chats: list[list[dict[str, Any]]] = []
    for seed, (height, width) in enumerate(IMAGE_SIZES):
        coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        noise = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        gradient = Image.radial_gradient("L").resize((width, height)).convert("RGB")
        for image in (noise, gradient):
            for question in QUESTIONS:
                content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
                chats.append([{"role": "user", "content": content}])
    return [*chats, [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}]}]]


class ChatsOfQuestions:
    """The questions of a test set as chats that hold their images, which are decoded when they are asked for.

    Args:
        questions (`QuestionSet`): The test set.
    """

    def __init__(self, questions: QuestionSet):
        self.questions = questions

    def __iter__(self):
        for question in self.questions.questions:
            images = self.questions.images(question)
            yield self.questions.messages_with_images(question, images)


def encode(processor: Any, chat: list[dict[str, Any]]) -> Any:
    """The inputs of one chat, up to where the answer begins."""
    return processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def answering(model: nn.Module, processor: Any, reference_processor: Any, max_new_tokens: int) -> Answering:
    """
    How an image-text-to-text model of transformers answers.

    Args:
        model (`PreTrainedModel`): Asked without gradients, in the mode it is in.
        processor (`ProcessorMixin`): Its own one, which encodes what it answers.
        reference_processor (`ProcessorMixin`): The one that encodes the inputs whose logits are compared.
        max_new_tokens (`int`): Longest answer, in tokens.
    """

    @torch.inference_mode()
    def answer(chat: list[dict[str, Any]], with_logits: bool) -> tuple[torch.Tensor | None, list[int]]:
        logits = None
        if with_logits:
            inputs = encode(reference_processor, chat).to(model.device, dtype=model.dtype)
            logits = model(**inputs).logits[:, -LAST_LOGITS:].float().cpu()
        inputs = encode(processor, chat).to(model.device, dtype=model.dtype)
        ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
        return logits, ids[0, inputs["input_ids"].shape[1] :].tolist()

    return answer


def ask(answer: Answering, chats: Iterable[list[dict[str, Any]]]) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits of the first [`COMPARED_LOGITS`] chats, and the greedy answers of all."""
    logits, answers = [], []
    for index, chat in enumerate(chats):
        kept, ids = answer(chat, index < COMPARED_LOGITS)
        answers.append(ids)
        if kept is not None:
            logits.append(kept)
    return logits, answers


def compare(
    before: tuple[list[torch.Tensor], list[list[int]]], after: tuple[list[torch.Tensor], list[list[int]]]
) -> Agreement:
    """
    Compare what two models answered to the same chats.

    Logits of rows that the exported vocabulary has and the model's has not are left out: no answer can hold them.
    """
    difference = 0.0
    for ours, theirs in zip(before[0], after[0], strict=True):
        width = min(ours.shape[-1], theirs.shape[-1])
        distance = (ours[..., :width] - theirs[..., :width]).abs().max().item()
        difference = max(difference, math.inf if math.isnan(distance) else distance)
    same = sum(one == other for one, other in zip(before[1], after[1], strict=True))
    return Agreement(difference, len(before[1]), same)
