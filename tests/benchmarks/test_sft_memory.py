"""The memory benchmark at a tiny size: it runs the recipe, and its counts follow the options."""

import json

import pytest

from benchmarks import sft_memory
from jnana.training.options.recipes import read_recipe


TINY = ["--scale", "tiny", "--steps", "2", "--images", "6"]


def test_the_recipe_is_what_runs(tmp_path, capsys):
    result = sft_memory.main([*TINY, "--output", str(tmp_path / "memory.json")])
    assert json.loads((tmp_path / "memory.json").read_text())["phases"] == result["phases"]
    assert len(result["losses"]) == result["steps"] == 2
    assert result["recipe"] == read_recipe("recipes/jnana/sft.yaml") and result["recipe"]["quantization"] == "nf4"
    held = result["held_bytes"]
    layers, hidden = 2, 32  # four square matrices and two four times as long, in each layer
    assert held["quantised_weights"] == layers * 12 * hidden**2
    assert held["quantised"] == held["quantised_weights"] // 2
    said = capsys.readouterr().out
    assert "LoRA on 12 linear layers of language_model" in said and "merged into the dequantized nf4 base" in said
    assert "training: peak" in said and "merging: peak" in said
    assert "jnana-" in said and not list(tmp_path.glob("jnana-*"))


def test_options_of_run_sft_go_there(capsys):
    """The control: without quantization the full weights are counted; unknown options are refused."""
    result = sft_memory.main([*TINY, "--quantization", "none", "--lora_r", "3"])
    held = result["held_bytes"]
    assert held["quantised"] == 0 and held["language_model"] > 4 * 2 * 12 * 32**2
    with pytest.raises(ValueError, match="unknown key 'quantisation'.*nearest known key is 'quantization'"):
        sft_memory.main([*TINY, "--quantisation", "none"])


def test_full_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(sft_memory.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sft_memory, "measure", lambda *args: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="There is no CUDA GPU here.*--scale tiny") as stopped:
        sft_memory.main([])
    assert "\n" not in str(stopped.value)


def test_the_verdict_is_on_what_the_card_must_have():
    phases = {
        "training": {"peak_gb": 9.0, "peak_reserved_gb": 14.9},
        "merging": {"peak_gb": 9, "peak_reserved_gb": 15.1},
    }
    text = sft_memory.table({"scale": "phi2", "steps": 2, "phases": phases, "held_bytes": {"trains": 4e8}})
    assert "14.90: under 15" in text and "15.10: NOT under 15" in text
