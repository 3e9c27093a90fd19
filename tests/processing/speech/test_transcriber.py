"""The worker's protocol, with a test double that crashes, hangs, starts slowly or sends malformed replies."""

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jnana.processing.speech import Transcriber, TranscriptionError
from jnana.processing.speech import transcriber as module
from jnana.processing.speech.recordings import speech_model, wav_bytes


WORKER = Path(__file__).with_name("stand_in_worker.py")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def recording(tmp_path):
    """Writes a "recording" whose text tells the stand-in what to do."""

    def write(words: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.wav"
        path.write_text(words, encoding="latin-1")
        return path

    return write


@pytest.fixture
def make():
    """Makes transcribers over the stand-in and closes them."""
    made = []

    def transcriber(model: str = "small", **options) -> Transcriber:
        options = {"python": sys.executable, "worker_script": WORKER, "start_timeout": 30.0, **options}
        made.append(Transcriber(model, **options))
        return made[-1]

    yield transcriber
    for each in made:
        each.close()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def assert_gone(*pids: int, within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_running(pid)]


def refusal(transcriber: Transcriber, path) -> TranscriptionError:
    with pytest.raises(TranscriptionError) as caught:
        transcriber.transcribe(path)
    return caught.value


def test_one_worker_answers_many_requests(make, recording):
    transcriber = make()
    assert not transcriber.ready
    heard = [transcriber.transcribe(recording(words)) for words in ("one", "two", "")]
    assert [transcript.text for transcript in heard] == ["one", "two", ""]
    assert (heard[0].language, heard[0].seconds, heard[0].model) == ("en", 1.0, "small")
    assert transcriber.ready
    worker = transcriber._worker
    transcriber.transcribe(recording("three"))
    assert transcriber._worker is worker and worker.last_output == "starting small"


def test_error_replies_leave_the_worker_alive(make, recording):
    transcriber = make()
    error = refusal(transcriber, recording("error"))
    assert (str(error), error.kind) == ("Not a recording.", "audio")
    worker = transcriber._worker
    assert refusal(transcriber, recording("strange")).kind == "internal"
    assert transcriber.transcribe(recording("after")).text == "after"
    assert transcriber._worker is worker


def test_garbage_is_passed_over(make, recording, caplog):
    with caplog.at_level(logging.DEBUG):
        assert make("garbage").transcribe(recording("garbage")).text == "garbage"
    assert "not json" in caplog.text and "of another" in caplog.text


def test_much_on_standard_error_blocks_nothing(make, recording):
    assert make(request_timeout=20.0).transcribe(recording("loud")).text == "loud"


def test_crash_in_mid_request_is_an_error_and_the_next_request_starts_anew(make, recording):
    transcriber = make()
    first = transcriber.transcribe(recording("before")) and transcriber._worker
    error = refusal(transcriber, recording("crash"))
    assert error.kind == "crash" and "started again" in str(error) and "starting small" in error.details
    assert not transcriber.ready
    assert transcriber.transcribe(recording("after")).text == "after"
    assert transcriber._worker is not first
    assert_gone(first.pid)


def test_worker_killed_between_requests_is_replaced(make, recording):
    transcriber = make()
    transcriber.start(wait=True)
    os.killpg(transcriber._worker.pid, signal.SIGKILL)
    assert_gone(transcriber._worker.pid)
    transcriber._worker._readers[0].join(5)
    assert transcriber.transcribe(recording("again")).text == "again"


@pytest.mark.parametrize("by", ["python", "uv"])
def test_timeout_kills_the_worker_and_all_it_started(make, recording, by):
    transcriber = make(request_timeout=1.5, **({"python": None} if by == "uv" else {}))
    transcriber.start(wait=True)
    guard = transcriber._worker.pid
    begin = time.monotonic()
    error = refusal(transcriber, recording("hang"))
    assert error.kind == "timeout" and "1.5 seconds" in str(error)
    assert 1.4 < time.monotonic() - begin < 10
    pids = [int(pid) for pid in re.findall(r"with (\d+) and (\d+)", error.details)[0]]
    assert_gone(guard, *pids)
    transcriber.request_timeout = 30.0
    assert transcriber.transcribe(recording("after")).text == "after"


def test_slow_start_is_waited_for_and_an_endless_one_is_not(make, recording):
    assert make("slow", request_timeout=0.9).transcribe(recording("late")).text == "late"  # two time-outs, not one
    transcriber = make("never", start_timeout=1.0)
    error = refusal(transcriber, recording("x"))
    assert error.kind == "timeout" and "still loading after 1 seconds" in str(error)
    assert not transcriber.ready


def test_background_start_logs_what_fails_and_is_tried_again(make, recording, caplog):
    transcriber = make("fatal")
    with caplog.at_level(logging.INFO):
        transcriber.start()
        deadline = time.monotonic() + 20
        while "No such model." not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "No such model." in caplog.text and "starting fatal" in caplog.text
    error = refusal(transcriber, recording("x"))
    assert (str(error), error.kind) == ("No such model.", "model") and "a traceback" in error.details

    with make("slow") as starting:
        assert not starting.ready
        assert starting.transcribe(recording("waits")).text == "waits"


def test_worker_that_ends_at_once_gives_its_last_output(make, recording):
    error = refusal(make("ends"), recording("x"))
    assert error.kind == "crash" and "exit status 3" in str(error) and "Something is missing." in str(error)


def test_close_ends_the_worker_even_in_mid_request(make, recording):
    transcriber = make()
    transcriber.start(wait=True)
    worker = transcriber._worker
    begin = time.monotonic()
    transcriber.close()
    assert time.monotonic() - begin < 2.5, "it was killed instead of asked"
    assert "input has ended" in worker.last_output
    assert_gone(worker.pid)
    assert refusal(transcriber, recording("x")).kind == "closed"

    transcriber.start(wait=True)
    worker, errors = transcriber._worker, []
    thread = threading.Thread(target=lambda: errors.append(refusal(transcriber, recording("hang"))))
    thread.start()
    deadline = time.monotonic() + 10
    while "hanging" not in worker.last_output and time.monotonic() < deadline:
        time.sleep(0.02)
    transcriber.close()
    thread.join(10)
    assert [error.kind for error in errors] == ["closed"]
    assert_gone(worker.pid)


def test_threads_take_turns(make, recording):
    transcriber = make()
    heard: dict[str, str] = {}
    paths = {f"words {index}": recording(f"words {index}") for index in range(8)}
    threads = [
        threading.Thread(
            target=lambda words=words, path=path: heard.update({words: transcriber.transcribe(path).text})
        )
        for words, path in paths.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert heard == {words: words for words in paths}


PARENT = """
import importlib.util, logging, sys
logging.basicConfig(level=logging.INFO)
spec = importlib.util.spec_from_file_location("worker_process", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.GUARD_SCRIPT = sys.argv[2]
worker = module.WorkerProcess([sys.executable, sys.argv[3], "--model=small"])
while worker.receive(20)["event"] != "ready":
    pass
worker.request({"path": sys.argv[4]}, 1000)
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_killed_parent_leaves_nothing_behind(recording, tmp_path, guarded):
    """The worker hangs and does not look at its input; without the guard it would stay."""
    guard = ROOT / "processing" / "speech" / "worker_guard.py"
    if not guarded:
        guard = tmp_path / "no_guard.py"
        guard.write_text("import os, sys; os.execvp(sys.argv[3], sys.argv[3:])")
    paths = [ROOT / "processing" / "speech" / "worker_process.py", guard, WORKER, recording("hang")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *paths], stderr=subprocess.PIPE, text=True)
    found = next(match for line in parent.stderr if (match := re.search(r"with (\d+) and (\d+)", line)))
    pids = [int(pid) for pid in found.groups()]
    try:
        assert all(map(is_running, pids))
        parent.kill()
        parent.wait()
        if guarded:
            assert_gone(*pids)
        else:
            time.sleep(1.5)
            assert all(map(is_running, pids)), "they end by themselves: the guard is not what is tested"
    finally:
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)
        parent.stderr.close()


# ---------------------------------------------------------------------- nothing to run it with


def test_missing_uv_and_missing_python_name_the_remedy(make, recording, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "")
    error = refusal(make(python=None), recording("x"))
    assert error.kind == "environment" and "pip install uv" in str(error)
    monkeypatch.setenv(module.PYTHON_VARIABLE, "/nowhere/else/python")
    error = refusal(make(python=None), recording("x"))
    assert error.kind == "environment" and "/nowhere/else/python" in str(error)


def test_no_network_at_the_first_provisioning(recording, monkeypatch, tmp_path):
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.delenv(module.PYTHON_VARIABLE, raising=False)
    transcriber = Transcriber("small", start_timeout=60.0)
    error = refusal(transcriber, recording("x"))
    assert error.kind == "network" and "Connect to the network" in str(error), error.details


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("  cause: dns error\n  cause: failed to lookup address information", "network"),
        ("  cause: tcp connect error\n  cause: Connection refused (os error 111)", "network"),
        ("error: failed to write: No space left on device (os error 28)", "environment"),
        ("error: No interpreter found for Python >=3.10, <3.14", "environment"),
        ("error: something new", "crash"),
    ],
)
def test_what_uv_complains_of(words, kind):
    message, found = module._start_error(module.WorkerEnded("the worker ended", words), started=False)
    assert found == kind and "could not be" in message
    assert module._start_error(module.WorkerEnded("the worker ended", words), started=True)[1] == "crash"


def test_python_without_whisperx_is_named(recording):
    assert importlib.util.find_spec("whisperx") is None, "this environment must not have it"
    transcriber = Transcriber("small", python=sys.executable, start_timeout=60.0)
    error = refusal(transcriber, recording("x"))
    assert error.kind == "environment" and "WhisperX can't be imported" in str(error)


# ---------------------------------------------------------------------- before the worker is asked


def test_recordings_that_are_none(make, tmp_path):
    transcriber = make("ends")  # would fail if it were started
    for audio in (
        tmp_path,
        tmp_path / "missing.wav",
        "https://example.org/question.wav",
        np.zeros((2, 2, 2)),
        np.array("a"),
    ):
        assert refusal(transcriber, audio).kind == "audio"
    assert refusal(transcriber, np.zeros(301 * 16_000, np.int8)).kind == "too_long"
    with pytest.raises(TranscriptionError, match="at least 1 Hz"):
        transcriber.transcribe(np.zeros(3), sampling_rate=0)
    assert str(tmp_path) not in str(refusal(transcriber, tmp_path / "missing.wav"))


def test_names_of_speech_models(tmp_path):
    assert speech_model("openai/whisper-small") == "small"
    assert speech_model("openai/whisper-large-v3-turbo") == "large-v3-turbo"
    assert speech_model("large-v2") == "large-v2"
    assert speech_model("Systran/faster-whisper-small") == "Systran/faster-whisper-small"
    with pytest.raises(ValueError, match="is not a directory"):
        speech_model(tmp_path / "missing")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="lacks model.bin, tokenizer.json, vocabulary.json"):
        speech_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="ct2-transformers-converter"):
        Transcriber(tmp_path)
    for name in ("model.bin", "tokenizer.json", "vocabulary.txt"):
        (tmp_path / name).touch()
    assert speech_model(tmp_path) == str(tmp_path.resolve())


def test_model_of_the_environment_variable(monkeypatch):
    monkeypatch.setenv(module.MODEL_VARIABLE, "openai/whisper-tiny")
    assert Transcriber().model == "tiny"
    assert Transcriber("base").model == "base"
    monkeypatch.delenv(module.MODEL_VARIABLE)
    assert Transcriber().model == "small"


def test_samples_become_a_float_wav_file():
    def samples_of(data: bytes) -> np.ndarray:
        assert data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") == len(data) - 8
        assert int.from_bytes(data[20:22], "little") == 3  # IEEE floats
        return np.frombuffer(data[44:], "<f4")

    values = np.array([0.0, 0.5, -1.0], np.float32)
    assert np.array_equal(samples_of(wav_bytes(values.astype(np.float64), 16_000)), values)
    assert np.array_equal(samples_of(wav_bytes((values * 2**15).astype(np.int16), 8_000)), values)
    assert np.array_equal(samples_of(wav_bytes((values * 128 + 128).astype(np.uint8), 8_000)), values)
    stereo = wav_bytes(np.stack([values, -values], axis=1), 44_100)
    assert int.from_bytes(stereo[22:24], "little") == 2 and int.from_bytes(stereo[24:28], "little") == 44_100
    assert np.array_equal(samples_of(stereo), [0.0, 0.0, 0.5, -0.5, -1.0, 1.0])


NOISY_PACKAGES = {
    "ctranslate2.py": "import os; os.write(1, b'noise'); get_cuda_device_count = lambda: 0",
    "faster_whisper/__init__.py": "",
    "faster_whisper/vad.py": "def get_speech_timestamps(*args, **kwargs): return []",
    "whisperx/__init__.py": """
import os, subprocess, sys
print("Use manually assigned vad_model.")
os.write(1, b'{"event": "ready"}')
assert os.environ["PYANNOTE_METRICS_ENABLED"] == "false" and os.environ["ORT_DISABLE_TELEMETRY"] == "1"
assert subprocess.run(["cat"], stdout=subprocess.PIPE, check=True).stdout == b"", "a child reads the requests"
def load_model(*args, **kwargs): print("loaded")
""",
    "whisperx/diarize.py": "Segment = object",
    "whisperx/vads.py": "class Vad:\n    def __init__(self, onset): ...",
    "whisperx-3.dist-info/METADATA": "Metadata-Version: 2.1\nName: whisperx\nVersion: 3\n",
}


def test_only_replies_reach_standard_output(tmp_path):
    """The real worker over packages that print, write and spawn as they please."""
    for name, text in NOISY_PACKAGES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    requests = '{"op": "ping", "id": 1}\nnot json\n{"op": "sing", "id": 2}\n{"op": "transcribe", "id": 3}\n'
    worker = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + RUN_WORKER],
        input=requests.encode(),
        capture_output=True,
        timeout=60,
    )
    replies = [json.loads(line) for line in worker.stdout.splitlines()]
    assert worker.returncode == 0, worker.stderr.decode()
    assert [reply.get("event") or reply["id"] for reply in replies] == ["started", "ready", 1, None, 2, 3]
    assert [reply.get("ok") for reply in replies[2:]] == [True, False, False, False]
    assert b"noise" in worker.stderr and b"loaded" in worker.stderr


RUN_WORKER = f"import runpy; runpy.run_path({str(module.WORKER_SCRIPT)!r}, run_name='__main__')"


WITHOUT_PROCESS_GROUPS = """
import os, signal, sys
saved = {name: getattr(os, name) for name in ("killpg", "waitid")}
for name in saved:
    delattr(os, name)  # as on Windows
from jnana import Transcriber
from jnana.processing.speech import TranscriptionError
transcriber = Transcriber("small", python=sys.executable, worker_script=sys.argv[1])
try:
    transcriber.transcribe(sys.argv[1])
except TranscriptionError as error:
    print(error.kind, error)
for name, function in saved.items():  # the control
    setattr(os, name, function)
print("then", transcriber.transcribe(sys.argv[1]).language)
transcriber.close()
"""


def test_systems_without_process_groups_raise_when_speech_is_used():
    """Importing works. This is also the one test that imports `Transcriber` before `processing.data`."""
    command = [sys.executable, "-c", WITHOUT_PROCESS_GROUPS, str(WORKER)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    error, control = found.stdout.splitlines()
    assert error.startswith("environment Spoken questions need Linux or macOS: ") and "os.killpg" in error
    assert control == "then en"
