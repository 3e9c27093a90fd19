"""Work for the first process, and waits of the others, in real processes over gloo."""

import atexit
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import datasets
import pytest
import torch.distributed as dist
from accelerate import PartialState

from jnana.processing.data import temporary, tokenizer_fingerprint, train_tokenizer
from jnana.processing.data.temporary import temporary_directory
from jnana.training import distributed, text_models
from jnana.training.data import prepare_text_data
from jnana.training.distributed import (
    main_process_first,
    once_per_machine,
    process_group,
    run_on_main_process,
    unpartitioned,
)
from jnana.training.options.arguments import TextDataArguments, TextModelArguments
from tests.tiny import CORPUS


WAIT = 4  # seconds that the first process works


def run_two(function, folder, timeout: int = 600, read: bool = True) -> list[str]:
    """Call `function(folder)` in two processes of a group that gives up after 2 seconds; what each returned."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(function, folder, rank)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)] if read else []


def _child(function, folder, rank: int) -> None:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(variables | {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    PartialState._reset_state()  # the forked process inherits that of the test process
    PartialState(cpu=True)
    try:
        result = function(folder)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.txt").write_text(str(result))
    dist.barrier() if "Error" not in str(result) else None
    os._exit(0)


def work_slowly() -> str:
    time.sleep(WAIT)
    return f"by {dist.get_rank()}"


def fail() -> None:
    raise ValueError("row 7 has no answer")


def once(folder) -> str:
    return run_on_main_process(work_slowly)


def once_failing(folder) -> str:
    return run_on_main_process(fail)


def first(folder) -> str:
    with main_process_first():
        found = (folder / "cache").is_file()
        if not found:
            time.sleep(WAIT)
            (folder / "cache").write_text("")
    return f"found: {found}"


def first_failing(folder) -> str:
    with main_process_first():
        fail()
    return "not reached"


def made_once(folder) -> str:
    def make() -> str:
        time.sleep(WAIT)
        with open(folder / "made", "a") as file:
            file.write("x")
        return f"by {dist.get_rank()}"

    return once_per_machine(make, lambda made, at: (at / "a").write_text(made), lambda at: (at / "a").read_text())


def made_failing(folder) -> str:
    return once_per_machine(fail, lambda made, at: None, lambda at: "loaded")


def text_blocks(folder) -> str:
    model_args = TextModelArguments(train_tokenizer_vocab_size=300, text_config='{"model_type": "phi"}')
    data_args = TextDataArguments(train_data=str(folder / "a.txt"), eval_data=str(folder / "a.txt"), block_size=16)
    calls = []
    text_models.train_tokenizer = lambda *a: calls.append(a) or train_tokenizer(*a)
    tokenizer, train, validation = prepare_text_data(model_args, data_args)
    rows = [block["input_ids"] for blocks in (train, validation) for block in blocks]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{len(calls)} {len(rows) > 10} {digest} {tokenizer_fingerprint(tokenizer)}"


def training_group(folder) -> str:
    time.sleep(WAIT if dist.get_rank() == 0 else 0)
    dist.barrier()
    return "waited"


def test_once_and_longer_than_the_training_group_waits(tmp_path):
    assert run_two(once, tmp_path) == ["by 0", "by 0"]


def test_the_training_group_would_not_wait(tmp_path):
    """The control."""
    assert "Error" in run_two(training_group, tmp_path)[1]


def test_an_error_reaches_all(tmp_path):
    assert run_two(once_failing, tmp_path) == ["ValueError: row 7 has no answer"] * 2


def test_the_first_process_first(tmp_path):
    assert run_two(first, tmp_path) == ["found: False", "found: True"]


def test_an_error_in_the_first_process_leaves_nobody_waiting(tmp_path):
    assert run_two(first_failing, tmp_path) == ["ValueError: row 7 has no answer"] * 2


def test_directories_of_other_hosts_and_file_systems_without_locks(tmp_path, monkeypatch):
    """Their locks may look free from here, and a lock that can't be had deletes nothing."""
    for name in ("jnana_another-host_0_x", temporary.HANDED_ON + "x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / temporary.OWNED).touch()
    monkeypatch.setattr(temporary.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(OSError("no locks")))
    assert temporary_directory(tmp_path).is_dir()
    assert len(list(tmp_path.glob("jnana_*"))) == 3
    monkeypatch.undo()
    assert temporary_directory(tmp_path).is_dir()
    assert not (tmp_path / (temporary.HANDED_ON + "x")).exists() and (tmp_path / "jnana_another-host_0_x").is_dir()


def test_once_per_machine_and_longer_than_the_training_group_waits(tmp_path):
    assert run_two(made_once, tmp_path) == ["by 0", "by 0"]
    assert (tmp_path / "made").read_text() == "x"


def test_an_error_while_preparing_reaches_all(tmp_path):
    assert run_two(made_failing, tmp_path) == ["ValueError: row 7 has no answer"] * 2


def test_one_process_trains_the_tokenizer_and_packs(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"{line} {number}" for number in range(20) for line in CORPUS))
    first, second = (said.split(" ", 1) for said in run_two(text_blocks, tmp_path))
    assert (first[0], second[0]) == ("1", "0")
    assert first[1] == second[1] and first[1].startswith("True ")


def make_and_stay(cache, pipe) -> None:
    """Makes a directory and says which, until it is killed."""
    pipe.send(temporary_directory(cache))
    pipe.recv()


def test_the_directory_of_a_killed_process_is_deleted_by_the_next(tmp_path, caplog, monkeypatch):
    context = multiprocessing.get_context("fork")
    processes, folders, at_exit = [], [], []
    for _ in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=make_and_stay, args=(tmp_path, theirs)))
        processes[-1].start()
        folders.append(ours.recv())
    older = tmp_path / "jnana_older"  # of a version that holds no lock: who needs it is unknown
    older.mkdir()
    processes[0].kill()
    processes[0].join()
    monkeypatch.setattr(atexit, "register", lambda *call, **options: at_exit.append((call, options)))
    with caplog.at_level(logging.INFO):
        own = temporary_directory(tmp_path)
    processes[1].kill()
    assert not folders[0].exists() and folders[1].is_dir() and older.is_dir() and own.is_dir()
    assert f"deleting {folders[0]}, which a run that was killed has left" in caplog.text
    (((delete, folder), options),) = at_exit
    delete(folder, **options)
    assert not own.exists()


def killed_while_it_hands_on(folder) -> str:
    def save(made, at) -> None:
        (at / "a").write_text(made)
        os.kill(os.getpid(), signal.SIGKILL)

    return once_per_machine(lambda: "half", save, lambda at: (at / "a").read_text())


def test_a_killed_run_leaves_nothing_behind_the_next(tmp_path, monkeypatch):
    """Stage 0 on two processes, whose first is killed while it hands its data on; then started again."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for name in ("killed", "again"):
        (tmp_path / name).mkdir()
    run_two(killed_while_it_hands_on, tmp_path / "killed", read=False)
    (left,) = cache.glob("jnana_*")
    assert run_two(made_once, tmp_path / "again") == ["by 0", "by 0"]
    assert not left.exists() and len(list(cache.glob("jnana_*"))) == 1  # `os._exit` ended the second one


def test_one_process_alone():
    assert once_per_machine(lambda: 3, lambda *_: pytest.fail("saved"), lambda _: pytest.fail("loaded")) == 3
    assert run_on_main_process(lambda: 3) == 3
    with pytest.raises(ValueError, match="row 7"):
        run_on_main_process(fail)
    with main_process_first(), process_group() as group:
        assert (group.rank, group.size, group.gather("a")) == (0, 1, ["a"])


class TestUnpartitioned:
    """Whether transformers sees ZeRO-3 while a model is built; tests/scripts/test_sharded.py tests the training."""

    class Plugin:
        def __init__(self, zero3_init_flag: bool):
            self.zero3_init_flag = zero3_init_flag
            self.restored = False

        def set_deepspeed_weakref(self) -> None:
            self.restored = True

    @pytest.mark.parametrize(
        ("flag", "whole", "hidden"),
        [(False, True, True), (False, False, True), (True, True, True), (True, False, False)],
    )
    def test_under_zero3(self, monkeypatch, flag, whole, hidden):
        calls = []
        monkeypatch.setattr(distributed, "is_deepspeed_zero3_enabled", lambda: True)
        monkeypatch.setattr(distributed, "unset_hf_deepspeed_config", lambda: calls.append("hidden"))
        args = type("Args", (), {"deepspeed_plugin": self.Plugin(flag)})
        with unpartitioned(args, whole):
            assert calls == ["hidden"] * hidden and not args.deepspeed_plugin.restored
        assert args.deepspeed_plugin.restored == hidden

    def test_elsewhere(self, monkeypatch):
        monkeypatch.setattr(distributed, "unset_hf_deepspeed_config", lambda: pytest.fail("called"))
        for args in (None, type("Args", (), {"deepspeed_plugin": None})):
            with unpartitioned(args, whole=True):
                pass
