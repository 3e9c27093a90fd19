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

The pins of WhisperX 3.8.6 are overridden to what it runs with all the same, packages that transcription does not use
are left out, and `pyannote_absent` stands for pyannote.audio, whose classes WhisperX only inherits from until someone
asks for its speaker or voice detection. Good for tests; people run what `processing/speech/worker.py` asks for.

There is nothing to run here: `uv sync --script` reads the header.
"""
