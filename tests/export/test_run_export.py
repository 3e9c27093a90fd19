"""The script: an adapter is merged and exported, questions come from a test set, and images from the training data."""

import json

import pytest
from transformers import AutoModelForImageTextToText

from jnana import run_export, run_sft
from tests.export.models import save_model
from tests.scripts.tiny_data import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def options(**values) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def test_an_adapter_and_a_test_set(tmp_path, data, capsys):
    path = save_model(tmp_path, vision_feature_layer=-2)
    sft = {"model_name_or_path": path, "train_data": data / "instruct.json", "image_folder": data / "images"}
    sft |= {"lora_r": 4, "max_steps": 2, "save_strategy": "no", "learning_rate": "1e-2"}
    run_sft.main(options(**sft, output_dir=tmp_path / "adapter", per_device_train_batch_size=8))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    export = {"model_name_or_path": tmp_path / "adapter", "to": "llava", "output_dir": tmp_path / "out"}
    export |= {"eval_data": data / "instruct.json", "image_folder": data / "images", "max_new_tokens": 6}
    capsys.readouterr()
    run_export.main(options(**export))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("largest logit difference 0, ") and "32 of 32 greedy answers equal" in line
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "32 of 32 greedy answers equal" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text(encoding="utf-8")


def test_a_distillation_on_the_training_images(tmp_path, data, capsys):
    path = save_model(tmp_path, projector_type="resblock", vision_feature_layer=-2)
    export = {"model_name_or_path": path, "to": "llava", "output_dir": tmp_path / "out", "distill": "true"}
    export |= {"train_data": data / "instruct.json", "image_folder": data / "images", "distill_steps": 100}
    export |= {"eval_data": data / "instruct.json", "max_new_tokens": 1}
    run_export.main(options(**export))
    out = capsys.readouterr().out
    assert "distilled the projector on 56 vectors of 16 images: relative error" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"to": None}, "to is not set; give it as --to"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path './nowhere' does not exist"),
        ({"distill": "true"}, "train_data is not set; distill fits the projector on its images"),
        ({"output_dir": "model/out/merged"}, None),
    ],
)
def test_options_are_checked_first(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_export, "export_model", lambda *arguments, **options: None)
    (tmp_path / "model").mkdir()
    values = {"model_name_or_path": "model", "to": "llava", "output_dir": "out", **changes}
    arguments = options(**{name: value for name, value in values.items() if value is not None})
    if message is None:
        run_export.main(arguments)
    else:
        with pytest.raises(ValueError, match=message):
            run_export.main(arguments)
