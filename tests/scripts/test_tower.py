"""The vision tower trains whole: what is saved in which dtype, resumes, further rounds, merging, refusals."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from jnana import JnanaForConditionalGeneration, load_model, run_align, run_sft
from jnana.training.stages import part_of
from tests.scripts.conftest import align_options, sft_options
from tests.scripts.test_resume import assert_same_weights, cut


# Rates large enough that six steps show, and LLaVA-1.6's tenth of the language model's for the tower.
TOWER = {"freeze_vision_tower": "false", "vision_learning_rate": "1e-4", "projector_learning_rate": "5e-4"}
HALF = {"dtype": "bfloat16", "bf16": "true", "use_cpu": "true"}


@pytest.fixture(scope="module")
def tower(tmp_path_factory, data, aligned):
    """An adapter on the language model, projector and tower whole, on a base in bfloat16."""
    folder = tmp_path_factory.mktemp("tower") / "sft"
    changes = {**TOWER, **HALF, "merge_adapter": "true", "gradient_checkpointing": "true"}
    run_sft.main(sft_options(data, aligned, output_dir=folder, **changes))
    return folder


def dtypes_by_part(file) -> dict[str, set[torch.dtype]]:
    found: dict[str, set[torch.dtype]] = {}
    for name, tensor in load_file(file).items():
        found.setdefault(part_of(name), set()).add(tensor.dtype)
    return found


def dtype_in_config(folder) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def test_an_adapter_holds_what_trained_in_float32(tower):
    for folder in (tower, tower / "checkpoint-3"):
        found = dtypes_by_part(folder / "adapter_model.safetensors")
        assert found == {part: {torch.float32} for part in ("vision_tower", "multi_modal_projector", "language_model")}
        assert dtype_in_config(folder) == "bfloat16"
    assert set.union(*dtypes_by_part(tower / "merged" / "model.safetensors").values()) == {torch.bfloat16}
    assert dtype_in_config(tower / "merged") == "bfloat16"


@pytest.mark.parametrize("how", ["load_model", "from_pretrained"])
def test_it_loads_unrounded(tower, how):
    saved = load_file(tower / "adapter_model.safetensors")
    path = str(tower)
    model = load_model(path)[0] if how == "load_model" else JnanaForConditionalGeneration.from_pretrained(path)
    prefix = "" if isinstance(model, PeftModel) else "base_model.model."
    held = {
        prefix + name.replace(".modules_to_save.default", ""): tensor for name, tensor in model.state_dict().items()
    }
    names = [name for name in saved if "vision_tower" in name]
    assert names and all(torch.equal(held[name], saved[name]) for name in names)
    assert model.dtype == torch.bfloat16
    rounded = [name for name in names if not torch.equal(saved[name], saved[name].bfloat16().float())]
    assert len(rounded) > len(names) / 2  # the control: bfloat16 would hold other values


def test_each_rate_is_logged(tower):
    log = json.loads((tower / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in log if "loss" in entry)
    names = ("learning_rate", "multi_modal_projector_learning_rate", "vision_tower_learning_rate")
    assert [first[name] for name in names] == [1e-3, 5e-4, 1e-4]


def test_it_resumes(tower, aligned, data, tmp_path):
    shutil.copytree(tower, tmp_path / "sft", ignore=shutil.ignore_patterns("merged"))
    cut(tmp_path / "sft" / "checkpoint-6" / "adapter_model.safetensors")
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    changes = {**TOWER, **HALF, "gradient_checkpointing": "true"}
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "sft", **changes))
    assert_same_weights(tmp_path / "sft", tower, "adapter_model.safetensors")
    with pytest.raises(AssertionError):  # the control
        assert_same_weights(tmp_path / "sft" / "checkpoint-3", tower, "adapter_model.safetensors")


def test_a_second_round_trains_the_tower_on(tower, data, tmp_path, capsys):
    """Only the rates are given; that the tower trains is the adapter's."""
    changes = {**HALF, "lora_r": 0, "max_steps": 2, "vision_learning_rate": "1e-4", "save_strategy": "no"}
    run_sft.main(sft_options(data, tower, output_dir=tmp_path, **changes))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tower, tmp_path))
    still = {name for name in second if torch.equal(first[name], second[name])}
    assert still and all("vision_tower.post_layernorm" in name for name in still)
    assert re.search(r"vision_tower +[\d,]+  float32 +64  float32", capsys.readouterr().out)


def test_a_whole_model_is_saved_as_it_was_trained(aligned, data, vision, pretrained, tmp_path):
    """What trained in float32 and the rest in `dtype`, which config.json names; it can be loaded unrounded."""
    changes = {**TOWER, **HALF, "max_steps": 2, "save_strategy": "no"}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align", **changes))
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "sft", **{**changes, "lora_r": 0}))
    trained, frozen = {torch.float32}, {torch.bfloat16}
    found = dtypes_by_part(tmp_path / "align" / "model.safetensors")
    assert found == {
        "vision_tower": trained,
        "multi_modal_projector": trained,
        "language_model": frozen,
        "lm_head": frozen,
    }
    assert dtype_in_config(tmp_path / "align") == "bfloat16"
    # all trains, so nothing is left in bfloat16
    assert set.union(*dtypes_by_part(tmp_path / "sft" / "model.safetensors").values()) == trained
    assert dtype_in_config(tmp_path / "sft") == "float32"
    saved = load_file(tmp_path / "align" / "model.safetensors")
    rounded = load_model(str(tmp_path / "align"))[0].state_dict()
    assert {tensor.dtype for tensor in rounded.values()} == frozen
    whole = load_model(str(tmp_path / "align"), dtype="float32")[0].state_dict()
    tower = [name for name in saved if "vision_tower.encoder" in name and name.endswith("weight")]
    assert all(torch.equal(whole[name], saved[name]) for name in tower)
    assert not any(torch.equal(rounded[name].float(), saved[name]) for name in tower if "norm" not in name)


def test_a_checkpoint_in_float16_trains_in_bfloat16(aligned, data, tmp_path, capsys):
    model, processor = load_model(str(aligned), dtype="float16")
    model.save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    assert dtype_in_config(tmp_path / "half") == "float16"
    changes = {"dtype": "auto", "bf16": "true", "use_cpu": "true", "max_steps": 1, "save_strategy": "no"}
    run_sft.main(sft_options(data, tmp_path / "half", output_dir=tmp_path / "sft", **changes))
    said = capsys.readouterr().out
    assert "is stored in float16; frozen weights are held in bfloat16" in said
    assert re.search(r"lm_head +0 +[\d,]+  bfloat16\n", said) and "  float16" not in said
    assert json.loads((tmp_path / "sft" / "jnana_base.json").read_text())["dtype"] == "bfloat16"
    changes |= {"dtype": "float16", "bf16": "false"}
    run_sft.main(sft_options(data, tmp_path / "half", output_dir=tmp_path / "asked", **changes))
    assert re.search(r"lm_head +0 +[\d,]+  float16\n", capsys.readouterr().out)  # the control


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_learning_rate": "2e-6"}, "vision_learning_rate is 2e-06, but the vision tower is frozen"),
        (
            {"vision_lr_scheduler_type": "linear"},
            "vision_lr_scheduler_type is 'linear', but the vision tower is frozen",
        ),
        (
            {**TOWER, "feature_cache": "cache"},
            r"feature_cache is .*, but the vision tower trains \(freeze_vision_tower",
        ),
        (
            {"dtype": "float16", "bf16": "true", "use_cpu": "true"},
            "dtype is 'float16' but bf16 is true, .* `dtype: bflo",
        ),
        ({**TOWER, "vision_learning_rate": -1}, "vision_learning_rate is -1.0; it must be at least 0"),
    ],
)
def test_refused_before_a_model_is_loaded(data, vision, pretrained, aligned, tmp_path, monkeypatch, changes, message):
    for script in (run_align, run_sft):
        monkeypatch.setattr(script, "prepare_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    if "feature_cache" in changes:
        changes = {**changes, "feature_cache": tmp_path / "cache"}
    with pytest.raises(ValueError, match=message):
        run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path, **changes))
    with pytest.raises(ValueError, match=message):
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path, **changes))
