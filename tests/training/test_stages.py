"""Exactly which tensors change in each stage, and where LoRA may go."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.arguments import LoraArguments
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


def pair(kind: str = "phi") -> JnanaForConditionalGeneration:
    torch.manual_seed(0)
    config = JnanaConfig.from_vision_text_configs(
        tiny_vision_config(), tiny_text_config(kind), image_token_id=300, vision_feature_layer=-1
    )
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
