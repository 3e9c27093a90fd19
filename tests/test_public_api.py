"""The files that travel with a checkpoint use only the public interface of torch and transformers."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "modeling").glob("*_jnana.py"), *(ROOT / "processing").glob("*_jnana.py")])

# Names with an underscore that transformers documents for the code of custom models: class attributes and methods that
# a model or processor defines for transformers to read, and that ours therefore also reads and extends.
HOOKS = {
    "_can_compile_fullgraph",
    "_get_num_multimodal_tokens",
    "_init_weights",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tied_weights_keys",
    "_tp_plan",
}
# The exceptions: the name under which a registered attention is looked up, and the hooks of a module, of which torch
# tells in no other way. They are commented where they stand.
EXCEPTIONS = {
    "_attn_implementation",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
}


def private_names(source: str) -> set[str]:
    """Names with one leading underscore that the source uses without defining them, and private modules it imports."""
    tree = ast.parse(source)
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        if isinstance(node, ast.Name):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.id)
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        if isinstance(node, ast.ImportFrom) and not node.level:
            used |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        if isinstance(node, ast.Import):
            used |= {part for alias in node.names for part in alias.name.split(".")}
        if isinstance(node, ast.Call):
            used |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return {name for name in used - defined if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_public_names_are_used(file):
    neighbours = {name for other in FILES for name in _definitions(other)}
    assert private_names(file.read_text(encoding="utf-8")) - neighbours <= HOOKS | EXCEPTIONS


def _definitions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize(
    "source",
    [
        "model._from_config(config)",
        "from transformers.modeling_utils import _load_state_dict",
        "import torch._dynamo",
        "cached_file(path, _raise_exceptions_for_missing_entries=False)",
    ],
)
def test_a_private_name_is_found(source):
    assert private_names(source)
