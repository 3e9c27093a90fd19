"""What pycocoevalcap makes of some captions: its figures, and the tokens of its PTBTokenizer.

    pip install --no-binary pycocoevalcap pycocoevalcap==1.2  # the wheel lacks the tokenizer's jar
    python -m tests.evaluation.benchmarks.caption_figures     # needs Java

writes tests/fixtures/caption_figures.json and rewrites tests/fixtures/ptb_tokens.json. The figures are of made-up
captions, computed on the words between spaces, so that no tokenizer takes part. The captions of the second file were
written to be hard to tokenise.
"""

import json
import random
from pathlib import Path


FIXTURES = Path(__file__).parents[2] / "fixtures"
FIGURES, TOKENS = FIXTURES / "caption_figures.json", FIXTURES / "ptb_tokens.json"
WORDS = "a the man woman dog red ball on in with holding street two sitting next to of white cat 's".split()


def made_up_captions(images: int = 40) -> tuple[list[str], list[list[str]]]:
    """A caption and one to five references for each image; among them odd ones."""
    chance = random.Random(19)

    def caption(least: int = 3, most: int = 14) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))

    references = [[caption() for _ in range(chance.randint(1, 5))] for _ in range(images)]
    candidates = []
    for group in references:
        words = chance.choice(group).split()
        for _ in range(chance.randint(0, 4)):  # a reference with some words changed
            words[chance.randrange(len(words))] = chance.choice(WORDS)
        candidates.append(" ".join(words[: chance.randint(2, len(words))]))
    candidates[0] = references[0][0]
    candidates[1] = ""
    candidates[2] = "dog dog dog dog dog dog"
    candidates[3] = "zebra unseen words"
    references[4] = ["man"]
    candidates[4] = "man"
    return candidates, references


def pycocoevalcap_figures(candidates: list[str], references: list[list[str]]) -> dict[str, float | list[float]]:
    """The figures of the package `pycocoevalcap`, of the set and of each image."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = dict(enumerate(references))
    answers = {index: [caption] for index, caption in enumerate(candidates)}
    cider, ciders = Cider().compute_score(truth, answers)
    rouge, rouges = Rouge().compute_score(truth, answers)
    bleu = Bleu(4).compute_score(truth, answers, verbose=0)[0][3]
    return {
        "cider_d": float(cider),
        "cider_d_each": ciders.tolist(),
        "bleu_4": float(bleu),
        "rouge_l": float(rouge),
        "rouge_l_each": rouges.tolist(),
    }


def ptb_tokens(captions: list[str]) -> dict[str, list[str]]:
    """The tokens of COCO's caption evaluation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenized = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(captions)})
    return {text: tokenized[index][0].split() for index, text in enumerate(captions)}


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(pycocoevalcap_figures(*made_up_captions()), indent=1) + "\n", encoding="utf-8")
    lines = [
        f"{json.dumps(text)}: {json.dumps(tokens)}"
        for text, tokens in ptb_tokens(list(json.loads(TOKENS.read_text(encoding="utf-8")))).items()
    ]
    TOKENS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
