"""Published chat templates and the shipped ones that replace them: same prompts, marked answers, real end tokens."""

import logging
import random
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor

from jnana.processing import JnanaProcessor, adopt_chat_template, read_chat_template
from jnana.processing.chat_formats_jnana import FORMATS, find_answer_end
from tests.processing.chats import FORMAT_TOKENS, add_format_tokens, instruct_tokenizer, llama_like_tokenizer
from tests.tiny import CORPUS, save_tiny_llava, tiny_image_processor, tiny_tokenizer


FIXTURES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
IMAGE = {"type": "image", "image": Image.new("RGB", (30, 24), "red")}

# The shipped template that takes the place of each published one
VISION = {
    "llava-1.5": "vicuna",
    "llava-1.6-mistral": "mistral",
    "llava-1.6-mistral-later": "mistral",
    "llava-next-video-7b-32k": "mistral",
    "llava-next-video-34b": "chatml",
    "llava-onevision": "chatml",
}
TEXT = {
    "openhermes-2.5": "chatml",
    "smollm2-instruct": "smollm2",
    "qwen2-instruct": "qwen2",
    "qwen2.5-instruct": "qwen2_5",
    "qwen3": "chatml",
    "llama-3-instruct": "llama3",
    "llama-3.2-instruct": "llama3_1",
    "llama-3.3-instruct": "llama3_1",
    "phi-3.5-mini-instruct": "phi3",
}
# What docs/chat_templates.md lists as missing or wrong behind an answer: the published text, and the corrected one
CORRECTED = {
    "llava-1.5": ("{% generation %}{{ content['text'] + ' '}}", "{% generation %}{{ content['text'] + '</s>'}}"),
    "llava-1.6-mistral": ("<\\s>", "</s>"),
    "llava-next-video-7b-32k": ("<\\s>", "</s>"),
}
WITHOUT_SYSTEM = {"llava-next-video-7b-32k"}


def published(fixture: str) -> str:
    return (FIXTURES / f"{fixture}.jinja").read_text(encoding="utf-8")


def corrected(fixture: str) -> str:
    old, new = CORRECTED.get(fixture, ("{%", "{%"))
    assert old in published(fixture)
    return published(fixture).replace(old, new)


def make_processor(template: str, tokenizer, kind=JnanaProcessor):
    return kind(
        tiny_image_processor(),
        tokenizer,
        patch_size=12,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=template,
    )


def ordinary_chat(rng: random.Random, turns: int, images: bool, system: bool) -> list[dict]:
    """Messages of text parts, with up to two images anywhere among a question's parts, ending in a question."""

    def text(edges: tuple[str, ...] = ("", "", " ", "\n")) -> dict:
        words = " ".join(rng.choices(" ".join(CORPUS).split(), k=rng.randint(1, 6)))
        return {"type": "text", "text": rng.choice(edges) + words + rng.choice(edges)}

    chat = [{"role": "system", "content": [text()]}] if system else []
    for turn in range(turns):
        if turn:  # no white space around: tokenised in one piece, it could merge with the prompt in front
            chat.append({"role": "assistant", "content": [text(edges=("",))]})
        parts = [text()]
        for _ in range(rng.choice([0, 1, 1, 2]) if images else 0):
            parts.insert(rng.randint(0, len(parts)), IMAGE)
        chat.append({"role": "user", "content": parts})
    return chat


def as_strings(chat: list[dict]) -> list[dict]:
    return [{**message, "content": message["content"][0]["text"]} for message in chat]


def ids_of(processor, chat: list[dict]) -> list[int]:
    row = processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(row["input_ids"][0])


def text_ids(tokenizer, template: str, chat: list[dict]) -> list[int]:
    """The prompt's ids as a language model's tokenizer gives them, on the day that Llama 3.1's template names."""
    return tokenizer.apply_chat_template(
        chat,
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        date_string="26 Jul 2024",
    )


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize(("fixture", "name"), VISION.items())
def test_prompts_are_those_of_the_stock_processor(fixture, name):
    """Token for token, one turn and many, with and without images and system message."""
    tokenizer = instruct_tokenizer(name)
    stock = make_processor(corrected(fixture), tokenizer, LlavaProcessor)
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    rng = random.Random(fixture)
    for number in range(60):
        system = number % 4 == 0 and fixture not in WITHOUT_SYSTEM
        chat = ordinary_chat(rng, turns=1 + number % 3, images=number % 5 > 0, system=system)
        assert ids_of(ours, chat) == ids_of(stock, chat)


@pytest.mark.parametrize("fixture", CORRECTED)
def test_a_listed_deviation_is_all_that_differs(fixture):
    """As published: equal on one turn, and the end of earlier answers is what differs on many."""
    tokenizer = instruct_tokenizer(VISION[fixture])
    stock = make_processor(published(fixture), tokenizer, LlavaProcessor)
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    rng = random.Random(fixture)
    for _ in range(10):
        one, many = (ordinary_chat(rng, turns, images=True, system=False) for turns in (1, 3))
        assert ids_of(ours, one) == ids_of(stock, one)
        assert ids_of(ours, many) != ids_of(stock, many)
        assert ids_of(ours, many).count(tokenizer.eos_token_id) == 2
        assert ids_of(stock, many).count(tokenizer.eos_token_id) == 0


@pytest.mark.parametrize(("fixture", "name"), TEXT.items())
def test_prompts_are_those_of_the_language_models_tokenizer(fixture, name):
    tokenizer = instruct_tokenizer(name)
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    rng = random.Random(fixture)
    for number in range(60):
        chat = ordinary_chat(rng, turns=1 + number % 3, images=False, system=number % 4 == 0)
        expected = text_ids(tokenizer, published(fixture), as_strings(chat))
        assert ids_of(ours, chat) == ids_of(ours, as_strings(chat)) == expected


@pytest.mark.parametrize(("fixture", "name"), TEXT.items())
def test_an_image_is_a_line_in_front_of_the_question(fixture, name):
    """Where the published template knows no images: `<image>` and a line break for each, as LLaVA's models have it."""
    tokenizer = instruct_tokenizer(name)
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    for count, question in ((1, "what do you see?"), (2, "how many pieces are there?")):
        chat = [{"role": "user", "content": [{"type": "text", "text": question}, *[IMAGE] * count]}]
        written = [{"role": "user", "content": "<image>\n" * count + question}]
        (ids,), _ = ours.encode_chats([chat], add_generation_prompt=True)
        assert ids.count(ours.image_token_id) == count
        assert ids == text_ids(tokenizer, published(fixture), written)


def test_the_prompt_that_llava_1_6_34b_was_trained_with():
    """`chatml_direct` is the only recognised format without a published template: this is its documented prompt."""
    ours = make_processor(read_chat_template("chatml_direct"), instruct_tokenizer("chatml_direct"))
    chat = [
        {"role": "system", "content": "Answer the questions."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is shown in this image?"}]},
    ]
    assert ours.apply_chat_template(chat, add_generation_prompt=True) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is shown in this image?"
        "<|im_end|><|im_start|>assistant\n"
    )


def test_a_prompt_does_not_depend_on_the_day():
    """Llama 3.2's own template writes the day of the call; the shipped one a fixed day, or the one that is given."""
    tokenizer = instruct_tokenizer("llama3_1")
    own, chat = published("llama-3.2-instruct"), [{"role": "user", "content": "why?"}]
    ours = make_processor(adopt_chat_template(own, tokenizer), tokenizer)
    assert "\nToday Date: 26 Jul 2024\n" in ours.apply_chat_template(chat)
    for day in ("26 Jul 2024", "01 Feb 2030"):
        theirs = tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False, date_string=day)
        assert ours.apply_chat_template(chat, date_string=day) == theirs
    assert ours.apply_chat_template(chat) != tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False)


def test_nothing_stands_behind_a_whole_chat_of_phi():
    """Its own template writes the tokenizer's end token behind a chat that asks for no answer."""
    tokenizer = instruct_tokenizer("phi3")
    own = published("phi-3.5-mini-instruct")
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    ours = make_processor(adopt_chat_template(own, tokenizer), tokenizer).apply_chat_template(chat)
    assert tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False) == ours + tokenizer.eos_token


def test_no_empty_thoughts_of_qwen3():
    """Its own template writes them in front of a last answer; behind a following question they are gone."""
    tokenizer = instruct_tokenizer("chatml")
    own = published("qwen3")
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    ours = make_processor(adopt_chat_template(own, tokenizer), tokenizer).apply_chat_template(chat)
    theirs = tokenizer.apply_chat_template(chat, chat_template=own, tokenize=False)
    assert theirs != ours and theirs.replace("<think>\n\n</think>\n\n", "") == ours


@pytest.mark.parametrize("fixture", ["qwen2.5-instruct", "qwen3", "llama-3.2-instruct", "llama-3.3-instruct"])
def test_tools_are_not_written(fixture):
    tokenizer = instruct_tokenizer(TEXT[fixture])
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    chat = [{"role": "user", "content": "why?"}]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    assert "look" in tokenizer.apply_chat_template(chat, tools, chat_template=published(fixture), tokenize=False)
    assert ours.apply_chat_template(chat, tools=tools) == ours.apply_chat_template(chat)


@pytest.mark.parametrize(("fixture", "name"), [*VISION.items(), *TEXT.items()])
def test_every_answer_ends_in_the_real_end_token(fixture, name):
    tokenizer = instruct_tokenizer(name)
    ours = make_processor(adopt_chat_template(published(fixture), tokenizer), tokenizer)
    end = tokenizer.convert_tokens_to_ids(FORMAT_TOKENS.get(name, ("</s>",))[0])
    assert find_answer_end(ours.chat_template, tokenizer) == end
    chat = ordinary_chat(random.Random(fixture), turns=3, images=True, system=False)[:-1]
    row = ours.apply_chat_template([chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = row["input_ids"][0], row["assistant_masks"][0]
    ends = [index for index, on, after in zip(ids, mask, [*mask[1:], 0], strict=True) if on and not after]
    assert ends == [end] * 2
    # Negative control: the published templates mark nothing, or leave their end token out
    assert find_answer_end(published(fixture), tokenizer) is None


# ---------------------------------------------------------------------- recognition


def test_one_log_line_names_the_format(caplog):
    with caplog.at_level(logging.INFO, logger="jnana"):
        adopt_chat_template(published("smollm2-instruct"), instruct_tokenizer("smollm2"))
    (record,) = [record for record in caplog.records if "chat template" in record.getMessage()]
    assert "has the format 'smollm2': the shipped template takes its place" in record.getMessage()


def test_every_shipped_format_is_recognised_as_itself():
    for name in FORMATS:
        tokenizer = instruct_tokenizer(name)
        adopted = adopt_chat_template(read_chat_template(name), tokenizer)
        assert adopted == read_chat_template(name)
        assert adopt_chat_template(adopted, tokenizer) == adopted


@pytest.mark.parametrize(("fixture", "name"), [*VISION.items(), *TEXT.items()])
def test_a_template_saved_with_other_white_space_is_recognised(fixture, name):
    tokenizer = instruct_tokenizer(name)
    expected = adopt_chat_template(published(fixture), tokenizer)
    again = "{# saved again -#}\n{%- set unused = 1 -%}\n" + published(fixture).replace("message['", "message ['")
    assert again != published(fixture)
    assert adopt_chat_template(again, tokenizer) == expected
    assert adopt_chat_template({"default": again, "tool_use": "x"}, tokenizer) == expected


@pytest.mark.parametrize(
    ("fixture", "old", "new"),
    [
        ("llava-1.5", "'ASSISTANT:'", "'ASSISTANT: '"),
        ("llava-1.5", "{{ '<image>\n' }}", "{{ '<image>' }}"),
        ("llava-1.5", "{% generation %}{{ content['text'] + ' '}}", "{% generation %}{{ content['text'] + '.'}}"),
        ("llava-1.6-mistral", "' [/INST]'", "'[/INST]'"),
        ("llava-1.6-mistral", "<\\s>", "<|end|>"),
        ("llava-1.6-mistral", "<</SYS>>\n\n", "<</SYS>>\n"),
        ("llava-next-video-34b", "'<|im_end|>' + '\n'", "'<|im_end|>' + '\n\n'"),
        ("llava-next-video-34b", "'<image>\n'", "'<image>'"),
        ("llava-onevision", "'<|im_start|>' + message", "'<|im_end|>' + message"),
        ("smollm2-instruct", "SmolLM", "SmolLM2"),
        ("qwen2-instruct", "helpful", "useful"),
        ("qwen2.5-instruct", "Qwen, created", "Qwen created"),
        ("llama-3-instruct", "<|eot_id|>", "<|end_header_id|>"),
        ("llama-3.2-instruct", "December 2023", "March 2023"),
        ("llama-3.3-instruct", "assistant<|end_header_id|>\\n\\n", "assistant<|end_header_id|>\\n"),
        ("phi-3.5-mini-instruct", "'<|user|>\n'", "'<|user|>'"),
        ("phi-3.5-mini-instruct", "<|system|>", "<|user|>"),
    ],
)
def test_negative_control_one_changed_token_is_another_format(fixture, old, new):
    changed = published(fixture).replace(old, new)
    assert changed != published(fixture)
    with pytest.raises(ValueError, match="has none of the known formats"):
        adopt_chat_template(changed, instruct_tokenizer({**VISION, **TEXT}[fixture]))


def test_an_image_in_other_tokens_is_another_format():
    """Qwen2-VL's text format is Qwen2's; its images are not."""
    template = (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful "
        "assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = instruct_tokenizer("qwen2")
    with pytest.raises(ValueError, match="has none of the known formats.*write '<image>'"):
        adopt_chat_template(template, tokenizer)
    without = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    assert adopt_chat_template(without, tokenizer) == read_chat_template("qwen2")


def test_a_prompt_begins_as_the_checkpoints_own(tmp_path):
    """The begin-of-text token comes from the template, or from a stock processor whose tokenizer adds it."""
    adding = instruct_tokenizer("vicuna")
    plain = add_format_tokens(llama_like_tokenizer(), "vicuna")
    for tokenizer, begins in ((adding, True), (plain, False)):
        ours = make_processor(adopt_chat_template(published("llava-1.5"), tokenizer), tokenizer)
        stock = make_processor(published("llava-1.5"), tokenizer, LlavaProcessor)
        chat = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "why?"}]}]
        assert ids_of(ours, chat) == ids_of(stock, chat)
        assert (ids_of(ours, chat)[0] == tokenizer.bos_token_id) == begins
        assert adopt_chat_template(ours.chat_template, tokenizer) == ours.chat_template
    hermes = add_format_tokens(llama_like_tokenizer(), "chatml")
    chat = [{"role": "user", "content": "why?"}]
    for start in ("", "{{ bos_token }}"):
        own = start + published("openhermes-2.5")
        ours = make_processor(adopt_chat_template(own, hermes), hermes)
        assert ids_of(ours, chat) == text_ids(hermes, own, chat)
        assert (ids_of(ours, chat)[0] == hermes.bos_token_id) == bool(start)


# ---------------------------------------------------------------------- kept or refused


OWN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Bot:{% generation %}{{ ' ' + m.content[0].text + END }}"
    "{% endgeneration %}{% else %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)


@pytest.mark.parametrize("end", ["eos_token", "eos_token + '\n'", "'<|im_end|>'", "'\n' + eos_token"])
def test_another_format_with_marked_answers_is_kept(end):
    tokenizer = add_format_tokens(tiny_tokenizer(), "chatml")
    own = OWN.replace("END", end)
    assert adopt_chat_template(own, tokenizer) == own
    written = "<|im_end|>" if "im_end" in end else tokenizer.eos_token
    assert find_answer_end(own, tokenizer) == tokenizer.convert_tokens_to_ids(written)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (OWN.replace("{% generation %}", "").replace("{% endgeneration %}", ""), "marks no answers, so put"),
        (OWN.replace(" + END", ""), "do not close each answer with an end token.*'<\\|endoftext\\|>'"),
        (OWN.replace("END", "'</s>'"), "do not close each answer"),  # in letters: this tokenizer has no such token
        (OWN.replace("END", "'<image>'"), "do not close each answer"),
        (OWN.replace("END", "(eos_token if loop.last else '')"), "do not close each answer"),
        (OWN.replace(" + END }}{% endgeneration %}", "}}{% endgeneration %}{{ eos_token }}"), "do not close each"),
        (OWN.replace("END", "eos_token").replace("<image>", ""), "does not render messages of image and text parts"),
        (OWN.replace("END", "eos_token").replace("m.content[0].text", "m.content"), "does not render messages"),
    ],
)
def test_what_cannot_be_trained_with_is_refused_with_what_to_add(template, message):
    tokenizer = add_format_tokens(tiny_tokenizer(), "jnana")
    with pytest.raises(ValueError, match=f"none of the known formats.*{message}.*name a shipped one"):
        adopt_chat_template(template, tokenizer)


def test_no_template_is_refused():
    for template in (None, {"tool_use": "x"}):
        with pytest.raises(ValueError, match="holds no default template. Give one: chatml"):
            adopt_chat_template(template, tiny_tokenizer())


def test_a_known_format_whose_end_token_the_tokenizer_lacks():
    """chatml over a tokenizer without its tokens: the end token would be trained letter by letter."""
    message = r"'chatml' writes '<\|im_end\|>' between an answer.*finds no end token in it.*'<\|endoftext\|>'"
    with pytest.raises(ValueError, match=message):
        adopt_chat_template(published("openhermes-2.5"), tiny_tokenizer())


def test_an_end_token_need_not_be_marked_as_special():
    """Some tokenizers hold `<|im_end|>` as an added token that is not special; a word is no end token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "rook"])
    adopted = adopt_chat_template(published("openhermes-2.5"), tokenizer)
    assert find_answer_end(adopted, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert find_answer_end(OWN.replace("END", "'rook'"), tokenizer) is None


def test_letters_become_the_tokenizers_own_end_token():
    """Vicuna's format with `</s>` written into the template, over a tokenizer that ends texts otherwise."""
    tokenizer = add_format_tokens(tiny_tokenizer(), "vicuna")
    letters = corrected("llava-1.5")
    assert find_answer_end(letters, tokenizer) is None
    adopted = adopt_chat_template(letters, tokenizer)
    assert find_answer_end(adopted, tokenizer) == tokenizer.eos_token_id


# ---------------------------------------------------------------------- the default of a new pair


@pytest.mark.parametrize(("fixture", "name"), TEXT.items())
def test_an_instruct_model_keeps_its_own_format(backbones, tmp_path, fixture, name):
    tokenizer = instruct_tokenizer(name)
    tokenizer.chat_template = published(fixture)
    tokenizer.save_pretrained(tmp_path / "text")
    processor = JnanaProcessor.from_vision_text_pretrained(backbones[0], tmp_path / "text")
    assert processor.chat_template == read_chat_template(name)
    processor.save_pretrained(tmp_path / "saved")
    again = JnanaProcessor.from_pretrained(tmp_path / "saved")
    assert again.chat_template == AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template
    assert again.chat_template == processor.chat_template
    named = JnanaProcessor.from_vision_text_pretrained(backbones[0], tmp_path / "text", chat_template="jnana")
    assert named.chat_template == read_chat_template("jnana")


def test_a_base_model_gets_jnana(backbones):
    assert JnanaProcessor.from_vision_text_pretrained(*backbones).chat_template == read_chat_template("jnana")


def test_an_instruct_model_of_another_format_is_refused(backbones, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="marks no answers, so put"):
        JnanaProcessor.from_vision_text_pretrained(backbones[0], tmp_path)
    assert JnanaProcessor.from_vision_text_pretrained(backbones[0], tmp_path, chat_template="jnana")


def test_a_named_template_needs_its_end_token(backbones):
    with pytest.raises(ValueError, match=r"'phi3' writes '<\|end\|>' between an answer"):
        JnanaProcessor.from_vision_text_pretrained(*backbones, chat_template="phi3")


@pytest.mark.parametrize(("kind", "name"), [("llava", "vicuna"), ("llava_next", "mistral")])
def test_a_published_checkpoint_keeps_its_prompts(tmp_path, kind, name):
    folder = save_tiny_llava(tmp_path, kind)
    stock, ours = AutoProcessor.from_pretrained(folder), JnanaProcessor.from_llava_pretrained(folder)
    assert ours.chat_template == read_chat_template(name)
    chat = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "why?"}]}]
    assert ids_of(ours, chat) == ids_of(stock, chat)
    named = JnanaProcessor.from_llava_pretrained(folder, chat_template="llava_chess")
    assert named.chat_template == read_chat_template("llava_chess")
    with pytest.raises(ValueError, match=r"'chatml' writes '<\|im_end\|>' between an answer"):
        JnanaProcessor.from_llava_pretrained(folder, chat_template="chatml")
