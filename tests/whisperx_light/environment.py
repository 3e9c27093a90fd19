# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["whisperx==3.8.6", "pyannote-audio"]
#
# [tool.uv]
# override-dependencies = [
#     "torch==2.13.0",
#     "huggingface-hub>=1",
#     "transformers>=5",
#     "torchaudio; python_version < '3'",
#     "torchcodec; python_version < '3'",
#     "torchvision; python_version < '3'",
#     "triton; python_version < '3'",
# ]
#
# [tool.uv.sources]
# pyannote-audio = { path = "pyannote_absent" }
# ///
"""Describes a light environment in which the tests run the real WhisperX: 1.3 GB on a CPU instead of 7.2 GB.

The pins of WhisperX 3.8.6 are overridden with versions that it also runs with, and packages that transcription does
not use are left out. `pyannote_absent` replaces pyannote.audio: without speaker or voice detection WhisperX only
inherits from its classes. This environment is for tests; users get that of `processing/speech/worker.py`.

This file contains no code: `uv sync --script` reads the header.
"""
