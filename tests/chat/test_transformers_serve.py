"""A chat completion with a base64 image, from a real server process, equals the session's own answer."""

import base64
import contextlib
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
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import is_serve_available

from jnana.chat import ChatSession
from jnana.processing import JnanaProcessor
from tests.modeling.pairs import join
from tests.tiny import save_tiny_llava, save_tiny_text, save_tiny_vision


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed")
ROOT = Path(__file__).parents[2]
SECONDS = 240  # to start, on a busy machine
TRANSFORMERS = [sys.executable, "-m", "transformers.cli.transformers"]


@contextlib.contextmanager
def serving(folder: Path):
    """`transformers serve FOLDER --trust-remote-code` in a process that does not import this package; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--trust-remote-code", "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
    process = subprocess.Popen([*TRANSFORMERS, "serve", str(folder), *options], cwd=folder.parent, env=environment())
    try:
        wait_for(port, process)
        yield port
    finally:
        process.kill()  # asked to end, it may wait for open connections
        process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}


def wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def complete(port: int, folder: Path, image: Image.Image) -> str:
    """The answer to a question about an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what is this?"}]
    body = {"model": str(folder), "messages": [{"role": "user", "content": parts}], "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


def plain_words(model, tokenizer) -> None:
    """Let a model generate plain words only: what the server sends travels as text."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    texts = [tokenizer.decode([number]) for number in range(320)]
    model.generation_config.suppress_tokens = [
        number for number, text in enumerate(texts) if not (text.isascii() and text.strip().isalpha())
    ]


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (30, 24), colour)
    image.paste("white", (0, 0, 10, 10))
    return image


def test_a_chat_completion_with_an_image_and_a_chat_in_the_terminal(tmp_path):
    vision, text = save_tiny_vision(tmp_path / "v"), save_tiny_text(tmp_path / "t")
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
    model = join(tmp_path / "pair", image_token_id=processor.image_token_id)
    plain_words(model, processor.tokenizer)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with serving(folder) as port:
        answers = [complete(port, folder, picture(colour)) for colour in ("red", "yellow")]
        command = [*TRANSFORMERS, "chat", str(folder), f"http://localhost:{port}/v1"]
        talked = subprocess.run(
            [*command, "max_new_tokens=6", "do_sample=false"],
            input="what is this?\nn\n!exit\n",  # `n`: not to go on with an answer that reached its length
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=tmp_path,
            env=environment() | {"HF_HUB_OFFLINE": "0"},  # with which its client would not reach this machine either
        )
    for answer, colour in zip(answers, ("red", "yellow"), strict=True):
        *_, expected = ChatSession(model, processor).ask("what is this?", [picture(colour)], max_new_tokens=6)
        assert answer == expected
    assert answers[0] != answers[1]  # the control: the image was looked at
    *_, expected = ChatSession(model, processor).ask("what is this?", max_new_tokens=6)
    assert expected in talked.stdout, talked.stdout + talked.stderr[-2000:]


def test_stock_llava_is_served_alike(tmp_path):
    """The control of the test above: the same command, requests and comparison."""
    folder = save_tiny_llava(tmp_path / "stock", "llava")
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    plain_words(model, processor.tokenizer)
    model.save_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    with serving(folder) as port:
        answer = complete(port, folder, picture("red"))
    inputs = processor(images=picture("red"), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.decode(tokens, skip_special_tokens=True).strip()
