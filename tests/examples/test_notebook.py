"""examples/notebook.ipynb, run from its first to its last cell with tiny models."""

import os
import sys
from pathlib import Path

import pytest

from jnana import run_pretrain
from tests.scripts.conftest import PRETRAIN, options
from tests.scripts.tiny_data import make_data
from tests.tiny import save_tiny_vision


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]

# Instead of the notebook's second code cell: other models and sizes, the same names.
SETTINGS = """
VISION_MODEL, TEXT_MODEL = {vision!r}, {text!r}
OUTPUT = Path({output!r})
TRAIN_IMAGES, ALIGN_STEPS, SFT_STEPS, GPUS = 24, 4, 6, 0
precision, quantization = [], ["--eval_steps=3", "--sample_steps=3", "--sample_max_new_tokens=4"]
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after its run."""
    folder = tmp_path_factory.mktemp("notebook")
    data = make_data(folder / "text")
    run_pretrain.main([*options(**PRETRAIN, output_dir=folder / "text_model"), f"--train_data={data / 'corpus.txt'}"])
    vision = save_tiny_vision(folder / "vision", "clip_full")
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source and "VISION_MODEL =" in code[1].source
    code[0].source = "\n".join(line for line in code[0].source.splitlines() if "%pip" not in line)
    values = {"vision": str(vision), "text": str(folder / "text_model"), "output": str(folder / "outputs")}
    code[1].source = SETTINGS.format(**values)
    previous = dict(os.environ)
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where `accelerate` is
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": commands}
    try:
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}
        )
        client.execute()
    finally:
        os.environ.clear()
        os.environ |= previous
    return code


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def kinds(cell) -> set[str]:
    """The MIME types that a cell displays."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def cell_with(cells, text: str):
    (found,) = [cell for cell in cells if text in cell.source]
    return found


def test_it_trains_and_shows_what_was_learnt(executed):
    assert kinds(cell_with(executed, '"align" / "loss_curve.png"')) == {"image/png", "text/plain"}
    shown = cell_with(executed, "samples.html")
    assert kinds(shown) >= {"image/png", "text/html"}
    assert "data:image" in "".join(output.data.get("text/html", "") for output in shown.outputs)


def test_the_log_is_in_the_cell(executed):
    """That of a launched script, and that of a function called in the notebook's own process, with a table."""
    launched, called = (cell_with(executed, text) for text in ("run_align.py {", "notebook_launcher("))
    assert all("trained parameters" in printed(cell) and "MFU" in printed(cell) for cell in (launched, called))
    tables = "".join(output.get("data", {}).get("text/html", "") for output in called.outputs)
    assert "Validation Loss" in tables


def test_it_answers(executed):
    answers = printed(cell_with(executed, "session.ask"))
    assert answers.count("Q: ") == answers.count("A: ") == 2


def test_the_committed_notebook_holds_no_outputs():
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
