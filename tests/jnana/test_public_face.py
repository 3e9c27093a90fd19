"""`import jnana`: the public names, what importing it loads, and that each class exists once."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import jnana
from tests.modeling.pairs import join


ROOT = Path(__file__).parents[2]

# Packages that training, evaluation and the app need, and loading a checkpoint does not.
NOT_NEEDED = ("bitsandbytes", "datasets", "evaluate", "gradio", "matplotlib", "pandas", "peft", "pyarrow")


def run(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """The standard output of a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there():
    from jnana import (  # noqa: F401
        ChatSession,
        JnanaCollator,
        JnanaForConditionalGeneration,
        JnanaProcessor,
        Transcriber,
        load_model,
        load_rows,
    )

    assert set(jnana.__all__) <= set(dir(jnana))
    assert all(getattr(jnana, name) is not None for name in jnana.__all__)
    assert jnana.__version__[0].isdigit() and (ROOT / "jnana" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'JnanaNothing'"):
        jnana.JnanaNothing  # noqa: B018


def test_importing_it_is_light():
    """It loads what transformers' own model classes load, and takes no longer than 1.5 times as long."""
    code = """
        import json, sys, time
        start = time.perf_counter()
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin
        from transformers import PreTrainedModel, ProcessorMixin
        stock, before = time.perf_counter() - start, set(sys.modules)
        start = time.perf_counter()
        import jnana
        ours = time.perf_counter() - start
        print(json.dumps({"stock": stock, "ours": ours, "loaded": sorted(set(sys.modules) - before)}))
    """
    runs = [json.loads(run(code)) for _ in range(3)]
    packages = {name.split(".")[0] for name in runs[0]["loaded"]}
    assert not packages & set(NOT_NEEDED), packages & set(NOT_NEEDED)
    assert packages >= {"jnana"}
    assert min(found["ours"] / found["stock"] for found in runs) < 0.5, runs


def test_the_lazy_names_load_their_packages():
    """Negative control of the test above: asking for the data pipeline loads datasets."""
    code = "import sys, jnana; jnana.load_rows; print('datasets' in sys.modules)"
    assert run(code).split() == ["True"]


def test_a_base_install_loads_and_answers(tmp_path):
    """With every package blocked that only training, evaluation and the app need."""
    join(tmp_path).save_pretrained(tmp_path / "pair")
    code = """
        import sys
        sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))  # None: as if it were not installed
        import torch
        from jnana import JnanaForConditionalGeneration
        model = JnanaForConditionalGeneration.from_pretrained(sys.argv[1])
        ids = torch.tensor([[310] * 4 + list(range(5, 15))])
        images = torch.zeros(1, 3, 24, 24)
        answer = model.generate(input_ids=ids, pixel_values=images, max_new_tokens=3, pad_token_id=1)
        print(answer.shape[1] > ids.shape[1])
        try:
            from jnana import load_rows
        except ModuleNotFoundError as error:
            print(error.name, "pip install 'jnana[train]'" in str(error))
    """
    found = run(code, str(tmp_path / "pair"), ",".join((*NOT_NEEDED, "accelerate")))
    assert found.split() == ["True", "datasets", "True"]


def test_an_editable_install_is_found_anywhere(tmp_path):
    """The tests' own environment holds one; `-I` leaves the working directory and PYTHONPATH out of the path."""
    code = "import jnana, jnana.run_sft, jnana.app, jnana.modeling; print(jnana.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and Path(done.stdout.strip()).name == "__init__.py", done.stderr


@pytest.mark.parametrize("folder", ["modeling", "processing", "training", "evaluation", "export", "chat"])
def test_a_folder_imported_by_its_bare_name_raises(folder):
    """It would give every class a second time, and the Auto classes would know the wrong one."""
    code = f"""
        try:
            import {folder}
        except ImportError as error:
            print(error)
        import jnana.{folder}
    """
    assert f"import jnana.{folder} instead" in run(code)


def test_the_classes_of_the_auto_classes_are_ours():
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    mapping = AutoModelForImageTextToText._model_mapping
    assert mapping[jnana.JnanaConfig] is jnana.JnanaForConditionalGeneration
    assert PROCESSOR_MAPPING[jnana.JnanaConfig] is jnana.JnanaProcessor and AutoProcessor is not None
