"""Which attention packed rows are trained with: the fastest that is exact on this machine.

Flex attention skips what the mask of packed rows hides, whole blocks at a time; sdpa computes it and throws it away.
But flex attention is compiled for the very head size (Phi-2's heads are 80 wide), and on some machines it fails to, or
is no faster. So both are tried on one layer's worth of random tensors, forward and backward, before training.
"""

import logging
import time
from types import SimpleNamespace

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling.packed_attention_jnana import create_packed_mask

from .arguments import DataArguments


logger = logging.getLogger(__name__)

# In bfloat16, whose numbers are 0.4 % apart; a wrong mask differs by the size of the values themselves
TOLERANCE = 0.05
ROUNDS = 5


def choose_attention(
    model: nn.Module, data_args: DataArguments, device: torch.device, attn_implementation: str | None
) -> str:
    """Give the language model the attention implementation to train packed rows with, and say which and why.

    Args:
        model (`JnanaForConditionalGeneration` or `PeftModel`): The model, on the device or not.
        data_args (`DataArguments`): Its `packing` and `max_row_tokens`; without packing the model is left alone.
        device (`torch.device`): Where the model will train. Without a GPU it is left alone: flex attention has no
            backward pass there.
        attn_implementation (`str`, *optional*): What the recipe asks for, which is then left alone.

    Returns:
        `str`: The implementation.
    """
    language_model = model.get_base_model() if isinstance(model, PeftModel) else model
    language_model = language_model.model.language_model
    config = language_model.config
    asked = attn_implementation is not None or config._attn_implementation != "sdpa"
    if data_args.packing == "none" or asked or device.type != "cuda":
        return config._attn_implementation
    # The first process decides for all, by its clock.
    main = PartialState().is_main_process
    found = [fastest_attention(config, data_args.max_row_tokens, device) if main else None]
    best, reason = broadcast_object_list(found)[0]
    logger.info(f"attention of packed rows: {best}, {reason}")
    if best != config._attn_implementation:
        language_model.set_attn_implementation(best)
    return best


def fastest_attention(config: PreTrainedConfig, max_row_tokens: int, device: torch.device) -> tuple[str, str]:
    """Try flex attention against sdpa.

    Args:
        config (`PreTrainedConfig`): The language model's; its heads, their size and its sliding window are tried.
        max_row_tokens (`int`): Tokens of the row that is tried.
        device (`torch.device`): Where.

    Returns:
        `tuple[str, str]`: `flex_attention` or `sdpa`, and the reason in words.
    """
    if getattr(config, "attention_dropout", 0.0) > 0:
        return "sdpa", f"flex attention has no dropout and attention_dropout is {config.attention_dropout}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tried = attention_inputs(config, max_row_tokens, device, dtype)
    expected, seconds = run_attention("sdpa", config, tried)
    try:
        found, flex_seconds = run_attention("flex_attention", config, tried)
    except Exception as error:  # a compiler's, of any class; sdpa is always there
        return "sdpa", f"flex attention fails here for heads of {tried['query'].shape[-1]}: {str(error)[:200]}"
    worst = max(
        ((ours - theirs).float().norm() / theirs.float().norm()).item()
        for ours, theirs in zip(found, expected, strict=True)
    )
    times = f"{1000 * flex_seconds:.1f} ms a layer against {1000 * seconds:.1f} ms with sdpa"
    if not worst <= TOLERANCE:  # NaN is not
        return "sdpa", f"flex attention computes something else here (relative difference {worst:.1e})"
    if flex_seconds >= seconds:
        return "sdpa", f"flex attention is no faster ({times})"
    return "flex_attention", f"{times}, the same numbers (relative difference {worst:.0e})"


def attention_inputs(
    config: PreTrainedConfig, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A row of trees of five branches each: queries, keys and values `(1, heads, num_tokens, head_dim)`, and ids."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(1, count, num_tokens, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    }
    tree, shared, branch = 125, 50, 15  # of a picture of 49 image tokens with five captions
    place = torch.arange(num_tokens, device=device)
    within = place % tree
    branch_ids = torch.where(within < shared, 0, (within - shared) // branch + 1)
    position_ids = torch.where(within < shared, within, shared + (within - shared) % branch)
    ids = {"segment_ids": place // tree, "branch_ids": branch_ids, "position_ids": position_ids}
    return {**tensors, **{name: value[None] for name, value in ids.items()}}


def run_attention(
    implementation: str, config: PreTrainedConfig, inputs: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], float]:
    """One layer's attention, forward and backward.

    Args:
        implementation (`str`): Name that transformers knows it by.
        config (`PreTrainedConfig`): The language model's.
        inputs (`dict[str, torch.Tensor]`): From [`attention_inputs`].

    Returns:
        `tuple[list[torch.Tensor], float]`: Output and the gradients of queries, keys and values; seconds a round, the
            median of five after one that compiles.
    """
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    window = getattr(config, "sliding_window", None)
    mask_config = SimpleNamespace(_attn_implementation=implementation, sliding_window=window)
    embeds = torch.empty(1, query.shape[2], 1, device=query.device, dtype=query.dtype)
    mask = create_packed_mask(mask_config, embeds, inputs["segment_ids"], inputs["branch_ids"], inputs["position_ids"])
    groups = query.shape[1] // key.shape[1]
    layer = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=groups)
    attend = ALL_ATTENTION_FUNCTIONS[implementation]
    seconds, results = [], []
    for _ in range(1 + ROUNDS):
        synchronize(query.device)
        start = time.perf_counter()
        output = attend(layer, query, key, value, mask, dropout=0.0, scaling=query.shape[-1] ** -0.5)[0]
        gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        synchronize(query.device)
        seconds.append(time.perf_counter() - start)
        results = [output.detach(), *gradients]
    return results, sorted(seconds[1:])[ROUNDS // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
