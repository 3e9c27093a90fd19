"""The forecast of a run's memory: logged before weights are read, refused or warned of, and close to what is measured
(the latter in tests/benchmarks/test_memory_forecast.py)."""

import logging
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.options.arguments import LoraArguments
from jnana.training.profiling import forecast as module
from jnana.training.profiling.forecast import Forecast, check_forecast, judge, make_optimizer
from jnana.training.profiling.memory_trace import StepMemory, TracedEightBitAdamW
from jnana.training.stages import apply_stage
from tests.tiny import tiny_text_config, tiny_vision_config


STEP = {"gradients": 20, "optimizer": 40, "activations": 300, "logits and loss": 40}
FOUND = Forecast({"weights float32": 600}, StepMemory(STEP, "forward and backward pass"), (1, 64))
IDS = torch.arange(32)[None]


@pytest.fixture
def forecast_everything(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 0)


def arguments(folder, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **changes)


def check(args: TrainingArguments, make_batch=lambda: {"input_ids": IDS, "labels": IDS}) -> Forecast | None:
    def make_model():
        return apply_stage(AutoModelForCausalLM.from_config(tiny_text_config()), "pretrain")

    return check_forecast(make_model, make_batch, partial(make_optimizer, args, "stock", None), args)


def test_parts_add_up_and_the_random_state_stays(forecast_everything, tmp_path, caplog):
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, "jnana.training.profiling.forecast"):
        found = check(arguments(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert found.weights["weights float32"] == pytest.approx(size, rel=0.01)  # and the rotary frequencies
    assert found.step.parts["optimizer"] == pytest.approx(2 * size, rel=0.01)
    assert found.total == found.weights_total + sum(found.step.parts.values())
    assert "memory forecast, 1 row(s) of 32 tokens, peak in the" in caplog.text and "which fits" in caplog.text


def test_8_bit_states_are_those_of_bitsandbytes(tmp_path):
    """A state of one byte for each value, and float32 in embeddings and small weights."""
    config = JnanaConfig.from_vision_text_configs(tiny_vision_config(), tiny_text_config("phi", hidden_size=128))
    model = apply_stage(JnanaForConditionalGeneration(config), "sft", LoraArguments())
    args = arguments(tmp_path, optim="adamw_bnb_8bit")
    optimizer = make_optimizer(args, "stock", None, model)
    assert isinstance(optimizer, TracedEightBitAdamW)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    embedding = model.get_input_embeddings().weight
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    assert optimizer.state[model.lm_head.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.lm_head.bias]["state1"].dtype == torch.float32


def test_weights_that_cannot_fit_are_refused(forecast_everything, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "device_memory", lambda device: ("Tiny GPU", 1000))
    never = partial(pytest.fail, "a batch was read for a model that does not fit")
    with pytest.raises(
        ValueError, match="the weights alone need .* kB, but Tiny GPU has 1.0 kB; hold them in 16 bits"
    ):
        check(arguments(tmp_path), never)


def test_a_peak_that_does_not_fit_is_warned_of(tmp_path, caplog):
    args = arguments(tmp_path)
    with caplog.at_level(logging.INFO, "jnana.training.profiling.forecast"):
        judge(FOUND, "Tiny GPU", 999, args)
    assert "memory: Tiny GPU has 999 bytes, which is less than the forecast 1.0 kB" in caplog.text
    assert "gradient_checkpointing: true; a smaller per_device_train_batch_size" in caplog.text
    assert "adamw_bnb_8bit" not in caplog.text  # the optimizer's part is small here
    caplog.clear()
    with caplog.at_level(logging.INFO, "jnana.training.profiling.forecast"):
        judge(FOUND, "Tiny GPU", 1000, args)  # the control
    assert "which fits" in caplog.text and "less" not in caplog.text


def test_several_processes(forecast_everything, tmp_path, monkeypatch):
    """DDP keeps another copy of the gradients; FSDP divides all but activations and logits; ZeRO-2 is not forecast."""
    args = arguments(tmp_path)
    alone = check(args)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    ddp = check(args)
    assert ddp.total - alone.total == ddp.step.parts["DDP's buckets"] == alone.step.parts["gradients"]
    monkeypatch.setattr(module, "sharding_of", lambda args: "fsdp")
    sharded = check(args)
    assert sharded.weights_total == pytest.approx(alone.weights_total / 2, rel=0.01)
    assert sharded.step.parts["activations"] == alone.step.parts["activations"]
    monkeypatch.setattr(module, "sharding_of", lambda args: "zero2")
    assert check(args) is None


def test_what_cannot_be_traced_still_trains(forecast_everything, tmp_path, caplog):
    def values_needed() -> dict:
        return {"input_ids": IDS, "labels": IDS, "unknown_argument": torch.ones(2, 2)[0], "position_ids": "wrong"}

    assert check(arguments(tmp_path), values_needed) is None
    assert "no forecast of memory: a step of this model can't be traced" in caplog.text


def test_small_models_are_not_forecast(tmp_path):
    assert check(arguments(tmp_path)) is None
