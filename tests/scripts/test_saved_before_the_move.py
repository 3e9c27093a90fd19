"""Checkpoints of version 0.1, from before its folders moved into one package, load, answer, merge and resume.

`tests/fixtures/saved_by_0_1` was written by that version; its README says how.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModel,
)
from transformers.utils import is_torchvision_available

from jnana import (
    JnanaForConditionalGeneration,
    JnanaProcessor,
    load_model,
    run_align,
    run_merge,
    run_pretrain,
    run_sft,
)
from jnana.modeling import CACHE_NAME
from jnana.processing.data import FeatureCache
from tests.packed_kernel import HAS_NATIVE_KERNEL
from tests.scripts.conftest import options


SAVED = Path(__file__).parents[1] / "fixtures" / "saved_by_0_1"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
FOLDERS = list(EXPECTED["answers"])

STAGES = {"pretrain": run_pretrain, "align": run_align, "sft": run_sft}
STARTS = {"align": "small_pretrain", "sft": "small_align"}
ADAPTERS = ("sft", "sft_nf4")


def lay_out(folder: Path) -> Path:
    """A copy, in which each folder that was saved with code has that code again: the fixture keeps it once."""
    shutil.copytree(SAVED, folder)
    for config in folder.rglob("config.json"):
        if "auto_map" in json.loads(config.read_text(encoding="utf-8")):
            shutil.copytree(SAVED / "code", config.parent, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """To read from."""
    return lay_out(tmp_path_factory.mktemp("saved") / "by_0_1")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """To write to; also the working directory, from where the recipes name their files."""
    monkeypatch.chdir(lay_out(tmp_path / "by_0_1"))
    return tmp_path / "by_0_1"


def expected_tensors(start: str) -> dict[str, torch.Tensor]:
    tensors = load_file(SAVED / "expected.safetensors")
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def model_inputs(processor, folder: Path, chat: str) -> dict[str, torch.Tensor]:
    messages = json.loads(json.dumps(EXPECTED["chats"][chat]).replace("data/images", f"{folder}/data/images"))
    template_options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **template_options)


@torch.no_grad()
def assert_answers(model, processor, folder: Path, name: str, tolerance: float = 1e-5) -> None:
    """What the tokenizer and the chat template make of each chat, the logits, and the answer word for word."""
    model.eval()
    for chat, expected in EXPECTED["answers"][name].items():
        inputs = model_inputs(processor, folder, chat)
        assert inputs["input_ids"][0].tolist() == expected["input_ids"], chat
        logits = model(**inputs).logits[0]
        tensors = expected_tensors(f"{name}:{chat}:")
        for found, wanted in ((logits[-3:], tensors["logits"]), (logits.logsumexp(-1), tensors["logsumexp"])):
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        assert output[len(expected["input_ids"]) :] == expected["ids"], chat
        assert processor.decode(expected["ids"], skip_special_tokens=True) == expected["text"]


def with_processor(model_class):
    return lambda path: (model_class.from_pretrained(path), AutoProcessor.from_pretrained(path))


LOADERS = {
    "auto_class": with_processor(AutoModelForImageTextToText),
    "model_class": with_processor(JnanaForConditionalGeneration),
    "load_model": load_model,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", FOLDERS)
def test_it_loads_and_answers(saved, name, loader, monkeypatch):
    """By each way that today's package has; an adapter's base is found beside it, from anywhere."""
    monkeypatch.chdir("/")
    model, processor = LOADERS[loader](str(saved / name))
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, JnanaForConditionalGeneration) and isinstance(processor, JnanaProcessor)
    assert_answers(model, processor, saved, name)


def test_another_weight_is_noticed(work):
    """The control of the comparison: one of a hundred weight tensors, off by a thousandth."""
    weights = load_file(work / "align" / "model.safetensors")
    name = "model.language_model.layers.1.mlp.fc2.weight"
    save_file({**weights, name: weights[name] * 1.001}, work / "align" / "model.safetensors", {"format": "pt"})
    for folder in ("align", "sft"):
        with pytest.raises(AssertionError, match="not close"):
            assert_answers(*load_model(str(work / folder)), work, folder)


FRESH = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

saved, names, chats = Path(sys.argv[1]), sys.argv[2].split(), json.loads(sys.argv[3])
tensors = {}
for name in names:
    model = AutoModelForImageTextToText.from_pretrained(saved / name, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(saved / name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    for chat, messages in chats.items():
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                               return_tensors="pt")
        with torch.no_grad():
            tensors[f"{name}:{chat}:logits"] = model(**inputs).logits[0, -3:].clone()
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        tensors[f"{name}:{chat}:ids"] = output[inputs["input_ids"].shape[1] :].clone()
assert not {"jnana", "modeling", "processing", "training"} & set(sys.modules)
save_file(tensors, "answers.safetensors")
"""


@pytest.mark.skipif(CACHE_NAME == "cache", reason="the code that version 0.1 saved runs up to transformers 5.23")
def test_it_answers_by_its_own_code(saved, tmp_path):
    """A fresh interpreter that has transformers and not this package: the code saved by version 0.1 is what runs."""
    root = Path(__file__).parents[2]
    script = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    script += f"sys.path[:] = [p for p in sys.path if p not in ('', {str(root)!r})]\n" + FRESH
    chats = json.dumps(EXPECTED["chats"]).replace("data/images", f"{saved}/data/images")
    run = subprocess.run(
        [sys.executable, "-I", "-c", script, str(saved), " ".join(FOLDERS), chats],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "m"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = load_file(tmp_path / "answers.safetensors")
    for name in FOLDERS:
        for chat, expected in EXPECTED["answers"][name].items():
            assert answers[f"{name}:{chat}:ids"].tolist() == expected["ids"]
            wanted = expected_tensors(f"{name}:{chat}:")["logits"]
            # version 0.1 let bitsandbytes compute 4-bit layers in bfloat16 where the CPU has AVX512-BF16
            tolerance = 2e-2 if HAS_NATIVE_KERNEL and name == "sft_nf4" else 1e-5
            torch.testing.assert_close(answers[f"{name}:{chat}:logits"], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_merges(work, name):
    """Into what it was trained on, hence with the adapter's own answers."""
    run_merge.main(options(model_name_or_path=name, output_dir="again"))
    assert_answers(*load_model("again"), work, name, tolerance=1e-4)


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    (file,) = Path(folder).glob("*model.safetensors")
    return load_file(file)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def resume(stage: str, *changes: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Start the killed run again by its own recipe; its last weights and the losses of all its steps."""
    STAGES[stage].main([f"recipes/interrupted_{stage}.yaml", *changes])
    output = Path("interrupted") / stage
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return weights_of(output), [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes(work, stage, capsys):
    """It ends in the weights and losses in which version 0.1 ended that was not killed."""
    half = weights_of(f"interrupted/{stage}/checkpoint-4")
    assert not list(work.rglob("training_args.bin"))  # a pickle: nothing may need it
    weights, losses = resume(stage)
    assert f"resuming from interrupted/{stage}/checkpoint-4" in capsys.readouterr().out
    trained = expected_tensors(f"interrupted/{stage}:")
    assert_same(weights, {**half, **trained})
    assert losses == pytest.approx(EXPECTED["losses"][stage], abs=1e-5) and len(losses) == 8
    with pytest.raises(AssertionError):  # the control: half way is not the end
        assert_same({**weights, **{name: half[name] for name in trained}}, {**half, **trained})
    if stage == "sft":
        assert_same(weights_of(f"interrupted/{stage}/merged"), weights_of("merged"))
    if stage in STARTS.values():
        assert_same(weights, weights_of(f"small_{stage}"))


def test_a_resume_that_lost_something_is_noticed(work):
    """The control of the runs above: with other dropout, or momentum off by a hundredth, they end elsewhere."""
    checkpoint = work / "interrupted" / "sft" / "checkpoint-4"
    wanted = {**weights_of(checkpoint), **expected_tensors("interrupted/sft:")}
    (checkpoint / "rng_state.pth").unlink()
    with pytest.raises(AssertionError, match="not close"):
        assert_same(resume("sft", "--merge_adapter=false")[0], wanted)

    checkpoint = work / "interrupted" / "align" / "checkpoint-4"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for moments in state["state"].values():
        moments["exp_avg"].mul_(1.01)
    torch.save(state, checkpoint / "optimizer.pt")
    with pytest.raises(AssertionError, match="not close"):
        assert_same(resume("align")[0], weights_of("small_align"))


def test_a_half_written_checkpoint_is_passed_over(work, capsys):
    """The kill came while checkpoint-6 was written; checkpoint-4 is whole."""
    whole = work / "interrupted" / "align" / "checkpoint-4"
    cut_off = shutil.copytree(whole, whole.with_name("checkpoint-6")) / "model.safetensors"
    cut_off.write_bytes(cut_off.read_bytes()[:20000])
    weights, _ = resume("align")
    said = capsys.readouterr().out
    assert "checkpoint-6 is skipped" in said and "resuming from interrupted/align/checkpoint-4" in said
    assert_same(weights, weights_of("small_align"))


def test_a_language_model_of_stage_0(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved / "small_pretrain")
    model = AutoModelForCausalLM.from_pretrained(saved / "small_pretrain")
    assert len(tokenizer) <= model.config.vocab_size and model.config.tokenizer_fingerprint
    assert tokenizer.decode(tokenizer("what is the top? red on blue")["input_ids"]) == "what is the top? red on blue"


@pytest.mark.skipif(is_torchvision_available(), reason="the cache has features of images that Pillow resized")
def test_stored_features_are_found(work, capsys):
    """The old cache has the features of every image, equal to the tower's; a changed image is computed again."""
    cache = FeatureCache(work / "feature_cache")
    processor = CLIPImageProcessor.from_pretrained(work / "vision")
    tower = CLIPVisionModel.from_pretrained(work / "vision")
    picture = work / "data" / "images" / "red_blue.png"
    with Image.open(picture) as image, torch.no_grad():
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        features = tower(pixels, output_hidden_states=True).hidden_states[-1][0, 1:]
    (stored,) = cache.load({"path": str(picture), "bytes": None}).features
    torch.testing.assert_close(stored, features, rtol=1e-5, atol=1e-5)

    recipe = ["recipes/feature_cache.yaml"]
    run_align.main(recipe)
    said = capsys.readouterr().out
    assert "to be computed" not in said and "16 different images of this run are in it" in said
    Image.new("RGB", (24, 24), "green").save(picture)
    run_align.main([*recipe, "--output_dir=again"])
    assert "1 of 16 different images are to be computed" in capsys.readouterr().out
