"""Which image each token attends to, and what the cross-attention blocks keep of images between two calls.

The images of a text are slots of its row, in reading order. A slot is known by the position of its image token,
counted from the start of the row. So one rule holds for a whole text, for a text whose start is in the cache, and for
a cache that has been cropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


# The attribute of a `Cache` that holds the keys and values of images beside those of tokens.
STATES_NAME = "cross_attention_states"
# The position of an image token that is not there: behind every token.
NOWHERE = torch.iinfo(torch.int64).max


@dataclass
class CrossAttentionStates:
    """
    The images of the text so far, kept with the cache of keys and values.

    Args:
        image_positions (`torch.LongTensor` of shape `(batch_size, num_slots)`): The index in the row of each image
            token; `NOWHERE` in the slots of rows with fewer images.
        end_positions (`torch.LongTensor` of shape `(batch_size, num_ends)`): The same of end tokens.
        keys, values (`list[torch.FloatTensor]`): For each block, `(batch_size, num_heads, num_slots, num_latents,
            head_dim)`.
    """

    image_positions: torch.Tensor
    end_positions: torch.Tensor
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def hide(self, length: int | torch.Tensor) -> "CrossAttentionStates":
        """The same with no image and no end token behind the first `length` tokens; its shapes do not change."""
        images, ends = (
            torch.where(positions < length, positions, NOWHERE)
            for positions in (self.image_positions, self.end_positions)
        )
        return CrossAttentionStates(images, ends, self.keys, self.values)

    def crop(self, length: int) -> "CrossAttentionStates":
        """The images and end tokens within the first `length` tokens."""
        kept = (self.image_positions < length).any(0)
        return CrossAttentionStates(
            self.image_positions[:, kept],
            self.end_positions[:, (self.end_positions < length).any(0)],
            [keys[:, :, kept.to(keys.device)] for keys in self.keys],  # `device_map` may have put them elsewhere
            [values[:, :, kept.to(values.device)] for values in self.values],
        ).hide(length)

    def select(self, rows: torch.Tensor) -> "CrossAttentionStates":
        """Those of these rows (`torch.LongTensor` of shape `(num_rows,)`), in this order; a row may be named twice."""

        def of(states: torch.Tensor) -> torch.Tensor:
            return states[rows.to(states.device)]

        return CrossAttentionStates(
            of(self.image_positions),
            of(self.end_positions),
            [of(keys) for keys in self.keys],
            [of(values) for values in self.values],
        )


@dataclass
class CrossAttentionInputs:
    """
    What the blocks need of one call of the model.

    Args:
        image_vectors (`torch.FloatTensor` of shape `(num_images, num_latents, width)`, *optional*): New images.
        image_slots (`torch.LongTensor` of shape `(batch_size, num_new_slots)`, *optional*): For each row, the indices
            of its images in `image_vectors`, in reading order; any index in the slots of rows with fewer.
        attention_mask (`torch.BoolTensor` of shape `(batch_size, 1, sequence_length, num_slots * num_latents)`,
            *optional*): Which vectors a token attends to; `None` if there is one slot only.
        sees_image (`torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`): Whether it attends to any.
        past ([`CrossAttentionStates`], *optional*): Images of earlier calls; their slots come first.
        states ([`CrossAttentionStates`]): Old and new images; the blocks add their keys and values.
    """

    image_vectors: torch.Tensor | None
    image_slots: torch.Tensor | None
    attention_mask: torch.Tensor | None
    sees_image: torch.Tensor
    past: CrossAttentionStates | None
    states: CrossAttentionStates


def find_positions(
    token_mask: torch.Tensor, start: int | torch.Tensor, most: int, slots: int | None = None
) -> torch.Tensor:
    """
    Where in its row each marked token stands.

    Args:
        token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The marked tokens.
        start (`int`): The index of the first column in the row.
        most (`int`): No row has more marked tokens. Used where counting them would break a compiled graph.
        slots (`int`, *optional*): The most marked tokens of a row, where they have been counted.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_slots)`: Ascending; `NOWHERE` in rows with fewer.
    """
    columns = torch.arange(token_mask.shape[1], device=token_mask.device) + start
    positions = torch.where(token_mask, columns, NOWHERE).sort(dim=1).values
    if slots is None:
        slots = most if torch.compiler.is_compiling() else int(token_mask.sum(1).max())
    return positions[:, :slots].contiguous()


def find_visible_images(
    columns: torch.Tensor,
    image_positions: torch.Tensor,
    end_positions: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    branch_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Which image each token attends to: the last one before it or at it, unless an end token stands between.

    Args:
        columns (`torch.LongTensor` of shape `(sequence_length,)`): The indices of the tokens in their rows.
        image_positions (`torch.LongTensor` of shape `(batch_size, num_slots)`): Those of the image tokens.
        end_positions (`torch.LongTensor` of shape `(batch_size, num_ends)`): Those of the end tokens.
        segment_ids, branch_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): For packed
            rows: only images and end tokens of a token's own branch, and of the prefix before it, count.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, sequence_length, num_slots)`: At most one image a token.
    """
    here = columns[None, :, None]

    def in_same_text(positions: torch.Tensor) -> torch.Tensor:
        there = positions.clamp(max=segment_ids.shape[1] - 1)  # type: ignore[union-attr]
        segment, branch = (ids.gather(1, there)[:, None] for ids in (segment_ids, branch_ids))  # type: ignore[union-attr]
        same_branch = (branch == 0) | (branch == branch_ids[:, :, None])  # type: ignore[index]
        return (segment == segment_ids[:, :, None]) & same_branch  # type: ignore[index]

    images, ends = image_positions[:, None], end_positions[:, None]
    image_before, end_before = images <= here, ends < here
    if segment_ids is not None:
        image_before = image_before & in_same_text(image_positions)
        end_before = end_before & in_same_text(end_positions)
    if image_positions.shape[1] == 0:
        return image_before
    last_image = torch.where(image_before, images, -1).amax(-1, keepdim=True)
    visible = image_before & (images == last_image)
    if end_positions.shape[1] == 0:
        return visible
    return visible & (last_image > torch.where(end_before, ends, -1).amax(-1, keepdim=True))


def prepare_inputs(
    image_vectors: torch.Tensor | None,
    image_indices: torch.Tensor | Sequence[int] | None,
    image_mask: torch.Tensor,
    end_mask: torch.Tensor | None,
    cache: Any | None,
    segment_ids: torch.Tensor | None = None,
    branch_ids: torch.Tensor | None = None,
    max_row_images: int | None = None,
) -> CrossAttentionInputs:
    """
    Lay the images out for the blocks.

    Args:
        image_vectors (`torch.FloatTensor` of shape `(num_images, num_latents, width)`, *optional*): The images of this
            call, or, with a mask of no image, a blank one whose only purpose is that all weights take part.
        image_indices (`torch.LongTensor` of shape `(num_image_tokens,)` or `list`, *optional*): For each image token,
            in reading order, the index of its image; by default one after the other.
        image_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The image tokens of this call.
        end_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): Its end tokens.
        cache (`Cache`, *optional*): With the images of earlier calls.
        segment_ids, branch_ids (`torch.LongTensor`, *optional*): Of packed rows.
        max_row_images (`int`, *optional*): The most image tokens of a row, where they have been counted.
    """
    rows, length = image_mask.shape
    start = 0 if cache is None else cache.get_seq_length()
    past: CrossAttentionStates | None = getattr(cache, STATES_NAME, None)
    if past is not None:  # the cache may have been cropped, or emptied
        past = past.hide(start) if length == 1 else past.crop(int(start))
    if past is not None and past.image_positions.shape[1] == 0:
        past = None
    columns = torch.arange(length, device=image_mask.device) + start
    empty = image_mask.new_zeros((rows, 0), dtype=torch.long)
    old_ends = empty if past is None else past.end_positions
    new_images, slots = empty, None
    if image_vectors is not None:
        most = len(image_vectors) if image_indices is None else len(image_indices)
        new_images = find_positions(image_mask, start, min(most, length), max_row_images)
        if new_images.shape[1] == 0:  # the blank image needs a slot
            new_images = torch.full((rows, 1), NOWHERE, device=image_mask.device)
        counts = image_mask.sum(1)
        first = counts.cumsum(0) - counts
        slots = first[:, None] + torch.arange(new_images.shape[1], device=first.device)
        slots = slots.clamp(max=most - 1)
        slots = slots if image_indices is None else torch.as_tensor(image_indices, device=slots.device)[slots]
    states = CrossAttentionStates(
        new_images if past is None else torch.cat([past.image_positions, new_images], dim=1),
        old_ends if end_mask is None else _add_ends(old_ends, end_mask, start),
    )
    visible = find_visible_images(columns, states.image_positions, states.end_positions, segment_ids, branch_ids)
    sees_image = visible.any(-1, keepdim=True)
    mask = None
    if visible.shape[-1] > 1:
        num_latents = image_vectors.shape[1] if past is None else past.keys[0].shape[3]  # type: ignore[union-attr]
        # A token without an image attends to all: the softmax of an empty row is NaN. The block discards the result.
        mask = (visible | ~sees_image).repeat_interleave(num_latents, dim=-1)[:, None]
    return CrossAttentionInputs(image_vectors, slots, mask, sees_image, past, states)


def _add_ends(end_positions: torch.Tensor, end_mask: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
    """
    The positions of end tokens so far. A last column is for those that are generated later, one token at a time, so
    that the steps of generation keep one shape.
    """
    if end_mask.shape[1] == 1 and end_positions.shape[1] > 0:
        last = torch.where(end_mask, start, end_positions[:, -1:])
        return torch.cat([end_positions[:, :-1], last], dim=1)
    spare = torch.full((end_mask.shape[0], 1), NOWHERE, device=end_mask.device)
    return torch.cat([end_positions, find_positions(end_mask, start, end_mask.shape[1]), spare], dim=1)


__all__ = ["CrossAttentionInputs", "CrossAttentionStates", "find_visible_images", "prepare_inputs"]
