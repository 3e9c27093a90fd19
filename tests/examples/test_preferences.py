"""examples/preferences/train_dpo.py: the chosen answers become likelier, the reference stays; what a pair costs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from jnana import load_model, run_sft
from tests.export.models import save_model
from tests.scripts.tiny_data import make_data


trl = pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "examples" / "preferences" / "train_dpo.py"
NAMES = ["white_red", "black_blue", "red_white", "blue_black"]
EPOCHS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter of run_sft, and four pairs of answers."""
    folder = tmp_path_factory.mktemp("preferences")
    data = make_data(folder / "data")
    base = save_model(folder / "base", projector_type="resblock", vision_feature_layer=-2)
    options = {"model_name_or_path": base, "train_data": data / "instruct.json", "image_folder": data / "images"}
    options |= {"output_dir": folder / "sft", "lora_r": 4, "max_steps": 2, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 8, "learning_rate": "1e-3"}
    run_sft.main([f"--{name}={value}" for name, value in options.items()])
    pairs = [
        {"image": f"{name}.png", "question": "what is the top?", "chosen": name.split("_")[0], "rejected": "a dog"}
        for name in NAMES
    ]
    (folder / "preferences.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder


def train(folder: Path, monkeypatch, output: Path, *options: str):
    command = [
        SCRIPT,
        folder / "sft",
        folder / "preferences.json",
        output,
        "--image_folder",
        folder / "data" / "images",
    ]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, *options)])
    return runpy.run_path(str(SCRIPT), run_name="__main__")["trainer"]


def margins(path: Path, folder: Path) -> list[float]:
    """How much likelier the chosen answer of each pair is than the rejected one, in nats."""
    model, processor = load_model(str(path))
    found = []
    for pair in json.loads((folder / "preferences.json").read_text(encoding="utf-8")):
        image = {"type": "image", "image": Image.open(folder / "data" / "images" / pair["image"])}
        scores = []
        for answer in (pair["chosen"], pair["rejected"]):
            question = {"role": "user", "content": [image, {"type": "text", "text": pair["question"]}]}
            inputs = processor.apply_chat_template(
                [question, {"role": "assistant", "content": answer}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                return_assistant_tokens_mask=True,
            )
            mask = inputs.pop("assistant_masks")[:, 1:].bool()
            with torch.no_grad():
                logps = model(**inputs).logits[:, :-1].log_softmax(-1)
            scores.append(logps.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0][mask].sum().item())
        found.append(scores[0] - scores[1])
    return found


@pytest.mark.parametrize("learning_rate", ["3e-3", "0"])
def test_the_chosen_answers_become_likelier(folder, tmp_path, monkeypatch, learning_rate):
    before = load_model(str(folder / "sft"))[0].state_dict()
    trainer = train(folder, monkeypatch, tmp_path / "dpo", "--epochs", str(EPOCHS), "--learning_rate", learning_rate)
    assert (tmp_path / "dpo" / "jnana_base.json").is_file() and not (tmp_path / "dpo" / "ref").exists()
    gains = [b - a for a, b in zip(margins(folder / "sft", folder), margins(tmp_path / "dpo", folder), strict=True)]
    reference = {
        name.replace(".ref.", ".default."): weight
        for name, weight in trainer.model.named_parameters()
        if ".ref." in name
    }
    assert reference and all(torch.equal(weight, before[name]) for name, weight in reference.items())  # frozen
    after = load_model(str(tmp_path / "dpo"))[0].state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if learning_rate == "0":  # the control
        assert changed == set() and gains == pytest.approx([0.0] * len(NAMES), abs=1e-5)
    else:
        assert sum(gains) > 0.5 and min(gains) > 0
        assert all(".default." in name for name in changed)
        assert any("lora" in name for name in changed) and any("multi_modal_projector" in name for name in changed)


def test_what_a_pair_costs(folder, tmp_path, monkeypatch):
    """Images that the tower encodes for one pair in one step: two for the policy and two for the reference."""
    seen = []
    train_step = trl.DPOTrainer.training_step

    def count(module, args, kwargs):
        seen.append(len(args[0] if args else kwargs["pixel_values"]))

    def counted(self, model, *arguments, **options):
        hook = model.get_base_model().model.vision_tower.register_forward_pre_hook(count, with_kwargs=True)
        try:
            return train_step(self, model, *arguments, **options)
        finally:
            hook.remove()

    monkeypatch.setattr(trl.DPOTrainer, "training_step", counted)
    train(folder, monkeypatch, tmp_path / "dpo", "--batch_size", "4")
    assert sum(seen) == 4 * 4


def test_a_directory_that_is_not_empty(folder, tmp_path, monkeypatch, capsys):
    """Refused before a model is loaded; nothing in it changes."""
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(SystemExit):
        train(folder, monkeypatch, tmp_path)
    assert "is not empty; give a new directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_the_data_is_read_before_the_model(folder, tmp_path, monkeypatch):
    """A mistyped file of pairs raises though the adapter is missing, too."""
    command = [SCRIPT, tmp_path / "no_adapter", tmp_path / "nowhere.json", tmp_path / "dpo"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
