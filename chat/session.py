"""A chat session with one model: many turns, several images, streamed answers, and a cache kept between turns.

The session keeps the keys and values of the last turn. The next turn runs the model only on the tokens after the
longest common prefix of the cached and the new token sequence. A second question about an image therefore needs
neither the vision tower nor the image's tokens in the language model. The prefix is found by comparing tokens, and for
image tokens the image's digest too; the session does not assume that a chat template only appends.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from jnana.modeling import CACHE_NAME
from jnana.processing import JnanaProcessor
from jnana.processing.data import image_size, load_image


BUSY = "this chat is still being answered; wait for the answer, or stop it"


class ContextFullError(ValueError):
    """The chat is longer than the model's context."""


@dataclass
class Turn:
    """
    Token counts and times of one answer.

    Args:
        prompt_tokens (`int`): Tokens of the whole chat up to the answer, image tokens included.
        cached_tokens (`int`): Prompt tokens whose keys and values came from the cache.
        new_tokens (`int`): Tokens of the answer.
        seconds_to_first_token (`float`): From the question to the answer's first token, image preprocessing included.
        seconds (`float`): From the question to the end of the answer.
        finish_reason (`str`): `"end"` (the model wrote an end token), `"length"` (`max_new_tokens` was reached),
            `"context"` (the model's context is full) or `"stopped"`.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    finish_reason: str = "stopped"


@dataclass
class PreparedImage:
    """
    An image as the vision tower takes it.

    Args:
        pixel_values (`torch.Tensor`): Its views, of shape `(num_views, channels, height, width)`.
        size (`tuple[int, int]`): (height, width) in pixels, before it was processed.
        num_tokens (`int`): Image tokens it takes.
        digest (`str`): SHA-256 of the pixel values and the size.
    """

    pixel_values: torch.Tensor
    size: tuple[int, int]
    num_tokens: int
    digest: str


class ChatSession:
    """
    A chat with a model. A session writes one answer at a time. Sessions may share a model if only one of them answers
    at a time.

    Args:
        model (`nn.Module`): A `JnanaForConditionalGeneration`, or the `PeftModel` around one, as
            [`jnana.load_model`] returns them; put into evaluation mode.
        processor (`JnanaProcessor`): Its processor.
        keep_cache (`bool`, *optional*, defaults to `True`): Keep keys and values between turns. With `False` every
            turn processes the whole chat; the answers are the same.

    Attributes:
        messages (`list[dict]`): The chat so far, as chat templates take it; image parts hold no image.
        last_turn (`Turn` or `None`): Counts and times of the last answer.
    """

    def __init__(self, model: nn.Module, processor: JnanaProcessor, *, keep_cache: bool = True):
        self.model = model.eval()
        self.processor = processor
        self.keep_cache = keep_cache
        self.messages: list[dict] = []
        self.last_turn: Turn | None = None
        self._images: list[PreparedImage] = []  # of all messages, in reading order
        self._cache: DynamicCache | None = None
        self._cached_keys: list[Any] = []  # for each cached position: token id, or (digest, index) of an image token
        self._busy = threading.Lock()
        self._stop = threading.Event()  # of the latest turn; each turn gets a new event

    # ------------------------------------------------------------------ public methods

    def ask(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        """
        Ask a question and stream the answer.

        Args:
            text (`str`): The question; may be empty if an image is given.
            images (`Sequence`, *optional*): Images of the question, each as [`jnana.processing.data.load_image`] takes
                it or as [`~ChatSession.prepare`] returns it.
            max_new_tokens (`int`, *optional*, defaults to 200): Longest answer, in tokens.
            temperature (`float`, *optional*, defaults to 0): Sampling temperature; 0 decodes greedily.
            top_p (`float`, *optional*, defaults to 1): Sample from the smallest set of likeliest tokens whose
                probabilities add up to this value.
            seed (`int`, *optional*): Of the sampling, which then leaves PyTorch's global generators as they were.

        Returns:
            `Iterator[str]`: The answer so far, once for each token. Closing the iterator stops the answer; the text
            written up to then stays in the chat.

        Raises:
            ValueError: if neither text nor an image is given, an option is out of range, or the chat is too long
                (`ContextFullError`). The chat then stays unchanged.
            BadSampleError: if an image can't be read.
            RuntimeError: if another answer of this session is being written.
        """
        started = time.perf_counter()
        if not text.strip() and not images:
            raise ValueError("there is neither a question nor an image; give one of them")
        prepared = [image if isinstance(image, PreparedImage) else self.prepare(image) for image in images]
        parts: list[dict] = [{"type": "image"} for _ in prepared]
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
        message = {"role": "user", "content": parts}
        return self._answer([*self.messages, message], [*self._images, *prepared], started, **options)

    def prepare(self, image: Any) -> PreparedImage:
        """
        Preprocess an image for the vision tower. The result takes less memory than a large image.

        Args:
            image (`Any`): As [`jnana.processing.data.load_image`] takes it; its errors are raised.
        """
        loaded = load_image(image, source="image")
        inputs = self.processor(images=[loaded], return_tensors="pt")  # type: ignore[call-arg]  # not in the typed dict
        pixel_values = inputs["pixel_values"].flatten(0, -4)
        size = image_size(loaded)
        digest = hashlib.sha256(pixel_values.numpy().tobytes() + repr(size).encode()).hexdigest()
        return PreparedImage(pixel_values, size, self.processor.count_image_tokens(size), digest)

    def retry(self, **options: Any) -> Iterator[str]:
        """
        Answer the last question again. Options and errors are those of [`~ChatSession.ask`].

        Raises:
            ValueError: if nothing has been asked.
        """
        if not self.messages:
            raise ValueError("nothing has been asked yet; call ask first")
        return self._answer(self.messages[:-1], self._images, time.perf_counter(), **options)

    def answer(self, messages: list[dict], images: Sequence[PreparedImage] = (), **options: Any) -> Iterator[str]:
        """
        Answer a whole chat, which replaces the session's own. The cache is used as far as both begin alike.

        Args:
            messages (`list[dict]`): The chat as chat templates take it, up to the last question; image parts hold no
                image.
            images (`Sequence[PreparedImage]`, *optional*): Its images, in reading order.

        The options, the returned iterator and the errors are those of [`~ChatSession.ask`].
        """
        return self._answer(messages, list(images), time.perf_counter(), **options)

    def encode(self, messages: list[dict], images: Sequence[PreparedImage] = ()) -> list[int]:
        """
        The token ids (`list[int]`) of a chat up to its next answer, image tokens included.

        Raises:
            ContextFullError: if the model's context leaves no room for an answer.
        """
        ids = self.processor.encode_chat(messages, image_sizes=[image.size for image in images])
        limit = self._context
        if len(ids) >= limit:
            raise ContextFullError(
                f"the chat has {len(ids):,} tokens, and the model reads at most {limit:,}. Clear the chat and ask "
                "again, with fewer images or a shorter question"
            )
        return ids

    def count_cached(self, ids: list[int], images: Sequence[PreparedImage] = ()) -> int:
        """How many of a chat's first tokens (`int`) have their keys and values in the cache."""
        return self._common_length(self._keys(ids, list(images)))

    def stop(self) -> None:
        """Stop the current answer after its next token. May be called from any thread."""
        self._stop.set()

    def clear(self) -> None:
        """
        Delete all messages and images, and the cache.

        Raises:
            RuntimeError: if an answer is being written.
        """
        with self._exclusively():
            self.messages, self._images, self.last_turn = [], [], None
            self._forget()

    def forget_cache(self) -> None:
        """Free the cache; the next turn processes the whole chat again. Errors as [`~ChatSession.clear`]."""
        with self._exclusively():
            self._forget()

    @property
    def cached_tokens(self) -> int:
        """Number of tokens in the cache (`int`)."""
        return len(self._cached_keys)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written (`bool`)."""
        return self._busy.locked()

    # ------------------------------------------------------------------ one turn

    def _answer(
        self,
        chat: list[dict],
        images: list[PreparedImage],
        started: float,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Check the arguments, then return the generator, so that errors are raised before the first token."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not 0 <= temperature <= 5:
            raise ValueError(f"temperature is {temperature}; it must be between 0 (greedy decoding) and 5")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if self.busy:
            raise RuntimeError(BUSY)
        stop = self._stop = threading.Event()
        ids = self.encode(chat, images)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0, "seed": seed}
        room = min(max_new_tokens, self._context - len(ids))
        turn = Turn(prompt_tokens=len(ids), cached_tokens=0)
        return self._write(chat, images, ids, started, room, room < max_new_tokens, sampling, turn, stop)

    def _write(
        self,
        chat: list[dict],
        images: list[PreparedImage],
        ids: list[int],
        started: float,
        room: int,
        context_limited: bool,
        sampling: dict[str, Any],
        turn: Turn,
        stop: threading.Event,
    ) -> Iterator[str]:
        with self._exclusively():
            inputs = self._inputs(ids, images, room)
            turn.cached_tokens = self.cached_tokens
            stream = TokenStream()
            options = {"max_new_tokens": room, "num_beams": 1, "use_cache": True, **sampling}
            worker = threading.Thread(target=self._generate, args=(inputs, options, stream, stop), daemon=True)
            self._cached_keys = []  # generation changes the cache, so a failure must leave nothing to reuse
            worker.start()
            answer: list[int] = []
            text = ""
            try:
                for token in stream:
                    if not answer:
                        turn.seconds_to_first_token = time.perf_counter() - started
                    answer.append(token)
                    written = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
                    if not written.endswith("\ufffd"):  # an incomplete UTF-8 character
                        text = written.strip()
                    yield text
            finally:
                stop.set()
                worker.join()
                if stream.output is None:
                    self._forget()
                else:
                    self._record(chat, images, stream.output, ids, started, room, context_limited, turn)

    def _record(self, chat, images, output, ids, started, room: int, context_limited: bool, turn: Turn) -> None:
        """Add the answer to the chat, and record which tokens the cache holds."""
        sequence = output.sequences[0].tolist()
        answer = sequence[len(ids) :]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.messages = [*chat, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        self._images = images
        turn.new_tokens = len(answer)
        turn.seconds = time.perf_counter() - started
        if answer and answer[-1] in end_token_ids(self.model, self.processor.tokenizer):
            turn.finish_reason = "end"
        elif len(answer) == room:
            turn.finish_reason = "context" if context_limited else "length"
        self.last_turn = turn
        if self.keep_cache:
            self._cache = output[CACHE_NAME]
            self._cached_keys = self._keys(sequence, images)[: self._cache.get_seq_length()]
        else:
            self._forget()

    def _generate(
        self, inputs: dict[str, Any], options: dict[str, Any], stream: "TokenStream", stop: threading.Event
    ) -> None:
        """Runs in a separate thread, so that tokens can be read while the model generates."""
        try:
            with torch.inference_mode(), seeded(options.pop("seed", None), self.model.device):
                stream.output = self.model.generate(
                    **inputs,
                    **options,
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([StopOnEvent(stop)]),
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                )
        except BaseException as error:  # raised again by the iterator of the stream
            stream.error = error
        stream.close()

    # ------------------------------------------------------------------ cache between turns

    def _inputs(self, ids: list[int], images: list[PreparedImage], room: int) -> dict[str, Any]:
        """
        The inputs of `generate`: the ids of the whole chat, the cache cropped to their common prefix, and the pixel
        values of the images behind it.
        """
        keys = self._keys(ids, images)
        kept = self._common_length(keys)
        if self._cache is None or kept == 0 or self._rotary_embedding_changes(kept, len(ids) + room):
            kept = 0
            # Without the config all layers keep every key; sliding-window layers would drop keys and can't be cropped
            self._cache = DynamicCache()
        elif kept < len(self._cached_keys):
            self._cache.crop(kept - len(self._cached_keys))
        self._cached_keys = keys[:kept]
        device = self.model.device
        input_ids = torch.tensor([ids], device=device)  # => [1, tokens]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            CACHE_NAME: self._cache,
        }
        new_images, cached = list(images), ids[:kept].count(self.processor.image_token_id)
        while cached > 0:  # the cache splits no image
            cached -= new_images.pop(0).num_tokens
        if new_images:
            pixel_values = torch.cat([image.pixel_values for image in new_images])
            inputs["pixel_values"] = pixel_values.to(device, self.model.dtype)  # => [views, 3, h, w]
            if self.processor.image_grid_pinpoints is not None:
                inputs["image_sizes"] = torch.tensor([image.size for image in new_images])
        return inputs

    def _common_length(self, keys: list[Any]) -> int:
        """Length of the prefix of `keys` to take from the cache: it leaves at least one token, and splits no image."""
        most = min(len(keys) - 1, len(self._cached_keys))
        common = next((i for i in range(most) if keys[i] != self._cached_keys[i]), most)
        while common > 0 and isinstance(keys[common], tuple) and keys[common][1] > 0:
            common -= 1
        return common

    def _keys(self, ids: list[int], images: list[PreparedImage]) -> list[Any]:
        """Token ids, with image tokens replaced by (digest of the image, index in it): equal for equal images only."""
        keys = list[Any](ids)
        image_keys = ((image.digest, index) for image in images for index in range(image.num_tokens))
        for position, token in enumerate(ids):
            if token == self.processor.image_token_id:
                keys[position] = next(image_keys)
        return keys

    def _rotary_embedding_changes(self, kept: int, longest: int) -> bool:
        """
        Whether cached keys have another rotary embedding than this turn needs. Phi-3 (LongRoPE) scales it differently
        for texts below and above `original_max_position_embeddings`, and discards its cache when a text crosses it.
        """
        text_config = self.model.config.text_config
        if text_config.model_type != "phi3":
            return False
        limit = text_config.original_max_position_embeddings
        return not (kept > limit or (len(self._cached_keys) <= limit and longest <= limit))

    # ------------------------------------------------------------------ helpers

    @property
    def _context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _forget(self) -> None:
        self._cache, self._cached_keys = None, []

    def _exclusively(self) -> "Exclusive":
        return Exclusive(self._busy)


def end_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's generation config, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seeds PyTorch's global generators and restores them afterwards; `None` leaves them alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


class Exclusive:
    """Holds a lock; raises instead of waiting if it is taken."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(BUSY)

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class TokenStream(BaseStreamer):
    """
    Passes tokens one by one from the thread that generates them to the thread that reads them.

    transformers' `TextIteratorStreamer` holds the last word back until a space follows, yields one item more than
    there are tokens, and passes on neither the exception nor the output of `generate`.
    """

    def __init__(self) -> None:
        self.tokens: SimpleQueue[int | None] = SimpleQueue()
        self.prompt_seen = False
        self.output: Any = None
        self.error: BaseException | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.tokens.put(int(value))
        self.prompt_seen = True  # `generate` passes the prompt first

    def end(self) -> None:
        """Called by `generate` after the last token, before it returns; [`~TokenStream.close`] ends the stream."""

    def close(self) -> None:
        self.tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self.tokens.get()) is not None:
            yield token
        if self.error is not None:
            raise self.error


class StopOnEvent(StoppingCriteria):
    """Stops generation after an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
