"""Limits on the requests of visitors, and the checks that enforce them.

The page may be public, so every upload is untrusted. A check raises `Refused`, whose message is shown to the visitor:
it names the limit, and contains no path of this machine.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from jnana.processing.data import BadSampleError, load_image
from jnana.processing.data.images import IMAGE_FORMATS


logger = logging.getLogger(__name__)


class Refused(ValueError):
    """A request that is refused; the message is shown to the visitor."""


@dataclass(frozen=True)
class Limits:
    """
    Args:
        upload_megabytes (`float`): Size of one uploaded file; a larger one is refused during the upload.
        all_uploads_megabytes (`float`): Size of all files in the upload directory at one time.
        image_megapixels (`float`): Size of one image, checked in its header before it is decoded.
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
        Refused: if it is too large.
    """
    size = Path(path).stat().st_size
    if size > limits.upload_megabytes * 1e6:
        raise Refused(f"That file has {size / 1e6:.0f} MB; at most {limits.upload_megabytes:g} MB are allowed.")
    return Path(path).read_bytes()


def read_image(path: str | Path, limits: Limits) -> Image:
    """
    Decode an uploaded image.

    Raises:
        Refused: if it is not an image, is truncated, or is too large.
    """
    data = read_upload(path, limits)
    try:
        return load_image(
            {"path": None, "bytes": data}, source="upload", max_image_pixels=int(limits.image_megapixels * 1e6)
        )
    except BadSampleError as error:
        logger.info("refused: %s", error)
        raise Refused(
            f"That file can't be used as a picture. It must be a complete {', '.join(IMAGE_FORMATS)} file of at most "
            f"{limits.image_megapixels:g} megapixels and {limits.upload_megabytes:g} MB, with no side more than 100 "
            "times as long as the other."
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


def refuse_addresses(payload: Any) -> None:
    """
    Refuse requests that would make the server download a web address: those that give one as a file's path.

    Raises:
        Refused: if any file in the request's data has a web address as its path.
    """
    if isinstance(payload, dict):
        path = payload.get("path")
        if isinstance(path, str) and "://" in path:
            raise Refused("Web addresses are not fetched here. Save the file and upload it.")
        payload = list(payload.values())
    if isinstance(payload, (list, tuple)):
        for item in payload:
            refuse_addresses(item)
