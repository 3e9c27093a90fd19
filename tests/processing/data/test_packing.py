"""Packed rows supervise the same (context, token) pairs as unpacked rows, each once, and are well filled."""

import pickle
import random
import sys
from collections import Counter

import datasets
import pytest
import torch
from PIL import Image

from jnana.processing.data import BadSampleError, JnanaCollator, check_rows, packed_rows, packed_stream, plan_rows
from jnana.processing.data import prepare as prepare_function
from jnana.processing.data.packing import IGNORED, EncodedConversation, RowPlan, pack_row, shared_length
from jnana.processing.data.rows import IMAGE_PART, caption_conversation, make_row, message, rows_to_dataset, text_part
from tests.modeling.packed import assert_same_batch
from tests.processing.chats import random_text


IMAGE = 7


def encoded(*conversations: str) -> list[EncodedConversation]:
    """Conversations from texts `"pp=aa"`: prompt and answer; each letter is a token, `i` an image token."""
    found = []
    for text in conversations:
        prompt, answer = text.split("=")
        ids = [IMAGE if letter == "i" else ord(letter) for letter in prompt + answer]
        images = [0] * (prompt.count("i") // 2)
        mask = [0] * len(prompt) + [1] * len(answer)
        found.append(EncodedConversation(ids, mask, images, [2] * len(images)))
    return found


def shared(*conversations: str) -> int:
    group = encoded(*conversations)
    return shared_length([c.ids for c in group], [c.mask for c in group], IMAGE)


def test_the_shared_prefix_stops_one_token_early():
    assert shared("iic:=ab", "iic:=xyz") == 3  # `:` predicts both answers, so each has one
    assert shared("iic:ab=x", "iic:ac=y") == 4


def test_the_shared_prefix_ends_before_every_answer():
    assert shared("iic:=same", "iic:=same", "iic:=same thing") == 3  # captions written alike count as often
    assert (
        shared("iic:=same, but longer", "iic:same? =no") == 3
    )  # the answer of one is part of the question of the other


def test_the_shared_prefix_never_ends_inside_an_image():
    assert shared("abii=x", "abii=y") == 2
    assert shared("ii=x", "ii=y") == 0
    assert shared("abiicd=x", "abiiiicd=y") == 2


def test_conversations_without_a_shared_prefix():
    assert shared("abc=d") == 0
    assert shared("abc=d", "xbc=d") == 0
    assert shared("a=d", "a=e") == 0


def test_the_layout_of_a_row():
    row = pack_row([encoded("iic:=ab", "iic:=c"), encoded("q=de")], IMAGE, share=True)
    letters = "".join("i" if token == IMAGE else chr(token) for token in row.ids)
    assert letters == "iic" + ":ab" + ":c" + "qde"
    assert row.positions == [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2]
    assert row.segments == [0] * 8 + [1] * 3
    assert row.branches == [0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 1]
    assert "".join(chr(label) if label != IGNORED else "." for label in row.labels) == "....ab.c.de"
    assert row.images == [0]
    apart = pack_row([encoded("iic:=ab", "iic:=c")], IMAGE, share=False)
    assert apart.positions == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4] and apart.images == [0, 0]


# ---------------------------------------------------------------------- the supervised pairs of a batch


def supervised_pairs(batch: dict) -> Counter:
    """The (visible tokens with their images, target token) pairs of a batch, derived from its tensors alone."""
    found: Counter = Counter()
    packed = "segment_ids" in batch
    size = 4
    shown = iter(batch.get("image_indices", range(10**6)))
    predicting = set(batch["logit_positions"].tolist())
    for row, ids in enumerate(batch["input_ids"].tolist()):
        image_of, run = {}, 0
        for position, token in enumerate(ids):
            if token == IMAGE_TOKEN:
                if run % size == 0:
                    image = batch["pixel_values"][int(next(shown))].mean((1, 2)).argmax().item()
                image_of[position], run = image, run + 1
        for position in range(len(ids) - 1):
            if packed:
                target = batch["shift_labels"][row, position].item()
                segments, branches = batch["segment_ids"][row].tolist(), batch["branch_ids"][row].tolist()
                seen = [
                    k
                    for k in range(position + 1)
                    if segments[k] == segments[position] and branches[k] in (0, branches[position])
                ]
                positions = [batch["position_ids"][row, k].item() for k in seen]
                assert positions == list(range(len(seen))) or target == IGNORED
            else:
                target, seen = batch["labels"][row, position + 1].item(), range(position + 1)
            assert (row * len(ids) + position in predicting) == (target != IGNORED)
            if target != IGNORED:
                found[tuple((ids[k], image_of.get(k)) for k in seen), target] += 1
    assert next(shown, None) is None or not packed
    return found


IMAGE_TOKEN = 0  # set by the fixture: the processors of one pair share it


@pytest.fixture(autouse=True)
def image_token(processor):
    global IMAGE_TOKEN
    IMAGE_TOKEN = processor.image_token_id


def random_row(rng: random.Random, number: int) -> dict:
    """A row with up to two images and one to five conversations, some identical, some without an image."""
    images = [
        Image.new("RGB", (30, 24), rng.choice(["red", "green", "blue"])) for _ in range(rng.choice([0, 1, 1, 2]))
    ]
    say = [random_text(rng, 3) + "x" for _ in range(2)]
    chats = []
    for _ in range(rng.randint(1, 5)):
        parts = [IMAGE_PART] * len(images) if rng.random() < 0.9 else []
        question = [text_part(rng.choice([*say, random_text(rng, 3)]))] if rng.random() < 0.7 or not parts else []
        chat = [message("user", *parts, *question), message("assistant", text_part(rng.choice(say)))]
        if rng.random() < 0.3:
            chat += [message("user", text_part("and?")), message("assistant", text_part(random_text(rng, 3) + "y"))]
        chats.append(chat)
    return make_row(images, chats, f"row {number}")


@pytest.mark.parametrize("packing", ["rows", "shared_image"])
def test_packed_rows_supervise_what_single_rows_supervise(processors, packing):
    """Over all templates and random conversations."""
    for seed, processor in enumerate(processors.values()):
        rng = random.Random(seed)
        rows = [random_row(rng, number) for number in range(8)]
        opening = processor.encode_chat([message("user", text_part(""))])  # some templates write a system message
        max_length = rng.choice([None, len(opening) + 50])
        options = {"max_length": max_length, "on_bad_sample": "skip"}
        alone = supervised_pairs(JnanaCollator(processor, **options)(rows))
        items = [{"groups": rows[:4]}, {"groups": rows[4:5]}, {"groups": rows[5:]}]
        packed = supervised_pairs(JnanaCollator(processor, packing=packing, **options)(items))
        assert packed == alone and alone.total() > 50


def test_a_wrong_layout_supervises_other_pairs(processor):
    rows = [random_row(random.Random(seed), 0) for seed in range(6)]
    right = supervised_pairs(batch := JnanaCollator(processor, packing="shared_image")([{"groups": rows}]))
    batch["branch_ids"][batch["branch_ids"] == 2] = 1
    with pytest.raises(AssertionError):
        assert supervised_pairs(batch) == right


def test_rows_padded_to_blocks_supervise_the_same(processor):
    """Only padding is added: no segment, no label."""
    rows = [{"groups": [random_row(random.Random(seed), 0) for seed in range(2)]}]
    tight = JnanaCollator(processor, packing="shared_image")(rows)
    wide = JnanaCollator(processor, packing="shared_image", pad_to_multiple_of=128)(rows)
    width = tight["input_ids"].shape[1]
    assert wide["input_ids"].shape[1] % 128 == 0 < width % 128
    fillers = {"segment_ids": -1, "branch_ids": 0, "position_ids": 0, "labels": IGNORED, "shift_labels": IGNORED}
    for name, filler in fillers.items():
        assert wide[name][:, :width].equal(tight[name]) and (wide[name][:, width:] == filler).all(), name
    assert supervised_pairs(wide) == supervised_pairs(tight)
    assert torch.equal(wide["logit_positions"], tight["logit_positions"])  # of a single row
    wide["shift_labels"][0, width] = 5
    wide["logit_positions"] = torch.cat([wide["logit_positions"], torch.tensor([width])])
    assert supervised_pairs(wide) != supervised_pairs(tight)


def test_an_image_is_opened_once(processor, pictures):
    chats = [caption_conversation(text, None) for text in ("red", "a red one")]
    rows = [make_row([{"path": str(pictures / name), "bytes": None}], chats, name) for name in ("2.jpg", "0.png")]
    batch = JnanaCollator(processor, packing="rows")([{"groups": [rows[0], rows[1]]}, {"groups": [rows[0]]}])
    assert batch["pixel_values"].shape[0] == 2
    assert batch["image_indices"].tolist() == [0, 0, 1, 1, 0, 0]
    shared = JnanaCollator(processor, packing="shared_image")([{"groups": [rows[0], rows[1]]}, rows[0]])
    assert shared["image_indices"].tolist() == [0, 1, 0]


def test_bad_rows_leave_a_packed_row(processor, pictures):
    good = make_row([{"path": str(pictures / "0.png"), "bytes": None}], [caption_conversation("red", None)], "good")
    bad = {**good, "images": [{"path": str(pictures / "gone.png"), "bytes": None}], "source": "bad"}
    collator = JnanaCollator(processor, packing="shared_image", on_bad_sample="skip")
    batch = collator([{"groups": [bad, good]}, {"groups": [bad]}])
    only = JnanaCollator(processor, packing="shared_image")([{"groups": [good]}])
    assert_same_batch(batch, only)
    assert collator.num_bad_samples == 2
    assert_same_batch(collator([{"groups": [bad]}]), only)  # the last good one
    blank = JnanaCollator(processor, packing="shared_image", on_bad_sample="skip")([{"groups": [bad]}])
    assert (blank["labels"] != IGNORED).any() and blank["image_indices"].tolist() == [0]
    with pytest.raises(BadSampleError, match="^bad: image .*gone.png"):
        JnanaCollator(processor, packing="shared_image")([{"groups": [good, bad]}])
    with pytest.raises(ValueError, match="packing='images' must be 'none', 'rows' or 'shared_image'"):
        JnanaCollator(processor, packing="images")


# ---------------------------------------------------------------------- plans


def random_lengths(rng: random.Random, count: int) -> tuple[list[list[int]], list[int]]:
    lengths = [[rng.randint(60, 90) for _ in range(rng.randint(1, 6))] for _ in range(count)]
    return lengths, [52 if len(row) > 1 else 0 for row in lengths]


@pytest.mark.parametrize("share", [True, False])
def test_a_plan_holds_every_conversation_once_in_full_rows(share):
    lengths, shared = random_lengths(random.Random(0), 800)
    plan = plan_rows(lengths, shared if share else None, 512, seed=1)
    held = Counter((row, chat) for groups in plan.rows for row, chats in groups for chat in chats)
    assert held == Counter((row, chat) for row, sizes in enumerate(lengths) for chat in range(len(sizes)))
    for groups, size in zip(plan.rows, plan.sizes, strict=True):
        prefix = [shared[row] if share else 0 for row, _ in groups]
        sizes = [
            once + sum(lengths[row][chat] - once for chat in chats)
            for (row, chats), once in zip(groups, prefix, strict=True)
        ]
        assert size == sum(sizes) <= 512
        assert share or all(len(chats) == 1 for _, chats in groups)
    assert sum(plan.sizes) > 0.96 * 512 * len(plan.rows)


def test_a_plan_depends_on_lengths_and_seed_alone():
    lengths, shared = random_lengths(random.Random(2), 100)
    plan = plan_rows(lengths, shared, 512, seed=3)
    assert plan == plan_rows(lengths, shared, 512, seed=3)
    assert plan != plan_rows(lengths, shared, 512, seed=4)
    assert plan_rows(lengths, shared, 512).rows[0][0] == (0, list(range(len(lengths[0]))))


def test_a_group_that_is_too_long_becomes_several():
    plan = plan_rows([[30, 30, 40, 25]], [20], 60)
    assert plan.rows == [[(0, [0, 1, 2])], [(0, [3])]]  # 20 + 10 + 10 + 20, then 25 with its own prefix
    assert plan.sizes == [60, 25]
    with pytest.raises(
        ValueError, match="max_row_tokens is 60, but a conversation of data row 1 has 61 tokens; raise it"
    ):
        plan_rows([[10], [61]], [0, 0], 60)
    assert plan_rows([[10], [61]], [0, 0], 60, max_length=50).sizes == [60]


def test_a_plan_is_described_with_its_savings():
    plan = RowPlan([[(0, [0, 1])], [(1, [0])]], [90, 60], 200)
    assert str(plan) == (
        "2 packed rows of up to 90 tokens with 1.0 groups each, at most 16.7% of them padding; 150 tokens instead of "
        "200 (25% saved)"
    )


# ---------------------------------------------------------------------- data sets


def caption_rows(count: int, words: int = 5) -> list[dict]:
    rng = random.Random(5)
    image = {"path": "shared.png", "bytes": None}
    return [
        make_row(
            [image],
            [caption_conversation("rook " * rng.randint(1, words), None) for _ in range(rng.randint(1, 5))],
            f"row {number}",
        )
        for number in range(count)
    ]


def sources(items) -> list[list[str]]:
    return [[row["source"] for row in item["groups"]] for item in items]


def test_planned_sizes_are_the_batches_sizes(processor, pictures):
    rows = caption_rows(40)
    for row in rows:
        row["images"] = [{"path": str(pictures / "0.png"), "bytes": None}]
    data = rows_to_dataset(rows)
    report = check_rows(data, processor, progress=False)
    plan = plan_rows(report.lengths, report.shared, 128, seed=0)
    packed = packed_rows(data, plan)
    collator = JnanaCollator(processor, packing="shared_image")
    for size, item in zip(plan.sizes, packed, strict=True):
        assert collator([item])["input_ids"].shape == (1, size)
    assert sum(len(row["conversations"]) for item in packed for row in item["groups"]) == sum(map(len, report.lengths))
    again = pickle.loads(pickle.dumps(packed.shuffle(seed=1).select(range(3))))
    assert sources(again) == sources(packed.shuffle(seed=1).select(range(3)))
    assert packed.column_names == ["groups", "length"] and list(packed["length"]) == plan.sizes


def test_a_stream_is_packed_while_it_is_read(processor, monkeypatch):
    monkeypatch.setattr(sys.modules[prepare_function.__module__], "STREAM_BUFFER", 32)
    rows = caption_rows(100)
    stream = packed_stream(
        rows_to_dataset(rows).to_iterable_dataset(), processor, share=True, max_row_tokens=128, max_length=64
    )
    items = list(stream)
    assert sorted(name.split(",")[0] for names in sources(items) for name in names) == sorted(
        r["source"] for r in rows
    )
    assert sources(items) == sources(stream)  # the same once more
    assert sources(stream.skip(7))[:5] == sources(items)[7:12]
    state = stream.state_dict()
    iterator = iter(stream)
    first = [next(iterator) for _ in range(9)]
    state = stream.state_dict()
    rest = sources(iterator)
    stream.load_state_dict(state)
    assert sources(first) + sources(stream) == sources(items) and sources(stream) == rest


def test_bad_rows_of_a_stream_reach_the_collator(processor):
    rows = caption_rows(3)
    rows[0]["conversations"] = rows[0]["conversations"][:1]
    rows[1]["conversations"] = []
    rows[2] = make_row([], [[message("user", text_part("rook " * 90)), message("assistant", text_part("a"))]], "long")
    stream = packed_stream(
        datasets.IterableDataset.from_generator(lambda: iter(rows), features=rows_to_dataset(rows).features),
        processor,
        share=True,
        max_row_tokens=64,
        max_length=64,
    )
    assert [names[0].split(",")[0] for names in sources(stream)] == ["row 0", "row 1", "long"]
