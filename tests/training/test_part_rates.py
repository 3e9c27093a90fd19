"""Rates and schedules of parts: who is in which group, that the stock groups are the Trainer's, and a real run."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from jnana.training.arguments import LoraArguments, RateArguments
from jnana.training.optimizers import PartScheduleCallback, check_rates, split_by_part, stock_groups, trainer_optimizer
from jnana.training.stages import apply_stage, part_of
from tests.training.test_stages import LORA, batch, pair


RATES = RateArguments(projector_learning_rate=2e-3, projector_lr_scheduler_type="cosine")


def arguments(folder, **changes) -> TrainingArguments:
    values = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "linear"}
    values |= {"report_to": "none", "use_cpu": True, "logging_steps": 1, "remove_unused_columns": False}
    return TrainingArguments(output_dir=folder, **{**values, **changes})


def rows(count: int = 16) -> list[dict]:
    inputs = batch()
    return [{"input_ids": inputs["input_ids"][0], "labels": inputs["labels"][0]} for _ in range(count)]


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    stacked = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    images = torch.randn(len(examples), 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return {**stacked, "pixel_values": images}


def train(folder, rates: RateArguments | None, resume: str | None = None, **changes) -> Trainer:
    model, args = apply_stage(pair(), "sft", LORA), arguments(folder, **changes)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(),
        data_collator=collate,
        callbacks=[PartScheduleCallback(rates)] if rates else [],
        optimizer_cls_and_kwargs=trainer_optimizer("stock", model, args, rates),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_parameter_is_in_the_group_of_its_part():
    model = apply_stage(pair(), "sft", LORA)
    groups = split_by_part(stock_groups(model, 0.1), model, RATES, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(seen) == len(set(seen)) and set(seen) == set(names)
    for group in groups:
        assert {part_of(names[id(parameter)]) for parameter in group["params"]} == {group["part"]}
        assert group["lr"] == (2e-3 if group["part"] == "multi_modal_projector" else 1e-3)
    assert groups[0]["part"] == "language_model"  # the one whose rate the Trainer logs


def test_decay_is_the_trainers_own(tmp_path):
    model = apply_stage(pair(), "sft")
    stock = Trainer(model=model, args=arguments(tmp_path)).create_optimizer().param_groups
    ours = stock_groups(model, 0.1)
    for group, expected in zip(ours, stock, strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]


def test_a_run_follows_both_schedules_and_resumes(tmp_path):
    trainer = train(tmp_path / "whole", RATES, save_steps=2, save_strategy="steps")
    cosine = [2e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in log] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [entry["multi_modal_projector_learning_rate"] for entry in log] == pytest.approx(cosine)
    resumed = train(tmp_path / "again", RATES, resume=str(tmp_path / "whole" / "checkpoint-2"))
    alone = train(tmp_path / "alone", None)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    projector = [name for name in alone.model.state_dict() if "modules_to_save" in name]
    differ = [not torch.equal(alone.model.state_dict()[n], trainer.model.state_dict()[n]) for n in projector]
    assert projector and all(differ)  # the control: without rates of its own the projector ends elsewhere
    json.dumps(trainer.state.log_history)


def test_equal_rates_change_nothing(tmp_path):
    same = RateArguments(projector_learning_rate=1e-3)
    ours, stock = train(tmp_path / "ours", same), train(tmp_path / "stock", None)
    for name, tensor in stock.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def test_muon_takes_rates_too(tmp_path):
    model = apply_stage(pair(), "sft", LORA)
    _, kwargs = trainer_optimizer("muon", model, arguments(tmp_path), RATES)
    assert {(group["part"], group["lr"]) for group in kwargs["params"]} == {
        ("language_model", 1e-3),
        ("multi_modal_projector", 2e-3),
    }
    assert {group["muon"] for group in kwargs["params"]} == {True, False}


def test_the_vision_towers_rate(tmp_path):
    rates = RateArguments(vision_learning_rate=5e-5)
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj"])
    _, kwargs = trainer_optimizer("stock", apply_stage(pair(), "sft", lora), arguments(tmp_path), rates)
    assert {group["part"]: group["lr"] for group in kwargs["params"]}["vision_tower"] == 5e-5
    with pytest.raises(ValueError, match="vision_tower has a learning rate .5e-05. .* nothing in it trains"):
        trainer_optimizer("stock", apply_stage(pair(), "sft", LORA), arguments(tmp_path), rates)


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="projector_learning_rate is -1; it must be at least 0"):
        check_rates(RateArguments(projector_learning_rate=-1), arguments(tmp_path))
    plateau = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    check_rates(RateArguments(), plateau)  # the control
    with pytest.raises(ValueError, match="lr_scheduler_type 'reduce_lr_on_plateau' follows the loss"):
        check_rates(RATES, plateau)
