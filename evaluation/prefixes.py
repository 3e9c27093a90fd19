"""The part of a prompt that all questions about an image share: read once, its keys and values used for each of them.

The questions about an image begin with the same tokens: those of the system's text and of the image. They are one row
of a first call of the model. Its cache is copied for each question, and `generate` goes on behind it:

    columns     0 ................... P-1 | P .................. P+S-1 | answers
    question 1  <pad> system image ...... | <pad> <pad> is there a dog | no
    question 2  <pad> system image ...... | how many dogs are there in | two
    question 3  system another image .... | <pad> what is left of the | dog

Padding may stand in front of both parts. It is masked, and positions count real tokens only, so that each token has
the position, and attends to the tokens, that it has when the question is asked alone. This is exact with rotary
embeddings (all supported families), and with `fusion: cross_attention`, where a token attends to the last image before
it. It is not where a model counts columns or tokens otherwise; [`sharing_problem`] and [`length_limit`] name these
cases, which are asked in ordinary batches.
"""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedConfig
from transformers.generation import GenerationMode

from jnana.modeling import CACHE_NAME
from jnana.modeling.image_slots_jnana import STATES_NAME
from jnana.processing import JnanaProcessor


def sharing_problem(model: torch.nn.Module, processor: Any, options: dict[str, Any] | None = None) -> str | None:
    """Why a model's questions can't share the cache of their prefix.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Any model.
        processor (`ProcessorMixin`): Its processor.
        options (`dict`, *optional*): Arguments of `generate`, which override the generation config.

    Returns:
        `str` or `None`: The reason, for a log.
    """
    if not isinstance(processor, JnanaProcessor):
        return f"the processor is a {type(processor).__name__}, not a JnanaProcessor; load it with `load_model`"
    if model.config.model_type != "jnana":
        return f"the positions of a {model.config.model_type} model are not known to allow it"
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type.value} puts vectors of its own in front of the prompt"
    image_end = model.config.image_end_token_id
    if image_end is not None and image_end == processor.tokenizer.pad_token_id:
        return "image_end_token_id is the padding token, which stands between the prefix and a shorter question"
    options = dict(options or {})
    assistant = options.pop("assistant_model", None)
    settings = copy.deepcopy(model.generation_config)
    for name, value in options.items():
        setattr(settings, name, value)
    mode = settings.get_generation_mode(assistant)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} does not go on from a cache as greedy search and sampling do"
    # n-grams are looked for in all columns, and padding parts those across the end of the prefix
    for name, allowed in (
        ("use_cache", (True, None)),
        ("cache_implementation", (None,)),
        ("no_repeat_ngram_size", (0, None)),
    ):
        if getattr(settings, name) not in allowed:
            return f"{name} is {getattr(settings, name)!r} in the generation settings"
    return None


def length_limit(text_config: PreTrainedConfig) -> int | None:
    """The longest row, in columns up to the end of its answer, whose prefix may be read by itself.

    Within it, a sliding window hides nothing (it counts columns, padding included), and the rotary embedding does not
    change with the length of the text (LongRoPE of Phi-3, dynamic scaling).

    Args:
        text_config (`PreTrainedConfig`): The language model's config.

    Returns:
        `int` or `None`: The limit; `None` without one.
    """
    limits = []
    if getattr(text_config, "sliding_window", None) is not None:
        limits.append(text_config.sliding_window)
    if text_config.model_type == "phi3":
        limits.append(text_config.original_max_position_embeddings)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limits.append(rope.get("original_max_position_embeddings") or text_config.max_position_embeddings)
    return min(limits, default=None)


def shared_prefix_length(ids: Sequence[list[int]], image_token_id: int) -> int:
    """How many of their first tokens some prompts share, if all their images are within.

    Args:
        ids (`Sequence[list[int]]`): Token ids of each prompt, with all image tokens.
        image_token_id (`int`): The image token.

    Returns:
        `int`: The length of the longest common prefix that leaves each prompt a token; 0 if an image token stands
        behind it.
    """
    length = min(len(os.path.commonprefix(ids)), min(map(len, ids)) - 1)
    return 0 if any(image_token_id in tokens[length:] for tokens in ids) else length


def read_prefix(model: torch.nn.Module, prefix: dict[str, Any]) -> DynamicCache:
    """Run the model on prefixes and their images.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, in evaluation mode.
        prefix (`dict`): `input_ids` and `attention_mask` of shape `(num_prefixes, length)`, padded on the left, and
            what the image processor returned for their images.

    Returns:
        `DynamicCache`: Keys and values of shape `(num_prefixes, num_heads, length, head_dim)`, images included.
    """
    mask = prefix["attention_mask"]
    outputs = model(
        **prefix,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # as `generate` counts them
        logits_to_keep=1,
        use_cache=True,
        # without the config all layers keep every key
        **{CACHE_NAME: DynamicCache()},
    )
    return getattr(outputs, CACHE_NAME)


def cache_of_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache whose rows are copies of rows of another one, which stays as it is.

    Args:
        cache (`DynamicCache`): As [`read_prefix`] returns it.
        rows (`torch.LongTensor` of shape `(num_rows,)`): The row to copy for each; on the CPU, as the layers of the
            model may be on several devices.

    Returns:
        `DynamicCache`: With `num_rows` rows.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    states = getattr(cache, STATES_NAME, None)
    if states is not None:
        setattr(chosen, STATES_NAME, states.select(rows))
    return chosen
