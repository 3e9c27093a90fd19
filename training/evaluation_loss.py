"""The loss on validation data, per supervised token, whatever the batches and however many processes.

The stock Trainer averages the batches' losses, each weighing the same, the last one and the one with the short answers
too. Two hooks that it offers give the mean over tokens instead: each row of a batch is reduced to the sum of its
tokens' losses and their number, the Trainer gathers these over processes (leaving out the rows that only fill up the
last batch), and `eval_loss` is the one sum over the other.
"""

from typing import Any

import torch
from transformers import EvalPrediction

from jnana.processing.data import IGNORED


def row_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` of the Trainer.

    Args:
        logits (`torch.Tensor`): `(batch_size, sequence_length, vocab_size)`, or only those of the places that predict
            a label, `(num_kept, vocab_size)`; or a tuple of model outputs that begins with them.
        labels (`torch.Tensor`): `(batch_size, sequence_length)`, -100 where nothing is to predict.

    Returns:
        `torch.Tensor`: `(batch_size, 2)`, for each row the summed loss and the number of its supervised tokens.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    supervised = labels[:, 1:] != IGNORED
    if logits.ndim == 3:
        logits = logits[:, :-1][supervised]
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction="none")
    sums = torch.zeros(supervised.shape, dtype=losses.dtype, device=losses.device).masked_scatter(supervised, losses)
    return torch.stack([sums.sum(1), supervised.sum(1)], dim=1)


def mean_token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the Trainer: `loss`, which takes the place of its own mean over batches."""
    total, count = prediction.predictions.astype("float64").sum(0)
    return {"loss": float(total / max(count, 1))}


def evaluation_hooks(on_bad_sample: str, world_size: int) -> dict[str, Any]:
    """The Trainer's arguments for an exact `eval_loss`.

    Several processes that skip bad samples may end up with different numbers of rows, which can't be gathered: they
    keep the Trainer's mean over batches.

    Args:
        on_bad_sample (`str`): `raise` or `skip`.
        world_size (`int`): Number of processes.
    """
    if on_bad_sample == "skip" and world_size > 1:
        return {}
    return {"preprocess_logits_for_metrics": row_losses, "compute_metrics": mean_token_loss}
