"""Conversations about a few images, in each row layout; all layouts must train the same."""

from typing import Any

import torch

from jnana.modeling.packed_layout_jnana import PackedLayout
from jnana.processing.data.packing import EncodedConversation, pack_row, stack_rows
from tests.modeling.pairs import IMAGE, TEXT_IDS, pictures


SIZE = 4  # image tokens of the tiny tower
NUM_IMAGES = 3


def conversations(seed: int = 0, size: int = SIZE) -> list[list[EncodedConversation]]:
    """Groups as a data set has them: five captions an image, two of them alike; questions; two images; no image."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(2, TEXT_IDS, (count,), generator=generator).tolist()

    def conversation(prompt: list[int], answer: list[int], *images: int) -> EncodedConversation:
        answer = [*answer, 0]
        mask = [0] * len(prompt) + [1] * len(answer)
        return EncodedConversation(prompt + answer, mask, list(images), [size] * len(images))

    separator, same = words(3), words(4)
    image = [IMAGE] * size
    answers = [words(2), same, words(9), same, [*same, *words(3)]]
    captions = [conversation([*image, *separator], answer, 0) for answer in answers]
    questions = [conversation([*image, *separator, *words(n)], words(11 - n), 1) for n in (2, 7, 4)]
    both = [conversation([9, *image, *image, *separator, *words(n)], words(5), 2, 0) for n in (1, 3)]
    text = [conversation(words(n), words(6)) for n in (1, 12)]
    return [captions, questions, both, text]


def batch(
    rows: list[list[list[EncodedConversation]]], packing: str, multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """Model inputs of rows of groups, as `JnanaCollator` makes them."""
    if packing == "none":
        rows = [[[conversation]] for row in rows for group in row for conversation in group]
    packed = [pack_row(row, IMAGE, packing == "shared_image") for row in rows]
    inputs = stack_rows(packed, 1, multiple_of)
    if packing == "none":
        inputs["attention_mask"] = (inputs["segment_ids"] >= 0).long()
        for name in ("position_ids", "segment_ids", "branch_ids", "shift_labels", "logit_positions"):
            del inputs[name]
    else:
        is_image = inputs["input_ids"] == IMAGE
        inputs["image_positions"] = is_image.flatten().nonzero()[:, 0]
        inputs["max_row_image_tokens"] = int(is_image.sum(1).max())
    shown = [image for row in packed for image in row.images]
    if shown:
        order = sorted(set(shown))
        inputs["pixel_values"] = pictures(NUM_IMAGES)[order]
        inputs["image_indices"] = torch.tensor([order.index(image) for image in shown])
    return inputs


def with_layout(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Packed rows with the layout that `JnanaCollator` adds."""
    ids = (inputs["segment_ids"], inputs["branch_ids"], inputs["position_ids"])
    return {**inputs, "packed_layout": PackedLayout.from_ids(*ids)}


def assert_same_batch(batch: dict[str, Any], other: dict[str, Any]) -> None:
    """Every input is the same to the bit, the layout of packed rows too."""
    assert batch.keys() == other.keys()
    for name, value in batch.items():
        if isinstance(value, PackedLayout):
            assert value.equal(other[name]), name
        else:
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=name)


def find_labels(inputs: dict[str, torch.Tensor]) -> None:
    """Set the positions that predict a label again, after labels were changed."""
    inputs["logit_positions"] = (inputs["shift_labels"] != -100).flatten().nonzero()[:, 0]


def batches(how: str, size: int = SIZE) -> list[dict[str, torch.Tensor]]:
    """All conversations, as micro-batches of one step.

    Args:
        how (`str`): `single` (a conversation a batch), `padded` (one batch), `rows` and `shared_image` (two rows of
            different lengths), `blocks` (the same, padded to whole blocks of 128), `one group per batch`.
        size (`int`): Image tokens of an image.
    """
    groups = conversations(size=size)
    if how == "single":
        return [batch([[[conversation]]], "none") for group in groups for conversation in group]
    if how == "padded":
        return [batch([groups], "none")]
    if how == "one group per batch":
        return [batch([[group]], "shared_image") for group in groups]
    rows = [[groups[0], groups[3]], [groups[2], groups[1]]]
    return [batch(rows, "shared_image", 128)] if how == "blocks" else [batch(rows, how)]


def loss_and_gradients(model, inputs: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step over micro-batches, every token weighing the same."""
    model.zero_grad(set_to_none=True)
    labels = [micro.get("shift_labels", micro["labels"][:, 1:]) for micro in inputs]
    count = sum(int((label != -100).sum()) for label in labels)
    total = 0.0
    for micro in inputs:
        loss = model(**micro, num_items_in_batch=torch.tensor(count)).loss
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(ours: tuple, theirs: tuple) -> float:
    """The largest relative difference, of the loss and of any parameter's gradient.

    Gradients that are nothing but rounding (of keys' biases, which the softmax cancels) are measured against the
    largest gradient of all.
    """
    assert ours[1].keys() == theirs[1].keys()
    largest = max(gradient.norm().item() for gradient in theirs[1].values())
    worst = abs(ours[0] - theirs[0]) / theirs[0]
    for name, gradient in theirs[1].items():
        scale = max(gradient.norm().item(), 1e-3 * largest)
        worst = max(worst, (ours[1][name] - gradient).norm().item() / scale)
    return worst
