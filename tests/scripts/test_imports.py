"""What a stage script loads beyond the stock Trainer, by the names of the modules."""

import json

import pytest

from tests.jnana.test_public_face import run


SCRIPTS = ("run_pretrain", "run_align", "run_sft")
# Packages that one option, one stage or another script needs. (transformers' Trainer loads peft where it is installed,
# and peft bitsandbytes.)
WHERE_USED = ("bitsandbytes", "deepspeed", "evaluate", "fastapi", "gradio", "IPython", "matplotlib", "peft")
WHERE_USED += ("pillow_heif", "starlette", "tensorboard", "torchvision", "trl", "uvicorn", "wandb", "whisperx")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules that importing each script adds, one after the other, after those of the Trainer."""
    code = f"""
        import importlib, json, sys
        from transformers import Trainer, TrainingArguments
        found, before = {{}}, set(sys.modules)
        for name in {SCRIPTS!r}:
            importlib.import_module("jnana." + name)
            found[name] = sorted(set(sys.modules) - before)
        from jnana.evaluation import contact_sheet
        import matplotlib
        found["control"] = sorted(set(sys.modules) - before)
        print(json.dumps(found))
    """
    return json.loads(run(code))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stage_script_loads_what_it_needs(loaded, script):
    packages = {name.partition(".")[0] for name in loaded[script]}
    assert not packages & set(WHERE_USED), packages & set(WHERE_USED)
    assert "jnana.training.run" in loaded[script] or script != SCRIPTS[0]
    own = {name for name in loaded[script] if name.startswith("jnana.")}
    assert not [name for name in own if name.startswith(("jnana.chat", "jnana.export", "jnana.evaluation"))]


def test_a_package_that_is_loaded_is_seen(loaded):
    """The control."""
    assert "matplotlib" in loaded["control"] and "jnana.evaluation" in loaded["control"]
