"""Uploads to the Hub: the right files with the right content, and no path of this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from jnana import run_align, run_push, run_sft
from jnana.training.loading import load_model
from jnana.training.sharing import check_published, published_files
from tests.scripts.conftest import align_options, sft_options
from tests.scripts.hub import LocalHub
from tests.scripts.launching import ROOT


CODE = {file.name for room in ("modeling", "processing") for file in (ROOT / room).glob("*_jnana.py")}
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
MODEL = {"model.safetensors", "config.json", "generation_config.json", "README.md"}
PUSH = {"push_to_hub": "true", "hub_model_id": "me/model", "hub_token": "hf_x"}


@pytest.fixture
def uploads(monkeypatch):
    """Replaces the Hub in this process; the arguments of each upload."""
    asked: list[dict] = []
    repository = type("Repository", (), {"repo_id": "me/model"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: repository)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: asked.append(kwargs))
    return asked


def test_align_pushes_at_its_end(data, vision, pretrained, tmp_path, uploads):
    """One upload, of the finished checkpoint; samples and lists of skipped rows are not uploaded."""
    samples = {"eval_data": data / "captions.json", "sample_steps": 1, "sample_max_new_tokens": 2, "max_steps": 2}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path, save_steps=1, **samples, **PUSH))
    ((upload),) = uploads
    assert upload["repo_id"] == "me/model" and upload["folder_path"] == str(tmp_path)
    assert set(upload["allow_patterns"]) == MODEL | PROCESSOR | CODE | {"loss_curve.png"}
    left = {path.name for path in tmp_path.iterdir()} - set(upload["allow_patterns"])
    assert left == {
        "checkpoint-1",
        "checkpoint-2",
        "samples.html",
        "samples.jsonl",
        "trainer_state.json",
        "recipe_record.json",
        "training_args.bin",
    }


def test_a_public_repository_is_not_made_private(tuned, monkeypatch, uploads):
    """`--private` onto an existing public repository raises before the upload; onto a private one it uploads."""
    for private in (False, True):
        info = type("Info", (), {"private": private})
        monkeypatch.setattr(HfApi, "model_info", lambda self, name, info=info: info)
        arguments = [str(tuned / "merged"), "someone/name", "--private"]
        if private:
            run_push.main(arguments)
        else:
            with pytest.raises(ValueError, match="'me/model' exists and is public, and a private one was asked for"):
                run_push.main(arguments)
        assert len(uploads) == private


def test_a_checkpoint_that_shares_its_frozen_weights(aligned):
    """All of its weights are uploaded, and nothing that only training reads."""
    folder = aligned / "checkpoint-4"
    names = {file.name for file in published_files(folder)}
    files = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(files) == 2 and {*files, "model.safetensors.index.json", "config.json"} <= names
    assert not names & {"optimizer.pt", "rng_state.pth", "trainer_state.json", "checkpoint_manifest.json"}


def test_no_path_of_this_machine(pretrained, aligned, tuned, tmp_path):
    """No finished checkpoint of the chain names one; if it does, the check finds it."""
    for folder in (pretrained, aligned, tuned / "merged"):
        check_published(folder)
        for file in published_files(folder):
            assert str(pretrained.parent).encode() not in file.read_bytes(), file
    for name, value in (("config.json", str(aligned)), ("README.md", f"trained on {tmp_path}/secret.json today")):
        shutil.copytree(tuned / "merged", tmp_path / name)
        file = tmp_path / name / name
        content = json.dumps({**json.loads(file.read_text()), "x": value}) if name == "config.json" else value
        file.write_text(content)
        with pytest.raises(ValueError, match=f"{name}.* names .*, a directory of this machine; remove it"):
            check_published(tmp_path / name)


# Reads a checkpoint from the Hub with transformers alone: the repository is not on its path.
READ = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [place for place in sys.path if place not in ("", sys.argv[1])]
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained("someone/name", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("someone/name", trust_remote_code=True)
assert "jnana" not in sys.modules
chat = [{"role": "user", "content": [{"type": "image", "image": Image.open(sys.argv[2])},
                                     {"type": "text", "text": "what is the <image> top?"}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
with torch.no_grad():
    torch.save({**inputs, "logits": model(**inputs).logits}, sys.argv[3])
"""


@pytest.fixture
def hub():
    hub = LocalHub()
    yield hub
    hub.close()


def run_with_hub(hub: LocalHub, folder: Path, *command: str) -> str:
    """What Python prints against `hub`, with an empty cache in `folder`; it must end well and send known requests."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "cache")}
    environment |= {"HF_TOKEN": "hf_x", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + str(hub.unknown)
    assert hub.unknown == []
    return done.stdout


def test_pushed_over_http_and_read_back(hub, tuned, data, tmp_path):
    """`run_push.py` makes one commit of unchanged files; a reader gets the same tokens and logits."""
    run_with_hub(hub, tmp_path / "me", str(ROOT / "run_push.py"), str(tuned / "merged"), "someone/name")
    assert set(hub.files) == MODEL | PROCESSOR | CODE
    assert len(hub.commits) == 1
    for file in published_files(tuned / "merged"):
        assert hub.files[file.name] == file.read_bytes()

    picture = data / "images" / "red_blue.png"
    run_with_hub(hub, tmp_path / "other", "-I", "-c", READ, str(ROOT), str(picture), str(tmp_path / "read.pt"))
    read = torch.load(tmp_path / "read.pt")
    model, processor = load_model(str(tuned / "merged"))
    image = {"type": "image", "image": Image.open(picture)}
    logits = {}
    for question in ("what is the <image> top?", "what is the bottom?"):
        chat = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits[question] = model(**inputs).logits[:, -1]
        assert torch.equal(inputs["pixel_values"], read["pixel_values"])
        same = inputs["input_ids"].tolist() == read["input_ids"].tolist()
        assert same == ("<image>" in question)
    same, other = logits.values()
    assert torch.equal(same, read["logits"][:, -1]) and not torch.equal(other, read["logits"][:, -1])


READ_SUBFOLDER = """
import json, sys
import torch
root, target = sys.argv[1:]
sys.path.insert(0, root)
from jnana import JnanaForConditionalGeneration, load_model
repository = {"subfolder": "adapters/sft"}
ids = torch.arange(5, 25)[None]
ours, processor = load_model("someone/name", **repository)
theirs = JnanaForConditionalGeneration.from_pretrained("someone/name", **repository)
base, _ = load_model("someone/name")
with torch.no_grad():
    logits = {name: model.eval()(input_ids=ids).logits for name, model in
              {"ours": ours, "theirs": theirs, "base": base}.items()}
torch.save({**logits, "image_token_id": processor.image_token_id}, target)
"""


def test_an_adapter_in_a_subfolder_of_a_repository(hub, aligned, tuned, tmp_path):
    """The base at the root of a repository on the Hub, the adapter below it."""
    hub.files |= {file.name: file.read_bytes() for file in published_files(aligned)}
    adapter = {file.name: file.read_bytes() for file in published_files(tuned)}
    reference = json.loads(adapter["jnana_base.json"])
    adapter["jnana_base.json"] = json.dumps({**reference, "model": "someone/name"}).encode()
    hub.files |= {f"adapters/sft/{name}": content for name, content in adapter.items()}
    run_with_hub(hub, tmp_path / "reader", "-I", "-c", READ_SUBFOLDER, str(ROOT), str(tmp_path / "read.pt"))
    read = torch.load(tmp_path / "read.pt")
    model, processor = load_model(str(tuned))
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.arange(5, 25)[None]).logits
    assert torch.equal(read["ours"], expected) and torch.equal(read["theirs"], expected)
    assert not torch.equal(read["base"], expected)  # negative control
    assert read["image_token_id"] == processor.image_token_id


def test_the_hub_lists_its_files(hub, monkeypatch):
    """As the real Hub: files and directories, one level or all; a missing directory is an error."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=hub.url, token="hf_x")
    hub.files |= {"a.json": b"{}", "additional_chat_templates/tool.jinja": b"x", "deep/er/b.txt": b"b"}
    names = [entry.path for entry in api.list_repo_tree("someone/name")]
    assert names == ["a.json", "additional_chat_templates", "deep"]
    (file,) = api.list_repo_tree("someone/name", "additional_chat_templates")
    assert (file.path, file.size) == ("additional_chat_templates/tool.jinja", 1)
    everything = {entry.path for entry in api.list_repo_tree("someone/name", recursive=True)}
    assert everything == {*hub.files, "additional_chat_templates", "deep", "deep/er"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("someone/name", "nowhere"))


class TestRefused:
    """Each error comes before a model is loaded and names the remedy."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded before the check")

        monkeypatch.setattr(run_align, "prepare_model", refuse)
        monkeypatch.setattr(run_sft, "prepare_model", refuse)

    def test_an_adapter_on_a_local_base(self, data, aligned, tmp_path):
        message = f"push_to_hub is true, but the adapter would need model '{aligned}', .* run_push.py .* merge_adapter"
        with pytest.raises(ValueError, match=message):
            run_sft.main(sft_options(data, aligned, output_dir=tmp_path, **PUSH))

    def test_a_push_at_every_save(self, data, vision, pretrained, tmp_path):
        with pytest.raises(ValueError, match="hub_strategy is 'every_save', .* a pickle of the arguments"):
            run_align.main(
                align_options(data, vision, pretrained, output_dir=tmp_path, **PUSH, hub_strategy="every_save")
            )

    def test_pushing_that_adapter_later(self, tuned):
        with pytest.raises(ValueError, match=r"jnana_base.json says that the adapter needs model .*merged"):
            run_push.main([str(tuned), "me/model"])

    @pytest.mark.parametrize("folder", ["checkpoints", "nowhere"])
    def test_a_folder_without_a_checkpoint(self, tmp_path, folder):
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(ValueError, match="holds no finished checkpoint"):
            run_push.main([str(tmp_path / folder), "me/model"])
