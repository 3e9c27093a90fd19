"""The API, driven with the official `openai` client over a real socket."""

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from jnana.chat import ChatSession
from jnana.chat.limits import Limits
from jnana.processing import JnanaProcessor
from tests.modeling.pairs import join
from tests.tiny import save_tiny_text, save_tiny_vision


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
openai = pytest.importorskip("openai", reason="the official client is not installed")
import uvicorn  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from gradio.routes import App  # noqa: E402
from openai.types.chat import completion_create_params as schema  # noqa: E402

from jnana.chat.api import Api  # noqa: E402
from jnana.chat.api_request import HONOURED, NEUTRAL, ApiError, check_size  # noqa: E402
from jnana.chat.assistant import Assistant, Turns  # noqa: E402
from jnana.chat.completions import Written  # noqa: E402
from jnana.chat.gate import STALL_SECONDS  # noqa: E402
from jnana.chat.interface import build_interface, launch_options  # noqa: E402
from jnana.chat.serve import build_server  # noqa: E402


ROOT = Path(__file__).parents[2]
SECONDS = 240  # to start, on a busy machine
LIMITS = Limits(new_tokens=12, kept_chats=3, queue_length=64, images=3, upload_megabytes=16)
WORDS = "what is this piece"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model that writes plain words, so that an answer is equal after it travelled as text."""
    folder = tmp_path_factory.mktemp("pair")
    processor = JnanaProcessor.from_vision_text_pretrained(
        save_tiny_vision(folder / "v"), save_tiny_text(folder / "t")
    )
    model = join(
        folder / "pair", text_changes={"max_position_embeddings": 192}, image_token_id=processor.image_token_id
    )
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    texts = [processor.tokenizer.decode([number]) for number in range(320)]
    model.generation_config.suppress_tokens = [
        number for number, text in enumerate(texts) if not (text.isascii() and text.strip().isalpha())
    ]
    return model, processor


@pytest.fixture(scope="module")
def assistant(pair) -> Assistant:
    return Assistant(*pair, "tiny", LIMITS)


class Serving(uvicorn.Server):
    """A server in a thread of this process."""

    def __init__(self, app):
        super().__init__(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        while not self.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_) -> None:
        self.should_exit = True
        self.thread.join(timeout=30)


@pytest.fixture(scope="module")
def address(assistant):
    with Serving(build_server(assistant, set())) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


JOBS: list = []


@pytest.fixture(autouse=True)
def keep_jobs(monkeypatch):
    """The requests of a test, as the API queues them."""
    from jnana.chat import api

    JOBS.clear()

    class Kept(api.Job):
        def __init__(self, request):
            super().__init__(request)
            JOBS.append(self)

    monkeypatch.setattr(api, "Job", Kept)


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (30, 24), colour)
    image.paste("white", (0, 0, 10, 10))
    return image


def part(colour: str) -> dict:
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def request_to(address: str, body: dict, **headers: str) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"} | headers
    return urllib.request.Request(address, json.dumps(body).encode(), headers)


def ask(client, *messages, **options):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8} | options
    return client.chat.completions.create(messages=list(messages), **options)


def text_of(reply) -> str:
    return reply.choices[0].message.content


def session_answer(pair, *questions, new_tokens: int = 8) -> list[str]:
    """The answers of a chat session by itself, each question a text and its images."""
    session = ChatSession(*pair)
    return [list(session.ask(text, images, max_new_tokens=new_tokens))[-1] for text, *images in questions]


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="Only 'tiny' is served"):
        client.models.retrieve("other/model")


def test_a_chat_with_images_in_several_turns_is_that_of_a_session(client, pair):
    expected = session_answer(pair, ("what?", picture("red")), (WORDS, picture("blue")), ("why?",))
    messages = [user(part("red"), "what?")]
    replies = [ask(client, *messages)]
    for following in (user(part("blue"), WORDS), {"role": "user", "content": "why?"}):
        messages += [{"role": "assistant", "content": text_of(replies[-1])}, following]
        replies.append(ask(client, *messages))
    assert [text_of(reply) for reply in replies] == expected
    assert text_of(replies[0]) != text_of(ask(client, user(part("yellow"), "what?")))  # the control: it was looked at
    first, *later = [reply.usage for reply in replies]
    assert first.completion_tokens == 8 and first.total_tokens == first.prompt_tokens + 8
    # each later turn processes its own question only
    for before, usage in zip([first, *later], later, strict=False):
        assert usage.prompt_tokens_details.cached_tokens >= before.prompt_tokens
    assert replies[0].choices[0].finish_reason == "length"


def test_requests_that_begin_alike_share_the_image(client, pair):
    ask(client, user(part("green"), "what?"))
    reply = ask(client, user(part("green"), "how many pieces?"))
    image_tokens = pair[1].count_image_tokens((24, 30))
    assert reply.usage.prompt_tokens_details.cached_tokens >= image_tokens
    assert text_of(reply) == session_answer(pair, ("how many pieces?", picture("green")))[0]
    reply = ask(client, user(part("purple"), "how many pieces?"))  # the control: another image
    assert reply.usage.prompt_tokens_details.cached_tokens < image_tokens


def test_a_streamed_answer_is_the_whole_one_in_pieces(client):
    whole = ask(client, user(part("red"), WORDS))
    chunks = list(ask(client, user(part("red"), WORDS), stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text_of(whole) and sum(map(bool, pieces)) > 2
    assert not pieces[1].startswith(" ") and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    body = {"model": "tiny", "messages": [user("hi")], "stream": True, "max_tokens": 2}
    with urllib.request.urlopen(request_to(f"{client.base_url}chat/completions", body), timeout=SECONDS) as raw:
        assert raw.read().decode().endswith("data: [DONE]\n\n")


def test_stop_texts_end_the_answer_before_them(client):
    whole = text_of(ask(client, user(WORDS)))
    stop = whole[3:5]
    for options in ({"stop": stop}, {"stop": ["none of this", stop]}):
        reply = ask(client, user(WORDS), **options)
        assert text_of(reply) == whole[: whole.index(stop)] and reply.choices[0].finish_reason == "stop"
        chunks = ask(client, user(WORDS), stream=True, **options)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == text_of(reply)
    assert text_of(ask(client, user(WORDS), stop="none of this")) == whole


def test_what_may_begin_a_stop_text_is_held_back():
    written = Written(["END", "\n"])
    assert [written.add(text) for text in ("a", "a E", "a EN", "a ENt", "a ENtE")] == ["a", " ", "", "ENt", ""]
    assert written.finish("a ENtE") == "E" and not written.stopped
    assert written.add("a ENtEND more") == "" and written.stopped


def test_seed_temperature_and_top_p(client):
    def sampled(**options) -> str:
        return text_of(ask(client, user(WORDS), **{"temperature": 2, "max_tokens": 10} | options))

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    greedy = text_of(ask(client, user(WORDS), max_tokens=10))
    assert sampled(seed=1) != greedy
    assert sampled(seed=1, top_p=0) == sampled(seed=2, top_p=0.0001) == greedy
    assert len({sampled(temperature=openai.omit) for _ in range(3)}) > 1  # the schema's default, 1
    assert ask(client, user(WORDS), max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3


def test_fifty_at_once_get_their_own_answers(client, pair):
    questions = [f"what is {number}?" for number in range(10)]
    expected = [session_answer(pair, (question,), new_tokens=4)[0] for question in questions]
    assert len(set(expected)) > 3

    def one(number: int) -> str:
        return text_of(ask(client, user(questions[number % 10]), max_tokens=4))

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(one, range(50))) == expected * 5


def test_every_parameter_of_the_schema_is_honoured_or_refused_by_name(client):
    names = set(schema.CompletionCreateParamsBase.__annotations__)
    names |= set(schema.CompletionCreateParamsStreaming.__annotations__)
    assert names <= {*HONOURED, *NEUTRAL}, "a parameter of a newer client"
    neutral = {name: values[0] for name, values in NEUTRAL.items() if isinstance(values, tuple) and values}
    neutral |= {"user": "anna", "metadata": {"a": "b"}, "n": 1, "store": False, "response_format": {"type": "text"}}
    neutral |= dict.fromkeys(set(NEUTRAL) - set(neutral))
    assert text_of(ask(client, user("hi"), extra_body=neutral)) == text_of(ask(client, user("hi")))
    wrong = {name: {"wanted": "it"} for name, values in NEUTRAL.items() if isinstance(values, tuple)}
    wrong |= {"n": 2, "logprobs": True, "frequency_penalty": 0.5, "store": 1, "tools": [{"type": "function"}]}
    wrong |= {"temperature": 2.1, "top_p": -1, "max_tokens": 0, "max_completion_tokens": 13, "seed": "one"}
    wrong |= {"stop": ["", "a"], "stream": "yes", "stream_options": {"include_usage": True}, "never_heard_of": 1}
    for name, value in wrong.items():
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, user("hi"), max_tokens=openai.omit, extra_body={name: value})
        assert refused.value.param == name and name in refused.value.message, name
        assert refused.value.type == "invalid_request_error"


BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGFuIGltYWdl"}}
REFUSED = (
    ([], "messages", "at least one"),
    ([{"role": "user", "content": None}], "messages[0].content", "must be a text"),
    ([{"role": "user", "content": " "}], "messages[0].content", "neither"),
    ([{"role": "tool", "content": "1"}], "messages[0].role", "must be system, user or assistant"),
    ([user("hi"), {"role": "assistant", "content": "ho"}], "messages[1].role", "last message"),
    ([user(BROKEN)], "messages[0].content[0].image_url.url", "can't be used as a picture"),
    ([user("hi", {"type": "input_audio"})], "messages[0].content[1]", "other kinds"),
    ([{"role": "user", "content": "hi", "name": "x"}], "messages[0].name", "not supported"),
    ([user(*[part("red")] * 4)], "messages", "at most 3"),
    (["hi"], "messages[0]", "an object"),
)


@pytest.mark.parametrize("messages, param, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_a_request_that_cannot_be_answered_gets_an_error_object(client, messages, param, words):
    with pytest.raises(openai.BadRequestError, match=re.escape(words)) as refused:
        ask(client, *messages)
    assert refused.value.param == param and "/" not in refused.value.message


def test_no_address_is_fetched_and_no_file_is_read(client, tmp_path):
    picture("red").save(tmp_path / "mine.png")
    for url in (str(tmp_path / "mine.png"), f"file://{tmp_path}/mine.png", "http://localhost:1/a.png", "data:,x", 7):
        with pytest.raises(openai.BadRequestError, match="Other addresses are not fetched"):
            ask(client, user({"type": "image_url", "image_url": {"url": url}}))


def test_a_chat_that_is_too_long_is_refused_with_both_lengths(client, pair):
    length = len(pair[1].encode_chat([user("so " * 16_000)]))
    assert length > 16_000
    for stream in (False, True):  # refused before a stream begins
        with pytest.raises(openai.BadRequestError, match=f"has {length:,} tokens.* at most 192") as refused:
            ask(client, user("so " * 16_000), stream=stream)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="have 1,199,999 characters"):
        ask(client, user("so " * 400_000))
    with pytest.raises(openai.NotFoundError, match="only 'tiny'"):
        ask(client, user("hi"), model="other")


def test_a_body_of_40_megabytes_is_refused_and_the_server_goes_on(client):
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)) as refused:
        ask(client, user("so " * 14_000_000))
    if isinstance(refused.value, openai.APIStatusError):  # else the connection was closed while it was being sent
        assert refused.value.status_code == 413
    assert text_of(ask(client, user("hi")))


def test_the_gate_stands_before_the_api(address):
    def status(path: str, data: bytes | None = None, **headers: str) -> tuple[int, dict]:
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"} | headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            body = error.read().decode()
            return error.code, json.loads(body)["error"] if body.startswith("{") else {"message": body}

    body = json.dumps({"model": "tiny", "messages": [user("hi")], "max_tokens": 1}).encode()
    assert status("/v1/chat/completions", body)[0] == 200
    assert status("/v1/chat/completions", body, Origin=address)[0] == 200
    for path, data in (("/v1/models", None), ("/v1/chat/completions", body), ("/reset", b"{}")):
        assert status(path, data, Host="evil.example")[0] == 421
    for path in ("/v1/chat/completions", "/v1/other", "/reset"):
        assert status(path, body, Origin="http://evil.example")[0] == 403, path
    assert status("/v1/models/tiny", b"{}")[1]["code"] == "unknown_url"
    assert status("/v1/embeddings", b"{}")[1]["message"].startswith("There is no POST /v1/embeddings")
    assert status("/gradio_api/upload", b"{}")[0] == status("/docs")[0] == 404  # routes of the page, and FastAPI's
    for bad in (b"{", b"[" * 100_000, b'{"a": \xff}', b"[]"):
        assert status("/v1/chat/completions", bad)[0] == 400, bad[:10]


def test_json_that_would_take_much_memory_is_refused_before_it_is_parsed(client, monkeypatch):
    from jnana.chat import api

    parsed = []
    loads = json.loads
    monkeypatch.setattr(api.json, "loads", lambda body: parsed.append(len(body)) or loads(body))
    for body in (b"[" + b"[]," * 1_000_000 + b"0]", b"[" + b'{"a":0},' * 100_000 + b"0]", b'{"a":' * 200_000):
        with pytest.raises(ApiError, match="values in its JSON; at most 250,000"):
            Api._read(SimpleNamespace(), body)
    assert parsed == []
    text = json.dumps({"text": '[{,:"\\' * 100_000}).encode()  # the control: text is no structure
    check_size(text)
    with pytest.raises(AttributeError):  # it is parsed and handed on
        Api._read(SimpleNamespace(), text)
    assert parsed == [len(text)]
    began = time.process_time()  # which other programs don't lengthen
    check_size(b'"' + b'\\"' * 5_000_000)  # a text that never ends, looked through once
    assert time.process_time() - began < 20


def test_parsing_waits_for_its_turn(pair, monkeypatch):
    """At most `READERS` bodies are parsed at one time."""
    from jnana.chat import api

    running, most, lock = [], [], threading.Lock()
    read = Api._read

    def counted(self, body):
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.05)
        try:
            return read(self, body)
        finally:
            with lock:
                running.pop()

    monkeypatch.setattr(Api, "_read", counted)
    assistant = Assistant(*pair, "tiny", LIMITS)
    with Serving(build_server(assistant, set())) as address, ThreadPoolExecutor(20) as pool:
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        list(pool.map(lambda _: ask(other, user("hi"), max_tokens=1), range(20)))
    assert max(most) <= api.READERS and len(most) == 20


def test_a_full_queue_and_a_failure_are_error_objects(pair, monkeypatch):
    assistant = Assistant(*pair, "tiny", Limits(queue_length=1, new_tokens=4))
    with Serving(build_server(assistant, set())) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        with assistant.turn, ThreadPoolExecutor(4) as pool:  # the page is answering
            running = [pool.submit(ask, client, user("hi"), max_tokens=1) for _ in range(4)]
            while sum(job.done() for job in running) < 2:
                time.sleep(0.01)
            refused = [job.exception() for job in running if job.done()]
            assistant.turn.__exit__()  # one waits for its turn, one in the queue; let them go on
            assert [text_of(job.result()) for job in running if not isinstance(job.exception(), openai.RateLimitError)]
            assert all(isinstance(error, openai.RateLimitError) for error in refused)
            assistant.turn.__enter__()
        monkeypatch.setattr(ChatSession, "answer", lambda *_, **__: (_ for _ in ()).throw(KeyError("/srv/secret")))
        with pytest.raises(openai.InternalServerError) as failed:
            ask(client, user("hi"), max_tokens=1)
        assert "secret" not in str(failed.value)
        with pytest.raises(openai.APIError, match="Something went wrong"):
            list(ask(client, user("hi"), max_tokens=1, stream=True))


def test_a_client_that_leaves_stops_its_answer(client, monkeypatch):
    left, written, answer = threading.Event(), [], ChatSession.answer

    def slow(self, *args, **options):
        for text in answer(self, *args, **options):
            written.append(text)
            yield text
            left.wait(SECONDS)

    monkeypatch.setattr(ChatSession, "answer", slow)
    stream = ask(client, user("go on"), stream=True, max_tokens=12)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)
    stream.close()
    deadline = time.monotonic() + SECONDS
    while not JOBS[0].cancelled.is_set() and time.monotonic() < deadline:
        time.sleep(0.05)
    left.set()
    ask(client, user("next"), max_tokens=3)  # begins when the first answer is over
    assert 4 <= len(written) <= 5  # of 15: one or two tokens of the first answer, three of the next


def test_turns_go_to_those_who_wait_in_order():
    turns, order = Turns(), []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    with turns:
        threads = []
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(turns) <= number + 1:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_one_process_serves_page_and_api(assistant, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def serve(api: Api | None) -> TestClient:
        blocks = build_interface(assistant)
        options = launch_options(assistant, tmp_path, ["testserver"], api)
        blocks.max_file_size, blocks.config = options["max_file_size"], blocks.get_config_file()
        blocks.auth = None
        return TestClient(App.create_app(blocks, app_kwargs=options["app_kwargs"]))

    page = serve(Api(assistant, "secret"))
    assert page.get("/config").status_code == page.get("/gradio_api/app_id").status_code == 200
    body = {"model": "tiny", "messages": [user("hi")], "max_tokens": 2}
    assert page.post("/v1/chat/completions", json=body).json()["error"]["code"] == "invalid_api_key"
    headers = {"Authorization": "Bearer secret"}
    reply = page.post("/v1/chat/completions", json=body, headers=headers)
    assert reply.json()["usage"]["completion_tokens"] == 2
    assert page.post("/v1/chat/completions", json=body, headers=headers | {"Host": "evil.x"}).status_code == 421
    assert serve(None).get("/v1/models").status_code == 404  # the control: without --api


def test_the_command_serves_a_checkpoint(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "jnana.chat.serve", str(tmp_path / "checkpoint"), "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu", "--new_tokens", "8"], cwd=tmp_path, env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + SECONDS
        served = SimpleNamespace(data=[])
        while not served.data and time.monotonic() < deadline and process.poll() is None:
            try:
                served = client.models.list()
            except openai.APIConnectionError:
                time.sleep(0.2)
        assert [model.id for model in served.data] == ["checkpoint"]
        reply = ask(client, user(part("red"), WORDS), model="checkpoint")
        assert text_of(reply) == session_answer(pair, (WORDS, picture("red")))[0]
        with socket.create_connection(("127.0.0.1", port)) as half:  # a request whose body never comes
            half.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:{port}\r\n".encode())
            half.sendall(b"Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{")
            client.models.list()  # so that the other one has come
            began = time.monotonic()
            process.terminate()
            process.wait(timeout=SECONDS)
        assert time.monotonic() - began < STALL_SECONDS  # the gate would give it up then
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # it writes what each thread does
        process.wait(timeout=SECONDS)
        raise
    finally:
        process.kill()
        process.wait()
