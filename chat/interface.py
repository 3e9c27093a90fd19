"""The layout of the chat page, in Gradio 6. Its event handlers are in `page.py`."""

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from .api import Api
from .assistant import Assistant
from .gate import Gate
from .limits import Refused, check_files
from .page import Page, for_visitors, in_status_line, with_notice


EXAMPLES = Path(__file__).parent / "examples"
QUESTIONS = ("What do you see in this picture?", "How many pieces are there?", "Which piece is at the top?")
UPLOAD_NAME = "Drop an image file here to upload"  # Gradio's name of the button, which its text must be part of
# Gradio's image takes a pasted file only while its clipboard tab is open, its audio no .webm (to browsers a video)
SCRIPT = """<script>
(() => {
  const inputOf = (id) => document.querySelector(`#${id} input[type=file]`);
  const put = (input, file) => {
    const data = new DataTransfer(); data.items.add(file);
    input.files = data.files; input.dispatchEvent(new Event('change', {bubbles: true}));
  };
  const asAudio = (file) => new File([file], file.name, {type: 'audio/webm'});
  const isFilm = (file) => file.type === 'video/webm';
  const waiting = [];
  let begun = 0, seen = false;
  setInterval(() => {  // Gradio gives these buttons no name
    for (const button of document.querySelectorAll('#chat .image-container > button:not([aria-label])'))
      button.setAttribute('aria-label', 'Enlarge the picture');
  }, 500);
  setInterval(() => {  // one after the other: an image stands in the input until the server has taken or refused it
    const input = inputOf('picture'), shown = document.querySelector('#picture img');
    if (begun && shown) seen = true;
    else if (begun && (seen || Date.now() - begun > 10000)) begun = 0;  // 10 s: the page itself refused it
    if (begun || shown || !input || !waiting.length) return;
    begun = Date.now(); seen = false;
    put(input, waiting.shift());
  }, 50);
  const take = (event, files) => {
    if (!files || !files.length) return;
    event.preventDefault(); event.stopPropagation();
    for (const file of files) {
      if (isFilm(file) && inputOf('recording')) put(inputOf('recording'), asAudio(file)); else waiting.push(file);
    }
  };
  document.addEventListener('paste', (event) => take(event, event.clipboardData.files), true);
  document.addEventListener('dragover', (event) => event.preventDefault());
  document.addEventListener('drop', (event) => {
    const files = event.dataTransfer.files;
    if (event.target.closest('#recording') && ![...files].some(isFilm)) return;
    take(event, files);
  }, true);
  document.addEventListener('change', (event) => {
    const file = event.target.files && event.target.files[0];
    if (file && isFilm(file) && event.target.closest('#recording')) {
      event.stopPropagation(); put(event.target, asAudio(file));
    }
  }, true);
  window.addEventListener('beforeunload', (event) => {
    if (document.querySelector('#chat .message')) event.preventDefault();  // the chat would be lost
  });
})();
</script>"""
CSS = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
#about {opacity: .75; font-size: .85rem}
#status {font-size: .8rem; opacity: .75; min-height: 1.2rem}
#waiting .grid-wrap {min-height: 0}
#waiting .grid-container {grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); grid-template-rows: auto;
 margin-top: 1.6rem; height: auto}
#refused {color: var(--error-text-color)}
body:not(.dark)
 :is([data-testid="block-label"], [data-testid="block-info"], #picture .wrap, #picture .or, #examples .label)
 {color: #3730a3 !important}
#picture .upload-container .wrap {min-height: 0}
#chat button[aria-label="Share"] {display: none}
@media (max-width: 760px) {#talk {order: -1}}
footer {display: none !important}
"""


def pass_file(component: gr.Image | gr.Audio) -> Any:
    """
    Make an input pass the path of the uploaded file, unopened, so that [`read_image`] and the speech worker open it
    within limits. The method is replaced on the instance, because Gradio writes a stub file beside a subclass's file.
    """
    component.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return component


class GuardedBlocks(gr.Blocks):
    """Blocks that take no file but an uploaded one, in every input of every handler."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call: bool = False):
        try:
            check_files(inputs, get_upload_folder())
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        # Gradio replaces an input in a session by a new instance once a handler returns an update for it (`gr.skip()`
        # is one); the new instance lacks the `preprocess` that `pass_file` sets.
        for block in block_fn.inputs if state is not None else ():
            if "preprocess" in vars(block) and state[block._id] is not block:
                state[block._id] = block
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def find_examples(folder: Path) -> list[tuple[str, str]]:
    """Images of a directory, each with its question: from a text file of the same name, else a default question."""
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:6]
    examples = []
    for number, image in enumerate(images):
        note = image.with_suffix(".txt")
        question = note.read_text(encoding="utf-8").strip() if note.is_file() else QUESTIONS[number % len(QUESTIONS)]
        examples.append((str(image), question))
    return examples


def build_interface(assistant: Assistant, examples_folder: Path = EXAMPLES) -> gr.Blocks:
    """
    Build the page with its queue.

    Args:
        assistant (`Assistant`): The model that answers.
        examples_folder (`Path`, *optional*): Directory of example images, each with its question in a `.txt` of the
            same name.

    Returns:
        `gr.Blocks`: To be launched with [`launch_options`].
    """
    limits, idle = assistant.limits, assistant.limits.idle_seconds
    page = Page(assistant, find_examples(examples_folder))
    with GuardedBlocks(
        title="Jnana", analytics_enabled=False, delete_cache=(idle, idle + 60), fill_height=True
    ) as blocks:
        # Gradio copies the value for each browser session; all handlers of the session share the copy
        visitor = gr.State(assistant.new_visitor(), time_to_live=idle, delete_callback=assistant.close_chat)
        gr.Markdown("# Jnana\nDrop a picture, type or say a question, read the answer.")
        gr.Markdown(assistant.describe(), elem_id="about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                inputs = _build_inputs(assistant, page)
            with gr.Column(scale=3, min_width=360, elem_id="talk"):
                chat = _build_chat(limits.question_characters)
        images = [visitor, inputs.waiting, inputs.drop]
        everything = [*images, chat.messages, chat.question, chat.status]
        _connect_images(page, inputs, chat, images)
        _connect_voice(page, inputs, chat)
        _connect_chat(page, inputs, chat, everything)
    blocks.queue(max_size=limits.queue_length, default_concurrency_limit=1, api_open=False)
    return blocks


def _build_inputs(assistant: Assistant, page: Page) -> SimpleNamespace:
    """The components for images, voice, examples and settings."""
    image = gr.Image(
        label="Picture: upload, paste or take one",
        sources=["upload", "webcam", "clipboard"],
        type="filepath",
        placeholder=UPLOAD_NAME,
        height=220,
        buttons=[],
        elem_id="picture",
    )
    waiting = gr.Gallery(
        label="For the next question",
        columns=assistant.limits.images,
        object_fit="contain",
        visible=False,
        buttons=[],
        elem_id="waiting",
    )
    refused = gr.Markdown("", elem_id="refused")
    drop = gr.Button("Remove", size="sm", visible=False, elem_id="drop")
    recording = gr.Audio(
        label="Speak, or upload a recording",
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
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: greedy decoding)")
        new_tokens = gr.Slider(1, longest, min(200, longest), step=1, label="Longest answer, in tokens")
    return SimpleNamespace(
        image=pass_file(image),
        waiting=waiting,
        refused=refused,
        drop=drop,
        recording=pass_file(recording),
        examples=examples,
        temperature=temperature,
        new_tokens=new_tokens,
    )


def _build_chat(question_characters: int) -> SimpleNamespace:
    """The components for the chat, the question box and the buttons."""
    # Messages are escaped plain text (`as_plain_text`). There is no copy button, because it would copy the escapes
    messages = gr.Chatbot(
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
    return SimpleNamespace(
        messages=messages, status=status, question=question, send=send, stop=stop, retry=retry, clear=clear
    )


def _connect_images(page: Page, inputs: SimpleNamespace, chat: SimpleNamespace, images: list) -> None:
    visitor = images[0]
    if inputs.examples is not None:
        chosen = [*images, chat.question, inputs.refused]
        _on(inputs.examples.click, page.choose_example, [inputs.examples, visitor], chosen, queue=False)
    # `change`, because Gradio's image sends no `input` event when an image is pasted
    # Outside the queue, because a queue full of questions would refuse images too
    added = [*images, inputs.image, inputs.refused]
    _on(inputs.image.change, page.add_image, [inputs.image, visitor], added, queue=False)
    _on(inputs.drop.click, page.drop_images, [visitor], [*images, inputs.refused], queue=False)


def _connect_voice(page: Page, inputs: SimpleNamespace, chat: SimpleNamespace) -> None:
    transcript, recording, question, status = gr.State(""), inputs.recording, chat.question, chat.status
    # `change`, because Gradio's audio sends `input` before the recording is uploaded
    noticed = _on(recording.change, page.notice, [recording], [status], queue=False)
    transcribed = _on(noticed.then, page.transcribe, [recording], [transcript, status], concurrency_id="speech")
    _on(transcribed.success, page.append_transcript, [transcript, question], [question, status], queue=False)
    transcribed.failure(lambda: "", None, [status], queue=False, api_visibility="private")


def _connect_chat(page: Page, inputs: SimpleNamespace, chat: SimpleNamespace, everything: list) -> None:
    visitor = everything[0]
    # `take` queues a question without waiting; `answer` runs for one question at a time
    take = functools.partial(gr.on, [chat.send.click, chat.question.submit])
    for taken in (
        _on(take, page.take, [chat.question, visitor], everything, queue=False, starts_answer=True),
        _on(chat.retry.click, page.take_again, [visitor], everything, queue=False, starts_answer=True),
    ):
        _on(taken.failure, page.show_notice, [visitor], everything, queue=False)
        options = [inputs.temperature, inputs.new_tokens]
        turn = _on(taken.success, page.answer, [*options, visitor], everything, concurrency_id="model")
        _on(turn.failure, page.withdraw, [visitor], everything, queue=False)
        _on(turn.then, page.settle, [visitor], [chat.messages, chat.status], queue=False)
    _on(chat.stop.click, page.stop, [visitor], everything, queue=False)
    for event in (chat.clear.click, chat.messages.clear):
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


def _on(
    event: Callable, handler: Callable, inputs: list, outputs: list, starts_answer: bool = False, **options: Any
) -> Any:
    if options.get("queue", True):
        guarded = for_visitors(handler)
    elif starts_answer:
        guarded, options["trigger_mode"] = with_notice(handler), "once"
    else:  # Gradio shows no message of a handler that runs outside the queue, and empties its outputs
        guarded = in_status_line(handler, len(outputs))
    return event(guarded, inputs, outputs, show_progress="hidden", api_visibility="private", **options)


def launch_options(
    assistant: Assistant, uploads: Path, host_names: Collection[str] = (), api: Api | None = None
) -> dict[str, Any]:
    """
    Options of `Blocks.launch`: no tracebacks and no API documentation for visitors, no fonts from other servers, only
    the page's own routes, and no chat history in the browser.

    Args:
        assistant (`Assistant`): The model that answers.
        uploads (`Path`): Gradio's upload directory.
        host_names (`Collection[str]`, *optional*): Names under which the page may be opened, besides `localhost` and
            addresses in numbers.
        api (`Api`, *optional*): Answers OpenAI clients beside the page.
    """
    limits = assistant.limits
    gate = Middleware(
        Gate,
        folder=uploads,
        question_characters=limits.question_characters,
        upload_megabytes=limits.upload_megabytes,
        host_names=host_names,
        folder_megabytes=limits.all_uploads_megabytes,
        api_megabytes=api.body_megabytes if api else 0,
    )
    return {
        "show_error": False,
        "max_file_size": int(limits.upload_megabytes * 1e6),
        "state_session_capacity": limits.visitors,
        "app_kwargs": {"middleware": [gate], "openapi_url": None, "routes": api.routes if api else None},
        "run_history": False,
        "footer_links": [],
        "share": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "_frontend": False,  # no start-up request to the page, whose limit of 3 s is too short on a busy machine
        "css": CSS,
        "head": SCRIPT,
        "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
            button_primary_background_fill="*primary_700",  # enough contrast with its text
            button_primary_background_fill_dark="*primary_700",
            button_primary_background_fill_hover="*primary_800",
            button_primary_background_fill_hover_dark="*primary_800",
        ),
    }


__all__ = ["build_interface", "find_examples", "launch_options"]
