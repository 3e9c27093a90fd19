"""Limits on the requests of visitors, and the checks that enforce them.

The page may be public, so every upload is untrusted. A check raises `Refused`, whose message is shown to the visitor:
it names the limit, and contains no path of this machine.
"""

import io
import logging
import os
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL.Image import Image

from jnana.processing.data import BadSampleError, load_image

from . import decode_upload


logger = logging.getLogger(__name__)

DECODE_SECONDS = 30  # of the process that decodes an upload, its start included
DECODERS = threading.BoundedSemaphore(4)  # processes at one time; each may take `decode_upload.MEMORY`
NO_UPLOAD = "That file was not uploaded here. Upload it again."


class Refused(ValueError):
    """A request that is refused; the message is shown to the visitor."""


@dataclass(frozen=True)
class Limits:
    """
    Args:
        upload_megabytes (`float`): Size of one uploaded file; a larger one is refused during the upload.
        all_uploads_megabytes (`float`): Size of all files in the upload directory at one time.
        image_megapixels (`float`): Size of one image, checked in its header before it is decoded. A JPEG of up to 16
            times as many pixels is scaled down while it is decoded.
        images (`int`): Images in one chat.
        question_characters (`int`): Length of one question.
        audio_seconds (`float`): Length of one recording.
        new_tokens (`int`): Largest value of the answer length setting.
        queue_length (`int`): Requests that may wait for the model; more are refused.
        visitors (`int`): Open chats; a new one replaces the chat that has been idle longest.
        kept_chats (`int`): Chats whose caches stay in memory; the next turn of another chat processes it again.
        idle_seconds (`int`): Time without activity after which a chat and its uploads are deleted; see docs/app.md.
    """

    upload_megabytes: float = 16
    all_uploads_megabytes: float = 2000
    image_megapixels: float = 40
    images: int = 6
    question_characters: int = 4000
    audio_seconds: float = 120
    new_tokens: int = 512
    queue_length: int = 16
    visitors: int = 500
    kept_chats: int = 16
    idle_seconds: int = 3600

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


def read_upload(path: str | Path, limits: Limits) -> bytes:
    """
    Read an uploaded file.

    Raises:
        Refused: if it is too large, or not a regular file.
    """
    limit = int(limits.upload_megabytes * 1e6)
    try:
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused(NO_UPLOAD)
            data = file.read(limit + 1)
    except OSError:
        raise Refused(NO_UPLOAD) from None
    if len(data) > limit:
        raise Refused(f"That file has more than the {limits.upload_megabytes:g} MB that are allowed.")
    return data


def read_image(path: str | Path, limits: Limits) -> Image:
    """
    Decode an uploaded image. Its bytes are decoded in a process of its own (`decode_upload.py`), which a crafted file
    can crash or stop without harm to the app.

    Raises:
        Refused: if it is not an image, is truncated, or is too large.
    """
    return decode_image(read_upload(path, limits), limits)


def decode_image(data: bytes, limits: Limits) -> Image:
    """As [`read_image`], of the bytes of a file."""
    pixels = int(limits.image_megapixels * 1e6)
    try:
        return load_image({"path": None, "bytes": _decode(data, pixels)}, source="upload", max_image_pixels=pixels)
    except (BadSampleError, ValueError, subprocess.TimeoutExpired) as error:
        logger.info("refused: %s", error)
        raise Refused(
            f"That file can't be used as a picture. It must be a complete {', '.join(decode_upload.UPLOAD_FORMATS)} "
            f"file of at most {limits.image_megapixels:g} megapixels and {limits.upload_megabytes:g} MB, with no side "
            "more than 100 times as long as the other."
        ) from None


def check_question(text: str, limits: Limits) -> str:
    """The stripped question. Lone surrogates, which UTF-8 cannot encode, become question marks.

    Raises:
        Refused: if it is too long.
    """
    text = text.encode("utf-8", "replace").decode().strip()
    if len(text) > limits.question_characters:
        raise Refused(
            f"That question has {len(text):,} characters; at most {limits.question_characters:,} are allowed."
        )
    return text


def check_sampling(temperature: Any, top_p: Any, new_tokens: Any, limits: Limits) -> dict[str, Any]:
    """The options (`dict`) of [`ChatSession.answer`]. Raises `Refused` for one that is no number or out of range."""
    try:
        temperature, top_p, new_tokens = float(temperature), float(top_p), int(new_tokens)
    except (TypeError, ValueError, OverflowError):
        raise Refused("Temperature, top-p and length must be numbers.") from None
    if not (0 <= temperature <= 2 and 0 < top_p <= 1 and 1 <= new_tokens <= limits.new_tokens):
        raise Refused(
            f"The temperature is 0 to 2, top-p above 0 and at most 1, the length 1 to {limits.new_tokens} tokens."
        )
    return {"temperature": temperature, "top_p": top_p, "max_new_tokens": new_tokens}


def _decode(data: bytes, max_pixels: int) -> bytes:
    """
    An uploaded image as a PNG, decoded by `decode_upload.py` in a process without this one's environment variables,
    which may hold passwords.

    Raises:
        ValueError: if the image can't be decoded, or the process crashed.
        RuntimeError: if the process could not start to decode.
    """
    command = [sys.executable, "-I", decode_upload.__file__, str(max_pixels), str(Path(PIL.__file__).parents[1])]
    environment = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    with DECODERS:
        done = subprocess.run(command, input=data, capture_output=True, timeout=DECODE_SECONDS, env=environment)
    if done.returncode == 0:
        return done.stdout
    reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    if done.returncode == decode_upload.BAD_IMAGE or done.returncode < 0:  # negative: ended by a signal
        raise ValueError(reason or f"the process ended with {done.returncode}")
    raise RuntimeError(f"decode_upload.py can't run: {reason}")


def check_decoder() -> None:
    """
    Decode a small image as uploads are decoded.

    Raises:
        RuntimeError: if that does not work on this machine; every upload would be refused.
    """
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    try:
        _decode(buffer.getvalue(), 64)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"uploaded images can't be decoded on this machine: {error}") from error


def check_files(payload: Any, folder: str | Path) -> None:
    """
    Refuse requests about files that no visitor uploaded. Gradio checks only those that are marked as files; this
    function checks every `path` wherever it is in a request.

    Args:
        payload (`Any`): The data of the request.
        folder (`str` or `Path`): The upload directory.

    Raises:
        Refused: if a path is a web address, which the server would download, or is not that of a regular file in the
            upload directory. The message does not tell whether the file exists.
    """
    if isinstance(payload, dict):
        path = payload.get("path")
        if isinstance(path, str) and "://" in path:
            raise Refused("Web addresses are not fetched here. Save the file and upload it.")
        if path is not None and not _is_upload(path, folder):
            raise Refused(NO_UPLOAD)
        payload = list(payload.values())
    if isinstance(payload, (list, tuple)):
        for item in payload:
            check_files(item, folder)


def _is_upload(path: Any, folder: str | Path) -> bool:
    """Whether `path` is a regular file inside `folder`, symbolic links followed."""
    if not isinstance(path, str):
        return False
    try:
        file = os.path.realpath(path)
        return os.path.isfile(file) and Path(file).is_relative_to(os.path.realpath(folder))
    except ValueError:  # characters that no file name has
        return False
