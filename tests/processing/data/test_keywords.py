"""Answers as keywords: the words that are removed, and those that are kept."""

import pytest

from jnana.processing.data import answers_as_keywords, keywords


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The man is riding a horse, on the beach.", "man riding horse beach"),
        ("No, there are not any dogs in the picture.", "No not dogs picture"),
        ("It's a well-known clock; it shows 3:45 or 2.5 hours.", "well-known clock shows 3:45 2.5 hours"),
        ("It isn't.", "isn't"),
        ("It is.", "It is"),  # nothing but stop words: they are the answer
        ("!", "!"),
        ("Ein Löwe über dem Tor", "Ein Löwe über dem Tor"),
    ],
)
def test_keywords(text, expected):
    assert keywords(text) == expected


def test_only_answers_change():
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the man doing?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "The man is riding a horse."}]}
    row = answers_as_keywords({"images": [], "conversations": [[question, answer]], "source": "x"})
    assert row["conversations"][0][0] == question and row["source"] == "x"
    assert row["conversations"][0][1]["content"][0]["text"] == "man riding horse"
