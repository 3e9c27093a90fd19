"""Exactly which tensors change in each stage, and where LoRA may go."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.options.arguments import LoraArguments
from jnana.training.stages import (
    STAGES,
    active_dropout,
    apply_stage,
    count_parameters,
    describe_parameters,
    part_of,
    resolve_targets,
)
from tests.tiny import tiny_text_config, tiny_vision_config


LORA = LoraArguments(lora_r=2, lora_target_modules=["q_proj", "fc1"])


def pair(kind: str = "phi", vision: str = "clip", layer: int = -1, **fields) -> JnanaForConditionalGeneration:
    torch.manual_seed(0)
    fields |= {"image_token_id": 300, "vision_feature_layer": layer}
    config = JnanaConfig.from_vision_text_configs(tiny_vision_config(vision), tiny_text_config(kind), **fields)
    return JnanaForConditionalGeneration(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 1:5] = 300
    labels = ids.clone()
    labels[:, :6] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 24, 24)}


def changed_by_training(model, inputs) -> set[str]:
    """Names of the tensors (parameters and buffers) that two steps with a huge rate and weight decay change."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(2):  # LoRA's A gets no gradient before B has left zero
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def names_of(model, *parts: str) -> set[str]:
    return {name for name in model.state_dict() if part_of(name) in parts}


def test_align_changes_the_projector_and_nothing_else():
    model = apply_stage(pair(), "align")
    assert changed_by_training(model, batch()) == names_of(model, "multi_modal_projector")


@pytest.mark.parametrize("kind", ["phi", "phi3", "gpt_neox", "qwen2"])
def test_full_sft_changes_all_but_the_tower(kind):
    model = apply_stage(pair(kind), "sft")
    expected = names_of(model, "multi_modal_projector", "language_model", "lm_head")
    # softmax ignores what is added to every key alike, so the gradient of a key bias is rounding noise or nothing
    optional = {name for name in expected if name.endswith("k_proj.bias")}
    changed = changed_by_training(model, batch())
    assert changed - optional == expected - optional and changed <= expected


def test_lora_sft_changes_adapter_and_projector():
    model = apply_stage(pair(), "sft", LORA)
    changed = changed_by_training(model, batch())
    expected = {name for name in model.state_dict() if "lora_" in name or "modules_to_save.default" in name}
    assert changed == expected
    adapted = {name.split(".lora_")[0] for name in changed if "lora_" in name}
    prefix = "base_model.model.model.language_model.layers"
    names = ("self_attn.q_proj", "mlp.fc1")
    assert adapted == {f"{prefix}.{layer}.{name}" for layer in (0, 1) for name in names}


def test_a_bare_suffix_would_have_adapted_the_tower():
    """The control: CLIP has q_proj and fc1 too, so PEFT's own matching by suffix reaches into the frozen tower."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pair(), LoraConfig(r=2, target_modules=LORA.lora_target_modules, task_type="CAUSAL_LM"))
    assert any("vision_tower" in name for name, _ in model.named_parameters() if "lora_" in name)


# Softmax ignores what is added to every key alike, so the gradient of a key bias is rounding noise or nothing.
NO_GRADIENT = ("k_proj.bias", "key.bias")


def used_in_tower(model, unused: tuple[str, ...]) -> set[str]:
    """The tower's parameters that must change when it trains whole."""
    names = {name for name, _ in model.named_parameters() if part_of(name) == "vision_tower"}
    return {name for name in names if "original_module" not in name and not any(part in name for part in unused)}


@pytest.mark.parametrize(
    ("vision", "layer", "unused"),
    [
        ("clip", -1, ("post_layernorm",)),
        ("clip", -2, ("post_layernorm", "layers.2.")),  # as LLaVA; the last of three layers
        ("siglip", -2, ("post_layernorm", "layers.2.", ".head.")),
        ("dinov2", -1, ("mask_token", ".layernorm.")),
    ],
)
@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_tower_that_trains_changes_where_its_features_depend_on_it(vision, layer, unused, lora):
    model = apply_stage(pair(vision=vision, layer=layer), "sft", lora, freeze_vision_tower=False)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    tower = used_in_tower(model, unused)
    held = ".modules_to_save.default." if lora else ".vision_tower."
    assert tower and all(held in name for name in tower) and not tower & frozen
    changed = {name for name in changed_by_training(model, batch()) if part_of(name) == "vision_tower"}
    optional = {name for name in tower if name.endswith(NO_GRADIENT)}
    assert changed - optional == tower - optional and changed <= tower
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in frozen)


def test_align_with_the_tower_changes_projector_and_tower():
    model = apply_stage(pair(layer=-2), "align", freeze_vision_tower=False)
    tower = used_in_tower(model, ("post_layernorm", "layers.2."))
    changed = changed_by_training(model, batch())
    optional = {name for name in tower if name.endswith(NO_GRADIENT)}
    assert changed - optional == (tower | names_of(model, "multi_modal_projector")) - optional


def test_lora_on_tower_and_language_model_changes_both_adapters_and_the_projector():
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj", "fc1"])
    model = apply_stage(pair(layer=-2), "sft", lora)
    changed = changed_by_training(model, batch())
    assert changed == {name for name in model.state_dict() if "lora_" in name or "modules_to_save.default" in name}
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in changed if "lora_" in name}
    layers = "vision_tower.encoder.layers.{}.{}"
    tower = {layers.format(layer, name) for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.fc1")}
    assert adapted == tower | {f"language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_pretrain_changes_everything():
    torch.manual_seed(0)
    model = apply_stage(AutoModelForCausalLM.from_config(tiny_text_config()), "pretrain")
    inputs = batch()
    del inputs["pixel_values"]
    changed = changed_by_training(model, inputs)
    assert {name for name in set(model.state_dict()) - changed if not name.endswith("k_proj.bias")} == set()


def test_targets_that_match_nothing():
    with pytest.raises(ValueError, match=r"\['qkv_proj'\] match no linear layer .* \['dense', 'fc1', 'fc2', 'k_proj'"):
        apply_stage(pair(), "sft", LoraArguments(lora_r=2, lora_target_modules=["q_proj", "qkv_proj"]))


def test_all_linear_means_the_language_models():
    targets = resolve_targets(pair(), ["all-linear"])
    assert len(targets) == 2 * 6
    assert all(name.startswith("model.language_model.") for name in targets)


def test_what_trains_is_float32():
    model = apply_stage(pair().to(torch.bfloat16), "align")
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    adapted = apply_stage(pair().to(torch.bfloat16), "sft", LORA)
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_a_tower_that_trains_is_float32(lora):
    """All of it: without autocast its unused last layer would else get float32 inputs for its bfloat16 weights."""
    model = apply_stage(pair(layer=-2).to(torch.bfloat16), "sft", lora, freeze_vision_tower=False)
    held = {name: p.dtype for name, p in model.named_parameters() if "original_module" not in name}
    assert {dtype for name, dtype in held.items() if part_of(name) == "vision_tower"} == {torch.float32}
    frozen = {dtype for name, dtype in held.items() if part_of(name) == "lm_head"}
    assert frozen == ({torch.bfloat16} if lora else {torch.float32})
    model(**batch()).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch()).loss.backward()


def test_the_table_names_dtypes():
    model = apply_stage(pair(layer=-2).to(torch.bfloat16), "sft", LORA, freeze_vision_tower=False)
    lines = {line.split()[0]: line.split()[1:] for line in describe_parameters(model, "sft").splitlines()[2:-1]}
    counts = count_parameters(model)
    tower = counts["vision_tower"]
    assert lines["vision_tower"] == [
        f"{tower.trainable:,}",
        "float32",
        f"{tower.total - tower.trainable:,}",
        "float32",
    ]
    assert lines["multi_modal_projector"] == [f"{counts['multi_modal_projector'].total:,}", "float32", "0"]
    assert lines["language_model"][1::2] == ["float32", "bfloat16"]
    assert lines["lm_head"] == ["0", f"{counts['lm_head'].total:,}", "bfloat16"]
    model.get_base_model().lm_head.half()  # the control
    assert "float16" in describe_parameters(model, "sft").replace("bfloat16", "")


def test_adapter_config_names_no_temporary_module():
    config = apply_stage(pair(), "sft", LORA).peft_config["default"]
    assert config.task_type == "CAUSAL_LM" and config.auto_mapping is None


def test_counts_and_the_printed_table():
    model = apply_stage(pair("qwen2"), "align")
    counts = count_parameters(model)
    assert sum(count.total for count in counts.values()) == sum(p.numel() for p in model.parameters())
    assert {part: count.trainable > 0 for part, count in counts.items()} == {
        part: STAGES["align"][part] for part in counts
    }
    table = describe_parameters(model, "align")
    assert f"{counts['multi_modal_projector'].trainable:,}" in table and "vision_tower" in table


def test_the_untrained_copy_of_the_projector_does_not_count():
    bare, adapted = pair(), apply_stage(pair(), "sft", LORA)
    assert (
        count_parameters(adapted)["multi_modal_projector"].total
        == count_parameters(bare)["multi_modal_projector"].total
    )


def test_unknown_stage():
    with pytest.raises(ValueError, match="stage 'finetune' is unknown; it must be one of"):
        apply_stage(copy.deepcopy(pair()), "finetune")


@pytest.mark.parametrize("dropout", [None, 0.05])
def test_lora_and_its_dropout_are_logged_once(dropout, caplog):
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_dropout=dropout)
    with caplog.at_level(logging.INFO, "jnana.training.stages"):
        model = apply_stage(pair(), "sft", lora)
    (line,) = [record.message for record in caplog.records if "dropout" in record.message]
    assert line.startswith(f"LoRA of rank 2, alpha 4, dropout {dropout or 0}")
    assert ("packed and separate rows" in line) == (dropout is not None)
    caplog.clear()
    with caplog.at_level(logging.INFO, "jnana.training.stages"):
        apply_stage(model, "sft")  # a further round on the same adapter
    assert line in caplog.text


def test_dropout_of_what_trains_is_stated_and_packing_warned_about(caplog):
    """Phi-2's config has `resid_pdrop` 0.1. A frozen language model, also under LoRA, has none in training."""
    model = pair()
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    with caplog.at_level("INFO"):
        apply_stage(copy.deepcopy(model), "align", packing="shared_image")
        apply_stage(copy.deepcopy(model), "sft", LORA, packing="shared_image")
    assert "dropout is on" not in caplog.text and "dropout: " not in caplog.text
    full = apply_stage(copy.deepcopy(model), "sft", packing="shared_image")
    assert "packing is 'shared_image', and dropout is on in trained parts (language_model 0.1)" in caplog.text
    assert active_dropout(full) == {"language_model": 0.1}
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj", "fc1"], lora_dropout=0.05)
    adapted = apply_stage(copy.deepcopy(model), "sft", lora, packing="shared_image")
    assert "trained parts (lora 0.05)" in caplog.text and active_dropout(adapted) == {"lora": 0.05}
