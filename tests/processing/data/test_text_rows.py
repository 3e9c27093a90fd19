"""Rows of whole documents: every document is kept, and a stock language model attends within documents only."""

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, default_data_collator

from jnana.modeling.packed_layout_jnana import PackedLayout
from jnana.processing.data import collate_documents, pack_documents
from tests.tiny import CORPUS, tiny_text_config, tiny_tokenizer


TEXTS = [text[:n] for n in (9, 30, 61, 83) for text in CORPUS] + ["", "rook " * 40]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def documents(tokenizer, most: int) -> list[list[int]]:
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in TEXTS]
    pieces = [document[i : i + most] for document in ids for i in range(0, len(document), most)]
    return sorted(piece for piece in pieces if len(piece) > 1)


def documents_in(rows) -> list[list[int]]:
    found = []
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [len(row["position_ids"])]
        pieces = [row["input_ids"][a:b] for a, b in zip(starts, starts[1:], strict=False)]
        found += [piece for piece in pieces if len(piece) > 1]
    return sorted(found)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_hold_every_document(tokenizer, streaming):
    corpus = datasets.Dataset.from_dict({"text": TEXTS})
    rows = list(pack_documents(corpus.to_iterable_dataset() if streaming else corpus, tokenizer, 64))
    assert documents_in(rows) == documents(tokenizer, 64)
    assert {len(row[name]) for row in rows for name in row} == {64}
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    assert tokens == sum(len(document) - 1 for document in documents(tokenizer, 64)) > 0.8 * 64 * len(rows)


@pytest.mark.parametrize("attention", ["jnana_packed", "sdpa"])
@pytest.mark.parametrize("family", ["phi", "phi3", "gpt_neox", "llama"])
def test_stock_models_see_each_document_alone(tokenizer, family, attention):
    """By the layout that the collator adds, and by the mask that transformers makes of the positions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_text_config(family, initializer_range=0.2)).eval()
    rows = pack_documents(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, 64)
    model.set_attn_implementation(attention)
    batch = (collate_documents if attention == "jnana_packed" else default_data_collator)(list(rows))

    def step(batches) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        losses = [model(**inputs, use_cache=False, num_items_in_batch=100).loss for inputs in batches]
        sum(losses).backward()
        return float(sum(losses)), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, gradient = step([batch])
    alone = [torch.tensor([document]) for document in documents(tokenizer, 64)]
    expected, expected_gradient = step([{"input_ids": ids, "labels": ids} for ids in alone])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    changes = {"position_ids": torch.arange(64).expand_as(batch["position_ids"])}  # the control: rows of one document
    if "packed_layout" in batch:
        one = torch.zeros_like(batch["position_ids"])
        changes["packed_layout"] = PackedLayout.from_ids(one, one, changes["position_ids"])
    wrong, _ = step([{**batch, **changes}])
    assert abs(wrong - expected) > 1e-3 * expected


def test_a_corpus_that_can_not_be_packed_raises(tokenizer):
    corpus = datasets.Dataset.from_dict({"text": [""]})
    with pytest.raises(ValueError, match="holds no text"):
        pack_documents(corpus, tokenizer, 8)
    with pytest.raises(ValueError, match="row_tokens=1 must be at least 2"):
        pack_documents(corpus, tokenizer, 1)
