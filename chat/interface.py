"""The page: a chat on one side, pictures, voice and settings on the other. Needs Gradio 6.

Whatever goes wrong in a request ends as one line on the visitor's page: what can be said to a visitor (`Refused`, a
chat that is too long) in its own words, everything else as "something went wrong", the details in the log alone.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .assistant import Assistant, Shown, Visitor
from .limits import Refused, check_question, refuse_addresses
from .session import ContextFullError


logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = ("What do you see in this picture?", "How many pieces are there?", "Which piece is at the top?")
APOLOGY = "Something went wrong here. It has been noted; try again, or clear the chat."
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#about {opacity: .75; font-size: .85rem}
#status {font-size: .8rem; opacity: .75; min-height: 1.2rem}
#waiting .grid-wrap {min-height: 0}
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


def for_visitors(handler: Callable) -> Callable:
    """Turn every exception of a handler into one line for the visitor; the app goes on."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, (Refused, ContextFullError)):
            text = str(error)
            return gr.Error(text[0].upper() + text[1:], title="Not possible", print_exception=False)
        logger.error("%s failed", handler.__name__, exc_info=error)
        return gr.Error(APOLOGY, title="Sorry", print_exception=False)

    @functools.wraps(handler)
    def guarded(*args: Any) -> Any:
        try:
            return handler(*args)
        except Exception as error:
            raise told(error) from None

    @functools.wraps(handler)
    def guarded_stream(*args: Any) -> Iterator[Any]:
        try:
            yield from handler(*args)
        except Exception as error:
            raise told(error) from None

    return guarded_stream if handler.__code__.co_flags & 0x20 else guarded  # 0x20: a generator


class Page:
    """
    The handlers of the page.

    Args:
        assistant (`Assistant`): Who answers.
        examples (`list[tuple[str, str]]`): Picture files and questions to click.
    """

    def __init__(self, assistant: Assistant, examples: list[tuple[str, str]]):
        self.assistant = assistant
        self.examples = examples

    def add_picture(self, path: str | None, visitor: Visitor | None):
        """An uploaded picture -> the row of pictures that wait for a question; the input is free for the next."""
        visitor = visitor or self.assistant.welcome()
        if path is not None:
            try:
                self.assistant.receive(visitor, path)
            except Refused as error:
                gr.Warning(str(error), title="Not possible")
        return *self._pictures(visitor), None

    def drop_pictures(self, visitor: Visitor | None):
        visitor = visitor or self.assistant.welcome()
        visitor.waiting = []
        return self._pictures(visitor)

    def choose_example(self, index: int, visitor: Visitor | None):
        visitor = visitor or self.assistant.welcome()
        path, question = self.examples[int(index)]
        visitor.waiting = []
        self.assistant.receive(visitor, path)
        return *self._pictures(visitor), question

    def transcribe(self, path: str | None, question: str):
        """A recording -> words behind what is typed already, to be read and corrected before they are sent."""
        if path is None:
            return question
        return f"{question} {self.assistant.listen(path)}".strip()

    def send(self, question: str, temperature: float, new_tokens: int, visitor: Visitor | None):
        """The question and the waiting pictures -> the answer while it is written."""
        visitor = visitor or self.assistant.welcome()
        question = check_question(question, self.assistant.limits)
        waiting = visitor.waiting
        if not question and not waiting:
            raise Refused("Type or say a question, or give a picture.")
        answer = visitor.session.ask(
            question, [shown.picture for shown in waiting], **self._options(temperature, new_tokens)
        )
        visitor.waiting = []
        before = visitor.transcript
        visitor.transcript = [*before, *self._asked(question, waiting)]
        try:
            yield from self._write(visitor, answer, "")
        except Exception:  # the session is as it was; so is the page
            visitor.transcript, visitor.waiting = before, waiting
            yield self._view(visitor, question, "")
            raise

    def retry(self, temperature: float, new_tokens: int, question: str, visitor: Visitor | None):
        """The last question once more."""
        if visitor is None or not visitor.session.messages:
            raise Refused("Nothing has been asked yet.")
        answer = visitor.session.retry(**self._options(temperature, new_tokens))
        visitor.transcript = visitor.transcript[:-1]
        yield from self._write(visitor, answer, question)

    def stop(self, visitor: Visitor | None) -> None:
        if visitor is not None:
            visitor.session.stop()

    def clear(self, visitor: Visitor | None):
        if visitor is not None:
            visitor.session.stop()
            self.assistant.goodbye(visitor)
        return self._view(self.assistant.welcome(), "", "")

    # ------------------------------------------------------------------ inside

    def _write(self, visitor: Visitor, answer: Iterator[str], question: str):
        said = {"role": "assistant", "content": ""}
        visitor.transcript = [*visitor.transcript, said]
        yield self._view(visitor, question, "reading ...")
        try:
            for text in answer:
                said["content"] = text
                yield self._view(visitor, question, "writing ...")
        finally:
            self.assistant.keep_recent(visitor.session)
        turn = visitor.session.last_turn
        assert turn is not None
        said["content"] = visitor.session.messages[-1]["content"][0]["text"] or "(no answer)"
        speed = turn.new_tokens / max(turn.seconds, 1e-9)
        ends = {
            "length": " · cut at the length that is set",
            "context": " · the chat is full: clear it",
            "stopped": " · stopped",
        }
        status = (
            f"{turn.prompt_tokens} tokens, {turn.cached_tokens} of them known from before · first word after "
            f"{turn.seconds_to_first_token:.2f} s · {turn.new_tokens} new tokens, {speed:.0f} a second"
        )
        yield self._view(visitor, question, status + ends.get(turn.finish_reason, ""))

    def _options(self, temperature: float, new_tokens: int) -> dict[str, Any]:
        try:
            temperature, new_tokens = float(temperature), int(new_tokens)
        except (TypeError, ValueError):
            raise Refused("Temperature and length must be numbers.") from None
        if not 0 <= temperature <= 2 or not 1 <= new_tokens <= self.assistant.limits.new_tokens:
            raise Refused(f"The temperature is 0 to 2, the length 1 to {self.assistant.limits.new_tokens} tokens.")
        return {"temperature": temperature, "max_new_tokens": new_tokens}

    def _asked(self, question: str, waiting: list[Shown]) -> list[dict]:
        messages: list[dict] = [
            {"role": "user", "content": gr.Image(shown.thumbnail, show_label=False, container=False, buttons=[])}
            for shown in waiting
        ]
        return [*messages, {"role": "user", "content": question}] if question else messages

    def _view(self, visitor: Visitor, question: str, status: str):
        return *self._pictures(visitor), list(visitor.transcript), question, status

    def _pictures(self, visitor: Visitor):
        """The visitor, the row of waiting pictures and the button that empties it."""
        some = bool(visitor.waiting)
        row = gr.update(value=[shown.thumbnail for shown in visitor.waiting], visible=some)
        return visitor, row, gr.update(visible=some)


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
    limits = assistant.limits
    page = Page(assistant, find_examples(examples_folder))
    hour = limits.idle_seconds
    with GuardedBlocks(title="Jnana", analytics_enabled=False, delete_cache=(hour, hour), fill_height=True) as blocks:
        visitor = gr.State(None, time_to_live=hour, delete_callback=assistant.goodbye)
        gr.Markdown("# Jnana\nDrop a picture, type or say a question, read the answer.")
        gr.Markdown(assistant.describe(), elem_id="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                picture = unopened(
                    gr.Image(
                        label="Picture: drop, paste or take one",
                        sources=["upload", "webcam", "clipboard"],
                        type="filepath",
                        height=220,
                        buttons=[],
                        elem_id="picture",
                    )
                )
                waiting = gr.Gallery(
                    label="For the next question", columns=4, height=130, visible=False, buttons=[], elem_id="waiting"
                )
                drop = gr.Button("Take these away", size="sm", visible=False, elem_id="drop")
                recording = unopened(
                    gr.Audio(
                        label="Speak, or drop a recording",
                        sources=["microphone", "upload"],
                        type="filepath",
                        visible=assistant.transcriber is not None,
                        editable=False,
                        buttons=[],
                        elem_id="recording",
                    )
                )
                if assistant.transcriber is None:
                    gr.Markdown(f"*{assistant.speech_note}*", elem_id="speech_note")
                examples = _examples(page.examples)
                with gr.Accordion("Settings", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest word)")
                    new_tokens = gr.Slider(
                        1, limits.new_tokens, min(200, limits.new_tokens), step=1, label="Longest answer, in tokens"
                    )
            with gr.Column(scale=3, min_width=360):
                # Plain text: what a model or a visitor writes is never taken for markup
                chat = gr.Chatbot(
                    label="Chat",
                    height=460,
                    render_markdown=False,
                    buttons=["copy"],
                    allow_file_downloads=False,
                    elem_id="chat",
                )
                status = gr.Markdown("", elem_id="status")
                question = gr.Textbox(
                    label="Question",
                    placeholder="What do you see in this picture?",
                    lines=1,
                    max_lines=4,
                    max_length=limits.question_characters,
                    elem_id="question",
                )
                with gr.Row():
                    send = gr.Button("Send", variant="primary", min_width=90, elem_id="send")
                    stop = gr.Button("Stop", min_width=90, elem_id="stop")
                    retry = gr.Button("Retry", min_width=90, elem_id="retry")
                    clear = gr.Button("Clear", min_width=90, elem_id="clear")

        pictures = [visitor, waiting, drop]
        everything = [*pictures, chat, question, status]
        if examples is not None:
            _on(examples.click, page.choose_example, [examples, visitor], [*pictures, question])
        _on(picture.input, page.add_picture, [picture, visitor], [*pictures, picture])
        _on(drop.click, page.drop_pictures, [visitor], pictures)
        # Not `input`, which Gradio's audio sends before the recording is there
        _on(recording.change, page.transcribe, [recording, question], [question], concurrency_id="speech")
        writing = {"concurrency_id": "model", "trigger_mode": "once"}
        for event in (send.click, question.submit):
            _on(event, page.send, [question, temperature, new_tokens, visitor], everything, **writing)
        _on(retry.click, page.retry, [temperature, new_tokens, question, visitor], everything, **writing)
        _on(stop.click, page.stop, [visitor], None, queue=False)
        for event in (clear.click, chat.clear):
            _on(event, page.clear, [visitor], everything, queue=False)
    blocks.queue(max_size=limits.queue_length, default_concurrency_limit=1, api_open=False)
    return blocks


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


def _on(event: Callable, handler: Callable, inputs: list, outputs: list | None, **options: Any) -> None:
    event(for_visitors(handler), inputs, outputs, show_progress="hidden", api_visibility="private", **options)


def launch_options(assistant: Assistant) -> dict[str, Any]:
    """What `Blocks.launch` needs to keep the page's promises: no paths, no traces, no fonts from elsewhere."""
    return {
        "show_error": False,
        "max_file_size": int(assistant.limits.upload_megabytes * 1e6),
        "footer_links": [],
        "share": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "css": CSS,
        "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    }


__all__ = ["build_interface", "find_examples", "launch_options"]
