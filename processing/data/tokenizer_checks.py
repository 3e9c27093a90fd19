"""Which tokenizer a model was trained with: a fingerprint to store beside it, and the refusal of any other.

A language model under another tokenizer than its own raises nothing and loses up to half of what it knows.
"""

import hashlib
import json

from transformers import PreTrainedTokenizerBase


# Words, numbers, punctuation, white space, other scripts: what tokenizers cut in different ways
PROBE = (
    "The 2nd quick-brown fox, isn't it?  It's 12,345.67\n\n\tdéjà vu; Ünïcode - 日本語 ☃ 🙂 def f(x):\n"
    "    return x_1 != 0"
)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> str:
    """
    A short text that is the same for tokenizers that give the same ids.

    Covers the entries with ids below `size`, and the ids they give to a text of every sort of character, so that two
    ways of cutting text into the same entries differ too. Tokens added behind (image, padding) leave the fingerprint
    of the first `size` entries as it was.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer.
        size (`int`, *optional*): entries to cover; all of them when not given.

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
    Refuse a tokenizer that is not a model's own.

    Args:
        fingerprint (`str`): as [`tokenizer_fingerprint`] gave it for the model's tokenizer. Further tokens may have
            been added.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer to be used.
        model_name (`str`), tokenizer_name (`str`): both are named in the error.

    Raises:
        ValueError: if the tokenizer gives other ids, or the fingerprint is not one.
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
