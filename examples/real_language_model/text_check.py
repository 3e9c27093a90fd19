"""What trained pairs still know of their language model's text life: ten questions, and the loss on its own answers.

    python examples/real_language_model/text_check.py --chats_dir outputs/real_language_model/chats \
        --models '{"images": "outputs/real_language_model/sft_images/merged"}' --output_file text.json

`original.json` of text_chats.py holds the answers and the loss of the original model, and the prompts and answers on
which the loss of each pair is measured; none of them is trained on.
"""

import argparse
import json
import logging
from pathlib import Path

from text_chats import QUESTIONS, answer_loss, is_right, write_answers

from jnana import load_model


logger = logging.getLogger(__name__)


def score(answers: list[str], loss: float | None) -> dict:
    """Answers to the ten questions, which of them are right, and the loss on the original model's answers."""
    right = [is_right(answer, words, n) for answer, (_, words, n) in zip(answers, QUESTIONS, strict=True)]
    return {"right": sum(right), "loss": loss, "answers": answers, "is_right": right}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats_dir", type=Path, required=True)
    parser.add_argument("--models", type=json.loads, required=True, help="names and directories of pairs, as JSON")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    original = json.loads((arguments.chats_dir / "original.json").read_text(encoding="utf-8"))
    results = {"original": score(original["answers"], original["loss"])}
    questions = [question for question, _, _ in QUESTIONS]
    for name, folder in arguments.models.items():
        model, processor = load_model(folder, dtype="float32")
        text = (model.eval(), processor.tokenizer, processor.chat_template)
        answers = [answer for answer, _ in write_answers(*text, questions, arguments.max_new_tokens)]
        own = original["own_answers"]
        results[name] = score(answers, answer_loss(*text, own) if own else None)
        logger.info(f"{name}: {results[name]['right']} of {len(questions)} questions right")
    arguments.output_file.write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
