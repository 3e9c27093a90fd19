"""Runs each line of the table in docs/interruptions.md, and compares the resumed run with an uninterrupted one.

The file of final weights must be equal byte for byte, and so must the loss of every step. The run must leave the same
files.
"""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from jnana.training.saving.checkpoints import checkpoint_problem
from jnana.training.saving.interruption import STOP_SIGNALS
from jnana.training.saving.manifests import write_manifest
from tests.scripts.conftest import align_options, sft_options
from tests.scripts.faults import (
    flip_bit,
    kill,
    kill_at_random,
    kill_before,
    kill_while_drawing,
    kill_while_saving,
    refuse_file,
    refuse_state,
    refuse_weights,
    set_clock_back,
    strike,
    strike_group,
    take_directory,
    terminate,
    wait,
    write_zeros,
)
from tests.scripts.forked import Ended, run_forked, succeed
from tests.scripts.launching import LONGEST, ROOT, launch
from tests.scripts.tiny_data import make_shards


DOCS = Path(__file__).parents[2] / "docs" / "interruptions.md"


@dataclass(frozen=True)
class Kind:
    """A training run to interrupt: its script, options, and number of processes."""

    name: str
    script: str
    weights: str
    changes: tuple[tuple[str, object], ...]
    processes: int = 1


COMMON = {
    "max_steps": 6,
    "save_steps": 2,
    "save_total_limit": 10,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
}
ALIGN = Kind(
    "align, 2 accumulation steps, 2 epochs", "run_align", "model.safetensors", (("gradient_accumulation_steps", 2),)
)
LORA = Kind(
    "sft, LoRA with dropout, a stream that starts over",
    "run_sft",
    "adapter_model.safetensors",
    (("lora_dropout", 0.3), ("streaming", "true"), ("per_device_train_batch_size", 6)),
)
PACKED = Kind(
    "sft, LoRA, packed rows that share their image",
    "run_sft",
    "adapter_model.safetensors",
    (("packing", "shared_image"), ("max_row_tokens", 96), ("gradient_accumulation_steps", 2)),
)
QLORA = Kind(
    "sft, QLoRA (nf4), an evaluation every 2 steps",
    "run_sft",
    "adapter_model.safetensors",
    (("quantization", "nf4"), ("eval_strategy", "steps"), ("eval_steps", 2), ("per_device_train_batch_size", 6)),
)
ONE_KEPT = Kind(
    "align, `save_total_limit: 1`",
    "run_align",
    "model.safetensors",
    (("gradient_accumulation_steps", 2), ("save_total_limit", 1)),
)
TWO = Kind(
    "align on 2 processes, a stream of tar files",
    "run_align",
    "model.safetensors",
    (("gradient_accumulation_steps", 2), ("streaming", "true"), ("train_data", "tar files")),
    2,
)
NF4 = Kind(
    "sft, LoRA on nf4, evaluation and samples at every step",
    "run_sft",
    "adapter_model.safetensors",
    (("quantization", "nf4"), ("eval_strategy", "steps"), ("eval_steps", 1), ("sample_steps", 1)),
)


@dataclass(frozen=True)
class Case:
    """One line of the table: the faults of the first start, the second start, ..., then a start that ends well.

    Args:
        faults: What is called in each process before it runs.
        codes: The exit codes that follow.
        resumed_from: The checkpoint that the last start goes on from; `None`: from the beginning.
        workers: Of the dataloader, in the first start.
        ending: What the table says about the last start, where that is not one checkpoint.
    """

    how: str
    when: str
    kind: Kind
    faults: tuple[Callable, ...]
    codes: tuple[int, ...]
    resumed_from: int | None
    workers: int = 0
    ending: str | None = None

    def line(self) -> str:
        """This case in the table of the docs."""
        start = "starts anew" if self.resumed_from is None else f"resumes from step {self.resumed_from}"
        start = self.ending or start
        codes = ", ".join(str(code) for code in dict.fromkeys(self.codes))
        return f"| {self.how} | {self.when} | {self.kind.name} | {codes} | {start}; same bytes |"


KILLED, TERMINATED, FAILED = -signal.SIGKILL, 128 + signal.SIGTERM, 1
CODES = {name: 128 + getattr(signal, name) for name in STOP_SIGNALS}
# started by `accelerate launch`, which passes the signal on, after a moment and once more to those who have it already
LAUNCHER, ALL = "to `accelerate launch` alone", "to `accelerate launch` and all its processes"
GROUP = "to the process group of `accelerate launch` with one process"
LAUNCHED = {
    ("SIGTERM", "launcher"): Case("SIGTERM", LAUNCHER, TWO, (), (TERMINATED,), 3),
    ("SIGTERM", "all"): Case("SIGTERM", ALL, TWO, (), (TERMINATED,), 3),
    ("SIGINT", "all"): Case("SIGINT", ALL, TWO, (), (CODES["SIGINT"],), 3),
    ("SIGHUP", "launcher"): Case("SIGHUP", LAUNCHER, TWO, (), (CODES["SIGHUP"],), 3),
    ("SIGTERM", "group"): Case("SIGTERM", GROUP, ALIGN, (), (TERMINATED,), 3),
    ("SIGINT", "group"): Case("SIGINT", GROUP, ALIGN, (), (CODES["SIGINT"],), 3),
    ("SIGUSR1", "launcher"): Case(
        "SIGUSR1", f"{LAUNCHER}, which was told to pass it on", TWO, (), (CODES["SIGUSR1"],), 3
    ),
}
SEED, MOMENTS = 18, 8
AT_RANDOM = (f"SIGKILL, {MOMENTS} times", f"at random moments (seed {SEED})")
RANDOM = {kind: Case(*AT_RANDOM, kind, (), (KILLED,), None, ending="resumes each time") for kind in (LORA, ONE_KEPT)}
CHANGED = Case(
    "changed recipe",
    "`learning_rate` and `seed`, after SIGKILL in step 6",
    ALIGN,
    (),
    (FAILED,),
    None,
    ending="refused; its own recipe resumes from step 4",
)
SECOND_RUN = Case("two runs at once", "the second in step 4 of the first", ALIGN, (), (FAILED,), None, 0, "refused")
CASES = [
    Case("SIGKILL", "before the first checkpoint", ALIGN, (partial(kill, "on_step_end", 1),), (KILLED,), None),
    Case(
        "SIGKILL",
        "while it takes the lock of `output_dir`",
        ALIGN,
        (partial(kill_before, "os.remove", "/run/run.lock.{host}.{pid}"),),
        (KILLED,),
        None,
    ),
    Case(
        "SIGKILL",
        "while the record of its options is written",
        ALIGN,
        (partial(kill_before, "os.rename", "/run/.recipe_record.json.{pid}"),),
        (KILLED,),
        None,
    ),
    Case("SIGKILL", "between two micro-batches", ALIGN, (partial(kill, "on_substep_end", 4),), (KILLED,), 4),
    Case("SIGKILL", "before the final files", ALIGN, (partial(kill, "on_train_end", 6),), (KILLED,), 6),
    Case("SIGKILL", "while weights are written", LORA, (partial(kill_while_saving, "weights", 4),), (KILLED,), 2),
    Case(
        "SIGKILL", "while the optimizer is written", LORA, (partial(kill_while_saving, "optimizer", 4),), (KILLED,), 2
    ),
    Case(
        "SIGKILL, twice",
        "in step 4, and again in step 6",
        LORA,
        (partial(kill, "on_step_begin", 3), partial(kill, "on_step_begin", 5)),
        (KILLED, KILLED),
        4,
    ),
    Case(
        "SIGKILL",
        "between `trainer_state.json` and the record of the base",
        LORA,
        (partial(kill, "on_save", 4),),
        (KILLED,),
        2,
    ),
    Case("SIGKILL", "between two steps", PACKED, (partial(kill, "on_step_end", 3),), (KILLED,), 2),
    Case("SIGKILL", "after an evaluation", QLORA, (partial(kill, "on_step_begin", 5),), (KILLED,), 4),
    Case(
        "SIGKILL",
        "before the last deletion",
        ONE_KEPT,
        (partial(kill_before, "os.rename", "/run/checkpoint-4"),),
        (KILLED,),
        6,
    ),
    Case(
        "SIGKILL",
        "in the last deletion",
        ONE_KEPT,
        (partial(kill_before, "os.rmdir", "/run/deleted-checkpoint-4"),),
        (KILLED,),
        6,
    ),
    *RANDOM.values(),
    Case("clock set back", "after each checkpoint", ONE_KEPT, (partial(set_clock_back, 5),), (KILLED,), 4),
    Case(
        "flipped bit",
        "in the last checkpoint's trained weights",
        ALIGN,
        (partial(flip_bit, "checkpoint-4/model-00001-of-00002.safetensors", 5),),
        (KILLED,),
        2,
    ),
    Case(
        "zeros",
        "in the last checkpoint's optimizer",
        LORA,
        (partial(write_zeros, "checkpoint-4/optimizer.pt", 5),),
        (KILLED,),
        2,
    ),
    CHANGED,
    SECOND_RUN,
    Case(
        "output directory taken over",
        "by a run of another host, in step 4",
        ALIGN,
        (partial(take_directory, 3),),
        (FAILED,),
        2,
    ),
    Case("SIGTERM", "between two micro-batches", ALIGN, (partial(terminate, "on_substep_end", 2),), (TERMINATED,), 3),
    Case("SIGTERM", "in the last step", ALIGN, (partial(terminate, "on_step_begin", 5),), (TERMINATED,), 6),
    Case(
        "SIGTERM, twice",
        "in step 2, and again in step 5",
        LORA,
        (partial(terminate, "on_step_begin", 1), partial(terminate, "on_step_begin", 4)),
        (TERMINATED, TERMINATED),
        5,
    ),
    Case(
        "SIGTERM", "to one of two processes", TWO, (partial(terminate, "on_step_begin", 2, rank=1),), (TERMINATED,), 3
    ),
    Case(
        "SIGTERM",
        "to the dataloader's workers too",
        ALIGN,
        (partial(strike_group, signal.SIGTERM, "on_step_begin", 2),),
        (TERMINATED,),
        3,
        1,
    ),
    Case(
        "SIGINT",
        "to the dataloader's workers too",
        ALIGN,
        (partial(strike_group, signal.SIGINT, "on_step_begin", 2),),
        (CODES["SIGINT"],),
        3,
        1,
    ),
    Case(
        "SIGHUP",
        "to one of two processes",
        TWO,
        (partial(strike, signal.SIGHUP, "on_step_begin", 2, rank=1),),
        (CODES["SIGHUP"],),
        3,
    ),
    Case(
        "SIGQUIT",
        "between two micro-batches",
        ALIGN,
        (partial(strike, signal.SIGQUIT, "on_substep_end", 2),),
        (CODES["SIGQUIT"],),
        3,
    ),
    Case(
        "SIGUSR1",
        "between two steps",
        PACKED,
        (partial(strike, signal.SIGUSR1, "on_step_end", 3),),
        (CODES["SIGUSR1"],),
        3,
    ),
    Case("SIGKILL", "after an evaluation of nf4 weights", NF4, (partial(kill, "on_step_end", 5),), (KILLED,), 4),
    *LAUNCHED.values(),
    Case("full disk", "for a checkpoint's weights", LORA, (partial(refuse_weights, "checkpoint-4"),), (FAILED,), 2),
    Case("full disk", "for its optimizer", ALIGN, (partial(refuse_file, "optimizer.pt", 4),), (FAILED,), 2),
    Case("full disk", "for its last file", ALIGN, (partial(refuse_state, 4),), (FAILED,), 2),
    Case("full disk", "for the final weights", ALIGN, (partial(refuse_weights, "run"),), (FAILED,), 6),
]
FORKED = [case for case in CASES if case.faults]


def arguments(kind: Kind, output: Path, data, vision, pretrained, aligned) -> list[str]:
    changes = {**COMMON, **dict(kind.changes), "output_dir": output}
    if changes.get("train_data") == "tar files":
        changes["train_data"] = str(data / "shards" / "*.tar")
    if kind.script == "run_align":
        return align_options(data, vision, pretrained, **changes)
    return sft_options(data, aligned, **changes)


@pytest.fixture(scope="module")
def start(tmp_path_factory, data, vision, pretrained, aligned):
    """Starts a run of a kind in processes of its own."""
    make_shards(data / "images", data / "shards", 4)

    def start(kind: Kind, output: Path, prepare: Callable | None = None, workers: int = 0) -> list[Ended]:
        words = arguments(kind, output, data, vision, pretrained, aligned)
        words.append(f"--dataloader_num_workers={workers}")
        log = tmp_path_factory.mktemp("log")
        return run_forked(kind.script, words, log, processes=kind.processes, prepare=prepare)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    """The uninterrupted run of each kind, made once."""
    made: dict[Kind, Path] = {}

    def whole(kind: Kind) -> Path:
        if kind not in made:
            output = tmp_path_factory.mktemp("whole") / "run"
            succeed(start(kind, output))
            made[kind] = output
        return made[kind]

    return whole


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same(folder: Path, reference: Path, kind: Kind) -> None:
    assert losses(folder) == losses(reference)
    assert (folder / kind.weights).read_bytes() == (reference / kind.weights).read_bytes()
    assert left(folder, kind) == left(reference, kind)


def left(folder: Path, kind: Kind) -> list[str]:
    """What a run leaves in its directory: no file that was half written, no checkpoint that was half deleted.

    Not compared: checkpoints of steps in which only the stopped run saved; the Trainer's pickle, which a start of a
    finished run does not copy; the loss curve, which forked processes do not draw.
    """
    names = {path.name for path in folder.iterdir()} - {"training_args.bin", "loss_curve.png"}
    return sorted(name for name in names if kind is ONE_KEPT or not name.startswith("checkpoint-"))


@pytest.mark.parametrize("case", FORKED, ids=lambda case: f"{case.how} {case.when}".replace(" ", "_"))
def test_interrupted(case: Case, start, whole, tmp_path):
    assert case.line() in DOCS.read_text()
    output = tmp_path / "run"
    for fault, code in zip(case.faults, case.codes, strict=True):
        ended = start(case.kind, output, fault, case.workers)[0]
        assert ended.code == code, ended.output[-4000:]
        if code in CODES.values():
            assert ended.output.count(f"{case.how.split(',')[0]}: stopped after step") == 1
    if case.how == "full disk":
        assert "has no room for the files of this run" in ended.output
        assert f"{output}/checkpoint-{case.resumed_from} is complete; make room" in ended.output
        for link in output.glob("checkpoint-*/*"):
            if link.is_symlink():
                link.unlink()  # there is room again
    if case.how == "output directory taken over":
        assert "now belongs to process 1 on host 'another', started 2026-01-01" in ended.output
        assert not (output / "checkpoint-4").exists()
        (output / "run.lock").unlink()  # that run has ended
    said = succeed(start(case.kind, output))
    if case.resumed_from is None:
        assert "resuming from" not in said
    else:
        assert f"resuming from {output}/checkpoint-{case.resumed_from} " in said
    assert_same(output, whole(case.kind), case.kind)


@pytest.mark.parametrize(("name", "to"), LAUNCHED)
def test_interrupted_under_accelerate_launch(name, to, start, whole, tmp_path, data, vision, pretrained, aligned):
    case, output = LAUNCHED[name, to], tmp_path / "run"
    words = arguments(case.kind, output, data, vision, pretrained, aligned)
    terminated = [name, to, "2", str(tmp_path), case.kind.script]
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{LONGEST:.0f}"}  # a checkpoint takes long on a busy machine
    variables |= {"PET_SIGNALS_TO_HANDLE": ",".join(STOP_SIGNALS)} if name == "SIGUSR1" else {}
    process = launch(
        "tests/scripts/terminated_launch.py",
        [*terminated, *words],
        case.kind.processes,
        PYTHONPATH=str(ROOT),
        **variables,
    )
    said, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == 1 or (process.returncode and to == "group"), said[-4000:]  # the launcher's own
    assert said.count(f"{name}: stopped after step 3") == 1, said[-4000:]
    assert "forcefully exiting" not in said
    ranks = range(case.kind.processes)
    assert [(tmp_path / str(rank)).read_text() for rank in ranks] == [str(CODES[name]) for _ in ranks]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert f"resuming from {output}/checkpoint-3 " in succeed(start(case.kind, output))
    assert_same(output, whole(case.kind), case.kind)


def test_killed_while_a_progress_bar_is_drawn(start, tmp_path):
    """The control of the tests themselves: the processes that are forked after it draw their own bars."""
    assert start(ALIGN, tmp_path / "run", kill_while_drawing)[0].code == KILLED
    assert "16 of 16 rows" in succeed(start(ALIGN, tmp_path / "run"))


@pytest.mark.parametrize("kind", RANDOM, ids=["adapter", "one_kept"])
def test_killed_at_random_moments(kind: Kind, start, whole, tmp_path):
    assert RANDOM[kind].line() in DOCS.read_text()
    output, killed = tmp_path / "run", 0
    for moment in range(MOMENTS):
        ended = start(kind, output, partial(kill_at_random, SEED + moment))[0]
        assert ended.code in (KILLED, 0), ended.output[-4000:]  # the last moments may lie behind the end
        killed += ended.code == KILLED
    assert killed >= MOMENTS // 2  # the other moments lie behind the end of a run that has little left to do
    succeed(start(kind, output))
    assert_same(output, whole(kind), kind)
    print(f"{killed} of {MOMENTS} starts were killed")
    for checkpoint in output.glob("checkpoint-*"):
        assert checkpoint_problem(checkpoint) is None
    assert len(list(output.glob("*checkpoint-*"))) == (1 if kind is ONE_KEPT else 3)


def test_a_changed_recipe(start, whole, tmp_path):
    assert CHANGED.line() in DOCS.read_text()
    output = tmp_path / "run"
    assert start(ALIGN, output, partial(kill, "on_step_begin", 5))[0].code == KILLED
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and path.name != "run.lock"}
    changed = replace(ALIGN, changes=(*ALIGN.changes, ("learning_rate", "2e-3"), ("seed", 7)))
    ended = start(changed, output)[0]
    assert ended.code == FAILED
    differences = "learning_rate 0.001, this run has 0.002", "seed 42, this run has 7"
    for difference in (f"{output}/checkpoint-4 was trained with ", *differences):
        assert difference in ended.output
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert f"resuming from {output}/checkpoint-4 " in succeed(start(ALIGN, output))
    assert_same(output, whole(ALIGN), ALIGN)


def test_two_runs_at_once(start, whole, tmp_path):
    assert SECOND_RUN.line() in DOCS.read_text()
    output, waiting, first = tmp_path / "run", tmp_path / "waiting", []
    thread = threading.Thread(target=lambda: first.extend(start(ALIGN, output, partial(wait, 3))))
    thread.start()
    deadline = time.monotonic() + LONGEST
    while not waiting.exists():
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    owner = json.loads((output / "run.lock").read_text())
    second = start(ALIGN, output)[0]
    waiting.unlink()
    thread.join()
    assert second.code == FAILED
    named = f"process {owner['pid']} on host {owner['host']!r}, started {owner['started']}"
    assert f"another run writes into output_dir {str(output)!r}: {named}" in second.output
    succeed(first)
    assert_same(output, whole(ALIGN), ALIGN)
    assert not (output / "run.lock").exists()


@pytest.mark.parametrize("handled", [None, "SIGTERM,SIGINT"])
def test_a_closed_terminal_under_nohup(handled, start, tmp_path, data, vision, pretrained, aligned):
    """The remedy of the docs lets the run go on. The control: the launcher kills processes that ignore SIGHUP, which
    stay in their step until then."""
    words = arguments(TWO, tmp_path / "run", data, vision, pretrained, aligned)
    variables = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"} | (
        {"PET_SIGNALS_TO_HANDLE": handled} if handled else {"STAY": "until the launcher ends it"}
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which new processes inherit
    try:
        process = launch(
            "tests/scripts/terminated_launch.py",
            ["SIGHUP", "all", "2", str(tmp_path), TWO.script, *words],
            TWO.processes,
            PYTHONPATH=str(ROOT),
            **variables,
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    said, _ = process.communicate(timeout=LONGEST)
    assert (process.returncode == 0) is (handled is not None), said[-4000:]
    assert (tmp_path / "run" / "model.safetensors").is_file() is (handled is not None)


def test_the_table_lists_nothing_else():
    lines = [line for line in DOCS.read_text().splitlines() if line.endswith("; same bytes |")]
    assert lines == [case.line() for case in CASES]


def test_the_comparison_notices(start, whole, tmp_path):
    """The control: a resumed run whose dropout draws other numbers is not the same."""
    shutil.copytree(whole(LORA), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-6"))
    (tmp_path / "run" / "checkpoint-4" / "rng_state.pth").unlink()
    write_manifest(tmp_path / "run" / "checkpoint-4")
    assert "resuming from" in succeed(start(LORA, tmp_path / "run"))
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole(LORA), LORA)
