"""What the visitors share, the model, and what each has alone: a chat, pictures waiting to be asked about.

The handlers of a page run at the same time: a picture is taken in while a question is sent and the chat is cleared. So
a visitor is there once, before the first handler, and no handler puts another in its place; what belongs to a chat is
in a `Chat`, and a handler that works on one sees at the end whether it is over.
"""

import logging
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from PIL.Image import Image
from torch import nn

from jnana.processing import JnanaProcessor
from jnana.processing.speech import TranscriptionError

from .limits import Limits, Refused, read_picture
from .session import ChatSession, Picture


logger = logging.getLogger(__name__)
THUMBNAIL = 512  # pixels; what the page shows of a picture
# Kinds of `TranscriptionError` that a visitor can do something about; the others may name paths of this machine
FOR_VISITORS = ("audio", "too_long", "timeout")
UNHEARD = "Spoken questions can't be understood here just now; the reason has been noted. Type the question, please."


@dataclass
class Shown:
    """A picture as the model takes it, and the file of a small copy for the page."""

    picture: Picture
    thumbnail: str


@dataclass
class Asked:
    """
    A question that waits for its turn.

    Args:
        question (`str`): Its text.
        pictures (`list[Shown]`): The pictures given with it.
        before (`list[dict]`): The page's chat without it, to go back to.
        again (`bool`): Whether it is the last question once more.
    """

    question: str
    pictures: list[Shown]
    before: list[dict]
    again: bool = False


@dataclass(eq=False)
class Chat:
    """
    What is said and shown between two clicks on Clear.

    Args:
        session (`ChatSession`): The chat as the model has it.
        waiting (`list[Shown]`): Pictures for the next question.
        receiving (`int`): How many more are being taken in.
        transcript (`list[dict]`): The chat as the page shows it.
        asked (`Asked` or `None`): What waits to be answered.
        answering (`Asked` or `None`): What is being answered.
        gone (`bool`): Whether the chat was cleared, or has rested for too long.
        lock (`threading.RLock`): For whoever looks at `waiting`, `receiving`, `asked`, `answering` and then acts.
    """

    session: ChatSession
    waiting: list[Shown] = field(default_factory=list)
    receiving: int = 0
    transcript: list[dict] = field(default_factory=list)
    asked: Asked | None = None
    answering: Asked | None = None
    gone: bool = False
    lock: Any = field(default_factory=threading.RLock)

    @property
    def images(self) -> int:
        """Pictures of the chat (`int`), with those that are on their way into it."""
        said = sum(part["type"] == "image" for message in self.session.messages for part in message["content"])
        asked = sum(len(question.pictures) for question in (self.asked, self.answering) if question)
        return said + asked + len(self.waiting) + self.receiving


class Visitor:
    """
    One browser tab, and the chat it is in. Gradio copies the value of a `State` for each session when it is first
    used; a copy is a new visitor, with a chat of its own.

    Args:
        model (`nn.Module`): As [`ChatSession`] takes it.
        processor (`JnanaProcessor`): Its processor.
    """

    def __init__(self, model: nn.Module, processor: JnanaProcessor):
        self.model, self.processor = model, processor
        self.chat = Chat(ChatSession(model, processor))

    def __deepcopy__(self, memo: dict) -> "Visitor":
        return Visitor(self.model, self.processor)

    def start_anew(self) -> Chat:
        """A new chat; returns the old one (`Chat`)."""
        old, self.chat = self.chat, Chat(ChatSession(self.model, self.processor))
        return old


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
        return Visitor(self.model, self.processor)

    def goodbye(self, visitor: Visitor) -> None:
        """A visitor's chat is over: an answer in the making ends, the memory is free again."""
        chat = visitor.start_anew()
        with self._recent_lock:
            chat.gone = True
            self._recent.pop(id(chat.session), None)
        chat.session.stop()

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

    def receive(self, chat: Chat, path: str) -> None:
        """
        Take an uploaded picture for the next question.

        Raises:
            Refused: if it can't be used, or the chat has all the pictures it may have.
        """
        with chat.lock:
            if chat.images >= self.limits.images:
                raise Refused(f"A chat takes at most {self.limits.images} pictures. Clear it to start anew.")
            chat.receiving += 1
        shown = []
        try:
            image = read_picture(path, self.limits)
            picture = chat.session.prepare(image)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            shown.append(Shown(picture, keep_file(image)))
        finally:
            with chat.lock:
                chat.receiving -= 1
                chat.waiting.extend(shown)

    def listen(self, path: str) -> str:
        """
        What is said in a recording.

        Raises:
            Refused: if there is no speech in it, or it can't be transcribed.
        """
        if self.transcriber is None:
            raise Refused(self.speech_note)
        try:
            heard = self.transcriber.transcribe(path)
        except TranscriptionError as error:
            logger.warning("a recording was not transcribed: %s %s", error, error.details)
            raise Refused(str(error) if error.kind in FOR_VISITORS else UNHEARD) from None
        if not heard.text.strip():
            raise Refused("No speech was heard in that recording. Speak closer to the microphone, or type.")
        return heard.text.strip()

    def keep_recent(self, chat: Chat) -> None:
        """Call after each answer: of the chats, only the latest keep their keys and values."""
        session = chat.session
        with self._recent_lock:
            if chat.gone:
                return
            self._recent[id(session)] = session
            self._recent.move_to_end(id(session))
        self._keep_at_most(self.limits.kept_chats)

    def make_room(self) -> None:
        """Call when memory has run out: no chat keeps its keys and values; each is read anew when it goes on."""
        self._keep_at_most(0)

    def _keep_at_most(self, number: int) -> None:
        with self._recent_lock:
            surplus = [self._recent.popitem(last=False)[1] for _ in range(len(self._recent) - number)]
        for old in surplus:
            try:
                old.forget_cache()
            except RuntimeError:  # it is being answered just now, and comes back by itself
                continue


def keep_file(thumbnail: Image) -> str:
    """
    The file (`str`) of a picture for the page, where Gradio keeps such files and deletes them in time. Given the
    picture itself, Gradio would compress it anew for every word of an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.webp"
        thumbnail.save(file)
        return save_file_to_cache(file, cache_dir=get_upload_folder())
