"""Building a pair: embeddings grown only when needed, special tokens for generate, what is refused or warned about."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, Dinov2Config, TrainingArguments

from jnana.modeling import JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor, read_chat_template
from jnana.processing.data import tokenizer_fingerprint
from jnana.training.adapters import adapter_reference, write_base_reference
from jnana.training.loading import load_model, load_processor
from jnana.training.model_setup import (
    build_pair,
    check_text_tokenizer,
    prepare_model,
    prepare_processor,
    run_image_backend,
)
from jnana.training.options.arguments import LoraArguments, ModelArguments
from jnana.training.stages import apply_stage
from tests.processing.chats import instruct_tokenizer
from tests.tiny import (
    save_tiny_llava,
    save_tiny_text,
    save_tiny_vision,
    tiny_image_processor,
    tiny_tokenizer,
    tiny_vision_config,
)


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
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    pad, image = processor.tokenizer.pad_token_id, processor.image_token_id
    torch.testing.assert_close(head.weight[pad], head.weight[:ENTRIES].mean(0))
    torch.testing.assert_close(embedding.weight[image], embedding.weight[:ENTRIES].mean(0) * 17 / 16)
    assert (head.weight is embedding.weight) == (kind == "qwen2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_no_image_to_embeddings_alone(vision, tmp_path, dtype):
    text = str(save_tiny_text(tmp_path, vocab_size=ENTRIES))
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text)
    model = build_pair(vision, text, processor, dtype=dtype)
    pad, image = processor.tokenizer.pad_token_id, processor.image_token_id
    embeds = model.get_input_embeddings()(torch.tensor([[pad, pad, image, image, image, image, 5]]))
    mask = model.model.get_placeholder_mask(None, embeds, torch.zeros(4, embeds.shape[-1]))
    assert mask[0, :, 0].tolist() == [False, False, True, True, True, True, False]


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


def test_a_published_adapter_names_no_folder_of_this_machine(tmp_path):
    """A relative path to a near base is kept; for another base only its name is kept, and loading raises an error."""
    near, far, adapter = tmp_path / "runs/align", tmp_path / "secret/clip", tmp_path / "runs/a/b/sft"
    for folder in (near, far, adapter):
        folder.mkdir(parents=True)
    names = {"vision_model": str(far), "text_model": "gpt2"}
    write_base_reference({"names": {"model": str(near)}, "projector_fields": {}}, near.parent / "a", published=True)
    assert adapter_reference(str(near.parent / "a"))["names"] == {"model": str(near.parent / "a" / "../align")}
    write_base_reference({"names": names, "projector_fields": {}}, adapter, published=True)
    assert "secret" not in (adapter / "jnana_base.json").read_text()
    with pytest.raises(ValueError, match="was trained on vision_model 'clip', which is not a directory here"):
        adapter_reference(str(adapter))
    write_base_reference({"names": names, "projector_fields": {}}, adapter)  # the control
    assert adapter_reference(str(adapter))["names"]["text_model"] == "gpt2"


def test_an_adapter_in_a_subfolder(vision, tmp_path):
    model, _ = build(vision, str(save_tiny_text(tmp_path / "phi")))
    model.save_pretrained(tmp_path / "base")
    adapted = apply_stage(model, "sft", LoraArguments(lora_r=2, lora_target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    directory = tmp_path / "runs" / "sft"
    adapted.save_pretrained(directory)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    write_base_reference({"names": {"model": str(tmp_path / "base")}, "projector_fields": {}}, directory)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(ids).logits
        loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "runs", subfolder="sft")
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-6, rtol=1e-5)
        base = JnanaForConditionalGeneration.from_pretrained(tmp_path / "base")
        assert not torch.allclose(base(ids).logits, expected, atol=1e-3)  # negative control


def test_nothing_saved_names_the_backbones_folders(vision, tmp_path):
    model, _ = build(vision, str(save_tiny_text(tmp_path / "phi")))
    model.save_pretrained(tmp_path / "pair")
    assert str(tmp_path) not in (tmp_path / "pair/config.json").read_text() and vision not in str(model.config)
    checkpoint = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    adapted = apply_stage(checkpoint, "sft", LoraArguments(lora_r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    for file in ("adapter_config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "adapter" / file).read_text(), file


def test_model_and_processor_that_count_an_image_differently(vision, tmp_path):
    model, processor = build(vision, str(save_tiny_text(tmp_path / "phi")))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "pair")
    load_model(str(tmp_path / "pair"))  # the control
    processor.image_processor.size = processor.image_processor.crop_size = {"height": 48, "width": 48}
    processor.save_pretrained(tmp_path / "pair")
    message = "the processor in .*pair writes 16 image tokens an image, but the model in .*pair gives 4 vectors"
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "pair"))
    with pytest.raises(ValueError, match="16 image tokens an image, but .* gives 4"):
        build_pair(vision, str(tmp_path / "phi"), processor)


def test_dinov2_takes_the_size_its_image_processor_gives(tmp_path):
    """Published DINOv2 checkpoints say 518 pixels and come with an image processor that gives 224."""
    vision = tmp_path / "dinov2"
    AutoModel.from_config(
        Dinov2Config(**{**tiny_vision_config("dinov2").to_dict(), "image_size": 36})
    ).save_pretrained(vision)
    tiny_image_processor().save_pretrained(vision)  # 24 pixels: 2 x 2 patches of 12
    text = str(save_tiny_text(tmp_path / "text"))
    processor = prepare_processor(ModelArguments(vision_model=str(vision), text_model=text))
    model = build_pair(str(vision), text, processor)
    assert (model.config.image_size, model.config.image_seq_length) == (24, 4)
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (50, 40))}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    before = model(**inputs).logits
    model.save_pretrained(tmp_path / "pair")
    processor.save_pretrained(tmp_path / "pair")
    again, _ = load_model(str(tmp_path / "pair"))
    torch.testing.assert_close(again(**inputs).logits, before, rtol=0, atol=0)


def test_clip_takes_its_own_size_only(vision, tmp_path):
    with pytest.raises(ValueError, match="`image_size` is 36"):
        JnanaForConditionalGeneration.from_vision_text_pretrained(
            vision, str(save_tiny_text(tmp_path)), image_token_id=300, image_size=36
        )


def test_a_checkpoint_of_another_type(vision, tmp_path):
    _, processor = build(vision, str(save_tiny_text(tmp_path)))
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a Jnana checkpoint: its config.json says model_type 'phi'"):
        load_model(str(tmp_path))


def test_a_run_that_was_cut_off_names_its_checkpoints(tmp_path):
    (tmp_path / "checkpoint-40").mkdir()
    with pytest.raises(ValueError, match=r"Its run was cut off: take one of \['checkpoint-40'\]"):
        load_processor(str(tmp_path))


@pytest.mark.parametrize("trust", [True, False])
def test_trust_reaches_the_backbones_own_classes(vision, tmp_path, monkeypatch, trust):
    """Ours need none; a third-party tokenizer, image processor or config does."""
    text = str(save_tiny_text(tmp_path))
    asked = []
    for auto in (AutoConfig, AutoTokenizer, AutoImageProcessor):
        original = auto.from_pretrained

        def spy(*args, original=original, **kwargs):
            asked.append(kwargs.get("trust_remote_code", False))
            return original(*args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", spy)
    processor = prepare_processor(ModelArguments(vision_model=vision, text_model=text, trust_remote_code=trust))
    build_pair(vision, text, processor, trust_remote_code=trust)
    processor.save_pretrained(tmp_path / "pair")
    load_processor(str(tmp_path / "pair"), trust)
    assert len(asked) >= 8 and set(asked) == {trust}


@pytest.mark.parametrize("installed", [False, True])
def test_the_library_that_resizes_images_is_chosen_once(vision, tmp_path, monkeypatch, caplog, installed):
    monkeypatch.setattr("jnana.training.model_setup.is_torchvision_available", lambda: installed)
    text = str(save_tiny_text(tmp_path / "text"))
    pair = {"vision_model": vision, "text_model": text}
    preferred = "torchvision" if installed else "pil"
    assert run_image_backend(ModelArguments(**pair)) == preferred
    assert run_image_backend(ModelArguments(**pair, image_backend="pil")) == "pil"
    if installed:
        assert run_image_backend(ModelArguments(**pair, image_backend="torchvision")) == "torchvision"
    else:
        with pytest.raises(ValueError, match="image_backend is 'torchvision', which can't be imported here"):
            run_image_backend(ModelArguments(**pair, image_backend="torchvision"))
    prepare_processor(ModelArguments(**pair, image_backend="pil")).save_pretrained(tmp_path / "pair")
    recorded = json.loads((tmp_path / "pair" / "processor_config.json").read_text())
    assert recorded["image_backend"] == "pil"
    start = ModelArguments(model_name_or_path=str(tmp_path / "pair"))
    assert run_image_backend(start) == "pil"  # as it was trained
    for record, chosen in (("torchvision", preferred), (None, preferred)):  # older checkpoints have no record
        changed = {name: value for name, value in recorded.items() if name != "image_backend"}
        changed |= {} if record is None else {"image_backend": record}
        (tmp_path / "pair" / "processor_config.json").write_text(json.dumps(changed))
        caplog.clear()
        assert run_image_backend(start) == chosen
        assert ("Pillow resizes them" in caplog.text) == (record == "torchvision" and not installed)


@pytest.mark.parametrize("asked", [None, "torchvision"])
def test_a_library_without_a_class_is_warned_about_where_it_was_asked_for(
    vision, tmp_path, monkeypatch, caplog, asked
):
    """transformers has no torchvision class for this image processor; Pillow resizes, and is what is recorded."""
    for module in ("training.model_setup", "processing.image_geometry_jnana"):
        monkeypatch.setattr(f"jnana.{module}.is_torchvision_available", lambda: True)
    monkeypatch.setattr("jnana.processing.image_geometry_jnana.backend_class", lambda name, backend: None)
    text = str(save_tiny_text(tmp_path / "text"))
    args = ModelArguments(vision_model=vision, text_model=text, image_backend=asked)
    chosen = run_image_backend(args)
    assert chosen == "torchvision"
    processor = prepare_processor(args, chosen)
    assert processor.image_backend == "pil"
    assert ("there is no such" in caplog.text) == (asked is not None)
    processor.save_pretrained(tmp_path / "pair")
    assert json.loads((tmp_path / "pair" / "processor_config.json").read_text())["image_backend"] == "pil"


def test_a_machine_that_lacks_the_library_of_the_run_raises(vision, tmp_path, monkeypatch):
    """The first process chose torchvision; without it Pillow would give this machine other pixels."""
    monkeypatch.setattr("jnana.training.model_setup.is_torchvision_available", lambda: False)
    args = ModelArguments(vision_model=vision, text_model=str(save_tiny_text(tmp_path / "text")))
    assert prepare_processor(args, "pil").image_backend == "pil"
    with pytest.raises(ValueError, match=r"'torchvision', which can't be imported on .*; install .* on each machine"):
        prepare_processor(args, "torchvision")


# ---------------------------------------------------------------------- chat templates


def save_instruct_text(folder, name: str, **changes):
    """A language model checkpoint whose tokenizer ships a chat template of a known format; its folder."""
    text = save_tiny_text(folder, **{"vocab_size": 512, **changes})
    tokenizer = instruct_tokenizer(name)
    tokenizer.chat_template = read_chat_template(name)
    tokenizer.save_pretrained(text)
    return str(text)


def test_an_instruct_model_keeps_its_chat_format(vision, tmp_path):
    text = save_instruct_text(tmp_path / "smollm2", "smollm2")
    arguments = {"vision_model": vision, "text_model": text}
    assert prepare_processor(ModelArguments(**arguments)).chat_template == read_chat_template("smollm2")
    named = prepare_processor(ModelArguments(**arguments, chat_template="jnana"))
    assert named.chat_template == read_chat_template("jnana")
    base = ModelArguments(vision_model=vision, text_model=str(save_tiny_text(tmp_path / "base")))
    assert prepare_processor(base).chat_template == read_chat_template("jnana")


def test_generate_stops_at_the_templates_end_token(vision, tmp_path):
    """Phi-3.5's answers end in `<|end|>`; its tokenizer's end token is another one."""
    text = save_instruct_text(tmp_path, "phi3", vocab_size=576)
    processor = prepare_processor(ModelArguments(vision_model=vision, text_model=text))
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model = build_pair(vision, text, processor)
    assert set(model.generation_config.eos_token_id) >= {tokenizer.eos_token_id, end}
    assert tokenizer.eos_token == "<|endoftext|>" and end != tokenizer.eos_token_id
    processor.chat_template = read_chat_template("jnana")
    ends = build_pair(vision, text, processor).generation_config.eos_token_id
    assert end not in ([ends] if isinstance(ends, int) else ends)


def test_a_checkpoint_goes_on_with_another_template(vision, tmp_path):
    text = save_instruct_text(tmp_path / "text", "phi3", vocab_size=576)
    processor = prepare_processor(ModelArguments(vision_model=vision, text_model=text, chat_template="jnana"))
    build_pair(vision, text, processor).save_pretrained(tmp_path / "pair")
    processor.save_pretrained(tmp_path / "pair")
    args = ModelArguments(model_name_or_path=str(tmp_path / "pair"), chat_template="phi3")
    model = prepare_model(args, prepare_processor(args))
    assert processor.tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
    args = ModelArguments(model_name_or_path=str(tmp_path / "pair"), chat_template="llama3")
    with pytest.raises(ValueError, match=r"chat_template 'llama3' writes '<\|eot_id\|>' between an answer"):
        prepare_processor(args)


def test_the_model_computes_its_loss_by_liger_if_asked_to(vision, tmp_path):
    args = ModelArguments(vision_model=vision, text_model=str(save_tiny_text(tmp_path / "text")))
    for options, expected in (
        ({}, False),
        ({"use_liger_kernel": True}, True),
        ({"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}, False),
    ):
        training_args = TrainingArguments(output_dir=tmp_path / "out", use_cpu=True, **options)
        assert prepare_model(args, prepare_processor(args), training_args).use_liger_kernel is expected


def test_a_published_checkpoint_of_another_chat_format_is_refused(tmp_path):
    folder = save_tiny_llava(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    with pytest.raises(ValueError, match="marks no answers, so put"):
        prepare_processor(ModelArguments(model_name_or_path=str(folder)))
    args = ModelArguments(model_name_or_path=str(folder), chat_template="vicuna")
    processor = prepare_processor(args)
    assert processor.chat_template == read_chat_template("vicuna")
    assert prepare_model(args, processor).generation_config.eos_token_id == processor.tokenizer.eos_token_id
