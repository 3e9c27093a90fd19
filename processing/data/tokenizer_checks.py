"""Fingerprints of tokenizers, to check that a model is used with the tokenizer that it was trained with.

A language model under another tokenizer raises no error and loses up to 50 points of accuracy.
"""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


# Words, numbers, punctuation, white space and other scripts, which tokenizers split differently.
PROBE = (
    "The 2nd quick-brown fox, isn't it?  It's 12,345.67\n\n\tdéjà vu; Ünïcode - 日本語 ☃ 🙂 def f(x):\n"
    "    return x_1 != 0"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """
    A short text that is equal for tokenizers that give the same ids.

    It covers the entries with ids below `size`, and the ids of a text with all kinds of characters, so that two
    tokenizers with equal entries that split text differently have different fingerprints. Tokens added later (image,
    padding) do not change the fingerprint of the first `size` entries.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        size (`int`, *optional*): number of entries to cover; by default all.

    Returns:
        `str`: `"{size}:{sha256}"`.

    Raises:
        ValueError: if the tokenizer has fewer entries than `size`.
    """
    vocabulary = tokenizer.get_vocab()
    size = len(tokenizer) if size is None else size
    if size > len(tokenizer):
        raise ValueError(f"size={size}: the tokenizer has only {len(tokenizer)} entries.")
    entries = sorted((index, token) for token, index in vocabulary.items() if index < size)
    probe = [index for index in tokenizer.encode(PROBE, add_special_tokens=False) if index < size]
    text = json.dumps([entries, probe], ensure_ascii=False)
    return f"{size}:{hashlib.sha256(text.encode('utf-8')).hexdigest()}"


def check_tokenizer(
    fingerprint: str, tokenizer: PreTrainedTokenizerBase, *, model_name: str, tokenizer_name: str
) -> None:
    """
    Raise if a tokenizer is not the one that a model was trained with.

    Args:
        fingerprint (`str`): [`tokenizer_fingerprint`] of the model's tokenizer. The tokenizer may have further tokens.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer to check.
        model_name (`str`), tokenizer_name (`str`): names for the error.

    Raises:
        ValueError: if the tokenizer gives other ids, or the fingerprint is malformed.
    """
    head = fingerprint.split(":")[0]
    if not head.isdigit():
        raise ValueError(f"tokenizer_fingerprint={fingerprint!r} of {model_name} is not of the form 'size:sha256'.")
    size = int(head)
    if size > len(tokenizer) or tokenizer_fingerprint(tokenizer, size) != fingerprint:
        raise ValueError(
            f"The tokenizer {tokenizer_name} ({len(tokenizer)} entries) is not the one that {model_name} was trained "
            f"with ({size} entries, fingerprint {fingerprint}): its ids mean other texts. Use the tokenizer saved "
            f"with {model_name}."
        )
