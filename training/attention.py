"""Which attention packed rows are trained with: the fastest that is exact on this machine.

Flex attention skips what the mask of packed rows hides, whole blocks at a time; sdpa computes it and throws it away.
But flex attention is compiled for the very head size (Phi-2's heads are 80 wide), and on some machines it fails to, or
is no faster. So both are tried on one layer's worth of random tensors, forward and backward, before training.

Rows differ in length. transformers (5.23) leaves `dynamic` to torch.compile: kernel and block mask are compiled for
the first length, once more with the length as a variable when a second one comes, and a third time for rows of one
block of 128 tokens; every other length takes the second. (torch 2.13: counted on a CPU, forward only.) So the trial
takes turns between two lengths, and times what training will run: the kernel of variable length. Packed rows are
padded to whole blocks, which flex attention computes anyway, so that few lengths occur and most batches have the same.
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

from jnana.modeling.packed_attention_jnana import MASKED_ATTENTION, create_packed_mask

from .arguments import DataArguments


logger = logging.getLogger(__name__)

# In bfloat16, whose numbers are 0.4 % apart; a wrong mask differs by the size of the values themselves
TOLERANCE = 0.05
ROUNDS = 5
BLOCK = 128  # tokens of flex attention's blocks


def check_attention(attn_implementation: str | None, packing: str) -> None:
    """Refuse an attention implementation that knows lengths only for rows that need a mask.

    Args:
        attn_implementation (`str`, *optional*): As transformers names it.
        packing (`str`): `none`, `rows` or `shared_image`.

    Raises:
        ValueError: naming both options and the remedy.
    """
    if packing != "none" and attn_implementation is not None and attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}, which cannot follow the mask of packed rows (packing: "
            f"{packing}); give one of {', '.join(MASKED_ATTENTION)}, leave it out, or set packing: none"
        )


def row_multiple(attn_implementation: str, packing: str) -> int | None:
    """What the collator pads rows to a multiple of: whole blocks for flex attention, `None` for any length."""
    return BLOCK if packing != "none" and attn_implementation == "flex_attention" else None


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

    Raises:
        ValueError: if the model was loaded with one that can't follow the mask of packed rows.
    """
    language_model = model.get_base_model() if isinstance(model, PeftModel) else model
    language_model = language_model.model.language_model
    config = language_model.config
    check_attention(config._attn_implementation, data_args.packing)
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
    """Try flex attention against sdpa, on rows of two lengths.

    Args:
        config (`PreTrainedConfig`): The language model's; its heads, their size, its sliding window and the number of
            its layers are tried.
        max_row_tokens (`int`): Tokens of the longer row, in whole blocks; the other one is about half as long.
        device (`torch.device`): Where.

    Returns:
        `tuple[str, str]`: `flex_attention` or `sdpa`, and the reason in words.
    """
    if getattr(config, "attention_dropout", 0.0) > 0:
        return "sdpa", f"flex attention has no dropout and attention_dropout is {config.attention_dropout}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [attention_inputs(config, length, device, dtype) for length in tried_lengths(max_row_tokens)]
    expected, seconds = run_attention("sdpa", config, rows)
    try:
        found, flex_seconds = run_attention("flex_attention", config, rows)
    except Exception as error:  # a compiler's, of any class; sdpa is always there
        return "sdpa", f"flex attention fails here for heads of {rows[0]['query'].shape[-1]}: {str(error)[:200]}"
    worst = max(
        ((ours - theirs).float().norm() / theirs.float().norm()).item()
        for ours, theirs in zip(found, expected, strict=True)
    )
    lengths = " and ".join(str(row["query"].shape[2]) for row in rows)
    times = f"{1000 * flex_seconds:.1f} ms against {1000 * seconds:.1f} ms with sdpa for rows of {lengths} tokens"
    if not worst <= TOLERANCE:  # NaN is not
        return "sdpa", f"flex attention computes something else here (relative difference {worst:.1e})"
    if flex_seconds >= seconds:
        return "sdpa", f"flex attention is no faster ({times})"
    return "flex_attention", f"{times}, the same numbers (relative difference {worst:.0e})"


def tried_lengths(max_row_tokens: int) -> list[int]:
    """The longest row in whole blocks, and one about half as long if that is another length."""
    longest = -(-max_row_tokens // BLOCK) * BLOCK
    shorter = max(longest // 2 // BLOCK * BLOCK, BLOCK)
    return [longest, shorter] if shorter < longest else [longest]


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
    implementation: str, config: PreTrainedConfig, rows: list[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], float]:
    """The attention of one training step for each row, one after the other, as batches of different lengths follow
    one another.

    A step makes the mask once and uses it in every layer; one layer is run, forward and backward, and counted for all.

    Args:
        implementation (`str`): Name that transformers knows it by.
        config (`PreTrainedConfig`): The language model's.
        rows (`list[dict[str, torch.Tensor]]`): Each from [`attention_inputs`].

    Returns:
        `tuple[list[torch.Tensor], float]`: For each row the output and the gradients of queries, keys and values;
            seconds for all rows, the median of five rounds after one that compiles.
    """
    seconds, results = [], []
    for _ in range(1 + ROUNDS):
        results, spent = [], 0.0
        for inputs in rows:
            found, mask_seconds, layer_seconds = run_layer(implementation, config, inputs)
            results += found
            spent += mask_seconds + config.num_hidden_layers * layer_seconds
        seconds.append(spent)
    return results, sorted(seconds[1:])[ROUNDS // 2]


def run_layer(
    implementation: str, config: PreTrainedConfig, inputs: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], float, float]:
    """Mask and one layer's attention, forward and backward; results as in [`run_attention`], seconds of each."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    window = getattr(config, "sliding_window", None)
    mask_config = SimpleNamespace(_attn_implementation=implementation, sliding_window=window)
    embeds = torch.empty(1, query.shape[2], 1, device=query.device, dtype=query.dtype)
    ids = [inputs[name] for name in ("segment_ids", "branch_ids", "position_ids")]
    groups = query.shape[1] // key.shape[1]
    layer = SimpleNamespace(training=True, is_causal=True, num_key_value_groups=groups)
    attend = ALL_ATTENTION_FUNCTIONS[implementation]
    start = synchronized_time(query.device)
    mask = create_packed_mask(mask_config, embeds, *ids)
    made = synchronized_time(query.device)
    output = attend(layer, query, key, value, mask, dropout=0.0, scaling=query.shape[-1] ** -0.5)[0]
    gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    done = synchronized_time(query.device)
    return [output.detach(), *gradients], made - start, done - made


def synchronized_time(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
