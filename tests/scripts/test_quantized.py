"""QLoRA from the command line: train on 4 bits, merge into either base, load without jnana, train a second round."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from jnana import run_evaluate, run_merge, run_sft
from jnana.chat import ChatSession
from jnana.training.adapters import adapter_reference
from jnana.training.loading import load_model
from jnana.training.merging import max_difference, merge_adapter, merging_base, probe_logits
from tests import packed_kernel
from tests.chat.test_session import largest_difference, reread
from tests.packed_kernel import KERNELS, force_kernel
from tests.scripts.conftest import options, sft_options
from tests.scripts.test_chain import logits


@pytest.fixture(scope="module", params=KERNELS)
def kernel(request):
    """Every test of a 4-bit model runs on both of bitsandbytes' ways to multiply (see packed_kernel.py)."""
    with pytest.MonkeyPatch.context() as patch:
        force_kernel(request.param, patch.setattr)
        yield request.param


@pytest.fixture(scope="module")
def quantized(kernel, aligned, data, tmp_path_factory) -> Path:
    """Six steps on a 4-bit base, all in float32 so that nothing but the 4 bits rounds."""
    folder = tmp_path_factory.mktemp("qlora") / "sft"
    changes = {"quantization": "nf4", "learning_rate": "1e-2", "projector_learning_rate": "2e-3"}
    run_sft.main(sft_options(data, aligned, output_dir=folder, merge_adapter="true", **changes))
    return folder


def test_it_learns_and_says_what_it_rests_on(quantized):
    state = json.loads((quantized / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in state if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert [entry["multi_modal_projector_learning_rate"] for entry in state if "loss" in entry][0] == 2e-3
    for folder in (quantized, quantized / "checkpoint-3"):
        assert adapter_reference(str(folder))["quantization"]["quantization"] == "nf4"
        assert (folder / "modeling_jnana.py").is_file() and (folder / "processor_config.json").is_file()
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_evaluating_while_it_trains_changes_nothing(quantized, kernel, aligned, data, tmp_path, monkeypatch):
    """Evaluations and samples between the steps leave the weights' bytes as they are without them."""
    changes = {"quantization": "nf4", "learning_rate": "1e-2", "projector_learning_rate": "2e-3"}
    changes |= {"eval_strategy": "steps", "eval_steps": 2, "sample_steps": 1, "sample_max_new_tokens": 2}
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "sft", **changes))
    name = "adapter_model.safetensors"
    assert (tmp_path / "sft" / name).read_bytes() == (quantized / name).read_bytes()
    if kernel == "off":
        return
    # the control: with the layers as bitsandbytes makes them the gradients are wrong after the first sample, or none
    monkeypatch.setattr("jnana.modeling.modeling_jnana.disable_packed_kernel", lambda model: None)
    try:
        run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "spoilt", **changes))
    except RuntimeError as error:
        assert "requires grad" in str(error)
    else:
        assert (tmp_path / "spoilt" / name).read_bytes() != (quantized / name).read_bytes()


def test_merging_into_both_bases(quantized, data, tmp_path, capsys):
    """Into the dequantised base: what was trained. Into the original weights: off by what 4 bits lose, and said so."""
    adapted = logits(*load_model(str(quantized)), data)
    reports = {}
    for base in ("dequantized", "full"):
        run_merge.main(options(model_name_or_path=quantized, output_dir=tmp_path / base, merge_base=base))
        merged, processor = load_model(str(tmp_path / base))
        assert not getattr(merged, "is_quantized", False)
        reports[base] = merged.config.adapter_merge
        difference = (logits(merged, processor, data) - adapted).abs().max().item()
        assert difference < (1e-5 if base == "dequantized" else 0.5)
        assert (difference > 1e-3) == (base == "full")  # the control: the two bases are not the same
        card = ModelCard.load(tmp_path / base / "README.md")
        assert f"merged into the {reports[base]['base']} base" in card.text and "lora" not in card.data.tags
    said = capsys.readouterr().out
    assert "merged into the dequantized nf4 base in float32" in said and "merged into the full base" in said
    assert reports["dequantized"]["max_logit_difference"] < 1e-5 < 1e-3 < reports["full"]["max_logit_difference"]
    for report in reports.values():
        assert report["trained_on"] == "nf4" and report["adapter_logit_change"] > 0.05
    ours, theirs = (load_file(f / "model.safetensors") for f in (quantized / "merged", tmp_path / "dequantized"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_merge_that_forgot_the_adapter_would_be_seen(quantized):
    """The control of the comparison itself: the dequantised base alone differs by what the adapter changed."""
    model, processor = load_model(str(quantized))
    base = merging_base(str(quantized), adapter_reference(str(quantized)), "dequantized", "float32", {})
    assert max_difference(probe_logits(model, processor), probe_logits(base, processor)) > 0.05


def test_merging_in_bfloat16_rounds(quantized, tmp_path):
    report = merge_adapter(str(quantized), tmp_path / "half", dtype="bfloat16")
    assert 1e-4 < report.max_logit_difference < 0.1
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}


FRESH = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image
assert "jnana" not in sys.modules
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.") and model.is_loaded_in_4bit
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What do you see in this picture?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                           tokenize=True, return_dict=True, return_tensors="pt")
    print("sum", model(**inputs).logits.double().sum().item())
"""


def test_an_adapter_folder_loads_in_a_fresh_interpreter(quantized, kernel, tmp_path):
    """By transformers alone, the repository not on the path: code, base, 4 bits, adapter and trained projector."""
    model, processor = load_model(str(quantized))
    expected = probe_logits(model, processor)[0].double().sum().item()
    earlier = probe_logits(*load_model(str(quantized / "checkpoint-3")))[0].double().sum().item()
    force = f"exec(open({packed_kernel.__file__!r}).read())\nforce_kernel({kernel!r})\n"
    script = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += f"sys.path[:] = [p for p in sys.path if p not in ('', {str(Path.cwd())!r})]\n" + force + FRESH
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(quantized), str(quantized / "checkpoint-3")],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    sums = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("sum")]
    assert sums == pytest.approx([expected, earlier], abs=1e-3)
    assert abs(expected - earlier) > 0.1  # the control: the two folders do not hold the same


HELD = {"merged": ("merged", None), "adapter": (".", "none"), "nf4_adapter": (".", None)}


@pytest.mark.parametrize(("folder", "quantization"), HELD.values(), ids=HELD)
def test_the_chat_takes_every_kind_of_folder(quantized, aligned, folder, quantization):
    """The answers of `generate`; what is kept between turns is what a second reading gives; the adapter is at work."""
    model, processor = load_model(str(quantized / folder), quantization=quantization)
    assert bool(getattr(model, "is_loaded_in_4bit", False)) == (folder == "." and quantization is None)
    image = Image.radial_gradient("L").convert("RGB")
    session = ChatSession(model, processor)
    *_, answer = session.ask("what is this?", [image], max_new_tokens=6)
    *_, _ = session.ask("why?", max_new_tokens=6)
    assert answer and session.last_turn.cached_tokens > 10
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(output, skip_special_tokens=True).strip() == answer
    assert largest_difference(session, reread(session)) < 1e-5
    without = ChatSession(load_model(str(aligned))[0], processor)  # the control: no adapter
    without.messages, without._images = session.messages, session._images
    assert largest_difference(session, reread(without)) > 1e-3


def test_a_second_round_adopts_everything(quantized, data, tmp_path):
    """Only data and schedule are given; rank, targets and the 4-bit base come from the first round's folder."""
    output = tmp_path / "round2"
    run_sft.main(sft_options(data, quantized, output_dir=output, lora_r=0, max_steps=2, save_strategy="no"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (quantized, output))
    assert first.keys() == second.keys() and all(not torch.equal(first[name], second[name]) for name in first)
    references = [adapter_reference(str(folder)) for folder in (quantized, output)]
    assert references[0]["quantization"] == references[1]["quantization"]
    assert [Path(reference["names"]["model"]).resolve().name for reference in references] == ["align", "align"]
    rates = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert rates[0]["learning_rate"] == 1e-3  # a fresh schedule, from its start


def test_eight_bits_train_too(aligned, data, tmp_path):
    changes = {"quantization": "int8", "max_steps": 2, "save_strategy": "no", "gradient_checkpointing": "true"}
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "int8", **changes))
    model, processor = load_model(str(tmp_path / "int8"))
    assert model.get_base_model().is_loaded_in_8bit and torch.isfinite(logits(model, processor, data)).all()


def test_align_goes_on_from_an_earlier_align(aligned, data, tmp_path):
    from jnana import run_align

    arguments = {"model_name_or_path": aligned, "train_data": data / "captions.json", "max_steps": 2}
    run_align.main(options(**arguments, image_folder=data / "images", output_dir=tmp_path, save_strategy="no"))
    before, after = (load_file(folder / "model.safetensors") for folder in (aligned, tmp_path))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if "multi_modal_projector" in name}


def test_evaluating_an_adapter_on_its_4_bits_and_off_them(quantized, data, tmp_path):
    """By default the base is held as in training; `quantization` overrides that, for a full checkpoint too."""
    fingerprints = {}
    for name, folder, changes in (
        ("as trained", quantized, {}),
        ("nf4", quantized, {"quantization": "nf4"}),
        ("none", quantized, {"quantization": "none"}),
        ("merged", quantized / "merged", {}),
        ("merged, nf4", quantized / "merged", {"quantization": "nf4"}),
    ):
        values = {"eval_data": data / "instruct.json", "image_folder": data / "images", "blind": "false"}
        values |= {"max_rows": 2, "max_new_tokens": 2, "num_workers": 0, "max_examples": 0, **changes}
        run_evaluate.main(options(model_name_or_path=folder, output_dir=tmp_path / name, **values))
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["splits"]["test"]["overall"]["n"] == 4
        assert results["settings"]["quantization"] == changes.get("quantization")
        fingerprints[name] = results["model_fingerprint"]
    assert fingerprints["as trained"] == fingerprints["nf4"]
    assert len(set(fingerprints.values())) == 4  # the control: whatever else was loaded is something else


def test_evaluation_says_before_loading_that_bitsandbytes_is_missing(quantized, data, tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.training.options.computation_checks.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(run_evaluate, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    values = {"eval_data": data / "instruct.json", "image_folder": data / "images", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="quantization is 'nf4', which needs bitsandbytes"):
        run_evaluate.main(options(model_name_or_path=quantized / "merged", quantization="nf4", **values))


def test_merging_with_a_build_that_knows_cuda(tuned, tmp_path, monkeypatch):
    """`pip install torch` gives such a build on machines without a GPU too; the merge is computed on the CPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")  # the control
    merge_adapter(str(tuned), tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, tuned / "merged"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
