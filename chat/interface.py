"""The layout of the chat page, in Gradio 6. Its event handlers are in `page.py`, its script in `page.js`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from .api import Api
from .assistant import Assistant
from .gate import Gate
from .limits import Refused, check_files
from .page import SOUND, Page


HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"
QUESTIONS = ("What do you see in this picture?", "How many pieces are there?", "Which piece is at the top?")
WELCOME = "## Ask about a picture\nAttach, paste, drop or photograph one, and type or say your question."
# Which images and which recordings the composer of which chat holds, as texts, because Gradio has no event for files
FILES = rf"""({{files}}, key) => [false, true].map((sound) => files.map((file) => file.path).filter((path) =>
  new RegExp(String.raw`{SOUND.pattern}`, 'i').test(path) === sound).map((path) => key.split('.')[0] + path).join())"""
OPEN_KEY = "() => { try { return [sessionStorage.getItem('jnana-chat') || '']; } catch { return ['']; } }"
KEEP_KEY = "(key) => { try { sessionStorage.setItem('jnana-chat', key); } catch {} }"  # unless the browser blocks it


class GuardedBlocks(gr.Blocks):
    """Blocks that take no file but an uploaded one, in every input of every handler."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call: bool = False):
        try:
            check_files(inputs, get_upload_folder())
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from None
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def find_examples(folder: Path) -> list[tuple[str, str]]:
    """Images of a directory, each with its question: from a text file of the same name, else a default question."""
    images = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:6]
    examples = []
    for number, image in enumerate(images):
        note, question = image.with_suffix(".txt"), QUESTIONS[number % len(QUESTIONS)]
        examples.append((str(image), note.read_text(encoding="utf-8").strip() if note.is_file() else question))
    return examples


def build_interface(assistant: Assistant, examples_folder: Path = EXAMPLES) -> gr.Blocks:
    """The page with its queue (`gr.Blocks`), to be launched with [`launch_options`]; examples as `find_examples`."""
    limits, idle = assistant.limits, assistant.limits.idle_seconds
    page = Page(assistant, find_examples(examples_folder))
    with GuardedBlocks(
        title=f"{assistant.name} · Jnana", analytics_enabled=False, delete_cache=(idle, idle + 60)
    ) as blocks:
        key, pictures, recordings = (gr.Textbox(visible="hidden") for _ in range(3))
        gr.Markdown("# Jnana", elem_id="title")
        download = gr.Button("Download", size="sm")
        messages = _build_chat(page, download)
        status = gr.Markdown("", elem_id="status")
        restore = gr.Button("Undo clear", size="sm", elem_id="restore")
        with gr.Row(elem_id="ask"):
            camera = gr.Button("", elem_id="camera")
            composer = gr.MultimodalTextbox(
                sources=["upload", "microphone"] if assistant.transcriber else ["upload"],
                file_count="multiple",
                placeholder="Ask a question",
                max_lines=6,
                max_plain_text_length=1_000_000,  # a long text is refused in words, not pasted as a file
                show_label=False,
                elem_id="composer",
            )
        settings = _build_settings(limits.new_tokens)

        def on(event: Callable, handler: Callable, inputs: list, outputs: list, **options: Any) -> Any:
            otherwise = {status: page.line, composer: lambda _: gr.skip()}.get(outputs[0], page.view)
            options = {"queue": False, "show_progress": "hidden", "api_visibility": "private", **options}
            return event(page.guarded(handler, otherwise), [key, *inputs], outputs, **options)

        everything = [key, messages, composer, status]
        for event, handler, inputs in (
            (composer.submit, page.take, [composer]),
            (messages.example_select, page.choose, []),
            (messages.retry, page.retry, []),
            (messages.edit, page.edit, []),
        ):
            taken = on(event, handler, inputs, everything, trigger_mode="once")
            lines = {"queue": True, "concurrency_id": "model", "concurrency_limit": limits.queue_length + 1}
            answered = on(taken.then, page.answer, settings, [status, messages], **lines)
            on(answered.then, page.show, [], everything)
        for event, handler in ((composer.stop, page.stop), (messages.undo, page.undo), (messages.clear, page.clear)):
            on(event, handler, [], everything)
        on(restore.click, page.undo, [], everything)
        messages.clear(None, None, None, js="() => document.body.classList.add('cleared')")
        on(blocks.load, page.open, [], everything, js=OPEN_KEY)
        key.change(None, [key], None, js=KEEP_KEY)
        # Outside the queue, because a queue full of questions would refuse images too
        received = on(pictures.change, page.receive, [composer], [status])
        heard = on(recordings.change, page.listen, [composer], [status], queue=True, concurrency_id="speech")
        for read in (received, heard):
            on(read.then, page.tidy, [composer], [composer])
        gr.on([composer.change, key.change], None, [composer, key], [pictures, recordings], js=FILES)
        camera.click(None, None, None, js="() => jnana.camera()")
        download.click(None, [messages], None, js="(messages) => jnana.download(messages)")
    blocks.queue(max_size=2 * limits.queue_length, default_concurrency_limit=1, api_open=False)
    return blocks


def _build_chat(page: Page, download: gr.Button) -> gr.Chatbot:
    messages = gr.Chatbot(
        label="Chat",
        show_label=False,
        editable="user",
        buttons=["copy", download],
        placeholder=WELCOME,
        examples=[{"text": question, "files": [path]} for path, question in page.examples],
        latex_delimiters=[],
        allow_tags=False,
        allow_file_downloads=False,
        group_consecutive_messages=False,  # Gradio can't edit a message of an image and a text
        elem_id="chat",
    )
    messages.keep_in_cache.update(file["path"] for example in messages.examples or () for file in example["files"])
    return messages


def _build_settings(longest: int) -> list:
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox(label="System prompt", lines=2)
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest words)")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (1: all words)")
        new_tokens = gr.Slider(1, longest, min(200, longest), step=1, label="Longest answer, in tokens")
        dark = gr.Button("Light or dark", size="sm")
    dark.click(None, None, None, js="() => { document.body.classList.toggle('dark'); }")
    return [system, temperature, top_p, new_tokens]


def launch_options(
    assistant: Assistant, uploads: Path, host_names: Collection[str] = (), api: Api | None = None
) -> dict[str, Any]:
    """
    Options of `Blocks.launch`: only the page's own routes, nothing from other servers, no tracebacks for visitors.

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
        "ssr_mode": False,
        "_frontend": False,  # no start-up request to the page, whose limit of 3 s is too short on a busy machine
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "favicon_path": str(HERE / "icon.png"),
        "max_threads": 40 + limits.queue_length,  # each question that waits for the model takes one
        "theme": gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
            button_primary_background_fill="*primary_700",  # enough contrast with the text
            button_primary_background_fill_dark="*primary_700",
        ),
    }
