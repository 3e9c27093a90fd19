"""docs/clients.md is what its script writes."""

import runpy
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "docs" / "write_clients.py"))["clients_page"]()
    assert (ROOT / "docs" / "clients.md").read_text(encoding="utf-8") == page
    assert page.count("::test_") == page.count("\n| ") - 1  # the head of the table is the other line
