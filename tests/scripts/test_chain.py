"""The three scripts in order: the files in each output directory, the weights that changed, and how they load."""

import json
import logging
import re
import shlex
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CLIPModel, modeling_utils

from jnana import run_merge, run_sft
from jnana.processing.data import read_json_lines
from jnana.training.adapters import adapter_reference
from jnana.training.loading import load_model
from jnana.training.saving.frozen_weights import checkpoint_tensors
from jnana.training.stages import part_of
from tests.scripts.conftest import options, sft_options


def logits(model, processor, data) -> torch.Tensor:
    """The logits for one image at every position: (1, sequence_length, vocabulary)."""
    question = [
        {"type": "image", "path": str(data / "images/red_blue.png")},
        {"type": "text", "text": "what is the top?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_each_stage_leaves_a_complete_checkpoint(pretrained, aligned, tuned):
    for folder in (pretrained, aligned, tuned):
        for name in ("README.md", "loss_curve.png", "trainer_state.json", "tokenizer.json"):
            assert (folder / name).is_file(), (folder.name, name)
    for folder in (aligned, tuned / "merged"):
        for name in ("model.safetensors", "processor_config.json", "chat_template.jinja", "modeling_jnana.py"):
            assert (folder / name).is_file(), (folder.name, name)
    assert sorted(path.name for path in aligned.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_align_changed_the_projector_alone(pretrained, aligned, vision):
    tensors = load_file(aligned / "model.safetensors")
    text = AutoModelForCausalLM.from_pretrained(pretrained).state_dict()
    tower = CLIPModel.from_pretrained(vision).vision_model.state_dict()
    compared = 0
    for name, tensor in tensors.items():
        if part_of(name) == "language_model":
            assert torch.equal(tensor, text["model." + name.split("language_model.")[1]]), name
        elif part_of(name) == "lm_head":
            assert torch.equal(tensor, text[name]), name
        elif part_of(name) == "vision_tower" and "position_ids" not in name:
            assert torch.equal(tensor, tower[name.split("vision_tower.")[1].removeprefix("vision_model.")]), name
        else:
            continue
        compared += 1
    projector = {name for name in tensors if part_of(name) == "multi_modal_projector"}
    assert compared + len(projector) == len(tensors)
    earlier = checkpoint_tensors(aligned / "checkpoint-4")
    assert {name for name in tensors if not torch.equal(tensors[name], earlier[name])} == projector


def test_fingerprint_and_special_tokens_travel(pretrained, aligned, tuned):
    fingerprint = AutoConfig.from_pretrained(pretrained).tokenizer_fingerprint
    for folder in (aligned, tuned / "merged"):
        model, processor = load_model(str(folder))
        assert model.config.tokenizer_fingerprint == fingerprint
        generation = model.generation_config
        assert generation.pad_token_id == processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id
        assert generation.eos_token_id == processor.tokenizer.eos_token_id
        assert generation.suppress_tokens == [processor.image_token_id]
        # 290 entries and a row for the image token fitted from the start
        assert model.get_input_embeddings().weight.shape[0] == 320


def test_merged_says_what_the_adapter_says(aligned, tuned, data):
    adapted = logits(*load_model(str(tuned)), data)
    merged = logits(*load_model(str(tuned / "merged")), data)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    base = logits(*load_model(str(aligned)), data)
    assert (base - adapted).abs().max() > 1e-2  # the control: training did change something


def test_the_disk_is_full_for_the_merged_model(aligned, tuned, data, tmp_path, monkeypatch):
    """The adapter is complete, and the command in the error message writes the merged model that did not fit."""
    folder = tmp_path / "sft"
    shutil.copytree(tuned, folder, ignore=shutil.ignore_patterns("merged"))

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", full)  # PEFT has its own
        with pytest.raises(OSError, match="no room .* The adapter is complete; make room, and run: python") as caught:
            run_sft.main(sft_options(data, aligned, output_dir=folder, merge_adapter="true"))
    _, option, module, *arguments = shlex.split(str(caught.value).partition("and run: ")[2])
    assert (option, module) == ("-m", "jnana.run_merge") and not list(folder.glob("merged/*.safetensors"))
    run_merge.main(arguments)
    merged, reference = (load_file(path / "merged" / "model.safetensors") for path in (folder, tuned))
    assert merged.keys() == reference.keys() and all(torch.equal(merged[name], reference[name]) for name in merged)


def test_every_kind_of_folder_loads(aligned, tuned, data):
    last = logits(*load_model(str(aligned)), data)
    assert torch.equal(logits(*load_model(str(aligned / "checkpoint-6")), data), last)
    assert not torch.equal(logits(*load_model(str(aligned / "checkpoint-4")), data), last)
    adapted = logits(*load_model(str(tuned)), data)
    assert torch.equal(logits(*load_model(str(tuned / "checkpoint-6")), data), adapted)
    assert not torch.equal(logits(*load_model(str(tuned / "checkpoint-3")), data), adapted)


def test_an_adapter_moves_with_its_base(aligned, tuned, data, tmp_path):
    shutil.copytree(aligned, tmp_path / "align", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copytree(tuned, tmp_path / "sft", ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
    assert adapter_reference(str(tmp_path / "sft"))["names"]["model"] == str(tmp_path / "sft" / "../align")
    shutil.rmtree(tmp_path / "align")
    reference = json.loads((tmp_path / "sft" / "jnana_base.json").read_text())
    reference["names"]["model"] = "/gone/align"
    (tmp_path / "sft" / "jnana_base.json").write_text(json.dumps(reference))
    with pytest.raises(ValueError, match="trained on model '/gone/align', which is not a directory here"):
        load_model(str(tmp_path / "sft"))


def test_an_adapter_on_other_weights_is_noticed(tuned, aligned, tmp_path, caplog):
    """Same name, same shapes, other numbers: a warning that names the base. Untouched, or held in 4 bits: none."""
    shutil.copytree(aligned, tmp_path / "align", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copytree(tuned, tmp_path / "sft", ignore=shutil.ignore_patterns("checkpoint-*", "merged"))
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        for quantization in ("none", "nf4"):
            load_model(str(tmp_path / "sft"), quantization=quantization)
        said_before = "answers may be wrong" in caplog.text
        weights = load_file(tmp_path / "align" / "model.safetensors")
        name = "model.language_model.layers.0.mlp.fc1.weight"
        save_file({**weights, name: weights[name] * 1.01}, tmp_path / "align" / "model.safetensors", {"format": "pt"})
        load_model(str(tmp_path / "sft"))
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert not said_before
    assert re.search("the weights of model '.*align' have changed .* answers may be wrong", caplog.text)


def test_samples_and_loss_curve(tuned, pretrained):
    lines = list(read_json_lines(tuned / "samples.jsonl", "skip"))
    assert [line["step"] for line in lines] == [0, 0, 3, 3, 6, 6]
    assert lines[0]["prompt"] == "what is the top?" and lines[0]["truth"] == "white"
    page = (tuned / "samples.html").read_text()
    assert page.count("<img") == 2 and "what is the bottom?" in page
    for folder in (tuned, pretrained):
        with Image.open(folder / "loss_curve.png") as curve:
            assert curve.size[0] > 500
    assert len(list(read_json_lines(pretrained / "samples.jsonl", "skip"))) == 3


def test_the_card_is_ours_and_private(tuned, aligned):
    card = ModelCard.load(tuned / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert {"jnana", "sft", "lora"} <= set(card.data.tags)
    state = json.loads((tuned / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert f"| training loss, step 6 | {losses[-1]:.4f} |" in card.text
    assert "AutoModelForImageTextToText" in card.text and "`instruct.json`" in card.text
    assert str(tuned.parent) not in card.content and "/tmp" not in card.content
    for folder in (aligned, tuned / "merged"):
        assert "AutoModelForImageTextToText" in (folder / "README.md").read_text()


def test_a_further_round_on_the_same_adapter(tuned, data, tmp_path):
    output = tmp_path / "round2"
    run_sft.main(sft_options(data, tuned, output_dir=output, lora_r=0, max_steps=2, save_strategy="no"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tuned, output))
    assert first.keys() == second.keys()
    # the biases of keys get no LoRA; everything an adapter holds goes on training
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert adapter_reference(str(output))["names"]["model"].endswith("align")
    load_model(str(output))


def test_sft_of_a_pair_without_align(pretrained, vision, data, tmp_path):
    """phi35_pooled's way: adapter and projector together from the start; the base is the pair itself."""
    output = tmp_path / "pooled"
    arguments = {
        "vision_model": vision,
        "text_model": pretrained,
        "projector_layer_norm": "true",
        "vision_feature_select_strategy": "pooled",
        "chat_template": "phi35_pooled",
        "train_data": data / "instruct.json",
        "image_folder": data / "images",
        "lora_r": 2,
        "max_steps": 2,
        "output_dir": output,
        "merge_adapter": "true",
        "gradient_checkpointing": "true",
    }
    run_sft.main(options(**arguments))
    adapted = logits(*load_model(str(output)), data)
    merged = logits(*load_model(str(output / "merged")), data)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning(aligned, data, tmp_path):
    output = tmp_path / "full"
    changes = {
        "lora_r": 0,
        "max_steps": 2,
        "gradient_checkpointing": "true",
        "optimizer": "muon",
        "dataloader_num_workers": 1,
    }
    run_sft.main(sft_options(data, aligned, output_dir=output, **changes))
    before, after = (load_file(folder / "model.safetensors") for folder in (aligned, output))
    changed = {part_of(name) for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector", "language_model", "lm_head"}
    assert "MuonWithAdamW" in (output / "README.md").read_text()


def test_a_new_schedule_in_bfloat16(aligned, data, tmp_path):
    """Frozen weights in bfloat16, what trains in float32, forward in bfloat16: the recipes' setting, on a CPU."""
    output = tmp_path / "bf16"
    samples = {"sample_steps": 2, "sample_count": 1, "sample_max_new_tokens": 4}
    run_sft.main(
        sft_options(
            data, aligned, output_dir=output, max_steps=2, dtype="bfloat16", bf16="true", use_cpu="true", **samples
        )
    )
    adapter = load_file(output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    model, processor = load_model(str(output), dtype="bfloat16")
    assert torch.isfinite(logits(model, processor, data)).all()


def test_the_code_of_the_merged_card_runs(tuned, data, tmp_path, monkeypatch, capsys):
    """It names the merged directory, not the adapter's; the card says where to run it."""
    shutil.copytree(tuned / "merged", tmp_path / "merged")
    with Image.open(data / "images" / "red_blue.png") as image:
        image.save(tmp_path / "image.jpg")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "merged" / "README.md").read_text(), re.DOTALL).group(1)
    assert code.count('from_pretrained("merged"') == 2 and "parent directory" in code and '"sft"' not in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out
