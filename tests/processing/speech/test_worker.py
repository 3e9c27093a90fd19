"""The real WhisperX in its worker process, with real recordings and with files that are not recordings."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jnana.processing.speech import Transcriber, TranscriptionError
from jnana.processing.speech.transcriber import PYTHON_VARIABLE, WORKER_SCRIPT, _environment
from tests.speech import STAND_IN_MODEL, speak, whisperx_python_or_skip


PICTURE, PIECES = "What do you see in this picture?", "How many pieces are there?"

# Made by PyAV, which only the worker's environment has. Called with the spoken question and a folder
MAKE_FILES = """
import sys, wave
from pathlib import Path
import av, numpy as np

question, folder = sys.argv[1], Path(sys.argv[2])

def encode(name, samples, codec, rate):
    with av.open(str(folder / name), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = 22050
        resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))

with wave.open(question) as file:
    spoken = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
for name, codec in (("q.mp3", "libmp3lame"), ("q.m4a", "aac"), ("q.webm", "libopus"), ("q.ogg", "libopus")):
    encode(name, spoken, codec, 48000)
encode("q.flac", spoken, "flac", 22050)
encode("hour.flac", np.zeros(3600 * 22050), "flac", 22050)
encode("minute.wav", np.zeros(60 * 22050), "pcm_s16le", 22050)
with av.open(str(folder / "mute.mp4"), "w") as file:
    stream = file.add_stream("mpeg4", rate=10)
    stream.width = stream.height = 64
    stream.pix_fmt = "yuv420p"
    for _ in range(10):
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8))))
    file.mux(stream.encode(None))
"""


@pytest.fixture(scope="module")
def python() -> str:
    return whisperx_python_or_skip()


@pytest.fixture(scope="module")
def transcriber(python):
    """One worker for all tests of this file: it takes WhisperX several seconds to import itself."""
    with Transcriber(STAND_IN_MODEL, python=python, max_seconds=30.0, start_timeout=300.0) as transcriber:
        yield transcriber


@pytest.fixture(scope="module")
def files(python, tmp_path_factory) -> Path:
    """A spoken question in many formats, and files that are not recordings."""
    folder = tmp_path_factory.mktemp("recordings")
    question = speak(PICTURE, folder / "q.wav")
    subprocess.run([python, "-I", "-c", MAKE_FILES, question, folder], check=True)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("This is not sound.")
    (folder / "random.mp3").write_bytes(np.random.default_rng(0).bytes(20_000))
    silence = bytes(32_000)
    header = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 32_036, b"WAVE", b"fmt ", 16, 0x1234, 1, 16_000, 32_000, 2, 16)
    (folder / "codec.wav").write_bytes(header + struct.pack("<4sI", b"data", len(silence)) + silence)
    (folder / "list.wav").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\n{question}\n#EXT-X-ENDLIST\n")
    (folder / "list.mp3").write_text(f"ffconcat version 1.0\nfile '{question}'\n")
    return folder


@pytest.mark.parametrize("voice", ["en-us", "en-gb"])
@pytest.mark.parametrize("question", [PICTURE, PIECES])
def test_spoken_questions_are_heard(transcriber, tmp_path, question, voice):
    heard = transcriber.transcribe(speak(question, tmp_path / "question.wav", voice))
    assert (heard.text, heard.language) == (question, "en")
    assert 1.0 < heard.seconds < 3.0 and heard.elapsed > 0


@pytest.mark.parametrize("name", ["q.wav", "q.flac", "q.mp3", "q.m4a", "q.ogg", "q.webm"])
def test_every_usual_format_is_read(transcriber, files, name):
    assert transcriber.transcribe(files / name).text == PICTURE


def test_samples_are_heard_at_any_rate_and_type(transcriber, files):
    samples = np.frombuffer((files / "q.wav").read_bytes()[44:], np.int16)  # 22,050 Hz
    stereo = np.stack([samples, samples], axis=1).astype(np.float64) / 2**15
    assert transcriber.transcribe(samples, 22_050).text == PICTURE
    assert transcriber.transcribe(stereo, sampling_rate=22_050).text == PICTURE
    too_fast = transcriber.transcribe(samples, 44_100)
    assert too_fast.seconds == pytest.approx(len(samples) / 44_100, abs=0.01) and too_fast.text != PICTURE


@pytest.mark.parametrize("sound", ["silence", "noise", "tone", "no sample", "one sample", "not a number"])
def test_what_is_no_speech_gives_no_text(transcriber, sound):
    time = np.arange(32_000) / 16_000
    samples = {
        "silence": np.zeros(32_000),
        "noise": np.random.default_rng(0).standard_normal(32_000) * 0.2,
        "tone": 0.4 * np.sin(2 * np.pi * 440 * time),
        "no sample": np.zeros(0),
        "one sample": np.zeros(1),
        "not a number": np.full(16_000, np.nan),
    }[sound]
    heard = transcriber.transcribe(samples.astype(np.float32))
    assert (heard.text, heard.language, heard.seconds) == ("", None, len(samples) / 16_000)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("empty.wav", "audio", "not a readable audio"),
        ("text.wav", "audio", "not a readable audio"),
        ("random.mp3", "audio", ""),
        ("codec.wav", "audio", "codec that can't be decoded"),
        ("mute.mp4", "audio", "has no sound"),
        ("hour.flac", "too_long", "longer than 30 seconds"),
        ("minute.wav", "too_long", "longer than 30 seconds"),
        # play lists, which FFmpeg would follow to other files and addresses
        ("list.wav", "audio", "not a readable audio"),
        ("list.mp3", "audio", "not a readable audio"),
    ],
)
def test_files_that_are_no_recording_are_errors_and_the_worker_lives(transcriber, files, name, kind, words):
    transcriber.start(wait=True)
    worker = transcriber._worker
    with pytest.raises(TranscriptionError) as caught:
        transcriber.transcribe(files / name)
    assert caught.value.kind == kind and words in str(caught.value)
    assert name in str(caught.value) and str(files) not in str(caught.value)
    assert transcriber._worker is worker and worker.alive


IN_PROCESS = """
import sys, types
for name in ("jnana", "jnana.processing", "jnana.processing.data", "jnana.processing.speech"):
    package = types.ModuleType(name)  # without its __init__.py, which needs packages that are not here
    package.__path__ = ["/".join([sys.argv[1], *name.split(".")[1:]])]
    sys.modules[name] = package
from jnana.processing.speech.transcriber import Transcriber
from jnana.processing.speech.recordings import TranscriptionError
with Transcriber(sys.argv[2]) as transcriber:
    print("HEARD", [transcriber.transcribe(path).text for path in sys.argv[3:]], transcriber._worker)
try:
    Transcriber("small").transcribe(sys.argv[3])
except TranscriptionError as error:
    print("REFUSED", error.kind, error)
"""


def test_whisperx_runs_in_this_process_where_it_is_importable(python, files, tmp_path):
    """And says so when a model can't be had without a network."""
    environment = {**_environment(), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop(PYTHON_VARIABLE, None)
    done = subprocess.run(
        [python, "-c", IN_PROCESS, WORKER_SCRIPT.parents[2], STAND_IN_MODEL, files / "q.wav", files / "q.mp3"],
        capture_output=True,
        text=True,
        cwd=files,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # WhisperX logs to the same standard output
    heard, error = [line for line in done.stdout.splitlines() if line.startswith(("HEARD", "REFUSED"))]
    assert heard == f"HEARD {[PICTURE, PICTURE]} None"
    assert error.startswith("REFUSED network The speech model 'small' is not on this machine")


def test_this_environment_stays_without_whisperx():
    """torchaudio beside a CPU build of torch would break transformers: nothing of it may be installed here."""
    done = subprocess.run([sys.executable, "-c", "import whisperx"], capture_output=True)
    assert done.returncode and b"ModuleNotFoundError" in done.stderr
