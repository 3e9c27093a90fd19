"""The page: a chat on one side, pictures, voice, settings on the other. `page.py` has what it does. Needs Gradio 6."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from .assistant import Assistant
from .gate import Gate
from .limits import Refused, refuse_addresses
from .page import Page, for_visitors


EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = ("What do you see in this picture?", "How many pieces are there?", "Which piece is at the top?")
CSS = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
#about {opacity: .75; font-size: .85rem}
#status {font-size: .8rem; opacity: .75; min-height: 1.2rem}
#waiting .grid-wrap {min-height: 0}
#waiting .grid-container {grid-template-columns: repeat(4, 1fr); grid-template-rows: auto; margin-top: 1.6rem}
#picture .upload-container .wrap {min-height: 0}
#chat button[aria-label="Share"] {display: none}
footer {display: none !important}
"""


def unopened(component: gr.Image | gr.Audio) -> Any:
    """
    Have an input hand over the uploaded file as it is, for [`read_picture`] and the speech worker to open within
    limits. (On the instance: for a subclass Gradio would write a stub file beside this one.)
    """
    component.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return component


class GuardedBlocks(gr.Blocks):
    """Blocks whose inputs name no web address: Gradio would otherwise fetch files named so, for any input."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call: bool = False):
        try:
            refuse_addresses(inputs)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def find_examples(folder: Path) -> list[tuple[str, str]]:
    """Pictures of a folder with a question each: a text file of the same name, else one of the usual questions."""
    pictures = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:6]
    asked = []
    for number, picture in enumerate(pictures):
        note = picture.with_suffix(".txt")
        question = note.read_text(encoding="utf-8").strip() if note.is_file() else QUESTIONS[number % len(QUESTIONS)]
        asked.append((str(picture), question))
    return asked


def build_interface(assistant: Assistant, examples_folder: Path = EXAMPLES) -> gr.Blocks:
    """
    The page, with its queue.

    Args:
        assistant (`Assistant`): Who answers.
        examples_folder (`Path`, *optional*): Pictures to click, each with its question in a `.txt` of the same name.

    Returns:
        `gr.Blocks`: to be launched with [`launch_options`].
    """
    limits, idle = assistant.limits, assistant.limits.idle_seconds
    page = Page(assistant, find_examples(examples_folder))
    with GuardedBlocks(
        title="Jnana", analytics_enabled=False, delete_cache=(idle, idle + 60), fill_height=True
    ) as blocks:
        # Copied for each session: a visitor of its own, which all handlers share
        visitor = gr.State(assistant.welcome(), time_to_live=idle, delete_callback=assistant.goodbye)
        gr.Markdown("# Jnana\nDrop a picture, type or say a question, read the answer.")
        gr.Markdown(assistant.describe(), elem_id="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                given = _what_is_given(assistant, page)
            with gr.Column(scale=3, min_width=360):
                said = _what_is_said(limits.question_characters)
        pictures = [visitor, given.waiting, given.drop]
        everything = [*pictures, said.chat, said.question, said.status]
        _connect_pictures(page, given, said, pictures)
        _connect_voice(page, given, said)
        _connect_chat(page, given, said, everything)
    blocks.queue(max_size=limits.queue_length, default_concurrency_limit=1, api_open=False)
    return blocks


def _what_is_given(assistant: Assistant, page: Page) -> SimpleNamespace:
    """Pictures, voice, examples, settings."""
    picture = gr.Image(
        label="Picture: drop, paste or take one",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        height=220,
        buttons=[],
        elem_id="picture",
    )
    waiting = gr.Gallery(
        label="For the next question",
        columns=4,
        height=150,
        object_fit="contain",
        visible=False,
        buttons=[],
        elem_id="waiting",
    )
    drop = gr.Button("Take these away", size="sm", visible=False, elem_id="drop")
    recording = gr.Audio(
        label="Speak, or drop a recording",
        sources=["microphone", "upload"],
        type="filepath",
        visible=assistant.transcriber is not None,
        editable=False,
        buttons=[],
        elem_id="recording",
    )
    if assistant.transcriber is None:
        gr.Markdown(f"*{assistant.speech_note}*", elem_id="speech_note")
    examples, longest = _examples(page.examples), assistant.limits.new_tokens
    with gr.Accordion("Settings", open=False):
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest word)")
        new_tokens = gr.Slider(1, longest, min(200, longest), step=1, label="Longest answer, in tokens")
    return SimpleNamespace(
        picture=unopened(picture),
        waiting=waiting,
        drop=drop,
        recording=unopened(recording),
        examples=examples,
        temperature=temperature,
        new_tokens=new_tokens,
    )


def _what_is_said(question_characters: int) -> SimpleNamespace:
    """The chat, the box below it, the buttons."""
    # Plain text: what a model or a visitor writes is never taken for markup (`as_plain_text`); no button to copy,
    # which would copy the escapes
    chat = gr.Chatbot(
        label="Chat",
        height=460,
        render_markdown=False,
        latex_delimiters=[],
        buttons=[],
        allow_file_downloads=False,
        elem_id="chat",
    )
    status = gr.Markdown("", elem_id="status")
    question = gr.Textbox(
        label="Question",
        placeholder="What do you see in this picture?",
        lines=1,
        max_lines=4,
        max_length=question_characters,
        elem_id="question",
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", min_width=90, elem_id="send")
        stop = gr.Button("Stop", min_width=90, elem_id="stop")
        retry = gr.Button("Retry", min_width=90, elem_id="retry")
        clear = gr.Button("Clear", min_width=90, elem_id="clear")
    return SimpleNamespace(chat=chat, status=status, question=question, send=send, stop=stop, retry=retry, clear=clear)


def _connect_pictures(page: Page, given: SimpleNamespace, said: SimpleNamespace, pictures: list) -> None:
    visitor = pictures[0]
    if given.examples is not None:
        _on(given.examples.click, page.choose_example, [given.examples, visitor], [*pictures, said.question])
    # Not `input`, which Gradio's image does not send when a picture is pasted
    _on(given.picture.change, page.add_picture, [given.picture, visitor], [*pictures, given.picture])
    _on(given.drop.click, page.drop_pictures, [visitor], pictures)


def _connect_voice(page: Page, given: SimpleNamespace, said: SimpleNamespace) -> None:
    heard, recording, question, status = gr.State(""), given.recording, said.question, said.status
    # Not `input`, which Gradio's audio sends before the recording is there
    noticed = _on(recording.change, page.notice, [recording], [status], queue=False)
    listened = _on(noticed.then, page.transcribe, [recording], [heard, status], concurrency_id="speech")
    _on(listened.success, page.add_words, [heard, question], [question], queue=False)
    listened.failure(lambda: "", None, [status], queue=False, api_visibility="private")


def _connect_chat(page: Page, given: SimpleNamespace, said: SimpleNamespace, everything: list) -> None:
    visitor = everything[0]
    # Taken at once, answered in turn
    take = functools.partial(gr.on, [said.send.click, said.question.submit])
    for taken in (
        _on(take, page.take, [said.question, visitor], everything, queue=False, trigger_mode="once"),
        _on(said.retry.click, page.take_again, [visitor], everything, queue=False, trigger_mode="once"),
    ):
        options = [given.temperature, given.new_tokens]
        turn = _on(taken.success, page.answer, [*options, visitor], everything, concurrency_id="model")
        _on(turn.failure, page.give_up, [visitor], everything, queue=False)
        _on(turn.then, page.settle, [visitor], [said.chat, said.status], queue=False)
    _on(said.stop.click, page.stop, [visitor], everything, queue=False)
    for event in (said.clear.click, said.chat.clear):
        _on(event, page.clear, [visitor], everything, queue=False)


def _examples(examples: list[tuple[str, str]]) -> gr.Dataset | None:
    if not examples:
        return None
    return gr.Dataset(
        components=[gr.Image(render=False), gr.Textbox(render=False)],
        samples=[list(example) for example in examples],
        headers=["picture", "question"],
        type="index",
        label="Examples: click one",
        elem_id="examples",
    )


def _on(event: Callable, handler: Callable, inputs: list, outputs: list | None, **options: Any) -> Any:
    return event(for_visitors(handler), inputs, outputs, show_progress="hidden", api_visibility="private", **options)


def launch_options(assistant: Assistant, uploads: Path) -> dict[str, Any]:
    """
    What `Blocks.launch` needs to keep the page's promises: no paths, no traces, no fonts from elsewhere, no routes but
    the page's own, nothing of a chat kept in the browser.

    Args:
        assistant (`Assistant`): Who answers.
        uploads (`Path`): Gradio's folder of uploads.
    """
    limits = assistant.limits
    gate = Middleware(
        Gate,
        folder=uploads,
        question_characters=limits.question_characters,
        upload_megabytes=limits.upload_megabytes,
        folder_megabytes=limits.all_uploads_megabytes,
    )
    return {
        "show_error": False,
        "max_file_size": int(limits.upload_megabytes * 1e6),
        "state_session_capacity": limits.visitors,
        "app_kwargs": {"middleware": [gate], "openapi_url": None},
        "run_history": False,
        "footer_links": [],
        "share": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "_frontend": False,  # nothing but a look at the page, which gives up after 3 s: too few on a busy machine
        "css": CSS,
        "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    }


__all__ = ["build_interface", "find_examples", "launch_options"]
