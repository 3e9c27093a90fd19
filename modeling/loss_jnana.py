"""The training loss fused with the head, so that the logits of all supervised tokens never exist at once.

At 51,200 words the float32 logits of 4,096 tokens take 839 MB, and a plain loss holds several tensors of that size.
Here the head runs on one chunk of tokens after the other. The gradients of a chunk, for its hidden states and for the
head where it trains, are computed in the forward pass, as in Liger's kernel, and the backward pass only scales them.
So nothing is computed twice.

Used in training, and only for batches that ask for no logits: see `skip_logits` in
[`JnanaForConditionalGeneration.forward`].
"""

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.utils import is_liger_kernel_available


logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a position without one
# Of weights as they are; those without data are traced for a forecast of memory.
PLAIN_WEIGHTS = ("torch.nn.parameter.Parameter", "torch._subclasses.fake_tensor.FakeTensor")
CHUNK_ELEMENTS = 2**24  # logits of a chunk: 64 MiB in float32
# Gradients in float16 are computed this many times too large until they are scaled. Otherwise the
# smallest would lose digits, because a loss scaler multiplies them only afterwards.
FLOAT16_SCALE = 256.0


def select_labelled(
    hidden_states: torch.Tensor, shift_labels: torch.Tensor | None, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Hidden states and labels at given positions. Selecting by indices does not make a GPU wait, unlike a boolean mask.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Of all positions.
        shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): The token that each
            position must predict; labels of another shape are taken to be selected already.
        positions (`torch.LongTensor` of shape `(num_positions,)`): Indices into the rows laid end to end.

    Returns:
        `tuple`: Hidden states of shape `(num_positions, hidden_size)`, and labels of shape `(num_positions,)`.
    """
    if shift_labels is not None and shift_labels.shape == hidden_states.shape[:2]:
        shift_labels = shift_labels.flatten().index_select(0, positions.to(shift_labels.device))
    return hidden_states.flatten(0, 1).index_select(0, positions.to(hidden_states.device)), shift_labels


def head_loss(
    hidden_states: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = IGNORED,
    use_liger_kernel: bool = False,
    return_token_losses: bool = False,
) -> Any:
    """
    The cross-entropy of the head's logits, without the logits.

    Args:
        hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): The inputs of the head.
        head (`torch.nn.Linear`): A head for which [`unfused_reason`] gives `None`.
        labels (`torch.LongTensor` of shape `(...)`): The token to predict from each hidden state.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the summed loss is divided by; by default the
            number of labels.
        ignore_index (`int`, *optional*, defaults to -100): The label of hidden states without loss.
        use_liger_kernel (`bool`, *optional*, defaults to `False`): Compute it by Liger's Triton kernel.
        return_token_losses (`bool`, *optional*, defaults to `False`): Return the losses of the tokens too.

    Returns:
        `torch.FloatTensor` of shape `()`: In float32. It can be differentiated once. With `return_token_losses` a
        tuple of it and what [`token_losses`] would give, or `None` in its place with Liger's kernel, which only sums.

    Raises:
        ImportError: If Liger's kernel is asked for and not installed.
    """
    hidden_states, labels = hidden_states.flatten(0, -2), labels.flatten().to(hidden_states.device)
    weight, bias = head.weight, head.bias
    losses = None
    if use_liger_kernel:
        total = _liger_loss(hidden_states, weight, bias, labels, ignore_index)
    else:
        if not torch.is_grad_enabled():
            hidden_states, weight = hidden_states.detach(), weight.detach()
            bias = None if bias is None else bias.detach()
        total, losses = _ChunkedLoss.apply(hidden_states, weight, bias, labels, ignore_index)
    count = (labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    loss = total.float() / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
    return (loss, losses) if return_token_losses else loss


@torch.no_grad()
def token_losses(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = IGNORED) -> torch.Tensor:
    """
    The cross-entropy of each token, computed chunk by chunk and without gradients.

    Args:
        logits (`torch.FloatTensor` of shape `(..., vocab_size)`): Of the head.
        labels (`torch.LongTensor` of shape `(...)`): The token to predict from each of them.
        ignore_index (`int`, *optional*, defaults to -100): The label of those without loss, for which it is 0.

    Returns:
        `torch.FloatTensor` of shape `(num_labels,)`: In float32.
    """
    logits, labels = logits.flatten(0, -2), labels.flatten().to(logits.device)
    rows = max(CHUNK_ELEMENTS // logits.shape[-1], 1)
    chunks = zip(logits.split(rows), labels.split(rows), strict=True)
    found = [
        nn.functional.cross_entropy(chunk.float(), wanted, ignore_index=ignore_index, reduction="none")
        for chunk, wanted in chunks
    ]
    return torch.cat(found)


def unfused_reason(head: nn.Module) -> str | None:
    """
    Why the loss can't be fused with a head, or `None` if it can.

    The fused loss reads the weights of the head and does not call its `forward`. So the head must be a Linear layer
    that holds its whole weights while the model's `forward` runs: on one device, under DDP, ZeRO-1 and ZeRO-2, and
    under FSDP where the head belongs to the unit of the whole model, which is gathered when its `forward` starts.
    (accelerate's FSDP2 makes the head a unit of its own, which is gathered for the head's `forward` only.) Any other
    head computes logits by its own `forward`, in which adapters, quantised weights, and hooks that gather or move
    weights take part.

    Args:
        head (`torch.nn.Module`): The output embeddings.
    """
    if torch.compiler.is_compiling():
        return "the model is compiled"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, so it is adapted, quantised or sharded by itself"
    for kind in (type(weight) for weight in head.parameters(recurse=False)):
        if f"{kind.__module__}.{kind.__qualname__}" not in PLAIN_WEIGHTS:
            return f"a weight of the head is a {kind.__name__}"
    if hasattr(head.weight, "ds_id"):  # DeepSpeed gives an id to each parameter that it partitions
        return "ZeRO-3 partitions the weight of the head"
    # Not public, but torch has no other way to tell whether a module has hooks.
    if head._forward_pre_hooks or head._forward_hooks or head._backward_pre_hooks or head._backward_hooks:
        return "the head has hooks"
    if "forward" in vars(head):  # accelerate replaces it where a device map moves weights or inputs
        return "a device map places the head"
    return None


@functools.cache
def log_unfused(reason: str) -> None:
    """Log once why a loss that could do without logits is not fused with the head."""
    logger.info(f"the loss computes all logits of a batch at once: {reason}")


def _liger_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor:
    """The summed loss by Liger's kernel, which itself reads the number of labels back from the GPU."""
    if is_liger_kernel_available():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore_index, reduction="sum")
        return loss(weight, hidden_states, labels, bias)
    raise ImportError(
        "`use_liger_kernel` is True, but liger-kernel is not installed: `pip install liger-kernel`, or set it to "
        "False."
    )


class _ChunkedLoss(torch.autograd.Function):
    """The summed cross-entropy of a Linear layer's outputs, whose gradients are computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignore_index: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        wide = torch.promote_types(dtype, torch.float32)  # of all that is exponentiated, or summed over chunks
        held_weight, held_bias = weight, bias
        if autocast:  # converted once, and not for each chunk
            held_weight, held_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_states) if for_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if for_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if for_bias else None
        total = torch.zeros((), dtype=wide, device=hidden_states.device)
        all_losses = torch.zeros(len(labels), dtype=wide, device=hidden_states.device)
        rows = max(CHUNK_ELEMENTS // len(weight) // 16 * 16, 16)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), rows):
                chunk = slice(start, start + rows)
                states = hidden_states[chunk].to(dtype)
                logits = nn.functional.linear(states, held_weight, held_bias)
                kept = labels[chunk] != ignore_index
                losses, grad_logits = _losses_and_gradients(logits, labels[chunk].masked_fill(~kept, 0), wide)
                del logits
                if ctx.scale != 1:
                    grad_logits.mul_(ctx.scale)
                all_losses[chunk] = losses.masked_fill(~kept, 0)
                total += all_losses[chunk].sum()
                # Ignored tokens are left out of the products, which are smaller than the gradient of the logits.
                if grad_bias is not None:
                    grad_bias += kept.to(wide) @ grad_logits
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.to(dtype), states * kept[:, None])
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_logits.to(dtype) @ held_weight * kept[:, None]
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden_states.dtype, weight.dtype, None if bias is None else bias.dtype
        all_losses = all_losses.float()
        ctx.mark_non_differentiable(all_losses)
        return total, all_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of the fused loss are scaled in place, so `backward` can be called only once. Call the "
                "model with `skip_logits=False` for more."
            )
        factor = grad_output / ctx.scale
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            # In the factor's precision: multiplied in place, it would be rounded to that of the gradient first.
            None if gradient is None else gradient.to(factor.dtype).mul_(factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _losses_and_gradients(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of each token of a chunk, and its gradient for the logits, both in `dtype`."""
    log_probs = logits.log_softmax(-1, dtype=dtype)
    place = torch.arange(len(labels), device=labels.device), labels
    losses = -log_probs[place]
    gradients = log_probs.exp_()
    gradients[place] -= 1
    return losses, gradients


def _add_product(total: torch.Tensor, grad_logits: torch.Tensor, states: torch.Tensor) -> None:
    """Add `grad_logits.T @ states` to `total`; where that is wider, without a product of the size of the head."""
    if total.dtype == states.dtype:
        total.addmm_(grad_logits.T, states)
        return
    rows = max(CHUNK_ELEMENTS // states.shape[1], 1)
    for start in range(0, len(total), rows):
        words = slice(start, start + rows)
        total[words] += grad_logits[:, words].T @ states


__all__ = ["head_loss", "log_unfused", "select_labelled", "token_losses", "unfused_reason"]
