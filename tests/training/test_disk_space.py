"""What a checkpoint is said to take is what it takes; a run without room for one is refused before it trains."""

import logging
import shutil

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from modeling import JnanaConfig, JnanaForConditionalGeneration
from tests.tiny import tiny_text_config, tiny_vision_config
from training.arguments import LoraArguments
from training.disk_space import check_disk_space, resuming_size, weights_size
from training.optimizers import trainer_optimizer
from training.stages import apply_stage


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
def test_it_is_what_a_step_leaves(kind, optimizer, optim, tmp_path):
    trainer = trainer_of(tmp_path, model_of(kind), optimizer, optim=optim)
    said = resuming_size(trainer)
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    leaves = tree_leaves(trainer.optimizer.state_dict()["state"])
    kept = sum(leaf.nbytes for leaf in leaves if torch.is_tensor(leaf))
    weights = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert kept == pytest.approx(said, abs=weights / 5)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_it_is_what_lies_on_the_disk(kind, tmp_path):
    trainer = trainer_of(tmp_path, model_of(kind))
    trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.save_model()
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    (weights,) = tmp_path.glob("*.safetensors")
    assert weights.stat().st_size == pytest.approx(weights_size(trainer), rel=0.1)
    assert (tmp_path / "optimizer.pt").stat().st_size == pytest.approx(resuming_size(trainer), rel=0.25)


def test_refused_and_warned(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "training.disk_space")
    usage = shutil.disk_usage(tmp_path)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=size))

    trainer = trainer_of(tmp_path, model_of("whole"))
    weights = weights_size(trainer)
    checkpoint = weights + resuming_size(trainer)
    assert checkpoint > 2 * weights
    free(checkpoint - 1)
    with pytest.raises(ValueError, match=r"output_dir .* MB free, but one checkpoint takes about .* make room"):
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
