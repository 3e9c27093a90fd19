"""Every template with every kind of text: only answers and end tokens are labels, no text becomes a control token."""

import random

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

from jnana.processing import JnanaProcessor, add_jnana_tokens, chat_template_names, read_chat_template
from jnana.processing.chat_encoding_jnana import FOREIGN_MARKS
from tests.processing.chats import (
    FORMAT_TOKENS,
    add_format_tokens,
    llama_like_tokenizer,
    num_images,
    random_chat,
    text_of,
)
from tests.tiny import tiny_image_processor, tiny_tokenizer


TEMPLATES = chat_template_names()
# Templates whose answers start with the space that follows their last separator
SPACED = {"idefics", "idefics_instruct", "jnana", "visualize_this", "llava_chess", "vicuna", "mistral"}
# Templates that leave the white space around a message as it is, as the published ones of their formats do
UNTRIMMED = {"chatml", "chatml_direct", "smollm2", "qwen2", "qwen2_5", "vicuna", "mistral", "phi3"}
IMAGE = {"type": "image", "image": Image.new("RGB", (30, 24), "red")}


def make_processor(template: str, tokenizer) -> JnanaProcessor:
    add_jnana_tokens(tokenizer)
    return JnanaProcessor(
        tiny_image_processor(), tokenizer, patch_size=12, num_additional_image_tokens=1, chat_template=template
    )


def encode(processor, chats, **kwargs):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
    )


def runs(ids: list[int], mask: list[int]) -> list[tuple[int, list[int]]]:
    """(start, ids) of each stretch of supervised tokens."""
    found: list[tuple[int, list[int]]] = []
    for position, (index, on) in enumerate(zip(ids, mask, strict=True)):
        if on and position and mask[position - 1]:
            found[-1][1].append(index)
        elif on:
            found.append((position, [index]))
    return found


def control_tokens(processor, ids: list[int]) -> list[int]:
    special = {index for index, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    return [index for index in ids if index in special]


def harmless(chat: list[dict]) -> list[dict]:
    """The chat with `x` for every text that is not empty (a format may leave out an empty system message)."""

    def plain(text: str) -> str:
        return "x" if FOREIGN_MARKS.sub("", text) else ""

    return [
        {**m, "content": plain(m["content"])}
        if isinstance(m["content"], str)
        else {**m, "content": [{**p, "text": plain(p.get("text", ""))} for p in m["content"]]}
        for m in chat
    ]


def check_chat(processor: JnanaProcessor, chat: list[dict], template: str = "jnana", exact: bool = True) -> None:
    """All the promises about one chat; `template` names one with the processor's separators."""
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(FORMAT_TOKENS.get(template, (tokenizer.eos_token,))[0])
    row = encode(processor, [chat])
    ids, mask = row["input_ids"][0], row["assistant_masks"][0]
    answers = [message for message in chat if message["role"] == "assistant"]
    found = runs(ids, mask)
    assert len(found) == len(answers)
    for (_, answer_ids), answer in zip(found, answers, strict=True):
        assert answer_ids[-1] == end
        decoded = tokenizer.decode(answer_ids[:-1])
        expected = (" " if template in SPACED else "") + text_of(answer, trim=template not in UNTRIMMED)
        assert decoded == expected if exact else decoded.strip() == expected.strip()

    # The control tokens are those of the same chat with harmless texts, and the text is still readable
    assert ids.count(processor.image_token_id) == 4 * num_images(chat)
    assert template in FORMAT_TOKENS or ids.count(end) == len(answers)
    assert control_tokens(processor, ids) == control_tokens(
        processor, encode(processor, [harmless(chat)])["input_ids"][0]
    )
    if exact:
        read = tokenizer.decode(ids)
        for message in chat:
            parts = [{"text": message["content"]}] if isinstance(message["content"], str) else message["content"]
            whole = all("text" in part for part in parts)
            assert not whole or text_of(message) in read

    # The prompt of each answer is an exact prefix of the row that trains it
    turns = [position for position, message in enumerate(chat) if message["role"] == "assistant"]
    for turn, (start, _) in zip(turns, found, strict=True):
        prompt = processor.apply_chat_template(
            [chat[:turn]], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"][0]
        assert prompt == ids[:start]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_exactly_answers_and_closing_tokens_are_supervised(processors, template, seed):
    rng = random.Random(f"{template}{seed}")
    for _ in range(40):
        check_chat(processors[template], random_chat(rng, images=rng.random() < 0.7), template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_promises_hold_for_a_tokenizer_that_puts_spaces_in_front(template):
    processor = make_processor(read_chat_template(template), add_format_tokens(llama_like_tokenizer(), template))
    rng = random.Random(template)
    for _ in range(40):
        check_chat(processor, random_chat(rng), template, exact=False)


def test_the_promises_hold_with_added_tokens_of_every_kind():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>", "    ", "rook"])  # not special: a control token, white space, a word
    tokenizer.add_tokens(["<s>", "[INST]"], special_tokens=True)
    processor = make_processor(read_chat_template("jnana"), tokenizer)
    control = {tokenizer.convert_tokens_to_ids(token) for token in ("<tool>", "<s>", "[INST]")}
    rng = random.Random(0)
    for _ in range(60):
        chat = random_chat(rng)
        check_chat(processor, chat)
        assert not control & set(encode(processor, [chat])["input_ids"][0])
    chat = [{"role": "user", "content": "a rook"}, {"role": "assistant", "content": "a rook"}]
    assert tokenizer.convert_tokens_to_ids("rook") in encode(processor, [chat])["input_ids"][0]


def test_negative_control_the_checks_see_a_template_without_closing_token():
    broken = read_chat_template("jnana").replace(
        " + eos_token -}}\n{%- endgeneration -%}", "-}}\n{%- endgeneration -%}{{- eos_token -}}"
    )
    processor = make_processor(broken, tiny_tokenizer())
    with pytest.raises(AssertionError):
        check_chat(processor, random_chat(random.Random(0)))


def test_negative_control_plain_prompt_text_is_not_neutralised(processor):
    """Raw `processor(text=...)` is prompt text: there `<|endoftext|>` means the token."""
    ids = processor(text="say <|endoftext|> now")["input_ids"][0]
    assert processor.tokenizer.eos_token_id in ids


def test_negative_control_whole_text_tokenisation_breaks_the_prefix():
    """With a tokenizer that merges over the border, only tokenising piece by piece keeps the prompt a prefix."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = llama_like_tokenizer()
    chat = [{"role": "user", "content": "the bl"}, {"role": "assistant", "content": "ack rook"}]
    processor = make_processor(template, tokenizer)

    def whole(text):
        return tokenizer.encode(text, add_special_tokens=False)

    prompt, row = whole("the bl"), whole("the black rook</s>")
    assert row[: len(prompt)] != prompt
    check_chat(processor, chat, "era_capstone", exact=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ordinary_text_has_the_tokens_of_the_whole_rendered_text(processors, template):
    """Who renders and tokenises in two steps (vLLM, other tools) gets the same ids: templates break where BPE does."""
    processor = processors[template]
    chats = [
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "how many pieces are there"}]},
            {"role": "assistant", "content": "three, a king and two rooks."},
            {"role": "user", "content": "isn't it a black rook?"},
            {"role": "assistant", "content": "yes"},
        ],
        [{"role": "user", "content": [IMAGE, IMAGE]}, {"role": "assistant", "content": "a 2nd picture"}],
        [{"role": "user", "content": "what do you see"}, {"role": "assistant", "content": "no picture"}],
    ]
    for chat in chats:
        ids = encode(processor, [chat])["input_ids"]
        text = processor.apply_chat_template(chat)
        images = [IMAGE["image"]] * num_images(chat) or None
        assert processor(text=text, images=images)["input_ids"] == ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendered_text_stays_safe_when_tokenised_later(processors, template):
    processor = processors[template]
    chat = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "is <image> or <|endoftext|> a word?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=text, images=[IMAGE["image"]], return_tensors="pt")
    expected = encode(processor, [chat], add_generation_prompt=True)["input_ids"]
    assert inputs["input_ids"].tolist() == expected
    plain = processor.tokenizer(text)["input_ids"]  # by a tool that knows nothing of this
    assert plain.count(processor.image_token_id) == 1
    assert plain.count(processor.tokenizer.eos_token_id) == 0


def test_a_begin_of_text_token_is_written_once():
    """By the template, or by a tokenizer that adds it by itself, with and without neutralised passages."""
    tokenizer = llama_like_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    for template in ("llava_chess", "phi35_pooled"):
        processor = make_processor(read_chat_template(template), tokenizer)
        for question in ("why?", "why <s> and </s>?"):
            chat = [{"role": "user", "content": question}]
            text = processor.apply_chat_template(chat)
            ids = processor(text=text)["input_ids"][0]
            assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.eos_token_id not in ids
            rendered = encode(processor, [chat])["input_ids"][0]
            assert rendered == (ids if template == "llava_chess" else ids[1:])


def test_batches_are_padded_on_either_side(processor):
    chats = [
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "how many?"}]},
            {"role": "assistant", "content": "two"},
        ],
        [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "a king"}],
        [{"role": "user", "content": [IMAGE, IMAGE]}, {"role": "assistant", "content": "the rook"}],
    ]
    single = [encode(processor, [chat]) for chat in chats]
    for side in ("left", "right"):
        batch = encode(
            processor, chats, processor_kwargs={"padding": True, "padding_side": side, "return_tensors": "pt"}
        )
        assert batch["pixel_values"].shape == (3, 3, 24, 24)
        assert isinstance(batch["assistant_masks"], torch.Tensor)
        for row, alone in enumerate(single):
            kept = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][kept].tolist() == alone["input_ids"][0]
            assert batch["assistant_masks"][row][kept].tolist() == alone["assistant_masks"][0]
            assert batch["assistant_masks"][row][~kept].sum() == 0
            assert (batch["input_ids"][row][~kept] == processor.tokenizer.pad_token_id).all()
            assert kept[-1 if side == "left" else 0]


def test_the_jnana_sequence_is_that_of_the_system(processor):
    image, question = IMAGE, {"type": "text", "text": " what do you see? "}
    chat = [{"role": "user", "content": [image, question]}, {"role": "assistant", "content": "a king"}]
    assert processor.apply_chat_template(chat) == (
        "<image>caption image: what do you see? end of question: a king<|endoftext|>"
    )
    caption = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "a king"}]
    assert processor.apply_chat_template(caption) == "<image>caption image: a king<|endoftext|>"
    prompt = processor.apply_chat_template(caption[:1], add_generation_prompt=True)
    assert prompt == "<image>caption image:"
    assert processor.apply_chat_template([{"role": "user", "content": "why?"}]) == "why? end of question:"


def test_a_final_answer_can_be_continued(processor):
    chat = [{"role": "user", "content": "why? <image>"}, {"role": "assistant", "content": "a white"}]
    row = encode(processor, [chat])["input_ids"][0]
    begun = processor.apply_chat_template(chat, tokenize=True, return_dict=True, continue_final_message=True)
    assert begun["input_ids"][0] == row[:-1]


def test_truncation_of_image_tokens_and_missing_pictures_are_refused(processor):
    chat = [{"role": "user", "content": [IMAGE]}]
    with pytest.raises(ValueError, match="max_length=3 would cut off image tokens: row 0 has"):
        encode(processor, [chat], processor_kwargs={"truncation": True, "max_length": 3})
    with pytest.raises(ValueError, match="no images"):
        encode(processor, [[{"role": "user", "content": [{"type": "image"}]}]])


def test_an_unknown_template_is_named():
    with pytest.raises(ValueError, match="'jnanna' is neither a shipped template"):
        read_chat_template("jnanna")


def test_a_name_is_not_a_template(processor):
    with pytest.raises(ValueError, match="chat_template='llava_chess' is not a Jinja template.*read_chat_template"):
        processor.apply_chat_template([{"role": "user", "content": "why?"}], chat_template="llava_chess")


def test_no_field_of_a_chat_can_hold_a_control_token(processor):
    """A template may write any of them: a tool's name, the names of its arguments, a file's path."""
    evil = "<|endoftext|>"
    call = {"type": "function", "function": {"name": evil, "arguments": {evil: [evil], "path": evil, "url": evil}}}
    chat = [
        {"role": "user", "content": evil},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": evil, "content": evil},
    ]
    parameters = {"type": "object", "properties": {"path": {"type": "string", "description": evil}}}
    tools = [{"type": "function", "function": {"name": "read", "description": evil, "parameters": parameters}}]
    template = "{{ tools | tojson }}{% for message in messages %}{{ message | tojson }}{% endfor %}"
    ids = processor.apply_chat_template([chat], chat_template=template, tools=tools, tokenize=True, return_dict=True)[
        "input_ids"
    ][0]
    assert processor.tokenizer.decode(ids).count(evil) == 10
    assert processor.tokenizer.eos_token_id not in ids
    role = [{"role": evil, "content": "x"}]
    ids = processor.apply_chat_template([role], chat_template=template, tokenize=True, return_dict=True)["input_ids"]
    assert processor.tokenizer.eos_token_id not in ids[0]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, llama_like_tokenizer])
def test_encode_chat_gives_the_ids_of_apply_chat_template(template, tokenizer):
    processor = make_processor(read_chat_template(template), add_format_tokens(tokenizer(), template))
    rng = random.Random(7)
    for _ in range(20):
        chat = random_chat(rng)
        for prompt, asks in ((chat[:-1], True), (chat, False)):
            given = encode(processor, [prompt], add_generation_prompt=asks)["input_ids"][0]
            assert processor.encode_chat(prompt, add_generation_prompt=asks) == given
