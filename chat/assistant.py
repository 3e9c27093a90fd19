"""The assistant that all visitors of the page and all clients of the API share. chats.py holds the visitors' chats."""

import logging
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder
from jinja2 import TemplateError
from PIL.Image import Image
from torch import nn

from jnana.processing import JnanaProcessor
from jnana.processing.speech import TranscriptionError

from .chats import Chat, ChatImage, Chats
from .limits import Limits, Refused, read_image
from .session import ChatSession, PreparedImage


logger = logging.getLogger(__name__)
THUMBNAIL_SIDE = 512  # pixels, of the copy that the page shows
# Kinds of `TranscriptionError` whose message is shown to visitors; others may contain paths of this machine
VISITOR_ERRORS = ("audio", "too_long", "timeout")
SPEECH_FAILED = "Speech recognition failed; the reason is in the server's log. Please type the question."


class Turns:
    """The line of those who want the model, in the order of their arrival. Any thread may act for another."""

    def __init__(self) -> None:
        self._line: list[object] = []  # the first one has the model
        self._moved = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    def join(self) -> object:
        """Join the line; returns a ticket, which must be given to [`~Turns.leave`]."""
        ticket = object()
        with self._moved:
            self._line.append(ticket)
        return ticket

    def wait(self, ticket: object, seconds: float | None = None) -> int:
        """How many are before a ticket (`int`). Unless none is, wait until the line moves, or for `seconds`."""
        with self._moved:
            if self._line.index(ticket) > 0:
                self._moved.wait(seconds)
            return self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        """Leave the line, from any place."""
        with self._moved:
            self._line.remove(ticket)
            self._moved.notify_all()

    def __enter__(self) -> None:
        ticket = self.join()
        while self.wait(ticket):
            continue

    def __exit__(self, *_: object) -> None:
        self.leave(self._line[0])


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
        self._preparer = self.new_session()  # for its preprocessing; it never answers
        self._recent: OrderedDict[int, ChatSession] = OrderedDict()
        self._recent_lock = threading.Lock()
        self.chats = Chats(self.limits, self.new_session, self._stop)

    def new_session(self) -> ChatSession:
        """A session of an empty chat with the model."""
        return ChatSession(self.model, self.processor)

    def _stop(self, chat: Chat) -> None:
        """Stop the answer of a closed chat and free its cache."""
        with self._recent_lock:
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

    def receive(self, chat: Chat, files: list[str]) -> list[ChatImage]:
        """
        The images of uploaded files, for the next question. Those decoded before are not decoded again.

        Raises:
            Refused: if one can't be used, or the chat has more images than it may.
        """
        earlier = sum(len(question.images) for question in chat.shown)
        if earlier + len(files) > self.limits.images:
            raise Refused(f"A chat takes at most {self.limits.images} pictures. Clear it to start a new one.")
        with chat.reading:
            for file in files:
                if file not in chat.received:
                    chat.received[file] = self.read(file)
            return [chat.received[file] for file in files]

    def read(self, file: str) -> ChatImage:
        """Decode an image (`ChatImage`). Raises `Refused` if it can't be used."""
        image = read_image(file, self.limits)
        prepared = self._preparer.prepare(image)
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return ChatImage(prepared, keep_file(image))

    def check_system(self, messages: list[dict], images: list[PreparedImage]) -> None:
        """
        Check that the model sees the system prompt with which the messages begin, if they do.

        Raises:
            Refused: if the model's chat template refuses it or leaves it out.
        """
        if messages[0]["role"] != "system":
            return
        try:
            honoured = self._preparer.encode(messages, images) != self._preparer.encode(messages[1:], images)
        except TemplateError:
            honoured = False
        if not honoured:
            raise Refused("This model takes no system prompt. Empty that field in the settings.")

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
