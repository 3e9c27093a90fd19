"""The attention that packed rows are trained with: flex attention only where it was tested, sdpa everywhere else."""

import pytest
import torch
from transformers import TrainingArguments

from jnana.training import attention
from jnana.training.arguments import DataArguments
from tests.modeling.pairs import join
from tests.tiny import tiny_text_config


CPU = torch.device("cpu")


def tried(monkeypatch, run) -> tuple[str, str]:
    """The choice when flex attention runs as `run(config, inputs)`, and sdpa takes a second."""
    real = attention.run_attention

    def stand_in(implementation, config, rows):
        if implementation == "flex_attention":
            return run(real, config, rows)
        return real(implementation, config, rows)[0], 1.0

    monkeypatch.setattr(attention, "run_attention", stand_in)
    monkeypatch.setattr(attention, "ROUNDS", 1)
    return attention.fastest_attention(tiny_text_config("phi3", sliding_window=9), 250, CPU)


def test_flex_is_taken_when_it_agrees_and_is_faster(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: (real("sdpa", *given)[0], 0.25))
    assert best == "flex_attention"
    assert "250.0 ms against 1000.0 ms with sdpa for rows of 256 and 128 tokens, the same results" in reason


def test_flex_is_not_taken_when_it_is_slower(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: (real("sdpa", *given)[0], 1.5))
    assert best == "sdpa" and "not faster" in reason


@pytest.mark.parametrize("name", ["segment_ids", "branch_ids", "position_ids"])
def test_flex_is_not_taken_when_it_computes_something_else(monkeypatch, name):
    def wrong(real, config, rows):
        longer, shorter = rows
        return real("sdpa", config, [longer, {**shorter, name: torch.zeros_like(shorter[name])}])[0], 0.1

    best, reason = tried(monkeypatch, wrong)
    assert best == "sdpa" and "gives other results" in reason


def test_flex_is_not_taken_when_it_gives_nan_or_fails(monkeypatch):
    best, reason = tried(monkeypatch, lambda real, *given: ([t * torch.nan for t in real("sdpa", *given)[0]], 0.1))
    assert best == "sdpa" and "gives other results" in reason

    def fails(real, config, rows):
        raise RuntimeError("no kernel")

    best, reason = tried(monkeypatch, fails)
    assert best == "sdpa" and reason == "flex attention fails here for heads of 16: no kernel"
    best, reason = attention.fastest_attention(tiny_text_config("phi", attention_dropout=0.1), 64, CPU)
    assert best == "sdpa" and "attention_dropout is 0.1" in reason


@pytest.mark.parametrize("max_row_tokens", [100, 128])
def test_rows_of_one_block_have_one_length(max_row_tokens):
    assert attention.tried_lengths(max_row_tokens) == [128]


def test_two_lengths_are_tried(monkeypatch):
    """As long as the longest row and about half of it, in whole blocks: the second one has to be compiled for too."""
    assert [attention.tried_lengths(number) for number in (129, 1000, 4096)] == [[256, 128], [1024, 512], [4096, 2048]]
    config, tried = tiny_text_config("phi"), []
    real = attention.run_layer

    def second_length_fails(implementation, config, inputs):
        tried.append((implementation, inputs["query"].shape[2]))
        if tried[-1] == ("flex_attention", 128):
            raise RuntimeError("no shapes of variable size")
        return real("sdpa", config, inputs)

    monkeypatch.setattr(attention, "run_layer", second_length_fails)
    monkeypatch.setattr(attention, "ROUNDS", 1)
    best, reason = attention.fastest_attention(config, 256, CPU)
    assert best == "sdpa" and "no shapes of variable size" in reason
    assert tried[:3] == [("sdpa", 256), ("sdpa", 128), ("sdpa", 256)] and tried[-2:] == [
        ("flex_attention", 256),
        ("flex_attention", 128),
    ]


def test_a_step_pays_for_its_mask_once(monkeypatch):
    """One mask and the attention of all layers, for each length; the first round, which compiles, does not count."""
    config = tiny_text_config("phi")
    times = iter([(9.0, 9.0)] * 2 + [(0.5, 0.01), (0.25, 0.02)] * attention.ROUNDS)
    monkeypatch.setattr(attention, "run_layer", lambda *given: ([], *next(times)))
    seconds = attention.run_attention("sdpa", config, [{}, {}])[1]
    assert config.num_hidden_layers > 1
    assert seconds == pytest.approx(0.75 + 0.03 * config.num_hidden_layers)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_that_cannot_follow_a_mask_is_refused(tmp_path, implementation):
    with pytest.raises(ValueError, match=f"attn_implementation is '{implementation}'.*packing: rows.*sdpa, flex"):
        attention.check_attention(implementation, "rows")
    for known in (None, "eager", "sdpa", "flex_attention"):
        attention.check_attention(known, "rows")
    model = join(tmp_path)
    model.model.language_model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"attn_implementation is '{implementation}'"):
        attention.choose_attention(model, DataArguments(packing="shared_image"), CPU, None)
    assert attention.choose_attention(model, DataArguments(), CPU, None) == implementation


def test_only_packed_rows_of_flex_attention_are_padded_to_blocks():
    assert attention.row_multiple("flex_attention", "rows") == 128
    assert attention.row_multiple("flex_attention", "none") is None
    assert attention.row_multiple("sdpa", "shared_image") is None


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
