"""The installed package: a wheel that puts `jnana` alone into site-packages, and a clone beside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.scripts.tiny_data import make_data
from tests.tiny import save_tiny_text, save_tiny_vision


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in ROOT.glob("run_*.py")) + ["app"]


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_module(f"jnana.{script}", run_name="__main__")
    except SystemExit as end:
        print("exit", script, end.code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, built with what is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if name.split("/")[0] not in ("tests", "benchmarks", "docs", "examples") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run([*command, "--quiet", "--disable-pip-version-check"], check=True)
    return next(folder.glob("jnana-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A directory that holds what the wheel puts into site-packages."""
    target = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(installed: Path, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_site_packages_gets_jnana_and_nothing_else(installed):
    assert {path.name.split("-")[0] for path in installed.iterdir()} == {"jnana"}
    files = {path.relative_to(installed / "jnana").as_posix() for path in (installed / "jnana").rglob("*")}
    assert {f"{script}.py" for script in SCRIPTS} <= files
    folders = ("modeling", "processing", "training", "evaluation", "export", "chat", "model_cards", "recipes")
    for folder in folders:
        tracked = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        tracked = {name for name in tracked if "__pycache__" not in name}
        assert tracked <= files, tracked - files
    assert "py.typed" in files and "tests" not in {name.split("/")[0] for name in files}
    (entry_points,) = installed.glob("jnana-*.dist-info/entry_points.txt")
    assert entry_points.read_text().split() == [
        "[lmms_eval.models]",
        *("jnana", "=", "jnana.evaluation.lmms_eval_model:manifest"),
    ]


def test_the_installed_package_is_the_one_that_runs(installed, tmp_path):
    code = "import jnana, jnana.modeling, jnana.run_sft; print(jnana.__file__, jnana.run_sft.__file__, jnana.__path__)"
    out = python(installed, "-c", code, cwd=tmp_path)
    assert out.count(str(installed)) == 3 and str(ROOT) not in out


def test_recipes_are_found_where_there_is_no_clone(installed, tmp_path):
    """By the names that README and messages give, and messages name files that exist."""
    code = "from jnana.training.options.recipes import accelerate_config, read_recipe, recipe_path\n"
    code += "print(read_recipe('recipes/jnana/sft.yaml')['lora_r'], recipe_path('recipes/none.yaml'))\n"
    code += "print(accelerate_config('fsdp2.yaml'))"
    recipe, config = python(installed, "-c", code, cwd=tmp_path).splitlines()[-2:]
    assert recipe == "64 recipes/none.yaml"
    assert (tmp_path / config).resolve() == (installed / "jnana/recipes/accelerate/fsdp2.yaml").resolve()
    assert (tmp_path / config).is_file()


def test_in_a_clone_the_clone_runs(installed):
    """The clone's `jnana/` comes first on the path there; it must not be mixed with the installed subpackages."""
    code = "import jnana, jnana.modeling, jnana.training.options.arguments as a\n"
    code += "print(jnana.__file__, jnana.modeling.__file__, a.__file__)"
    out = python(installed, "-c", code, cwd=ROOT)
    assert out.count(str(ROOT)) == 3 and str(installed) not in out


def test_the_scripts_run_installed_and_elsewhere(installed, tmp_path):
    """`accelerate launch -m jnana.run_align` outside of any clone, on data of its own."""
    save_tiny_vision(tmp_path / "vision")
    save_tiny_text(tmp_path / "text")
    make_data(tmp_path / "data")
    arguments = ["--vision_model", "vision", "--text_model", "text", "--train_data", "data/captions.json"]
    arguments += ["--image_folder", "data/images", "--output_dir", "out", "--max_steps", "2", "--use_cpu", "true"]
    command = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "jnana.run_align"]
    python(installed, *command, *arguments, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file() and (tmp_path / "out" / "modeling_jnana.py").is_file()
    helped = python(installed, "-c", HELP, *SCRIPTS, cwd=tmp_path)
    assert [line for line in helped.splitlines() if line.startswith("exit ")] == [f"exit {s} 0" for s in SCRIPTS]
