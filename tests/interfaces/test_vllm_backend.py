"""vLLM's transformers backend, in a double (`vllm_double.py`): it builds, loads and asks a checkpoint as vLLM does."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jnana.processing import JnanaProcessor, add_jnana_tokens, chat_template_names, read_chat_template
from jnana.training.loading import load_model
from tests.export.models import save_model
from tests.interfaces.vllm_double import VllmDouble, content_format, one_string_ids
from tests.processing.chats import add_format_tokens, llama_like_tokenizer
from tests.tiny import CORPUS, tiny_image_processor, tiny_tokenizer


NEW_TOKENS = 6
MODELS = {
    "phi": {"text": "phi"},
    "phi3": {"text": "phi3"},
    "gpt_neox": {"text": "gpt_neox"},
    "llama": {"text": "llama", "vision": "siglip"},
    "mistral": {"text": "mistral", "projector_type": "resblock"},
    "qwen2": {"text": "qwen2", "vision": "dinov2", "vision_feature_layer": -1},
    "qwen3": {"text": "qwen3", "projector_type": "linear"},
    "pooled": {"text": "phi", "vision": "clip_full", "vision_feature_select_strategy": "pooled"},
    "tiles": {"text": "llama", "geometry": "anyres"},
    "perceiver": {"text": "llama", "projector_type": "perceiver"},
    "pixel_shuffle": {"text": "llama", "projector_type": "pixel_shuffle"},
    "avg_pool": {"text": "llama", "projector_type": "avg_pool"},
}


def picture(seed: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def question(text: str, *images: Image.Image) -> list[dict]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


CHATS = {
    "one image": question("what is this?", picture(0, 24, 24)),
    "no image": question("why?"),
    "two images": question("which is the king?", picture(1, 30, 70), picture(2, 60, 61)),
    "another": question("what is this?", picture(3, 24, 24)),
}


def save(folder, **fields) -> str:
    path = save_model(folder, **{"vision_feature_layer": -2, **fields})
    if fields.get("text") == "phi":  # a new Phi's head has a bias of zeros
        model, _ = load_model(path)
        torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(path)
    return path


def answers(path: str, chats: dict) -> dict[str, list[int]]:
    """What transformers answers to each chat alone."""
    model, processor = load_model(path)
    found = {}
    for name, chat in chats.items():
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        model.generation_config.suppress_tokens = None  # vLLM does not know it
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
        found[name] = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
    return found


@pytest.mark.client("vLLM's transformers backend", note="in a double of it: vLLM itself can't be installed here")
@pytest.mark.parametrize("name", MODELS)
def test_requests_that_run_together_are_answered_as_alone(tmp_path, name, monkeypatch):
    path = save(tmp_path, **MODELS[name])
    expected = answers(path, CHATS)
    assert len({tuple(answer) for answer in expected.values()}) == len(CHATS)  # each depends on its image or question
    # vLLM initialises it, with as many processes as GPUs
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    served = VllmDouble(tmp_path / "model")
    seen = []
    served.model.vision_tower.register_forward_hook(lambda *arguments: seen.append(1))
    assert served.generate(CHATS, NEW_TOKENS) == expected
    assert len(seen) == 3  # once for each request with images, and never while decoding
    assert [instance.calls for instance in served.instances.values()] == [NEW_TOKENS] * len(served.instances)
    assert served.model.get_encoder(modality="image") is served.model.vision_tower
    assert served.model.get_decoder() is served.model.language_model


def test_the_bias_of_the_head_counts(tmp_path):
    """Negative control: without it Phi answers otherwise."""
    path = save(tmp_path, **MODELS["phi"])
    served = VllmDouble(tmp_path / "model")
    served.head.bias.data.zero_()
    assert served.generate(CHATS, NEW_TOKENS) != answers(path, CHATS)


def test_the_double_sees_wrong_weights_and_other_images(tmp_path):
    save(tmp_path, **MODELS["llama"])
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    renamed = {name.replace("multi_modal_projector", "projector"): weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no module or parameter named 'projector\.linear_1"):
        VllmDouble(tmp_path / "model")
    save_file({name: w for name, w in weights.items() if "linear_2.bias" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not initialized from checkpoint: .*linear_2.bias"):
        VllmDouble(tmp_path / "model")
    save_file(weights, file, metadata={"format": "pt"})
    served = VllmDouble(tmp_path / "model")
    right = served.generate(CHATS, NEW_TOKENS)
    other = VllmDouble(tmp_path / "model")
    other.embed_images = lambda fields, embed=other.embed_images: [-vectors for vectors in embed(fields)]
    wrong = other.generate(CHATS, NEW_TOKENS)
    assert wrong["no image"] == right["no image"] and wrong["one image"] != right["one image"]


def test_the_config_names_a_class_that_takes_the_backend(tmp_path):
    save(tmp_path, **MODELS["llama"])
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"} <= set(config["auto_map"])
    assert config["architectures"] == ["JnanaForConditionalGeneration"]
    served = VllmDouble(tmp_path / "model")
    assert type(served.model).__name__ == config["auto_map"]["AutoModel"].rsplit(".", 1)[1]
    assert served.model.is_backend_compatible()


def test_an_image_token_without_a_row_is_looked_up_beyond_the_table(tmp_path):
    """What docs/exports.md says of such a model: transformers takes it, vLLM needs the row."""
    path = save(tmp_path, **MODELS["llama"])
    model, processor = load_model(path)
    model.resize_token_embeddings(processor.image_token_id, mean_resizing=False)
    model.config.text_config.vocab_size = processor.image_token_id
    model.save_pretrained(path)
    assert len(answers(path, CHATS)) == len(CHATS)
    with pytest.raises(IndexError):
        VllmDouble(tmp_path / "model").generate(CHATS, NEW_TOKENS)


@pytest.mark.parametrize("name", ["llama", "phi", "pooled", "tiles", "perceiver", "pixel_shuffle", "qwen2"])
def test_token_counts_before_the_images_are_processed(tmp_path, name):
    """Images of every shape, two in one call; and 10,000 x 10,000 pixels, of which vLLM makes its profile."""
    save(tmp_path, **MODELS[name])
    processor = JnanaProcessor.from_pretrained(tmp_path / "model")
    sizes = [(24, 24), (31, 90), (100, 40), (61, 60)]
    images = [picture(seed, *size) for seed, size in enumerate(sizes)]
    counts = processor._get_num_multimodal_tokens(image_sizes=sizes)
    called = processor(text=processor.image_token * len(images), images=images, return_text_replacement_offsets=True)
    replacements = [entry["replacement"] for entry in called["text_replacement_offsets"][0]]
    assert [text.count(processor.image_token) for text in replacements] == list(counts["num_image_tokens"])
    assert called["input_ids"][0].count(processor.image_token_id) == sum(counts["num_image_tokens"])
    assert sum(counts["num_image_patches"]) == len(called["pixel_values"])
    assert set(called) - {"input_ids", "attention_mask", "text_replacement_offsets"} <= set(
        processor.image_processor.model_input_names
    )
    largest = processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],))
    square = processor._get_num_multimodal_tokens(image_sizes=[(1000, 1000)])
    assert largest["num_image_tokens"] == square["num_image_tokens"] and largest["num_image_tokens"][0] > 0
    model, _ = load_model(str(tmp_path / "model"))
    inputs = processor(text=processor.image_token * len(images), images=images, return_tensors="pt")
    fields = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    vectors = model.model.get_image_features(**fields).pooler_output
    assert [len(rows) for rows in vectors] == list(counts["num_image_tokens"])


# ---------------------------------------------------------------------- a chat as one string


def qwen_like_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind Qwen's split into words and single digits and its normaliser, without a first token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "yes.\nno\n\nUSER:\n", "?\n!\n.\n:\n"] * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    return fast


TOKENIZERS = {
    "phi-2": tiny_tokenizer,
    "llama": lambda: llama_like_tokenizer(across_words=False),
    "qwen": qwen_like_tokenizer,
}
IMAGE = {"type": "image", "image": Image.new("RGB", (30, 24), "red")}
TURNS = [
    [{"role": "user", "content": [IMAGE, {"type": "text", "text": "how many pieces are there"}]}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "how many pieces are there?"}]},
        {"role": "assistant", "content": "three, a king and two rooks."},
        {"role": "user", "content": "isn't it a black rook?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "and 2 of them?"}]},
    ],
    [
        {"role": "user", "content": [IMAGE, IMAGE]},
        {"role": "assistant", "content": "a 2nd picture"},
        {"role": "user", "content": "why"},
    ],
    [{"role": "user", "content": "what do you see"}],
]


def make_processor(template: str, tokenizer) -> JnanaProcessor:
    tokenizer = add_format_tokens(tokenizer, template)
    add_jnana_tokens(tokenizer)
    return JnanaProcessor(
        tiny_image_processor(),
        tokenizer,
        patch_size=12,
        num_additional_image_tokens=1,
        chat_template=read_chat_template(template),
    )


@pytest.mark.parametrize("template", chat_template_names())
def test_parts_reach_every_template(template):
    """Or vLLM joins a message's text and drops its images."""
    assert content_format(read_chat_template(template)) == "openai"


def test_a_template_whose_parts_are_not_found():
    """The control: how the shipped templates named them before; and how vLLM's users can help themselves."""
    template = read_chat_template("jnana").replace("content -%}", "parts -%}").replace("set content", "set parts")
    assert content_format(template.replace("(content", "(parts").replace("if content", "if parts")) == "string"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", chat_template_names())
def test_a_chat_as_one_string_has_the_ids_of_our_encoding(template, kind):
    processor = make_processor(template, TOKENIZERS[kind]())
    for chat in TURNS:
        assert (
            one_string_ids(processor.tokenizer, processor.chat_template, chat)
            == (processor.encode_chats([chat], add_generation_prompt=True)[0][0])
        )
