"""Stage 0's model and tokenizer: a causal language model from random weights, or one to go on with."""

import logging

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

from jnana.processing.data import tokenizer_fingerprint, train_tokenizer

from .arguments import TextModelArguments
from .loading import check_text_tokenizer


logger = logging.getLogger(__name__)

ROWS_MULTIPLE = 64  # embeddings of such a height suit GPU kernels, and leave rows for the image token


def check_text_arguments(args: TextModelArguments) -> None:
    """Refuse arguments that name no model or tokenizer, or two of them.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    models = ("model_name_or_path", "config_name_or_path", "text_config")
    given = [name for name in models if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"of {', '.join(models)} exactly one must be set, and {given or 'none'} is/are")
    if args.train_tokenizer_vocab_size is not None and args.tokenizer_name_or_path is not None:
        raise ValueError(
            f"tokenizer_name_or_path ({args.tokenizer_name_or_path!r}) and train_tokenizer_vocab_size "
            f"({args.train_tokenizer_vocab_size}) exclude each other; take a tokenizer, or train one"
        )
    if args.model_name_or_path is not None and args.train_tokenizer_vocab_size is not None:
        raise ValueError(
            f"train_tokenizer_vocab_size is {args.train_tokenizer_vocab_size}, but {args.model_name_or_path!r} has a "
            "tokenizer and knows no other; leave it out"
        )
    if args.text_config is not None and args.text_config_fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"text_config: model_type is {args.text_config_fields.get('model_type')!r}; give one that transformers "
            "knows, such as phi or gpt_neox"
        )
    if args.text_config is not None and not (args.tokenizer_name_or_path or args.train_tokenizer_vocab_size):
        raise ValueError("text_config needs a tokenizer: set tokenizer_name_or_path or train_tokenizer_vocab_size")


def prepare_tokenizer(
    args: TextModelArguments, documents: Dataset | IterableDataset, checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the corpus.

    Args:
        args (`TextModelArguments`): What to load or train.
        documents (`Dataset` or `IterableDataset`): The corpus, with a column `text`.
        checkpoint (`str`, *optional*): The checkpoint that is resumed; its model must know this very tokenizer.

    Raises:
        ValueError: if a model is continued with a tokenizer that is not its own.
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
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **loading)
    else:
        model = AutoModelForCausalLM.from_config(text_model_config(args, tokenizer), **loading)
    model.config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model


def text_model_config(args: TextModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The config to build from random weights; where it names no `vocab_size`, one is derived from the tokenizer."""
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
