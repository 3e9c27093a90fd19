"""Transcribes spoken questions with WhisperX, which runs in a process of its own."""

from .recordings import Transcript, TranscriptionError
from .transcriber import Transcriber


__all__ = ["Transcriber", "Transcript", "TranscriptionError"]
