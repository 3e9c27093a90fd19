"""Gradient accumulation is correct to the token: a batch of 8 and 8 batches of 1 are the same step."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from jnana import run_sft
from tests.scripts.conftest import sft_options


def weights(data, aligned, folder, batch, accumulation) -> dict[str, torch.Tensor]:
    """Full fine-tuning for three steps over answers of different lengths (float32, CPU)."""
    arguments = {
        "lora_r": 0,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "save_strategy": "no",
        "learning_rate": "1e-3",
        "independent_turns": "false",
        "adam_epsilon": "1e-3",  # keeps AdamW from turning rounding noise in tiny gradients into whole steps
    }
    run_sft.main(sft_options(data, aligned, output_dir=folder / f"{batch}x{accumulation}", **arguments))
    return load_file(folder / f"{batch}x{accumulation}" / "model.safetensors")


@pytest.fixture
def uneven(data, tmp_path):
    """Answers of 1 to 16 words, so that rows differ in supervised tokens and in padding."""
    import json
    import shutil

    shutil.copytree(data / "images", tmp_path / "images")
    records = json.loads((data / "instruct.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] = " ".join(["white"] * (number % 8 + 1))
    (tmp_path / "instruct.json").write_text(json.dumps(records))
    return tmp_path


def test_8x1_is_1x8(uneven, aligned, tmp_path):
    whole, parts = weights(uneven, aligned, tmp_path, 8, 1), weights(uneven, aligned, tmp_path, 1, 8)
    for name, tensor in whole.items():
        difference = (parts[name] - tensor).norm()
        assert difference <= 1e-5 * tensor.norm() + 1e-7, name


def test_a_mean_of_means_would_differ(uneven, aligned, tmp_path, monkeypatch):
    """The control: without the count of tokens over all micro-batches, each would weigh the same."""
    whole = weights(uneven, aligned, tmp_path, 8, 1)
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *args: None)
    parts = weights(uneven, aligned, tmp_path, 1, 8)
    assert max((parts[name] - tensor).norm() / tensor.norm() for name, tensor in whole.items()) > 1e-4
