"""Reduces answers to keywords, as the recipe phi35_pooled trains its adapter.

Stop words and punctuation say little about an image, so an adapter trained without them writes shorter answers. The
base model, with the adapter off, turns the keywords into a sentence (`jnana.evaluation.fluent`).
"""

import re
from typing import Any


# English function words: articles, pronouns, prepositions, conjunctions, auxiliaries. Negations and numbers are kept,
# because without them an answer would say the opposite.
STOP_WORDS = frozenset(
    """
    a an the this that these those there here it its itself he him his himself she her hers herself they them their
    theirs themselves we us our ours ourselves you your yours yourself i me my mine myself who whom whose which what
    am is are was were be been being have has had having do does did doing will would shall should can could may might
    must and or but if then than because while as until of at by for with about against between into through during to
    from in out on off over under again further once so such also both each other some any very just only own same too
    s t re ve ll d m
    """.split()
)

# A word, with the apostrophes and hyphens inside it; a number with its decimal point.
WORD = re.compile(r"\d+(?:[.,:]\d+)*|\w+(?:[-'’]\w+)*")


def keywords(text: str) -> str:
    """
    A text without stop words and punctuation.

    Args:
        text (`str`): An answer in sentences.

    Returns:
        `str`: The remaining words in order, separated by single spaces. A text of stop words only keeps them, without
        punctuation; a text without words is returned unchanged.
    """
    words = WORD.findall(text)
    kept = [word for word in words if not is_stop_word(word)]
    return " ".join(kept or words) or text


def is_stop_word(word: str) -> bool:
    """Whether a word, or every piece of a contraction ("it's", but not "isn't"), is a stop word."""
    return all(piece in STOP_WORDS for piece in re.split(r"['’]", word.lower()))


def answers_as_keywords(row: dict[str, Any]) -> dict[str, Any]:
    """The row with every answer's text as [`keywords`]; questions are unchanged."""
    chats = []
    for chat in row["conversations"]:
        messages = []
        for message in chat:
            content = message["content"]
            if message["role"] == "assistant":
                content = [
                    {**part, "text": keywords(part["text"])} if part["type"] == "text" else part for part in content
                ]
            messages.append({**message, "content": content})
        chats.append(messages)
    return {**row, "conversations": chats}
