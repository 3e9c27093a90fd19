"""Builds or loads the language model of stage 0, with its tokenizer."""

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from jnana.modeling import explain_missing_safetensors
from jnana.processing.data import tokenizer_fingerprint, train_tokenizer

from .model_setup import check_text_tokenizer
from .options.arguments import TextModelArguments


ROWS_MULTIPLE = 64  # of a new embedding: suits GPU kernels, and leaves rows for the image and the pad token


def prepare_tokenizer(
    args: TextModelArguments, documents: Dataset | IterableDataset, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the corpus.

    Args:
        args (`TextModelArguments`): What to load or train.
        documents (`Dataset` or `IterableDataset`): The corpus, with a column `text`.
        checkpoint (`str`, *optional*): The checkpoint to resume from; its model must have this tokenizer.

    Raises:
        ValueError: if a model is continued with another tokenizer than it was trained with.
    """
    if args.train_tokenizer_vocab_size is not None:
        tokenizer = train_tokenizer((row["text"] for row in documents), args.train_tokenizer_vocab_size)
        if checkpoint is not None:
            check_text_tokenizer(checkpoint, tokenizer, "the tokenizer trained on train_data")
        return tokenizer
    name = args.tokenizer_name_or_path or args.model_name_or_path or args.config_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name)
    for model_name in (args.model_name_or_path, checkpoint):
        if model_name is not None:
            check_text_tokenizer(model_name, tokenizer, name)
    return tokenizer


def prepare_text_model(args: TextModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The language model to train, with the fingerprint of its tokenizer in its config.

    Raises:
        ValueError: if the config has fewer rows in its embedding than the tokenizer has entries.
    """
    loading = {"dtype": getattr(torch, args.dtype)}
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    if args.model_name_or_path is not None:
        with explain_missing_safetensors(args.model_name_or_path):
            model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, use_safetensors=True, **loading)
    else:
        model = AutoModelForCausalLM.from_config(text_model_config(args, tokenizer), **loading)
    model.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model


def text_model_config(args: TextModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config of a model with random weights; a missing `vocab_size` is derived from the tokenizer.

    Raises:
        ValueError: if the embedding has fewer rows than the tokenizer has entries.
    """
    needed = len(tokenizer)
    if args.config_name_or_path is not None:
        config = AutoConfig.from_pretrained(args.config_name_or_path)
    else:
        fields = args.text_config_fields
        rows = -(-(needed + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        config = CONFIG_MAPPING[fields["model_type"]](**{"vocab_size": rows, **fields})
    if config.vocab_size < needed:
        raise ValueError(
            f"text_config: vocab_size is {config.vocab_size}, but the tokenizer has {needed} entries; leave it "
            "out, or train a smaller tokenizer"
        )
    return config
