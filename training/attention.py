"""The attention of packed rows: which implementation computes it in a run, decided before the first step.

`modeling/packed_attention_jnana.py` has the implementations. Here a recipe's choice is checked, the default is turned
into the one that suits the device, and the collators are told what it needs.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, default_data_collator

from jnana.modeling.packed_attention_jnana import PACKED_ATTENTION, SUPPORTED_ATTENTION, set_packed_attention
from jnana.processing.data import collate_documents


logger = logging.getLogger(__name__)

BLOCK = 128  # tokens of flex attention's blocks
# Families whose layers hand the layout of packed rows on to the attention, by test.
TEXT_FAMILIES = ("phi", "phi3", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def check_attention(attn_implementation: str | None, packing: str) -> None:
    """Refuse an attention implementation that can't compute packed rows.

    Args:
        attn_implementation (`str`, *optional*): Its name in transformers.
        packing (`str`): `none`, `rows` or `shared_image`.

    Raises:
        ValueError: naming both options and the remedy.
    """
    if packing != "none" and attn_implementation is not None and attn_implementation not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {attn_implementation!r}, which cannot compute packed rows (packing: {packing}); "
            f"leave it out, give one of {', '.join(SUPPORTED_ATTENTION)}, or set packing: none"
        )


def check_documents(packing: str, dispatch_batches: bool | None) -> None:
    """Refuse `dispatch_batches` for rows of documents.

    Raises:
        ValueError: naming both options and the remedy.
    """
    if packing == "rows" and dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches is true, with which accelerate cuts the rows of a batch apart, but "
            "not the layout of their documents (packing: rows); leave it out, or set packing: blocks"
        )


def row_multiple(attn_implementation: str, packing: str) -> int | None:
    """The number that the collator pads the length of rows to a multiple of; `None` leaves lengths as they are.

    Flex attention computes whole blocks anyway, and is compiled for few lengths then."""
    return BLOCK if packing != "none" and attn_implementation == "flex_attention" else None


def choose_attention(model: nn.Module, packing: str, device: torch.device) -> str:
    """Set the attention implementation with which the language model trains packed rows, and log it.

    Args:
        model (`JnanaForConditionalGeneration` or `PeftModel`): The model, on the device or not.
        packing (`str`): `none` (nothing is changed), `rows` or `shared_image`.
        device (`torch.device`): Where the model will train.

    Returns:
        `str`: The implementation.

    Raises:
        ValueError: if the model was loaded with one that can't compute packed rows.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    language_model = whole.model.language_model
    if packing == "none":
        return language_model.config._attn_implementation
    check_attention(language_model.config._attn_implementation, packing)
    return _set(language_model, device)


def text_collator(
    model: PreTrainedModel, packing: str, device: torch.device
) -> Callable[[list[dict]], dict[str, Any]]:
    """The collator of stage 0, for which the language model's attention implementation is set where it is sdpa.

    Args:
        model (`PreTrainedModel`): A causal language model.
        packing (`str`): `blocks`, or `rows` of documents that do not attend to one another.
        device (`torch.device`): Where the model will train.

    Returns:
        `Callable`: `collate_documents`, or transformers' own collator where transformers makes the mask of documents
            itself: with an attention implementation that the recipe gives, and in families not tried.
    """
    if packing != "rows" or model.config.model_type not in TEXT_FAMILIES:
        return default_data_collator
    if model.config._attn_implementation not in ("sdpa", *PACKED_ATTENTION):
        return default_data_collator
    _set(model, device)
    return collate_documents


def _set(language_model: PreTrainedModel, device: torch.device) -> str:
    name = set_packed_attention(language_model, device)
    logger.info(f"attention of packed rows: {name}")
    return name
