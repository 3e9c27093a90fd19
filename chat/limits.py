"""What a stranger may send: how much of it, and what is said when it is too much.

The page may stand open to the world, so every upload is untrusted. All refusals are `Refused`, whose text is written
for the visitor: it names the limit and never a path of this machine.
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
    """A request that is turned down; the text is for the visitor."""


@dataclass(frozen=True)
class Limits:
    """
    Args:
        upload_megabytes (`float`): Of one file, refused while it arrives.
        all_uploads_megabytes (`float`): Of all files that lie in the folder of uploads at one time.
        image_megapixels (`float`): Of one picture, read from its header before a pixel is decoded.
        images (`int`): Pictures in one chat.
        question_characters (`int`): Of one question.
        audio_seconds (`float`): Of one recording.
        new_tokens (`int`): Upper end of the answer's length.
        queue_length (`int`): Requests that may wait; further ones are told to come back.
        visitors (`int`): Open chats; the one that has rested longest makes room for another.
        kept_chats (`int`): Chats whose keys and values stay in memory; older ones are read anew when they go on.
        idle_seconds (`int`): After which a chat whose page has shown nothing new is deleted, and uploads are;
            docs/app.md has the details.
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
    The bytes of an uploaded file.

    Raises:
        Refused: if it is larger than allowed.
    """
    size = Path(path).stat().st_size
    if size > limits.upload_megabytes * 1e6:
        raise Refused(f"That file has {size / 1e6:.0f} MB; at most {limits.upload_megabytes:g} MB are taken here.")
    return Path(path).read_bytes()


def read_picture(path: str | Path, limits: Limits) -> Image:
    """
    Decode an uploaded picture.

    Raises:
        Refused: if it is no picture, incomplete, or larger than allowed.
    """
    data = read_upload(path, limits)
    try:
        return load_image(
            {"path": None, "bytes": data}, source="upload", max_image_pixels=int(limits.image_megapixels * 1e6)
        )
    except BadSampleError as error:
        logger.info("refused: %s", error)
        raise Refused(
            f"That file can't be used as a picture. Pictures here are complete {', '.join(IMAGE_FORMATS)} files of at "
            f"most {limits.image_megapixels:g} megapixels and {limits.upload_megabytes:g} MB, no side more than 100 "
            "times the other."
        ) from None


def check_question(text: str, limits: Limits) -> str:
    """The question without white space around it; half characters, which nothing can write, become question marks.

    Raises:
        Refused: if it is too long.
    """
    text = text.encode("utf-8", "replace").decode().strip()
    if len(text) > limits.question_characters:
        raise Refused(
            f"That question has {len(text):,} characters; at most {limits.question_characters:,} are taken here."
        )
    return text


def refuse_addresses(payload: Any) -> None:
    """
    Refuse what would make the server fetch a web address: a file that is named by one instead of being uploaded.

    Raises:
        Refused: if any file in a request's data is named so.
    """
    if isinstance(payload, dict):
        path = payload.get("path")
        if isinstance(path, str) and "://" in path:
            raise Refused("Web addresses are not fetched here. Save the file and upload it.")
        payload = list(payload.values())
    if isinstance(payload, (list, tuple)):
        for item in payload:
            refuse_addresses(item)
