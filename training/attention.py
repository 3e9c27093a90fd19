"""Chooses the attention implementation for packed rows: the fastest that is exact on this machine.

Flex attention skips whole blocks that the mask of packed rows hides; sdpa computes and discards them. But flex
attention is compiled for the head size (Phi-2's heads are 80 wide), which fails on some machines, and on others it is
slower. So both are run on random tensors of one layer, forward and backward, before training.

Rows differ in length. transformers (5.23) leaves `dynamic` to torch.compile: kernel and block mask are compiled for
the first length, again with a variable length when a second one occurs, and a third time for rows of one block of 128
tokens; all other lengths use the second. (torch 2.13: counted on a CPU, forward only.) So the trial alternates between
two lengths, and measures the kernel that training will run: the one of variable length. Packed rows are padded to
whole blocks, which flex attention computes anyway, so that few lengths occur and most batches have the same.
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

# Relative difference allowed in bfloat16, which rounds to 0.4 %; a wrong mask differs by about 1
TOLERANCE = 0.05
ROUNDS = 5
BLOCK = 128  # tokens of flex attention's blocks


def check_attention(attn_implementation: str | None, packing: str) -> None:
    """Refuse an attention implementation without masks for packed rows.

    Args:
        attn_implementation (`str`, *optional*): Its name in transformers.
        packing (`str`): `none`, `rows` or `shared_image`.

    Raises:
        ValueError: naming both options and the remedy.
    """
    if packing != "none" and attn_implementation is not None and attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}, which cannot apply the mask of packed rows (packing: "
            f"{packing}); give one of {', '.join(MASKED_ATTENTION)}, leave it out, or set packing: none"
        )


def row_multiple(attn_implementation: str, packing: str) -> int | None:
    """The number that the collator pads the length of rows to a multiple of; `None` leaves lengths as they are."""
    return BLOCK if packing != "none" and attn_implementation == "flex_attention" else None


def choose_attention(
    model: nn.Module, data_args: DataArguments, device: torch.device, attn_implementation: str | None
) -> str:
    """Set the attention implementation with which the language model trains packed rows, and log the reason.

    Args:
        model (`JnanaForConditionalGeneration` or `PeftModel`): The model, on the device or not.
        data_args (`DataArguments`): Its `packing` and `max_row_tokens`; without packing nothing is changed.
        device (`torch.device`): Where the model will train. Without a GPU nothing is changed: flex attention has no
            backward pass there.
        attn_implementation (`str`, *optional*): The recipe's choice; if given, nothing is changed.

    Returns:
        `str`: The implementation.

    Raises:
        ValueError: if the model was loaded with one that can't apply the mask of packed rows.
    """
    language_model = model.get_base_model() if isinstance(model, PeftModel) else model
    language_model = language_model.model.language_model
    config = language_model.config
    check_attention(config._attn_implementation, data_args.packing)
    asked = attn_implementation is not None or config._attn_implementation != "sdpa"
    if data_args.packing == "none" or asked or device.type != "cuda":
        return config._attn_implementation
    # The times differ from process to process, so the first process decides for all.
    main = PartialState().is_main_process
    found = [fastest_attention(config, data_args.max_row_tokens, device) if main else None]
    best, reason = broadcast_object_list(found)[0]
    logger.info(f"attention of packed rows: {best}, {reason}")
    if best != config._attn_implementation:
        language_model.set_attn_implementation(best)
    return best


def fastest_attention(config: PreTrainedConfig, max_row_tokens: int, device: torch.device) -> tuple[str, str]:
    """Compare flex attention with sdpa on rows of two lengths.

    Args:
        config (`PreTrainedConfig`): The language model's: number and size of heads, sliding window, number of layers.
        max_row_tokens (`int`): Tokens of the longer row, rounded up to whole blocks; the other is about half as long.
        device (`torch.device`): Where to compute.

    Returns:
        `tuple[str, str]`: `flex_attention` or `sdpa`, and the reason.
    """
    if getattr(config, "attention_dropout", 0.0) > 0:
        return "sdpa", f"flex attention has no dropout and attention_dropout is {config.attention_dropout}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [attention_inputs(config, length, device, dtype) for length in tried_lengths(max_row_tokens)]
    expected, seconds = run_attention("sdpa", config, rows)
    try:
        found, flex_seconds = run_attention("flex_attention", config, rows)
    except Exception as error:  # compilers raise errors of many classes; sdpa is always available
        return "sdpa", f"flex attention fails here for heads of {rows[0]['query'].shape[-1]}: {str(error)[:200]}"
    worst = max(
        ((ours - theirs).float().norm() / theirs.float().norm()).item()
        for ours, theirs in zip(found, expected, strict=True)
    )
    lengths = " and ".join(str(row["query"].shape[2]) for row in rows)
    times = f"{1000 * flex_seconds:.1f} ms against {1000 * seconds:.1f} ms with sdpa for rows of {lengths} tokens"
    if not worst <= TOLERANCE:  # also if it is NaN
        return "sdpa", f"flex attention gives other results here (relative difference {worst:.1e})"
    if flex_seconds >= seconds:
        return "sdpa", f"flex attention is not faster ({times})"
    return "flex_attention", f"{times}, the same results (relative difference {worst:.0e})"


def tried_lengths(max_row_tokens: int) -> list[int]:
    """The longest row in whole blocks and, unless it is one block, a row about half as long."""
    longest = -(-max_row_tokens // BLOCK) * BLOCK
    shorter = max(longest // 2 // BLOCK * BLOCK, BLOCK)
    return [longest, shorter] if shorter < longest else [longest]


def attention_inputs(
    config: PreTrainedConfig, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Random inputs of a packed row whose images have five branches each.

    Returns:
        `dict`: Queries, keys and values `(1, heads, num_tokens, head_dim)`; segment, branch and position ids
        `(1, num_tokens)`.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(1, count, num_tokens, head_dim, generator=generator).to(device, dtype).requires_grad_()
        for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    }
    segment, prefix, branch = 125, 50, 15  # tokens of an image with 49 image tokens and five captions
    index = torch.arange(num_tokens, device=device)
    within = index % segment
    branch_ids = torch.where(within < prefix, 0, (within - prefix) // branch + 1)
    position_ids = torch.where(within < prefix, within, prefix + (within - prefix) % branch)
    ids = {"segment_ids": index // segment, "branch_ids": branch_ids, "position_ids": position_ids}
    return {**tensors, **{name: value[None] for name, value in ids.items()}}


def run_attention(
    implementation: str, config: PreTrainedConfig, rows: list[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], float]:
    """Run the attention of one training step for each row in turn, as training alternates between lengths.

    A step makes the mask once and uses it in every layer. One layer is run, forward and backward, and its time is
    multiplied by the number of layers.

    Args:
        implementation (`str`): Its name in transformers.
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
    """The clock in seconds, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
