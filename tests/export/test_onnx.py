"""ONNX: three graphs that answer through onnxruntime as the model does, token for token, with their cache.

A trace takes ten seconds and more, so one model is exported for most tests; JNANA_ONNX=1 exports every family.
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor

from jnana.export import ExportFailedError, ExportOptions, export_model, onnx_graphs, probe_chats
from jnana.export.comparison import Agreement, ask, encode
from jnana.training.loading import load_model
from tests.export.models import save_model


ONNX = ExportOptions("onnx", max_new_tokens=8)
EVERY_FAMILY = os.environ.get("JNANA_ONNX") == "1"
PHI = {"text": "phi", "projector_type": "resblock"}
CASES = {
    "phi with a bias": PHI,
    "llama": {"text": "llama"},
    "mistral": {"text": "mistral", "vision": "siglip"},
    "mistral with a window": {"text": "mistral", "text_sliding_window": 12},
    "qwen2, tied": {"text": "qwen2", "projector_type": "linear"},
    "qwen3": {"text": "qwen3", "projector_layer_norm": True},
    "gpt_neox": {"text": "gpt_neox", "vision": "dinov2", "vision_feature_layer": -1},
    "image token beyond the vocabulary": {"text": "llama", "text_vocab_size": 300},
    "pixel_shuffle": {"text": "llama", "projector_type": "pixel_shuffle"},
    "avg_pool": {"text": "llama", "projector_type": "avg_pool"},
    "perceiver": {"text": "llama", "projector_type": "perceiver"},
    "pooled": {"text": "llama", "vision_feature_select_strategy": "pooled", "vision": "clip_full"},
    "phi3": {"text": "phi3", "vision_feature_select_strategy": "full", "vision_feature_layer": [-2, 1]},
}
needs_packages = pytest.mark.skipif(
    any(find_spec(name) is None for name in onnx_graphs.PACKAGES),
    reason="the extra onnx (onnx, onnxruntime, onnxscript) is not installed",
)


def save(folder: Path, **fields) -> str:
    path = save_model(folder, **{"vision_feature_layer": -2, **fields})
    if fields.get("text") == "phi":  # a new Phi's head has a bias of zeros
        model, _ = load_model(path)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[str, Path, Agreement]:
    """A checkpoint (Phi with a bias, residual blocks), its graphs, and what the export measured."""
    folder = tmp_path_factory.mktemp("onnx")
    path = save(folder, **PHI)
    return path, folder / "out", export_model(path, folder / "out", ONNX)


@needs_packages
def test_the_graphs_answer_as_the_model_does(exported):
    agreement = exported[2]
    assert agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers == len(probe_chats())


@needs_packages
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] is not PHI])
def test_every_family(tmp_path, case):
    if case not in ("mistral with a window", "image token beyond the vocabulary") and not EVERY_FAMILY:
        pytest.skip("JNANA_ONNX=1 exports every family, ten seconds and more each")
    agreement = export_model(save(tmp_path, **CASES[case]), tmp_path / "out", ONNX)
    assert agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers


@pytest.mark.parametrize("case", ["pixel_shuffle", "avg_pool", "perceiver", "pooled"])
def test_image_tokens_that_are_not_the_patches(tmp_path, case):
    model, processor = load_model(save(tmp_path, **CASES[case]))
    onnx_graphs.check_fits_onnx(model.config)
    onnx_graphs.counting_processor(model.config, processor).save_pretrained(tmp_path / "stock")
    stock = LlavaProcessor.from_pretrained(tmp_path / "stock")
    assert (stock.num_additional_image_tokens < 0) == (case != "perceiver")  # its 64 latents are more than the patches
    image = Image.new("RGB", (50, 40))
    (ids,) = stock(text=f"{stock.image_token} a", images=image)["input_ids"]
    vectors = onnx_graphs.VisionEncoder(model)(torch.zeros(1, 3, *model.config.image_height_and_width)).shape[1]
    assert ids.count(processor.image_token_id) == model.config.image_seq_length == vectors


@needs_packages
def test_the_files_and_the_names_that_transformers_js_asks_for(exported):
    path, out, _ = exported
    graphs = sorted(file.relative_to(out).as_posix() for file in out.rglob("*.onnx*"))
    assert graphs == ["onnx/decoder_model_merged.onnx", "onnx/embed_tokens.onnx", "onnx/vision_encoder.onnx"]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    _, processor = load_model(path)
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == processor.image_token_id and config["text_config"]["model_type"] == "phi"
    assert not list(out.glob("*.py")) and str(out.parent) not in json.dumps(config)
    cache = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    names = {
        "vision_encoder": (["pixel_values"], ["image_features"]),
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "decoder_model_merged": (
            ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cache)],
            ["logits", *(f"present.{name}" for name in cache)],
        ),
    }
    sessions = onnx_graphs.load_sessions(out)
    for graph, (inputs, outputs) in names.items():
        assert [value.name for value in sessions[graph].get_inputs()] == inputs
        assert [value.name for value in sessions[graph].get_outputs()] == outputs


@needs_packages
def test_what_transformers_js_reads(exported):
    """Its five reads, repeated: processor, count of image tokens, template, dtype, weights beside a graph."""
    path, out, _ = exported
    read = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*.json")}
    pixels, counts = read["preprocessor_config"], read["processor_config"]
    assert pixels["processor_class"] == "LlavaProcessor" and pixels["image_processor_type"]
    model, processor = load_model(path)
    (side, _), patch = model.config.image_height_and_width, counts["patch_size"]
    ids = encode(processor, probe_chats()[0])["input_ids"]
    images = int((ids == processor.image_token_id).sum())
    assert (side // patch) ** 2 + counts["num_additional_image_tokens"] == images > 0
    assert counts["vision_feature_select_strategy"] == "full"
    assert read["tokenizer_config"]["chat_template"] == processor.chat_template
    assert read["config"]["transformers.js_config"] == {"dtype": "fp32"}  # no weights beside these graphs


@needs_packages
def test_batches_with_padding_in_front(exported):
    """The decoder takes any batch: logits of padded rows are those of each row alone."""
    path, out, _ = exported
    sessions = onnx_graphs.load_sessions(out)
    model, processor = load_model(path)
    row = encode(processor, probe_chats()[-1])["input_ids"]
    rows = [row, row[:, :-3]]
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (3, 0))])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    feed = {"inputs_embeds": sessions["embed_tokens"].run(None, {"input_ids": ids.numpy()})[0]}
    feed |= {"attention_mask": mask.numpy(), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).numpy()}
    shape = onnx_graphs.cache_shape(model.config, 2, 0)
    feed |= {name: np.zeros(shape, np.float32) for name in onnx_graphs.cache_names("past_key_values", 2)}
    logits, *present = sessions["decoder_model_merged"].run(None, feed)
    assert present[0].shape == (2, 4, row.shape[1], 16)
    with torch.no_grad():
        for number, ids_alone in enumerate(rows):
            expected = model(ids_alone).logits[0, -1]
            np.testing.assert_allclose(logits[number, -1], expected, rtol=0, atol=1e-4)


@needs_packages
def test_the_answers_that_are_compared_differ_and_the_cache_is_used(exported):
    path, out, _ = exported
    _, processor = load_model(path)
    sessions = onnx_graphs.load_sessions(out)
    steps = []
    sessions["decoder_model_merged"] = Wrapped(
        sessions["decoder_model_merged"],
        lambda feed: steps.append((feed["inputs_embeds"].shape[1], feed["past_key_values.0.key"].shape[2])) or feed,
    )
    answers = ask(onnx_graphs.answering_by_graphs(sessions, out, processor, 8), probe_chats())[1]
    assert len({tuple(ids) for ids in answers}) > 5
    assert {count for count, cached in steps if cached} == {1}


class Wrapped:
    """A session whose inputs pass through a function."""

    def __init__(self, session, change):
        self.session, self.change, self.get_inputs = session, change, session.get_inputs

    def run(self, outputs, feed):
        return self.session.run(outputs, self.change(dict(feed)))


@needs_packages
@pytest.mark.parametrize("error", ["positions", "mask", "pixels", "another model's"])
def test_the_check_finds_errors_and_nothing_is_written(exported, tmp_path, monkeypatch, error):
    """With the graphs of the export above, and what is wrong in them or in what they are given."""
    path, out, _ = exported
    if error == "another model's":  # its head has another bias
        shutil.copytree(path, tmp_path / "model")
        model, _ = load_model(path)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(tmp_path / "model")
        path = str(tmp_path / "model")
    monkeypatch.setattr("jnana.export.run.write_onnx_folder", lambda folder, *others: shutil.copytree(out, folder))

    def wrong(feed):
        if error == "positions":
            feed["position_ids"] = feed["position_ids"] * 0
        elif error == "mask":
            feed["attention_mask"][:, 0] = 0
        return feed

    def sessions(folder):
        found = onnx_graphs.load_sessions(folder)
        found["decoder_model_merged"] = Wrapped(found["decoder_model_merged"], wrong)
        if error == "pixels":
            change = {"pixel_values": lambda pixels: pixels[:, ::-1].copy()}  # BGR
            found["vision_encoder"] = Wrapped(
                found["vision_encoder"], lambda feed: {name: change[name](value) for name, value in feed.items()}
            )
        return found

    monkeypatch.setattr("jnana.export.run.load_sessions", sessions)
    with pytest.raises(ExportFailedError, match="nothing was written: largest logit difference"):
        export_model(path, tmp_path / "out", ONNX)
    assert not (tmp_path / "out").exists()


@needs_packages
def test_weights_beside_a_large_graph(exported, tmp_path, monkeypatch):
    """A graph of more than 2 GB is no valid file: its weights lie beside it, here those of the embedding."""
    import onnxruntime

    model, _ = load_model(exported[0])
    monkeypatch.setattr(onnx_graphs, "EXTERNAL_BYTES", 0)
    auto = torch.export.Dim.AUTO
    onnx_graphs.write_graph(
        tmp_path / "embed_tokens.onnx",
        model.get_input_embeddings(),
        (torch.zeros(2, 3, dtype=torch.long),),
        ({0: auto, 1: auto},),
        ["input_ids"],
        ["inputs_embeds"],
    )
    assert {file.name for file in tmp_path.iterdir()} == {"embed_tokens.onnx", "embed_tokens.onnx_data"}
    assert (tmp_path / "embed_tokens.onnx").stat().st_size < model.get_input_embeddings().weight.numel()
    session = onnxruntime.InferenceSession(str(tmp_path / "embed_tokens.onnx"))
    ids = np.array([[5, 7, 9, 11]])
    expected = model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_array_equal(session.run(None, {"input_ids": ids})[0], expected)


REFUSED = {
    "cross_attention": ({"fusion": "cross_attention", "projector_type": "perceiver"}, "fusion: cross_attention"),
    "rope": (
        {"text_rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic'",
    ),
    "tiles": ({"geometry": "anyres"}, "cuts images into tiles.*--to llava"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, case, monkeypatch):
    monkeypatch.setattr("jnana.export.run.require_onnx", lambda: None)
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"can't be exported: .*{message}") as refusal:
        export_model(save(tmp_path, **fields), tmp_path / "out", ONNX)
    assert "Nearest: " in str(refusal.value) and not (tmp_path / "out").exists()


def test_distilling_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.export.run.require_onnx", lambda: None)
    path = save(tmp_path, projector_type="resblock")
    with pytest.raises(ValueError, match="a graph holds any projector. Nearest: leave distill out"):
        export_model(path, tmp_path / "out", ExportOptions("onnx", distill=True))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"double_linear": True}])
def test_options_of_other_formats_are_refused(tmp_path, options, monkeypatch):
    monkeypatch.setattr("jnana.export.run.require_onnx", lambda: None)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*Nearest: leave {next(iter(options))} out"):
        export_model(save(tmp_path), tmp_path / "out", ExportOptions("onnx", **options))
    assert not (tmp_path / "out").exists()


def test_settings_that_change_greedy_answers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.export.run.require_onnx", lambda: None)
    path = save(tmp_path)
    file = Path(path) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.3}))
    with pytest.raises(ValueError, match="sets repetition_penalty"):
        export_model(path, tmp_path / "out", ONNX)
    assert not (tmp_path / "out").exists()


def test_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(ImportError, match=r"onnxscript is not installed: `pip install 'jnana\[onnx\]'`"):
        export_model(save(tmp_path), tmp_path / "out", ONNX)
