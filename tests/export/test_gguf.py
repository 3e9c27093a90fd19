"""GGUF: the file is read back and computed by an independent reading of llama.cpp's graph, in both token orders."""

import importlib.util
import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from jnana.export import ExportFailedError, ExportOptions, export_model, llama_cpp, mmproj, probe_chats
from jnana.export.comparison import encode
from jnana.export.llama_cpp import MARKER, llama_cpp_template
from jnana.export.mmproj import MmprojEncoder
from jnana.processing import chat_template_names, read_chat_template
from jnana.training.loading import load_model
from tests.export.clip_graph import ClipGraph
from tests.export.models import save_model


GGUF = ExportOptions("gguf", max_new_tokens=8)
TANH = {"projector_hidden_act": "gelu_pytorch_tanh"}
CASES = {
    "clip": TANH,
    "clip, last layer": {**TANH, "vision_feature_layer": -1},
    "clip, first state": {**TANH, "vision_feature_layer": 0},
    "clip, three layers out of order": {**TANH, "vision_feature_layer": [-1, 1, -2]},
    "clip, no bias": {**TANH, "multimodal_projector_bias": False},
    "clip, norm": {**TANH, "projector_layer_norm": True},
    "clip, linear": {"projector_type": "linear"},
    "clip, linear without bias": {"projector_type": "linear", "multimodal_projector_bias": False},
    "siglip": {**TANH, "vision": "siglip"},
    "siglip full, linear": {"vision": "siglip", "projector_type": "linear", "vision_feature_select_strategy": "full"},
    "padded": {**TANH, "geometry": "pad"},
}


def save(folder, **fields) -> str:
    return save_model(folder, **{"vision_feature_layer": -2, **fields})


def features_of(model, processor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixel values and our projected features of each built-in image."""
    found = []
    for chat in probe_chats():
        inputs = encode(processor, chat)
        if "pixel_values" in inputs:
            with torch.no_grad():
                ours = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
            found.append((inputs["pixel_values"][0].numpy(), ours.numpy()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_features_equal_those_of_the_graph(tmp_path, case):
    path = save(tmp_path, **CASES[case])
    agreement = export_model(path, tmp_path / "out", GGUF)
    assert agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "mmproj.gguf", "text"]
    graph = ClipGraph(tmp_path / "out" / "mmproj.gguf")
    for pixels, ours in features_of(*load_model(path)):
        np.testing.assert_allclose(graph(pixels), ours, rtol=0, atol=1e-3 * np.abs(ours).max())


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_both_orders_of_the_class_token(tmp_path, caplog, vision):
    """The deviation of the order that stands in llama.cpp is told; SigLIP has no class token and no deviation."""
    path = save(tmp_path, vision=vision, **TANH)
    with caplog.at_level(logging.INFO, "jnana.export"):
        export_model(path, tmp_path / "out", GGUF)
    graph = ClipGraph(tmp_path / "out" / "mmproj.gguf")
    encoder = MmprojEncoder(tmp_path / "out" / "mmproj.gguf", load_model(path)[0].config)
    deviations = []
    for pixels, ours in features_of(*load_model(path)):
        last = graph(pixels, class_token="last")
        emulated = encoder(torch.from_numpy(pixels)[None], class_token_last=True)[0].numpy()
        np.testing.assert_allclose(emulated, last, rtol=0, atol=1e-4 * np.abs(last).max())
        deviations.append(np.linalg.norm(last - ours) / np.linalg.norm(ours))
    told = re.search(r"report 25814.*features differ by (\d+(?:\.\d+)?)", caplog.text)
    if vision == "siglip":
        assert told is None and max(deviations) < 1e-4
    else:
        assert told is not None and float(told[1]) == pytest.approx(max(deviations), rel=0.1) and float(told[1]) > 0.1


def test_the_form_of_gelu_with_erf_is_told_apart(tmp_path):
    """llama.cpp computes the tanh form: the features of a projector with the other are near, and not equal."""
    path = save(tmp_path, projector_hidden_act="gelu")
    agreement = export_model(path, tmp_path / "out", GGUF)
    assert 1e-4 < agreement.max_logit_difference < 0.1
    graph = ClipGraph(tmp_path / "out" / "mmproj.gguf")
    errors = [np.linalg.norm(graph(p) - ours) / np.linalg.norm(ours) for p, ours in features_of(*load_model(path))]
    assert 1e-5 < max(errors) < 1e-3


def test_the_text_half(tmp_path):
    """Phi with the bias of its head, which no LLaVA class has."""
    path = save(tmp_path, text="phi", text_intermediate_size=256, **TANH)
    model, processor = load_model(path)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    export_model(path, tmp_path / "out", GGUF)
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "text")
    assert text.lm_head.bias.abs().min() > 0 and torch.equal(text.lm_head.bias, model.lm_head.bias)
    ids = encode(processor, probe_chats()[-1])["input_ids"]
    with torch.no_grad():
        assert torch.equal(text(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "out" / "text" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["PhiForCausalLM"] and "auto_map" not in config
    assert str(tmp_path) not in json.dumps(config)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "text").chat_template.count(MARKER) > 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(tmp_path, dtype):
    """`text/` in 16 bits, from a checkpoint of 32: it answers as the rounded weights do in 32."""
    path = save(tmp_path, text="phi", text_intermediate_size=256, **TANH)
    options = ExportOptions("gguf", dtype=dtype, max_new_tokens=8)
    agreement = export_model(path, tmp_path / "out", options)
    assert agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers
    config = json.loads((tmp_path / "out" / "text" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == dtype
    weights = load_file(tmp_path / "out" / "text" / "model.safetensors")
    own = load_model(path)[0].model.language_model.state_dict()
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights[f"model.{name}"], own[name].to(getattr(torch, dtype)))
    graph = ClipGraph(tmp_path / "out" / "mmproj.gguf")
    rounded = load_model(path, dtype=dtype)[0].float()
    for pixels, ours in features_of(rounded, load_model(path)[1]):
        np.testing.assert_allclose(graph(pixels), ours, rtol=0, atol=1e-3 * np.abs(ours).max())
    exact = features_of(*load_model(path))  # the control: the features of the weights before they were rounded
    assert max(np.abs(graph(pixels) - ours).max() / np.abs(ours).max() for pixels, ours in exact) > 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_text_families(tmp_path, family):
    agreement = export_model(save(tmp_path, text=family, **TANH), tmp_path / "out", GGUF)
    assert agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers


@pytest.mark.parametrize("name", chat_template_names())
def test_templates_take_the_marker_in_the_text(name):
    """As the server sends it (a part or a string with the marker) and as transformers does (an image part)."""
    template = read_chat_template(name)
    ours = llama_cpp_template(template, "<image>")
    assert "generation" not in re.findall(r"\{%-?\s*(\w+)", ours)
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A rook."}]}
    again = {"role": "user", "content": [{"type": "text", "text": "And  then?"}]}
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}

    def render(source: str, content) -> str:
        chat = [{"role": "user", "content": content}, answer, again]
        return render_jinja_template([chat], chat_template=source, add_generation_prompt=True, **tokens)[0][0]

    expected = render(template, [image, text]).replace("<image>", MARKER)
    assert expected.count(MARKER) == 1
    marker = {"type": "text", "text": MARKER}
    forms = [
        [image, text],
        [marker, text],
        f"{MARKER}\nWhat is it?",
        [{"type": "text", "text": f"{MARKER}What is it?"}],
    ]
    assert [render(ours, content) for content in forms] == [expected] * len(forms)
    assert render(ours, "What is it?") == render(template, "What is it?")
    if name != "era_capstone":  # which writes for an image what it writes for a line of text
        assert render(template, [marker, text]) != expected  # the control: the template as it was


REFUSED = {
    "resblock": ({"projector_type": "resblock"}, "residual blocks with norms.*--distill"),
    "pooled": ({"vision_feature_select_strategy": "pooled", "vision": "clip_full"}, "is 'pooled'"),
    "full": ({"vision_feature_select_strategy": "full"}, "always drops CLIP's class token"),
    "dinov2": ({"vision": "dinov2"}, "computes CLIP and SigLIP towers, not 'dinov2'"),
    "tiles": ({"geometry": "anyres"}, "cuts images into tiles.*--to llava"),
    "activation": ({"projector_hidden_act": "relu"}, "always computes a GELU there"),
    "phi's width": ({"text": "phi"}, "feed-forward of a Phi to be 4 x 64 wide, and this one has 128"),
    "phi3": ({"text": "phi3"}, "reads tokenizer.model"),
    "twice": ({"vision_feature_layer": [-2, 2]}, "names a layer twice"),
    "norm of two layers": ({"vision_feature_layer": [-1, -2], "projector_layer_norm": True}, "last one alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_nearest_way(tmp_path, case):
    fields, message = REFUSED[case]
    path = save(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"(?s)can't be exported: .*{message}") as refusal:
        export_model(path, tmp_path / "out", GGUF)
    assert "Nearest: " in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf(tmp_path, monkeypatch):
    path = save(tmp_path, **TANH)
    find = importlib.util.find_spec
    monkeypatch.setattr("jnana.export.run.find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ImportError, match=r"pip install 'jnana\[gguf\]'"):
        export_model(path, tmp_path / "out", GGUF)


@pytest.mark.parametrize("error", ["bias", "layer", "gelu", "order of layers", "text"])
def test_the_check_finds_errors_and_nothing_is_written(tmp_path, monkeypatch, error):
    fields = {"vision_feature_layer": [-1, 1]} if error == "order of layers" else {}
    path = save(tmp_path, **TANH, **fields)
    if error == "layer":
        layers = mmproj.feature_layers
        monkeypatch.setattr(mmproj, "feature_layers", lambda config: [layer + 1 for layer in layers(config)])
    elif error == "gelu":  # the tower's: CLIP has the quick form
        monkeypatch.setitem(mmproj.TOWER_FLAGS, "quick_gelu", "use_gelu")
    elif error == "text":
        write = llama_cpp.write_text_folder

        def broken(folder, model, *arguments):
            torch.nn.init.normal_(model.lm_head.weight)
            write(folder, model, *arguments)

        monkeypatch.setattr("jnana.export.run.write_text_folder", broken)
    else:
        tensors = mmproj.projector_tensors

        def wrong(projector, config):
            found = tensors(projector, config)
            if error == "bias":
                found["mm.0.bias"] = torch.zeros_like(found["mm.0.bias"])
            else:
                found["mm.0.weight"] = torch.cat(found["mm.0.weight"].chunk(2, dim=1)[::-1], dim=1)
            return found

        monkeypatch.setattr(mmproj, "projector_tensors", wrong)
    with pytest.raises(ExportFailedError, match="nothing was written: "):
        export_model(path, tmp_path / "out", GGUF)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("geometry", [None, "pad"])
def test_other_pixels_are_told(tmp_path, caplog, geometry):
    with caplog.at_level(logging.WARNING, "jnana.export"):
        export_model(save(tmp_path, geometry=geometry, **TANH), tmp_path / "out", GGUF)
    assert ("llama.cpp pads images" in caplog.text) == (geometry is None)
