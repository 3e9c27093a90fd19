"""transformers' pipelines, from a directory: texts and vectors equal stock LLaVA's."""

import numpy as np
import pytest
from transformers import AutoModel, pipeline

from tests.interfaces.conftest import chat, picture


SETTINGS = {"max_new_tokens": 8, "do_sample": False}


def texts_of(outputs) -> list[str]:
    """The generated texts of one chat or of several."""
    if isinstance(outputs, dict):
        return [outputs["generated_text"]]
    return [text for output in outputs for text in texts_of(output)]


@pytest.mark.client("pipeline: image-text-to-text", note="chats, several at once")
def test_chats(stock, ours):
    other = [{"role": "user", "content": [{"type": "image", "image": picture(7)}, {"type": "text", "text": "why?"}]}]
    found = []
    for side in (stock, ours):
        answer = pipeline("image-text-to-text", model=str(side.folder), device="cpu")
        assert type(answer.model) is type(side.model) and type(answer.processor) is type(side.processor)
        single = [texts_of(answer(text=one, return_full_text=False, **SETTINGS))[0] for one in (chat(), other)]
        assert single[0] != single[1]
        padded = {"batch_size": 2, "processing_kwargs": {"padding": True}}
        both = texts_of(answer(text=[chat(), other], return_full_text=False, **padded, **SETTINGS))
        if side is ours:  # the tiny stock processor pads on the right, where a published one says left
            assert both == single
        found.append(single)
    assert found[0] == found[1]


@pytest.mark.client("pipeline: images and a text", note="without a chat template")
def test_images_and_a_text(stock, ours):
    given = {"images": picture(), "text": "<image> what is this?", "return_full_text": False, **SETTINGS}
    found = []
    for side in (stock, ours):
        answer = pipeline("image-text-to-text", model=side.model, processor=side.processor)
        found.append(texts_of(answer(**given)))
        assert texts_of(answer(**{**given, "images": picture(7)})) != found[-1]  # the control
    assert found[0] == found[1]


@pytest.mark.client("pipeline: feature-extraction", note="of texts, as stock LLaVA")
def test_features_of_a_text(stock, ours):
    found = []
    for side in (stock, ours):
        model = AutoModel.from_pretrained(side.folder)
        extract = pipeline("feature-extraction", model=model, tokenizer=side.processor.tokenizer, device="cpu")
        found.append([np.array(extract(text)) for text in ("a white king", "a dog")])
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
    assert found[1][0].shape[-1] == ours.model.config.text_config.hidden_size
    assert not np.allclose(found[1][0][0, -1], found[1][1][0, -1], atol=1e-3)  # the control
