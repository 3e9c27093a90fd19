"""What the visitors share, the model, and what each has alone: a chat, pictures waiting to be asked about."""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from processing import JnanaProcessor

from .limits import Limits, Refused, read_picture
from .session import ChatSession, Picture


logger = logging.getLogger(__name__)
THUMBNAIL = 512  # pixels; what the page shows of a picture


@dataclass
class Shown:
    """A picture as the model takes it, and a small copy for the page."""

    picture: Picture
    thumbnail: Image


@dataclass(eq=False)
class Visitor:
    """
    One browser tab.

    Args:
        session (`ChatSession`): The chat.
        waiting (`list[Shown]`): Pictures for the next question.
        transcript (`list[dict]`): The chat as the page shows it.
    """

    session: ChatSession
    waiting: list[Shown] = field(default_factory=list)
    transcript: list[dict] = field(default_factory=list)


class Assistant:
    """
    A model with all that a page needs to know of it.

    Args:
        model (`nn.Module`): As [`ChatSession`] takes it.
        processor (`JnanaProcessor`): Its processor.
        name (`str`): What the page calls it.
        limits (`Limits`, *optional*): What visitors may send.
        transcriber (`Any`, *optional*): A [`processing.Transcriber`]; without, spoken questions are off.
        speech_note (`str`, *optional*): Why they are off.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: JnanaProcessor,
        name: str,
        limits: Limits | None = None,
        transcriber: Any = None,
        speech_note: str = "",
    ):
        self.model, self.processor, self.name = model, processor, name
        self.limits = limits or Limits()
        self.transcriber = transcriber
        self.speech_note = speech_note
        self._recent: OrderedDict[int, ChatSession] = OrderedDict()
        self._recent_lock = threading.Lock()

    def welcome(self) -> Visitor:
        """A new visitor."""
        return Visitor(ChatSession(self.model, self.processor))

    def goodbye(self, visitor: Visitor | None) -> None:
        """A visitor who left: an answer in the making ends, the memory is free again."""
        if visitor is not None:
            visitor.session.stop()
            with self._recent_lock:
                self._recent.pop(id(visitor.session), None)

    def describe(self) -> str:
        """Model, device and dtype in a line (`str`)."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        for bits in (4, 8):
            if getattr(self.model, f"is_loaded_in_{bits}bit", False):
                dtype = f"{bits}-bit weights, computing in {dtype}"
        device = str(self.model.device)
        if device.startswith("cuda"):
            device = f"{device} ({torch.cuda.get_device_name(self.model.device)})"
        return f"{self.name} · {device} · {dtype}"

    def receive(self, visitor: Visitor, path: str) -> None:
        """
        Take an uploaded picture for the next question.

        Raises:
            Refused: if it can't be used, or the chat has all the pictures it may have.
        """
        asked = sum(part["type"] == "image" for m in visitor.session.messages for part in m["content"])
        if asked + len(visitor.waiting) >= self.limits.images:
            raise Refused(f"A chat takes at most {self.limits.images} pictures. Clear it to start anew.")
        image = read_picture(path, self.limits)
        picture = visitor.session.prepare(image)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        visitor.waiting.append(Shown(picture, image))

    def listen(self, path: str) -> str:
        """
        What is said in a recording.

        Raises:
            Refused: if there is no speech in it, or it can't be transcribed.
        """
        from processing import TranscriptionError

        if self.transcriber is None:
            raise Refused(self.speech_note)
        try:
            heard = self.transcriber.transcribe(path)
        except TranscriptionError as error:
            logger.warning("a recording was not transcribed: %s", error)
            raise Refused(str(error)) from None
        if not heard.text.strip():
            raise Refused("No speech was heard in that recording. Speak closer to the microphone, or type.")
        return heard.text.strip()

    def keep_recent(self, session: ChatSession) -> None:
        """Call after each answer: of the chats, only the latest keep their keys and values."""
        with self._recent_lock:
            self._recent[id(session)] = session
            self._recent.move_to_end(id(session))
            surplus = [self._recent.popitem(last=False)[1] for _ in range(len(self._recent) - self.limits.kept_chats)]
        for old in surplus:
            try:
                old.forget_cache()
            except RuntimeError:  # it is being answered just now, and comes back by itself
                continue
