"""A model's own tokenizer passes the check, and any other raises an error."""

import pytest
from transformers import AutoTokenizer

from jnana.processing import add_jnana_tokens
from jnana.processing.data import check_tokenizer, tokenizer_fingerprint, train_tokenizer
from tests.processing.chats import llama_like_tokenizer
from tests.tiny import CORPUS, tiny_tokenizer


NAMES = {"model_name": "models/phi", "tokenizer_name": "other/tokenizer"}


def test_a_tokenizer_is_known_again_after_saving_and_adding_tokens(tmp_path):
    tokenizer = tiny_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint.startswith("300:") and len(fingerprint) == 4 + 64
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == fingerprint
    add_jnana_tokens(loaded)
    assert tokenizer_fingerprint(loaded, 300) == fingerprint != tokenizer_fingerprint(loaded)
    check_tokenizer(fingerprint, loaded, **NAMES)


def test_every_other_tokenizer_is_refused_by_both_names():
    fingerprint = tokenizer_fingerprint(tiny_tokenizer())
    same_size = train_tokenizer([*CORPUS[::-1], "entirely other words, over and over, over and over"], 300)
    smaller = train_tokenizer(CORPUS, 280)
    for other in (same_size, smaller, llama_like_tokenizer()):
        with pytest.raises(ValueError, match="other/tokenizer .* is not the one that models/phi was trained with"):
            check_tokenizer(fingerprint, other, **NAMES)
    check_tokenizer(fingerprint, tiny_tokenizer(), **NAMES)  # negative control


def test_two_ids_exchanged_are_seen():
    """The slip that cost a trial up to 50 points: the same entries, two of them under each other's id."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    with pytest.raises(ValueError, match="its ids mean other texts"):
        check_tokenizer(tokenizer_fingerprint(tokenizer), other, **NAMES)


def test_the_same_entries_cut_otherwise_are_seen():
    from tokenizers import pre_tokenizers

    tokenizer, other = tiny_tokenizer(), tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)


def test_what_is_no_fingerprint_is_named():
    with pytest.raises(ValueError, match="tokenizer_fingerprint='abc' of models/phi"):
        check_tokenizer("abc", tiny_tokenizer(), **NAMES)
    with pytest.raises(ValueError, match="size=999"):
        tokenizer_fingerprint(tiny_tokenizer(), 999)
