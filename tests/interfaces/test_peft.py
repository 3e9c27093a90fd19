"""PEFT beyond LoRA: ours trains, is saved and loaded as a stock LLaVA of the same weights is."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter


TARGETS = r".*language_model.*\.(q_proj|v_proj)"
# The language model's layers alone, so that both sides draw the same random numbers.
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "DoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rsLoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA with modules_to_save": lambda: LoraConfig(
        r=4, target_modules=TARGETS, modules_to_save=["multi_modal_projector"]
    ),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: LoKrConfig(r=4, target_modules=TARGETS),
    "VeRA": lambda: VeraConfig(r=4, target_modules=r".*language_model.*\.q_proj"),
    "IA3": lambda: IA3Config(
        target_modules=r".*language_model.*\.(v_proj|down_proj)",
        feedforward_modules=r".*language_model.*\.down_proj",
    ),
}


def batch(side) -> dict[str, torch.Tensor]:
    inputs = side.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


def train(side, model, optimizer=None) -> list[float]:
    """The losses of four steps."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch(side)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(side, config: PeftConfig) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(side.model), config).eval()


def logits(side, model) -> torch.Tensor:
    with torch.no_grad():
        return model(**side.inputs()).logits


@pytest.mark.client("PEFT: DoRA, rsLoRA, LoHa, LoKr, VeRA, IA3, modules_to_save", note="losses equal stock LLaVA's")
@pytest.mark.parametrize("name", CONFIGS)
def test_trained_saved_loaded_and_merged(stock, ours, name, tmp_path):
    losses = {}
    for side in (stock, ours):
        kind = type(side.model).__name__
        model = adapted(side, CONFIGS[name]())
        losses[kind] = train(side, model)
        model.save_pretrained(tmp_path / kind)
        loaded = PeftModel.from_pretrained(copy.deepcopy(side.model), tmp_path / kind).eval()
        expected = logits(side, model)
        torch.testing.assert_close(logits(side, loaded), expected)
        assert not torch.allclose(expected, logits(side, side.model), atol=1e-3)  # the control: it has learnt
        torch.testing.assert_close(logits(side, loaded.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
    first, second = losses.values()
    assert first == pytest.approx(second, rel=1e-4)
    assert second[-1] < second[0]


@pytest.mark.client("PEFT: LoRA+", note="create_loraplus_optimizer")
def test_lora_plus(stock, ours):
    losses = []
    for side in (stock, ours):
        model = adapted(side, LoraConfig(r=4, target_modules=TARGETS))
        settings = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
        losses.append(train(side, model, create_loraplus_optimizer(model, **settings)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < losses[1][0]


def two_adapters(side) -> PeftModel:
    """One model with two adapters, each trained."""
    model = adapted(side, LoraConfig(r=4, target_modules=TARGETS))
    train(side, model)
    model.add_adapter("second", LoraConfig(r=4, target_modules=TARGETS))
    model.set_adapter("second")
    train(side, model)
    return model


@pytest.mark.client("PEFT: several adapters, add_weighted_adapter", note="")
def test_several_adapters(stock, ours):
    found = []
    for side in (stock, ours):
        model = two_adapters(side)
        by_name = []
        for name in ("default", "second"):
            model.set_adapter(name)
            by_name.append(logits(side, model))
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", combination_type="linear")
        model.set_adapter("mixed")
        by_name.append(logits(side, model))
        with model.disable_adapter():
            torch.testing.assert_close(logits(side, model), logits(side, side.model))
        found.append(by_name)
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found[1][0], found[1][1], atol=1e-3)  # the control: three different models
    assert not torch.allclose(found[1][2], found[1][1], atol=1e-3)


@pytest.mark.client("PEFT: hotswap_adapter", note="")
def test_an_adapter_is_swapped_in_place(stock, ours, tmp_path):
    for side in (stock, ours):
        model = two_adapters(side)
        folder = tmp_path / type(side.model).__name__
        model.save_pretrained(folder)
        served = PeftModel.from_pretrained(copy.deepcopy(side.model), folder).eval()
        model.set_adapter("second")
        expected = logits(side, model)
        assert not torch.allclose(logits(side, served), expected, atol=1e-3)
        hotswap_adapter(served, str(folder / "second"), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(logits(side, served), expected)


PROMPTS: dict[str, Callable[[], PeftConfig]] = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.client("PEFT: prompt tuning, prefix tuning", note="")
@pytest.mark.parametrize("name", PROMPTS)
def test_learnt_prompts(stock, ours, name, tmp_path):
    losses = []
    for side in (stock, ours):
        model = adapted(side, PROMPTS[name]())
        losses.append(train(side, model))
        folder = tmp_path / type(side.model).__name__
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(side.model), folder).eval()
        torch.testing.assert_close(logits(side, loaded), logits(side, model))
        other = side.inputs() | {"pixel_values": -side.inputs()["pixel_values"]}
        with torch.no_grad():  # the control: behind the learnt prompt the image is still seen
            assert not torch.allclose(loaded(**other).logits, logits(side, loaded), atol=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][-1] < losses[1][0]
