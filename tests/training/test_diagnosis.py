"""Runs that can't learn, each sabotaged in one way, and what the log says about them within 50 steps."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from jnana.modeling import normalize_pixels
from jnana.processing.data.encoding import usable_cores
from jnana.training.diagnosis import DiagnosisCallback, feeding, gradient_norm, watched, with_exchanged_images
from jnana.training.options.arguments import LoraArguments
from jnana.training.profiling.speed import Work
from jnana.training.stages import apply_stage
from tests.training.profiling.test_speed import PEAK
from tests.training.test_stages import pair


DOCS = Path(__file__).parents[2] / "docs" / "log.md"
BRIGHT, DARK = 40, 50  # the tokens of the two answers


class Images:
    """A collator of rows about a bright or a dark image, whose answer says which."""

    def __init__(self, grey: bool = False, unlabelled: bool = False, seconds: float = 0.0):
        self.grey, self.unlabelled, self.seconds = grey, unlabelled, seconds

    def __call__(self, items):
        time.sleep(self.seconds)
        bright = torch.tensor([item["bright"] for item in items])
        ids = torch.tensor([[5, 300, 300, 300, 300, 7, 8, 9]]).repeat(len(items), 1)
        ids[:, -1] = torch.where(bright, BRIGHT, DARK)
        labels = torch.full_like(ids, -100)
        if not self.unlabelled:
            labels[:, -1] = ids[:, -1]
        values = torch.zeros(len(items)) if self.grey else bright * 2.0 - 1
        return {"input_ids": ids, "labels": labels, "pixel_values": values[:, None, None, None].expand(-1, 3, 24, 24)}


def trainer_of(folder, collator, **changes) -> Trainer:
    values = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 10}
    values |= {"eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no", "report_to": "none"}
    values |= {"use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "label_names": ["labels"]}
    args = TrainingArguments(output_dir=str(folder), **{**values, **changes})
    rows = [{"bright": index % 3 == 0} for index in range(48)]
    model = apply_stage(pair(), "sft", LoraArguments(lora_r=0))
    return Trainer(model, args, collator, rows, eval_dataset=rows[:8])


def detach_projector(trainer: Trainer) -> None:
    projector = trainer.model.model.multi_modal_projector
    projector.register_forward_hook(lambda module, args, outputs: [output.detach() for output in outputs])


SABOTAGES = {
    "the output of the projector is detached": {"break": detach_projector},
    "`learning_rate: 1e20`": {"options": {"learning_rate": 1e20, "max_steps": 10, "logging_nan_inf_filter": False}},
    "every label is -100": {"collator": Images(unlabelled=True), "options": {"max_steps": 10}},
    "every image is the same": {"collator": Images(grey=True)},
    "the collator takes 0.3 s a batch": {"collator": Images(seconds=0.3), "options": {"max_steps": 10}},
}


def found(folder, sabotage: dict) -> list[str]:
    trainer = trainer_of(folder, sabotage.get("collator", Images()), **sabotage.get("options", {}))
    sabotage.get("break", lambda trainer: None)(trainer)
    with watched(trainer, peak=PEAK) as diagnosis:
        trainer.train()
    return diagnosis.found


def headline(message: str) -> str:
    """A message up to its remedy."""
    return re.split(r"\. [A-Z]|, so it does|, and every|, so the", message)[0]


def without_figures(text: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "N", text)


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotaged_run_is_named(tmp_path, name, caplog):
    messages = found(tmp_path, SABOTAGES[name])
    assert messages and all(message in caplog.text for message in messages)
    if "learning_rate" in name:
        assert messages[1].startswith("the loss of steps 1 to 10 is nan. Stop the run")
    row = f"| {name} | {headline(messages[0])} |"
    assert without_figures(row) in without_figures(DOCS.read_text()), f"docs/log.md lacks: {row}"


def test_the_table_has_no_other_rows():
    table = DOCS.read_text().partition("| what was done to the run |")[2].partition("\n\n")[0]
    assert table.count("\n") == 1 + len(SABOTAGES)


def test_a_run_that_learns_is_not_named(tmp_path):
    """The control; the data is the same, and its answers do depend on the images in the end."""
    trainer = trainer_of(tmp_path, Images(), max_steps=30, eval_steps=15)
    with watched(trainer, peak=PEAK) as diagnosis:
        trainer.train()
    assert diagnosis.found == []
    gains = [entry["eval_image_gain"] for entry in trainer.state.log_history if "eval_image_gain" in entry]
    assert len(gains) == 2 and gains[-1] > 0.1


def test_a_run_that_logs_rarely_is_looked_at_after_50_steps(tmp_path):
    options = {"max_steps": 50, "per_device_train_batch_size": 1, "logging_strategy": "no", "eval_strategy": "no"}
    trainer = trainer_of(tmp_path, Images(unlabelled=True), **options)
    with watched(trainer, peak=PEAK) as diagnosis:
        trainer.train()
    assert diagnosis.found[0].startswith("no token of steps 1 to 50 is supervised")


def test_a_starved_run_that_logs_rarely_is_named_after_50_steps():
    """The control: a loader that keeps up."""
    for waiting in (1.0, 0.1):
        run = Doubles()
        run.diagnosis.speed.of_all_processes = lambda waiting=waiting: Work(
            steps=50, supervised=1, images=1, computing=1, waiting=waiting
        )
        for _ in range(50):
            run.step(projector=1.0)
        starved = [text for text in run.diagnosis.found if text.startswith("50% of the time of steps 1 to 50 went by")]
        assert len(starved) == (waiting == 1.0) == len(run.diagnosis.found)


@pytest.mark.parametrize(
    ("workers", "processes", "waiting", "needed", "given", "wanted"),
    [
        (0, 1, 6.0, 2, 10, 25),  # each step takes 4 s, and making its images 6: two workers make more than it takes
        (0, 1, 2.0, 1, 16.7, 25),
        (3, 1, 6.0, 8, 10, 25),  # three workers make a batch in 10 s
        (3, 2, 12.0, 8, 10, 25),  # two processes, whose times are summed
    ],
)
def test_the_workers_that_would_feed_the_steps(workers, processes, waiting, needed, given, wanted):
    work = Work(steps=5 * processes, images=100, samples=500, computing=4.0 * processes, waiting=waiting)
    found = feeding(work, workers, processes)
    assert (found["needed"], found["what"]) == (needed, "images") and found["cores"] >= 1
    assert (round(found["given"], 1), round(found["wanted"], 1)) == (given, wanted)
    text = feeding(Work(steps=5, samples=50, computing=1, waiting=1), 1, 1)
    assert (text["what"], text["given"], text["wanted"], text["needed"]) == ("conversations", 25, 50, 2)


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(96)), raising=False)
    monkeypatch.setattr("jnana.processing.data.encoding.CPU_SHARE", Path("/missing"))
    work = Work(steps=5, images=100, samples=100, computing=1.0, waiting=3.0)
    assert feeding(work, 2, 1)["cores"] == 96  # not only as many as prepare rows
    assert usable_cores() == 32
    for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        with monkeypatch.context() as launched:
            launched.setenv(name, "8")
            assert feeding(work, 2, 8)["cores"] == 12


@pytest.mark.parametrize(("cores", "raises"), [(2, True), (1, False)])
def test_workers_are_not_recommended_beyond_the_cores(monkeypatch, cores, raises):
    monkeypatch.setattr("jnana.training.diagnosis.usable_cores", lambda most: cores)
    run = Doubles()
    run.diagnosis.judge_work(Work(steps=50, supervised=1, images=1, computing=1, waiting=1.5), 50, 1)
    (text,) = run.diagnosis.found
    assert ("Raise dataloader_num_workers to 2 (this process has 2 cores" in text) == raises
    assert ("That would take 2 workers a process, and it has 1 cores: keep the features" in text) != raises
    assert "feature_cache" in text and "store smaller images" in text


def test_exchanged_images_of_a_batch_of_bytes():
    pixels, table = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8), torch.randn(3, 256)
    several = with_exchanged_images({"pixel_values": pixels, "pixel_table": table})
    assert torch.equal(several["pixel_values"], pixels.flip(0)) and several["pixel_table"] is table
    alone = with_exchanged_images({"pixel_values": pixels[:1], "pixel_table": table})
    floats = with_exchanged_images({"pixel_values": normalize_pixels(pixels[:1], table)})
    assert alone.keys() == floats.keys() == {"pixel_values"}
    assert torch.equal(alone["pixel_values"], floats["pixel_values"]) and alone["pixel_values"].dtype == torch.float32


class Doubles:
    """A diagnosis without a run, fed step by step."""

    def __init__(self):
        values = {"device": torch.device("cpu"), "deepspeed_plugin": None, "world_size": 1, "learning_rate": 1e-4}
        values |= {"dataloader_num_workers": 0}
        self.args = SimpleNamespace(**values)
        trainer = SimpleNamespace(args=self.args, is_world_process_zero=lambda: True)
        over = lambda values: torch.tensor([values], dtype=torch.float64)  # noqa: E731
        work = Work(steps=5, supervised=1, images=1, computing=1)
        speed = SimpleNamespace(over_processes=over, total=work, here=work, interval=work)
        self.diagnosis = DiagnosisCallback(trainer, speed)
        self.state, self.control = TrainerState(), TrainerControl()
        self.model = torch.nn.ModuleDict(
            {"multi_modal_projector": torch.nn.Linear(2, 1), "lm_head": torch.nn.Linear(1, 1)}
        )
        self.diagnosis.on_train_begin(self.args, self.state, self.control, model=self.model)

    def step(self, projector: float, head: float = 1.0, skipped: bool = False, log: bool = False) -> None:
        for name, value in (("multi_modal_projector", projector), ("lm_head", head)):
            self.model[name].weight.grad = torch.full_like(self.model[name].weight, value)
        self.state.global_step += 1
        self.control.should_log = log
        self.diagnosis.on_pre_optimizer_step(self.args, self.state, self.control)
        optimizer = SimpleNamespace(step_was_skipped=skipped)
        self.diagnosis.on_step_end(self.args, self.state, self.control, optimizer=optimizer)
        if log:
            self.diagnosis.on_log(self.args, self.state, self.control, logs={"loss": 1.0})


def test_closed_gates_may_have_no_gradient_at_first():
    run = Doubles()
    for step in range(1, 31):
        run.step(projector=float(step > 8), log=step % 5 == 0)
    assert run.diagnosis.found == []
    for step in range(1, 16):
        run.step(projector=0.0, log=step % 5 == 0)
    assert [text.split(",")[0] for text in run.diagnosis.found] == [
        "the gradient norm of multi_modal_projector has been 0 for the last 10 steps"
    ]


def test_the_step_of_the_first_nan_is_named():
    run = Doubles()
    for step in range(1, 21):
        run.step(projector=float("nan") if step >= 13 else 1.0, log=step % 10 == 0)
    assert len(run.diagnosis.found) == 1
    assert run.diagnosis.found[0].startswith("the gradient norm of multi_modal_projector is NaN in step 13,")


def test_steps_that_the_scaler_skips():
    run = Doubles()
    for step in range(1, 21):  # the scale starts too high and is halved until nothing overflows
        run.step(projector=float("inf") if step < 8 else 1.0, skipped=step < 8, log=step % 10 == 0)
    assert run.diagnosis.found == []
    for step in range(1, 21):
        run.step(projector=float("inf"), head=float("inf"), skipped=True, log=step % 10 == 0)
    assert [text.split(",")[0] for text in run.diagnosis.found[:1]] == ["fp16: the scaler skipped the last 10 updates"]


def test_nothing_is_read_from_the_device_between_logs(monkeypatch):
    run = Doubles()
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real, name=name: reads.append(name) or real(self))
    for _ in range(9):
        run.step(projector=1.0)
    assert reads == []
    run.step(projector=1.0, log=True)
    assert reads  # the control


def test_the_norm_of_a_part():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert gradient_norm(weights, torch.device("cpu")) == 0
    weights[0].grad, weights[2].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm(weights, torch.device("cpu")) == 5


@pytest.mark.parametrize("name", [None, "rare"])
def test_the_validation_source_that_does_not_depend_on_images_is_named(tmp_path, name):
    def split(trainer: Trainer) -> None:
        if name is not None:
            trainer.eval_dataset = {name: trainer.eval_dataset}

    text = next(text for text in found(tmp_path, {"collator": Images(grey=True), "break": split}) if "answers" in text)
    assert f"the loss of 8 validation rows{'' if name is None else f' of {name}'} is " in text
