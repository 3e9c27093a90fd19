"""The attention that a run computes packed rows with."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, default_data_collator

from jnana.modeling import packed_attention_jnana
from jnana.processing.data import collate_documents
from jnana.training import attention
from tests.modeling.pairs import join
from tests.tiny import tiny_text_config


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def of_text(model) -> str:
    return model.model.language_model.config._attn_implementation


@pytest.mark.parametrize("implementation", ["paged|eager", "kernels-community/flash-attn2"])
def test_attention_that_cannot_compute_packed_rows_is_refused(tmp_path, implementation):
    message = f"attn_implementation is '{implementation}'.*packing: rows.*sdpa, jnana_packed".replace("|", "[|]")
    with pytest.raises(ValueError, match=message):
        attention.check_attention(implementation, "rows")
    for known in (None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "jnana_packed"):
        attention.check_attention(known, "rows")
    model = join(tmp_path)
    model.model.language_model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=message.replace("rows", "shared_image")):
        attention.choose_attention(model, "shared_image", CPU)
    assert attention.choose_attention(model, "none", CPU) == implementation


def test_only_packed_rows_of_flex_attention_are_padded_to_blocks():
    assert attention.row_multiple("flex_attention", "rows") == 128
    assert attention.row_multiple("flex_attention", "none") is None
    assert attention.row_multiple("jnana_packed", "shared_image") is None


def test_the_model_gets_what_suits_the_device(monkeypatch, tmp_path, caplog):
    model = join(tmp_path)
    problems = {CPU: "a CPU", GPU: None}
    tried = []
    monkeypatch.setattr(
        packed_attention_jnana, "varlen_problem", lambda device, *shape: tried.append(shape) or problems[device]
    )
    warned = []
    monkeypatch.setattr(packed_attention_jnana, "logger", SimpleNamespace(warning_once=warned.append))
    caplog.set_level("INFO")
    assert attention.choose_attention(model, "none", GPU) == of_text(model) == "sdpa"
    for device, name in ((CPU, "jnana_packed"), (GPU, "jnana_packed_varlen")):
        model.set_attn_implementation("sdpa")
        assert attention.choose_attention(model, "shared_image", device) == of_text(model) == name
        assert caplog.messages[-1] == f"attention of packed rows: {name}"
    assert tried == [(4, 4, 16, False)] * 2 and not warned
    problems[GPU] = "it is too old"
    model.set_attn_implementation("sdpa")
    assert attention.choose_attention(model, "rows", GPU) == of_text(model) == "jnana_packed"
    assert warned == ["attention of packed rows: one call for each piece, because it is too old"]
    for asked in ("eager", "flex_attention", "jnana_packed"):  # the recipe's choice stays
        model.set_attn_implementation(asked)
        assert attention.choose_attention(model, "rows", GPU) == of_text(model) == asked


def test_rows_of_documents_are_not_dispatched():
    for packing, dispatch in (("rows", None), ("rows", False), ("blocks", True)):
        attention.check_documents(packing, dispatch)
    with pytest.raises(ValueError, match="dispatch_batches is true.*packing: rows.*leave it out, or set packing: bl"):
        attention.check_documents("rows", True)


def test_the_collator_of_documents():
    model = AutoModelForCausalLM.from_config(tiny_text_config("phi"))
    assert attention.text_collator(model, "blocks", CPU) is default_data_collator
    assert model.config._attn_implementation == "sdpa"
    assert attention.text_collator(model, "rows", CPU) is collate_documents
    assert model.config._attn_implementation == "jnana_packed"
    assert attention.text_collator(model, "rows", CPU) is collate_documents
    model.set_attn_implementation("eager")
    assert attention.text_collator(model, "rows", CPU) is default_data_collator
    model.set_attn_implementation("sdpa")
    model.config.model_type = "gpt2"
    assert attention.text_collator(model, "rows", CPU) is default_data_collator
    assert model.config._attn_implementation == "sdpa"
