"""Random chats with all kinds of text that users may write, and tokenizers of another family than GPT-2's."""

import json
import random

from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from jnana.processing import add_jnana_tokens
from jnana.processing.chat_encoding_jnana import FOREIGN_MARKS
from tests.tiny import CORPUS, tiny_tokenizer


# The control tokens of the formats that have some; the first ends an answer
CHATML_TOKENS = ("<|im_end|>", "<|im_start|>")
LLAMA_TOKENS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
FORMAT_TOKENS = {
    **dict.fromkeys(("chatml", "chatml_direct", "qwen2", "qwen2_5", "smollm2"), CHATML_TOKENS),
    **dict.fromkeys(("llama3", "llama3_1"), LLAMA_TOKENS),
    "phi3": ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
}

# Control tokens, pieces of them, the templates' own words, white space, other scripts, our private marks
FRAGMENTS = [
    *"<image> <|endoftext|> <|pad|> <IMAGE> <<image>> <ima ge> <|endof text|> </s> <s> <tool> [INST]".split(" "),
    *"caption image: end of question: USER: ASSISTANT: <|user|> <|assistant|> <|end|> [Answer] [Visualize".split(" "),
    *"<|system|> <|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|> [/INST] <<SYS>>".split(" "),
    *"a white king and the black rook, how many? isn't it... 12 3.5 : ; ' \" ( \\ {{ x }} {% y %}".split(" "),
    *["\n", "\n\n", "  ", "\t", " \n ", "\u00a0", "日本語", "é", "🙂", "\ufe0f", "\u200b"],
    *["\U0010fa00", "\U0010fa01", "\U0010fa02", "\U000f0000", "\U000f0001", "\ue000"],
]


def random_text(rng: random.Random, most: int = 6) -> str:
    """Fragments run together or spaced."""
    return "".join(rng.choice(FRAGMENTS) + rng.choice(["", " "]) for _ in range(rng.randint(1, most)))


def random_chat(rng: random.Random, images: bool = True) -> list[dict]:
    """A chat of one to three questions and answers, with none to two pictures, as strings or as parts."""
    chat = []
    if rng.random() < 0.3:
        chat.append({"role": "system", "content": random_text(rng)})
    for _ in range(rng.randint(1, 3)):
        parts = [{"type": "text", "text": random_text(rng)} for _ in range(rng.randint(0, 2))]
        if images:
            for _ in range(rng.choice([0, 0, 1, 2])):
                parts.insert(rng.randint(0, len(parts)), {"type": "image", "image": Image.new("RGB", (30, 24))})
        if not parts:
            parts = [{"type": "text", "text": "why?"}]
        as_string = len(parts) == 1 and parts[0]["type"] == "text" and rng.random() < 0.5
        chat.append({"role": "user", "content": parts[0]["text"] if as_string else parts})
        answer = random_text(rng)
        chat.append(
            {"role": "assistant", "content": answer if rng.random() < 0.5 else [{"type": "text", "text": answer}]}
        )
    return chat


def text_of(message: dict, trim: bool = True) -> str:
    """What a message says, as the model should read it."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    text = FOREIGN_MARKS.sub("", "".join(parts))
    return text.strip() if trim else text


def num_images(chat: list[dict]) -> int:
    return sum(part["type"] == "image" for m in chat if not isinstance(m["content"], str) for part in m["content"])


def llama_like_tokenizer(across_words: bool = True) -> PreTrainedTokenizerFast:
    """BPE over whole texts, `▁` for spaces and one put in front, bytes as a last resort: as Llama's and Phi-3's.
    Theirs have no tokens `across_words`; with such tokens it is harder to keep prompt and answer apart."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if not across_words:
        trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    entries = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    entries += [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(entries))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    # As Phi-3.5 has them: special, and swallowing the white space behind them
    fast.add_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=True) for t in ("<|user|>", "<|assistant|>", "<|end|>")],
        special_tokens=True,
    )
    return fast


def add_format_tokens(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer with the control tokens of a shipped template, behind the image and the pad token."""
    add_jnana_tokens(tokenizer)
    tokens = [AddedToken(token, special=True, normalized=False) for token in FORMAT_TOKENS.get(template, ())]
    tokenizer.add_tokens(
        [token for token in tokens if token.content not in tokenizer.get_vocab()], special_tokens=True
    )
    return tokenizer


def instruct_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer as a published model of this format has it: its kind, its control tokens, its end token."""
    if template in ("vicuna", "mistral", "phi3"):
        tokenizer = llama_like_tokenizer(across_words=False)
        if template == "phi3":  # its tokenizer's end token is another one than that of its answers
            tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
        else:
            post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
            tokenizer.backend_tokenizer.post_processor = post
        return add_format_tokens(tokenizer, template)
    tokenizer = add_format_tokens(tiny_tokenizer(), template)
    tokenizer.eos_token = FORMAT_TOKENS[template][0]
    tokenizer.bos_token = {"smollm2": "<|im_start|>"}.get(template, "<|endoftext|>")
    if template.startswith("llama"):
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    return tokenizer
