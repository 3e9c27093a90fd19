"""Names in words why a run can't learn, while it runs: docs/log.md has the table of what is recognised.

Looked at are the gradient norm of each part that should train, the tokens with a label, the time spent waiting for
data, and in evaluations whether the loss depends on the images. The norms are computed on the device after each
backward pass; nothing is read from it before the Trainer logs, or every 50 steps where it logs rarely.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import get_int_from_env
from torch import nn
from transformers import Trainer, TrainerCallback

from jnana.processing.data import BatchCounts
from jnana.processing.data.encoding import usable_cores

from .profiling.batch_counts import COUNTS
from .profiling.speed import SpeedCallback, Work, measured_speed
from .stages import PARTS, part_of


logger = logging.getLogger(__name__)

LOOK_EVERY = 50  # steps, at the latest
# Steps without a gradient, or skipped by fp16's scaler; the first ones of LoRA and of closed gates have zeros.
PATIENCE = 10
WAITING = 0.3  # of the time
FEWEST_STEPS = 5  # that a share of waiting is told of
DEPENDS = 0.005  # of the loss: the least that other images must add to it
WARM_UP = 0.1  # of the run, at least: its answers need not depend on images yet
COMPARED_BATCHES = 2
# Where launchers write the number of the machine's processes: torchrun and accelerate, Intel MPI, Open MPI, MVAPICH2
LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
IMAGE_INPUTS = ("pixel_values", "image_features")

# What can be wrong and what to do about it, in the words of the log.
NO_GRADIENT = (
    "the gradient norm of {part} has been 0 for the last {steps} steps, so it does not learn. Its output does not "
    "reach the loss: {reason}"
)
NOT_FINITE = (
    "the gradient norm of {parts} is {value} in step {step}, and every weight that it updates becomes NaN. Stop the "
    "run and resume from a checkpoint before that step, with a lower learning_rate (now {rate:g}), more warmup_steps, "
    "max_grad_norm: 1, or bf16 instead of fp16"
)
LOSS_NOT_FINITE = (
    "the loss of steps {first} to {step} is {value}. Stop the run and resume from a checkpoint before these steps, "
    "with a lower learning_rate (now {rate:g}), or bf16 instead of fp16"
)
OVERFLOW = (
    "fp16: the scaler skipped the last {steps} updates, because gradients overflow; nothing is learnt. Use bf16, or "
    "float32 where the chip has no bfloat16 units"
)
NO_LABELS = (
    "no token of steps {first} to {step} is supervised, so the loss is NaN or 0 and nothing is learnt. Check that the "
    "chat template marks answers with {{% generation %}} and that labels are not -100 everywhere"
)
STARVED = (
    "{share:.0%} of the time of steps {first} to {step} went by waiting for data. The dataloader gives {given:,.1f} "
    "{what}/s with {workers} workers a process, and the steps could take {wanted:,.1f}. {remedy}"
)
MORE_WORKERS = (
    "Raise dataloader_num_workers to {needed} (this process has {cores} cores; docs/data.md has a table), keep the "
    "features of a frozen image encoder (feature_cache), or store smaller images"
)
FEW_CORES = (
    "That would take {needed} workers a process, and it has {cores} cores: keep the features of a frozen image "
    "encoder (feature_cache), or store smaller images; docs/data.md has a table"
)
BLIND = (
    "answers do not depend on the image: in step {step} the loss of {rows} validation rows{source} is {own:.4f} with "
    "their own images and {other:.4f} with exchanged ones. If later evaluations say so too, check that texts and "
    "images belong together and that the projector trains (projector_learning_rate)"
)


class DiagnosisCallback(TrainerCallback):
    """
    Warns about a run that can't learn; each fault once, but the one about images after every evaluation.

    Args:
        trainer (`Trainer`): The run's.
        speed (`SpeedCallback`): Counts supervised tokens and the time spent waiting for data; stands in front of this.

    Attributes:
        found (`list[str]`): The warnings so far.
    """

    def __init__(self, trainer: Trainer, speed: SpeedCallback):
        self.trainer, self.speed = trainer, speed
        self.found: list[str] = []
        self.named: set[str] = set()
        self.parts: dict[str, list[nn.Parameter]] = {}
        self.norms: list[torch.Tensor] = []  # of the steps since the last look, `(num_parts,)` each, on the device
        self.skipped: list[bool] = []  # whether fp16's scaler skipped the update of these steps
        self.last_gradient: dict[str, int] = {}  # by part, the last step with a gradient
        self.last_update = 0  # the last step that the scaler did not skip
        self.looked = self.logged = 0  # the steps of the last look, and of the last log
        self.pending = Work()  # of the steps after `pending_from`, whose share of waiting has not been judged
        self.pending_from = 0

    def warn(self, key: str, text: str) -> None:
        """Log a fault, unless it was logged before."""
        if key not in self.named:
            self.named.add(key)
            self.found.append(text)
            if self.trainer.is_world_process_zero():
                logger.warning(text)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        self.looked = self.logged = self.last_update = self.pending_from = step
        self.norms, self.skipped, self.pending = [], [], Work()  # of an attempt that ran out of memory
        # DeepSpeed keeps gradients in buffers of its own.
        self.parts = {} if args.deepspeed_plugin is not None else trained_parts(model)
        self.last_gradient = dict.fromkeys(self.parts, step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.parts:
            self.norms.append(torch.stack([gradient_norm(weights, args.device) for weights in self.parts.values()]))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.skipped.append(bool(getattr(optimizer, "step_was_skipped", False)))  # known to the host
        if not control.should_log and state.global_step - self.looked >= LOOK_EVERY:
            self.pending = Work()  # the sums begin at the last log
            self.judge_work(self.speed.of_all_processes(), state.global_step, args.world_size)
            self.look_at_gradients(state.global_step)

    def look_at_gradients(self, step: int) -> None:
        """Read the norms of the steps since the last look."""
        first, self.looked = self.looked + 1, step
        if "labels" in self.named:  # of which gradients of 0 and NaN are a consequence
            self.norms, self.skipped = [], []
            return
        for number, skipped in enumerate(self.skipped, start=first):
            self.last_update = self.last_update if skipped else number
        if step - self.last_update >= PATIENCE:
            self.warn("overflow", OVERFLOW.format(steps=step - self.last_update))
        if self.norms:
            # Each process sees its shards: their squares are summed. Equal copies (DDP) are summed too.
            squares = [norm**2 for norms in torch.stack(self.norms).tolist() for norm in norms]
            rows = self.speed.over_processes(squares).sum(0).view(-1, len(self.parts)).tolist()
            for number, skipped, row in zip(range(first, step + 1), self.skipped, rows, strict=True):
                self.judge_norms(number, skipped, dict(zip(self.parts, row, strict=True)))
        self.norms, self.skipped = [], []
        for part, last in self.last_gradient.items():
            if step - last >= PATIENCE:
                reason = "check what the batches hold, and dtypes that round small gradients to 0"
                if part == "multi_modal_projector" and not self.speed.total.images + self.speed.here.images:
                    reason = "the batches hold no images"
                self.warn(f"0 {part}", NO_GRADIENT.format(part=part, steps=step - last, reason=reason))

    def judge_norms(self, step: int, skipped: bool, squares: dict[str, float]) -> None:
        """Look at the gradients of one step."""
        wrong = {part: value for part, value in squares.items() if not math.isfinite(value)}
        if wrong and not skipped:
            value = "NaN" if any(map(math.isnan, wrong.values())) else "infinite"
            values = {"parts": " and ".join(wrong), "value": value, "step": step, "rate": self.rate}
            self.warn("not finite", NOT_FINITE.format(**values))
        self.last_gradient |= {part: step for part, value in squares.items() if value != 0}

    @property
    def rate(self) -> float:
        return self.trainer.args.learning_rate

    def on_log(self, args, state, control, logs=None, **kwargs):
        step = state.global_step
        if "loss" in logs:
            self.judge_work(self.speed.interval, step, args.world_size)
            self.look_at_gradients(step)
            if not math.isfinite(logs["loss"]):
                values = {"first": self.logged + 1, "step": step, "value": logs["loss"], "rate": self.rate}
                self.warn("loss", LOSS_NOT_FINITE.format(**values))
            self.logged = step
        for name in [name for name in logs if name.startswith("eval_") and name.endswith("loss")]:
            self.compare_images(logs, state, name.removesuffix("loss"))

    def judge_work(self, work: Work, step: int, processes: int) -> None:
        """Look at the labels, and at the time spent waiting for data, of the steps since the last log."""
        if not work.supervised:
            self.warn("labels", NO_LABELS.format(first=self.logged + 1, step=step))
        if not self.pending.steps:
            self.pending_from = self.logged
        self.pending.add(work)
        if self.pending.steps < FEWEST_STEPS * processes:
            return
        done, self.pending = self.pending, Work()
        share = done.waiting / max(done.waiting + done.computing, 1e-9)
        if share > WAITING:
            workers = self.trainer.args.dataloader_num_workers
            values = {"first": self.pending_from + 1, "step": step, "share": share, "workers": workers}
            values |= feeding(done, workers, processes)
            remedy = MORE_WORKERS if values["needed"] <= values["cores"] else FEW_CORES
            self.warn("starved", STARVED.format(**values, remedy=remedy.format(**values)))

    def compare_images(self, logs: dict[str, float], state, prefix: str) -> None:
        """Compare the loss of a few validation rows with their own images and with exchanged ones.

        All processes take the same rows, so that a sharded model runs equally often in each.

        Args:
            logs (`dict[str, float]`): The log of the evaluation.
            state (`TrainerState`): Its last entry is a copy of the log.
            prefix (`str`): Of the names in it: `eval_`, or `eval_<name>_` of one of several validation sources.
        """
        dataset, args, source = self.trainer.eval_dataset, self.trainer.args, ""
        if isinstance(dataset, dict):
            name = prefix.removeprefix("eval_").removesuffix("_")
            dataset, source = dataset.get(name), f" of {name}"
        if not hasattr(dataset, "__getitem__"):
            return
        size = args.per_device_eval_batch_size
        own = other = total = 0.0
        rows = min(len(dataset), COMPARED_BATCHES * size)
        for start in range(0, rows, size):
            batch = self.trainer.data_collator([dataset[index] for index in range(start, min(start + size, rows))])
            exchanged = with_exchanged_images(batch)
            if exchanged is None:
                continue
            counts: BatchCounts = batch[COUNTS]
            own += counts.supervised * self.loss(batch)
            other += counts.supervised * self.loss(exchanged)
            total += counts.supervised
        if not total:
            return
        own, other = own / total, other / total
        logs[f"{prefix}image_gain"] = state.log_history[-1][f"{prefix}image_gain"] = other - own
        warm_up = max(args.get_warmup_steps(state.max_steps), WARM_UP * state.max_steps)
        if other - own < DEPENDS * own and state.global_step > warm_up:
            text = BLIND.format(step=state.global_step, rows=rows, source=source, own=own, other=other)
            self.warn(f"blind {prefix}{state.global_step}", text)

    def loss(self, batch: dict[str, Any]) -> float:
        """The loss of a batch, without gradients; the model is in evaluation mode."""
        trainer = self.trainer
        model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        return trainer.prediction_step(model, batch, prediction_loss_only=True)[0].item()


def feeding(work: Work, workers: int, processes: int) -> dict[str, Any]:
    """
    What the dataloader gives, and how many of its workers would feed the steps.

    Args:
        work (`Work`): Of all processes, waiting for data.
        workers (`int`): The dataloader's, of each process; 0 where the process itself makes the batches.
        processes (`int`): Their number.

    Returns:
        `dict`: `what` is counted (images, or conversations where there are none), how many of them a second are
            `given`, and `wanted` by steps that do not wait, the workers `needed` in each process, and its `cores`:
            the processes of a machine share them.
    """
    number, what = (work.images, "images") if work.images else (work.samples, "conversations")
    computing = max(work.computing, 1e-9)
    # A process that makes its batches itself does so while it waits; workers make them all the time.
    busy = workers * (work.waiting + work.computing) if workers else work.waiting
    return {
        "what": what,
        "given": number * processes / (work.waiting + work.computing),
        "wanted": number * processes / computing,
        "needed": max(math.ceil(busy / computing), workers + 1),
        "cores": max(1, usable_cores(most=None) // get_int_from_env(LOCAL_PROCESSES, 1)),
    }


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights that train, by part."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            found[part_of(name)].append(weight)
    return {part: weights for part, weights in found.items() if weights}


def gradient_norm(weights: list[nn.Parameter], device: torch.device) -> torch.Tensor:
    """The norm of the gradients that this process holds, on the device; 0 if there are none."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return torch.zeros((), device=device)
    # FSDP2's gradients are DTensors, whose norm would be exchanged between the processes in every step.
    local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
    return nn.utils.get_total_norm(local).float().to(device)


def with_exchanged_images(batch: dict[str, Any]) -> dict[str, Any] | None:
    """A batch in which each image is the next one, or one colour where there is one only; `None` without images."""
    name = next((name for name in IMAGE_INPUTS if batch.get(name) is not None and len(batch[name])), None)
    if name is None:
        return None
    images = batch[name]
    if len(images) > 1:
        return {**batch, name: images.roll(1, 0)}
    if images.dtype == torch.uint8:  # zeros are the mean of normalised pixels
        images = images.float()
    return {**{key: value for key, value in batch.items() if key != "pixel_table"}, name: torch.zeros_like(images)}


@contextlib.contextmanager
def watched(trainer: Trainer, **options: Any) -> Iterator[DiagnosisCallback]:
    """
    Log the speed of the training within the block ([`measured_speed`]), and name what keeps it from learning.

    Args:
        trainer (`Trainer`): Of the run.
        **options: For [`SpeedCallback`].
    """
    with measured_speed(trainer, **options) as speed:
        callback = DiagnosisCallback(trainer, speed)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(callbacks.index(speed) + 1, callback)
        try:
            yield callback
        finally:
            trainer.remove_callback(callback)
