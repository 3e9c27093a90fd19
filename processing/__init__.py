"""The processor, chat encoding and the chat templates. A saved checkpoint contains copies of the `*_jnana.py`
files and of its template.

`jnana.processing.data` prepares data for training, `jnana.processing.speech` transcribes spoken questions.
"""

if __name__ != "jnana.processing":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.processing instead")

from .chat_encoding_jnana import transcribe_chat
from .chat_formats_jnana import adopt_chat_template, chat_template_names, read_chat_template
from .image_geometry_jnana import set_image_geometry, with_image_backend
from .processing_jnana import JnanaProcessor, add_jnana_tokens


__all__ = [
    "JnanaProcessor",
    "add_jnana_tokens",
    "adopt_chat_template",
    "chat_template_names",
    "read_chat_template",
    "set_image_geometry",
    "transcribe_chat",
    "with_image_backend",
]
