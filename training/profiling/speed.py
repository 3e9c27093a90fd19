"""How fast a run trains: tokens and samples a second, padding, waiting for data, MFU and peak memory, in its log.

The figures are added to the log that the Trainer writes anyway, before any other callback sees it, so `trainer_state`,
the console and every `report_to` get them. Between two logs each process only adds up integers that came with the
batches and marks moments in time; the processes exchange their sums when the Trainer logs.

A step has three moments: its batches are asked for, they are there, its optimizer step is done. What happens between
the end of a step and the next request (logging, evaluation, samples, checkpoints) is not training time. On a GPU the
moments are events in its stream, so the time between the first two is the time that the GPU had nothing to do.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from jnana.processing.data import BatchCounts
from jnana.training.distributed import unpartitioned
from jnana.training.saving.checkpoints import size_text

from .batch_counts import counted_batches
from .chips import ChipPeak, chip_peak
from .flops import ModelFlops
from .sources import SourcesCallback


logger = logging.getLogger(__name__)

FEWEST_MARKS = 500  # steps whose times are added up at the latest, for runs that log rarely


class Clock(Protocol):
    """Moments in time, and the seconds between two of them."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The clock of the process."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """The clock of a GPU. Marking does not wait for it; `seconds` does, if the GPU has not reached the mark yet."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000  # milliseconds


@dataclass
class Work:
    """What some steps did, in one process or in all of them.

    Args:
        steps (`int`): Optimizer steps.
        tokens (`int`): Tokens without padding; those of a shared prefix count once.
        slots (`int`): Tokens with padding.
        supervised (`int`): Tokens with a label.
        samples (`int`): Conversations.
        images (`int`): Images; one that several conversations of a batch are about counts once.
        flops (`float`): Operations of the model ([`ModelFlops`]).
        waiting (`float`): Seconds in which the processes waited for data.
        computing (`float`): Seconds of the steps themselves.
    """

    steps: float = 0
    tokens: float = 0
    slots: float = 0
    supervised: float = 0
    samples: float = 0
    images: float = 0
    flops: float = 0
    waiting: float = 0
    computing: float = 0

    def add(self, other: "Work") -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def figures(self, processes: int, peak: float) -> dict[str, float]:
        """
        The values for the log.

        Args:
            processes (`int`): Processes that the sums are over; times are their mean.
            peak (`float`): Operations a second of all their chips.
        """
        seconds = max((self.waiting + self.computing) / processes, 1e-9)
        found = {
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.samples / seconds,
            "padding_share": 1 - self.tokens / max(self.slots, 1),
            "data_wait_share": self.waiting / processes / seconds,
            "mfu": self.flops / seconds / peak,
        }
        if self.images:
            found["images_per_second"] = self.images / seconds
        return found


class SpeedCallback(TrainerCallback):
    """
    Adds the figures to the log. It must stand in front of the callbacks that report the log; [`measured_speed`] puts
    it there.

    Args:
        trainer (`Trainer`): The run's.
        peak (`ChipPeak`, *optional*): Of one device; default: [`chip_peak`] of the run's.
        clock (`Clock`, *optional*): Default: the device's.

    Attributes:
        total (`Work`): Of all processes, since the start of this process, up to the last log.
        interval (`Work`): Of all processes, between the last two logs.
    """

    def __init__(self, trainer: Trainer, peak: ChipPeak | None = None, clock: Clock | None = None):
        self.trainer, self.peak = trainer, peak
        cuda = trainer.args.device.type == "cuda"
        self.clock: Clock = clock or (CudaClock() if cuda else HostClock())
        with unpartitioned(trainer.args, whole=True):  # builds a tower on the meta device
            self.flops = ModelFlops.of(trainer.model)  # before DDP or FSDP wraps it
        self.here = Work()  # of this process, since the last log
        self.interval, self.total = Work(), Work()
        self.marks: list[tuple[Any, Any, Any]] = []  # of the steps whose times have not been added up
        self.asked: Any = None  # when the batches of the next step were asked for
        self.ready: Any = None  # when they were there
        self.add_hook_to_wrapper: Any = None

    def count(self, counts: BatchCounts) -> None:
        """Add a batch of this process; called before its forward pass."""
        self.here.add(
            Work(
                tokens=counts.tokens,
                slots=counts.slots,
                supervised=counts.supervised,
                samples=counts.conversations,
                images=counts.images,
                flops=self.flops.batch(counts),
            )
        )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.add_hook_to_wrapper()
        self.here, self.marks, self.asked = Work(), [], None  # of an attempt that ran out of memory
        if args.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        if self.peak is None:
            self.peak = chip_peak(args.device, computing_dtype(args, model))
        logger.info(f"mfu is relative to {num_chips(args, model)} x {self.peak}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.ready = self.clock.mark()

    def on_step_end(self, args, state, control, **kwargs):
        self.here.steps += 1
        self.marks.append((self.asked, self.ready, self.clock.mark()))
        if len(self.marks) >= FEWEST_MARKS:
            self.add_up_times()

    def add_up_times(self) -> None:
        """Turn marks into seconds. Before the first step workers start and a resumed run skips data: not counted."""
        for asked, ready, done in self.marks:
            self.here.computing += self.clock.seconds(ready, done)
            self.here.waiting += 0.0 if asked is None else self.clock.seconds(asked, ready)
        self.marks = []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            self.exchange()
            self.report(logs, state, self.interval, model)
        elif "train_runtime" in logs:
            if self.marks or self.here.steps:
                self.exchange()
            if self.total.steps:
                self.report(logs, state, self.total, model)
                logger.info(self.describe(logs))

    def exchange(self) -> None:
        """Begin the next interval."""
        self.interval = self.of_all_processes()
        self.total.add(self.interval)
        self.here = Work()

    def of_all_processes(self) -> Work:
        """What the processes did since the last log, summed; every process has to ask."""
        self.add_up_times()
        values = [getattr(self.here, field.name) for field in fields(Work)]
        return Work(*self.over_processes(values).sum(0).tolist())

    def over_processes(self, values: list[float]) -> torch.Tensor:
        """Numbers of each process, as `(num_processes, len(values))`."""
        args = self.trainer.args
        if args.world_size == 1:
            return torch.tensor([values], dtype=torch.float64)
        return self.trainer.accelerator.gather(torch.tensor([values], dtype=torch.float64, device=args.device))

    def report(self, logs: dict[str, float], state, work: Work, model: nn.Module | None) -> None:
        """Add the figures to a log, and to its copy in the Trainer's history."""
        args = self.trainer.args
        chips = num_chips(args, model) * args.world_size
        found = work.figures(args.world_size, chips * self.peak.flops)  # type: ignore[union-attr]  # training began
        memory = peak_memory(args.device)
        if memory is not None:
            found["peak_memory_gb"] = self.over_processes([memory]).max().item() / 1e9
        logs.update(found)
        state.log_history[-1].update(found)

    def describe(self, figures: dict[str, float]) -> str:
        """One line about the whole run."""
        total, args = self.total, self.trainer.args
        seconds = (total.waiting + total.computing) / args.world_size
        images = f" and {total.images:,.0f} images" if total.images else ""
        return (
            f"trained {total.tokens:,.0f} tokens{images} in {seconds:,.1f} s (evaluation and saving not counted): "
            f"{describe_speed(figures)}"
        )


def describe_speed(figures: dict[str, float]) -> str:
    """The figures of a log in words."""
    images = f", {figures['images_per_second']:,.1f} images/s" if "images_per_second" in figures else ""
    memory = f", peak memory {size_text(1e9 * figures['peak_memory_gb'])}" if "peak_memory_gb" in figures else ""
    return (
        f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['samples_per_second']:,.1f} samples/s{images}, "
        f"{figures['padding_share']:.1%} padding, {figures['data_wait_share']:.1%} of the time waiting for data, MFU "
        f"{figures['mfu']:.1%}{memory}"
    )


class RequestCallback(TrainerCallback):
    """Marks the moment in which the batches of the next step are asked for: when all callbacks are done.

    Args:
        speed (`SpeedCallback`): Keeps the mark.
    """

    def __init__(self, speed: SpeedCallback):
        self.speed = speed

    def mark(self, args, state, control, **kwargs):
        self.speed.asked = self.speed.clock.mark()

    on_step_end = on_log = on_evaluate = on_save = mark


@contextlib.contextmanager
def measured_speed(trainer: Trainer, **options: Any) -> Iterator[SpeedCallback]:
    """
    Measure and log the speed of the training within the block.

    Args:
        trainer (`Trainer`): Of the run; transformers puts the callbacks given to it behind those that report.
        **options: For [`SpeedCallback`].
    """
    speed = SpeedCallback(trainer, **options)
    request = RequestCallback(speed)
    names = getattr(trainer.data_collator, "sources", ())
    sources = SourcesCallback(names, speed.over_processes) if names else None
    callbacks = trainer.callback_handler.callbacks
    first = 1 + max(i for i, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback))
    callbacks[first:first] = [speed, *([sources] if sources else [])]
    callbacks.append(request)
    try:
        with counted_batches(trainer, speed.count, sources.add if sources else None) as speed.add_hook_to_wrapper:
            yield speed
    finally:
        for callback in (speed, request, *([sources] if sources else [])):
            trainer.remove_callback(callback)


def computing_dtype(args, model: nn.Module) -> torch.dtype:
    """The dtype of the matrix products: autocast's, or the weights'."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    return model.dtype  # type: ignore[return-value]  # a PreTrainedModel, or PEFT's wrapper of one


def num_chips(args, model: nn.Module | None) -> int:
    """The devices of one process: several where `device_map` spreads the layers."""
    return len(set(getattr(model, "hf_device_map", {"": args.device}).values()))


def peak_memory(device: torch.device) -> int | None:
    """Bytes: allocated at most on one of the GPUs since training began, or on a CPU used by the process in its life.

    `None` where the system does not tell (Windows without a GPU).
    """
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    if device.type != "cpu":  # Apple's and Intel's GPUs: the process's own memory says nothing about theirs
        return None
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
