"""Muon, and rates and schedules of parts: the groups, agreement with the stock optimizers, exact resumes."""

import copy
import json
import math

import pytest
import torch
from torch.optim import AdamW, Muon
from transformers import AutoModelForCausalLM, SchedulerType, Trainer, TrainingArguments, get_scheduler

from jnana.training.optimizers import (
    SCHEDULES_OF_THE_LOSS,
    MuonWithAdamW,
    PartScheduleCallback,
    check_rates,
    muon_groups,
    schedule_factor,
    split_by_part,
    stock_groups,
    trainer_optimizer,
)
from jnana.training.options.arguments import LoraArguments, PartArguments
from jnana.training.stages import apply_stage, part_of
from tests.tiny import tiny_text_config
from tests.training.test_stages import LORA, batch, pair


RATES = PartArguments(projector_learning_rate=2e-3, projector_lr_scheduler_type="cosine")


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_text_config())


def build(model, lr=1e-2):
    return MuonWithAdamW(muon_groups(model, 0.1), lr=lr, betas=(0.9, 0.999), eps=1e-8)


def steps(model, optimizer, seeds):
    for seed in seeds:
        ids = torch.randint(2, 290, (2, 16), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_parameter_is_in_one_group():
    model = tiny_model()
    groups = muon_groups(model, 0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in model.parameters()}
    muon = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert names and all("layers" in name and name.endswith("weight") for name in names)
    assert not any("norm" in name for name in names)


def test_agrees_with_the_stock_optimizers(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)  # stock Muon's precision, ours is float32
    model, twin = tiny_model(), tiny_model()
    ours = build(model)
    stock = []
    for group in muon_groups(twin, 0.1):
        options = {"lr": 1e-2, "weight_decay": group["weight_decay"]}
        stock.append(
            Muon(group["params"], **options, adjust_lr_fn="match_rms_adamw")
            if group["muon"]
            else AdamW(group["params"], **options)
        )
    ids = torch.randint(2, 290, (2, 16), generator=torch.Generator().manual_seed(0))
    start = copy.deepcopy(model.state_dict())
    for network, optimizers in ((model, [ours]), (twin, stock)):
        network(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in model.state_dict().items():
        moved, expected = tensor - start[name], twin.state_dict()[name] - start[name]
        assert (moved - expected).norm() <= 1e-3 * expected.norm() + 1e-9, name


def test_resumes_exactly():
    model = tiny_model()
    optimizer = build(model)
    steps(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    restored = build(twin, lr=5.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh = copy.deepcopy(model)
    steps(model, optimizer, range(3, 5))
    steps(twin, restored, range(3, 5))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    steps(fresh, build(fresh), range(3, 5))  # the control: without its state it goes elsewhere
    difference = max((fresh.state_dict()[name] - tensor).abs().max() for name, tensor in model.state_dict().items())
    assert difference > 1e-3


def test_a_scheduler_moves_both_parts():
    optimizer = build(tiny_model())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    scheduler.step()
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {5e-3}


@pytest.mark.parametrize("name", ["stock", "muon"])
def test_what_the_trainer_is_given(name, tmp_path):
    chosen = trainer_optimizer(name, tiny_model(), TrainingArguments(output_dir=tmp_path, learning_rate=3e-4))
    if name == "stock":
        assert chosen is None
    else:
        assert chosen[0] is MuonWithAdamW and chosen[1]["lr"] == 3e-4


def arguments(folder, **changes) -> TrainingArguments:
    values = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 4, "lr_scheduler_type": "linear"}
    values |= {"report_to": "none", "use_cpu": True, "logging_steps": 1, "remove_unused_columns": False}
    return TrainingArguments(output_dir=folder, **{**values, **changes})


def rows(count: int = 16) -> list[dict]:
    inputs = batch()
    return [{"input_ids": inputs["input_ids"][0], "labels": inputs["labels"][0]} for _ in range(count)]


# Ways to train: the stage, LoRA, and whether the tower is frozen.
ON_BOTH = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj"])
WAYS = {
    "adapters on both": ("sft", ON_BOTH, True),
    "adapter and whole tower": ("sft", LORA, False),
    "all": ("sft", None, False),
    "align and tower": ("align", None, False),
}


def build_model(how: str | None):
    if how is None:
        return apply_stage(pair(), "sft", LORA)
    stage, lora, freeze = WAYS[how]
    return apply_stage(pair(layer=-2), stage, lora, freeze_vision_tower=freeze)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    stacked = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    images = torch.randn(len(examples), 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return {**stacked, "pixel_values": images}


def train(folder, rates: PartArguments | None, resume: str | None = None, how=None, **changes) -> Trainer:
    model, args = build_model(how), arguments(folder, **changes)
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
    same = PartArguments(projector_learning_rate=1e-3)
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
    rates = PartArguments(vision_learning_rate=5e-5)
    lora = LoraArguments(lora_r=2, lora_target_modules=["q_proj"], lora_vision_target_modules=["q_proj"])
    _, kwargs = trainer_optimizer("stock", apply_stage(pair(), "sft", lora), arguments(tmp_path), rates)
    assert {group["part"]: group["lr"] for group in kwargs["params"]}["vision_tower"] == 5e-5
    with pytest.raises(ValueError, match="vision_tower has a learning rate .5e-05. .* nothing in it trains"):
        trainer_optimizer("stock", apply_stage(pair(), "sft", LORA), arguments(tmp_path), rates)


THREE = PartArguments(projector_learning_rate=2e-3, vision_learning_rate=5e-4)


@pytest.mark.parametrize("how", WAYS)
def test_three_rates(how):
    """Each trained parameter is in one group of its part; the rate that the Trainer logs is not the tower's."""
    model = build_model(how)
    groups = split_by_part(stock_groups(model, 0.1), model, THREE, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(id(parameter) for group in groups for parameter in group["params"]) == sorted(names)
    rates = {"language_model": 1e-3, "lm_head": 1e-3, "multi_modal_projector": 2e-3, "vision_tower": 5e-4}
    for group in groups:
        assert {rates[part_of(names[id(parameter)])] for parameter in group["params"]} == {group["lr"]}
    parts = list(dict.fromkeys(group["part"] for group in groups))
    expected = ["language_model", "multi_modal_projector", "vision_tower"]
    assert parts == (expected[1:] if how == "align and tower" else expected)


@pytest.mark.parametrize("how", WAYS)
def test_three_rates_follow_one_schedule_and_resume(how, tmp_path):
    """With gradient checkpointing; the unused end of the tower stays frozen after a resume."""
    options = {"how": how, "save_steps": 2, "save_strategy": "steps", "gradient_checkpointing": True}
    trainer = train(tmp_path / "whole", THREE, **options)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    schedule = [1, 0.75, 0.5, 0.25]
    first = 2e-3 if how == "align and tower" else 1e-3
    assert [entry["learning_rate"] for entry in log] == pytest.approx([first * factor for factor in schedule])
    for part, rate in (("multi_modal_projector", 2e-3), ("vision_tower", 5e-4)):
        logged = [entry[f"{part}_learning_rate"] for entry in log]
        assert logged == pytest.approx([rate * factor for factor in schedule])
    resumed = train(tmp_path / "again", THREE, resume=str(tmp_path / "whole" / "checkpoint-2"), **options)
    trained = [{n for n, p in each.model.named_parameters() if p.requires_grad} for each in (trainer, resumed)]
    assert trained[0] == trained[1] and any("vision_tower" in name for name in trained[0])
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    # the control: with one rate for all parts the tower ends elsewhere
    alone = train(tmp_path / "alone", None, **{**options, "save_strategy": "no"}).model.state_dict()
    tower = [name for name in trained[0] if "vision_tower" in name and not name.endswith("k_proj.bias")]
    assert all(not torch.equal(alone[name], trainer.model.state_dict()[name]) for name in tower)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_other_optimizers_take_the_groups(optim, tmp_path):
    """Those of bitsandbytes step on GPUs only; here they are built and their groups looked at."""
    model, args = build_model("adapter and whole tower"), arguments(tmp_path, optim=optim)
    chosen, kwargs = trainer_optimizer("stock", model, args, THREE)
    optimizer = chosen(**kwargs)
    assert {group["part"]: group["lr"] for group in optimizer.param_groups} == {
        "language_model": 1e-3,
        "multi_modal_projector": 2e-3,
        "vision_tower": 5e-4,
    }


def test_muon_trains_a_tower(tmp_path):
    model = build_model("all")
    _, kwargs = trainer_optimizer("muon", model, arguments(tmp_path), THREE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(p)] for group in kwargs["params"] if group["muon"] for p in group["params"]}
    assert {(group["part"], group["lr"]) for group in kwargs["params"] if group["muon"]} == {
        ("language_model", 1e-3),
        ("multi_modal_projector", 2e-3),
        ("vision_tower", 5e-4),
    }
    assert any("vision_tower.encoder.layers.0.mlp.fc1" in name for name in muon)
    assert not any("embed" in name for name in muon)


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="projector_learning_rate is -1; it must be at least 0"):
        check_rates(PartArguments(projector_learning_rate=-1), arguments(tmp_path))
    plateau = arguments(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
    check_rates(PartArguments(), plateau)  # the control
    with pytest.raises(ValueError, match="lr_scheduler_type 'reduce_lr_on_plateau' follows the loss"):
        check_rates(RATES, plateau)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_schedules_are_those_of_transformers(name, warmup_steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    (expected,) = get_scheduler(name, optimizer, warmup_steps, 10).lr_lambdas
    factor = schedule_factor(name, warmup_steps, 10)
    assert [factor(step) for step in range(12)] == [expected(step) for step in range(12)]
    other = schedule_factor("cosine" if name == "linear" else "linear", warmup_steps, 10)
    assert [other(step) for step in range(12)] != [expected(step) for step in range(12)]  # the control


def test_schedules_of_the_loss_are_known():
    """All others are functions of the step, one for each parameter group, that the callback can replace."""
    needed = {"warmup_stable_decay": {"num_decay_steps": 2}, "cosine_with_min_lr": {"min_lr": 0.1}}
    needed["cosine_warmup_with_min_lr"] = needed["cosine_with_min_lr"]
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=needed.get(kind.value, {}))
        assert hasattr(scheduler, "lr_lambdas") == (kind.value not in SCHEDULES_OF_THE_LOSS), kind
