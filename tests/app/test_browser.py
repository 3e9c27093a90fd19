"""The running app in a real browser: images, questions, correct answers, and errors.

Screenshots stay in `JNANA_SCREENSHOTS`, or in `outputs/screenshots` of the working folder.
"""

import base64
import io
import json
import os
import re
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import CHROMIUM
from tests.chat.test_limits import bomb
from tests.speech import speak


pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; .ci/system_packages.sh installs it")

TIMEOUT = 60_000  # ms; on a quiet machine everything takes a second or two
sync_api.expect.set_options(timeout=TIMEOUT)


@pytest.fixture(scope="module")
def microphone(tmp_path_factory) -> Path:
    """The file that the browser's microphone plays; a test must write it first."""
    return tmp_path_factory.mktemp("microphone") / "said.wav"


@pytest.fixture(scope="module")
def browser(microphone):
    """Chromium with a camera that films a test picture, and a microphone that hears a file once."""
    devices = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    devices.append(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *devices]
        )
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, running):
    devices = ["camera", "microphone", "clipboard-read", "clipboard-write"]
    page = browser.new_page(viewport={"width": 1180, "height": 940}, permissions=devices)
    page.set_default_timeout(TIMEOUT)
    page.outside = []  # requests to other servers
    page.on("request", lambda r: page.outside.append(r.url) if running.address not in r.url else None)
    page.goto(running.address)
    page.wait_for_selector("#question textarea")
    yield page
    page.close()


def screenshot(tab, name: str) -> None:
    folder = Path(os.environ.get("JNANA_SCREENSHOTS", "outputs/screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=str(folder / f"{name}.png"))


def show(tab, file: Path) -> None:
    tab.set_input_files("#picture input[type=file]", str(file))


def hand_over(tab, recording: Path) -> None:
    """Drop a recording."""
    tab.click('#recording button[aria-label="Upload file"]')
    tab.set_input_files("#recording input[type=file]", str(recording))


def ask(tab, question: str | None = None) -> str:
    """Type a question (or keep the text of the box), send it, and wait for the answer; returns the last message."""
    answers = tab.locator("#chat .bot.message")
    before = answers.count()
    if question is not None:
        tab.fill("#question textarea", question)
    tab.click("#send")
    sync_api.expect(answers).to_have_count(before + 1)
    sync_api.expect(tab.locator("#status")).to_contain_text("new tokens")
    return answers.nth(before).inner_text().strip()


def toast(tab, name: str) -> str:
    """The text of a notice, which is saved as a screenshot and closed."""
    tab.wait_for_selector(".toast-body")
    screenshot(tab, name)
    text = tab.inner_text(".toast-body")
    tab.click(".toast-close")
    tab.wait_for_selector(".toast-body", state="detached")
    return text


def refusal(tab, name: str) -> str:
    """The text beside the images about a file that was refused; a screenshot is saved."""
    sync_api.expect(tab.locator("#picture img")).to_have_count(0)  # the server has answered
    sync_api.expect(tab.locator("#refused")).to_contain_text(re.compile("[a-z]{3}"))  # not Gradio's timer alone
    screenshot(tab, name)
    return tab.inner_text("#refused")


def chats(chess: Path) -> list[tuple[Path, list[str]]]:
    """Each image file, with question, answer, question, answer."""
    records = json.loads((chess / "chats.json").read_text())
    return [
        (chess / "test" / r["image"], [turn["value"].split("\n")[-1] for turn in r["conversations"]]) for r in records
    ]


def test_pictures_questions_and_right_answers(tab, chess):
    for number, (file, turns) in enumerate(chats(chess)):
        show(tab, file)
        tab.wait_for_selector("#waiting img")
        assert ask(tab, turns[0]) == turns[1]
        assert " 0 of them cached" in tab.inner_text("#status")
        assert ask(tab, turns[2]) == turns[3]
        assert " 0 of them cached" not in tab.inner_text("#status")  # the image was not processed again
        screenshot(tab, f"two_turns_{number}")
        tab.click("#clear")
        sync_api.expect(tab.locator("#chat .message")).to_have_count(0)
    assert [url for url in tab.outside if not url.startswith(("data:", "blob:"))] == []


def test_hostile_uploads_are_refused_and_the_app_goes_on(tab, chess, running, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    bomb(tmp_path / "bomb.png", 30_000, 30_000)
    Image.effect_noise((1800, 1800), 90).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 2e6
    for name in ("text", "bomb", "large"):
        show(tab, tmp_path / f"{name}.png")
        # The page itself refuses large files; tests/chat/test_gate.py has the server's refusal
        said = toast(tab, "hostile_large") if name == "large" else refusal(tab, f"hostile_{name}")
        assert ("maximum allowed size" if name == "large" else "can't be used as a picture") in said
        assert str(tmp_path) not in said and "Traceback" not in said and "/tmp" not in said
        tab.reload()
        tab.wait_for_selector("#question textarea")
    file, turns = chats(chess)[0]
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    assert ask(tab, turns[0]) == turns[1]
    assert "Traceback" not in running.log.read_text()


def test_the_second_image_of_a_tab_is_checked_as_the_first(tab, chess, running, tmp_path):
    """A format that is not opened, a bomb and a transparent image, one after the other in one tab."""
    files, (first, _) = tab.locator("#waiting img"), chats(chess)[0]
    show(tab, first)
    sync_api.expect(files).to_have_count(1)
    Image.new("1", (64, 64)).save(tmp_path / "fax.tiff", compression="group4")
    bomb(tmp_path / "bomb.png", 13_000, 13_700)
    for name in ("fax.tiff", "bomb.png"):
        show(tab, tmp_path / name)
        tab.wait_for_selector("#picture img", state="attached")
        assert "can't be used as a picture" in refusal(tab, f"second_{name}")
        sync_api.expect(files).to_have_count(1)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    show(tab, tmp_path / "transparent.png")
    sync_api.expect(files).to_have_count(2)
    shown = tab.request.get(files.nth(1).get_attribute("src")).body()
    assert Image.open(io.BytesIO(shown)).convert("RGB").getpixel((30, 30)) == (255, 255, 255)
    assert "Traceback" not in running.log.read_text()


def test_a_refusal_is_words_and_leaves_the_chat(tab, chess):
    status = tab.locator("#status")
    tab.click("#send")
    sync_api.expect(status).to_have_text("Type or say a question, or give a picture.")
    file, turns = chats(chess)[0]
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    assert ask(tab, turns[0]) == turns[1]
    before = tab.locator("#chat .message").all_inner_texts()
    tab.click("#send")
    sync_api.expect(status).to_have_text("Type or say a question, or give a picture.")
    screenshot(tab, "refusal")
    assert tab.locator("#chat .message").all_inner_texts() == before and turns[1] in "".join(before)
    assert ask(tab, turns[2]) == turns[3]  # the control: the chat goes on


def test_an_example_is_clicked_and_the_answer_retried(tab):
    tab.click("#examples tbody tr")
    tab.wait_for_selector("#waiting img")
    assert tab.input_value("#question textarea") == "What do you see in this picture?"
    answer = ask(tab, "How many pieces are there?")
    tab.click("#retry")
    sync_api.expect(tab.locator("#chat .bot.message")).to_have_text([answer])
    sync_api.expect(tab.locator("#status")).to_contain_text("new tokens")
    screenshot(tab, "example")


def test_a_spoken_question_is_heard_shown_and_answered(tab, running, chess, tmp_path):
    """The real WhisperX in its worker process, with a model that knows a few questions."""
    if running.deaf:
        pytest.skip(running.deaf)
    file, turns = chats(chess)[0]
    spoken = speak(turns[0], tmp_path / "question.wav")
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    hand_over(tab, spoken)
    box = tab.locator("#question textarea")
    sync_api.expect(box).to_have_value(turns[0], timeout=3 * TIMEOUT)  # loading WhisperX included
    screenshot(tab, "spoken_question")
    sync_api.expect(tab.locator("#chat .message")).to_have_count(0)  # nothing is sent before it was read
    assert ask(tab) == turns[1]
    screenshot(tab, "spoken_question_answered")
    assert "Traceback" not in running.log.read_text()


def test_an_answer_is_stopped(tab, running, chess):
    file, turns = chats(chess)[0]
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    assert ask(tab, turns[0]) == turns[1]
    running.dawdle.touch()
    try:
        tab.fill("#question textarea", turns[2])
        tab.click("#send")
        sync_api.expect(tab.locator("#status")).to_contain_text("writing")
        tab.click("#stop")
        sync_api.expect(tab.locator("#status")).to_contain_text("stopped")
    finally:
        running.dawdle.unlink()
    last = tab.locator("#chat .bot.message").nth(1)
    said = last.inner_text().strip()
    assert turns[3].startswith(said) and said != turns[3]
    tab.click("#retry")
    sync_api.expect(last).to_have_text(turns[3])  # the whole of it


def with_silence(recording: Path, said: Path, rate: int = 48_000) -> None:
    """A recording as a microphone hears it: a second before the voice, and a long while after it."""
    with wave.open(str(recording)) as file:
        samples, old = np.frombuffer(file.readframes(file.getnframes()), np.int16), file.getframerate()
    voice = np.interp(np.arange(len(samples) * rate // old) * old / rate, np.arange(len(samples)), samples)
    with wave.open(str(said), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.concatenate([np.zeros(rate), voice, np.zeros(20 * rate)]).astype(np.int16).tobytes())


def test_a_question_is_said_into_the_microphone_and_corrected(tab, running, chess, microphone, tmp_path):
    """
    From the browser's microphone through the real WhisperX into the box, where it can be edited. On a busy machine the
    browser's recording has gaps and the small model mishears it, so which words arrive is not looked at.
    """
    if running.deaf:
        pytest.skip(running.deaf)
    file, turns = chats(chess)[0]
    with_silence(speak(turns[0], tmp_path / "question.wav"), microphone)
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    tab.click("#recording .record-button")
    tab.wait_for_timeout(5000)
    tab.click("#recording .stop-button")
    box = tab.locator("#question textarea")
    sync_api.expect(box).to_have_value(re.compile(r"\w+ \w+"), timeout=3 * TIMEOUT)
    heard = box.input_value()
    screenshot(tab, "microphone")
    sync_api.expect(tab.locator("#chat .message")).to_have_count(0)  # nothing is sent before it was read
    box.press("End")
    box.press("Backspace")
    assert box.input_value() == heard[:-1]
    assert ask(tab, turns[0]) == turns[1]


def test_pictures_from_the_camera_and_the_clipboard(tab, chess):
    file, turns = chats(chess)[0]
    tab.click('#picture button[aria-label="Capture from camera"]')
    tab.click("#picture button:has-text('Access Webcam')")
    tab.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    tab.wait_for_timeout(1000)  # the first frames of a camera are empty
    tab.click("#picture button.photo-capture")
    sync_api.expect(tab.locator("#waiting img")).to_have_count(1)
    tab.click("#drop")
    sync_api.expect(tab.locator("#waiting img")).to_have_count(0)
    copy = """async data => {
        const blob = await (await fetch("data:image/png;base64," + data)).blob();
        await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
    }"""
    tab.evaluate(copy, base64.b64encode(file.read_bytes()).decode())
    tab.click('#picture button[aria-label="Paste from clipboard"]')
    sync_api.expect(tab.locator("#waiting img")).to_have_count(1)
    assert ask(tab, turns[0]) == turns[1]


def test_what_is_written_is_shown_as_it_is(tab):
    written = '<img src="http://127.0.0.1:1/x"><b>bold</b> [a](javascript:1) <image>'
    ask(tab, written)
    sync_api.expect(tab.locator("#chat .user.message")).to_have_text([written])
    assert tab.locator("#chat .message").locator("img, b, a").count() == 0
    assert not [url for url in tab.outside if "127.0.0.1:1/" in url]


def test_a_chat_cleared_while_it_is_answered_stays_cleared(tab, running, chess):
    file, turns = chats(chess)[0]
    show(tab, file)
    tab.wait_for_selector("#waiting img")
    assert ask(tab, turns[0]) == turns[1]
    answer = tab.locator("#chat .bot.message").nth(1)
    running.dawdle.touch()
    try:
        tab.fill("#question textarea", turns[2])
        tab.click("#send")
        sync_api.expect(tab.locator("#status")).to_contain_text("writing")
        tab.fill("#question textarea", "typed meanwhile")
        said = answer.inner_text()
        running.dawdle.touch()  # one more token
        sync_api.expect(answer).not_to_have_text(said)
        assert tab.input_value("#question textarea") == "typed meanwhile"
        tab.click("#clear")
        sync_api.expect(tab.locator("#chat .message")).to_have_count(0)
    finally:
        running.dawdle.unlink()
    sync_api.expect(tab.locator("#status")).to_have_text("")
    ask(tab, "why?")  # one answer is written at a time: the old one is over
    sync_api.expect(tab.locator("#chat .user.message")).to_have_text(["why?"])
    assert tab.locator("#chat .bot.message").count() == 1


PASTE = """([data, names, kind]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    for (const name of names) transfer.items.add(new File([bytes], name, {type: "image/png"}));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
        : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
    document.querySelector(kind === "paste" ? "#question textarea" : "#chat").dispatchEvent(event);
}"""


def bring(tab, file: Path, kind: str, number: int = 1) -> None:
    """Paste a file into the question box, or drop it (several times) onto the chat."""
    data = base64.b64encode(file.read_bytes()).decode()
    tab.evaluate(PASTE, [data, [f"{index}.png" for index in range(number)], kind])


def test_images_are_pasted_and_dropped_anywhere_and_all_are_shown(tab, chess, tmp_path):
    file, turns = chats(chess)[0]
    images = tab.locator("#waiting .thumbnail-item")
    tab.focus("#question textarea")
    bring(tab, file, "paste")
    sync_api.expect(images).to_have_count(1)
    assert ask(tab, turns[0]) == turns[1]
    bring(tab, file, "drop", number=5)  # six with the first one
    sync_api.expect(images).to_have_count(5)
    gallery = tab.locator("#waiting").bounding_box()
    for index in range(5):
        box = images.nth(index).bounding_box()
        assert box["height"] > 30 and box["y"] + box["height"] <= gallery["y"] + gallery["height"] + 1, index
    screenshot(tab, "waiting_images")
    bring(tab, file, "drop")
    assert "at most 6 pictures" in refusal(tab, "seventh_image")
    left = []
    tab.on("dialog", lambda dialog: (left.append(dialog.type), dialog.accept()))
    tab.reload()
    assert left == ["beforeunload"]  # a reload says that the chat would be lost
    tab.wait_for_selector("#question textarea")
    Image.new("RGB", (8064, 6048), "red").save(tmp_path / "phone.jpg")  # 48 megapixels
    show(tab, tmp_path / "phone.jpg")
    sync_api.expect(images).to_have_count(1)


def test_a_webm_recording_is_taken(tab, running, chess, tmp_path):
    """Browsers call its type a video. The speech worker then hears, or refuses, what is in it."""
    if running.deaf:
        pytest.skip(running.deaf)
    (tmp_path / "said.webm").write_bytes(b"\x1a\x45\xdf\xa3 not really a recording")
    hand_over(tab, tmp_path / "said.webm")
    assert "OGG and WebM can be read" in toast(tab, "webm")  # said by the worker, which it reached


AXE = Path(os.environ.get("JNANA_AXE", Path(__file__).parents[2] / ".axe/node_modules/axe-core/axe.min.js"))


def axe_violations(page) -> list[dict]:
    """What axe finds once the page stands still: Gradio adds elements after an answer, which the page then names."""
    for _ in range(10):
        found = page.evaluate("axe.run()")["violations"]
        if not found:
            break
        page.wait_for_timeout(500)
    return found


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed: npm install --prefix .axe axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, running, chess, scheme):
    """An empty page, and one with a conversation and a waiting image, at the widths of a desktop and a phone."""
    file, turns = chats(chess)[0]
    for width, height in ((1180, 940), (390, 844)):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(TIMEOUT)
        page.goto(running.address)
        page.wait_for_selector("#question textarea")
        chat, image = (page.locator(name).bounding_box() for name in ("#chat", "#picture"))
        assert chat["y"] < image["y"] if width < 400 else chat["x"] > image["x"]  # on a phone the chat comes first
        page.evaluate(AXE.read_text())
        violations = axe_violations(page)
        bring(page, file, "paste")
        page.wait_for_selector("#waiting img")
        assert ask(page, turns[0]) == turns[1]
        bring(page, file, "paste")
        page.wait_for_selector("#waiting img")
        screenshot(page, f"page_{'phone' if width < 400 else 'desktop'}_{scheme}")
        violations += axe_violations(page)
        found = [(v["id"], v["impact"], [node["html"][:200] for node in v["nodes"]]) for v in violations]
        assert found == [], (width, scheme)
        page.evaluate("document.body.append(Object.assign(document.createElement('button'), {id: 'nameless'}))")
        assert "button-name" in [v["id"] for v in page.evaluate("axe.run()")["violations"]]  # the control
        page.close()
