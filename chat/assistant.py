"""The state behind the chat page: the assistant that all visitors share, and one chat for each visitor.

The handlers of a page run concurrently: an image may be uploaded while a question is sent and the chat is cleared.
Therefore a visitor is created once, before the first handler runs, and no handler replaces it. Everything that belongs
to one chat is in a `Chat`, and a handler checks at its end whether its chat has been closed.
"""

import logging
import tempfile
import threading
from collections import OrderedDict, deque
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

from .limits import Limits, Refused, read_image
from .session import ChatSession, PreparedImage


logger = logging.getLogger(__name__)
TABS = 10  # as a multiple of `visitors`: browser tabs whose visitors are remembered after they were deleted
THUMBNAIL_SIDE = 512  # pixels, of the copy that the page shows
# Kinds of `TranscriptionError` whose message is shown to visitors; others may contain paths of this machine
VISITOR_ERRORS = ("audio", "too_long", "timeout")
SPEECH_FAILED = "Speech recognition failed; the reason is in the server's log. Please type the question."


@dataclass
class ChatImage:
    """
    An image of a chat.

    Args:
        prepared (`PreparedImage`): The image as the model takes it.
        thumbnail (`str`): File of a small copy, for the page.
    """

    prepared: PreparedImage
    thumbnail: str


@dataclass
class QueuedQuestion:
    """
    A question from the moment it is sent until it is answered.

    Args:
        question (`str`): Its text.
        images (`list[ChatImage]`): Its images.
        before (`list[dict]`): The transcript without the question, restored if the question fails.
        is_retry (`bool`): Whether it repeats the last question.
    """

    question: str
    images: list[ChatImage]
    before: list[dict]
    is_retry: bool = False


@dataclass(eq=False)
class Chat:
    """
    All messages and images between two clicks on Clear.

    Args:
        session (`ChatSession`): The chat session with the model.
        waiting (`list[ChatImage]`): Images for the next question.
        receiving (`int`): Number of images that are being read.
        transcript (`list[dict]`): The chat as the page shows it.
        queued (`QueuedQuestion` or `None`): The question that waits for the model.
        answering (`QueuedQuestion` or `None`): The question that is being answered.
        notice (`str`): Why the last click did nothing, for the status line; empty if it did something.
        closed (`bool`): Whether the chat was cleared, or deleted after `idle_seconds`.
        lock (`threading.RLock`): Held while `waiting`, `receiving`, `queued` or `answering` are read and changed.
    """

    session: ChatSession
    waiting: list[ChatImage] = field(default_factory=list)
    receiving: int = 0
    transcript: list[dict] = field(default_factory=list)
    queued: QueuedQuestion | None = None
    answering: QueuedQuestion | None = None
    notice: str = ""
    closed: bool = False
    lock: Any = field(default_factory=threading.RLock)

    @property
    def image_count(self) -> int:
        """Number of images in the chat (`int`), including those of waiting questions and running uploads."""
        answered = sum(part["type"] == "image" for message in self.session.messages for part in message["content"])
        unanswered = sum(len(question.images) for question in (self.queued, self.answering) if question)
        return answered + unanswered + len(self.waiting) + self.receiving


class Visitor:
    """
    One browser tab and its chat. Gradio copies the value of a `State` for each browser session; a copy is a new
    visitor with a new chat.

    Args:
        model (`nn.Module`): As [`ChatSession`] takes it.
        processor (`JnanaProcessor`): Its processor.

    Attributes:
        token (`object`): Tells a visitor from the one that replaces it, without keeping its chat in memory.
    """

    def __init__(self, model: nn.Module, processor: JnanaProcessor):
        self.model, self.processor = model, processor
        self.token = object()
        self.chat = Chat(ChatSession(model, processor))

    def __deepcopy__(self, memo: dict) -> "Visitor":
        return Visitor(self.model, self.processor)

    def start_new_chat(self) -> Chat:
        """Start a new chat; returns the old one (`Chat`)."""
        old, self.chat = self.chat, Chat(ChatSession(self.model, self.processor))
        return old


class Turns:
    """A lock that goes to those who wait for it in the order of their arrival. Any thread may release it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken
            else:
                self._taken = False


class Assistant:
    """
    The model that all visitors share, with its limits and its speech recogniser.

    Args:
        model (`nn.Module`): As [`ChatSession`] takes it.
        processor (`JnanaProcessor`): Its processor.
        name (`str`): The model's name on the page.
        limits (`Limits`, *optional*): Limits on requests.
        transcriber (`Any`, *optional*): A [`jnana.Transcriber`]; without one, spoken questions are disabled.
        speech_note (`str`, *optional*): Note for visitors if spoken questions are disabled.

    Attributes:
        turn (`Turns`): Held while an answer is generated; the page and the API wait for it in order.
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
        self.turn = Turns()
        self._recent: OrderedDict[int, ChatSession] = OrderedDict()
        self._recent_lock = threading.Lock()
        self._tabs: OrderedDict[str, object] = OrderedDict()  # the token of each tab's visitor

    def new_visitor(self) -> Visitor:
        """A new visitor, with an empty chat."""
        return Visitor(self.model, self.processor)

    def has_lost_chat(self, tab: str, visitor: Visitor) -> bool:
        """
        Whether a browser tab had a chat that Gradio has deleted. The tab's visitor is then the new one.

        Args:
            tab (`str`): Gradio's name of the tab.
            visitor (`Visitor`): Its visitor now.
        """
        with self._recent_lock:
            before = self._tabs.pop(tab, visitor.token)
            self._tabs[tab] = visitor.token
            while len(self._tabs) > TABS * self.limits.visitors:
                self._tabs.popitem(last=False)
        return before is not visitor.token

    def forget_tab(self, visitor: Visitor) -> None:
        """Call when a visitor's page is emptied; there is nothing more to lose."""
        with self._recent_lock:
            for tab in [tab for tab, token in self._tabs.items() if token is visitor.token]:
                del self._tabs[tab]

    def close_chat(self, visitor: Visitor) -> None:
        """Close a visitor's chat: stop its answer and free its cache. The visitor gets a new chat."""
        chat = visitor.start_new_chat()
        with self._recent_lock:
            chat.closed = True
            self._recent.pop(id(chat.session), None)
        chat.session.stop()

    def describe(self) -> str:
        """Model, device and dtype in one line (`str`)."""
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
        Add an uploaded image to those of the next question.

        Raises:
            Refused: if it can't be used, or the chat has reached its number of images.
        """
        with chat.lock:
            if chat.image_count >= self.limits.images:
                raise Refused(f"A chat takes at most {self.limits.images} pictures. Clear it to start a new one.")
            chat.receiving += 1
        received = []
        try:
            image = read_image(path, self.limits)
            prepared = chat.session.prepare(image)
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            received.append(ChatImage(prepared, keep_file(image)))
        finally:
            with chat.lock:
                chat.receiving -= 1
                chat.waiting.extend(received)

    def listen(self, path: str) -> str:
        """
        Transcribe a recording.

        Raises:
            Refused: if it holds no speech, or can't be transcribed.
        """
        if self.transcriber is None:
            raise Refused(self.speech_note)
        try:
            heard = self.transcriber.transcribe(path)
        except TranscriptionError as error:
            logger.warning("a recording was not transcribed: %s %s", error, error.details)
            raise Refused(str(error) if error.kind in VISITOR_ERRORS else SPEECH_FAILED) from None
        if not heard.text.strip():
            raise Refused("No speech was heard in that recording. Speak closer to the microphone, or type.")
        return heard.text.strip()

    def keep_recent(self, chat: Chat) -> None:
        """Call after each answer. Only the `kept_chats` most recent chats keep their caches."""
        session = chat.session
        with self._recent_lock:
            if chat.closed:
                return
            self._recent[id(session)] = session
            self._recent.move_to_end(id(session))
        self._keep_at_most(self.limits.kept_chats)

    def make_room(self) -> None:
        """Call when memory has run out. Frees the caches of all chats; their next turns process them again."""
        self._keep_at_most(0)

    def _keep_at_most(self, number: int) -> None:
        with self._recent_lock:
            surplus = [self._recent.popitem(last=False)[1] for _ in range(len(self._recent) - number)]
        for old in surplus:
            try:
                old.forget_cache()
            except RuntimeError:  # its answer is being written; `keep_recent` is called again after it
                continue


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU, Python, or PyTorch on a CPU (which raises a plain `RuntimeError`) has run out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def keep_file(thumbnail: Image) -> str:
    """
    Save a thumbnail in Gradio's cache directory, which Gradio cleans up; returns the file (`str`). If it were given
    the image itself, Gradio would compress it again for every token of an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.webp"
        thumbnail.save(file)
        return save_file_to_cache(file, cache_dir=get_upload_folder())
