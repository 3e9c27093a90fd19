"""Takes the counts of a batch from the collator to the process that trains, past the model.

Workers of the dataloader make batches ahead of time, so the numbers travel in the batch itself, as one plain object
that neither accelerate nor the Trainer moves to the GPU. A forward pre-hook takes it out before the model sees it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from jnana.processing.data import BatchCounts, CountedBatch, count_tensors


COUNTS = "batch_counts"


class CountingCollator:
    """
    A collator whose batches carry their counts under the key `batch_counts`.

    Args:
        collator (`Callable`): Makes the batches, with counts ([`CountedBatch`]) or without.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collator(items)
        counts = batch.counts if isinstance(batch, CountedBatch) else None
        counts = counts or count_tensors(batch)
        return {**batch, **({"return_token_losses": True} if counts.sources else {}), COUNTS: counts}


class CountsHook:
    """
    The forward pre-hook that takes the counts out of a model's inputs.

    Args:
        on_training_batch (`Callable[[BatchCounts], None]`): Called for each batch that trains, not in evaluations.
        on_losses (`Callable[[BatchCounts, torch.Tensor | None], None]`, *optional*): Called after the forward pass of
            such a batch, if it is one of a mixture, with the loss of each label.
    """

    def __init__(
        self,
        on_training_batch: Callable[[BatchCounts], None],
        on_losses: Callable[[BatchCounts, torch.Tensor | None], None] | None = None,
    ):
        self.on_training_batch, self.on_losses = on_training_batch, on_losses
        self.waiting: tuple[nn.Module, BatchCounts] | None = None  # the module that is called, and its batch

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if COUNTS not in kwargs:
            return None
        kwargs = dict(kwargs)
        counts = kwargs.pop(COUNTS)
        if module.training and torch.is_grad_enabled():
            self.on_training_batch(counts)
            if counts.sources and self.on_losses is not None:
                self.waiting = module, counts
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The forward hook that takes the losses from a model's outputs."""
        if self.waiting is None or self.waiting[0] is not module:
            return
        (_, counts), self.waiting = self.waiting, None
        self.on_losses(counts, output.get("token_losses"))  # type: ignore[misc]  # `waiting` is set only with it


@contextlib.contextmanager
def counted_batches(
    trainer: Trainer,
    on_training_batch: Callable[[BatchCounts], None],
    on_losses: Callable[[BatchCounts, torch.Tensor | None], None] | None = None,
) -> Iterator[Callable[[], None]]:
    """
    Count the batches of a Trainer within the block.

    Args:
        trainer (`Trainer`): Its collator is wrapped, and its model gets the hook.
        on_training_batch, on_losses (`Callable`): As for [`CountsHook`].

    Yields:
        `Callable[[], None]`: to be called when the Trainer has wrapped its model (DDP, torch.compile, DeepSpeed):
        training calls the wrapper, evaluation the model inside, so both need the hook. In a wrapper the hook also
        runs outside of the compiled graph.
    """
    hook, collator, model = CountsHook(on_training_batch, on_losses), trainer.data_collator, trainer.model
    handles = []

    def add_to(module: nn.Module) -> None:
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if on_losses is not None:
            handles.append(module.register_forward_hook(hook.after))

    def add_to_wrapper() -> None:
        if trainer.model_wrapped is not model:
            add_to(trainer.model_wrapped)

    add_to(model)
    trainer.data_collator = CountingCollator(collator)
    try:
        yield add_to_wrapper
    finally:
        trainer.data_collator = collator
        for handle in handles:
            handle.remove()
