"""Transcribe the spoken questions of a data set, once, before training or evaluation.

    python run_transcribe.py questions.jsonl --model small

The file has records with `messages`, in which a recording stands for words:

    {"images": ["board.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "audio", "path": "question.wav"}]},
        {"role": "assistant", "content": "A white king."}]}

The transcripts are written to `questions.jsonl.transcripts.jsonl`, from where the stage scripts read them. What has
been transcribed before, by the same model and from the same sound, is not done again; correct a text there and it
stays corrected.
"""

import argparse
import logging
import sys
from pathlib import Path

import pyarrow.parquet

from jnana.processing.data.records import read_records
from jnana.processing.speech import StoredTranscripts, Transcriber, TranscriptionError
from jnana.processing.speech.stored_transcripts import recordings_in


logger = logging.getLogger("run_transcribe")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a .jsonl, .json or .parquet file with a column `messages`")
    parser.add_argument("--model", help="speech model: a size, a Hub id or a folder (default: small)")
    parser.add_argument("--language", help="code of the language spoken (default: detected in each recording)")
    parser.add_argument("--max_seconds", type=float, default=300.0, help="refuse longer recordings (default: 300)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    # 1. What is to be transcribed, and by what
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

    # 2. Transcribe what is new
    try:
        problems = stored.make(transcriber, recordings)
    except TranscriptionError as error:
        logger.error("%s", error)
        return 1
    finally:
        transcriber.close()

    # 3. Say what came of it
    silent = [
        name for name in dict.fromkeys(recordings) if name in stored.records and not stored.records[name]["text"]
    ]
    for name in silent:
        logger.warning("%s: no speech heard", name)
    for problem in problems:
        logger.error("%s", problem)
    made = len(set(recordings)) - len(problems)
    logger.info("%d of %d recordings have a transcript in %s", made, len(set(recordings)), stored.file)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
