"""Transcribe the spoken questions of a data file once, before training or evaluation.

    python run_transcribe.py questions.jsonl --model small

The records of the file have `messages`, in which an audio part takes the place of a text:

    {"images": ["board.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "audio", "path": "question.wav"}]},
        {"role": "assistant", "content": "A white king."}]}

The transcripts are written to `questions.jsonl.transcripts.jsonl`, where the stage scripts read them. A recording that
the same model has transcribed is not transcribed again unless its content changes, so a text corrected by hand in that
file is kept.
"""

import argparse
import logging
import sys
from pathlib import Path

import pyarrow.parquet

from jnana.processing.data import StoredTranscripts
from jnana.processing.data.records import read_records
from jnana.processing.data.transcripts import recordings_in
from jnana.processing.speech import Transcriber, TranscriptionError


logger = logging.getLogger("run_transcribe")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a .jsonl, .json or .parquet file with a column `messages`")
    parser.add_argument("--model", help="speech model: a size, a Hub id or a directory (default: small)")
    parser.add_argument("--language", help="code of the spoken language (default: detected in each recording)")
    parser.add_argument("--max_seconds", type=float, default=300.0, help="skip longer recordings (default: 300)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # 1. The recordings and the transcriber
    try:
        if args.data.suffix.lower() == ".parquet":
            records = pyarrow.parquet.read_table(args.data, memory_map=True).to_pylist()
        else:
            records = read_records(args.data)
        stored = StoredTranscripts(args.data)
        transcriber = Transcriber(args.model, language=args.language, max_seconds=args.max_seconds)
    except (OSError, ValueError) as error:
        logger.error("%s", error)
        return 1
    recordings = list(recordings_in(records))
    if not recordings:
        logger.error("%s: no message holds a part {'type': 'audio', 'path': ...}: nothing to transcribe.", args.data)
        return 1

    # 2. Transcribe new recordings
    try:
        problems = stored.make(transcriber, recordings)
    except TranscriptionError as error:
        logger.error("%s", error)
        return 1
    finally:
        transcriber.close()

    # 3. Log the result
    silent = [
        name for name in dict.fromkeys(recordings) if name in stored.records and not stored.records[name]["text"]
    ]
    for name in silent:
        logger.warning("%s: no speech found", name)
    for problem in problems:
        logger.error("%s", problem)
    made = len(set(recordings)) - len(problems)
    logger.info("%d of %d recordings have a transcript in %s", made, len(set(recordings)), stored.file)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
