"""What the app is told on its command line and by the environment."""

import pytest
import torch


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")

import app  # noqa: E402
from chat.limits import Limits  # noqa: E402


def test_the_model_is_the_flags_the_environments_or_the_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JNANA_MODEL", raising=False)
    with pytest.raises(SystemExit, match="make demo"):
        app.find_model(None)
    (tmp_path / app.DEMO).mkdir(parents=True)
    assert app.find_model(None) == str(app.DEMO)
    monkeypatch.setenv("JNANA_MODEL", "someone/model")
    assert app.find_model(None) == "someone/model"
    assert app.find_model("mine") == "mine"
    with pytest.raises(SystemExit, match="can't be loaded"):
        app.load_assistant(app.parse_arguments(["--model_name_or_path", str(tmp_path)]))


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

        def start(self):
            pass

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

    monkeypatch.setattr(app, "load_model_and_processor", load)
    given = ["--model_name_or_path", "mine", "--device", "cpu"]
    with pytest.raises(SystemExit, match="can't be loaded: quantization is 'nf4', which needs bitsandbytes"):
        app.load_assistant(app.parse_arguments([*given, "--quantization", "nf4"]))
    assert (taken["quantization"], taken["device_map"]) == ("nf4", {"": torch.device("cpu")})
    with pytest.raises(SystemExit, match="can't be loaded"):
        app.load_assistant(app.parse_arguments(given))
    assert taken["quantization"] is None  # as the folder says
