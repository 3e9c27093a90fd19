"""The speed in the Trainer's log: what is counted, which time it is divided by, and who gets to see it."""

import dataclasses
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from jnana.processing.data import BatchCounts, CountedBatch
from jnana.training.profiling.batch_counts import counted_batches
from jnana.training.profiling.chips import ChipPeak, measured_peak, stated_peak
from jnana.training.profiling.speed import HostClock, SpeedCallback, Work, measured_speed
from jnana.training.stages import apply_stage
from tests.training.test_stages import batch, pair


KEYS = {"tokens_per_second", "samples_per_second", "images_per_second", "padding_share", "data_wait_share", "mfu"}
PEAK = ChipPeak(1e9, "a chip of the test")
RUN = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 2, "save_strategy": "no"}


class Counting:
    """A collator whose batches have 10 tokens without padding of 24, in 3 conversations about 2 images."""

    counts = BatchCounts(24, ((0, 6), (2, 4)), 7, 3, images=2, encoded_views=2, projected_views=2)

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait

    def __call__(self, items):
        self.wait()
        return CountedBatch(batch(), self.counts)


class SetClock(HostClock):
    """A clock that stands still unless it is told that time has passed."""

    def __init__(self):
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def trainer_of(folder, *callbacks, collator=None, **changes) -> Trainer:
    values = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(output_dir=str(folder), **{**values, **RUN, **changes})
    rows = [{"index": index} for index in range(64)]
    model = apply_stage(pair(), "align")
    collator = collator or Counting()
    return Trainer(model, args, collator, rows, eval_dataset=rows[:4], callbacks=list(callbacks))


def run(trainer: Trainer) -> tuple[SpeedCallback, list[dict]]:
    with measured_speed(trainer, peak=PEAK) as speed:
        trainer.train()
    return speed, trainer.state.log_history


class Reports(TrainerCallback):
    """A double of the callbacks of `report_to`."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.fixture
def reports(monkeypatch):
    """A name for `report_to`, and the callback that transformers then makes."""
    callback = Reports()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", callback)
    return callback


def test_every_report_and_the_history_get_the_figures(tmp_path, reports):
    speed, history = run(trainer_of(tmp_path, report_to="tensorboard"))
    assert [KEYS <= entry.keys() for entry in history] == [True] * 3  # steps 2 and 4, and the whole run
    assert [KEYS <= entry.keys() for entry in reports.seen] == [True] * 3
    assert history[0]["peak_memory_gb"] > 0.05
    assert speed.total.steps == 4


def test_an_ordinary_callback_would_come_too_late(tmp_path, reports):
    """The control: a callback given to the Trainer changes the log behind those that report it."""

    class Late(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logs["late"] = 1.0

    trainer_of(tmp_path, Late(), report_to="tensorboard").train()
    assert len(reports.seen) == 3
    assert not any("late" in entry for entry in reports.seen)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_that_trains_is_counted_once(tmp_path, accumulation, workers):
    values = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    speed, history = run(trainer_of(tmp_path, **values, eval_strategy="steps", eval_steps=1))
    batches, total = 4 * accumulation, speed.total
    assert (total.tokens, total.slots, total.supervised) == (10 * batches, 24 * batches, 7 * batches)
    assert (total.samples, total.images) == (3 * batches, 2 * batches)
    assert total.flops == speed.flops.batch(Counting.counts) * batches > 0
    assert next(entry for entry in history if "loss" in entry)["padding_share"] == pytest.approx(14 / 24)


def test_the_rates_are_those_of_the_training_time(tmp_path):
    class Slow(TrainerCallback):
        """Takes its time where samples are generated, checkpoints written and logs sent."""

        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.08)

        on_log = on_evaluate = on_save = on_step_end

    trainer = trainer_of(tmp_path, Slow(), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    start = time.perf_counter()
    speed, history = run(trainer)
    seconds = time.perf_counter() - start
    training = speed.total.waiting + speed.total.computing
    assert seconds - training > 4 * 4 * 0.08
    last = history[-1]
    assert last["tokens_per_second"] == pytest.approx(speed.total.tokens / training)
    assert last["mfu"] == pytest.approx(speed.total.flops / training / PEAK.flops)


def test_the_share_of_waiting_for_data(tmp_path):
    def share(seconds: float) -> float:
        clock = SetClock()
        trainer = trainer_of(tmp_path, collator=Counting(lambda: clock.pass_by(seconds)))
        trainer.model.register_forward_pre_hook(lambda *_: clock.pass_by(0.1))
        with measured_speed(trainer, peak=PEAK, clock=clock):
            trainer.train()
        return trainer.state.log_history[-1]["data_wait_share"]

    assert share(0.3) > 0.6 and share(0.0) == 0.0


def test_a_resumed_run_counts_its_own_steps(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2).train()
    clock = SetClock()
    trainer = trainer_of(tmp_path, collator=Counting(lambda: clock.pass_by(0.3)))
    with measured_speed(trainer, peak=PEAK, clock=clock) as speed:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (speed.total.steps, speed.total.tokens) == (2, 20)
    assert speed.total.waiting <= 0.31  # that of one step: data that was skipped, and the first batches, are not in it


def test_nothing_is_left_behind(tmp_path):
    trainer = trainer_of(tmp_path)
    collator, callbacks = trainer.data_collator, list(trainer.callback_handler.callbacks)
    run(trainer)
    assert trainer.data_collator is collator and trainer.callback_handler.callbacks == callbacks
    assert not trainer.model._forward_pre_hooks


class Double(nn.Module):
    def forward(self, values):
        return 2 * values


def test_the_hook_runs_in_front_of_a_compiled_model():
    model, graphs, counted = Double(), [], []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    trainer = SimpleNamespace(model=model, model_wrapped=model, data_collator=None)
    with counted_batches(trainer, counted.append) as add_to_wrapper:
        trainer.model_wrapped = compiled
        add_to_wrapper()
        for number in (3, 5, 7):  # other numbers must not be compiled anew
            counts = dataclasses.replace(Counting.counts, slots=number)
            assert compiled(values=torch.ones(2), batch_counts=counts).tolist() == [2, 2]
        model.eval()
        model(values=torch.ones(2), batch_counts=Counting.counts)  # as evaluation calls it
    assert [counts.slots for counts in counted] == [3, 5, 7] and len(graphs) == 1


def test_the_model_gets_the_tensors_only(tmp_path):
    trainer = trainer_of(tmp_path)
    given = []
    trainer.model.register_forward_pre_hook(lambda m, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    with measured_speed(trainer, peak=PEAK):
        trainer.model.register_forward_pre_hook(lambda m, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
        trainer.train()
        trainer.evaluate()
    assert "batch_counts" in given[0]  # the control: it is in the batch before the hook
    assert not any("batch_counts" in names for names in given[1::2]) and len(given) > 8


def test_the_sum_over_processes():
    work = Work(steps=4, tokens=100, slots=200, samples=8, images=6, flops=4e9, waiting=1.0, computing=3.0)
    figures = work.figures(processes=2, peak=4e9)  # each process took 2 seconds
    assert figures == {
        "tokens_per_second": 50,
        "samples_per_second": 4,
        "images_per_second": 3,
        "padding_share": 0.5,
        "data_wait_share": 0.25,
        "mfu": 0.5,
    }


def test_peaks_of_chips():
    def peak(name, dtype=torch.bfloat16):
        found = stated_peak(name, dtype)
        return found and found.flops / 1e12

    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989.5
    assert (peak("NVIDIA H100 PCIe"), peak("NVIDIA H100 NVL")) == (756.5, 835.5)
    assert peak("NVIDIA A100-SXM4-80GB") == peak("NVIDIA A100 80GB PCIe") == 312
    assert (peak("NVIDIA L4"), peak("NVIDIA L40S"), peak("NVIDIA A10"), peak("NVIDIA A10G")) == (121, 362, 125, None)
    assert (peak("Tesla T4", torch.float16), peak("Tesla T4")) == (65, None)  # it has no bfloat16 units
    assert peak("NVIDIA GeForce RTX 4090") == 165.2 and peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert peak("NVIDIA A100-SXM4-80GB", torch.float32) is None


def test_the_measured_peak_is_a_rate():
    state = torch.get_rng_state()
    rate = measured_peak(torch.device("cpu"), torch.float32, size=256)
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), state)
