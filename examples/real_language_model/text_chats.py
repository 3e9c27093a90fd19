"""The language model's text life: prompts, the original model's answers to them, and chats to mix into training.

    python examples/real_language_model/text_chats.py --text_model outputs/real_language_model/text_model \
        --data_dir outputs/real_language_model/data --output_dir outputs/real_language_model/chats

    instruct_images.json   the questions about the first images of the chess demo, as they are
    instruct_mixed.json    the same, and the original model's own answers to simple text prompts
    original.json          the original model's answers to the ten questions and to prompts that are not trained on

The answers need not be true: they are what the model said before, and training on them keeps it. An answer that did
not end within its limit of tokens is left out, because training would append the end token that the model did not
write.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from jnana.processing import adopt_chat_template


logger = logging.getLogger(__name__)

# The ten questions, each with the words of which a right answer holds at least `needed`.
QUESTIONS: list[tuple[str, list[str], int]] = [
    ("What is the capital of France?", ["Paris"], 1),
    ("What is 2 + 3?", ["5", "five"], 1),
    ("Name three fruits.", ["apple", "banana", "orange", "grape", "mango", "berr", "pear", "peach", "kiwi"], 3),
    ("What is the opposite of hot?", ["cold", "cool"], 1),
    ("List the four seasons of the year.", ["spring", "summer", "autumn", "fall", "winter"], 4),
    ("Which planet do we live on?", ["Earth"], 1),
    ("How many days are there in a week?", ["7", "seven"], 1),
    ("Who wrote Romeo and Juliet?", ["Shakespeare"], 1),
    ("What do bees make?", ["honey"], 1),
    ("At which temperature in degrees Celsius does water boil?", ["100"], 1),
]

# Prompts whose answers are trained on; the last ones of their random order are not, and measure the loss.
PROMPTS: dict[str, list[str]] = {
    "What is the capital of {}?": ["Italy", "Spain", "Japan", "Egypt", "Canada", "Germany", "Norway", "India", "Peru"],
    "Name three {}.": [
        "vegetables",
        "animals",
        "colours",
        "countries",
        "rivers",
        "sports",
        "metals",
        "flowers",
        "tools",
    ],
    "What is the opposite of {}?": ["big", "fast", "light", "happy", "early", "strong", "dry", "full", "near"],
    "Explain in one sentence what {} is.": ["gravity", "a poem", "rain", "money", "an atom", "music", "a volcano"],
    "Write one sentence about {}.": ["the sea", "a dog", "winter", "a teacher", "the moon", "bread", "a long journey"],
    "What is {}?": ["1 + 1", "4 + 4", "10 - 3", "6 + 1", "3 times 3", "9 - 5", "5 + 5", "8 + 2", "7 - 6"],
    "Give two tips for {}.": ["sleeping well", "learning a language", "saving water", "a job interview", "running"],
    "What is a {} used for?": ["hammer", "telescope", "spoon", "bicycle", "dictionary", "thermometer", "ladder"],
    "Where does {} come from?": ["milk", "paper", "glass", "coffee", "wool", "rubber", "sugar", "cotton"],
    "Who was {}?": ["Albert Einstein", "Mozart", "Cleopatra", "Isaac Newton", "Marie Curie", "Leonardo da Vinci"],
    "Say {} in a friendly way.": ["hello", "goodbye", "thank you", "sorry", "good night"],
    "Why {}?": [
        "is the sky blue",
        "do birds fly",
        "do we sleep",
        "is the sea salty",
        "do leaves fall",
        "do cats purr",
    ],
}


def all_prompts(seed: int) -> list[str]:
    """Every prompt once, in random order."""
    prompts = [pattern.format(word) for pattern, words in PROMPTS.items() for word in words]
    return [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]


def is_right(answer: str, words: list[str], needed: int) -> bool:
    """Whether an answer holds enough of the words, in any case."""
    return sum(word.lower() in answer.lower() for word in words) >= needed


@torch.inference_mode()
def write_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy answers to prompts without images, all in one batch.

    Args:
        model (`nn.Module`): A language model, or a pair that holds one.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        template (`str`): Its chat template.
        prompts (`list[str]`): One-turn chats.
        max_new_tokens (`int`): Longest answer.

    Returns:
        `list[tuple[str, bool]]`: Each answer, and whether the model ended it.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats,
        chat_template=template,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answers = output[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ended = (answers == tokenizer.eos_token_id).any(dim=1).tolist()
    return [(text.strip(), end) for text, end in zip(texts, ended, strict=True)]


@torch.inference_mode()
def answer_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str, chats: list[tuple[str, str]]
) -> float:
    """The mean loss over the tokens of given answers, end tokens included (nats).

    Args:
        model, tokenizer, template: As in [`write_answers`].
        chats (`list[tuple[str, str]]`): Prompts and answers.
    """
    total, count = 0.0, 0
    for prompt, answer in chats:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        inputs = tokenizer.apply_chat_template(
            chat, chat_template=template, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        supervised = inputs["assistant_masks"][0, 1:].bool()
        logits = model(input_ids=inputs["input_ids"]).logits[0, :-1][supervised]
        labels = inputs["input_ids"][0, 1:][supervised]
        total += nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        count += len(labels)
    return total / count


def text_record(number: int, prompt: str, answer: str) -> dict:
    """A LLaVA-Instruct record without an image."""
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": f"text-{number:04d}", "conversations": turns}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_model", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="data of the chess demo")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=390, help="images whose questions are trained on")
    parser.add_argument("--prompts", type=int, default=1000, help="text prompts at most, held-out ones included")
    parser.add_argument("--held_out", type=int, default=16, help="prompts that only measure the loss")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    return parser.parse_args(arguments)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = AutoTokenizer.from_pretrained(arguments.text_model)
    model = AutoModelForCausalLM.from_pretrained(arguments.text_model, dtype=torch.float32).eval()
    template = adopt_chat_template(tokenizer.chat_template, tokenizer)

    prompts = all_prompts(arguments.seed)[: arguments.prompts]
    questions = [question for question, _, _ in QUESTIONS]
    answers = write_answers(model, tokenizer, template, [*questions, *prompts], arguments.max_new_tokens)
    answers_to_questions = [answer for answer, _ in answers[: len(questions)]]
    chats = [(prompt, *answer) for prompt, answer in zip([*questions, *prompts], answers, strict=True)]
    first_trained, end = len(questions), len(chats) - arguments.held_out
    own = [(prompt, answer) for prompt, answer, ended in chats[:first_trained] + chats[end:] if ended and answer]
    trained = [(prompt, answer) for prompt, answer, ended in chats[first_trained:end] if ended and answer]

    images = json.loads((arguments.data_dir / "instruct_train.json").read_text(encoding="utf-8"))[: arguments.images]
    texts = [text_record(number, *chat) for number, chat in enumerate(trained)]
    before = {"answers": answers_to_questions, "own_answers": own}
    before["loss"] = answer_loss(model, tokenizer, template, own) if own else None
    files = {"instruct_images": images, "instruct_mixed": images + texts, "original": before}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = arguments.output_dir / f"{name}.json"
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    logger.info(f"{len(images)} images; {len(texts)} text chats to train on, {len(own)} to measure the loss")


if __name__ == "__main__":
    main()
