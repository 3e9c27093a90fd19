"""The app's arguments and environment variables."""

import os
import signal
import socket
import tempfile

import pytest
import torch


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

from jnana import app  # noqa: E402
from jnana.chat import startup  # noqa: E402
from jnana.chat.limits import Limits  # noqa: E402


def test_the_model_is_the_flags_the_environments_or_the_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JNANA_MODEL", raising=False)
    with pytest.raises(SystemExit, match="make demo"):
        startup.find_model(None)
    (tmp_path / startup.DEMO).mkdir(parents=True)
    assert startup.find_model(None) == str(startup.DEMO)
    monkeypatch.setenv("JNANA_MODEL", "someone/model")
    assert startup.find_model(None) == "someone/model"
    assert startup.find_model("mine") == "mine"
    with pytest.raises(SystemExit, match="can't be loaded"):
        app.load(app.parse_arguments(["--model_name_or_path", str(tmp_path)]))


def test_host_names_are_the_flags_the_environments_and_this_machines(monkeypatch):
    for name in ("GRADIO_SERVER_NAME", "SPACE_HOST", "JNANA_HOST_NAMES"):
        monkeypatch.delenv(name, raising=False)
    own = {socket.gethostname()}
    assert startup.find_host_names(None, None) == own
    assert startup.find_host_names("box", " a.example ,b ") == own | {"box", "a.example", "b"}
    monkeypatch.setenv("SPACE_HOST", "me-chess.hf.space")
    monkeypatch.setenv("JNANA_HOST_NAMES", "chess.example.org")
    assert startup.find_host_names(None, None) == own | {"me-chess.hf.space", "chess.example.org"}
    for wrong in ("http://a.example", "a.example:8443", "a b"):
        with pytest.raises(SystemExit, match="without http:// and port"):
            startup.find_host_names(None, wrong)


def test_a_login_has_a_name_and_a_password(monkeypatch):
    monkeypatch.delenv("JNANA_LOGIN", raising=False)
    assert app.find_login(None) is None
    assert app.find_login("anna:se:cret") == ("anna", "se:cret")
    monkeypatch.setenv("JNANA_LOGIN", "bob:pw")
    assert app.find_login(None) == ("bob", "pw")
    for wrong in ("anna", "anna:", ":secret"):
        with pytest.raises(SystemExit, match="name:password"):
            app.find_login(wrong)


def test_every_limit_has_a_flag():
    arguments = app.parse_arguments(["--queue_length", "3", "--image_megapixels", "1.5"])
    assert {name: getattr(arguments, name) for name in vars(Limits())} == {
        **vars(Limits()),
        "queue_length": 3,
        "image_megapixels": 1.5,
    }


def test_speech_is_off_unless_asked_for_or_at_hand(monkeypatch):
    for name in ("JNANA_WHISPERX_PYTHON", "JNANA_WHISPERX_MODEL"):
        monkeypatch.delenv(name, raising=False)
    started = []

    class StandIn:
        def __init__(self, model, max_seconds):
            started.append((model, max_seconds))

    monkeypatch.setattr(app, "Transcriber", StandIn)
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert app.find_speech(None, Limits()) is None and app.find_speech("none", Limits()) is None
    assert isinstance(app.find_speech("small", Limits()), StandIn)
    monkeypatch.setenv("JNANA_WHISPERX_PYTHON", "/usr/bin/python3")
    assert isinstance(app.find_speech(None, Limits(audio_seconds=9)), StandIn)
    assert started == [("small", 120), (None, 9)]
    assert app.find_speech("none", Limits()) is None


def test_the_bits_of_the_language_model_reach_the_loader(monkeypatch):
    taken = {}

    def load(path, **options):
        taken.update(options)
        raise ImportError("quantization is 'nf4', which needs bitsandbytes")

    monkeypatch.setattr(startup, "load_model", load)
    given = ["--model_name_or_path", "mine", "--device", "cpu"]
    with pytest.raises(SystemExit, match="can't be loaded: quantization is 'nf4', which needs bitsandbytes"):
        app.load(app.parse_arguments([*given, "--quantization", "nf4"]))
    assert (taken["quantization"], taken["device_map"]) == ("nf4", {"": torch.device("cpu")})
    with pytest.raises(SystemExit, match="can't be loaded"):
        app.load(app.parse_arguments(given))
    assert taken["quantization"] is None  # as the checkpoint says


def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for given, words in (
        (["--queue_length", "0"], "queue_length is 0"),
        (["--speech_model", str(tmp_path)], "lacks model.bin"),
        (["--examples_folder", str(tmp_path / "none")], "is not a directory"),
    ):
        with pytest.raises(SystemExit, match=words):
            app.load(app.parse_arguments(["--model_name_or_path", "mine", *given]))


def test_uploads_go_with_the_app_and_those_of_a_killed_one_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / "jnana-uploads-of-a-killed-app"
    left.mkdir()
    (left / "face.png").touch()
    pipe = tmp_path / "jnana-uploads-that-nobody-writes"
    os.mkfifo(pipe)
    with app.upload_directory() as mine:
        assert {mine, pipe} == set(tmp_path.iterdir())
        with app.upload_directory() as anothers:  # its start does not delete the directory of a running app
            assert mine.is_dir() and anothers.is_dir()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_folder_taken_for_left_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock, taken = app.fcntl.flock, []

    def slow(handle, how):
        if not taken:  # another app starts in between
            taken.append(next(tmp_path.iterdir()))
            with app.upload_directory():
                assert not taken[0].exists()
        lock(handle, how)

    monkeypatch.setattr(app.fcntl, "flock", slow)
    with app.upload_directory() as mine:
        assert mine.is_dir() and taken and mine != taken[0]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_was_turned_off_stays_off():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        app.handle_signals()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
