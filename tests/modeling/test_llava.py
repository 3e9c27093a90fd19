"""Published LLaVA checkpoints: the model computes what transformers' own class computes with the same weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from jnana.modeling import JnanaForConditionalGeneration, jnana_config_from_llava
from jnana.processing import JnanaProcessor
from jnana.training.loading import load_model
from tests.tiny import save_tiny_llava


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "phi"]  # Phi's head gets a bias of zeros
KINDS = ["llava", "llava_next"]


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


SIZES = [(24, 24), (31, 77), (90, 20), (48, 48), (5, 60), (61, 60)]


def batch(folder: Path, rows: list[list[tuple[int, int]]]) -> dict:
    """Inputs of the checkpoint's own processor: several rows, with several images of random sizes each, or none."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    texts = ["a white king " + "<image> and " * len(row) + "a black rook" for row in rows]
    images = [random_image(*size, seed=index) for index, size in enumerate(size for row in rows for size in row)]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == processor.image_token_id] = -100
    return {**inputs, "labels": labels}


def losses_and_gradients(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), outputs.loss.detach(), gradients


def jnana_name(name: str) -> str:
    return name.replace("model.image_newline", "model.multi_modal_projector.image_newline")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_equal_stock(tmp_path, kind, family):
    folder = save_tiny_llava(tmp_path, kind, family)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder, dtype="float32")
    inputs = batch(folder, [SIZES[:2], [], SIZES[2:]])
    expected, loss, gradients = losses_and_gradients(stock, inputs)
    logits, our_loss, our_gradients = losses_and_gradients(model, inputs)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_loss, loss, rtol=0, atol=1e-5)
    renamed = {jnana_name(name): gradient for name, gradient in gradients.items()}
    extra = our_gradients.keys() - renamed.keys()
    assert extra <= {"lm_head.bias"} and renamed.keys() <= our_gradients.keys()
    for name, gradient in renamed.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("change", ["sizes", "newline", "order"])
def test_controls_of_the_equality(tmp_path, change):
    folder = save_tiny_llava(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder, dtype="float32")
    inputs = batch(folder, [[(40, 24), (24, 40)]])
    expected = stock(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5)
    if change == "sizes":  # another size of the same number of tokens: other padding is cut off
        inputs["image_sizes"] = inputs["image_sizes"].flip(0)
    elif change == "newline":
        torch.nn.init.zeros_(model.model.multi_modal_projector.image_newline)
    else:
        inputs["pixel_values"] = inputs["pixel_values"].flip(1)
    assert (model(**inputs).logits - expected).abs().max() > 1e-3


def test_flat_views_equal_padded_ones(tmp_path):
    folder = save_tiny_llava(tmp_path)
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder)
    inputs = batch(folder, [SIZES])
    padded = model(**inputs)
    counts = model.model.multi_modal_projector.count_views([tuple(size) for size in inputs["image_sizes"].tolist()])
    flat = torch.cat([views[:count] for views, count in zip(inputs.pop("pixel_values"), counts, strict=True)])
    assert len(set(counts)) > 1
    assert torch.equal(model(pixel_values=flat, **inputs).logits, padded.logits)
    features = model.model.get_vision_features(flat)[1]
    assert torch.equal(model(image_features=features, **inputs).logits, padded.logits)
    with pytest.raises(ValueError, match="names images of .* views, but there are"):
        model(pixel_values=flat[:-1], **inputs)
    inputs.pop("image_sizes")
    with pytest.raises(ValueError, match="`image_sizes` is missing"):
        model(pixel_values=flat, **inputs)


def test_images_used_twice(tmp_path):
    folder = save_tiny_llava(tmp_path)
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder)
    twice = batch(folder, [[(40, 24)], [(24, 60)], [(40, 24)]])
    twice["pixel_values"][2] = twice["pixel_values"][0]
    once = {**twice, "pixel_values": twice["pixel_values"][:2], "image_sizes": twice["image_sizes"][:2]}
    indices = torch.tensor([0, 1, 0])
    torch.testing.assert_close(model(**once, image_indices=indices).logits, model(**twice).logits)
    with pytest.raises((ValueError, RuntimeError), match="must be from 0 to 1"):
        model(**once, image_indices=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_equals_stock(tmp_path, kind, beams):
    folder = save_tiny_llava(tmp_path, kind)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder, dtype="float32")
    inputs = batch(folder, [[(40, 24), (24, 60)], [(70, 24), (24, 24)]])
    del inputs["labels"]
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    options["suppress_tokens"] = [model.config.image_token_id]
    assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_again(tmp_path, kind):
    folder = save_tiny_llava(tmp_path / "stock", kind)
    model = JnanaForConditionalGeneration.from_pretrained(folder)  # finds out by itself what the checkpoint is
    processor = JnanaProcessor.from_llava_pretrained(folder)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "jnana" and str(tmp_path) not in json.dumps(config)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "own")
    inputs = batch(folder, [SIZES[:2]])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    reread = AutoProcessor.from_pretrained(tmp_path / "own")
    assert [reread.count_image_tokens(size) for size in SIZES] == [processor.count_image_tokens(s) for s in SIZES]


def test_no_weight_is_in_memory_twice(tmp_path):
    folder = save_tiny_llava(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    from jnana.modeling.llava_jnana import adopt_llava

    pointers = {p.data_ptr() for p in stock.parameters()}
    model = adopt_llava(JnanaForConditionalGeneration, stock, jnana_config_from_llava(config))
    assert {p.data_ptr() for p in model.parameters()} == pointers


def test_float16_loads_as_bfloat16_unless_asked(tmp_path, caplog):
    folder = save_tiny_llava(tmp_path / "a", dtype="float16")
    AutoModelForImageTextToText.from_pretrained(folder, dtype="float16").save_pretrained(folder)
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config.dtype == torch.bfloat16
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder, dtype="float16")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").save_pretrained(folder)
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder)  # the control
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_llava(tmp_path)
    weights = load_file(folder / "model.safetensors")
    dropped = next(name for name in weights if "image_newline" in name)
    save_file(
        {name: w for name, w in weights.items() if name != dropped}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lacks 1 weights of the model"):
        JnanaForConditionalGeneration.from_llava_pretrained(folder)


def test_other_models_are_refused(tmp_path):
    from tests.tiny import save_tiny_text

    with pytest.raises(ValueError, match="model_type is 'phi'; a LLaVA checkpoint"):
        JnanaForConditionalGeneration.from_llava_pretrained(save_tiny_text(tmp_path))


PUBLISHED = {  # parameters that transformers' own classes count
    "llava-1.5-7b-hf": 7_063_427_072,
    "llava-v1.6-mistral-7b-hf": 7_566_747_648,
    "llava-v1.6-vicuna-7b-hf": 7_063_431_168,
    "llava-v1.6-34b-hf": 34_752_083_968,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_at_full_size(name):
    """On the meta device, from the fields of the published config.json; transformers' own class is the reference."""
    config = AutoConfig.from_pretrained(Path(__file__).parents[1] / "fixtures" / "configs" / f"llava-hf--{name}")
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config)
        model = JnanaForConditionalGeneration(jnana_config_from_llava(config))
    shapes = {jnana_name(key): value.shape for key, value in stock.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


class TestStoredQuantised:
    """A LLaVA checkpoint that was saved in 4 bits."""

    @pytest.fixture
    def stored(self, tmp_path) -> Path:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["model.vision_tower", "lm_head"]
        )
        folder = save_tiny_llava(tmp_path / "full", "llava")
        stock = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=quantization)
        stock.save_pretrained(tmp_path / "four")
        AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "four")
        return tmp_path / "four"

    def test_it_loads_saves_and_loads_again(self, stored, tmp_path):
        model, processor = load_model(str(stored))
        assert model.is_quantized and model.is_loaded_in_4bit and model.config.quantization_config is not None
        layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
        assert layers and not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)
        inputs = batch(stored, [SIZES[:2]])
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path / "again")
        processor.save_pretrained(tmp_path / "again")
        again, _ = load_model(str(tmp_path / "again"))
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("quantization", ["none", "int8"])
    def test_another_quantisation_is_refused(self, stored, quantization):
        with pytest.raises(ValueError, match="is stored quantised .* leave `quantization` out"):
            load_model(str(stored), quantization=quantization)


def test_arguments_of_from_pretrained(tmp_path):
    folder = save_tiny_llava(tmp_path, "llava")
    load = JnanaForConditionalGeneration.from_llava_pretrained
    assert load(folder, torch_dtype=torch.float16).dtype == torch.float16
    model = load(folder, attn_implementation="eager")
    assert model.config._attn_implementation == model.model.language_model.config._attn_implementation == "eager"
    four = load(folder, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    assert any(type(module).__name__ == "Linear4bit" for module in four.model.language_model.modules())
    assert not any(type(module).__name__ == "Linear4bit" for module in four.model.vision_tower.modules())


def test_four_bits_compute_in_the_dtype_of_the_checkpoint(tmp_path):
    folder = save_tiny_llava(tmp_path, "llava")
    AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    model, _ = load_model(str(folder), quantization="nf4")
    assert model.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16


def test_float16_is_noticed_where_the_config_names_no_dtype(tmp_path):
    folder = save_tiny_llava(tmp_path, "llava")
    AutoModelForImageTextToText.from_pretrained(folder, dtype="float16").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert JnanaForConditionalGeneration.from_llava_pretrained(folder).dtype == torch.bfloat16


def test_pickled_weights_are_not_read(tmp_path):
    folder = save_tiny_llava(tmp_path, "llava")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        JnanaForConditionalGeneration.from_llava_pretrained(folder)


def test_a_checkpoint_without_a_chat_template(tmp_path):
    folder = save_tiny_llava(tmp_path, "llava")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template. Name the one .* vicuna"):
        load_model(str(folder))
    assert load_model(str(folder), chat_template="vicuna")[1].chat_template is not None


def test_sizes_of_fewer_images(tmp_path):
    folder = save_tiny_llava(tmp_path)
    model = JnanaForConditionalGeneration.from_llava_pretrained(folder)
    inputs = batch(folder, [SIZES[:2]])
    inputs["image_sizes"] = inputs["image_sizes"][:1]
    with pytest.raises(ValueError, match="`image_sizes` has 1 images and `pixel_values` 2"):
        model(**inputs)
