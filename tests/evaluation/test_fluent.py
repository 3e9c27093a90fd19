"""Keywords are generated with the adapter, sentences without it; questions without an image never use the adapter."""

import pytest
from PIL import Image

from jnana.evaluation.fluent import fluent_answer
from jnana.processing import JnanaProcessor
from jnana.training.model_setup import build_pair
from jnana.training.options.arguments import LoraArguments
from jnana.training.stages import apply_stage
from tests.tiny import save_tiny_text, save_tiny_vision


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    backbones = str(save_tiny_vision(folder / "clip")), str(save_tiny_text(folder / "phi"))
    processor = JnanaProcessor.from_vision_text_pretrained(*backbones)
    return build_pair(*backbones, processor, vision_feature_layer=-1), processor


def test_which_pass_has_the_adapter(pair, monkeypatch):
    model, processor = apply_stage(pair[0], "sft", LoraArguments(lora_r=2)), pair[1]
    passes = []
    generate = model.generate

    def spy(**inputs):
        layer = model.get_base_model().model.language_model.layers[0].mlp.fc1
        text = processor.tokenizer.decode(inputs["input_ids"][0])
        passes.append((not layer.disable_adapters, "pixel_values" in inputs, text))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    text = {"type": "text", "text": "what stands there?"}
    picture = {"type": "image", "image": Image.new("RGB", (24, 24), "red")}
    keywords, _ = fluent_answer(model, processor, [{"role": "user", "content": [picture, text]}], max_new_tokens=3)
    assert [one[:2] for one in passes] == [(True, True), (False, False)]
    assert "what stands there?" in passes[1][2] and keywords in passes[1][2]
    passes.clear()
    assert fluent_answer(model, processor, [{"role": "user", "content": [text]}], max_new_tokens=3)[0] is None
    assert [one[:2] for one in passes] == [(False, False)]


def test_a_merged_model_is_refused(pair):
    with pytest.raises(ValueError, match="needs a model with an unmerged adapter"):
        fluent_answer(*pair, [{"role": "user", "content": [{"type": "text", "text": "x"}]}])
