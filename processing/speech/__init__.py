"""Spoken questions: WhisperX in a process of its own, and transcripts stored beside a data file."""

from .recordings import Transcript, TranscriptionError
from .stored_transcripts import StoredTranscripts
from .transcriber import Transcriber


__all__ = ["StoredTranscripts", "Transcriber", "Transcript", "TranscriptionError"]
