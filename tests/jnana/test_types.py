"""`make quality` finds a name that another folder of the package does not define."""

import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]

GOOD = "from jnana.processing.data.paths import is_hub_id\n\nprint(is_hub_id('a/b'))\n"
PLANTED = {
    "a name": "from jnana.processing.data.paths import no_such_name\n",
    "a module": "from jnana.processing.data.no_such_module import is_hub_id\n",
    "an argument": "from jnana.processing.data.paths import is_hub_id\n\nprint(is_hub_id('a/b', wrong=1))\n",
}


@pytest.mark.parametrize("planted", [None, *PLANTED])
def test_mypy_follows_imports_across_folders(tmp_path, planted):
    """The tree is that of `make links`, with one module in place of `jnana.training`; without an error it passes."""
    subprocess.run(["make", "links"], cwd=ROOT, check=True, capture_output=True)
    package = tmp_path / "jnana"
    (package / "training").mkdir(parents=True)
    for path in (ROOT / ".package" / "jnana").iterdir():
        if path.name != "training" and path.suffix != ".py" or path.name == "__init__.py":
            (package / path.name).symlink_to(path.resolve())
    (package / "training" / "planted.py").write_text(GOOD if planted is None else PLANTED[planted])
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".package" / ".mypy_cache"), "-m", "jnana.training.planted"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("jnana/training/planted.py")]
    if planted is None:
        assert done.returncode in (0, 1) and not found, done.stdout + done.stderr
    else:
        assert done.returncode == 1 and found, done.stdout + done.stderr
