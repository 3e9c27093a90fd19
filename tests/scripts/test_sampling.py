"""`train_sampling_strategy: group_by_length` reads the lengths that the data preparation counted."""

import json

import pytest

from jnana import run_align
from jnana.processing.data import JnanaCollator
from tests.scripts.conftest import align_options


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_rows_are_grouped_by_their_lengths(data, vision, pretrained, tmp_path, monkeypatch, strategy):
    captions = json.loads((data / "captions.json").read_text())
    for number, annotation in enumerate(captions["annotations"]):
        annotation["caption"] += " red" * (number * 5 % 16)
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    lengths = []
    original = JnanaCollator.__call__

    def recording(self, rows):
        batch = original(self, rows)
        lengths.extend(batch["attention_mask"].sum(1).tolist())
        return batch

    monkeypatch.setattr(JnanaCollator, "__call__", recording)
    arguments = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    arguments |= {"train_data": tmp_path / "captions.json", "train_sampling_strategy": strategy}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "out", **arguments))
    assert len(lengths) == 16 and len(set(lengths)) > 8
    # Of so few rows the sampler sorts each batch by itself, and then puts the longest row of all in front.
    batches = [lengths[1:8], lengths[9:]]
    in_order = all(batch == sorted(batch, reverse=True) for batch in batches)
    assert in_order == (strategy == "group_by_length")  # random: the control
