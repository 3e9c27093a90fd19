"""Building a pair: embeddings grown only when needed, special tokens for generate, what is refused or warned about."""

import pytest
import torch

from processing import JnanaProcessor, tokenizer_fingerprint
from tests.tiny import save_tiny_text, save_tiny_vision, tiny_tokenizer
from training.loading import build_pair, check_text_tokenizer, load_processor, write_base_reference


ENTRIES = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return str(save_tiny_vision(tmp_path_factory.mktemp("vision"), "clip"))


def build(vision, text):
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
    return build_pair(vision, text, processor, vision_feature_layer=-1), processor


def test_an_embedding_with_room_stays_as_it_is(vision, tmp_path):
    model, processor = build(vision, str(save_tiny_text(tmp_path)))  # 320 rows, as Phi-2 has more rows than entries
    assert len(processor.tokenizer) == ENTRIES + 2
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 320


@pytest.mark.parametrize("kind", ["phi", "llama", "qwen2"])
def test_a_full_embedding_grows_by_what_is_needed(vision, tmp_path, kind):
    text = str(save_tiny_text(tmp_path, kind, vocab_size=ENTRIES))
    model, processor = build(vision, text)
    rows = len(processor.tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
    assert model.config.text_config.vocab_size == rows == ENTRIES + 2
    again, _ = build(vision, text)  # an adapter's base is built a second time
    for name, tensor in model.state_dict().items():
        assert "projector" in name or torch.equal(again.state_dict()[name], tensor), name
    head = model.get_output_embeddings()
    torch.testing.assert_close(head.weight[ENTRIES], head.weight[:ENTRIES].mean(0))
    assert (head.weight is model.get_input_embeddings().weight) == (kind == "qwen2")


def test_generate_knows_the_tokens(vision, tmp_path):
    folder = save_tiny_text(tmp_path, eos_token_id=[7, 0])  # a chat model's second way to end
    model, processor = build(vision, str(folder))
    generation = model.generation_config
    assert generation.pad_token_id == processor.tokenizer.pad_token_id != generation.eos_token_id[0]
    assert generation.eos_token_id == [0, 7]
    assert generation.suppress_tokens == [processor.image_token_id]


def test_a_pair_remembers_its_tokenizer(vision, tmp_path):
    """Hub models have no fingerprint; the pair gets that of the tokenizer which the checkpoint ships."""
    model, processor = build(vision, str(save_tiny_text(tmp_path)))
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(tiny_tokenizer())
    assert model.config.tokenizer_fingerprint == tokenizer_fingerprint(processor.tokenizer, ENTRIES)


def test_a_checkpoint_without_tokenizer_is_only_warned_about(tmp_path, caplog):
    folder = save_tiny_text(tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    assert check_text_tokenizer(str(folder), tiny_tokenizer(), "elsewhere") is None
    assert "ships no tokenizer, so 'elsewhere' cannot be compared" in caplog.text


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is not a Jnana checkpoint: it has no processor_config.json"):
        load_processor(str(tmp_path))


def test_a_hub_base_stays_a_name(tmp_path):
    names = {"vision_model": "openai/clip-vit-base-patch32", "text_model": "microsoft/phi-2"}
    write_base_reference({"names": names, "projector_fields": {"projector_type": "mlp"}}, tmp_path)
    assert '"relative_paths": {}' in (tmp_path / "jnana_base.json").read_text()
