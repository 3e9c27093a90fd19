"""The formula for the operations of a step, beside what torch counts while a tiny model runs forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing.data import BatchCounts, count_tensors
from jnana.training.options.arguments import LoraArguments
from jnana.training.profiling.flops import ModelFlops, attention_windows
from jnana.training.stages import apply_stage
from tests.tiny import tiny_text_config, tiny_vision_config


LENGTH, ROWS = 48, 2
# Relative. The formula leaves out the weights of an adapter in the tower, and counts the input gradient of the first
# block of cross-attention, in front of which nothing trains.
TOLERANCE = {"sft by LoRA, tower too": 0.002, "cross-attention": 0.01}


def inputs(image_tokens: int, labelled: int = 20) -> dict[str, torch.Tensor]:
    """Rows without padding whose last tokens have labels, each with an image."""
    ids = torch.randint(2, 290, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 1 : 1 + image_tokens] = 300
    labels = ids.clone()
    labels[:, : LENGTH - labelled] = -100
    keep = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(ROWS, 3, 24, 24), "logits_to_keep": keep}


def counted_by_torch(model, batch) -> int:
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def dense(flops: ModelFlops, counts: BatchCounts) -> int:
    """Our count if every token attended to its whole row: torch counts hidden pairs too."""
    seen = sum(counts.attention_pairs(window) for window in flops.windows)
    return flops.batch(counts) + flops.pair * (len(flops.windows) * ROWS * LENGTH**2 - seen)


def pair(kind: str, **fields) -> JnanaForConditionalGeneration:
    torch.manual_seed(0)
    text = tiny_text_config(kind)
    fields = {"image_token_id": 300, "vision_feature_layer": -1, **fields}
    vision = tiny_vision_config("clip")
    model = JnanaForConditionalGeneration(JnanaConfig.from_vision_text_configs(vision, text, **fields))
    model.set_attn_implementation("eager")  # torch counts no operations in the CPU's fused kernel
    return model


CASES = {
    "align": {"stage": "align"},
    "align, tower too": {"stage": "align", "freeze_vision_tower": False},
    "align, mlp": {"stage": "align", "fields": {"projector_type": "mlp"}},
    "align, pixel_shuffle": {
        "stage": "align",
        "fields": {"projector_type": "pixel_shuffle", "projector_downsample_factor": 2},
    },
    "sft whole": {"stage": "sft", "lora": LoraArguments(lora_r=0)},
    "sft by LoRA": {"stage": "sft", "lora": LoraArguments(lora_r=4)},
    "sft by LoRA, tower too": {
        "stage": "sft",
        "lora": LoraArguments(lora_r=4, lora_vision_target_modules=["all-linear"]),
    },
    "cross-attention": {
        "stage": "align",
        "fields": {
            "fusion": "cross_attention",
            "cross_layer_interval": 1,
            "projector_type": "perceiver",
            "projector_num_latents": 4,
            "projector_depth": 1,
            "projector_num_heads": 2,
            "projector_head_dim": 8,
        },
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["phi", "llama"])
def test_the_formula_agrees_with_torch(kind, case):
    settings = dict(CASES[case])
    model = pair(kind, **settings.pop("fields", {}))
    crossed = model.config.fusion == "cross_attention"
    batch = inputs(1 if crossed else model.config.num_image_tokens)
    model = apply_stage(model, **settings)
    flops, counts = ModelFlops.of(model), count_tensors(batch)
    assert counts.supervised == ROWS * 20 and counts.encoded_views == ROWS
    measured = counted_by_torch(model, batch)
    assert dense(flops, counts) == pytest.approx(measured, rel=TOLERANCE.get(case, 0))
    # The control: the Trainer's own estimate, 6 operations for each weight and token, is far away
    assert 6 * model.num_parameters(exclude_embeddings=True) * ROWS * LENGTH > 1.1 * measured


@pytest.mark.parametrize("kind", ["phi", "gpt_neox", "qwen2"])
def test_stage_0_agrees_with_torch(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(kind, attn_implementation="eager"))
    model = apply_stage(model, "pretrain")
    batch = inputs(0, LENGTH)
    for name in ("pixel_values", "logits_to_keep"):
        del batch[name]
    flops, counts = ModelFlops.of(model), count_tensors(batch)
    # a stock model computes logits at every position; the last one of a row has no label
    missing = flops.label * (ROWS * LENGTH - counts.supervised)
    measured = counted_by_torch(model, batch)
    assert dense(flops, counts) + missing == measured


def test_a_feature_cache_saves_the_tower():
    model = apply_stage(pair("phi"), "align")
    batch = inputs(model.config.num_image_tokens)
    flops, whole = ModelFlops.of(model), count_tensors(batch)
    shape = (ROWS, model.config.num_view_features, model.config.vision_feature_size)
    cached = {name: value for name, value in batch.items() if name != "pixel_values"}
    cached["image_features"] = torch.randn(shape)
    counts = count_tensors(cached)
    assert flops.encoded_view > 0
    assert flops.batch(whole) - flops.batch(counts) == ROWS * flops.encoded_view
    assert dense(flops, counts) == counted_by_torch(model, cached)


def test_each_position_attends_to_itself_and_those_before():
    counts = BatchCounts(slots=20, runs=((0, 4), (2, 3), (0, 2)), supervised=1, conversations=3)
    positions = [0, 1, 2, 3, 2, 3, 4, 0, 1]
    assert counts.tokens == len(positions)
    for window in (None, 1, 2, 3, 4, 100):
        assert counts.attention_pairs(window) == sum(min(p + 1, window or 1000) for p in positions)


def test_windows():
    assert attention_windows(tiny_text_config("phi")) == [None, None]
    assert attention_windows(tiny_text_config("phi3")) == [16, 16]
    assert attention_windows(tiny_text_config("qwen2")) == [None, None]
