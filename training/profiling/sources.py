"""The loss, the tokens and the share of each source of a mixture, in the log of the run.

The collator counts on the host. The losses of the labels come with the model's outputs (`return_token_losses`) and are
added up on the device; they are read when the Trainer logs.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from transformers import TrainerCallback

from jnana.processing.data import BatchCounts


logger = logging.getLogger(__name__)

COUNTED = ("conversations", "tokens", "supervised")


class SourcesCallback(TrainerCallback):
    """
    Adds the figures to the log. It must stand in front of the callbacks that report the log.

    Args:
        names (`Sequence[str]`): Of the sources.
        over_processes (`Callable[[list[float]], torch.Tensor]`): Gives the numbers of each process, as
            `(num_processes, len(numbers))`.
    """

    def __init__(self, names: Sequence[str], over_processes: Callable[[list[float]], torch.Tensor]):
        self.names, self.over_processes = list(names), over_processes
        self.losses: torch.Tensor | None = None  # summed, of each source, then of labels of none; on the device
        self.counts = self.no_counts()
        self.total = torch.zeros(len(names), len(COUNTED) + 1, dtype=torch.float64)
        self.without_losses = False

    def no_counts(self) -> list[list[int]]:
        return [[0] * len(COUNTED) for _ in self.names]

    def on_train_begin(self, args, state, control, **kwargs):
        self.losses, self.counts, self.total = None, self.no_counts(), torch.zeros_like(self.total)

    def add(self, counts: BatchCounts, losses: torch.Tensor | None) -> None:
        """
        Add a batch that trains.

        Args:
            counts (`BatchCounts`): Of the batch, with `sources`.
            losses (`torch.Tensor` of shape `(num_labels,)`, *optional*): Of the labels, in the order of their
                positions; Liger's kernel gives none.
        """
        for numbers, source in zip(self.counts, counts.sources, strict=True):
            for index, name in enumerate(COUNTED):
                numbers[index] += getattr(source, name)
        if losses is None:
            if not self.without_losses:
                logger.info("the losses of single sources are not logged: Liger's kernel gives their sum only")
            self.without_losses = True
            return
        if self.losses is None:
            self.losses = torch.zeros(len(self.names) + 1, device=losses.device)
        # sliced by numbers that the host knows: no index has to be sent to a GPU
        start = 0
        for source, number in counts.label_sources:
            self.losses[source] += losses[start : start + number].sum()
            start += number

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.report(logs, state, self.exchange())
        elif "train_runtime" in logs:
            self.exchange()
            if self.total.any():
                self.report(logs, state, self.total)
                logger.info(describe_sources(self.names, logs))

    def exchange(self) -> torch.Tensor:
        """The sums of all processes since the last log, `(num_sources, 4)`: the counts, then the loss."""
        losses = [0.0] * len(self.names) if self.losses is None else self.losses.tolist()[: len(self.names)]
        values = [[*numbers, loss] for numbers, loss in zip(self.counts, losses, strict=True)]
        found = self.over_processes([value for row in values for value in row]).sum(0).cpu().view(self.total.shape)
        self.total += found
        self.losses, self.counts = None, self.no_counts()
        return found

    def report(self, logs: dict[str, float], state, sums: torch.Tensor) -> None:
        """Add the figures to a log, and to its copy in the Trainer's history."""
        found = {}
        tokens_of_all = max(sums[:, COUNTED.index("tokens")].sum().item(), 1)
        for name, (conversations, tokens, supervised, loss) in zip(self.names, sums.tolist(), strict=True):
            if supervised and not self.without_losses:
                found[f"loss_{name}"] = loss / supervised
            found[f"samples_{name}"] = conversations
            found[f"tokens_{name}"] = tokens
            found[f"share_{name}"] = tokens / tokens_of_all
        logs.update(found)
        state.log_history[-1].update(found)


def describe_sources(names: Sequence[str], figures: dict[str, float]) -> str:
    """The figures of a log in words."""
    texts = []
    for name in names:
        conversations, tokens, share = (figures[f"{kind}_{name}"] for kind in ("samples", "tokens", "share"))
        loss = f", loss {figures[f'loss_{name}']:.4f}" if f"loss_{name}" in figures else ""
        texts.append(f"{name}: {conversations:,.0f} conversations, {tokens:,.0f} tokens ({share:.1%}){loss}")
    return "; ".join(texts)
