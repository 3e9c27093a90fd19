"""Muon and AdamW as one optimizer: who gets what, agreement with the stock optimizers, and an exact resume."""

import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from transformers import AutoModelForCausalLM, TrainingArguments

from jnana.training.optimizers import MuonWithAdamW, muon_groups, trainer_optimizer
from tests.tiny import tiny_text_config


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
