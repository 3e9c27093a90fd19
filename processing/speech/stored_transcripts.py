"""Transcripts of a data file's recordings, made once and kept beside it.

What is said in a recording never changes, so training and evaluation read it instead of hearing it in every epoch and
every process: `run_transcribe.py` writes `<data file>.transcripts.jsonl`, and the readers put its texts where the
recordings stand. Rows therefore hold text, and everything behind the readers is as for typed questions.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from jnana.processing.data.records import parse_lines

from .recordings import Transcript, TranscriptionError


SUFFIX = ".transcripts.jsonl"
AUDIO_COLUMNS = ("audios", "audio")
ONE_RECORDINGS = ("audio", "too_long", "timeout", "crash", "internal")  # errors that end one transcription, not all
LOST_FOR_GOOD = 3


class StoredTranscripts:
    """
    Transcripts that have been made; takes the place of a `Transcriber` for recordings named in a data file.

    Args:
        source (`str` or `Path`): the data file. Paths of recordings are relative to its folder.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source)
        self.file = Path(f"{self.source}{SUFFIX}")
        self.records: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            for record in parse_lines(self._whole_lines().decode("utf-8"), self.file):
                if not isinstance(record, dict):
                    raise ValueError(f"{self.file}: an object with named fields is needed, not {record!r:.80}.")
                self.records[str(record.get("audio"))] = record  # a later record takes the place of an earlier one

    def _whole_lines(self) -> bytes:
        """
        The file, ending with a whole line: an editor may have left out the line's end, and a full disk or a kill the
        rest of a record, which is then made again.
        """
        data = self.file.read_bytes()
        start = data.rfind(b"\n") + 1
        try:
            return data if start == len(data) else data[:start] + json.dumps(json.loads(data[start:])).encode() + b"\n"
        except ValueError:
            return data[:start]

    def path_of(self, recording: str) -> Path:
        """Where a recording named in the data file is."""
        return self.source.parent / recording

    def transcribe(self, recording: Any, sampling_rate: int | None = None) -> Transcript:
        """
        The stored transcript of a recording.

        Args:
            recording (`str`): its path as the data file names it.

        Raises:
            TranscriptionError: if there is none, or the recording has changed in size since.
        """
        remedy = f"Make them once: python run_transcribe.py {self.source}"
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
        Transcribe what has no transcript of this content by this model yet; each is written as soon as it is made.

        Args:
            transcriber (`Transcriber`): asked for those that are missing, and not started if none is.
            recordings (`Iterable[str]`): paths as the data file names them.
            progress (`bool`, *optional*, defaults to `True`): show a progress bar.

        Returns:
            `list[str]`: the problems of those that could not be transcribed.

        Raises:
            TranscriptionError: if it can't go on at all (nothing to run WhisperX with, no model, lost three times in
                a row).
        """
        problems = []
        lost = 0  # times in a row that the speech recogniser crashed or hung
        wanted = list(dict.fromkeys(recordings))
        if self.file.is_file() and (whole := self._whole_lines()) != self.file.read_bytes():
            self.file.write_bytes(whole)
        with self.file.open("a", encoding="utf-8") as file:
            for recording in tqdm(wanted, desc="Transcribing", unit="recording", disable=not progress):
                path = self.path_of(recording)
                if not path.is_file():
                    problems.append(f"{recording}: does not exist in {path.parent}")
                    continue
                digest = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                known = self.records.get(recording, {})
                if known.get("sha256") == digest["sha256"] and known.get("model") == transcriber.model:
                    continue
                try:
                    heard = transcriber.transcribe(path)
                except TranscriptionError as error:
                    lost = lost + 1 if error.kind in ("timeout", "crash") else 0
                    if error.kind not in ONE_RECORDINGS or lost == LOST_FOR_GOOD:
                        raise
                    problems.append(f"{recording}: {error}")
                    continue
                lost = 0
                self.records[recording] = record = {
                    "audio": recording,
                    "text": heard.text,
                    "language": heard.language,
                    "seconds": heard.seconds,
                    "model": heard.model,
                    **digest,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
        return problems


def with_recordings(messages: list[dict], record: dict) -> list[dict]:
    """
    Messages whose audio parts name their recordings.

    Args:
        messages (`list[dict]`): chat messages; an audio part may hold its path under `path` or `audio`.
        record (`dict`): the record they are of; paths in its column `audios` or `audio` belong, in order, to the audio
            parts that hold none.

    Returns:
        `list[dict]`: a copy, each audio part with its `path` (`None` if nothing names it).
    """
    column: Any = next((record[name] for name in AUDIO_COLUMNS if record.get(name)), [])
    remaining = iter(column if isinstance(column, list) else [column])

    def named(part: Any) -> Any:
        if not isinstance(part, dict) or part.get("type") != "audio":
            return part
        path = next((part[name] for name in ("path", "audio") if part.get(name)), None) or next(remaining, None)
        if isinstance(path, dict):  # as data sets hold a file: {"path", "bytes"}
            path = path.get("path")
        return {"type": "audio", "path": path}

    return [
        {**message, "content": [named(part) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def recordings_in(records: Iterable[dict]) -> Iterator[str]:
    """The paths of all recordings that the `messages` of a data file's records name."""
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list):
            continue  # the readers say what is wrong with such a record
        for message in with_recordings(messages, record):
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else []:
                if isinstance(part, dict) and part.get("type") == "audio" and isinstance(part.get("path"), str):
                    yield part["path"]
