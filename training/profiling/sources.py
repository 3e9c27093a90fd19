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
        self.losses += sums_of_runs(losses, counts.label_sources, len(self.losses))

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


def sums_of_runs(values: torch.Tensor, runs: Sequence[tuple[int, int]], number: int) -> torch.Tensor:
    """
    Sums of values that lie in runs, in a few operations, however many runs there are.

    Args:
        values (`torch.Tensor` of shape `(num_values,)`): On any device; nothing of it is read back.
        runs (`Sequence[tuple[int, int]]`): For each run the index of its sum, and its number of values.
        number (`int`): Of sums.

    Returns:
        `torch.Tensor` of shape `(number,)`: The same for the same values, on a GPU too, where `index_add_` is not.
    """
    sums, numbers = torch.tensor(runs, dtype=torch.long).view(-1, 2).unbind(1)
    index = torch.repeat_interleave(sums, numbers)
    if values.device.type == "cuda":
        index = index.pin_memory()  # from other memory the copy would wait for the GPU
    index = index.to(values.device, non_blocking=True)
    belongs = index == torch.arange(number, device=values.device)[:, None]  # => [number, num_values]
    return torch.where(belongs, values, 0).sum(1)


def describe_sources(names: Sequence[str], figures: dict[str, float]) -> str:
    """The figures of a log in words."""
    texts = []
    for name in names:
        conversations, tokens, share = (figures[f"{kind}_{name}"] for kind in ("samples", "tokens", "share"))
        loss = f", loss {figures[f'loss_{name}']:.4f}" if f"loss_{name}" in figures else ""
        texts.append(f"{name}: {conversations:,.0f} conversations, {tokens:,.0f} tokens ({share:.1%}){loss}")
    return "; ".join(texts)
