"""Options of single sources in a mixture, and what the log says about rows that no epoch has."""

import json
import logging

import pytest

from jnana.processing.data import PrepareOptions, prepare
from jnana.processing.data.mixture import DataSource


@pytest.fixture
def files(pictures):
    """Two LLaVA records of two turns each, and three captions in a column of their own."""
    turns = [("human", "what is it?"), ("gpt", "a square"), ("human", "and now?"), ("gpt", "the same")]
    chat = [{"from": who, "value": text} for who, text in turns]
    llava, captions = pictures / "llava.json", pictures / "captions.jsonl"
    llava.write_text(json.dumps([{"image": f"{number}.png", "conversations": chat} for number in range(2)]))
    texts = [json.dumps({"image": f"{number % 2}.png", "sentence": f"caption {number}"}) for number in range(3)]
    captions.write_text("\n".join(texts))
    return {"llava": llava, "captions": captions}


def options(pictures, **changes) -> PrepareOptions:
    given = {"image_folder": pictures, "progress": False, "num_proc": 1, "seed": 0}
    return PrepareOptions(**{**given, **changes})


def said(rows) -> dict[str, list[list[str]]]:
    """The texts of each conversation, by source."""
    found: dict[str, list[list[str]]] = {}
    for row in rows:
        (chat,) = row["conversations"]
        texts = ["".join(part["text"] or "" for part in message["content"]) for message in chat]
        found.setdefault(row["origin"], []).append(texts)
    return found


def test_a_mixture_of_llava_and_a_column_of_its_own(files, pictures, processor):
    sources = [
        DataSource(files["llava"], independent_turns=False),
        DataSource(files["captions"], format="dataset", text_column="sentence", prompt="which?"),
    ]
    found = said(prepare(sources, processor, options(pictures, prompt="what?")))
    assert [len(chat) for chat in found["llava"]] == [4, 4]
    assert found["captions"] == [["which?", f"caption {number}"] for number in range(3)]
    # The controls: the run's options, which the second source alone needs
    assert [
        len(chat)
        for chat in said(prepare([DataSource(files["llava"]), sources[1]], processor, options(pictures)))["llava"]
    ] == [2] * 4
    plain = [DataSource(files["llava"]), DataSource(files["captions"], format="dataset")]
    with pytest.raises(ValueError, match="text_column: options of format='dataset'"):
        prepare(plain, processor, options(pictures, text_column="sentence"))


@pytest.mark.parametrize(
    ("epochs", "samples", "repeat", "logged"),
    [
        (3, 2, 1, True),
        (None, 2, 1, True),  # as with max_steps
        (1, 2, 1, False),
        (3, None, 1, False),
        (3, None, 2, False),
    ],
)
def test_rows_that_no_epoch_has_are_logged(files, pictures, processor, caplog, epochs, samples, repeat, logged):
    sources = [
        DataSource(files["llava"]),
        DataSource(files["captions"], format="dataset", text_column="sentence", samples=samples, repeat=repeat),
    ]
    with caplog.at_level(logging.INFO, logger="jnana"):
        prepare(sources, processor, options(pictures, epochs=epochs))
    assert ("every epoch has the same rows (2 of 3 of captions)" in caplog.text) is logged
    assert "an epoch has" in caplog.text
