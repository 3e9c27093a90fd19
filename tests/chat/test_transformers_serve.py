"""A chat completion with a base64 image, from a real server process, equals the session's own answer; so does what
`transformers chat` prints."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from transformers.utils import is_serve_available

from jnana.chat import ChatSession
from jnana.processing import JnanaProcessor
from tests.modeling.pairs import join
from tests.tiny import save_tiny_text, save_tiny_vision


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
ROOT = Path(__file__).parents[2]
SECONDS = 240  # to start, on a busy machine


def complete(port: int, model: str, messages: list[dict]) -> str:
    body = {"model": model, "messages": messages, "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def chat_of_transformers(port: int, model: str, question: str) -> str:
    """What `transformers chat` prints as the answer to a question typed into it."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", model, f"http://127.0.0.1:{port}/v1"]
    command += ["max_new_tokens=6", "do_sample=False"]
    environment = {**os.environ, "COLUMNS": "400", "TERM": "dumb", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        command, input=f"{question}\nn\n!exit\n", env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip() for line in done.stdout.split(f"<{model}>:")[1].splitlines()]
    return next(line for line in lines if line)


def wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_a_chat_completion_with_an_image(tmp_path):
    vision, text = save_tiny_vision(tmp_path / "v"), save_tiny_text(tmp_path / "t")
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
    model = join(tmp_path / "pair", image_token_id=processor.image_token_id)
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    # only plain words: what the server sends travels as text
    texts = [processor.tokenizer.decode([number]) for number in range(320)]
    model.generation_config.suppress_tokens = [
        number for number, text in enumerate(texts) if not (text.isascii() and text.strip().isalpha())
    ]
    folder = str(tmp_path / "checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        folder,
        "--trust-remote-code",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--host",
        "127.0.0.1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        wait_for(port, process)
        answers = []
        for colour in ("red", "yellow"):
            image = Image.new("RGB", (30, 24), colour)
            image.paste("white", (0, 0, 10, 10))
            file = io.BytesIO()
            image.save(file, "PNG")
            address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what is this?"}]
            answers.append(complete(port, folder, [{"role": "user", "content": parts}]))
            *_, expected = ChatSession(model, processor).ask("what is this?", [image], max_new_tokens=6)
            assert answers[-1].strip() == expected
        assert answers[0] != answers[1]  # the control: the image was looked at
        assert (
            chat_of_transformers(port, folder, "why?")
            == list(ChatSession(model, processor).ask("why?", max_new_tokens=6))[-1]
        )
    finally:
        process.terminate()
        process.wait(timeout=30)
