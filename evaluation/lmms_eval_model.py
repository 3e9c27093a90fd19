"""lmms-eval asks a Jnana checkpoint: the model `jnana` of https://github.com/EvolvingLMMs-Lab/lmms-eval.

    python -m lmms_eval --model jnana --model_args pretrained=outputs/sft --tasks pope,mme --batch_size 16
    accelerate launch --num_processes 4 -m lmms_eval --model jnana --model_args pretrained=... --tasks pope

lmms-eval finds it by the entry point `lmms_eval.models` of this package (setup.cfg), so nothing has to be registered.
It reads the data, writes the questions and scores the answers; this module asks them as run_evaluate does: in batches
of similar length, the images of several questions read once. It is imported by lmms-eval only.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm.auto import tqdm

from jnana.modeling import available_device
from jnana.processing.data import image_size, load_image
from jnana.processing.data.rows import bad_sample
from jnana.training.loading import load_model

from .generation import generate_answers
from .questions import Question, QuestionSet


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval: the name of the model and the path of its class."""
    return ModelManifest("jnana", chat_class_path=f"{__name__}.{JnanaLmms.__name__}")


class JnanaLmms(lmms):
    """
    A Jnana checkpoint, or a published LLaVA or IDEFICS one, as a chat model of lmms-eval.

    Args:
        pretrained (`str`): Directory or Hub id, as [`jnana.load_model`] takes it.
        batch_size (`int` or `str`, *optional*, defaults to 1): Questions of a `generate` call.
        device (`str`, *optional*): By default that of the process.
        dtype (`str`, *optional*): `float32`, `bfloat16` or `float16`; by default the checkpoint's.
        quantization, attn_implementation, trust_remote_code: As in [`jnana.load_model`].
        share_prefix (`bool`, *optional*, defaults to `True`): Read the images of several questions once.
        max_batch_size: Ignored: lmms-eval gives it to every model.

    Raises:
        ValueError: If `model_args` has another name, or `batch_size` is not a number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        share_prefix: bool = True,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if pretrained is None:
            raise ValueError("model_args has no pretrained; give --model_args pretrained=DIRECTORY")
        if unknown:
            raise ValueError(
                f"model_args has {', '.join(sorted(unknown))}, which jnana does not take; it takes pretrained, dtype, "
                "quantization, attn_implementation, trust_remote_code and share_prefix"
            )
        if not str(batch_size).isdecimal():
            raise ValueError(f"batch_size is {batch_size!r}; give a number, as in --batch_size 16")
        self.accelerator = Accelerator(cpu=available_device().type == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device or self.accelerator.device)
        loading: dict[str, Any] = {"trust_remote_code": trust_remote_code, "quantization": quantization}
        if attn_implementation is not None:
            loading["attn_implementation"] = attn_implementation
        # loaded straight onto its device, because a quantised model cannot be moved afterwards
        self.model, self.processor = load_model(
            pretrained, dtype=None if dtype == "auto" else dtype, device_map={"": self.device}, **loading
        )
        self.batch_size = int(batch_size)
        self.share_prefix = share_prefix

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        Answer requests.

        Args:
            requests (`list[Instance]`): With `args` `(context, doc_to_messages, generation kwargs, number of the
                document, task, split)`.

        Returns:
            `list[GenerationResult]`: The answers and their numbers of tokens, in the order of the requests.

        Raises:
            ValueError: If a document holds a video or a recording.
            BadSampleError: If an image can't be read. Raised before the first question is asked.
        """
        arguments = [request.args for request in requests]
        hidden = self.rank != 0
        questions = RequestedQuestions(arguments, self.task_dict, self.share_prefix, progress_bar=not hidden)
        alike: dict[str, list[int]] = {}
        for number, given in enumerate(arguments):
            alike.setdefault(json.dumps(given[2], sort_keys=True, default=str), []).append(number)
        results: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="jnana", disable=hidden)
        for numbers in alike.values():
            settings = arguments[numbers[0]][2]
            max_new_tokens, decoding = read_settings(settings)
            answers = generate_answers(
                self.model,
                self.processor,
                questions,
                numbers,
                batch_size=self.batch_size,
                max_new_tokens=max_new_tokens,
                share_prefix=self.share_prefix,
                decoding=decoding,
            )
            with closing(answers):
                for batch in answers:
                    for number, answer in batch.items():
                        if answer.error is not None:
                            raise ValueError(answer.error)
                        text = cut_off(answer.text or "", settings.get("until"))
                        results[number] = GenerationResult(text, TokenCounts(output_tokens=answer.num_tokens))
                        self.cache_hook.add_partial("generate_until", (arguments[number][0], settings), text)
                    bar.update(len(batch))
        bar.close()
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("jnana answers single questions; leave out tasks of several rounds")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("jnana writes answers; lmms-eval asks chat models for no likelihoods")


class RequestedQuestions(QuestionSet):
    """
    The chats of requests as questions. Every document is read at once, and again when its images are needed, so that
    only text, sizes and digests stay in memory.

    Args:
        arguments (`Sequence[tuple]`): The `args` of each request, as in [`~JnanaLmms.generate_until`].
        task_dict (`dict`): Task -> split -> documents.
        share_prefix (`bool`): Compute the digests that tell which questions are about the same images.
        progress_bar (`bool`): Show how many documents are read.

    Raises:
        ValueError: If a document holds a video or a recording.
        BadSampleError: If an image can't be read.
    """

    def __init__(
        self,
        arguments: Sequence[tuple],
        task_dict: dict[str, Any],
        share_prefix: bool = True,
        progress_bar: bool = False,
    ):
        self._arguments, self._task_dict = arguments, task_dict
        self._sizes: list[list[tuple[int, int]]] = []
        self.questions: list[Question] = []
        for number in tqdm(range(len(arguments)), desc="jnana reads", disable=not progress_bar):
            source, chat = self._document(number)
            messages = [{"role": message["role"], "content": _parts(message, source)} for message in chat]
            question = Question(source, number, messages, references=[], category=None)
            images = _read_images(chat, source)
            if share_prefix:
                question.image_key = " ".join(map(_digest, images))
            self._sizes.append([image_size(image) for image in images])
            self.questions.append(question)

    def _document(self, number: int) -> tuple[str, list[dict[str, Any]]]:
        """Its name for messages, and its chat as the task makes it."""
        _, doc_to_messages, _, doc_id, task, split = self._arguments[number]
        return f"{task}, {split} {doc_id}", doc_to_messages(self._task_dict[task][split][doc_id])

    def images(self, question: Question, blind: bool = False, **limits: Any) -> list[Image.Image]:
        """As `QuestionSet.images`, but an image that the task has decoded stays as it is, as for other models."""
        source, chat = self._document(question.row)
        return _read_images(chat, source)

    def image_sizes(self, question: Question) -> list[tuple[int, int]]:
        return self._sizes[question.row]


def _read_images(chat: list[dict[str, Any]], source: str) -> list[Image.Image]:
    """The images of a chat in mode RGB."""
    given = [part["url"] for message in chat for part in message["content"] if part["type"] == "image"]
    images = []
    for image in given:
        if not isinstance(image, Image.Image):
            images.append(load_image(image, source=source))
            continue
        try:
            images.append(image.convert("RGB"))  # decodes it, if the task has only opened it
        except (OSError, SyntaxError, ValueError) as error:
            name = f"an image of {image.width}x{image.height}"
            raise bad_sample(source, f"{name} can't be decoded: {error}.", "Replace it in the data set.") from error
    return images


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest()


def _parts(message: dict[str, Any], source: str) -> list[dict[str, Any]]:
    parts = []
    for part in message["content"]:
        if part["type"] not in ("text", "image"):
            kind = part["type"]
            raise ValueError(f"{source}: the question has a part of type {kind!r}; jnana reads text and images")
        parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]})
    return parts


def read_settings(settings: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """
    The longest answer in tokens (1024 where the task names none), and the arguments of `generate`: greedy unless the
    temperature is above 0, as in lmms-eval's own models.

    Args:
        settings (`dict`): The task's generation kwargs.
    """
    temperature = settings.get("temperature") or 0
    decoding: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": settings.get("num_beams") or 1}
    if temperature > 0:
        decoding |= {name: settings[name] for name in ("temperature", "top_p") if settings.get(name) is not None}
    return int(settings.get("max_new_tokens") or 1024), decoding


def cut_off(text: str, until: str | Sequence[str] | None) -> str:
    """
    An answer up to the first of some strings. An empty line counts for none: lmms-eval puts it into every task that
    names no end, and it would cut off the second paragraph of long answers.

    Args:
        text (`str`): The answer.
        until (`str` or `Sequence[str]`, *optional*): Of the task's generation kwargs.
    """
    ends = [until] if isinstance(until, str) else until or []
    for end in ends:
        if end.strip():
            text = text.split(end)[0]
    return text
