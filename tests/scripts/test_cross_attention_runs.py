"""align -> sft -> merge with cross-attention, and sft from an IDEFICS checkpoint, all at tiny size."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from jnana import run_align, run_evaluate, run_sft
from jnana.chat import ChatSession
from jnana.processing.data import read_json_lines
from jnana.training.loading import load_model
from jnana.training.saving.frozen_weights import checkpoint_tensors
from jnana.training.stages import part_of
from tests.modeling.tiny_idefics import save_tiny_idefics
from tests.scripts.conftest import CROSS, align_options, sft_options
from tests.scripts.test_chain import logits
from tests.scripts.test_resume import assert_same_weights, cut


JOINING = {"multi_modal_projector", "cross_attention"}


@pytest.fixture(scope="module")
def adapter(crossed, data):
    folder = crossed.parent / "sft"
    run_sft.main(sft_options(data, crossed, output_dir=folder, merge_adapter="true", gradient_checkpointing="true"))
    return folder


def test_align_trains_resampler_and_blocks_alone(crossed):
    tensors = load_file(crossed / "model.safetensors")
    earlier = checkpoint_tensors(crossed / "checkpoint-4")
    changed = {name for name in tensors if not torch.equal(tensors[name], earlier[name])}
    assert changed == {name for name in tensors if part_of(name) in JOINING}
    card = (crossed / "README.md").read_text()
    assert "cross_attention" in card


def test_one_token_an_image(crossed, data):
    model, processor = load_model(str(crossed))
    assert model.config.fusion == "cross_attention" and processor.tokens_per_view == 1
    question = [{"type": "image", "path": str(data / "images/red_blue.png")}, {"type": "text", "text": "what?"}]
    ids = processor.apply_chat_template([{"role": "user", "content": question}], tokenize=True)
    assert ids[0].count(processor.image_token_id) == 1


def test_sft_trains_adapter_resampler_and_blocks(crossed, adapter, data):
    weights = load_file(adapter / "adapter_model.safetensors")
    whole = {name for name in weights if ".lora_" not in name}
    assert {part_of(name) for name in whole} == JOINING
    assert len(whole) == len([n for n in load_file(crossed / "model.safetensors") if part_of(n) in JOINING])
    start, _ = load_model(str(crossed))
    before = dict(start.named_parameters())
    for name in whole:
        assert not torch.equal(weights[name], before[name.removeprefix("base_model.model.")]), name
    assert all("language_model" in name for name in weights if ".lora_" in name)


def test_merged_says_what_the_adapter_says(crossed, adapter, data):
    adapted = logits(*load_model(str(adapter)), data)
    torch.testing.assert_close(logits(*load_model(str(adapter / "merged")), data), adapted, rtol=1e-4, atol=1e-4)
    assert (logits(*load_model(str(crossed)), data) - adapted).abs().max() > 1e-2  # the control


REMOTE = """
import sys
import torch
from transformers import AutoModelForImageTextToText
assert "jnana" not in sys.modules
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
torch.manual_seed(0)
image = model.config.image_token_id
with torch.no_grad():
    print(model(torch.tensor([[image, 5, 6, 7]]), pixel_values=torch.randn(1, 3, 24, 24)).logits.double().sum().item())
"""


def test_a_fresh_interpreter_loads_it(adapter, tmp_path):
    run = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, str(adapter / "merged")],
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    model, _ = load_model(str(adapter / "merged"))
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.tensor([[model.config.image_token_id, 5, 6, 7]])
        expected = model(ids, pixel_values=torch.randn(1, 3, 24, 24)).logits.double().sum().item()
    assert float(run.stdout.split()[-1]) == pytest.approx(expected, rel=1e-6)


def test_both_stages_resume(data, vision, pretrained, crossed, adapter, tmp_path):
    """The last checkpoint of each run is broken, so both go on from the one before."""
    shutil.copytree(crossed, tmp_path / "align")
    cut(tmp_path / "align" / "checkpoint-6" / "optimizer.pt")
    (tmp_path / "align" / "model.safetensors").unlink()
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align", **CROSS))
    assert_same_weights(tmp_path / "align", crossed)
    shutil.copytree(adapter, tmp_path / "sft", ignore=shutil.ignore_patterns("merged"))
    cut(tmp_path / "sft" / "checkpoint-6" / "adapter_model.safetensors")
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    options = {"output_dir": tmp_path / "sft", "gradient_checkpointing": "true"}
    run_sft.main(sft_options(data, crossed, **options))
    assert_same_weights(tmp_path / "sft", adapter, "adapter_model.safetensors")


def test_packed_rows_with_and_without_checkpointing(data, crossed, tmp_path):
    common = {"max_steps": 2, "save_strategy": "no", "lora_r": 0, "adam_epsilon": "1e-3"}
    common |= {"per_device_train_batch_size": 4, "packing": "shared_image", "max_row_tokens": 128}
    for name, changes in (("plain", {}), ("checkpointed", {"gradient_checkpointing": "true"}), ("other", {"seed": 1})):
        run_sft.main(sft_options(data, crossed, output_dir=tmp_path / name, **{**common, **changes}))
    assert_same_weights(tmp_path / "checkpointed", tmp_path / "plain")
    with pytest.raises(AssertionError):  # the control: rows in another order
        assert_same_weights(tmp_path / "other", tmp_path / "plain")


def test_an_adapter_on_four_bits(data, crossed, tmp_path):
    """Only the language model is quantised; blocks and resampler train in float32."""
    changes = {"quantization": "nf4", "max_steps": 2, "save_strategy": "no", "merge_adapter": "true"}
    run_sft.main(sft_options(data, crossed, output_dir=tmp_path / "sft", **changes))
    model, processor = load_model(str(tmp_path / "sft"))
    quantised = {part_of(name) for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert quantised == {"language_model"}
    joining = {weight.dtype for name, weight in model.named_parameters() if part_of(name) in JOINING}
    assert joining == {torch.float32}
    logits(model, processor, data)
    load_model(str(tmp_path / "sft" / "merged"))


def test_the_projectors_rate_is_the_blocks_too(data, crossed, tmp_path, capsys):
    """At a rate of 0 for the projector neither it nor the blocks change."""
    rates = {"projector_learning_rate": 0.0, "max_steps": 1, "weight_decay": 0.0, "save_strategy": "no", "lora_r": 0}
    run_sft.main(sft_options(data, crossed, output_dir=tmp_path / "run", **rates))
    ours, start = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", crossed))
    changed = {part_of(name) for name in ours if not torch.equal(ours[name], start[name])}
    assert changed == {"language_model", "lm_head"}


def test_a_chat_keeps_the_images_with_its_cache(crossed, data):
    model, processor = load_model(str(crossed))
    model.config.text_config.max_position_embeddings = 512
    with torch.no_grad():
        for layer in model.model.cross_attention.layers:
            layer.attention_gate.fill_(2.0)
    sessions = [ChatSession(model, processor, keep_cache=keep) for keep in (True, False)]
    red, blue = (str(data / f"images/{name}.png") for name in ("red_blue", "white_black"))
    turns = [("top?", [red]), ("below?", []), ("here?", [blue]), ("why?", [])]
    for text, images in turns:
        answers = [list(session.ask(text, images, max_new_tokens=3))[-1] for session in sessions]
        assert answers[0] == answers[1]
        kept = [list(session.retry(max_new_tokens=3))[-1] for session in sessions]
        assert kept == answers
    assert sessions[0].last_turn.cached_tokens > 0 == sessions[1].last_turn.cached_tokens


def test_the_tower_may_train_and_samples_are_written(data, vision, pretrained, crossed, tmp_path):
    changes = {"freeze_vision_tower": "false", "max_steps": 2, "sample_steps": 2, "sample_count": 2}
    changes |= {"eval_data": data / "captions.json", "eval_image_folder": data / "images"}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "run", **{**CROSS, **changes}))
    ours, frozen = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", crossed))
    changed = {part_of(name) for name in ours if not torch.equal(ours[name], frozen[name])}
    assert changed == {"vision_tower", *JOINING}
    samples = list(read_json_lines(tmp_path / "run" / "samples.jsonl", "skip"))
    assert [line["step"] for line in samples] == [0, 0, 2, 2]


def test_evaluation(data, adapter, tmp_path):
    """In batches of questions about different images; alone each gets the same answer."""
    predictions = []
    for size in (4, 1):
        options = {"eval_data": data / "instruct.json", "image_folder": data / "images", "batch_size": size}
        options |= {"max_rows": 4, "max_new_tokens": 4, "num_workers": 0, "output_dir": tmp_path / str(size)}
        words = [f"--{name}={value}" for name, value in options.items()]
        run_evaluate.main([f"--model_name_or_path={adapter}", *words])
        lines = read_json_lines(tmp_path / str(size) / "predictions.jsonl", "skip")
        predictions.append([line["prediction"] for line in lines])
    assert predictions[0] == predictions[1] and len(predictions[0]) == 8


def test_sft_from_an_idefics_checkpoint(data, tmp_path):
    save_tiny_idefics(tmp_path / "idefics")
    changes = {"max_steps": 2, "save_steps": 2, "merge_adapter": "true", "lora_target_modules": "q_proj"}
    run_sft.main(sft_options(data, tmp_path / "idefics", output_dir=tmp_path / "sft", **changes))
    adapted, merged = (load_model(str(tmp_path / "sft" / name)) for name in ("", "merged"))
    torch.testing.assert_close(logits(*merged, data), logits(*adapted, data), rtol=1e-4, atol=1e-4)
    start = load_model(str(tmp_path / "idefics"))
    assert (logits(*start, data) - logits(*merged, data)).abs().max() > 1e-3
    assert merged[0].config.image_end_token_id is None  # every answer ends in </s>, and questions follow
    assert merged[0].generation_config.suppress_tokens == [320, 321]
