"""Checkpoints: weight names on disk equal those in memory, and a saved directory loads with transformers alone."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from jnana.modeling import JnanaForConditionalGeneration, JnanaModel
from tests.modeling.pairs import join, pictures, save_text, save_vision, text_ids, with_images


VISIONS = [("clip", "default"), ("clip_full", "pooled"), ("siglip", "full"), ("dinov2", "default")]


@pytest.mark.parametrize(("vision", "strategy"), VISIONS)
@pytest.mark.parametrize("family", ["phi", "gpt_neox", "qwen2"])
def test_names_on_disk_are_names_in_memory(tmp_path, family, vision, strategy):
    model = join(tmp_path, family, vision, vision_feature_select_strategy=strategy)
    model.save_pretrained(tmp_path / "one")
    loaded, info = JnanaForConditionalGeneration.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    loaded.save_pretrained(tmp_path / "two")  # what was loaded remembers how its names were changed, if they were
    in_memory = set(model.state_dict()) - ({"lm_head.weight"} if family == "qwen2" else set())
    for folder in ("one", "two"):
        on_disk = load_file(tmp_path / folder / "model.safetensors")
        assert set(on_disk) == in_memory
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in on_disk.items())


def test_transformers_own_way_would_rename(tmp_path):
    """Negative control of the test above: without our `save_pretrained`, the tower comes back under another name."""
    save_vision(tmp_path / "bare", "clip_full")
    model = join(tmp_path, vision="dinov2")
    PreTrainedModel.save_pretrained(model, tmp_path / "pair")
    assert set(load_file(tmp_path / "pair" / "model.safetensors")) != set(model.state_dict())


def test_dtype_survives(tmp_path):
    model = join(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "pair")
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    full = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair", dtype=torch.float32)
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}


def test_auto_classes_know_jnana_in_this_process(tmp_path):
    join(tmp_path).save_pretrained(tmp_path / "pair")
    assert type(AutoConfig.from_pretrained(tmp_path / "pair")).__name__ == "JnanaConfig"
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path / "pair"), JnanaForConditionalGeneration)
    base, info = AutoModel.from_pretrained(tmp_path / "pair", output_loading_info=True)
    assert isinstance(base, JnanaModel) and not info["missing_keys"]
    assert info["unexpected_keys"] <= {"lm_head.weight", "lm_head.bias"}


def test_resized_vocabulary_saves_and_loads(tmp_path):
    model = join(tmp_path, "phi")
    model.resize_token_embeddings(350)
    assert model.lm_head.bias.shape == (350,) and model.config.text_config.vocab_size == 350
    model.save_pretrained(tmp_path / "pair")
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    ids, images = with_images(text_ids(), 4), pictures(2)
    with torch.no_grad():
        assert torch.equal(loaded(ids, pixel_values=images).logits, model(ids, pixel_values=images).logits)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = with_images(text_ids(1, 8, seed=index), 4)[0]
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 310, -100), "pixel_values": pictures(1, index)[0]}


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_the_trainer_resumes_every_weight(tmp_path, vision, monkeypatch):
    """The Trainer loads with `strict=False`; here nothing may be missing, and the end is that of an unbroken run."""

    def train(model, folder, steps, **resume):
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to="none",
            use_cpu=True,
            gradient_checkpointing=True,
        )
        Trainer(model, arguments, train_dataset=_Rows()).train(**resume)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    unbroken = train(join(tmp_path, vision=vision), tmp_path / "unbroken", 4)
    train(join(tmp_path, vision=vision), tmp_path / "broken", 2)
    fresh = JnanaForConditionalGeneration(AutoConfig.from_pretrained(tmp_path / "broken" / "checkpoint-2"))
    strict = []
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module,
        "load_state_dict",
        lambda module, weights, *args, **kwargs: strict.append(load(module, weights, strict=True)) or strict[-1],
    )
    resumed = train(fresh, tmp_path / "broken", 4, resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))
    assert strict, "the Trainer did not load the checkpoint"
    for name, tensor in unbroken.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


REMOTE = """
    import os, shutil, sys, torch
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
    source, target = sys.argv[1:]
    assert "jnana" not in sys.modules
    config = AutoConfig.from_pretrained(source, trust_remote_code=True)
    assert type(config).__name__ == "JnanaConfig" and type(config).__module__.startswith("transformers_modules")
    base = AutoModel.from_pretrained(source, trust_remote_code=True)
    assert type(base).__name__ == "JnanaModel"
    AutoModelForMultimodalLM.from_pretrained(source, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert type(model).__module__.startswith("transformers_modules")
    ids = torch.tensor([[310] * 4 + list(range(5, 15))])
    torch.manual_seed(0)
    images = torch.randn(1, 3, 24, 24)
    total = model(ids, pixel_values=images).logits.double().sum().item()
    answer = model.generate(input_ids=ids, pixel_values=images, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert answer.shape[1] > ids.shape[1]
    model.save_pretrained(target)
    base.save_pretrained(target + "-base")
    AutoModel.from_pretrained(target + "-base", trust_remote_code=True)
    # Negative control: a folder without its code does not load here.
    shutil.copytree(target + "-base", target + "-bare")
    os.unlink(target + "-bare/projector_jnana.py")
    try:
        AutoModel.from_pretrained(target + "-bare", trust_remote_code=True)
    except OSError:
        print(total)
    else:
        raise AssertionError("the code came from somewhere else")
"""


def test_a_fresh_interpreter_loads_saves_and_loads_again(tmp_path):
    """The repo is not on the path: `-I` in another folder, with only the code that the checkpoint carries."""
    model = join(tmp_path, "phi")
    model.save_pretrained(tmp_path / "one")
    ids = torch.tensor([[310] * 4 + list(range(5, 15))])
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(ids, pixel_values=torch.randn(1, 3, 24, 24)).logits.double().sum().item()

    away = tmp_path / "away"
    away.mkdir()
    # An editable install would put the repo on the path; an isolated interpreter must not find it either.
    script = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += f"sys.path[:] = [p for p in sys.path if p not in ('', {str(Path.cwd())!r})]\n" + textwrap.dedent(REMOTE)
    for source, target in (("one", "two"), ("two", "three")):
        run = subprocess.run(
            [sys.executable, "-I", "-c", script, str(tmp_path / source), str(tmp_path / target)],
            cwd=away,
            env={
                **os.environ,
                "HF_HOME": str(tmp_path / "hub"),
                "HF_MODULES_CACHE": str(tmp_path / "modules"),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
        # not to the bit: matrix products round by where their inputs lie in memory
        assert float(run.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)
        auto_map = json.loads((tmp_path / target / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {
            "AutoConfig",
            "AutoModel",
            "AutoModelForImageTextToText",
            "AutoModelForMultimodalLM",
            "AutoModelForPreTraining",
            "AutoModelForCausalLM",
            "AutoModelForSequenceClassification",
        }
        assert not any("--" in reference for reference in auto_map.values())


def test_the_code_in_a_checkpoint_is_complete_and_imports_only_what_a_reader_has(tmp_path):
    join(tmp_path).save_pretrained(tmp_path / "pair")
    files = {path.stem: ast.parse(path.read_text()) for path in (tmp_path / "pair").glob("*.py")}
    assert {"configuration_jnana", "modeling_jnana"} <= set(files)
    for tree in files.values():
        guarded = {inner for node in ast.walk(tree) if _is_availability_check(node) for inner in ast.walk(node)}
        for node in set(ast.walk(tree)) - guarded:
            if isinstance(node, ast.ImportFrom):
                assert node.module in files if node.level else node.module.split(".")[0] in _ALLOWED, node.module
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in _ALLOWED for alias in node.names)


_ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def _is_availability_check(node) -> bool:
    """`if is_peft_available():`, the form in which transformers lets remote code import what a reader may lack."""
    called = node.test if isinstance(node, ast.If) else None
    return isinstance(called, ast.Call) and ast.unparse(called.func).startswith("is_") and not node.orelse


def test_an_import_outside_of_an_availability_check_would_be_noticed():
    """Negative control of the test above."""
    inside, outside = "if is_peft_available():\n    import peft", "if peft_is_here:\n    import peft"
    found = [any(map(_is_availability_check, ast.walk(ast.parse(code)))) for code in (inside, outside)]
    assert found == [True, False]


def test_fields_can_be_overridden_when_loading(tmp_path):
    save_text(tmp_path / "x")
    join(tmp_path).save_pretrained(tmp_path / "pair")
    with pytest.raises(ValueError, match="`image_seq_length` is 4, but this tower gives 5"):
        JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair", vision_feature_select_strategy="full")
    model = JnanaForConditionalGeneration.from_pretrained(
        tmp_path / "pair", vision_feature_select_strategy="full", image_seq_length=5
    )
    assert model.get_image_features(pictures(1)).pooler_output[0].shape == (5, 64)
