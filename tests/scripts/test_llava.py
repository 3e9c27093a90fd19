"""Fine-tuning a published LLaVA-1.6: from a tiny checkpoint that transformers saved to a merged model in use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlavaNextForConditionalGeneration

from jnana import ChatSession, run_align, run_evaluate, run_sft
from jnana.training.loading import load_model
from jnana.training.stages import part_of
from tests.scripts.conftest import options
from tests.scripts.launching import kill_at, launch
from tests.tiny import save_tiny_llava


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("published") / "llava", "llava_next")


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory) -> Path:
    """The pictures of the tiny data in sizes of their own, so that they differ in tiles and tokens."""
    folder = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(sorted((data / "images").glob("*.png"))):
        with Image.open(file) as image:
            image.resize((20 + 7 * number, 24 + 5 * number % 40)).save(folder / file.name)
    return folder


def sft_options(stock, data, photos, **changes) -> list[str]:
    values = {
        "model_name_or_path": stock,
        "chat_template": "llava_chess",
        "train_data": data / "instruct.json",
        "image_folder": photos,
        "eval_data": data / "instruct.json",
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "lora_vision_target_modules": "all-linear",
        "packing": "shared_image",
        "max_row_tokens": 200,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "projector_learning_rate": "5e-4",
        "vision_learning_rate": "1e-4",
        "logging_steps": 1,
        "use_cpu": "true",
    }
    return options(**{**values, **changes})


@pytest.fixture(scope="module")
def tuned(stock, data, photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "sft"
    samples = {"sample_steps": 3, "sample_count": 2, "sample_max_new_tokens": 6, "merge_adapter": "true"}
    run_sft.main(sft_options(stock, data, photos, output_dir=folder, **samples))
    return folder


def test_what_trains(stock, tuned):
    """Adapters in both backbones, and the projector with its newline vector, each part at its own rate."""
    weights = load_file(tuned / "adapter_model.safetensors")
    assert {part_of(name) for name in weights} == {"vision_tower", "language_model", "multi_modal_projector"}
    moved = [name for name, weight in weights.items() if "lora_B" not in name or weight.abs().max() > 0]
    assert len(moved) == len(weights)
    history = json.loads((tuned / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rates = {name: value for name, value in history[0].items() if name.endswith("learning_rate")}
    assert rates == {
        "learning_rate": 1e-3,
        "multi_modal_projector_learning_rate": 5e-4,
        "vision_tower_learning_rate": 1e-4,
    }
    published = LlavaNextForConditionalGeneration.from_pretrained(stock)
    newline = next(weight for name, weight in weights.items() if name.endswith("image_newline"))
    assert not torch.equal(newline, published.model.image_newline)


ASK = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, image, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what is the top?"}]}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
torch.save(model(**inputs).logits, out)
assert "jnana" not in sys.modules
"""


def test_merged_and_loaded_in_a_fresh_interpreter(tuned, photos, tmp_path):
    image = photos / "red_blue.png"
    command = [sys.executable, "-I", "-c", ASK, str(tuned / "merged"), str(image), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh = torch.load(tmp_path / "logits.pt")
    chat = [{"type": "image", "path": str(image)}, {"type": "text", "text": "what is the top?"}]
    asked = [{"role": "user", "content": chat}]
    template_options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found = {}
    for name, folder in (("adapter", tuned), ("merged", tuned / "merged")):
        model, processor = load_model(str(folder))
        inputs = processor.apply_chat_template(asked, **template_options)
        found[name] = model.eval()(**inputs).logits
    torch.testing.assert_close(fresh, found["merged"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["merged"], found["adapter"], rtol=0, atol=1e-4)


def test_the_merged_model_differs_from_the_published_one(stock, tuned, photos):
    """The control of the comparison above."""
    (before, processor), (after, _) = load_model(str(stock)), load_model(str(tuned / "merged"))
    part = {"type": "image", "path": str(photos / "red_blue.png")}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "what is the top?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (before.eval()(**inputs).logits - after.eval()(**inputs).logits).abs().max() > 1e-2


def test_it_answers_in_a_chat(tuned, photos):
    for folder in (tuned, tuned / "merged"):
        session = ChatSession(*load_model(str(folder)))
        list(session.ask("what is the top?", [photos / "red_blue.png", photos / "white_black.png"], max_new_tokens=4))
        list(session.ask("what is the bottom?", max_new_tokens=4))
        assert session.last_turn.cached_tokens > 0 and len(session.messages) == 4


def test_it_answers_on_the_page(tuned, photos):
    pytest.importorskip("gradio", reason="the app extra (gradio) is not installed")
    from jnana.chat.assistant import Assistant
    from jnana.chat.page import Page

    page = Page(Assistant(*load_model(str(tuned / "merged")), "llava"), [])
    chat, _ = page.assistant.chats.find("")
    page.take(chat, {"text": "what is the top?", "files": [str(photos / "red_blue.png")]})
    *_, last = page.answer(chat, "", 0.0, 1.0, 4)
    assert chat.session.last_turn.new_tokens > 0 and "new tokens" in last[0]


def test_evaluated(tuned, data, photos, tmp_path):
    arguments = {"model_name_or_path": tuned / "merged", "eval_data": data / "instruct.json", "image_folder": photos}
    run_evaluate.main(options(**arguments, output_dir=tmp_path, max_new_tokens=4))
    assert (tmp_path / "report.html").is_file()


def test_killed_and_started_again(stock, data, photos, tuned, tmp_path):
    output = tmp_path / "killed"
    arguments = sft_options(stock, data, photos, output_dir=output)
    process = launch("run_sft.py", arguments)
    kill_at(process, output / "checkpoint-3")
    (output / "adapter_model.safetensors").unlink(missing_ok=True)
    run_sft.main(arguments)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (output, tuned))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_align_changes_the_projector_alone(stock, data, photos, tmp_path):
    arguments = {"model_name_or_path": stock, "chat_template": "llava_chess", "train_data": data / "captions.json"}
    arguments |= {"image_folder": photos, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": "1e-3"}
    run_align.main(options(**arguments, output_dir=tmp_path / "align", use_cpu="true"))
    before, _ = load_model(str(stock))
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "align").state_dict()
    changed = {part_of(name) for name, weight in before.state_dict().items() if not torch.equal(weight, after[name])}
    assert changed == {"multi_modal_projector"}
