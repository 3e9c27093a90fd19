"""Transcripts of the recordings in a data file, made once by `run_transcribe.py` and stored beside the file.

Training and evaluation then read the text instead of transcribing in every epoch and every process. The readers
replace each recording by its transcript, so rows hold text only, as for typed questions.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jnana.processing.speech.recordings import Transcript, TranscriptionError

from .files import digest_of
from .records import read_json_lines


SUFFIX = ".transcripts.jsonl"
AUDIO_COLUMNS = ("audios", "audio")
# Kinds of `TranscriptionError` that concern one recording; any other kind ends `make`.
RECORDING_ERRORS = ("audio", "too_long", "timeout", "crash", "internal")
# `make` gives up when the worker crashed or timed out this many times in a row.
MAX_WORKER_FAILURES = 3


class StoredTranscripts:
    """
    The stored transcripts of a data file. Has the method `transcribe` of a `Transcriber`, for recordings that the data
    file names.

    Args:
        source (`str` or `Path`): the data file. Paths of recordings are relative to its directory.

    Raises:
        ValueError: if the transcript file has a malformed line. An incomplete last line is skipped.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self.file = Path(f"{self.source}{SUFFIX}")
        self.records: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            for record in read_json_lines(self.file, torn="skip_last"):
                if not isinstance(record, dict):
                    raise ValueError(f"{self.file}: an object with named fields is needed, not {record!r:.80}.")
                self.records[str(record.get("audio"))] = record  # a later record replaces an earlier one

    def path_of(self, recording: str) -> Path:
        """The path of a recording that the data file names."""
        return self.source.parent / recording

    def transcribe(self, recording: Any, sampling_rate: int | None = None) -> Transcript:
        """
        The stored transcript of a recording.

        Args:
            recording (`str`): its path as in the data file.

        Raises:
            TranscriptionError: if there is none, or the size of the recording has changed since.
        """
        remedy = f"Make the transcripts once: python run_transcribe.py {self.source}"
        record = self.records.get(recording) if isinstance(recording, str) else None
        if record is None:
            raise TranscriptionError(f"the recording {str(recording):.200} has no transcript. {remedy}", "audio")
        path = self.path_of(recording)
        if path.is_file() and path.stat().st_size != record.get("bytes"):
            raise TranscriptionError(
                f"the recording {recording} has changed since it was transcribed. {remedy}", "audio"
            )
        return Transcript(record["text"], record["language"], record["seconds"], record["model"], 0.0)

    def make(self, transcriber: Any, recordings: Iterable[str], progress: bool = True) -> list[str]:
        """
        Transcribe the recordings that this model has not transcribed with their present content. Each transcript is
        written as soon as it is made.

        Args:
            transcriber (`Transcriber`): not started if no recording needs it.
            recordings (`Iterable[str]`): paths as in the data file.
            progress (`bool`, *optional*, defaults to `True`): show a progress bar.

        Returns:
            `list[str]`: one problem for each recording that could not be transcribed.

        Raises:
            TranscriptionError: if no recording can be transcribed (WhisperX or its model can't be loaded, or the
                worker failed three times in a row).
        """
        problems = []
        failures = 0  # of the worker, in a row
        self._complete_last_line()
        with self.file.open("a", encoding="utf-8") as file:
            for recording in tqdm(
                list(dict.fromkeys(recordings)), desc="Transcribing", unit="recording", disable=not progress
            ):
                path = self.path_of(recording)
                if not path.is_file():
                    problems.append(f"{recording}: does not exist in {path.parent}")
                    continue
                digest = {"bytes": path.stat().st_size, "sha256": digest_of(path)}
                known = self.records.get(recording, {})
                if known.get("sha256") == digest["sha256"] and known.get("model") == transcriber.model:
                    continue
                try:
                    transcript = transcriber.transcribe(path)
                except TranscriptionError as error:
                    failures = failures + 1 if error.kind in ("timeout", "crash") else 0
                    if error.kind not in RECORDING_ERRORS or failures == MAX_WORKER_FAILURES:
                        raise
                    problems.append(f"{recording}: {error}")
                    continue
                failures = 0
                self.records[recording] = record = {
                    "audio": recording,
                    "text": transcript.text,
                    "language": transcript.language,
                    "seconds": transcript.seconds,
                    "model": transcript.model,
                    **digest,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
        return problems

    def _complete_last_line(self) -> None:
        """End the file with a line break, so that the next record starts a line. An incomplete record is deleted."""
        data = self.file.read_bytes() if self.file.is_file() else b""
        start = data.rfind(b"\n") + 1
        if start == len(data):
            return
        try:
            json.loads(data[start:])
        except ValueError:
            self.file.write_bytes(data[:start])
        else:
            self.file.write_bytes(data + b"\n")


def with_recordings(messages: list[dict], record: dict) -> list[dict]:
    """
    Messages in which each audio part holds the path of its recording.

    Args:
        messages (`list[dict]`): chat messages; an audio part may hold its path under `path` or `audio`.
        record (`dict`): the record of the messages. Paths in its column `audios` or `audio` belong, in order, to the
            audio parts without a path.

    Returns:
        `list[dict]`: a copy; each audio part has a `path`, `None` if no path is given for it.
    """
    column: Any = next((record[name] for name in AUDIO_COLUMNS if record.get(name)), [])
    remaining = iter(column if isinstance(column, list) else [column])

    def with_path(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "audio":
            return part
        path = next((part[name] for name in ("path", "audio") if part.get(name)), None) or next(remaining, None)
        if isinstance(path, dict):  # the `Audio` feature of `datasets`: {"path", "bytes"}
            path = path.get("path")
        return {"type": "audio", "path": path}

    return [
        {**message, "content": [with_path(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def recordings_in(records: Iterable[dict]) -> Iterator[str]:
    """The paths of all recordings in the `messages` of a data file's records. Malformed records have none."""
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list):
            continue
        for message in with_recordings(messages, record):
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else []:
                if isinstance(part, dict) and part.get("type") == "audio" and isinstance(part.get("path"), str):
                    yield part["path"]
