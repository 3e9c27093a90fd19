"""The first 200 batches of a run: from raw rows, cold, warm, with one and four workers, in one and two processes.

The reference renders and tokenises each row when it collates it, and takes the image processor's own floats, as the
first version did.
"""

import json
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from jnana.modeling import normalize_pixels
from jnana.processing import JnanaProcessor
from jnana.processing.data import JnanaCollator, PrepareOptions, prepare
from tests.processing.data.test_pixels import picture, stock
from tests.processing.data.test_prepared_rows import batches, forbid_tokenising, options_for, processes, raw, same


__all__ = ["processes"]  # a fixture

BATCHES = 200


@pytest.fixture
def records(tmp_path) -> Path:
    """240 LLaVA records of one to three turns about twelve images, each in a batch of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        picture((30 + 9 * number, 80 - 5 * number), number).save(folder / f"{number}.jpg")
    found = []
    for number in range(240):
        turns = []
        for turn in range(number % 3 + 1):
            turns += [
                {"from": "human", "value": f"how many kings {number * turn}?"},
                {"from": "gpt", "value": f"{number} and a rook, {turn}"},
            ]
        found.append({"id": str(number), "image": f"{number % 12}.jpg", "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(found))
    return path


class WithFloats(JnanaCollator):
    """As the training scripts' collator, but each batch is normalised as the model does it."""

    def __call__(self, items):
        batch = super().__call__(items)
        assert batch["pixel_values"].dtype == torch.uint8
        batch["pixel_values"] = normalize_pixels(batch["pixel_values"], batch.pop("pixel_table"))
        return batch


class RawPixels(JnanaCollator):
    """The reference: what the image processor gives, called for each image."""

    def __call__(self, items):
        batch = super().__call__(items)
        shown = dict.fromkeys(image["path"] for item in items for row in item["groups"] for image in row["images"])
        images = [self.images.load(path, "") for path in shown]
        batch["pixel_values"] = torch.cat([stock(self.processor.image_processor, image) for image in images])
        return batch


def loaded(rows, processor: JnanaProcessor, options: PrepareOptions, workers: int, processes: int = 1) -> list[dict]:
    """The first batches as the Trainer's loaders give them: with several processes, theirs in turn."""
    collator = WithFloats(processor, normalize_on_device=True, **options.for_collator)
    found = []
    for rank in range(processes):
        loader = DataLoader(rows, 1, collate_fn=collator, num_workers=workers)
        loader = prepare_data_loader(
            loader, num_processes=processes, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        own = []
        for batch in loader:
            own.append(batch)
            if len(own) == BATCHES // processes:
                break
        found.append(own)
    return [batch for of_step in zip(*found, strict=True) for batch in of_step]


def test_the_first_batches_are_the_same_however_they_are_made(records, processor, tmp_path, processes, monkeypatch):
    options = options_for(tmp_path, packing="shared_image", max_row_tokens=60, max_length=60)
    expected_rows = raw(records, processor, options)
    collator = RawPixels(processor, **options.for_collator)
    expected = [collator([expected_rows[index]]) for index in range(BATCHES)]
    assert expected[0].keys() >= {"input_ids", "labels", "position_ids", "packed_layout", "pixel_values"}
    processes(2)
    cold = prepare(records, processor, options)
    assert len(cold) > BATCHES
    assert same(loaded(cold, processor, options, workers=1), expected)
    with monkeypatch.context() as patch:
        forbid_tokenising(patch)
        warm = prepare(records, processor, options)
    assert warm["length"][:] == cold["length"][:] == expected_rows["length"][:]  # the plan
    assert same(loaded(warm, processor, options, workers=4, processes=2), expected)


@pytest.mark.parametrize("name", ["input_ids", "labels", "position_ids", "pixel_values"])
def test_a_difference_in_the_last_batch_is_noticed(records, processor, tmp_path, name):
    """The control of the test above."""
    options = options_for(tmp_path, packing="shared_image", max_row_tokens=60, max_rows=9)
    rows = prepare(records, processor, options)
    left, right = (batches(rows, processor, options) for _ in "ab")
    assert same(left, right)
    right[-1][name][-1, -1] = right[-1][name][-1, -1] + 1
    assert not same(left, right)
