"""Batches: labels on answers only, images in order, bad rows raised or skipped and listed."""

import json
import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from jnana.processing.data import BadSampleError, JnanaCollator, flatten_conversations, load_rows, read_bad_samples
from jnana.processing.data.rows import IMAGE_PART, make_row, message, text_part


def row(images=(), question="how many?", answer="two", source="pets.json, record 0") -> dict:
    references = [{"path": str(path), "bytes": None} for path in images]
    chat = [
        message("user", *[IMAGE_PART] * len(references), text_part(question)),
        message("assistant", text_part(answer)),
    ]
    return make_row(references, [chat], source)


def supervised(processor, batch) -> list[str]:
    return [processor.decode(labels[labels != -100]) for labels in batch["labels"]]


def test_labels_are_answers_and_closing_tokens(processor, pictures):
    rows = [row([pictures / "0.png"]), row(question="why?", answer="a white king"), row([pictures / "1.png"] * 2)]
    batch = JnanaCollator(processor)(rows)
    assert supervised(processor, batch) == [" two<|endoftext|>", " a white king<|endoftext|>", " two<|endoftext|>"]
    assert batch.keys() == {
        *("input_ids", "attention_mask", "labels", "logit_positions", "skip_logits"),
        *("pixel_values", "image_indices", "image_positions", "max_row_image_tokens"),
    }
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    assert batch["image_indices"].tolist() == [0, 1, 1]
    width = batch["input_ids"].shape[1]
    predicting = torch.zeros_like(batch["labels"]).flatten().index_fill(0, batch["logit_positions"], 1)
    assert torch.equal(predicting.view(-1, width)[:, :-1].bool(), batch["labels"][:, 1:] != -100)
    is_image = batch["input_ids"] == processor.image_token_id
    assert torch.equal(is_image.flatten().nonzero()[:, 0], batch["image_positions"])
    assert batch["max_row_image_tokens"] == is_image.sum(1).max() == 8 and batch["skip_logits"] is True
    on = batch["labels"] != -100
    assert torch.equal(batch["labels"][on], batch["input_ids"][on])
    assert not on[batch["attention_mask"] == 0].any()
    assert not on[batch["input_ids"] == processor.image_token_id].any()
    lengths = batch["attention_mask"].sum(1)
    for line, length in zip(batch["attention_mask"], lengths, strict=True):  # padded on the right
        assert line[:length].all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_images_come_in_reading_order_over_the_batch(processor, pictures):
    rows = [row([pictures / "2.jpg", pictures / "0.png"]), row(), row([pictures / "1.png"])]
    pixels = JnanaCollator(processor)(rows)["pixel_values"]  # => [3, channels, height, width]
    assert pixels.shape == (3, 3, 24, 24)
    assert pixels.mean((2, 3)).argmax(1).tolist() == [2, 0, 1]
    assert "pixel_values" not in JnanaCollator(processor)([row()])


def test_many_conversations_of_a_row_are_many_sequences(processor, pictures):
    two = row([pictures / "0.png"])
    two["conversations"] *= 2
    batch = JnanaCollator(processor)([two])
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 1
    assert batch["image_indices"].tolist() == [0, 0]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_the_first_token_is_never_supervised(processor, monkeypatch):
    monkeypatch.setattr("jnana.processing.data.collator.check_row", lambda row, needs_images: None)
    only_answer = make_row([], [[message("assistant", text_part("two kings"))]], "a")
    batch = JnanaCollator(processor)([only_answer])
    assert batch["labels"][0, 0] == -100 and batch["labels"][0, 1] == batch["input_ids"][0, 1]


def test_max_length_cuts_answers_and_never_images(processor, pictures):
    long = row([pictures / "0.png"], answer="rook " * 50)
    whole = JnanaCollator(processor)([long])["input_ids"]
    batch = JnanaCollator(processor, max_length=40)([long, row()])
    assert batch["input_ids"].shape[1] == 40
    assert torch.equal(batch["input_ids"][0], whole[0, :40])
    assert (batch["input_ids"][0] == processor.image_token_id).sum() == 4
    with pytest.raises(BadSampleError, match="pets.json, record 0: does not fit"):
        JnanaCollator(processor, max_length=12)([long])


def test_padding_to_a_multiple(processor):
    batch = JnanaCollator(processor, pad_to_multiple_of=64)([row()])
    assert {batch[name].shape[1] for name in ("input_ids", "attention_mask", "labels")} == {64}


def test_bad_rows_raise_with_file_and_record(processor, pictures):
    bad = row([pictures / "gone.png"], source="pets.json, record 7")
    with pytest.raises(BadSampleError, match="^pets.json, record 7: image .* does not exist"):
        JnanaCollator(processor)([row(), bad])
    with pytest.raises(BadSampleError, match="pets.json, record 0: image .* max_image_pixels=100"):
        JnanaCollator(processor, max_image_pixels=100)([row([pictures / "0.png"])])
    with pytest.raises(ValueError, match="on_bad_sample='ignore' must be 'raise' or 'skip'"):
        JnanaCollator(processor, on_bad_sample="ignore")


def test_bad_rows_are_skipped_and_listed(processor, pictures, tmp_path):
    listing = tmp_path / "out" / "bad_samples.jsonl"
    collator = JnanaCollator(processor, max_length=40, on_bad_sample="skip", bad_samples_file=listing)
    rows = [
        row([pictures / "2.jpg"]),
        row([pictures / "gone.png"], source="r1"),
        row([pictures / "0.png"], question="rook " * 60, source="r2"),  # found by tokenising it
        row([pictures / "1.png"], answer="three"),
    ]
    batch = collator(rows)
    assert supervised(processor, batch) == [" two<|endoftext|>", " three<|endoftext|>"]
    assert batch["pixel_values"].mean((2, 3)).argmax(1).tolist() == [2, 1]  # not the image of the row that did not fit
    assert collator.num_bad_samples == 2
    assert [problem[:3] for problem in read_bad_samples(listing)] == ["r1:", "r2:"]
    good = JnanaCollator(processor, max_length=40)([rows[0], rows[3]])
    torch.testing.assert_close(batch, good, rtol=0, atol=0)


def test_a_batch_without_a_good_row_still_trains(processor, pictures):
    bad = row([pictures / "gone.png"])
    collator = JnanaCollator(processor, on_bad_sample="skip")
    first = collator([bad, bad])  # before any good batch
    assert first["input_ids"].shape[0] == 1 and "pixel_values" in first
    assert supervised(processor, first) == [" <|endoftext|>"]
    good = collator([row([pictures / "0.png"]), row(answer="three")])
    again = collator([bad])
    assert supervised(processor, again) == [" two<|endoftext|>"] and again["pixel_values"].shape[0] == 1
    for batch in (first, good, again):
        assert (batch["labels"] != -100).sum() > 0  # num_items_in_batch is never 0


@pytest.fixture
def rows_on_disk(tmp_path, pictures):
    records = [
        {
            "image": f"{'gone' if i % 5 == 4 else i % 2}.png",
            "conversations": [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": f"number {i}"}],
        }
        for i in range(20)
    ]
    path = tmp_path / "pets.json"
    path.write_text(json.dumps(records))
    return flatten_conversations(load_rows(path, image_folder=pictures))


def test_dataloader_workers_share_one_list(processor, rows_on_disk, tmp_path):
    listing = tmp_path / "bad_samples.jsonl"
    collator = JnanaCollator(processor, on_bad_sample="skip", bad_samples_file=listing)
    loader = DataLoader(rows_on_disk, batch_size=2, num_workers=2, collate_fn=collator)
    said = [answer for batch in loader for answer in supervised(processor, batch)]
    assert len(set(said)) == 16
    assert {problem.split(":")[0] for problem in read_bad_samples(listing)} == {
        f"pets.json, record {i}" for i in (4, 9, 14, 19)
    }


def test_collator_and_rows_can_be_sent_to_spawned_workers(processor, rows_on_disk):
    collator, rows = pickle.loads(pickle.dumps((JnanaCollator(processor), rows_on_disk)))
    assert torch.equal(collator([rows[0]])["input_ids"], JnanaCollator(processor)([rows_on_disk[0]])["input_ids"])


def test_a_worker_that_raises_names_the_row(processor, rows_on_disk):
    loader = DataLoader(rows_on_disk, batch_size=2, num_workers=1, collate_fn=JnanaCollator(processor))
    with pytest.raises(BadSampleError, match="pets.json, record 4: image '.*gone.png' does not exist"):
        list(loader)


def test_the_collator_changes_no_row(processor, pictures):
    given = row([pictures / "0.png"])
    before = json.dumps(given)
    JnanaCollator(processor)([given])
    assert json.dumps(given) == before


def test_pil_images_in_rows(processor):
    given = row()
    given["images"] = [Image.new("RGB", (30, 20), "red")]
    given["conversations"][0][0]["content"].insert(0, IMAGE_PART)
    assert JnanaCollator(processor)([given])["pixel_values"].shape == (1, 3, 24, 24)
