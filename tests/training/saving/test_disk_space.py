"""The estimated size of a checkpoint is its size; a run without space for its weights is refused before it trains."""

import logging
import shutil

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.optimizers import trainer_optimizer
from jnana.training.options.arguments import LoraArguments
from jnana.training.saving.checkpoints import check_disk_space, checkpoint_size, merged_size, weights_size
from jnana.training.stages import apply_stage
from tests.tiny import tiny_text_config, tiny_vision_config


def trainer_of(folder, model: nn.Module, optimizer: str = "stock", **changes) -> Trainer:
    changes = {"save_total_limit": 2, "report_to": "none", "use_cpu": True, **changes}
    args = TrainingArguments(output_dir=str(folder), **changes)
    return Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(optimizer, model, args))


def model_of(kind: str) -> nn.Module:
    config = JnanaConfig.from_vision_text_configs(tiny_vision_config(), tiny_text_config("phi", hidden_size=128))
    model = JnanaForConditionalGeneration(config)
    return apply_stage(
        model, "sft", LoraArguments(lora_r=0 if kind == "whole" else 32)
    )  # bitsandbytes keeps 32 bits of small matrices


def take_a_step(trainer: Trainer) -> None:
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "optim"),
    [
        ("stock", "adamw_torch"),
        ("stock", "sgd"),
        ("stock", "rmsprop"),
        ("stock", "adagrad"),
        ("stock", "adafactor"),
        ("stock", "lion_32bit"),
        ("stock", "adamw_bnb_8bit"),
        ("muon", "adamw_torch"),
    ],
)
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_no_optimizer_keeps_more_than_adamw(kind, optimizer, optim, tmp_path):
    """The estimate is an upper bound, and it is AdamW's size."""
    trainer = trainer_of(tmp_path, model_of(kind), optimizer, optim=optim)
    estimated = checkpoint_size(trainer) - weights_size(trainer)
    take_a_step(trainer)
    leaves = tree_leaves(trainer.optimizer.state_dict()["state"])
    kept = sum(leaf.nbytes for leaf in leaves if torch.is_tensor(leaf))
    steps = 4 * sum(p.requires_grad for p in trainer.model.parameters())  # AdamW counts the steps of each tensor
    assert kept <= estimated + steps
    if (optimizer, optim) == ("stock", "adamw_torch"):
        assert kept == estimated + steps


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_estimate_is_the_size_on_disk(kind, tmp_path):
    trainer = trainer_of(tmp_path, model_of(kind))
    take_a_step(trainer)
    trainer.save_model()
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.stat().st_size == pytest.approx(weights_size(trainer), rel=0.1)
    written = weights.stat().st_size + (tmp_path / "optimizer.pt").stat().st_size
    assert written == pytest.approx(checkpoint_size(trainer), rel=0.2)


def test_sharded_adapters_hold_what_trains(tmp_path):
    """FSDP and DeepSpeed leave an adapter's frozen base out."""
    trainer = trainer_of(tmp_path, model_of("adapter"))
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert weights_size(trainer) == trained < sum(p.nbytes for p in trainer.model.parameters()) / 2


def test_partitioned_weights_count_whole(tmp_path):
    trainer = trainer_of(tmp_path, nn.Linear(100, 100))
    for parameter in trainer.model.parameters():  # as ZeRO-3 leaves them
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    trainer.is_deepspeed_enabled = True
    assert (weights_size(trainer), checkpoint_size(trainer)) == (10_100 * 2, 10_100 * (2 + 8))


@pytest.fixture
def free(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size))


def test_raises_or_warns(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "jnana.training.saving.checkpoints")
    trainer = trainer_of(tmp_path, model_of("whole"))
    weights = weights_size(trainer)
    checkpoint = checkpoint_size(trainer)
    assert checkpoint > 2 * weights
    free(weights - 1)
    with pytest.raises(
        ValueError,
        match=r"output_dir .* MB free, but needs .* for the weights of one checkpoint; make room",
    ):
        check_disk_space(trainer)
    free(weights)  # what an optimizer keeps is not known for sure: no error
    check_disk_space(trainer)
    check_disk_space(trainer_of(tmp_path, trainer.model, save_strategy="no"))
    check_disk_space(trainer_of(tmp_path, trainer.model, save_only_model=True))
    caplog.clear()
    free(3 * checkpoint + weights - 1)
    check_disk_space(trainer)
    assert "save_total_limit 2, one more while it is written, and the final weights" in caplog.text
    caplog.clear()
    free(3 * checkpoint + weights)
    check_disk_space(trainer)
    assert not caplog.records


def test_broken_checkpoints_are_overwritten(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "jnana.training.saving.checkpoints")
    trainer = trainer_of(tmp_path, model_of("whole"))
    weights = weights_size(trainer)
    broken = tmp_path / "checkpoint-4"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(bytes(1_200_000))
    free(weights - 1_200_001)
    with pytest.raises(ValueError, match=r"and 1.2 MB in broken .* that may be deleted \(checkpoint-4\), but needs"):
        check_disk_space(trainer)
    free(weights - 1_200_000)
    check_disk_space(trainer)
    assert "and 1.2 MB in broken checkpoints" in caplog.text
    weights_only = trainer_of(tmp_path, trainer.model, save_only_model=True)
    free(weights_size(trainer) - 1)  # these hold no optimizer, and are what the user wants
    with pytest.raises(ValueError, match=r"free, but needs at least .* for the weights of one checkpoint"):
        check_disk_space(weights_only)


def test_final_weights_are_overwritten(tmp_path, free):
    trainer = trainer_of(tmp_path, model_of("whole"), save_strategy="no")
    free(10)
    with pytest.raises(ValueError, match=r"10 bytes free, but needs at least .* for the final weights"):
        check_disk_space(trainer)
    trainer.save_model()
    check_disk_space(trainer)


def test_the_merged_model_counts_in_the_warning(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "jnana.training.saving.checkpoints")
    trainer = trainer_of(tmp_path, model_of("adapter"))
    merged = trainer.model.merge_and_unload()
    whole = sum(p.nbytes for p in merged.parameters())
    trainer = trainer_of(tmp_path, model_of("adapter"))
    assert whole <= merged_size(trainer.model) <= whole + 2 * weights_size(trainer)
    free(weights_size(trainer) + 3 * checkpoint_size(trainer) + merged_size(trainer.model) - 1)
    check_disk_space(trainer)
    assert not caplog.records
    check_disk_space(trainer, merge=True)
    assert "the final weights, and" in caplog.text and "for the merged model)" in caplog.text
