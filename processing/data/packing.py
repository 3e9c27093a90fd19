"""Packing: which conversations share a row of a batch, and how such a row is laid out.

Planning uses token counts only. The conversations of one data row form a group; rows are filled with groups like bins.
The plan depends on the lengths and the seed alone, so every process computes the same plan and a resumed run continues
with it. The Trainer's sampler then shuffles the rows in every epoch.

Layout: conversations of a group begin alike (those about one image do). Their common tokens stand once, as a prefix,
followed by the rest of each conversation as a branch. A branch attends to the prefix and to itself, and its positions
continue those of the prefix (`modeling/packed_attention_jnana.py`), so each conversation is trained
exactly as in a row of its own.

The branch point makes it exact. The last token before the branches must predict the first token of *every* branch, but
one position of a row predicts one token. So the prefix ends one token early, and each branch repeats that token at the
same position, unsupervised. The code compares token ids and knows nothing about chat templates.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


IGNORED = -100
PACKINGS = ("none", "rows", "shared_image")

# Groups that are sorted by length together: enough to leave little room in the rows.
WINDOW = 2048


# ---------------------------------------------------------------------- lengths of conversations


@dataclass
class ConversationSize:
    """
    The size of a conversation in tokens.

    Args:
        length (`int`): all tokens.
        first_label (`int`, *optional*): position of the first supervised token; the first token of a sequence is never
            supervised.
        images_end (`int`): position behind the last image token, 0 without images.
    """

    length: int
    first_label: int | None
    images_end: int


def measure_conversation(
    ids: list[int], mask: list[int], image_token_id: int, image_tokens: Sequence[int], source: str = "a row"
) -> ConversationSize:
    """
    The size that a conversation will have when each of its image tokens is repeated for its image.

    Args:
        ids (`list[int]`): token ids, with one image token for each image.
        mask (`list[int]`): 1 on answer tokens.
        image_token_id (`int`): the image token.
        image_tokens (`Sequence[int]`): image tokens of each image, in reading order.
        source (`str`, *optional*): file and record, for the error.

    Raises:
        ValueError: if the numbers of image tokens and images differ.
    """
    images = _image_positions(ids, image_token_id, image_tokens, source)
    added = [count - 1 for count in image_tokens]
    first = mask.index(1, 1) if 1 in mask[1:] else None
    if first is not None:
        first += sum(more for position, more in zip(images, added, strict=True) if position < first)
    images_end = images[-1] + 1 + sum(added) if images else 0
    return ConversationSize(len(ids) + sum(added), first, images_end)


def expand_images(
    ids: list[int], mask: list[int], image_token_id: int, image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """
    Repeat each image token as often as the model gives vectors for its image.

    Args:
        ids, mask, image_token_id, image_tokens: as in [`measure_conversation`].

    Returns:
        `tuple[list[int], list[int]]`: token ids and mask.
    """
    images = _image_positions(ids, image_token_id, image_tokens)
    for position, count in reversed(list(zip(images, image_tokens, strict=True))):
        ids = ids[:position] + [image_token_id] * count + ids[position + 1 :]
        mask = mask[:position] + mask[position : position + 1] * count + mask[position + 1 :]
    return ids, mask


def _image_positions(
    ids: list[int], image_token_id: int, image_tokens: Sequence[int], source: str = "a row"
) -> list[int]:
    positions = [position for position, token in enumerate(ids) if token == image_token_id]
    if len(positions) != len(image_tokens):
        raise ValueError(
            f"{source}: a conversation about {len(image_tokens)} images has {len(positions)} image tokens; the chat "
            "template must write one for each image. Mend it, or give another one, such as chat_template: jnana"
        )
    return positions


def shared_length(ids: Sequence[list[int]], masks: Sequence[list[int]], image_token_id: int) -> int:
    """
    The number of tokens in the prefix that several conversations share.

    It is their longest common prefix less one token, the branch point, which each branch repeats. The prefix ends
    before any answer: identical captions are trained once each. It never ends inside an image.

    Args:
        ids (`Sequence[list[int]]`): token ids of each conversation, with one image token for each image or with all.
        masks (`Sequence[list[int]]`): 1 on answer tokens.
        image_token_id (`int`): the image token.

    Returns:
        `int`: length of the prefix, 0 for a single conversation.
    """
    if len(ids) < 2:
        return 0
    common = min(len(tokens) for tokens in ids)
    for position, tokens in enumerate(zip(*ids, strict=False)):
        if len(set(tokens)) > 1:
            common = position
            break
    first_answer = min(mask.index(1) if 1 in mask else len(mask) for mask in masks)
    shared = max(min(common, first_answer) - 1, 0)
    first = ids[0]
    while shared > 0 and first[shared] == first[shared - 1] == image_token_id:
        shared -= 1
    return shared


# ---------------------------------------------------------------------- planning


@dataclass
class RowPlan:
    """
    The rows that will be packed.

    Args:
        rows (`list[list[tuple[int, list[int]]]]`): for each row its groups, as the index of a data row and the indices
            of some of its conversations.
        sizes (`list[int]`): tokens of each row.
        num_unpacked (`int`): tokens of all conversations without packing.
    """

    rows: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    num_unpacked: int = 0

    def __str__(self) -> str:
        tokens, longest = sum(self.sizes), max(self.sizes, default=0)
        padded = 1 - tokens / max(longest * len(self.rows), 1)
        saved = 1 - tokens / max(self.num_unpacked, 1)
        groups = sum(len(row) for row in self.rows) / max(len(self.rows), 1)
        return (
            f"{len(self.rows):,} packed rows of up to {longest} tokens with {groups:.1f} groups each, at most "
            f"{padded:.1%} of them padding; {tokens:,} tokens instead of {self.num_unpacked:,} ({saved:.0%} saved)"
        )


def plan_rows(
    lengths: Sequence[Sequence[int]],
    shared: Sequence[int] | None,
    max_row_tokens: int,
    *,
    max_length: int | None = None,
    seed: int | None = None,
) -> RowPlan:
    """
    Fill rows with groups of conversations.

    Args:
        lengths (`Sequence[Sequence[int]]`): tokens of every conversation of every data row.
        shared (`Sequence[int]`, *optional*): tokens in the shared prefix of each data row ([`shared_length`]). A data
            row is then one group, or as few groups as fit into rows, each with the prefix again. If not given, every
            conversation is a group of its own.
        max_row_tokens (`int`): tokens a row may have.
        max_length (`int`, *optional*): conversations are cut to this length.
        seed (`int`, *optional*): of the order in which groups are taken; by default the order of the data.

    Returns:
        `RowPlan`: the rows.

    Raises:
        ValueError: if a conversation is longer than a row.
    """
    groups, costs, plan = [], [], RowPlan()
    for row, whole in enumerate(lengths):
        sizes = [length if max_length is None else min(length, max_length) for length in whole]
        plan.num_unpacked += sum(sizes)
        if max(sizes) > max_row_tokens:
            raise ValueError(
                f"max_row_tokens is {max_row_tokens}, but a conversation of data row {row} has {max(sizes)} tokens; "
                "raise it, or lower max_length, which cuts long answers (never images)"
            )
        for conversations, cost in _split(sizes, 0 if shared is None else shared[row], max_row_tokens, shared is None):
            groups.append((row, conversations))
            costs.append(cost)
    order: Iterable[int] = range(len(groups))
    if seed is not None:
        shuffled = np.random.default_rng(seed).permutation(len(groups)).tolist()
        windows = (shuffled[i : i + WINDOW] for i in range(0, len(shuffled), WINDOW))
        order = [group for window in windows for group in longest_first(costs, window)]
    for members, size in fill_rows(costs, order, max_row_tokens):
        plan.rows.append([groups[index] for index in members])
        plan.sizes.append(size)
    return plan


def longest_first(costs: Sequence[int], groups: Iterable[int]) -> list[int]:
    """Groups by decreasing cost, so that short ones fill the room that long ones leave. The sort is stable."""
    return sorted(groups, key=lambda group: -costs[group])


def _split(sizes: list[int], shared: int, limit: int, separate: bool) -> list[tuple[list[int], int]]:
    """One data row as groups of at most `limit` tokens: the conversations of each group, and its tokens."""
    found: list[tuple[list[int], int]] = []
    members: list[int] = []
    cost = 0
    for index, size in enumerate(sizes):
        added = size - shared if members else size
        if members and (separate or cost + added > limit):
            found.append((members, cost))
            members, cost, added = [], 0, size
        members.append(index)
        cost += added
    return [*found, (members, cost)]


def fill_rows(costs: Sequence[int], order: Iterable[int], limit: int) -> list[tuple[list[int], int]]:
    """
    Best-fit bin packing: each group goes into the fullest row that has room for it.

    Args:
        costs (`Sequence[int]`): tokens of each group.
        order (`Iterable[int]`): the groups, in the order in which they are placed.
        limit (`int`): tokens a row may have.

    Returns:
        `list[tuple[list[int], int]]`: for each row its groups, and its tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in order:
        fullest = bisect_left(open_rows, (costs[index], -1))
        if fullest < len(open_rows):
            left, row = open_rows.pop(fullest)
        else:
            left, row = limit, len(rows)
            rows.append([])
            room.append(limit)
        rows[row].append(index)
        room[row] = left - costs[index]
        if room[row] > 0:
            insort(open_rows, (room[row], row))
    return [(members, limit - left) for members, left in zip(rows, room, strict=True)]


# ---------------------------------------------------------------------- layout


@dataclass
class EncodedConversation:
    """
    A conversation as token ids, cut to the length it is trained with.

    Args:
        ids (`list[int]`): token ids, with all image tokens of each image.
        mask (`list[int]`): 1 on the tokens of answers.
        images (`list[int]`): for each of its images, in reading order, the index among the images of the batch.
        image_tokens (`list[int]`): for each of its images, the number of image tokens.
        origin (`str`, *optional*): in a mixture, the name of its source.
    """

    ids: list[int]
    mask: list[int]
    images: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    origin: str | None = None


@dataclass
class PackedRow:
    """
    One row of a batch, without padding.

    Args:
        ids, positions, segments, branches, labels (`list[int]`): one entry for each token. `labels` holds the tokens
            to predict at their own positions, -100 elsewhere.
        images (`list[int]`): for each occurrence of an image in reading order, the index of the image.
        num_segments (`int`): number of groups, or of conversations that are not grouped.
        origins (`list[tuple[str | None, int]]`): for each segment the name of its source, and its conversations.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    num_segments: int = 0
    origins: list[tuple[str | None, int]] = field(default_factory=list)

    def add(self, ids: list[int], labels: list[int], start: int, branch: int) -> None:
        """Add tokens to the newest segment, at positions from `start` on."""
        self.ids += ids
        self.labels += labels
        self.positions += range(start, start + len(ids))
        self.segments += [self.num_segments - 1] * len(ids)
        self.branches += [branch] * len(ids)


def pack_row(groups: Sequence[Sequence[EncodedConversation]], image_token_id: int, share: bool) -> PackedRow:
    """
    Lay out one row.

    Args:
        groups (`Sequence[Sequence[EncodedConversation]]`): conversations; those of one group have the same images.
        image_token_id (`int`): the image token.
        share (`bool`): lay out each group as prefix and branches (`packing: shared_image`); otherwise every
            conversation stands alone.

    Returns:
        `PackedRow`.
    """
    row = PackedRow()
    for group in groups:
        for segment in [group] if share else [[conversation] for conversation in group]:
            _add_segment(row, segment, image_token_id)
    return row


def _add_segment(row: PackedRow, conversations: Sequence[EncodedConversation], image_token_id: int) -> None:
    row.num_segments += 1
    shared = shared_length([c.ids for c in conversations], [c.mask for c in conversations], image_token_id)
    first = conversations[0]
    row.origins.append((first.origin, len(conversations)))
    prefix = first.ids[:shared]
    left, num_shared_images = prefix.count(image_token_id), 0
    while left > 0:  # the prefix ends at the end of an image or outside images
        left -= first.image_tokens[num_shared_images]
        num_shared_images += 1
    row.add(prefix, [IGNORED] * shared, start=0, branch=0)
    row.images += first.images[:num_shared_images]
    for branch, conversation in enumerate(conversations, start=1):
        ids = conversation.ids[shared:]
        labels = [token if on else IGNORED for token, on in zip(ids, conversation.mask[shared:], strict=True)]
        labels[0] = IGNORED  # the token before it in the row belongs to another branch or segment
        row.add(ids, labels, start=shared, branch=branch)
        row.images += conversation.images[num_shared_images:]


def stack_rows(
    rows: Sequence[PackedRow], pad_token_id: int, multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """
    Rows as tensors, padded on the right.

    Args:
        rows (`Sequence[PackedRow]`): at least one.
        pad_token_id (`int`): the padding token.
        multiple_of (`int`, *optional*): pad the length to a multiple of it.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `position_ids`, `segment_ids`, `branch_ids`, `labels`, `shift_labels`
        (at each position the token that it must predict), all `(num_rows, sequence_length)`; and `logit_positions`
        `(num_labels,)`, where a token is to be predicted, as indices into the rows laid end to end.
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
    batch = {name: _pad_right(values, filler, width) for name, (values, filler) in columns.items()}
    # The first token of a segment or branch has no label, so shifting moves no label into another segment or branch.
    labels = batch["labels"]
    batch["shift_labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    # Indices, counted here: a boolean mask would make the GPU wait for its count in every step.
    batch["logit_positions"] = (batch["shift_labels"].flatten() != IGNORED).nonzero()[:, 0]
    return batch


def _pad_right(values: Sequence[list[int]], filler: int, width: int) -> torch.Tensor:
    """Lists as a tensor `(len(values), width)`."""
    return torch.tensor([value + [filler] * (width - len(value)) for value in values], dtype=torch.long)
