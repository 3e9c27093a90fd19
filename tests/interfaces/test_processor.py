"""The processor as other libraries call it."""

import base64
import functools
import http.server
import inspect
import io
import threading

import numpy as np
import pytest
import torch
from transformers import AutoProcessor
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, Unpack

from jnana import JnanaProcessor
from tests.interfaces.conftest import chat, picture


@pytest.mark.client("processor: truncation", note="never through image tokens")
def test_truncation(stock, ours):
    whole, cut = ours.inputs()["input_ids"], ours.inputs(truncation=True, max_length=12, padding=True)["input_ids"]
    assert torch.equal(cut, whole[:, :12]) and whole.shape[1] > 12
    assert torch.equal(cut, stock.inputs(truncation=True, max_length=12, padding=True)["input_ids"])
    for side in (stock, ours):
        text = side.processor.apply_chat_template(chat(), add_generation_prompt=True)
        called = side.processor(picture(), text, truncation=True, max_length=12, return_tensors="pt")
        assert torch.equal(called["input_ids"], cut)
    with pytest.raises(ValueError, match="Likely due to `truncation"):
        stock.inputs(truncation=True, max_length=4)
    last = int((whole[0] == ours.processor.image_token_id).nonzero().max())
    message = (
        f"max_length=4 would cut off image tokens: row 0 has {whole.shape[1]} tokens, and its images need {last + 1}"
    )
    with pytest.raises(ValueError, match=message):
        ours.inputs(truncation=True, max_length=4)
    with pytest.raises(ValueError, match=message):
        ours.processor(picture(), text, truncation=True, max_length=4)


@pytest.mark.client("processor: truncation with answer masks", note="")
def test_truncation_shortens_the_answer_mask(ours):
    conversation = [*chat(), {"role": "assistant", "content": "a white king on a board"}]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    whole = ours.processor.apply_chat_template([conversation], **options)
    length = len(whole["input_ids"][0]) - 3
    cut = ours.processor.apply_chat_template(
        [conversation], processor_kwargs={"truncation": True, "max_length": length}, **options
    )
    assert cut["assistant_masks"][0] == whole["assistant_masks"][0][:length] and sum(cut["assistant_masks"][0]) > 0


@pytest.mark.client("processor: constructor without patch_size", note="the first image raises")
def test_the_constructor_takes_the_parts_alone(stock, ours):
    type(stock.processor)(stock.processor.image_processor, stock.processor.tokenizer)
    processor = JnanaProcessor(ours.processor.image_processor, ours.processor.tokenizer)
    assert processor(text="a cat")["input_ids"]
    with pytest.raises(ValueError, match="patch_size=None: the number of image tokens depends on it"):
        processor(picture(), "<image> a cat")


def test_the_call_is_annotated_with_the_types_of_transformers():
    parameters = inspect.signature(JnanaProcessor.__call__).parameters
    assert parameters["images"].annotation == ImageInput | None
    assert parameters["kwargs"].annotation == Unpack[ProcessingKwargs]


@pytest.fixture
def served():
    """Serves a directory on a port of this machine; returns its address."""
    servers = []

    def serve(folder) -> str:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()


@pytest.mark.client("processor: images of every form", note="path, URL, base64, numpy, tensor, nested")
@pytest.mark.parametrize(
    "form", ["numpy", "channels_first", "tensor", "path", "base64", "data", "list", "nested", "url"]
)
def test_images_of_every_form(stock, ours, form, tmp_path, served):
    image, buffer = picture(), io.BytesIO()
    image.save(tmp_path / "image.png")
    image.save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    given = {
        "numpy": np.asarray(image),
        "channels_first": np.asarray(image).transpose(2, 0, 1),
        "tensor": torch.from_numpy(np.array(image)).permute(2, 0, 1),
        "path": str(tmp_path / "image.png"),
        "base64": text,
        "data": f"data:image/png;base64,{text}",
        "list": [image],
        "nested": [[image]],
        "url": f"{served(tmp_path)}/image.png",
    }[form]
    for side in (stock, ours):
        values = side.processor(given, "<image> a cat", return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(values, side.inputs()["pixel_values"])


@pytest.mark.client("processor: token types, decoding of answers", note="")
def test_token_types_and_decoded_answers(stock, ours):
    types = [side.inputs(return_mm_token_type_ids=True)["mm_token_type_ids"] for side in (stock, ours)]
    assert [list(map(int, kind[0])) for kind in types][0] == list(map(int, types[1][0]))
    tokens = ours.inputs()["input_ids"]
    texts = [side.processor.post_process_image_text_to_text(tokens) for side in (stock, ours)]
    assert texts[0] == texts[1]
    # Releases before 5.22 take too many images, with the stock processor.
    with pytest.raises(ValueError, match="The text has 1 '<image>', but the number of images passed is 2"):
        ours.processor([picture(), picture()], ["<image> a cat"])


@pytest.mark.client("processor: batches", note="a list of images a text")
def test_batches_of_images_and_texts(stock, ours):
    images = [[picture(0), picture(1)], [picture(2)]]
    texts = ["<image> and <image> are two", "<image> is one"]
    settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    found = [side.processor(images, texts, **settings) for side in (stock, ours)]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        torch.testing.assert_close(found[1][name], found[0][name])
    assert found[1]["pixel_values"].shape[0] == 3
    other = ours.processor([images[0][::-1], images[1]], texts, **settings)
    assert not torch.equal(other["pixel_values"], found[1]["pixel_values"])  # the control: in another order


def test_the_auto_map_is_stable(ours, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    JnanaProcessor.from_pretrained(ours.folder).save_pretrained(folders[0])
    AutoProcessor.from_pretrained(folders[0]).save_pretrained(folders[1])
    for name in ("processor_config.json", "tokenizer_config.json"):
        texts = [(folder / name).read_text() for folder in (ours.folder, *folders)]
        assert "processing_jnana.JnanaProcessor" in texts[0] and texts[0] == texts[1] == texts[2]
