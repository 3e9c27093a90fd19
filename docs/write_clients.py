"""Writes docs/clients.md, a table of what of other libraries is tested, from the marks of tests/interfaces.

python docs/write_clients.py
"""

import ast
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clients.md"
HEAD = """# Clients

What other programs do with a checkpoint, and the test that covers it. The tests run on the versions of
[versions.md](versions.md), with a stock LLaVA of the same weights beside ours where the behaviour is stock's.
`python docs/write_clients.py` writes this page from the tests.

Preferences: [`examples/preferences/train_dpo.py`](../examples/preferences/train_dpo.py) trains an adapter of run_sft
on with TRL's `DPOTrainer`, a frozen copy of it as the reference. The chosen and the rejected answer each pay for the
image, for the policy and for the reference: in a step the tower encodes it, and the language model reads its tokens,
four times a pair. Where there are images, TRL can't ask the reference once before training.

| client | versions | test | note |
|---|---|---|---|
"""
# A client's package, by the beginning of its name.
PACKAGES = {"PEFT": "peft", "TRL": "trl", "accelerate": "accelerate", "torch": "torch"}


def versions_of(client: str) -> str:
    """The lowest and the newest version of the client's package that the tests run on."""
    package = next((package for start, package in PACKAGES.items() if client.startswith(start)), "transformers")
    found = []
    for name in ("lowest", "newest"):
        text = (ROOT / f"constraints-{name}.txt").read_text(encoding="utf-8")
        found += [line.split("==")[1] for line in text.splitlines() if line.startswith(f"{package}==")]
    return f"{package} " + " to ".join(dict.fromkeys(found))


def clients_page() -> str:
    """The text of docs/clients.md: one line for each test with a mark `client`."""
    lines = []
    for file in sorted((ROOT / "tests" / "interfaces").glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if ast.unparse(mark).startswith("pytest.mark.client("):
                    assert isinstance(mark, ast.Call) and isinstance(node, ast.FunctionDef)
                    name, note = ast.literal_eval(mark.args[0]), ast.literal_eval(mark.keywords[0].value)
                    lines.append(f"| {name} | {versions_of(name)} | `{file.name}::{node.name}` | {note} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(clients_page(), encoding="utf-8")
