"""IDEFICS checkpoints: logits, gradients and parameter counts are those of transformers' own class."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from jnana.modeling import JnanaForConditionalGeneration
from jnana.modeling.idefics_jnana import convert_state_dict, jnana_config_from_idefics
from tests.modeling.tiny_idefics import AROUND, END, IMAGE, save_tiny_idefics, tiny_config, tiny_idefics


SIZES = [(1,), (3,), (1, 2), (0, 3), (2, 1)]


def inputs_of(counts: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with so many images at random places, ids, pixel values `(rows, most, 3, 12, 12)` and IDEFICS's mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, AROUND, (len(counts), 24), generator=generator)
    for row, count in enumerate(counts):
        places = torch.randperm(22, generator=generator)[: count + 2] + 1
        ids[row, places[:count]] = IMAGE
        ids[row, places[count:]] = END
    most = max(*counts, 1)
    pixels = torch.randn(len(counts), most, 3, 12, 12, generator=generator)

    class Tokenizer:
        eos_token_id = END

        def convert_tokens_to_ids(self, token):
            return IMAGE

    mask, _ = image_attention_mask_for_packed_input_ids(ids, Tokenizer(), "pt")
    return ids, pixels, incremental_to_binary_attention_mask(mask, "pt", num_classes=most)


def flat(pixels: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([row[:count] for row, count in zip(pixels, counts, strict=True)])


@pytest.mark.parametrize("changes", [{}, {"alpha_type": "vector", "qk_layer_norms": False}], ids=["9b", "vector"])
def test_logits_and_gradients_equal_stock(tmp_path, changes):
    """Under one external loss: that of stock raises where tokens were added."""
    stock = save_tiny_idefics(tmp_path / "idefics", **changes)
    model = JnanaForConditionalGeneration.from_idefics_pretrained(str(tmp_path / "idefics"))
    assert model.config.image_token_id == IMAGE and model.generation_config.suppress_tokens == [IMAGE, AROUND]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock.parameters())
    for counts in SIZES:
        ids, pixels, mask = inputs_of(counts)
        stock.zero_grad(), model.zero_grad()
        expected = stock(ids, pixel_values=pixels, image_attention_mask=mask).logits
        actual = model(ids, pixel_values=flat(pixels, counts)).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        wrong = torch.ones_like(mask)  # negative control: every token attends to every image
        attending_all = stock(ids, pixel_values=pixels, image_attention_mask=wrong).logits
        assert (attending_all - expected).abs().max() > 1e-2
        targets = ids.roll(-1, 1)
        for logits in (expected, actual):
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        gradients = convert_state_dict({n: p.grad for n, p in stock.named_parameters() if p.grad is not None})
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        ours = {name.replace("vision_tower.vision_model.", "vision_tower."): g for name, g in ours.items()}
        assert ours.keys() == gradients.keys() and len(ours) > 60
        largest = max(gradient.abs().max() for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-5 * largest, rtol=1e-4, msg=name)


def test_text_without_images_needs_none(tmp_path):
    """Stock raises; here the blocks' attention is skipped. Equal to stock with an image that nothing attends to."""
    stock = save_tiny_idefics(tmp_path / "idefics")
    model = JnanaForConditionalGeneration.from_idefics_pretrained(str(tmp_path / "idefics"), image_token_id=IMAGE)
    ids, pixels, mask = inputs_of((0, 0))
    with pytest.raises(ValueError, match="Exactly 1 of pixel_values"):
        stock(ids)
    with torch.no_grad():
        expected = stock(ids, pixel_values=pixels, image_attention_mask=torch.zeros_like(mask)).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_generation_equals_stock(tmp_path):
    stock = save_tiny_idefics(tmp_path / "idefics")
    model = JnanaForConditionalGeneration.from_idefics_pretrained(str(tmp_path / "idefics"))
    ids, pixels, mask = inputs_of((2, 1))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = stock.generate(
        ids, pixel_values=pixels, image_attention_mask=mask, suppress_tokens=[IMAGE, AROUND], **options
    )
    assert torch.equal(model.generate(ids, pixel_values=flat(pixels, (2, 1)), **options), expected)
    others = model.generate(ids, pixel_values=flat(pixels, (2, 1)).flip(0), **options)
    assert not torch.equal(others, expected)  # negative control


def test_weights_move_without_being_copied():
    stock = tiny_idefics()
    theirs = {weight.data_ptr() for weight in stock.state_dict().values()}
    converted = convert_state_dict(stock.state_dict())
    config = jnana_config_from_idefics(stock.config, IMAGE)
    model = JnanaForConditionalGeneration.from_pretrained(None, config=config, state_dict=dict(converted))
    copied = {name for name, weight in model.state_dict().items() if weight.data_ptr() not in theirs}
    assert copied == {"model.language_model.embed_tokens.weight", "lm_head.weight"}  # two tables joined


def test_a_float16_checkpoint_loads_as_bfloat16_unless_asked(tmp_path):
    save_tiny_idefics(tmp_path / "idefics").half().save_pretrained(tmp_path / "idefics")

    def load(**kwargs):
        return JnanaForConditionalGeneration.from_idefics_pretrained(str(tmp_path / "idefics"), **kwargs).dtype

    assert load() == load(dtype="auto") == torch.bfloat16
    assert load(dtype=torch.float16) == torch.float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_resampler": False}, "`use_resampler` is False"),
        ({"dropout": 0.1}, "`dropout` is 0.1"),
        ({"cross_layer_interval": 3}, "`cross_layer_interval` is 3"),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        jnana_config_from_idefics(tiny_config(**changes), IMAGE)
    with pytest.raises(ValueError, match="`image_token_id` is 322"):
        jnana_config_from_idefics(tiny_config(), 322)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny_idefics(tmp_path / "idefics")
    weights = load_file(tmp_path / "idefics" / "model.safetensors")
    weights.pop("model.gated_cross_attn_layers.0.alpha_dense")
    save_file(weights, tmp_path / "idefics" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of IDEFICS .*alpha_dense"):
        JnanaForConditionalGeneration.from_idefics_pretrained(str(tmp_path / "idefics"))


@pytest.mark.parametrize(
    ("name", "count", "blocks", "added"),
    [("idefics-9b", 8_929_679_632, 8, 1_434_519_568), ("idefics-80b", 79_967_843_624, 20, 13_925_422_120)],
)
def test_full_size_models_have_as_many_parameters_as_stock(name, count, blocks, added):
    """On the meta device, both classes from the same config."""
    fixture = Path(__file__).parents[1] / "fixtures" / "configs" / f"HuggingFaceM4--{name}"
    config = IdeficsConfig.from_pretrained(fixture)
    with torch.device("meta"):
        stock = IdeficsForVisionText2Text(copy.deepcopy(config))
        model = JnanaForConditionalGeneration(jnana_config_from_idefics(config, 32001))
    theirs, ours = ({n: p.numel() for n, p in m.named_parameters()} for m in (stock, model))
    assert sum(ours.values()) == sum(theirs.values()) == count

    def total(sizes: dict[str, int], part: str) -> int:
        return sum(size for name, size in sizes.items() if f".{part}." in name)

    assert total(ours, "cross_attention") == total(theirs, "gated_cross_attn_layers") == added
    assert total(ours, "multi_modal_projector") == total(theirs, "perceiver_resampler") == 125_961_984
    assert len(model.model.cross_attention.layers) == blocks


def test_only_the_language_model_is_quantised(tmp_path):
    save_tiny_idefics(tmp_path / "idefics")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = JnanaForConditionalGeneration.from_idefics_pretrained(
        str(tmp_path / "idefics"), quantization_config=config
    )
    parts = {name.split(".")[1] for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert parts == {"language_model"}
