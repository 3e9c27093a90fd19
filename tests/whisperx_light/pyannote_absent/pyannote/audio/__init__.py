"""Stands for pyannote.audio; see tests/whisperx_light/environment.py."""


class Model: ...


class Pipeline: ...
