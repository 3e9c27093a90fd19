"""One chat with one model: many turns, several pictures, tokens as they are made, and nothing read twice.

A chat grows at its end, so what the model has read of it stays valid: the keys and values of the last turn are kept,
and a turn feeds the model only what comes behind the part that both have in common. A second question about a picture
therefore pays neither for the vision tower nor for the picture's tokens in the language model. What is in common is
found by comparing tokens, a picture's together with what it shows; no template is trusted to be a pure continuation.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from jnana.modeling import CACHE_NAME
from jnana.processing import JnanaProcessor
from jnana.processing.data import load_image


BUSY = "this chat is still being answered; wait for the answer, or stop it"


class ContextFullError(ValueError):
    """The chat is longer than what the model can read."""


@dataclass
class Turn:
    """
    What one answer took.

    Args:
        prompt_tokens (`int`): Tokens of the whole chat up to the answer, image tokens included.
        cached_tokens (`int`): How many of them were not read again.
        new_tokens (`int`): Tokens of the answer.
        seconds_to_first_token (`float`): From the question to the answer's first token, preparing pictures included.
        seconds (`float`): From the question to the end.
        finish_reason (`str`): `"end"` (the model closed its answer), `"length"` (`max_new_tokens`), `"context"` (the
            model can read no further) or `"stopped"`.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    finish_reason: str = "stopped"


@dataclass
class Picture:
    """A picture as the tower takes it, `(1, channels, height, width)`, and a digest that tells it from others."""

    pixel_values: torch.Tensor
    digest: str


class ChatSession:
    """
    A chat. One answer at a time; several sessions may share a model as long as only one of them answers.

    Args:
        model (`nn.Module`): A `JnanaForConditionalGeneration`, or the `PeftModel` around one, as
            [`jnana.training.loading.load_model`] gives them; put into evaluation mode.
        processor (`JnanaProcessor`): Its processor.
        keep_cache (`bool`, *optional*, defaults to `True`): Keep keys and values between turns. Without, every turn
            reads the whole chat; the answers are the same.

    Attributes:
        messages (`list[dict]`): The chat so far, as chat templates take it; image parts hold no picture.
        last_turn (`Turn` or `None`): What the last answer took.
    """

    def __init__(self, model: nn.Module, processor: JnanaProcessor, *, keep_cache: bool = True):
        self.model = model.eval()
        self.processor = processor
        self.keep_cache = keep_cache
        self.messages: list[dict] = []
        self.last_turn: Turn | None = None
        self._pictures: list[Picture] = []  # of all messages, in reading order
        self._cache: DynamicCache | None = None
        self._held: list[Any] = []  # what `_cache` has read: a token id, or (digest, place) of a picture's token
        self._busy = threading.Lock()
        self._stop = threading.Event()  # of the latest turn: each has its own

    # ------------------------------------------------------------------ what people do

    def ask(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        """
        Ask, and read the answer while it is written.

        Args:
            text (`str`): The question; may be empty if there is a picture.
            images (`Sequence`, *optional*): Pictures shown with it, each what
                [`jnana.processing.data.load_image`] takes, or what [`~ChatSession.prepare`] made of it.
            max_new_tokens (`int`, *optional*, defaults to 200): The answer's length at most, in tokens.
            temperature (`float`, *optional*, defaults to 0): 0 takes the likeliest token each time.
            top_p (`float`, *optional*, defaults to 1): Draw from the likeliest tokens that together have this much
                probability.

        Returns:
            `Iterator[str]`: The answer so far, once a token. Closing the iterator stops the answer; what has been
            written of it stays in the chat.

        Raises:
            ValueError: if there is nothing to answer, an option is out of range, or (`ContextFullError`) the chat is
                too long. The chat is then as it was before.
            BadSampleError: if a picture can't be read.
            RuntimeError: while another answer of this session is being written.
        """
        started = time.perf_counter()
        if not text.strip() and not images:
            raise ValueError("there is neither a question nor a picture; give one of them")
        pictures = [image if isinstance(image, Picture) else self.prepare(image) for image in images]
        parts: list[dict] = [{"type": "image"} for _ in pictures]
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
        message = {"role": "user", "content": parts}
        return self._answer([*self.messages, message], [*self._pictures, *pictures], started, **options)

    def prepare(self, image: Any) -> Picture:
        """A picture ready for the tower, which takes far less memory than the picture; errors as [`load_image`]."""
        loaded = load_image(image, source="picture")
        pixel_values = self.processor(images=[loaded], return_tensors="pt")["pixel_values"]  # => [1, 3, h, w]
        return Picture(pixel_values, hashlib.sha256(pixel_values.numpy().tobytes()).hexdigest())

    def retry(self, **options: Any) -> Iterator[str]:
        """
        Answer the last question once more; arguments and errors as [`~ChatSession.ask`].

        Raises:
            ValueError: if nothing has been asked.
        """
        if not self.messages:
            raise ValueError("nothing has been asked yet, so there is nothing to answer again")
        return self._answer(self.messages[:-1], self._pictures, time.perf_counter(), **options)

    def stop(self) -> None:
        """Stop the answer that was asked for last after its next token; may be called from any thread."""
        self._stop.set()

    def clear(self) -> None:
        """
        Forget the chat.

        Raises:
            RuntimeError: while an answer is being written.
        """
        with self._exclusively():
            self.messages, self._pictures, self.last_turn = [], [], None
            self._forget()

    def forget_cache(self) -> None:
        """Free the memory of keys and values; the next turn reads the chat anew. Raises as [`~ChatSession.clear`]."""
        with self._exclusively():
            self._forget()

    @property
    def cached_tokens(self) -> int:
        """How many tokens the kept keys and values cover (`int`)."""
        return len(self._held)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written (`bool`)."""
        return self._busy.locked()

    # ------------------------------------------------------------------ one turn

    def _answer(
        self,
        chat: list[dict],
        pictures: list[Picture],
        started: float,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> Iterator[str]:
        """Check, then return the iterator that does the work, so that a refusal comes before the first token."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if not 0 <= temperature <= 5:
            raise ValueError(f"temperature is {temperature}; it must be between 0 (always the likeliest token) and 5")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if self.busy:
            raise RuntimeError(BUSY)
        stop = self._stop = threading.Event()
        ids = self.processor.encode_chat(chat)
        limit = self.model.config.text_config.max_position_embeddings
        if len(ids) >= limit:
            raise ContextFullError(
                f"the chat has {len(ids):,} tokens, and the model reads at most {limit:,}. Clear the chat and ask "
                "again, with fewer pictures or a shorter question"
            )
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        room = min(max_new_tokens, limit - len(ids))
        turn = Turn(prompt_tokens=len(ids), cached_tokens=0)
        return self._write(chat, pictures, ids, started, room, room < max_new_tokens, sampling, turn, stop)

    def _write(
        self,
        chat: list[dict],
        pictures: list[Picture],
        ids: list[int],
        started: float,
        room: int,
        short_of_room: bool,
        sampling: dict[str, Any],
        turn: Turn,
        stop: threading.Event,
    ) -> Iterator[str]:
        with self._exclusively():
            inputs = self._inputs(ids, pictures, room)
            turn.cached_tokens = self.cached_tokens
            stream = TokenStream()
            options = {"max_new_tokens": room, "num_beams": 1, "use_cache": True, **sampling}
            worker = threading.Thread(target=self._generate, args=(inputs, options, stream, stop), daemon=True)
            self._held = []  # the cache is changing; a failure leaves nothing to rely on
            worker.start()
            answer: list[int] = []
            text = ""
            try:
                for token in stream:
                    if not answer:
                        turn.seconds_to_first_token = time.perf_counter() - started
                    answer.append(token)
                    written = self.processor.tokenizer.decode(answer, skip_special_tokens=True)
                    if not written.endswith("\ufffd"):  # half of a character
                        text = written.strip()
                    yield text
            finally:
                stop.set()
                worker.join()
                if stream.output is None:
                    self._forget()
                else:
                    self._record(chat, pictures, stream.output, ids, started, room, short_of_room, turn)

    def _record(self, chat, pictures, output, ids, started, room: int, short_of_room: bool, turn: Turn) -> None:
        """Put the answer into the chat, and remember what the cache has read."""
        sequence = output.sequences[0].tolist()
        answer = sequence[len(ids) :]
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        self.messages = [*chat, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        self._pictures = pictures
        turn.new_tokens = len(answer)
        turn.seconds = time.perf_counter() - started
        if answer and answer[-1] in self._end_tokens():
            turn.finish_reason = "end"
        elif len(answer) == room:
            turn.finish_reason = "context" if short_of_room else "length"
        self.last_turn = turn
        if self.keep_cache:
            self._cache = output[CACHE_NAME]
            self._held = self._keys(sequence, pictures)[: self._cache.get_seq_length()]
        else:
            self._forget()

    def _generate(
        self, inputs: dict[str, Any], options: dict[str, Any], stream: "TokenStream", stop: threading.Event
    ) -> None:
        """Runs in a thread of its own, so that tokens can be read while they are made."""
        try:
            with torch.inference_mode():
                stream.output = self.model.generate(
                    **inputs,
                    **options,
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([Stopped(stop)]),
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                    return_dict_in_generate=True,
                )
        except BaseException as error:  # raised again where the tokens are read
            stream.error = error
        stream.close()

    # ------------------------------------------------------------------ the kept cache

    def _inputs(self, ids: list[int], pictures: list[Picture], room: int) -> dict[str, Any]:
        """
        What to give to `generate`: the whole chat's ids, a cache that has read as much of them as it can, and the
        pictures it has not read.
        """
        keys = self._keys(ids, pictures)
        kept = self._common_length(keys)
        if self._cache is None or kept == 0 or self._rotary_embedding_changes(kept, len(ids) + room):
            kept = 0
            # Not told the config: layers with a sliding window would drop keys, and could not be cropped
            self._cache = DynamicCache()
        elif kept < len(self._held):
            self._cache.crop(kept - len(self._held))
        self._held = keys[:kept]
        device = self.model.device
        input_ids = torch.tensor([ids], device=device)  # => [1, tokens]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            CACHE_NAME: self._cache,
        }
        per_image = self.processor.num_image_tokens(*self.processor.image_height_and_width())
        unread = pictures[ids[:kept].count(self.processor.image_token_id) // per_image :]
        if unread:
            pixel_values = torch.cat([picture.pixel_values for picture in unread])
            inputs["pixel_values"] = pixel_values.to(device, self.model.dtype)  # => [unread pictures, 3, h, w]
        return inputs

    def _common_length(self, keys: list[Any]) -> int:
        """How much of `keys` the cache holds: at least one token is left to read, and no picture is cut in two."""
        most = min(len(keys) - 1, len(self._held))
        common = next((place for place in range(most) if keys[place] != self._held[place]), most)
        while common > 0 and isinstance(keys[common], tuple) and keys[common][1] > 0:
            common -= 1
        return common

    def _keys(self, ids: list[int], pictures: list[Picture]) -> list[Any]:
        """Token ids, a picture's tokens replaced by (its digest, place in it): equal only if they show the same."""
        per_image = self.processor.num_image_tokens(*self.processor.image_height_and_width())
        image_token_id, keys, seen = self.processor.image_token_id, list[Any](ids), 0
        for place, token in enumerate(ids):
            if token == image_token_id:
                keys[place] = (pictures[seen // per_image].digest, seen % per_image)
                seen += 1
        return keys

    def _rotary_embedding_changes(self, kept: int, longest: int) -> bool:
        """Phi-3 reads all anew when a text passes the length at which its rotary embedding changes (LongRoPE): what
        was read below that length serves texts that stay below it, what was read above serves those above."""
        text_config = self.model.config.text_config
        if text_config.model_type != "phi3":
            return False
        limit = text_config.original_max_position_embeddings
        return not (kept > limit or (len(self._held) <= limit and longest <= limit))

    # ------------------------------------------------------------------ small things

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        return ends if isinstance(ends, list) else [ends]

    def _forget(self) -> None:
        self._cache, self._held = None, []

    def _exclusively(self) -> "Exclusive":
        return Exclusive(self._busy)


class Exclusive:
    """A lock that refuses instead of waiting."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise RuntimeError(BUSY)

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class TokenStream(BaseStreamer):
    """Carries tokens from the thread that makes them to the one that reads them, one at a time."""

    def __init__(self) -> None:
        self.tokens: SimpleQueue[int | None] = SimpleQueue()
        self.prompt_seen = False
        self.output: Any = None
        self.error: BaseException | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.tokens.put(int(value))
        self.prompt_seen = True  # `generate` hands over the prompt first

    def end(self) -> None:
        """`generate` has made its last token; its output is yet to come."""

    def close(self) -> None:
        self.tokens.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self.tokens.get()) is not None:
            yield token
        if self.error is not None:
            raise self.error


class Stopped(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
