"""Systems without Unix's signals, locks and process groups, simulated by removing those functions from Python."""

import subprocess
import sys
from pathlib import Path

import pytest

from jnana import run_align
from tests.scripts.conftest import align_options
from tests.scripts.launching import ROOT, environment


# What Python lacks on Windows, of the modules that this package imports or may import
MISSING = {
    "signal": ["pthread_sigmask", "sigpending", "sigwait", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1"],
    "os": ["fork", "killpg", "mkfifo", "getuid", "setsid", "sched_getaffinity", "O_NOFOLLOW", "O_DIRECTORY"],
}
MODULES = ["fcntl", "resource", "pwd", "grp", "termios"]

# Libraries have code of their own for Windows, chosen by `sys.platform`: they are imported before anything is removed.
IMPORT = f"""
import importlib, sys
from pathlib import Path
import accelerate, datasets, multiprocessing.context, peft, PIL.Image, torch, transformers, transformers.trainer
from transformers import CLIPVisionModel, PhiForCausalLM, Trainer
for name, attributes in {MISSING!r}.items():
    for attribute in attributes:
        delattr(sys.modules[name], attribute)
for name in {MODULES!r}:
    sys.modules[name] = None
for folder in ("modeling", "processing", "training", "evaluation"):
    for file in sorted(Path(folder).rglob("*.py")):
        if file.stem not in ("__init__", "worker", "worker_guard", "lmms_eval_model"):  # imported by other programs
            importlib.import_module(".".join(("jnana", *file.with_suffix("").parts)))
for file in sorted(Path().glob("run_*.py")):
    importlib.import_module(f"jnana.{{file.stem}}")
print(len([name for name in sys.modules if name.startswith("jnana.")]))
from signal import pthread_sigmask  # the control: a module that needs one is noticed
"""


def test_every_module_imports():
    """All but the control at the end of the script."""
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert "cannot import name 'pthread_sigmask' from 'signal'" in run.stderr.splitlines()[-1], run.stderr[-3000:]
    assert int(run.stdout) > 40


@pytest.mark.parametrize("missing", [True, False])
def test_a_run_trains(data, vision, pretrained, tmp_path, monkeypatch, missing):
    if missing:
        for name in MISSING["signal"]:
            monkeypatch.delattr(f"signal.{name}")
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path, max_steps=1, save_steps=1))
    assert Path(tmp_path, "checkpoint-1", "trainer_state.json").is_file()
