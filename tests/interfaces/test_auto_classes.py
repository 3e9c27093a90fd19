"""Auto classes, the tables of names of transformers, and weights that a checkpoint lacks."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from jnana import JnanaConfig
from tests.interfaces.conftest import chat


@pytest.mark.client("Auto classes", note="AutoModel gives hidden states")
def test_the_auto_classes_load_the_same_weights(stock, ours):
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        for side in (stock, ours):
            assert type(auto.from_pretrained(side.folder)) is type(side.model)
    states = [AutoModel.from_pretrained(side.folder)(**side.inputs()).last_hidden_state for side in (stock, ours)]
    torch.testing.assert_close(*states)


@pytest.mark.client("every Auto class that takes LLaVA", note="a class of a new release is tried too")
def test_every_auto_class_that_takes_stock_llava_takes_ours(stock, ours):
    taken = []
    for name in sorted(set(dir(transformers))):
        if not re.fullmatch(r"AutoModel(For\w+|With\w+)?", name):
            continue
        auto = getattr(transformers, name)
        try:
            made = auto.from_config(stock.model.config)
        except (ValueError, ImportError):  # it has no such class
            with pytest.raises((ValueError, ImportError)):
                auto.from_config(ours.model.config)
            continue
        taken.append(name)
        mine = auto.from_config(ours.model.config)
        assert type(mine).__name__.replace("Jnana", "Llava") == type(made).__name__, name
        assert name in ours.model.config.auto_map or name == "AutoModel", name
    assert {"AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"} < set(taken)


@pytest.mark.client("embeddings: mean pooling", note="over the tokens of the answer, of AutoModel's hidden states")
def test_the_mean_of_an_answers_hidden_states_is_an_embedding(stock, ours):
    vectors = []
    for side in (stock, ours):
        model = AutoModel.from_pretrained(side.folder)
        inputs, prompt = side.inputs(), side.inputs()["input_ids"].shape[1]
        answer = side.processor.tokenizer(" a white king", return_tensors="pt")["input_ids"][:, :3]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            vectors.append(model(**inputs).last_hidden_state[:, prompt:].mean(1))
            inputs["pixel_values"] = -inputs["pixel_values"]
            other = model(**inputs).last_hidden_state[:, prompt:].mean(1)
        assert not torch.allclose(vectors[-1], other, atol=1e-3)  # the control: it is of the image too
    torch.testing.assert_close(*vectors)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_other_auto_classes_name_the_right_ones(stock, ours, auto):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        auto.from_pretrained(stock.folder)
    with pytest.raises(ValueError, match="Load it with `AutoModelForImageTextToText`"):
        auto.from_pretrained(ours.folder)
    with pytest.raises(ValueError, match="Load it with `AutoModelForImageTextToText`"):
        auto.from_config(ours.model.config)


@pytest.mark.client("pipeline: image-text-to-text", note="chats, alone and in a batch")
def test_the_pipeline(stock, ours):
    chats = [chat("what is this?"), chat("why?")]
    texts = []
    for side in (stock, ours):
        answer = pipeline("image-text-to-text", model=str(side.folder), trust_remote_code=True)
        settings = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 8, "do_sample": False}}
        alone = [answer(text=one, **settings)[0]["generated_text"] for one in chats]
        together = [one[0]["generated_text"] for one in answer(text=chats, batch_size=2, **settings)]
        if side is ours:  # the tiny stock processor pads on the right, where a published one says left
            assert alone == together
        texts.append(alone)
    assert texts[0] == texts[1] and len(set(texts[0])) == 2


@pytest.mark.client(
    "transformers serve DIRECTORY --trust-remote-code", note="tests/chat/test_transformers_serve.py runs it"
)
def test_the_server_finds_the_class_by_its_name(stock, ours):
    for side in (stock, ours):
        assert MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[side.model.config.model_type] == type(side.model).__name__


def test_the_files_have_the_copyright_line_that_the_init_test_of_transformers_reads(stock):
    for config_class in (type(stock.model.config), JnanaConfig):
        source = Path(inspect.getfile(config_class)).read_text(encoding="utf-8")
        assert re.search(r"^# Copyright (\d{4})", source, re.MULTILINE)
