"""The attention that packed rows are trained with: flex only where it is proven, sdpa everywhere else."""

import pytest
import torch
from transformers import TrainingArguments

import training.attention as attention
from tests.modeling.pairs import join
from tests.tiny import tiny_text_config
from training.arguments import DataArguments


CPU = torch.device("cpu")


def tried(monkeypatch, run) -> tuple[str, str]:
    """The choice when flex attention runs as `run(config, inputs)`, and sdpa takes a second."""
    real = attention.run_attention

    def stand_in(implementation, config, inputs):
        if implementation == "flex_attention":
            return run(real, config, inputs)
        return real(implementation, config, inputs)[0], 1.0

    monkeypatch.setattr(attention, "run_attention", stand_in)
    return attention.fastest_attention(tiny_text_config("phi3", sliding_window=9), 130, CPU)


def test_flex_is_taken_when_it_agrees_and_is_faster(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: (real("sdpa", *given)[0], 0.25))
    assert best == "flex_attention"
    assert "250.0 ms a layer against 1000.0 ms with sdpa, the same numbers" in reason


def test_flex_is_not_taken_when_it_is_slower(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: (real("sdpa", *given)[0], 1.5))
    assert best == "sdpa" and "no faster" in reason


@pytest.mark.parametrize("name", ["segment_ids", "branch_ids", "position_ids"])
def test_flex_is_not_taken_when_it_computes_something_else(monkeypatch, name):
    def wrong(real, config, inputs):
        return real("sdpa", config, {**inputs, name: torch.zeros_like(inputs[name])})[0], 0.1

    best, reason = tried(monkeypatch, wrong)
    assert best == "sdpa" and "computes something else" in reason


def test_flex_is_not_taken_when_it_gives_nan_or_fails(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: ([t * torch.nan for t in real("sdpa", *given)[0]], 0.1))
    assert best == "sdpa" and "computes something else" in reason

    def fails(real, config, inputs):
        raise RuntimeError("no kernel")

    best, reason = tried(monkeypatch, fails)
    assert best == "sdpa" and reason == "flex attention fails here for heads of 16: no kernel"
    best, reason = attention.fastest_attention(tiny_text_config("phi", attention_dropout=0.1), 64, CPU)
    assert best == "sdpa" and "attention_dropout is 0.1" in reason


def test_the_model_gets_what_was_chosen(monkeypatch, tmp_path):
    model = join(tmp_path)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(attention, "fastest_attention", lambda *given: ("flex_attention", "for a test"))
    packed, cuda = DataArguments(packing="shared_image"), torch.device("cuda")
    for given in (
        (packed, TrainingArguments(output_dir=str(tmp_path)).device, None),
        (DataArguments(), cuda, None),
        (packed, cuda, "sdpa"),
    ):
        assert attention.choose_attention(model, *given) == "sdpa"
    assert attention.choose_attention(model, packed, cuda, None) == "flex_attention"
    assert model.model.language_model.config._attn_implementation == "flex_attention"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
