"""Text for stage 0 in rows that hold whole documents, none of which sees another.

Blocks (`text_corpus.py`) cut documents wherever a block ends and let each see the one before it. Here a row is filled
with whole documents, and positions start over with each: that is how stock language models of transformers know packed
rows, as long as they get no attention mask and keep no cache, which is so under the Trainer.
"""

from collections.abc import Iterator
from typing import Any

import datasets
from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from .packing import IGNORED
from .row_planning import WINDOW, fill_rows, longest_first


TEXT_ROW_FEATURES = Features({name: List(Value("int32")) for name in ("input_ids", "position_ids", "labels")})


def pack_documents(
    corpus: datasets.Dataset | datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, row_tokens: int
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Pack documents into rows of one length.

    Each document is closed by the closing token; one that is longer than a row is cut into rows. Some thousand
    documents are taken together, and their order among themselves is given up to fill rows well. What is left of a row
    is padded. Special tokens spelt in the text are tokenised as plain text.

    Args:
        corpus (`Dataset` or `IterableDataset`): with the column `text`.
        tokenizer (`PreTrainedTokenizerBase`): its `eos_token` closes documents.
        row_tokens (`int`): tokens a row.

    Returns:
        `Dataset` (in memory; for a corpus larger than memory, stream) or `IterableDataset`: columns `input_ids`,
        `position_ids` and `labels`, lists of `row_tokens` ids. The first label of a document is -100: nothing predicts
        it.

    Raises:
        ValueError: if `row_tokens` is below 2, the tokenizer has no closing token, or the corpus is empty.
    """
    if row_tokens < 2:
        raise ValueError(f"row_tokens={row_tokens} must be at least 2.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token to close documents with.")
    given = {"corpus": corpus, "tokenizer": tokenizer, "row_tokens": row_tokens}
    if isinstance(corpus, datasets.IterableDataset):
        return datasets.IterableDataset.from_generator(_text_rows, gen_kwargs=given, features=TEXT_ROW_FEATURES)
    rows = list(_text_rows(corpus, tokenizer, row_tokens))
    if not rows:
        raise ValueError("The corpus holds no text.")
    return datasets.Dataset.from_list(rows, features=TEXT_ROW_FEATURES)


def _text_rows(corpus: Any, tokenizer: PreTrainedTokenizerBase, row_tokens: int) -> Iterator[dict]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for batch in corpus.iter(batch_size=WINDOW):
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True, verbose=False)
        documents = [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]
        pieces = [ids[i : i + row_tokens] for ids in documents for i in range(0, len(ids), row_tokens)]
        pieces = [piece for piece in pieces if len(piece) > 1]  # a single token teaches nothing
        sizes = [len(piece) for piece in pieces]
        order = longest_first(sizes, range(len(pieces)))
        for members, size in fill_rows(sizes, order, row_tokens):
            padding = row_tokens - size
            chosen = [pieces[index] for index in members]
            yield {
                "input_ids": [token for piece in chosen for token in piece] + [pad] * padding,
                "position_ids": [place for piece in chosen for place in range(len(piece))] + [0] * padding,
                "labels": [label for piece in chosen for label in (IGNORED, *piece[1:])] + [IGNORED] * padding,
            }
