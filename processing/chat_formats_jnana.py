"""Finds the shipped chat template that renders what a published checkpoint's own template renders.

Templates that circulate rarely suit training: most lack `{% generation %}` blocks, some mark answers without their end
token, some spell the end token in letters (`docs/chat_templates.md` lists what was found). A template is recognised by
what it renders for a few probe chats, not by its text, so a copy that was saved with other white space or comments is
recognised too. This file is copied beside `processing_jnana.py` into every saved checkpoint.
"""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_encoding_jnana import is_word


logger = logging.get_logger(__name__)

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The templates that replace a published one. Each has the other endings that published templates of this format write
# behind an answer where the shipped one writes the end token.
FORMATS: dict[str, tuple[str, ...]] = {
    "chatml": (),
    "chatml_direct": (),
    "llama3": (),
    "llama3_1": (),
    "mistral": ("</s>", "<\\s>"),
    "phi3": (),
    "qwen2": (),
    "qwen2_5": (),
    "smollm2": (),
    "vicuna": ("</s>", " "),
}

SYSTEM = ("system", "Some advice.")
QUESTION = ("user", "Which one?")
ANSWERS = ("The first answer.", "Another answer.")
TURNS = [QUESTION, ("assistant", ANSWERS[0]), ("user", "Why?"), ("assistant", ANSWERS[1]), ("user", "And then?")]
# Llama 3.2's own template writes the day of the call unless it is given one
DATE = "01 Jan 2020"


def chat_template_names() -> list[str]:
    """The names of the chat templates shipped with this package (`list[str]`)."""
    return sorted(path.stem for path in (Path(__file__).parent / "chat_templates").glob("*.jinja"))


def read_chat_template(chat_template: str) -> str:
    """
    The text of a chat template.

    Args:
        chat_template (`str`): the name of a shipped template (`jnana`, `llava_chess`, ...) or the path of a `.jinja`
            file.

    Raises:
        ValueError: if it is neither.
    """
    shipped = Path(__file__).parent / "chat_templates" / f"{chat_template}.jinja"
    for path in (shipped, Path(chat_template)):
        if path.suffix == ".jinja" and path.is_file():
            return path.read_text(encoding="utf-8")
    raise ValueError(
        f"chat_template={chat_template!r} is neither a shipped template ({', '.join(chat_template_names())}) nor the "
        "path of a .jinja file."
    )


def adopt_chat_template(
    chat_template: str | dict[str, str] | None, tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>"
) -> str:
    """
    The template to train with, for a checkpoint that ships a chat template of its own.

    A template whose format is known is replaced by the shipped template of this format: its prompts are the same,
    token for token, and each answer is marked with its end token. A template of another format is kept if it can be
    trained with as it is.

    Args:
        chat_template (`str` or `dict[str, str]`, *optional*): `chat_template` of a tokenizer or a processor; of
            several templates the one named `default` is taken.
        tokenizer (`PreTrainedTokenizerBase`): the checkpoint's tokenizer.
        image_token (`str`, *optional*, defaults to `"<image>"`): the token that stands for an image in a prompt.

    Returns:
        `str`: the text of the template.

    Raises:
        ValueError: if there is no template; if one of unknown format marks no answers, marks them without an end
            token, or leaves out images; or if the tokenizer lacks the end token of the format.
    """
    own = chat_template.get("default") if isinstance(chat_template, dict) else chat_template
    owner = f"tokenizer {tokenizer.name_or_path!r}"
    if own is None:
        raise ValueError(
            f"{owner}: chat_template={chat_template!r} holds no default template. Give one: "
            f"{', '.join(chat_template_names())}, or the path of a .jinja file."
        )
    for name, endings in FORMATS.items():
        shipped = read_chat_template(name)
        if (knows_images := _has_format(own, shipped, endings, tokenizer, image_token)) is None:
            continue
        shipped = _begin_alike(own, shipped, tokenizer, by_processor=knows_images)
        check_answer_end(shipped, tokenizer, name, image_token)
        logger.info(f"The chat template of {owner} has the format {name!r}: the shipped template takes its place.")
        return shipped
    missing = _missing_for_training(own, tokenizer, image_token)
    if missing:
        raise ValueError(
            f"The chat template of {owner} has none of the known formats ({', '.join(FORMATS)}), and training cannot "
            f"use it as it is: {'; '.join(missing)}. Save the changed template as a .jinja file and give its path as "
            f"chat_template, or name a shipped one ({', '.join(chat_template_names())})."
        )
    return own


def find_answer_end(
    chat_template: str, tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>"
) -> int | None:
    """
    The token with which a template ends each answer.

    Args:
        chat_template (`str`): the text of the template.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer it is used with.
        image_token (`str`, *optional*, defaults to `"<image>"`): it cannot end an answer.

    Returns:
        `int` or `None`: the id of the first control token behind an answer inside its `{% generation %}` block;
        `None` if one of the answers is in no block, or its block holds none.
    """
    for parts in (True, False):
        text, spans = _render(chat_template, _chat(TURNS, parts), tokenizer) or ("", [])
        ends = set()
        for answer in ANSWERS:
            marked = [text[start:end] for start, end in spans if answer in text[start:end]]
            behind = marked[0].split(answer, 1)[1] if len(marked) == 1 else ""
            ends.add(_first_control_token(behind, tokenizer, image_token))
        if len(ends) == 1 and None not in ends:
            return ends.pop()
    return None


def check_answer_end(
    chat_template: str, tokenizer: PreTrainedTokenizerBase, name: str, image_token: str = "<image>"
) -> None:
    """
    Refuse a template whose answers end in no token of the tokenizer: a model trained with it would never stop.

    Args:
        chat_template (`str`): the text of the template. One without `{% generation %}` blocks passes: it is of no use
            for training, but for talking to a model.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer it is used with.
        name (`str`): the template's name in the message.
        image_token (`str`, *optional*, defaults to `"<image>"`): it cannot end an answer.

    Raises:
        ValueError: naming the template, what it writes behind an answer, and the remedy.
    """
    rendered = _render(chat_template, _chat(TURNS, parts=True), tokenizer)
    if not rendered or not GENERATION_BLOCK.search(chat_template):
        return
    if find_answer_end(chat_template, tokenizer, image_token) is not None:
        return
    text, spans = rendered
    marked = next((text[start:end] for start, end in spans if ANSWERS[0] in text[start:end]), "")
    raise ValueError(
        f"chat_template {name!r} writes {marked.split(ANSWERS[0])[-1]!r} between an answer and the end of its "
        f"generation block, and the tokenizer {tokenizer.name_or_path!r} finds no end token in it: the model would "
        f"never learn to stop. Use a template that writes `eos_token` (here {tokenizer.eos_token!r}), or add the "
        "format's own token to the tokenizer and the model first."
    )


def _has_format(
    own: str, shipped: str, endings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, image_token: str
) -> bool | None:
    """
    Whether `own` renders the prompts of `shipped`.

    Returns:
        `None` if it does not; else whether it also writes images.
    """

    def same(turns: list, parts: bool, **images) -> bool | None:
        chat = _chat(turns, parts, **images)
        theirs, ours = (_render(template, chat, tokenizer) for template in (own, shipped))
        if theirs is None or ours is None:
            return None
        return _same_prompt(theirs[0], *ours, endings, tokenizer)

    for parts in (True, False):
        # A template may refuse system messages; what it renders must be the same
        if not (same(TURNS[:1], parts) and same(TURNS, parts) and same([SYSTEM, *TURNS], parts) is not False):
            continue
        if not parts:
            return False
        plain, pictured = (_render(own, _chat(TURNS, True, images=n), tokenizer) for n in (0, 1))
        if pictured in (None, plain):
            return False
        alike = all(same(TURNS, True, images=n, last=last) for n in (1, 2) for last in (False, True))
        return True if alike and pictured and image_token in pictured[0] else None
    return None


def _same_prompt(
    theirs: str, ours: str, spans: list, endings: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether two renderings of the turns are equal, but for the begin-of-text token and what ends an answer."""
    pattern, last = "", 0
    for start, end in spans:
        behind = max(ours.find(answer, start, end) + len(answer) for answer in ANSWERS if answer in ours[start:end])
        ends = "|".join(map(re.escape, (ours[behind:end], *endings)))
        pattern += f"{re.escape(ours[last:behind])}(?:{ends})"
        last = end
    bos = re.escape(tokenizer.bos_token or "")
    pattern = f"(?:{bos})?" + (pattern + re.escape(ours[last:])).removeprefix(bos)
    return re.fullmatch(pattern, theirs) is not None


def _begin_alike(own: str, shipped: str, tokenizer: PreTrainedTokenizerBase, by_processor: bool) -> str:
    """The shipped template, changed to begin a prompt with a begin-of-text token if and only if the own one's prompt
    does: it may write the token itself, and a stock processor (not a tokenizer) adds it where the tokenizer does."""
    bos = tokenizer.bos_token
    if bos is None:
        return shipped
    theirs, ours = (_render(text, _chat(TURNS[:1], by_processor), tokenizer) for text in (own, shipped))
    begins = theirs is not None and theirs[0].startswith(bos)
    begins = begins or (by_processor and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id])
    if begins == (ours is not None and ours[0].startswith(bos)):
        return shipped
    return ("{{- bos_token -}}\n" if begins else "{%- set bos_token = '' -%}\n") + shipped


def _missing_for_training(template: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> list[str]:
    """What a template of unknown format has to be given before it can be trained with."""
    missing = []
    end = tokenizer.eos_token
    if not GENERATION_BLOCK.search(template):
        missing.append(
            "it marks no answers, so put `{% generation %}` in front of each answer and `{% endgeneration %}` behind "
            f"its end token ({end!r})"
        )
    elif find_answer_end(template, tokenizer, image_token) is None:
        missing.append(
            "its `{% generation %}` blocks do not close each answer with an end token of the tokenizer, so put one "
            f"({end!r}, in a template `eos_token`) between the answer and `{{% endgeneration %}}`"
        )
    pictured = _render(template, _chat(TURNS, parts=True, images=1), tokenizer)
    if pictured is None or pictured[0].count(image_token) != 1 or TURNS[-1][1] not in pictured[0]:
        missing.append(
            "it does not render messages of image and text parts, so let it go through `message.content`, write "
            f"{image_token!r} for each part of type 'image' and the text of each of type 'text'"
        )
    return missing


def _first_control_token(text: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> int | None:
    """The id of the first control token in a text that can end an answer."""
    others = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids(image_token)}
    added = tokenizer.added_tokens_decoder.items()
    control = {index for index, token in added if token.special or not is_word(token.content)}
    ends = control - others | {tokenizer.eos_token_id}
    return next((index for index in tokenizer(text, add_special_tokens=False)["input_ids"] if index in ends), None)


def _chat(turns: list[tuple[str, str]], parts: bool, images: int = 0, last: bool = False) -> list[dict]:
    """A chat with texts as strings or as parts, and images in its first or last message, around its text."""
    if not parts:
        return [{"role": role, "content": text} for role, text in turns]
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    content = chat[-1 if last else 0]["content"]
    content[:] = [*[{"type": "image"}] * (images > 0), *content, *[{"type": "image"}] * (images - 1)]
    return chat


def _render(template: str, chat: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list] | None:
    """The prompt and the spans of its generation blocks; `None` if the template cannot render the chat."""
    marks = GENERATION_BLOCK.search(template) is not None
    variables: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": DATE}
    try:
        rendered: Any = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=True,
            return_assistant_tokens_mask=marks,
            **variables,
        )
    except ImportError:
        raise
    except Exception:  # a template can raise anything: an error of its own, of Jinja, or of Python's types
        return None
    texts, spans = rendered
    return texts[0], spans[0] if spans else []
