"""File names that some operating system cannot hold."""

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / ".ci" / "file_names.py"
spec = importlib.util.spec_from_file_location("file_names", SCRIPT)
file_names = importlib.util.module_from_spec(spec)
spec.loader.exec_module(file_names)


def test_the_tracked_files_can_be_checked_out_everywhere():
    assert file_names.main() == 0


@pytest.mark.parametrize(
    "path",
    ["hat is too long for the README | |||", "docs/a:b.md", "aux.py", "docs/CON", "name.", "é.py", "a" * 200, "a?b"],
)
def test_a_name_that_windows_cannot_hold_is_named(path):
    assert file_names.problems(["README.md", path])


def test_names_that_differ_in_case_alone_are_named():
    assert file_names.problems(["docs/Speech.md", "docs/speech.md"])
    assert not file_names.problems(["docs/speech.md", "docs/app.md", ".ci/run", "recipes/jnana/sft.yaml"])
