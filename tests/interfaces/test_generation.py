"""Generation beyond greedy decoding, offloaded weights and quantised layers: tokens equal stock LLaVA's."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForImageTextToText, GenerationConfig, QuantoConfig, TorchAoConfig
from transformers.generation import ContinuousBatchingConfig

from tests.interfaces.conftest import picture


@pytest.fixture
def expected(stock, ours) -> list[int]:
    answer = stock.answer()
    assert ours.answer() == answer
    other = ours.inputs()
    other["pixel_values"] = -other["pixel_values"]  # negative control: the answer depends on the image
    assert ours.model.generate(**other, max_new_tokens=8, do_sample=False)[0, -8:].tolist() != answer
    return answer


@pytest.mark.client("generate: static cache", note="")
def test_a_static_cache(stock, ours, expected):
    assert stock.answer(cache_implementation="static") == ours.answer(cache_implementation="static") == expected


@pytest.mark.client("generate: quantised cache", note="optimum-quanto, HQQ")
@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_a_quantised_cache(stock, ours, backend, package):
    pytest.importorskip(package)
    settings = {"backend": backend, "nbits": 4, "q_group_size": 8, "residual_length": 4}
    settings |= {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    answers = [
        side.answer(cache_implementation="quantized", cache_config=settings, max_new_tokens=16)
        for side in (stock, ours)
    ]
    assert answers[0] == answers[1]


@pytest.mark.client("generate: beam search", note="")
def test_beam_search(stock, ours):
    assert stock.answer(num_beams=3) == ours.answer(num_beams=3)


@pytest.mark.client("generate: assisted decoding", note="the assistant model encodes the image by itself")
def test_the_assistant_model_sees_the_image(stock, ours, expected):
    """Stock's assistant reads the image tokens' own embeddings. Ours proposes what the model would answer."""
    draft = copy.deepcopy(ours.model)
    seen = []
    draft.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    assert stock.answer(assistant_model=copy.deepcopy(stock.model)) == expected
    assert ours.answer(assistant_model=draft) == expected
    inputs = ours.inputs()
    ids = inputs["input_ids"][0]
    places = ids == ours.model.config.image_token_id
    vectors = ours.model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    prompt = seen[0][0][: len(ids)]
    torch.testing.assert_close(prompt[places], vectors)
    # Negative control: the image token's own embedding is another vector.
    assert not torch.allclose(prompt[places], ours.model.get_input_embeddings()(ids[places]))


def test_an_assistant_and_chunks_of_the_prompt_are_refused_together(ours):
    with pytest.raises(ValueError, match="`prefill_chunk_size` and an `assistant_model` that sees images"):
        ours.answer(assistant_model=copy.deepcopy(ours.model), prefill_chunk_size=3)


@pytest.mark.client("generate: prompt lookup", note="works where stock LLaVA raises")
def test_prompt_lookup(stock, ours, expected):
    assert ours.answer(prompt_lookup_num_tokens=2) == expected
    try:
        assert stock.answer(prompt_lookup_num_tokens=2) == expected
    except ValueError as error:  # transformers gives the images again with later steps
        assert "do not match" in str(error)


@pytest.mark.client("generate: custom_generate directory", note="needs trust_remote_code")
def test_a_local_custom_generate(stock, ours, expected, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(
        "def generate(model, input_ids=None, pixel_values=None, **kwargs):\n"
        "    return model(input_ids=input_ids, pixel_values=pixel_values).logits[:, -1].argmax(-1)\n"
    )
    settings = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    for side in (stock, ours):
        assert side.model.generate(**side.inputs(), **settings).tolist() == expected[:1]


@pytest.mark.client("forward: text alone", note="as exporters call it; with labels, images are required")
def test_image_tokens_without_images_keep_their_own_embeddings(stock, ours):
    inputs = ours.inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [side.model(**text).logits for side in (stock, ours)]
        torch.testing.assert_close(*logits)
        # Negative control: with its image the text has other logits.
        assert not torch.allclose(logits[1], ours.model(**inputs).logits)
    with pytest.raises(ValueError, match="the images give 0 vectors"):  # it would train on a text without its image
        ours.model(**text, labels=text["input_ids"])
    with pytest.raises(ValueError, match="the images give 0 vectors"):
        ours.model.generate(**text, max_new_tokens=1)


@pytest.mark.client("accelerate: cpu_offload, disk_offload", note="")
def test_accelerate_offload(stock, ours, expected, tmp_path):
    for side in (stock, ours):
        name = type(side.model).__name__
        assert side.answer(cpu_offload(copy.deepcopy(side.model), execution_device="cpu")) == expected
        offloaded = disk_offload(copy.deepcopy(side.model), tmp_path / name, execution_device="cpu")
        assert side.answer(offloaded) == expected


@pytest.mark.client("from_pretrained: device_map with disk offload", note="shards larger than max_memory")
def test_a_sharded_checkpoint_larger_than_memory(stock, ours, expected, tmp_path):
    for side in (stock, ours):
        folder = tmp_path / type(side.model).__name__
        side.model.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        memory = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 3 // 4
        model = AutoModelForImageTextToText.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload" / folder.name
        )
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        assert side.answer(model) == expected


@pytest.mark.client("torch.ao: dynamic quantisation", note="")
def test_dynamic_quantisation(stock, ours):
    quantised = [
        torch.ao.quantization.quantize_dynamic(copy.deepcopy(side.model), {torch.nn.Linear}, dtype=torch.qint8)
        for side in (stock, ours)
    ]
    projector = quantised[1].model.multi_modal_projector
    assert not any(weight.is_floating_point() for weight in projector.parameters())
    assert stock.answer(quantised[0]) == ours.answer(quantised[1])


@pytest.mark.client("from_pretrained: torchao, quanto", note="weights of the language model in 8 bits")
@pytest.mark.parametrize("method", ["torchao", "quanto"])
def test_quantised_at_loading(stock, ours, method):
    """The logits of both sides are equal, and differ from those of the unquantised weights."""
    pytest.importorskip({"quanto": "optimum.quanto"}.get(method, method))
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = QuantoConfig(weights="int8")
    found = []
    for side in (stock, ours):
        model = AutoModelForImageTextToText.from_pretrained(
            side.folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        inputs = side.inputs()
        with torch.no_grad():
            found.append(model(**inputs).logits)
            assert not torch.equal(found[-1], side.model(**inputs).logits)
        assert len(side.answer(model)) == 8
    torch.testing.assert_close(*found)


@pytest.mark.client("vLLM-like forward: inputs_embeds", note="vLLM itself is not tested")
def test_no_tower_call_while_decoding(stock, ours):
    for side in (stock, ours):
        calls = []
        side.model.model.vision_tower.register_forward_hook(lambda *arguments, calls=calls: calls.append(1))
        side.answer()
        assert calls == [1]
        embeds = side.model.get_input_embeddings()(torch.tensor([[5]]))
        side.model(inputs_embeds=embeds)
        assert calls == [1]
        side.model(**side.inputs())
        assert calls == [1, 1]  # the control


def with_images(number: int, text: str = "what?") -> list[dict]:
    """A chat with several images."""
    images = [{"type": "image", "image": picture(seed)} for seed in range(number)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def encoded(side, chats: list, **settings) -> dict:
    return side.processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
    )


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.client("generate: beam search, several images", note="")
def test_beam_search_with_several_images(stock, ours):
    answers = []
    for side in (stock, ours):
        inputs = encoded(side, [with_images(2)])
        # ours never generates an image token, which stock may
        settings = {**GREEDY, "num_beams": 3, "suppress_tokens": [side.processor.image_token_id]}
        answers.append(side.model.generate(**inputs, **settings).tolist())
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)  # the control: in another order
        assert side.model.generate(**inputs, **settings).tolist() != answers[-1]
    assert answers[0] == answers[1]


@pytest.mark.client("generate: left padding", note="rows of two, one and no images")
def test_left_padding_with_different_numbers_of_images(stock, ours):
    found = []
    for side in (stock, ours):
        chats = [with_images(number) for number in (2, 1, 0)]
        padded = encoded(side, chats, processor_kwargs={"padding": True, "padding_side": "left"})
        assert padded["attention_mask"][2, 0] == 0
        settings = {**GREEDY, "suppress_tokens": [side.processor.image_token_id]}
        tokens = side.model.generate(**padded, **settings)[:, -6:]
        single = [side.model.generate(**encoded(side, [chat]), **settings)[0, -6:] for chat in chats]
        assert torch.equal(tokens, torch.stack(single))
        found.append(tokens.tolist())
    assert found[0] == found[1]


@pytest.mark.client("generate: inputs_embeds", note="with the image vectors in their places")
def test_from_embeddings(stock, ours, expected):
    for side in (stock, ours):
        inputs = side.inputs()
        places = inputs["input_ids"] == side.processor.image_token_id
        with torch.no_grad():
            embeds = side.model.get_input_embeddings()(inputs["input_ids"])
            vectors = torch.cat(list(side.model.model.get_image_features(inputs["pixel_values"]).pooler_output))
            joined = embeds.masked_scatter(places.unsqueeze(-1), vectors)
        settings = {"attention_mask": inputs["attention_mask"], "max_new_tokens": 8, "do_sample": False}
        assert side.model.generate(inputs_embeds=joined, **settings)[0].tolist() == expected
        assert side.model.generate(inputs_embeds=embeds, **settings)[0].tolist() != expected  # the control


@pytest.mark.client("generate_batch: continuous batching", note="text alone: transformers' own takes token ids only")
def test_continuous_batching_of_texts(stock, ours):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1)
    batching = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64, page_size=32, use_cuda_graph=False)
    found = []
    for side in (stock, ours):
        side.model.generation_config.suppress_tokens = None  # ours suppresses image tokens, stock does not
        outputs = side.model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=batching, warmup=False
        )
        found.append([output.generated_tokens for output in outputs.values()])
        single = [
            side.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
            for prompt in prompts
        ]
        assert found[-1] == [tokens[0, len(prompt) :].tolist() for tokens, prompt in zip(single, prompts, strict=True)]
    assert found[0] == found[1] and found[0][0] != found[0][1]
