"""The layout of packed rows: conversations as token ids in, ids, positions and labels of one long row out.

Conversations that begin alike (those about one image do) are laid out as a tree: what they share once, then the rest
of each as a branch. A branch sees the shared tokens and itself, and its positions go on from them (the model's
`packed_attention_jnana.py` makes the mask), so each conversation is trained exactly as in a row of its own.

What makes it exact is the branch point. The last token before the branches must predict the first token of *every*
branch, but one place of a row predicts one token. So the shared part stops one token early, and each branch repeats
that token, at the same position and unsupervised. Nothing here knows a chat template: tokens are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


IGNORED = -100
PACKINGS = ("none", "rows", "shared_image")


@dataclass
class EncodedConversation:
    """
    A conversation as token ids, cut to the length it is trained with.

    Args:
        ids (`list[int]`): token ids.
        mask (`list[int]`): 1 on the tokens of answers.
        images (`list[int]`): for each image of it, in reading order, its number among the images of the batch.
    """

    ids: list[int]
    mask: list[int]
    images: list[int] = field(default_factory=list)


@dataclass
class PackedRow:
    """
    One row of a batch, without padding.

    Args:
        ids, positions, segments, branches, labels (`list[int]`): one entry a token. `labels` holds the tokens to
            predict in their own places, -100 elsewhere.
        images (`list[int]`): for each place of an image in reading order, the number of the image it shows.
        num_segments (`int`): conversations or trees in it.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    num_segments: int = 0

    def add(self, ids: list[int], labels: list[int], start: int, branch: int) -> None:
        """Tokens of the newest segment, at positions from `start` on."""
        self.ids += ids
        self.labels += labels
        self.positions += range(start, start + len(ids))
        self.segments += [self.num_segments - 1] * len(ids)
        self.branches += [branch] * len(ids)


def shared_length(ids: Sequence[list[int]], masks: Sequence[list[int]], image_token_id: int) -> int:
    """
    How many tokens several conversations can share.

    It is their longest common prefix less one token, the branch point that each repeats. It ends before any answer:
    a caption that two people wrote alike counts twice. It never ends inside an image: images stay whole.

    Args:
        ids (`Sequence[list[int]]`): token ids of each conversation, with one image token an image or with all of them.
        masks (`Sequence[list[int]]`): 1 on answer tokens.
        image_token_id (`int`): the image token.

    Returns:
        `int`: length of the shared part, 0 for a single conversation.
    """
    if len(ids) < 2:
        return 0
    common = min(len(tokens) for tokens in ids)
    for place, tokens in enumerate(zip(*ids, strict=False)):
        if len(set(tokens)) > 1:
            common = place
            break
    first_answer = min(mask.index(1) if 1 in mask else len(mask) for mask in masks)
    shared = max(min(common, first_answer) - 1, 0)
    first = ids[0]
    while shared > 0 and first[shared] == first[shared - 1] == image_token_id:
        shared -= 1
    return shared


def expanded_length(ids: list[int], image_token_id: int, tokens_per_image: int) -> int:
    """Tokens of a sequence once each image token in it stands for `tokens_per_image`."""
    return len(ids) + (tokens_per_image - 1) * ids.count(image_token_id)


def pack_row(
    groups: Sequence[Sequence[EncodedConversation]], image_token_id: int, tokens_per_image: int, share: bool
) -> PackedRow:
    """
    Lay out one row.

    Args:
        groups (`Sequence[Sequence[EncodedConversation]]`): conversations; those of one group have the same images.
        image_token_id (`int`): the image token.
        tokens_per_image (`int`): image tokens an image has in `ids`.
        share (`bool`): lay out each group as a tree (`packing: shared_image`); else every conversation by itself.

    Returns:
        `PackedRow`.
    """
    row = PackedRow()
    for group in groups:
        trees = [group] if share else [[conversation] for conversation in group]
        for tree in trees:
            _add_tree(row, tree, image_token_id, tokens_per_image)
    return row


def _add_tree(row: PackedRow, tree: Sequence[EncodedConversation], image_token_id: int, tokens_per_image: int) -> None:
    row.num_segments += 1
    shared = shared_length([c.ids for c in tree], [c.mask for c in tree], image_token_id)
    prefix = tree[0].ids[:shared]
    num_shared_images = prefix.count(image_token_id) // tokens_per_image
    row.add(prefix, [IGNORED] * shared, start=0, branch=0)
    row.images += tree[0].images[:num_shared_images]
    for branch, conversation in enumerate(tree, start=1):
        ids = conversation.ids[shared:]
        labels = [token if on else IGNORED for token, on in zip(ids, conversation.mask[shared:], strict=True)]
        labels[0] = IGNORED  # what stands before it in the row is another branch or another segment
        row.add(ids, labels, start=shared, branch=branch)
        row.images += conversation.images[num_shared_images:]


def stack_rows(
    rows: Sequence[PackedRow], pad_token_id: int, multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Rows to tensors, padded on the right.

    Args:
        rows (`Sequence[PackedRow]`): at least one.
        pad_token_id (`int`): the padding token.
        multiple_of (`int`, *optional*): pad the length to a multiple of it.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids`, `segment_ids`, `branch_ids`, `labels`, `shift_labels`
        (at each place the token that it must predict) and the bool `logits_to_keep`, all
        `(num_rows, sequence_length)`.
    """
    width = max(len(row.ids) for row in rows)
    if multiple_of:
        width = -(-width // multiple_of) * multiple_of
    columns = {
        "input_ids": ([row.ids for row in rows], pad_token_id),
        "position_ids": ([row.positions for row in rows], 0),
        "segment_ids": ([row.segments for row in rows], -1),
        "branch_ids": ([row.branches for row in rows], 0),
        "labels": ([row.labels for row in rows], IGNORED),
    }
    batch = {name: pad_right(values, filler, width) for name, (values, filler) in columns.items()}
    # A segment's and a branch's first token has no label, so no label crosses a border when all move by one.
    batch["shift_labels"] = shift_left(batch["labels"])
    batch["logits_to_keep"] = batch["shift_labels"] != IGNORED
    return batch


def pad_right(values: Sequence[list[int]], filler: int, width: int) -> torch.Tensor:
    """Lists to a tensor `(len(values), width)`."""
    return torch.tensor([value + [filler] * (width - len(value)) for value in values], dtype=torch.long)


def shift_left(labels: torch.Tensor) -> torch.Tensor:
    """Labels `(rows, sequence_length)` moved to the places that predict them."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
