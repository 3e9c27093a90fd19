"""Stock LLaVA folders: loaded by transformers alone they compute what the model computes; what can't, is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from jnana.export import ExportFailedError, ExportOptions, export_model, llava, probe_chats
from jnana.export.comparison import Agreement, encode
from jnana.training.loading import load_model
from tests.export.models import save_model


CASES = {
    "mlp": ("llava", {}),
    "mlp of the last layer": ("llava", {"vision_feature_layer": -1}),
    "mlp without bias": ("llava", {"multimodal_projector_bias": False}),
    "mlp of two layers": ("llava", {"vision_feature_layer": [-1, -3]}),
    "another activation": ("llava", {"projector_hidden_act": "gelu_pytorch_tanh"}),
    "clip full": ("llava", {"vision_feature_select_strategy": "full"}),
    "siglip": ("llava", {"vision": "siglip"}),
    "siglip full": ("llava", {"vision": "siglip", "vision_feature_select_strategy": "full"}),
    "linear": ("llava", {"projector_type": "linear"}),
    "linear without bias": ("llava", {"projector_type": "linear", "multimodal_projector_bias": False}),
    "norm": ("vipllava", {"projector_layer_norm": True}),
    "norm without bias": ("vipllava", {"projector_layer_norm": True, "multimodal_projector_bias": False}),
    "norm of two layers": ("vipllava", {"projector_layer_norm": True, "vision_feature_layer": [-2, 1]}),
    "tiles": ("llava_next", {"geometry": "anyres"}),
    "tiles, linear": ("llava_next", {"geometry": "anyres", "projector_type": "linear"}),
    "padded": ("llava", {"geometry": "pad"}),
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3"]
LLAVA = ExportOptions("llava", max_new_tokens=8)


def save(folder: Path, **fields) -> str:
    return save_model(folder, **{"vision_feature_layer": -2, **fields})


@pytest.mark.parametrize("case", CASES)
def test_stock_classes_compute_the_same_bit_for_bit(tmp_path, case):
    model_type, fields = CASES[case]
    path = save(tmp_path, **fields)
    agreement = export_model(path, tmp_path / "out", LLAVA)
    assert agreement == Agreement(0.0, len(probe_chats()), len(probe_chats()))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == model_type and "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "text", "vision"]  # no rest of the work


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    path = save(tmp_path, text=family)
    agreement = export_model(path, tmp_path / "out", LLAVA)
    assert agreement.max_logit_difference == 0 and agreement.same_answers == agreement.answers
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tied = stock.lm_head.weight is stock.get_input_embeddings().weight
    assert tied == family.startswith("qwen")


def test_sixteen_bits(tmp_path):
    path = save(tmp_path)
    agreement = export_model(path, tmp_path / "out", ExportOptions("llava", dtype="bfloat16", max_new_tokens=8))
    assert agreement.max_logit_difference == 0 and agreement.same_answers == agreement.answers
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_answers_that_are_compared_differ(tmp_path):
    """A comparison of equal answers shows nothing if a model answers everything alike."""
    model, processor = load_model(save(tmp_path))
    answer = llava_answers(model, processor)
    assert len({tuple(ids) for ids in answer}) > 5


def llava_answers(model, processor) -> list[list[int]]:
    from jnana.export.comparison import answering, ask

    return ask(answering(model, processor, processor, 8), probe_chats())[1]


@pytest.mark.parametrize("tiles", [False, True])
def test_a_doubled_linear_projector(tmp_path, tiles):
    path = save(tmp_path, projector_type="linear", geometry="anyres" if tiles else None)
    agreement = export_model(path, tmp_path / "out", ExportOptions("llava", double_linear=True, max_new_tokens=8))
    assert 0 < agreement.max_logit_difference < 1e-4 and agreement.same_answers == agreement.answers
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["projector_hidden_act"] == "gelu"


STOCK_ALONE = """
import json, sys
sys.modules["jnana"] = None  # not installed
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (50, 90, 3), dtype=np.uint8))
chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "two?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**inputs).logits
ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
counts = processor._get_num_multimodal_tokens(image_sizes=[[50, 90]])["num_image_tokens"]
print(json.dumps({"ids": inputs["input_ids"][0].tolist(), "answer": ids[0].tolist(), "counts": counts,
    "class": type(model).__name__, "processor": type(processor).__name__, "logits": logits[0, -1].tolist()}))
"""


@pytest.mark.parametrize("case", ["mlp", "siglip", "norm", "tiles"])
def test_a_fresh_interpreter_without_the_package(tmp_path, case):
    path = save(tmp_path, **CASES[case][1])
    export_model(path, tmp_path / "out", LLAVA)
    command = [sys.executable, "-c", STOCK_ALONE, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stock = json.loads(done.stdout.splitlines()[-1])
    classes = {"llava": "Llava", "vipllava": "VipLlava", "llava_next": "LlavaNext"}
    assert stock["class"] == classes[CASES[case][0]] + "ForConditionalGeneration"
    assert stock["processor"] == ("LlavaNextProcessor" if case == "tiles" else "LlavaProcessor")
    model, processor = load_model(path)
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "two?"}]
    inputs = encode(processor, [{"role": "user", "content": content}])
    assert inputs["input_ids"][0].tolist() == stock["ids"]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    torch.testing.assert_close(torch.tensor(stock["logits"]), logits, rtol=0, atol=1e-5)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert ids[0].tolist() == stock["answer"]
    assert stock["counts"] == [int((inputs["input_ids"] == processor.image_token_id).sum())]


def test_an_exported_folder_loads_here_again(tmp_path):
    path = save(tmp_path)
    export_model(path, tmp_path / "out", LLAVA)
    model, processor = load_model(path)
    again, its_processor = load_model(str(tmp_path / "out"))
    assert llava_answers(again, its_processor) == llava_answers(model, processor)
    export_model(str(tmp_path / "out"), tmp_path / "twice", LLAVA)


def test_an_image_token_beyond_the_vocabulary_gets_a_row(tmp_path):
    path = save(tmp_path)
    model, processor = load_model(path)
    rows = processor.image_token_id  # the embedding ends where the image token begins
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.config.text_config.vocab_size = rows
    model.save_pretrained(path)
    agreement = export_model(path, tmp_path / "out", LLAVA)
    assert agreement.max_logit_difference == 0 and agreement.same_answers == agreement.answers
    stock, its_processor = (c.from_pretrained(tmp_path / "out") for c in (AutoModelForImageTextToText, AutoProcessor))
    needed = max(its_processor.image_token_id, its_processor.tokenizer.pad_token_id) + 1
    assert stock.config.text_config.vocab_size == needed == stock.lm_head.weight.shape[0]
    assert set(range(rows, needed)) <= set(stock.generation_config.suppress_tokens)


def test_a_head_with_a_bias_of_zeros_fits(tmp_path):
    path = save(tmp_path, text="phi")
    assert export_model(path, tmp_path / "out", LLAVA).max_logit_difference == 0  # a new Phi's bias is zero
    model, _ = load_model(path)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(path)
    with pytest.raises(ValueError, match=r"head of the language model \('phi'\) has a bias.*Nearest: .*--to gguf"):
        export_model(path, tmp_path / "biased", LLAVA)
    assert not (tmp_path / "biased").exists()


REFUSED = {
    "resblock": ({"projector_type": "resblock"}, "residual blocks with norms.*Nearest: fit an mlp .* --distill"),
    "pixel_shuffle": ({"projector_type": "pixel_shuffle"}, "'pixel_shuffle' joins neighbouring patches.*type mlp"),
    "avg_pool": ({"projector_type": "avg_pool"}, "'avg_pool' averages neighbouring patches"),
    "pooled": ({"vision_feature_select_strategy": "pooled", "vision": "clip_full"}, "is 'pooled' .*Nearest: train"),
    "norm and siglip": ({"vision": "siglip", "projector_layer_norm": True}, "VipLlava takes one view an image"),
    "norm and tiles": ({"geometry": "anyres", "projector_layer_norm": True}, "VipLlava takes one view an image"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_nearest_way(tmp_path, case):
    fields, message = REFUSED[case]
    path = save(tmp_path, **fields)
    with pytest.raises(ValueError, match=f"(?s)can't be exported: .*{message}"):
        export_model(path, tmp_path / "out", LLAVA)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fusion": "cross_attention", "projector_type": "perceiver"}, "fusion: cross_attention"),
        ({"projector_type": "perceiver"}, "'perceiver' is a resampler"),
        ({"num_prefix_tokens": 5}, "5 vectors before its patches .CLS and registers.*select_strategy: full"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    config = load_model(save(tmp_path))[0].config
    llava.check_fits_llava(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        llava.check_fits_llava(config)


def test_a_doubled_projector_needs_room(tmp_path):
    config = load_model(save(tmp_path, projector_type="linear", vision_feature_layer=[-1, -2]))[0].config
    with pytest.raises(ValueError, match="needs 2 x 64 units"):
        llava.check_fits_llava(config, double_linear=True)
    config.projector_type = "mlp"
    with pytest.raises(ValueError, match="double_linear is for projectors of type linear"):
        llava.check_fits_llava(config, double_linear=True)


def drop_bias(monkeypatch):
    fill = llava.fill_projector

    def broken(target, *arguments):
        fill(target, *arguments)
        torch.nn.init.zeros_(target.linear_1.bias)

    monkeypatch.setattr(llava, "fill_projector", broken)


def change_field(monkeypatch, name, value):
    fields = llava.stock_fields
    monkeypatch.setattr(llava, "stock_fields", lambda *arguments: {**fields(*arguments), name: value})


@pytest.mark.parametrize("error", ["a projector bias dropped", "a wrong feature layer", "the other GELU"])
def test_the_check_finds_errors_and_nothing_is_written(tmp_path, monkeypatch, error):
    path = save(tmp_path)
    if error == "a projector bias dropped":
        drop_bias(monkeypatch)
    elif error == "a wrong feature layer":
        change_field(monkeypatch, "vision_feature_layer", -1)
    else:
        change_field(monkeypatch, "projector_hidden_act", "gelu_pytorch_tanh")
    with pytest.raises(ExportFailedError, match="nothing was written: largest logit difference"):
        export_model(path, tmp_path / "out", LLAVA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text", "vision"]


def test_an_output_directory_in_use_is_refused(tmp_path):
    path = save(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new directory"):
        export_model(path, tmp_path / "out", LLAVA)
    (tmp_path / "out" / "notes.txt").unlink()
    export_model(path, tmp_path / "out", LLAVA)  # an empty one is taken
