"""A language model in 4 or 8 bits: the quantised layers, their dtypes, and the configurations that raise an error."""

import pytest
import torch
from peft import prepare_model_for_kbit_training

from jnana.modeling import quantization_config
from jnana.processing import JnanaProcessor
from jnana.training.adapters import base_reference, quantization_settings
from jnana.training.loading import load_model
from jnana.training.model_setup import build_pair
from jnana.training.options.arguments import LoraArguments, ModelArguments
from jnana.training.options.computation_checks import check_quantization
from jnana.training.options.model_checks import check_lora
from jnana.training.stages import apply_stage, count_parameters, part_of
from tests.tiny import save_tiny_text, save_tiny_vision


NF4 = {"quantization": "nf4", "double_quantization": True, "storage_dtype": "uint8", "compute_dtype": "bfloat16"}
LORA = LoraArguments(lora_r=2)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return str(save_tiny_vision(folder / "clip")), str(save_tiny_text(folder / "phi"))


@pytest.fixture(scope="module")
def pair(backbones, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pair")
    processor = JnanaProcessor.from_vision_text_pretrained(*backbones)
    build_pair(*backbones, processor, vision_feature_layer=-1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def dtypes_by_part(model) -> dict[str, set]:
    """What the parameters of each part are held in; the quantised matrices apart."""
    dtypes: dict[str, set] = {}
    for name, parameter in model.named_parameters():
        packed = type(parameter).__name__ in ("Params4bit", "Int8Params")
        trains = "trains" if parameter.requires_grad else "packed" if packed else part_of(name)
        dtypes.setdefault(trains, set()).add(parameter.dtype)
    return dtypes


EXPECTED = {
    "vision_tower": {torch.bfloat16},
    "multi_modal_projector": {torch.float32},  # PEFT's untouched copy of what trains
    "language_model": {torch.bfloat16},  # embeddings, biases, norms
    "lm_head": {torch.bfloat16},
    "trains": {torch.float32},
}


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_only_the_language_models_matrices_are_quantised_and_nothing_grows(pair, method):
    model, _ = load_model(pair, quantization=method, dtype="bfloat16")
    packed = {n for n, p in model.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")}
    assert len(packed) == 2 * 6 and all(name.startswith("model.language_model.layers.") for name in packed)
    model.model.multi_modal_projector.float()
    model = apply_stage(model, "sft", LORA)
    assert dtypes_by_part(model) == EXPECTED | {"packed": {torch.uint8 if method == "nf4" else torch.int8}}


def test_pefts_own_preparation_would_have_grown_it(pair):
    """The control: what `prepare_model_for_kbit_training` does to tower, embeddings and head."""
    model, _ = load_model(pair, quantization="nf4", dtype="bfloat16")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert dtypes_by_part(model)["vision_tower"] == dtypes_by_part(model)["lm_head"] == {torch.float32}


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_pair_joined_on_the_spot_holds_the_same_bits(backbones, pair, method):
    saved, processor = load_model(pair, quantization=method, dtype="bfloat16")
    settings = {**NF4, "quantization": method}
    joined = build_pair(
        *backbones,
        processor,
        vision_feature_layer=-1,
        dtype="bfloat16",
        quantization_config=quantization_config(settings, "bfloat16"),
    )
    assert joined.is_quantized and joined.hf_quantizer is not None
    assert joined.config.quantization_config.llm_int8_skip_modules[-1] == "lm_head"
    assert not hasattr(joined.config.text_config, "quantization_config")
    ours, theirs = joined.dequantize().state_dict(), saved.dequantize().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert part_of(name) == "multi_modal_projector" or torch.equal(ours[name], tensor), name
    original = load_model(pair, dtype="bfloat16")[0].state_dict()
    name = "model.language_model.layers.0.mlp.fc1.weight"
    assert not torch.equal(original[name], ours[name])  # the control: quantising did lose something


def test_counts_are_those_of_the_whole_model(pair):
    """4-bit weights are packed two a byte; the table must count weights, not bytes."""
    whole = count_parameters(load_model(pair)[0])
    packed, _ = load_model(pair, quantization="nf4")
    assert {part: count.total for part, count in count_parameters(packed).items()} == {
        part: count.total for part, count in whole.items()
    }
    assert sum(p.numel() for p in packed.parameters()) < sum(count.total for count in whole.values())


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr("jnana.training.options.computation_checks.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="quantization is 'nf4', which needs bitsandbytes, .*`pip install bitsandbyt"):
        check_quantization(NF4, torch.device("cpu"))
    check_quantization({"quantization": "none"}, torch.device("cpu"))  # the control
    monkeypatch.setattr("jnana.modeling.loading_jnana.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="quantization is 'int8', which needs bitsandbytes"):
        quantization_config({"quantization": "int8"})


def test_on_a_device_that_bitsandbytes_does_not_know():
    check_quantization(NF4, torch.device("cpu"))  # the control
    with pytest.raises(ValueError, match="this run is on 'vulkan'; set `quantization: none`"):
        check_quantization(NF4, torch.device("vulkan"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"quantization": "nf4"}, "quantization is 'nf4' but lora_r is 0, so there is no adapter; set lora_r"),
        ({"lora_vision_target_modules": ["q_proj"]}, "lora_vision_target_modules is .* but lora_r is 0"),
        ({"merge_adapter": True}, "merge_adapter is true but lora_r is 0"),
    ],
)
def test_no_adapter_to_train(lora, message):
    with pytest.raises(ValueError, match=message):
        check_lora(LoraArguments(**lora), None)


def test_what_is_written_down(pair):
    lora = LoraArguments(lora_r=2, quantization="nf4", double_quantization=False, base_model_id="me/base")
    reference = base_reference(ModelArguments(model_name_or_path=pair, dtype="bfloat16"), lora)
    assert reference["quantization"] == {**NF4, "double_quantization": False}
    assert (reference["dtype"], reference["base_model_id"]) == ("bfloat16", "me/base")
    plain = quantization_settings(LoraArguments(lora_r=2), ModelArguments(model_name_or_path=pair))
    assert plain == {"quantization": "none"}


def test_a_vision_adapter_only_where_it_is_asked_for_and_can_learn(pair):
    """The last layer of a tower read at its second last hidden state never gets a gradient."""
    model, _ = load_model(pair)
    model.config.vision_feature_layer = -2
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj", "fc2"])
    model = apply_stage(model, "sft", lora)
    adapted = {
        n.split(".lora_")[0].removeprefix("base_model.model.model.") for n in model.state_dict() if "lora_" in n
    }
    layers = [f"vision_tower.encoder.layers.{layer}" for layer in (0, 1)]
    expected = {f"{layer}.{name}" for layer in layers for name in ("self_attn.q_proj", "mlp.fc2")}
    assert {name for name in adapted if "vision_tower" in name} == expected
    ids = torch.tensor([[300] * 4 + list(range(5, 15))])
    model.config.image_token_id = 300
    model.train()(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 24, 24)).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n and p.grad is None]
    assert without == []
    with pytest.raises(
        ValueError, match=r"lora_vision_target_modules: \['dense'\] match no linear layer of the vision"
    ):
        apply_stage(load_model(pair)[0], "sft", LoraArguments(2, lora_vision_target_modules=["dense"]))
